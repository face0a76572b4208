"""Attention over a band of keys, backward.

dk, dv: one program per key tile and share of the queries that read it. Its rows
hold all heads of a group, so the products also sum over the group. dq: one
product with ds, the gradients of the scores, which the first kernel stores.
That is five products in all; two independent kernels need seven, and compute
the exponentials twice. Queries are processed in chunks, which bounds the memory
of ds; dk and dv accumulate over the chunks. There are no atomics, so every run
gives the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.bands import Band, BandReads, key_tiles, query_tiles
from pallas_kernels.gradients import delta_of, gradient_of, keep_finite
from pallas_kernels.integers import ceil_div, div, rem
from pallas_kernels.interface import Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.band import (
  QuerySizes,
  choose_tiles,
  flat_rows,
  key_span,
  load_rows,
  per_head,
  tile_rows,
)
from pallas_kernels.triton.tiling import BandTiling


class Inputs(NamedTuple):
  """Arrays that the kernels read; those of queries are flat."""

  place: jax.Array  # int32 [B, 2]
  query: jax.Array  # [B T N, H]
  dout: jax.Array  # [B T N, V]
  lse: jax.Array  # [B T N], base 2; huge if the query reads nothing
  delta: jax.Array  # [B T N], sum(dout * out) - dlse
  key: jax.Array  # [B, S, K, H]
  value: jax.Array  # [B, S, K, V]
  segments: tuple[jax.Array, ...]


class Schedule(NamedTuple):
  """How the work is split into programs; hashable.

  Query tiles are those of the dq kernel, key tiles those of the dk, dv kernel.
  """

  spec: Spec  # with tiles
  band: Band
  sizes: QuerySizes
  num_tiles: int  # query tiles
  num_key_tiles: int
  num_chunks: int
  chunk_tiles: int  # query tiles per chunk
  slots: int  # most key tiles that a query tile can read
  splits: int  # programs per key tile

  @property
  def steps(self) -> int:
    """Steps of the dk, dv kernel per query tile."""
    return self.spec.tiles.steps

  @property
  def block_q(self) -> int:
    """Queries per query tile."""
    return queries_of_tile(self.spec.tiles, self.sizes)

  def tiles_of(self, chunk: Any) -> tuple[Any, int]:
    """First query tile of a chunk, and the distance between its tiles."""
    if self.band.window is None:
      # Interleaved, every chunk reads equally many keys and fills the device.
      return chunk, self.num_chunks
    # Contiguous, a chunk reads few key tiles.
    return chunk * self.chunk_tiles, 1

  def keys_of(
    self, tile: Any, offset: Any, first_row: Any, size: int
  ) -> tuple[Any, Any]:
    """Range of the key tiles, of `size` key rows, that a query tile reads.

    With the tile size of the dk, dv kernel, the range begins at slot 0 of the
    query tile's ds. That kernel writes ds for the whole range, because
    `query_tiles` yields the same pairs of query and key tile.
    """
    bounds = key_tiles(
      self.band,
      offset,
      first_row,
      tile * self.block_q,
      jnp.minimum((tile + 1) * self.block_q, self.sizes.length),
      size,
    )
    return bounds.begin, bounds.end


def queries_of_tile(tiles: BandTiling, sizes: QuerySizes) -> int:
  """Queries per query tile, in whole steps of the dk, dv kernel."""
  return tiles.steps * (tiles.dkv.rows // sizes.group)


def make_schedule(
  spec: Spec,
  band: Band,
  sizes: QuerySizes,
  *,
  batch: int,
  num_keys: int,
  dtype: Any,
) -> Schedule:
  """Chooses the chunks and splits for a shape.

  Args:
    spec: static arguments of the call, with tiles.
    band: band of the branch.
    sizes: sizes of the queries.
    batch: B.
    num_keys: number of key rows.
    dtype: dtype of ds.
  """
  tiles = spec.tiles
  block_k, block_q = tiles.dkv.block_k, queries_of_tile(tiles, sizes)
  num_tiles = -(-sizes.length // block_q)
  num_key_tiles = slots = -(-num_keys // block_k)
  if band.window is not None:
    # Windows and query tiles are not aligned to key tiles.
    slots = min(slots, (band.window + block_q - 2) // block_k + 2)
  heads = batch * (sizes.heads // sizes.group)
  size = heads * slots * block_k * tiles.dq.rows * jnp.dtype(dtype).itemsize
  num_chunks = -(-num_tiles // max(1, tiles.scratch // size))
  chunk_tiles = -(-num_tiles // num_chunks)
  splits = -(-tiles.programs // (num_key_tiles * heads))
  # Enough work per program: 8 steps if the whole chunk reads its key tile.
  splits = max(1, min(splits, chunk_tiles * tiles.steps // 8))
  return Schedule(
    spec,
    band,
    sizes,
    num_tiles,
    num_key_tiles,
    num_chunks,
    chunk_tiles,
    slots,
    splits,
  )


def backward(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  reads: BandReads,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of query, key and value, in their dtypes.

  Args:
    spec: as in `forward`.
    qkv: as in `forward`.
    reads: as in `forward`.
    out: [B, T, N, V], from `forward`.
    lse: [B, T, N], from `forward`.
    dout: [B, T, N, V], cotangent of `out`.
    dlse: float32 [B, T, N], cotangent of `lse`.
  """
  query, key, value = qkv
  delta = keep_finite(delta_of(out, dout, dlse), lse)
  # Queries that read nothing get probabilities of exactly 0.
  lse = jnp.where(lse == -jnp.inf, -common.MASK, lse * common.LOG2E)
  inputs = Inputs(
    reads.place,
    flat_rows(query),
    flat_rows(dout),
    flat_rows(lse),
    flat_rows(delta),
    key,
    value,
    reads.flat_segments,
  )
  _, length, heads, _ = query.shape
  schedule = make_schedule(
    spec._replace(tiles=choose_tiles(spec, reads.band, qkv)),
    reads.band,
    QuerySizes(length, heads, heads // key.shape[2]),
    batch=len(key),
    num_keys=key.shape[1],
    dtype=key.dtype,
  )
  step = functools.partial(_add_chunk, inputs=inputs, schedule=schedule)
  # The first chunk has no earlier gradients to add to.
  grads = step(jnp.int32(0), None)
  if schedule.num_chunks > 1:
    grads = lax.fori_loop(1, schedule.num_chunks, step, grads)
  dq, dk, dv = grads

  return (
    dq.reshape(query.shape),
    gradient_of(dk, key, spec.scale),
    gradient_of(dv, value),
  )


def _add_chunk(
  chunk: jax.Array,
  grads: tuple[jax.Array, ...] | None,
  inputs: Inputs,
  schedule: Schedule,
) -> tuple[jax.Array, ...]:
  """Adds the gradients of one chunk of queries, in place.

  Returns dq [B T N, H]; dk / scale [splits, B K, S, H] and
  dv [splits, B K, S, V] in float32.
  """
  chunk = chunk.astype(jnp.int32).reshape(1)
  dq, *sums = grads or (None,)
  *sums, ds = _key_value_gradient(chunk, tuple(sums), inputs, schedule)
  return (_query_gradient(chunk, ds, dq, inputs, schedule), *sums)


def row_and_head(head: Any, sizes: QuerySizes) -> tuple[Any, Any]:
  """Batch row and key/value head from one index in [0, B K).

  They share a grid axis: on its own axis, Triton knows that a single batch row
  is 0, and keeps so many addresses in registers that the gradients spill.
  """
  kv_heads = sizes.heads // sizes.group
  return div(head, kv_heads), rem(head, kv_heads)


def _dkv_kernel(
  chunk_ref,  # [1]
  place_ref,  # [2]
  q_ref,  # [B T N, H]
  dout_ref,  # [B T N, V]
  lse_ref,  # [B T N]
  delta_ref,  # [B T N]
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  # Segments [S] and [B T], if any; dk and dv of earlier chunks, if any; dk
  # [block_k, H], dv [block_k, V]; ds [chunk_tiles, slots block_k, dq.rows].
  *refs,
  schedule: Schedule,
  segmented: bool,
  exp2: Callable[[jax.Array], jax.Array],
):
  *optional, dk_ref, dv_ref, ds_ref = refs
  segments = optional[:2] if segmented else ()
  before = optional[len(segments) :]
  sizes, spec, band = schedule.sizes, schedule.spec, schedule.band
  tile = spec.tiles.dkv
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[-1])
  value_pieces = common.pieces(value_dim)
  split, head, j = (pl.program_id(axis) for axis in range(3))
  b, h = row_and_head(head, sizes)
  offset, first_row = place_ref[0], place_ref[1]
  begin, end = query_tiles(
    band,
    offset,
    first_row,
    j * tile.block_k,
    tile.block_k,
    sizes.length,
    schedule.block_q,
  )
  # Steps of this chunk, counted from its first.
  start, apart = schedule.tiles_of(chunk_ref[0])
  begin, end = (
    jnp.minimum(
      ceil_div(jnp.maximum(x - start, 0), apart), schedule.chunk_tiles
    )
    * schedule.steps
    for x in (begin, end)
  )
  # Equal shares of the steps that read these keys, so that no program finishes
  # long after the others.
  share = ceil_div(jnp.maximum(end - begin, 0), schedule.splits)
  begin += split * share
  end = jnp.minimum(end, begin + share)

  def run():
    span_k, token, inside = key_span(j, tile.block_k, num_keys)
    k = common.load_pieces(k_ref, span_k, head_pieces, inside)
    v = common.load_pieces(v_ref, span_k, value_pieces, inside)
    if segments:
      key_segment = common.load(segments[0].at[span_k], inside)

    # Every step is masked: its products take longer than the mask, and a
    # separate loop for unmasked steps would begin by waiting for its loads.
    def step(i, carry):
      dk, dv = carry
      number, part = (
        div(i, schedule.steps),
        rem(i, schedule.steps),
      )
      queries = start + number * apart
      rows = tile_rows(queries, b, h, tile.rows, sizes, schedule.steps, part)
      q = load_rows(q_ref, rows.index, head_pieces)
      dout = load_rows(dout_ref, rows.index, value_pieces)
      lse, delta = lse_ref[rows.index], delta_ref[rows.index]

      def summed(x):  # zeroes rows that repeat another
        if rows.distinct is None:
          return x
        return jnp.where(rows.distinct[None, :], x, 0)

      # Transposed, [keys, tile rows], so that dk and dv need no transpose.
      s = common.dot_pieces(k, q)
      p = exp2(s * (spec.scale * common.LOG2E) - lse[None, :])
      t = offset + rows.query
      mask = band.readable(token[:, None], t[None, :], first_row)
      if segments:
        segment = segments[1][b * sizes.length + rows.query]
        mask &= key_segment[:, None] == segment[None, :]
      p = jnp.where(mask, p, 0)
      dv = tuple(
        d + common.dot(summed(p).astype(x.dtype), x)
        for d, x in zip(dv, dout, strict=True)
      )
      dp = common.dot_pieces(v, dout)
      ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
      slot = j - schedule.keys_of(queries, offset, first_row, tile.block_k)[0]
      ds_ref[
        number,
        pl.ds(slot * tile.block_k, tile.block_k),
        pl.ds(part * tile.rows, tile.rows),
      ] = ds
      ds = summed(ds)
      dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
      return dk, dv

    dk, dv = lax.fori_loop(
      begin,
      end,
      step,
      (
        common.accumulators(tile.block_k, head_pieces),
        common.accumulators(tile.block_k, value_pieces),
      ),
    )
    for i, (ref, pieces, grads) in enumerate(
      ((dk_ref, head_pieces, dk), (dv_ref, value_pieces, dv))
    ):
      for (column, width), d in zip(pieces, grads, strict=True):
        columns = pl.ds(column, width)
        if before:
          d += common.load(before[i].at[:, columns], inside)
        common.store(ref.at[:, columns], d, inside)

  if before:
    pl.when(begin < end)(run)
  else:
    run()


