"""Block geometry: number and positions of blocks.

Segments of blocks are in `pallas_kernels.interface`: the kernels need them too.
"""

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


def token_windows(x: Array, config: NSAConfig) -> Array:
  """Overlapping blocks of tokens: [B, S, ...] -> [B, C, l, ...].

  Built from slices of stride d instead of a gather: the transpose of the slices
  is a sum of pads, that of a gather is a scatter.
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
