"""Kernels for the Triton backend of Pallas, a module for every op it serves."""

from pallas_kernels.triton import (
  compressed,
  decode,
  select_blocks,
  selected,
  window,
)

__all__ = ["compressed", "decode", "select_blocks", "selected", "window"]
