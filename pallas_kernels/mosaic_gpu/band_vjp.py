"""Attention over a band of keys, backward, with wgmma and TMA (Hopper).

Five products, as on Triton: dk and dv with ds, the gradients of the scores,
which the first kernel stores; then dq as one product with ds. Tiles of keys
stay in shared memory, and tiles of 64 rows (some queries with all heads of a
group) stream past them.

dk, dv: a block has two warpgroups that compute, each with 64 keys of a tile,
and one that loads. dk and dv stay in registers; scores are transposed, [keys,
rows], so that they are the first operand of both products in registers. The two
warpgroups drift apart by themselves: one computes exponentials while the other
one has the tensor cores.

dq: a block has four steps of 64 rows, so that their ds, which comes from device
memory, limits it rather than the keys, which come from L2.

Queries are processed in chunks, which bounds the memory of ds; dk and dv
accumulate over the chunks, over shares of the queries in separate sums. There
are no atomics, so every run gives the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.band import Band, BandReads, ceil_div, key_tiles
from pallas_kernels.triton.band_vjp import query_tiles, sum_splits

M = 64  # rows of a wgmma, keys per warpgroup
CONSUMERS = 2  # warpgroups that compute
# Registers per thread of the warpgroups that load and that compute.
LOAD_REGISTERS, COMPUTE_REGISTERS = 24, 240
EMPTY = 1e30  # lse of queries that read nothing: their probabilities are 0


@dataclasses.dataclass(frozen=True)
class BandVjpTiling:
  """Tiles of the backward pass of the compressed or the window branch.

  Attributes:
    rows: tile rows (queries x heads of a group) per step of the dk, dv kernel.
    stages: steps whose queries and dout are in flight or in use.
    steps: steps per query tile of the dq kernel, an even number.
    dq_block_k: keys per step of the dq kernel.
    dq_stages: its steps in flight or in use.
    programs: number of dk, dv programs that fills a device; the queries are
      split until there are that many.
    scratch: maximum memory in bytes of ds, the stored gradients of the scores.
      A chunk has at least one query tile.
  """

  rows: int = 64
  stages: int = 3
  steps: int = 4
  dq_block_k: int = 64
  dq_stages: int = 4
  programs: int = 512
  scratch: int = 2**31


class Inputs(NamedTuple):
  """Arrays that the kernels read; those of queries are not flat."""

  place: jax.Array  # int32 [B, 2]
  query: jax.Array  # [B, T, N, H]
  dout: jax.Array  # [B, T, N, V]
  stats: jax.Array  # [B K, steps, 2, rows]: lse, base 2, and delta
  key: jax.Array  # [B, S, K, H], S a multiple of the key tile
  value: jax.Array  # [B, S, K, V]
  # Segments of keys [B, S] and of tile rows [B, steps, rows], if any.
  segments: tuple[jax.Array, ...]


class Schedule(NamedTuple):
  """How the work is split into programs; hashable."""

  band: Band
  tiles: BandVjpTiling
  scale: float
  interpret: bool
  length: int  # T
  kv_heads: int
  group: int
  block_k: int  # keys per key tile
  heads: int  # B K
  num_tiles: int  # query tiles
  num_key_tiles: int
  num_chunks: int
  chunk_tiles: int  # query tiles per chunk
  slots: int  # most key tiles that a query tile can read
  splits: int  # programs per key tile

  @property
  def step_queries(self) -> int:
    """Queries per step."""
    return self.tiles.rows // self.group

  @property
  def block_q(self) -> int:
    """Queries per query tile."""
    return self.tiles.steps * self.step_queries

  def tiles_of(self, chunk: Any) -> tuple[Any, int]:
    """First query tile of a chunk, and the distance between its tiles."""
    if self.band.window is None:
      # Interleaved, every chunk reads equally many keys and fills the device.
      return chunk, self.num_chunks
    # Contiguous, a chunk reads few key tiles.
    return chunk * self.chunk_tiles, 1

  def keys_of(
    self, tile: Any, offset: Any, first_row: Any, size: int
  ) -> tuple[Any, Any]:
    """Range of the tiles of `size` keys that a query tile reads."""
    bounds = key_tiles(
      self.band,
      offset,
      first_row,
      tile * self.block_q,
      jnp.minimum((tile + 1) * self.block_q, self.length),
      size,
    )
    return bounds.begin, bounds.end


def make_schedule(
  spec: Spec,
  band: Band,
  tiles: BandVjpTiling,
  query: jax.Array,
  key: jax.Array,
) -> Schedule:
  """Chooses the chunks and splits for a shape.

  Args:
    spec: static arguments of the call.
    band: band of the branch.
    tiles: tiles.
    query: [B, T, N, H].
    key: [B, S, K, H].
  """
  batch, num_keys, kv_heads, _ = key.shape
  _, length, query_heads, _ = query.shape
  group = query_heads // kv_heads
  heads, block_k = batch * kv_heads, 2 * M
  block_q = tiles.steps * (tiles.rows // group)
  num_tiles = -(-length // block_q)
  num_key_tiles = slots = -(-num_keys // block_k)
  if band.window is not None:
    # Windows and query tiles are not aligned to key tiles.
    slots = min(slots, (band.window + block_q - 2) // block_k + 2)
  size = heads * slots * block_k * tiles.steps * tiles.rows * 2
  num_chunks = -(-num_tiles // max(1, tiles.scratch // size))
  chunk_tiles = -(-num_tiles // num_chunks)
  splits = -(-tiles.programs // (num_key_tiles * heads))
  # Enough work per program: 8 steps if the whole chunk reads its key tile.
  splits = max(1, min(splits, chunk_tiles * tiles.steps // 8))
  return Schedule(
    band,
    tiles,
    spec.scale,
    spec.interpret,
    length,
    kv_heads,
    group,
    block_k,
    heads,
    num_tiles,
    num_key_tiles,
    num_chunks,
    chunk_tiles,
    slots,
    splits,
  )


def backward(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  reads: BandReads,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
  tiles: BandVjpTiling = BandVjpTiling(),
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of query, key and value, in their dtypes.

  Args:
    spec: static arguments of the call.
    qkv: query [B, T, N, H]; key [B, S, K, H] and value [B, S, K, V] of S key
      rows.
    reads: what the queries read.
    out: [B, T, N, V], from the forward pass.
    lse: float32 [B, T, N], from the forward pass.
    dout: [B, T, N, V], cotangent of `out`.
    dlse: float32 [B, T, N], cotangent of `lse`.
    tiles: tiles.
  """
  query, key, value = qkv
  num_keys = key.shape[1]
  schedule = make_schedule(spec, reads.band, tiles, query, key)
  inputs = prepare(schedule, qkv, reads, out, lse, dout, dlse)
  first = jnp.zeros((1,), jnp.int32)
  sums, ds = key_value_gradient(schedule, first, inputs, ())
  dq = query_gradient(schedule, first, inputs, ds, None)
  if schedule.num_chunks > 1:
    # The later chunks add to these arrays in place.
    refs = [jax.new_ref(x) for x in sums]
    dq_ref = jax.new_ref(dq)

    def step(chunk: jax.Array, carry: tuple[()]) -> tuple[()]:
      chunk = chunk.astype(jnp.int32).reshape(1)
      _, ds = key_value_gradient(schedule, chunk, inputs, refs)
      query_gradient(schedule, chunk, inputs, ds, dq_ref)
      return carry

    lax.fori_loop(1, schedule.num_chunks, step, ())
    sums = tuple(ref[...] for ref in refs)
    dq = dq_ref[...]

  def finish(x: jax.Array, like: jax.Array, scale: float = 1.0) -> jax.Array:
    """[splits, B K, S, H] -> [B, S, K, H], without padding."""
    x = sum_splits(x)[:, :num_keys] * scale
    x = jnp.swapaxes(x.reshape(len(like), -1, *x.shape[1:]), 1, 2)
    return x.astype(like.dtype)

  return dq, finish(sums[0], key, spec.scale), finish(sums[1], value)


