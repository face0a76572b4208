"""Attention of the newest tokens over a cache: decoding, forward only.

With few queries the time is that of reading the bytes once: compressed keys and
values, n blocks, the window. Keys are split into pieces, so that even one batch
row fills the device. There are three launches:

1. compressed: a partial softmax for every split of the visible compressed
   blocks, with all queries and heads of a group as tile rows. It also stores
   the sums of the weights over each selection block, instead of the scores.
2. blocks: partial softmaxes of the selected blocks and of the window. Every
   program that reads selected blocks first selects them: importance (Eq. 8-10),
   then top-n (Eq. 11). All programs of a query find the same blocks; this takes
   no longer than in one program and saves a launch. The programs of the window
   run meanwhile: selection mostly waits and leaves the memory bandwidth idle.
3. merge: the sum of the branches, weighted by the gates (Eq. 5).

If means of the selected keys choose the blocks, the first kernel runs twice:
over the compressed blocks for the output, and over the means for the weights.

Loops are bounded by the visible keys, so that the time depends on the lengths,
not on the capacity of the cache.
"""

from typing import NoReturn

import jax
from jax.experimental import pallas as pl

from pallas_kernels import checks
from pallas_kernels.interface import (
  KV,
  DecodeArrays,
  Queries,
  Spec,
  per_row,
)
from pallas_kernels.triton import support
from pallas_kernels.triton.decode.blocks import read_blocks
from pallas_kernels.triton.decode.compressed import read_compressed
from pallas_kernels.triton.decode.merge import merge_branches
from pallas_kernels.triton.decode.softmax import columns_of
from pallas_kernels.triton.tiling import DecodeTiling, decode_tiling


def check(
  spec: Spec, arrays: DecodeArrays, index: tuple[jax.Array, Queries]
) -> None:
  """As in `interface`; `tiles` must be a `DecodeTiling` that fits."""
  del index
  support.check_where()
  support.check_heads(arrays.query, *arrays.selected)
  block = spec.config.selection_block
  checks.check_selection_block(block, support.BLOCKS)
  support.check_blocks_of_a_row(arrays.selected.key.shape[1], block)
  if spec.own_selection:
    raise NotImplementedError(
      "`select` is given, and the decode kernels select the blocks themselves"
    )
  group = checks.group_of(arrays.query, arrays.selected.key)
  ratio = _of_selection(spec).ratio
  checks.check_tiles(spec, DecodeTiling, group, block, ratio)


def forward(
  spec: Spec, arrays: DecodeArrays, index: tuple[jax.Array, Queries]
) -> tuple[jax.Array, jax.Array]:
  """As in `interface`."""
  lengths, queries = index
  query, compressed_query, pair, selected, ring, gates, scales, means = arrays
  offset = per_row(queries.offset, len(query))
  num_blocks = pl.cdiv(selected.key.shape[1], spec.config.selection_block)
  crowded = spec.num_free > 0 and num_blocks > spec.config.num_selected
  chooser = _of_selection(spec)
  chooser = _with_tiles(chooser, arrays, pair.key if means is None else means)
  spec = _with_tiles(spec, arrays, pair.key)

  def read(query, pair, spec, need_weights):
    num_keys, num_tiles = pair.key.shape[1], 0
    if not num_keys:
      return None, None
    if need_weights:
      # Whole steps of selection.
      tiles = pl.cdiv(num_keys, spec.tiles.compressed.block_k)
      block_m, columns = spec.tiles.block_m, columns_of(spec)
      steps = pl.cdiv(max(num_blocks, tiles * columns), block_m)
      num_tiles = steps * (block_m // columns)
    return read_compressed(
      query, pair, offset, lengths, num_tiles=num_tiles, spec=spec
    )

  partial, weights = read(
    compressed_query, pair, spec, crowded and means is None
  )
  chosen_by = partial
  if means is not None and crowded:
    # Only the weights are used: any values do, and these are in the L2 cache.
    chosen_by, weights = read(query, KV(means, means), chooser, True)
  ids, far, near = read_blocks(
    query,
    selected,
    scales,
    ring,
    chosen_by,
    weights,
    offset,
    lengths,
    spec=chooser,
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
    "cache.attend has no derivatives with the decode kernels: pass "
    "implementation='xla', or differentiate native_sparse_attention"
  )


def _of_selection(spec):
  """`spec` with the compressed blocks that select."""
  return spec if spec.means is None else spec._replace(config=spec.means)


def _with_tiles(spec, arrays, keys):
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
    num_compressed=keys.shape[1],
    num_selected=min(config.num_selected * config.selection_block, key_length),
    num_window=num_window,
  )
  return spec._replace(tiles=tiles)
