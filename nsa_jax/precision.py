"""Products of the portable code: how precise they are."""

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array


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
    preferred_element_type=jnp.promote_types(jnp.float32, x.dtype),
  )
