"""One traced program for NVIDIA GPUs and all other platforms.

`jax.lax.platform_dependent` is not enough: when `jax.export` targets several
platforms, it lowers every branch for each of them, and a compiled kernel does
not lower for a CPU. The primitive here traces and lowers a branch only for its
own platforms, and leaves no switch in a program for a single platform.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import ManualAxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.partition import needs_devices, partitioned

# A function f(static, *arrays) and its static argument. Equal pairs share a
# compiled program.
Call: TypeAlias = tuple[Callable[..., Any], Any]


def by_platform(cuda: Call, default: Call, out: Any, *args: Any) -> Any:
  """Calls `cuda` on NVIDIA GPUs and `default` elsewhere.

  It has no derivatives: use it inside the rules of a `jax.custom_vjp`. Outside
  `jit`, equal calls are compiled once.

  Args:
    cuda: a module-level function f(static, *args), and a hashable `static`.
    default: another such pair.
    out: shapes and dtypes of the results of both, a pytree of
      `jax.ShapeDtypeStruct`.
    *args: pytrees of arrays. The first axis of every array, of `out` too, is
      the batch B; a scalar holds for all of it.

  Returns:
    Arrays in a pytree like `out`.
  """
  flat, tree = jax.tree.flatten(args)
  shapes, out_tree = jax.tree.flatten(out)
  avals = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in shapes)
  mesh = jax.sharding.get_abstract_mesh()
  manual = not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
  results = _by_platform_p.bind(
    *flat,
    cuda=cuda,
    default=default,
    tree=tree,
    avals=avals,
    devices=None if manual else needs_devices(),
  )
  return jax.tree.unflatten(out_tree, results)


_by_platform_p = core.Primitive("nsa_by_platform")
_by_platform_p.multiple_results = True


@_by_platform_p.def_abstract_eval
def _abstract_eval(*flat, avals, **_):
  mesh = flat[0].sharding.mesh
  return [
    jax.core.ShapedArray(
      x.shape,
      x.dtype,
      sharding=NamedSharding(mesh, P(*(None,) * len(x.shape))),
      manual_axis_type=ManualAxisType(varying=_varying(flat)),
    )
    for x in avals
  ]


def _varying(avals):
  """Manual mesh axes over which some array is known to vary."""
  return frozenset().union(*(x.manual_axis_type.varying for x in avals))


def out_shape(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a result of `pl.pallas_call`.

  Under `jax.shard_map` with `check_vma=True`, Pallas wants to know what it
  varies over. Arguments of a kernel lost that in `by_platform`.
  """
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())


def vary_alike(arrays: Any) -> Any:
  """Lets all arrays vary over the mesh axes that one of them varies over.

  Inside `jax.shard_map` with `check_vma=True`, the gradient of an array that
  did not vary is then summed over these axes.
  """
  axes = _varying(map(jax.typeof, jax.tree.leaves(arrays)))

  def one(x):
    missing = axes - jax.typeof(x).manual_axis_type.varying
    if not missing:
      return x
    # In an order that is the same in every process.
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying")

  return jax.tree.map(one, arrays) if axes else arrays


def _jvp(*_, **__):
  raise NotImplementedError(
    "kernels, and `implementation`=None, have no second derivatives: pass "
    '`implementation`="xla"'
  )


ad.primitive_jvps[_by_platform_p] = _jvp


def _flat(call, tree):
  """A call as a function from flat arrays to flat results."""
  function, static = call
  return lambda *flat: jax.tree.leaves(
    function(static, *jax.tree.unflatten(tree, flat))
  )


def _lowering(platform):
  """Lowers the call of a platform, traced only here."""

  def lowering(ctx, *flat, tree, avals, devices, **calls):
    del devices
    function, static = calls[platform]
    # Inside, nothing needs to know what varies over a mesh.
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ctx.avals_in]
    parts = getattr(ctx.module_context.axis_context, "num_devices", 1)
    kernel = function is calls["cuda"][0] is not _mapped
    python = platform == "default" and getattr(function, "in_python", False)
    if parts != 1 and kernel and not python:
      run = partitioned(_flat(calls[platform], tree), args, avals)
      return mlir.lower_fun(run)(_of_avals(ctx, args), *flat)
    jaxpr = jax.make_jaxpr(functools.partial(function, static))(
      *jax.tree.unflatten(tree, args)
    )
    found = [(x.shape, x.dtype) for x in jaxpr.out_avals]
    wanted = [(x.shape, x.dtype) for x in avals]
    if found != wanted:
      raise TypeError(f"{function} returned {found}, not {wanted}.")
    run = core.jaxpr_as_fun(jaxpr)
    return mlir.lower_fun(run)(_of_avals(ctx, args), *flat)

  return lowering