def prepare(
  schedule: Schedule,
  qkv: tuple[jax.Array, ...],
  reads: BandReads,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> Inputs:
  """What the kernels read; arguments as in `backward`."""
  query, key, value = qkv
  rows, group = schedule.tiles.rows, schedule.group
  batch, length = query.shape[:2]
  steps = schedule.num_tiles * schedule.tiles.steps
  padding = steps * schedule.step_queries - length
  delta = common.keep_finite(common.delta_of(out, dout, dlse), lse)
  lse = jnp.where(lse == -jnp.inf, EMPTY, lse * common.LOG2E)

  def per_step(x: jax.Array, empty: float) -> jax.Array:
    """[B, T, N] -> [B K, steps, rows], heads innermost."""
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)), constant_values=empty)
    x = x.reshape(batch, -1, schedule.kv_heads, group)
    return jnp.swapaxes(x, 1, 2).reshape(-1, steps, rows)

  stats = jnp.stack([per_step(lse, EMPTY), per_step(delta, 0)], axis=2)
  more = schedule.num_key_tiles * schedule.block_k - key.shape[1]

  def pad_keys(x: jax.Array) -> jax.Array:
    width = ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, width) if more else x

  segments = reads.segments
  if segments:
    keys, queries = segments
    # Every head of a query; the rows after the last query are empty.
    queries = jnp.pad(queries, ((0, 0), (0, padding)), constant_values=-1)
    queries = jnp.repeat(queries, group, axis=1)
    segments = pad_keys(keys), queries.reshape(batch, steps, rows)
  return Inputs(
    reads.place, query, dout, stats, pad_keys(key), pad_keys(value), segments
  )


