"""The first launch of decoding: compressed branch, weights for selection."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import platforms
from pallas_kernels.bands import Band, Bounds
from pallas_kernels.integers import ceil_div, div, rem, within
from pallas_kernels.interface import KV, Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.band import (
  QuerySizes,
  flat_rows,
  load_rows,
  tile_rows,
  walk,
)
from pallas_kernels.triton.decode.softmax import (
  PartialSoftmax,
  Weights,
  arange,
  columns_of,
  empty_softmax,
  fold_keys,
)


def _stencil(spec: Spec) -> jax.Array:
  """Number of strides of compressed block k of a tile in selection block m.

  bfloat16 [block_k, columns + 1 or more]; column `columns` is the first
  selection block of the next tile.
  """
  k = arange(spec.tiles.compressed.block_k)[:, None]
  m = arange(common.padded_rows(columns_of(spec) + 1))[None, :]
  own = jnp.minimum(spec.reach, spec.ratio - rem(k, spec.ratio))
  first = div(k, spec.ratio)
  count = jnp.where(m == first, own, 0)
  count = jnp.where(m == first + 1, spec.reach - own, count)
  return count.astype(jnp.float32).astype(jnp.bfloat16)


def _split(x: jax.Array) -> list[jax.Array]:
  """Splits a float32 array into three bfloat16 arrays with the exact sum."""
  parts: list[jax.Array] = []
  for _ in range(3):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def _compressed_kernel(
  offset_ref,  # [1]
  length_ref,  # [1]
  q_ref,  # [B T N, H]
  k_ref,  # [C, H]
  v_ref,  # [C, V]
  acc_ref,  # [B T N, V]
  top_ref,  # [B T N]
  total_ref,  # [B T N]
  *weight_refs,  # if needed: tops [B T K, tiles, G], sums [B T N, M'] and
  # edges [B T K, tiles, G]
  spec: Spec,
  sizes: QuerySizes,
  exp2: Callable[[jax.Array], jax.Array],
):
  tiling = spec.tiles
  rows, block_k = tiling.rows, tiling.compressed.block_k
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[1])
  value_pieces = common.pieces(value_dim)
  split, i, h, b = (pl.program_id(axis) for axis in range(4))
  mine = tile_rows(i, b, h, rows, sizes)
  q = load_rows(q_ref, mine.index, head_pieces)

  offset, length = offset_ref[0], length_ref[0]
  block_q = rows // sizes.group
  first = offset + i * block_q
  end_q = jnp.minimum((i + 1) * block_q, sizes.length)
  last = jnp.minimum(offset + end_q, length) - 1
  band = Band(
    spec.config.compression_stride, spec.config.compression_block, None, 0
  )
  # Blocks from here on are not visible, and may hold undefined values.
  stop = jnp.minimum(band.stop(last), num_keys)
  stop = jnp.where(first <= last, stop, 0)
  tiles = ceil_div(stop, block_k)
  begin = div(tiles * split, tiling.splits)
  end = div(tiles * (split + 1), tiling.splits)
  full = div(jnp.minimum(band.stop(first), stop), block_k)
  bounds = Bounds(begin, begin, within(full, begin, end), end)
  t = offset + mine.query
  inside = t < length
  t = jnp.minimum(t, last)

  stencil = _stencil(spec)
  group = div(mine.index, sizes.group)
  head = rem(mine.index, sizes.group)

  def store_weights(j, top, p):
    """Stores the weights of a tile, summed over selection blocks."""
    tops_ref, sums_ref, *edges_refs = weight_refs
    tops_ref[group, j, head] = top
    # Products of bfloat16 numbers are exact in float32.
    first, *rest = (common.dot(x, stencil) for x in _split(p))
    sums = sum(rest, first)

    def spread(x):
      return jnp.broadcast_to(x, sums.shape)

    column = spread(arange(sums.shape[1])[None, :])
    row, block = spread(mine.index[:, None]), j * columns_of(spec) + column
    plgpu.store(sums_ref.at[row, block], sums, mask=column < columns_of(spec))
    for ref in edges_refs:
      edge = column == columns_of(spec)
      # The interpreter also stores masked elements, unless out of bounds.
      tile = jnp.where(edge, j, ref.shape[1])
      place = spread(group[:, None]), tile, spread(head[:, None])
      plgpu.store(ref.at[place], sums, mask=edge)

  def step(j, carry, masked):
    span_k = pl.ds(j * block_k, block_k)
    token = j * block_k + arange(block_k)
    exists = token < stop if masked else None
    carry, p = fold_keys(
      carry,
      q,
      common.load_pieces(k_ref, span_k, head_pieces, exists),
      lambda: common.load_pieces(v_ref, span_k, value_pieces, exists),
      band.readable(token[None, :], t[:, None], None) if masked else None,
      spec.scale * common.LOG2E,
      exp2,
    )
    if weight_refs:
      store_weights(j, carry[1], p)
    return carry

  acc, m_i, l_i = walk(step, empty_softmax(rows, value_dim), bounds, False)
  for (column, width), a in zip(value_pieces, acc, strict=True):
    acc_ref[mine.index, pl.ds(column, width)] = a
  # Queries past the last token have read the keys of the last one.
  top_ref[mine.index] = jnp.where(inside, m_i, common.MAX_INIT)
  total_ref[mine.index] = jnp.where(inside, l_i, 0)


def read_compressed(
  query: jax.Array,
  compressed: KV,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  num_tiles: int,
  spec: Spec,
) -> tuple[PartialSoftmax, Weights | None]:
  """Partial softmaxes, and the weights of `num_tiles` tiles or None if 0."""
  batch, length, heads, head_dim = query.shape
  num_keys, kv_heads, value_dim = compressed.value.shape[1:]
  sizes = QuerySizes(length, heads, heads // kv_heads)
  tiling = spec.tiles
  flat = flat_rows(query)
  num_rows = len(flat)

  def keys(width):
    return pl.BlockSpec(
      (None, num_keys, None, width), lambda s, i, h, b: (b, 0, h, 0)
    )

  def of_split(*last):
    return pl.BlockSpec(
      (None, num_rows, *last), lambda s, *_: (s, 0, *(0,) * len(last))
    )

  one = pl.BlockSpec((1,), lambda s, i, h, b: (b,))

  def floats(*shape):
    return platforms.out_shape(shape, jnp.float32)

  weights = []
  if num_tiles:
    of_tiles = floats(num_rows // sizes.group, num_tiles, sizes.group)
    weights = [of_tiles, floats(num_rows, num_tiles * columns_of(spec))]
    weights += [of_tiles] * (spec.reach > 1)
  splits = tiling.splits
  acc, top, total, *found = pl.pallas_call(
    functools.partial(
      _compressed_kernel,
      spec=spec,
      sizes=sizes,
      exp2=common.exp2(spec.interpret),
    ),
    **common.options(
      "nsa_decode_compressed",
      tiling.compressed.num_warps,
      tiling.compressed.num_stages,
      spec.interpret,
    ),
    grid=(splits, pl.cdiv(length, tiling.rows // sizes.group), kv_heads, batch),
    in_specs=[one, one, common.whole(flat), keys(head_dim), keys(value_dim)],
    out_specs=[
      of_split(value_dim),
      of_split(),
      of_split(),
      *map(common.whole, weights),
    ],
    out_shape=[
      floats(splits, num_rows, value_dim),
      floats(splits, num_rows),
      floats(splits, num_rows),
      *weights,
    ],
  )(offset, lengths, flat, *compressed)
  partial = PartialSoftmax(acc, top, total)
  if not num_tiles:
    return partial, None
  tops, sums, *edges = found
  groups = batch, length, kv_heads

  def by_tile(x):
    return x.reshape(*groups, num_tiles, sizes.group)

  return partial, Weights(
    by_tile(tops),
    sums.reshape(*groups, sizes.group, -1),
    tuple(map(by_tile, edges)),
  )
