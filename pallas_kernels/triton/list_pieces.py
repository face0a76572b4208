"""Pieces of inverse lists in the kernels: loads, and sums in order."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.integers import div
from pallas_kernels.inverse_lists import chosen
from pallas_kernels.query_chunks import Chunk, Chunking, Piece, piece_of
from pallas_kernels.triton import common

_AT_ONCE = 8  # Pieces that `sum_pieces` loads per step.


def load_piece(
  piece_ref: Any,
  first_row_ref: Any,
  offset_ref: Any,
  segments: Sequence[Any],
  chunking: Chunking,
) -> Piece:
  """Loads the program's piece and the segments of its keys, if any."""
  bounds = piece_ref[0], piece_ref[1], piece_ref[2]
  piece = piece_of(*bounds, first_row_ref[0], offset_ref, chunking)
  token = piece.start_k + jnp.arange(chunking.block)
  key_segment = None
  if segments:
    keys_ref = segments[0].at[piece.batch, pl.ds(piece.start_k, chunking.block)]
    key_segment = common.load(keys_ref, token < chunking.key_length)
  return piece._replace(token=token, key_segment=key_segment)


def count_chosen(
  ids_ref: Any, first_row_ref: Any, offset_ref: Any, chunking: Chunking
) -> jax.Array:
  """Number of blocks that the program's query attends to.

  Ids ascend, so those of attended blocks come first.
  """
  row = first_row_ref[0] + pl.program_id(0)
  head = div(row, chunking.length)
  position = offset_ref[div(head, chunking.kv_heads)]
  position += row - head * chunking.length
  mask = common.padding_mask(chunking.num_ids, ids_ref.shape[0])
  ids = common.load(ids_ref, mask, other=-1)
  valid = chosen(ids, position, chunking.key_length, chunking.block)
  return jnp.sum(valid.astype(jnp.int32))


def _sum_pieces_kernel(
  starts_ref,  # [owners + 1]
  partial_ref,  # [P, rows, width]
  sum_ref,  # [rows, width]
):
  owner = pl.program_id(0)
  first, end = starts_ref[owner], starts_ref[owner + 1]

  def load(step):
    start = first + step * _AT_ONCE
    return [
      partial_ref[jnp.clip(start + i, 0, jnp.maximum(end - 1, 0)), :, :]
      for i in range(_AT_ONCE)
    ]

  def add(step, carry):
    total, current = carry
    # The loads of the next step do not wait for these sums: every query chooses
    # block 0, whose pieces are many.
    following = load(step + 1)
    for i, x in enumerate(current):
      total += jnp.where(first + step * _AT_ONCE + i < end, x, 0)
    return total, following

  total, _ = lax.fori_loop(
    0,
    div(end - first + (_AT_ONCE - 1), _AT_ONCE),
    add,
    (jnp.zeros(sum_ref.shape, jnp.float32), load(0)),
  )
  sum_ref[...] = total.astype(sum_ref.dtype)


def sum_pieces(
  partial: jax.Array, starts: jax.Array, dtype: Any, *, interpret: bool
) -> jax.Array:
  """Sums partial sums [P, l', W] of each owner, in order: [owners, l', W]."""
  num_pieces, block, columns = partial.shape
  rows, width = 16, 32 if columns % 32 == 0 else 16
  owners = starts.shape[0] - 1
  return pl.pallas_call(
    _sum_pieces_kernel,
    **common.options("nsa_sum_pieces", 4, 1, interpret),
    grid=(owners, block // rows, columns // width),
    in_specs=[
      pl.BlockSpec(starts.shape, lambda o, r, c: (0,)),
      pl.BlockSpec((num_pieces, rows, width), lambda o, r, c: (0, r, c)),
    ],
    out_specs=pl.BlockSpec((None, rows, width), lambda o, r, c: (o, r, c)),
    out_shape=platforms.out_shape((owners, block, columns), dtype),
  )(starts, partial)


def add_pieces(
  total: jax.Array,
  partial: jax.Array,
  chunk: Chunk,
  chunking: Chunking,
  *,
  interpret: bool,
) -> jax.Array:
  """Adds the gradients [P, l', W] of a chunk's pieces, in order."""
  sums = sum_pieces(
    partial, chunk.lists.starts, total.dtype, interpret=interpret
  )
  sums = sums.reshape(chunking.heads, -1, sums.shape[-1])
  first_head = div(chunk.first_row[0], chunking.length)
  if chunking.splits_heads:
    sums += lax.dynamic_slice_in_dim(total, first_head, chunking.heads)
  return lax.dynamic_update_slice_in_dim(total, sums, first_head, axis=0)
