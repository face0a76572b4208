"""Attention over selected blocks, forward: query-outer.

All heads of a group choose the same blocks, so the rows of a program's matrix
products are the heads of one group at one position, and each chosen block is
loaded once for all of them. The kernel is bound by L2 bandwidth: if registers
allow, a program therefore takes two neighbouring positions, and loads the
blocks that both chose once for both. The first walks its blocks in ascending
order, whatever the second chose, so that no bit of a query depends on later
tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.integers import div, rem
from pallas_kernels.interface import Queries, Spec, per_row, segment_pair
from pallas_kernels.triton import common
from pallas_kernels.triton.tiling import Tile


class Unpadded(NamedTuple):
  """Sizes before padding to tiles."""

  length: int  # T
  group: int  # G
  num_ids: int  # m


class Run(NamedTuple):
  """Consecutive entries of a list of block ids, for the same queries."""

  first: Any  # index of the first entry
  full: Any  # number of blocks before the queries' own
  diagonal: Any  # 1 if the queries' own block follows, else 0


def attended(ids: jax.Array, t: Any, key_length: int, block: int) -> Any:
  """Masks of the ids of blocks before the one of position t, and of that one.

  Blocks before the query's own need no causal mask, its own block does, and
  later ones are not read. A position outside the keys reads nothing.
  """
  inside = (t >= 0) & (t < key_length)
  own = div(jnp.maximum(t, 0), block)
  return inside & (ids >= 0) & (ids < own), inside & (ids == own)


def count(mask: jax.Array) -> Any:
  """Number of true entries."""
  return jnp.sum(mask.astype(jnp.int32))


def _pair_kernel(
  ids_ref,  # [2, m], m padded to a power of two
  offset_ref,  # [1]
  lists_ref,  # [2 m + 1]: first query's, second's other blocks; one unused
  counts_ref,  # [4]: full blocks and diagonal of each list
  *,
  length: int,
  num_ids: int,
  key_length: int,
  block: int,
):
  m = num_ids
  width = ids_ref.shape[1]
  first = 2 * pl.program_id(0)
  ids, masks = [], []
  for i in range(2):
    inside = (jnp.arange(width) < m) & (first + i < length)
    ids.append(common.load(ids_ref.at[common.index(i)], inside, other=-1))
    t = offset_ref[0] + first + i
    masks.append(attended(ids[i], t, key_length, block))
  full, diagonal = zip(*masks, strict=True)
  same = (ids[0][:, None] == ids[1][None, :]).astype(jnp.int32)

  def shared(masks):
    both = same * (masks[0][:, None] & masks[1][None, :]).astype(jnp.int32)
    return jnp.max(both, axis=1) > 0, jnp.max(both, axis=0) > 0

  shared_full, shared_diagonal = shared(full), shared(diagonal)
  both = shared_full[0] | shared_diagonal[0]
  counts: list[Any] = []

  def append(start, entries, blocks, last):
    rank = jnp.cumsum(blocks.astype(jnp.int32)) - 1
    place = jnp.where(blocks, start + rank, 2 * m)
    place = jnp.where(last, start + count(blocks), place)
    lists_ref[place] = entries
    counts.extend((count(blocks), count(last)))

  append(0, 2 * ids[0] + both.astype(jnp.int32), full[0], diagonal[0])
  append(
    m, 2 * ids[1], full[1] & ~shared_full[1], diagonal[1] & ~shared_diagonal[1]
  )
  index = jnp.arange(counts_ref.shape[0])
  values = [jnp.where(index == i, x, 0) for i, x in enumerate(counts)]
  counts_ref[...] = sum(values[1:], values[0])


def pair_lists(
  ids: jax.Array,
  offset: jax.Array,
  key_length: int,
  block: int,
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """Blocks that query 2 i chose, and those that only query 2 i + 1 chose.

  Args:
    ids: int32 [B, T, K, m], strictly ascending, then -1.
    offset: int32 [B].
    key_length: S.
    block: l'.
    interpret: run the kernel in the interpreter.

  Returns:
    The lists, int32 [B, ceil(T / 2), K, 2 m + 1], and their counts,
    int32 [B, ceil(T / 2), K, 4], as in `_pair_kernel`. An entry is twice the
    id, plus 1 in the first list if query 2 i + 1 chose the block as well.
  """
  batch, length, kv_heads, num_ids = ids.shape
  pairs = -(-length // 2)
  widths = (2 * num_ids + 1, 4)

  def spec(rows, width):
    return pl.BlockSpec((None, rows, None, width), lambda p, h, b: (b, p, h, 0))

  lists, counts = pl.pallas_call(
    functools.partial(
      _pair_kernel,
      length=length,
      num_ids=num_ids,
      key_length=key_length,
      block=block,
    ),
    **common.options("nsa_selected_pairs", 1, 1, interpret),
    grid=(pairs, kv_heads, batch),
    in_specs=[
      spec(2, pl.next_power_of_2(num_ids)),
      pl.BlockSpec((1,), lambda p, h, b: (b,)),
    ],
    out_specs=[spec(None, width) for width in widths],
    out_shape=[
      platforms.out_shape((batch, pairs, kv_heads, width), jnp.int32)
      for width in widths
    ],
  )(ids, offset)
  return lists, counts


class Program(NamedTuple):
  """The one or two queries of a program, and the blocks that they read."""

  positions: tuple[Any, ...]
  row_masks: tuple[Any, ...]  # per query, mask of the valid tile rows, or None
  ids_ref: Any  # ids, or the lists of a pair
  runs: tuple[Run, ...]  # per query; of a pair, as in `pair_lists`
  segments_ref: Any  # of the keys, or None
  segments: tuple[Any, ...]  # of the queries


def program(
  offset_ref: Any,
  refs: Sequence[Any],
  *,
  queries: int,
  rows: int,
  sizes: Unpadded,
  key_length: int,
  block: int,
) -> Program:
  """Loads the queries' positions, masks, block lists and segments.

  Args:
    offset_ref: [1].
    refs: ids [m], or the lists and counts of a pair; then the segments of
      the keys [S] and of the queries [queries], if any.
    queries: 1 or 2.
    rows: G, padded.
    sizes: sizes before padding.
    key_length: S.
    block: l'.
  """
  runs: tuple[Run, ...]
  first = queries * pl.program_id(0)
  last = sizes.length - 1 - first  # The last program may have a query less.
  positions = tuple(offset_ref[0] + first + i for i in range(queries))
  row_masks = []
  for i in range(queries):
    mask = common.padding_mask(sizes.group, rows)
    if sizes.length % queries:
      mask = (jnp.arange(rows) < sizes.group) & (first + i < sizes.length)
    row_masks.append(mask)
  if queries == 1:
    ids_ref, *segments = refs
    width = ids_ref.shape[0]
    ids = common.load(
      ids_ref, common.padding_mask(sizes.num_ids, width), other=-1
    )
    full, diagonal = attended(ids, positions[0], key_length, block)
    runs = (Run(0, count(full), count(diagonal)),)
  else:
    ids_ref, counts_ref, *segments = refs
    runs = tuple(
      Run(i * sizes.num_ids, counts_ref[2 * i], counts_ref[2 * i + 1])
      for i in range(2)
    )
  return Program(
    positions,
    tuple(row_masks),
    ids_ref,
    runs,
    segments[0] if segments else None,
    tuple(segments[1][jnp.minimum(i, last)] for i in range(queries))
    if segments
    else (),
  )


def walk_blocks(
  scores: Any,
  update: Any,
  states: tuple[Any, ...],
  program: Program,
  k_ref: Any,
  v_ref: Any,
  *,
  block: int,
  block_k: int,
) -> tuple[Any, ...]:
  """Folds `update` over the keys that the queries of a program read.

  Args:
    scores: maps (q, k, mask) to the scores of query q. k holds `block_k` keys;
      the mask [block_k] is None if all are read.
    update: maps (state, scores, v) to the next state of a query.
    states: one per query.
    program: the queries and their blocks.
    k_ref: [S, H].
    v_ref: [S, V].
    block: l'.
    block_k: keys per step.
  """
  steps = block // block_k
  pair = len(states) == 2

  def entry(run, i):
    """Block of step i, and whether both queries of a pair read it here."""
    x = program.ids_ref[run.first + div(i, steps)]
    return (x >> 1, (x & 1) == 1) if pair else (x, False)

  def readable(q, span_k, token, masked, joins=True):
    mask = token <= program.positions[q] if masked else None
    if program.segments_ref is not None:
      # Only the query's own block, which is masked, may extend past the keys;
      # so may that of another query, which it does not join.
      inside = None if mask is None else mask & joins
      keys = common.load(program.segments_ref.at[span_k], inside)
      same = keys == program.segments[q]
      mask = same if mask is None else mask & same
    return mask

  def walk(q, first, last, masked, states):
    """Walks steps first .. last - 1 of the list of query q."""
    with_second = pair and q == 0

    def body(i, states):
      block_id, both = entry(program.runs[q], i)
      start = block_id * block + rem(i, steps) * block_k
      span_k, token = pl.ds(start, block_k), start + jnp.arange(block_k)
      mask = either = readable(q, span_k, token, masked)
      if with_second:
        second_mask = readable(1, span_k, token, masked, both)
        if mask is not None:
          either = mask | (second_mask & both)
      k, v = (
        common.load_pieces(ref, span_k, common.pieces(ref.shape[1]), either)
        for ref in (k_ref, v_ref)
      )
      states = list(states)
      states[q] = update(states[q], scores(q, k, mask), v)
      if with_second:
        # Inside the `cond`, the query would be copied to shared memory at every
        # step, and twice as many registers spill.
        s = scores(1, k, second_mask)
        states[1] = lax.cond(
          both,
          lambda state: update(state, s, v),
          lambda state: state,
          states[1],
        )
      return tuple(states)

    return lax.fori_loop(first, last, body, states)

  for q, run in enumerate(program.runs):
    full = run.full * steps
    last = program.positions[q]
    if pair and q == 0:
      # If both are in this block, the second reads one more token of it.
      _, both = entry(run, full)
      last = jnp.where(both, program.positions[1], last)
    visible = div(rem(jnp.maximum(last, 0), block), block_k) + 1
    states = walk(q, 0, full, False, states)
    states = walk(q, full, full + run.diagonal * visible, True, states)
  return states


def _fwd_kernel(
  offset_ref,  # [1]
  q_ref,  # [queries, G, H], G padded to a power of two
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  *refs,  # as in `program`; then out [queries, G, V], lse [queries, G]
  spec: Spec,
  sizes: Unpadded,
):
  *reads, out_ref, lse_ref = refs
  queries, rows, head_dim = q_ref.shape
  key_length, value_dim = v_ref.shape
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  mine = program(
    offset_ref,
    reads,
    queries=queries,
    rows=rows,
    sizes=sizes,
    key_length=key_length,
    block=spec.config.selection_block,
  )
  q = [
    common.load_pieces(q_ref, (common.index(i), slice(None)), head_pieces, mask)
    for i, mask in enumerate(mine.row_masks)
  ]

  def scores(i, k, mask):
    s = common.dot_pieces(q[i], k) * (spec.scale * common.LOG2E)
    return s if mask is None else jnp.where(mask[None, :], s, common.MASK)

  def update(state, s, v):
    acc, m_i, l_i = state
    m_next = jnp.maximum(m_i, s.max(axis=1))
    p = jnp.exp2(s - m_next[:, None])
    correction = jnp.exp2(m_i - m_next)
    l_next = l_i * correction + p.sum(axis=1)
    acc = tuple(
      a * correction[:, None] + common.dot(p.astype(x.dtype), x)
      for a, x in zip(acc, v, strict=True)
    )
    return acc, m_next, l_next

  start = (
    common.accumulators(rows, value_pieces),
    jnp.full((rows,), common.MAX_INIT, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
  )
  states = walk_blocks(
    scores,
    update,
    (start,) * queries,
    mine,
    k_ref,
    v_ref,
    block=spec.config.selection_block,
    block_k=spec.tiles.fwd.block_k,
  )
  for i, (acc, m_i, l_i) in enumerate(states):
    some = l_i != 0
    total = jnp.where(some, l_i, 1)
    lse = jnp.where(some, m_i / common.LOG2E + jnp.log(total), -jnp.inf)
    for (column, width), a in zip(value_pieces, acc, strict=True):
      out = (a / total[:, None]).astype(out_ref.dtype)
      common.store(
        out_ref.at[common.index(i), :, pl.ds(column, width)],
        out,
        mine.row_masks[i],
      )
    common.store(lse_ref.at[common.index(i)], lse, mine.row_masks[i])


class Layout(NamedTuple):
  """Arrays and block specs that the query-outer kernels share."""

  grid: tuple[int, int, int]  # programs per head, key/value heads, batch
  sizes: Unpadded
  offset: pl.BlockSpec  # of [B]
  per_query: Any  # width -> spec of [B, T, K, G, width]
  per_row: pl.BlockSpec  # of [B, T, K, G]
  keys: Any  # width -> spec of [B, S, K, width]
  reads: tuple[jax.Array, ...]  # arrays of the `refs` of `program`
  read_specs: tuple[pl.BlockSpec, ...]


class BlockReads(NamedTuple):
  """What the queries of a call read.

  Attributes:
    ids: int32 [B, T, K, m], strictly ascending, then -1.
    offset: int32 [B], position of the first query.
    segments: () or key segments [B, S] and query segments [B, T], int32; a
      query whose segment has no key reads nothing.
  """

  ids: jax.Array
  offset: jax.Array
  segments: tuple[jax.Array, ...]


def reads_of(index: tuple[jax.Array, Queries]) -> BlockReads:
  """Converts the index of a call for the kernels."""
  ids, queries = index
  return BlockReads(
    ids,
    per_row(queries.offset, len(ids)),
    segment_pair(queries.key_segments, queries.query_segments),
  )


def layout(
  grouped: jax.Array, key_length: int, reads: BlockReads, tile: Tile, spec: Spec
) -> Layout:
  """Layout for queries [B, T, K, G, H]; consecutive programs share a head."""
  batch, length, kv_heads, group, _ = grouped.shape
  rows = common.padded_rows(group)
  queries = tile.queries
  ids, offset, segments = reads

  def per_query(*last):
    return pl.BlockSpec(
      (None, queries, None, *last),
      lambda p, h, b: (b, p, h, *(0,) * len(last)),
    )

  lists: tuple[jax.Array, ...] = (ids,)
  if queries == 1:
    widths = [pl.next_power_of_2(ids.shape[-1])]
  else:
    lists = pair_lists(
      ids,
      offset,
      key_length,
      spec.config.selection_block,
      interpret=spec.interpret,
    )
    widths = [x.shape[-1] for x in lists]
  specs = [
    pl.BlockSpec((None, None, None, width), lambda p, h, b: (b, p, h, 0))
    for width in widths
  ]
  if segments:
    specs += [
      pl.BlockSpec((None, key_length), lambda p, h, b: (b, 0)),
      pl.BlockSpec((None, queries), lambda p, h, b: (b, p)),
    ]
  return Layout(
    grid=(-(-length // queries), kv_heads, batch),
    sizes=Unpadded(length, group, ids.shape[-1]),
    offset=pl.BlockSpec((1,), lambda p, h, b: (b,)),
    per_query=lambda width: per_query(rows, width),
    per_row=per_query(rows),
    keys=lambda width: pl.BlockSpec(
      (None, key_length, None, width), lambda p, h, b: (b, 0, h, 0)
    ),
    reads=(*lists, *segments),
    read_specs=tuple(specs),
  )


def group_heads(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, N, ...] -> [B, T, K, G, ...]."""
  return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[jax.Array, Queries]
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, N, V] and lse [B, T, N] (float32) of the selected branch.

  Args:
    spec: static arguments of the call, with tiles.
    qkv: query [B, T, N, H], key [B, S, K, H], value [B, S, K, V].
    index: block ids and queries.
  """
  query, key, value = qkv
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = value.shape[1:]
  reads = reads_of(index)
  grouped = group_heads(query, kv_heads)
  tile = spec.tiles.fwd
  specs = layout(grouped, key_length, reads, tile, spec)
  out, lse = pl.pallas_call(
    functools.partial(_fwd_kernel, spec=spec, sizes=specs.sizes),
    **common.options(
      "nsa_selected_fwd", tile.num_warps, tile.num_stages, spec.interpret
    ),
    grid=specs.grid,
    in_specs=[
      specs.offset,
      specs.per_query(head_dim),
      specs.keys(head_dim),
      specs.keys(value_dim),
      *specs.read_specs,
    ],
    out_specs=[specs.per_query(value_dim), specs.per_row],
    out_shape=[
      platforms.out_shape((*grouped.shape[:4], value_dim), query.dtype),
      platforms.out_shape(grouped.shape[:4], jnp.float32),
    ],
  )(reads.offset, grouped, key, value, *specs.reads)
  return (
    out.reshape(batch, length, heads, value_dim),
    lse.reshape(batch, length, heads),
  )
