"""What all kernels share: options of `plgpu.kernel`, and rings."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.integers import rem

# The kernels need names of jax 0.11; type checkers may see those of 0.10.
plgpu: Any = mosaic_gpu
# Softmax uses exp2, which is one instruction; the scale includes log2(e).
LOG2E = math.log2(math.e)


def options(
  name: str, num_threads: int, interpret: bool, *, auto_barriers: bool = False
) -> dict[str, Any]:
  """Keyword arguments of `plgpu.kernel` that all kernels have.

  Args:
    name: name of the kernel.
    num_threads: warpgroups.
    interpret: run it in the interpreter.
    auto_barriers: the compiler puts barriers of a warpgroup around every access
      to shared memory. Kernels whose threads read nothing there that another
      one has stored, with barriers of their own for TMA, need none.
  """
  return {
    "grid_names": ("program",),
    "num_threads": num_threads,
    "thread_name": "warpgroup",
    "kernel_name": name,
    # No reduction crosses warps.
    "compiler_params": plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=0,
      unsafe_no_auto_barriers=not (auto_barriers or interpret),
    ),
    "interpret": (
      plgpu.InterpretGPUParams(detect_races=True) if interpret else None
    ),
  }


def drain(free: Any, stages: int, count: Any, first: Any = 0) -> None:
  """Waits until the last steps of a ring are read.

  The interpreter wants every barrier awaited.

  Args:
    free: barriers.
    stages: size of the ring.
    count: number of steps that it has had.
    first: number of the barrier of its first slot.
  """

  def step(n: Any, _: Any) -> Any:
    plgpu.barrier_wait(free.at[first + rem(n, stages)])
    return ()

  lax.fori_loop(jnp.maximum(count - stages, 0), count, step, ())
