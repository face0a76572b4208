"""Block selection (Eq. 8-11): scores here, then Triton's top-n kernel.

A persistent block computes units of work: 64 queries against a tile of
compressed keys. Two warpgroups compute, each with half of the keys. A third one
loads; it also finds the units, and leaves each beside its keys. The keys of a
unit stay in shared memory, and its queries stream past them head by head: so a
product has queries as rows and keys as columns, and the sum over the heads of a
group moves no data between threads. Products and exponentials take equally
long. Where shared memory has room, a warpgroup issues the products of two heads
together, and the second one runs beside the exponentials of the first one.
Nothing orders the two warpgroups: to issue products in turns took 2% longer.

Nor does the sum over overlapping compressed blocks move data: in shared memory
come first the keys that begin first in their selection block, then all that
begin second, and so on. What has to be added is then in the same columns of
several slices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import checks
from pallas_kernels.bands import Band
from pallas_kernels.integers import ceil_div, div, rem
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import support
from pallas_kernels.mosaic_gpu.common import LOG2E, drain, options
from pallas_kernels.mosaic_gpu.interpreter import in_python, interpreted
from pallas_kernels.mosaic_gpu.tiling import (
  MAX_RATIO,
  ROWS,
  WORKERS,
  ScoresTile,
  SelectionTiling,
  selection_tiling,
)
from pallas_kernels.selection import Chunks, no_derivatives
from pallas_kernels.triton import select_blocks as triton
from pallas_kernels.triton import tiling as triton_tiling

# The kernels need names of jax 0.11; type checkers may see those of 0.10.
plgpu: Any = mosaic_gpu

# Registers per thread: what the loading warpgroup gives up the others take.
_LOAD_REGISTERS = 40
_COMPUTE_REGISTERS = 232

Arrays = tuple[jax.Array, jax.Array, jax.Array]
Index = tuple[None, Queries]


class Call(NamedTuple):
  """Static sizes and choices of a call.

  Attributes:
    band: which compressed keys queries see.
    tile: tile sizes.
    scale: softmax scale.
    ratio: as in `Spec`.
    reach: as in `Spec`.
    batch: B.
    length: T.
    chunk: queries per chunk.
    kv_heads: K.
    group: G.
    num_keys: C.
    blocks: persistent blocks.
    interpret: the kernel is interpreted.
  """

  band: Band
  tile: ScoresTile
  scale: float
  ratio: int
  reach: int
  batch: int
  length: int
  chunk: int
  kv_heads: int
  group: int
  num_keys: int
  blocks: int
  interpret: bool

  @property
  def columns(self) -> int:
    """Selection blocks in which the keys of a warpgroup begin."""
    return self.tile.block_k // self.ratio

  @property
  def key_copies(self) -> int:
    """Copies of the keys and lse of a unit to shared memory."""
    return WORKERS * self.ratio + 1

  @property
  def key_tiles(self) -> int:
    """Tiles of the keys of a unit."""
    return -(-self.num_keys // self.tile.keys)


class Refs(NamedTuple):
  """Arrays in global memory, and what is in shared memory (`*_s`).

  T' is T rounded up, W is `WORKERS`, D is `num_stages` and D' `key_stages`.
  """

  start: Any  # [1], first query of the chunk
  offset: Any  # [B], position of query 0
  q: Any  # [B, T', N, H]
  k: Any  # [B, J, ratio K, H] of the keys ratio * J + r
  lse: Any  # [B, K, G, T'], base 2
  key_segments: Any  # [B, ratio, J] or None
  query_segments: Any  # [B, T'] or None
  first_tile: Any  # [B, T' / ROWS], key tile of the first candidate, or None
  scores: Any  # as in `Chunks`
  k_s: Any  # [D', W, block_k, H]
  lse_s: Any  # [D', G, ROWS]
  unit_s: Any  # [D', fields of `Unit`]
  q_s: Any  # [D, ROWS, H]
  k_ready: Any  # [D'] barriers: keys and lse of a unit are loaded
  k_free: Any  # [D'] barriers: both warpgroups have read them
  q_ready: Any  # [D] barriers: the queries of a head are loaded
  q_free: Any  # [D] barriers


class Unit(NamedTuple):
  """A unit of work: scalars."""

  b: Any
  h: Any
  position: Any  # of the first query of the chunk
  row: Any  # first query, counted in the chunk
  tile: Any  # key tile; -1 after the last unit


class Place(NamedTuple):
  """A group of units: scalars.

  They are those of the query tiles of a batch row that see the first `tiles`
  key tiles and no more; `base` units come before them.
  """

  b: Any
  tiles: Any
  base: Any


# ----------------------------------------------------------------------- units


def _row(call: Call, refs: Refs, b: Any) -> tuple[Any, Any]:
  """Position of the first query of the chunk, and number of query tiles."""
  position = refs.offset[b] + refs.start[0]
  queries = jnp.minimum(
    jnp.minimum(call.chunk, call.length - refs.start[0]),
    call.band.length - position,
  )
  return position, ceil_div(jnp.maximum(queries, 0), ROWS)


def _first(call: Call, row: tuple[Any, Any], tile: Any) -> Any:
  """The first query tile that sees a key tile; the number of them if none."""
  position, tiles = row
  end = tile * (call.tile.keys * call.band.stride) + (call.band.span - 1)
  first = div(jnp.maximum(end - position, 0), ROWS)
  return jnp.where(tile < call.key_tiles, jnp.minimum(first, tiles), tiles)


def _num_units(call: Call, refs: Refs, block: Any) -> Any:
  """Number of units of a block."""

  def of_row(b: Any, count: Any) -> Any:
    row = _row(call, refs, b)

    def of_tile(tile: Any, count: Any) -> Any:
      return count + (row[1] - _first(call, row, tile)) * call.kv_heads

    return _loop(call.key_tiles, of_tile, count)

  count = _loop(call.batch, of_row, jnp.int32(0))
  return div(jnp.maximum(count - block + (call.blocks - 1), 0), call.blocks)


def _loop(stop: Any, body: Callable[..., Any], carry: Any) -> Any:
  return lax.fori_loop(jnp.int32(0), jnp.int32(stop), body, carry)


def _unit(
  call: Call, refs: Refs, index: Any, place: Place
) -> tuple[Unit, Place]:
  """A unit, searched for from a place on.

  A query tile sees the first few key tiles. Units are ordered by batch row,
  query tile, head and key tile: so blocks that run at the same time share the
  queries, which they find in L2.
  """

  def bounds(place: Place) -> tuple[Any, Any, Any]:
    row = _row(call, refs, place.b)
    first = _first(call, row, place.tiles - 1)
    size = place.tiles * call.kv_heads
    return first, size, (_first(call, row, place.tiles) - first) * size

  def before(place: Place) -> Any:
    return index >= place.base + bounds(place)[2]

  def advance(place: Place) -> Place:
    last = place.tiles == call.key_tiles
    return Place(
      place.b + last.astype(jnp.int32),
      jnp.where(last, 1, place.tiles + 1),
      place.base + bounds(place)[2],
    )

  place = lax.while_loop(before, advance, place)
  first, size, _ = bounds(place)
  number = index - place.base
  tile = lax.div(number, size)
  number -= tile * size
  h = lax.div(number, place.tiles)
  unit = Unit(
    place.b,
    h,
    _row(call, refs, place.b)[0],
    pl.multiple_of((first + tile) * ROWS, ROWS),
    number - h * place.tiles,
  )
  return unit, place


def _each_unit(
  call: Call, refs: Refs, block: Any, run: Callable[[Any, Unit], None]
) -> Any:
  """Calls run(n, unit) for the n-th unit of a block; returns their number.

  Key tiles that come before the segments of all queries are left out.
  """

  def step(i: Any, carry: Any) -> Any:
    n, place = carry
    unit, place = _unit(call, refs, block + i * call.blocks, place)
    if refs.first_tile is None:
      run(n, unit)
      return n + 1, place
    number = div(refs.start[0] + unit.row, ROWS)
    needed = refs.first_tile[unit.b, number] <= unit.tile
    pl.when(needed)(lambda: run(n, unit))
    return n + needed.astype(jnp.int32), place

  zero = jnp.int32(0)
  place = Place(zero, jnp.int32(1), zero)
  return _loop(_num_units(call, refs, block), step, (zero, place))[0]


# ---------------------------------------------------------------------- kernel


def _scores_kernel(
  *arrays: Any, call: Call, num_scores: int, **scratch: Any
) -> None:
  inputs, scores = arrays[:-num_scores], arrays[-num_scores:]
  segments = inputs[5:] or (None, None, None)
  fields: Any = (*inputs[:5], *segments, scores)
  refs = Refs(*fields, **scratch)
  block, worker = lax.axis_index("program"), lax.axis_index("warpgroup")

  @pl.when(worker == WORKERS)
  def _() -> None:
    if not call.interpret:
      plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
    units = _each_unit(
      call, refs, block, functools.partial(_load_unit, call, refs)
    )
    slot = _wait_for_free(refs.k_free, units, call.tile.key_stages)
    refs.unit_s[slot, Unit._fields.index("tile")] = jnp.int32(-1)
    for _ in range(call.key_copies):
      plgpu.barrier_arrive(refs.k_ready.at[slot])
    if call.interpret:
      drain(refs.k_free, call.tile.key_stages, units + 1)
      drain(refs.q_free, call.tile.num_stages, units * call.group)

  @pl.when(worker < WORKERS)
  def _() -> None:
    if not call.interpret:
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

    def look(n: Any) -> Unit:
      """Waits for the keys of the n-th unit."""
      slot = rem(n, call.tile.key_stages)
      plgpu.barrier_wait(refs.k_ready.at[slot])
      unit = Unit(*(refs.unit_s[slot, i] for i in range(len(Unit._fields))))
      return unit._replace(row=pl.multiple_of(unit.row, ROWS))

    def step(carry: Any) -> Any:
      n, unit = carry
      _compute_unit(call, refs, worker, n, unit)
      return n + 1, look(n + 1)

    zero = jnp.int32(0)
    n, _ = lax.while_loop(
      lambda carry: carry[1].tile >= 0, step, (zero, look(zero))
    )
    plgpu.barrier_arrive(refs.k_free.at[rem(n, call.tile.key_stages)])


def _wait_for_free(free: Any, i: Any, stages: int) -> Any:
  """The slot of the i-th tile of a ring, once it is free."""
  slot = rem(i, stages)
  pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
  return slot


def _load_unit(call: Call, refs: Refs, n: Any, unit: Unit) -> None:
  """Loads the keys and lse of the n-th unit, then its queries by head."""
  columns, stages = call.columns, call.tile.num_stages
  # Of the arrays, not of the chunk.
  row = pl.multiple_of(refs.start[0] + unit.row, ROWS)
  span_q = pl.ds(row, ROWS)

  slot = _wait_for_free(refs.k_free, n, call.tile.key_stages)
  # Every thread stores these before it arrives at the barrier of the copies: so
  # who waits for the copies finds them, too.
  for i, x in enumerate(unit):
    refs.unit_s[slot, i] = x
  for worker in range(WORKERS):
    first = pl.multiple_of((unit.tile * WORKERS + worker) * columns, columns)
    for r in range(call.ratio):
      plgpu.copy_gmem_to_smem(
        refs.k.at[unit.b, pl.ds(first, columns), r * call.kv_heads + unit.h],
        refs.k_s.at[slot, worker, pl.ds(r * columns, columns)],
        refs.k_ready.at[slot],
      )
  plgpu.copy_gmem_to_smem(
    refs.lse.at[unit.b, unit.h, pl.ds(0, call.group), span_q],
    refs.lse_s.at[slot],
    refs.k_ready.at[slot],
  )

  def load(g: Any, _: Any) -> Any:
    slot = _wait_for_free(refs.q_free, n * call.group + g, stages)
    plgpu.copy_gmem_to_smem(
      refs.q.at[unit.b, span_q, unit.h * call.group + g],
      refs.q_s.at[slot],
      refs.q_ready.at[slot],
    )
    return ()

  _loop(call.group, load, ())


def _compute_unit(
  call: Call, refs: Refs, worker: Any, n: Any, unit: Unit
) -> None:
  """Computes and stores the scores of one warpgroup's keys of the n-th unit."""
  layout, shape = plgpu.Layout.WGMMA, (ROWS, call.tile.block_k)
  heads, stages = call.tile.heads, call.tile.num_stages
  factor = call.scale * LOG2E
  key_slot = rem(n, call.tile.key_stages)
  keys = refs.k_s.at[key_slot, worker]

  def slot_of(g: Any) -> Any:
    return rem(n * call.group + g, stages)

  def wait_for_queries(g: Any) -> None:
    plgpu.barrier_wait(refs.q_ready.at[slot_of(g)])

  def step(i: Any, acc: Any) -> Any:
    """Adds the probabilities of `heads` heads."""
    first = i * heads

    def add(*products: Any) -> Any:
      for x, s in enumerate(products):
        plgpu.wgmma(s, refs.q_s.at[slot_of(first + x)], keys.T)
      total = acc
      for x, s in enumerate(products):
        g = first + x
        lse = plgpu.load(
          refs.lse_s.at[key_slot, g], layout=layout.reduce(1), optimized=False
        )
        scores = plgpu.wgmma_accumulator_load(s, wait_n=heads - 1 - x)
        plgpu.barrier_arrive(refs.q_free.at[slot_of(g)])
        lse = lax.broadcast_in_dim(lse, shape, [0])
        total += jnp.exp2(scores * factor - lse)
        # ptxas moves the wait for a product up, until it meets another wait.
        # This one keeps it below the exponentials.
        pl.when(g + heads < call.group)(
          functools.partial(wait_for_queries, g + heads)
        )
      return total

    return pl.run_scoped(add, *[plgpu.ACC(shape, jnp.float32)] * heads)

  for x in range(heads):
    wait_for_queries(x)
  zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
  p = _loop(call.group // heads, step, zeros)
  # TMA may overwrite what was read of `lse_s`: a barrier alone does not order
  # the two.
  plgpu.commit_smem()
  plgpu.barrier_arrive(refs.k_free.at[key_slot])

  store = functools.partial(_store, call, refs, worker, unit, p)
  if refs.first_tile is not None:
    store(masked=True)
    return
  seen = call.band.stop(unit.position + unit.row)
  full = seen >= (unit.tile * WORKERS + worker + 1) * call.tile.block_k
  pl.when(full)(functools.partial(store, masked=False))
  pl.when(~full)(functools.partial(store, masked=True))


def _store(
  call: Call, refs: Refs, worker: Any, unit: Unit, p: Any, masked: bool
) -> None:
  """Stores the scores, from probabilities of the keys of a warpgroup.

  Compressed blocks count in the selection block where they begin and, those
  that reach into it, in the next one.
  """
  layout, columns = plgpu.Layout.WGMMA, call.columns
  shape = ROWS, columns
  part = unit.tile * WORKERS + worker
  first = pl.multiple_of(part * columns, columns)
  rows = pl.ds(unit.row, ROWS)

  def of_rows(x: Any) -> Any:
    return lax.broadcast_in_dim(x, shape, [0])

  if masked:
    row, column = (
      plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
      for axis in (0, 1)
    )
    # Keys of the warpgroup that a query sees.
    seen = call.band.stop(unit.position + unit.row + row)
    seen -= part * call.tile.block_k
  if refs.first_tile is not None:
    start = pl.multiple_of(refs.start[0] + unit.row, ROWS)
    segment = plgpu.load(
      refs.query_segments.at[unit.b, pl.ds(start, ROWS)],
      layout=layout.reduce(1),
      optimized=False,
    )

  # The sum over the compressed blocks that begin in a selection block.
  sums: list[Any] = [None, None]
  for r in range(call.ratio):
    x = lax.slice(p, (0, r * columns), (ROWS, (r + 1) * columns))
    if masked:
      mask = column * call.ratio + r < seen
      if refs.first_tile is not None:
        key_segment = plgpu.load(
          refs.key_segments.at[unit.b, r, pl.ds(first, columns)],
          layout=layout.reduce(0),
          optimized=False,
        )
        mask &= lax.broadcast_in_dim(key_segment, shape, [1]) == of_rows(
          segment
        )
      # Scores that a query does not see may be inf or NaN.
      x = jnp.where(mask, x, 0.0)
    # Strides of the compressed block in this selection block.
    inside = min(call.reach, call.ratio - r)
    for i, weight in enumerate((inside, call.reach - inside)):
      if weight:
        weighted = x * float(weight) if weight > 1 else x
        sums[i] = weighted if sums[i] is None else sums[i] + weighted
  own, carried = sums
  refs.scores[0][unit.b, unit.h, rows, pl.ds(first, columns)] = own
  if carried is None:
    return
  # One column further right: that way no value moves between threads.
  target = unit.b, unit.h, rows, pl.ds(first + 1, columns)
  if call.interpret:
    refs.scores[1][target] = carried
  else:
    _store_one_by_one(refs.scores[1].at[target], carried)


def _store_one_by_one(ref: Any, x: Any) -> None:
  """Stores [ROWS, columns] anywhere in global memory.

  `ref[...] = x` stores two floats at once, whose address must be a multiple of
  8 bytes; and TMA takes only multiples of 16 bytes, else it is an illegal
  instruction.
  """

  def store(context: Any, ref: Any, x: Any) -> None:
    del context
    x.foreach(lambda value, index: utils.memref.store(value, ref, index))

  arg_types = plgpu.RefType(), plgpu.Layout.WGMMA
  plgpu.inline_mgpu(arg_types=arg_types)(store)(ref, x)


# ------------------------------------------------------------------- interface


def check(spec: Spec, arrays: Arrays, index: Index) -> None:
  """As in `interface`; `tiles` must be a `SelectionTiling` that fits."""
  query, key, _ = arrays
  support.check_where()
  checks.check_scores(spec)
  support.check_heads(query, key, key)
  if MAX_RATIO % spec.ratio:
    raise NotImplementedError(
      f"`selection_block` / `compression_stride` = {spec.ratio}: the kernels "
      f"take divisors of {MAX_RATIO}"
    )
  checks.check_tiles(spec, SelectionTiling, *_sizes(spec, arrays).values())
  triton.check(spec._replace(tiles=None), arrays, index)  # Its top-n kernel.


@in_python
def forward(spec: Spec, arrays: Arrays, index: Index) -> jax.Array:
  """As in `interface`: ids int32 [B, T, K, n] of the selected blocks."""
  query = arrays[0]
  tiles = spec.tiles or selection_tiling(**_sizes(spec, arrays))
  top_n = triton_tiling.selection_tiling(
    length=query.shape[1], dtype=query.dtype, ratio=spec.ratio
  )
  top_n = dataclasses.replace(top_n, scratch=tiles.scratch)
  return triton.select(
    spec._replace(tiles=top_n),
    arrays,
    index,
    (ROWS, tiles.scores.keys),
    functools.partial(_scores, tiles.scores),
  )


def backward(
  spec: Spec, arrays: Arrays, index: Index, *results: object
) -> NoReturn:
  """Block selection has no derivatives; raises NotImplementedError."""
  no_derivatives()


def _sizes(spec: Spec, arrays: Arrays) -> dict[str, int]:
  """What tiles have to fit."""
  query, key, _ = arrays
  return {
    "head_dim": query.shape[-1],
    "group": checks.group_of(query, key),
    "ratio": spec.ratio,
  }


def _scores(
  tile: ScoresTile,
  spec: Spec,
  arrays: Arrays,
  offset: jax.Array,
  segments: tuple[jax.Array, ...],
  chunks: Chunks,
) -> Callable[[jax.Array], Any]:
  """`make_scores` of `triton.select`."""
  query, key, lse = arrays
  config, ratio = spec.config, spec.ratio
  batch, length, heads, head_dim = query.shape
  num_keys, kv_heads = key.shape[1:3]
  group = heads // kv_heads
  call = Call(
    Band(
      config.compression_stride,
      config.compression_block,
      None,
      spec.key_length,
    ),
    tile,
    spec.scale,
    ratio,
    spec.reach,
    batch,
    length,
    chunks.length,
    kv_heads,
    group,
    num_keys,
    tile.blocks or support.multiprocessors(),
    spec.interpret,
  )
  stages = tile.num_stages
  # TMA loads boxes of 8 rows; of a box it fills with zeros what is not there.
  query = _pad(query, -length % 8)
  # A place for every key of the last tile.
  blocks = call.key_tiles * WORKERS * call.columns
  key = _pad(key, blocks * ratio - num_keys)
  key = key.reshape(batch, blocks, ratio * kv_heads, head_dim)
  lse = lse.astype(jnp.float32) * LOG2E
  lse = _pad(lse, -length % ROWS).reshape(batch, -1, kv_heads, group)
  lse = jnp.moveaxis(lse, 1, 3)
  if segments:
    of_keys, of_queries, first = segments
    of_keys = _pad(of_keys, blocks * ratio - num_keys)
    of_keys = jnp.swapaxes(of_keys.reshape(batch, blocks, ratio), 1, 2)
    first = _pad(first, -length % ROWS, spec.key_length)
    first = first.reshape(batch, -1, ROWS).min(axis=2) // (tile.keys // ratio)
    segments = of_keys, _pad(of_queries, -length % ROWS, -1), first
  dtype, smem, barrier = query.dtype, plgpu.SMEM, plgpu.Barrier
  keys = tile.key_stages, WORKERS, tile.block_k, head_dim
  scratch = {
    "k_s": smem(keys, dtype),
    "unit_s": smem((tile.key_stages, len(Unit._fields)), jnp.int32),
    "lse_s": smem((tile.key_stages, group, ROWS), jnp.float32),
    "q_s": smem((stages, ROWS, head_dim), dtype),
    "k_ready": barrier(
      num_arrivals=call.key_copies, num_barriers=tile.key_stages
    ),
    "k_free": barrier(num_arrivals=WORKERS, num_barriers=tile.key_stages),
    "q_ready": barrier(num_barriers=stages),
    "q_free": barrier(num_arrivals=WORKERS, num_barriers=stages),
  }
  results = chunks.shapes(batch, kv_heads)
  run = plgpu.kernel(
    functools.partial(_scores_kernel, call=call, num_scores=chunks.num_scores),
    out_type=results,
    grid=(call.blocks,),
    scratch_types=scratch,
    **options("nsa_block_scores", WORKERS + 1, call.interpret),
  )
  if call.interpret:
    run = functools.partial(interpreted, run, results)
  return lambda start: run(start, offset, query, key, lse, *segments)


def _pad(x: jax.Array, more: int, value: float = 0) -> jax.Array:
  """Appends entries along axis 1."""
  width = [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, width, constant_values=value) if more else x
