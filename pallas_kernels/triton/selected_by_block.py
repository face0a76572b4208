"""Attention over selected blocks for small groups, forward: blocks outside.

With few heads in a group, a program per query would load a block for a handful
of rows. Here a program takes a piece of the list of the queries that chose one
block, keeps the block's keys and values, and gathers several queries a step as
the rows of its products. Each (query, block) pair leaves a partial output and
its lse; a second kernel merges the partial outputs of every query.

The partial outputs take m times the memory of the output: one key/value head
and one chunk of queries at a time, so that they stay within a budget.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common
from pallas_kernels.triton.inverse_lists import InverseLists, chosen, invert
from pallas_kernels.triton.selected_attention import Spec, group_heads

# Bytes of the partial outputs of one chunk.
PARTIAL_BYTES = 2**31


class Chunk(NamedTuple):
  """One key/value head of a range of queries, and the lists of its pairs."""

  head: jax.Array  # int32 [4]: batch, head, first query, position of query 0
  ids: jax.Array  # int32 [C, m]
  lists: InverseLists  # block -> pairs, pair = query in the chunk * m + place


def chunk_length(
  length: int, num_ids: int, group: int, width: int, dtype: Any
) -> int:
  """Queries in a chunk: a power of two, or all."""
  per_query = num_ids * group * width * jnp.dtype(dtype).itemsize
  rows = max(PARTIAL_BYTES // per_query, 16)
  return length if rows >= length else 1 << (rows.bit_length() - 1)


def split_blocks(
  ids: jax.Array, spec: Spec, block_k: int
) -> tuple[jax.Array, Spec]:
  """The same call with blocks of `block_k` tokens, and more of them."""
  parts = spec.block // block_k
  inner = ids[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)
  inner = jnp.where(ids[..., None] < 0, -1, inner)
  return inner.reshape(*ids.shape[:-1], -1), spec._replace(block=block_k)


def map_heads(
  body: Any,
  ids: jax.Array,
  offset: jax.Array,
  key_length: int,
  rows: int,
  *,
  spec: Spec,
) -> Any:
  """Maps `body` over chunks of `rows` queries of every head.

  Args:
    body: from a `Chunk` to a pytree.
    ids: int32 [B, T, K, m].
    offset: int32 [B].
    key_length: S.
    rows: C, queries in a chunk; the last chunk is padded with queries that
      chose nothing.
    spec: `block` and `tiling.piece` are read.

  Returns:
    The pytree with leading axes [B, K, chunks].
  """
  batch, length, kv_heads, num_ids = ids.shape
  chunks = -(-length // rows)
  num_blocks = -(-key_length // spec.block)
  ids = jnp.pad(
    ids,
    [(0, 0), (0, chunks * rows - length), (0, 0), (0, 0)],
    constant_values=-1,
  )

  def one(index):
    c = index % chunks
    h = index // chunks % kv_heads
    b = index // (chunks * kv_heads)
    local = lax.dynamic_slice(
      ids, (b, c * rows, h, 0), (1, rows, 1, num_ids)
    ).reshape(rows, num_ids)
    pair = jnp.arange(rows * num_ids, dtype=jnp.int32).reshape(local.shape)
    position = offset[b] + c * rows + jnp.arange(rows, dtype=jnp.int32)
    valid = chosen(local, position[:, None], key_length, spec.block)
    lists = invert(
      jnp.where(valid, local, num_blocks),
      pair,
      num_rows=num_blocks,
      num_items=rows * num_ids,
      piece=spec.tiling.piece,
    )
    head = jnp.stack([b, h, c * rows, offset[b]]).astype(jnp.int32)
    return body(Chunk(head, local, lists))

  index = jnp.arange(batch * kv_heads * chunks, dtype=jnp.int32)
  result = lax.map(one, index)
  return jax.tree.map(
    lambda x: x.reshape(batch, kv_heads, chunks, *x.shape[1:]), result
  )


def whole(x: jax.Array) -> pl.BlockSpec:
  """The whole array, whatever the program."""
  return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def pad_group(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, N, ...] -> [B, T, K, G, ...], G padded to a power of two."""
  x = group_heads(x, kv_heads)
  group = x.shape[3]
  pad = [(0, 0)] * x.ndim
  pad[3] = (0, pl.next_power_of_2(group) - group)
  return jnp.pad(x, pad)


