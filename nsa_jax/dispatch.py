"""Chooses the implementation that serves a call; errors if none can.

`ValueError` means that the caller made a mistake; it is never swallowed.
`NotImplementedError` means that this implementation cannot do the call; the
next requested one is tried.

The ops are the branches "compressed", "selected", "window" and "full", whose
result is (out, lse), and "block_scores", "select_blocks" and "decode".
`pallas_kernels.interface` documents the arguments and results of their
functions.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import _checks, cudnn, reference, xla
from nsa_jax.precision import sum_dtype
from nsa_jax.reverse_mode import reverse_mode_only
from nsa_jax.typing import Implementation
from pallas_kernels.checks import abstract_gpu, visible_gpus
from pallas_kernels.interface import Spec
from pallas_kernels.platforms import by_platform, vary_alike

# `disabled_checks` of `jax.export.export` for programs with Triton kernels,
# whose custom calls have no stability guarantee: run such a program with the
# version of jax that exported it. The name of the target depends on that
# version. jax keeps the custom calls of Mosaic GPU by itself.
EXPORT_DISABLED_CHECKS = tuple(
  export.DisabledSafetyCheck.custom_call(target)
  for target in ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
)

ATTENTION_OPS = ("compressed", "selected", "window", "full")

# Modules that support every call of every op but "decode", which is composed of
# their other ops. Their functions f(spec, arrays, index) are differentiated by
# jax.
PORTABLE: dict[str, Any] = {"reference": reference, "xla": xla}

# A backend is an object with an attribute for every op that it serves. The
# attribute has `check`, `forward` and `backward`, as in
# `pallas_kernels.interface`; if `backward` is None, jax differentiates
# `forward`. A string names a module that is imported at first use, so that
# importing nsa_jax does not import Pallas.
BACKENDS: dict[str, Any] = {
  "triton": "pallas_kernels.triton",
  "mosaic_gpu": "pallas_kernels.mosaic_gpu",
  "cudnn": cudnn,
}


class Kernel(NamedTuple):
  """Forward and backward function of one op, both at module level."""

  forward: Callable[..., Any]
  backward: Callable[..., Any] | None


class Plan(NamedTuple):
  """The kernels that a call runs on each platform; static and hashable.

  Attributes:
    op: name of the op.
    spec: static arguments of the call.
    cuda: runs on NVIDIA GPUs.
    default: runs elsewhere: `xla`, or the same kernel interpreted if the
      backend was requested by name.
  """

  op: str
  spec: Spec
  cuda: Kernel
  default: Kernel


def names(implementation: Implementation, op: str = "window") -> Sequence[str]:
  """The implementations to try, in order.

  Raises:
    ValueError: if a name is unknown or the sequence is empty.
  """
  if implementation is None:
    # cuDNN is the default for full attention only: its order of sums changes
    # from run to run.
    if op == "full":
      return "cudnn", "xla"
    # `benchmarks.backends` compares these two. "mosaic_gpu" is faster with
    # most shapes, up to 2.7 times. With heads of 64 and random blocks the
    # selected branch is slower, by 3% in a training step on text. It serves
    # some cards only, so that the card has to be known: a program that is
    # lowered without one may be for others.
    served = op in (*ATTENTION_OPS, "select_blocks")
    if served and (abstract_gpu() or visible_gpus()):
      return "mosaic_gpu", "triton", "xla"
    return "triton", "xla"
  return named(implementation)


def named(implementation: Implementation) -> Sequence[str]:
  """The implementations that an argument names; none for None.

  It asks for no device, so that jax can still be configured after it.

  Raises:
    ValueError: if a name is unknown or the sequence is empty.
  """
  if implementation is None:
    return ()
  known = [*PORTABLE, *BACKENDS]
  if isinstance(implementation, str):
    tried: Sequence[Any] = (implementation,)
  elif isinstance(implementation, Sequence) and implementation:
    tried = tuple(implementation)
  else:
    tried = (implementation,)
  for name in tried:
    if not isinstance(name, str) or name not in known:
      raise ValueError(
        f"`implementation`={_checks.show(implementation)} must be None, one of "
        f"{', '.join(map(repr, known))}, or a sequence of these names."
      )
  return tried


def choose(
  op: str, implementation: Implementation, spec: Spec, arrays: Any, index: Any
) -> Callable[[], Any]:
  """The first requested implementation of `op` that can do the call.

  None is "mosaic_gpu" or "triton" on NVIDIA GPUs and "xla" on other platforms,
  in one traced program; or "xla" alone, if the kernels cannot do the call. For
  "full" it is "cudnn" or "xla".

  Args:
    op: name of the op.
    implementation: the caller's argument.
    spec: static arguments of the call.
    arrays: arrays of the call.
    index: block ids or lengths, and `Queries`.

  Returns:
    A function without arguments that runs the call.

  Raises:
    ValueError: if `implementation` is invalid.
    NotImplementedError: if no requested implementation can do the call; the
      message lists the reason of each.
  """
  reasons: list[str] = []
  for name in names(implementation, op):
    if name in PORTABLE:
      forward = getattr(PORTABLE[name], op)
      return functools.partial(_run, op, forward, spec, arrays, index)
    kernel = _kernel(name, op, spec, arrays, index, reasons)
    if kernel is None:
      continue
    if kernel.backward is None:
      return functools.partial(_run, op, kernel.forward, spec, arrays, index)
    default = kernel
    if implementation is None:
      default = portable_kernel(getattr(xla, op))
    return _planned(Plan(op, spec, kernel, default), arrays, index)
  raise NotImplementedError(
    f"`implementation`={implementation!r} cannot do this call of "
    f"`{_title(op)}`: {'; '.join(reasons)}."
  )


def choose_fused(
  op: str,
  implementation: Implementation,
  spec: Spec,
  arrays: Any,
  index: Any,
  composed: Callable[..., Any],
) -> Callable[[], Any] | None:
  """Like `choose`, for an op that can also be composed of other ops.

  Args:
    op: as in `choose`.
    implementation: as in `choose`.
    spec: as in `choose`.
    arrays: as in `choose`.
    index: as in `choose`.
    composed: the composition by "xla", a module-level function f(spec, arrays,
      index). It runs on other platforms if `implementation` is None.

  Returns:
    A function without arguments that runs the call. Or None if the caller must
    compose the op, because a portable implementation comes first or no kernel
    can do the call.
  """
  for name in names(implementation, op):
    if name in PORTABLE:
      break
    kernel = _kernel(name, op, spec, arrays, index, [])
    if kernel is not None and kernel.backward is None:
      return functools.partial(_run, op, kernel.forward, spec, arrays, index)
    if kernel is not None:
      default = kernel
      if implementation is None:
        default = Kernel(composed, kernel.backward)
      return _planned(Plan(op, spec, kernel, default), arrays, index)
  return None


def _planned(plan, arrays, index):
  # Leaf by leaf: an array without a tangent must not get one.
  arrays = jax.tree.map(reverse_mode_only, arrays)
  arrays, index = vary_alike((arrays, index))
  return functools.partial(attend, plan, arrays, index)


def _kernel(name, op, spec, arrays, index, reasons):
  """A backend's kernel, or None after appending the reason to `reasons`."""
  backend = BACKENDS[name]
  if isinstance(backend, str):
    backend = importlib.import_module(backend)
  served = getattr(backend, op, None)
  if served is None:
    reasons.append(f"{name!r} has no `{_title(op)}` in this version")
    return None
  try:
    served.check(spec, arrays, index)
  except NotImplementedError as error:
    reasons.append(f"{name!r}: {error}")
    return None
  return Kernel(served.forward, served.backward)


