"""The selected branch (Eq. 12): the tokens s <= t of the given blocks.

Large groups use the query-outer kernels, small ones the block-outer kernels.
"""

import jax

from pallas_kernels import checks
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.triton import (
  by_block,
  by_block_vjp,
  by_query,
  by_query_vjp,
  support,
)
from pallas_kernels.triton.tiling import SelectedTiling, selected_tiling


def check(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[jax.Array, Queries]
) -> None:
  """As in `interface`; `tiles` must be a `SelectedTiling` that fits."""
  del index
  support.check_where()
  support.check_heads(*qkv)
  block = spec.config.selection_block
  checks.check_selection_block(block, support.BLOCKS)
  checks.check_tiles(spec, SelectedTiling, checks.group_of(*qkv[:2]), block)


def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[jax.Array, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As in `interface`."""
  spec = _with_tiles(spec, qkv, index)
  kernels = by_block if spec.tiles.by_block else by_query
  return kernels.forward(spec, qkv, index)


def backward(
  spec: Spec,
  qkv: tuple[jax.Array, ...],
  index: tuple[jax.Array, Queries],
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[jax.Array, ...]:
  """As in `interface`."""
  spec = _with_tiles(spec, qkv, index)
  kernels = by_block_vjp if spec.tiles.by_block else by_query_vjp
  return kernels.backward(spec, qkv, index, out, lse, dout, dlse)


def _with_tiles(spec, qkv, index):
  if spec.tiles is not None:
    return spec
  query, key, value = qkv
  tiles = selected_tiling(
    group=checks.group_of(query, key),
    head_dim=query.shape[-1],
    value_dim=value.shape[-1],
    dtype=query.dtype,
    block=spec.config.selection_block,
    num_ids=index[0].shape[-1],
  )
  return spec._replace(tiles=tiles)
