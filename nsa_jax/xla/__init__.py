"""The portable implementation: plain XLA, memory linear in the length."""

from nsa_jax.xla.attention import (
  block_scores,
  compressed,
  full,
  select_blocks,
  selected,
  window,
)

__all__ = [
  "block_scores",
  "compressed",
  "full",
  "select_blocks",
  "selected",
  "window",
]
