"""Runs interpreted kernels as a single step of a program, on a CPU."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import jax

# The interpreter keeps the memory of a kernel in a global: one at a time.
_LOCK = threading.Lock()
# Threads of XLA that block while a kernel runs: one per warpgroup and some that
# wait for these. XLA has one per core, or per device of the CPU.
_THREADS = 8


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
  """Marks a function of a backend whose interpreted kernels call Python.

  `platforms` does not partition it where it is interpreted: jax would not keep
  what is called alive. XLA then runs it on one device.
  """
  function.in_python = True  # type: ignore[attr-defined]
  return function


def interpreted(
  run: Callable[..., Any], results: Any, *arrays: jax.Array
) -> Any:
  """Calls a function with interpreted kernels.

  The interpreter makes ordered effects, which neither `jax.custom_vjp` nor
  `jax.vmap` allows. So the function runs outside the program that calls it.

  Args:
    run: the function of `arrays`.
    results: shapes and dtypes of its results.
    *arrays: its arguments.

  Raises:
    NotImplementedError: if XLA has too few threads; it would wait forever.
  """
  threads = max(os.cpu_count() or 1, len(jax.devices("cpu")))
  if threads < _THREADS:
    raise NotImplementedError(
      f"interpreted kernels of 'mosaic_gpu' take {_THREADS} threads, and XLA "
      f"has {threads}: set the environment variable XLA_FLAGS to "
      f'"--xla_force_host_platform_device_count={_THREADS}"'
    )
  function = functools.partial(_run_alone, jax.jit(run))
  return jax.pure_callback(function, results, *arrays, vmap_method="sequential")


def _run_alone(run: Callable[..., Any], *arrays: Any) -> Any:
  cpu = jax.devices("cpu")[0]
  with _LOCK, jax.default_device(cpu):
    return jax.device_get(run(*jax.device_put(arrays, cpu)))
