"""Chunks of queries, and the lists of the queries that chose each block.

The kernels of the selected branch that go block by block store something for
each pair of a query and a block that it chose. Queries are processed in chunks,
whole heads or a part of one, so that this stays within a budget. Query row
z T + t is query t of head z = b K + h.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.integers import div, rem
from pallas_kernels.inverse_lists import InverseLists, chosen, invert, take


class Chunking(NamedTuple):
  """How the queries of all heads are split into chunks; static.

  Blocks here are selection blocks, or equal parts of them.
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


class Chunk(NamedTuple):
  """A range of query rows, and the lists of its pairs."""

  first_row: jax.Array  # int32 [1]
  ids: jax.Array  # int32 [D T', m]
  chosen: jax.Array  # bool [D T', m], the ids of pairs that are attended to
  # From M * (head in the chunk) + block to pairs, counted within the head.
  lists: InverseLists


def by_head(x: jax.Array, length: int, fill: int = 0) -> jax.Array:
  """[B, T, K, ...] -> [B K, length, ...], padded with `fill`."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, length - x.shape[1])
  x = jnp.swapaxes(jnp.pad(x, pad, constant_values=fill), 1, 2)
  return x.reshape(-1, *x.shape[2:])


def ids_of_rows(ids: jax.Array, chunking: Chunking) -> jax.Array:
  """[B, T, K, m] -> [B K T, m], -1 in the padding rows of a head."""
  rows = by_head(ids, chunking.length, -1)
  return rows.reshape(-1, chunking.num_ids)


def first_rows(row_ids: jax.Array, chunking: Chunking) -> jax.Array:
  """First row of every chunk, int32 [chunks]; `row_ids` from `ids_of_rows`."""
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
    row_ids: int32 [B K T, m], from `ids_of_rows`.
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
  head = div(first_row, chunking.length) + local_head
  row = first_row + jnp.arange(count, dtype=jnp.int32)
  position = take(offset, div(head, chunking.kv_heads))
  position += row - head * chunking.length
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
  return Chunk(first_row[None], local, valid, lists)


def zero_gradient(like: jax.Array, chunking: Chunking) -> jax.Array:
  """Zeros [B K, M l', W] to add chunks to; `like` is keys or values."""
  batch, _, kv_heads, width = like.shape
  # A head in several chunks needs float32 between them.
  dtype = jnp.float32 if chunking.splits_heads else like.dtype
  shape = batch * kv_heads, chunking.num_blocks * chunking.block, width
  return jnp.zeros(shape, dtype)


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
  token: Any  # int32 [l'], positions of the keys, or None
  key_segment: Any  # int32 [l'], or None


def piece_of(
  owner: Any,
  first: Any,
  last: Any,
  first_row: Any,
  offset_ref: Any,
  chunking: Chunking,
) -> Piece:
  """A piece of a list without its keys' positions and segments.

  Args:
    owner: M * (head in the chunk) + block.
    first: index into the items.
    last: exclusive.
    first_row: first query row of the chunk.
    offset_ref: [B], position of the first query.
    chunking: the chunking of the query rows.
  """
  local_head = div(owner, chunking.num_blocks)
  first_head = div(first_row, chunking.length)
  head = first_head + local_head
  batch = div(head, chunking.kv_heads)
  return Piece(
    first,
    last,
    head,
    batch,
    first_pair=local_head * (chunking.queries * chunking.num_ids),
    # A chunk of several heads starts at the first query of a head.
    first_query=first_row - first_head * chunking.length,
    offset=offset_ref[batch],
    start_k=rem(owner, chunking.num_blocks) * chunking.block,
    token=None,
    key_segment=None,
  )
