"""Says what to do where forward-mode differentiation is not implemented.

jax's own error for a `jax.custom_vjp` comes late, at lowering, and names
neither the op nor the remedy.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from nsa_jax.typing import Array

REVERSE_MODE_ONLY = (
  "kernels, and `implementation`=None, have reverse-mode derivatives only: for "
  'jax.jvp, jax.jacfwd and jax.linearize pass `implementation`="xla"'
)


@contextlib.contextmanager
def explain_forward_mode() -> Iterator[None]:
  """Turns jax's own error, which comes first under vmap, into ours.

  Raises:
    NotImplementedError: in its place.
  """
  try:
    yield
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise NotImplementedError(REVERSE_MODE_ONLY) from error


@jax.custom_jvp
def reverse_mode_only(x: Array) -> Array:
  """`x`, with a tangent that can be transposed but not computed."""
  return x


@reverse_mode_only.defjvp
def _jvp(primals, tangents):
  return primals[0], _tangent_p.bind(*tangents)


_tangent_p = core.Primitive("nsa_reverse_mode_only")
_tangent_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent_p)


@_tangent_p.def_impl
def _refuse(*_, **__):
  raise NotImplementedError(REVERSE_MODE_ONLY)


mlir.register_lowering(_tangent_p, _refuse)
