"""Bands of keys: what queries of the compressed branch and the window read.

Each query reads one range of key rows, which moves with its position. A key row
is a token (window) or a compressed block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.integers import ceil_div, div, within
from pallas_kernels.interface import (
  Queries,
  Spec,
  compressed_block_segments,
  per_row,
  segment_pair,
)


class Band(NamedTuple):
  """Which key rows a query at position t reads; hashable.

  Key row j ends at position j * stride + span - 1 and is read iff that is at
  most t and, with a window, greater than t - window. Positions outside
  [0, length) read nothing. Positions count from the first token of key row 0.

  Attributes:
    stride: d, or 1.
    span: l, or 1.
    window: w, only with a stride and a span of 1; or None.
    length: S, tokens.
  """

  stride: int
  span: int
  window: int | None
  length: int

  @property
  def branch(self) -> str:
    """Name of the branch, for the names of kernels."""
    return "compressed" if self.window is None else "window"

  def stop(self, t: Any) -> Any:
    """End of the key rows that a query at position t reads."""
    rows = div(jnp.maximum(t - self.span + 1, 0), self.stride) + 1
    return jnp.where(t < self.span - 1, 0, rows)

  def readable(self, j: Any, t: Any, first_row: Any) -> Any:
    """Mask of the key rows j that positions t read; j and t broadcast."""
    mask = j * self.stride + (self.span - 1) <= t
    if self.window is not None:
      mask &= (j > t - self.window) & (j >= first_row)
    return mask


class BandReads(NamedTuple):
  """What the queries of a call read.

  Attributes:
    band: static.
    place: int32 [B, 2]: position of query 0, counted from key row 0, and the
      first valid key row (window only).
    segments: () or segments of the key rows [B, S] and of the queries [B, T],
      int32; a query whose segment has no key reads nothing.
  """

  band: Band
  place: jax.Array
  segments: tuple[jax.Array, ...]

  @property
  def flat_segments(self) -> tuple[jax.Array, ...]:
    """`segments` with those of the queries flattened to [B T]."""
    if not self.segments:
      return ()
    key_segments, query_segments = self.segments
    return key_segments, query_segments.reshape(-1)


def compressed_reads(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> BandReads:
  """What the queries of a call of the compressed branch read."""
  _, queries = index
  config = spec.config
  offset = per_row(queries.offset, len(qkv[0]))
  segments = queries.key_segments
  if segments is not None:
    segments = compressed_block_segments(segments, config)
  return BandReads(
    Band(
      config.compression_stride,
      config.compression_block,
      None,
      spec.key_length,
    ),
    jnp.stack([offset, jnp.zeros_like(offset)], axis=-1),
    segment_pair(segments, queries.query_segments),
  )


def window_reads(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> BandReads:
  """What the queries of a call of the window read.

  Positions are counted from the first key.
  """
  _, queries = index
  batch, num_keys = qkv[1].shape[:2]
  key_offset = per_row(queries.key_offset, batch)
  return BandReads(
    # A longer window would read the same keys, and might overflow int32.
    Band(1, 1, min(spec.config.window, num_keys), num_keys),
    jnp.stack(
      [
        per_row(queries.offset, batch) - key_offset,
        -jnp.clip(key_offset, -num_keys, 0),
      ],
      axis=-1,
    ),
    segment_pair(queries.key_segments, queries.query_segments),
  )


class Bounds(NamedTuple):
  """Tiles to walk: [begin, end), of which [full_begin, full_end) need no mask.

  If two neighbouring fields are the same object, because the band has no such
  end, a kernel needs no loop between them.
  """

  begin: Any
  full_begin: Any
  full_end: Any
  end: Any


def key_tiles(
  band: Band, offset: Any, first_row: Any, start_q: Any, stop_q: Any, size: int
) -> Bounds:
  """Key tiles, of `size` key rows, that the queries [start_q, stop_q) read.

  Args:
    band: the band.
    offset: position of query 0.
    first_row: first valid key row.
    start_q: first query.
    stop_q: end of the queries.
    size: key rows per tile.
  """
  first = offset + start_q
  last = jnp.minimum(offset + stop_q, band.length) - 1
  end = jnp.where(first <= last, ceil_div(band.stop(last), size), 0)
  if band.window is None:
    begin = full_begin = jnp.int32(0)
  else:
    low = jnp.maximum(first - band.window + 1, first_row)
    begin = jnp.minimum(div(low, size), end)
    high = jnp.maximum(last - band.window + 1, first_row)
    full_begin = within(ceil_div(high, size), begin, end)
  full_end = within(div(band.stop(first), size), full_begin, end)
  return Bounds(begin, full_begin, full_end, end)


def query_tiles(
  band: Band,
  offset: Any,
  first_row: Any,
  start_k: Any,
  block_k: int,
  length: int,
  block_q: int,
) -> tuple[Any, Any]:
  """Range of the query tiles that read a key tile.

  Args:
    band: the band.
    offset: position of query 0.
    first_row: first valid key row.
    start_k: first key row of the tile.
    block_k: key rows per tile.
    length: T.
    block_q: queries per query tile.
  """
  last_k = start_k + block_k - 1
  first = start_k * band.stride + (band.span - 1) - offset
  stop = jnp.minimum(length, band.length - offset)
  if band.window is not None:
    stop = jnp.minimum(stop, last_k + band.window - offset)
    stop = jnp.where(last_k < first_row, 0, stop)
  begin = div(jnp.maximum(first, 0), block_q)
  end = jnp.where(first < stop, ceil_div(jnp.maximum(stop, 0), block_q), 0)
  return begin, end
