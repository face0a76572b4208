"""Which queries and keys of a call are valid, and masks for the others."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from nsa_jax import _checks, geometry
from nsa_jax.config import NSAConfig
from nsa_jax.typing import Array, Queries
from pallas_kernels.interface import compressed_block_segments, query_positions


class Scope(NamedTuple):
  """Queries of a call, and masks of what is valid; a mask of None: everything.

  Attributes:
    queries: positions and segments.
    key_length: S.
    valid_queries: bool [B, T], queries that are neither padding nor positioned
      outside the keys.
    readable_keys: bool [B, S], keys that some query may read.
    last_position: int32 [B, 1], position of the last query; -1 if all queries
      lie past the keys.
  """

  queries: Queries
  key_length: int
  valid_queries: Array | None
  readable_keys: Array | None
  last_position: Array | None

  def readable_blocks(self, config: NSAConfig) -> Array | None:
    """Compressed blocks that some query may read, bool [B, C]."""
    readable = None
    if self.last_position is not None:
      ends = geometry.compressed_block_ends(self.key_length, config)
      readable = ends[None] <= self.last_position
    tokens = self.queries.key_segments
    if tokens is not None:
      whole = compressed_block_segments(tokens, config) > 0
      readable = whole if readable is None else readable & whole
    return readable

  def mask(
    self,
    query: Array,
    key: Array,
    value: Array,
    compressed: NSAConfig | None = None,
  ) -> tuple[Array, Array, Array]:
    """Zeros in place of what no query may read: NaN there reaches no result.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; [B, C, K, H] if compressed.
      value: [B, S, K, V]; [B, C, K, V] if compressed.
      compressed: the config of compressed keys and values; None for tokens.
    """
    readable = self.readable_keys
    if compressed is not None:
      readable = self.readable_blocks(compressed)
    return (
      keep(query, self.valid_queries),
      keep(key, readable),
      keep(value, readable),
    )


def make_scope(
  query: Array,
  key_length: int,
  query_offset: ArrayLike | None,
  segment_ids: ArrayLike | None,
  query_segment_ids: ArrayLike | None,
  *,
  alignment: int = 1,
  key_offset: int | Array = 0,
  inside: bool = False,
  name: str = "query",
) -> Scope:
  """Validates positions and segments of queries [B, T, N, H].

  Args:
    query: the queries.
    key_length: S.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`.
    query_segment_ids: as in `native_sparse_attention`.
    alignment: each segment must start at a multiple of it.
    key_offset: position of the first key.
    inside: the queries are known to be at positions of keys, and keys after
      them to belong to other queries of the same call on other devices.
    name: what the caller calls `query`.

  Raises:
    ValueError: if an argument does not fit.
  """
  batch, length = query.shape[:2]
  first: int | Array = jnp.maximum(key_offset, 0)
  stop = key_offset + key_length
  if query_offset is None:
    query_offset = stop - length
  query_offset = _checks.offset("query_offset", query_offset, ((), (batch,)))
  if isinstance(query_offset, int) and isinstance(key_offset, int):
    # Static offsets stay static, and need no mask if everything is valid.
    first = max(key_offset, 0)
    all_valid = first <= query_offset <= stop - length
    all_readable = key_offset >= 0 and stop - length <= query_offset < stop
    query_offset = min(max(query_offset, first - length), stop)
  else:
    all_valid = all_readable = inside
    # A query far outside the keys is padding like one just outside, whose
    # position cannot overflow int32.
    query_offset = jnp.clip(query_offset, first - length, stop)
  positions = query_positions(query_offset, batch, length)
  first, stop, start = (_column(x) for x in (first, stop, key_offset))
  valid_queries = last_position = readable_keys = None
  if not all_valid:
    valid_queries = (positions >= first) & (positions < stop)
  if not all_readable:
    token = start + jnp.arange(key_length)[None]
    behind = positions[:, :1] >= stop
    last_position = jnp.where(behind, -1, positions[:, -1:])
    readable_keys = (token >= 0) & (token <= last_position)

  key_segments = query_segments = None
  if segment_ids is not None:
    key_segments = _checks.integers(
      "segment_ids",
      segment_ids,
      (batch, key_length),
      f"one entry per row of `{name}` and key",
    )
    _checks.segments(segment_ids, alignment)
    if query_segment_ids is None:
      at = (positions - start).clip(0, key_length - 1)
      query_segments = jnp.take_along_axis(key_segments, at, axis=1)
    else:
      query_segments = _checks.integers(
        "query_segment_ids",
        query_segment_ids,
        (batch, length),
        f"one entry per row and token of `{name}`",
      )
      _checks.not_negative("query_segment_ids", query_segment_ids)
    token_queries = query_segments > 0
    if valid_queries is not None:
      token_queries &= valid_queries
    valid_queries = token_queries
    query_segments = jnp.where(valid_queries, query_segments, 0)
    tokens = key_segments > 0
    readable_keys = tokens if readable_keys is None else readable_keys & tokens
  elif query_segment_ids is not None:
    raise ValueError(
      "`query_segment_ids` needs `segment_ids`, the segments of the keys."
    )
  return Scope(
    Queries(query_offset, key_segments, query_segments, key_offset),
    key_length,
    valid_queries,
    readable_keys,
    last_position,
  )


def _column(offset):
  """An offset that broadcasts against [B, T] or [B, S]."""
  return offset[:, None] if jnp.ndim(offset) else offset


def keep(x: Array, mask: Array | None, fill: float = 0) -> Array:
  """`x` where a mask [B, T or S] holds; elsewhere `fill`, without gradient."""
  if mask is None:
    return x
  return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, fill)
