"""Checks that the kernels support a call; raises NotImplementedError if not."""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_query, group_of, visible_gpus

_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
BLOCKS = (16, 32, 64, 128)
_MAX_GROUP = 64
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = 8.0
# A decode program holds all scores of a query in registers, 128 per thread.
_MAX_BLOCKS_OF_A_ROW = 2**14


def check_where() -> None:
  """Checks the visible devices.

  Without a visible NVIDIA GPU (when lowering for another machine), one that the
  kernels support is assumed.

  Raises:
    NotImplementedError: naming the limit.
  """
  for device in visible_gpus():
    if float(device.compute_capability) < _MIN_CAPABILITY:
      raise NotImplementedError(
        f"{device.device_kind} has compute capability "
        f"{device.compute_capability}: the kernels take {_MIN_CAPABILITY} and "
        "newer"
      )


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
    if size % 16 or size > _MAX_HEAD_DIM:
      raise NotImplementedError(
        f"`{name}` has head dimension {size}: the kernels take multiples of 16 "
        f"up to {_MAX_HEAD_DIM}"
      )
  group = group_of(query, key)
  if group > _MAX_GROUP:
    raise NotImplementedError(
      f"`query` has {group} heads per key/value head: the kernels take at most "
      f"{_MAX_GROUP}"
    )


def check_blocks_of_a_row(key_length: int, block: int) -> None:
  """Checks the number of selection blocks that a decoding query chooses from.

  Raises:
    NotImplementedError: naming the value and the limit.
  """
  if -(-key_length // block) > _MAX_BLOCKS_OF_A_ROW:
    raise NotImplementedError(
      f"`cache` has room for {key_length} tokens: the decode kernels take at "
      f"most {_MAX_BLOCKS_OF_A_ROW} selection blocks of {block}"
    )