def _key_value_gradient(
  chunk: jax.Array,
  before: tuple[jax.Array, ...],
  inputs: Inputs,
  schedule: Schedule,
) -> tuple[jax.Array, ...]:
  """dk, dv as in `_add_chunk`; ds [B K, chunk_tiles, slots block_k, rows]."""
  tiles = schedule.spec.tiles
  tile = tiles.dkv
  batch, num_keys, kv_heads, _ = inputs.key.shape
  heads = batch * kv_heads
  widths = (inputs.key.shape[-1], inputs.value.shape[-1])
  place, keys, segments = per_head(
    inputs.key, inputs.segments, lambda s, i, j: row_and_head(i, schedule.sizes)
  )
  grads = [
    pl.BlockSpec(
      (None, None, tile.block_k, width), lambda s, i, j: (s, i, j, 0)
    )
    for width in widths
  ]
  ds = (schedule.chunk_tiles, schedule.slots * tile.block_k, tiles.dq.rows)
  per_query = inputs[1:5]
  args = (
    chunk,
    inputs.place,
    *per_query,
    inputs.key,
    inputs.value,
    *inputs.segments,
  )
  return tuple(
    pl.pallas_call(
      functools.partial(
        _dkv_kernel,
        schedule=schedule,
        segmented=bool(inputs.segments),
        exp2=common.exp2(schedule.spec.interpret),
      ),
      **common.options(
        f"nsa_{schedule.band.branch}_dkv",
        tile.num_warps,
        tile.num_stages,
        schedule.spec.interpret,
      ),
      grid=(schedule.splits, heads, schedule.num_key_tiles),
      in_specs=[
        common.whole(chunk),
        place,
        *map(common.whole, per_query),
        *map(keys, widths),
        *segments,
        *(grads if before else ()),
      ],
      out_specs=[
        *grads,
        pl.BlockSpec((None, *ds), lambda s, i, j: (i, 0, 0, 0)),
      ],
      out_shape=[
        *(
          platforms.out_shape(
            (schedule.splits, heads, num_keys, width), jnp.float32
          )
          for width in widths
        ),
        platforms.out_shape((heads, *ds), inputs.query.dtype),
      ],
      input_output_aliases={len(args) + i: i for i in range(len(before))},
    )(*args, *before)
  )


