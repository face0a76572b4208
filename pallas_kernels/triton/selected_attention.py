"""Attention over selected blocks, forward: one program per query and group.

All heads of a group choose the same blocks, so a program takes the queries of
one position, all heads of one group, as the rows of its matrix products, and
streams each chosen block once for all of them. The grid walks the positions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common
from pallas_kernels.triton.tiling import SelectedTiling


class Spec(NamedTuple):
  """The static side of a call; hashable."""

  block: int  # l'
  scale: float
  tiling: SelectedTiling


class Sizes(NamedTuple):
  """Sizes of what is padded to a power of two."""

  group: int  # G
  num_ids: int  # m


class Blocks(NamedTuple):
  """How many of a query's ids to walk, and the block of its own position."""

  full: Any  # ids of blocks that lie wholly before the query's own
  diagonal: Any  # 1 if the query's own block is among the ids
  start: Any  # position of the first token of the query's own block


def chosen_blocks(
  ids_ref: Any, count: int, t: Any, key_length: int, block: int
) -> Blocks:
  """Splits `count` ids (ascending, then -1) by causality.

  Blocks before the query's own need no mask, its own does, later ones
  contribute nothing. A position outside the keys reads nothing.
  """
  width = ids_ref.shape[0]
  ids = common.load(ids_ref, common.padding_mask(count, width), other=-1)
  inside = (t >= 0) & (t < key_length)
  own = common.div(jnp.maximum(t, 0), block)
  full = jnp.sum(((ids >= 0) & (ids < own)).astype(jnp.int32))
  diagonal = jnp.max((ids == own).astype(jnp.int32))
  return Blocks(
    jnp.where(inside, full, 0), jnp.where(inside, diagonal, 0), own * block
  )


def walk_blocks(
  tile: Any,
  carry: Any,
  ids_ref: Any,
  blocks: Blocks,
  t: Any,
  *,
  block: int,
  block_k: int,
) -> Any:
  """Folds `tile(start, carry, diagonal)` over the keys of the chosen blocks.

  `block_k` keys at a time; `diagonal` (static) says that tokens after t occur.
  """
  steps = block // block_k

  def full(i, carry):
    if steps == 1:
      start = ids_ref[i] * block
    else:
      first = ids_ref[common.div(i, steps)] * block
      start = first + common.rem(i, steps) * block_k
    return tile(start, carry, False)

  def own(i, carry):
    return tile(blocks.start + i * block_k, carry, True)

  carry = lax.fori_loop(0, blocks.full * steps, full, carry)
  visible = common.div(jnp.maximum(t - blocks.start, 0), block_k) + 1
  return lax.fori_loop(0, blocks.diagonal * visible, own, carry)


def readable(
  start: Any,
  t: Any,
  block_k: int,
  diagonal: bool,
  segments_ref: Any,
  segment: Any,
) -> jax.Array | None:
  """Mask of the keys start .. start + block_k - 1, or None if all are read."""
  mask = None
  if diagonal:
    mask = start + jnp.arange(block_k) <= t
  if segments_ref is not None:
    # Blocks before the query's own are complete; its own may end too early.
    keys = common.load(segments_ref.at[pl.ds(start, block_k)], mask)
    same = keys == segment
    mask = same if mask is None else mask & same
  return mask


def _fwd_kernel(
  ids_ref,  # [m]
  offset_ref,  # [1]
  q_ref,  # [G, H], G and m padded to powers of two
  k_ref,  # [S, H]
  v_ref,  # [S, V]
  *refs,  # key segments [S] and query segment [1], if any; out [G, V], lse [G]
  spec: Spec,
  sizes: Sizes,
):
  *segments, out_ref, lse_ref = refs
  segments_ref, segment = None, None
  if segments:
    segments_ref, segment = segments[0], segments[1][0]
  rows, head_dim = q_ref.shape
  key_length, value_dim = v_ref.shape
  block_k = spec.tiling.fwd.block_k
  head_pieces = common.pieces(head_dim)
  value_pieces = common.pieces(value_dim)
  row_mask = common.padding_mask(sizes.group, rows)

  t = offset_ref[0] + pl.program_id(0)
  q = common.load_pieces(q_ref, slice(None), head_pieces, row_mask)

  def tile(start, carry, diagonal):
    acc, m_i, l_i = carry
    mask = readable(start, t, block_k, diagonal, segments_ref, segment)
    span_k = pl.ds(start, block_k)
    k = common.load_pieces(k_ref, span_k, head_pieces, mask)
    s = common.dot_pieces(q, k) * (spec.scale * common.LOG2E)
    if mask is not None:
      s = jnp.where(mask[None, :], s, common.MASK)
    m_next = jnp.maximum(m_i, s.max(axis=1))
    p = jnp.exp2(s - m_next[:, None])
    correction = jnp.exp2(m_i - m_next)
    l_next = l_i * correction + p.sum(axis=1)
    v = common.load_pieces(v_ref, span_k, value_pieces, mask)
    acc = tuple(
      a * correction[:, None] + common.dot(p.astype(x.dtype), x)
      for a, x in zip(acc, v, strict=True)
    )
    return acc, m_next, l_next

  acc = tuple(jnp.zeros((rows, w), jnp.float32) for _, w in value_pieces)
  m_i = jnp.full((rows,), common.MAX_INIT, jnp.float32)
  l_i = jnp.zeros((rows,), jnp.float32)
  acc, m_i, l_i = walk_blocks(
    tile,
    (acc, m_i, l_i),
    ids_ref,
    chosen_blocks(ids_ref, sizes.num_ids, t, key_length, spec.block),
    t,
    block=spec.block,
    block_k=block_k,
  )
  some = l_i > 0
  total = jnp.where(some, l_i, 1)
  lse = jnp.where(some, m_i / common.LOG2E + jnp.log(total), -jnp.inf)
  for (start, width), a in zip(value_pieces, acc, strict=True):
    out = (a / total[:, None]).astype(out_ref.dtype)
    common.store(out_ref.at[:, pl.ds(start, width)], out, row_mask)
  common.store(lse_ref, lse, row_mask)


