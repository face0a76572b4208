"""Attention of the newest tokens over a cache: decoding, forward only.

With a handful of queries the time is that of the bytes read once: compressed
keys and values, n blocks, the window. Keys are cut into pieces, so that one row
of a batch fills the device, in three launches:

1. compressed: a partial softmax for every split of the compressed blocks that
   are visible, all queries and heads of a group as rows; and the sums of the
   weights over each selection block, all that is left of the scores;
2. blocks: partial softmaxes of the selected blocks and of the window. Each
   program of a query's selected blocks first finds them: importance (Eq. 8-10),
   then the best n (Eq. 11). All find the same; that takes no longer than one of
   them would, and saves a launch. Those of the window read meanwhile: selection
   mostly waits and leaves the memory idle;
3. merge: the partial softmaxes, weighted by the gates (Eq. 5).

Loops are bounded by what is visible, so that the time follows the lengths, not
the capacity of the cache.
"""

from typing import NoReturn

import jax
from jax.experimental import pallas as pl

from pallas_kernels.interface import DecodeArrays, Queries, Spec, per_row
from pallas_kernels.triton import support
from pallas_kernels.triton.decode.blocks import read_blocks
from pallas_kernels.triton.decode.compressed import read_compressed
from pallas_kernels.triton.decode.merge import merge_branches
from pallas_kernels.triton.decode.softmax import columns_of
from pallas_kernels.triton.tiling import DecodeTiling, decode_tiling


def check(
  spec: Spec, arrays: DecodeArrays, index: tuple[jax.Array, Queries]
) -> None:
  """As `interface` says; `tiles` are a `DecodeTiling`.

  Raises:
    ValueError: if `tiles` do not fit each other or the shapes.
  """
  del index
  support.check_where()
  support.check_heads(arrays.query, *arrays.selected)
  block = spec.config.selection_block
  support.check_selection_block(block)
  support.check_blocks_of_a_row(arrays.selected.key.shape[1], block)
  if spec.own_selection:
    raise NotImplementedError(
      "`select` is given, and the decode kernels select the blocks themselves"
    )
  support.check_tiles(spec, DecodeTiling)
  if spec.tiles is not None:
    _check_fit(spec, arrays)


def forward(
  spec: Spec, arrays: DecodeArrays, index: tuple[jax.Array, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As `interface` says."""
  lengths, queries = index
  spec = _with_tiles(spec, arrays)
  query, compressed_query, pair, selected, ring, gates = arrays
  offset = per_row(queries.offset, len(query))
  num_blocks = pl.cdiv(selected.key.shape[1], spec.config.selection_block)
  num_keys = pair.key.shape[1]
  partial, weights = None, None
  if num_keys:
    num_tiles = 0
    if spec.num_free and num_blocks > spec.config.num_selected:
      # Whole steps of selection.
      tiles = pl.cdiv(num_keys, spec.tiles.compressed.block_k)
      block_m, columns = spec.tiles.block_m, columns_of(spec)
      steps = pl.cdiv(max(num_blocks, tiles * columns), block_m)
      num_tiles = steps * (block_m // columns)
    partial, weights = read_compressed(
      compressed_query, pair, offset, lengths, num_tiles=num_tiles, spec=spec
    )
  ids, far, near = read_blocks(
    query, selected, ring, partial, weights, offset, lengths, spec=spec
  )
  branches = [far, near] if partial is None else [partial, far, near]
  return merge_branches(branches, gates, query.dtype, spec), ids


def backward(
  spec: Spec,
  arrays: DecodeArrays,
  index: tuple[jax.Array, Queries],
  *results: object,
) -> NoReturn:
  """Decoding has no derivatives.

  Raises:
    NotImplementedError: always.
  """
  raise NotImplementedError(
    "decode_attention has no derivatives: differentiate native_sparse_attention"
  )


def _with_tiles(spec, arrays):
  if spec.tiles is not None:
    return spec
  query, config = arrays.query, spec.config
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = arrays.selected.value.shape[1:]
  num_window = min(config.window, key_length)
  if arrays.window is not None:
    num_window = arrays.window.key.shape[1]
  tiles = decode_tiling(
    batch=batch,
    length=length,
    kv_heads=kv_heads,
    group=heads // kv_heads,
    head_dim=head_dim,
    value_dim=value_dim,
    dtype=query.dtype,
    block=config.selection_block,
    ratio=spec.ratio,
    num_compressed=arrays.compressed.key.shape[1],
    num_selected=min(config.num_selected * config.selection_block, key_length),
    num_window=num_window,
  )
  return spec._replace(tiles=tiles)


def _check_fit(spec, arrays):
  """Tiles that were asked for fit each other and the shapes."""
  tiles, block, ratio = spec.tiles, spec.config.selection_block, spec.ratio
  group = arrays.query.shape[2] // arrays.selected.key.shape[2]
  if tiles.rows < group:
    raise ValueError(
      f"`tiles`={tiles} must have at least as many `rows` as a group has "
      f"heads, {group}."
    )
  if block % tiles.blocks.block_k:
    raise ValueError(
      f"`tiles`={tiles} must have a `block_k` of `blocks` that divides "
      f"`selection_block`={block}."
    )
  if tiles.compressed.block_k % ratio:
    raise ValueError(
      f"`tiles`={tiles} must have a `block_k` of `compressed` that is a "
      f"multiple of `selection_block` / `compression_stride` = {ratio}."
    )
  columns = columns_of(spec)
  if tiles.block_m % columns:
    raise ValueError(
      f"`tiles`={tiles} must have a `block_m` that is a multiple of the "
      f"{columns} selection blocks in a tile of compressed keys."
    )
