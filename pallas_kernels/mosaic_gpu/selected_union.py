"""Attention over selected blocks, forward: neighbouring queries together.

The matrix products of Hopper (wgmma) have 64 rows: the heads of a group at
several neighbouring positions, which read much the same blocks. A program has
one warpgroup that loads and two or three that compute, of 64 rows each; their
queries are a piece of work, and a program has several pieces, one after the
other. The loading warpgroup walks the sorted lists of all queries of a piece at
once, like the merge of a merge sort: each step loads the lowest block that some
query has not read yet, and publishes its id and a bit per query that chose it.
The computing warpgroups mask the scores of queries without the bit, and skip a
block that none of their queries chose. A step without a block ends a piece.

The bits of a query do not depend on its neighbours. A block that it did not
choose has scores of -inf: the maximum stays, the correction is exp2(0) = 1, and
the products add 0 to sums. This needs finite values: see `_values` for those
that no query may read.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.integers import div, rem
from pallas_kernels.interface import Queries, Spec, per_row, segment_pair
from pallas_kernels.mosaic_gpu import selected_lanes, support
from pallas_kernels.mosaic_gpu.common import LOG2E, drain, options
from pallas_kernels.mosaic_gpu.interpreter import interpreted
from pallas_kernels.mosaic_gpu.selected_lists import minimum, walk_union
from pallas_kernels.mosaic_gpu.tiling import ROWS, UnionTile, union_in_place

# With its types mypy would complain of jax 0.10, which lacks some of it.
_plgpu: Any = plgpu
# Initial maximum. That of a query without scores stays finite, so that
# exp2(-inf - maximum) = 0.
_MAX_INIT = -1e30
# Set beside the bits of the queries if the tokens of the block differ in their
# segment.
_MIXED = 1 << 30


class Sizes(NamedTuple):
  """Static sizes of a call.

  Attributes:
    batch: B.
    length: T.
    kv_heads: K.
    group: G.
    head_dim: H.
    value_dim: V.
    key_length: S, tokens.
    key_rows: S padded to whole blocks.
    num_ids: n.
    block: l'.
    workers: computing warpgroups per program.
    stages: blocks of keys, and of values, in shared memory.
    programs: number of programs.
    lanes: each lane of the loading warps holds the list of one query; else
      every thread holds all.
    in_place: the output passes through the buffer of the queries.
    tail: the last block that is read has its values in an array of its own.
    segments: there are segment ids.
  """

  batch: int
  length: int
  kv_heads: int
  group: int
  head_dim: int
  value_dim: int
  key_length: int
  key_rows: int
  num_ids: int
  block: int
  workers: int
  stages: int
  programs: int
  lanes: bool
  in_place: bool
  tail: bool
  segments: bool

  @property
  def stride(self) -> int:
    """Rows of a query in a tile: G, rounded up so that it divides 64."""
    return pl.next_power_of_2(self.group)

  @property
  def per_worker(self) -> int:
    """Queries of a warpgroup."""
    return ROWS // self.stride

  @property
  def per_piece(self) -> int:
    """Queries of a piece."""
    return self.workers * self.per_worker

  @property
  def pieces(self) -> int:
    """Pieces of a key/value head."""
    return pl.cdiv(self.length, self.per_piece)

  @property
  def total(self) -> int:
    """Pieces of the call."""
    return self.batch * self.kv_heads * self.pieces

  @property
  def blocks(self) -> int:
    """M."""
    return self.key_rows // self.block


class _Piece(NamedTuple):
  """A piece of work."""

  b: Any
  h: Any
  first: Any  # its first query
  position: Any  # of that query


class _Inputs(NamedTuple):
  """Global memory that the kernel reads."""

  offset: Any  # [B]
  ids: Any  # [B * T * K, n]
  q: Any  # [B * T * K, G, H]
  k: Any  # [B * S, K, H], S padded to whole blocks
  v: Any  # [B * S, K, V]
  last: Any  # [B], the last block that is read; if `tail`
  v_tail: Any  # [B * l', K, V], its values; if `tail`
  query_segments: Any  # [B * T], -1: reads nothing; if `segments`
  key_segments: Any  # [B * S]
  lowest: Any  # [B * M], the lowest segment id of each block
  highest: Any  # [B * M]


class _Buffers(NamedTuple):
  """Shared memory and barriers of a program."""

  q: Any  # [workers, 64, H]
  k: Any  # [stages, l', H]
  v: Any  # [stages, l', V]
  steps: Any  # [stages, 2]: block id, -1 ends a piece; bits of queries
  out: Any  # [workers, 64, V]; None: it takes the place of the queries
  lse: Any  # [workers, 64]
  p: Any  # [workers, 64, l'], for the interpreter only
  q_ready: Any  # per warpgroup
  k_ready: Any  # per stage, as the following
  v_ready: Any
  k_free: Any
  v_free: Any


def _each_piece(
  s: Sizes, x: _Inputs, run: Callable[[Any, Any, _Piece], Any]
) -> Any:
  """Runs run(n, step, piece) for the pieces of this program; returns the step.

  Args:
    s: sizes.
    x: global memory.
    run: takes the number of pieces and of steps before this one, and returns
      the number of steps after it.
  """

  def one(n, step):
    return run(n, step, _piece(s, x, n))

  return lax.fori_loop(0, _num_pieces(s), one, jnp.int32(0))


def _piece(s: Sizes, x: _Inputs, n: Any) -> _Piece:
  """Piece n of this program."""
  # Neighbouring programs share a head, so that its keys stay in L2. Late
  # queries, which read most, come first.
  i = lax.axis_index("program") + n * s.programs
  head = div(i, s.pieces)
  first = (s.pieces - 1 - rem(i, s.pieces)) * s.per_piece
  b, h = div(head, s.kv_heads), rem(head, s.kv_heads)
  return _Piece(b, h, first, x.offset[b] + first)


def _num_pieces(s: Sizes) -> Any:
  """Pieces of this program."""
  return div(s.total - 1 - lax.axis_index("program"), s.programs) + 1


def _query(s: Sizes, at: _Piece, i: Any) -> Any:
  """Index of query i of a piece; after the last one, the last one's."""
  t = at.first + i
  if s.length % s.per_piece or s.lanes:
    t = lax.min(t, jnp.int32(s.length - 1))
  return t