def scalar_div(x: Any, y: int) -> Any:
  """Floor division of a nonnegative scalar."""
  return lax.div(x, jnp.int32(y))


class Walk(NamedTuple):
  """Steps that a warpgroup of a dk, dv program walks, counted in its chunk.

  It skips [begin, first) and [last, end), where it only keeps pace with the
  other warpgroup; [full_first, full_last) needs no mask.
  """

  begin: Any
  first: Any
  full_first: Any
  full_last: Any
  last: Any
  end: Any


def steps_of(
  schedule: Schedule, chunk: Any, place: tuple[Any, Any], j: Any, split: Any,
  wg: Any, segmented: bool,
) -> Walk:  # fmt: skip
  """The steps of one warpgroup.

  Args:
    schedule: the schedule.
    chunk: number of the chunk.
    place: position of query 0, and the first valid key row.
    j: key tile.
    split: number of the share of queries.
    wg: number of the warpgroup.
    segmented: every step needs a mask.
  """
  band, tiles = schedule.band, schedule.tiles
  offset, first_row = place
  start, apart = schedule.tiles_of(chunk)

  def to_steps(tile):
    """Query tile -> first step of the chunk at or after it."""
    x = ceil_div(jnp.maximum(tile - start, 0), apart)
    return jnp.minimum(x, schedule.chunk_tiles) * tiles.steps

  def reading(start_k, size):
    bounds = query_tiles(
      band, offset, first_row, start_k, size, schedule.length, schedule.block_q
    )
    return [to_steps(x) for x in bounds]

  begin, end = reading(j * schedule.block_k, schedule.block_k)
  # Equal shares of the steps that read these keys, so that no program finishes
  # long after the others.
  share = ceil_div(jnp.maximum(end - begin, 0), schedule.splits)
  begin += split * share
  end = jnp.maximum(jnp.minimum(end, begin + share), begin)

  def inside(x, low=begin):
    return jnp.minimum(jnp.maximum(x, low), end)

  start_k = j * schedule.block_k + wg * M
  last_k = start_k + (M - 1)
  first, last = reading(start_k, M)
  first = inside(first)
  last = inside(last, first)
  # The first query tile whose queries all read the last key.
  whole = last_k * band.stride + (band.span - 1) - offset
  full_first = to_steps(ceil_div(jnp.maximum(whole, 0), schedule.block_q))
  full_last = last
  if band.window is not None:
    # Up to the last query tile whose queries all read the first key.
    whole = start_k + band.window - offset
    whole = scalar_div(jnp.maximum(whole, 0), schedule.block_q)
    whole = jnp.where(start_k < first_row, 0, whole)
    full_last = jnp.minimum(to_steps(whole), last)
  if segmented:
    full_first = last
  full_first = jnp.minimum(jnp.maximum(full_first, first), last)
  full_last = jnp.maximum(full_last, full_first)
  return Walk(begin, first, full_first, full_last, last, end)


