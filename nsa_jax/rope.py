"""Rotary position embedding with YaRN scaling.

Pure functions of explicit positions. `layers/core.py` decides which arrays are
rotated, and to which positions.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nsa_jax import _checks
from nsa_jax.precision import sum_dtype
from nsa_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Frequencies of the rotary embedding (arXiv 2104.09864, 2309.00071).

  Attributes:
    base: pair i of the H/2 pairs turns by base**(-2 i / H) radians per token.
    yarn_factor: s >= 1, the context extension; 1 means no scaling, and the
      fields below are not used.
    original_max_position: context length in tokens before the extension.
    beta_fast: pairs that make more turns than this in `original_max_position`
      tokens keep their frequency.
    beta_slow: pairs that make fewer turns than this are slowed down by s.

  Raises:
    ValueError: if a value is out of range.

  Example:
    >>> from nsa_jax import RopeConfig
    >>> RopeConfig(yarn_factor=4.0).original_max_position
    8192
  """

  base: float = 10_000.0
  yarn_factor: float = 1.0
  original_max_position: int = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0

  def __post_init__(self):
    for name in ("base", "yarn_factor", "beta_fast", "beta_slow"):
      value = _checks.finite(name, getattr(self, name))
      if not isinstance(getattr(self, name), int | float):
        object.__setattr__(self, name, value)  # Arrays have no hash.
    position = _checks.static_int(
      "original_max_position", self.original_max_position, 1
    )
    object.__setattr__(self, "original_max_position", position)
    if self.base <= 1:
      raise ValueError(f"`base`={self.base} must be greater than 1.")
    if self.yarn_factor < 1:
      raise ValueError(
        f"`yarn_factor`={self.yarn_factor} must be at least 1 (1: no scaling)."
      )
    if self.beta_slow <= 0:
      raise ValueError(f"`beta_slow`={self.beta_slow} must be positive.")
    if self.beta_fast <= self.beta_slow:
      raise ValueError(
        f"`beta_fast`={self.beta_fast} must be greater than `beta_slow`="
        f"{self.beta_slow}."
      )


def rope_frequencies(head_dim: int, config: RopeConfig) -> np.ndarray:
  """Radians per token of every pair of features, float64 [H / 2].

  With YaRN (arXiv 2309.00071, "NTK-by-parts"), the frequency of a pair that
  makes r turns in the original context is multiplied by

      ramp + (1 - ramp) / yarn_factor

  where ramp = clip((r - beta_slow) / (beta_fast - beta_slow), 0, 1).

  Args:
    head_dim: H, even.
    config: base and YaRN parameters.

  Raises:
    ValueError: if `head_dim` is not an even positive integer.

  Example:
    >>> from nsa_jax import RopeConfig
    >>> from nsa_jax.rope import rope_frequencies
    >>> rope_frequencies(4, RopeConfig()).tolist()
    [1.0, 0.01]
  """
  check_head_dim(head_dim)
  _checks.instance("config", config, RopeConfig)
  pairs = np.arange(0, head_dim, 2, dtype=np.float64)
  frequencies = config.base ** (-pairs / head_dim)
  turns = config.original_max_position * frequencies / (2 * np.pi)
  ramp = (turns - config.beta_slow) / (config.beta_fast - config.beta_slow)
  ramp = ramp.clip(0, 1)
  return frequencies * (ramp + (1 - ramp) / config.yarn_factor)


def check_head_dim(head_dim: int) -> None:
  """Raises ValueError unless `head_dim` is a positive even integer."""
  if _checks.static_int("head_dim", head_dim, 1) % 2:
    raise ValueError(
      f"`head_dim`={head_dim} must be even: RoPE rotates pairs of features."
    )


def apply_rope(x: ArrayLike, positions: ArrayLike, config: RopeConfig) -> Array:
  """Rotates queries or keys to their positions.

  Features i and i + H/2 form pair i. With YaRN the result is also multiplied by
  0.1 ln(yarn_factor) + 1. Applied to queries and keys, this is the softmax
  temperature of the YaRN paper.

  Args:
    x: [B, S, N, H] queries or keys, H even.
    positions: int32 [B, S].
    config: base and YaRN parameters.

  Returns:
    [B, S, N, H] in the dtype of `x`. Angles and products are in float32
    (float64 for float64).

  Raises:
    ValueError: if a shape or dtype does not fit, or H is odd.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import RopeConfig, apply_rope
    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> apply_rope(x, jnp.array([[1]]), RopeConfig()).round(3).tolist()
    [[[[0.5400000214576721, 0.8410000205039978]]]]
  """
  _checks.instance("config", config, RopeConfig)
  x = _checks.array("x", x, 4, "[B, S, N, H]")
  _checks.floating("x", x)
  _checks.not_empty("x", x, axes=(3,))
  positions = _checks.integers("positions", positions, x.shape[:2])
  acc = sum_dtype(x.dtype)
  frequencies = jnp.asarray(rope_frequencies(x.shape[-1], config), acc)
  positions = positions[:, :, None, None].astype(acc)
  angles = positions * frequencies[None, None, None]
  temperature = 0.1 * math.log(config.yarn_factor) + 1
  cos, sin = jnp.cos(angles) * temperature, jnp.sin(angles) * temperature
  left, right = jnp.split(x.astype(acc), 2, axis=-1)
  rotated = [left * cos - right * sin, right * cos + left * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
