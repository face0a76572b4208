"""Attention of the newest tokens over a cache: decoding, forward only.

With a handful of queries the time is that of the bytes read once: compressed
keys and values, n blocks, the window. Keys are cut into pieces, so that one row
of a batch fills the device, in three launches:

1. compressed: a partial softmax for every split of the compressed blocks that
   are visible, all queries and heads of a group as rows; and the sums of the
   weights over each selection block, all that is left of the scores;
2. blocks: partial softmaxes of the selected blocks and of the window. Each
   program of a query's selected blocks first finds them: importance (Eq. 8-10),
   then the best n (Eq. 11). All find the same; that takes no longer than one of
   them would, and saves a launch. Those of the window read meanwhile: selection
   mostly waits and leaves the memory idle;
3. merge: the partial softmaxes, weighted by the gates (Eq. 5).

Loops are bounded by what is visible, so that the time follows the lengths, not
the capacity of the cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import common
from pallas_kernels.triton.band_attention import (
  Band,
  Bounds,
  Sizes,
  ceil_div,
  flat_rows,
  gather,
  tile_rows,
  walk,
  within,
)
from pallas_kernels.triton.selected_attention import group_heads
from pallas_kernels.triton.tiling import DecodeTiling

# Later than any block.
_NEVER = 2**30


class Spec(NamedTuple):
  """The static side of a call; hashable."""

  stride: int  # d
  span: int  # l
  block: int  # l'
  num_selected: int  # n
  num_initial: int
  num_local: int
  window: int  # w
  scale: float
  tiling: DecodeTiling

  @property
  def ratio(self) -> int:
    """Compressed blocks that begin in one selection block."""
    return self.block // self.stride

  @property
  def reach(self) -> int:
    """Strides in one compressed block; with 1 none reaches the next block."""
    return self.span // self.stride

  @property
  def num_free(self) -> int:
    """Places that scores decide."""
    return self.num_selected - self.num_initial - self.num_local

  @property
  def columns(self) -> int:
    """Selection blocks of a tile of compressed keys."""
    return self.tiling.compressed.block_k // self.ratio


class Keys(NamedTuple):
  """Keys and values of a branch."""

  key: jax.Array  # [B, S, K, H]
  value: jax.Array  # [B, S, K, V]


class Partial(NamedTuple):
  """Softmaxes over pieces of the keys, not yet divided by their sums."""

  acc: jax.Array  # [pieces, B T N, V], float32
  top: jax.Array  # [pieces, B T N], largest score, base 2
  total: jax.Array  # [pieces, B T N], 0 where nothing is read


class Weights(NamedTuple):
  """Weights of compressed blocks, summed over the selection blocks.

  Those of a tile of compressed keys are relative to the largest score so far.
  """

  # What a tile has of a group lies together: memory is not written in pieces
  # smaller than what a transfer holds.
  tops: jax.Array  # [B, T, K, tiles, G], largest scores
  sums: jax.Array  # [B, T, K, G, M'], M' >= M: whole tiles
  # [B, T, K, tiles, G], of what reaches into the first block of the next tile;
  # one array, or none if nothing does.
  edges: tuple[jax.Array, ...]


def _arange(size: int) -> jax.Array:
  return jnp.arange(size, dtype=jnp.int32)


def _start(rows: int, value_dim: int) -> Any:
  """A softmax over nothing: accumulators, maximum and sum."""
  return (
    common.accumulators(rows, common.pieces(value_dim)),
    jnp.full((rows,), common.MAX_INIT, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
  )


def _fold(
  carry: Any,
  q: Any,
  k: Any,
  load_v: Callable[[], Any],
  mask: Any,
  factor: float,
  exp2: Callable[[jax.Array], jax.Array],
) -> tuple[Any, jax.Array]:
  """One step of a softmax; also the weights, relative to the new maximum.

  Args:
    carry: as of `_start`.
    q: pieces [rows, H].
    k: pieces [keys, H].
    load_v: loads pieces [keys, V].
    mask: bool, broadcasts to [rows, keys]; None if all are read.
    factor: scale of the scores, base 2.
    exp2: 2^x.
  """
  acc, m_i, l_i = carry
  s = common.dot_pieces(q, k) * factor
  if mask is not None:
    s = jnp.where(mask, s, common.MASK)
  m_next = jnp.maximum(m_i, s.max(axis=1))
  p = exp2(s - m_next[:, None])
  correction = exp2(m_i - m_next)
  acc = tuple(
    a * correction[:, None] + common.dot(p.astype(x.dtype), x)
    for a, x in zip(acc, load_v(), strict=True)
  )
  return (acc, m_next, l_i * correction + p.sum(axis=1)), p


# ------------------------------------------------------------------ compressed


def _stencil(spec: Spec) -> jax.Array:
  """How many strides compressed block k of a tile has in selection block m.

  bfloat16 [block_k, columns + 1 or more]; the last block is of the next tile.
  """
  k = _arange(spec.tiling.compressed.block_k)[:, None]
  m = _arange(common.padded_rows(spec.columns + 1))[None, :]
  own = jnp.minimum(spec.reach, spec.ratio - common.rem(k, spec.ratio))
  first = common.div(k, spec.ratio)
  count = jnp.where(m == first, own, 0)
  count = jnp.where(m == first + 1, spec.reach - own, count)
  return count.astype(jnp.float32).astype(jnp.bfloat16)


def _split(x: jax.Array) -> list[jax.Array]:
  """A float32 array as the sum of three in bfloat16, exactly."""
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
  *weight_refs,  # tops [B T K, tiles, G], sums [B T N, M'] and edges
  # [B T K, tiles, G], if needed
  spec: Spec,
  sizes: Sizes,
  exp2: Callable[[jax.Array], jax.Array],
):
  tiling = spec.tiling
  rows, block_k = tiling.rows, tiling.compressed.block_k
  num_keys, value_dim = v_ref.shape
  head_pieces = common.pieces(q_ref.shape[1])
  value_pieces = common.pieces(value_dim)
  split, i, h, b = (pl.program_id(axis) for axis in range(4))
  mine = tile_rows(i, b, h, rows, sizes)
  q = gather(q_ref, mine.index, head_pieces)

  offset, length = offset_ref[0], length_ref[0]
  block_q = rows // sizes.group
  first = offset + i * block_q
  end_q = jnp.minimum((i + 1) * block_q, sizes.length)
  last = jnp.minimum(offset + end_q, length) - 1
  band = Band(spec.stride, spec.span, None, 0)
  # Rows from here on hold anything.
  stop = jnp.minimum(band.stop(last), num_keys)
  stop = jnp.where(first <= last, stop, 0)
  tiles = ceil_div(stop, block_k)
  begin = common.div(tiles * split, tiling.splits)
  end = common.div(tiles * (split + 1), tiling.splits)
  full = common.div(jnp.minimum(band.stop(first), stop), block_k)
  bounds = Bounds(begin, begin, within(full, begin, end), end)
  t = offset + mine.query
  inside = t < length
  t = jnp.minimum(t, last)

  stencil = _stencil(spec)
  group = common.div(mine.index, sizes.group)
  head = common.rem(mine.index, sizes.group)

  def keep(j, top, p):
    """Stores the weights of a tile."""
    tops_ref, sums_ref, *edges_refs = weight_refs
    tops_ref[group, j, head] = top
    # Products of numbers of 16 bits are exact.
    first, *rest = (common.dot(x, stencil) for x in _split(p))
    sums = sum(rest, first)

    def spread(x):
      return jnp.broadcast_to(x, sums.shape)

    column = spread(_arange(sums.shape[1])[None, :])
    row, block = spread(mine.index[:, None]), j * spec.columns + column
    plgpu.store(sums_ref.at[row, block], sums, mask=column < spec.columns)
    for ref in edges_refs:
      edge = column == spec.columns
      # Interpreted, masked elements are stored too, but not out of bounds.
      tile = jnp.where(edge, j, ref.shape[1])
      place = spread(group[:, None]), tile, spread(head[:, None])
      plgpu.store(ref.at[place], sums, mask=edge)

  def step(j, carry, masked):
    span_k = pl.ds(j * block_k, block_k)
    token = j * block_k + _arange(block_k)
    exists = token < stop if masked else None
    carry, p = _fold(
      carry,
      q,
      common.load_pieces(k_ref, span_k, head_pieces, exists),
      lambda: common.load_pieces(v_ref, span_k, value_pieces, exists),
      band.readable(token[None, :], t[:, None], None) if masked else None,
      spec.scale * common.LOG2E,
      exp2,
    )
    if weight_refs:
      keep(j, carry[1], p)
    return carry

  acc, m_i, l_i = walk(step, _start(rows, value_dim), bounds, False)
  for (column, width), a in zip(value_pieces, acc, strict=True):
    acc_ref[mine.index, pl.ds(column, width)] = a
  top_ref[mine.index] = m_i
  # Queries after the last token have read as it does.
  total_ref[mine.index] = jnp.where(inside, l_i, 0)


def _compressed(
  query: jax.Array,
  compressed: Keys,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  num_tiles: int,
  spec: Spec,
) -> tuple[Partial, Weights | None]:
  """Partial softmaxes, and the weights of `num_tiles` tiles; None if 0."""
  batch, length, heads, head_dim = query.shape
  num_keys, kv_heads, value_dim = compressed.value.shape[1:]
  sizes = Sizes(length, heads, heads // kv_heads)
  tiling = spec.tiling
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
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  weights = []
  if num_tiles:
    of_tiles = floats(num_rows // sizes.group, num_tiles, sizes.group)
    weights = [of_tiles, floats(num_rows, num_tiles * spec.columns)]
    weights += [of_tiles] * (spec.reach > 1)
  splits = tiling.splits
  acc, top, total, *found = common.pallas_call(
    functools.partial(_compressed_kernel, spec=spec, sizes=sizes),
    name="nsa_decode_compressed",
    num_warps=tiling.compressed.num_warps,
    num_stages=tiling.compressed.num_stages,
    with_exp2=True,
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
  partial = Partial(acc, top, total)
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


# ------------------------------------------------------------ pieces of a query


class _Softmax(NamedTuple):
  """A softmax over a piece of the keys of a query, all heads of a group."""

  start: Any  # the first carry
  # fold(carry, row, mask) reads the keys of a step from `row` on, all of them
  # if the mask is None.
  fold: Callable[..., Any]
  store: Callable[[Any], None]


def _softmax(
  q_ref: Any,
  keys: Any,
  out_refs: Any,
  *,
  group: int,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
) -> _Softmax:
  """Loads the query.

  Args:
    q_ref: [G, H], G padded to a power of two, at least 16.
    keys: refs [S, H] and [S, V].
    out_refs: acc [G, V], top [G], total [G].
    group: G without padding.
    spec: of the call.
    exp2: 2^x.
  """
  rows, head_dim = q_ref.shape
  value_dim = keys[1].shape[1]
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  row_mask = common.padding_mask(group, rows)
  q = common.load_pieces(q_ref, slice(None), head_pieces, row_mask)

  def fold(carry, row, mask):
    span_k = pl.ds(row, spec.tiling.blocks.block_k)
    return _fold(
      carry,
      q,
      common.load_pieces(keys[0], span_k, head_pieces, mask),
      lambda: common.load_pieces(keys[1], span_k, value_pieces, mask),
      None if mask is None else mask[None, :],
      spec.scale * common.LOG2E,
      exp2,
    )[0]

  def store(carry):
    acc_ref, top_ref, total_ref = out_refs
    acc, m_i, l_i = carry
    for (column, width), a in zip(value_pieces, acc, strict=True):
      common.store(acc_ref.at[:, pl.ds(column, width)], a, row_mask)
    common.store(top_ref, m_i, row_mask)
    common.store(total_ref, l_i, row_mask)

  return _Softmax(_start(rows, value_dim), fold, store)


# ---------------------------------------------------------------------- select


def _select(
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
  """The first forced blocks, the best of the others, the last forced ones.

  The last of all is the query's own. With at most n candidates, all of them,
  then -1. n is padded to a power of two; what is at the places that there are
  not does not matter.

  Args:
    weight_refs: top and total [splits, G], tops [tiles, G], sums [G, M'] and
      edges [tiles, G], if any; or none of all, if there are at most n
      candidates, all places are forced or nothing is compressed.
    t: position of the query.
    length: tokens of its row.
    num_blocks: M without padding.
    num_splits: without padding.
    group: G without padding.
    spec: of the call.
    exp2: 2^x.
  """
  n = spec.num_selected
  last = common.div(jnp.maximum(t, 0), spec.block)
  count = jnp.where((t >= 0) & (t < length), last + 1, 0)
  slot = _arange(pl.next_power_of_2(n))
  few = jnp.where(slot < count, slot, -1)
  forced = jnp.where(slot < spec.num_initial, slot, last - (n - 1) + slot)
  # With at most n candidates all of them are chosen; with more, forced blocks
  # do not overlap.
  crowded = count > n
  if not weight_refs:
    return jnp.where(crowded, forced, few)
  hi = jnp.where(crowded, last - spec.num_local, -1)
  scores = _importance(
    weight_refs, hi, num_blocks, num_splits, group, spec, exp2
  )
  block = _arange(scores.shape[0])
  free = (block >= spec.num_initial) & (block <= hi)
  # Scores are not negative: their bits are in order, and for integers a warp
  # finds the largest in one instruction. A NaN must not lead astray.
  bits = jnp.maximum(lax.bitcast_convert_type(scores, jnp.int32), 0)
  bits = jnp.where(free, bits, -1)
  place = slot - spec.num_initial
  is_free = (place >= 0) & (place < spec.num_free)
  best = _best(
    bits,
    # A bound that the compiler cannot know: it would unroll the loop, and run
    # through instructions that are not in the cache yet.
    jnp.clip(hi + 1 - spec.num_initial, 0, spec.num_free),
    place,
    spec.tiling.blocks.num_warps,
  )
  return jnp.where(crowded, jnp.where(is_free, best, forced), few)


def _best(
  bits: jax.Array, count: Any, place: jax.Array, num_warps: int
) -> jax.Array:
  """The `count` largest of [M] at their places, the largest at 0.

  The lower index comes first where two are equal. Every warp finds those of its
  own share, and does not wait for the others; then all of these are compared
  with each other.

  Args:
    bits: int32 [M], -1 where there is no candidate.
    count: of those to choose, at most that of the candidates, or 0.
    place: [n]; what is at a place that there is not does not matter.
    num_warps: warps of the program.

  Returns:
    int32 [n].
  """
  # In this shape the middle axis is that of the warps, as the compiler lays out
  # a vector: four elements to a thread. M and the warps are powers of two. At
  # most 128 candidates are compared; more places have fewer shares.
  width = min(128, len(bits))
  shares = min(num_warps, len(bits) // width, max(1, 128 // len(place)))
  shape = len(bits) // (shares * width), shares, width
  block = _arange(len(bits)).reshape(shape)
  # The largest of a single share are in order, each at its place at once.
  slot = (_arange(len(place)) if shares > 1 else place)[None, :]

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
  rank = _total(better)
  return _total(jnp.where(rank[:, None] == place[None, :], block[:, None], 0))


def _total(x: jax.Array) -> jax.Array:
  """Int32 sums over the first axis, most of which a thread holds."""
  return x.astype(jnp.int32).sum(axis=0, dtype=jnp.int32)


def _ascending(ids: jax.Array, count: int) -> jax.Array:
  """The place of each of the first `count` ids in ascending order, -1 last."""
  slot = _arange(len(ids))
  key = jnp.where((ids >= 0) & (slot < count), ids, _NEVER + slot)
  if len(ids) <= 64:
    return _total(key[:, None] < key[None, :])

  # All with all would not fit in registers.
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
  """Scores of the blocks up to `hi` and of some more, which may be anything."""
  top_ref, total_ref, tops_ref, sums_ref, *edges_refs = refs
  splits, rows = top_ref.shape
  block_m, columns = spec.tiling.block_m, spec.columns
  tiles = block_m // columns
  chunks = pl.next_power_of_2(pl.cdiv(num_blocks, block_m))

  exists = _arange(splits)[:, None] < num_splits
  exists &= _arange(rows)[None, :] < group
  row = jnp.minimum(_arange(rows), group - 1)
  real = common.padding_mask(group, rows)

  def of_tiles(ref, tile):  # [G, tiles] of a ref [all tiles, G]
    shape = rows, tiles
    index = jnp.broadcast_to(tile[None, :], shape)
    return ref[index, jnp.broadcast_to(row[:, None], shape)]

  def visit(i, scores):
    # All loads come first: they wait for memory together.
    tile = i * tiles + _arange(tiles)
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
    share = 1 / jnp.where(total > 0, total, 1)

    def factor(tops):
      x = exp2(tops - high[:, None]) * share[:, None]
      return x if real is None else jnp.where(real[:, None], x, 0)

    shape = rows, tiles, columns
    factors = jnp.broadcast_to(factor(tops)[:, :, None], shape)
    x = (x * factors.reshape(rows, block_m)).sum(axis=0)
    for tops, edge in edges:
      # What reaches into a tile; nothing reaches into the first.
      edge = (edge * factor(tops)).sum(axis=0)
      edge = jnp.where(tile > 0, edge, 0)[:, None]
      x += jnp.where((_arange(columns) == 0)[None, :], edge, 0).reshape(block_m)
    here = _arange(chunks) == i
    return jnp.where(here[:, None], x[None, :], scores)

  scores = jnp.zeros((chunks, block_m), jnp.float32)
  if chunks == 1:
    # Without a loop the loads do not wait for the length of the row.
    scores = visit(0, scores)
  else:
    steps = common.div(hi + block_m, block_m)
    scores = lax.fori_loop(0, steps, visit, scores)
  return scores.reshape(chunks * block_m)


# ---------------------------------------------------------------------- blocks


def _read_window(
  softmax: _Softmax,
  piece: Any,
  t: Any,
  length: Any,
  *,
  num_rows: int,
  ring: bool,
  spec: Spec,
) -> None:
  """One piece of the window of a query at position t, of `num_rows` keys."""
  block_k, steps = spec.tiling.blocks.block_k, spec.tiling.window_steps
  low = jnp.maximum(t - spec.window + 1, 0)
  first = piece * steps
  if ring:
    base = jnp.int32(0)
    end = jnp.int32(pl.cdiv(num_rows, block_k))
  else:
    base = low
    end = ceil_div(jnp.maximum(t - low + 1, 0), block_k)
  end = jnp.where((t >= 0) & (t < length), end, 0)

  def readable(row):
    """Which rows the query reads; softmax knows no order."""
    if not ring:
      return (row <= t) & (row >= low)
    # Counted back from the newest row, which lies anywhere in the ring.
    newest = common.rem(jnp.maximum(length - 1, 0), num_rows)
    age = newest - row
    position = length - 1 - jnp.where(age < 0, age + num_rows, age)
    return (position <= t) & (position >= low) & (row < num_rows)

  def step(i, carry):
    row = base + i * block_k
    return softmax.fold(carry, row, readable(row + _arange(block_k)))

  last = jnp.minimum(end, first + steps)
  softmax.store(lax.fori_loop(first, last, step, softmax.start))


def _read_selected(
  softmax: _Softmax,
  piece: Any,
  ids: jax.Array,
  t: Any,
  length: Any,
  *,
  spec: Spec,
) -> None:
  """One piece of the blocks `ids` of a query at position t."""
  block_k, steps = spec.tiling.blocks.block_k, spec.tiling.selected_steps
  first = piece * steps
  # The last block is the query's own, the only one that needs a mask.
  per_block = spec.block // block_k
  own = common.div(jnp.maximum(t, 0), spec.block)
  full = jnp.minimum(own, spec.num_selected - 1) * per_block
  end = full + common.div(jnp.maximum(t - own * spec.block, 0), block_k) + 1
  real = (t >= 0) & (t < length)
  end = jnp.minimum(jnp.where(real, end, 0), first + steps)
  end = jnp.maximum(end, first)

  def step(i, carry, masked):
    here = _arange(len(ids)) == common.div(i, per_block)
    block = jnp.where(here, ids, 0).sum(dtype=jnp.int32)
    row = block * spec.block + common.rem(i, per_block) * block_k
    mask = row + _arange(block_k) <= t if masked else None
    return softmax.fold(carry, row, mask)

  bounds = Bounds(first, first, within(full, first, end), end)
  softmax.store(walk(step, softmax.start, bounds, False))


def _blocks_kernel(
  offset_ref,  # [1]
  length_ref,  # [1]
  q_ref,  # [G, H], G padded to a power of two, at least 16
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  window_k_ref,  # [R, H] of a ring, or [S, H]
  window_v_ref,  # [R, V] of a ring, or [S, V]
  *refs,  # as `_select` takes them; ids [n]; acc [G, V], top [G], total [G]
  # of a piece of the selected blocks, and the same of the window
  num_pieces: int,
  group: int,
  num_blocks: int,
  num_splits: int,
  ring: bool,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
):
  """Pieces of the selected blocks, `num_pieces`, then those of the window."""
  *weight_refs, ids_ref = refs[:-6]
  piece = pl.program_id(3)
  t = offset_ref[0] + pl.program_id(0)
  length = length_ref[0]
  softmax = functools.partial(
    _softmax, q_ref, group=group, spec=spec, exp2=exp2
  )

  @pl.when(piece < num_pieces)
  def _():
    # The query is on its way during selection.
    own = softmax((k_ref, v_ref), refs[-6:-3])
    ids = _select(
      weight_refs,
      t,
      length,
      num_blocks=num_blocks,
      num_splits=num_splits,
      group=group,
      spec=spec,
      exp2=exp2,
    )

    @pl.when(piece == 0)
    def _():
      n = spec.num_selected
      places = _ascending(ids, n)
      plgpu.store(ids_ref.at[places], ids, mask=places < n)

    _read_selected(own, piece, ids, t, length, spec=spec)

  @pl.when(piece >= num_pieces)
  def _():
    _read_window(
      softmax((window_k_ref, window_v_ref), refs[-3:]),
      piece - num_pieces,
      t,
      length,
      num_rows=window_k_ref.shape[0],
      ring=ring,
      spec=spec,
    )


def _blocks(
  query: jax.Array,
  selected: Keys,
  ring: Keys | None,
  partial: Partial | None,
  weights: Weights | None,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  spec: Spec,
) -> tuple[jax.Array, Partial, Partial]:
  """Ids int32 [B, T, K, n]; softmaxes of the selected blocks and the window."""
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = selected.value.shape[1:]
  group = heads // kv_heads
  tiling = spec.tiling
  padded = common.padded_rows(group)
  num_blocks = pl.cdiv(key_length, spec.block)
  window = selected if ring is None else ring
  one = pl.BlockSpec((1,), lambda i, h, b, p: (b,))

  def of_query(*block):  # of an array [B, T, K, ...]
    return pl.BlockSpec(
      (None, None, None, *block),
      lambda i, h, b, p: (b, i, h, *(0,) * len(block)),
    )

  def of_head(x):  # of an array [B, S, K, width]
    return pl.BlockSpec(
      (None, x.shape[1], None, x.shape[3]), lambda i, h, b, p: (b, 0, h, 0)
    )

  args: list[Any] = [offset, lengths, group_heads(query, kv_heads)]
  specs = [one, one, of_query(padded, head_dim)]
  for x in (*selected, *window):
    args.append(x)
    specs.append(of_head(x))

  num_splits = 1
  if partial is not None and weights is not None:
    num_splits = len(partial.top)
    rows = pl.next_power_of_2(group)
    splits = pl.next_power_of_2(num_splits)
    for x in (partial.top, partial.total):
      args.append(x.reshape(num_splits, batch, length, kv_heads, group))
      specs.append(
        pl.BlockSpec(
          (splits, None, None, None, rows), lambda i, h, b, p: (0, b, i, h, 0)
        )
      )
    args += [weights.tops, weights.sums, *weights.edges]
    of_tiles = of_query(weights.tops.shape[3], rows)
    specs += [of_tiles, of_query(rows, weights.sums.shape[4])]
    specs += [of_tiles] * len(weights.edges)

  block_k = tiling.blocks.block_k
  span = min(spec.window, key_length) if ring is None else ring.key.shape[1]
  chosen = min(spec.num_selected, num_blocks) * spec.block
  counts = [
    pl.cdiv(chosen, block_k * tiling.selected_steps),
    pl.cdiv(span, block_k * tiling.window_steps),
  ]

  def out_specs(before, count):
    """Of acc, top and total of the pieces of a branch."""

    def index(i, h, b, p):
      return jnp.clip(p - before, 0, count - 1), b, i, h, 0

    block = (None, None, None, None, padded)
    return [
      pl.BlockSpec((*block, value_dim), lambda *p: (*index(*p), 0)),
      pl.BlockSpec(block, index),
      pl.BlockSpec(block, index),
    ]

  def out_shapes(count):
    shape = count, batch, length, kv_heads, group
    return [
      jax.ShapeDtypeStruct(x, jnp.float32)
      for x in ((*shape, value_dim), shape, shape)
    ]

  ids, *found = common.pallas_call(
    functools.partial(
      _blocks_kernel,
      num_pieces=counts[0],
      group=group,
      num_blocks=num_blocks,
      num_splits=num_splits,
      ring=ring is not None,
      spec=spec,
    ),
    name="nsa_decode_blocks",
    num_warps=tiling.blocks.num_warps,
    num_stages=tiling.blocks.num_stages,
    with_exp2=True,
    # Programs start in the order of the last axis: those that select, which
    # take longest, first.
    grid=(length, kv_heads, batch, sum(counts)),
    in_specs=specs,
    out_specs=[
      of_query(spec.num_selected),
      *out_specs(0, counts[0]),
      *out_specs(counts[0], counts[1]),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(
        (batch, length, kv_heads, spec.num_selected), jnp.int32
      ),
      *out_shapes(counts[0]),
      *out_shapes(counts[1]),
    ],
  )(*args)

  def flat(acc, top, total):
    pieces = len(acc)
    return Partial(
      acc.reshape(pieces, -1, value_dim),
      top.reshape(pieces, -1),
      total.reshape(pieces, -1),
    )

  return ids, flat(*found[:3]), flat(*found[3:])


# ----------------------------------------------------------------------- merge


def _merge_kernel(
  gates_ref,  # [3]
  *refs,  # acc [pieces, V], top and total [pieces] of every branch; out [V]
  counts: tuple[int, ...],
  exp2: Callable[[jax.Array], jax.Array],
):
  """One query and head.

  `counts`: pieces of each branch. There may be no compressed one.
  """
  *partial_refs, out_ref = refs
  value_pieces = common.pieces(out_ref.shape[0])
  # All loads come first: they wait for memory together.
  loaded = []
  for branch, count in enumerate(counts):
    acc_ref, top_ref, total_ref = partial_refs[3 * branch : 3 * branch + 3]
    mask = common.padding_mask(count, len(top_ref))
    loaded.append(
      (
        gates_ref[3 - len(counts) + branch].astype(jnp.float32),
        common.load(top_ref, mask, common.MAX_INIT),
        common.load(total_ref, mask),
        common.load_pieces(acc_ref, slice(None), value_pieces, mask),
      )
    )
  out = [jnp.zeros((width,), jnp.float32) for _, width in value_pieces]
  for gate, top, total, acc in loaded:
    weight = exp2(top - top.max())
    total = (weight * total).sum()
    some = total > 0
    factor = gate / jnp.where(some, total, 1)
    for i, a in enumerate(acc):
      x = (weight[:, None] * a).sum(axis=0) * factor
      out[i] += jnp.where(some, x, 0)
  for (column, width), x in zip(value_pieces, out, strict=True):
    out_ref[pl.ds(column, width)] = x.astype(out_ref.dtype)


def _merge(
  branches: Sequence[Partial], gates: jax.Array, dtype: Any, num_warps: int
) -> jax.Array:
  """Out [B, T, N, V]."""
  _, num_rows, value_dim = branches[0].acc.shape
  counts = tuple(len(x.acc) for x in branches)
  specs = []
  for count in counts:
    padded = pl.next_power_of_2(count)  # loads are
    specs += [
      pl.BlockSpec((padded, None, value_dim), lambda r: (0, r, 0)),
      pl.BlockSpec((padded, None), lambda r: (0, r)),
      pl.BlockSpec((padded, None), lambda r: (0, r)),
    ]
  out = common.pallas_call(
    functools.partial(_merge_kernel, counts=counts),
    name="nsa_decode_merge",
    num_warps=num_warps,
    num_stages=1,
    with_exp2=True,
    grid=(num_rows,),
    in_specs=[pl.BlockSpec((None, 3), lambda r: (r, 0)), *specs],
    out_specs=pl.BlockSpec((None, value_dim), lambda r: (r, 0)),
    out_shape=jax.ShapeDtypeStruct((num_rows, value_dim), dtype),
  )(gates.reshape(-1, 3), *(leaf for x in branches for leaf in x))
  return out.reshape(*gates.shape[:3], value_dim)


def forward(
  query: jax.Array,
  compressed_query: jax.Array,
  compressed: Keys,
  selected: Keys,
  ring: Keys | None,
  gates: jax.Array,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  spec: Spec,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, N, V] and block ids int32 [B, T, K, n].

  Args:
    query: [B, T, N, H].
    compressed_query: [B, T, N, H], of the compressed branch and selection.
    compressed: [B, C, K, H] and [B, C, K, V]; C may be 0.
    selected: [B, S, K, H] and [B, S, K, V].
    ring: [B, R, K, H] and [B, R, K, V]; None if the window reads `selected`.
    gates: [B, T, N, 3].
    offset: int32 [B], position of the first query.
    lengths: int32 [B], tokens that each row holds.
    spec: lengths, counts, scale and tiles.
  """
  num_blocks = pl.cdiv(selected.key.shape[1], spec.block)
  num_keys = compressed.key.shape[1]
  partial, weights = None, None
  if num_keys:
    num_tiles = 0
    if spec.num_free and num_blocks > spec.num_selected:
      # Whole steps of selection.
      tiles = pl.cdiv(num_keys, spec.tiling.compressed.block_k)
      block_m = spec.tiling.block_m
      steps = pl.cdiv(max(num_blocks, tiles * spec.columns), block_m)
      num_tiles = steps * (block_m // spec.columns)
    partial, weights = _compressed(
      compressed_query,
      compressed,
      offset,
      lengths,
      num_tiles=num_tiles,
      spec=spec,
    )
  ids, far, near = _blocks(
    query, selected, ring, partial, weights, offset, lengths, spec=spec
  )
  branches = [far, near] if partial is None else [partial, far, near]
  return _merge(branches, gates, query.dtype, spec.tiling.merge_warps), ids
