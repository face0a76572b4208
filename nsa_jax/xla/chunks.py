"""A loop over chunks of queries that keeps memory linear in the length."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array

# Elements of the largest array a chunk may hold. 2^22 float32 values are
# 16 MiB: large enough to fill matrix units, small enough to be forgotten
# beside the inputs.
CHUNK_ELEMENTS = 2**22


def chunk_rows(length: int, elements_per_row: int, floor: int = 1) -> int:
  """Queries per chunk for a body that holds so many elements per query."""
  rows = max(CHUNK_ELEMENTS // max(elements_per_row, 1), floor, 1)
  if rows >= length:
    return length
  # Powers of two keep the number of different shapes small.
  return min(1 << (rows.bit_length() - 1), length)


def map_chunks(
  body: Callable[..., Any],
  rows: int,
  *per_query: Array | None,
  per_chunk: Any = (),
) -> Any:
  """Applies `body` to chunks of `rows` queries and joins the results.

  The body is rematerialised in the backward pass, so that reverse mode keeps
  the inputs of a chunk and nothing computed from them; what it closes over
  (keys, values) is shared by all chunks.

  Args:
    body: maps the chunks of `per_query`, then the entries of `per_chunk`, to
      a pytree of [B, rows, ...] arrays.
    rows: queries per chunk.
    *per_query: arrays [B, T, ...] (the first one must be), or None, which the
      body gets as None.
    per_chunk: tuple of arrays [ceil(T / rows), ...], or None.

  Returns:
    The pytree of [B, T, ...] arrays.
  """
  assert per_query[0] is not None
  length = per_query[0].shape[1]
  if rows >= length:
    return body(*per_query, *jax.tree.map(lambda x: x[0], per_chunk))
  chunks = -(-length // rows)

  def split(x):
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, chunks * rows - length)
    x = jnp.pad(x, pad).reshape(x.shape[0], chunks, rows, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], chunks * rows, *x.shape[3:])[:, :length]

  # Inside a loop nothing can be merged with the forward pass, so the barriers
  # that prevent it are not needed.
  step = jax.checkpoint(lambda xs: body(*xs), prevent_cse=False)
  xs = (*jax.tree.map(split, per_query), *per_chunk)
  return jax.tree.map(join, jax.lax.map(step, xs))
