"""The compressed branch (Eq. 7): the blocks that end at or before the query."""

import jax
import jax.numpy as jnp

from pallas_kernels.interface import (
  Queries,
  Spec,
  compressed_block_segments,
  per_row,
)
from pallas_kernels.triton import band, band_vjp, common

check = band.check


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[None, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As in `interface`."""
  return band.forward(spec, qkv, _reads(spec, qkv, index))


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
  reads = _reads(spec, qkv, index)
  return band_vjp.backward(spec, qkv, reads, out, lse, dout, dlse)


def _reads(spec, qkv, index):
  _, queries = index
  config = spec.config
  offset = per_row(queries.offset, len(qkv[0]))
  segments = queries.key_segments
  if segments is not None:
    segments = compressed_block_segments(segments, config)
  return band.BandReads(
    band.Band(
      config.compression_stride,
      config.compression_block,
      None,
      spec.key_length,
    ),
    jnp.stack([offset, jnp.zeros_like(offset)], axis=-1),
    common.segment_pair(segments, queries.query_segments),
  )
