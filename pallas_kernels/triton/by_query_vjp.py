"""Attention over selected blocks, backward.

dq: the loop of the forward kernel. dk, dv: one program per piece of the list of
the queries that chose a block, which also sums over the heads of a group. There
are no atomics, so every run gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.interface import Queries, Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.by_query import (
  BlockReads,
  Unpadded,
  group_heads,
  layout,
  program,
  reads_of,
  walk_blocks,
)
from pallas_kernels.triton.inverse_lists import chosen, invert, sum_pieces


def backward(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  index: tuple[jax.Array, Queries],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, ...]:
  """Gradients of query, key and value, in their dtypes.

  Args:
    spec: as in `by_query.forward`.
    qkv: as in `by_query.forward`.
    index: as in `by_query.forward`.
    out: [B, T, N, V], from `forward`.
    lse: [B, T, N], from `forward`.
    dout: [B, T, N, V], cotangent of `out`.
    dlse: float32 [B, T, N], cotangent of `lse`.
  """
  reads = reads_of(index)
  dq, delta = query_gradient(spec, qkv, reads, out, lse, dout, dlse)
  return dq, *key_value_gradient(spec, qkv, reads, lse, delta, dout)


def _dq_kernel(
  offset_ref,  # [1]
  q_ref,  # [queries, G, H]
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  out_ref,  # [queries, G, V]
  lse_ref,  # [queries, G]
  dout_ref,  # [queries, G, V]
  dlse_ref,  # [queries, G]
  *refs,  # as in `program`; then dq [queries, G, H], delta [queries, G]
  spec: Spec,
  sizes: Unpadded,
):
  *reads, dq_ref, delta_ref = refs
  queries, rows, head_dim = q_ref.shape
  key_length, value_dim = v_ref.shape
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  mine = program(
    offset_ref,
    reads,
    queries=queries,
    rows=rows,
    sizes=sizes,
    key_length=key_length,
    block=spec.config.selection_block,
  )

  def load(ref, pieces, i):
    return common.load_pieces(
      ref, (common.index(i), slice(None)), pieces, mine.row_masks[i]
    )

  q = [load(q_ref, head_pieces, i) for i in range(queries)]
  dout = [load(dout_ref, value_pieces, i) for i in range(queries)]
  deltas, lses, some = [], [], []
  for i, mask in enumerate(mine.row_masks):
    delta = -common.load(dlse_ref.at[common.index(i)], mask)
    for x, y in zip(dout[i], load(out_ref, value_pieces, i), strict=True):
      delta += jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=1)
    lse = common.load(lse_ref.at[common.index(i)], mask)
    delta = common.keep_finite(delta, lse)
    common.store(delta_ref.at[common.index(i)], delta, mask)
    deltas.append(delta)
    some.append((lse != -jnp.inf)[:, None])
    lses.append(jnp.where(lse == -jnp.inf, 0, lse) * common.LOG2E)

  def tile(i, dq, k, v, mask):
    s = common.dot_pieces(q[i], k) * (spec.scale * common.LOG2E)
    if mask is not None:
      s = jnp.where(mask[None, :], s, common.MASK)
    p = jnp.exp2(s - lses[i][:, None])
    dp = common.dot_pieces(dout[i], v)
    ds = (p * (dp - deltas[i][:, None])).astype(q_ref.dtype)
    return tuple(d + common.dot(ds, x) for d, x in zip(dq, k, strict=True))

  start = common.accumulators(rows, head_pieces)
  states = walk_blocks(
    tile,
    (start,) * queries,
    mine,
    k_ref,
    v_ref,
    block=spec.config.selection_block,
    block_k=spec.tiles.dq.block_k,
  )
  for i, dq in enumerate(states):
    for (column, width), d in zip(head_pieces, dq, strict=True):
      d = jnp.where(some[i], d * spec.scale, 0).astype(dq_ref.dtype)
      common.store(
        dq_ref.at[common.index(i), :, pl.ds(column, width)],
        d,
        mine.row_masks[i],
      )


def query_gradient(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  reads: BlockReads,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """dq [B, T, N, H] and delta = sum(dout * out) - dlse, float32 [B, T, N]."""
  query, key, value = qkv
  key_length, kv_heads = key.shape[1:3]
  grouped = group_heads(query, kv_heads)
  tile = spec.tiles.dq
  specs = layout(grouped, key_length, reads, tile, spec)
  head_dim, value_dim = query.shape[-1], value.shape[-1]
  dq, delta = pl.pallas_call(
    functools.partial(_dq_kernel, spec=spec, sizes=specs.sizes),
    **common.options(
      "nsa_selected_dq", tile.num_warps, tile.num_stages, spec.interpret
    ),
    grid=specs.grid,
    in_specs=[
      specs.offset,
      specs.per_query(head_dim),
      specs.keys(head_dim),
      specs.keys(value_dim),
      specs.per_query(value_dim),
      specs.per_row,
      specs.per_query(value_dim),
      specs.per_row,
      *specs.read_specs,
    ],
    out_specs=[specs.per_query(head_dim), specs.per_row],
    out_shape=[
      jax.ShapeDtypeStruct(grouped.shape, query.dtype),
      jax.ShapeDtypeStruct(grouped.shape[:4], jnp.float32),
    ],
  )(
    reads.offset,
    grouped,
    key,
    value,
    *(group_heads(x, kv_heads) for x in (out, lse, dout, dlse)),
    *specs.reads,
  )
  return dq.reshape(query.shape), delta.reshape(lse.shape)


def _dkv_kernel(
  piece_ref,  # [3]
  items_ref,  # [B T K m], queries
  offset_ref,  # [B]
  k_ref,  # [B, S, K, H]
  v_ref,  # [B, S, K, V]
  *refs,  # segments [B, S] and [B, T], if any; then those unpacked below
  spec: Spec,
  group: int,
):
  # q, dout [B, T, K, G, H or V]; lse, delta [B, T, K, G], G padded; partial dk,
  # dv [l', H or V].
  *segments, q_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
  kv_heads, rows, head_dim = q_ref.shape[2:]
  key_length, value_dim = v_ref.shape[1], v_ref.shape[-1]
  block = spec.config.selection_block
  num_blocks = -(-key_length // block)
  block_k = spec.tiles.dkv.block_k
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  row_mask = common.padding_mask(group, rows)
  row, first, last = piece_ref[0], piece_ref[1], piece_ref[2]
  local = pl.program_id(1) * block_k

  @pl.when(last > first)
  def _():
    j = common.rem(row, num_blocks)
    h = common.rem(common.div(row, num_blocks), kv_heads)
    b = common.div(row, num_blocks * kv_heads)
    start = j * block + local
    token = start + jnp.arange(block_k)
    inside = token < key_length
    span_k = pl.ds(start, block_k)
    k = common.load_pieces(k_ref, (b, span_k, h), head_pieces, inside)
    v = common.load_pieces(v_ref, (b, span_k, h), value_pieces, inside)
    offset = offset_ref[b]
    if segments:
      key_segment = common.load(segments[0].at[b, span_k], inside)

    def body(i, carry):
      dk, dv = carry
      t = items_ref[i]
      index = (b, t, h, slice(None))
      q = common.load_pieces(q_ref, index, head_pieces, row_mask)
      dout = common.load_pieces(dout_ref, index, value_pieces, row_mask)
      lse = common.load(lse_ref.at[index], row_mask)
      delta = common.load(delta_ref.at[index], row_mask)
      # Transposed, [keys, tile rows], so that dk and dv need no transpose.
      s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
      mask = token <= offset + t
      if segments:
        mask &= key_segment == segments[1][b, t]
        lse = jnp.where(lse == -jnp.inf, 0, lse)
      p = jnp.exp2(s - (lse * common.LOG2E)[None, :])
      p = jnp.where(mask[:, None], p, 0)
      dv = tuple(
        d + common.dot(p.astype(x.dtype), x)
        for d, x in zip(dv, dout, strict=True)
      )
      dp = common.dot_pieces(v, dout)
      ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
      dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
      return dk, dv

    dk, dv = lax.fori_loop(
      first,
      last,
      body,
      (
        common.accumulators(block_k, head_pieces),
        common.accumulators(block_k, value_pieces),
      ),
    )
    span = pl.ds(local, block_k)
    for (column, width), d in zip(head_pieces, dk, strict=True):
      dk_ref[span, pl.ds(column, width)] = d * spec.scale
    for (column, width), d in zip(value_pieces, dv, strict=True):
      dv_ref[span, pl.ds(column, width)] = d


def key_value_gradient(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  reads: BlockReads,
  lse: jax.Array,
  delta: jax.Array,
  dout: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """dk [B, S, K, H] and dv [B, S, K, V]."""
  query, key, value = qkv
  ids, offset, segments = reads
  kv_heads = key.shape[2]
  group = query.shape[2] // kv_heads
  rows = common.padded_rows(group)
  tiles, block = spec.tiles, spec.config.selection_block
  batch, length = query.shape[:2]
  key_length = key.shape[1]
  num_blocks = -(-key_length // block)
  num_owners = batch * kv_heads * num_blocks
  item = jnp.arange(length, dtype=jnp.int32)[None, :, None, None]
  position = offset[:, None, None, None] + item
  head = (
    jnp.arange(batch, dtype=jnp.int32)[:, None, None, None] * kv_heads
    + jnp.arange(kv_heads, dtype=jnp.int32)[None, None, :, None]
  )
  valid = chosen(ids, position, key_length, block)
  lists = invert(
    jnp.where(valid, head * num_blocks + ids, num_owners),
    jnp.broadcast_to(item, ids.shape),
    num_owners=num_owners,
    num_items=length,
    piece=tiles.piece,
  )
  per_row = [group_heads(x, kv_heads) for x in (query, dout, lse, delta)]

  def padded(x):  # spec with the heads of a group padded to a tile
    shape = (*x.shape[:3], rows, *x.shape[4:])
    return common.whole(jax.ShapeDtypeStruct(shape, x.dtype))

  num_pieces = lists.pieces.shape[0]
  widths = (key.shape[-1], value.shape[-1])
  partial = pl.pallas_call(
    functools.partial(_dkv_kernel, spec=spec, group=group),
    **common.options(
      "nsa_selected_dkv",
      tiles.dkv.num_warps,
      tiles.dkv.num_stages,
      spec.interpret,
    ),
    grid=(num_pieces, block // tiles.dkv.block_k),
    in_specs=[
      pl.BlockSpec((None, 3), lambda p, _: (p, 0)),
      *map(common.whole, (lists.items, offset, key, value, *segments)),
      *map(padded, per_row),
    ],
    out_specs=[
      pl.BlockSpec((None, block, width), lambda p, _: (p, 0, 0))
      for width in widths
    ],
    out_shape=[
      jax.ShapeDtypeStruct((num_pieces, block, width), jnp.float32)
      for width in widths
    ],
  )(lists.pieces, lists.items, offset, key, value, *segments, *per_row)

  def finish(partial, like):
    total = sum_pieces(
      partial, lists.starts, like.dtype, interpret=spec.interpret
    )
    total = total.reshape(batch, kv_heads, -1, like.shape[-1])
    return jnp.swapaxes(total[:, :, :key_length], 1, 2)

  return finish(partial[0], key), finish(partial[1], value)
