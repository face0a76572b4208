"""Operations between the 32 lanes of a warp, for kernels.

A scalar of a kernel is a register of every thread, and may differ between
lanes. All lanes of a warp must take part. Not for interpreted kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import nvvm

_plgpu: Any = plgpu
_ALL = -1  # The mask of all lanes.


def _scalar(function: Any, *args: jax.Array) -> jax.Array:
  """function(*args) of int32 scalars, with values of MLIR."""
  layout = plgpu.Layout.WG_SPLAT

  def run(context, *arrays):
    del context
    values = [array.registers.item() for array in arrays]
    return mgpu.FragmentedArray.splat(function(*values), (), is_signed=True)

  return _plgpu.inline_mgpu(
    arg_types=(layout,) * len(args),
    return_type=_plgpu.ShapeDtypeStruct((), jnp.int32, layout=layout),
  )(run)(*args)


def _reduce(kind: Any, x: jax.Array) -> jax.Array:
  def run(value):
    i32 = ir.IntegerType.get_signless(32)
    return nvvm.redux_sync(value, kind, mgpu.c(_ALL, i32))

  return _scalar(run, x)


def lane() -> jax.Array:
  """Index of this lane, int32 in [0, 32)."""
  return _scalar(nvvm.read_ptx_sreg_laneid)


def lowest(x: jax.Array) -> jax.Array:
  """Minimum of an int32 over the lanes, the same in all of them."""
  return _reduce(nvvm.ReductionKind.MIN, x)


def union(x: jax.Array) -> jax.Array:
  """Bitwise or of an int32 over the lanes, the same in all of them."""
  return _reduce(nvvm.ReductionKind.OR, x)