class Step(NamedTuple):
  """The queries of one step of a program."""

  pair: Any  # int32 [Q], where partial results go; past the end if unused
  query: Any  # int32 [Q], row of the query arrays
  position: Any  # int32 [Q G], -1 if unused
  segment: Any  # int32 [Q G], or None


def load_step(
  items_ref: Any,
  head_ref: Any,
  start: Any,
  last: Any,
  *,
  queries: int,
  group: int,
  num_ids: int,
  num_pairs: int,
  segments_ref: Any = None,
) -> Step:
  """`queries` pairs from `start` on, with those from `last` on unused."""
  used = start + jnp.arange(queries) < last
  pair = common.load(items_ref.at[pl.ds(start, queries)], used, num_pairs)
  local = jnp.where(used, common.div(pair, num_ids), 0)
  query = head_ref[2] + local
  position = jnp.where(used, head_ref[3] + query, -1)

  def per_row(x):
    x = jnp.broadcast_to(x[:, None], (queries, group))
    return x.reshape(queries * group)

  segment = None
  if segments_ref is not None:
    segment = per_row(segments_ref[head_ref[0], query])
  return Step(pair, query, per_row(position), segment)


def gather_rows(
  ref: Any, head_ref: Any, query: Any, columns: Any = None
) -> Any:
  """Rows (query, head of the group) of [B, T, K, G, ...], flattened."""
  index = (head_ref[0], query, head_ref[1])
  if columns is None:
    return ref[index].reshape(-1)
  return tuple(
    ref[(*index, slice(None), pl.ds(start, width))].reshape(-1, width)
    for start, width in columns
  )


def load_block(
  k_ref: Any, v_ref: Any, head_ref: Any, start: Any, block_k: int
) -> Any:
  """Tokens, key pieces and value pieces of one block."""
  token = start + jnp.arange(block_k)
  inside = token < k_ref.shape[1]
  index = (head_ref[0], pl.ds(start, block_k), head_ref[1])
  return (
    token,
    *(
      common.load_pieces(ref, index, common.pieces(ref.shape[-1]), inside)
      for ref in (k_ref, v_ref)
    ),
  )


def _fwd_kernel(
  piece_ref,  # [3]
  items_ref,  # [C m]
  head_ref,  # [4]
  q_ref,  # [B, T, K, G, H]
  k_ref,  # [B, S, K, H]
  v_ref,  # [B, S, K, V]
  *refs,  # segments [B, S] and [B, T], if any; out [C m + 1, G, V], lse [., G]
  spec: Spec,
  num_ids: int,
):
  *segments, out_ref, lse_ref = refs
  group, value_dim = out_ref.shape[1:]
  queries = spec.tiling.rows // group
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

    def body(i, count):
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
      q = gather_rows(
        q_ref, head_ref, step.query, common.pieces(q_ref.shape[-1])
      )
      s = common.dot_pieces(q, k) * (spec.scale * common.LOG2E)
      mask = token[None, :] <= step.position[:, None]
      if segments:
        mask &= key_segment[None, :] == step.segment[:, None]
      s = jnp.where(mask, s, common.MASK)
      m_i = jnp.maximum(s.max(axis=1), common.MAX_INIT)
      p = jnp.exp2(s - m_i[:, None])
      l_i = p.sum(axis=1)
      total = jnp.where(l_i > 0, l_i, 1)
      for (start, width), x in zip(common.pieces(value_dim), v, strict=True):
        out = common.dot(p.astype(x.dtype), x) / total[:, None]
        out_ref[step.pair, :, pl.ds(start, width)] = out.astype(
          out_ref.dtype
        ).reshape(queries, group, width)
      lse = (m_i + jnp.log2(total)).reshape(queries, group)
      lse_ref[step.pair] = lse
      # A loop that carries nothing does not lower.
      return count + 1

    lax.fori_loop(
      0, common.div(last - first + queries - 1, queries), body, jnp.int32(0)
    )


