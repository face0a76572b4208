"""Attention over a band of keys, backward.

dq: the forward kernel's loop once more. dk, dv: one program per tile of keys
and part of the queries that read it; rows hold all heads of a group, so the sum
over the group is part of the products. No atomics: every run gives the same
bits. One kernel for all three would need 5 products instead of 7, but the
shares of dq that it writes, one per tile of keys, cost more than it saves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common
from pallas_kernels.triton.band_attention import (
  Band,
  Sizes,
  Spec,
  ceil_div,
  flat_rows,
  gather,
  key_span,
  per_head,
  program,
  tile_rows,
  walk,
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
  dq = _query_gradient(inputs, sizes, spec)
  dk, dv = _key_value_gradient(inputs, sizes, spec)

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
  exp2: Callable[[jax.Array], jax.Array],
):
  *segments, dq_ref = refs
  band, tile = spec.band, spec.tiling.dq
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[-1])
  value_pieces = common.pieces(value_dim)
  mine = program(place_ref, segments, band, tile, sizes)
  q = gather(q_ref, mine.index, head_pieces)
  dout = gather(dout_ref, mine.index, value_pieces)
  lse, delta = lse_ref[mine.index], delta_ref[mine.index]

  def step(j, dq, masked):
    span_k, token, inside = key_span(j, tile.block_k, num_keys)
    inside = inside if masked else None
    k = common.load_pieces(k_ref, span_k, head_pieces, inside)
    v = common.load_pieces(v_ref, span_k, value_pieces, inside)
    s = common.dot_pieces(q, k) * (spec.scale * common.LOG2E)
    if masked:
      s = jnp.where(mine.mask(span_k, token, inside), s, common.MASK)
    p = exp2(s - lse[:, None])
    dp = common.dot_pieces(dout, v)
    ds = (p * (dp - delta[:, None])).astype(q_ref.dtype)
    return tuple(d + common.dot(ds, x) for d, x in zip(dq, k, strict=True))

  dq = common.accumulators(tile.rows, head_pieces)
  dq = walk(step, dq, mine.bounds, bool(segments))
  for (start, width), d in zip(head_pieces, dq, strict=True):
    d = (d * spec.scale).astype(dq_ref.dtype)
    dq_ref[mine.index, pl.ds(start, width)] = d


def _query_gradient(inputs: Inputs, sizes: Sizes, spec: Spec) -> jax.Array:
  """dq [B T N, H]."""
  tile = spec.tiling.dq
  batch, _, kv_heads, value_dim = inputs.value.shape
  place, keys, segments = per_head(inputs.key, inputs.segments)
  per_query = inputs[1:5]
  return common.pallas_call(
    functools.partial(_dq_kernel, spec=spec, sizes=sizes),
    name=f"nsa_{spec.branch}_dq",
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    with_exp2=True,
    grid=(-(-sizes.length // (tile.rows // sizes.group)), kv_heads, batch),
    in_specs=[
      place,
      *map(common.whole, per_query),
      keys(inputs.key.shape[-1]),
      keys(value_dim),
      *segments,
    ],
    out_specs=common.whole(inputs.query),
    out_shape=jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype),
  )(inputs.place, *per_query, inputs.key, inputs.value, *inputs.segments)


def query_tiles(
  band: Band,
  offset: Any,
  first_row: Any,
  start_k: Any,
  block_k: int,
  length: int,
  block_q: int,
) -> tuple[Any, Any]:
  """Range of the tiles of queries that read a tile of keys.

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
  stop = jnp.minimum(length, band.length - offset)
  if band.window is not None:
    stop = jnp.minimum(stop, last_k + band.window - offset)
    stop = jnp.where(last_k < first_row, 0, stop)
  begin = common.div(jnp.maximum(first, 0), block_q)
  end = jnp.where(first < stop, ceil_div(jnp.maximum(stop, 0), block_q), 0)
  return begin, end


def share_of(i: Any, splits: int, heads: int) -> tuple[Any, Any, Any]:
  """Tile of keys, part of its queries, head [B K] of program i.

  The first tiles have most readers and begin first, all their parts together.
  """
  rest = common.rem(i, splits * heads)
  j = common.div(i, splits * heads)
  return j, common.rem(rest, splits), common.div(rest, splits)


def row_and_head(head: Any, sizes: Sizes) -> tuple[Any, Any]:
  """Batch row and key/value head of one of the B K pairs.

  From one number: Triton knows that the only batch row is 0, and keeps so much
  of the addresses in registers that the gradients spill.
  """
  kv_heads = sizes.heads // sizes.group
  return common.div(head, kv_heads), common.rem(head, kv_heads)


