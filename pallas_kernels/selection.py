"""What block selection (Eq. 8-11) computes beside its kernels.

Queries are processed in chunks, which bounds the memory of their scores.
"""

from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.interface import (
  Queries,
  Spec,
  compressed_block_segments,
  query_positions,
  segment_pair,
  segment_starts,
)


class Chunks(NamedTuple):
  """How the queries are split, and the scores of a chunk.

  These are `num_scores` arrays, float32 [B, K, length, width], whose sum counts
  for the candidates of a query. Scores of other blocks need not be written, nor
  the second one of block 0.

  Attributes:
    number: number of chunks.
    length: queries per chunk; the last ones may not exist.
    width: room for whole score tiles, and one more column.
    num_scores: 2 if compressed blocks carry over into the next selection block.
  """

  number: int
  length: int
  width: int
  num_scores: int

  def shapes(self, batch: int, kv_heads: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the scores of a chunk."""
    shape = batch, kv_heads, self.length, self.width
    return [platforms.out_shape(shape, jnp.float32)] * self.num_scores


def segments_of(spec: Spec, queries: Queries) -> tuple[jax.Array, ...]:
  """Segments for the kernels; () without segments.

  They are those of the compressed blocks [B, C], those of the queries [B, T] (a
  query whose segment has no block reads nothing), and the first candidate block
  of every query [B, T], past the last block if it has none.
  """
  tokens, of_query = queries.key_segments, queries.query_segments
  if tokens is None or of_query is None:
    return ()
  first = segment_starts(tokens, of_query) // spec.config.selection_block
  return (
    *segment_pair(compressed_block_segments(tokens, spec.config), of_query),
    jnp.where(of_query > 0, first, spec.key_length),
  )


def without_scores(
  spec: Spec,
  length: int,
  kv_heads: int,
  offset: jax.Array,
  segments: tuple[jax.Array, ...],
) -> jax.Array:
  """Ids int32 [B, T, K, n] of a call where they do not depend on the scores.

  That is, no query has more than n candidates, or all slots are forced.

  Args:
    spec: static arguments.
    length: T.
    kv_heads: K.
    offset: int32 [B], position of the first query.
    segments: from `segments_of`.
  """
  config = spec.config
  t = query_positions(offset, len(offset), length)
  first = segments[2] if segments else jnp.zeros_like(t)
  last = jnp.maximum(t, 0) // config.selection_block
  count = jnp.where((t >= 0) & (t < spec.key_length), last - first + 1, 0)
  slot = jnp.arange(config.num_selected, dtype=jnp.int32)[None, None]
  first, last, count = first[..., None], last[..., None], count[..., None]
  local = slot - config.num_selected + 1 + last
  ids = jnp.where(
    (count > config.num_selected) & (slot >= config.num_initial),
    local,
    jnp.where(slot < count, first + slot, -1),
  )
  shape = (*ids.shape[:2], kv_heads, config.num_selected)
  return jnp.broadcast_to(ids[:, :, None], shape)


def no_derivatives() -> NoReturn:
  """The backward pass: there is none, since the inputs are not differentiated.

  Raises:
    NotImplementedError: always.
  """
  raise NotImplementedError(
    "select_blocks has no derivatives: its inputs are under stop_gradient"
  )
