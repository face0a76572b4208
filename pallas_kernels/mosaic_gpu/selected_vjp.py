"""Attention over selected blocks, backward.

Five products, as on Triton: dk and dv with ds, the gradients of the scores,
which the first kernel stores for every pair of a query and a block that it
chose; then dq as a product with ds.

dk, dv: the keys of a block stay in shared memory, dk and dv in registers, and
the queries that chose the block stream past them, in steps of 64 rows: a few
queries with all heads of a group, gathered one by one. A program has two
tracks, each a warp that loads and a warpgroup that computes, which have pieces
of lists of their own: while one track changes its block or waits for its
products, the other one has the tensor cores. Of wide heads, dk and dv do not
fit in the registers of one warpgroup: there a program has one track, of which
one warpgroup computes dv and another one dk and ds.

A list is as long as the queries are many, and two lists share few queries. So
lists are cut into short pieces, and pieces of queries near each other are done
at the same time: what they read is then in L2. Shorter pieces read less from
memory, but store more sums.

dq: a program takes neighbouring queries, two warpgroups of 64 rows, and loads
the keys of a block once for all of them. Queries that did not choose it have
zeros in place of ds. A step is short, and to merge the lists of the queries
takes longer. So their unions are made before the kernel, for all tiles at once.
A warp loads the keys, and one for each warpgroup its ds.

Queries are processed in chunks, which bounds the memory of ds. There are no
atomics, so every run gives the same bits. A NaN in a key or a value may reach
dq of all queries that chose its block, and of their neighbours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.checks import group_of
from pallas_kernels.gradients import delta_of, keep_finite
from pallas_kernels.integers import ceil_div, div, rem
from pallas_kernels.interface import Queries, Spec, per_row, segment_pair
from pallas_kernels.inverse_lists import sort_items, take
from pallas_kernels.mosaic_gpu import gradient_steps, selected_lanes, support
from pallas_kernels.mosaic_gpu.common import LOG2E, drain, options
from pallas_kernels.mosaic_gpu.gradient_steps import EMPTY
from pallas_kernels.mosaic_gpu.interpreter import interpreted
from pallas_kernels.mosaic_gpu.selected_lists import (
  COUNT_BITS,
  UnionLists,
  union_lists,
)
from pallas_kernels.mosaic_gpu.tiling import (
  ROWS,
  WORKERS,
  SelectedGradientTile,
  selected_tracks,
)
from pallas_kernels.query_chunks import (
  Chunk,
  Chunking,
  Piece,
  by_head,
  finish_gradient,
  first_rows,
  ids_of_rows,
  make_chunk,
  make_chunking,
  piece_of,
  zero_gradient,
)
from pallas_kernels.triton.list_pieces import add_pieces

plgpu: Any = mosaic_gpu
# Registers per thread: what the loading warpgroup gives up the others take.
# They need all of it for dk, dv, and the two tiles of scores.
_LOAD_REGISTERS = 24
_COMPUTE_REGISTERS = 240

# A pair that is outside ds, also where mapped calls have theirs in one array: a
# copy of it brings zeros and reads nothing.
_NOWHERE = 2**30


class Inputs(NamedTuple):
  """Arrays that the kernels read."""

  offset: jax.Array  # int32 [B], position of query 0
  query: jax.Array  # [B, T, K, G, H]
  dout: jax.Array  # [B, T, K, G, V]
  stats: jax.Array  # [B K, T, 2 G]: lse (base 2) and delta
  key: jax.Array  # [B, M, l', K, H]
  value: jax.Array  # [B, M, l', K, V]
  segments: tuple[jax.Array, ...]  # () or of keys [B, M l'] and queries [B, T]


class Schedule(NamedTuple):
  """Static sizes of a call.

  Attributes:
    chunking: how the queries are split into chunks.
    tile: tile sizes.
    scale: softmax scale.
    interpret: run the kernels in the interpreter.
    length: T.
    group: G.
    widths: H, V.
    tracks: pieces that a program does at the same time, 2 or 1.
    num_pieces: pieces of a chunk, some of which may be empty.
    programs: programs of the dk, dv kernel.
  """

  chunking: Chunking
  tile: SelectedGradientTile
  scale: float
  interpret: bool
  length: int
  group: int
  widths: tuple[int, int]
  tracks: int
  num_pieces: int
  programs: int

  @property
  def step_queries(self) -> int:
    """Queries per step."""
    return ROWS // self.group


def make_schedule(
  spec: Spec,
  tile: SelectedGradientTile,
  qkv: tuple[jax.Array, ...],
  block_ids: jax.Array,
) -> Schedule:
  """Chooses the chunks and programs for a shape; arguments as in `backward`."""
  query, key, value = qkv
  widths = key.shape[-1], value.shape[-1]
  group = group_of(query, key)
  chunking = make_chunking(
    block_ids,
    pair_bytes=ROWS * group * query.dtype.itemsize,
    key_length=key.shape[1],
    block=ROWS,
    scratch=tile.scratch,
  )
  tracks = selected_tracks(*widths)
  # As `invert` makes them: at most one piece per list is incomplete.
  owners = chunking.heads * chunking.num_blocks
  num_pieces = -(-chunking.num_pairs // tile.piece) + owners
  most = tile.blocks or support.multiprocessors()
  return Schedule(
    chunking,
    tile,
    spec.scale,
    spec.interpret,
    query.shape[1],
    group,
    widths,
    tracks,
    num_pieces,
    min(most, -(-num_pieces // tracks)),
  )


def backward(
  spec: Spec,
  tile: SelectedGradientTile,
  qkv: tuple[jax.Array, ...],
  index: tuple[jax.Array, Queries],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, ...]:
  """Gradients of query, key and value, in their dtypes.

  Args:
    spec: static arguments of the call; blocks of 64, G divides 64.
    tile: tile sizes.
    qkv: query [B, T, N, H], key [B, S, K, H], value [B, S, K, V].
    index: block ids and queries.
    out: [B, T, N, V], from the forward pass.
    lse: [B, T, N], from the forward pass.
    dout: [B, T, N, V], cotangent of `out`.
    dlse: float32 [B, T, N], cotangent of `lse`.
  """
  query, key, value = qkv
  schedule = make_schedule(spec, tile, qkv, index[0])
  inputs = prepare(schedule, qkv, index[1], out, lse, dout, dlse)
  row_ids = ids_of_rows(index[0], schedule.chunking)
  run: Any = functools.partial(gradients, schedule)
  if spec.interpret:
    totals = [zero_gradient(x, schedule.chunking) for x in (key, value)]
    results = [
      jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.query, *totals)
    ]
    run = functools.partial(interpreted, run, results)
  dq, *totals = run(row_ids, *inputs[:-1], *inputs.segments)
  dq = dq.reshape(query.shape)

  dk, dv = map(finish_gradient, totals, (key, value))
  return dq, dk, dv


def prepare(
  schedule: Schedule,
  qkv: tuple[jax.Array, ...],
  queries: Queries,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> Inputs:
  """What the kernels read; the arguments are those of `backward`."""
  query, key, value = qkv
  batch, length = query.shape[:2]
  chunking = schedule.chunking
  key_length = key.shape[1]
  more_keys = chunking.num_blocks * ROWS - key_length
  segments = segment_pair(queries.key_segments, queries.query_segments)
  offset = queries.offset
  if segments or not isinstance(offset, int) or offset + length < key_length:
    # What no query reads shares blocks with what is read. Its weights are 0,
    # and 0 * NaN is NaN.
    last = per_row(offset, batch)[:, None] + (length - 1)
    read = jnp.arange(key_length, dtype=jnp.int32) <= last
    if segments:
      read &= segments[0] > 0
    key, value = (jnp.where(read[:, :, None, None], x, 0) for x in (key, value))

  def whole_blocks(x: jax.Array) -> jax.Array:
    width = [(0, 0), (0, more_keys)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, width) if more_keys else x

  delta = keep_finite(delta_of(out, dout, dlse), lse)
  # Fused with the concatenation below, the sum over V would be slow.
  delta = jax.lax.optimization_barrier(delta)
  lse = jnp.where(lse == -jnp.inf, EMPTY, lse * LOG2E)

  def by_group(x: jax.Array) -> jax.Array:
    shape = batch, length, chunking.kv_heads, schedule.group
    return x.reshape(*shape, *x.shape[3:])

  def by_block(x: jax.Array) -> jax.Array:
    x = whole_blocks(x)
    return x.reshape(batch, -1, ROWS, *x.shape[2:])

  stats = jnp.concatenate([by_group(lse), by_group(delta)], axis=-1)
  if segments:
    segments = whole_blocks(segments[0]), segments[1]
  return Inputs(
    per_row(queries.offset, batch),
    by_group(query),
    by_group(dout),
    by_head(stats, length),
    by_block(key),
    by_block(value),
    segments,
  )


def gradients(
  schedule: Schedule, row_ids: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq [B, T, K, G, H], and dk and dv as of `add_pieces`.

  Args:
    schedule: the schedule.
    row_ids: int32 [B K T', n], from `ids_of_rows`.
    *arrays: the fields of `Inputs`, `segments` last and flat.
  """
  fields: Any = (*arrays[:6], arrays[6:])
  inputs = Inputs(*fields)
  chunking, tile = schedule.chunking, schedule.tile
  starts = first_rows(row_ids, chunking)
  several = len(starts) > 1
  dq_ref = None
  if several:
    # Chunks write their queries in place, and all queries are in one.
    dq_ref = jax.new_ref(lax.empty(inputs.query.shape, inputs.query.dtype))

  def step(first_row: jax.Array, totals: Sequence[jax.Array]) -> Any:
    chunk = make_chunk(first_row, row_ids, inputs.offset, chunking, tile.piece)
    *partial, ds = key_value_gradient(schedule, chunk, inputs)
    dq = query_gradient(schedule, chunk, inputs, ds, dq_ref)
    totals = [
      add_pieces(*x, chunk, chunking, interpret=schedule.interpret)
      for x in zip(totals, partial, strict=True)
    ]
    return dq, totals

  totals: Any = [
    zero_gradient(x[:, 0], chunking) for x in (inputs.key, inputs.value)
  ]
  if dq_ref is None:
    dq, totals = step(starts[0], totals)
  else:
    # A first chunk outside the loop would get a second buffer for ds.
    totals, _ = lax.scan(
      lambda totals, first_row: (step(first_row, totals)[1], None),
      totals,
      starts,
    )
    dq = dq_ref[...]
  return dq, *totals