def _dkv_kernel(
  place_ref,  # [2]
  q_ref,  # [B T N, H]
  dout_ref,  # [B T N, V]
  lse_ref,  # [B T N]
  delta_ref,  # [B T N]
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  *refs,  # segments [S] and [B T], if any; dk [block_k, H], dv [block_k, V]
  spec: Spec,
  sizes: Sizes,
  splits: int,
  assign: Callable[[Any], tuple[Any, Any, Any]],
  exp2: Callable[[jax.Array], jax.Array],
):
  *segments, dk_ref, dv_ref = refs
  band, tile = spec.band, spec.tiling.dkv
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[-1])
  value_pieces = common.pieces(value_dim)
  j, split, head = assign(pl.program_id(0))
  b, h = row_and_head(head, sizes)
  offset, first_row = place_ref[0], place_ref[1]
  span_k, token, inside = key_span(j, tile.block_k, num_keys)
  k = common.load_pieces(k_ref, span_k, head_pieces, inside)
  v = common.load_pieces(v_ref, span_k, value_pieces, inside)
  if segments:
    key_segment = common.load(segments[0].at[span_k], inside)

  # Every step is masked: it waits for its products, not for the mask, and a
  # loop of its own for the steps without one would begin by waiting for loads.
  def step(i, carry):
    dk, dv = carry
    rows = tile_rows(i, b, h, tile.rows, sizes)
    q = gather(q_ref, rows.index, head_pieces)
    dout = gather(dout_ref, rows.index, value_pieces)
    lse, delta = lse_ref[rows.index], delta_ref[rows.index]
    if rows.real is not None:
      lse = jnp.where(rows.real, lse, -common.MASK)
    # Transposed: keys are the rows, so that dk and dv need no transpose.
    s = common.dot_pieces(k, q)
    p = exp2(s * (spec.scale * common.LOG2E) - lse[None, :])
    t = offset + rows.query
    mask = band.readable(token[:, None], t[None, :], first_row)
    if segments:
      segment = segments[1][b * sizes.length + rows.query]
      mask &= key_segment[:, None] == segment[None, :]
    p = jnp.where(mask, p, 0)
    dv = tuple(
      d + common.dot(p.astype(x.dtype), x)
      for d, x in zip(dv, dout, strict=True)
    )
    dp = common.dot_pieces(v, dout)
    ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
    dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
    return dk, dv

  begin, end = query_tiles(
    band,
    offset,
    first_row,
    j * tile.block_k,
    tile.block_k,
    sizes.length,
    tile.rows // sizes.group,
  )
  # Equal shares of what reads these keys: no program is left over at the end.
  share = ceil_div(jnp.maximum(end - begin, 0), splits)
  begin += split * share
  dk, dv = lax.fori_loop(
    begin,
    jnp.minimum(end, begin + share),
    step,
    (
      common.accumulators(tile.block_k, head_pieces),
      common.accumulators(tile.block_k, value_pieces),
    ),
  )
  for ref, pieces, grads in (
    (dk_ref, head_pieces, dk),
    (dv_ref, value_pieces, dv),
  ):
    for (column, width), d in zip(pieces, grads, strict=True):
      common.store(ref.at[:, pl.ds(column, width)], d, inside)


def _key_value_gradient(
  inputs: Inputs, sizes: Sizes, spec: Spec
) -> tuple[jax.Array, jax.Array]:
  """dk / scale [B K, S, H] and dv [B K, S, V], float32."""
  tile = spec.tiling.dkv
  batch, num_keys, kv_heads, _ = inputs.key.shape
  num_key_tiles = -(-num_keys // tile.block_k)
  num_tiles = -(-sizes.length // (tile.rows // sizes.group))
  splits = -(-spec.tiling.programs // (num_key_tiles * kv_heads * batch))
  # A program that starts must have something to do.
  splits = max(1, min(splits, num_tiles // 8))
  assign = functools.partial(share_of, splits=splits, heads=batch * kv_heads)
  widths = (inputs.key.shape[-1], inputs.value.shape[-1])
  place, keys, segments = per_head(
    inputs.key, inputs.segments, lambda i: row_and_head(assign(i)[2], sizes)
  )

  def partial_block(i):
    j, split, head = assign(i)
    return split, head, j, 0

  per_query = inputs[1:5]
  partial = common.pallas_call(
    functools.partial(
      _dkv_kernel, spec=spec, sizes=sizes, splits=splits, assign=assign
    ),
    name=f"nsa_{spec.branch}_dkv",
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    with_exp2=True,
    grid=(num_key_tiles * splits * batch * kv_heads,),
    in_specs=[
      place,
      *map(common.whole, per_query),
      *map(keys, widths),
      *segments,
    ],
    out_specs=[
      pl.BlockSpec((None, None, tile.block_k, width), partial_block)
      for width in widths
    ],
    out_shape=[
      jax.ShapeDtypeStruct(
        (splits, batch * kv_heads, num_keys, width), jnp.float32
      )
      for width in widths
    ],
  )(inputs.place, *per_query, inputs.key, inputs.value, *inputs.segments)
  dk, dv = (x.sum(axis=0) for x in partial)
  return dk, dv
