"""How alike the blocks are that neighbouring queries chose.

The kernel of `selected_union` takes a time that grows with the number of
distinct blocks of the queries of a warpgroup.
"""

import jax
import jax.numpy as jnp


def mean_union(
  block_ids: jax.Array, neighbours: int = 4, *, most: int = 256
) -> jax.Array:
  """Mean number of distinct blocks that runs of neighbouring queries chose.

  Runs are a sample, evenly spaced, of each batch row and key/value head, so
  that the time does not grow with T: with n = 16 ids per query, a million
  comparisons per row and head.

  Args:
    block_ids: int32 [B, T, K, n], ascending, then -1.
    neighbours: queries per run.
    most: maximum number of runs.

  Returns:
    float32 scalar; between the mean number of blocks of a query and
    `neighbours` times that. 0 if there are fewer queries than in a run.
  """
  batch, length, kv_heads, _ = block_ids.shape
  runs = length // neighbours
  count = min(runs, most)
  if not count:
    return jnp.zeros((), jnp.float32)
  first = jnp.arange(count, dtype=jnp.int32) * runs // count * neighbours
  index = first[:, None] + jnp.arange(neighbours, dtype=jnp.int32)
  ids = block_ids[:, index]  # [B, count, neighbours, K, n]
  ids = jnp.moveaxis(ids, 3, 2).reshape(batch, count, kv_heads, -1)
  place = jnp.arange(ids.shape[-1])
  earlier = place[None, :] < place[:, None]
  repeated = (ids[..., :, None] == ids[..., None, :]) & earlier
  distinct = (ids >= 0) & ~repeated.any(axis=-1)
  return distinct.sum(dtype=jnp.float32) / (batch * count * kv_heads)
