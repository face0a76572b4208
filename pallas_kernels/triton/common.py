"""What all kernels share: the one wrapper around `pl.pallas_call`, constants.

Nothing here knows what attention is selected, compressed or windowed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.platforms import by_platform

# Softmax runs on exp2, which is one instruction; log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# Masked scores, and where running maxima start. The maximum starts far above
# the mask, so that a tile in which a row has no key leaves exp2(MASK - m) = 0
# and needs no second mask; real scores lie far above both.
MASK = -1e30
MAX_INIT = -1e20


def pallas_call(
  kernel: Callable[..., None],
  *,
  name: str,
  num_warps: int,
  num_stages: int,
  with_exp2: bool = False,
  **kwargs: Any,
) -> Callable[..., Any]:
  """`pl.pallas_call` for the Triton backend; interpreted where no GPU is.

  The platform is that of the lowering, so one traced program serves both, and
  a program lowered for a CPU holds no kernel.

  Args:
    kernel: the kernel.
    name: for profiles.
    num_warps: warps per program.
    num_stages: depth of the pipelines of its loops.
    with_exp2: pass the kernel `exp2`, the fastest there is.
    **kwargs: of `pl.pallas_call`.
  """

  def call(interpret: bool) -> Callable[..., Any]:
    exp2 = {"exp2": jnp.exp2 if interpret else _exp2} if with_exp2 else {}
    return pl.pallas_call(
      functools.partial(kernel, **exp2),
      name=name,
      compiler_params=plgpu.CompilerParams(
        num_warps=num_warps, num_stages=num_stages
      ),
      interpret=interpret,
      **kwargs,
    )

  return by_platform(cuda=call(False), default=call(True))


def _exp2(x: jax.Array) -> jax.Array:
  """2^x of float32, 0 where that is denormal; only for compiled kernels.

  One instruction; `jnp.exp2` keeps denormal numbers, which takes three.
  """
  (out,) = plgpu.elementwise_inline_asm(
    "ex2.approx.ftz.f32 $0, $1;",
    args=[x],
    constraints="=f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
  )
  return out


def whole(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
  """The whole array, whatever the program."""
  return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def pieces(size: int) -> tuple[tuple[int, int], ...]:
  """A dimension as (start, width) of powers of two, 192 = 128 + 64.

  Tiles must be powers of two; padding 192 to 256 would waste a quarter.
  """
  result, start = [], 0
  for bit in reversed(range(size.bit_length())):
    if size >> bit & 1:
      result.append((start, 1 << bit))
      start += 1 << bit
  return tuple(result)


def padded_rows(size: int) -> int:
  """Rows of a matrix product: a power of two, at least 16."""
  return max(16, pl.next_power_of_2(size))


def padding_mask(size: int, padded: int) -> jax.Array | None:
  """Which of `padded` rows are real; None if all are."""
  return None if size == padded else jnp.arange(padded) < size


def index(i: int) -> jax.Array:
  """A Python integer as an index; interpreted loads do not take it as it is.

  Of the type of the other indices, which depends on jax_enable_x64.
  """
  return jnp.full((), i, int)


def load(
  ref: Any, mask: jax.Array | None = None, other: float = 0
) -> jax.Array:
  """Loads a ref of any rank; `other` in the rows off the mask."""
  if mask is None:
    return plgpu.load(ref)
  mask = mask.reshape(mask.shape + (1,) * (len(ref.shape) - 1))
  return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=other)


def store(ref: Any, x: jax.Array, mask: jax.Array | None = None) -> None:
  """Stores all rows, or those of the mask."""
  if mask is not None:
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - 1))
    mask = jnp.broadcast_to(mask, x.shape)
  plgpu.store(ref, x, mask=mask)


def load_pieces(
  ref: Any,
  index: Any,
  columns: Sequence[tuple[int, int]],
  mask: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
  """ref[index] of shape [rows, H] as tiles, one for each piece of H.

  Args:
    ref: [..., H].
    index: of all dimensions but the last; one tuple entry is a range of rows.
    columns: the pieces of H.
    mask: [rows]; rows off the mask are 0.
  """
  index = index if isinstance(index, tuple) else (index,)
  return tuple(
    load(ref.at[(*index, pl.ds(start, width))], mask)
    for start, width in columns
  )


def accumulators(
  rows: int, columns: Sequence[tuple[int, int]]
) -> tuple[jax.Array, ...]:
  """Zeros [rows, H] in float32, one tile for each piece of H."""
  return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in columns)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """A product accumulated in float32; float32 exactly, never as TF32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return plgpu.dot(x, y, precision=precision)


def dot_pieces(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
  """x y^T over the pieces of a common last dimension."""
  products = [dot(x, y.T) for x, y in zip(xs, ys, strict=True)]
  return sum(products[1:], products[0])


def div(x: Any, y: int) -> Any:
  """Floor division of numbers that are not negative.

  `//` lowers to a sign correction that Triton does not take for scalars.
  """
  return lax.div(x, jnp.asarray(y, x.dtype))


def rem(x: Any, y: int) -> Any:
  """Remainder of numbers that are not negative."""
  return lax.rem(x, jnp.asarray(y, x.dtype))
