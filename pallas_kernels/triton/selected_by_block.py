"""Attention over selected blocks for small groups, forward: blocks outside.

With few heads in a group, a program per query would load a block for a handful
of rows. Here a program takes a piece of the list of the queries that chose one
block, keeps the block's keys and values, and gathers several queries a step as
the rows of its products. Each (query, block) pair leaves a partial output and
its lse; a second kernel merges the partial outputs of every query.

Gathers are fast from arrays whose heads lie apart, so queries are transposed
once: row z T + t is query t of head z = b K + h. A chunk is a range of rows,
whole heads or a part of one, whose partial outputs (m times the memory of the
output) stay within a budget.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common
from pallas_kernels.triton.inverse_lists import InverseLists, chosen, invert
from pallas_kernels.triton.selected_attention import Spec, group_heads
from pallas_kernels.triton.tiling import Tile

# Bytes of the partial outputs of one chunk.
PARTIAL_BYTES = 2**31


class Plan(NamedTuple):
  """How the queries of all heads are cut into chunks; static."""

  kv_heads: int  # K
  length: int  # T, padded to a multiple of `rows`: rows of a head
  heads: int  # D, heads in a chunk
  rows: int  # C, queries of each of them in a chunk
  num_ids: int  # m
  num_blocks: int  # M
  block: int  # l'
  key_length: int  # S

  @property
  def num_pairs(self) -> int:
    """Pairs (query, block) of a chunk, pair = query * m + place."""
    return self.heads * self.rows * self.num_ids


def plan_chunks(
  query: jax.Array, key: jax.Array, ids: jax.Array, block: int
) -> Plan:
  """As many whole heads as fit, or a power of two of queries of one head.

  Args:
    query: [B, T, N, ...], whose dtype partial outputs have.
    key: [B, S, K, W]; or values, whichever has the width of the outputs.
    ids: int32 [B, T, K, m].
    block: l'.
  """
  batch, length, kv_heads, num_ids = ids.shape
  key_length, width = key.shape[1], key.shape[-1]
  num_blocks = -(-key_length // block)
  group = pl.next_power_of_2(query.shape[2] // kv_heads)
  query_bytes = num_ids * group * width * query.dtype.itemsize
  most = max(PARTIAL_BYTES // query_bytes, 16)
  # Few enough for a 32-bit sort key of the lists, which is several times as
  # fast; but not if most lists of a chunk would end before they fill a step.
  short_key = (2**32 - 1) // (num_ids * (num_blocks + 1))
  if short_key * num_ids >= 128 * num_blocks:
    most = min(most, short_key)
  heads, rows = 1, length
  if length > most:
    rows = 1 << (most.bit_length() - 1)
    length = -(-length // rows) * rows
  else:
    total = batch * kv_heads
    fits = range(1, min(most // length, total) + 1)
    heads = max(d for d in fits if total % d == 0)
  return Plan(
    kv_heads, length, heads, rows, num_ids, num_blocks, block, key_length
  )


class Chunk(NamedTuple):
  """A range of rows, and the lists of its pairs."""

  first_row: jax.Array  # int32 [1]
  ids: jax.Array  # int32 [D C, m]
  # Block M * (head in the chunk) + block -> pairs, counted within the head.
  lists: InverseLists


def split_blocks(
  ids: jax.Array, spec: Spec, block_k: int
) -> tuple[jax.Array, Spec]:
  """The same call with blocks of `block_k` tokens, and more of them."""
  parts = spec.block // block_k
  inner = ids[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)
  inner = jnp.where(ids[..., None] < 0, -1, inner)
  return inner.reshape(*ids.shape[:-1], -1), spec._replace(block=block_k)


def by_head(x: jax.Array, length: int, fill: int = 0) -> jax.Array:
  """[B, T, K, ...] -> [B K, length, ...], padded with `fill`."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, length - x.shape[1])
  x = jnp.swapaxes(jnp.pad(x, pad, constant_values=fill), 1, 2)
  return x.reshape(-1, *x.shape[2:])


def query_rows(x: jax.Array, plan: Plan) -> jax.Array:
  """[B, T, N, ...] -> [B K T, G, ...], G padded to a power of two."""
  x = by_head(group_heads(x, plan.kv_heads), plan.length)
  x = x.reshape(-1, *x.shape[2:])
  group = x.shape[1]
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, pl.next_power_of_2(group) - group)
  return jnp.pad(x, pad)