# ---------------------------------------------------------------------- dk, dv


def work_of(schedule: Schedule, chunk: Chunk) -> jax.Array:
  """The pieces of a chunk in the order in which programs take them.

  Pieces with their middle in the same range of queries come one after the
  other, of each range the longest first, so that tracks finish at the same
  time. Empty ones are last.

  Returns:
    Flat int32 [P, 4]: owner, first and last (exclusive) item, and number of the
    piece.
  """
  chunking, piece = schedule.chunking, schedule.tile.piece
  owner, first, last = chunk.lists.pieces.T
  middle = take(chunk.lists.items, div(first + last, 2))
  query = div(middle, chunking.num_ids)
  ranges = -(-chunking.queries // schedule.tile.near)
  place = div(query, schedule.tile.near)
  place += div(owner, chunking.num_blocks) * ranges
  rank = place * piece + (piece - (last - first))
  ranks = chunking.heads * ranges * piece
  number = jnp.arange(len(owner), dtype=jnp.int32)
  _, order = sort_items(
    jnp.where(last > first, rank, ranks), number, ranks, len(owner)
  )
  columns = [take(x, order) for x in (owner, first, last)]
  return jnp.stack([*columns, order], axis=1).reshape(-1)


class Refs(NamedTuple):
  """Arrays in global memory, and what is in shared memory (`*_s`).

  L is `tracks`; a track has a ring of D = `num_stages` steps. Slot d of track l
  is number l D + d.
  """

  first_row: Any  # [1]
  work: Any  # [P * 4], from `work_of`
  items: Any  # [n]
  offset: Any  # [B]
  q: Any  # [B, T, K, G, H]
  dout: Any  # [B, T, K, G, V]
  stats: Any  # [B K, T, 2 G]
  k: Any  # [B, M, l', K, H]
  v: Any  # [B, M, l', K, V]
  key_segments: Any  # [B, M l'] or None
  query_segments: Any  # [B, T] or None
  dk: Any  # [P, l', H], float32
  dv: Any  # [P, l', V], float32
  ds: Any  # [pairs, G, l']
  k_s: Any  # [L, l', H]
  v_s: Any  # [L, l', V]
  q_s: Any  # [L D, ROWS, H]
  dout_s: Any  # [L D, ROWS, V]
  stats_s: Any  # [L D, 2 ROWS]: lse and delta of a query, then the next one's
  items_s: Any  # [L D, step queries]
  segments_s: Any  # [L D, step queries] or None
  ds_s: Any  # [L, ROWS, l']
  p_s: Any  # [WORKERS, l', ROWS], interpreted only
  keys_ready: Any  # [L] barriers: the keys and values of a piece are loaded
  keys_free: Any  # [L] barriers: they are read
  ready: Any  # [L D] barriers: a step is loaded
  free: Any  # [L D] barriers: a step is read


def _dkv_kernel(
  *arrays: Any, schedule: Schedule, segmented: bool, **scratch: Any
) -> None:
  """The kernel of dk, dv and ds; the arrays are in the order of `Refs`.

  Args:
    *arrays: those in global memory.
    schedule: the schedule.
    segmented: segments are among them.
    **scratch: what is in shared memory.
  """
  inputs, results = arrays[:-3], arrays[-3:]
  segments = () if segmented else (None, None)
  absent = dict.fromkeys(("segments_s", "p_s"))
  refs = Refs(*inputs, *segments, *results, **(absent | scratch))
  warpgroup = lax.axis_index("warpgroup")

  @pl.when(warpgroup == WORKERS)
  def _() -> None:
    if not schedule.interpret:
      plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

    @plgpu.warp_map
    def _(track: Any) -> None:
      pl.when(track < schedule.tracks)(
        lambda: _load_track(schedule, refs, track)
      )

  def run(worker: int, track: int, *names: str) -> None:
    """Computes the named gradients of the pieces of a track."""

    @pl.when(warpgroup == worker)
    def _() -> None:
      if not schedule.interpret:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
      _each_piece(
        schedule,
        refs,
        track,
        functools.partial(_compute_piece, schedule, refs, worker, track, names),
      )
      plgpu.wait_smem_to_gmem(0)

  if schedule.tracks == 1:
    run(0, 0, "dv")
    run(1, 0, "dk")
  else:
    run(0, 0, "dk", "dv")
    run(1, 1, "dk", "dv")


def _load_track(schedule: Schedule, refs: Refs, track: Any) -> None:
  """The loading warp of a track."""
  end = _each_piece(
    schedule, refs, track, functools.partial(_load_piece, schedule, refs, track)
  )
  if schedule.interpret:
    stages = schedule.tile.num_stages
    drain(refs.free, stages, end, track * stages)
    pl.when(end > 0)(lambda: plgpu.barrier_wait(refs.keys_free.at[track]))


def _each_piece(
  schedule: Schedule,
  refs: Refs,
  track: Any,
  run: Callable[[Any, Any, Piece, Any], None],
) -> Any:
  """Calls run(i, n, piece, count) for the pieces of a track that are not empty.

  Args:
    schedule: the schedule.
    refs: arrays in global memory.
    track: number of the track.
    run: takes the number of steps before the piece, the number of the piece,
      the piece, and the number of its steps.

  Returns:
    The number of steps of all.
  """
  program = lax.axis_index("program")
  at_once = schedule.programs * schedule.tracks

  def one(n: Any, i: Any) -> Any:
    n = n * at_once + program * schedule.tracks + track
    row = [
      refs.work[jnp.minimum(n, schedule.num_pieces - 1) * 4 + x]
      for x in range(4)
    ]
    owner, first, last, number = row
    piece = piece_of(
      owner,
      first,
      last,
      refs.first_row[0],
      refs.offset,
      schedule.chunking,
    )
    count = ceil_div(last - first, schedule.step_queries)
    count = jnp.where(n < schedule.num_pieces, count, 0)
    pl.when(count > 0)(lambda: run(i, number, piece, count))
    return i + count

  rounds = -(-schedule.num_pieces // at_once)
  return lax.fori_loop(0, rounds, one, jnp.int32(0))


def _slot(schedule: Schedule, track: Any, i: Any) -> Any:
  """Slot of the i-th step of a track."""
  stages = schedule.tile.num_stages
  return track * stages + rem(i, stages)


def _rows_of(schedule: Schedule, x: int, size: int = 1) -> Any:
  """Slice of `size` numbers per row of the x-th query of a step."""
  return pl.ds(x * schedule.group * size, schedule.group * size)


def _load_piece(
  schedule: Schedule,
  refs: Refs,
  track: Any,
  i: Any,
  number: Any,
  piece: Piece,
  count: Any,
) -> None:
  """Loads a block and the steps that stream past it."""
  del number
  b, h = piece.batch, piece.head - piece.batch * schedule.chunking.kv_heads

  def items_of(n: Any) -> tuple[Any, ...]:
    """Items of a step; after the last one, the last one's."""
    at = [piece.first + n * schedule.step_queries]
    at += [at[0] + x for x in range(1, schedule.step_queries)]
    return tuple(refs.items[jnp.minimum(x, piece.last - 1)] for x in at)

  items = items_of(jnp.int32(0))
  pl.when(i > 0)(lambda: plgpu.barrier_wait(refs.keys_free.at[track]))
  block = div(piece.start_k, ROWS)
  for source, target in ((refs.k, refs.k_s), (refs.v, refs.v_s)):
    plgpu.copy_gmem_to_smem(
      source.at[b, block, :, h], target.at[track], refs.keys_ready.at[track]
    )

  def load(n: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    slot = _slot(schedule, track, i + n)
    # These loads are under way while the step is waited for and loaded.
    following = items_of(n + 1)

    @pl.when(i + n >= schedule.tile.num_stages)
    def _() -> None:
      plgpu.barrier_wait(refs.free.at[slot])

    queries = [
      piece.first_query + div(item, schedule.chunking.num_ids) for item in items
    ]
    # Whoever waits for the copies sees these, too, since all threads arrive.
    for x, (item, t) in enumerate(zip(items, queries, strict=True)):
      refs.items_s[slot, x] = item
      if refs.segments_s is not None:
        refs.segments_s[slot, x] = refs.query_segments[b, t]
    for x, t in enumerate(queries):
      rows = _rows_of(schedule, x)
      for source, target in ((refs.q, refs.q_s), (refs.dout, refs.dout_s)):
        plgpu.copy_gmem_to_smem(
          source.at[b, t, h], target.at[slot, rows], refs.ready.at[slot]
        )
      # Without its bounds checked, any 16 bytes may be the place of a copy.
      plgpu.copy_gmem_to_smem(
        refs.stats.at[piece.head, t],
        refs.stats_s.at[slot, _rows_of(schedule, x, 2)],
        refs.ready.at[slot],
        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
      )
    return following

  lax.fori_loop(0, count, load, items)


def _compute_piece(
  schedule: Schedule,
  refs: Refs,
  worker: int,
  track: int,
  names: tuple[str, ...],
  i: Any,
  number: Any,
  piece: Piece,
  count: Any,
) -> None:
  """Computes and stores dk, dv, or both, of a piece; with dk ds, too.

  Args:
    schedule: the schedule.
    refs: arrays and shared memory.
    worker: number of the warpgroup.
    track: its track.
    names: "dk", "dv".
    i: steps of the track before this piece.
    number: number of the piece.
    piece: the piece.
    count: number of its steps.
  """
  per_step, num_ids = schedule.step_queries, schedule.chunking.num_ids
  sums = {"dk": refs.dk, "dv": refs.dv}
  # Only the first queries of a list read a part of the block.
  t = piece.offset + piece.first_query + div(refs.items[piece.first], num_ids)
  whole = t >= piece.start_k + (ROWS - 1)
  # Steps of which every query reads every key.
  full = jnp.where(whole, div(piece.last - piece.first, per_step), 0)
  if refs.key_segments is not None:
    full = jnp.int32(0)
  plgpu.barrier_wait(refs.keys_ready.at[track])

  def walk(*accs: Any) -> list[Any]:
    def step(n: Any, _: Any, masked: bool) -> Any:
      _compute_step(
        schedule,
        refs,
        worker,
        track,
        dict(zip(names, accs, strict=True)),
        piece,
        n,
        _slot(schedule, track, i + n),
        masked,
      )
      return ()

    lax.fori_loop(0, full, functools.partial(step, masked=False), ())
    lax.fori_loop(full, count, functools.partial(step, masked=True), ())
    return [acc[...] for acc in accs]

  accs = [plgpu.ACC((ROWS, sums[x].shape[-1]), jnp.float32) for x in names]
  grads = pl.run_scoped(walk, *accs)
  # The next block loads while these are stored.
  plgpu.barrier_arrive(refs.keys_free.at[track])
  for name, x in zip(names, grads, strict=True):
    sums[name][number] = x * schedule.scale if name == "dk" else x


def _compute_step(
  schedule: Schedule,
  refs: Refs,
  worker: int,
  track: int,
  accs: dict[str, Any],
  piece: Piece,
  n: Any,
  slot: Any,
  masked: bool,
) -> None:
  """Step n of a piece; `accs` as in `gradient_steps.add_step`."""
  layout, shape = plgpu.Layout.WGMMA, (ROWS, ROWS)
  group, per_step = schedule.group, schedule.step_queries
  num_ids = schedule.chunking.num_ids
  first = piece.first + n * per_step

  def stats(which: int) -> Any:
    vectors = [
      gradient_steps.load_rows(
        refs.stats_s.at[slot, pl.ds((2 * x + which) * group, group)]
      )
      for x in range(per_step)
    ]
    vector = jnp.concatenate(vectors) if per_step > 1 else vectors[0]
    return gradient_steps.of_rows(vector)

  def readable() -> Any:
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    query = row >> (group.bit_length() - 1)

    def of_queries(values: Sequence[Any]) -> Any:
      result = query * 0 + values[0]
      for x, value in enumerate(values[1:], 1):
        result = jnp.where(query == x, value, result)
      return result

    # Last readable key of the block, of each query.
    position = piece.offset + piece.first_query - piece.start_k
    last = []
    for x in range(per_step):
      t = position + div(refs.items_s[slot, x], num_ids)
      last.append(jnp.where(first + x < piece.last, t, -1))
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    mask = key <= of_queries(last)
    if refs.segments_s is not None:
      of_keys = plgpu.load(
        refs.key_segments.at[piece.batch, pl.ds(piece.start_k, ROWS)],
        layout=layout.reduce(1),
        optimized=False,
      )
      segments = [refs.segments_s[slot, x] for x in range(per_step)]
      mask &= lax.broadcast_in_dim(of_keys, shape, [0]) == of_queries(segments)
    return mask

  def store(ds: Any) -> None:
    # The stores of the step before have read the buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.ds_s.at[track].T[...] = ds
    plgpu.commit_smem()
    for x in range(per_step):

      def copy(x: int = x) -> None:
        plgpu.copy_smem_to_gmem(
          refs.ds_s.at[track, _rows_of(schedule, x)],
          refs.ds.at[piece.first_pair + refs.items_s[slot, x]],
        )

      if masked:
        pl.when(first + x < piece.last)(copy)
      else:
        copy()

  plgpu.barrier_wait(refs.ready.at[slot])
  gradient_steps.add_step(
    accs,
    (refs.k_s.at[track], refs.v_s.at[track]),
    (refs.q_s.at[slot], refs.dout_s.at[slot]),
    (functools.partial(stats, 0), functools.partial(stats, 1)),
    scale=schedule.scale,
    readable=readable if masked else None,
    store=store,
    buffer=refs.p_s.at[worker] if schedule.interpret else None,
  )
  if "dk" not in accs:  # Else `store` does it.
    # What was read of `stats_s` may be overwritten by copies.
    plgpu.commit_smem()
  plgpu.barrier_arrive(refs.free.at[slot])


def key_value_gradient(
  schedule: Schedule, chunk: Chunk, inputs: Inputs
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dk [P, l', H] and dv [P, l', V] of the pieces of a chunk, in float32; ds.

  ds [pairs, G, l'] is not written for pairs that are not attended to.
  """
  chunking, tracks = schedule.chunking, schedule.tracks
  dtype, widths = inputs.query.dtype, schedule.widths
  slots, per_step = tracks * schedule.tile.num_stages, schedule.step_queries
  smem, barrier = plgpu.SMEM, plgpu.Barrier
  readers = WORKERS // tracks  # warpgroups that read what a track loads
  scratch = {
    "k_s": smem((tracks, ROWS, widths[0]), dtype),
    "v_s": smem((tracks, ROWS, widths[1]), dtype),
    "q_s": smem((slots, ROWS, widths[0]), dtype),
    "dout_s": smem((slots, ROWS, widths[1]), dtype),
    "stats_s": smem((slots, 2 * ROWS), jnp.float32),
    "items_s": smem((slots, per_step), jnp.int32),
    "ds_s": smem((tracks, ROWS, ROWS), dtype),
    "keys_ready": barrier(num_arrivals=2, num_barriers=tracks),
    "keys_free": barrier(num_arrivals=readers, num_barriers=tracks),
    "ready": barrier(num_arrivals=3 * per_step, num_barriers=slots),
    "free": barrier(num_arrivals=readers, num_barriers=slots),
  }
  if inputs.segments:
    scratch["segments_s"] = smem((slots, per_step), jnp.int32)
  if schedule.interpret:
    scratch["p_s"] = smem((WORKERS, ROWS, ROWS), dtype)
  pairs = chunking.num_pairs
  sums = [(schedule.num_pieces, ROWS, width) for width in widths]
  return plgpu.kernel(
    functools.partial(
      _dkv_kernel, schedule=schedule, segmented=bool(inputs.segments)
    ),
    out_type=(
      *(jax.ShapeDtypeStruct(x, jnp.float32) for x in sums),
      jax.ShapeDtypeStruct((pairs, schedule.group, ROWS), dtype),
    ),
    grid=(schedule.programs,),
    scratch_types=scratch,
    **options("nsa_selected_dkv", WORKERS + 1, schedule.interpret),
  )(
    chunk.first_row,
    work_of(schedule, chunk),
    chunk.lists.items,
    *inputs[:-1],
    *inputs.segments,
  )


# -------------------------------------------------------------------------- dq


class DqRefs(NamedTuple):
  """Arrays in global memory, and what is in shared memory (`*_s`).

  W is `WORKERS`, D is `dq_stages`, a step is a block and its ds.
  """

  first_row: Any  # [1]
  blocks: Any  # [tiles * (E + 1)], from `union_lists`
  readers: Any  # [tiles * (E + 1)]
  counts: Any  # [tiles]
  stats: Any  # [B K, T, 2 G]
  ds: Any  # [pairs, G, l']
  k: Any  # [B, M, l', K, H]
  dq: Any  # [B, T, K, G, H]
  k_s: Any  # [D, l', H]
  ds_s: Any  # [W D, ROWS, l']
  states_s: Any  # [W D]: what a step is for a warpgroup, see below
  dq_s: Any  # [W, ROWS, H]
  k_ready: Any  # [D] barriers: the keys are loaded
  ds_ready: Any  # [W D] barriers: ds is loaded, and the state is written
  free: Any  # [D] barriers: both warpgroups have read a step


# States of a step: it ends the tile, no query of the warpgroup chose the block,
# some did.
_END, _SKIP, _MULTIPLY = range(3)


class _Tile(NamedTuple):
  """Neighbouring queries of a program of the dq kernel."""

  number: Any  # of its list
  head: Any  # b K + h
  batch: Any
  first: Any  # its first query, counted in the head's part of the chunk
  first_query: Any  # first query of that part, counted within the head
  first_row: Any  # row of that query in the chunk


def _tile_queries(schedule: Schedule) -> int:
  """Queries of a tile of the dq kernel."""
  return WORKERS * schedule.step_queries


def _num_tiles(schedule: Schedule) -> int:
  """Tiles of a head's part of a chunk."""
  return -(-schedule.chunking.queries // _tile_queries(schedule))


def tile_lists(schedule: Schedule, chunk: Chunk) -> UnionLists:
  """The blocks of the tiles of a chunk, head by head, by first query."""
  chunking, queries = schedule.chunking, _tile_queries(schedule)
  ids = jnp.where(chunk.chosen, chunk.ids, -1)
  ids = ids.reshape(chunking.heads, chunking.queries, chunking.num_ids)
  more = _num_tiles(schedule) * queries - chunking.queries
  ids = jnp.pad(ids, [(0, 0), (0, more), (0, 0)], constant_values=-1)
  return union_lists(ids.reshape(-1, queries, chunking.num_ids))


def _each_tile(
  schedule: Schedule, refs: DqRefs, run: Callable[[Any, _Tile], Any]
) -> Any:
  """Runs run(i, tile) for the tiles of this program; returns the last result.

  Args:
    schedule: the schedule.
    refs: arrays in global memory.
    run: takes the number of steps before the tile, and returns that after it.
  """
  chunking, program = schedule.chunking, lax.axis_index("program")
  tiles, queries = _num_tiles(schedule), _tile_queries(schedule)
  programs = _dq_programs(schedule)

  def one(n: Any, i: Any) -> Any:
    number = program + n * programs
    local_head = div(number, tiles)
    first_head = div(refs.first_row[0], chunking.length)
    head = first_head + local_head
    # The last queries read the most blocks, so they start first.
    place = tiles - 1 - rem(number, tiles)
    tile = _Tile(
      local_head * tiles + place,
      head,
      div(head, chunking.kv_heads),
      place * queries,
      refs.first_row[0] - first_head * chunking.length,
      local_head * chunking.queries,
    )
    return run(i, tile)

  count = div(chunking.heads * tiles - 1 - program, programs) + 1
  return lax.fori_loop(0, count, one, jnp.int32(0))


def _dq_programs(schedule: Schedule) -> int:
  most = schedule.tile.blocks or support.multiprocessors()
  return min(most, schedule.chunking.heads * _num_tiles(schedule))


def _dq_kernel(*arrays: Any, schedule: Schedule, **scratch: Any) -> None:
  """The kernel of dq; the arrays are in the order of `DqRefs`."""
  refs = DqRefs(*arrays, **scratch)
  warpgroup = lax.axis_index("warpgroup")

  @pl.when(warpgroup == WORKERS)
  def _() -> None:
    if not schedule.interpret:
      plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

    @plgpu.warp_map
    def _(warp: Any) -> None:
      pl.when(warp < WORKERS)(lambda: _load_tiles(schedule, refs, warp))
      pl.when(warp == WORKERS)(lambda: _load_tiles(schedule, refs, None))

  @pl.when(warpgroup < WORKERS)
  def _() -> None:
    if not schedule.interpret:
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    _each_tile(
      schedule,
      refs,
      functools.partial(_multiply_tile, schedule, refs, warpgroup),
    )
    plgpu.wait_smem_to_gmem(0)


def _load_tiles(schedule: Schedule, refs: DqRefs, worker: Any) -> None:
  """A loading warp: the keys of all blocks, or ds for a warpgroup.

  Args:
    schedule: the schedule.
    refs: arrays and shared memory.
    worker: number of the warpgroup; None for the keys.
  """
  if worker is None:
    load: Any = functools.partial(_load_keys, schedule, refs)
  else:
    load = functools.partial(_load_ds, schedule, refs, worker)
  end = _each_tile(schedule, refs, load)
  if schedule.interpret:
    drain(refs.free, schedule.tile.dq_stages, end)


def _each_block(
  schedule: Schedule,
  refs: DqRefs,
  i: Any,
  tile: _Tile,
  visit: Callable[[Any, Any, Any, Any], Any],
  state: Any = (),
) -> tuple[Any, Any]:
  """Runs visit(slot, block, readers, state) for the blocks of a tile.

  Args:
    schedule: the schedule.
    refs: arrays and shared memory.
    i: number of steps before the tile.
    tile: the queries.
    visit: takes a free slot and an entry of `UnionLists`, and returns the next
      state.
    state: the first state.

  Returns:
    The number of the step that ends the tile, and its slot, which is free.
  """
  size = _tile_queries(schedule) * schedule.chunking.num_ids + 1

  def wait(i: Any) -> Any:
    slot = rem(i, schedule.tile.dq_stages)

    @pl.when(i >= schedule.tile.dq_stages)
    def _() -> None:
      plgpu.barrier_wait(refs.free.at[slot])

    return slot

  def entry(at: Any) -> tuple[Any, Any]:
    return refs.blocks[at], refs.readers[at]

  def after(at: Any, readers: Any) -> Any:
    """Place of the next entry; that after the last one is its own."""
    return at + (readers >> COUNT_BITS)

  def step(n: Any, carry: Any) -> Any:
    at, now, following, state = carry
    at = after(at, following[1])
    # Not used before the next step: these loads run beside this one.
    later = entry(at)
    block, readers = now
    if not schedule.interpret:
      block, readers = map(selected_lanes.common, now)
    state = visit(wait(i + n), block, readers, state)
    return at, following, later, state

  at = tile.number * size
  count = refs.counts[tile.number]
  now = entry(at)
  at = after(at, now[1])
  lax.fori_loop(0, count, step, (at, now, entry(at), state))
  return i + count, wait(i + count)


def _load_keys(schedule: Schedule, refs: DqRefs, i: Any, tile: _Tile) -> Any:
  """Loads the blocks of a tile.

  Args:
    schedule: the schedule.
    refs: arrays and shared memory.
    i: number of steps before the tile.
    tile: the queries.

  Returns:
    The number of steps after it.
  """
  h = tile.head - tile.batch * schedule.chunking.kv_heads

  def visit(slot: Any, block: Any, readers: Any, state: Any) -> Any:
    del readers
    plgpu.copy_gmem_to_smem(
      refs.k.at[tile.batch, block, :, h],
      refs.k_s.at[slot],
      refs.k_ready.at[slot],
    )
    return state

  i, slot = _each_block(schedule, refs, i, tile, visit)
  plgpu.barrier_arrive(refs.k_ready.at[slot])
  return i + 1


def _load_ds(
  schedule: Schedule, refs: DqRefs, worker: Any, i: Any, tile: _Tile
) -> Any:
  """Loads ds of a warpgroup's queries; arguments as in `_load_keys`."""
  chunking, stages = schedule.chunking, schedule.tile.dq_stages
  per_step = schedule.step_queries
  mine = worker * per_step

  def skip(at: Any) -> None:
    """Arrives as often as the copies would."""
    for _ in range(per_step):
      plgpu.barrier_arrive(refs.ds_ready.at[at])

  def visit(slot: Any, block: Any, readers: Any, pairs: Any) -> Any:
    del block
    at = worker * stages + slot
    bits = readers >> mine
    hits = [(bits >> x) & 1 for x in range(per_step)]
    some = (bits & (2**per_step - 1)) != 0
    # Whoever waits for the copies sees the state, too, since all threads
    # arrive.
    refs.states_s[at] = jnp.where(some, jnp.int32(_MULTIPLY), _SKIP)

    def copy() -> None:
      for x, (hit, pair) in enumerate(zip(hits, pairs, strict=True)):
        plgpu.copy_gmem_to_smem(
          refs.ds.at[jnp.where(hit == 1, pair, _NOWHERE)],
          refs.ds_s.at[at, _rows_of(schedule, x)],
          refs.ds_ready.at[at],
        )

    lax.cond(some, copy, functools.partial(skip, at))
    return tuple(pair + hit for hit, pair in zip(hits, pairs, strict=True))

  # The next pair of each query.
  row = tile.first_row + tile.first + mine
  pairs = tuple((row + x) * chunking.num_ids for x in range(per_step))
  i, slot = _each_block(schedule, refs, i, tile, visit, pairs)
  at = worker * stages + slot
  refs.states_s[at] = jnp.int32(_END)
  skip(at)
  return i + 1


def _multiply_tile(
  schedule: Schedule, refs: DqRefs, worker: Any, i: Any, tile: _Tile
) -> Any:
  """dq of the queries of a warpgroup; arguments as in `_load_ds`."""
  chunking, stages = schedule.chunking, schedule.tile.dq_stages
  per_step, shape = schedule.step_queries, (ROWS, schedule.widths[0])

  def look(i: Any) -> Any:
    """Waits for the ds of a step, and returns its state."""
    slot = worker * stages + rem(i, stages)
    plgpu.barrier_wait(refs.ds_ready.at[slot])
    return refs.states_s[slot]

  def multiply(acc: Any) -> Any:
    def step(carry: Any) -> Any:
      i, state = carry
      slot = rem(i, stages)
      plgpu.barrier_wait(refs.k_ready.at[slot])

      @pl.when(state == _MULTIPLY)
      def _() -> None:
        plgpu.wgmma(
          acc, refs.ds_s.at[worker * stages + slot], refs.k_s.at[slot]
        )
        plgpu.wgmma_wait(0)

      plgpu.barrier_arrive(refs.free.at[slot])
      return i + 1, look(i + 1)

    i_end, _ = lax.while_loop(lambda x: x[1] != _END, step, (i, state))
    return acc[...], i_end

  state = look(i)
  dq, i = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
  slot = rem(i, stages)
  plgpu.barrier_wait(refs.k_ready.at[slot])
  plgpu.barrier_arrive(refs.free.at[slot])

  first = tile.first + worker * per_step
  row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
  query_of_row = row >> (schedule.group.bit_length() - 1)
  some = query_of_row < 0
  exists = []
  for x in range(per_step):
    query = first + x
    t = tile.first_query + query
    exists.append((query < chunking.queries) & (t < schedule.length))
    lse = refs.stats[tile.head, jnp.minimum(t, schedule.length - 1), 0]
    some |= (query_of_row == x) & (lse != EMPTY)
  # A NaN in a key must not reach queries that read nothing.
  dq = jnp.where(some, dq * schedule.scale, 0.0)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  refs.dq_s[worker] = dq.astype(refs.dq_s.dtype)
  plgpu.commit_smem()
  h = tile.head - tile.batch * chunking.kv_heads
  for x in range(per_step):

    @pl.when(exists[x])
    def _(x: int = x) -> None:
      plgpu.copy_smem_to_gmem(
        refs.dq_s.at[worker, _rows_of(schedule, x)],
        refs.dq.at[tile.batch, tile.first_query + first + x, h],
      )

  return i + 1


def query_gradient(
  schedule: Schedule,
  chunk: Chunk,
  inputs: Inputs,
  ds: jax.Array,
  before: Any,
) -> Any:
  """dq [B, T, K, G, H] of the queries of a chunk; None if in `before`.

  Args:
    schedule: the schedule.
    chunk: the chunk.
    inputs: what the kernels read.
    ds: from `key_value_gradient`.
    before: ref of dq, which is written to; None for a single chunk.
  """
  query, stages = inputs.query, schedule.tile.dq_stages
  dtype, width = query.dtype, schedule.widths[0]
  smem, barrier = plgpu.SMEM, plgpu.Barrier
  lists = tile_lists(schedule, chunk)
  refs = () if before is None else (before,)
  result = plgpu.kernel(
    functools.partial(_dq_kernel, schedule=schedule),
    out_type=() if refs else (jax.ShapeDtypeStruct(query.shape, dtype),),
    grid=(_dq_programs(schedule),),
    scratch_types={
      "k_s": smem((stages, ROWS, width), dtype),
      "ds_s": smem((WORKERS * stages, ROWS, ROWS), dtype),
      "states_s": smem((WORKERS * stages,), jnp.int32),
      "dq_s": smem((WORKERS, ROWS, width), dtype),
      "k_ready": barrier(num_arrivals=1, num_barriers=stages),
      "ds_ready": barrier(
        num_arrivals=schedule.step_queries, num_barriers=WORKERS * stages
      ),
      "free": barrier(num_arrivals=WORKERS, num_barriers=stages),
    },
    **options("nsa_selected_dq", WORKERS + 1, schedule.interpret),
  )(
    chunk.first_row,
    *(x.reshape(-1) for x in lists),
    inputs.stats,
    ds,
    inputs.key,
    *refs,
  )
  return None if refs else result[0]