def _dq_kernel(
  chunk_ref,  # [1]
  place_ref,  # [2]
  lse_ref,  # [B T N]
  ds_ref,  # [chunk_tiles, slots block_k, rows]
  k_ref,  # [S, H]
  *refs,  # dq of earlier chunks, if any; dq [B T N, H]
  schedule: Schedule,
):
  dq_ref = refs[-1]
  sizes, spec, tiles = schedule.sizes, schedule.spec, schedule.spec.tiles
  tile, block_k = tiles.dq, tiles.dkv.block_k
  num_keys, head_dim = k_ref.shape
  head_pieces = common.pieces(head_dim)
  h, b = pl.program_id(1), pl.program_id(2)
  offset, first_row = place_ref[0], place_ref[1]
  # The last queries read the most keys, so they start first.
  number = schedule.chunk_tiles - 1 - pl.program_id(0)
  start, apart = schedule.tiles_of(chunk_ref[0])
  i = start + number * apart

  # All chunks have `chunk_tiles` tiles, but the last ones may not exist.
  @pl.when(i < schedule.num_tiles)
  def _():
    rows = tile_rows(i, b, h, tiles.dkv.rows, sizes, schedule.steps)
    first = schedule.keys_of(i, offset, first_row, block_k)[0] * block_k

    def step(j, dq):
      span_k, _, inside = key_span(j, tile.block_k, num_keys)
      k = common.load_pieces(k_ref, span_k, head_pieces, inside)
      slots = pl.ds(j * tile.block_k - first, tile.block_k)
      ds = ds_ref[number, slots, :].T
      return tuple(d + common.dot(ds, x) for d, x in zip(dq, k, strict=True))

    dq = lax.fori_loop(
      *schedule.keys_of(i, offset, first_row, tile.block_k),
      step,
      common.accumulators(tile.rows, head_pieces),
    )
    # A NaN in an unread value may be in the ds of queries that read nothing.
    some = (lse_ref[rows.index] != -common.MASK)[:, None]
    for (column, width), d in zip(head_pieces, dq, strict=True):
      d = jnp.where(some, d * spec.scale, 0).astype(dq_ref.dtype)
      dq_ref[rows.index, pl.ds(column, width)] = d


