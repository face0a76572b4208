"""Partitions kernels over batch and heads where XLA partitions a program.

XLA cannot look into a kernel: it would gather the arguments of a call on every
device. This serves programs under `jit` whose inputs are sharded over Auto axes
of a mesh and that say nothing else. Inside `jax.shard_map` nothing of it runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def partitioned(
  function: Callable[..., Any], arrays: Sequence[Any], results: Sequence[Any]
) -> Callable[..., Any]:
  """A function that each device calls with its batch rows and heads.

  The persistent compilation cache of jax does not find such a program again in
  another process, unless `jax_remove_custom_partitioning_ptr_from_cache_key` is
  set: it has the address of a Python function.

  Args:
    function: takes `arrays`. The first axis of an array is the batch. The third
      one, if there is one, is that of query heads (N) or of key/value heads
      (K); query head n belongs to key/value head n // (N // K).
    arrays: shapes of the arguments.
    results: shapes of the results, with the same axes.
  """
  shapes = [x.shape for x in (*arrays, *results)]
  kv_heads = min(shape[2] for shape in shapes if len(shape) > 2)

  def specs(batch, heads):
    """The partition of every argument and result."""
    return [P(*(batch, None, heads, None)[: len(shape)]) for shape in shapes]

  def partition(mesh, arguments, wanted):
    given = [x.sharding.spec for x in (*jax.tree.leaves(wanted), *arguments)]
    given = [(*spec, *(None,) * 3) for spec in given]
    batch, heads = (
      next((spec[axis] for spec in given if spec[axis]), None)
      for axis in (0, 2)
    )
    parts = 1
    for name in (heads,) if isinstance(heads, str) else heads or ():
      parts *= mesh.shape[name]
    if kv_heads % parts:  # No device may have a part of a group.
      heads = None
    placed = tuple(NamedSharding(mesh, spec) for spec in specs(batch, heads))
    return mesh, function, placed[len(arrays) :], placed[: len(arrays)]

  def letters(i, shape):
    """Axes of an array in the notation of Shardy, where (k g) is N."""
    heads = "k" if len(shape) > 2 and shape[2] == kv_heads else "(k g)"
    return " ".join(("b", f"t{i}", heads, f"h{i}")[: len(shape)])

  rule = [letters(i, shape) for i, shape in enumerate(shapes)]
  inner, outer = (
    ", ".join(x) for x in (rule[: len(arrays)], rule[len(arrays) :])
  )
  heads = max(shape[2] for shape in shapes if len(shape) > 2)
  factors = {"g": heads // kv_heads} if heads > kv_heads else {}
  whole = custom_partitioning(lambda *flat: tuple(function(*flat)))
  whole.def_partition(
    partition=partition,
    sharding_rule=f"{inner} -> {outer}",
    **factors,
  )
  return whole


@functools.cache
def needs_devices() -> Any:
  """A jaxpr; jax shows devices to the lowering of an equation that holds it.

  `partitioned` needs them. It is traced at lowering, when the platform is
  known, but jax looks for it before.
  """
  nothing = custom_partitioning(lambda x: x)
  nothing.def_partition(partition=None, sharding_rule="i -> i")
  return jax.make_jaxpr(nothing)(jax.ShapeDtypeStruct((1,), bool))
