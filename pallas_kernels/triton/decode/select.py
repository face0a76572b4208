"""Block selection (Eq. 8-11) inside the second launch of decoding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.integers import div
from pallas_kernels.interface import Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.decode.softmax import arange, columns_of

# Greater than any block id.
_NEVER = 2**30


def select_ids(
  weight_refs: Any,
  t: Any,
  length: Any,
  *,
  num_blocks: int,
  num_splits: int,
  group: int,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Ids of the initial blocks, of the best others, and of the local blocks.

  The last id is the query's own block. Up to n candidates are all chosen,
  followed by -1. n is padded to a power of two, with undefined ids in the
  padding.

  Args:
    weight_refs: top and total [splits, G], tops [tiles, G], sums [G, M'] and,
      if any, edges [tiles, G]. Empty if there are at most n candidates, all
      slots are forced or there are no compressed blocks.
    t: position of the query.
    length: number of tokens in the query's batch row.
    num_blocks: M without padding.
    num_splits: number of splits without padding.
    group: G without padding.
    spec: static arguments of the call.
    exp2: 2^x.
  """
  n = spec.config.num_selected
  last = div(jnp.maximum(t, 0), spec.config.selection_block)
  count = jnp.where((t >= 0) & (t < length), last + 1, 0)
  slot = arange(pl.next_power_of_2(n))
  few = jnp.where(slot < count, slot, -1)
  forced = jnp.where(
    slot < spec.config.num_initial, slot, last - (n - 1) + slot
  )
  # Up to n candidates are all chosen; with more, forced blocks do not overlap.
  crowded = count > n
  if not weight_refs:
    return jnp.where(crowded, forced, few)
  hi = jnp.where(crowded, last - spec.config.num_local, -1)
  scores = _importance(
    weight_refs, hi, num_blocks, num_splits, group, spec, exp2
  )
  block = arange(scores.shape[0])
  free = (block >= spec.config.num_initial) & (block <= hi)
  # Scores are not negative, so their bits have the same order; and a warp finds
  # the maximum of integers in one instruction. A NaN counts as the lowest.
  bits = lax.bitcast_convert_type(scores, jnp.int32)
  bits = jnp.where(scores == scores, bits, 0)
  bits = jnp.where(free, bits, -1)
  place = slot - spec.config.num_initial
  is_free = (place >= 0) & (place < spec.num_free)
  best = _best(
    bits,
    # A dynamic bound: with a static one the compiler would unroll the loop, and
    # the instructions would miss the instruction cache.
    jnp.clip(hi + 1 - spec.config.num_initial, 0, spec.num_free),
    place,
    spec.tiles.blocks.num_warps,
  )
  return jnp.where(crowded, jnp.where(is_free, best, forced), few)


