"""Checks that the kernels support a call; raises NotImplementedError if not."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.interface import Spec

_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
_BLOCKS = (16, 32, 64, 128)
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
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:  # No visible GPU.
    devices = []
  for device in devices:
    if float(device.compute_capability) < _MIN_CAPABILITY:
      raise NotImplementedError(
        f"{device.device_kind} has compute capability "
        f"{device.compute_capability}: the kernels take {_MIN_CAPABILITY} and "
        "newer"
      )


def check_scores(spec: Spec) -> None:
  """Checks that the scores of queries and keys stay as they are.

  Raises:
    NotImplementedError: naming the argument and the value.
  """
  if spec.softcap is not None:
    raise NotImplementedError(
      f"`softcap`={spec.softcap}: the kernels take None; "
      "`implementation`='xla' can"
    )


def check_tiles(spec: Spec, kind: Any, *fits: int) -> None:
  """Checks that the requested tiles, if any, are a `kind` and fit the call.

  Args:
    spec: static arguments of the call.
    kind: class of the tiles.
    *fits: arguments of its `check_fit`.

  Raises:
    ValueError: naming the value and the rule.
  """
  tiles = spec.tiles
  if tiles is None:
    return
  if not isinstance(tiles, kind):
    raise ValueError(f"`tiles`={tiles!r} must be a {kind.__name__}.")
  tiles.check_fit(*fits)


def group_of(query: jax.Array, key: jax.Array) -> int:
  """G, query heads per key/value head."""
  return query.shape[2] // key.shape[2]


def check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
  """Checks shapes and dtype of the arrays, the same for every kernel.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].

  Raises:
    NotImplementedError: naming argument, value and limit.
  """
  if not all(isinstance(size, int) for size in query.shape):
    raise NotImplementedError(
      f"`query` has the symbolic shape {query.shape}: the kernels take static "
      "sizes"
    )
  if query.dtype not in _DTYPES:
    raise NotImplementedError(
      f"`query` of dtype {query.dtype}: the kernels take "
      f"{', '.join(jnp.dtype(d).name for d in _DTYPES)}"
    )
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


def check_selection_block(block: int) -> None:
  """Checks for a block length whose tiles are powers of two.

  Raises:
    NotImplementedError: naming the value and the limit.
  """
  if block not in _BLOCKS:
    raise NotImplementedError(
      f"`selection_block`={block}: the kernels take "
      f"{', '.join(map(str, _BLOCKS))}"
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
