"""Inverts block ids: lists of the queries that chose each block.

The lists differ much in length, since every query chooses the initial block.
They are cut into pieces of bounded length, one program each. The partial sums
of a list's pieces are added in order, so that every run gives the same bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton import common


class InverseLists(NamedTuple):
  """The list of items of each row, cut into pieces.

  Here a row is a block of one key/value head, with the list of its queries.

  Attributes:
    items: int32 [n], the lists of all rows one after the other, each ascending.
    pieces: int32 [P, 3]: row, first and last (exclusive) index into `items`.
      Unused pieces at the end are empty.
    starts: int32 [R + 1], first piece of every row.
  """

  items: jax.Array
  pieces: jax.Array
  starts: jax.Array


def invert(
  row: jax.Array,
  item: jax.Array,
  *,
  num_rows: int,
  num_items: int,
  piece: int,
) -> InverseLists:
  """Groups items by row.

  Args:
    row: int32, any shape: the row of each item; `num_rows` drops the item.
    item: int32, same shape, in [0, num_items), ascending within a row.
    num_rows: R.
    num_items: exclusive upper bound of the items.
    piece: maximum items per piece.
  """
  if (num_rows + 1) * num_items < 2**32:
    # A single 32-bit key for row and item sorts fastest.
    key = row.astype(jnp.uint32) * num_items + item.astype(jnp.uint32)
    key = jnp.sort(key.reshape(-1))
    rows, items = jnp.divmod(key, jnp.uint32(num_items))
    rows, items = rows.astype(jnp.int32), items.astype(jnp.int32)
  else:
    rows, items = lax.sort(
      (row.reshape(-1), item.reshape(-1)), num_keys=1, is_stable=True
    )
  bounds = jnp.searchsorted(rows, jnp.arange(num_rows + 1, dtype=jnp.int32))
  bounds = bounds.astype(jnp.int32)
  per_row = -(-jnp.diff(bounds) // piece)
  starts = jnp.pad(jnp.cumsum(per_row, dtype=jnp.int32), (1, 0))
  # Upper bound: at most one piece per row is incomplete.
  num_pieces = -(-row.size // piece) + num_rows
  index = jnp.arange(num_pieces, dtype=jnp.int32)
  owner = jnp.searchsorted(starts, index, side="right").astype(jnp.int32) - 1
  used = owner < num_rows
  owner = owner.clip(0, num_rows - 1)
  first = bounds[owner] + (index - starts[owner]) * piece
  last = jnp.minimum(first + piece, bounds[owner + 1])
  pieces = jnp.stack(
    [owner, jnp.where(used, first, 0), jnp.where(used, last, 0)], axis=1
  )
  return InverseLists(items, pieces, starts)


def chosen(
  ids: jax.Array, position: jax.Array, key_length: int, block: int
) -> jax.Array:
  """Mask of the ids of blocks with a token that the query may read.

  Args:
    ids: int32 [..., m].
    position: int32, position of the query; broadcasts to `ids`.
    key_length: S.
    block: l'.
  """
  valid = (ids >= 0) & (ids * block <= position)
  return valid & (position >= 0) & (position < key_length)


def _sum_pieces_kernel(
  starts_ref,  # [R + 1]
  partial_ref,  # [P, l', width]
  sum_ref,  # [l', width]
):
  row = pl.program_id(0)

  def add(i, total):
    return total + partial_ref[i, :, :]

  sum_ref[...] = lax.fori_loop(
    starts_ref[row],
    starts_ref[row + 1],
    add,
    jnp.zeros(sum_ref.shape, jnp.float32),
  ).astype(sum_ref.dtype)


def sum_pieces(
  partial: jax.Array, starts: jax.Array, dtype: Any, *, interpret: bool
) -> jax.Array:
  """Sums the partial sums [P, l', W] of each row, in order: [R, l', W]."""
  num_pieces, block, columns = partial.shape
  width = 32 if columns % 32 == 0 else 16
  rows = starts.shape[0] - 1
  return pl.pallas_call(
    _sum_pieces_kernel,
    **common.options("nsa_sum_pieces", 4, 2, interpret),
    grid=(rows, columns // width),
    in_specs=[
      pl.BlockSpec(starts.shape, lambda r, c: (0,)),
      pl.BlockSpec((num_pieces, block, width), lambda r, c: (0, 0, c)),
    ],
    out_specs=pl.BlockSpec((None, block, width), lambda r, c: (r, 0, c)),
    out_shape=jax.ShapeDtypeStruct((rows, block, columns), dtype),
  )(starts, partial)
