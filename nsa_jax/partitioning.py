"""Logical names of the axes of parameters, and rules that split them.

One table says what the axes of every parameter are. From it come the shardings
of whole trees and the metadata of Flax. How the arrays of a call are split is
in `nsa_jax.sharding`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nsa_jax import _checks
from nsa_jax.sharding import MeshAxes, axis_names

Names = tuple[str | None, ...]

_KEY_VALUE: Names = ("embed", "kv_heads", "head_dim")
_PROJECTIONS: dict[str, Names] = {
  "query": ("embed", "heads", "head_dim"),
  "gate": ("embed", "heads", None),
  "out": ("heads", "head_dim", "embed"),
  "mlp_gate": ("embed", "mlp"),
  "mlp_up": ("embed", "mlp"),
  "mlp_down": ("mlp", "embed"),
}
_PHI: dict[str, tuple[Names, ...]] = {
  "position": (("kv_heads", None, "head_dim"),),
  "weight": (("kv_heads", None), ("kv_heads", "phi", None)),
  "w1": (("kv_heads", "phi", None),),
  "b1": (("kv_heads", None),),
  "w2": (("kv_heads", "phi", None),),
  "b2": (("kv_heads", None),),
}


def parameter_axes(
  module: str, name: str, ndim: int | None = None
) -> Names | None:
  """Logical names of the axes of a parameter; None if it is none of ours.

  Args:
    module: what holds it, such as "query", "mlp_up" or "compress_key".
    name: such as "kernel" or "w1".
    ndim: its rank; it distinguishes the "weight" of two kinds of phi.
  """
  tables: tuple[Names, ...] = ()
  if module.startswith("compress_"):
    tables = _PHI.get(name, ())
  elif name in ("embedding", "head"):
    tables = (("vocab", "embed"),)
  elif name == "scale":
    tables = (("norm",),)
  elif name == "sink":
    tables = (("heads",),)
  elif name in ("kernel", "bias"):
    axes = _PROJECTIONS.get(module, ())
    if module.split("_")[0] in ("key", "value"):
      axes = _KEY_VALUE
    if axes and name == "bias":
      axes = ("norm",) if module == "out" else axes[1:]
    tables = (axes,) if axes else ()
  return next((x for x in tables if ndim in (None, len(x))), None)


# FSDP over "data", tensor parallelism over "heads": the mesh axes over which an
# axis of a parameter is split; None: every device holds all of it.
PARAMETER_RULES: Mapping[str, MeshAxes] = MappingProxyType(
  {
    "embed": "data",
    "phi": "data",
    "heads": "heads",
    "kv_heads": "heads",
    "mlp": "heads",
    "vocab": None,
    "head_dim": None,
    "norm": None,
    "layers": None,
  }
)


def parameter_shardings(
  tree: Any,
  mesh: Mesh | AbstractMesh,
  rules: Mapping[str, MeshAxes] | None = None,
) -> Any:
  """How parameters, and what an optimiser keeps of them, lie on a mesh.

  The names of axes are "vocab", "embed" (D, of every kernel too), "heads" (N),
  "kv_heads" (K), "head_dim", "mlp", "phi" (what phi's kernels sum over), "norm"
  (scales, and biases over D) and "layers" (with `scan_layers`). By default
  "embed" and "phi" are split over the mesh axis "data" as in FSDP, and "heads",
  "kv_heads" and "mlp" over "heads". A mesh without such an axis does not split
  them.

  Args:
    tree: a pytree of arrays or shapes whose paths end like those of the
      parameters of `TransformerLM` or `NativeSparseAttention`: parameters,
      states of optax, a TrainState. What else it holds, such as a count of
      steps, is whole on every device.
    mesh: the mesh.
    rules: mesh axes by name, or None to split an axis over nothing; they
      replace the defaults one by one.

  Returns:
    The pytree with a `jax.sharding.NamedSharding` in place of every leaf.

  Raises:
    ValueError: if a rule names no axis of the model or of the mesh, or the
      devices along its axes do not divide an axis of a parameter.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import (
    ...   TransformerConfig, TransformerLM, parameter_shardings
    ... )
    >>> config = TransformerConfig.preset("tiny", num_layers=1, model_dim=16)
    >>> model = TransformerLM(config)
    >>> arguments = jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    >>> shapes = jax.eval_shape(model.init, *arguments)
    >>> mesh = jax.make_mesh((1, 1), ("data", "heads"))
    >>> shardings = parameter_shardings(shapes, mesh)
    >>> layer = shardings["params"]["layer_0"]
    >>> tuple(layer["attention"]["query"]["kernel"].spec)
    ('data', 'heads', None)
    >>> params = jax.jit(model.init, out_shardings=shardings)(*arguments)
  """
  if not isinstance(mesh, Mesh | AbstractMesh):
    raise ValueError(
      f"`mesh`={_checks.show(mesh)} must be a jax.sharding.Mesh."
    )
  resolved = _resolve(rules, mesh)
  leaves, structure = jax.tree.flatten_with_path(tree)
  return jax.tree.unflatten(
    structure,
    [
      NamedSharding(mesh, _spec(path, leaf, mesh, resolved))
      for path, leaf in leaves
    ],
  )


def _resolve(rules, mesh):
  """The complete rules for a mesh."""
  rules = {} if rules is None else rules
  if not isinstance(rules, Mapping):
    raise ValueError(
      f"`rules`={_checks.show(rules)} must map names of axes to mesh axes."
    )
  for name, axes in rules.items():
    if name not in PARAMETER_RULES:
      raise ValueError(
        f"`rules` has {_checks.show(name)}, which must be one of "
        f"{sorted(PARAMETER_RULES)}."
      )
    known = [str(axis) for axis in mesh.axis_names]
    if not all(isinstance(x, str) and x in known for x in axis_names(axes)):
      raise ValueError(
        f"`rules`[{name!r}]={_checks.show(axes)} must name axes of the mesh, "
        f"{list(mesh.axis_names)}, or be None."
      )
  # A default says nothing about a mesh with other axes.
  defaults = {
    name: axes if axes in mesh.axis_names else None
    for name, axes in PARAMETER_RULES.items()
  }
  return defaults | dict(rules)


def _spec(path, leaf, mesh, rules):
  """The partition of a leaf."""
  shape = jnp.shape(leaf)
  keys = [_name(key) for key in path]
  # A box with metadata adds `.value` to the path of what is in it.
  if keys and keys[-1] == "value":
    keys.pop()
  module, name = ("", *keys)[-2:] if keys else ("", "")
  stacked = "layers" in keys
  axes = parameter_axes(module, name, len(shape) - stacked)
  if axes is not None and stacked:
    axes = ("layers", *axes)
  if axes is None:
    return P()
  parts: list[MeshAxes] = []
  used: set[str] = set()
  for size, axis in zip(shape, axes, strict=True):
    split = None if axis is None else rules[axis]
    devices = math.prod(mesh.shape[x] for x in axis_names(split))
    where = f"`tree`{jax.tree_util.keystr(path)} of shape {shape}"
    if size % devices:
      fitting = [n for n in range(1, devices) if size % n == 0]
      raise ValueError(
        f"{where} must have {axis!r} a multiple of {devices}, the devices of "
        f"`rules`[{axis!r}]={split!r}: {', '.join(map(str, fitting))} would "
        f"fit, and {{{axis!r}: None}} leaves it whole on every device."
      )
    if used & set(axis_names(split)):
      raise ValueError(
        f"{where} with the axes {axes} must use a mesh axis once: `rules`"
        f"[{axis!r}]={split!r}."
      )
    used |= set(axis_names(split))
    parts.append(split)
  return P(*parts)


def _name(key):
  """The name in a key of a path."""
  for field in ("key", "name", "idx"):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)
