"""The compressed branch (Eq. 7): the blocks that end at or before the query."""

import jax

from pallas_kernels.bands import compressed_reads
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import band, band_vjp
from pallas_kernels.mosaic_gpu.interpreter import in_python

check = band.check


@in_python
def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As in `interface`."""
  return band.forward(spec, qkv, compressed_reads(spec, qkv, index))


@in_python
def backward(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  index: tuple[None, Queries],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, ...]:
  """As in `interface`."""
  reads = compressed_reads(spec, qkv, index)
  return band_vjp.backward(spec, qkv, reads, out, lse, dout, dlse)
