"""Kernels for the Mosaic GPU backend of Pallas (Hopper), one module per op."""

from pallas_kernels.mosaic_gpu import (
  compressed,
  select_blocks,
  selected,
  window,
)

__all__ = ["compressed", "select_blocks", "selected", "window"]
