"""Attention over a band of keys, backward: compressed branch and window.

Five products, as on Triton: dk and dv with ds, the gradients of the scores,
which the first kernel stores; then dq as one product with ds.

dk, dv: two warpgroups compute, each with 64 keys of a tile, and a third one
loads. The keys stay in shared memory, dk and dv in registers, and steps of 64
rows (a few queries with all heads of a group) stream past them. Nothing orders
the two warpgroups: one that waits for its products leaves the tensor cores to
the other, and they drift apart until exponentials run beside products. Of wide
heads, dk and dv do not fit in the registers of one warpgroup: there a tile has
64 keys, of which one warpgroup computes dv and the other one dk and ds.

dq: a program has several steps of 64 rows, so that it reads each key, from L2,
for many rows; it is as slow as the memory that holds ds.

Queries are processed in chunks, which bounds the memory of ds; dk and dv
accumulate over the chunks, and over shares of the queries in separate sums.
There are no atomics, so every run gives the same bits.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.bands import Band, BandReads, key_tiles, query_tiles
from pallas_kernels.checks import group_of
from pallas_kernels.gradients import delta_of, gradient_of, keep_finite
from pallas_kernels.integers import ceil_div, div, rem, within
from pallas_kernels.interface import Spec
from pallas_kernels.mosaic_gpu import common, gradient_steps
from pallas_kernels.mosaic_gpu.common import LOG2E
from pallas_kernels.mosaic_gpu.gradient_steps import EMPTY
from pallas_kernels.mosaic_gpu.interpreter import interpreted
from pallas_kernels.mosaic_gpu.tiling import (
  ROWS,
  WORKERS,
  BandGradientTile,
  gradient_keys,
  gradient_tile,
)
from pallas_kernels.triton import band_vjp as triton

plgpu: Any = mosaic_gpu
# Registers per thread: what the loading warpgroup gives up the others take.
# They need all of it for dk, dv, and the two tiles of scores.
_LOAD_REGISTERS = 24
_COMPUTE_REGISTERS = 240


class Inputs(NamedTuple):
  """Arrays that the kernels read. S is padded to whole key tiles."""

  place: jax.Array  # int32 [B, 2]: position of query 0, first valid key row
  query: jax.Array  # [B, T, N, H]
  dout: jax.Array  # [B, T, N, V]
  lse: jax.Array  # [B K, steps, ROWS], base 2
  delta: jax.Array  # [B K, steps, ROWS]
  key: jax.Array  # [B, S, K, H]
  value: jax.Array  # [B, S, K, V]
  # () or segments of the keys [B, S] and of the rows of steps [B, steps, ROWS].
  segments: tuple[jax.Array, ...]


class Schedule(NamedTuple):
  """How the work is split into programs; hashable.

  A step is 64 rows: `step_queries` queries with all heads of a group. A query
  tile is several steps, which one program of the dq kernel computes.
  """

  band: Band
  tile: BandGradientTile
  scale: float
  interpret: bool
  length: int  # T
  kv_heads: int  # K
  group: int  # G
  block_k: int  # keys per tile of the dk, dv kernel
  heads: int  # B K
  num_tiles: int  # query tiles
  num_key_tiles: int
  num_chunks: int
  chunk_tiles: int  # query tiles per chunk
  slots: int  # most key tiles that a query tile can read
  splits: int  # programs per key tile

  @property
  def shared(self) -> bool:
    """Whether the warpgroups of the dk, dv kernel share the keys of a tile."""
    return self.block_k == ROWS

  @property
  def step_queries(self) -> int:
    """Queries per step."""
    return ROWS // self.group

  @property
  def block_q(self) -> int:
    """Queries per query tile."""
    return self.tile.steps * self.step_queries

  def tiles_of(self, chunk: Any) -> tuple[Any, int]:
    """First query tile of a chunk, and the distance between its tiles."""
    if self.band.window is None:
      # Interleaved, every chunk reads equally many keys and fills the device.
      return chunk, self.num_chunks
    # Contiguous, a chunk reads few key tiles.
    return chunk * self.chunk_tiles, 1

  def keys_of(self, tile: Any, place: Any, size: int) -> tuple[Any, Any]:
    """Range of the tiles of `size` keys that a query tile reads.

    Those of `ROWS` keys are the pairs of query tile and keys for which the dk,
    dv kernel writes ds, because `query_tiles` yields the same pairs. The first
    one of `block_k` keys is slot 0 of the query tile's ds.
    """
    offset, first_row = place
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
  tile: BandGradientTile,
  query: jax.Array,
  key: jax.Array,
  value_dim: int,
) -> Schedule:
  """Chooses the chunks and splits for a shape.

  Args:
    spec: static arguments of the call.
    band: band of the branch.
    tile: tile sizes.
    query: [B, T, N, H].
    key: [B, S, K, H].
    value_dim: V.
  """
  batch, num_keys, kv_heads, head_dim = key.shape
  block_k = gradient_keys(head_dim, value_dim)
  length, group = query.shape[1], group_of(query, key)
  heads = batch * kv_heads
  block_q = tile.steps * (ROWS // group)
  num_tiles = -(-length // block_q)
  num_key_tiles = slots = -(-num_keys // block_k)
  if band.window is not None:
    # Windows and query tiles are not aligned to key tiles.
    slots = min(slots, (band.window + block_q - 2) // block_k + 2)
  row = slots * block_k * query.dtype.itemsize
  size = heads * tile.steps * ROWS * row
  num_chunks = -(-num_tiles // max(1, tile.scratch // size))
  chunk_tiles = -(-num_tiles // num_chunks)
  splits = -(-tile.programs // (num_key_tiles * heads))
  # Enough work per program: 8 steps if the whole chunk reads its key tile.
  splits = max(1, min(splits, chunk_tiles * tile.steps // 8))
  return Schedule(
    band,
    tile,
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of query, key and value, in their dtypes.

  The Triton kernels compute those of groups that do not divide 64.

  Args:
    spec: as in `band.forward`.
    qkv: as in `band.forward`.
    reads: as in `band.forward`.
    out: [B, T, N, V], from `band.forward`.
    lse: [B, T, N], from `band.forward`.
    dout: [B, T, N, V], cotangent of `out`.
    dlse: float32 [B, T, N], cotangent of `lse`.
  """
  query, key, value = qkv
  if ROWS % group_of(query, key):
    spec = spec._replace(tiles=None)
    return triton.backward(spec, qkv, reads, out, lse, dout, dlse)
  widths = key.shape[-1], value.shape[-1]
  tile = (spec.tiles and spec.tiles.bwd) or gradient_tile(*widths)
  schedule = make_schedule(spec, reads.band, tile, query, key, widths[1])
  inputs = prepare(schedule, qkv, reads, out, lse, dout, dlse)
  run: Any = functools.partial(gradients, schedule)
  if schedule.interpret:
    shapes = [_result(query.shape, query.dtype), *_sums(schedule, inputs)]
    run = functools.partial(interpreted, run, shapes)
  dq, dk, dv = run(*inputs[:-1], *inputs.segments)

  return (
    dq,
    gradient_of(dk, key, spec.scale),
    gradient_of(dv, value),
  )