def _best(
  bits: jax.Array, count: Any, place: jax.Array, num_warps: int
) -> jax.Array:
  """Indices of the `count` largest values, ties to the lower index.

  Every warp finds the largest values of its own share without waiting for other
  warps; then all values found are compared with each other.

  Args:
    bits: int32 [M], -1 where there is no candidate.
    count: how many to choose: at most the number of candidates, or 0.
    place: int32 [n], rank of the value for each slot; 0 is the largest.
    num_warps: warps of the program.

  Returns:
    int32 [n]; undefined where `place` is not in [0, count).
  """
  # With this shape the middle axis runs over the warps, because the compiler
  # gives each thread four consecutive elements of a vector. M and the number of
  # warps are powers of two. At most 128 candidates are compared at the end: for
  # a larger n there are fewer shares.
  width = min(128, len(bits))
  shares = min(num_warps, len(bits) // width, max(1, 128 // len(place)))
  shape = len(bits) // (shares * width), shares, width
  block = arange(len(bits)).reshape(shape)
  # The values of a single share are found in order and go directly to their
  # slots.
  slot = (arange(len(place)) if shares > 1 else place)[None, :]

  def largest(x):
    return x.max(axis=0).max(axis=1)

  def find(i, carry):
    bits, values, blocks = carry
    value = largest(bits)
    here = bits == value[None, :, None]
    first = -largest(jnp.where(here, -block, -_NEVER))
    return (
      jnp.where(block == first[None, :, None], -1, bits),
      jnp.where(slot == i, value[:, None], values),
      jnp.where(slot == i, first[:, None], blocks),
    )

  found = (shares, len(place))
  _, values, blocks = lax.fori_loop(
    0,
    count,
    find,
    (
      bits.reshape(shape),
      jnp.full(found, -1, jnp.int32),
      jnp.full(found, _NEVER, jnp.int32),
    ),
  )
  value, block = values.reshape(-1), blocks.reshape(-1)
  if shares == 1:
    return block
  better = value[:, None] > value[None, :]
  equal = value[:, None] == value[None, :]
  better |= equal & (block[:, None] < block[None, :])
  rank = _sum(better)
  return _sum(jnp.where(rank[:, None] == place[None, :], block[:, None], 0))


def _sum(x: jax.Array) -> jax.Array:
  """Int32 sums over the first axis, which is mostly within a thread."""
  return x.astype(jnp.int32).sum(axis=0, dtype=jnp.int32)


def ascending(ids: jax.Array, count: int) -> jax.Array:
  """Rank of each of the first `count` ids in ascending order, -1 last."""
  slot = arange(len(ids))
  key = jnp.where((ids >= 0) & (slot < count), ids, _NEVER + slot)
  if len(ids) <= 64:
    return _sum(key[:, None] < key[None, :])

  # All pairs would not fit in registers.
  def step(i, place):
    one = jnp.where(slot == i, key, 0).sum(dtype=jnp.int32)
    return place + (one < key).astype(jnp.int32)

  return lax.fori_loop(0, len(ids), step, jnp.zeros_like(slot))


def _importance(
  refs: Any,
  hi: Any,
  num_blocks: int,
  num_splits: int,
  group: int,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Scores of the blocks up to `hi`; those of later blocks are undefined."""
  top_ref, total_ref, tops_ref, sums_ref, *edges_refs = refs
  splits, rows = top_ref.shape
  block_m, columns = spec.tiles.block_m, columns_of(spec)
  tiles = block_m // columns
  chunks = pl.next_power_of_2(pl.cdiv(num_blocks, block_m))

  exists = arange(splits)[:, None] < num_splits
  exists &= arange(rows)[None, :] < group
  row = jnp.minimum(arange(rows), group - 1)
  real = common.padding_mask(group, rows)

  def of_tiles(ref, tile):  # [G, tiles] of a ref [all tiles, G]
    shape = rows, tiles
    index = jnp.broadcast_to(tile[None, :], shape)
    return ref[index, jnp.broadcast_to(row[:, None], shape)]

  def visit(i, scores):
    # All loads are issued first, so that their latencies overlap.
    tile = i * tiles + arange(tiles)
    before = jnp.maximum(tile - 1, 0)
    top = plgpu.load(top_ref, mask=exists, other=common.MAX_INIT)
    total = plgpu.load(total_ref, mask=exists, other=0)
    tops = of_tiles(tops_ref, tile)
    edges = [
      (of_tiles(tops_ref, before), of_tiles(ref, before)) for ref in edges_refs
    ]
    x = common.load(sums_ref.at[:, pl.ds(i * block_m, block_m)], real)

    high = top.max(axis=0)
    total = (total * exp2(top - high[None, :])).sum(axis=0)
    share = 1 / jnp.where(total != 0, total, 1)

    def factor(tops):
      x = exp2(tops - high[:, None]) * share[:, None]
      return x if real is None else jnp.where(real[:, None], x, 0)

    shape = rows, tiles, columns
    factors = jnp.broadcast_to(factor(tops)[:, :, None], shape)
    x = (x * factors.reshape(rows, block_m)).sum(axis=0)
    for tops, edge in edges:
      # Weights of the previous tile in a tile's first block; tile 0 has none.
      edge = (edge * factor(tops)).sum(axis=0)
      edge = jnp.where(tile > 0, edge, 0)[:, None]
      x += jnp.where((arange(columns) == 0)[None, :], edge, 0).reshape(block_m)
    here = arange(chunks) == i
    return jnp.where(here[:, None], x[None, :], scores)

  scores = jnp.zeros((chunks, block_m), jnp.float32)
  if chunks == 1:
    # Without a loop the loads need not wait for the length of the row.
    scores = visit(0, scores)
  else:
    steps = div(hi + block_m, block_m)
    scores = lax.fori_loop(0, steps, visit, scores)
  return scores.reshape(chunks * block_m)
