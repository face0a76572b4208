"""Attention over selected blocks for small groups, forward: block-outer.

With few heads per group, a program per query would load each block for only a
few tile rows. Here a program takes a piece of the list of the queries that
chose a block and keeps the block's keys and values; at each step it gathers
several queries as the rows of its products. Each (query, block) pair stores a
partial output and its lse; a second kernel merges the partial outputs of every
query.

Gathers are fast if heads are the outer axis, so queries are transposed once:
query row z T + t is query t of head z = b K + h. They are processed in chunks,
whole heads or a part of one, so that the partial outputs (m times the memory of
the output) stay within a budget.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.interface import Queries, Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.by_query import group_heads, reads_of
from pallas_kernels.triton.inverse_lists import (
  InverseLists,
  chosen,
  invert,
  sum_pieces,
)


class Chunking(NamedTuple):
  """How the queries of all heads are split into chunks; static.

  Blocks here are selection blocks, or for small groups those of `split_blocks`,
  parts of selection blocks.
  """

  kv_heads: int  # K
  length: int  # T padded to a multiple of `queries`: query rows per head
  heads: int  # D, heads per chunk
  queries: int  # T', queries per head of a chunk
  num_ids: int  # m, blocks per query
  num_blocks: int  # M, blocks of the keys
  block: int  # l', tokens per block
  key_length: int  # S

  @property
  def num_pairs(self) -> int:
    """Pairs (query, block) of a chunk; pair = query * m + index of the id."""
    return self.heads * self.queries * self.num_ids

  @property
  def splits_heads(self) -> bool:
    """Whether the queries of a head are in several chunks."""
    return self.queries < self.length


def make_chunking(
  ids: jax.Array, *, pair_bytes: int, key_length: int, block: int, scratch: int
) -> Chunking:
  """As many whole heads as fit, or a power of two of queries of one head.

  Args:
    ids: int32 [B, T, K, m].
    pair_bytes: memory of the partial results of a (query, block) pair.
    key_length: S.
    block: tokens per block of `ids`.
    scratch: maximum memory of the partial results of a chunk, in bytes.
  """
  batch, length, kv_heads, num_ids = ids.shape
  num_blocks = -(-key_length // block)
  most = max(scratch // (num_ids * pair_bytes), 16)
  # Chunks that fit 32-bit sort keys make their lists several times as fast. Not
  # worth it if most lists of a chunk would then be shorter than a step.
  short_key = (2**32 - 1) // (num_ids * (num_blocks + 1))
  if short_key * num_ids >= 128 * num_blocks:
    most = min(most, short_key)
  heads, queries = 1, length
  if length > most:
    queries = 1 << (most.bit_length() - 1)
    length = -(-length // queries) * queries
  else:
    total = batch * kv_heads
    fits = range(1, min(most // length, total) + 1)
    heads = max(d for d in fits if total % d == 0)
  return Chunking(
    kv_heads, length, heads, queries, num_ids, num_blocks, block, key_length
  )


def group_bytes(query: jax.Array, like: jax.Array) -> int:
  """Bytes of [G padded, W] in the dtype of `query`; W is that of `like`."""
  group = pl.next_power_of_2(query.shape[2] // like.shape[2])
  return group * like.shape[-1] * query.dtype.itemsize


class Chunk(NamedTuple):
  """A range of query rows, and the lists of its pairs."""

  first_row: jax.Array  # int32 [1]
  ids: jax.Array  # int32 [D T', m]
  # From M * (head in the chunk) + block to pairs, counted within the head.
  lists: InverseLists


def split_blocks(ids: jax.Array, block: int, block_k: int) -> jax.Array:
  """Ids of blocks of `block_k` tokens, for ids of blocks of `block` tokens."""
  parts = block // block_k
  part = jnp.arange(parts, dtype=jnp.int32)[None, None, None, None]
  inner = ids[..., None] * parts + part
  inner = jnp.where(ids[..., None] < 0, -1, inner)
  return inner.reshape(*ids.shape[:-1], -1)


def by_head(x: jax.Array, length: int, fill: int = 0) -> jax.Array:
  """[B, T, K, ...] -> [B K, length, ...], padded with `fill`."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, length - x.shape[1])
  x = jnp.swapaxes(jnp.pad(x, pad, constant_values=fill), 1, 2)
  return x.reshape(-1, *x.shape[2:])


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


def first_rows(row_ids: jax.Array, chunking: Chunking) -> jax.Array:
  """First row of every chunk, int32 [chunks]; `row_ids` as in `make_chunk`."""
  size = chunking.heads * chunking.queries
  return jnp.arange(0, len(row_ids), size, dtype=jnp.int32)