def _row(s: Sizes, at: _Piece, i: Any) -> Any:
  """Row of query i of a piece in [B * T * K, ...]."""
  return (at.b * s.length + _query(s, at, i)) * s.kv_heads + at.h


def _load(s: Sizes, x: _Inputs, to: _Buffers, interpret: bool):
  """The loading warpgroup."""
  if not interpret:
    plgpu.set_max_registers(_registers(s)[0], action="decrease")
  end = _each_piece(s, x, functools.partial(_load_piece, s, x, to))
  if interpret:
    drain(to.k_free, s.stages, end)
    drain(to.v_free, s.stages, end - _num_pieces(s))


def _union(*values: Any) -> Any:
  return functools.reduce(jnp.bitwise_or, values)


def _load_piece(
  s: Sizes, x: _Inputs, to: _Buffers, n: Any, i: Any, at: _Piece
) -> Any:
  """Loads the union of the lists of a piece; arguments as in `_each_piece`."""
  if s.lanes:
    # Each lane has the list of its query; what is left over has none.
    queries: Sequence[Any] = [selected_lanes.lane()]
    lowest: Any = selected_lanes.lowest
    union: Any = selected_lanes.union
  else:
    queries = range(s.per_piece)
    lowest, union = minimum, _union
  rows = [_row(s, at, query) for query in queries]
  # Id of each query's own block; -1 if the query reads nothing. The shift of a
  # negative position is negative.
  shift = s.block.bit_length() - 1
  own = []
  for query in queries:
    t = at.position + query
    inside = t < s.key_length
    if s.length % s.per_piece or s.lanes:
      inside &= at.first + query < s.length
    if s.lanes:
      inside &= query < s.per_piece
    own.append(jnp.where(inside, t >> shift, -1))

  segments = []
  if s.segments:
    for query in queries:
      row = at.b * s.length + _query(s, at, query)
      segments.append(x.query_segments[row])

  def readers(hits, block_id):
    """A bit per query that reads the block."""
    mixed = jnp.int32(0)
    if s.segments:
      low, high = (y[at.b * s.blocks + block_id] for y in (x.lowest, x.highest))
      hits = [
        hit & (low <= own_segment) & (own_segment <= high)
        for hit, own_segment in zip(hits, segments, strict=True)
      ]
      mixed = jnp.where(low != high, jnp.int32(_MIXED), 0)
    bits = [
      jnp.where(hit, jnp.int32(1) << query, 0)
      for hit, query in zip(hits, queries, strict=True)
    ]
    return union(*bits) | mixed

  def when_free(barrier, i):
    @pl.when(i >= s.stages)
    def _():
      plgpu.barrier_wait(barrier.at[rem(i, s.stages)])

  def step(i, block_id, hits):
    slot = rem(i, s.stages)
    bits = readers(hits, block_id)
    start = block_id * s.block
    span = pl.ds(pl.multiple_of(at.b * s.key_rows + start, s.block), s.block)
    when_free(to.k_free, i)
    to.steps[slot, 0] = block_id
    to.steps[slot, 1] = bits
    # This arrives on the barrier, too: whoever waits for the keys sees the
    # step.
    plgpu.copy_gmem_to_smem(
      x.k.at[span, at.h], to.k.at[slot], to.k_ready.at[slot]
    )
    # The steps that ended earlier pieces had no values.
    when_free(to.v_free, i - n)
    v_slot = rem(i - n, s.stages)

    def values(ref, span):
      plgpu.copy_gmem_to_smem(
        ref.at[span, at.h], to.v.at[v_slot], to.v_ready.at[v_slot]
      )

    if s.tail:
      at_end = block_id == x.last[at.b]
      tail = pl.ds(pl.multiple_of(at.b * s.block, s.block), s.block)
      pl.when(at_end)(lambda: values(x.v_tail, tail))
      pl.when(~at_end)(lambda: values(x.v, span))
    else:
      values(x.v, span)

  i = walk_union(x.ids, s.num_ids, rows, own, i, step, lowest)
  slot = rem(i, s.stages)
  when_free(to.k_free, i)
  to.steps[slot, 0] = jnp.int32(-1)
  plgpu.barrier_arrive(to.k_ready.at[slot])
  return i + 1


