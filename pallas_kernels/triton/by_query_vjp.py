"""Attention over selected blocks, backward.

dk, dv: one program per piece of the list of the queries that chose a block,
which also sums over the heads of a group. It stores ds, the gradients of the
scores, of every pair of a query and a block that it chose. dq: the product of a
query's ds with the keys of its blocks, which does not read values again and
computes no exponentials. Queries are processed in chunks, which bounds the
memory of ds. There are no atomics, so every run gives the same bits. A NaN in a
key or a value may reach dq of all queries that chose its block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.gradients import delta_of, keep_finite
from pallas_kernels.integers import div, rem
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.query_chunks import (
  Chunk,
  Chunking,
  finish_gradient,
  first_rows,
  ids_of_rows,
  make_chunk,
  make_chunking,
  zero_gradient,
)
from pallas_kernels.triton import common
from pallas_kernels.triton.by_query import BlockReads, group_heads, reads_of
from pallas_kernels.triton.list_pieces import (
  add_pieces,
  count_chosen,
  load_piece,
)

# If a chunk has few pairs, pieces are shorter, so that about _PIECES programs
# share them evenly; none is shorter than _SHORTEST_PIECE.
_PIECES = 2048
_SHORTEST_PIECE = 128


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
  query, key, value = qkv
  reads = reads_of(index)
  tiles, block = spec.tiles, spec.config.selection_block
  key_length, kv_heads = key.shape[1:3]
  rows = common.padded_rows(query.shape[2] // kv_heads)
  chunking = make_chunking(
    reads.ids,
    pair_bytes=block * rows * query.dtype.itemsize,
    key_length=key_length,
    block=block,
    scratch=tiles.scratch,
  )
  piece = max(chunking.num_pairs // _PIECES, _SHORTEST_PIECE)
  piece = min(piece, tiles.piece)
  row_ids = ids_of_rows(reads.ids, chunking)
  delta = keep_finite(delta_of(out, dout, dlse), lse)
  grouped = [group_heads(x, kv_heads) for x in (query, dout, lse, delta)]

  def step(first_row, grads):
    chunk = make_chunk(first_row, row_ids, reads.offset, chunking, piece)
    dq, *totals = grads
    *partial, ds = _key_value_gradient(
      chunk, grouped, key, value, reads, chunking, spec
    )
    dq = _query_gradient(
      chunk, ds, dq, grouped, key, reads.offset, chunking, spec
    )
    totals = [
      add_pieces(*x, chunk, chunking, interpret=spec.interpret)
      for x in zip(totals, partial, strict=True)
    ]
    return dq, *totals

  totals = [zero_gradient(x, chunking) for x in (key, value)]
  starts = first_rows(row_ids, chunking)
  if len(starts) == 1:
    grads = step(starts[0], (None, *totals))
  else:
    # A first chunk outside the loop would get a second buffer for ds.
    empty = jnp.zeros(grouped[0].shape, query.dtype)
    grads, _ = lax.scan(
      lambda grads, first_row: (step(first_row, grads), None),
      (empty, *totals),
      starts,
    )
  dq, *totals = grads

  dk, dv = map(finish_gradient, totals, (key, value))
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
  block_k = spec.tiles.dkv.block_k
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  row_mask = common.padding_mask(group, rows)
  local = pl.program_id(1) * block_k

  piece = load_piece(piece_ref, first_row_ref, offset_ref, (), chunking)

  @pl.when(piece.last > piece.first)
  def _():
    b, h = piece.batch, piece.head - piece.batch * chunking.kv_heads
    start = piece.start_k + local
    token = start + jnp.arange(block_k)
    inside = token < chunking.key_length
    span_k = pl.ds(start, block_k)
    k = common.load_pieces(k_ref, (b, span_k, h), head_pieces, inside)
    v = common.load_pieces(v_ref, (b, span_k, h), value_pieces, inside)
    if segments:
      key_segment = common.load(segments[0].at[b, span_k], inside)

    def body(i, carry):
      dk, dv = carry
      item = items_ref[i]
      t = piece.first_query + div(item, chunking.num_ids)
      index = (b, t, h, slice(None))
      q = common.load_pieces(q_ref, index, head_pieces, row_mask)
      dout = common.load_pieces(dout_ref, index, value_pieces, row_mask)
      lse = common.load(lse_ref.at[index], row_mask)
      delta = common.load(delta_ref.at[index], row_mask)
      # Transposed, [keys, tile rows], so that dk and dv need no transpose.
      s = common.dot_pieces(k, q) * (spec.scale * common.LOG2E)
      mask = token <= piece.offset + t
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
      ds_ref[piece.first_pair + item, pl.ds(local, block_k), :] = ds
      dk = tuple(d + common.dot(ds, x) for d, x in zip(dk, q, strict=True))
      return dk, dv

    dk, dv = lax.fori_loop(
      piece.first,
      piece.last,
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


def _padded(x: jax.Array, rows: int) -> pl.BlockSpec:
  """Spec of [B, T, K, G, ...] with the heads of a group padded to a tile."""
  shape = (*x.shape[:3], rows, *x.shape[4:])
  return common.whole(jax.ShapeDtypeStruct(shape, x.dtype))


def _key_value_gradient(
  chunk: Chunk,
  grouped: list[jax.Array],
  key: jax.Array,
  value: jax.Array,
  reads: BlockReads,
  chunking: Chunking,
  spec: Spec,
) -> tuple[jax.Array, ...]:
  """dk and dv of the pieces [P, l', H or V]; ds [pairs, l', G padded]."""
  group = grouped[0].shape[3]
  rows = common.padded_rows(group)
  tile, lists = spec.tiles.dkv, chunk.lists
  num_pieces = lists.pieces.shape[0]
  block, widths = chunking.block, (key.shape[-1], value.shape[-1])
  ds = platforms.out_shape((chunking.num_pairs, block, rows), key.dtype)
  inputs: tuple[jax.Array, ...] = (
    lists.items,
    chunk.first_row,
    reads.offset,
    key,
    value,
    *reads.segments,
  )
  return tuple(
    pl.pallas_call(
      functools.partial(_dkv_kernel, spec=spec, chunking=chunking, group=group),
      **common.options(
        "nsa_selected_dkv", tile.num_warps, tile.num_stages, spec.interpret
      ),
      grid=(num_pieces, block // tile.block_k),
      in_specs=[
        pl.BlockSpec((None, 3), lambda p, _: (p, 0)),
        *map(common.whole, inputs),
        *(_padded(x, rows) for x in grouped),
      ],
      out_specs=[
        *(
          pl.BlockSpec((None, block, width), lambda p, _: (p, 0, 0))
          for width in widths
        ),
        common.whole(ds),
      ],
      out_shape=[
        *(
          platforms.out_shape((num_pieces, block, width), jnp.float32)
          for width in widths
        ),
        ds,
      ],
    )(lists.pieces, *inputs, *grouped)
  )


def _dq_kernel(
  ids_ref,  # [m]
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
  block_k = spec.tiles.dq.block_k
  parts = chunking.block // block_k
  head_pieces = common.pieces(head_dim)
  row_mask = common.padding_mask(group, rows)
  row = first_row_ref[0] + pl.program_id(0)
  head = div(row, chunking.length)
  t = row - head * chunking.length
  b = div(head, chunking.kv_heads)
  h = head - b * chunking.kv_heads

  count = count_chosen(ids_ref, first_row_ref, offset_ref, chunking)

  @pl.when(t < dq_ref.shape[1])  # The last chunk of a head may be padded.
  def _():
    def body(i, dq):
      slot = div(i, parts)
      local = rem(i, parts) * block_k
      start = ids_ref[slot] * chunking.block + local
      inside = None
      if chunking.key_length % chunking.block:
        inside = start + jnp.arange(block_k) < chunking.key_length
      k = common.load_pieces(
        k_ref, (b, pl.ds(start, block_k), h), head_pieces, inside
      )
      ds = ds_ref[slot, pl.ds(local, block_k), :].T
      return tuple(d + common.dot(ds, x) for d, x in zip(dq, k, strict=True))

    dq = lax.fori_loop(
      0, count * parts, body, common.accumulators(rows, head_pieces)
    )
    index = (*map(common.index, (b, t, h)), slice(None))
    some = (common.load(lse_ref.at[index], row_mask) != -jnp.inf)[:, None]
    for (column, width), d in zip(head_pieces, dq, strict=True):
      d = jnp.where(some, d * spec.scale, 0).astype(dq_ref.dtype)
      common.store(dq_ref.at[(*index, pl.ds(column, width))], d, row_mask)


def _query_gradient(
  chunk: Chunk,
  ds: jax.Array,
  before: jax.Array | None,
  grouped: list[jax.Array],
  key: jax.Array,
  offset: jax.Array,
  chunking: Chunking,
  spec: Spec,
) -> jax.Array:
  """dq [B, T, K, G, H] of this chunk and of those before."""
  query, _, lse, _ = grouped
  group = query.shape[3]
  rows = common.padded_rows(group)
  tile = spec.tiles.dq
  args = (chunk.ids, chunk.first_row, offset, key, lse, ds)
  aliased = () if before is None else (before,)
  ids = pl.next_power_of_2(chunking.num_ids)
  return pl.pallas_call(
    functools.partial(_dq_kernel, spec=spec, chunking=chunking, group=group),
    **common.options(
      "nsa_selected_dq", tile.num_warps, tile.num_stages, spec.interpret
    ),
    grid=(chunking.heads * chunking.queries,),
    in_specs=[
      pl.BlockSpec((None, ids), lambda r: (r, 0)),
      *map(common.whole, args[1:4]),
      _padded(lse, rows),
      pl.BlockSpec(
        (chunking.num_ids, chunking.block, rows), lambda r: (r, 0, 0)
      ),
      *(_padded(x, rows) for x in aliased),
    ],
    out_specs=_padded(query, rows),
    out_shape=platforms.out_shape(query.shape, query.dtype),
    input_output_aliases={len(args): 0} if aliased else {},
  )(*args, *aliased)
