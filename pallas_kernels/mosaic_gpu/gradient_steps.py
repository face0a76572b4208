"""The steps of the backward kernels of all branches.

A step is 64 rows of queries against 64 keys. Scores are transposed, [keys,
rows], so that probabilities and ds are operands of the next products right
where they are computed, in registers.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.mosaic_gpu.common import LOG2E
from pallas_kernels.mosaic_gpu.tiling import ROWS

plgpu: Any = mosaic_gpu
# Value of lse of queries that read nothing: their probabilities are exactly 0.
EMPTY = 1e30


def _add_product(acc: Any, x: Any, y: Any, buffer: Any) -> None:
  """Issues acc += x y, with x in registers.

  Args:
    acc: accumulator.
    x: [keys, ROWS].
    y: [ROWS, width], in shared memory.
    buffer: [keys, ROWS] in shared memory where interpreted, else None.
  """
  if buffer is not None:  # The interpreter takes no operands in registers.
    buffer[...] = x
    plgpu.commit_smem()
    x = buffer
  plgpu.wgmma(acc, x, y)


def add_step(
  accs: dict[str, Any],
  keys: tuple[Any, Any],
  rows: tuple[Any, Any],
  stats: tuple[Callable[[], Any], Callable[[], Any]],
  *,
  scale: float,
  readable: Callable[[], Any] | None,
  store: Callable[[Any], None],
  buffer: Any,
) -> None:
  """Adds a step to dk / scale, dv, or both; with dk it stores ds, too.

  Args:
    accs: an accumulator for each gradient by its name, "dk" or "dv".
    keys: [ROWS, H] and [ROWS, V], keys and values in shared memory.
    rows: [ROWS, H] and [ROWS, V], queries and dout in shared memory.
    stats: each loads [keys, ROWS]: lse of base 2, and delta.
    scale: softmax scale.
    readable: loads the mask [keys, ROWS]; None if all rows read all keys.
    store: stores ds [keys, ROWS].
    buffer: as in `_add_product`.
  """
  (k, v), (q, dout) = keys, rows
  lse_of, delta_of = stats

  def products(s_acc: Any, dp_acc: Any = None) -> None:
    # The exponentials run beside the second product, ds beside that of dv.
    plgpu.wgmma(s_acc, k, q.T)
    if "dk" in accs:
      plgpu.wgmma(dp_acc, v, dout.T)
    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=int("dk" in accs))
    p = jnp.exp2(s * (scale * LOG2E) - lse_of())
    if readable is not None:
      p = jnp.where(readable(), p, 0.0)
    if "dv" in accs:
      _add_product(accs["dv"], p.astype(q.dtype), dout, buffer)
    if "dk" in accs:
      dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=int("dv" in accs))
      ds = (p * (dp - delta_of())).astype(q.dtype)
      _add_product(accs["dk"], ds, q, buffer)
      store(ds)
    plgpu.wgmma_wait(0)

  scores = plgpu.ACC((ROWS, ROWS), jnp.float32)
  pl.run_scoped(products, scores, *[scores] * ("dk" in accs))


def of_rows(x: Any) -> Any:
  """[ROWS] of the rows of a step -> [keys, ROWS]."""
  return lax.broadcast_in_dim(x, (ROWS, ROWS), [1])


def load_rows(ref: Any) -> Any:
  """Loads a vector that belongs to the columns of a tile of scores."""
  layout = plgpu.Layout.WGMMA.reduce(0)
  return plgpu.load(ref, layout=layout, optimized=False)
