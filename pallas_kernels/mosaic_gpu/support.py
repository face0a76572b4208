"""Checks that the kernels support a call; raises NotImplementedError if not."""

import functools
import re

import jax
import jax.numpy as jnp

from pallas_kernels.checks import (
  abstract_gpu,
  check_query,
  group_of,
  visible_gpus,
)

# Older versions lack much of the layout inference that the kernels rely on.
_MIN_JAX = (0, 11)
_CAPABILITY = "9.0"  # wgmma is of Hopper alone.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
# PTX ISA 9.0 is that of CUDA 13.0, with which the kernels were measured. ptxas
# 12.9 overwrites registers that an asynchronous wgmma still reads.
_MIN_PTX_ISA = 90
_DTYPES = (jnp.float16, jnp.bfloat16)
_HEAD_DIMS = (64, 128, 192, 256)
_MAX_GROUP = 64
_MULTIPROCESSORS = 132  # of an H100 or H200 with SXM


def check_where() -> None:
  """Checks the version of jax, the cards and the assembler.

  An abstract device says which card it is, else the visible NVIDIA GPUs do.
  Without both (when interpreting), and without an assembler, those that the
  kernels support are assumed.

  Raises:
    NotImplementedError: naming what is there and the rule.
  """
  if jax.__version_info__[:2] < _MIN_JAX:
    least = ".".join(map(str, _MIN_JAX))
    raise NotImplementedError(
      f"jax has version {jax.__version__}: the kernels take {least} and newer"
    )
  card, devices = abstract_gpu(), visible_gpus()
  if card is not None and not _HOPPER.search(card.device_kind):
    raise NotImplementedError(
      f"{card.device_kind} is not a Hopper card: the kernels take compute "
      f"capability {_CAPABILITY} only"
    )
  for device in devices if card is None else ():
    if device.compute_capability != _CAPABILITY:
      raise NotImplementedError(
        f"{device.device_kind} has compute capability "
        f"{device.compute_capability}: the kernels take {_CAPABILITY} only"
      )
  if devices:
    check_assembler(ptx_isa())


def check_assembler(isa: int | None) -> None:
  """Checks the newest PTX ISA that ptxas knows, which tells its version.

  Args:
    isa: 88 for 8.8; None if unknown.

  Raises:
    NotImplementedError: naming the version and the rule.
  """
  rule = "the kernels need ptxas of CUDA 13.0 or newer"
  if isa is None:
    raise NotImplementedError(f"ptxas has an unknown version: {rule}")
  if isa < _MIN_PTX_ISA:
    # CUDA 12.0 has PTX ISA 8.0, and each minor version of both goes together;
    # from CUDA 13.0 on so do 9.0 and its minor versions.
    release = f"12.{isa - 80 + (isa > 85)}" if isa >= 80 else "11 or older"
    raise NotImplementedError(
      f"ptxas is of CUDA {release} (PTX ISA {isa / 10}), which corrupts "
      f"products with an operand in registers: {rule}"
    )


@functools.cache
def ptx_isa() -> int | None:
  """The newest PTX ISA of the ptxas that compiles kernels; None if unknown."""
  try:
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext._get_ptxas_isa_version()
  except (ImportError, AttributeError, RuntimeError):
    return None


def multiprocessors() -> int:
  """Multiprocessors of the card that a kernel is lowered for.

  They are those of the abstract device, or of the visible GPUs, else an H200's.
  """
  card = abstract_gpu()
  if card is not None and card.num_cores:
    return card.num_cores
  for device in visible_gpus():
    return device.core_count
  return _MULTIPROCESSORS


def check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
  """Checks shapes and dtype of the arrays, the same for every kernel.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].

  Raises:
    NotImplementedError: naming argument, value and limit.
  """
  check_query(query, _DTYPES)
  for name, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
    if size not in _HEAD_DIMS:
      raise NotImplementedError(
        f"`{name}` has head dimension {size}: the kernels take "
        f"{', '.join(map(str, _HEAD_DIMS))}"
      )
  group = group_of(query, key)
  if group % 8 or group > _MAX_GROUP:
    raise NotImplementedError(
      f"`query` has {group} heads per key/value head: the kernels take "
      f"multiples of 8 up to {_MAX_GROUP}"
    )