def query_heads(x: jax.Array, like: jax.Array, plan: Plan) -> jax.Array:
  """The inverse of `query_rows`, of all chunks [., D C, G, ...].

  `like` [B, T, N, ...] has the sizes before padding.
  """
  batch, length, heads = like.shape[:3]
  x = x.reshape(batch, plan.kv_heads, plan.length, *x.shape[2:])
  x = jnp.swapaxes(x, 1, 2)[:, :length, :, : heads // plan.kv_heads]
  return x.reshape(batch, length, heads, *x.shape[4:])


def scan_chunks(
  body: Callable[[Chunk], tuple[Any, Any]],
  ids: jax.Array,
  offset: jax.Array,
  totals: Any,
  plan: Plan,
  piece: int,
) -> tuple[Any, Any]:
  """Runs `body` on one chunk after the other.

  Args:
    body: from a chunk to a pytree like `totals` of the sums of the chunk's
      heads, [D, ...], and a pytree of anything.
    ids: int32 [B, T, K, m].
    offset: int32 [B].
    totals: pytree of arrays [B K, ...] that the sums are added to.
    plan: of the chunks.
    piece: pairs in a piece of a list.

  Returns:
    `totals`, and the second pytree with a leading axis for the chunks.
  """
  rows_ids = by_head(ids, plan.length, -1).reshape(-1, plan.num_ids)
  count = plan.heads * plan.rows
  item = jnp.arange(plan.rows * plan.num_ids, dtype=jnp.int32)
  item = jnp.tile(item.reshape(plan.rows, plan.num_ids), (plan.heads, 1))
  local_head = jnp.repeat(jnp.arange(plan.heads, dtype=jnp.int32), plan.rows)

  def step(totals, first_row):
    local = lax.dynamic_slice_in_dim(rows_ids, first_row, count)
    first_head = first_row // plan.length
    head = first_head + local_head
    row = first_row + jnp.arange(count, dtype=jnp.int32)
    position = offset[head // plan.kv_heads] + row - head * plan.length
    valid = chosen(local, position[:, None], plan.key_length, plan.block)
    num_rows = plan.heads * plan.num_blocks
    lists = invert(
      jnp.where(valid, local_head[:, None] * plan.num_blocks + local, num_rows),
      item,
      num_rows=num_rows,
      num_items=plan.rows * plan.num_ids,
      piece=piece,
    )
    sums, result = body(Chunk(first_row[None], local, lists))

    def add(total, x):
      x += lax.dynamic_slice_in_dim(total, first_head, plan.heads)
      return lax.dynamic_update_slice_in_dim(total, x, first_head, axis=0)

    return jax.tree.map(add, totals, sums), result

  first_rows = jnp.arange(0, rows_ids.shape[0], count, dtype=jnp.int32)
  return lax.scan(step, totals, first_rows)


class Piece(NamedTuple):
  """What a program works on: a block, and a part of the list of its pairs."""

  first: Any  # place in the list
  last: Any
  head: Any  # b K + h
  batch: Any  # b
  first_pair: Any  # pair of item 0
  first_query: Any  # query of item 0, counted within the head
  offset: Any  # position of query 0
  start_k: Any
  token: Any  # int32 [l'], position of the keys
  key_segment: Any  # int32 [l'], or None


def load_piece(
  piece_ref: Any,
  first_row_ref: Any,
  offset_ref: Any,
  segments: Sequence[Any],
  plan: Plan,
) -> Piece:
  """The piece of this program and, with segments, those of its keys."""
  row, first, last = piece_ref[0], piece_ref[1], piece_ref[2]
  local_head = common.div(row, plan.num_blocks)
  first_head = common.div(first_row_ref[0], plan.length)
  head = first_head + local_head
  batch = common.div(head, plan.kv_heads)
  start_k = common.rem(row, plan.num_blocks) * plan.block
  token = start_k + jnp.arange(plan.block)
  key_segment = None
  if segments:
    keys_ref = segments[0].at[batch, pl.ds(start_k, plan.block)]
    key_segment = common.load(keys_ref, token < plan.key_length)
  return Piece(
    first,
    last,
    head,
    batch,
    first_pair=local_head * (plan.rows * plan.num_ids),
    # A chunk of several heads starts with the first query of one.
    first_query=first_row_ref[0] - first_head * plan.length,
    offset=offset_ref[batch],
    start_k=start_k,
    token=token,
    key_segment=key_segment,
  )


def load_block(ref: Any, piece: Piece, plan: Plan) -> tuple[jax.Array, ...]:
  """The block's rows of keys or values [B K, S, W], in pieces of W."""
  return common.load_pieces(
    ref,
    (piece.head, pl.ds(piece.start_k, plan.block)),
    common.pieces(ref.shape[-1]),
    piece.token < plan.key_length,
  )


class Step(NamedTuple):
  """The queries of one step of a program, Q = rows / G of them."""

  pair: Any  # int32 [Q], where partial results go; past the end if unused
  row: Any  # int32 [Q], of the query arrays
  position: Any  # int32 [Q G], -1 if unused
  segment: Any  # int32 [Q G], or None


def walk_queries(
  body: Callable[[Step, Any], Any],
  carry: Any,
  piece: Piece,
  items_ref: Any,
  segments: Sequence[Any],
  plan: Plan,
  *,
  queries: int,
  group: int,
) -> Any:
  """Folds `body` over the piece, `queries` pairs at a time."""
  # Unused rows read a query that is read anyway: nothing else gets in.
  filler = items_ref[piece.first]

  def per_row(x):
    x = jnp.broadcast_to(x[:, None], (queries, group))
    return x.reshape(queries * group)

  def step(i, carry):
    start = piece.first + i * queries
    used = start + jnp.arange(queries) < piece.last
    item = common.load(items_ref.at[pl.ds(start, queries)], used)
    item = jnp.where(used, item, filler)
    query = piece.first_query + common.div(item, plan.num_ids)
    segment = None
    if segments:
      segment = per_row(segments[1][piece.batch, query])
    return body(
      Step(
        pair=jnp.where(used, piece.first_pair + item, plan.num_pairs),
        row=piece.head * plan.length + query,
        position=per_row(jnp.where(used, piece.offset + query, -1)),
        segment=segment,
      ),
      carry,
    )

  steps = common.div(piece.last - piece.first + queries - 1, queries)
  return lax.fori_loop(0, steps, step, carry)


def gather(ref: Any, step: Step) -> tuple[jax.Array, ...]:
  """Rows of [B K T, G, W], flattened to [Q G, .], in pieces of W."""
  return tuple(
    ref[step.row, :, pl.ds(start, width)].reshape(-1, width)
    for start, width in common.pieces(ref.shape[-1])
  )


def scatter(ref: Any, step: Step, xs: tuple[jax.Array, ...]) -> None:
  """Stores [Q G, .] of the step in pieces of W; `ref` [pairs, G, W]."""
  group, columns = ref.shape[1:]
  for (start, width), x in zip(common.pieces(columns), xs, strict=True):
    x = x.astype(ref.dtype).reshape(-1, group, width)
    ref[step.pair, :, pl.ds(start, width)] = x


def _fwd_kernel(
  piece_ref,  # [3]
  items_ref,  # [D C m]
  first_row_ref,  # [1]
  offset_ref,  # [B]
  q_ref,  # [B K T, G, H]
  k_ref,  # [B K, S, H]
  v_ref,  # [B K, S, V]
  *refs,  # segments [B, S], [B, T], if any; out [pairs + m, G, V], lse [., G]
  spec: Spec,
  plan: Plan,
):
  *segments, out_ref, lse_ref = refs
  group = q_ref.shape[1]
  queries = spec.tiling.rows // group

  @pl.when(piece_ref[2] > piece_ref[1])
  def _():
    piece = load_piece(piece_ref, first_row_ref, offset_ref, segments, plan)
    k, v = (load_block(ref, piece, plan) for ref in (k_ref, v_ref))

    def body(step, count):
      q = gather(q_ref, step)
      s = common.dot_pieces(q, k) * (spec.scale * common.LOG2E)
      mask = piece.token[None, :] <= step.position[:, None]
      if segments:
        mask &= piece.key_segment[None, :] == step.segment[:, None]
      s = jnp.where(mask, s, common.MASK)
      m_i = jnp.maximum(s.max(axis=1), common.MAX_INIT)
      p = jnp.exp2(s - m_i[:, None])
      l_i = p.sum(axis=1)
      total = jnp.where(l_i > 0, l_i, 1)
      out = (common.dot(p.astype(x.dtype), x) / total[:, None] for x in v)
      scatter(out_ref, step, tuple(out))
      lse = m_i + jnp.log2(total)
      lse_ref[step.pair] = lse.reshape(queries, group)
      # A loop that carries nothing does not lower.
      return count + 1

    walk_queries(
      body,
      jnp.int32(0),
      piece,
      items_ref,
      segments,
      plan,
      queries=queries,
      group=group,
    )


def count_chosen(
  ids_ref: Any, first_row_ref: Any, offset_ref: Any, plan: Plan
) -> jax.Array:
  """How many partial results the program's query has.

  Ids ascend: those that were attended come first.
  """
  row = first_row_ref[0] + pl.program_id(0)
  head = common.div(row, plan.length)
  position = offset_ref[common.div(head, plan.kv_heads)]
  position += row - head * plan.length
  mask = common.padding_mask(plan.num_ids, ids_ref.shape[0])
  ids = common.load(ids_ref, mask, other=-1)
  valid = chosen(ids, position, plan.key_length, plan.block)
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
  plan: Plan,
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
    count_chosen(ids_ref, first_row_ref, offset_ref, plan),
    body,
    (
      common.accumulators(group, columns),
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


def call_by_piece(
  kernel: Callable[..., None],
  chunk: Chunk,
  offset: jax.Array,
  arrays: Sequence[jax.Array],
  per_piece: Sequence[tuple[int, ...]],
  per_pair: Sequence[tuple[tuple[int, ...], Any]],
  *,
  name: str,
  plan: Plan,
  tile: Tile,
) -> list[jax.Array]:
  """A program for every piece of the lists.

  Args:
    kernel: see `_fwd_kernel` for its refs.
    chunk: the lists.
    offset: int32 [B].
    arrays: given to the kernel as a whole.
    per_piece: shapes of what a piece leaves, float32.
    per_pair: shapes and dtypes of what a pair leaves. Unused rows of a step
      write to one more query than there are.
    name: of the kernel.
    plan: of the chunks.
    tile: of the kernel.
  """
  lists = chunk.lists
  num_pieces = lists.pieces.shape[0]
  pairs = plan.num_pairs + plan.num_ids
  inputs = (lists.items, chunk.first_row, offset, *arrays)

  def one(shape):
    return pl.BlockSpec((None, *shape), lambda p: (p, *[0] * len(shape)))

  outs = [jax.ShapeDtypeStruct((pairs, *x), dtype) for x, dtype in per_pair]
  return common.pallas_call(
    kernel,
    name=name,
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    grid=(num_pieces,),
    in_specs=[one((3,)), *map(common.whole, inputs)],
    out_specs=[*map(one, per_piece), *map(common.whole, outs)],
    out_shape=[
      *(jax.ShapeDtypeStruct((num_pieces, *x), jnp.float32) for x in per_piece),
      *outs,
    ],
  )(lists.pieces, *inputs)


def call_by_query(
  kernel: Callable[..., None],
  chunk: Chunk,
  offset: jax.Array,
  parts: Sequence[jax.Array],
  *,
  name: str,
  plan: Plan,
) -> list[jax.Array]:
  """A program for every query, from what its pairs left to [D C, ...].

  Args:
    kernel: see `_merge_kernel` for its refs.
    chunk: the ids.
    offset: int32 [B].
    parts: [pairs, ...]; results have the same shapes and dtypes.
    name: of the kernel.
    plan: of the chunks.
  """
  rows = plan.heads * plan.rows

  def rows_of(first, x):
    tail = x.shape[1:]
    return pl.BlockSpec((first, *tail), lambda t: (t, *[0] * len(tail)))

  return common.pallas_call(
    kernel,
    name=name,
    num_warps=1,
    num_stages=3,
    grid=(rows,),
    in_specs=[
      pl.BlockSpec((None, pl.next_power_of_2(plan.num_ids)), lambda t: (t, 0)),
      common.whole(chunk.first_row),
      common.whole(offset),
      *(rows_of(plan.num_ids, x) for x in parts),
    ],
    out_specs=[rows_of(None, x) for x in parts],
    out_shape=[
      jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in parts
    ],
  )(chunk.ids, chunk.first_row, offset, *parts)


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
  tile = spec.tiling.fwd
  ids, spec = split_blocks(ids, spec, tile.block_k)
  plan = plan_chunks(query, value, ids, spec.block)
  rows = query_rows(query, plan)
  keys, values = (by_head(x, plan.key_length) for x in (key, value))
  per_row = (rows.shape[1],)

  def chunk(chunk):
    parts = call_by_piece(
      functools.partial(_fwd_kernel, spec=spec, plan=plan),
      chunk,
      offset,
      (rows, keys, values, *segments),
      (),
      (
        ((*per_row, value.shape[-1]), query.dtype),
        (per_row, jnp.float32),
      ),
      name="nsa_selected_by_block_fwd",
      plan=plan,
      tile=tile,
    )
    return (), call_by_query(
      functools.partial(_merge_kernel, plan=plan),
      chunk,
      offset,
      parts,
      name="nsa_selected_merge",
      plan=plan,
    )

  _, result = scan_chunks(chunk, ids, offset, (), plan, spec.tiling.piece)
  out, lse = (query_heads(x, query, plan) for x in result)
  return out, lse
