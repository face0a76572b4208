"""Operations between the 32 lanes of a warp, for kernels.

A scalar of a kernel is a register of every thread, and may differ between
lanes. All lanes of a warp must take part. Not for interpreted kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

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
  return _scalar(
    lambda value: utils.redux(value, utils.c(_ALL, value.type), kind), x
  )


def lane() -> jax.Array:
  """Index of this lane, int32 in [0, 32)."""
  return _scalar(utils.nvvm.read_ptx_sreg_laneid)


def lowest(x: jax.Array) -> jax.Array:
  """Minimum of an int32 over the lanes, the same in all of them."""
  return _reduce(utils.ReductionKind.MIN, x)


def union(x: jax.Array) -> jax.Array:
  """Bitwise or of an int32 over the lanes, the same in all of them."""
  return _reduce(utils.ReductionKind.OR, x)


def common(x: jax.Array) -> jax.Array:
  """An int32 that is the same in all lanes, for what follows.

  The compiler would move it to a uniform register where it is loaded, and wait
  for the load there. This keeps it in the registers of the lanes until now.
  """
  return union(x)