def _run(op, forward, spec, arrays, index):
  """Runs a forward function that jax differentiates, and tags its result."""
  return tag(op, forward(spec, arrays, index))


@functools.cache
def portable_kernel(forward: Callable[..., Any]) -> Kernel:
  """A portable function as a Kernel; cached, so that calls can share a Plan."""

  def backward(spec, arrays, index, out, lse, dout, dlse):
    # Recomputes the forward pass; CSE merges it with the first, so both
    # platforms save the same residuals.
    del out, lse
    _, pullback = jax.vjp(lambda *x: forward(spec, x, index), *arrays)
    return pullback((dout, dlse))

  return Kernel(forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, arrays: Any, index: Any) -> Any:
  """Runs a plan; the only custom_vjp around the kernels.

  Args:
    plan: which kernels to run.
    arrays: differentiable arguments: query, key and value of a branch.
    index: block ids or lengths, and `Queries`; not differentiable.
  """
  return _attend_fwd(plan, arrays, index)[0]


def _attend_fwd(plan, arrays, index):
  spec = plan.spec
  result = by_platform(
    (plan.cuda.forward, spec),
    (plan.default.forward, spec._replace(interpret=True)),
    _results(plan, arrays),
    arrays,
    index,
  )
  result = tag(plan.op, result)
  return result, (arrays, index, result)


def _attend_bwd(plan, residuals, cotangents):
  arrays, index, result = residuals
  spec = plan.spec
  if plan.op not in ATTENTION_OPS:  # Raises, as the interface says.
    plan.cuda.backward(spec, arrays, index, result, None, cotangents, None)
  out, lse = result
  dout, dlse = cotangents
  if spec.empty_queries:  # They have zero gradient, but 0 * NaN would be NaN.
    empty = lse == -jnp.inf
    dout = jnp.where(empty[..., None], 0, dout)
    dlse = jnp.where(empty, 0, dlse)
  grads = by_platform(
    (plan.cuda.backward, spec),
    (plan.default.backward, spec._replace(interpret=True)),
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays),
    arrays,
    index,
    out,
    lse,
    dout,
    dlse,
  )
  return grads, None


attend.defvjp(_attend_fwd, _attend_bwd)


def _results(plan, arrays):
  """Shapes and dtypes of the results, equal for every implementation."""
  op, config = plan.op, plan.spec.config
  query = arrays[0]
  batch, length, heads, _ = query.shape

  def ids(kv_heads):
    shape = batch, length, kv_heads, config.num_selected
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  def out(value_dim):
    shape = batch, length, heads, value_dim
    return jax.ShapeDtypeStruct(shape, query.dtype)

  if op == "select_blocks":
    return ids(arrays[1].shape[2])
  if op == "decode":
    value = arrays.selected.value
    return out(value.shape[3]), ids(value.shape[2])
  acc = sum_dtype(query.dtype)
  if op == "block_scores":
    blocks = -(-plan.spec.key_length // config.selection_block)
    shape = batch, length, arrays[1].shape[2], blocks
    return jax.ShapeDtypeStruct(shape, acc)
  lse = jax.ShapeDtypeStruct((batch, length, heads), acc)
  return out(arrays[2].shape[3]), lse


def tag(op: str, result: Any) -> Any:
  """Tags out and lse of a branch with names for remat policies."""
  if op not in ATTENTION_OPS:
    return result
  out, lse = result
  out = checkpoint_name(out, f"nsa_{op}_out")
  if lse is not None:
    lse = checkpoint_name(lse, f"nsa_{op}_lse")
  return out, lse


def _title(op):
  """The name of the public function."""
  if op == "decode":
    return "cache.attend"
  return f"{op}_attention" if op in ATTENTION_OPS else op
