"""Integer arithmetic that every kernel language lowers."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def div(x: Any, y: int) -> Any:
  """Floor division of nonnegative integers.

  `//` lowers to a sign correction that Triton does not support for scalars, and
  that takes XLA many operations.
  """
  return lax.div(x, jnp.asarray(y, x.dtype))


def rem(x: Any, y: int) -> Any:
  """Remainder of nonnegative integers."""
  return lax.rem(x, jnp.asarray(y, x.dtype))


def ceil_div(x: Any, y: int) -> Any:
  """ceil(x / y) of a traced x >= 0."""
  return div(x + (y - 1), y)


def within(x: Any, low: Any, high: Any) -> Any:
  """`x` clipped to [low, high]."""
  return jnp.minimum(jnp.maximum(x, low), high)
