"""The sliding window: the last w tokens, max(0, t - w + 1) .. t."""

import jax
import jax.numpy as jnp

from pallas_kernels.interface import Queries, Spec, per_row
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
  """Positions are counted from the first key."""
  _, queries = index
  batch, num_keys = qkv[1].shape[:2]
  key_offset = per_row(queries.key_offset, batch)
  return band.BandReads(
    # A longer window would read the same keys, and might overflow int32.
    band.Band(1, 1, min(spec.config.window, num_keys), num_keys),
    jnp.stack(
      [
        per_row(queries.offset, batch) - key_offset,
        -jnp.clip(key_offset, -num_keys, 0),
      ],
      axis=-1,
    ),
    common.segment_pair(queries.key_segments, queries.query_segments),
  )
