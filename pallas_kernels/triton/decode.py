"""Attention of the newest tokens over a cache: decoding, forward only.

With a handful of queries the time is that of the bytes read once: compressed
keys and values, n blocks, the window. Keys are cut into pieces, so that one row
of a batch fills the device, in four launches:

1. compressed: a partial softmax for every split of the compressed blocks that
   are visible, all queries and heads of a group as rows; and the sums of the
   weights over each selection block, all that is left of the scores;
2. select: importance of the blocks (Eq. 8-10), then the best n (Eq. 11);
3. pieces: partial softmaxes of the selected blocks and of the window;
4. merge: the partial softmaxes, weighted by the gates (Eq. 5).

Loops are bounded by what is visible, so that the time follows the lengths, not
the capacity of the cache.
"""

import functools
from collections.abc import Callable
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

  The weights of a tile are relative to the largest score so far, `tops`.
  """

  tops: jax.Array  # [B, T, K, G, tiles]
  # [B, T, K, G, M]: of those that begin in a block and, stored with the next
  # block, of those that reach into it.
  sums: tuple[jax.Array, ...]


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


def _compressed_kernel(
  offset_ref,  # [1]
  length_ref,  # [1]
  q_ref,  # [B T N, H]
  k_ref,  # [C, H]
  v_ref,  # [C, V]
  acc_ref,  # [B T N, V]
  top_ref,  # [B T N]
  total_ref,  # [B T N]
  *weight_refs,  # tops [B T N, tiles] and sums [B T N, M], if needed
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

  place = common.rem(_arange(block_k), spec.ratio)
  # Strides of a compressed block that lie in the block it begins in.
  own = jnp.minimum(spec.reach, spec.ratio - place)

  def reduce(p, weight):
    p = p * weight.astype(jnp.float32)[None, :]
    if spec.ratio == 1:
      return p
    return p.reshape(rows, spec.columns, spec.ratio).sum(axis=2)

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
      tops_ref, *sums_refs = weight_refs
      tops_ref[mine.index, pl.ds(j, 1)] = carry[1][:, None]
      for shift, (ref, weight) in enumerate(
        zip(sums_refs, (own, spec.reach - own), strict=False)
      ):
        column = j * spec.columns + shift
        ref[mine.index, pl.ds(column, spec.columns)] = reduce(p, weight)
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
  width: int,
  spec: Spec,
) -> tuple[Partial, Weights | None]:
  """Partial softmaxes, and the weights if `width` > 0 columns are needed."""
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
  if width:
    weights = [floats(num_rows, width // spec.columns)]
    weights += [floats(num_rows, width)] * (2 if spec.reach > 1 else 1)
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
  if not width:
    return partial, None
  tops, *sums = (
    x.reshape(batch, length, kv_heads, sizes.group, -1) for x in found
  )
  return partial, Weights(tops, tuple(sums))


# ---------------------------------------------------------------------- select


def _select_kernel(
  offset_ref,  # [1]
  length_ref,  # [1]
  *refs,  # top and total [splits, G], tops [G, tiles], sums [G, M]; ids [n]
  num_blocks: int,
  num_splits: int,
  group: int,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
):
  """The forced blocks and the best of the others, ascending, then -1."""
  *weight_refs, ids_ref = refs
  n = spec.num_selected
  t = offset_ref[0] + pl.program_id(0)
  last = common.div(jnp.maximum(t, 0), spec.block)
  count = jnp.where((t >= 0) & (t < length_ref[0]), last + 1, 0)
  # Places that there are not repeat the last one: they store the same.
  slot = jnp.minimum(_arange(pl.next_power_of_2(n)), n - 1)
  few = jnp.where(slot < count, slot, -1)
  if not weight_refs:
    local = jnp.where(slot < spec.num_initial, slot, last - (n - 1) + slot)
    ids_ref[slot] = jnp.where(count > n, local, few)
    return

  # With at most n candidates all of them are chosen; with more, forced blocks
  # do not overlap.
  crowded = count > n
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

  is_free = (slot >= spec.num_initial) & (slot < n - spec.num_local)

  def choose(i, carry):
    bits, chosen, rank = carry
    best = jnp.where(bits == jnp.max(bits), block, _NEVER).min()
    here = slot == spec.num_initial + i
    smaller = (is_free & (chosen < best)).astype(jnp.int32).sum(dtype=jnp.int32)
    rank = jnp.where(is_free & (chosen > best), rank + 1, rank)
    return (
      jnp.where(block == best, -1, bits),
      jnp.where(here, best, chosen),
      jnp.where(here, spec.num_initial + smaller, rank),
    )

  forced = jnp.where(slot < spec.num_initial, slot, last - (n - 1) + slot)
  _, chosen, rank = lax.fori_loop(
    0,
    crowded.astype(jnp.int32) * spec.num_free,
    choose,
    (bits, jnp.where(is_free, _NEVER, forced), slot),
  )
  ids_ref[rank] = jnp.where(crowded, chosen, few)


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
  top_ref, total_ref, tops_ref, *sums_refs = refs
  splits, rows = top_ref.shape
  block_m, columns = spec.tiling.block_m, spec.columns
  tiles = block_m // columns
  chunks = pl.next_power_of_2(pl.cdiv(num_blocks, block_m))
  row_mask = common.padding_mask(group, rows)

  exists = _arange(splits)[:, None] < num_splits
  exists &= _arange(rows)[None, :] < group
  top = plgpu.load(top_ref, mask=exists, other=common.MAX_INIT)
  total = plgpu.load(total_ref, mask=exists, other=0)
  high = top.max(axis=0)
  total = (total * exp2(top - high[None, :])).sum(axis=0)
  lse = high + jnp.log2(jnp.where(total > 0, total, 1))

  def spread(x):  # [rows, tiles] of the tiles -> [rows, block_m] of columns
    x = jnp.broadcast_to(x[:, :, None], (rows, tiles, columns))
    return x.reshape(rows, block_m)

  def weight(tile):
    index = jnp.broadcast_to(tile[None, :], (rows, tiles))
    row = jnp.broadcast_to(
      jnp.minimum(_arange(rows), group - 1)[:, None], (rows, tiles)
    )
    return exp2(tops_ref[row, index] - lse[:, None])

  def heads(x):  # [rows, block_m] -> [block_m]
    if row_mask is not None:
      x = jnp.where(row_mask[:, None], x, 0)
    return x.sum(axis=0)

  def visit(i, scores):
    span = pl.ds(i * block_m, block_m)
    tile = i * tiles + _arange(tiles)
    factors = [spread(weight(tile))]
    if len(sums_refs) == 2:
      # What reaches into the first block of a tile comes from the tile before.
      before = spread(weight(jnp.maximum(tile - 1, 0)))
      at_edge = common.rem(_arange(block_m), columns) == 0
      factors.append(jnp.where(at_edge[None, :], before, factors[0]))
    x, *carried = (
      heads(common.load(ref.at[:, span], row_mask) * factor)
      for ref, factor in zip(sums_refs, factors, strict=True)
    )
    if carried:
      # Nothing reaches into the very first.
      x += jnp.where(i * block_m + _arange(block_m) > 0, carried[0], 0)
    here = _arange(chunks) == i
    return jnp.where(here[:, None], x[None, :], scores)

  return lax.fori_loop(
    0,
    common.div(hi + block_m, block_m),
    visit,
    jnp.zeros((chunks, block_m), jnp.float32),
  ).reshape(chunks * block_m)


def _select(
  partial: Partial | None,
  weights: Weights | None,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  length: int,
  kv_heads: int,
  num_blocks: int,
  spec: Spec,
) -> jax.Array:
  """Ids int32 [B, T, K, n]; without weights the number of candidates decides.

  That is, if there are at most n of them or all places are forced.
  """
  batch = len(offset)
  one = pl.BlockSpec((1,), lambda i, h, b: (b,))
  args: list[Any] = []
  specs: list[Any] = []
  num_splits = group = 1
  if partial is not None and weights is not None:
    group = weights.tops.shape[3]
    num_splits = len(partial.top)
    rows = pl.next_power_of_2(group)
    for x in (partial.top, partial.total):
      args.append(x.reshape(num_splits, batch, length, kv_heads, group))
      specs.append(
        pl.BlockSpec(
          (pl.next_power_of_2(num_splits), None, None, None, rows),
          lambda i, h, b: (0, b, i, h, 0),
        )
      )
    for x in (weights.tops, *weights.sums):
      args.append(x)
      specs.append(
        pl.BlockSpec(
          (None, None, None, rows, x.shape[-1]),
          lambda i, h, b: (b, i, h, 0, 0),
        )
      )
  return common.pallas_call(
    functools.partial(
      _select_kernel,
      num_blocks=num_blocks,
      num_splits=num_splits,
      group=group,
      spec=spec,
    ),
    name="nsa_decode_select",
    num_warps=spec.tiling.select_warps if args else 1,
    num_stages=1,
    with_exp2=True,
    grid=(length, kv_heads, batch),
    in_specs=[one, one, *specs],
    out_specs=pl.BlockSpec(
      (None, None, None, spec.num_selected), lambda i, h, b: (b, i, h, 0)
    ),
    out_shape=jax.ShapeDtypeStruct(
      (batch, length, kv_heads, spec.num_selected), jnp.int32
    ),
  )(offset, lengths, *args)


# ---------------------------------------------------------------------- pieces


def _pieces_kernel(
  offset_ref,  # [1]
  length_ref,  # [1]
  ids_ref,  # [n]
  q_ref,  # [G, H], G padded to a power of two, at least 16
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  *refs,  # keys [R, H] and values [R, V] of a ring, if any; acc, top, total
  group: int,
  num_selected: int,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
):
  """One piece of the selected blocks, or of the window.

  The first `num_selected` pieces are of selected blocks, the window's
  follow them.
  """
  *ring_refs, acc_ref, top_ref, total_ref = refs
  tile, steps = spec.tiling.pieces, spec.tiling.steps
  block_k = tile.block_k
  rows, head_dim = q_ref.shape
  value_dim = v_ref.shape[1]
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  piece = pl.program_id(0)
  length = length_ref[0]
  t = offset_ref[0] + pl.program_id(1)
  real = (t >= 0) & (t < length)
  row_mask = common.padding_mask(group, rows)
  q = common.load_pieces(q_ref, slice(None), head_pieces, row_mask)

  def fold(carry, refs, start, mask):
    span_k = pl.ds(start, block_k)
    return _fold(
      carry,
      q,
      common.load_pieces(refs[0], span_k, head_pieces, mask),
      lambda: common.load_pieces(refs[1], span_k, value_pieces, mask),
      None if mask is None else mask[None, :],
      spec.scale * common.LOG2E,
      exp2,
    )[0]

  def finish(carry):
    acc, m_i, l_i = carry
    for (column, width), a in zip(value_pieces, acc, strict=True):
      common.store(acc_ref.at[:, pl.ds(column, width)], a, row_mask)
    common.store(top_ref, m_i, row_mask)
    common.store(total_ref, l_i, row_mask)

  @pl.when(piece < num_selected)
  def _():
    # The last block is the query's own, the only one that needs a mask.
    per_block = spec.block // block_k
    own = common.div(jnp.maximum(t, 0), spec.block)
    full = jnp.minimum(own, spec.num_selected - 1) * per_block
    end = full + common.div(jnp.maximum(t - own * spec.block, 0), block_k) + 1
    first = piece * steps
    end = jnp.minimum(jnp.where(real, end, 0), first + steps)
    end = jnp.maximum(end, first)

    def step(i, carry, masked):
      start = ids_ref[common.div(i, per_block)] * spec.block
      start += common.rem(i, per_block) * block_k
      mask = start + _arange(block_k) <= t if masked else None
      return fold(carry, (k_ref, v_ref), start, mask)

    bounds = Bounds(first, first, within(full, first, end), end)
    finish(walk(step, _start(rows, value_dim), bounds, False))

  @pl.when(piece >= num_selected)
  def _():
    first = (piece - num_selected) * steps
    low = jnp.maximum(t - spec.window + 1, 0)

    def readable(start):
      """Which rows of a tile the query reads; softmax knows no order."""
      row = start + _arange(block_k)
      if not ring_refs:
        return (row <= t) & (row >= low)
      # Counted back from the newest row, which lies anywhere in the ring.
      ring = ring_refs[0].shape[0]
      newest = common.rem(jnp.maximum(length - 1, 0), ring)
      age = newest - row
      position = length - 1 - jnp.where(age < 0, age + ring, age)
      return (position <= t) & (position >= low) & (row < ring)

    refs: Any = ring_refs or (k_ref, v_ref)
    if ring_refs:
      base = jnp.int32(0)
      end = jnp.int32(pl.cdiv(ring_refs[0].shape[0], block_k))
    else:
      base = low
      end = ceil_div(jnp.maximum(t - low + 1, 0), block_k)
    end = jnp.minimum(jnp.where(real, end, 0), first + steps)

    def step(i, carry):
      start = base + i * block_k
      return fold(carry, refs, start, readable(start))

    finish(lax.fori_loop(first, end, step, _start(rows, value_dim)))


def _pieces(
  query: jax.Array,
  selected: Keys,
  ring: Keys | None,
  ids: jax.Array,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  spec: Spec,
) -> tuple[Partial, int]:
  """Partial softmaxes, and how many of them are of selected blocks."""
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = selected.value.shape[1:]
  group = heads // kv_heads
  rows = common.padded_rows(group)
  tiling = spec.tiling
  per_piece = tiling.pieces.block_k * tiling.steps
  num_selected = pl.cdiv(
    min(
      spec.num_selected * spec.block,
      pl.cdiv(key_length, spec.block) * spec.block,
    ),
    per_piece,
  )
  span = min(spec.window, key_length) if ring is None else ring.key.shape[1]
  num_pieces = num_selected + pl.cdiv(span, per_piece)

  def keys(x):
    _, num_keys, _, width = x.shape
    return pl.BlockSpec(
      (None, num_keys, None, width), lambda p, i, h, b: (b, 0, h, 0)
    )

  def per_piece_spec(*last):
    return pl.BlockSpec(
      (None, None, None, None, rows, *last),
      lambda p, i, h, b: (p, b, i, h, 0, *(0,) * len(last)),
    )

  one = pl.BlockSpec((1,), lambda p, i, h, b: (b,))
  shape = (num_pieces, batch, length, kv_heads, group)
  every = [*selected, *(ring or ())]
  acc, top, total = common.pallas_call(
    functools.partial(
      _pieces_kernel, group=group, num_selected=num_selected, spec=spec
    ),
    name="nsa_decode_pieces",
    num_warps=tiling.pieces.num_warps,
    num_stages=tiling.pieces.num_stages,
    with_exp2=True,
    grid=(num_pieces, length, kv_heads, batch),
    in_specs=[
      one,
      one,
      pl.BlockSpec(
        (None, None, None, spec.num_selected), lambda p, i, h, b: (b, i, h, 0)
      ),
      pl.BlockSpec(
        (None, None, None, rows, head_dim), lambda p, i, h, b: (b, i, h, 0, 0)
      ),
      *map(keys, every),
    ],
    out_specs=[per_piece_spec(value_dim), per_piece_spec(), per_piece_spec()],
    out_shape=[
      jax.ShapeDtypeStruct((*shape, value_dim), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ],
  )(offset, lengths, ids, group_heads(query, kv_heads), *every)
  return (
    Partial(
      acc.reshape(num_pieces, -1, value_dim),
      top.reshape(num_pieces, -1),
      total.reshape(num_pieces, -1),
    ),
    num_selected,
  )


# ----------------------------------------------------------------------- merge


def _merge_kernel(
  gates_ref,  # [3]
  *refs,  # acc [pieces, V], top and total [pieces] of 1 or 2 arrays; out [V]
  branches: tuple[tuple[int, int, int, int], ...],
  exp2: Callable[[jax.Array], jax.Array],
):
  """One query and head.

  `branches`: of each branch its gate, its array, and its first piece and
  their number.
  """
  *partial_refs, out_ref = refs
  value_pieces = common.pieces(out_ref.shape[0])
  out = [jnp.zeros((width,), jnp.float32) for _, width in value_pieces]
  for gate, array, first, count in branches:
    acc_ref, top_ref, total_ref = partial_refs[3 * array : 3 * array + 3]
    padded = pl.next_power_of_2(count)
    span = pl.ds(first, padded)
    mask = common.padding_mask(count, padded)
    top = common.load(top_ref.at[span], mask, common.MAX_INIT)
    total = common.load(total_ref.at[span], mask)
    weight = exp2(top - top.max())
    total = (weight * total).sum()
    some = total > 0
    factor = gates_ref[gate].astype(jnp.float32) / jnp.where(some, total, 1)
    for i, (column, width) in enumerate(value_pieces):
      acc = common.load(acc_ref.at[span, pl.ds(column, width)], mask)
      branch = (weight[:, None] * acc).sum(axis=0) * factor
      out[i] += jnp.where(some, branch, 0)
  for (column, width), x in zip(value_pieces, out, strict=True):
    out_ref[pl.ds(column, width)] = x.astype(out_ref.dtype)


def _merge(
  compressed: Partial | None,
  pieces: Partial,
  num_selected: int,
  gates: jax.Array,
  dtype: Any,
  num_warps: int,
) -> jax.Array:
  """Out [B, T, N, V]."""
  num_pieces, num_rows, value_dim = pieces.acc.shape
  branches = [
    (1, 0, 0, num_selected),
    (2, 0, num_selected, num_pieces - num_selected),
  ]
  partials = [pieces]
  if compressed is not None:
    branches.append((0, 1, 0, len(compressed.acc)))
    partials.append(compressed)
  specs = []
  for x in partials:
    # Loads are of powers of two.
    count = len(x.acc) + pl.next_power_of_2(len(x.acc))
    specs += [
      pl.BlockSpec((count, None, value_dim), lambda r: (0, r, 0)),
      pl.BlockSpec((count, None), lambda r: (0, r)),
      pl.BlockSpec((count, None), lambda r: (0, r)),
    ]
  out = common.pallas_call(
    functools.partial(_merge_kernel, branches=tuple(branches)),
    name="nsa_decode_merge",
    num_warps=num_warps,
    num_stages=1,
    with_exp2=True,
    grid=(num_rows,),
    in_specs=[pl.BlockSpec((None, 3), lambda r: (r, 0)), *specs],
    out_specs=pl.BlockSpec((None, value_dim), lambda r: (r, 0)),
    out_shape=jax.ShapeDtypeStruct((num_rows, value_dim), dtype),
  )(gates.reshape(-1, 3), *(leaf for x in partials for leaf in x))
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
  length, kv_heads = query.shape[1], selected.key.shape[2]
  num_blocks = pl.cdiv(selected.key.shape[1], spec.block)
  num_keys = compressed.key.shape[1]
  partial, weights = None, None
  if num_keys:
    width = 0
    if spec.num_free and num_blocks > spec.num_selected:
      tiles = pl.cdiv(num_keys, spec.tiling.compressed.block_k)
      # What a block carries over goes to the next one.
      width = pl.cdiv(tiles * spec.columns + 1, spec.tiling.block_m)
      width *= spec.tiling.block_m
    partial, weights = _compressed(
      compressed_query, compressed, offset, lengths, width=width, spec=spec
    )
  ids = _select(
    partial,
    weights,
    offset,
    lengths,
    length=length,
    kv_heads=kv_heads,
    num_blocks=num_blocks,
    spec=spec,
  )
  pieces, num_selected = _pieces(
    query, selected, ring, ids, offset, lengths, spec=spec
  )
  out = _merge(
    partial,
    pieces,
    num_selected,
    gates,
    query.dtype,
    spec.tiling.merge_warps,
  )
  return out, ids
