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
from pallas_kernels.triton.inverse_lists import chosen, sum_pieces
from pallas_kernels.triton.selected_attention import Spec
from pallas_kernels.triton.selected_by_block import (
  chunk_length,
  gather_rows,
  join,
  load_block,
  load_step,
  map_heads,
  pad_group,
  split_blocks,
  whole,
)


def _bwd_kernel(
  piece_ref,  # [3]
  items_ref,  # [C m]
  head_ref,  # [4]
  q_ref,  # [B, T, K, G, H]
  k_ref,  # [B, S, K, H]
  v_ref,  # [B, S, K, V]
  dout_ref,  # [B, T, K, G, V]
  lse_ref,  # [B, T, K, G], base 2
  delta_ref,  # [B, T, K, G]
  *refs,  # segments, if any; dk [l', H] and dv [l', V], partial; dq per pair
  spec: Spec,
  num_ids: int,
):
  *segments, dk_ref, dv_ref, dq_ref = refs
  group, head_dim = dq_ref.shape[1:]
  queries = spec.tiling.rows // group
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(v_ref.shape[-1])
  block, first, last = piece_ref[0], piece_ref[1], piece_ref[2]

  @pl.when(last > first)
  def _():
    start_k = block * spec.block
    token, k, v = load_block(k_ref, v_ref, head_ref, start_k, spec.block)
    if segments:
      key_segment = common.load(
        segments[0].at[head_ref[0], pl.ds(start_k, spec.block)],
        token < k_ref.shape[1],
      )

    def body(i, carry):
      dk, dv = carry
      step = load_step(
        items_ref,
        head_ref,
        first + i * queries,
        last,
        queries=queries,
        group=group,
        num_ids=num_ids,
        num_pairs=items_ref.shape[0],
        segments_ref=segments[1] if segments else None,
      )
      q = gather_rows(q_ref, head_ref, step.query, head_pieces)
      dout = gather_rows(dout_ref, head_ref, step.query, value_pieces)
      lse = gather_rows(lse_ref, head_ref, step.query)
      delta = gather_rows(delta_ref, head_ref, step.query)
      # Transposed: keys are the rows, so that dk and dv need no transpose.
      s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
      mask = token[:, None] <= step.position[None, :]
      if segments:
        mask &= key_segment[:, None] == step.segment[None, :]
      s = jnp.where(mask, s, common.MASK)
      p = jnp.exp2(s - lse[None, :])
      dv = tuple(
        d + common.dot(p.astype(x.dtype), x)
        for d, x in zip(dv, dout, strict=True)
      )
      dp = common.dot_pieces(v, dout)
      ds = (p * (dp - delta[None, :])).astype(q_ref.dtype)
      dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
      for (start, width), x in zip(head_pieces, k, strict=True):
        dq = common.dot(ds.T, x) * spec.scale
        dq_ref[step.pair, :, pl.ds(start, width)] = dq.astype(
          dq_ref.dtype
        ).reshape(queries, group, width)
      return dk, dv

    dk, dv = lax.fori_loop(
      0,
      common.div(last - first + queries - 1, queries),
      body,
      tuple(
        tuple(
          jnp.zeros((spec.block, width), jnp.float32) for _, width in pieces
        )
        for pieces in (head_pieces, value_pieces)
      ),
    )
    for (start, width), d in zip(head_pieces, dk, strict=True):
      dk_ref[:, pl.ds(start, width)] = d * spec.scale
    for (start, width), d in zip(value_pieces, dv, strict=True):
      dv_ref[:, pl.ds(start, width)] = d


