"""Attention of the newest tokens over a decode cache."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax.numpy as jnp
from jax.typing import ArrayLike

from nsa_jax import _checks, dispatch, geometry
from nsa_jax.cache.state import (
  Cache,
  check_cache,
  checked_max_append,
  dequantized,
  mean_tokens,
  ring_rows,
  take_rows,
)
from nsa_jax.config import (
  NSAConfig,
  Select,
  SelectByMeans,
  check_config,
  check_select,
)
from nsa_jax.ops import nsa
from nsa_jax.ops.branches import attend_branch
from nsa_jax.ops.scope import Scope, keep, make_scope
from nsa_jax.sharding import Layout, partitioned
from nsa_jax.typing import KV, Array, Implementation
from pallas_kernels.interface import (
  DecodeArrays,
  Queries,
  Spec,
  query_positions,
)

# Axes of arguments whose tokens are not split over devices.
CACHE_LETTERS = {
  "query": "B.N",
  "compressed_query": "B.N",
  "gates": "B.N",
  "bound": "B",
  "cache": "B.K",
  "prefill_window": "B.K",
}


@overload
def attend(
  query: ArrayLike,
  cache: Cache,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  compressed_query: ArrayLike | None = None,
  prefill_window: KV | None = None,
  select: Select = None,
  return_block_ids: Literal[False] = False,
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array: ...


@overload
def attend(
  query: ArrayLike,
  cache: Cache,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  compressed_query: ArrayLike | None = None,
  prefill_window: KV | None = None,
  select: Select = None,
  return_block_ids: Literal[True],
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]: ...


@overload
def attend(
  query: ArrayLike,
  cache: Cache,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  compressed_query: ArrayLike | None = None,
  prefill_window: KV | None = None,
  select: Select = None,
  return_block_ids: bool,
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]: ...


@partitioned(**CACHE_LETTERS)
def attend(
  query: ArrayLike,
  cache: Cache,
  gates: ArrayLike,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  compressed_query: ArrayLike | None = None,
  prefill_window: KV | None = None,
  select: Select = None,
  return_block_ids: bool = False,
  tiles: Mapping[str, Any] | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]:
  """Native Sparse Attention of the newest tokens over the cache (Eq. 5).

  For inference: gradients are not guaranteed.

  Args:
    query: [B, T, N, H], of tokens that the cache already holds.
    cache: of kind "nsa", after `append` or `prefill`.
    gates: [B, T, N, 3], as in `native_sparse_attention`.
    config: the one given to `init`.
    query_offset: position of the first query of each batch row, equal to the
      row's length before the append: int32 of shape () or [B]. With a Python
      integer, which applies to all rows, keys after the last query are skipped,
      so that a prompt at 0 costs the same as without a cache. The window's ring
      holds every key that the last `max_append` tokens of a row read, unless
      the row was rewound; earlier queries silently miss keys.
    scale: static softmax scale, 1/sqrt(H) by default.
    compressed_query: [B, T, N, H], as in `native_sparse_attention`.
    prefill_window: the second result of `prefill`; needed for more than
      `max_append` queries if the window has its own keys and values.
    select: as in `native_sparse_attention`; by means it must be the one given
      to `init`. The decode kernels select by compressed keys or by means; with
      a function the branches run one by one.
    return_block_ids: also return the ids of the selected blocks.
    tiles: tile sizes as in `native_sparse_attention`; those of the decode
      kernels, a `DecodeTiling`, under "decode".
    implementation: "triton", "xla", "reference", or a sequence of names, as in
      `native_sparse_attention`. None is the decode kernels on NVIDIA GPUs and
      "xla" elsewhere; a call they cannot do runs the branches one by one.
    layout: as in `native_sparse_attention`. Rows and heads are split, tokens
      are not.

  Returns:
    out [B, T, N, V] in the dtype of `query`, or (out, block_ids) with block_ids
    int32 [B, T, K, n]. Queries at positions < 0 or >= `lengths`, such as the
    padding of a ragged batch, get out 0 and ids -1.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   1, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8
    ... )._replace(lengths=jnp.array([9]))
    >>> query, gates = jnp.ones((1, 1, 4, 8)), jnp.ones((1, 1, 4, 3))
    >>> cache.attend(
    ...   query, held, gates, config=NSAConfig(), query_offset=jnp.array([8])
    ... ).shape
    (1, 1, 4, 8)
  """
  check_config(config)
  _checks.flag("return_block_ids", return_block_ids)
  cache = check_cache(cache)
  if cache.selected is None or cache.compressed is None or cache.tail is None:
    raise ValueError("`cache` must be of kind 'nsa': it lacks fields.")
  query, selected = _check_selected(query, cache)
  batch, length = query.shape[:2]
  gates, compressed_query = nsa.check_queries(query, gates, compressed_query)
  scale = _checks.scale(scale, query)
  query_offset = _checks.offset("query_offset", query_offset, ((), (batch,)))
  select = check_select(select)
  few = _check_few(cache.window, query, prefill_window, cache, config)
  if prefill_window is not None:
    prefill_window = _check_prefill_window(query, prefill_window)
    _checks.shape(
      "prefill_window.value",
      prefill_window.value,
      (None, None, None, selected.value.shape[-1]),
      "V of the cache",
    )

  # With a static offset, keys after the last query are sliced off.
  key_length = selected.key.shape[1]
  if isinstance(query_offset, int):
    stop = max(query_offset + length, 1)
    if few and prefill_window is None:  # The kernels read whole blocks.
      stop += -stop % config.selection_block
    key_length = min(stop, key_length)
  blocks = geometry.num_compressed_blocks(key_length, config)
  means, by_means = None, None
  if isinstance(select, SelectByMeans):
    by_means = select.blocks(config)
    kept = mean_tokens(cache)
    if cache.means is None or kept != select.tokens:
      raise ValueError(
        f"`select`={select} must be that of `init`: the cache keeps "
        f"{f'means of {kept} tokens' if kept else 'no means'}."
      )
    count = geometry.num_compressed_blocks(key_length, by_means)
    means = cache.means[:, :count]
  arrays = DecodeArrays(
    query,
    compressed_query,
    _first(cache.compressed, blocks),
    _first(cache.selected, key_length),
    cache.window,
    gates,
    _first(cache.scales, key_length),
    means,
  )
  tiles = nsa.check_tiles(tiles, "decode")
  spec = Spec(
    config,
    scale,
    key_length,
    tiles=tiles.get("decode"),
    own_selection=callable(select),
    means=by_means,
  )
  index = cache.lengths, Queries(query_offset)
  run = None
  if few and prefill_window is None:
    run = dispatch.choose_fused(
      "decode", implementation, spec, arrays, index, _compose_by_xla
    )
  if run is None:
    out, ids = _compose(
      spec, arrays, index, implementation, prefill_window, select, tiles
    )
  else:
    out, ids = run()
  return (out, ids) if return_block_ids else out


@overload
def attend_window(
  query: ArrayLike,
  cache: Cache,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: Literal[False] = False,
  prefill_window: KV | None = None,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array: ...


@overload
def attend_window(
  query: ArrayLike,
  cache: Cache,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: Literal[True],
  prefill_window: KV | None = None,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]: ...


@overload
def attend_window(
  query: ArrayLike,
  cache: Cache,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: bool,
  prefill_window: KV | None = None,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]: ...


@partitioned(**CACHE_LETTERS)
def attend_window(
  query: ArrayLike,
  cache: Cache,
  *,
  config: NSAConfig,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: bool = False,
  prefill_window: KV | None = None,
  tiles: Any = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]:
  """Window attention of the newest tokens over a cache of kind "window".

  Args:
    query: [B, T, N, H], of tokens that the cache already holds.
    cache: after `append` or `prefill`.
    config: the one given to `init`.
    query_offset: as in `attend`.
    scale: as in `attend`.
    softcap: as in `window_attention`.
    return_lse: also return lse.
    prefill_window: the second result of `prefill`; needed for more than
      `max_append` queries.
    tiles: as in `window_attention`.
    implementation: as in `window_attention`.
    layout: as in `attend`.

  Returns:
    out [B, T, N, V]; 0 at positions < 0 or >= `lengths`. With `return_lse`
    (out, lse), as of `compressed_attention`.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   1, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8, kind="window"
    ... )._replace(lengths=jnp.array([9]))
    >>> cache.attend_window(
    ...   jnp.ones((1, 1, 4, 8)), held, config=NSAConfig(), query_offset=8
    ... ).shape
    (1, 1, 4, 8)
  """
  check_config(config)
  _checks.flag("return_lse", return_lse)
  cache = check_cache(cache)
  if cache.window is None:
    raise ValueError("`cache` must be of kind 'window': it has no `window`.")
  query, ring = _checks.pair("cache.window", query, cache.window)
  query_offset = _checks.offset(
    "query_offset", query_offset, ((), query.shape[:1])
  )
  _check_few(ring, query, prefill_window, cache, config)
  if prefill_window is not None:
    prefill_window = _check_prefill_window(query, prefill_window)
  rows, scope = _window_rows(
    query, ring, prefill_window, query_offset, cache.lengths, config.window
  )
  spec = Spec(
    config,
    _checks.scale(scale, query),
    scope.key_length,
    need_lse=return_lse,
    tiles=tiles,
    softcap=_checks.softcap(softcap),
  )
  arrays = scope.mask(query, *rows)
  out, lse = attend_branch("window", implementation, spec, arrays, scope)
  return (out, lse) if return_lse else out


@overload
def attend_full(
  query: ArrayLike,
  cache: Cache,
  *,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: Literal[False] = False,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array: ...


@overload
def attend_full(
  query: ArrayLike,
  cache: Cache,
  *,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: Literal[True],
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> tuple[Array, Array]: ...


@overload
def attend_full(
  query: ArrayLike,
  cache: Cache,
  *,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: bool,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]: ...


@partitioned(**CACHE_LETTERS)
def attend_full(
  query: ArrayLike,
  cache: Cache,
  *,
  query_offset: ArrayLike,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: bool = False,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array | tuple[Array, Array]:
  """Causal attention of the newest tokens over all tokens of their row.

  Args:
    query: [B, T, N, H], of tokens that the cache already holds.
    cache: of kind "full" (or "nsa"), after `append` or `prefill`.
    query_offset: as in `attend`.
    scale: as in `attend`.
    softcap: as in `window_attention`.
    return_lse: also return lse.
    implementation: as in `full_attention`.
    layout: as in `attend`.

  Returns:
    out [B, T, N, V]; 0 at positions < 0 or >= `lengths`. With `return_lse`
    (out, lse), as of `compressed_attention`.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   1, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8, kind="full"
    ... )._replace(lengths=jnp.array([9]))
    >>> query = jnp.ones((1, 1, 4, 8))
    >>> cache.attend_full(query, held, query_offset=8).shape
    (1, 1, 4, 8)
  """
  _checks.flag("return_lse", return_lse)
  cache = check_cache(cache)
  if cache.selected is None:
    raise ValueError("`cache` must be of kind 'full': it has no `selected`.")
  query, selected = _check_selected(query, cache)
  batch, length = query.shape[:2]
  query_offset = _checks.offset("query_offset", query_offset, ((), (batch,)))
  key_length = selected.key.shape[1]
  if isinstance(query_offset, int):
    key_length = min(max(query_offset + length, 1), key_length)
  scope = _held_scope(query, key_length, query_offset, cache.lengths)
  spec = Spec(
    None,
    _checks.scale(scale, query),
    key_length,
    need_lse=return_lse,
    softcap=_checks.softcap(softcap),
  )
  arrays = scope.mask(query, *_first(selected, key_length))
  out, lse = attend_branch("full", implementation, spec, arrays, scope)
  return (out, lse) if return_lse else out


def _check_selected(query: Any, cache: Cache) -> tuple[Array, KV]:
  """Validates query and `cache.selected`, which is dequantized."""
  query = _checks.queries(query)
  selected: Any = cache.selected
  selected = dequantized(selected, cache.scales, query.dtype)
  return _checks.pair("cache.selected", query, selected)


def _compose(
  spec, arrays, index, implementation, prefill_window, select, tiles
):
  """`attend` composed of the separate branches."""
  lengths, queries = index
  query = arrays.query
  selected = dequantized(arrays.selected, arrays.scales, query.dtype)
  # A kernel would need all of the cache dequantized. For few queries that is
  # most of the work.
  num_read = query.shape[1] * spec.config.num_selected
  few = num_read * spec.config.selection_block < spec.key_length
  by_xla = arrays.scales is not None and few and implementation is None
  scope = _held_scope(query, spec.key_length, queries.offset, lengths)
  window, window_scope = selected, scope
  own_keys = arrays.window is not None or prefill_window is not None
  few_keys = spec.config.window + query.shape[1] <= spec.key_length
  if own_keys or few_keys:
    window, window_scope = _window_rows(
      query,
      arrays.window,
      prefill_window,
      queries.offset,
      lengths,
      spec.config.window,
      selected=selected,
    )
  out, ids = nsa.compose(
    nsa.Arguments(
      query,
      arrays.compressed_query,
      arrays.compressed,
      selected,
      window,
      arrays.gates,
      means=arrays.means,
    ),
    spec,
    scope,
    window_scope,
    implementation,
    select,
    tiles,
    of_selected="xla" if by_xla else None,
  )
  return out, keep(ids, scope.valid_queries, -1)


def _compose_by_xla(spec, arrays, index):
  """At module level, so that equal calls have equal plans."""
  return _compose(spec, arrays, index, "xla", None, None, {})


def _held_scope(query, key_length, query_offset, lengths):
  """The scope of queries over the first `lengths` keys of each batch row."""
  scope = make_scope(query, key_length, query_offset, None, None)
  positions = scope.queries.positions(*query.shape[:2])
  last = lengths[:, None] - 1
  if scope.last_position is not None:
    last = jnp.minimum(last, scope.last_position)
  return scope._replace(
    valid_queries=_held(positions, lengths),
    # Stale keys of rewound tokens may be NaN, and 0 * NaN is NaN.
    readable_keys=jnp.arange(key_length)[None] <= last,
    last_position=last,
  )


def _window_rows(
  query, ring, prefill_window, query_offset, lengths, window, selected=None
):
  """Keys and values that the queries' windows read, and their scope.

  They are in order of position: first the tokens before the first query, then
  the queries' own.
  """
  batch, length = query.shape[:2]
  before = window - 1
  if prefill_window is not None:
    before = prefill_window.key.shape[1] - length
  if isinstance(query_offset, int):  # Fewer tokens may precede the query.
    before = min(before, max(query_offset, 0))
  key_offset = query_offset - before
  token = query_positions(key_offset, batch, before + length)
  known = _held(token, lengths)
  valid = _held(query_positions(query_offset, batch, length), lengths)
  segments: tuple[Any, Any] = None, None
  if prefill_window is not None:
    first = prefill_window.key.shape[1] - before - length
    rows = KV(*(x[:, first:] for x in prefill_window))
  elif ring is not None:
    rows = ring_rows(ring, token)
    # Later tokens have overwritten the earlier ones in the ring.
    known &= token >= lengths[:, None] - ring.key.shape[1]
    segments = known.astype(jnp.int32), valid.astype(jnp.int32)
  else:
    rows = take_rows(selected, token)
  queries = Queries(query_offset, *segments, key_offset)
  return rows, Scope(queries, before + length, valid, known, None)


def _check_few(ring, query, prefill_window, cache, config):
  """Whether there are at most `max_append` queries, if that has a limit.

  Raises:
    ValueError: if the window's ring lacks keys that the queries read.
  """
  most = checked_max_append(cache, config)
  length = query.shape[1]
  few = most is None or length <= most
  if ring is not None and prefill_window is None and not few:
    raise ValueError(
      f"`query` has {length} tokens, more than `max_append`={most}: "
      "`prefill_window` must be what `prefill` returned."
    )
  return few


def _check_prefill_window(query, window):
  """Validates the argument `prefill_window` and returns it."""
  _, window = _checks.pair("prefill_window", query, window)
  if window.key.shape[1] < query.shape[1]:
    raise ValueError(
      f"`prefill_window.key` of shape {window.key.shape} must have a row for "
      f"each of the {query.shape[1]} queries: what `prefill` returned with "
      "them."
    )
  return window


def _held(positions, lengths):
  """Mask of the positions [B, n] that the cache holds."""
  return (positions >= 0) & (positions < lengths[:, None])


def _first(pair, length):
  return None if pair is None else KV(*(x[:, :length] for x in pair))
