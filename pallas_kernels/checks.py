"""Checks of a call that do not depend on the backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from pallas_kernels.interface import Spec


def visible_gpus() -> list[Any]:
  """The NVIDIA GPUs of this process; none when lowering for another machine."""
  try:
    return jax.local_devices(backend="cuda")
  except RuntimeError:
    return []


def abstract_gpu() -> Any:
  """The GPU that a program is lowered for by the current mesh, or None."""
  card = getattr(get_abstract_mesh(), "abstract_device", None)
  return card if card is not None and card.platform == "gpu" else None


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
    NotImplementedError: if they are tiles of another backend.
    ValueError: naming the value and the rule.
  """
  tiles = spec.tiles
  if tiles is None:
    return
  module = type(tiles).__module__
  if module != kind.__module__ and module.startswith("pallas_kernels."):
    raise NotImplementedError(
      f"`tiles` is a {module}.{type(tiles).__name__}: the kernels take a "
      f"{kind.__module__}.{kind.__name__}"
    )
  if not isinstance(tiles, kind):
    raise ValueError(f"`tiles`={tiles!r} must be a {kind.__name__}.")
  tiles.check_fit(*fits)


def group_of(query: jax.Array, key: jax.Array) -> int:
  """G, query heads per key/value head."""
  return query.shape[2] // key.shape[2]


def check_selection_block(block: int, taken: tuple[int, ...]) -> None:
  """Checks that the kernels take selection blocks of this length.

  Raises:
    NotImplementedError: naming the value and the limit.
  """
  if block not in taken:
    raise NotImplementedError(
      f"`selection_block`={block}: the kernels take "
      f"{', '.join(map(str, taken))}"
    )


def check_query(query: jax.Array, dtypes: tuple[Any, ...]) -> None:
  """Checks the dtype, and that sizes are known when tracing.

  Raises:
    NotImplementedError: naming the shape, or the dtype and those taken.
  """
  if not all(isinstance(size, int) for size in query.shape):
    raise NotImplementedError(
      f"`query` has the symbolic shape {query.shape}: the kernels take static "
      "sizes"
    )
  if query.dtype not in dtypes:
    raise NotImplementedError(
      f"`query` of dtype {query.dtype}: the kernels take "
      f"{', '.join(jnp.dtype(d).name for d in dtypes)}"
    )