def _compute(
  s: Sizes,
  x: _Inputs,
  out_ref: Any,  # [B * T * K, G, V]
  lse_ref: Any,  # [B * K, pieces * workers * 64]
  to: _Buffers,
  worker: Any,
  scale: float,
  interpret: bool,
):
  """A computing warpgroup."""
  if not interpret:
    plgpu.set_max_registers(_registers(s)[1], action="increase")

  def load_queries(n):
    at = _piece(s, x, n)
    for j in range(s.per_worker):
      plgpu.copy_gmem_to_smem(
        x.q.at[_row(s, at, worker * s.per_worker + j)],
        to.q.at[worker, pl.ds(j * s.stride, s.group)],
        to.q_ready.at[worker],
      )

  def next_queries(n):
    pl.when(n + 1 < _num_pieces(s))(lambda: load_queries(n + 1))

  load_queries(0)
  compute = functools.partial(
    _compute_piece,
    s,
    x,
    out_ref,
    lse_ref,
    to,
    worker,
    scale,
    interpret,
    next_queries,
  )
  _each_piece(s, x, compute)
  plgpu.wait_smem_to_gmem(0)


def _compute_piece(
  s: Sizes,
  x: _Inputs,
  out_ref: Any,
  lse_ref: Any,
  to: _Buffers,
  worker: Any,
  scale: float,
  interpret: bool,
  next_queries: Callable[[Any], None],
  n: Any,
  i: Any,
  at: _Piece,
) -> Any:
  """Attention of 64 rows of a piece; arguments as in `_each_piece`."""
  dtype = x.q.dtype
  layout = plgpu.Layout.WGMMA
  q = to.q.at[worker]
  mine = worker * s.per_worker  # Its first query in the piece.

  def vector(fill):
    return plgpu.layout_cast(
      jnp.full((ROWS,), fill, jnp.float32), layout.reduce(1)
    )

  def wide(y, width):
    return lax.broadcast_in_dim(y, (ROWS, width), [0])

  tile = ROWS, s.block
  row = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=layout)
  query = row >> (s.stride.bit_length() - 1)
  column = plgpu.broadcasted_iota(jnp.int32, tile, 1, layout=layout)
  position = at.position + mine
  everybody = 2**s.per_worker - 1

  def look(i):
    """Waits for the keys of a step; its block and the bits of queries."""
    slot = rem(i, s.stages)
    plgpu.barrier_wait(to.k_ready.at[slot])
    return to.steps[slot, 0], to.steps[slot, 1]

  def scores(slot):
    def run(acc):
      plgpu.wgmma(acc, q, to.k.at[slot].T)
      return acc[...]

    return pl.run_scoped(run, plgpu.ACC(tile, jnp.float32))

  def of_readers(y, readers):
    """Scores, -inf for queries that did not choose the block."""
    return jnp.where(((readers >> query) & 1) == 1, y, -jnp.inf)

  def of_readable(y, block_id, bits):
    """Scores, -inf for keys that a query may not read."""
    start = block_id * s.block
    y = jnp.where(column + start <= query + position, y, -jnp.inf)
    if not s.segments:
      return y

    def same_segment(y):
      span = pl.ds(at.b * s.key_rows + start, s.block)
      keys = _plgpu.load(
        x.key_segments.at[span], layout=layout.reduce(0), optimized=False
      )
      of_query = query * 0 - 1
      for j in range(s.per_worker):
        own = x.query_segments[at.b * s.length + _query(s, at, mine + j)]
        of_query = jnp.where(query == j, own, of_query)
      same = lax.broadcast_in_dim(keys, tile, [1]) == of_query
      return jnp.where(same, y, -jnp.inf)

    return lax.cond(bits >= _MIXED, same_segment, lambda y: y, y)

  def times_values(acc, p, slot):
    """acc + P V."""

    def run(ref):
      if interpret:  # It takes operands from shared memory only.
        plgpu.wgmma(ref, to.p.at[worker], to.v.at[slot])
        return ref[...]
      plgpu.wgmma(ref, p, to.v.at[slot])

    if interpret:
      to.p[worker] = p
      plgpu.commit_smem()
      start = plgpu.ACC((ROWS, s.value_dim), jnp.float32)
      return acc + pl.run_scoped(run, start)
    return pl.run_state(run)(plgpu.ACC.init(acc))

  def attend(slot, v_slot, block_id, bits, readers, state):
    acc, m_i, l_i = state
    y = scores(slot)
    plgpu.barrier_arrive(to.k_free.at[slot])
    # Few blocks need the second mask, and many the first one, which takes
    # fewer instructions.
    y = lax.cond(
      readers != everybody,
      lambda y: of_readers(y, readers),
      lambda y: y,
      y,
    )
    later = (block_id + 1) * s.block - 1 > position
    y = lax.cond(
      later | (bits >= _MIXED),
      lambda y: of_readable(y, block_id, bits),
      lambda y: y,
      y,
    )
    # As everywhere, exponents are of base 2.
    m_next = jnp.maximum(m_i, y.max(axis=1) * (scale * LOG2E))
    correction = jnp.exp2(m_i - m_next)
    p = jnp.exp2(y * (scale * LOG2E) - wide(m_next, s.block))
    l_next = l_i * correction + p.sum(axis=1)
    acc = acc * wide(correction, s.value_dim)
    p = p.astype(dtype)
    plgpu.barrier_wait(to.v_ready.at[v_slot])
    acc = times_values(acc, p, v_slot)
    plgpu.barrier_arrive(to.v_free.at[v_slot])
    return acc, m_next, l_next

  def skip(slot, v_slot, state):
    plgpu.barrier_arrive(to.k_free.at[slot])
    plgpu.barrier_wait(to.v_ready.at[v_slot])
    plgpu.barrier_arrive(to.v_free.at[v_slot])
    return state

  def step(carry):
    i, block_id, bits, *state = carry
    slot, v_slot = rem(i, s.stages), rem(i - n, s.stages)
    readers = (bits >> mine) & everybody
    state = lax.cond(
      readers != 0,
      lambda *state: attend(slot, v_slot, block_id, bits, readers, state),
      lambda *state: skip(slot, v_slot, state),
      *state,
    )
    return i + 1, *look(i + 1), *state

  plgpu.barrier_wait(to.q_ready.at[worker])
  acc = plgpu.layout_cast(jnp.zeros((ROWS, s.value_dim), jnp.float32), layout)
  i, _, _, acc, m_i, l_i = lax.while_loop(
    lambda carry: carry[1] >= 0,
    step,
    (i, *look(i), acc, vector(_MAX_INIT), vector(0)),
  )
  plgpu.barrier_arrive(to.k_free.at[rem(i, s.stages)])

  some = l_i != 0
  total = jnp.where(some, l_i, 1.0)
  lse = jnp.where(some, m_i * (1 / LOG2E) + jnp.log(total), -jnp.inf)
  out = q
  if to.out is not None:
    next_queries(n)
    out = to.out.at[worker]
  # The output and lse of the previous piece have left.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  # A query that reads nothing gets 0, whatever its neighbours have read.
  kept = wide(some.astype(jnp.float32), s.value_dim) > 0
  values = jnp.where(kept, acc / wide(total, s.value_dim), 0)
  out[...] = values.astype(dtype)
  to.lse[worker] = lse
  plgpu.commit_smem()
  for j in range(s.per_worker):

    def store(j=j):
      plgpu.copy_smem_to_gmem(
        out.at[pl.ds(j * s.stride, s.group)], out_ref.at[_row(s, at, mine + j)]
      )

    if s.length % s.per_piece:
      pl.when(at.first + mine + j < s.length)(store)
    else:
      store()
  column_of_lse = (at.first + mine) * s.stride
  plgpu.copy_smem_to_gmem(
    to.lse.at[worker],
    lse_ref.at[
      at.b * s.kv_heads + at.h,
      pl.ds(pl.multiple_of(column_of_lse, ROWS), ROWS),
    ],
  )
  if to.out is None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    next_queries(n)
  return i + 1


