"""Validation of arguments: every message names argument, value and rule."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.config import NSAConfig
from nsa_jax.typing import Array


def config(value: Any) -> None:
  if not isinstance(value, NSAConfig):
    raise ValueError(f"`config`={value!r} must be an NSAConfig.")


def static_int(name: str, value: Any, minimum: int | None = None) -> int:
  """A static Python integer, not a traced one."""
  if isinstance(value, (bool, jax.core.Tracer)) or not hasattr(
    value, "__index__"
  ):
    raise ValueError(f"`{name}`={value!r} must be a static integer.")
  value = operator.index(value)
  if minimum is not None and value < minimum:
    raise ValueError(f"`{name}`={value} must be at least {minimum}.")
  return value


def scale(value: Any, head_dim: int) -> float:
  """A static, finite softmax scale; 1/sqrt(H) by default."""
  if value is None:
    return head_dim**-0.5
  if isinstance(value, jax.core.Tracer):
    raise ValueError(
      f"`scale`={value!r} must be a static Python number; multiply the query "
      "by a traced one."
    )
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"`scale`={value!r} must be a finite number.")
  return number


def array(name: str, value: Any, rank: int, letters: str) -> Array:
  """An array of a given rank."""
  try:
    value = jnp.asarray(value)
  except TypeError as error:
    raise ValueError(
      f"`{name}`={value!r} must be an array of shape {letters}."
    ) from error
  if value.ndim != rank:
    raise ValueError(
      f"`{name}` of shape {value.shape} must have rank {rank}: {letters}."
    )
  return value


def floating(name: str, value: Array) -> None:
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise ValueError(
      f"`{name}` of dtype {value.dtype} must have a floating-point dtype."
    )


def shape(name: str, value: Array, want: tuple, rule: str) -> None:
  """`want` gives the size of each axis, None for any."""
  fits = len(want) == value.ndim and all(
    w is None or w == v for w, v in zip(want, value.shape, strict=True)
  )
  if not fits:
    sizes = ", ".join("any" if size is None else str(size) for size in want)
    raise ValueError(
      f"`{name}` of shape {value.shape} must have shape ({sizes}): {rule}."
    )


def parameter(name: str, value: Any, want: tuple, letters: str) -> Array:
  """A floating-point parameter of phi."""
  value = array(name, value, len(want), letters)
  floating(name, value)
  shape(name, value, want, letters)
  return value


def integers(name: str, value: Any, want: tuple) -> Array:
  """An integer array of a given shape, as int32."""
  value = array(name, value, len(want), f"{want}")
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(
      f"`{name}` of dtype {value.dtype} must have an integer dtype."
    )
  shape(name, value, want, "one entry per row and token")
  return value.astype(jnp.int32)


def concrete(value: Any) -> np.ndarray | None:
  """The values of an array, or None where they are not known here."""
  if isinstance(value, jax.core.Tracer):
    return None
  if not getattr(value, "is_fully_addressable", True):
    return None
  return np.asarray(value)


def segments(segment_ids: Array, alignment: int) -> None:
  """Concrete ids: not negative, one run per segment, aligned starts."""
  ids = concrete(segment_ids)
  if ids is None or not ids.size:
    return
  if ids.min() < 0:
    raise ValueError(
      f"`segment_ids` has the value {ids.min()}; ids must be at least 0, and "
      "0 means padding."
    )
  starts = np.ones(ids.shape, bool)
  starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
  for row, position in np.argwhere(starts & (ids > 0)):
    segment = ids[row, position]
    if position % alignment:
      raise ValueError(
        f"`segment_ids` starts segment {segment} of row {row} at position "
        f"{position}; starts must be multiples of `selection_block`="
        f"{alignment}."
      )
    if (ids[row, :position] == segment).any():
      raise ValueError(
        f"`segment_ids` has segment {segment} of row {row} in two runs, the "
        f"second at position {position}; segments must be contiguous."
      )


def block_ids(ids: Array, num_blocks: int) -> None:
  """Concrete ids: strictly ascending in [0, M), then -1."""
  values = concrete(ids)
  if values is None or not values.size:
    return
  rule = "ids must be strictly ascending, then -1"
  if values.min() < -1 or values.max() >= num_blocks:
    worst = values.min() if values.min() < -1 else values.max()
    raise ValueError(
      f"`block_ids` has the value {worst}; {rule}, and lie in [0, "
      f"{num_blocks}), the selection blocks of the keys."
    )
  left, right = values[..., :-1], values[..., 1:]
  wrong = (right >= 0) & (right <= left) | (left < 0) & (right >= 0)
  if wrong.any():
    row = tuple(np.argwhere(wrong)[0][:-1].tolist())
    raise ValueError(f"`block_ids`[{row}]={values[row].tolist()}; {rule}.")
