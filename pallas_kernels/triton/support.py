"""What the kernels can take; else `NotImplementedError` with the reason."""

import jax
import jax.numpy as jnp

_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
_BLOCKS = (16, 32, 64, 128)
_MAX_GROUP = 64
_MAX_HEAD_DIM = 256


def check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
  """Dtype, head dimensions and group size, the same for every kernel.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].

  Raises:
    NotImplementedError: naming argument, value and limit.
  """
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
  group = query.shape[2] // key.shape[2]
  if group > _MAX_GROUP:
    raise NotImplementedError(
      f"`query` has {group} heads per key/value head: the kernels take at most "
      f"{_MAX_GROUP}"
    )


def check_selection_block(block: int) -> None:
  """Block lengths whose tiles are powers of two.

  Raises:
    NotImplementedError: naming the value and the limit.
  """
  if block not in _BLOCKS:
    raise NotImplementedError(
      f"`selection_block`={block}: the kernels take "
      f"{', '.join(map(str, _BLOCKS))}"
    )
