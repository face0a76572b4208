"""Rotary position embedding, and the ways to stretch it over a longer context.

Pure functions of explicit positions. `layers/core.py` decides which arrays are
rotated, and to which positions.
"""

import dataclasses
import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nsa_jax import _checks
from nsa_jax.precision import sum_dtype
from nsa_jax.typing import Array, RopeScalingName


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Frequencies of the rotary embedding (arXiv 2104.09864, 2309.00071).

  Attributes:
    base: pair i of the R/2 pairs turns by base**(-2 i / R) radians per token.
    factor: s >= 1, the context extension; 1 means no scaling, and of the fields
      below `rotary_dim` and `temperature` alone are used.
    original_max_position: context length in tokens before the extension.
    beta_fast: pairs that make more turns than this in `original_max_position`
      tokens keep their frequency. Of "llama3" it is the `high_freq_factor`.
    beta_slow: pairs that make fewer turns than this are slowed down by s. Of
      "llama3" it is the `low_freq_factor`.
    scaling: which frequencies s changes.
      "yarn": the YaRN paper's; between the two betas the frequencies change
      linearly in the number of turns.
      "yarn_index": YaRN as in its authors' code and in transformers
      (`rope_type` "yarn"); they change linearly in the index of the pair, from
      the last index at or before `beta_fast` to the first at or after
      `beta_slow`.
      "llama3": as "yarn", without its temperature.
      "linear": all are divided by s.
      "dynamic": the base grows once a row is longer than
      `original_max_position`. All of a row's keys are rotated alike only if
      they are rotated in one call: a decode cache keeps those of earlier calls
      as they were, and so does transformers.
    rotary_dim: R, even: the first R features of a head are rotated, the others
      stay; None for all H.
    temperature: factor on the rotated features; None is 0.1 ln s + 1 with
      YaRN and 1 otherwise.
    yarn_factor: another name for the argument `factor`, no field.

  Raises:
    ValueError: if a value is out of range.

  Example:
    >>> from nsa_jax import RopeConfig
    >>> RopeConfig(factor=4.0).original_max_position
    8192
    >>> llama = RopeConfig(5e5, 8.0, 8192, 4.0, 1.0, scaling="llama3")
  """

  base: float = 10_000.0
  factor: float = 1.0
  original_max_position: int = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  scaling: RopeScalingName = "yarn"
  rotary_dim: int | None = None
  temperature: float | None = None
  yarn_factor: dataclasses.InitVar[float | None] = None

  def __post_init__(self, yarn_factor):
    names = ["base", "factor", "beta_fast", "beta_slow"]
    name = "factor"
    if yarn_factor is not None:
      name = "yarn_factor"
      if self.factor != 1:
        raise ValueError(
          f"`yarn_factor`={_checks.show(yarn_factor)} must not be given beside "
          f"`factor`={_checks.show(self.factor)}: it is the same field."
        )
      _checks.finite(name, yarn_factor)
      object.__setattr__(self, "factor", yarn_factor)
    if self.temperature is not None:
      names.append("temperature")
    for field in names:
      value = _checks.finite(field, getattr(self, field))
      if not isinstance(getattr(self, field), int | float):
        object.__setattr__(self, field, value)  # Arrays have no hash.
    integers = {"original_max_position": self.original_max_position}
    if self.rotary_dim is not None:
      integers["rotary_dim"] = self.rotary_dim
    for field, given in integers.items():
      object.__setattr__(self, field, _checks.static_int(field, given, 1))
    _checks.choice("scaling", self.scaling, get_args(RopeScalingName))
    if self.base <= 1:
      raise ValueError(f"`base`={self.base} must be greater than 1.")
    if self.factor < 1:
      raise ValueError(
        f"`{name}`={self.factor} must be at least 1 (1: no scaling)."
      )
    if self.beta_slow <= 0:
      raise ValueError(f"`beta_slow`={self.beta_slow} must be positive.")
    if self.beta_fast <= self.beta_slow:
      raise ValueError(
        f"`beta_fast`={self.beta_fast} must be greater than `beta_slow`="
        f"{self.beta_slow}."
      )
    if self.rotary_dim is not None and self.rotary_dim % 2:
      raise ValueError(
        f"`rotary_dim`={self.rotary_dim} must be even: RoPE rotates pairs of "
        "features."
      )
    if self.temperature is not None and self.temperature <= 0:
      raise ValueError(f"`temperature`={self.temperature} must be positive.")

  @property
  def is_dynamic(self) -> bool:
    """Whether the frequencies depend on the length of a row."""
    return self.scaling == "dynamic" and self.factor > 1

  @property
  def multiplier(self) -> float:
    """What the rotated features are multiplied by."""
    if self.temperature is not None:
      return self.temperature
    if self.scaling.startswith("yarn"):
      return 0.1 * math.log(self.factor) + 1
    return 1.0


def rope_frequencies(head_dim: int, config: RopeConfig) -> np.ndarray:
  """Radians per token of every pair of features, float64 [R / 2].

  The frequency of a pair is multiplied by

      ramp + (1 - ramp) / factor

  With "yarn" (arXiv 2309.00071, "NTK-by-parts") and "llama3", of a pair that
  makes r turns in the original context,

      ramp = clip((r - beta_slow) / (beta_fast - beta_slow), 0, 1)

  With "yarn_index", of pair i,

      ramp = clip((last - i) / (last - first), 0, 1)

  where `first` is the index of the pair that makes `beta_fast` turns, rounded
  down, and `last` of the one that makes `beta_slow` turns, rounded up. With
  "linear" it is 0. With "dynamic" these are the frequencies of rows up to
  `original_max_position` tokens.

  Args:
    head_dim: H, even.
    config: base and scaling.

  Raises:
    ValueError: if `head_dim` is not an even positive integer, or less than
      `rotary_dim`.

  Example:
    >>> from nsa_jax import RopeConfig
    >>> from nsa_jax.rope import rope_frequencies
    >>> rope_frequencies(4, RopeConfig()).tolist()
    [1.0, 0.01]
  """
  _checks.instance("config", config, RopeConfig)
  width = check_head_dim(head_dim, config)
  pairs = np.arange(0, width, 2, dtype=np.float64)
  frequencies = config.base ** (-pairs / width)
  if config.scaling == "linear":
    return frequencies / config.factor
  if config.scaling == "dynamic":
    return frequencies
  if config.scaling == "yarn_index":
    ramp = _index_ramp(width, config)
  else:
    turns = config.original_max_position * frequencies / (2 * np.pi)
    ramp = (turns - config.beta_slow) / (config.beta_fast - config.beta_slow)
    ramp = ramp.clip(0, 1)
  return frequencies * (ramp + (1 - ramp) / config.factor)


def _index_ramp(width, config):
  """From 1, for fast pairs, to 0, linear in the index of the pair."""

  def index(turns):
    tokens = config.original_max_position / (2 * math.pi * turns)
    return width * math.log(tokens) / (2 * math.log(config.base))

  first = max(math.floor(index(config.beta_fast)), 0)
  last = min(math.ceil(index(config.beta_slow)), width - 1)
  # A ramp of no length would divide by 0.
  span = last - first or 0.001
  pairs = np.arange(width // 2, dtype=np.float64)
  return 1 - ((pairs - first) / span).clip(0, 1)


def check_head_dim(head_dim: int, config: RopeConfig | None = None) -> int:
  """Validates H and returns R, the number of features that are rotated.

  Args:
    head_dim: H.
    config: `rotary_dim` is read.

  Raises:
    ValueError: unless `head_dim` is a positive integer, at least `rotary_dim`
      and, without it, even.
  """
  head_dim = _checks.static_int("head_dim", head_dim, 1)
  if config is not None and config.rotary_dim is not None:
    if config.rotary_dim > head_dim:
      raise ValueError(
        f"`rotary_dim`={config.rotary_dim} must be at most `head_dim`="
        f"{head_dim}."
      )
    return config.rotary_dim
  if head_dim % 2:
    raise ValueError(
      f"`head_dim`={head_dim} must be even: RoPE rotates pairs of features."
    )
  return head_dim


def apply_rope(
  x: ArrayLike,
  positions: ArrayLike,
  config: RopeConfig,
  lengths: ArrayLike | None = None,
) -> Array:
  """Rotates queries or keys to their positions.

  Features i and i + R/2 form pair i, of the first R; the others stay. The
  rotated ones are also multiplied by a temperature. Applied to queries and
  keys, this is the softmax temperature of the YaRN paper.

  Args:
    x: [B, S, N, H] queries or keys, H even.
    positions: int32 [B, S].
    config: base and scaling.
    lengths: int32 [B], tokens per row, which "dynamic" reads; by default the
      largest of the row's positions, plus 1.

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
  if lengths is not None:
    lengths = _checks.integers(
      "lengths", lengths, x.shape[:1], "one entry per row of `x`"
    )
  acc = sum_dtype(x.dtype)
  frequencies = jnp.asarray(rope_frequencies(x.shape[-1], config), acc)
  frequencies = frequencies[None, None, None]
  width = 2 * frequencies.shape[-1]
  if config.is_dynamic and positions.shape[1]:
    if lengths is None:
      lengths = positions.max(axis=1) + 1
    frequencies = frequencies * _slowed(width, lengths.astype(acc), config)
  positions = positions[:, :, None, None].astype(acc)
  angles = positions * frequencies
  cos = jnp.cos(angles) * config.multiplier
  sin = jnp.sin(angles) * config.multiplier
  rest = x[..., width:]
  left, right = jnp.split(x[..., :width].astype(acc), 2, axis=-1)
  rotated = [left * cos - right * sin, right * cos + left * sin]
  turned = jnp.concatenate(rotated, axis=-1).astype(x.dtype)
  if not rest.shape[-1]:
    return turned
  return jnp.concatenate([turned, rest], axis=-1)


def _slowed(width, lengths, config):
  """Factors on the frequencies of rows of these lengths, [B, 1, 1, R / 2].

  The base grows by a factor g**(R / (R - 2)) with g = s length / original -
  (s - 1), so that the slowest pair turns g times slower.
  """
  if width == 2:  # One pair, which turns by 1 whatever the base.
    return 1
  original = config.original_max_position
  longer = jnp.maximum(lengths, original) / original
  grown = config.factor * longer - (config.factor - 1)
  exponents = -np.arange(0, width, 2, dtype=np.float64) / (width - 2)
  exponents = jnp.asarray(exponents, grown.dtype)
  return grown[:, None, None, None] ** exponents[None, None, None]
