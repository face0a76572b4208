"""Which implementation serves a call, and the errors when none can.

`ValueError` means that the caller is wrong; it is never swallowed.
`NotImplementedError` means that this implementation cannot do it; the next one
asked for may.

The ops are "compressed", "selected", "window" and "full", the branches, whose
result is (out, lse); "block_scores", "select_blocks" and "decode".
`pallas_kernels.interface` says what their functions take and return.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import cudnn, reference, xla
from nsa_jax.typing import Implementation
from pallas_kernels.interface import Spec
from pallas_kernels.platforms import by_platform

# `disabled_checks` of `jax.export.export` for programs that hold the kernels,
# whose custom calls jax does not promise to keep: run such a program with the
# version of jax that exported it. The target depends on that version.
EXPORT_DISABLED_CHECKS = tuple(
  export.DisabledSafetyCheck.custom_call(target)
  for target in ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
)

BRANCHES = ("compressed", "selected", "window", "full")

# These do every call of every op but "decode", which they have no need of:
# functions f(spec, arrays, index), which jax differentiates.
PORTABLE: dict[str, Any] = {"reference": reference, "xla": xla}

# A backend is an object with an attribute for every op that it serves; that
# holds `check`, `forward` and `backward`, as `pallas_kernels.interface` says. A
# `backward` of None leaves it to jax to differentiate `forward`. A string is
# the name of a module that is imported at its first use: importing nsa_jax
# imports no Pallas.
BACKENDS: dict[str, Any] = {
  "triton": "pallas_kernels.triton",
  "cudnn": cudnn,
}


class Kernel(NamedTuple):
  """Forward and backward function of one op; module-level functions."""

  forward: Callable[..., Any]
  backward: Callable[..., Any] | None


class Plan(NamedTuple):
  """What a call runs; static and hashable.

  Attributes:
    op: its name.
    spec: the static side of the call.
    cuda: what runs on NVIDIA GPUs.
    default: what runs elsewhere: `xla`, or the same kernel interpreted if the
      backend was asked for by name.
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
    # cuDNN's other attention has another order of sums in every run.
    return ("cudnn" if op == "full" else "triton", "xla")
  known = [*PORTABLE, *BACKENDS]
  if isinstance(implementation, str):
    tried: Sequence[Any] = (implementation,)
  elif isinstance(implementation, Sequence) and implementation:
    tried = tuple(implementation)
  else:
    tried = (implementation,)
  for name in tried:
    if name not in known:
      raise ValueError(
        f"`implementation`={implementation!r} must be None, one of "
        f"{', '.join(map(repr, known))}, or a sequence of these names."
      )
  return tried


def choose(
  op: str, implementation: Implementation, spec: Spec, arrays: Any, index: Any
) -> Callable[[Any, Any], Any]:
  """The first implementation of `op` that can do the call.

  None is "triton" on NVIDIA GPUs with "xla" in place of the kernels everywhere
  else, in one traced program; or "xla" alone, if the kernels cannot do it.

  Args:
    op: its name.
    implementation: what was asked for.
    spec: the static side of the call.
    arrays: of the call, to be judged; as is the next.
    index: of the call.

  Returns:
    A function of `arrays` and `index`.

  Raises:
    ValueError: if `implementation` is wrong.
    NotImplementedError: if none of those asked for can, with every reason.
  """
  reasons: list[str] = []
  for name in names(implementation, op):
    if name in PORTABLE:
      forward = getattr(PORTABLE[name], op)
      return functools.partial(_run, op, forward, spec)
    kernel = _kernel(name, op, spec, arrays, index, reasons)
    if kernel is None:
      continue
    if kernel.backward is None:
      return functools.partial(_run, op, kernel.forward, spec)
    default = kernel
    if implementation is None:
      default = portable_kernel(getattr(xla, op))
    return functools.partial(attend, Plan(op, spec, kernel, default))
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
) -> Callable[[Any, Any], Any] | None:
  """As `choose`, for an op that others can be composed to.

  Args:
    op: as of `choose`; as are the next four.
    implementation: what was asked for.
    spec: the static side of the call.
    arrays: of the call.
    index: of the call.
    composed: the composition by "xla", a module-level function f(spec, arrays,
      index): what runs on other platforms if `implementation` is None.

  Returns:
    A function of `arrays` and `index`; or None, to compose: a portable
    implementation comes first, or no kernel can do the call.
  """
  for name in names(implementation, op):
    if name in PORTABLE:
      break
    kernel = _kernel(name, op, spec, arrays, index, [])
    if kernel is not None:
      default = kernel
      if implementation is None:
        default = Kernel(composed, kernel.backward)
      return functools.partial(attend, Plan(op, spec, kernel, default))
  return None


def _kernel(name, op, spec, arrays, index, reasons):
  """A backend's kernel, or None with the reason added to `reasons`."""
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
  """A function that jax differentiates."""
  return tag(op, forward(spec, arrays, index))


@functools.cache
def portable_kernel(forward: Callable[..., Any]) -> Kernel:
  """A portable function as a kernel; the same one for the same function."""

  def backward(spec, arrays, index, out, lse, dout, dlse):
    # Recomputes the forward pass; CSE merges it with the first, so both
    # platforms save the same residuals.
    del out, lse
    _, pullback = jax.vjp(lambda *x: forward(spec, x, index), *arrays)
    return pullback((dout, dlse))

  return Kernel(forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, arrays: Any, index: Any) -> Any:
  """Runs a plan: the one function of the kernels with derivatives.

  Args:
    plan: what to run.
    arrays: what it is differentiated by: query, key and value of a branch.
    index: block ids and queries.
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
  if plan.op not in BRANCHES:  # which says that it has no derivatives
    plan.cuda.backward(spec, arrays, index)
  out, lse = result
  dout, dlse = cotangents
  # Rows that read nothing have no gradient, and NaN times 0 would be one.
  dlse = jnp.where(lse == -jnp.inf, 0, dlse)
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
  """Shapes and dtypes of the results, the same for every implementation."""
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
  acc = jnp.promote_types(jnp.float32, query.dtype)
  lse = jax.ShapeDtypeStruct((batch, length, heads), acc)
  return out(arrays[2].shape[3]), lse


def tag(op: str, result: Any) -> Any:
  """Names out and lse of a branch for remat policies."""
  if op not in BRANCHES:
    return result
  out, lse = result
  out = checkpoint_name(out, f"nsa_{op}_out")
  if lse is not None:
    lse = checkpoint_name(lse, f"nsa_{op}_lse")
  return out, lse


def _title(op):
  """The name of the public function."""
  return f"{op}_attention" if op in (*BRANCHES, "decode") else op
