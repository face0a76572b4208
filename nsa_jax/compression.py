"""phi, the compression of key/value blocks (Eq. 7).

Pure functions from tokens [B, S, K, H] to compressed blocks [B, C, K, H]. Keys
and values are compressed by separate calls with separate parameters.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nsa_jax import _checks
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.geometry import token_windows
from nsa_jax.precision import einsum, sum_dtype
from nsa_jax.sharding import Layout, partitioned_phi
from nsa_jax.typing import Array


def _checked_windows(x, config, segment_ids):
  """Validated blocks of [B, S, K, H], padding zeroed: [B, C, l, K, H]."""
  x = _checks.array("x", x, 4, "[B, S, K, H]")
  _checks.floating("x", x)
  _checks.not_empty("x", x, axes=(0, 2, 3))
  check_config(config)
  if segment_ids is not None:
    given = segment_ids
    segment_ids = _checks.integers("segment_ids", segment_ids, x.shape[:2])
    _checks.segments(given, config.selection_block)
    x = jnp.where((segment_ids > 0)[:, :, None, None], x, 0)
  return token_windows(x, config)


@partitioned_phi
def compress_mean(
  x: ArrayLike,
  *,
  config: NSAConfig,
  segment_ids: ArrayLike | None = None,
  layout: Layout | None = None,
) -> Array:
  """Parameter-free phi (Eq. 7): the mean of the l tokens of each block.

  Args:
    x: [B, S, K, H] keys or values.
    config: `compression_block` and `compression_stride` are read.
    segment_ids: int32 [B, S]; tokens of segment 0 (padding) count as zeros.
    layout: as in `native_sparse_attention`. The result is not split over the
      sequence.

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
  blocks = _checked_windows(x, config, segment_ids)
  acc = sum_dtype(blocks.dtype)
  return blocks.astype(acc).mean(axis=2).astype(blocks.dtype)


@partitioned_phi
def compress_weighted(
  x: ArrayLike,
  weight: ArrayLike,
  *,
  config: NSAConfig,
  segment_ids: ArrayLike | None = None,
  layout: Layout | None = None,
) -> Array:
  """Weighted phi (Eq. 7): a weighted sum of the l tokens of each block.

  Args:
    x: [B, S, K, H] keys or values.
    weight: [K, l], one weight per head and token of the block, used without
      normalisation.
    config: `compression_block` and `compression_stride` are read.
    segment_ids: as in `compress_mean`.
    layout: as in `compress_mean`.

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
  blocks = _checked_windows(x, config, segment_ids)
  heads, block = blocks.shape[3], config.compression_block
  weight = _checks.parameter("weight", weight, (heads, block), "[K, l]")
  out = einsum("bclkh,kl->bckh", blocks, weight)
  return out.astype(blocks.dtype)


@partitioned_phi
def compress_linear(
  x: ArrayLike,
  position: ArrayLike,
  weight: ArrayLike,
  *,
  config: NSAConfig,
  segment_ids: ArrayLike | None = None,
  layout: Layout | None = None,
) -> Array:
  """Linear phi (Eq. 7): (block + position) weight.

  Args:
    x: [B, S, K, H] keys or values.
    position: [K, l, H] intra-block position embedding, added to each block.
    weight: [K, l*H, H']; blocks are flattened (l, H) row-major.
    config: `compression_block` and `compression_stride` are read.
    segment_ids: as in `compress_mean`.
    layout: as in `compress_mean`.

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
  blocks = _checked_windows(x, config, segment_ids)
  out = _first_layer(blocks, position, weight, config, "weight", "H'")
  return out.astype(blocks.dtype)


@partitioned_phi
def compress_mlp(
  x: ArrayLike,
  position: ArrayLike,
  w1: ArrayLike,
  b1: ArrayLike,
  w2: ArrayLike,
  b2: ArrayLike,
  *,
  config: NSAConfig,
  segment_ids: ArrayLike | None = None,
  layout: Layout | None = None,
) -> Array:
  """The paper's phi (Eq. 7): gelu((block + position) w1 + b1) w2 + b2.

  Args:
    x: [B, S, K, H] keys or values.
    position: [K, l, H] intra-block position embedding, added to each block.
    w1: [K, l*H, F]; blocks are flattened (l, H) row-major.
    b1: [K, F].
    w2: [K, F, H'].
    b2: [K, H'].
    config: `compression_block` and `compression_stride` are read.
    segment_ids: as in `compress_mean`.
    layout: as in `compress_mean`.

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
  blocks = _checked_windows(x, config, segment_ids)
  heads = blocks.shape[3]
  hidden = _first_layer(blocks, position, w1, config, "w1", "F")
  width = hidden.shape[-1]
  b1 = _checks.parameter("b1", b1, (heads, width), "[K, F]", "`w1`")
  w2 = _checks.parameter("w2", w2, (heads, width, None), "[K, F, H']", "`w1`")
  b2 = _checks.parameter("b2", b2, (heads, w2.shape[-1]), "[K, H']", "`w2`")
  hidden = jax.nn.gelu(hidden + b1[None, None].astype(hidden.dtype))
  if blocks.dtype != jnp.float16:  # In float16 it might overflow.
    hidden = hidden.astype(blocks.dtype)
  # XLA's CPU runtime has no bfloat16 product with output "bcko".
  out = jnp.moveaxis(einsum("bckf,kfo->kbco", hidden, w2), 0, 2)
  return (out + b2[None, None].astype(out.dtype)).astype(blocks.dtype)


def _first_layer(blocks, position, weight, config, name, letter):
  """(block + position) weight, [B, C, l, K, H] -> [B, C, K, F], uncast."""
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
  # weight is a bias. Adding it to the blocks would copy them.
  bias = einsum("klh,klhf->kf", position.astype(blocks.dtype), weight)
  return einsum("bclkh,klhf->bckf", blocks, weight) + bias[None, None]
