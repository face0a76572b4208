"""The second launch of decoding: selected blocks and window."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import platforms
from pallas_kernels.bands import Bounds
from pallas_kernels.integers import ceil_div, div, rem, within
from pallas_kernels.interface import KV, Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.band import walk
from pallas_kernels.triton.by_query import group_heads
from pallas_kernels.triton.decode.select import ascending, select_ids
from pallas_kernels.triton.decode.softmax import (
  PartialSoftmax,
  Weights,
  arange,
  empty_softmax,
  fold_keys,
)


class _Softmax(NamedTuple):
  """A softmax over a piece of a query's keys, for all heads of a group."""

  start: Any  # the initial carry
  # fold(carry, row, mask) adds the keys of a step, from key `row` on; all of
  # them if the mask is None.
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
  """Loads the query and returns the functions of its softmax.

  Args:
    q_ref: [G, H], G padded to a power of two, at least 16.
    keys: refs [S, H] and [S, V]; of int8, refs of their scales [S] follow.
    out_refs: acc [G, V], top [G], total [G].
    group: G without padding.
    spec: static arguments of the call.
    exp2: 2^x.
  """
  rows, head_dim = q_ref.shape
  k_ref, v_ref, *scale_refs = keys
  k_scale_ref, v_scale_ref = scale_refs or (None, None)
  value_dim = v_ref.shape[1]
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  row_mask = common.padding_mask(group, rows)
  q = common.load_pieces(q_ref, slice(None), head_pieces, row_mask)

  def load(ref, scale_ref, span_k, pieces, mask):
    loaded = common.load_pieces(ref, span_k, pieces, mask)
    if scale_ref is None:
      return loaded
    scale = common.load(scale_ref.at[span_k], mask)[:, None]
    # In float32, as by other implementations.
    return tuple(
      (x.astype(jnp.float32) * scale).astype(q_ref.dtype) for x in loaded
    )

  def fold(carry, row, mask):
    span_k = pl.ds(row, spec.tiles.blocks.block_k)
    return fold_keys(
      carry,
      q,
      load(k_ref, k_scale_ref, span_k, head_pieces, mask),
      lambda: load(v_ref, v_scale_ref, span_k, value_pieces, mask),
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

  return _Softmax(empty_softmax(rows, value_dim), fold, store)


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
  """Reads a piece of the window of a query at t, from `num_rows` keys."""
  block_k, steps = spec.tiles.blocks.block_k, spec.tiles.window_steps
  low = jnp.maximum(t - spec.config.window + 1, 0)
  first = piece * steps
  if ring:
    base = jnp.int32(0)
    end = jnp.int32(pl.cdiv(num_rows, block_k))
  else:
    base = low
    end = ceil_div(jnp.maximum(t - low + 1, 0), block_k)
  end = jnp.where((t >= 0) & (t < length), end, 0)

  def readable(row):
    """Mask of the keys that the query reads; they may be in any order."""
    if not ring:
      return (row <= t) & (row >= low)
    # The age of an entry is counted back from the newest one of the ring.
    newest = rem(jnp.maximum(length - 1, 0), num_rows)
    age = newest - row
    position = length - 1 - jnp.where(age < 0, age + num_rows, age)
    return (position <= t) & (position >= low) & (row < num_rows)

  def step(i, carry):
    row = base + i * block_k
    return softmax.fold(carry, row, readable(row + arange(block_k)))

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
  """Reads a piece of the blocks `ids` of a query at position t."""
  block_k, steps = spec.tiles.blocks.block_k, spec.tiles.selected_steps
  first = piece * steps
  # The last block is the query's own, the only one that needs a mask.
  per_block = spec.config.selection_block // block_k
  own = div(jnp.maximum(t, 0), spec.config.selection_block)
  full = jnp.minimum(own, spec.config.num_selected - 1) * per_block
  end = (
    full
    + div(jnp.maximum(t - own * spec.config.selection_block, 0), block_k)
    + 1
  )
  real = (t >= 0) & (t < length)
  end = jnp.minimum(jnp.where(real, end, 0), first + steps)
  end = jnp.maximum(end, first)

  def step(i, carry, masked):
    here = arange(len(ids)) == div(i, per_block)
    block = jnp.where(here, ids, 0).sum(dtype=jnp.int32)
    row = block * spec.config.selection_block + rem(i, per_block) * block_k
    mask = row + arange(block_k) <= t if masked else None
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
  *refs,  # scales [S] of keys and values if `quantized`; `weight_refs` of
  # `select_ids`; ids [n]; acc [G, V], top [G] and total [G] of a piece of the
  # selected blocks; the same of the window
  num_pieces: int,
  group: int,
  num_blocks: int,
  num_splits: int,
  ring: bool,
  quantized: bool,
  spec: Spec,
  exp2: Callable[[jax.Array], jax.Array],
):
  """Programs [0, num_pieces) read selected blocks, the others the window."""
  scale_refs = refs[: 2 * quantized]
  *weight_refs, ids_ref = refs[2 * quantized : -6]
  piece = pl.program_id(3)
  t = offset_ref[0] + pl.program_id(0)
  length = length_ref[0]
  softmax = functools.partial(
    _softmax, q_ref, group=group, spec=spec, exp2=exp2
  )

  @pl.when(piece < num_pieces)
  def _():
    # The load of the query is in flight during selection.
    own = softmax((k_ref, v_ref, *scale_refs), refs[-6:-3])
    ids = select_ids(
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
      n = spec.config.num_selected
      places = ascending(ids, n)
      plgpu.store(ids_ref.at[places], ids, mask=places < n)

    _read_selected(own, piece, ids, t, length, spec=spec)

  @pl.when(piece >= num_pieces)
  def _():
    of_window = () if ring else scale_refs
    _read_window(
      softmax((window_k_ref, window_v_ref, *of_window), refs[-3:]),
      piece - num_pieces,
      t,
      length,
      num_rows=window_k_ref.shape[0],
      ring=ring,
      spec=spec,
    )


def read_blocks(
  query: jax.Array,
  selected: KV,
  scales: KV | None,
  ring: KV | None,
  partial: PartialSoftmax | None,
  weights: Weights | None,
  offset: jax.Array,
  lengths: jax.Array,
  *,
  spec: Spec,
) -> tuple[jax.Array, PartialSoftmax, PartialSoftmax]:
  """Ids int32 [B, T, K, n], and partial softmaxes of selected and window."""
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = selected.value.shape[1:]
  group = heads // kv_heads
  tiling = spec.tiles
  padded = common.padded_rows(group)
  num_blocks = pl.cdiv(key_length, spec.config.selection_block)
  window = selected if ring is None else ring
  one = pl.BlockSpec((1,), lambda i, h, b, p: (b,))

  def of_query(*block):  # of an array [B, T, K, ...]
    return pl.BlockSpec(
      (None, None, None, *block),
      lambda i, h, b, p: (b, i, h, *(0,) * len(block)),
    )

  def of_head(x):  # of an array [B, S, K, width] or [B, S, K]
    rest = x.shape[3:]
    return pl.BlockSpec(
      (None, x.shape[1], None, *rest),
      lambda i, h, b, p: (b, 0, h, *(0,) * len(rest)),
    )

  args: list[Any] = [offset, lengths, group_heads(query, kv_heads)]
  specs = [one, one, of_query(padded, head_dim)]
  for x in (*selected, *window, *(scales or ())):
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
  span = (
    min(spec.config.window, key_length) if ring is None else ring.key.shape[1]
  )
  chosen = (
    min(spec.config.num_selected, num_blocks) * spec.config.selection_block
  )
  counts = [
    pl.cdiv(chosen, block_k * tiling.selected_steps),
    pl.cdiv(span, block_k * tiling.window_steps),
  ]

  def out_specs(before, count):
    """Specs of acc, top and total for the pieces of a branch."""

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
      platforms.out_shape(x, jnp.float32)
      for x in ((*shape, value_dim), shape, shape)
    ]

  ids, *found = pl.pallas_call(
    functools.partial(
      _blocks_kernel,
      num_pieces=counts[0],
      group=group,
      num_blocks=num_blocks,
      num_splits=num_splits,
      ring=ring is not None,
      quantized=scales is not None,
      spec=spec,
      exp2=common.exp2(spec.interpret),
    ),
    **common.options(
      "nsa_decode_blocks",
      tiling.blocks.num_warps,
      tiling.blocks.num_stages,
      spec.interpret,
    ),
    # Programs start in the order of the last axis, so that those that select,
    # which take longest, start first.
    grid=(length, kv_heads, batch, sum(counts)),
    in_specs=specs,
    out_specs=[
      of_query(spec.config.num_selected),
      *out_specs(0, counts[0]),
      *out_specs(counts[0], counts[1]),
    ],
    out_shape=[
      platforms.out_shape(
        (batch, length, kv_heads, spec.config.num_selected), jnp.int32
      ),
      *out_shapes(counts[0]),
      *out_shapes(counts[1]),
    ],
  )(*args)

  def flat(acc, top, total):
    pieces = len(acc)
    return PartialSoftmax(
      acc.reshape(pieces, -1, value_dim),
      top.reshape(pieces, -1),
      total.reshape(pieces, -1),
    )

  return ids, flat(*found[:3]), flat(*found[3:])
