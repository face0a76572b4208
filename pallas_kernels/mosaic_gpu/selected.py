"""The selected branch (Eq. 12): the tokens s <= t of the given blocks."""

import jax

from pallas_kernels import checks
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import selected_union, selected_vjp, support
from pallas_kernels.mosaic_gpu.interpreter import in_python
from pallas_kernels.mosaic_gpu.tiling import (
  ROWS,
  SelectedTiling,
  selected_gradient_tile,
  selected_tiling,
)
from pallas_kernels.triton import selected as triton

# The product of probabilities and values takes 64 keys at least.
_BLOCKS = (64, 128)
_INT32 = 2**31


def check(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[jax.Array, Queries]
) -> None:
  """As in `interface`; `tiles` must be a `SelectedTiling` that fits."""
  support.check_where()
  support.check_heads(*qkv)
  query, key, value = qkv
  block = spec.config.selection_block
  checks.check_selection_block(block, _BLOCKS)
  if not spec.scale > 0:
    raise NotImplementedError(
      f"`scale`={spec.scale}: the kernels take positive ones"
    )
  batch, length, _, head_dim = query.shape
  value_dim = value.shape[-1]
  ids = batch * length * key.shape[2] * index[0].shape[-1]
  if max(ids, batch * (spec.key_length + block)) >= _INT32:
    raise NotImplementedError(
      f"`query` of shape {query.shape} and `key` of shape {key.shape}: the "
      "kernels take fewer than 2^31 block ids, and keys of all batch rows"
    )
  checks.check_tiles(spec, SelectedTiling, head_dim, value_dim, block)
  if _tiles(spec, qkv) is None:
    raise NotImplementedError(
      f"`selection_block`={block} with head dimensions {head_dim} and "
      f"{value_dim}: two blocks of keys and values do not fit in shared memory"
    )
  # It has the backward pass of some groups and blocks, and its sums.
  triton.check(spec._replace(tiles=None), qkv, index)


@in_python
def forward(
  spec: Spec, qkv: tuple[jax.Array, ...], index: tuple[jax.Array, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As in `interface`."""
  tiles = _tiles(spec, qkv)
  assert tiles is not None  # As `check` found.
  return selected_union.forward(spec, tiles.fwd, qkv, index)


@in_python
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
  query, key, value = qkv
  if spec.config.selection_block != ROWS or ROWS % checks.group_of(query, key):
    spec = spec._replace(tiles=None)
    return triton.backward(spec, qkv, index, out, lse, dout, dlse)
  tile = spec.tiles.bwd if spec.tiles is not None else None
  if tile is None:
    tile = selected_gradient_tile(key.shape[-1], value.shape[-1])
  return selected_vjp.backward(spec, tile, qkv, index, out, lse, dout, dlse)


def _tiles(spec: Spec, qkv: tuple[jax.Array, ...]) -> SelectedTiling | None:
  if spec.tiles is not None:
    return spec.tiles
  return selected_tiling(
    head_dim=qkv[0].shape[-1],
    value_dim=qkv[2].shape[-1],
    block=spec.config.selection_block,
  )
