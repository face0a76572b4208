"""Attention over selected blocks for small groups, backward: one pass.

The program that holds a block and walks its queries has everything that dq, dk
and dv need: five products instead of the seven of two passes. dk and dv add up
inside the program; each (query, block) pair leaves its share of dq, which a
second kernel adds up in order. No atomics: every run gives the same bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common
from pallas_kernels.triton.inverse_lists import sum_pieces
from pallas_kernels.triton.selected_attention import Spec
from pallas_kernels.triton.selected_by_block import (
  Plan,
  by_head,
  call_by_piece,
  call_by_query,
  count_chosen,
  gather,
  load_block,
  load_piece,
  plan_chunks,
  query_heads,
  query_rows,
  scan_chunks,
  scatter,
  split_blocks,
  walk_queries,
)


def _bwd_kernel(
  piece_ref,  # [3]
  items_ref,  # [D C m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  q_ref,  # [B K T, G, H]
  k_ref,  # [B K, S, H]
  v_ref,  # [B K, S, V]
  dout_ref,  # [B K T, G, V]
  lse_ref,  # [B K T, G], base 2
  delta_ref,  # [B K T, G]
  *refs,  # segments, if any; dk [l', H] and dv [l', V], partial; dq per pair
  spec: Spec,
  plan: Plan,
):
  *segments, dk_ref, dv_ref, dq_ref = refs
  group = q_ref.shape[1]

  def zeros(ref):
    return common.accumulators(plan.block, common.pieces(ref.shape[-1]))

  @pl.when(piece_ref[2] > piece_ref[1])
  def _():
    piece = load_piece(piece_ref, first_row_ref, offset_ref, segments, plan)
    k, v = (load_block(ref, piece, plan) for ref in (k_ref, v_ref))

    def body(step, carry):
      dk, dv = carry
      q, dout = gather(q_ref, step), gather(dout_ref, step)
      lse, delta = (ref[step.row].reshape(-1) for ref in (lse_ref, delta_ref))
      # Transposed: keys are the rows, so that dk and dv need no transpose.
      s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
      mask = piece.token[:, None] <= step.position[None, :]
      if segments:
        mask &= piece.key_segment[:, None] == step.segment[None, :]
      s = jnp.where(mask, s, common.MASK)
      p = jnp.exp2(s - lse[None, :])
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
      plan,
      queries=spec.tiling.rows // group,
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
  plan: Plan,
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
    count_chosen(ids_ref, first_row_ref, offset_ref, plan),
    body,
    common.accumulators(group, columns),
  )
  for (start, w), a in zip(columns, acc, strict=True):
    dq_ref[:, pl.ds(start, w)] = a.astype(dq_ref.dtype)


def backward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  ids: jax.Array,
  offset: jax.Array,
  segments: tuple[jax.Array, ...],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
  *,
  spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As `selected_attention_vjp.backward`."""
  tile = spec.tiling.dkv
  ids, spec = split_blocks(ids, spec, tile.block_k)
  plan = plan_chunks(query, key, ids, spec.block)
  f32 = jnp.float32
  delta = jnp.sum(dout.astype(f32) * out.astype(f32), axis=-1) - dlse
  lse = jnp.where(lse == -jnp.inf, 0, lse) * common.LOG2E
  rows, dout, lse, delta = (
    query_rows(x, plan) for x in (query, dout, lse, delta)
  )
  keys, values = (by_head(x, plan.key_length) for x in (key, value))
  blocks = [(spec.block, x.shape[-1]) for x in (key, value)]

  def chunk(chunk):
    *partial, part = call_by_piece(
      functools.partial(_bwd_kernel, spec=spec, plan=plan),
      chunk,
      offset,
      (rows, keys, values, dout, lse, delta, *segments),
      blocks,
      [(rows.shape[1:], query.dtype)],
      name="nsa_selected_by_block_bwd",
      plan=plan,
      tile=tile,
    )
    (dq,) = call_by_query(
      functools.partial(_sum_dq_kernel, plan=plan),
      chunk,
      offset,
      [part],
      name="nsa_selected_sum_dq",
      plan=plan,
    )
    sums = (sum_pieces(x, chunk.lists.starts, f32) for x in partial)
    return [x.reshape(plan.heads, -1, x.shape[-1]) for x in sums], dq

  # Sums over the chunks of a head.
  zeros = [
    jnp.zeros((keys.shape[0], plan.num_blocks * block, width), f32)
    for block, width in blocks
  ]
  totals, dq = scan_chunks(chunk, ids, offset, zeros, plan, spec.tiling.piece)

  def tokens(x, like):  # [B K, M l', W] -> [B, S, K, W]
    x = x[:, : plan.key_length].reshape(
      like.shape[0], plan.kv_heads, -1, x.shape[-1]
    )
    return jnp.swapaxes(x, 1, 2).astype(like.dtype)

  dk, dv = map(tokens, totals, (key, value))
  return query_heads(dq, query, plan), dk, dv