def _registers(s: Sizes) -> tuple[int, int]:
  """Registers per thread of the loading and of a computing warpgroup.

  The loading one holds a place and an entry of every list, unless each lane has
  one. Together they must not take more than the program starts with: they would
  wait for ever.
  """
  warpgroups = s.workers + 1
  total = 2**16 // 128 // warpgroups // 8 * 8 * warpgroups
  loading = 32
  if not s.lanes:
    loading = 40 + 8 * pl.cdiv(s.per_piece, 3 if s.workers == 3 else 2)
  computing = (total - loading) // s.workers // 8 * 8
  return total - s.workers * computing, computing


def _kernel(s: Sizes, dtype: Any, scale: float, interpret: bool) -> Any:
  """The kernel as a function of the arrays of `_Inputs` that are not None.

  It returns out [B * T * K, G, V] and lse [B * K, pieces * workers * 64].
  """

  def body(*refs):
    given = [True] * 5 + [s.tail] * 2 + [s.segments] * 4
    rest = iter(refs)
    x = _Inputs(*(next(rest) if some else None for some in given))
    out_ref, lse_ref, *buffers = rest
    to = _Buffers(*buffers)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == s.workers)(lambda: _load(s, x, to, interpret))
    pl.when(warpgroup < s.workers)(
      lambda: _compute(s, x, out_ref, lse_ref, to, warpgroup, scale, interpret)
    )

  smem, barrier = plgpu.SMEM, plgpu.Barrier
  per_stage = functools.partial(barrier, num_barriers=s.stages)
  scratch = _Buffers(
    q=smem((s.workers, ROWS, s.head_dim), dtype),
    k=smem((s.stages, s.block, s.head_dim), dtype),
    v=smem((s.stages, s.block, s.value_dim), dtype),
    steps=smem((s.stages, 2), jnp.int32),
    out=None if s.in_place else smem((s.workers, ROWS, s.value_dim), dtype),
    lse=smem((s.workers, ROWS), jnp.float32),
    p=smem((s.workers, ROWS, s.block), dtype) if interpret else None,
    q_ready=barrier(num_arrivals=s.per_worker, num_barriers=s.workers),
    k_ready=per_stage(),
    v_ready=per_stage(),
    k_free=per_stage(num_arrivals=s.workers),
    v_free=per_stage(num_arrivals=s.workers),
  )
  rows, heads = s.batch * s.length * s.kv_heads, s.batch * s.kv_heads
  results = [
    jax.ShapeDtypeStruct((rows, s.group, s.value_dim), dtype),
    jax.ShapeDtypeStruct((heads, s.pieces * s.workers * ROWS), jnp.float32),
  ]
  run = plgpu.kernel(
    body,
    out_type=results,
    grid=(s.programs,),
    scratch_types=list(scratch),
    **options("nsa_selected_fwd", s.workers + 1, interpret, auto_barriers=True),
  )
  return functools.partial(interpreted, run, results) if interpret else run


