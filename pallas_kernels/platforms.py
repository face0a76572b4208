"""One traced program for NVIDIA GPUs and everything else.

`jax.lax.platform_dependent` would do, if `jax.export` did not lower each of its
branches for every platform when it is asked for several: a compiled kernel does
not lower for a CPU. The primitive here lowers each branch for its own platform
only, and no switch is left in a program for a single one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir


@dataclasses.dataclass(frozen=True, init=False)
class Partial:
  """`functools.partial`, but equal to another one with equal parts.

  So what has been compiled for one call of an op serves the next.
  """

  function: Callable[..., Any]
  args: tuple[Any, ...]
  kwargs: tuple[tuple[str, Any], ...]

  def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any):
    object.__setattr__(self, "function", function)
    object.__setattr__(self, "args", args)
    object.__setattr__(self, "kwargs", tuple(sorted(kwargs.items())))

  def __call__(self, *args: Any) -> Any:
    """The function of its own arguments and of these."""
    return self.function(*self.args, *args, **dict(self.kwargs))


def by_platform(
  *, cuda: Callable[..., Any], default: Callable[..., Any]
) -> Callable[..., Any]:
  """A function that is `cuda` on NVIDIA GPUs and `default` elsewhere.

  It has no derivatives: use it inside the rules of a `jax.custom_vjp`.

  Args:
    cuda: a function of arrays, in any pytrees; it must not close over traced
      values. It is traced when a program is lowered for an NVIDIA GPU, so that
      other machines do not wait for it.
    default: another one that returns the same shapes and dtypes.

  Returns:
    The function, with the signature of both. Called outside `jit`, it compiles
    anew unless `cuda` and `default` are equal to those of an earlier call.
  """

  def run(*args: Any) -> Any:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
      return _stage(cuda, default, *args)
    return _compiled(cuda, default)(*args)

  return run


@functools.lru_cache(maxsize=256)
def _compiled(cuda, default):
  return jax.jit(functools.partial(_stage, cuda, default))


def _stage(cuda, default, *args):
  elsewhere, shape = _trace(default, args)
  tree = jax.tree.structure(args)

  def on_cuda(*flat: Any) -> Any:
    outs = jax.tree.leaves(cuda(*jax.tree.unflatten(tree, flat)))
    found = [(x.shape, x.dtype) for x in outs]
    wanted = [(x.shape, x.dtype) for x in elsewhere.out_avals]
    assert found == wanted, (found, wanted)
    return outs

  return _bind(args, on_cuda, elsewhere, shape)


def _trace(function, args):
  """`function` as a jaxpr of the leaves of `args`, and what it returns."""
  flat, tree = jax.tree.flatten(args)

  def flattened(*flat: jax.Array) -> Any:
    return function(*jax.tree.unflatten(tree, flat))

  return jax.make_jaxpr(flattened, return_shape=True)(*flat)


def _bind(args, cuda, default, shape):
  # As functions: the primitive is opaque to what jax does with jaxprs.
  outs = _by_platform_p.bind(
    *jax.tree.leaves(args),
    cuda=cuda,
    default=core.jaxpr_as_fun(default),
    avals=tuple(default.out_avals),
  )
  return jax.tree.unflatten(jax.tree.structure(shape), outs)


_by_platform_p = core.Primitive("nsa_by_platform")
_by_platform_p.multiple_results = True
_by_platform_p.def_abstract_eval(lambda *_, avals, **__: avals)


@_by_platform_p.def_impl
def _impl(*args, **params):
  # Compiled for the platform at hand alone.
  return jax.jit(lambda *args: _by_platform_p.bind(*args, **params))(*args)


def _batch(args, axes, *, cuda, default, avals):
  del avals
  cuda, default = (jax.vmap(f, in_axes=tuple(axes)) for f in (cuda, default))
  outs = by_platform(cuda=cuda, default=default)(*args)
  return outs, [0] * len(outs)


batching.primitive_batchers[_by_platform_p] = _batch
mlir.register_lowering(
  _by_platform_p,
  mlir.lower_fun(lambda *args, cuda, default, avals: cuda(*args)),
  platform="cuda",
)
mlir.register_lowering(
  _by_platform_p,
  mlir.lower_fun(lambda *args, cuda, default, avals: default(*args)),
)
