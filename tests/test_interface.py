"""What is passed to every backend."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.interface import Queries

SEGMENTS: Any = np.ones((2, 5), np.int32)


def test_static_offsets_are_no_leaves() -> None:
  """They stay integers through jit, so that a check can read them."""
  queries = Queries(3, SEGMENTS, SEGMENTS, key_offset=-2)
  assert len(jax.tree.leaves(queries)) == 2
  seen: list[Any] = []

  @jax.jit
  def run(queries: Queries) -> Any:
    seen.append((queries.offset, queries.key_offset))
    return queries.positions(2, 4)

  np.testing.assert_array_equal(run(queries), [[3, 4, 5, 6]] * 2)
  run(Queries(3, SEGMENTS, SEGMENTS, key_offset=-2))
  assert seen == [(3, -2)]  # An equal one is not traced again.
  run(Queries(4, SEGMENTS, SEGMENTS, key_offset=-2))
  assert seen == [(3, -2), (4, -2)]


def test_arrays_are_leaves() -> None:
  offset = jnp.array([1, 7], jnp.int32)
  queries = Queries(offset, SEGMENTS, SEGMENTS, key_offset=offset)
  assert len(jax.tree.leaves(queries)) == 4
  again = jax.tree.map(lambda x: x, queries)
  assert again.key_offset is offset
  np.testing.assert_array_equal(again.positions(2, 2), [[1, 2], [7, 8]])
  assert jax.tree.leaves(Queries(0)) == []
  assert Queries(0).key_segments is None
