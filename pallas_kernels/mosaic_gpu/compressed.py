"""The compressed branch (Eq. 7): the blocks that end at or before the query."""

import jax

from pallas_kernels.bands import compressed_reads
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import band, band_vjp
from pallas_kernels.mosaic_gpu.interpreter import in_python
from pallas_kernels.triton import compressed as triton


def check(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> None:
  """As in `interface`; `tiles` must be a `BandTiling` that fits."""
  band.check(spec, qkv)
  triton.check(spec._replace(tiles=None), qkv, index)


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
  if band_vjp.serves(qkv):
    reads = compressed_reads(spec, qkv, index)
    return band_vjp.backward(spec, qkv, reads, out, lse, dout, dlse)
  # Triton's kernels serve the others; `check` asks them too.
  spec = spec._replace(tiles=None)
  return triton.backward(spec, qkv, index, out, lse, dout, dlse)