def _dkv_kernel(
  chunk_ref,  # [1]
  place_ref,  # [B, 2]
  q_ref,  # [B, T, N, H]
  dout_ref,  # [B, T, N, V]
  stats_ref,  # [B K, steps, 2, rows]
  k_ref,  # [B, S, K, H]
  v_ref,  # [B, S, K, V]
  # Segments [B, S] and [B, steps, rows], if any; dk [splits, B K, S, H] and dv
  # [splits, B K, S, V], float32; ds [B K, chunk steps, slots block_k, rows].
  *refs,
  schedule: Schedule,
  segmented: bool,
  fresh: bool,  # dk and dv have no earlier gradients
):
  segments, (dk_ref, dv_ref, ds_ref), scratch = (
    refs[:2] if segmented else (),
    refs[2 * segmented : 2 * segmented + 3],
    refs[2 * segmented + 3 :],
  )
  k_s, v_s, q_s, dout_s, stats_s, segments_s, ds_s, p_s = scratch[:8]
  keys_ready, ready, free = scratch[8:]
  band, tiles, group = schedule.band, schedule.tiles, schedule.group
  rows, stages, interpret = tiles.rows, tiles.stages, schedule.interpret
  wg = lax.axis_index("wg")
  # The tiles that most queries read start first.
  program = lax.axis_index("program")
  split = lax.rem(program, jnp.int32(schedule.splits))
  program = scalar_div(program, schedule.splits)
  head = lax.rem(program, jnp.int32(schedule.heads))
  j = scalar_div(program, schedule.heads)
  b = scalar_div(head, schedule.kv_heads)
  h = lax.rem(head, jnp.int32(schedule.kv_heads))
  place = place_ref[b, 0], place_ref[b, 1]
  chunk = chunk_ref[0]
  start, apart = schedule.tiles_of(chunk)

  def step_of(i):
    """Query tile, its number in the chunk, and the step, of a step's number."""
    number = scalar_div(i, tiles.steps)
    tile = start + number * apart
    return tile, tile * tiles.steps + lax.rem(i, jnp.int32(tiles.steps))

  @pl.when(wg == CONSUMERS)
  def _load():
    if not interpret:
      plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
    walk = steps_of(schedule, chunk, place, j, split, wg, segmented)
    keys = b, pl.ds(j * schedule.block_k, schedule.block_k), h
    plgpu.copy_gmem_to_smem(k_ref.at[keys], k_s, keys_ready)
    plgpu.copy_gmem_to_smem(v_ref.at[keys], v_s, keys_ready)

    def load(i, _):
      n = i - walk.begin
      slot = lax.rem(n, jnp.int32(stages))
      _, step = step_of(i)

      @pl.when(n >= stages)
      def _():
        plgpu.barrier_wait(free.at[slot])

      plgpu.copy_gmem_to_smem(
        stats_ref.at[head, step], stats_s.at[slot], ready.at[slot]
      )
      if segmented:
        plgpu.copy_gmem_to_smem(
          segments[1].at[b, step], segments_s.at[slot], ready.at[slot]
        )
      for x in range(schedule.step_queries):
        # Rows after the last query repeat it; their probabilities are 0.
        t = step * schedule.step_queries + x
        t = jnp.minimum(t, schedule.length - 1)
        heads = pl.ds(h * group, group)
        part = pl.ds(x * group, group)
        plgpu.copy_gmem_to_smem(
          q_ref.at[b, t, heads], q_s.at[slot, part], ready.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          dout_ref.at[b, t, heads], dout_s.at[slot, part], ready.at[slot]
        )
      return ()

    lax.fori_loop(walk.begin, walk.end, load, ())
    if interpret:  # It wants every barrier awaited.

      def drain(i, _):
        plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])
        return ()

      count = walk.end - walk.begin
      lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, ())

  @pl.when(wg < CONSUMERS)
  def _compute():
    if not interpret:
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    walk = steps_of(schedule, chunk, place, j, split, wg, segmented)
    start_k = j * schedule.block_k + wg * M
    mine = pl.ds(wg * M, M)
    layout = plgpu.Layout.WGMMA
    shape = M, rows
    factor = schedule.scale * common.LOG2E
    if segmented:
      key_segment = plgpu.load(
        segments[0].at[b, pl.ds(start_k, M)],
        layout=layout.reduce(1),
        optimized=False,
      )

    def slot_of(i):
      return lax.rem(i - walk.begin, jnp.int32(stages))

    def skip(i, _):
      plgpu.barrier_wait(ready.at[slot_of(i)])
      plgpu.barrier_arrive(free.at[slot_of(i)])
      return ()

    def by_row(ref):
      """[rows] as [keys, rows]."""
      x = plgpu.load(ref, layout=layout.reduce(0), optimized=False)
      return lax.broadcast_in_dim(x, shape, [1])

    def masked_out(p, slot, step):
      key_row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
      row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
      first = place[0] + step * schedule.step_queries
      t = first + lax.shift_right_logical(row, group.bit_length() - 1)
      mask = band.readable(start_k + key_row, t, place[1])
      if segmented:
        mask &= lax.broadcast_in_dim(key_segment, shape, [0]) == by_row(
          segments_s.at[slot]
        )
      return jnp.where(mask, p, 0.0)

    def compute(dk, dv):
      def product(acc, x, y):
        """acc += x y, x in registers."""
        if interpret:  # It takes operands in shared memory only.
          p_s[wg] = x
          plgpu.commit_smem()
          x = p_s.at[wg]
        plgpu.wgmma(acc, x, y)

      def step(i, _, masked):
        slot = slot_of(i)
        tile, number = step_of(i)
        q, dout = q_s.at[slot], dout_s.at[slot]
        plgpu.barrier_wait(ready.at[slot])

        def products(s_acc, dp_acc):
          plgpu.wgmma(s_acc, k_s.at[mine], q.T)
          plgpu.wgmma(dp_acc, v_s.at[mine], dout.T)
          s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
          p = jnp.exp2(s * factor - by_row(stats_s.at[slot, 0]))
          if masked:
            p = masked_out(p, slot, number)
          product(dv, p.astype(q.dtype), dout)
          dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
          ds = (p * (dp - by_row(stats_s.at[slot, 1]))).astype(q.dtype)
          product(dk, ds, q)
          n = lax.rem(i, 2)
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          ds_s[wg, n] = ds
          plgpu.commit_smem()
          first = schedule.keys_of(tile, *place, 2 * M)[0] * (2 * M)
          plgpu.copy_smem_to_gmem(
            ds_s.at[wg, n], ds_ref.at[head, i, pl.ds(start_k - first, M)]
          )
          plgpu.wgmma_wait(0)

        acc = plgpu.ACC(shape, jnp.float32)
        pl.run_scoped(products, acc, acc)
        plgpu.barrier_arrive(free.at[slot])
        return ()

      for low, high, body in (
        (walk.begin, walk.first, skip),
        (walk.first, walk.full_first, functools.partial(step, masked=True)),
        (walk.full_first, walk.full_last, functools.partial(step, masked=False)),
        (walk.full_last, walk.last, functools.partial(step, masked=True)),
        (walk.last, walk.end, skip),
      ):
        lax.fori_loop(low, high, body, ())
      return dk[...], dv[...]

    plgpu.barrier_wait(keys_ready)
    grads = pl.run_scoped(
      compute,
      *(plgpu.ACC((M, x.shape[-1]), jnp.float32) for x in (k_s, v_s)),
    )
    place_k = split, head, pl.ds(start_k, M)
    for ref, x in zip((dk_ref, dv_ref), grads, strict=True):
      if not fresh:
        x += plgpu.load(ref.at[place_k], layout=layout, optimized=False)
      ref[place_k] = x
    plgpu.wait_smem_to_gmem(0)


