"""Block selection (Eq. 8-11): importance of the blocks, then top-n.

The score kernel tiles queries and compressed keys. A program keeps its keys,
loops over the heads of a group, and accumulates their probabilities in
registers. So masks and the sum over overlapping blocks are computed once per
group, and the sum over its heads moves no data between threads. The top-n
kernel then reads the scores of each query.

No gradients: the inputs are under `stop_gradient`. The scores are the only
large temporary; processing queries in chunks keeps them within a budget.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import checks, platforms
from pallas_kernels.integers import div, rem
from pallas_kernels.interface import (
  Queries,
  Spec,
  per_row,
)
from pallas_kernels.selection import (
  Chunks,
  no_derivatives,
  segments_of,
  without_scores,
)
from pallas_kernels.triton import common, support
from pallas_kernels.triton.by_query import group_heads
from pallas_kernels.triton.tiling import SelectionTiling, selection_tiling

# Extra columns after the scores of a query: the last block carries over into
# one that is never read but must exist. 32 of them keep the rows aligned.
_SPARE = 32
# Greater than any block id.
_NEVER = 2**30


def _arange(size: int) -> jax.Array:
  return jnp.arange(size, dtype=jnp.int32)


def _scores_kernel(
  start_ref,  # [1], first query of the chunk
  offset_ref,  # [1]
  q_ref,  # [T, G, H]
  k_ref,  # [block_k, H]
  lse_ref,  # [G, T], base 2
  *refs,  # segments [block_k], [T] and first [T], if any; scores [block_q, W]
  num_scores: int,
  num_keys: int,
  masked: bool,
  spec: Spec,
):
  """p_slc[j] = own[j] + carried[j]: from blocks that begin in j and in j - 1.

  `carried` is a second output, stored one column further right: that way no
  value moves between threads.
  """
  config = spec.config
  tiling = spec.tiles
  refs, score_refs = refs[:-num_scores], refs[-num_scores:]
  length, group, head_dim = q_ref.shape
  block_q, block_k = tiling.block_q, tiling.scores.block_k
  columns = block_k // spec.ratio
  head_pieces = common.pieces(head_dim)
  step_k = pl.program_id(0)
  start = start_ref[0] + pl.program_id(1) * block_q
  span_q = pl.ds(start, block_q)
  row_mask = start + _arange(block_q) < length if masked else None
  t = offset_ref[0] + start + _arange(block_q)

  first_end = (
    step_k * (block_k * config.compression_stride)
    + config.compression_block
    - 1
  )
  needed = first_end <= offset_ref[0] + start + block_q - 1
  if masked:
    needed &= start < length
  if refs:
    first = common.load(refs[2].at[span_q], row_mask, _NEVER)
    needed &= jnp.min(first) < (step_k + 1) * columns

  @pl.when(needed)
  def _():
    key = step_k * block_k + _arange(block_k)
    key_mask = key < num_keys if num_keys % block_k else None
    # Transposed outside the loop, keys are stored to shared memory once, not
    # once per head.
    k = [
      x.T for x in common.load_pieces(k_ref, slice(None), head_pieces, key_mask)
    ]

    def head(g, acc):
      q = common.load_pieces(q_ref, (span_q, g), head_pieces, row_mask)
      lse = common.load(lse_ref.at[g, span_q], row_mask)
      products = [common.dot(x, y) for x, y in zip(q, k, strict=True)]
      s = sum(products[1:], products[0]) * (spec.scale * common.LOG2E)
      return acc + jnp.exp2(s - lse[:, None])

    p = lax.fori_loop(
      0, group, head, jnp.zeros((block_q, block_k), jnp.float32)
    )
    # Entries that a query does not see may be inf or NaN. They mix with no
    # others before this mask.
    end = key * config.compression_stride + config.compression_block - 1
    visible = end[None, :] <= t[:, None]
    if refs:
      key_segment = common.load(refs[0], key_mask)
      segment = common.load(refs[1].at[span_q], row_mask, -1)
      visible &= key_segment[None, :] == segment[:, None]
    p = jnp.where(visible, p, 0)

    def reduce(weight):
      weighted = p * weight.astype(jnp.float32)[None, :]
      return weighted.reshape(block_q, columns, spec.ratio).sum(axis=2)

    # Strides of a compressed block in the selection block where it begins.
    inside = jnp.minimum(
      spec.reach, spec.ratio - rem(_arange(block_k), spec.ratio)
    )
    # The interpreter stores by indices of one dtype, and that of `:` depends on
    # jax_enable_x64.
    first_column = (step_k * columns).astype(int)
    plgpu.store(
      score_refs[0].at[:, pl.ds(first_column, columns)], reduce(inside)
    )
    if num_scores == 2:
      plgpu.store(
        score_refs[1].at[:, pl.ds(first_column + 1, columns)],
        reduce(spec.reach - inside),
      )


def _top_n_kernel(
  start_ref,  # [1], first query of the chunk
  offset_ref,  # [1]
  *refs,  # scores [rows, W], once or twice; first [T], if any; ids [rows, n]
  num_scores: int,
  length: int,
  spec: Spec,
):
  """The forced blocks and the best others, ascending, then -1.

  For each group of neighbouring blocks the kernel keeps the largest score not
  chosen yet. Chosen blocks need no flags: a block is still available iff it
  comes after the last chosen one in the order of choice (larger score first,
  then lower index).
  """
  score_refs, first_refs, ids_ref = (
    refs[:num_scores],
    refs[num_scores:-1],
    refs[-1],
  )
  rows, width = score_refs[0].shape
  width -= _SPARE
  config = spec.config
  block_m = spec.tiles.block_m
  size = _group_size(width, block_m)
  per_step = block_m // size
  num_steps = pl.next_power_of_2(width // block_m)
  num_free = spec.num_free

  start = start_ref[0] + pl.program_id(0) * rows
  t = offset_ref[0] + start + _arange(rows)
  first = jnp.zeros(rows, jnp.int32)
  if first_refs:
    first = common.load(
      first_refs[0].at[pl.ds(start, rows)],
      start + _arange(rows) < length,
      _NEVER,
    )
  last = div(jnp.maximum(t, 0), config.selection_block)
  count = jnp.where((t >= 0) & (t < spec.key_length), last - first + 1, 0)
  # Up to n candidates are all chosen; with more, forced blocks do not overlap.
  crowded = count > config.num_selected
  lo = jnp.where(crowded, first + config.num_initial, _NEVER)
  hi = jnp.where(crowded, last - config.num_local, -1)

  def free_scores(j, scores):
    """Scores of the blocks j [rows or 1, X] as int32 bits; -1 unless free.

    Scores are not negative, so their bits have the same order; and a warp finds
    the maximum of integers in one instruction.
    """
    x = scores[0]
    if num_scores == 2:
      # Nothing carries over into the first block: that entry is not written.
      always = config.num_initial > 0  # The first block is forced, not free.
      x += scores[1] if always else jnp.where(j > first[:, None], scores[1], 0)
    # A NaN counts as the lowest score.
    x = jnp.where(x == x, lax.bitcast_convert_type(x, jnp.int32), 0)
    return jnp.where((lo[:, None] <= j) & (j <= hi[:, None]), x, -1)

  def visit(step, high):
    span = pl.ds(step * block_m, block_m)
    x = free_scores(
      step * block_m + _arange(block_m)[None, :],
      [plgpu.load(ref.at[:, span]) for ref in score_refs],
    )
    x = x.reshape(rows, per_step, size).max(axis=2)
    here = _arange(num_steps) == step
    return jnp.where(here[None, :, None], x[:, None, :], high)

  high = lax.fori_loop(
    div(jnp.maximum(jnp.min(lo), 0), block_m),
    div(jnp.max(hi) + block_m, block_m),
    visit,
    jnp.full((rows, num_steps, per_step), -1, jnp.int32),
  ).reshape(rows, num_steps * per_step)

  row = jnp.broadcast_to(_arange(rows)[:, None], (rows, size))
  group = _arange(num_steps * per_step)[None, :]
  place = _arange(pl.next_power_of_2(num_free))[None, :]
  slot = _arange(pl.next_power_of_2(config.num_selected))[None, :]

  def choose(i, carry):
    high, chosen, last_score, last_block = carry
    score = high.max(axis=1)[:, None]
    best = jnp.where(high == score, group, _NEVER).min(axis=1)[:, None]
    j = best * size + _arange(size)[None, :]
    x = free_scores(j, [ref[row, j] for ref in score_refs])
    equal = (x == score) & ((score < last_score) | (j > last_block))
    block = jnp.where(equal, j, _NEVER).min(axis=1)[:, None]
    left = (x < score) | ((x == score) & (j > block))
    rest = jnp.where(left, x, -1).max(axis=1)[:, None]
    high = jnp.where(group == best, rest, high)
    return high, jnp.where(place == i, block, chosen), score, block

  some = jnp.max(crowded.astype(jnp.int32))
  _, chosen, _, _ = lax.fori_loop(
    0,
    some * num_free,
    choose,
    (
      high,
      jnp.full((rows, place.shape[1]), _NEVER, jnp.int32),
      jnp.full((rows, 1), jnp.iinfo(jnp.int32).max, jnp.int32),
      jnp.full((rows, 1), -1, jnp.int32),
    ),
  )

  def sort(i, carry):
    ids, smaller = carry
    block = jnp.where(chosen > smaller, chosen, _NEVER).min(axis=1)[:, None]
    return jnp.where(slot == config.num_initial + i, block, ids), block

  first, last, count = first[:, None], last[:, None], count[:, None]
  after = slot - (config.num_selected - config.num_local)
  ids = jnp.where(after >= 0, last - config.num_local + 1 + after, first + slot)
  ids, _ = lax.fori_loop(
    0, some * num_free, sort, (ids, jnp.full((rows, 1), -1, jnp.int32))
  )
  few = jnp.where(slot < count, first + slot, -1)
  ids = jnp.where(count > config.num_selected, ids, few)
  plgpu.store(
    ids_ref,
    ids,
    mask=jnp.broadcast_to(slot < config.num_selected, ids.shape),
  )


def _group_size(width: int, block_m: int) -> int:
  """Blocks per group: about sqrt(width), so that both searches are short."""
  return min(1 << (width.bit_length() // 2), block_m)


def check(
  spec: Spec,
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  index: tuple[None, Queries],
) -> None:
  """As in `interface`; `tiles` must be a `SelectionTiling` that fits."""
  query, compressed_key, _ = arrays
  del index
  support.check_where()
  support.check_heads(query, compressed_key, compressed_key)
  checks.check_selection_block(spec.config.selection_block, support.BLOCKS)
  checks.check_tiles(spec, SelectionTiling, spec.ratio)


def forward(
  spec: Spec,
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  index: tuple[None, Queries],
) -> jax.Array:
  """As in `interface`: ids int32 [B, T, K, n] of the selected blocks."""
  query = arrays[0]
  if spec.tiles is None:
    tiles = selection_tiling(
      length=query.shape[1], dtype=query.dtype, ratio=spec.ratio
    )
    spec = spec._replace(tiles=tiles)
  tiles = spec.tiles
  return select(
    spec, arrays, index, (tiles.block_q, tiles.scores.block_k), _scores
  )


def select(
  spec: Spec,
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  index: tuple[None, Queries],
  tile: tuple[int, int],
  make_scores: Callable[..., Any],
) -> jax.Array:
  """Ids int32 [B, T, K, n] by a given kernel for the scores.

  Args:
    spec: static arguments; with `tiles`, of which the top-n kernel has some.
    arrays: query, compressed key and lse.
    index: the queries.
    tile: queries and compressed keys per tile of the scores.
    make_scores: f(spec, arrays, offset, segments, chunks) -> g(start) ->
      scores of the chunk that begins with query start [1]; see `Chunks` and
      `segments_of`.
  """
  query, key, _ = arrays
  config, tiling = spec.config, spec.tiles
  _, queries = index
  batch, length = query.shape[:2]
  num_keys, kv_heads = key.shape[1:3]
  offset = per_row(queries.offset, batch)
  segments = segments_of(spec, queries)
  num_blocks = pl.cdiv(spec.key_length, config.selection_block)
  if not spec.num_free or num_blocks <= config.num_selected or not num_keys:
    return without_scores(spec, length, kv_heads, offset, segments)

  block_q, block_k = tile
  steps_k = pl.cdiv(num_keys, block_k)
  steps_m = pl.cdiv(steps_k * (block_k // spec.ratio), tiling.block_m)
  width = steps_m * tiling.block_m + _SPARE
  num_scores = 2 if spec.reach > 1 else 1
  per_query = batch * kv_heads * width * 4 * num_scores
  per_chunk = max(tiling.scratch // per_query, block_q)
  per_chunk = min(
    1 << (per_chunk.bit_length() - 1), pl.cdiv(length, block_q) * block_q
  )
  chunks = Chunks(pl.cdiv(length, per_chunk), per_chunk, width, num_scores)
  scores = make_scores(spec, arrays, offset, segments, chunks)

  padded_n = pl.next_power_of_2(config.num_selected)
  top_n_call = pl.pallas_call(
    functools.partial(
      _top_n_kernel, num_scores=num_scores, length=length, spec=spec
    ),
    **common.options("nsa_top_n", tiling.top_n_warps, 1, spec.interpret),
    grid=(per_chunk // tiling.rows, kv_heads, batch),
    in_specs=[
      pl.BlockSpec((1,), lambda *_: (0,)),
      pl.BlockSpec((1,), lambda i, h, b: (b,)),
      *[
        pl.BlockSpec(
          (None, None, tiling.rows, width), lambda i, h, b: (b, h, i, 0)
        )
      ]
      * num_scores,
      *(pl.BlockSpec((None, length), lambda i, h, b: (b, 0)),)[: len(segments)],
    ],
    out_specs=pl.BlockSpec(
      (None, tiling.rows, None, padded_n), lambda i, h, b: (b, i, h, 0)
    ),
    out_shape=platforms.out_shape(
      (batch, per_chunk, kv_heads, config.num_selected), jnp.int32
    ),
  )

  def chunk(start):
    start = start[None]
    return top_n_call(start, offset, *scores(start), *segments[2:])

  if chunks.number == 1:
    return chunk(jnp.int32(0))[:, :length]
  ids = lax.map(chunk, jnp.arange(chunks.number, dtype=jnp.int32) * per_chunk)
  ids = jnp.moveaxis(ids, 0, 1).reshape(batch, -1, *ids.shape[3:])
  return ids[:, :length]


def _scores(
  spec: Spec,
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  offset: jax.Array,
  segments: tuple[jax.Array, ...],
  chunks: Chunks,
) -> Callable[[jax.Array], Any]:
  """`make_scores` of `select`."""
  query, key, lse = arrays
  tiling = spec.tiles
  block_q, block_k = tiling.block_q, tiling.scores.block_k
  batch, length = query.shape[:2]
  num_keys, kv_heads = key.shape[1:3]
  grouped = group_heads(query, kv_heads)
  group, head_dim = grouped.shape[3:]
  lse = group_heads(lse.astype(jnp.float32) * common.LOG2E, kv_heads)
  lse = jnp.moveaxis(lse, 1, 3)  # [B, K, G, T]
  all_queries = pl.BlockSpec((None, length), lambda i, j, h, b: (b, 0))
  call = pl.pallas_call(
    functools.partial(
      _scores_kernel,
      num_scores=chunks.num_scores,
      num_keys=num_keys,
      masked=chunks.number * chunks.length != length,
      spec=spec,
    ),
    **common.options(
      "nsa_block_scores",
      tiling.scores.num_warps,
      tiling.scores.num_stages,
      spec.interpret,
    ),
    # Neighbouring programs share their queries.
    grid=(
      pl.cdiv(num_keys, block_k),
      chunks.length // block_q,
      kv_heads,
      batch,
    ),
    in_specs=[
      pl.BlockSpec((1,), lambda *_: (0,)),
      pl.BlockSpec((1,), lambda i, j, h, b: (b,)),
      pl.BlockSpec(
        (None, length, None, group, head_dim),
        lambda i, j, h, b: (b, 0, h, 0, 0),
      ),
      pl.BlockSpec(
        (None, block_k, None, head_dim), lambda i, j, h, b: (b, i, h, 0)
      ),
      pl.BlockSpec(
        (None, None, group, length), lambda i, j, h, b: (b, h, 0, 0)
      ),
      *(
        pl.BlockSpec((None, block_k), lambda i, j, h, b: (b, i)),
        all_queries,
        all_queries,
      )[: len(segments)],
    ],
    out_specs=[
      pl.BlockSpec(
        (None, None, block_q, chunks.width), lambda i, j, h, b: (b, h, j, 0)
      )
    ]
    * chunks.num_scores,
    out_shape=chunks.shapes(batch, kv_heads),
  )
  return lambda start: call(start, offset, grouped, key, lse, *segments)


def backward(
  spec: Spec,
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  index: tuple[None, Queries],
  *results: object,
) -> NoReturn:
  """Block selection has no derivatives; raises NotImplementedError."""
  no_derivatives()