def make_chunk(
  first_row: jax.Array,
  row_ids: jax.Array,
  offset: jax.Array,
  chunking: Chunking,
  piece: int,
) -> Chunk:
  """The chunk that begins at `first_row`.

  Args:
    first_row: int32 ().
    row_ids: int32 [B K T, m], -1 in the padding rows of a head.
    offset: int32 [B], position of the first query.
    chunking: the chunking of the query rows.
    piece: maximum pairs per piece of a list.
  """
  count = chunking.heads * chunking.queries
  num_items = chunking.queries * chunking.num_ids
  item = jnp.arange(num_items, dtype=jnp.int32)
  item = jnp.tile(
    item.reshape(chunking.queries, chunking.num_ids), (chunking.heads, 1)
  )
  local_head = jnp.repeat(
    jnp.arange(chunking.heads, dtype=jnp.int32), chunking.queries
  )
  local = lax.dynamic_slice_in_dim(row_ids, first_row, count)
  head = first_row // chunking.length + local_head
  row = first_row + jnp.arange(count, dtype=jnp.int32)
  position = offset[head // chunking.kv_heads] + row - head * chunking.length
  valid = chosen(local, position[:, None], chunking.key_length, chunking.block)
  num_owners = chunking.heads * chunking.num_blocks
  lists = invert(
    jnp.where(
      valid, local_head[:, None] * chunking.num_blocks + local, num_owners
    ),
    item,
    num_owners=num_owners,
    num_items=num_items,
    piece=piece,
  )
  return Chunk(first_row[None], local, lists)


def zero_gradient(like: jax.Array, chunking: Chunking) -> jax.Array:
  """Zeros [B K, M l', W], for `add_pieces`; `like` is keys or values."""
  batch, _, kv_heads, width = like.shape
  # A head in several chunks needs float32 between them.
  dtype = jnp.float32 if chunking.splits_heads else like.dtype
  shape = batch * kv_heads, chunking.num_blocks * chunking.block, width
  return jnp.zeros(shape, dtype)


def add_pieces(
  total: jax.Array,
  partial: jax.Array,
  chunk: Chunk,
  chunking: Chunking,
  *,
  interpret: bool,
) -> jax.Array:
  """Adds the gradients [P, l', W] of a chunk's pieces, in order."""
  sums = sum_pieces(
    partial, chunk.lists.starts, total.dtype, interpret=interpret
  )
  sums = sums.reshape(chunking.heads, -1, sums.shape[-1])
  first_head = chunk.first_row[0] // chunking.length
  if chunking.splits_heads:
    sums += lax.dynamic_slice_in_dim(total, first_head, chunking.heads)
  return lax.dynamic_update_slice_in_dim(total, sums, first_head, axis=0)


def finish_gradient(total: jax.Array, like: jax.Array) -> jax.Array:
  """[B K, M l', W] -> [B, S, K, W], in the dtype of `like`."""
  batch, key_length, kv_heads, width = like.shape
  x = total[:, :key_length].reshape(batch, kv_heads, key_length, width)
  return jnp.swapaxes(x, 1, 2).astype(like.dtype)


class Piece(NamedTuple):
  """Work of a program: a block, and a piece of the list of its pairs."""

  first: Any  # index into the items
  last: Any  # exclusive
  head: Any  # b K + h
  batch: Any  # b
  first_pair: Any  # pair of item 0
  first_query: Any  # query of item 0, counted within the head
  offset: Any  # position of query 0
  start_k: Any
  token: Any  # int32 [l'], positions of the keys
  key_segment: Any  # int32 [l'], or None


def load_piece(
  piece_ref: Any,
  first_row_ref: Any,
  offset_ref: Any,
  segments: Sequence[Any],
  chunking: Chunking,
) -> Piece:
  """Loads the program's piece and the segments of its keys, if any."""
  row, first, last = piece_ref[0], piece_ref[1], piece_ref[2]
  local_head = common.div(row, chunking.num_blocks)
  first_head = common.div(first_row_ref[0], chunking.length)
  head = first_head + local_head
  batch = common.div(head, chunking.kv_heads)
  start_k = common.rem(row, chunking.num_blocks) * chunking.block
  token = start_k + jnp.arange(chunking.block)
  key_segment = None
  if segments:
    keys_ref = segments[0].at[batch, pl.ds(start_k, chunking.block)]
    key_segment = common.load(keys_ref, token < chunking.key_length)
  return Piece(
    first,
    last,
    head,
    batch,
    first_pair=local_head * (chunking.queries * chunking.num_ids),
    # A chunk of several heads starts at the first query of a head.
    first_query=first_row_ref[0] - first_head * chunking.length,
    offset=offset_ref[batch],
    start_k=start_k,
    token=token,
    key_segment=key_segment,
  )


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
    query = piece.first_query + common.div(item, chunking.num_ids)
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

  steps = common.div(piece.last - piece.first + queries - 1, queries)
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


def count_chosen(
  ids_ref: Any, first_row_ref: Any, offset_ref: Any, chunking: Chunking
) -> jax.Array:
  """Number of partial results of the program's query.

  Ids ascend, so those of attended blocks come first.
  """
  row = first_row_ref[0] + pl.program_id(0)
  head = common.div(row, chunking.length)
  position = offset_ref[common.div(head, chunking.kv_heads)]
  position += row - head * chunking.length
  mask = common.padding_mask(chunking.num_ids, ids_ref.shape[0])
  ids = common.load(ids_ref, mask, other=-1)
  valid = chosen(ids, position, chunking.key_length, chunking.block)
  return jnp.sum(valid.astype(jnp.int32))


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

  outs = [jax.ShapeDtypeStruct((pairs, *x), dtype) for x, dtype in per_pair]
  grid = {
    "grid": (num_pieces,),
    "in_specs": [one((3,)), *map(common.whole, inputs)],
    "out_specs": [*map(one, per_piece), *map(common.whole, outs)],
    "out_shape": [
      *(jax.ShapeDtypeStruct((num_pieces, *x), jnp.float32) for x in per_piece),
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
      jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in parts
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
  chunking = make_chunking(
    ids,
    pair_bytes=group_bytes(query, value),
    key_length=key.shape[1],
    block=block_k,
    scratch=spec.tiles.scratch,
  )
  row_ids = by_head(ids, chunking.length, -1).reshape(-1, chunking.num_ids)
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
