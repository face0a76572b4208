"""Attention over a band of keys, backward.

dk, dv: one program per tile of keys and part of the queries that read it; rows
hold all heads of a group, so the sum over the group is part of the products.
dq: either the forward kernel's loop once more (two passes, 7 products of
queries with keys), or shares that the first kernel computes on its way (one
pass, 5 products) and a second sums over the tiles of keys, in order. No
atomics: every run gives the same bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common
from pallas_kernels.triton.band_attention import (
  Band,
  Bounds,
  Sizes,
  Spec,
  ceil_div,
  flat_rows,
  gather,
  key_span,
  key_tiles,
  per_head,
  tile_rows,
  walk,
  whole,
  within,
)


class Inputs(NamedTuple):
  """What the kernels read; queries are flat."""

  place: jax.Array  # int32 [B, 2]
  query: jax.Array  # [B T N, H]
  dout: jax.Array  # [B T N, V]
  lse: jax.Array  # [B T N], to base 2; huge where nothing is read
  delta: jax.Array  # [B T N], sum(dout * out) - dlse
  key: jax.Array  # [B, S, K, H]
  value: jax.Array  # [B, S, K, V]
  segments: tuple[jax.Array, ...]


def backward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  place: jax.Array,
  segments: tuple[jax.Array, ...],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
  *,
  spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of query, key and value, in their dtypes.

  Args:
    query: [B, T, N, H]; as are the next four arguments those of `forward`.
    key: [B, S, K, H].
    value: [B, S, K, V].
    place: int32 [B, 2].
    segments: () or int32 [B, S] and [B T].
    out: [B, T, N, V], of `forward`, as is lse [B, T, N].
    lse: [B, T, N].
    dout: [B, T, N, V], cotangent of `out`.
    dlse: float32 [B, T, N], cotangent of `lse`.
    spec: band, scale and tiles.
  """
  delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  # Rows that read nothing get probabilities of exactly 0.
  lse = jnp.where(lse == -jnp.inf, -common.MASK, lse * common.LOG2E)
  inputs = Inputs(
    place,
    flat_rows(query),
    flat_rows(dout),
    flat_rows(lse),
    flat_rows(delta - dlse),
    key,
    value,
    segments,
  )
  _, length, heads, _ = query.shape
  sizes = Sizes(length, heads, heads // key.shape[2])
  dq, dk, dv = _key_value_gradient(inputs, sizes, spec)
  if dq is None:
    dq = _query_gradient(inputs, sizes, spec)

  def finish(x, like):
    x = jnp.swapaxes(x.reshape(len(key), key.shape[2], *x.shape[1:]), 1, 2)
    return x.astype(like.dtype)

  return (
    dq.reshape(query.shape),
    finish(dk * spec.scale, key),
    finish(dv, value),
  )


def _dq_kernel(
  place_ref,  # [2]
  q_ref,  # [B T N, H]
  dout_ref,  # [B T N, V]
  lse_ref,  # [B T N]
  delta_ref,  # [B T N]
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  *refs,  # segments [S] and [B T], if any; dq [B T N, H]
  spec: Spec,
  sizes: Sizes,
):
  *segments, dq_ref = refs
  band, tile = spec.band, spec.tiling.dq
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[-1])
  value_pieces = common.pieces(value_dim)
  block_q = tile.rows // sizes.group
  i = pl.num_programs(0) - 1 - pl.program_id(0)
  h, b = pl.program_id(1), pl.program_id(2)
  rows = tile_rows(i, b, h, tile.rows, sizes)
  offset, first_row = place_ref[0], place_ref[1]
  t = offset + rows.query
  q = gather(q_ref, rows.index, head_pieces)
  dout = gather(dout_ref, rows.index, value_pieces)
  lse, delta = lse_ref[rows.index], delta_ref[rows.index]
  if segments:
    segment = segments[1][b * sizes.length + rows.query]

  def step(j, dq, masked):
    span_k, token, inside = key_span(j, tile.block_k, num_keys)
    inside = inside if masked else None
    k = common.load_pieces(k_ref, span_k, head_pieces, inside)
    v = common.load_pieces(v_ref, span_k, value_pieces, inside)
    s = common.dot_pieces(q, k) * (spec.scale * common.LOG2E)
    if masked:
      mask = band.readable(token[None, :], t[:, None], first_row)
      if segments:
        keys = common.load(segments[0].at[span_k], inside)
        mask &= keys[None, :] == segment[:, None]
      s = jnp.where(mask, s, common.MASK)
    p = jnp.exp2(s - lse[:, None])
    dp = common.dot_pieces(dout, v)
    ds = (p * (dp - delta[:, None])).astype(q_ref.dtype)
    return tuple(d + common.dot(ds, x) for d, x in zip(dq, k, strict=True))

  bounds = key_tiles(
    band,
    offset,
    first_row,
    i * block_q,
    jnp.minimum((i + 1) * block_q, sizes.length),
    tile.block_k,
  )
  dq = tuple(jnp.zeros((tile.rows, w), jnp.float32) for _, w in head_pieces)
  dq = walk(step, dq, bounds, bool(segments))
  for (start, width), d in zip(head_pieces, dq, strict=True):
    d = (d * spec.scale).astype(dq_ref.dtype)
    dq_ref[rows.index, pl.ds(start, width)] = d


