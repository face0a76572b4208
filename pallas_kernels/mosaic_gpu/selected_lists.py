"""Unions of the sorted block ids of several queries.

Made in a kernel, step by step (`walk_union`), or before it (`union_lists`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.integers import div, rem

# In place of a block id: the list of a query has ended.
_NONE = 2**31 - 1
# The number of readers is this many bits above the readers.
COUNT_BITS = 16


class UnionLists(NamedTuple):
  """The blocks that the queries of a tile chose, ascending, each once.

  The entry of a block is followed by an unused one for each further reader. So
  one sort makes the list, without a second one to close the gaps.

  Attributes:
    blocks: int32 [tiles, E + 1], E = Q n.
    readers: int32 [tiles, E + 1]: bit i is set if query i chose the block, and
      2**`COUNT_BITS` times the number of them; 0 after the last entry.
    counts: int32 [tiles], number of blocks.
  """

  blocks: jax.Array
  readers: jax.Array
  counts: jax.Array


def union_lists(ids: jax.Array) -> UnionLists:
  """Lists for tiles of Q queries, Q up to 16.

  Args:
    ids: int32 [tiles, Q, n], distinct for a query; negative ones are dropped.
  """
  tiles, queries, num_ids = ids.shape
  # Queries of a block follow one another.
  query = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
  keys = jnp.where(ids >= 0, ids * queries + query, _NONE)
  keys = lax.sort(keys.reshape(tiles, -1), is_stable=False)
  keys = jnp.pad(keys, [(0, 0), (0, queries)], constant_values=_NONE)
  size = queries * num_ids + 1
  blocks = div(keys, queries)
  readers = number = jnp.zeros((tiles, size), jnp.int32)
  for i in range(queries):
    there = slice(i, i + size)
    same = blocks[:, there] == blocks[:, :size]
    # A query that has a block twice must not become another one.
    reader = jnp.where(same, 1 << rem(keys[:, there], queries), 0)
    readers |= reader
    number += same.astype(jnp.int32)
  readers |= number << COUNT_BITS
  blocks, some = blocks[:, :size], keys[:, :size] != _NONE
  before = jnp.pad(blocks, [(0, 0), (1, 0)], constant_values=-1)[:, :size]
  counts = jnp.sum(some & (blocks != before), axis=1, dtype=jnp.int32)
  return UnionLists(blocks, jnp.where(some, readers, 0), counts)


def minimum(*values: Any) -> Any:
  """The lowest of several numbers."""
  return functools.reduce(lax.min, values)


def walk_union(
  ids: Any,
  num_ids: int,
  rows: Sequence[Any],
  own: Sequence[Any],
  i: Any,
  visit: Callable[[Any, Any, list[Any]], None],
  lowest: Callable[..., Any] = minimum,
) -> Any:
  """Visits the blocks of several queries in ascending order, each block once.

  It is the merge of a merge sort: each step takes the lowest block that some
  query has not read yet.

  Args:
    ids: flat int32 [rows * n] in global memory.
    num_ids: n.
    rows: row of each query.
    own: last block that each query may read; -1 for none.
    i: number of the first step.
    visit: visit(i, block_id, hits) is called with the number of a step, its
      block, and whether each query chose it.
    lowest: minimum of the queries' block ids.

  Returns:
    The number after that of the last step.
  """

  def entry(query: int, place: Any) -> Any:
    """Block of a query at a place of its list. Later than its own: none."""
    last = jnp.int32(num_ids - 1)
    block_id = ids[rows[query] * num_ids + lax.min(place, last)]
    some = (place < num_ids) & (block_id >= 0) & (block_id <= own[query])
    return jnp.where(some, block_id, _NONE)

  def step(carry: Any) -> Any:
    i, block_id, places, heads = carry
    hits = [head == block_id for head in heads]
    # The loads of the next step are issued before `visit` waits.
    following = tuple(
      place + hit.astype(jnp.int32)
      for place, hit in zip(places, hits, strict=True)
    )
    heads = tuple(entry(q, place) for q, place in enumerate(following))
    visit(i, block_id, hits)
    return i + 1, lowest(*heads), following, heads

  places = tuple(jnp.int32(0) for _ in rows)
  heads = tuple(entry(q, place) for q, place in enumerate(places))
  i, *_ = lax.while_loop(
    lambda carry: carry[1] != _NONE,
    step,
    (i, lowest(*heads), places, heads),
  )
  return i