def _values(
  value: jax.Array, queries: Queries, length: int, key_length: int, block: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """Values whose unreadable tokens, in blocks that are read, are 0.

  The weight of a key that a query does not read is 0, and 0 * NaN is NaN. What
  no query may read must therefore be finite: padding, here 0 in a copy of the
  values, and tokens after the last query. These share a block with tokens that
  are read only in the block of the last query, which alone is copied.

  Args:
    value: [B, S, K, V], S padded to whole blocks.
    queries: queries of the call.
    length: T.
    key_length: S before padding.
    block: l'.

  Returns:
    The values; the last block that is read, int32 [B], and its values
    [B, l', K, V], or None twice if no token of it is after the last query.
  """
  if queries.key_segments is not None:
    padding = value.shape[1] - key_length
    segments = jnp.pad(queries.key_segments, [(0, 0), (0, padding)])
    value = jnp.where(segments[:, :, None, None] > 0, value, 0)
  if isinstance(queries.offset, int):
    end = queries.offset + length  # Tokens from here on are not read.
    if end >= key_length or end % block == 0:
      return value, None, None
  batch = len(value)
  last_token = per_row(queries.offset, batch) + (length - 1)
  last = jnp.clip(last_token, 0, key_length - 1) // block
  token = last[:, None] * block + jnp.arange(block, dtype=jnp.int32)
  tail = jnp.take_along_axis(value, token[:, :, None, None], axis=1)
  read = token <= last_token[:, None]
  return value, last, jnp.where(read[:, :, None, None], tail, 0)


def _segments(queries: Queries, key_rows: int, block: int) -> list[jax.Array]:
  """Segments of queries and keys, lowest and highest of each block."""
  segments = segment_pair(queries.key_segments, queries.query_segments)
  if not segments:
    return []
  keys, of_queries = segments
  keys = jnp.pad(keys, [(0, 0), (0, key_rows - keys.shape[1])])
  blocks = keys.reshape(len(keys), -1, block)
  parts = of_queries, keys, blocks.min(axis=-1), blocks.max(axis=-1)
  return [x.astype(jnp.int32).reshape(-1) for x in parts]


def forward(
  spec: Spec,
  tile: UnionTile,
  qkv: tuple[jax.Array, ...],
  index: tuple[jax.Array, Queries],
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, N, V] and lse [B, T, N] (float32) of the selected branch.

  Args:
    spec: static arguments of the call.
    tile: tile sizes.
    qkv: query [B, T, N, H], key [B, S, K, H], value [B, S, K, V].
    index: block ids and queries.
  """
  query, key, value = qkv
  block_ids, queries = index
  batch, length, heads, head_dim = query.shape
  kv_heads, value_dim = value.shape[2:]
  group = heads // kv_heads
  block = spec.config.selection_block
  key_rows = pl.cdiv(spec.key_length, block) * block

  def whole_blocks(x):
    rows = key_rows - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, rows), (0, 0), (0, 0)]) if rows else x

  value, last, tail = _values(
    whole_blocks(value), queries, length, spec.key_length, block
  )
  segments = _segments(queries, key_rows, block)
  arrays = [
    per_row(queries.offset, batch),
    block_ids.reshape(-1),
    query.reshape(-1, group, head_dim),
    whole_blocks(key).reshape(-1, kv_heads, head_dim),
    value.reshape(-1, kv_heads, value_dim),
  ]
  if last is not None and tail is not None:
    arrays += [last, tail.reshape(-1, kv_heads, value_dim)]
  in_place = union_in_place(tile, head_dim, value_dim, block)
  sizes = Sizes(
    batch=batch,
    length=length,
    kv_heads=kv_heads,
    group=group,
    head_dim=head_dim,
    value_dim=value_dim,
    key_length=spec.key_length,
    key_rows=key_rows,
    num_ids=block_ids.shape[-1],
    block=block,
    workers=tile.workers,
    stages=tile.num_stages,
    programs=0,
    lanes=not spec.interpret,
    in_place=in_place,
    tail=last is not None,
    segments=bool(segments),
  )
  most = tile.blocks or support.multiprocessors()
  sizes = sizes._replace(programs=min(most, sizes.total))
  run = _kernel(sizes, query.dtype, spec.scale, spec.interpret)
  out, lse = run(*arrays, *segments)
  rows = sizes.pieces * sizes.per_piece
  lse = lse.reshape(batch, kv_heads, rows, sizes.stride)
  lse = lse[:, :, :length, :group].swapaxes(1, 2)
  return (
    out.reshape(batch, length, heads, value_dim),
    lse.reshape(batch, length, heads),
  )
