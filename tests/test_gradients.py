"""What backward passes compute beside their kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gradients import sum_splits


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_splits_are_added_in_a_fixed_order(count: int) -> None:
  x = np.random.default_rng(0).normal(size=(count, 5, 4)).astype(np.float32)
  expected = x.sum(axis=0, dtype=np.float64)
  total = sum_splits(jnp.asarray(x))
  np.testing.assert_allclose(total, expected, atol=1e-5)
  # XLA chooses the order of a reduction, but not of additions.
  assert "reduce" not in str(jax.make_jaxpr(sum_splits)(x))
