"""The largest entries of every row, in a form that XLA can partition."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir

from nsa_jax.typing import Array


def top_k(x: Array, n: int) -> tuple[Array, Array]:
  """`jax.lax.top_k` without derivatives, for floats without NaN.

  XLA gathers the whole operand of a top-k on every device. Where it partitions
  the program, n searches for a maximum take its place, which are slower than a
  top-k, but not than a gather. Results are equal, except for the indices of
  entries of -inf.

  Args:
    x: [..., M].
    n: number of entries, at most M.

  Returns:
    The entries and their int32 indices, both [..., n], in descending order;
    among equals the lower index comes first.
  """
  best, ids = _top_k_p.bind(x, n=n)
  return best, ids


def _by_rounds(x: Array, *, n: int) -> tuple[Array, Array]:
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)

  def step(x: Array, _: None) -> tuple[Array, Any]:
    best, place = x.max(axis=-1), jnp.argmax(x, axis=-1).astype(jnp.int32)
    return jnp.where(index == place[..., None], -jnp.inf, x), (best, place)

  _, found = jax.lax.scan(step, x, None, length=n)
  best, ids = (jnp.moveaxis(y, 0, -1) for y in found)
  return best, ids


_top_k_p = core.Primitive("nsa_top_k")
_top_k_p.multiple_results = True


@functools.partial(jax.jit, static_argnames="n")
def _compiled(x, n):
  return _top_k_p.bind(x, n=n)


@_top_k_p.def_impl
def _impl(x, *, n):
  config: Any = jax.config
  return jax.lax.top_k(x, n) if config.jax_disable_jit else _compiled(x, n)


@_top_k_p.def_abstract_eval
def _abstract_eval(x, *, n):
  best = x.update(shape=(*x.shape[:-1], n), weak_type=False)
  return [best, best.update(dtype=jnp.dtype("int32"))]


def _lowering(ctx, x, *, n):
  function = functools.partial(jax.lax.top_k, k=n)
  if _is_partitioned(ctx.module_context.axis_context):
    function = functools.partial(_by_rounds, n=n)
  return mlir.lower_fun(function)(ctx, x)


def _is_partitioned(context: Any) -> bool:
  """Whether XLA splits the operands of what is lowered over devices."""
  mesh = getattr(context, "mesh", None)
  if mesh is None:
    return getattr(context, "num_devices", 1) > 1
  # In a region of `jax.shard_map`: over the axes that are not manual.
  free = set(mesh.axis_names) - set(context.manual_axes)
  return math.prod(mesh.shape[axis] for axis in free) > 1


mlir.register_lowering(_top_k_p, _lowering)


def _batch(args, axes, *, n):
  (x,), (axis,) = args, axes
  return _top_k_p.bind(jnp.moveaxis(x, axis, 0), n=n), (0, 0)


batching.primitive_batchers[_top_k_p] = _batch