def _query_gradient(inputs: Inputs, sizes: Sizes, spec: Spec) -> jax.Array:
  """dq [B T N, H] by a pass of its own."""
  tile = spec.tiling.dq
  batch, _, kv_heads, value_dim = inputs.value.shape
  place, keys, segments = per_head(inputs.key, inputs.segments)
  per_query = inputs[1:5]
  return common.pallas_call(
    functools.partial(_dq_kernel, spec=spec, sizes=sizes),
    name="nsa_band_dq",
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    grid=(-(-sizes.length // (tile.rows // sizes.group)), kv_heads, batch),
    in_specs=[
      place,
      *map(whole, per_query),
      keys(inputs.key.shape[-1]),
      keys(value_dim),
      *segments,
    ],
    out_specs=whole(inputs.query),
    out_shape=jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype),
  )(inputs.place, *per_query, inputs.key, inputs.value, *inputs.segments)


class Chunk(NamedTuple):
  """What one call of the kernel of dk and dv covers; hashable.

  A head is one of the B K pairs of batch row and key/value head.
  """

  heads: int  # heads in a chunk
  tiles: int  # tiles of queries in a chunk
  starts: tuple[tuple[int, int], ...]  # first head, first tile of each chunk
  splits: int  # programs that share the queries of one tile of keys
  shares: int  # tiles of keys that one tile of queries reads; 0: two passes


def _chunks(inputs: Inputs, sizes: Sizes, spec: Spec) -> Chunk:
  """All heads and queries at once, or as many as the shares leave room for."""
  tiling, tile = spec.tiling, spec.tiling.dkv
  batch, num_keys, kv_heads, head_dim = inputs.key.shape
  num_heads = batch * kv_heads
  num_key_tiles = -(-num_keys // tile.block_k)
  block_q = tile.rows // sizes.group
  num_tiles = -(-sizes.length // block_q)
  heads, tiles, shares = num_heads, num_tiles, 0
  if tiling.one_pass:
    shares = num_key_tiles
    if spec.band.window is not None:
      keys = block_q + spec.band.window - 1
      shares = min(shares, -(-(keys - 1) // tile.block_k) + 1)
    share = tile.rows * head_dim * inputs.query.dtype.itemsize
    room = max(1, tiling.share_bytes // (share * shares))
    fit = max(1, room // num_tiles)
    heads = max(n for n in range(1, fit + 1) if num_heads % n == 0)
    # Chunks of equal size, so that one program serves all.
    tiles = -(-num_tiles // -(-num_tiles // room))
  starts = tuple(
    (h, i)
    for h in range(0, num_heads, heads)
    for i in range(0, num_tiles, tiles)
  )
  splits = -(-tiling.programs // (num_key_tiles * heads))
  # A program that starts must have something to do.
  splits = max(1, min(splits, tiles // 8))
  return Chunk(heads, tiles, starts, splits, shares)


def query_tiles(
  band: Band,
  offset: Any,
  first_row: Any,
  start_k: Any,
  block_k: int,
  length: int,
  block_q: int,
) -> Bounds:
  """Tiles of queries that read a tile of keys: the inverse of `key_tiles`.

  Args:
    band: the band.
    offset: position of query 0.
    first_row: first row of keys that exists.
    start_k: first row of the tile of keys.
    block_k: rows of the tile.
    length: T.
    block_q: queries of a tile.
  """
  last_k = start_k + block_k - 1
  first = start_k * band.stride + (band.span - 1) - offset
  all_first = last_k * band.stride + (band.span - 1) - offset
  stop = jnp.minimum(length, band.length - offset)
  if band.window is not None:
    stop = jnp.minimum(stop, last_k + band.window - offset)
    stop = jnp.where(last_k < first_row, 0, stop)
  begin = common.div(jnp.maximum(first, 0), block_q)
  end = jnp.where(first < stop, ceil_div(jnp.maximum(stop, 0), block_q), 0)
  full_begin = within(ceil_div(jnp.maximum(all_first, 0), block_q), begin, end)
  full_end = end
  if band.window is not None:
    all_stop = jnp.maximum(start_k + band.window - offset, 0)
    all_stop = jnp.where(start_k < first_row, 0, all_stop)
    full_end = within(common.div(all_stop, block_q), full_begin, end)
  return Bounds(begin, full_begin, full_end, end)


def _dkv_kernel(
  chunk_ref,  # [2]: first head, first tile of queries
  place_ref,  # [B, 2]
  q_ref,  # [B T N, H]
  dout_ref,  # [B T N, V]
  lse_ref,  # [B T N]
  delta_ref,  # [B T N]
  k_ref,  # [B, S, K, H]
  v_ref,  # [B, S, K, V]
  *refs,  # segments [B, S] and [B T], if any; then those named below
  spec: Spec,
  sizes: Sizes,
  chunk: Chunk,
):
  # Of this program: [block_k, H], [block_k, V]; of the head, if one pass:
  # [shares, tiles * rows, H].
  count = 3 if chunk.shares else 2
  segments, (dk_ref, dv_ref, *shares) = refs[:-count], refs[-count:]
  band, tile = spec.band, spec.tiling.dkv
  num_keys, kv_heads, value_dim = v_ref.shape[1:]
  head_pieces = common.pieces(q_ref.shape[-1])
  value_pieces = common.pieces(value_dim)
  block_q = tile.rows // sizes.group
  j, split = pl.program_id(0), pl.program_id(1)
  first_head, first_tile = chunk_ref[0], chunk_ref[1]
  head = first_head + pl.program_id(2)
  b, h = common.div(head, kv_heads), common.rem(head, kv_heads)
  offset, first_row = place_ref[b, 0], place_ref[b, 1]
  span_k, token, inside = key_span(j, tile.block_k, num_keys)
  k = common.load_pieces(k_ref, (b, span_k, h), head_pieces, inside)
  v = common.load_pieces(v_ref, (b, span_k, h), value_pieces, inside)
  if segments:
    key_segment = common.load(segments[0].at[b, span_k], inside)

  def step(i, carry, masked):
    dk, dv = carry
    rows = tile_rows(i, b, h, tile.rows, sizes)
    q = gather(q_ref, rows.index, head_pieces)
    dout = gather(dout_ref, rows.index, value_pieces)
    lse, delta = lse_ref[rows.index], delta_ref[rows.index]
    if rows.real is not None:
      lse = jnp.where(rows.real, lse, -common.MASK)
    # Transposed: keys are the rows, so that dk and dv need no transpose.
    s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
    if masked:
      t = offset + rows.query
      mask = band.readable(token[:, None], t[None, :], first_row)
      if segments:
        segment = segments[1][b * sizes.length + rows.query]
        mask &= key_segment[:, None] == segment[None, :]
      s = jnp.where(mask, s, common.MASK)
    p = jnp.exp2(s - lse[None, :])
    dv = tuple(
      d + common.dot(p.astype(x.dtype), x)
      for d, x in zip(dv, dout, strict=True)
    )
    dp = common.dot_pieces(v, dout)
    ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
    dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
    for dq_ref in shares:
      begin = _key_tiles_of(i, place, sizes, spec).begin
      span_q = pl.ds((i - first_tile) * tile.rows, tile.rows)
      for (start, width), x in zip(head_pieces, k, strict=True):
        dq = (common.dot(ds.T, x) * spec.scale).astype(dq_ref.dtype)
        dq_ref[j - begin, span_q, pl.ds(start, width)] = dq
    return dk, dv

  place = (offset, first_row)
  bounds = query_tiles(
    band, *place, j * tile.block_k, tile.block_k, sizes.length, block_q
  )
  per_split = -(-chunk.tiles // chunk.splits)
  start = split * per_split
  stop = first_tile + jnp.minimum(start + per_split, chunk.tiles)
  start = first_tile + start
  full_begin = within(bounds.full_begin, start, stop)
  end = within(bounds.end, start, stop)
  bounds = Bounds(
    within(bounds.begin, start, stop),
    full_begin,
    end if band.window is None else within(bounds.full_end, start, stop),
    end,
  )
  dk, dv = walk(
    step,
    tuple(
      tuple(jnp.zeros((tile.block_k, w), jnp.float32) for _, w in pieces)
      for pieces in (head_pieces, value_pieces)
    ),
    bounds,
    bool(segments),
  )
  for ref, pieces, grads in (
    (dk_ref, head_pieces, dk),
    (dv_ref, value_pieces, dv),
  ):
    for (column, width), d in zip(pieces, grads, strict=True):
      common.store(ref.at[:, pl.ds(column, width)], d, inside)


def _key_tiles_of(
  i: Any, place: tuple[Any, Any], sizes: Sizes, spec: Spec
) -> Bounds:
  """Tiles of keys that tile i of the queries reads, as `dkv` cuts both."""
  tile = spec.tiling.dkv
  block_q = tile.rows // sizes.group
  stop = jnp.minimum((i + 1) * block_q, sizes.length)
  return key_tiles(
    spec.band, place[0], place[1], i * block_q, stop, tile.block_k
  )


def _sum_kernel(
  chunk_ref,  # [2]
  place_ref,  # [B, 2]
  share_ref,  # [shares, rows, H]
  before_ref,  # dq without this chunk, the memory of dq_ref
  dq_ref,  # [B T N, H]
  *,
  spec: Spec,
  sizes: Sizes,
):
  del before_ref
  num_rows = spec.tiling.dkv.rows
  block_q = num_rows // sizes.group
  i = chunk_ref[1] + pl.program_id(0)
  head = chunk_ref[0] + pl.program_id(1)

  @pl.when(i * block_q < sizes.length)
  def _():
    kv_heads = sizes.heads // sizes.group
    b, h = common.div(head, kv_heads), common.rem(head, kv_heads)
    rows = tile_rows(i, b, h, num_rows, sizes)
    # Repeated rows have no shares of their own: they copy the last real row.
    first = (b * sizes.length + i * block_q) * sizes.heads + h * sizes.group
    local = rows.query - i * block_q
    source = local * sizes.group + (rows.index - first - local * sizes.heads)
    place = (place_ref[b, 0], place_ref[b, 1])
    bounds = _key_tiles_of(i, place, sizes, spec)
    count = bounds.end - bounds.begin
    for start, width in common.pieces(dq_ref.shape[-1]):

      def add(n, dq, start=start, width=width):
        share = share_ref[n, source, pl.ds(start, width)]
        return dq + share.astype(jnp.float32)

      dq = jnp.zeros((num_rows, width), jnp.float32)
      dq = lax.fori_loop(0, count, add, dq)
      dq_ref[rows.index, pl.ds(start, width)] = dq.astype(dq_ref.dtype)


def _key_value_gradient(
  inputs: Inputs, sizes: Sizes, spec: Spec
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
  """dq [B T N, H] if one pass; dk / scale [B K, S, H], dv, float32."""
  tile = spec.tiling.dkv
  chunk = _chunks(inputs, sizes, spec)
  batch, num_keys, kv_heads, head_dim = inputs.key.shape
  widths = (head_dim, inputs.value.shape[-1])
  arrays = (*inputs[:-1], *inputs.segments)
  start_spec = pl.BlockSpec((2,), lambda *_: (0,))
  partial_shapes = [
    jax.ShapeDtypeStruct(
      (chunk.splits, chunk.heads, num_keys, width), jnp.float32
    )
    for width in widths
  ]
  partial_specs = [
    pl.BlockSpec(
      (None, None, tile.block_k, width), lambda j, s, n: (s, n, j, 0)
    )
    for width in widths
  ]
  if chunk.shares:
    share = (chunk.shares, chunk.tiles * tile.rows, head_dim)
    partial_shapes.append(
      jax.ShapeDtypeStruct((chunk.heads, *share), inputs.query.dtype)
    )
    partial_specs.append(
      pl.BlockSpec((None, *share), lambda j, s, n: (n, 0, 0, 0))
    )
  gradients = common.pallas_call(
    functools.partial(_dkv_kernel, spec=spec, sizes=sizes, chunk=chunk),
    name="nsa_band_bwd" if chunk.shares else "nsa_band_dkv",
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    grid=(-(-num_keys // tile.block_k), chunk.splits, chunk.heads),
    in_specs=[start_spec, *map(whole, arrays)],
    out_specs=partial_specs,
    out_shape=partial_shapes,
  )
  if not chunk.shares:
    dk, dv = gradients(jnp.zeros(2, jnp.int32), *arrays)
    return None, dk.sum(axis=0), dv.sum(axis=0)
  dq_like = jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype)
  sum_shares = common.pallas_call(
    functools.partial(_sum_kernel, spec=spec, sizes=sizes),
    name="nsa_band_dq_sum",
    num_warps=4,
    num_stages=1,
    grid=(chunk.tiles, chunk.heads),
    in_specs=[
      start_spec,
      whole(inputs.place),
      pl.BlockSpec(
        (None, chunk.shares, tile.rows, head_dim), lambda i, n: (n, 0, i, 0)
      ),
      whole(inputs.query),
    ],
    out_specs=whole(inputs.query),
    out_shape=dq_like,
    input_output_aliases={3: 0},
  )

  def body(carry, start):
    dq, *totals = carry
    *partial, shares = gradients(start, *arrays)
    dq = sum_shares(start, inputs.place, shares, dq)

    def add(total, x):
      old = lax.dynamic_slice_in_dim(total, start[0], chunk.heads)
      return lax.dynamic_update_slice_in_dim(
        total, old + x.sum(axis=0), start[0], 0
      )

    return (dq, *map(add, totals, partial)), None

  carry = (
    jnp.zeros(dq_like.shape, dq_like.dtype),
    *(
      jnp.zeros((batch * kv_heads, num_keys, width), jnp.float32)
      for width in widths
    ),
  )
  starts = jnp.array(chunk.starts, jnp.int32)
  if len(chunk.starts) == 1:
    carry, _ = body(carry, starts[0])
  else:
    carry, _ = lax.scan(body, carry, starts)
  dq, dk, dv = carry
  return dq, dk, dv
