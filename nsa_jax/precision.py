"""Precision of the portable code: dtypes of sums, and products."""

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype in which values of `dtype` are summed: float32 at least.

  Unlike `jnp.promote_types`, also under jax_numpy_dtype_promotion="strict".
  """
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def einsum(equation: str, x: Array, y: Array) -> Array:
  """An einsum accumulated in float32 (float64 for float64), without TF32.

  Args:
    equation: as in `jnp.einsum`.
    x: any floating-point array.
    y: another one; it takes part in the dtype of `x`.

  Returns:
    The result, float32 at least.
  """
  precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None
  return jnp.einsum(
    equation,
    x,
    y.astype(x.dtype),
    precision=precision,
    preferred_element_type=sum_dtype(x.dtype),
  )
