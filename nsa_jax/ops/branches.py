"""The four kinds of attention: compressed, selected, window, full."""

from typing import Any, Literal, overload

import jax.numpy as jnp
from jax.typing import ArrayLike

from nsa_jax import _checks, dispatch, geometry
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.ops.scope import Scope, keep, make_scope
from nsa_jax.precision import sum_dtype
from nsa_jax.reverse_mode import explain_forward_mode
from nsa_jax.sharding import Layout, partitioned
from nsa_jax.typing import Array, Implementation
from pallas_kernels.interface import Spec


@partitioned(key="B.K", value="B.K")
def compressed_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
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
) -> tuple[Array, Array]:
  """Attention over the compressed blocks that end at or before t (Eq. 7).

  Args:
    query: [B, T, N, H].
    key: [B, C, K, H], compressed; C = num_compressed_blocks(key_length).
    value: [B, C, K, V], compressed.
    config: `compression_block` and `compression_stride` are read.
    key_length: S, static: the number of tokens the blocks were made from.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`: int32 [B, S], per token.
    query_segment_ids: as in `native_sparse_attention`.
    tiles: tile sizes of the kernels, a `BandTiling`; None for the heuristic.
    implementation: as in `native_sparse_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N]
    in float32 (float64 for float64). A query that sees no block gets out 0,
    lse -inf and zero gradient.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compressed_attention
    >>> query, blocks = jnp.ones((1, 64, 2, 8)), jnp.ones((1, 3, 1, 8))
    >>> out, lse = compressed_attention(
    ...   query, blocks, blocks, config=NSAConfig(), key_length=64
    ... )
    >>> out.shape, lse.shape
    ((1, 64, 2, 8), (1, 64, 2))
  """
  check_config(config)
  query, key, value = _checks.attention_inputs(query, key, value, min_length=0)
  key_length = check_compressed("key", key, key_length, config)
  scope = make_scope(
    query,
    key_length,
    query_offset,
    segment_ids,
    query_segment_ids,
    alignment=config.selection_block,
  )
  spec = Spec(config, _checks.scale(scale, query), key_length, tiles=tiles)
  arrays = scope.mask(query, key, value, compressed=config)
  return attend_branch("compressed", implementation, spec, arrays, scope)


@partitioned()
def selected_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  block_ids: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]:
  """Attention over the tokens s <= t of the given blocks (Eq. 12).

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    block_ids: int32 [B, T, K, m], m >= 1, shared by the heads of a group:
      strictly ascending, then -1. They may come from any selector;
      `block_ids_from_scores` makes them from scores. Traced ids cannot be
      checked: if they break this rule, the result is undefined.
    config: only `selection_block` is read.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`.
    query_segment_ids: as in `native_sparse_attention`.
    tiles: tile sizes of the kernels, a `SelectedTiling`; None for the
      heuristic.
    implementation: as in `native_sparse_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    out and lse as in `compressed_attention`.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, selected_attention
    >>> query, key = jnp.ones((1, 128, 2, 8)), jnp.ones((1, 128, 1, 8))
    >>> ids = jnp.zeros((1, 128, 1, 1), jnp.int32)
    >>> out, lse = selected_attention(query, key, key, ids, config=NSAConfig())
    >>> out.shape, lse.shape
    ((1, 128, 2, 8), (1, 128, 2))
  """
  check_config(config)
  query, key, value = _checks.attention_inputs(query, key, value)
  scope = make_scope(
    query,
    key.shape[1],
    query_offset,
    segment_ids,
    query_segment_ids,
    alignment=config.selection_block,
  )
  spec = Spec(config, _checks.scale(scale, query), key.shape[1], tiles=tiles)
  block_ids = check_block_ids(block_ids, query, key, config)
  arrays = scope.mask(query, key, value)
  return attend_branch(
    "selected", implementation, spec, arrays, scope, block_ids
  )


@overload
def window_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  softcap: float | None = None,
  key_offset: ArrayLike = 0,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: Literal[True] = True,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]: ...


@overload
def window_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  softcap: float | None = None,
  key_offset: ArrayLike = 0,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: Literal[False],
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array: ...


@overload
def window_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  softcap: float | None = None,
  key_offset: ArrayLike = 0,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: bool,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]: ...


@partitioned(key="BWK", value="BWK", segment_ids="BW")
def window_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  softcap: float | None = None,
  key_offset: ArrayLike = 0,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: bool = True,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]:
  """Attention over the last w tokens, max(0, t - w + 1) .. t.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H]; key s has position key_offset + s. Keys at negative
      positions are not tokens and are not read.
    value: [B, S, K, V].
    config: only `window` is read.
    scale: as in `native_sparse_attention`.
    softcap: c > 0, static; scores s, after `scale`, become c tanh(s / c). "xla"
      and "reference" can.
    key_offset: position of the first key: int, or int32 of shape () or [B].
    query_offset: as in `native_sparse_attention`; key_offset + S - T by
      default.
    segment_ids: int32 [B, S], contiguous runs; here they may start anywhere.
    query_segment_ids: as in `native_sparse_attention`.
    return_lse: False returns out alone, which "cudnn" requires.
    tiles: tile sizes of the kernels, a `BandTiling`; None for the heuristic.
    implementation: as in `native_sparse_attention`, or "cudnn".
    layout: as in `native_sparse_attention`.

  Returns:
    out and lse as in `compressed_attention`, or out alone.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, window_attention
    >>> query, key = jnp.ones((1, 100, 2, 8)), jnp.ones((1, 100, 1, 8))
    >>> out, lse = window_attention(query, key, key, config=NSAConfig(window=8))
    >>> round(float(jnp.exp(lse[0, 50, 0]) / jnp.exp(8**0.5)))  # keys it saw
    8
  """
  check_config(config)
  _checks.flag("return_lse", return_lse)
  query, key, value = _checks.attention_inputs(query, key, value)
  key_offset = _checks.offset("key_offset", key_offset, ((), query.shape[:1]))
  scope = make_scope(
    query,
    key.shape[1],
    query_offset,
    segment_ids,
    query_segment_ids,
    key_offset=key_offset,
  )
  scale = _checks.scale(scale, query)
  spec = Spec(
    config,
    scale,
    key.shape[1],
    need_lse=return_lse,
    tiles=tiles,
    softcap=_checks.softcap(softcap),
  )
  arrays = scope.mask(query, key, value)
  out, lse = attend_branch("window", implementation, spec, arrays, scope)
  return (out, lse) if return_lse else out


