"""Chunks of queries, and the lists of the queries that chose each block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.inverse_lists import invert
from pallas_kernels.query_chunks import make_chunking


def test_chunks_keep_the_sort_key_short() -> None:
  def array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  for length, group, heads, rows in (
    (8192, 4, 8, 8192),
    (65536, 4, 2, 65536),
    (65536, 1, 2, 65536),  # 8 would fit the memory
    (131072, 4, 1, 65536),  # twice as many would
    (262144, 1, 1, 32768),
    (524288, 8, 1, 65536),  # here the lists would be short
  ):
    chunking = make_chunking(
      array(1, length, 8, 16),
      pair_bytes=group * 128 * 2,
      key_length=length,
      block=64,
      scratch=2**31,
    )
    assert (chunking.heads, chunking.queries) == (heads, rows)
    num_owners = chunking.heads * chunking.num_blocks + 1
    short = num_owners * chunking.queries * chunking.num_ids < 2**32
    assert short == (length <= 262144)


def test_two_operand_sort() -> None:
  """Rows and items that do not fit one 32-bit key are sorted as a pair."""
  row = jnp.array([3, 0, 3, 1, 4, 0], jnp.int32)  # 4 drops
  item = jnp.array([0, 1, 2, 3, 4, 5], jnp.int32)
  for num_items in (6, 2**30):
    lists = invert(row, item, num_owners=4, num_items=num_items, piece=1)
    pieces = [p for p in np.asarray(lists.pieces).tolist() if p[2] > p[1]]
    got = [(r, int(lists.items[first])) for r, first, _ in pieces]
    assert got == [(0, 1), (0, 5), (1, 3), (3, 0), (3, 2)]
    assert lists.starts.tolist() == [0, 2, 3, 3, 5]


@pytest.mark.parametrize("piece", [1, 7, 100])
@pytest.mark.parametrize("count", [1, 40, 5000])
def test_lists(count: int, piece: int) -> None:
  """Every list in ascending order, cut into pieces; owner 50 drops."""
  rng = np.random.default_rng(0)
  owner = rng.integers(0, 51, count)
  owner[rng.random(count) < 0.5] = 3  # A long list.
  owner[owner == 7] = 50  # An empty list.
  lists = invert(
    jnp.asarray(owner, jnp.int32),
    jnp.arange(count, dtype=jnp.int32),
    num_owners=50,
    num_items=count,
    piece=piece,
  )
  found: dict[int, list[int]] = {i: [] for i in range(50)}
  for i, (of, first, last) in enumerate(np.asarray(lists.pieces)):
    if last > first:
      assert lists.starts[of] <= i < lists.starts[of + 1]
      assert last - first <= piece
      found[of] += np.asarray(lists.items[first:last]).tolist()
  for i, items in found.items():
    assert items == np.flatnonzero(owner == i).tolist()