def _sum_dq_kernel(
  ids_ref,  # [m]
  head_ref,  # [4]
  part_ref,  # [m, G, H]
  dq_ref,  # [G, H]
  *,
  block: int,
  key_length: int,
  num_ids: int,
):
  group, head_dim = dq_ref.shape
  columns = common.pieces(head_dim)
  position = head_ref[3] + head_ref[2] + pl.program_id(0)
  width = ids_ref.shape[0]
  ids = common.load(ids_ref, common.padding_mask(num_ids, width), other=-1)
  count = jnp.sum(chosen(ids, position, key_length, block).astype(jnp.int32))

  def body(i, acc):
    return tuple(
      a + part_ref[i, :, pl.ds(start, w)].astype(jnp.float32)
      for a, (start, w) in zip(acc, columns, strict=True)
    )

  acc = lax.fori_loop(
    0,
    count,
    body,
    tuple(jnp.zeros((group, w), jnp.float32) for _, w in columns),
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
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = value.shape[1:]
  tile = spec.tiling.dkv
  ids, spec = split_blocks(ids, spec, tile.block_k)
  num_ids = ids.shape[-1]
  f32 = jnp.float32
  delta = jnp.sum(dout.astype(f32) * out.astype(f32), axis=-1) - dlse
  lse = jnp.where(lse == -jnp.inf, 0, lse) * common.LOG2E
  query_, dout_, lse_, delta_ = (
    pad_group(x, kv_heads) for x in (query, dout, lse, delta)
  )
  group = query_.shape[3]
  rows = chunk_length(length, num_ids, group, head_dim, query.dtype)
  num_pairs = rows * num_ids
  widths = (head_dim, value_dim)

  def chunk(chunk):
    num_pieces = chunk.lists.pieces.shape[0]
    arrays = (
      chunk.lists.items,
      chunk.head,
      query_,
      key,
      value,
      dout_,
      lse_,
      delta_,
      *segments,
    )
    *partial, part = common.pallas_call(
      functools.partial(_bwd_kernel, spec=spec, num_ids=num_ids),
      name="nsa_selected_by_block_bwd",
      num_warps=tile.num_warps,
      num_stages=tile.num_stages,
      grid=(num_pieces,),
      in_specs=[
        pl.BlockSpec((None, 3), lambda p: (p, 0)),
        *map(whole, arrays),
      ],
      out_specs=[
        *(
          pl.BlockSpec((None, spec.block, width), lambda p: (p, 0, 0))
          for width in widths
        ),
        pl.BlockSpec(
          (num_pairs + num_ids, group, head_dim), lambda p: (0, 0, 0)
        ),
      ],
      out_shape=[
        *(
          jax.ShapeDtypeStruct((num_pieces, spec.block, width), f32)
          for width in widths
        ),
        jax.ShapeDtypeStruct(
          (num_pairs + num_ids, group, head_dim), query.dtype
        ),
      ],
    )(chunk.lists.pieces, *arrays)
    dq = common.pallas_call(
      functools.partial(
        _sum_dq_kernel, block=spec.block, key_length=key_length, num_ids=num_ids
      ),
      name="nsa_selected_sum_dq",
      num_warps=1,
      num_stages=3,
      grid=(rows,),
      in_specs=[
        pl.BlockSpec((None, pl.next_power_of_2(num_ids)), lambda t: (t, 0)),
        whole(chunk.head),
        pl.BlockSpec((num_ids, group, head_dim), lambda t: (t, 0, 0)),
      ],
      out_specs=pl.BlockSpec((None, group, head_dim), lambda t: (t, 0, 0)),
      out_shape=jax.ShapeDtypeStruct((rows, group, head_dim), query.dtype),
    )(chunk.ids, chunk.head, part)
    dkv = [sum_pieces(x, chunk.lists.starts, f32) for x in partial]
    return dq, *dkv

  dq, dk, dv = map_heads(chunk, ids, offset, key_length, rows, spec=spec)

  def tokens(x, like):  # [B, K, chunks, M, l', width] -> [B, S, K, width]
    x = x.sum(axis=2).reshape(batch, kv_heads, -1, x.shape[-1])
    return jnp.swapaxes(x[:, :, :key_length], 1, 2).astype(like.dtype)

  return join(dq, length, heads), tokens(dk, key), tokens(dv, value)