def _of_avals(ctx, args):
  avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in args]
  return ctx.replace(avals_in=avals)


mlir.register_lowering(_by_platform_p, _lowering("cuda"), platform="cuda")
mlir.register_lowering(_by_platform_p, _lowering("default"))


@functools.lru_cache(maxsize=256)
def _compiled(**params):
  return jax.jit(functools.partial(_by_platform_p.bind, **params))


@_by_platform_p.def_impl
def _impl(*flat, **params):
  config: Any = jax.config
  nans, infs = config.jax_debug_nans, config.jax_debug_infs
  if not (config.jax_disable_jit or nans or infs):
    return _compiled(**params)(*flat)
  # A portable function can run step by step. Kernels are a single step: the
  # buffers between them have parts that are never written nor read.
  kernel, function = (_innermost(params[name]) for name in ("cuda", "default"))
  portable = function is not kernel and not _on_nvidia(flat)
  if config.jax_disable_jit and portable:
    return _flat(params["default"], params["tree"])(*flat)
  # To find the place of a NaN, jax would call this rule again, without end.
  with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
    results = _compiled(**params)(*flat)
    floats = [x for x in results if jnp.issubdtype(x.dtype, jnp.floating)]
    nans = nans and any(jnp.isnan(x).any() for x in floats)
    # The lse of a query that reads nothing is -inf.
    infs = infs and any(jnp.isposinf(x).any() for x in floats)
  if nans and portable:
    with jax.debug_infs(False):  # Masks are -inf.
      _flat(params["default"], params["tree"])(
        *flat
      )  # Raises at the step that makes it.
  if nans or infs:
    function = function if portable else kernel
    raise FloatingPointError(
      f"invalid value ({'nan' if nans else 'inf'}) encountered in "
      f"{function.__module__}.{function.__name__}"
    )
  return results


def _innermost(call):
  """The function of a call under any number of `jax.vmap`."""
  function, static = call
  return _innermost(static[0]) if function is _mapped else function


def _on_nvidia(flat):
  """Whether jit would run concrete arrays on NVIDIA GPUs."""
  committed = [x for x in flat if getattr(x, "committed", False)]
  # An array without a device is made on the default one.
  placed = committed[0] if committed else jnp.zeros(())
  return any(
    "cuda" in device.client.platform_version for device in placed.devices()
  )


def _mapped(static, *flat):
  """Maps a call over the batched axes of its arrays."""
  (function, inner), tree, axes = static

  def one(*flat):
    return function(inner, *jax.tree.unflatten(tree, flat))

  return jax.vmap(one, in_axes=axes)(*flat)


def _batch(args, axes, *, cuda, default, tree, avals, devices):
  del devices
  size = next(
    x.shape[axis]
    for x, axis in zip(args, axes, strict=True)
    if axis is not None
  )
  # Mapped calls become batch rows, so that they share chunks of bounded memory.
  # Arrays of a decode cache, or keys, are not copied for that. The arrays of a
  # call that is mapped already do not begin with the batch.
  copied = any(
    axis is None and x.ndim > 3 for x, axis in zip(args, axes, strict=True)
  )
  batch = avals[0].shape[0]
  static = isinstance(size, int) and isinstance(batch, int)
  if static and not copied and cuda[0] is not _mapped:

    def fold(x, axis):
      x = x[None] if axis is None else jnp.moveaxis(x, axis, 0)
      x = x[:, None] if x.ndim == 1 else x
      rows = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
      return rows.reshape(size * batch, *x.shape[2:])

    out = [
      jax.ShapeDtypeStruct((size * batch, *x.shape[1:]), x.dtype) for x in avals
    ]
    flat = [fold(x, axis) for x, axis in zip(args, axes, strict=True)]
    results = by_platform(cuda, default, out, *jax.tree.unflatten(tree, flat))
    results = [
      x.reshape(size, *aval.shape)
      for x, aval in zip(results, avals, strict=True)
    ]
    return results, [0] * len(results)
  mapped = ((_mapped, (call, tree, tuple(axes))) for call in (cuda, default))
  out = [jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in avals]
  return by_platform(*mapped, out, *args), [0] * len(out)


batching.primitive_batchers[_by_platform_p] = _batch