def _merge_kernel(
  ids_ref,  # [m]
  head_ref,  # [4]
  part_ref,  # [m, G, V]
  part_lse_ref,  # [m, G], base 2
  out_ref,  # [G, V]
  lse_ref,  # [G]
  *,
  block: int,
  key_length: int,
  num_ids: int,
):
  group, value_dim = out_ref.shape
  columns = common.pieces(value_dim)
  position = head_ref[3] + head_ref[2] + pl.program_id(0)
  width = ids_ref.shape[0]
  ids = common.load(ids_ref, common.padding_mask(num_ids, width), other=-1)
  # Ids ascend: those that were attended come first.
  count = jnp.sum(chosen(ids, position, key_length, block).astype(jnp.int32))

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
    count,
    body,
    (
      tuple(jnp.zeros((group, w), jnp.float32) for _, w in columns),
      jnp.full((group,), common.MAX_INIT, jnp.float32),
      jnp.zeros((group,), jnp.float32),
    ),
  )
  # Pairs without a readable token have lse = MAX_INIT and weigh nothing beside
  # others; a query that has no others reads nothing.
  some = m_i > common.MAX_INIT
  total = jnp.where(some, l_i, 1)
  for (start, w), a in zip(columns, acc, strict=True):
    a = jnp.where(some[:, None], a / total[:, None], 0)
    out_ref[:, pl.ds(start, w)] = a.astype(out_ref.dtype)
  lse = (m_i + jnp.log2(total)) / common.LOG2E
  lse_ref[...] = jnp.where(some, lse, -jnp.inf)


def forward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  ids: jax.Array,
  offset: jax.Array,
  segments: tuple[jax.Array, ...],
  *,
  spec: Spec,
) -> tuple[jax.Array, jax.Array]:
  """As `selected_attention.forward`."""
  length, heads = query.shape[1:3]
  key_length, kv_heads, value_dim = value.shape[1:]
  tile = spec.tiling.fwd
  ids, spec = split_blocks(ids, spec, tile.block_k)
  num_ids = ids.shape[-1]
  grouped = pad_group(query, kv_heads)
  group = grouped.shape[3]
  rows = chunk_length(length, num_ids, group, value_dim, query.dtype)
  num_pairs = rows * num_ids

  def chunk(chunk):
    part, part_lse = common.pallas_call(
      functools.partial(_fwd_kernel, spec=spec, num_ids=num_ids),
      name="nsa_selected_by_block_fwd",
      num_warps=tile.num_warps,
      num_stages=tile.num_stages,
      grid=(chunk.lists.pieces.shape[0],),
      in_specs=[
        pl.BlockSpec((None, 3), lambda p: (p, 0)),
        *map(
          whole,
          (chunk.lists.items, chunk.head, grouped, key, value, *segments),
        ),
      ],
      # Unused rows of a step write to one more query than there are.
      out_specs=[
        pl.BlockSpec(
          (num_pairs + num_ids, group, value_dim), lambda p: (0, 0, 0)
        ),
        pl.BlockSpec((num_pairs + num_ids, group), lambda p: (0, 0)),
      ],
      out_shape=[
        jax.ShapeDtypeStruct(
          (num_pairs + num_ids, group, value_dim), query.dtype
        ),
        jax.ShapeDtypeStruct((num_pairs + num_ids, group), jnp.float32),
      ],
    )(
      chunk.lists.pieces,
      chunk.lists.items,
      chunk.head,
      grouped,
      key,
      value,
      *segments,
    )
    return common.pallas_call(
      functools.partial(
        _merge_kernel, block=spec.block, key_length=key_length, num_ids=num_ids
      ),
      name="nsa_selected_merge",
      num_warps=1,
      num_stages=3,
      grid=(rows,),
      in_specs=[
        pl.BlockSpec((None, pl.next_power_of_2(num_ids)), lambda t: (t, 0)),
        whole(chunk.head),
        pl.BlockSpec((num_ids, group, value_dim), lambda t: (t, 0, 0)),
        pl.BlockSpec((num_ids, group), lambda t: (t, 0)),
      ],
      out_specs=[
        pl.BlockSpec((None, group, value_dim), lambda t: (t, 0, 0)),
        pl.BlockSpec((None, group), lambda t: (t, 0)),
      ],
      out_shape=[
        jax.ShapeDtypeStruct((rows, group, value_dim), query.dtype),
        jax.ShapeDtypeStruct((rows, group), jnp.float32),
      ],
    )(chunk.ids, chunk.head, part, part_lse)

  result = map_heads(chunk, ids, offset, key_length, rows, spec=spec)
  out, lse = (join(x, length, heads) for x in result)
  return out, lse


def join(x: jax.Array, length: int, heads: int) -> jax.Array:
  """[B, K, chunks, C, G, ...] -> [B, T, N, ...], without the padding."""
  batch, kv_heads, chunks, rows = x.shape[:4]
  x = x.reshape(batch, kv_heads, chunks * rows, *x.shape[4:])
  x = jnp.swapaxes(x, 1, 2)[:, :length, :, : heads // kv_heads]
  return x.reshape(batch, length, heads, *x.shape[4:])