def key_value_gradient(
  schedule: Schedule,
  chunk: jax.Array,
  inputs: Inputs,
  before: tuple[Any, ...] | list[Any],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """dk / scale and dv of a chunk of queries, and ds.

  Args:
    schedule: the schedule.
    chunk: [1], its number.
    inputs: what the kernels read.
    before: refs of dk and dv of earlier chunks, to add to; none for the first.

  Returns:
    dk / scale [splits, B K, S, H] and dv [splits, B K, S, V] in float32, () if
    they are added to `before`; ds [B K, chunk steps, slots block_k, rows].
  """
  tiles = schedule.tiles
  dtype, num_keys = inputs.query.dtype, inputs.key.shape[1]
  widths = inputs.key.shape[-1], inputs.value.shape[-1]
  f32 = jnp.float32
  shapes = [
    jax.ShapeDtypeStruct((schedule.splits, schedule.heads, num_keys, x), f32)
    for x in widths
  ]
  if before:
    shapes = []
  steps = schedule.chunk_tiles * tiles.steps
  ds = (schedule.heads, steps, schedule.slots * schedule.block_k, tiles.rows)
  segmented = bool(inputs.segments)
  smem, barrier = plgpu.SMEM, plgpu.Barrier
  body = functools.partial(
    _dkv_kernel, schedule=schedule, segmented=segmented, fresh=not before
  )
  *sums, ds = plgpu.kernel(
    functools.partial(
      _dkv_kernel, schedule=schedule, segmented=segmented, fresh=not before
    ),
    out_type=(*shapes, jax.ShapeDtypeStruct(ds, dtype)),
    grid=(schedule.num_key_tiles * schedule.heads * schedule.splits,),
    grid_names=("program",),
    scratch_types=[
      *(smem((schedule.block_k, x), dtype) for x in widths),
      *(smem((tiles.stages, tiles.rows, x), dtype) for x in widths),
      smem((tiles.stages, 2, tiles.rows), f32),
      smem((tiles.stages, tiles.rows), jnp.int32) if segmented else None,
      smem((CONSUMERS, 2, M, tiles.rows), dtype),
      smem((CONSUMERS, M, tiles.rows), dtype) if schedule.interpret else None,
      barrier(num_arrivals=2),
      barrier(
        num_arrivals=1 + segmented + 2 * schedule.step_queries,
        num_barriers=tiles.stages,
      ),
      barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages),
    ],
    **_options(schedule, "dkv"),
  )(chunk, *inputs[:-1], *inputs.segments, *before)
  return tuple(sums), ds


