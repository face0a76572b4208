"""Attention over selected blocks for small groups, backward: one pass.

A program that holds a block and walks its queries has all operands of dq, dk
and dv: this takes five products instead of the seven of two passes. dk and dv
accumulate inside the program; each (query, block) pair stores its share of dq,
and a second kernel sums these in order. There are no atomics, so every run
gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gradients import delta_of, keep_finite
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.query_chunks import (
  Chunking,
  by_head,
  finish_gradient,
  first_rows,
  ids_of_rows,
  make_chunk,
  zero_gradient,
)
from pallas_kernels.triton import common
from pallas_kernels.triton.by_block import (
  by_piece,
  by_row,
  chunk_queries,
  load_block,
  load_queries,
  query_heads,
  query_rows,
  scatter,
  split_blocks,
  walk_queries,
)
from pallas_kernels.triton.by_query import reads_of
from pallas_kernels.triton.list_pieces import (
  add_pieces,
  count_chosen,
  load_piece,
)


def _bwd_kernel(
  piece_ref,  # [3]
  items_ref,  # [D T' m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  q_ref,  # [B K T, G, H]
  k_ref,  # [B K, S, H]
  v_ref,  # [B K, S, V]
  dout_ref,  # [B K T, G, V]
  lse_ref,  # [B K T, G], base 2
  delta_ref,  # [B K T, G]
  *refs,  # segments, if any; partial dk [l', H], dv [l', V]; dq of pairs
  spec: Spec,
  chunking: Chunking,
):
  *segments, dk_ref, dv_ref, dq_ref = refs
  group = q_ref.shape[1]

  def zeros(ref):
    return common.accumulators(chunking.block, common.pieces(ref.shape[-1]))

  @pl.when(piece_ref[2] > piece_ref[1])
  def _():
    piece = load_piece(piece_ref, first_row_ref, offset_ref, segments, chunking)
    k, v = (load_block(ref, piece, chunking) for ref in (k_ref, v_ref))

    def body(step, carry):
      dk, dv = carry
      q, dout = load_queries(q_ref, step), load_queries(dout_ref, step)
      lse, delta = (ref[step.row].reshape(-1) for ref in (lse_ref, delta_ref))
      delta = keep_finite(delta, lse)
      # Transposed, [keys, tile rows], so that dk and dv need no transpose.
      s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
      mask = piece.token[:, None] <= step.position[None, :]
      if segments:
        mask &= piece.key_segment[:, None] == step.segment[None, :]
      p = jnp.where(mask, jnp.exp2(s - lse[None, :]), 0)
      dv = tuple(
        d + common.dot(p.astype(x.dtype), x)
        for d, x in zip(dv, dout, strict=True)
      )
      dp = common.dot_pieces(v, dout)
      ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
      dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
      scatter(dq_ref, step, tuple(common.dot(ds.T, x) * spec.scale for x in k))
      return dk, dv

    dk, dv = walk_queries(
      body,
      (zeros(k_ref), zeros(v_ref)),
      piece,
      items_ref,
      segments,
      chunking,
      queries=spec.tiles.rows // group,
      group=group,
    )
    for ref, xs, scale in ((dk_ref, dk, spec.scale), (dv_ref, dv, 1)):
      for (start, width), x in zip(
        common.pieces(ref.shape[-1]), xs, strict=True
      ):
        ref[:, pl.ds(start, width)] = x * scale


def _sum_dq_kernel(
  ids_ref,  # [m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  part_ref,  # [m, G, H]
  dq_ref,  # [G, H]
  *,
  chunking: Chunking,
):
  group, head_dim = dq_ref.shape
  columns = common.pieces(head_dim)

  def body(i, acc):
    return tuple(
      a + part_ref[i, :, pl.ds(start, w)].astype(jnp.float32)
      for a, (start, w) in zip(acc, columns, strict=True)
    )

  acc = lax.fori_loop(
    0,
    count_chosen(ids_ref, first_row_ref, offset_ref, chunking),
    body,
    common.accumulators(group, columns),
  )
  for (start, w), a in zip(columns, acc, strict=True):
    dq_ref[:, pl.ds(start, w)] = a.astype(dq_ref.dtype)


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
  tile, block_k = spec.tiles.dkv, spec.tiles.dkv.block_k
  ids = split_blocks(reads.ids, spec.config.selection_block, block_k)
  chunking = chunk_queries(spec, query, key, ids, block_k)
  row_ids = ids_of_rows(ids, chunking)
  delta = delta_of(out, dout, dlse)
  empty = lse == -jnp.inf
  lse = jnp.where(empty, 0, lse) * common.LOG2E
  rows, dout, lse, delta = (
    query_rows(x, chunking) for x in (query, dout, lse, delta)
  )
  keys, values = (by_head(x, chunking.key_length) for x in (key, value))
  arrays = (reads.offset, rows, keys, values, dout, lse, delta, *reads.segments)
  blocks = [(block_k, x.shape[-1]) for x in (key, value)]
  per_pair = [(rows.shape[1:], query.dtype)]

  def step(totals, first_row):
    chunk = make_chunk(
      first_row, row_ids, reads.offset, chunking, spec.tiles.piece
    )
    args, grid = by_piece(chunk, arrays, blocks, per_pair, chunking)
    *partial, part = pl.pallas_call(
      functools.partial(_bwd_kernel, spec=spec, chunking=chunking),
      **common.options(
        "nsa_selected_by_block_bwd",
        tile.num_warps,
        tile.num_stages,
        spec.interpret,
      ),
      **grid,
    )(*args)
    args, grid = by_row(chunk, reads.offset, [part], chunking)
    (dq,) = pl.pallas_call(
      functools.partial(_sum_dq_kernel, chunking=chunking),
      **common.options("nsa_selected_sum_dq", 1, 3, spec.interpret),
      **grid,
    )(*args)
    totals = [
      add_pieces(*x, chunk, chunking, interpret=spec.interpret)
      for x in zip(totals, partial, strict=True)
    ]
    return totals, dq

  zeros = [zero_gradient(x, chunking) for x in (key, value)]
  totals, dq = lax.scan(step, zeros, first_rows(row_ids, chunking))
  dk, dv = map(finish_gradient, totals, (key, value))
  # A NaN in an unread value may have reached queries that read nothing.
  dq = jnp.where(empty[..., None], 0, query_heads(dq, query, chunking))
  return dq, dk, dv