class Layout(NamedTuple):
  """Arrays and block specs that the query-outer kernels have in common."""

  grid: tuple[int, int, int]  # queries, key/value heads, batch
  sizes: Sizes
  per_query: Any  # width -> spec of [B, T, K, G, width]
  per_row: pl.BlockSpec  # of [B, T, K, G]
  keys: Any  # width -> spec of [B, S, K, width]
  ids: pl.BlockSpec  # of [B, T, K, m]
  offset: pl.BlockSpec  # of [B]
  segments: tuple[pl.BlockSpec, ...]  # of [B, S] and [B, T]


def layout(grouped: jax.Array, key_length: int, ids: jax.Array) -> Layout:
  """Specs for queries [B, T, K, G, H]; consecutive programs share a head."""
  batch, length, kv_heads, group, _ = grouped.shape
  rows = common.padded_rows(group)
  num_ids = ids.shape[-1]
  return Layout(
    grid=(length, kv_heads, batch),
    sizes=Sizes(group, num_ids),
    per_query=lambda width: pl.BlockSpec(
      (None, None, None, rows, width), lambda t, h, b: (b, t, h, 0, 0)
    ),
    per_row=pl.BlockSpec(
      (None, None, None, rows), lambda t, h, b: (b, t, h, 0)
    ),
    keys=lambda width: pl.BlockSpec(
      (None, key_length, None, width), lambda t, h, b: (b, 0, h, 0)
    ),
    ids=pl.BlockSpec(
      (None, None, None, pl.next_power_of_2(num_ids)),
      lambda t, h, b: (b, t, h, 0),
    ),
    offset=pl.BlockSpec((1,), lambda t, h, b: (b,)),
    segments=(
      pl.BlockSpec((None, key_length), lambda t, h, b: (b, 0)),
      pl.BlockSpec((None, 1), lambda t, h, b: (b, t)),
    ),
  )


def group_heads(x: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, N, ...] -> [B, T, K, G, ...]."""
  return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


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
  """Out [B, T, N, V] and lse [B, T, N] (float32) of the selected branch.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    ids: int32 [B, T, K, m], strictly ascending, then -1.
    offset: int32 [B], position of the first query.
    segments: () or key segments [B, S] and query segments [B, T], int32; a
      query segment that no key has reads nothing.
    spec: block length, scale and tiles.
  """
  batch, length, heads, _ = query.shape
  key_length, kv_heads, value_dim = value.shape[1:]
  grouped = group_heads(query, kv_heads)
  specs = layout(grouped, key_length, ids)
  head_dim = query.shape[-1]
  tile = spec.tiling.fwd
  out, lse = common.pallas_call(
    functools.partial(_fwd_kernel, spec=spec, sizes=specs.sizes),
    name="nsa_selected_fwd",
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    grid=specs.grid,
    in_specs=[
      specs.ids,
      specs.offset,
      specs.per_query(head_dim),
      specs.keys(head_dim),
      specs.keys(value_dim),
      *specs.segments[: len(segments)],
    ],
    out_specs=[specs.per_query(value_dim), specs.per_row],
    out_shape=[
      jax.ShapeDtypeStruct((*grouped.shape[:4], value_dim), query.dtype),
      jax.ShapeDtypeStruct(grouped.shape[:4], jnp.float32),
    ],
  )(ids, offset, grouped, key, value, *segments)
  return (
    out.reshape(batch, length, heads, value_dim),
    lse.reshape(batch, length, heads),
  )
