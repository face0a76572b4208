"""Block geometry and phi, the compression of key/value blocks (Eq. 7).

Geometry: how many blocks there are, where they lie, who sees them. phi: pure
functions from tokens [B, S, K, H] to compressed blocks [B, C, K, H], used once
for the keys and once for the values with separate parameters. Attention over
the compressed blocks is in `attention.py`.
"""

import jax
import jax.numpy as jnp

from nsa_jax import _checks
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.typing import Array


def num_compressed_blocks(length: int, config: NSAConfig) -> int:
  """C, the number of complete compression blocks in `length` tokens.

  Args:
    length: S, tokens.
    config: `compression_block` (l) and `compression_stride` (d) are read.

  Returns:
    0 if S < l, else (S - l) // d + 1.

  Raises:
    ValueError: if `length` is negative or not an integer.

  Example:
    >>> from nsa_jax import NSAConfig, num_compressed_blocks
    >>> num_compressed_blocks(64, NSAConfig())
    3
  """
  length = _checks.static_int("length", length, minimum=0)
  check_config(config)
  if length < config.compression_block:
    return 0
  return (length - config.compression_block) // config.compression_stride + 1


def num_selection_blocks(length: int, config: NSAConfig) -> int:
  """M, the number of selection blocks that cover `length` tokens.

  Args:
    length: S, tokens.
    config: `selection_block` (l') is read.

  Returns:
    ceil(S / l'). The last block may be incomplete.

  Raises:
    ValueError: if `length` is negative or not an integer.

  Example:
    >>> from nsa_jax import NSAConfig, num_selection_blocks
    >>> num_selection_blocks(65, NSAConfig())
    2
  """
  length = _checks.static_int("length", length, minimum=0)
  check_config(config)
  return -(-length // config.selection_block)


def compressed_block_ends(length: int, config: NSAConfig) -> Array:
  """Position of the last token of every compressed block.

  Block i covers tokens i*d .. i*d + l - 1 and is visible to a query at t iff
  its last token is at or before t.

  Args:
    length: S, tokens.
    config: the block length and the stride are read.

  Returns:
    int32 [C].
  """
  blocks = jnp.arange(num_compressed_blocks(length, config), dtype=jnp.int32)
  return blocks * config.compression_stride + config.compression_block - 1


def compressed_block_segments(segment_ids: Array, config: NSAConfig) -> Array:
  """Segment of every compressed block; only if all its l tokens are in it.

  Args:
    segment_ids: int32 [B, S].
    config: the block length and the stride are read.

  Returns:
    int32 [B, C]; 0 where a block has no segment.
  """
  windows = _windows(segment_ids, config)  # [B, C, l]
  first = windows[..., 0]
  whole = jnp.all(windows == first[..., None], axis=-1)
  return jnp.where(whole, first, 0)


def query_positions(
  query_offset: int | Array, batch: int, length: int
) -> Array:
  """Position of every query row in the row of keys.

  Args:
    query_offset: of the first row, int or int32 of shape () or [B].
    batch: B.
    length: T.

  Returns:
    int32 [B, T].
  """
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
  return offset[:, None] + jnp.arange(length, dtype=jnp.int32)


def segment_starts(segment_ids: Array, query_segment_ids: Array) -> Array:
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


def _windows(x: Array, config: NSAConfig) -> Array:
  """Overlapping blocks of tokens: [B, S, ...] -> [B, C, l, ...].

  Built from slices of stride d instead of a gather, because their transpose
  is a sum of pads where a gather's would be a scatter.
  """
  blocks = num_compressed_blocks(x.shape[1], config)
  stride = config.compression_stride
  pieces = config.compression_block // stride
  if not blocks:
    shape = (x.shape[0], 0, config.compression_block, *x.shape[2:])
    return jnp.zeros(shape, x.dtype)
  chunks = x[:, : (blocks + pieces - 1) * stride]
  chunks = chunks.reshape(x.shape[0], -1, stride, *x.shape[2:])
  return jnp.concatenate(
    [chunks[:, i : i + blocks] for i in range(pieces)], axis=2
  )


def _token_windows(x, config, segment_ids):
  """Blocks of [B, S, K, H] with padding zeroed: [B, C, l, K, H]."""
  x = _checks.array("x", x, 4, "[B, S, K, H]")
  _checks.floating("x", x)
  check_config(config)
  if segment_ids is not None:
    given = segment_ids
    segment_ids = _checks.integers("segment_ids", segment_ids, x.shape[:2])
    _checks.segments(given, config.selection_block)
    x = jnp.where((segment_ids > 0)[:, :, None, None], x, 0)
  return _windows(x, config)


def _product(equation: str, x: Array, weight: Array) -> Array:
  """A contraction accumulated in float32 (float64); float32 exactly."""
  precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None
  return jnp.einsum(
    equation,
    x,
    weight.astype(x.dtype),
    precision=precision,
    preferred_element_type=jnp.promote_types(jnp.float32, x.dtype),
  )


def compress_mean(
  x: Array, *, config: NSAConfig, segment_ids: Array | None = None
) -> Array:
  """The mean of the l tokens of each block: phi without parameters (Eq. 7).

  Args:
    x: [B, S, K, H] keys or values.
    config: `compression_block` and `compression_stride` are read.
    segment_ids: int32 [B, S]; tokens of segment 0 (padding) count as zeros.

  Returns:
    [B, C, K, H] in the dtype of `x`.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compress_mean
    >>> compress_mean(jnp.ones((1, 64, 2, 8)), config=NSAConfig()).shape
    (1, 3, 2, 8)
  """
  blocks = _token_windows(x, config, segment_ids)
  acc = jnp.promote_types(jnp.float32, blocks.dtype)
  return blocks.astype(acc).mean(axis=2).astype(blocks.dtype)


def compress_weighted(
  x: Array,
  weight: Array,
  *,
  config: NSAConfig,
  segment_ids: Array | None = None,
) -> Array:
  """A weighted sum of the l tokens of each block, as phi (Eq. 7).

  Args:
    x: [B, S, K, H] keys or values.
    weight: [K, l], one weight per head and place in the block, not
      normalised.
    config: `compression_block` and `compression_stride` are read.
    segment_ids: int32 [B, S]; tokens of segment 0 (padding) count as zeros.

  Returns:
    [B, C, K, H] in the dtype of `x`.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compress_weighted
    >>> config = NSAConfig()
    >>> x, weight = jnp.ones((1, 64, 2, 8)), jnp.full((2, 32), 1 / 32)
    >>> compress_weighted(x, weight, config=config).shape
    (1, 3, 2, 8)
  """
  blocks = _token_windows(x, config, segment_ids)
  heads, block = blocks.shape[3], config.compression_block
  weight = _checks.parameter("weight", weight, (heads, block), "[K, l]")
  out = _product("bclkh,kl->bckh", blocks, weight)
  return out.astype(blocks.dtype)


def compress_linear(
  x: Array,
  position: Array,
  weight: Array,
  *,
  config: NSAConfig,
  segment_ids: Array | None = None,
) -> Array:
  """A linear map of the block plus its position embedding, as phi (Eq. 7).

  Args:
    x: [B, S, K, H] keys or values.
    position: [K, l, H] intra-block position embedding, added to each block.
    weight: [K, l*H, H'], blocks are flattened (l, H) row-major.
    config: `compression_block` and `compression_stride` are read.
    segment_ids: int32 [B, S]; tokens of segment 0 (padding) count as zeros.

  Returns:
    [B, C, K, H'] in the dtype of `x`.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compress_linear
    >>> position, weight = jnp.zeros((2, 32, 8)), jnp.ones((2, 32 * 8, 8))
    >>> x = jnp.ones((1, 64, 2, 8))
    >>> compress_linear(x, position, weight, config=NSAConfig()).shape
    (1, 3, 2, 8)
  """
  blocks = _token_windows(x, config, segment_ids)
  out = _first_layer(blocks, position, weight, config, "weight", "H'")
  return out.astype(blocks.dtype)


def compress_mlp(
  x: Array,
  position: Array,
  w1: Array,
  b1: Array,
  w2: Array,
  b2: Array,
  *,
  config: NSAConfig,
  segment_ids: Array | None = None,
) -> Array:
  """The paper's phi (Eq. 7): gelu((block + position) w1 + b1) w2 + b2.

  Args:
    x: [B, S, K, H] keys or values.
    position: [K, l, H] intra-block position embedding, added to each block.
    w1: [K, l*H, F], blocks are flattened (l, H) row-major.
    b1: [K, F].
    w2: [K, F, H'].
    b2: [K, H'].
    config: `compression_block` and `compression_stride` are read.
    segment_ids: int32 [B, S]; tokens of segment 0 (padding) count as zeros.

  Returns:
    [B, C, K, H'] in the dtype of `x`. gelu is the tanh approximation.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compress_mlp
    >>> position, w1 = jnp.zeros((2, 32, 8)), jnp.ones((2, 32 * 8, 16))
    >>> b1, w2, b2 = jnp.zeros((2, 16)), jnp.ones((2, 16, 8)), jnp.zeros((2, 8))
    >>> x = jnp.ones((1, 64, 2, 8))
    >>> compress_mlp(x, position, w1, b1, w2, b2, config=NSAConfig()).shape
    (1, 3, 2, 8)
  """
  blocks = _token_windows(x, config, segment_ids)
  heads = blocks.shape[3]
  hidden = _first_layer(blocks, position, w1, config, "w1", "F")
  width = hidden.shape[-1]
  b1 = _checks.parameter("b1", b1, (heads, width), "[K, F]")
  w2 = _checks.parameter("w2", w2, (heads, width, None), "[K, F, H']")
  b2 = _checks.parameter("b2", b2, (heads, w2.shape[-1]), "[K, H']")
  hidden = jax.nn.gelu(hidden + b1.astype(hidden.dtype))
  if blocks.dtype != jnp.float16:  # whose range it may leave
    hidden = hidden.astype(blocks.dtype)
  # XLA's CPU runtime has no bfloat16 product that ends in "bcko".
  out = jnp.moveaxis(_product("bckf,kfo->kbco", hidden, w2), 0, 2)
  return (out + b2.astype(out.dtype)).astype(blocks.dtype)


def _first_layer(blocks, position, weight, config, name, letter):
  """(block + position) weight: [B, C, l, K, H] -> [B, C, K, F], unrounded."""
  heads, head_dim = blocks.shape[3:]
  block = config.compression_block
  position = _checks.parameter(
    "position", position, (heads, block, head_dim), "[K, l, H]"
  )
  weight = _checks.parameter(
    name, weight, (heads, block * head_dim, None), f"[K, l*H, {letter}]"
  )
  weight = weight.reshape(heads, block, head_dim, -1)
  # The position embedding is the same in every block, so its product with the
  # weight is a bias: no second copy of the blocks.
  bias = _product("klh,klhf->kf", position.astype(blocks.dtype), weight)
  return _product("bclkh,klhf->bckf", blocks, weight) + bias
