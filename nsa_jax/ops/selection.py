"""Which blocks a query reads: importance (Eq. 8-10) and top-n (Eq. 11).

And what full attention reads of each block, which selectors can be compared
with or trained on.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from nsa_jax import _checks, dispatch, geometry
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.ops.branches import attend_branch, check_compressed
from nsa_jax.ops.scope import Scope, keep, make_scope
from nsa_jax.sharding import Layout, partitioned
from nsa_jax.typing import Array, Implementation
from nsa_jax.xla.attention import first_candidates, top_n
from pallas_kernels.interface import Spec

# V of a call of which only lse is used: the fewest numbers that "xla" and
# "triton" take, so that the product with them costs little.
_FEW = 16


@partitioned()
def block_scores(
  query: ArrayLike,
  compressed_key: ArrayLike,
  lse: ArrayLike,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array:
  """Importance of every selection block (Eq. 8-10), for study and tests.

  Takes O(T M) memory; `select_blocks` does not.

  Args:
    query: [B, T, N, H].
    compressed_key: [B, C, K, H]; C = num_compressed_blocks(key_length).
    lse: [B, T, N], from `compressed_attention` with the same arguments.
    config: the block lengths and the stride are read.
    key_length: S, static: the number of tokens the blocks were made from.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`: int32 [B, S], per token.
    query_segment_ids: as in `native_sparse_attention`.
    implementation: as in `native_sparse_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    [B, T, K, M], float32 (float64 for float64): the attention probabilities of
    the compressed blocks, weighted by their overlap with each selection block
    in units of the stride, summed over the heads of a group.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, block_scores, compressed_attention
    >>> query, blocks = jnp.ones((1, 64, 2, 8)), jnp.ones((1, 3, 1, 8))
    >>> config = NSAConfig()
    >>> _, lse = compressed_attention(
    ...   query, blocks, blocks, config=config, key_length=64
    ... )
    >>> block_scores(query, blocks, lse, config=config, key_length=64).shape
    (1, 64, 1, 1)
  """
  query, compressed_key, lse, spec, scope = _inputs(
    query, compressed_key, lse, config, key_length, scale, query_offset,
    segment_ids, query_segment_ids,
  )  # fmt: skip
  arrays, index = (query, compressed_key, lse), (None, scope.queries)
  run = dispatch.choose("block_scores", implementation, spec, arrays, index)
  return keep(run(), scope.valid_queries)


@partitioned()
def select_blocks(
  query: ArrayLike,
  compressed_key: ArrayLike,
  lse: ArrayLike,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array:
  """The n blocks each query reads (Eq. 8-11), the same for a whole group.

  The first `num_initial` blocks of the sequence (or segment) and the
  `num_local` blocks ending at the query's own are always chosen (forced); the
  remaining slots go to the largest importance scores, ties to the lower index.
  No gradient passes through.

  Args:
    query: [B, T, N, H].
    compressed_key: [B, C, K, H]; C = num_compressed_blocks(key_length).
    lse: [B, T, N], from `compressed_attention` with the same arguments.
    config: the algorithm's hyper-parameters; all but `window` are read.
    key_length: as in `block_scores`.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`: int32 [B, S], per token.
    query_segment_ids: as in `native_sparse_attention`.
    tiles: tile sizes of the kernels, a `SelectionTiling`; None for the
      heuristic.
    implementation: as in `native_sparse_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    int32 [B, T, K, n]: block ids strictly ascending, then -1.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compressed_attention, select_blocks
    >>> query, blocks = jnp.ones((1, 128, 2, 8)), jnp.ones((1, 7, 1, 8))
    >>> config = NSAConfig(num_selected=4)
    >>> _, lse = compressed_attention(
    ...   query, blocks, blocks, config=config, key_length=128
    ... )
    >>> ids = select_blocks(query, blocks, lse, config=config, key_length=128)
    >>> ids[0, 100, 0].tolist()
    [0, 1, -1, -1]
  """
  query, compressed_key, lse, spec, scope = _inputs(
    query, compressed_key, lse, config, key_length, scale, query_offset,
    segment_ids, query_segment_ids,
  )  # fmt: skip
  spec = spec._replace(tiles=tiles)
  return select(implementation, spec, query, compressed_key, lse, scope)


@partitioned()
def block_ids_from_scores(
  scores: ArrayLike,
  *,
  config: NSAConfig,
  key_length: int,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  layout: Layout | None = None,
) -> Array:
  """Valid block ids from any scores (Eq. 11), as a selector must return.

  The forced blocks are included, no block lies in the future or in another
  segment, and the remaining slots go to the largest scores, ties to the lower
  index. If a query has at most n candidates, all of them are chosen.

  Args:
    scores: [B, T, K, M], floating-point, M = num_selection_blocks(key_length).
      Any range; a NaN counts as the lowest score.
    config: `selection_block`, `num_selected`, `num_initial` and `num_local` are
      read.
    key_length: S, static: number of tokens of the keys.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`: int32 [B, S], per token.
    query_segment_ids: as in `native_sparse_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    int32 [B, T, K, n]: block ids strictly ascending, then -1. No gradient
    passes through.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, block_ids_from_scores
    >>> scores = jnp.array([3.0, 1.0, 2.0, 0.0]).reshape(1, 1, 1, 4)
    >>> config = NSAConfig(num_selected=3, num_initial=0, num_local=1)
    >>> ids = block_ids_from_scores(scores, config=config, key_length=256)
    >>> ids.tolist()  # the query is the last token
    [[[[0, 2, 3]]]]
  """
  check_config(config)
  key_length = _checks.static_int("key_length", key_length, minimum=1)
  scores = _checks.array("scores", scores, 4, "[B, T, K, M]")
  _checks.floating("scores", scores)
  _checks.not_empty("scores", scores)
  _checks.shape(
    "scores",
    scores,
    (None, None, None, geometry.num_selection_blocks(key_length, config)),
    "[B, T, K, M], M = num_selection_blocks of `key_length`="
    f"{key_length} and `config`",
  )
  scope = make_scope(
    scores,
    key_length,
    query_offset,
    segment_ids,
    query_segment_ids,
    alignment=config.selection_block,
    name="scores",
  )
  batch, length = scores.shape[:2]
  spec, queries = Spec(config, 1.0, key_length), scope.queries
  return top_n(
    spec,
    jax.lax.stop_gradient(scores),
    queries.positions(batch, length),
    queries.query_segments,
    first_candidates(spec, queries, batch, length),
  )


@partitioned()
def block_mass(
  query: ArrayLike,
  key: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array:
  """The share of full attention that each selection block holds.

      mass[j] = mean over the heads of a group of
                sum over tokens s <= t of block j of exp(scale q_t k_s - lse_t)

  That is Eq. 8-10 with compressed blocks of one token each, divided by G: what
  a learned selector is taught, and what any selector is compared with. Beside
  the result, which has T M entries, memory is linear in the length.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H], those of the selected branch.
    config: only `selection_block` is read.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`.
    query_segment_ids: as in `native_sparse_attention`.
    implementation: as in `native_sparse_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    [B, T, K, M], float32 (float64 for float64). Over the blocks it sums to 1;
    to 0 for a query that reads nothing. It is differentiable; a teacher's goes
    through `jax.lax.stop_gradient`.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, block_mass
    >>> query, key = jnp.ones((1, 96, 2, 8)), jnp.ones((1, 96, 1, 8))
    >>> mass = block_mass(query, key, config=NSAConfig())
    >>> print(mass[0, 79, 0].round(3))  # it reads 64 and 16 keys
    [0.8 0.2]
  """
  check_config(config)
  query = _checks.queries(query)
  key = _checks.keys("key", key, query, 1)
  scope = make_scope(
    query,
    key.shape[1],
    query_offset,
    segment_ids,
    query_segment_ids,
    alignment=config.selection_block,
  )
  # With compressed blocks of one token, importance is attention.
  tokens = NSAConfig(1, 1, config.selection_block)
  spec = Spec(tokens, _checks.scale(scale, query), key.shape[1])
  group = query.shape[2] // key.shape[2]
  arrays = scope.mask(query, key, key)
  _, lse = attend_branch(
    "compressed", implementation, spec, arrays, scope, reads_own=True
  )
  scored = (*arrays[:2], keep(lse, scope.valid_queries))
  index = None, scope.queries
  run = dispatch.choose("block_scores", implementation, spec, scored, index)
  return keep(run(), scope.valid_queries) / group


def select(
  implementation: Implementation,
  spec: Spec,
  query: Array,
  compressed_key: Array,
  lse: Array,
  scope: Scope,
) -> Array:
  """`select_blocks` on validated arguments, masked by `scope`."""
  arrays = jax.lax.stop_gradient((query, compressed_key, lse))
  index = None, scope.queries
  run = dispatch.choose("select_blocks", implementation, spec, arrays, index)
  return checkpoint_name(run(), "nsa_block_ids")


def select_by_means(
  implementation: Implementation,
  spec: Spec,
  query: Array,
  means: Array,
  scope: Scope,
) -> Array:
  """`select` by `query` and `means` of the selected branch.

  Args:
    implementation: as in `select`.
    spec: that of the op; the means are the compressed keys of `spec.means`.
    query: [B, T, N, H].
    means: [B, C, K, H].
    scope: as in `select`.
  """
  spec = spec._replace(config=spec.means, means=None)
  query, means = jax.lax.stop_gradient((query, means))
  _, lse = attend_branch(
    "compressed",
    implementation,
    spec._replace(tiles=None),
    (query, means, means[..., :_FEW]),
    scope,
  )
  lse = keep(lse, scope.valid_queries)
  return select(implementation, spec, query, means, lse, scope)


def _inputs(
  query: Any, compressed_key: Any, lse: Any, config: Any, key_length: Any,
  scale: Any, query_offset: Any, segment_ids: Any, query_segment_ids: Any,
) -> tuple[Array, Array, Array, Spec, Scope]:  # fmt: skip
  """Validates the arguments of a selection; its arrays, spec and scope."""
  check_config(config)
  query = _checks.queries(query)
  compressed_key = _checks.keys("compressed_key", compressed_key, query, 0)
  lse = _checks.array("lse", lse, 3, "[B, T, N]")
  _checks.floating("lse", lse)
  _checks.shape("lse", lse, query.shape[:3], "[B, T, N] of `query`")
  key_length = check_compressed(
    "compressed_key", compressed_key, key_length, config
  )
  scope = make_scope(
    query,
    key_length,
    query_offset,
    segment_ids,
    query_segment_ids,
    alignment=config.selection_block,
  )
  spec = Spec(config, _checks.scale(scale, query), key_length)
  query, compressed_key, _ = scope.mask(
    query, compressed_key, compressed_key, compressed=config
  )
  return query, compressed_key, keep(lse, scope.valid_queries), spec, scope
