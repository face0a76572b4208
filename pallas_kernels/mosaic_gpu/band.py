"""Attention over a band of keys, forward: compressed branch and window.

A block computes pieces of work, one after the other; a piece is a few
neighbouring queries with all heads of a group. Two warpgroups compute, 64 rows
each, and a third one loads keys and values for both, up to `num_stages` tiles
ahead, across the ends of pieces too. The two may take turns: one issues matrix
products while the other computes exponentials. Within one, the product of
probabilities and values of a tile runs beside the exponentials of the next
tile.

A piece walks its key tiles from the last one to the first one: only those at
the ends of its band need a mask, and for the compressed branch this is mostly
the first one it walks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import checks
from pallas_kernels.bands import Band, BandReads, key_tiles
from pallas_kernels.integers import div, rem
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import support
from pallas_kernels.mosaic_gpu.common import LOG2E, drain, options
from pallas_kernels.mosaic_gpu.interpreter import interpreted
from pallas_kernels.mosaic_gpu.tiling import (
  ROWS,
  WORKERS,
  BandTile,
  BandTiling,
  band_tiling,
  in_place,
)
from pallas_kernels.triton import band as triton_band

# The kernels need names of jax 0.11; type checkers may see those of 0.10.
plgpu: Any = mosaic_gpu

# Initial value of running maxima: finite, so that -inf - m is -inf.
_MAX_INIT = -1e30
# Registers per thread: what the loading warpgroup gives up the others take.
_LOAD_REGISTERS = 40
_COMPUTE_REGISTERS = 232


class Call(NamedTuple):
  """Static sizes and choices of a call.

  Attributes:
    band: which keys queries read.
    tile: tile sizes.
    scale: softmax scale.
    batch: B.
    length: T.
    kv_heads: K.
    group: G.
    blocks: persistent blocks.
    interpret: the kernel is interpreted.
  """

  band: Band
  tile: BandTile
  scale: float
  batch: int
  length: int
  kv_heads: int
  group: int
  blocks: int
  interpret: bool

  @property
  def per(self) -> int:
    """Queries per warpgroup; left-over rows compute what nobody reads."""
    return ROWS // self.group

  @property
  def block_q(self) -> int:
    """Queries per piece."""
    return WORKERS * self.per

  @property
  def num_pieces(self) -> int:
    """Pieces of work of the whole call."""
    return -(-self.length // self.block_q) * self.kv_heads * self.batch


class Refs(NamedTuple):
  """Arrays in global memory, and what is in shared memory (`*_s`).

  P is rows (of a warpgroup), W is `WORKERS`, D is `num_stages`.
  """

  place: Any  # [B, 2]: position of query 0, first valid key row
  q: Any  # [B, T, N, H]
  k: Any  # [B, S, K, H], S key rows, padded
  v: Any  # [B, S, K, V]
  key_segments: Any  # [B, S] or None
  query_segments: Any  # [B, T] or None
  out: Any  # [B, T, N, V]
  lse: Any  # [B, K, T G]
  q_s: Any  # [W, P, H]
  k_s: Any  # [D, block_k, H]
  v_s: Any  # [D, block_k, V]
  o_s: Any  # [W, P, V], or None if the output passes through `q_s`
  p_s: Any  # [W, P, block_k], interpreted only
  acc_s: Any  # [W, P, V] float32, interpreted only
  lse_s: Any  # [W, P]
  segments_s: Any  # [D, block_k] or None
  q_ready: Any  # [W] barriers: the queries of a warpgroup are loaded
  k_ready: Any  # [D] barriers: a tile of keys is loaded
  v_ready: Any
  k_free: Any  # [D] barriers: both warpgroups have read a tile of keys
  v_free: Any
  turn: Any  # [W] barriers: a warpgroup may issue products; or None


class Piece(NamedTuple):
  """A piece of work: scalars.

  Steps [0, steps) walk the tiles from `last` down. Those before `full_begin`
  and from `full_end` on need a mask.
  """

  b: Any
  h: Any
  first: Any  # first query
  offset: Any  # position of query 0
  first_row: Any  # first valid key row
  last: Any  # last key tile
  full_begin: Any
  full_end: Any
  steps: Any


def _num_pieces(call: Call, block: Any) -> Any:
  """Number of pieces of a block."""
  rounds, rest = divmod(call.num_pieces, call.blocks)
  return rounds + (_place(call, block, rounds) < rest).astype(jnp.int32)


def _place(call: Call, block: Any, n: Any) -> Any:
  """The place of a block in round n, in turn from the left and the right."""
  return jnp.where(n % 2 == 0, block, call.blocks - 1 - block)


def _piece(call: Call, refs: Refs, block: Any, n: Any) -> Piece:
  """The n-th piece of a block.

  The last queries read the most keys, so they start first; then blocks that get
  a long piece in one round get a short one in the next.
  """
  index = n * call.blocks + _place(call, block, n)
  h = rem(index, call.kv_heads)
  index = div(index, call.kv_heads)
  b = rem(index, call.batch)
  tiles = -(-call.length // call.block_q)
  first = (tiles - 1 - div(index, call.batch)) * call.block_q
  offset = refs.place[b, 0]
  first_row = refs.place[b, 1]
  bounds = key_tiles(
    call.band,
    offset,
    first_row,
    first,
    jnp.minimum(first + call.block_q, call.length),
    call.tile.block_k,
  )
  # One step at least: it is masked, and finds that nothing is to be read.
  end = jnp.maximum(bounds.end, bounds.begin + 1)
  return Piece(
    b,
    h,
    first,
    offset,
    first_row,
    last=end - 1,
    full_begin=end - bounds.full_end,
    full_end=end - bounds.full_begin,
    steps=end - bounds.begin,
  )


def _each_piece(num_pieces: Any, run: Any) -> Any:
  """Calls run(n, steps before it) -> steps for all n; returns all steps."""
  return lax.fori_loop(
    0,
    num_pieces,
    lambda n, before: before + run(n, before),
    jnp.int32(0),
  )


def _fwd_kernel(*arrays: Any, call: Call, **scratch: Any) -> None:
  inputs, results = arrays[:-2], arrays[-2:]
  inputs = inputs if len(inputs) > 4 else (*inputs, None, None)
  absent = dict.fromkeys(("o_s", "p_s", "acc_s", "segments_s", "turn"))
  refs = Refs(*inputs, *results, **(absent | scratch))
  block = lax.axis_index("program")
  worker = lax.axis_index("warpgroup")
  num_pieces = _num_pieces(call, block)

  @pl.when(worker == WORKERS)
  def _():
    if not call.interpret:
      plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
    steps = _each_piece(
      num_pieces, functools.partial(_load_piece, call, refs, block)
    )
    if call.interpret:
      drain(refs.k_free, call.tile.num_stages, steps)
      drain(refs.v_free, call.tile.num_stages, steps)

  @pl.when(worker < WORKERS)
  def _():
    if not call.interpret:
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    _load_queries(call, refs, _piece(call, refs, block, 0), worker)
    # The first turn is the first warpgroup's. Turns alternate strictly, across
    # pieces too: a second arrival before a wait would be lost.
    if call.tile.turns:
      pl.when(worker == 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))
    _each_piece(
      num_pieces,
      functools.partial(_attend, call, refs, block, worker, num_pieces),
    )
    if call.interpret and call.tile.turns:
      pl.when(worker == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


def _load_piece(call: Call, refs: Refs, block: Any, n: Any, before: Any) -> Any:
  """Loads the key tiles of the n-th piece; returns its steps."""
  piece = _piece(call, refs, block, n)
  block_k, stages = call.tile.block_k, call.tile.num_stages

  def load(i: Any, _: Any) -> Any:
    slot = rem(before + i, stages)
    start = pl.multiple_of((piece.last - i) * block_k, block_k)
    # Rows after the last one are zeros.
    rows = pl.ds(start, block_k)

    def wait(free: Any) -> None:
      pl.when(before + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))

    wait(refs.k_free)
    source, ready = (piece.b, rows, piece.h), refs.k_ready.at[slot]
    plgpu.copy_gmem_to_smem(refs.k.at[source], refs.k_s.at[slot], ready)
    if refs.segments_s is not None:
      plgpu.copy_gmem_to_smem(
        refs.key_segments.at[piece.b, rows], refs.segments_s.at[slot], ready
      )
    wait(refs.v_free)
    plgpu.copy_gmem_to_smem(
      refs.v.at[source], refs.v_s.at[slot], refs.v_ready.at[slot]
    )
    return ()

  lax.fori_loop(0, piece.steps, load, ())
  return piece.steps


def _load_queries(call: Call, refs: Refs, piece: Piece, worker: Any) -> None:
  """Loads the queries of a warpgroup; queries after the last repeat it."""
  for i in range(call.per):
    query = jnp.minimum(piece.first + worker * call.per + i, call.length - 1)
    plgpu.copy_gmem_to_smem(
      refs.q.at[piece.b, query, _heads(call, piece)],
      refs.q_s.at[worker, pl.ds(i * call.group, call.group)],
      refs.q_ready.at[worker],
    )


def _heads(call: Call, piece: Piece) -> Any:
  """Slice of the query heads of a piece."""
  start = pl.multiple_of(piece.h * call.group, call.group)
  return pl.ds(start, call.group)


def _wide(x: Any, width: int, axis: int = 0) -> Any:
  """[rows] or, with axis 1, [width] -> [rows, width]."""
  shape = (len(x), width) if axis == 0 else (width, len(x))
  return lax.broadcast_in_dim(x, shape, [axis])


class Rows(NamedTuple):
  """What is known of the rows of a warpgroup, all int32 [rows]."""

  t: Any  # position of the query
  stop: Any  # end of the key rows that it reads
  start: Any  # first one (window), or None
  segment: Any  # or None


def _rows(call: Call, refs: Refs, piece: Piece, worker: Any) -> Rows:
  layout = plgpu.Layout.WGMMA.reduce(1)
  row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout)
  local = div(row, call.group)
  query = piece.first + worker * call.per
  t = piece.offset + query + local
  start = segment = None
  if call.band.window is not None:
    start = jnp.maximum(t - (call.band.window - 1), piece.first_row)
  if refs.query_segments is not None:
    segment = jnp.full_like(local, -1)
    for i in range(call.per):
      at = jnp.minimum(query + i, call.length - 1)
      this = refs.query_segments[piece.b, at]
      segment = jnp.where(local == i, this, segment)
  return Rows(t, call.band.stop(t), start, segment)


def _attend(
  call: Call,
  refs: Refs,
  block: Any,
  worker: Any,
  num_pieces: Any,
  n: Any,
  before: Any,
) -> Any:
  """Computes the rows of one warpgroup in the n-th piece; returns its steps."""
  piece = _piece(call, refs, block, n)
  block_k, stages = call.tile.block_k, call.tile.num_stages
  value_dim = refs.v_s.shape[-1]
  layout = plgpu.Layout.WGMMA
  rows = _rows(call, refs, piece, worker)
  column = plgpu.broadcasted_iota(jnp.int32, (ROWS, block_k), 1, layout=layout)
  q_s = refs.q_s.at[worker]
  factor = call.scale * LOG2E

  def slot_of(i: Any) -> Any:
    return rem(before + i, stages)

  def my_turn() -> None:
    if call.tile.turns:
      plgpu.barrier_wait(refs.turn.at[worker])

  def your_turn() -> None:
    if call.tile.turns:
      plgpu.barrier_arrive(refs.turn.at[1 - worker])

  def wait_for_keys(i: Any) -> None:
    pl.when(i < piece.steps)(
      lambda: plgpu.barrier_wait(refs.k_ready.at[slot_of(i)])
    )

  def readable(i: Any) -> Any:
    """Mask of the tile of step i."""
    first = (piece.last - i) * block_k
    mask = column < _wide(rows.stop - first, block_k)
    if rows.start is not None:
      mask &= column >= _wide(rows.start - first, block_k)
    if rows.segment is not None:
      keys = plgpu.load(refs.segments_s.at[slot_of(i)], layout=layout.reduce(0))
      # These reads and the next copy to this place go different ways to shared
      # memory, which a barrier alone does not order.
      plgpu.commit_smem()
      mask &= _wide(keys, ROWS, 1) == _wide(rows.segment, block_k)
    return mask

  def softmax(s: Any, m_i: Any, mask: Any) -> Any:
    """p, the new maximum, the correction of older sums, the sums of p."""
    times = factor
    if factor <= 0:
      s, times = s * factor, 1.0
    if mask is not None:
      s = jnp.where(mask, s, -jnp.inf)
    # The maximum is taken before scaling, so that scaling and subtraction fuse
    # into one instruction.
    m_next = jnp.maximum(m_i, s.max(axis=1) * times)
    p = jnp.exp2(s * times - _wide(m_next, block_k))
    return p, m_next, jnp.exp2(m_i - m_next), p.sum(axis=1)

  def scores(i: Any, mask: Any, then: Any) -> Any:
    """Q K^T of step i, and the mask; `then` runs once the product is issued.

    It returns how many products, issued later, need not have ended.
    """
    slot = slot_of(i)

    def run(s: Any) -> Any:
      plgpu.wgmma(s, q_s, refs.k_s.at[slot].T)
      return plgpu.wgmma_accumulator_load(s, wait_n=then())

    s = pl.run_scoped(run, plgpu.ACC((ROWS, block_k), jnp.float32))
    mask = readable(i) if mask else None
    plgpu.barrier_arrive(refs.k_free.at[slot])
    return s, mask

  def add_values(acc: Any, p: Any, i: Any) -> Any:
    """Issues acc += P V of step i."""
    values = refs.v_s.at[slot_of(i)]
    if not call.interpret:
      plgpu.wgmma(acc, p, values)
      return
    # The interpreter multiplies no operands in registers.
    refs.p_s[worker] = p
    plgpu.commit_smem()

    def product(r: Any) -> Any:
      plgpu.wgmma(r, refs.p_s.at[worker], values)
      return r[...]

    shape = plgpu.ACC((ROWS, value_dim), jnp.float32)
    acc[...] += pl.run_scoped(product, shape)

  def sums_of(acc: Any) -> Any:
    """Reads `acc`, once all products have ended."""
    if call.interpret:
      return acc[...]
    return plgpu.wgmma_accumulator_load(acc, wait_n=0)

  def next_queries() -> None:
    pl.when(n + 1 < num_pieces)(
      lambda: _load_queries(
        call, refs, _piece(call, refs, block, n + 1), worker
      )
    )

  def release() -> int:
    your_turn()
    return 0

  def walk(acc: Any) -> Any:
    """Accumulates P V in `acc`; returns its last value, maxima and sums."""
    plgpu.barrier_wait(refs.q_ready.at[worker])
    wait_for_keys(0)
    my_turn()
    s, mask = scores(0, True, release)
    m_i = plgpu.layout_cast(
      jnp.full((ROWS,), _MAX_INIT, jnp.float32), layout.reduce(1)
    )
    p, m_i, _, l_i = softmax(s, m_i, mask)
    p = p.astype(refs.v_s.dtype)
    wait_for_keys(1)

    def step(i: Any, carry: Any, masked: bool) -> Any:
      p, m_i, l_i = carry
      my_turn()

      def then() -> int:
        plgpu.barrier_wait(refs.v_ready.at[slot_of(i - 1)])
        add_values(acc, p, i - 1)
        your_turn()
        return 1

      s, mask = scores(i, masked, then)
      p_next, m_i, correction, sums = softmax(s, m_i, mask)
      # ptxas moves the wait for P V up, until it meets another wait. This one
      # keeps it below the exponentials, which would else not run beside P V.
      wait_for_keys(i + 1)
      old = sums_of(acc)
      acc[...] = old * _wide(correction, value_dim)
      plgpu.barrier_arrive(refs.v_free.at[slot_of(i - 1)])
      # If P were cast before the wait for P V, ptxas would serialise all
      # products.
      return p_next.astype(p.dtype), m_i, l_i * correction + sums

    carry = p, m_i, l_i
    for start, stop, masked in _loops(call, piece, refs.key_segments):
      body = functools.partial(step, masked=masked)
      carry = lax.fori_loop(start, stop, body, carry)
    p, m_i, l_i = carry
    if refs.o_s is not None:
      next_queries()
    last = piece.steps - 1
    plgpu.barrier_wait(refs.v_ready.at[slot_of(last)])
    my_turn()
    add_values(acc, p, last)
    your_turn()
    result = sums_of(acc)
    plgpu.barrier_arrive(refs.v_free.at[slot_of(last)])
    return result, m_i, l_i

  if call.interpret:  # It cannot write to an accumulator of wgmma.
    sums = refs.acc_s.at[worker]
    sums[...] = jnp.zeros(sums.shape, sums.dtype)
    acc, m_i, l_i = walk(sums)
  else:
    acc, m_i, l_i = pl.run_scoped(
      walk, plgpu.ACC((ROWS, value_dim), jnp.float32)
    )
  # Rows at positions past the last token may have read keys: they are zeroed.
  some = (l_i != 0) & (rows.t < call.band.length)
  total = jnp.where(some, l_i, 1.0)
  lse = jnp.where(some, m_i / LOG2E + jnp.log(total), -jnp.inf)
  kept = _wide(some.astype(jnp.float32), value_dim) > 0
  out = jnp.where(kept, acc * _wide(1 / total, value_dim), 0.0)
  staging = q_s if refs.o_s is None else refs.o_s.at[worker]
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the piece before
  staging[...] = out.astype(staging.dtype)
  refs.lse_s[worker] = lse
  plgpu.commit_smem()
  query = piece.first + worker * call.per
  for i in range(call.per):

    @pl.when(query + i < call.length)
    def _(i: int = i) -> None:
      plgpu.copy_smem_to_gmem(
        staging.at[pl.ds(i * call.group, call.group)],
        refs.out.at[piece.b, query + i, _heads(call, piece)],
      )

  used = call.per * call.group
  plgpu.copy_smem_to_gmem(
    refs.lse_s.at[worker, pl.ds(0, used)],
    # In bounds: `lse` has room for the whole of the last piece.
    refs.lse.at[piece.b, piece.h, pl.ds(query * call.group, used)],
  )
  if refs.o_s is None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    next_queries()
  return piece.steps


def _loops(call: Call, piece: Piece, segments: Any) -> list[Any]:
  """(first step, end, masked) of the loops after step 0, which is masked."""
  if segments is not None:
    return [(1, piece.steps, True)]
  full_begin = jnp.maximum(piece.full_begin, 1)
  full_end = jnp.maximum(piece.full_end, full_begin)
  begin: Any = 1
  loops: list[Any] = []
  # The numbers of key rows that the queries of a piece read may differ by one:
  # then only the last tile that they read has an end.
  if call.block_q - 1 > call.band.stride:
    loops.append((begin, full_begin, True))
    begin = full_begin
  loops.append((begin, full_end, False))
  if call.band.window is not None:
    loops.append((full_end, piece.steps, True))
  return loops


def check(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> None:
  """As in `interface`; `tiles` must be a `BandTiling` that fits."""
  query, _, value = qkv
  support.check_where()
  checks.check_scores(spec)
  support.check_heads(*qkv)
  checks.check_tiles(spec, BandTiling, query.shape[-1], value.shape[-1])
  # Its kernels compute some gradients.
  triton_band.check(spec._replace(tiles=None), qkv, index)


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], reads: BandReads
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, N, V] and lse [B, T, N] (float32).

  Args:
    spec: scale and tiles.
    qkv: query [B, T, N, H]; key [B, S, K, H] and value [B, S, K, V] of S key
      rows.
    reads: what the queries read.
  """
  query, key, value = qkv
  batch, length, heads, head_dim = query.shape
  num_keys, kv_heads, value_dim = value.shape[1:]
  tiles = spec.tiles or band_tiling(head_dim=head_dim, value_dim=value_dim)
  tile = tiles.fwd
  block_k, stages = tile.block_k, tile.num_stages
  call = Call(
    reads.band,
    tile,
    spec.scale,
    batch,
    length,
    kv_heads,
    heads // kv_heads,
    blocks=tile.blocks or support.multiprocessors(),
    interpret=spec.interpret,
  )
  call = call._replace(blocks=min(call.blocks, call.num_pieces))
  # TMA loads boxes of 8 rows; of a tile it fills with zeros what is not there.
  padding = max(-num_keys % 8, block_k - num_keys)
  inputs = [
    jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    for x in (key, value, *reads.segments[:1])
  ]
  dtype, barrier = query.dtype, plgpu.Barrier
  scratch: dict[str, Any] = {
    "q_s": plgpu.SMEM((WORKERS, ROWS, head_dim), dtype),
    "k_s": plgpu.SMEM((stages, block_k, head_dim), dtype),
    "v_s": plgpu.SMEM((stages, block_k, value_dim), dtype),
    "lse_s": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
    "q_ready": barrier(num_arrivals=call.per, num_barriers=WORKERS),
    "k_ready": barrier(
      num_arrivals=2 if reads.segments else 1, num_barriers=stages
    ),
    "v_ready": barrier(num_barriers=stages),
    "k_free": barrier(num_arrivals=WORKERS, num_barriers=stages),
    "v_free": barrier(num_arrivals=WORKERS, num_barriers=stages),
  }
  if tile.turns:
    scratch["turn"] = barrier(num_barriers=WORKERS)
  if not in_place(tile, head_dim, value_dim):
    scratch["o_s"] = plgpu.SMEM((WORKERS, ROWS, value_dim), dtype)
  if reads.segments:
    scratch["segments_s"] = plgpu.SMEM((stages, block_k), jnp.int32)
  if call.interpret:
    scratch["p_s"] = plgpu.SMEM((WORKERS, ROWS, block_k), dtype)
    scratch["acc_s"] = plgpu.SMEM((WORKERS, ROWS, value_dim), jnp.float32)
  rows = -(-length // call.block_q) * call.block_q
  results = [
    jax.ShapeDtypeStruct((batch, length, heads, value_dim), dtype),
    # A whole number of pieces: a contiguous copy from shared memory is not a
    # tensor copy, and would run on into the next head.
    jax.ShapeDtypeStruct((batch, kv_heads, rows * call.group), jnp.float32),
  ]
  run = plgpu.kernel(
    functools.partial(_fwd_kernel, call=call),
    out_type=results,
    grid=(call.blocks,),
    scratch_types=scratch,
    **options(
      f"nsa_{call.band.branch}_fwd",
      WORKERS + 1,
      call.interpret,
      auto_barriers=True,
    ),
  )
  if call.interpret:
    run = functools.partial(interpreted, run, results)
  out, lse = run(reads.place, query, *inputs, *reads.segments[1:])
  lse = lse.reshape(batch, kv_heads, rows, call.group)[:, :, :length]
  return out, lse.transpose(0, 2, 1, 3).reshape(batch, length, heads)
