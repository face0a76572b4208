"""Walks the sorted block ids of several queries at once, in kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

# In place of a block id: the list of a query has ended.
_NONE = 2**31 - 1


def minimum(*values: Any) -> Any:
  """The lowest of several numbers."""
  return functools.reduce(lax.min, values)


def walk_union(
  ids: Any,
  num_ids: int,
  rows: Sequence[Any],
  own: Sequence[Any],
  i: Any,
  visit: Callable[[Any, Any, list[Any], Sequence[Any]], None],
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
    visit: visit(i, block_id, hits, places) is called with the number of a step,
      its block, whether each query chose it, and the place of each query's next
      block in its list, which is this block where `hits` holds.
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
    visit(i, block_id, hits, places)
    return i + 1, lowest(*heads), following, heads

  places = tuple(jnp.int32(0) for _ in rows)
  heads = tuple(entry(q, place) for q, place in enumerate(places))
  i, *_ = lax.while_loop(
    lambda carry: carry[1] != _NONE,
    step,
    (i, lowest(*heads), places, heads),
  )
  return i
