"""The portable implementation: plain XLA, memory linear in the length."""

from nsa_jax.xla.attention import (
  block_scores,
  compressed_attention,
  select_blocks,
  selected_attention,
  window_attention,
)
from nsa_jax.xla.decode import decode_attention

__all__ = [
  "block_scores",
  "compressed_attention",
  "decode_attention",
  "select_blocks",
  "selected_attention",
  "window_attention",
]