def _options(schedule: Schedule, name: str) -> dict[str, Any]:
  """Keyword arguments of `plgpu.kernel` that both kernels share."""
  options: dict[str, Any] = {
    "num_threads": CONSUMERS + 1,
    "thread_name": "wg",
    "kernel_name": f"nsa_{schedule.band.branch}_{name}",
    # No reduction crosses warps.
    "compiler_params": plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
  }
  if schedule.interpret:
    options["interpret"] = plgpu.InterpretGPUParams()
  return options


def _dq_kernel(
  chunk_ref,  # [1]
  place_ref,  # [B, 2]
  stats_ref,  # [B K, steps, 2, rows]
  ds_ref,  # [B K, chunk steps, slots block_k, rows]
  k_ref,  # [B, S, K, H]
  dq_ref,  # [B, T, N, H]
  k_s,  # [dq_stages, dq_block_k, H]
  ds_s,  # [dq_stages, steps, dq_block_k, rows]
  dq_s,  # [CONSUMERS, rows, H]
  ready,
  free,
  *,
  schedule: Schedule,
):
  tiles, group, interpret = schedule.tiles, schedule.group, schedule.interpret
  block_k, stages, rows = tiles.dq_block_k, tiles.dq_stages, tiles.rows
  wg = lax.axis_index("wg")
  program = lax.axis_index("program")
  head = lax.rem(program, jnp.int32(schedule.heads))
  b = scalar_div(head, schedule.kv_heads)
  h = lax.rem(head, jnp.int32(schedule.kv_heads))
  place = place_ref[b, 0], place_ref[b, 1]
  start, apart = schedule.tiles_of(chunk_ref[0])
  # The last queries read the most keys, so they start first.
  number = schedule.chunk_tiles - 1 - scalar_div(program, schedule.heads)
  tile = start + number * apart
  # ds has the keys from `base` on; a warpgroup of the dk, dv kernel wrote those
  # of its 64 keys.
  base = schedule.keys_of(tile, *place, 2 * M)[0] * (2 * M)
  parts = M // block_k
  begin, end = (x * parts for x in schedule.keys_of(tile, *place, M))
  # All chunks have `chunk_tiles` tiles, but the last ones may not exist.
  count = jnp.where(tile < schedule.num_tiles, jnp.maximum(end - begin, 0), 0)

  @pl.when(wg == CONSUMERS)
  def _load():
    if not interpret:
      plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

    def load(n, _):
      slot = lax.rem(n, jnp.int32(stages))
      start_k = (begin + n) * block_k

      @pl.when(n >= stages)
      def _():
        plgpu.barrier_wait(free.at[slot])

      plgpu.copy_gmem_to_smem(
        k_ref.at[b, pl.ds(start_k, block_k), h], k_s.at[slot], ready.at[slot]
      )
      plgpu.copy_gmem_to_smem(
        ds_ref.at[
          head,
          pl.ds(number * tiles.steps, tiles.steps),
          pl.ds(start_k - base, block_k),
        ],
        ds_s.at[slot],
        ready.at[slot],
      )
      return ()

    lax.fori_loop(0, count, load, ())
    if interpret:  # It wants every barrier awaited.

      def drain(n, _):
        plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(stages))])
        return ()

      lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, ())

  @pl.when((wg < CONSUMERS) & (tile < schedule.num_tiles))
  def _compute():
    if not interpret:
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    layout = plgpu.Layout.WGMMA
    mine = tiles.steps // CONSUMERS  # steps of this warpgroup
    shape = rows, k_s.shape[-1]

    def compute(*accs):
      def step(n, _):
        slot = lax.rem(n, jnp.int32(stages))
        plgpu.barrier_wait(ready.at[slot])
        for x, acc in enumerate(accs):
          plgpu.wgmma(acc, ds_s.at[slot, wg * mine + x].T, k_s.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[slot])
        return ()

      lax.fori_loop(0, count, step, ())
      return tuple(acc[...] for acc in accs)

    results = pl.run_scoped(
      compute, *(plgpu.ACC(shape, jnp.float32) for _ in range(mine))
    )
    for x, dq in enumerate(results):
      step = tile * tiles.steps + wg * mine + x
      lse = plgpu.load(
        stats_ref.at[head, step, 0], layout=layout.reduce(1), optimized=False
      )
      # A NaN in an unread value may be in the ds of queries that read nothing.
      empty = lax.broadcast_in_dim(lse == EMPTY, shape, [0])
      dq = jnp.where(empty, 0.0, dq * schedule.scale)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      dq_s[wg] = dq.astype(dq_s.dtype)
      plgpu.commit_smem()
      for y in range(schedule.step_queries):
        t = step * schedule.step_queries + y

        @pl.when(t < schedule.length)
        def _(t=t, y=y):
          plgpu.copy_smem_to_gmem(
            dq_s.at[wg, pl.ds(y * group, group)],
            dq_ref.at[b, t, pl.ds(h * group, group)],
          )

    plgpu.wait_smem_to_gmem(0)


