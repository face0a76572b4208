"""Checks of a call that do not depend on the backend."""

from typing import Any

import jax

from pallas_kernels.interface import Spec


def visible_gpus() -> list[Any]:
  """The NVIDIA GPUs of this process; none when lowering for another machine."""
  try:
    return jax.local_devices(backend="cuda")
  except RuntimeError:
    return []


def check_scores(spec: Spec) -> None:
  """Checks that the scores of queries and keys stay as they are.

  Raises:
    NotImplementedError: naming the argument and the value.
  """
  if spec.softcap is not None:
    raise NotImplementedError(
      f"`softcap`={spec.softcap}: the kernels take None; "
      "`implementation`='xla' can"
    )


def check_tiles(spec: Spec, kind: Any, *fits: int) -> None:
  """Checks that the requested tiles, if any, are a `kind` and fit the call.

  Args:
    spec: static arguments of the call.
    kind: class of the tiles.
    *fits: arguments of its `check_fit`.

  Raises:
    ValueError: naming the value and the rule.
  """
  tiles = spec.tiles
  if tiles is None:
    return
  if not isinstance(tiles, kind):
    raise ValueError(f"`tiles`={tiles!r} must be a {kind.__name__}.")
  tiles.check_fit(*fits)


def group_of(query: jax.Array, key: jax.Array) -> int:
  """G, query heads per key/value head."""
  return query.shape[2] // key.shape[2]


def check_static_sizes(query: jax.Array) -> None:
  """Checks that the sizes of the query are known when tracing.

  Raises:
    NotImplementedError: naming the shape.
  """
  if not all(isinstance(size, int) for size in query.shape):
    raise NotImplementedError(
      f"`query` has the symbolic shape {query.shape}: the kernels take static "
      "sizes"
    )
