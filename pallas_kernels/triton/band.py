"""Attention over a band of keys, forward: compressed branch and window.

Each query reads one range of keys, which moves with its position: all
compressed blocks that end at or before it, or the last w tokens. The rows of a
program's matrix products are several neighbouring queries with all heads of one
group, so that keys and values are loaded once for all of them. Only key tiles
at the ends of the band need a mask.

A key row is a token (window) or a compressed block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import checks, platforms
from pallas_kernels.bands import Band, BandReads, Bounds, key_tiles
from pallas_kernels.integers import div, rem
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.triton import common, support
from pallas_kernels.triton.tiling import BandTile, BandTiling, band_tiling


class QuerySizes(NamedTuple):
  """Sizes that are lost in the flat arrays of queries."""

  length: int  # T
  heads: int  # N
  group: int  # G


def walk(
  step: Callable[[Any, Any, bool], Any], carry: Any, bounds: Bounds, mask: bool
) -> Any:
  """Folds `step(tile, carry, masked)` over the tiles, in order.

  Args:
    step: the loop body; `masked` is static.
    carry: initial carry.
    bounds: the tiles.
    mask: mask every tile, in a single loop.
  """
  begin, full_begin, full_end, end = bounds
  loops = [
    (begin, full_begin, True),
    (full_begin, full_end, False),
    (full_end, end, True),
  ]
  for start, stop, masked in [(begin, end, True)] if mask else loops:
    if start is not stop:
      body = functools.partial(lambda i, c, m: step(i, c, m), m=masked)
      carry = lax.fori_loop(start, stop, body, carry)
  return carry


class TileRows(NamedTuple):
  """The rows of a query tile: pairs of query and head, heads innermost."""

  query: Any  # int32 [rows], in [0, T)
  index: Any  # int32 [rows], into [B T N]
  # bool [rows], False for rows that repeat another; None if no row does.
  distinct: Any


def tile_rows(
  tile: Any,
  b: Any,
  h: Any,
  rows: int,
  sizes: QuerySizes,
  steps: int = 1,
  step: Any = None,
) -> TileRows:
  """Rows of a query tile, for batch row b and key/value head h.

  A tile has `steps` steps of `rows` rows each; the result is one step, or the
  whole tile if `step` is None. A step holds as many whole groups as fit.
  Left-over rows, and rows after the last query, repeat the last valid row: they
  compute and store the same values, so that only sums over rows need a mask.
  """
  length, heads, group = sizes
  block_q = rows // group
  if step is not None or steps == 1:
    row = jnp.arange(rows, dtype=jnp.int32)
  else:
    row = jnp.arange(steps * rows, dtype=jnp.int32)
    step, row = div(row, rows), rem(row, rows)
  if steps > 1:
    tile = tile * steps + step
  local = jnp.minimum(row, block_q * group - 1)
  query = tile * block_q + div(local, group)
  distinct = None
  # Inner loops compute this, so it is left out if no row repeats another.
  if rows % group or length % (steps * block_q):
    distinct = (row < block_q * group) & (query < length)
    query = jnp.minimum(query, length - 1)
  index = (b * length + query) * heads + h * group + rem(local, group)
  return TileRows(query, index, distinct)


def load_rows(
  ref: Any, index: Any, columns: tuple[tuple[int, int], ...]
) -> tuple[jax.Array, ...]:
  """Loads rows of a flat ref [B T N, H], one tile per piece of H."""
  return tuple(ref[index, pl.ds(start, width)] for start, width in columns)


def key_span(j: Any, block_k: int, num_keys: int) -> tuple[Any, Any, Any]:
  """Slice, key rows and mask of key tile j; the mask is None if all exist."""
  token = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
  inside = token < num_keys if num_keys % block_k else None
  return pl.ds(j * block_k, block_k), token, inside


def _fwd_kernel(
  place_ref,  # [2]: position of query 0, first valid key row
  q_ref,  # [B T N, H]
  k_ref,  # [S, H], S key rows
  v_ref,  # [S, V]
  *refs,  # segments [S] and [B T], if any; out [B T N, V], lse [B T N]
  band: Band,
  tile: BandTile,
  scale: float,
  sizes: QuerySizes,
  exp2: Callable[[jax.Array], jax.Array],
):
  *segments, out_ref, lse_ref = refs
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[-1])
  value_pieces = common.pieces(value_dim)
  factor = scale * common.LOG2E
  # The last queries read the most keys, so they start first.
  i = pl.num_programs(0) - 1 - pl.program_id(0)
  h, b = pl.program_id(1), pl.program_id(2)
  rows = tile_rows(i, b, h, tile.rows, sizes)
  offset, first_row = place_ref[0], place_ref[1]
  t = offset + rows.query
  if segments:
    segment = segments[1][b * sizes.length + rows.query]
  block_q = tile.rows // sizes.group
  bounds = key_tiles(
    band,
    offset,
    first_row,
    i * block_q,
    jnp.minimum((i + 1) * block_q, sizes.length),
    tile.block_k,
  )
  q = load_rows(q_ref, rows.index, head_pieces)

  def readable(span_k, token, inside):
    mask = band.readable(token[None, :], t[:, None], first_row)
    if segments:
      keys = common.load(segments[0].at[span_k], inside)
      mask &= keys[None, :] == segment[:, None]
    return mask

  def step(j, carry, masked):
    acc, m_i, l_i = carry
    span_k, token, inside = key_span(j, tile.block_k, num_keys)
    inside = inside if masked else None
    k = common.load_pieces(k_ref, span_k, head_pieces, inside)
    raw = common.dot_pieces(q, k)
    s = raw * factor
    if masked:
      s = jnp.where(readable(span_k, token, inside), s, common.MASK)
    # The maximum is taken before scaling, so that scaling and subtraction fuse
    # into one instruction.
    fused = not masked and factor > 0
    high = raw.max(axis=1) * factor if fused else s.max(axis=1)
    m_next = jnp.maximum(m_i, high)
    p = exp2(s - m_next[:, None])
    correction = exp2(m_i - m_next)
    l_next = l_i * correction + p.sum(axis=1)
    v = common.load_pieces(v_ref, span_k, value_pieces, inside)
    acc = tuple(
      a * correction[:, None] + common.dot(p.astype(x.dtype), x)
      for a, x in zip(acc, v, strict=True)
    )
    return acc, m_next, l_next

  carry = (
    common.accumulators(tile.rows, value_pieces),
    jnp.full((tile.rows,), common.MAX_INIT, jnp.float32),
    jnp.zeros((tile.rows,), jnp.float32),
  )
  acc, m_i, l_i = walk(step, carry, bounds, bool(segments))
  # Rows at positions past the last token may have read keys: they are zeroed.
  some = (l_i != 0) & (t < band.length)
  total = jnp.where(some, l_i, 1)
  lse = jnp.where(some, m_i / common.LOG2E + jnp.log(total), -jnp.inf)
  for (start, width), a in zip(value_pieces, acc, strict=True):
    out = jnp.where(some[:, None], a / total[:, None], 0)
    out_ref[rows.index, pl.ds(start, width)] = out.astype(out_ref.dtype)
  lse_ref[rows.index] = lse


def flat_rows(x: jax.Array) -> jax.Array:
  """[B, T, N, ...] -> [B T N, ...]."""
  return x.reshape(-1, *x.shape[3:])


def per_head(
  key: jax.Array,
  segments: tuple[jax.Array, ...],
  row_and_head: Callable[..., tuple[Any, Any]] = lambda i, h, b: (b, h),
) -> Any:
  """Block specs of the place, keys and segments that a program reads.

  Args:
    key: [B, S, K, H].
    segments: () or those of the keys [B, S] and of the flat queries [B T].
    row_and_head: maps grid indices to batch row and key/value head.

  Returns:
    The spec of the place [B, 2]; a function from H or V to the spec of keys or
    values; the specs of the segments.
  """
  num_keys = key.shape[1]

  def spec(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, width), lambda *i: (row_and_head(*i)[0], 0))

  def keys(width: int) -> pl.BlockSpec:
    def index(*i: Any) -> tuple[Any, ...]:
      b, h = row_and_head(*i)
      return b, 0, h, 0

    return pl.BlockSpec((None, num_keys, None, width), index)

  per_row = (spec(num_keys), common.whole(segments[1])) if segments else ()
  return spec(2), keys, per_row


def check(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> None:
  """As in `interface`; `tiles` must be a `BandTiling` that fits."""
  del index
  support.check_where()
  checks.check_scores(spec)
  support.check_heads(*qkv)
  checks.check_tiles(spec, BandTiling, checks.group_of(*qkv[:2]))


def choose_tiles(
  spec: Spec, band: Band, qkv: tuple[jax.Array, ...]
) -> BandTiling:
  """The requested tiles, or those of the heuristic."""
  query, key, value = qkv
  return spec.tiles or band_tiling(
    windowed=band.window is not None,
    group=checks.group_of(query, key),
    head_dim=query.shape[-1],
    value_dim=value.shape[-1],
    dtype=query.dtype,
  )


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], reads: BandReads
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, N, V] and lse [B, T, N] (float32).

  Args:
    spec: scale and tiles.
    qkv: query [B, T, N, H]; key [B, S, K, H] and value [B, S, K, V] of S key
      rows.
    reads: what the queries read.
  """
  query, key, value = qkv
  band, place, segments = reads.band, reads.place, reads.flat_segments
  batch, length, heads, _ = query.shape
  kv_heads, value_dim = value.shape[2:]
  sizes = QuerySizes(length, heads, heads // kv_heads)
  tile = choose_tiles(spec, band, qkv).fwd
  flat = flat_rows(query)
  place_spec, keys, segment_specs = per_head(key, segments)
  shapes = [
    platforms.out_shape((len(flat), value_dim), query.dtype),
    platforms.out_shape((len(flat),), jnp.float32),
  ]
  out, lse = pl.pallas_call(
    functools.partial(
      _fwd_kernel,
      band=band,
      tile=tile,
      scale=spec.scale,
      sizes=sizes,
      exp2=common.exp2(spec.interpret),
    ),
    **common.options(
      f"nsa_{band.branch}_fwd", tile.num_warps, tile.num_stages, spec.interpret
    ),
    grid=(-(-length // (tile.rows // sizes.group)), kv_heads, batch),
    in_specs=[
      place_spec,
      common.whole(flat),
      keys(query.shape[-1]),
      keys(value_dim),
      *segment_specs,
    ],
    out_specs=[common.whole(x) for x in shapes],
    out_shape=shapes,
  )(place, flat, key, value, *segments)
  return (
    out.reshape(batch, length, heads, value_dim),
    lse.reshape(batch, length, heads),
  )