@overload
def full_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: Literal[True] = True,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]: ...


@overload
def full_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: Literal[False],
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array: ...


@overload
def full_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: bool,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]: ...


@partitioned()
def full_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  return_lse: bool = True,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]:
  """Attention over all tokens s <= t: the dense baseline.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    scale: as in `native_sparse_attention`.
    softcap: as in `window_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: int32 [B, S], contiguous runs; here they may start anywhere.
    query_segment_ids: as in `native_sparse_attention`.
    return_lse: False returns out alone, which "cudnn" requires.
    implementation: "cudnn", "xla", "reference", or a sequence of these names.
      None is "cudnn" where it can do the call: out alone, 16-bit inputs, T = S,
      no segments, and an NVIDIA GPU as the default device. Otherwise it is
      "xla", with memory linear in the length.
    layout: as in `native_sparse_attention`.

  Returns:
    out and lse as in `compressed_attention`, or out alone.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import full_attention
    >>> query, key = jnp.ones((1, 100, 2, 8)), jnp.ones((1, 100, 1, 8))
    >>> out, lse = full_attention(query, key, key)
    >>> round(float(jnp.exp(lse[0, 50, 0]) / jnp.exp(8**0.5)))  # keys it saw
    51
  """
  _checks.flag("return_lse", return_lse)
  query, key, value = _checks.attention_inputs(query, key, value)
  scope = make_scope(
    query, key.shape[1], query_offset, segment_ids, query_segment_ids
  )
  spec = Spec(
    None,
    _checks.scale(scale, query),
    key.shape[1],
    need_lse=return_lse,
    softcap=_checks.softcap(softcap),
  )
  arrays = scope.mask(query, key, value)
  out, lse = attend_branch("full", implementation, spec, arrays, scope)
  return (out, lse) if return_lse else out


def attend_branch(
  op: str,
  implementation: Implementation,
  spec: Spec,
  arrays: tuple[Array, Array, Array],
  scope: Scope,
  block_ids: Array | None = None,
  *,
  reads_own: bool | None = None,
) -> tuple[Array, Any]:
  """Runs one branch on validated arguments.

  Args:
    op: "compressed", "selected", "window" or "full".
    implementation: the caller's argument.
    spec: static arguments of the call.
    arrays: query, key and value, from `scope.mask`.
    scope: which queries and keys are valid.
    block_ids: for the selected branch.
    reads_own: every valid query reads its own token; by default only in the
      window and full branch.

  Returns:
    out and lse; lse may be None if `spec.need_lse` is False.
  """
  query, key, value = arrays
  if not key.shape[1]:  # No complete compressed block: no kernel to run.
    dispatch.named(implementation)
    acc = sum_dtype(query.dtype)
    out = jnp.zeros((*query.shape[:3], value.shape[-1]), query.dtype)
    return out, jnp.full(query.shape[:3], -jnp.inf, acc)
  if reads_own is None:
    reads_own = op in ("window", "full")
  if reads_own and scope.valid_queries is None:
    spec = spec._replace(empty_queries=False)
  index = block_ids, scope.queries
  run = dispatch.choose(op, implementation, spec, arrays, index)
  with explain_forward_mode():
    out, lse = run()
  out = keep(out, scope.valid_queries)
  return out, None if lse is None else keep(lse, scope.valid_queries, -jnp.inf)


def check_compressed(
  name: str, key: Array, key_length: int, config: NSAConfig
) -> int:
  """Validates S against the compressed blocks of `key` and returns it."""
  key_length = _checks.static_int("key_length", key_length, minimum=1)
  num_compressed = geometry.num_compressed_blocks(key_length, config)
  if key.shape[1] != num_compressed:
    raise ValueError(
      f"`{name}` of shape {key.shape} must have {num_compressed} blocks, "
      f"num_compressed_blocks of `key_length`={key_length} and `config`."
    )
  return key_length


def check_block_ids(
  ids: Any,
  query: Array,
  key: Array,
  config: NSAConfig,
  name: str = "block_ids",
) -> Array:
  """Validates the shape, dtype and values of block ids; int32."""
  given = ids
  ids = _checks.array(name, ids, 4, "[B, T, K, m]")
  _checks.integer_dtype(name, ids)
  _checks.shape(
    name,
    ids,
    (*query.shape[:2], key.shape[2], None),
    "[B, T, K, m], one list per query and key/value head",
  )
  if not ids.shape[-1]:
    raise ValueError(
      f"`{name}` of shape {ids.shape} must have at least one block (m >= 1)."
    )
  num_blocks = geometry.num_selection_blocks(key.shape[1], config)
  _checks.block_ids(name, given, num_blocks)
  # A block past the keys is never read, but its token positions may overflow
  # int32.
  return jnp.minimum(_checks.clip_int32(ids), jnp.int32(num_blocks))
