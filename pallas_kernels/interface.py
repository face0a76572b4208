"""What every backend module is given, whatever its kernels are written in.

A backend is a folder. A module of it that serves an op has three functions:

    check(spec, arrays, index)      raises NotImplementedError with the reason
    forward(spec, arrays, index)    the result of the op
    backward(spec, arrays, index, out, lse, dout, dlse)
                                    gradients of `arrays`

`arrays` is (query, key, value) for the branches "compressed", "selected",
"window" and "full", whose result is out [B, T, N, V] in the dtype of `query`
and the natural-log lse [B, T, N], float32 at least; 0 and -inf where a query
reads nothing. For "select_blocks" it is (query, compressed_key, lse), the
result are block ids int32 [B, T, K, n]; for "decode" it is `DecodeArrays`, the
results are out and block ids. These two have no derivatives: `backward` says
so.

`index` is the pair of block ids (those of "selected", the lengths of "decode",
or None) and `Queries`. Arguments are validated and completed by `nsa_jax`.
Letters in shapes are explained in `nsa_jax.typing`.
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
  """The static side of a call; hashable.

  Attributes:
    config: hyper-parameters, an `nsa_jax.NSAConfig`.
    scale: softmax scale.
    key_length: S, tokens.
    need_lse: False if nobody reads the lse, which may then be None.
    tiles: tile sizes, of a class of the backend's; None for its heuristic.
    own_selection: the caller selects the blocks, so "decode" may not.
    interpret: run kernels by the interpreter, for platforms other than theirs.
  """

  config: Any
  scale: float
  key_length: int
  need_lse: bool = True
  tiles: Any = None
  own_selection: bool = False
  interpret: bool = False

  @property
  def ratio(self) -> int:
    """Compressed blocks that begin in one selection block."""
    return self.config.selection_block // self.config.compression_stride

  @property
  def reach(self) -> int:
    """Strides in one compressed block; with 1 none reaches the next block."""
    return self.config.compression_block // self.config.compression_stride

  @property
  def num_free(self) -> int:
    """Selected blocks that are not forced, where forced ones do not overlap."""
    config = self.config
    return config.num_selected - config.num_initial - config.num_local


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Queries:
  """Query positions and segment ids, passed to every implementation.

  A pytree. Offsets that are Python integers are no leaves of it: they stay
  static through `jit` and the switch of platforms.

  Attributes:
    offset: position of the first query: int, or int32 of shape () or [B].
    key_segments: int32 [B, S] (0: no query reads the token), or None if all
      tokens are of one segment.
    query_segments: int32 [B, T], 0 for queries that read nothing; None iff
      `key_segments` is.
    key_offset: position of the first key (window only): int, or int32 of shape
      () or [B]. Keys at negative positions are no tokens.
  """

  offset: int | jax.Array
  key_segments: jax.Array | None = None
  query_segments: jax.Array | None = None
  key_offset: int | jax.Array = 0

  def tree_flatten(self) -> tuple[Any, Any]:
    """Arrays, and the static offsets."""
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
    query: [B, T, N, H]. Queries outside [0, lengths) get 0 and select nothing.
    compressed_query: [B, T, N, H], of the compressed branch and selection.
    compressed: keys [B, C, K, H] and values [B, C, K, V]. Block i is read once
      all its tokens are held. C is at least the number of complete blocks; it
      may be 0.
    selected: keys [B, S, K, H] and values [B, S, K, V], by position.
    window: ring of keys [B, R, K, H] and values [B, R, K, V]: row r holds the
      largest position p < lengths with p % R == r. None if the window reads
      `selected`.
    gates: [B, T, N, 3], of the compressed, the selected, the window branch.
  """

  query: jax.Array
  compressed_query: jax.Array
  compressed: KV
  selected: KV
  window: KV | None
  gates: jax.Array


def per_row(offset: int | jax.Array, batch: int) -> jax.Array:
  """An offset as int32 [B]."""
  return jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))


def query_positions(
  offset: int | jax.Array, batch: int, length: int
) -> jax.Array:
  """Positions of `length` queries in each row, from `offset` on: int32 [B, T].

  Args:
    offset: position of the first one, int or int32 of shape () or [B].
    batch: B.
    length: T.
  """
  return per_row(offset, batch)[:, None] + jnp.arange(length, dtype=jnp.int32)


def compressed_block_segments(segment_ids: jax.Array, config: Any) -> jax.Array:
  """Segment of every compressed block; only if all its l tokens are in it.

  Args:
    segment_ids: int32 [B, S].
    config: the block length and the stride are read.

  Returns:
    int32 [B, C]; 0 where a block has no segment.
  """
  span, stride = config.compression_block, config.compression_stride
  length = segment_ids.shape[1]
  if length < span:
    return segment_ids[:, :0]
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  # How often the segment has changed before a token.
  changes = jnp.pad(
    jnp.cumsum(changed, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)]
  )
  first = changes[:, : length - span + 1 : stride]
  last = changes[:, span - 1 :: stride]
  return jnp.where(
    first == last, segment_ids[:, : length - span + 1 : stride], 0
  )


def segment_starts(
  segment_ids: jax.Array, query_segment_ids: jax.Array
) -> jax.Array:
  """First position of each query's segment.

  Sorts instead of comparing all pairs: O(S log S) and no [T, S] array.

  Args:
    segment_ids: int32 [B, S], of the keys.
    query_segment_ids: int32 [B, T].

  Returns:
    int32 [B, T]; 0 for a query whose segment no key has.
  """

  def row(keys, queries):
    order = jnp.argsort(keys, stable=True)
    ranked = keys[order]
    place = jnp.searchsorted(ranked, queries).clip(0, keys.shape[0] - 1)
    return jnp.where(ranked[place] == queries, order[place], 0)

  return jax.vmap(row)(segment_ids, query_segment_ids).astype(jnp.int32)
