"""A loop over chunks of queries that keeps memory linear in the length."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array

# Elements of the largest array of a chunk. 2^22 float32 values are 16 MiB:
# enough to fill the matrix units, and negligible next to the inputs.
CHUNK_ELEMENTS = 2**22


def chunk_queries(
  length: int, batch: int, elements_per_query: int, floor: int = 1
) -> int:
  """Queries per chunk.

  Args:
    length: T.
    batch: B. If it is symbolic, as in `jax.export`, chunks are as for one row.
    elements_per_query: that the body holds for each query of a row.
    floor: fewest queries, if there are that many.
  """
  rows = batch if isinstance(batch, int) else 1
  size = max(CHUNK_ELEMENTS // max(rows * elements_per_query, 1), floor, 1)
  if size >= length:
    return length
  # Powers of two keep the number of different shapes small.
  return min(1 << (size.bit_length() - 1), length)


def map_chunks(
  body: Callable[..., Any],
  size: int,
  *per_query: Array | None,
  per_chunk: Any = (),
) -> Any:
  """Applies `body` to chunks of `size` queries and joins the results.

  The body is rematerialised in the backward pass, so that reverse mode saves
  only the inputs of a chunk. All chunks share the arrays that the body closes
  over (keys, values).

  Args:
    body: maps a chunk of each of `per_query`, then an entry of each of
      `per_chunk`, to a pytree of [B, size, ...] arrays.
    size: queries per chunk.
    *per_query: arrays [B, T, ...], or None, which is passed to the body as
      None; the first must be an array.
    per_chunk: tuple of arrays [ceil(T / size), ...] or None.

  Returns:
    The pytree of [B, T, ...] arrays.
  """
  assert per_query[0] is not None
  length = per_query[0].shape[1]
  if size >= length:
    return body(*per_query, *jax.tree.map(lambda x: x[0], per_chunk))
  chunks = -(-length // size)

  def split(x):
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, chunks * size - length)
    x = jnp.pad(x, pad).reshape(x.shape[0], chunks, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :length]

  # CSE cannot merge a loop body with the forward pass, so the barriers that
  # prevent this are not needed.
  step = jax.checkpoint(lambda xs: body(*xs), prevent_cse=False)
  xs = (*jax.tree.map(split, per_query), *per_chunk)
  return jax.tree.map(join, jax.lax.map(step, xs))
