"""The interface of a backend, whatever language its kernels are written in.

A backend is an object with an attribute per op that it serves, in practice a
folder with one module per op. That has three functions:

    check(spec, arrays, index)      raises NotImplementedError if the backend
                                    cannot do the call, with the reason
    forward(spec, arrays, index)    returns the result of the op
    backward(spec, arrays, index, out, lse, dout, dlse)
                                    returns the gradients of `arrays`

With `backward = None` jax differentiates `forward`. `dout` and `dlse` are 0 for
queries that read nothing.

For the branches "compressed", "selected", "window" and "full", `arrays` is
(query, key, value) and the result is out [B, T, N, V] in the dtype of `query`
and the natural-log lse [B, T, N], float32 at least; a query that reads nothing
gets 0 and -inf. For "block_scores" and "select_blocks", `arrays` is (query,
compressed_key, lse) and the result is the scores [B, T, K, M], float32 at
least, or the block ids, int32 [B, T, K, n]. For "decode", `arrays` is
`DecodeArrays` and the result is out and block ids. A `backward` of these three
raises NotImplementedError.

`index` is a pair: the block ids of "selected", the lengths of "decode", or
None; and `Queries`. `nsa_jax` validates and completes the arguments.
`nsa_jax.typing` explains the letters in shapes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KV(NamedTuple):
  """Keys and values of one branch.

  Attributes:
    key: [B, S, K, H] (compressed: [B, C, K, H]).
    value: [B, S, K, V] (compressed: [B, C, K, V]).
  """

  key: jax.Array
  value: jax.Array


class Spec(NamedTuple):
  """Static arguments of a call; hashable.

  Attributes:
    config: hyper-parameters, an `nsa_jax.NSAConfig`.
    scale: softmax scale.
    key_length: S, tokens.
    need_lse: False if lse is not used; it may then be None, of an op without
      `backward`.
    tiles: tile sizes, an instance of the backend's class; None for its
      heuristic.
    own_selection: the caller has a custom selector, so that "decode", which
      selects the blocks itself, cannot do the call.
    empty_queries: some queries may read nothing.
    interpret: run the kernels in the interpreter, on any platform.
    softcap: c, if scores s become c tanh(s / c); None: they stay.
  """

  config: Any
  scale: float
  key_length: int
  need_lse: bool = True
  tiles: Any = None
  own_selection: bool = False
  empty_queries: bool = True
  interpret: bool = False
  softcap: float | None = None

  @property
  def ratio(self) -> int:
    """Compressed blocks that begin in one selection block."""
    return self.config.selection_block // self.config.compression_stride

  @property
  def reach(self) -> int:
    """Strides per compressed block; if 1, it lies in one selection block."""
    return self.config.compression_block // self.config.compression_stride

  @property
  def num_free(self) -> int:
    """Slots for blocks that are not forced, if forced ones do not overlap."""
    config = self.config
    return config.num_selected - config.num_initial - config.num_local


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Queries:
  """Query positions and segment ids, passed to every implementation.

  A pytree. Offsets that are Python integers are not among its leaves: they stay
  static through `jit` and the platform switch.

  Attributes:
    offset: position of the first query: int, or int32 of shape () or [B].
    key_segments: int32 [B, S] (0: no query reads the token), or None if all
      tokens are in one segment.
    query_segments: int32 [B, T], 0 for queries that read nothing; None iff
      `key_segments` is None.
    key_offset: position of the first key (window only): int, or int32 of shape
      () or [B]. Keys at negative positions are not tokens.
  """

  offset: int | jax.Array
  key_segments: jax.Array | None = None
  query_segments: jax.Array | None = None
  key_offset: int | jax.Array = 0

  def tree_flatten(self) -> tuple[Any, Any]:
    """The arrays as leaves, and the static offsets."""
    offsets = self.offset, self.key_offset
    arrays = [None if isinstance(x, int) else x for x in offsets]
    static = tuple(x if isinstance(x, int) else None for x in offsets)
    return (*arrays, self.key_segments, self.query_segments), static

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> "Queries":
    """The inverse of `tree_flatten`."""
    *arrays, key_segments, query_segments = children
    offset, key_offset = (
      x if fixed is None else fixed
      for x, fixed in zip(arrays, static, strict=True)
    )
    return cls(offset, key_segments, query_segments, key_offset)

  def positions(self, batch: int, length: int) -> jax.Array:
    """Position of every query, int32 [B, T]."""
    return query_positions(self.offset, batch, length)


class DecodeArrays(NamedTuple):
  """The arrays of "decode": the newest queries over a decode cache.

  Attributes:
    query: [B, T, N, H]. Queries at positions outside [0, lengths) get 0 and
      select nothing.
    compressed_query: [B, T, N, H], for the compressed branch and the selection.
    compressed: keys [B, C, K, H] and values [B, C, K, V]. Block i is read once
      the cache holds all its tokens. C is at least the number of complete
      blocks and may be 0.
    selected: keys [B, S, K, H] and values [B, S, K, V], by position.
    window: ring of keys [B, R, K, H] and values [B, R, K, V]: entry r holds the
      largest position p < lengths with p % R == r. None if the window reads
      `selected`.
    gates: [B, T, N, 3], in the order compressed, selected, window.
    scales: float32 [B, S, K] of keys and values, by which those in `selected`,
      of int8, are multiplied. None if they are not quantized.
  """

  query: jax.Array
  compressed_query: jax.Array
  compressed: KV
  selected: KV
  window: KV | None
  gates: jax.Array
  scales: KV | None = None


def per_row(offset: int | jax.Array, batch: int) -> jax.Array:
  """An offset broadcast to int32 [B]."""
  return jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))


def query_positions(
  offset: int | jax.Array, batch: int, length: int
) -> jax.Array:
  """Positions `offset`, `offset` + 1, ... of each batch row: int32 [B, T].

  Args:
    offset: first position: int, or int32 of shape () or [B].
    batch: B.
    length: T.
  """
  first = per_row(offset, batch)[:, None]
  return first + jnp.arange(length, dtype=jnp.int32)[None]


def compressed_block_segments(segment_ids: jax.Array, config: Any) -> jax.Array:
  """Segment of every compressed block whose l tokens share one.

  Args:
    segment_ids: int32 [B, S].
    config: the block length and the stride are read.

  Returns:
    int32 [B, C]; 0 for blocks that span several segments.
  """
  span, stride = config.compression_block, config.compression_stride
  length = segment_ids.shape[1]
  if length < span:
    return segment_ids[:, :0]
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  # Number of segment changes up to each token.
  changes = jnp.pad(
    jnp.cumsum(changed, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)]
  )
  first = changes[:, : length - span + 1 : stride]
  last = changes[:, span - 1 :: stride]
  return jnp.where(
    first == last, segment_ids[:, : length - span + 1 : stride], 0
  )


def segment_pair(
  key_segments: jax.Array | None, query_segments: jax.Array | None
) -> tuple[jax.Array, ...]:
  """Segments of keys and queries for the kernels; () without segments.

  Queries that read nothing get segment -1, which no key has.
  """
  if key_segments is None or query_segments is None:
    return ()
  return key_segments, jnp.where(query_segments > 0, query_segments, -1)


def segment_starts(
  segment_ids: jax.Array, query_segment_ids: jax.Array
) -> jax.Array:
  """First position of each query's segment.

  Sorting takes O(S log S) and avoids the [T, S] array of all comparisons.

  Args:
    segment_ids: int32 [B, S], of the keys.
    query_segment_ids: int32 [B, T].

  Returns:
    int32 [B, T]; 0 for a query whose segment has no key.
  """

  def row(keys, queries):
    order = jnp.argsort(keys, stable=True)
    ranked = keys[order]
    place = jnp.searchsorted(ranked, queries).clip(0, keys.shape[0] - 1)
    return jnp.where(ranked[place] == queries, order[place], 0)

  return jax.vmap(row)(segment_ids, query_segment_ids).astype(jnp.int32)
