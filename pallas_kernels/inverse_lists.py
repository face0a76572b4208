"""Inverts block ids: lists of the queries that chose each block.

The lists differ much in length, since every query chooses the initial block.
They are cut into pieces of bounded length. Where the partial sums of a list's
pieces are added in order, every run gives the same bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.integers import div, rem


class InverseLists(NamedTuple):
  """The list of items of each owner, cut into pieces.

  An owner is a block of one key/value head, its list holds its queries.

  Attributes:
    items: int32 [n], all lists one after the other, each ascending.
    pieces: int32 [P, 3]: owner, first and last (exclusive) index into `items`.
      Unused pieces at the end are empty.
    starts: int32 [owners + 1], first piece of every list.
  """

  items: jax.Array
  pieces: jax.Array
  starts: jax.Array


def invert(
  owner: jax.Array,
  item: jax.Array,
  *,
  num_owners: int,
  num_items: int,
  piece: int,
) -> InverseLists:
  """Groups items by owner.

  Args:
    owner: int32, any shape: the owner of each item; `num_owners` drops the
      item.
    item: int32, same shape, in [0, num_items), ascending within an owner.
    num_owners: number of lists.
    num_items: exclusive upper bound of the items.
    piece: maximum items per piece.
  """
  owners, items = sort_items(owner, item, num_owners, num_items)
  bounds = _search(owners, jnp.arange(num_owners + 1, dtype=jnp.int32))
  per_list = div(jnp.diff(bounds) + (piece - 1), piece)
  starts = jnp.pad(jnp.cumsum(per_list, dtype=jnp.int32), (1, 0))
  # Upper bound: at most one piece per list is incomplete.
  num_pieces = -(-owner.size // piece) + num_owners
  index = jnp.arange(num_pieces, dtype=jnp.int32)
  of_piece = _search(starts, index + 1) - 1
  used = of_piece < num_owners
  of_piece = of_piece.clip(0, num_owners - 1)
  first = take(bounds, of_piece)
  first += (index - take(starts, of_piece)) * piece
  last = jnp.minimum(first + piece, take(bounds, of_piece + 1))
  pieces = jnp.stack(
    [of_piece, jnp.where(used, first, 0), jnp.where(used, last, 0)], axis=1
  )
  return InverseLists(items, pieces, starts)


def sort_items(
  owner: jax.Array, item: jax.Array, num_owners: int, num_items: int
) -> tuple[jax.Array, jax.Array]:
  """Owners and items by owner, then item; arguments as in `invert`."""
  if (num_owners + 1) * num_items < 2**32:
    # A single 32-bit key for owner and item sorts fastest.
    key = owner.astype(jnp.uint32) * num_items + item.astype(jnp.uint32)
    key = jnp.sort(key.reshape(-1))
    owners, items = (
      divide(key, num_items).astype(jnp.int32) for divide in (div, rem)
    )
    return owners, items
  owners, items = lax.sort(
    (owner.reshape(-1), item.reshape(-1)), num_keys=1, is_stable=True
  )
  return owners, items


def _search(ascending: jax.Array, values: jax.Array) -> jax.Array:
  """Number of elements of `ascending` that are less than each value, int32.

  Two comparisons with about sqrt(n) elements each, which depend on each other
  once; a binary search waits for memory log2(n) times.
  """
  stride = 1 << (len(ascending).bit_length() + 1) // 2
  most = jnp.iinfo(ascending.dtype).max
  padded = jnp.pad(
    ascending, (0, -len(ascending) % stride), constant_values=most
  )
  rows = padded.reshape(-1, stride)

  def count(x):
    return jnp.sum(x < values[:, None], axis=1, dtype=jnp.int32)

  # The first elements of rows; the result is in or at the end of the last row
  # that begins below the value.
  row = jnp.maximum(count(rows[None, :, 0]) - 1, 0)
  return row * stride + count(take(rows, row))


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


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """`x[index]` for indices in [0, len(x)), in one operation of XLA."""
  return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
