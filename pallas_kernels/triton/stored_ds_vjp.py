"""Attention over selected blocks for large groups, backward with stored ds.

dk, dv: one program per piece of the list of the queries that chose a block, as
in `by_query_vjp`; it also stores ds, the gradients of the scores, of every
(query, block) pair. dq: one product of a query's ds with the keys of its
blocks. That reads half the bytes of a second pass over keys and values, and
computes no exponentials. Queries are processed in chunks, which bounds the
memory of ds; dk and dv accumulate over the chunks. There are no atomics, so
every run gives the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.interface import Queries, Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.by_block import (
  Chunk,
  Chunking,
  by_head,
  first_rows,
  load_piece,
  make_chunk,
  make_chunking,
  split_blocks,
)
from pallas_kernels.triton.by_query import group_heads, reads_of
from pallas_kernels.triton.inverse_lists import chosen, sum_pieces


def backward(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  index: tuple[jax.Array, Queries],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, ...]:
  """As in `by_query_vjp.backward`."""
  query, key, value = qkv
  reads = reads_of(index)
  block_k = spec.tiles.dkv.block_k
  batch, key_length, kv_heads, _ = key.shape
  ids = split_blocks(reads.ids, spec.config.selection_block, block_k)
  rows = common.padded_rows(query.shape[2] // kv_heads)
  shape = batch, query.shape[1], rows * kv_heads
  chunking = make_chunking(
    jax.ShapeDtypeStruct(shape, query.dtype),
    ids,
    key_length=key_length,
    width=block_k,
    block=block_k,
    scratch=spec.tiles.scratch,
  )
  row_ids = by_head(ids, chunking.length, -1).reshape(-1, chunking.num_ids)
  f32 = jnp.float32
  delta = jnp.sum(dout.astype(f32) * out.astype(f32), axis=-1) - dlse
  delta = common.keep_finite(delta, lse)
  grouped = [group_heads(x, kv_heads) for x in (query, dout, lse, delta)]

  def step(first_row, grads):
    chunk = make_chunk(
      first_row, row_ids, reads.offset, chunking, spec.tiles.piece
    )
    dq, *totals = grads or (None,)
    *partial, ds = _key_value_gradient(
      chunk, grouped, key, value, reads, chunking, spec
    )
    dq = _query_gradient(
      chunk, row_ids, ds, dq, grouped, key, reads, chunking, spec
    )
    first_head = first_row // chunking.length
    if not totals:
      shape = batch * kv_heads, chunking.num_blocks * block_k
      totals = [jnp.zeros((*shape, x.shape[-1]), f32) for x in partial]

    def add(total, partial):
      sums = sum_pieces(
        partial, chunk.lists.starts, f32, interpret=spec.interpret
      )
      sums = sums.reshape(chunking.heads, -1, sums.shape[-1])
      sums += lax.dynamic_slice_in_dim(total, first_head, chunking.heads)
      return lax.dynamic_update_slice_in_dim(total, sums, first_head, axis=0)

    return dq, *(add(*x) for x in zip(totals, partial, strict=True))

  starts = first_rows(row_ids, chunking)
  # The first chunk has no earlier gradients to add to.
  grads = step(starts[0], None)
  if len(starts) > 1:
    grads = lax.fori_loop(
      1, len(starts), lambda i, grads: step(starts[i], grads), grads
    )
  dq, *totals = grads

  def tokens(x, like):  # [B K, M l', W] -> [B, S, K, W]
    x = x[:, :key_length].reshape(batch, kv_heads, key_length, -1)
    return jnp.swapaxes(x, 1, 2).astype(like.dtype)

  dk, dv = map(tokens, totals, (key, value))
  return dq.reshape(query.shape), dk, dv


def _dkv_kernel(
  piece_ref,  # [3]
  items_ref,  # [D T' m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  k_ref,  # [B, S, K, H]
  v_ref,  # [B, S, K, V]
  *refs,  # segments [B, S] and [B, T], if any; then those unpacked below
  spec: Spec,
  chunking: Chunking,
  group: int,
):
  # q, dout [B, T, K, G, H or V]; lse, delta [B, T, K, G], G padded; partial dk,
  # dv [l', H or V]; ds [pairs, l', G].
  *segments, q_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, ds_ref = refs
  rows, head_dim = q_ref.shape[3:]
  value_dim = v_ref.shape[-1]
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  row_mask = common.padding_mask(group, rows)

  @pl.when(piece_ref[2] > piece_ref[1])
  def _():
    piece = load_piece(piece_ref, first_row_ref, offset_ref, segments, chunking)
    b, h = piece.batch, piece.head - piece.batch * chunking.kv_heads
    span_k = pl.ds(piece.start_k, chunking.block)
    inside = piece.token < chunking.key_length
    k = common.load_pieces(k_ref, (b, span_k, h), head_pieces, inside)
    v = common.load_pieces(v_ref, (b, span_k, h), value_pieces, inside)

    def body(i, carry):
      dk, dv = carry
      item = items_ref[i]
      t = piece.first_query + common.div(item, chunking.num_ids)
      index = (b, t, h, slice(None))
      q = common.load_pieces(q_ref, index, head_pieces, row_mask)
      dout = common.load_pieces(dout_ref, index, value_pieces, row_mask)
      lse = common.load(lse_ref.at[index], row_mask)
      delta = common.load(delta_ref.at[index], row_mask)
      # Transposed, [keys, tile rows], so that dk and dv need no transpose.
      s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
      mask = piece.token <= piece.offset + t
      if segments:
        mask &= piece.key_segment == segments[1][b, t]
        lse = jnp.where(lse == -jnp.inf, 0, lse)
      p = jnp.exp2(s - (lse * common.LOG2E)[None, :])
      p = jnp.where(mask[:, None], p, 0)
      dv = tuple(
        d + common.dot(p.astype(x.dtype), x)
        for d, x in zip(dv, dout, strict=True)
      )
      dp = common.dot_pieces(v, dout)
      ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
      ds_ref[piece.first_pair + item, :, :] = ds
      dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
      return dk, dv

    dk, dv = lax.fori_loop(
      piece.first,
      piece.last,
      body,
      (
        common.accumulators(chunking.block, head_pieces),
        common.accumulators(chunking.block, value_pieces),
      ),
    )
    for (column, width), d in zip(head_pieces, dk, strict=True):
      dk_ref[:, pl.ds(column, width)] = d * spec.scale
    for (column, width), d in zip(value_pieces, dv, strict=True):
      dv_ref[:, pl.ds(column, width)] = d


def _padded(x: jax.Array, rows: int) -> pl.BlockSpec:
  """Spec of [B, T, K, G, ...] with the heads of a group padded to a tile."""
  shape = (*x.shape[:3], rows, *x.shape[4:])
  return common.whole(jax.ShapeDtypeStruct(shape, x.dtype))


def _key_value_gradient(
  chunk: Chunk,
  grouped: list[jax.Array],
  key: jax.Array,
  value: jax.Array,
  reads: Any,
  chunking: Chunking,
  spec: Spec,
) -> tuple[jax.Array, ...]:
  """dk and dv of the pieces [P, l', H or V]; ds [pairs, l', G padded]."""
  group = grouped[0].shape[3]
  rows = common.padded_rows(group)
  tile, lists = spec.tiles.dkv, chunk.lists
  num_pieces = lists.pieces.shape[0]
  block, widths = chunking.block, (key.shape[-1], value.shape[-1])
  ds = jax.ShapeDtypeStruct((chunking.num_pairs, block, rows), grouped[0].dtype)
  inputs = (lists.items, chunk.first_row, reads.offset, key, value)
  inputs = (*inputs, *reads.segments)
  return tuple(
    pl.pallas_call(
      functools.partial(_dkv_kernel, spec=spec, chunking=chunking, group=group),
      **common.options(
        "nsa_selected_dkv_ds", tile.num_warps, tile.num_stages, spec.interpret
      ),
      grid=(num_pieces,),
      in_specs=[
        pl.BlockSpec((None, 3), lambda p: (p, 0)),
        *map(common.whole, inputs),
        *(_padded(x, rows) for x in grouped),
      ],
      out_specs=[
        *(
          pl.BlockSpec((None, block, width), lambda p: (p, 0, 0))
          for width in widths
        ),
        common.whole(ds),
      ],
      out_shape=[
        *(
          jax.ShapeDtypeStruct((num_pieces, block, width), jnp.float32)
          for width in widths
        ),
        ds,
      ],
    )(lists.pieces, *inputs, *grouped)
  )


def _dq_kernel(
  ids_ref,  # [B K T, m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  k_ref,  # [B, S, K, H]
  lse_ref,  # [B, T, K, G], G padded
  ds_ref,  # [m, l', G], of the program's query
  *refs,  # dq of earlier chunks, if any; dq [B, T, K, G, H]
  spec: Spec,
  chunking: Chunking,
  group: int,
):
  dq_ref = refs[-1]
  rows, head_dim = dq_ref.shape[3:]
  head_pieces = common.pieces(head_dim)
  row_mask = common.padding_mask(group, rows)
  row = first_row_ref[0] + pl.program_id(0)
  head = common.div(row, chunking.length)
  t = row - head * chunking.length
  b = common.div(head, chunking.kv_heads)
  h = head - b * chunking.kv_heads

  @pl.when(t < dq_ref.shape[1])  # The last chunk of a head may be padded.
  def _():
    slot = jnp.arange(pl.next_power_of_2(chunking.num_ids), dtype=jnp.int32)
    ids = common.load(
      ids_ref.at[row, pl.ds(0, slot.shape[0])], slot < chunking.num_ids, -1
    )
    # Ids ascend, so those of attended blocks come first.
    count = jnp.sum(
      chosen(
        ids, offset_ref[b] + t, chunking.key_length, chunking.block
      ).astype(jnp.int32)
    )

    def body(i, dq):
      start = ids_ref[row, i] * chunking.block
      inside = None
      if chunking.key_length % chunking.block:
        inside = start + jnp.arange(chunking.block) < chunking.key_length
      span_k = pl.ds(start, chunking.block)
      k = common.load_pieces(k_ref, (b, span_k, h), head_pieces, inside)
      ds = ds_ref[i, :, :].T
      return tuple(d + common.dot(ds, x) for d, x in zip(dq, k, strict=True))

    dq = lax.fori_loop(0, count, body, common.accumulators(rows, head_pieces))
    index = (b, t, h, slice(None))
    some = (common.load(lse_ref.at[index], row_mask) != -jnp.inf)[:, None]
    for (column, width), d in zip(head_pieces, dq, strict=True):
      d = jnp.where(some, d * spec.scale, 0).astype(dq_ref.dtype)
      common.store(dq_ref.at[(*index, pl.ds(column, width))], d, row_mask)


def _query_gradient(
  chunk: Chunk,
  row_ids: jax.Array,
  ds: jax.Array,
  before: jax.Array | None,
  grouped: list[jax.Array],
  key: jax.Array,
  reads: Any,
  chunking: Chunking,
  spec: Spec,
) -> jax.Array:
  """dq [B, T, K, G, H] of this chunk and of those before."""
  query, _, lse, _ = grouped
  group = query.shape[3]
  rows = common.padded_rows(group)
  tile = spec.tiles.dq
  args = (row_ids, chunk.first_row, reads.offset, key, lse, ds)
  aliased = () if before is None else (before,)
  specs = [*map(common.whole, args[:4]), _padded(lse, rows)]
  return pl.pallas_call(
    functools.partial(_dq_kernel, spec=spec, chunking=chunking, group=group),
    **common.options(
      "nsa_selected_dq_ds", tile.num_warps, tile.num_stages, spec.interpret
    ),
    grid=(chunking.heads * chunking.queries,),
    in_specs=[
      *specs,
      pl.BlockSpec(
        (chunking.num_ids, chunking.block, rows), lambda r: (r, 0, 0)
      ),
      *(_padded(x, rows) for x in aliased),
    ],
    out_specs=_padded(query, rows),
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    input_output_aliases={len(args): 0} if aliased else {},
  )(*args, *aliased)