def query_gradient(
  schedule: Schedule,
  chunk: jax.Array,
  inputs: Inputs,
  ds: jax.Array,
  before: Any,
) -> jax.Array | None:
  """dq [B, T, N, H] of the queries of a chunk.

  Args:
    schedule: the schedule.
    chunk: [1], its number.
    inputs: what the kernels read.
    ds: from `key_value_gradient`.
    before: ref of dq, to write to; None for a new array.
  """
  tiles = schedule.tiles
  query, smem, barrier = inputs.query, plgpu.SMEM, plgpu.Barrier
  width, dtype = query.shape[-1], query.dtype
  stages, block_k = tiles.dq_stages, tiles.dq_block_k
  shapes = (jax.ShapeDtypeStruct(query.shape, dtype),) if before is None else ()
  result = plgpu.kernel(
    functools.partial(_dq_kernel, schedule=schedule),
    out_type=shapes,
    grid=(schedule.chunk_tiles * schedule.heads,),
    grid_names=("program",),
    scratch_types=[
      smem((stages, block_k, width), dtype),
      smem((stages, tiles.steps, block_k, tiles.rows), dtype),
      smem((CONSUMERS, tiles.rows, width), dtype),
      barrier(num_arrivals=2, num_barriers=stages),
      barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    ],
    **_options(schedule, "dq"),
  )(
    chunk,
    inputs.place,
    inputs.stats,
    ds,
    inputs.key,
    *(() if before is None else (before,)),
  )
  return result[0] if result else None
