"""What all kernels share: the one wrapper around `pl.pallas_call`, constants.

Nothing here knows what attention is selected, compressed or windowed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Softmax runs on exp2, which is one instruction; log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# Masked scores, and where running maxima start. The maximum starts far above
# the mask, so that a tile in which a row has no key leaves exp2(MASK - m) = 0
# and needs no second mask; real scores lie far above both.
MASK = -1e30
MAX_INIT = -1e20


def options(
  name: str, num_warps: int, num_stages: int, interpret: bool
) -> dict[str, Any]:
  """Keyword arguments of `pl.pallas_call` for the Triton backend.

  Args:
    name: of the kernel, for profiles.
    num_warps: warps per program.
    num_stages: depth of the pipelines of its loops.
    interpret: run it by the interpreter, on any platform.
  """
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return {"name": name, "compiler_params": params, "interpret": interpret}


def exp2(interpret: bool) -> Callable[[jax.Array], jax.Array]:
  """2^x for kernels: the fastest there is."""
  return jnp.exp2 if interpret else _exp2


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


def segment_pair(
  key_segments: jax.Array | None, query_segments: jax.Array | None
) -> tuple[jax.Array, ...]:
  """Segments as the kernels take them: of keys and queries, or none.

  Queries that read nothing get a segment that no key has.
  """
  if key_segments is None or query_segments is None:
    return ()
  return key_segments, jnp.where(query_segments > 0, query_segments, -1)


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