def prepare(
  schedule: Schedule,
  qkv: tuple[jax.Array, ...],
  reads: BandReads,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> Inputs:
  """What the kernels read; the arguments are those of `backward`."""
  query, key, value = qkv
  batch, length = query.shape[:2]
  steps = schedule.num_tiles * schedule.tile.steps
  # Rows after the last query, which repeat it, are empty.
  padding = steps * schedule.step_queries - length
  more_keys = schedule.num_key_tiles * schedule.block_k - key.shape[1]
  delta = keep_finite(delta_of(out, dout, dlse), lse)
  lse = jnp.where(lse == -jnp.inf, EMPTY, lse * LOG2E)

  def pad(x: jax.Array, more: int, value: float = 0) -> jax.Array:
    width = [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, width, constant_values=value) if more else x

  def per_step(x: jax.Array, empty: float) -> jax.Array:
    x = pad(x, padding, empty)
    x = x.reshape(batch, -1, schedule.kv_heads, schedule.group)
    return jnp.swapaxes(x, 1, 2).reshape(-1, steps, ROWS)

  segments = reads.segments
  if segments:
    keys, queries = segments
    queries = jnp.repeat(pad(queries, padding, -1), schedule.group, axis=1)
    segments = pad(keys, more_keys), queries.reshape(batch, steps, ROWS)
  return Inputs(
    reads.place,
    query,
    dout,
    per_step(lse, EMPTY),
    per_step(delta, 0),
    pad(key, more_keys),
    pad(value, more_keys),
    segments,
  )


def gradients(
  schedule: Schedule, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dq [B, T, N, H], and sums of dk and dv as in `key_value_gradient`.

  Args:
    schedule: the schedule.
    *arrays: the fields of `Inputs`, `segments` last and flat.
  """
  fields: Any = (*arrays[:7], arrays[7:])
  inputs = Inputs(*fields)
  first = jnp.zeros((1,), jnp.int32)
  (dk, dv), ds = key_value_gradient(schedule, first, inputs, ())
  dq = query_gradient(schedule, first, inputs, ds, None)
  if schedule.num_chunks == 1:
    return dq, dk, dv
  # The other chunks add to these arrays in place.
  dq_ref, *sums = (jax.new_ref(x) for x in (dq, dk, dv))

  def step(chunk: jax.Array, carry: tuple[()]) -> tuple[()]:
    chunk = chunk.astype(jnp.int32).reshape(1)
    _, ds = key_value_gradient(schedule, chunk, inputs, sums)
    query_gradient(schedule, chunk, inputs, ds, dq_ref)
    return carry

  lax.fori_loop(1, schedule.num_chunks, step, ())
  return dq_ref[...], sums[0][...], sums[1][...]


def _result(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _sums(schedule: Schedule, inputs: Inputs) -> list[jax.ShapeDtypeStruct]:
  """Shapes of dk and dv, a sum per share of the queries."""
  shape = schedule.splits, schedule.heads, inputs.key.shape[1]
  widths = inputs.key.shape[-1], inputs.value.shape[-1]
  return [_result((*shape, width), jnp.float32) for width in widths]


def _options(schedule: Schedule, name: str) -> dict[str, Any]:
  """Keyword arguments of `plgpu.kernel`, the same for both kernels."""
  name = f"nsa_{schedule.band.branch}_{name}"
  return common.options(name, WORKERS + 1, schedule.interpret)


class Place(NamedTuple):
  """Scalars of a program: its batch row, key/value head, and band."""

  head: Any  # in [0, B K)
  b: Any
  h: Any
  band: tuple[Any, Any]  # position of query 0, first valid key row


def _place(schedule: Schedule, place_ref: Any, head: Any) -> Place:
  b = div(head, schedule.kv_heads)
  band = place_ref[b, 0], place_ref[b, 1]
  return Place(head, b, rem(head, schedule.kv_heads), band)


def _heads(schedule: Schedule, place: Place) -> Any:
  """Slice of the query heads of a program."""
  start = pl.multiple_of(place.h * schedule.group, schedule.group)
  return pl.ds(start, schedule.group)


def _rows_of(schedule: Schedule, x: int) -> Any:
  """Slice of the rows of the x-th query of a step."""
  return pl.ds(x * schedule.group, schedule.group)


def _ring(
  schedule: Schedule, free: Any, stages: int, count: Any, load: Any
) -> None:
  """Calls load(n, slot) for n in [0, count) once its slot is free."""

  def step(n: Any, _: Any) -> Any:
    slot = rem(n, stages)
    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    load(n, slot)
    return ()

  lax.fori_loop(0, count, step, ())
  if schedule.interpret:
    common.drain(free, stages, count)


# ---------------------------------------------------------------------- dk, dv


def _first_key(schedule: Schedule, tile: Any, worker: Any) -> Any:
  """First of the 64 keys of a warpgroup."""
  start_k = tile * schedule.block_k
  return start_k if schedule.shared else start_k + worker * ROWS


class Walk(NamedTuple):
  """Steps of a warpgroup of the dk, dv kernel, counted in the chunk.

  In [begin, first) and [last, end) only the other warpgroup reads its keys, and
  in [full_first, full_last) every query reads every key.
  """

  begin: Any
  first: Any
  full_first: Any
  full_last: Any
  last: Any
  end: Any


def steps_of(
  schedule: Schedule,
  chunk: Any,
  band_place: tuple[Any, Any],
  tile: Any,
  split: Any,
  worker: Any,
  segmented: bool = False,
) -> Walk:
  """The steps of one warpgroup.

  Args:
    schedule: the schedule.
    chunk: number of the chunk.
    band_place: position of query 0, and the first valid key row.
    tile: key tile.
    split: number of the share of the queries.
    worker: number of the warpgroup.
    segmented: every step needs a mask.
  """
  band, steps, block_q = schedule.band, schedule.tile.steps, schedule.block_q
  block_k = schedule.block_k
  offset, first_row = band_place
  start, apart = schedule.tiles_of(chunk)

  def to_steps(tile: Any) -> Any:
    """The first step of the chunk in or after a query tile."""
    number = ceil_div(jnp.maximum(tile - start, 0), apart)
    return jnp.minimum(number, schedule.chunk_tiles) * steps

  def reading(start_k: Any, size: int) -> list[Any]:
    bounds = query_tiles(
      band, offset, first_row, start_k, size, schedule.length, block_q
    )
    return [to_steps(x) for x in bounds]

  begin, end = reading(tile * block_k, block_k)
  # Equal shares of the steps that read these keys, so that no program finishes
  # long after the others.
  share = ceil_div(jnp.maximum(end - begin, 0), schedule.splits)
  begin += split * share
  end = jnp.maximum(jnp.minimum(end, begin + share), begin)

  start_k = _first_key(schedule, tile, worker)
  first, last = reading(start_k, ROWS)
  first = within(first, begin, end)
  last = within(last, first, end)
  if segmented:
    return Walk(begin, first, last, last, last, end)
  # From the first query that reads the last key, to the last one that reads the
  # first key.
  full = (start_k + (ROWS - 1)) * band.stride + (band.span - 1) - offset
  full_first = to_steps(ceil_div(jnp.maximum(full, 0), block_q))
  full_first = within(full_first, first, last)
  full_last = last
  if band.window is not None:
    stop = jnp.where(start_k < first_row, 0, start_k + band.window - offset)
    full_last = to_steps(div(jnp.maximum(stop, 0), block_q))
    full_last = within(full_last, full_first, last)
  return Walk(begin, first, full_first, full_last, last, end)


class Refs(NamedTuple):
  """Arrays in global memory, and what is in shared memory (`*_s`).

  W is `WORKERS`, D is `num_stages`.
  """

  chunk: Any  # [1]
  place: Any  # [B, 2]
  q: Any  # [B, T, N, H]
  dout: Any  # [B, T, N, V]
  lse: Any  # [B K, steps, ROWS]
  delta: Any  # [B K, steps, ROWS]
  k: Any  # [B, S, K, H]
  v: Any  # [B, S, K, V]
  key_segments: Any  # [B, S] or None
  row_segments: Any  # [B, steps, ROWS] or None
  dk: Any  # [splits, B K, S, H], float32
  dv: Any  # [splits, B K, S, V], float32
  ds: Any  # [B K, chunk steps, slots block_k, ROWS]
  k_s: Any  # [block_k, H]
  v_s: Any  # [block_k, V]
  q_s: Any  # [D, ROWS, H]
  dout_s: Any  # [D, ROWS, V]
  lse_s: Any  # [D, ROWS]
  delta_s: Any  # [D, ROWS]
  segments_s: Any  # [D, ROWS] or None
  ds_s: Any  # [block_k / ROWS, 2, ROWS keys, ROWS]
  p_s: Any  # [W, ROWS keys, ROWS], interpreted only
  keys_ready: Any  # barrier: the keys and values are loaded
  ready: Any  # [D] barriers: a step is loaded
  free: Any  # [D] barriers: both warpgroups have read a step


def _dkv_kernel(
  *arrays: Any, schedule: Schedule, segmented: bool, fresh: bool, **scratch: Any
) -> None:
  """The kernel of dk, dv and ds; the arrays are in the order of `Refs`.

  Args:
    *arrays: those in global memory.
    schedule: the schedule.
    segmented: segments are among them.
    fresh: dk and dv have no earlier gradients to add to.
    **scratch: what is in shared memory.
  """
  inputs, results = arrays[:-3], arrays[-3:]
  segments = () if segmented else (None, None)
  absent = dict.fromkeys(("segments_s", "p_s"))
  refs = Refs(*inputs, *segments, *results, **(absent | scratch))
  program, worker = lax.axis_index("program"), lax.axis_index("warpgroup")
  # The keys that most queries read start first.
  split = rem(program, schedule.splits)
  program = div(program, schedule.splits)
  place = _place(schedule, refs.place, rem(program, schedule.heads))
  tile = div(program, schedule.heads)
  chunk = refs.chunk[0]
  walk = steps_of(schedule, chunk, place.band, tile, split, worker, segmented)

  @pl.when(worker == WORKERS)
  def _() -> None:
    if not schedule.interpret:
      plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
    _load_steps(schedule, refs, place, chunk, tile, walk)

  def compute(*names: str) -> None:
    """Computes the named gradients of the keys of this warpgroup."""
    if not schedule.interpret:
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    some = walk.begin < walk.end
    pl.when(some)(lambda: plgpu.barrier_wait(refs.keys_ready))
    start_k = _first_key(schedule, tile, worker)
    sums = {"dk": refs.dk, "dv": refs.dv}
    grads = pl.run_scoped(
      lambda *accs: _walk_steps(
        schedule,
        refs,
        place,
        chunk,
        start_k,
        worker,
        walk,
        dict(zip(names, accs, strict=True)),
      ),
      *(plgpu.ACC((ROWS, sums[x].shape[-1]), jnp.float32) for x in names),
    )

    @pl.when(fresh | some)
    def _() -> None:
      at = split, place.head, pl.ds(start_k, ROWS)
      for name, x in zip(names, grads, strict=True):
        if not fresh:
          layout = plgpu.Layout.WGMMA
          x += plgpu.load(sums[name].at[at], layout=layout, optimized=False)
        sums[name][at] = x

    plgpu.wait_smem_to_gmem(0)

  if schedule.shared:
    pl.when(worker == 0)(lambda: compute("dv"))
    pl.when(worker == 1)(lambda: compute("dk"))
  else:
    pl.when(worker < WORKERS)(lambda: compute("dk", "dv"))


def _step_of(schedule: Schedule, chunk: Any, i: Any) -> tuple[Any, Any]:
  """Query tile and step of the i-th step of a chunk."""
  start, apart = schedule.tiles_of(chunk)
  tile = start + div(i, schedule.tile.steps) * apart
  return tile, tile * schedule.tile.steps + rem(i, schedule.tile.steps)


def _load_steps(
  schedule: Schedule,
  refs: Refs,
  place: Place,
  chunk: Any,
  tile: Any,
  walk: Walk,
) -> None:
  """Loads a key tile, and the steps that stream past it."""

  @pl.when(walk.begin < walk.end)
  def _() -> None:
    start_k = pl.multiple_of(tile * schedule.block_k, schedule.block_k)
    keys = place.b, pl.ds(start_k, schedule.block_k), place.h
    plgpu.copy_gmem_to_smem(refs.k.at[keys], refs.k_s, refs.keys_ready)
    plgpu.copy_gmem_to_smem(refs.v.at[keys], refs.v_s, refs.keys_ready)

  def load(n: Any, slot: Any) -> None:
    _, step = _step_of(schedule, chunk, walk.begin + n)

    def copy(source: Any, target: Any) -> None:
      plgpu.copy_gmem_to_smem(source, target, refs.ready.at[slot])

    copy(refs.lse.at[place.head, step], refs.lse_s.at[slot])
    copy(refs.delta.at[place.head, step], refs.delta_s.at[slot])
    if refs.segments_s is not None:
      copy(refs.row_segments.at[place.b, step], refs.segments_s.at[slot])
    for x in range(schedule.step_queries):
      query = step * schedule.step_queries + x
      query = jnp.minimum(query, schedule.length - 1)
      source = place.b, query, _heads(schedule, place)
      target = slot, _rows_of(schedule, x)
      copy(refs.q.at[source], refs.q_s.at[target])
      copy(refs.dout.at[source], refs.dout_s.at[target])

  count = walk.end - walk.begin
  _ring(schedule, refs.free, schedule.tile.num_stages, count, load)


def _walk_steps(
  schedule: Schedule,
  refs: Refs,
  place: Place,
  chunk: Any,
  start_k: Any,
  worker: Any,
  walk: Walk,
  accs: dict[str, Any],
) -> list[Any]:
  """Computes dk / scale, dv, or both, of the keys of a warpgroup.

  With dk it stores ds, too.

  Args:
    schedule: the schedule.
    refs: arrays and shared memory.
    place: batch row and head.
    chunk: number of the chunk.
    start_k: first key.
    worker: number of the warpgroup.
    walk: its steps.
    accs: an accumulator for each gradient by its name, "dk" or "dv".

  Returns:
    The gradients in the order of `accs`.
  """
  layout, shape = plgpu.Layout.WGMMA, (ROWS, ROWS)
  part = jnp.int32(0) if schedule.shared else worker  # of the tile
  mine = pl.ds(pl.multiple_of(part * ROWS, ROWS), ROWS)
  k, v = refs.k_s.at[mine], refs.v_s.at[mine]
  if refs.key_segments is not None:
    key_segment = plgpu.load(
      refs.key_segments.at[place.b, pl.ds(start_k, ROWS)],
      layout=layout.reduce(1),
      optimized=False,
    )

  def of_rows(ref: Any) -> Any:
    """[ROWS], of the rows of a step -> [keys, ROWS]."""
    return gradient_steps.of_rows(gradient_steps.load_rows(ref))

  def readable(slot: Any, step: Any) -> Any:
    key_row, row = (
      plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
      for axis in (0, 1)
    )
    first = place.band[0] + step * schedule.step_queries
    t = first + (row >> (schedule.group.bit_length() - 1))
    mask = schedule.band.readable(start_k + key_row, t, place.band[1])
    if refs.segments_s is not None:
      key = lax.broadcast_in_dim(key_segment, shape, [0])
      mask &= key == of_rows(refs.segments_s.at[slot])
    return mask

  def store(ds: Any, i: Any, tile: Any) -> None:
    buffer = rem(i, 2)
    # The store of two steps ago has read this buffer.
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    refs.ds_s[part, buffer] = ds
    plgpu.commit_smem()
    size = schedule.block_k
    slot = start_k - schedule.keys_of(tile, place.band, size)[0] * size
    plgpu.copy_smem_to_gmem(
      refs.ds_s.at[part, buffer],
      refs.ds.at[place.head, i, pl.ds(pl.multiple_of(slot, ROWS), ROWS)],
    )

  def slot_of(i: Any) -> Any:
    return rem(i - walk.begin, schedule.tile.num_stages)

  def skip(i: Any, _: Any) -> Any:
    plgpu.barrier_wait(refs.ready.at[slot_of(i)])
    plgpu.barrier_arrive(refs.free.at[slot_of(i)])
    return ()

  def compute(i: Any, _: Any, masked: bool) -> Any:
    slot = slot_of(i)
    tile, step = _step_of(schedule, chunk, i)
    q, dout = refs.q_s.at[slot], refs.dout_s.at[slot]
    plgpu.barrier_wait(refs.ready.at[slot])

    gradient_steps.add_step(
      accs,
      (k, v),
      (q, dout),
      (
        lambda: of_rows(refs.lse_s.at[slot]),
        lambda: of_rows(refs.delta_s.at[slot]),
      ),
      scale=schedule.scale,
      readable=functools.partial(readable, slot, step) if masked else None,
      store=lambda ds: store(ds, i, tile),
      buffer=refs.p_s.at[worker] if schedule.interpret else None,
    )
    if "dk" not in accs:  # Else `store` does it.
      # TMA may overwrite what was read of `lse_s` and `segments_s`.
      plgpu.commit_smem()
    plgpu.barrier_arrive(refs.free.at[slot])
    return ()

  masked = functools.partial(compute, masked=True)
  lax.fori_loop(walk.begin, walk.first, skip, ())
  if refs.key_segments is not None:
    lax.fori_loop(walk.first, walk.last, masked, ())
  else:
    full = functools.partial(compute, masked=False)
    lax.fori_loop(walk.first, walk.full_first, masked, ())
    lax.fori_loop(walk.full_first, walk.full_last, full, ())
    if schedule.band.window is not None:
      lax.fori_loop(walk.full_last, walk.last, masked, ())
  lax.fori_loop(walk.last, walk.end, skip, ())
  return [acc[...] for acc in accs.values()]


def key_value_gradient(
  schedule: Schedule,
  chunk: jax.Array,
  inputs: Inputs,
  before: Sequence[Any],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """dk / scale and dv of a chunk of queries, and ds.

  Args:
    schedule: the schedule.
    chunk: [1], its number.
    inputs: what the kernels read.
    before: refs of dk and dv of earlier chunks, which are added to; () for the
      first chunk.

  Returns:
    dk / scale [splits, B K, S, H] and dv [splits, B K, S, V] in float32, ()
    if they are in `before`; ds [B K, chunk steps, slots block_k, ROWS], parts
    of which are not written.
  """
  tile, dtype = schedule.tile, inputs.query.dtype
  stages, segmented = tile.num_stages, bool(inputs.segments)
  widths = inputs.key.shape[-1], inputs.value.shape[-1]
  steps = schedule.chunk_tiles * tile.steps
  block_k, parts = schedule.block_k, schedule.block_k // ROWS
  ds = schedule.heads, steps, schedule.slots * block_k, ROWS
  smem, barrier = plgpu.SMEM, plgpu.Barrier
  scratch = {
    "k_s": smem((block_k, widths[0]), dtype),
    "v_s": smem((block_k, widths[1]), dtype),
    "q_s": smem((stages, ROWS, widths[0]), dtype),
    "dout_s": smem((stages, ROWS, widths[1]), dtype),
    "lse_s": smem((stages, ROWS), jnp.float32),
    "delta_s": smem((stages, ROWS), jnp.float32),
    "ds_s": smem((parts, 2, ROWS, ROWS), dtype),
    "keys_ready": barrier(num_arrivals=2),
    "ready": barrier(
      num_arrivals=2 + segmented + 2 * schedule.step_queries,
      num_barriers=stages,
    ),
    "free": barrier(num_arrivals=WORKERS, num_barriers=stages),
  }
  if segmented:
    scratch["segments_s"] = smem((stages, ROWS), jnp.int32)
  if schedule.interpret:
    scratch["p_s"] = smem((WORKERS, ROWS, ROWS), dtype)
  *sums, ds = plgpu.kernel(
    functools.partial(
      _dkv_kernel, schedule=schedule, segmented=segmented, fresh=not before
    ),
    out_type=(
      *(() if before else _sums(schedule, inputs)),
      _result(ds, dtype),
    ),
    grid=(schedule.num_key_tiles * schedule.heads * schedule.splits,),
    scratch_types=scratch,
    **_options(schedule, "dkv"),
  )(chunk, *inputs[:-1], *inputs.segments, *before)
  return tuple(sums), ds


# -------------------------------------------------------------------------- dq


def _dq_kernel(
  chunk_ref,  # [1]
  place_ref,  # [B, 2]
  lse_ref,  # [B K, steps, ROWS]
  ds_ref,  # [B K, chunk steps, slots block_k, ROWS]
  k_ref,  # [B, S, K, H]
  dq_ref,  # [B, T, N, H]
  *,
  k_s,  # [dq_stages, ROWS keys, H]
  ds_s,  # [dq_stages, steps, ROWS keys, ROWS]
  dq_s,  # [WORKERS, ROWS, H]
  ready,  # [dq_stages] barriers: a tile of keys is loaded, and its ds
  free,  # [dq_stages] barriers: both warpgroups have read it
  schedule: Schedule,
):
  steps, stages = schedule.tile.steps, schedule.tile.dq_stages
  program, worker = lax.axis_index("program"), lax.axis_index("warpgroup")
  place = _place(schedule, place_ref, rem(program, schedule.heads))
  start, apart = schedule.tiles_of(chunk_ref[0])
  # The last queries read the most keys, so they start first.
  number = schedule.chunk_tiles - 1 - div(program, schedule.heads)
  tile = start + number * apart
  size = schedule.block_k
  base = schedule.keys_of(tile, place.band, size)[0] * size
  begin, end = schedule.keys_of(tile, place.band, ROWS)
  # All chunks have `chunk_tiles` tiles, but the last ones may not exist.
  exists = tile < schedule.num_tiles
  count = jnp.where(exists, jnp.maximum(end - begin, 0), 0)

  @pl.when(worker == WORKERS)
  def _() -> None:
    if not schedule.interpret:
      plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

    def load(n: Any, slot: Any) -> None:
      start_k = pl.multiple_of((begin + n) * ROWS, ROWS)
      keys = place.b, pl.ds(start_k, ROWS), place.h
      plgpu.copy_gmem_to_smem(k_ref.at[keys], k_s.at[slot], ready.at[slot])
      rows = pl.ds(number * steps, steps)
      start_ds = pl.multiple_of(start_k - base, ROWS)
      ds = place.head, rows, pl.ds(start_ds, ROWS)
      plgpu.copy_gmem_to_smem(ds_ref.at[ds], ds_s.at[slot], ready.at[slot])

    _ring(schedule, free, stages, count, load)

  @pl.when((worker < WORKERS) & exists)
  def _() -> None:
    if not schedule.interpret:
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    mine = steps // WORKERS  # steps of this warpgroup
    shape = ROWS, k_s.shape[-1]

    def compute(*accs: Any) -> Any:
      def product(n: Any, _: Any) -> Any:
        slot = rem(n, stages)
        plgpu.barrier_wait(ready.at[slot])
        for x, acc in enumerate(accs):
          ds = ds_s.at[slot, worker * mine + x]
          plgpu.wgmma(acc, ds.T, k_s.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[slot])
        return ()

      lax.fori_loop(0, count, product, ())
      return tuple(acc[...] for acc in accs)

    grads = pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32),) * mine)
    for x, dq in enumerate(grads):
      step = tile * steps + worker * mine + x
      lse = plgpu.load(
        lse_ref.at[place.head, step],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )
      # A NaN in an unread value may be in the ds of queries that read nothing.
      some = lax.broadcast_in_dim(
        (lse != EMPTY).astype(jnp.float32), shape, [0]
      )
      dq = jnp.where(some > 0, dq * schedule.scale, 0.0)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      dq_s[worker] = dq.astype(dq_s.dtype)
      plgpu.commit_smem()
      for y in range(schedule.step_queries):
        query = step * schedule.step_queries + y

        @pl.when(query < schedule.length)
        def _(query: Any = query, y: int = y) -> None:
          plgpu.copy_smem_to_gmem(
            dq_s.at[worker, _rows_of(schedule, y)],
            dq_ref.at[place.b, query, _heads(schedule, place)],
          )

    plgpu.wait_smem_to_gmem(0)


def query_gradient(
  schedule: Schedule,
  chunk: jax.Array,
  inputs: Inputs,
  ds: jax.Array,
  before: Any,
) -> Any:
  """dq [B, T, N, H] of the queries of a chunk; None if it is in `before`.

  Args:
    schedule: the schedule.
    chunk: [1], its number.
    inputs: what the kernels read.
    ds: from `key_value_gradient`.
    before: ref of dq, which is written to; None for the first chunk.
  """
  tile, query = schedule.tile, inputs.query
  stages, width, dtype = tile.dq_stages, query.shape[-1], query.dtype
  smem, barrier = plgpu.SMEM, plgpu.Barrier
  refs = () if before is None else (before,)
  result = plgpu.kernel(
    functools.partial(_dq_kernel, schedule=schedule),
    out_type=() if refs else (_result(query.shape, dtype),),
    grid=(schedule.chunk_tiles * schedule.heads,),
    scratch_types={
      "k_s": smem((stages, ROWS, width), dtype),
      "ds_s": smem((stages, tile.steps, ROWS, ROWS), dtype),
      "dq_s": smem((WORKERS, ROWS, width), dtype),
      "ready": barrier(num_arrivals=2, num_barriers=stages),
      "free": barrier(num_arrivals=WORKERS, num_barriers=stages),
    },
    **_options(schedule, "dq"),
  )(chunk, inputs.place, inputs.lse, ds, inputs.key, *refs)
  return None if refs else result[0]