def _query_gradient(
  chunk: jax.Array,
  ds: jax.Array,
  before: jax.Array | None,
  inputs: Inputs,
  schedule: Schedule,
) -> jax.Array:
  """dq [B T N, H]."""
  tile = schedule.spec.tiles.dq
  batch, _, kv_heads, head_dim = inputs.key.shape
  place, keys, _ = per_head(inputs.key, ())
  query = platforms.out_shape(inputs.query.shape, inputs.query.dtype)
  args = (chunk, inputs.place, inputs.lse, ds, inputs.key)
  aliased = () if before is None else (before,)
  return pl.pallas_call(
    functools.partial(_dq_kernel, schedule=schedule),
    **common.options(
      f"nsa_{schedule.band.branch}_dq",
      tile.num_warps,
      tile.num_stages,
      schedule.spec.interpret,
    ),
    grid=(schedule.chunk_tiles, kv_heads, batch),
    in_specs=[
      common.whole(chunk),
      place,
      common.whole(inputs.lse),
      pl.BlockSpec(
        (None, *ds.shape[1:]), lambda i, h, b: (b * kv_heads + h, 0, 0, 0)
      ),
      keys(head_dim),
      *map(common.whole, aliased),
    ],
    out_specs=common.whole(query),
    out_shape=query,
    input_output_aliases={len(args): 0} if aliased else {},
  )(*args, *aliased)
