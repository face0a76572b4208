"""Attention over a band of keys, forward: compressed branch and window."""

import jax

from pallas_kernels.bands import BandReads
from pallas_kernels.interface import Spec
from pallas_kernels.mosaic_gpu import support
from pallas_kernels.mosaic_gpu.tiling import BandTiling


def check(spec: Spec, qkv: tuple[jax.Array, ...]) -> None:
  """Checks that the forward kernel can do a call; arguments as in `forward`."""
  query, _, value = qkv
  support.check_where()
  support.check_scores(spec)
  support.check_heads(*qkv)
  support.check_tiles(spec, BandTiling, query.shape[-1], value.shape[-1])


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], reads: BandReads
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, N, V] and lse [B, T, N] (float32)."""
  raise NotImplementedError
