"""Attention over selected blocks for small groups, forward: block-outer.

With few heads per group, a program per query would load each block for only a
few tile rows. Here a program takes a piece of the list of the queries that
chose a block and keeps the block's keys and values; at each step it gathers
several queries as the rows of its products. Each (query, block) pair stores a
partial output and its lse; a second kernel merges the partial outputs of every
query.

Gathers are fast if heads are the outer axis, so queries are transposed once:
query row z T + t is query t of head z = b K + h. The partial outputs of all
queries would be m times the output, so queries are processed in chunks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.integers import div
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.query_chunks import (
  Chunk,
  Chunking,
  Piece,
  by_head,
  first_rows,
  ids_of_rows,
  make_chunk,
  make_chunking,
)
from pallas_kernels.triton import common
from pallas_kernels.triton.by_query import group_heads, reads_of
from pallas_kernels.triton.list_pieces import count_chosen, load_piece


def chunk_queries(
  spec: Spec, query: jax.Array, like: jax.Array, ids: jax.Array, block_k: int
) -> Chunking:
  """Chunks of queries, of which each pair stores a row per head of its group.

  Args:
    spec: static arguments of the call, with tiles.
    query: [B, T, N, H], whose dtype the rows have.
    like: [B, S, K, W], keys or values, whose width the rows have.
    ids: int32 [B, T, K, m], from `split_blocks`.
    block_k: tokens per block of `ids`.
  """
  group = pl.next_power_of_2(query.shape[2] // like.shape[2])
  return make_chunking(
    ids,
    pair_bytes=group * like.shape[-1] * query.dtype.itemsize,
    key_length=like.shape[1],
    block=block_k,
    scratch=spec.tiles.scratch,
  )


def split_blocks(ids: jax.Array, block: int, block_k: int) -> jax.Array:
  """Ids of blocks of `block_k` tokens, for ids of blocks of `block` tokens."""
  parts = block // block_k
  part = jnp.arange(parts, dtype=jnp.int32)[None, None, None, None]
  inner = ids[..., None] * parts + part
  inner = jnp.where(ids[..., None] < 0, -1, inner)
  return inner.reshape(*ids.shape[:-1], -1)


def query_rows(x: jax.Array, chunking: Chunking) -> jax.Array:
  """[B, T, N, ...] -> [B K T, G, ...], G padded to a power of two."""
  x = by_head(group_heads(x, chunking.kv_heads), chunking.length)
  x = x.reshape(-1, *x.shape[2:])
  group = x.shape[1]
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, pl.next_power_of_2(group) - group)
  return jnp.pad(x, pad)


def query_heads(x: jax.Array, like: jax.Array, chunking: Chunking) -> jax.Array:
  """The inverse of `query_rows`, for all chunks [chunks, D T', G, ...].

  `like` [B, T, N, ...] has the sizes before padding.
  """
  batch, length, heads = like.shape[:3]
  x = x.reshape(batch, chunking.kv_heads, chunking.length, *x.shape[2:])
  x = jnp.swapaxes(x, 1, 2)[:, :length, :, : heads // chunking.kv_heads]
  return x.reshape(batch, length, heads, *x.shape[4:])


def load_block(
  ref: Any, piece: Piece, chunking: Chunking
) -> tuple[jax.Array, ...]:
  """Loads the block's keys or values from [B K, S, W], in pieces of W."""
  return common.load_pieces(
    ref,
    (piece.head, pl.ds(piece.start_k, chunking.block)),
    common.pieces(ref.shape[-1]),
    piece.token < chunking.key_length,
  )


class Step(NamedTuple):
  """The Q = rows / G queries of one step; unused ones are padding."""

  pair: Any  # int32 [Q], index of the partial results; past the end if unused
  row: Any  # int32 [Q], query row
  position: Any  # int32 [Q G], -1 if unused
  segment: Any  # int32 [Q G], or None


def walk_queries(
  body: Callable[[Step, Any], Any],
  carry: Any,
  piece: Piece,
  items_ref: Any,
  segments: Sequence[Any],
  chunking: Chunking,
  *,
  queries: int,
  group: int,
) -> Any:
  """Folds `body` over the piece, `queries` pairs at a time."""
  # Unused queries repeat one of the list, so that no NaN of another gets in.
  filler = items_ref[piece.first]

  def per_row(x):
    x = jnp.broadcast_to(x[:, None], (queries, group))
    return x.reshape(queries * group)

  def step(i, carry):
    start = piece.first + i * queries
    used = start + jnp.arange(queries) < piece.last
    item = common.load(items_ref.at[pl.ds(start, queries)], used)
    item = jnp.where(used, item, filler)
    query = piece.first_query + div(item, chunking.num_ids)
    segment = None
    if segments:
      segment = per_row(segments[1][piece.batch, query])
    return body(
      Step(
        pair=jnp.where(used, piece.first_pair + item, chunking.num_pairs),
        row=piece.head * chunking.length + query,
        position=per_row(jnp.where(used, piece.offset + query, -1)),
        segment=segment,
      ),
      carry,
    )

  steps = div(piece.last - piece.first + queries - 1, queries)
  return lax.fori_loop(0, steps, step, carry)


def load_queries(ref: Any, step: Step) -> tuple[jax.Array, ...]:
  """Loads query rows of [B K T, G, W] as [Q G, .], in pieces of W."""
  return tuple(
    ref[step.row, :, pl.ds(start, width)].reshape(-1, width)
    for start, width in common.pieces(ref.shape[-1])
  )


def scatter(ref: Any, step: Step, xs: tuple[jax.Array, ...]) -> None:
  """Stores pieces [Q G, .] of W to the step's pairs of `ref` [pairs, G, W]."""
  group, columns = ref.shape[1:]
  for (start, width), x in zip(common.pieces(columns), xs, strict=True):
    x = x.astype(ref.dtype).reshape(-1, group, width)
    ref[step.pair, :, pl.ds(start, width)] = x


def _fwd_kernel(
  piece_ref,  # [3]
  items_ref,  # [D T' m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  q_ref,  # [B K T, G, H]
  k_ref,  # [B K, S, H]
  v_ref,  # [B K, S, V]
  *refs,  # segments [B, S], [B, T], if any; out [pairs + m, G, V], lse [., G]
  spec: Spec,
  chunking: Chunking,
):
  *segments, out_ref, lse_ref = refs
  group = q_ref.shape[1]
  queries = spec.tiles.rows // group

  @pl.when(piece_ref[2] > piece_ref[1])
  def _():
    piece = load_piece(piece_ref, first_row_ref, offset_ref, segments, chunking)
    k, v = (load_block(ref, piece, chunking) for ref in (k_ref, v_ref))

    def body(step, count):
      q = load_queries(q_ref, step)
      s = common.dot_pieces(q, k) * (spec.scale * common.LOG2E)
      mask = piece.token[None, :] <= step.position[:, None]
      if segments:
        mask &= piece.key_segment[None, :] == step.segment[:, None]
      s = jnp.where(mask, s, common.MASK)
      m_i = jnp.maximum(s.max(axis=1), common.MAX_INIT)
      p = jnp.exp2(s - m_i[:, None])
      l_i = p.sum(axis=1)
      total = jnp.where(l_i != 0, l_i, 1)
      out = (common.dot(p.astype(x.dtype), x) / total[:, None] for x in v)
      scatter(out_ref, step, tuple(out))
      lse = m_i + jnp.log2(total)
      lse_ref[step.pair] = lse.reshape(queries, group)
      # A loop without a carry does not lower.
      return count + 1

    walk_queries(
      body,
      jnp.int32(0),
      piece,
      items_ref,
      segments,
      chunking,
      queries=queries,
      group=group,
    )


def _merge_kernel(
  ids_ref,  # [m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  part_ref,  # [m, G, V]
  part_lse_ref,  # [m, G], base 2
  out_ref,  # [G, V]
  lse_ref,  # [G]
  *,
  chunking: Chunking,
):
  group, value_dim = out_ref.shape
  columns = common.pieces(value_dim)

  def body(i, carry):
    acc, m_i, l_i = carry
    lse = part_lse_ref[i, :]
    m_next = jnp.maximum(m_i, lse)
    correction, weight = jnp.exp2(m_i - m_next), jnp.exp2(lse - m_next)
    acc = tuple(
      a * correction[:, None]
      + part_ref[i, :, pl.ds(start, w)].astype(jnp.float32) * weight[:, None]
      for a, (start, w) in zip(acc, columns, strict=True)
    )
    return acc, m_next, l_i * correction + weight

  acc, m_i, l_i = lax.fori_loop(
    0,
    count_chosen(ids_ref, first_row_ref, offset_ref, chunking),
    body,
    (
      common.accumulators(group, columns),
      jnp.full((group,), common.MAX_INIT, jnp.float32),
      jnp.zeros((group,), jnp.float32),
    ),
  )
  # A pair without readable tokens has lse = MAX_INIT, so its weight is 0 beside
  # other pairs; a query with only such pairs reads nothing. The maximum may
  # ignore a NaN, the sum does not.
  some = (m_i > common.MAX_INIT) | (l_i != l_i)
  total = jnp.where(some, l_i, 1)
  for (start, w), a in zip(columns, acc, strict=True):
    a = jnp.where(some[:, None], a / total[:, None], 0)
    out_ref[:, pl.ds(start, w)] = a.astype(out_ref.dtype)
  lse = (m_i + jnp.log2(total)) / common.LOG2E
  lse_ref[...] = jnp.where(some, lse, -jnp.inf)


class Launch(NamedTuple):
  """Arguments, grid and block specs of a kernel."""

  args: tuple[jax.Array, ...]
  grid: dict[str, Any]  # keyword arguments of `pallas_call`


def by_piece(
  chunk: Chunk,
  arrays: Sequence[jax.Array],
  per_piece: Sequence[tuple[int, ...]],
  per_pair: Sequence[tuple[tuple[int, ...], Any]],
  chunking: Chunking,
) -> Launch:
  """One program per piece of the lists.

  Args:
    chunk: the lists.
    arrays: passed to every program whole: offset [B] and the others.
    per_piece: shapes of the float32 results of a piece.
    per_pair: shapes and dtypes of the results of a pair. The arrays have room
      for one more query, to which the unused queries of a step write.
    chunking: the chunking of the query rows.
  """
  lists = chunk.lists
  num_pieces = lists.pieces.shape[0]
  pairs = chunking.num_pairs + chunking.num_ids
  inputs = (lists.items, chunk.first_row, *arrays)

  def one(shape):
    return pl.BlockSpec((None, *shape), lambda p: (p, *[0] * len(shape)))

  outs = [platforms.out_shape((pairs, *x), dtype) for x, dtype in per_pair]
  grid = {
    "grid": (num_pieces,),
    "in_specs": [one((3,)), *map(common.whole, inputs)],
    "out_specs": [*map(one, per_piece), *map(common.whole, outs)],
    "out_shape": [
      *(platforms.out_shape((num_pieces, *x), jnp.float32) for x in per_piece),
      *outs,
    ],
  }
  return Launch((lists.pieces, *inputs), grid)


def by_row(
  chunk: Chunk,
  offset: jax.Array,
  parts: Sequence[jax.Array],
  chunking: Chunking,
) -> Launch:
  """One program per query of the chunk, which reduces the results of its pairs.

  Args:
    chunk: the ids.
    offset: int32 [B].
    parts: results of pairs [pairs, ...]; those of queries are [D T', ...], in
      the same dtypes.
    chunking: the chunking of the query rows.
  """
  rows = chunking.heads * chunking.queries

  def rows_of(first, x):
    tail = x.shape[1:]
    return pl.BlockSpec((first, *tail), lambda t: (t, *[0] * len(tail)))

  num_ids = chunking.num_ids
  grid = {
    "grid": (rows,),
    "in_specs": [
      pl.BlockSpec((None, pl.next_power_of_2(num_ids)), lambda t: (t, 0)),
      common.whole(chunk.first_row),
      common.whole(offset),
      *(rows_of(num_ids, x) for x in parts),
    ],
    "out_specs": [rows_of(None, x) for x in parts],
    "out_shape": [
      platforms.out_shape((rows, *x.shape[1:]), x.dtype) for x in parts
    ],
  }
  return Launch((chunk.ids, chunk.first_row, offset, *parts), grid)


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[jax.Array, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As in `by_query.forward`."""
  query, key, value = qkv
  reads = reads_of(index)
  tile, block_k = spec.tiles.fwd, spec.tiles.fwd.block_k
  ids = split_blocks(reads.ids, spec.config.selection_block, block_k)
  chunking = chunk_queries(spec, query, value, ids, block_k)
  row_ids = ids_of_rows(ids, chunking)
  rows = query_rows(query, chunking)
  keys, values = (by_head(x, chunking.key_length) for x in (key, value))
  arrays = (reads.offset, rows, keys, values, *reads.segments)
  per_row = (rows.shape[1],)
  per_pair = (
    ((*per_row, value.shape[-1]), query.dtype),
    (per_row, jnp.float32),
  )

  def step(carry, first_row):
    chunk = make_chunk(
      first_row, row_ids, reads.offset, chunking, spec.tiles.piece
    )
    args, grid = by_piece(chunk, arrays, (), per_pair, chunking)
    parts = pl.pallas_call(
      functools.partial(_fwd_kernel, spec=spec, chunking=chunking),
      **common.options(
        "nsa_selected_by_block_fwd",
        tile.num_warps,
        tile.num_stages,
        spec.interpret,
      ),
      **grid,
    )(*args)
    args, grid = by_row(chunk, reads.offset, parts, chunking)
    merged = pl.pallas_call(
      functools.partial(_merge_kernel, chunking=chunking),
      **common.options("nsa_selected_merge", 1, 3, spec.interpret),
      **grid,
    )(*args)
    return carry, merged

  _, result = lax.scan(step, (), first_rows(row_ids, chunking))
  out, lse = (query_heads(x, query, chunking) for x in result)
  return out, lse
