"""Native Sparse Attention (Eq. 5), composed of its branches."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from nsa_jax import _checks, geometry
from nsa_jax.compression import compress_mean
from nsa_jax.config import (
  NSAConfig,
  Select,
  SelectByMeans,
  check_config,
  check_select,
)
from nsa_jax.gating import gated_sum
from nsa_jax.ops.branches import attend_branch, check_block_ids
from nsa_jax.ops.scope import Scope, keep, make_scope
from nsa_jax.ops.selection import select as select_best
from nsa_jax.ops.selection import select_by_means
from nsa_jax.sharding import Layout, bind, bound_arrays, find_place, run
from nsa_jax.typing import KV, Array, Implementation
from pallas_kernels.interface import Spec


@overload
def native_sparse_attention(
  query: ArrayLike,
  compressed: KV,
  selected: KV,
  window: KV,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  compressed_query: ArrayLike | None = None,
  block_ids: ArrayLike | None = None,
  select: Select = None,
  return_block_ids: Literal[False] = False,
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array: ...


@overload
def native_sparse_attention(
  query: ArrayLike,
  compressed: KV,
  selected: KV,
  window: KV,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  compressed_query: ArrayLike | None = None,
  block_ids: ArrayLike | None = None,
  select: Select = None,
  return_block_ids: Literal[True],
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]: ...


@overload
def native_sparse_attention(
  query: ArrayLike,
  compressed: KV,
  selected: KV,
  window: KV,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  compressed_query: ArrayLike | None = None,
  block_ids: ArrayLike | None = None,
  select: Select = None,
  return_block_ids: bool,
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]: ...


def native_sparse_attention(
  query: ArrayLike,
  compressed: KV,
  selected: KV,
  window: KV,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  compressed_query: ArrayLike | None = None,
  block_ids: ArrayLike | None = None,
  select: Select = None,
  return_block_ids: bool = False,
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]:
  """Native Sparse Attention (arXiv 2502.11089, Eq. 5), causal.

      out[t] = sum over c of gates[t, :, c] * Attn_c(query[t], K_c, V_c)

  for c in compressed, selected, window, each with its own softmax.

  Args:
    query: [B, T, N, H].
    compressed: keys [B, C, K, H] and values [B, C, K, V] made by a
      `compress_*` function from S tokens, C = num_compressed_blocks(S).
    selected: keys [B, S, K, H] and values [B, S, K, V] of the selected blocks.
    window: keys [B, S, K, H] and values [B, S, K, V] of the sliding window.
    gates: [B, T, N, 3], any floating-point dtype, in the order compressed,
      selected, window, after the sigmoid.
    config: the algorithm's hyper-parameters.
    scale: static softmax scale, 1/sqrt(H) by default.
    query_offset: position of the first query among the keys: an integer, or an
      int32 array of shape () or [B]; S - T by default. Queries at positions
      outside [0, S) behave like padding.
    segment_ids: int32 [B, S] for packed sequences: contiguous runs that start
      at multiples of `selection_block`; 0 is padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    compressed_query: [B, T, N, H], the query of the compressed branch and of
      the selection, if it differs from `query` (for example, is not rotated).
    block_ids: int32 [B, T, K, m], block ids that replace the selection:
      strictly ascending, then -1.
    select: what replaces selection by the importance of the compressed keys
      (Eq. 8-11): "means", a `SelectByMeans`, or a function, a custom
      selector. That is called with keyword arguments: `query` [B, T, N, H]
      (that of the compressed branch), `compressed_key` [B, C, K, H], `lse`
      [B, T, N] of the compressed branch, `selected_query` [B, T, N, H],
      `selected_key` [B, S, K, H], `config`, `key_length`, `scale`,
      `query_offset`, `segment_ids` and `query_segment_ids`; it should accept
      `**_` for those it does not use. It returns block ids, for example from
      `block_ids_from_scores`.
    return_block_ids: also return the ids of the selected blocks.
    tiles: tile sizes of the kernels by op: "compressed", "select_blocks",
      "selected", "window"; None for the heuristic.
    implementation: a name ("triton", "xla", "reference"), or a sequence of
      names to try in order, op by op; in a sequence, "cudnn" may serve the
      window, and "mosaic_gpu" every branch and the selection. None is
      "mosaic_gpu" for what it serves on Hopper cards, else "triton" on NVIDIA
      GPUs, and "xla" elsewhere, in one traced program with reverse mode only;
      or "xla" alone, if the kernels cannot do the call.
    layout: mesh axes over which the arrays are split, on the mesh of
      `jax.set_mesh`. None reads them off the types if the mesh has Explicit
      axes. With Auto axes None leaves the partition to XLA, which can do it for
      rows and heads. Arrays bound to `select` by `functools.partial` are split
      like queries.

  Returns:
    out [B, T, N, V] in the dtype of `query`, or (out, block_ids) with block_ids
    int32 [B, T, K, n], or as given. Queries with nothing to attend get out 0.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> config = nsa_jax.NSAConfig(8, 4, 16, num_selected=4, window=16)
    >>> query = jax.random.normal(jax.random.key(0), (1, 128, 4, 16))
    >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 128, 1, 16))
    >>> compressed = nsa_jax.KV(
    ...   nsa_jax.compress_mean(key, config=config),
    ...   nsa_jax.compress_mean(value, config=config),
    ... )
    >>> pair = nsa_jax.KV(key, value)
    >>> gates = jnp.full((1, 128, 4, 3), 0.5)
    >>> nsa_jax.native_sparse_attention(
    ...   query, compressed, pair, pair, gates, config=config
    ... ).shape
    (1, 128, 4, 16)
  """
  check_config(config)
  query, selected = _checks.pair("selected", query, selected)
  _, window = _checks.pair("window", query, window)
  _, compressed = _checks.pair("compressed", query, compressed, min_length=0)
  key, value = selected
  key_length = key.shape[1]
  _checks.shape(
    "window.key", window.key, key.shape, "the shape of `selected.key`"
  )
  num_compressed = geometry.num_compressed_blocks(key_length, config)
  _checks.shape(
    "compressed.key",
    compressed.key,
    (key.shape[0], num_compressed, *key.shape[2:]),
    "num_compressed_blocks(S) blocks by `config`, and the heads of "
    "`selected.key`",
  )
  for name, other in (
    ("window.value", window.value),
    ("compressed.value", compressed.value),
  ):
    _checks.shape(
      name,
      other,
      (None, None, None, value.shape[-1]),
      "the head dimension of `selected.value`",
    )
  gates, compressed_query = check_queries(query, gates, compressed_query)
  spec = Spec(config, _checks.scale(scale, query), key_length)
  select = check_select(select)
  if isinstance(select, SelectByMeans):
    spec = spec._replace(means=select.blocks(config))
  _checks.flag("return_block_ids", return_block_ids)
  if block_ids is not None:
    if select is not None:
      raise ValueError(
        f"`select`={_checks.show(select)} must be None where `block_ids` are "
        "given."
      )
    block_ids = check_block_ids(block_ids, query, key, config)
  arrays = Arguments(
    query, compressed_query, compressed, selected, window, gates, block_ids
  )
  tiles = check_tiles(tiles)
  place = find_place(layout, "query", query, "BTN")
  if place is None:
    scope = make_scope(
      query,
      key_length,
      query_offset,
      segment_ids,
      query_segment_ids,
      alignment=config.selection_block,
    )
    out, ids = compose(
      arrays, spec, scope, scope, implementation, select, tiles
    )
  else:
    same = query.shape[1] == key_length and query_offset is None
    inside = query.shape[1] <= key_length and query_offset is None
    out, ids = run(
      place,
      functools.partial(_attend, spec, implementation, select, tiles, inside),
      arrays._asdict()
      | {
        "segment_ids": segment_ids,
        "query_segment_ids": query_segment_ids,
        "window_segment_ids": segment_ids if same else None,
        "bound": bound_arrays(select),
      },
      key_length=key_length,
      query_offset=query_offset,
      alignment=config.selection_block,
      halo=config.window if same else 0,
    )
  return (out, ids) if return_block_ids else out


def _attend(
  spec: Spec,
  implementation: Implementation,
  select: Any,
  tiles: Mapping[str, Any],
  inside: bool,
  *,
  query_offset: Array,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  window_segment_ids: Array | None = None,
  key_offset: int | Array = 0,
  bound: Mapping[str, Array] | None = None,
  **arrays: Any,
) -> tuple[Array, Array]:
  """The op on one device; its window may have fewer keys, from `key_offset`."""
  args = Arguments(**arrays)
  scope = window_scope = make_scope(
    args.query,
    spec.key_length,
    query_offset,
    segment_ids,
    query_segment_ids,
    alignment=spec.config.selection_block,
    inside=inside,
  )
  if not isinstance(key_offset, int):
    window_scope = make_scope(
      args.query,
      args.window.key.shape[1],
      query_offset,
      window_segment_ids,
      query_segment_ids,
      key_offset=key_offset,
      inside=inside,
    )
  select = bind(select, bound)
  return compose(args, spec, scope, window_scope, implementation, select, tiles)


class Arguments(NamedTuple):
  """Validated arrays of the op, named as in `native_sparse_attention`."""

  query: Array
  compressed_query: Array
  compressed: KV
  selected: KV
  window: KV
  gates: Array
  block_ids: Array | None = None
  means: Array | None = None  # [B, C', K, H], of `spec.means`, if known


def compose(
  arrays: Arguments,
  spec: Spec,
  scope: Scope,
  window_scope: Scope,
  implementation: Implementation,
  select: Select,
  tiles: Mapping[str, Any],
  of_selected: Implementation = None,
) -> tuple[Array, Array]:
  """compressed -> select -> selected -> window -> gated sum.

  Args:
    arrays: arrays of the call.
    spec: static arguments of the call.
    scope: of the compressed and the selected branch.
    window_scope: of the window branch, which may read other keys.
    implementation: as in `native_sparse_attention`.
    select: as in `native_sparse_attention`.
    tiles: as in `native_sparse_attention`.
    of_selected: the implementation of the selected branch, if another.

  Returns:
    out and block ids.
  """
  valid = scope.valid_queries
  # Masked once, so that the branch and the selection share their scores.
  compressed = scope.mask(
    arrays.compressed_query, *arrays.compressed, compressed=spec.config
  )
  selected = scope.mask(arrays.query, *arrays.selected)
  out_compressed, lse = attend_branch(
    "compressed",
    implementation,
    spec._replace(tiles=tiles.get("compressed")),
    compressed,
    scope,
  )
  block_ids = arrays.block_ids
  if block_ids is None and spec.means is not None:
    means = arrays.means
    if means is None:
      means = compress_mean(selected[1], config=spec.means)
    block_ids = select_by_means(
      implementation,
      spec._replace(tiles=tiles.get("select_blocks")),
      selected[0],
      means,
      scope,
    )
  elif block_ids is None and callable(select):
    block_ids = _call_selector(select, spec, compressed, selected, lse, scope)
  elif block_ids is None:
    block_ids = select_best(
      implementation,
      spec._replace(tiles=tiles.get("select_blocks")),
      *compressed[:2],
      keep(lse, valid),
      scope,
    )
  out_selected, _ = attend_branch(
    "selected",
    of_selected or implementation,
    spec._replace(tiles=tiles.get("selected"), need_lse=False),
    selected,
    scope,
    block_ids,
    # Ids of a caller or a custom selector may leave it out.
    reads_own=arrays.block_ids is None and not callable(select),
  )
  out_window, _ = attend_branch(
    "window",
    implementation,
    spec._replace(
      tiles=tiles.get("window"),
      need_lse=False,
      key_length=window_scope.key_length,
    ),
    window_scope.mask(arrays.query, *arrays.window),
    window_scope,
  )
  out = gated_sum(
    keep(arrays.gates, valid),
    (out_compressed, out_selected, out_window),
  )
  return keep(out, valid), block_ids


def _call_selector(select, spec, compressed, selected, lse, scope):
  """Block ids of a selector, which gets masked arrays."""
  queries = scope.queries
  query, compressed_key, _ = compressed
  selected_query, key, _ = selected
  ids = select(
    query=query,
    compressed_key=compressed_key,
    lse=lse,
    selected_query=selected_query,
    selected_key=key,
    config=spec.config,
    key_length=spec.key_length,
    scale=spec.scale,
    query_offset=queries.offset,
    segment_ids=queries.key_segments,
    query_segment_ids=queries.query_segments,
  )
  ids = check_block_ids(ids, query, key, spec.config, name="select(...)")
  return checkpoint_name(ids, "nsa_block_ids")


def check_queries(
  query: Array, gates: ArrayLike, compressed_query: ArrayLike | None
) -> tuple[Array, Array]:
  """Validates `gates` and `compressed_query` for queries [B, T, N, H]."""
  gates = _checks.array("gates", gates, 4, "[B, T, N, 3]")
  _checks.floating("gates", gates)
  _checks.shape("gates", gates, (*query.shape[:3], 3), "[B, T, N, 3]")
  if compressed_query is None:
    return gates, query
  return gates, _checks.same_as(
    "compressed_query", compressed_query, "query", query
  )


def check_tiles(tiles: Any, *more: str) -> Mapping[str, Any]:
  """Validates the mapping from ops to tile sizes; `more` ops are known too."""
  known = ("compressed", "select_blocks", "selected", "window", *more)
  if tiles is None:
    return {}
  if not isinstance(tiles, Mapping) or not set(tiles) <= set(known):
    raise ValueError(
      f"`tiles`={_checks.show(tiles)} must be a mapping from "
      f"{', '.join(map(repr, known))} to tile sizes."
    )
  return tiles
