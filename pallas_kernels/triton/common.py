"""What all kernels share: options of `pl.pallas_call`, loads, products.

Nothing here is specific to a branch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# The softmax uses exp2, which is one instruction; the scale includes log2(e).
LOG2E = math.log2(math.e)
# Value of masked scores, and initial value of running maxima. The maximum
# starts far above the mask, so that a tile without keys for a row gives
# exp2(MASK - m) = 0 without a second mask; valid scores lie far above both.
MASK = -1e30
MAX_INIT = -1e20


def options(
  name: str, num_warps: int, num_stages: int, interpret: bool
) -> dict[str, Any]:
  """Keyword arguments of `pl.pallas_call` for the Triton backend.

  Args:
    name: name of the kernel, for profiles.
    num_warps: warps per program.
    num_stages: pipeline depth of its loops.
    interpret: run it in the interpreter, on any platform.
  """
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return {"name": name, "compiler_params": params, "interpret": interpret}


def exp2(interpret: bool) -> Callable[[jax.Array], jax.Array]:
  """The fastest available 2^x for kernels."""
  return jnp.exp2 if interpret else _exp2


def _exp2(x: jax.Array) -> jax.Array:
  """2^x of float32, denormal results flushed to 0; for compiled kernels only.

  It takes one instruction; `jnp.exp2` preserves denormals and takes three.
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
  """Block spec of the whole array, the same for every program."""
  return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def pieces(size: int) -> tuple[tuple[int, int], ...]:
  """Splits a dimension into (start, width) of powers of two: 192 = 128 + 64.

  Tile sizes must be powers of two; padding 192 to 256 would waste a quarter.
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
  """Mask of the `size` valid rows of `padded`; None if all are valid."""
  return None if size == padded else jnp.arange(padded) < size


def index(i: Any) -> jax.Array:
  """An integer as an index array, which interpreted loads and stores require.

  Its dtype is that of slices, which depends on jax_enable_x64.
  """
  return jnp.full((), i, int)


def load(
  ref: Any, mask: jax.Array | None = None, other: float = 0
) -> jax.Array:
  """Loads a ref of any rank; rows that are masked out are `other`."""
  if mask is None:
    return plgpu.load(ref)
  mask = mask.reshape(mask.shape + (1,) * (len(ref.shape) - 1))
  return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=other)


def store(ref: Any, x: jax.Array, mask: jax.Array | None = None) -> None:
  """Stores all rows, or only those where the mask holds."""
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
  """Loads ref[index] of shape [rows, H] as one tile per piece of H.

  Args:
    ref: [..., H].
    index: for all dimensions but the last; one tuple entry is a range of rows.
    columns: the pieces of H.
    mask: [rows]; rows that are masked out are 0.
  """
  index = index if isinstance(index, tuple) else (index,)
  return tuple(
    load(ref.at[(*index, pl.ds(start, width))], mask)
    for start, width in columns
  )


def accumulators(
  rows: int, columns: Sequence[tuple[int, int]]
) -> tuple[jax.Array, ...]:
  """Float32 zeros [rows, H], one tile per piece of H."""
  return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in columns)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """A product accumulated in float32, without TF32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return plgpu.dot(x, y, precision=precision)


def dot_pieces(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> jax.Array:
  """x y^T, summed over the pieces of the last dimension."""
  products = [dot(x, y.T) for x, y in zip(xs, ys, strict=True)]
  return sum(products[1:], products[0])
