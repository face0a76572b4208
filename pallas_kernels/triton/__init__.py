"""Kernels for the Triton backend of Pallas, one module per op."""

from pallas_kernels.triton import (
  compressed,
  decode,
  select_blocks,
  selected,
  window,
)

__all__ = ["compressed", "decode", "select_blocks", "selected", "window"]
