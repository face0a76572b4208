"""Differentiable entry points of the kernels; imports jax and nothing else.

Arguments are those of the public ops of `nsa_jax`, validated and completed
there. What a kernel cannot take raises `NotImplementedError`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.platforms import Partial, by_platform
from pallas_kernels.triton import band_attention as _band
from pallas_kernels.triton import band_attention_vjp as _band_vjp
from pallas_kernels.triton import block_selection as _selection
from pallas_kernels.triton import decode as _decode
from pallas_kernels.triton import selected_attention as _by_query
from pallas_kernels.triton import selected_attention_vjp as _by_query_vjp
from pallas_kernels.triton import selected_by_block as _by_block
from pallas_kernels.triton import selected_by_block_vjp as _by_block_vjp
from pallas_kernels.triton import support, tiling
from pallas_kernels.triton.tiling import (
  BandTile,
  BandTiling,
  DecodeTiling,
  SelectedTiling,
  SelectionTiling,
  Tile,
)

__all__ = [
  "BandTile",
  "BandTiling",
  "DecodeTiling",
  "Elsewhere",
  "Partial",
  "SelectedTiling",
  "SelectionTiling",
  "Tile",
  "compressed_attention",
  "decode_attention",
  "select_blocks",
  "selected_attention",
  "window_attention",
]


class Elsewhere(NamedTuple):
  """What runs in place of the kernels where no NVIDIA GPU is.

  Attributes:
    function: f(query, key, value, *arguments) -> (out, lse), differentiable by
      jax; of `select_blocks`: f(query, compressed_key, lse, *arguments) -> ids;
      of `decode_attention`: f(query, compressed, selected, *arguments) -> (out,
      ids), of pairs of keys and values. It must not close over traced values.
    arguments: pytrees of arrays that have no gradients.
  """

  function: Callable[..., Any]
  arguments: tuple[Any, ...]


def compressed_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  stride: int,
  span: int,
  key_length: int,
  scale: float,
  query_offset: jax.Array,
  key_segments: jax.Array | None = None,
  query_segments: jax.Array | None = None,
  tiles: BandTiling | None = None,
  elsewhere: Elsewhere | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention over compressed blocks (Eq. 7), those wholly at or before t.

  Reverse mode only.

  Args:
    query: [B, T, N, H], float16, bfloat16 or float32; H a multiple of 16, at
      most 256.
    key: [B, C, K, H], C >= 1; block i covers the tokens from i * stride on.
    value: [B, C, K, V]; V like H, but it may be another.
    stride: d.
    span: l, tokens of a block.
    key_length: S, tokens. Queries outside [0, S) read nothing.
    scale: softmax scale.
    query_offset: int32 [B], position of the first query.
    key_segments: int32 [B, C], 0 for blocks that nobody reads; or None.
    query_segments: int32 [B, T]; 0 reads nothing. None iff `key_segments` is.
    tiles: tile sizes; None for the heuristic.
    elsewhere: what runs where no NVIDIA GPU is; None for the kernels,
      interpreted.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N],
    float32; 0 and -inf where nothing is read.

  Raises:
    NotImplementedError: if the kernels cannot take the shapes or the dtype.
  """
  band = _band.Band(stride, span, None, key_length)
  return _band_call(
    query,
    key,
    value,
    band,
    scale,
    query_offset,
    jnp.zeros_like(query_offset),
    key_segments,
    query_segments,
    tiles,
    elsewhere,
  )


def window_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  window: int,
  scale: float,
  query_offset: jax.Array,
  key_offset: int | jax.Array = 0,
  key_segments: jax.Array | None = None,
  query_segments: jax.Array | None = None,
  tiles: BandTiling | None = None,
  elsewhere: Elsewhere | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention over the last w tokens, max(0, t - w + 1) .. t.

  Reverse mode only.

  Args:
    query: [B, T, N, H], float16, bfloat16 or float32; H a multiple of 16, at
      most 256.
    key: [B, S, K, H]; row s has position key_offset + s. Rows at negative
      positions are not read.
    value: [B, S, K, V]; V like H, but it may be another.
    window: w.
    scale: softmax scale.
    query_offset: int32 [B], position of the first query. Queries outside
      [key_offset, key_offset + S) read nothing.
    key_offset: int or int32 of shape () or [B], position of the first key.
    key_segments: int32 [B, S], or None.
    query_segments: int32 [B, T]; 0 reads nothing. None iff `key_segments` is.
    tiles: tile sizes; None for the heuristic.
    elsewhere: what runs where no NVIDIA GPU is; None for the kernels,
      interpreted.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N],
    float32; 0 and -inf where nothing is read.

  Raises:
    NotImplementedError: if the kernels cannot take the shapes or the dtype.
  """
  num_keys = key.shape[1]
  first_row = -jnp.clip(key_offset, -num_keys, 0)
  return _band_call(
    query,
    key,
    value,
    # A longer window would read the same, and might not fit int32.
    _band.Band(1, 1, min(window, num_keys), num_keys),
    scale,
    query_offset - key_offset,
    jnp.broadcast_to(first_row, query_offset.shape),
    key_segments,
    query_segments,
    tiles,
    elsewhere,
  )


def _band_call(
  query,
  key,
  value,
  band,
  scale,
  offset,
  first_row,
  key_segments,
  query_segments,
  tiles,
  elsewhere,
):
  support.check_where()
  support.check_heads(query, key, value)
  if tiles is None:
    tiles = tiling.band_tiling(
      windowed=band.window is not None,
      group=query.shape[2] // key.shape[2],
      head_dim=query.shape[-1],
      value_dim=value.shape[-1],
      dtype=query.dtype,
    )
  segments = _segments(key_segments, query_segments)
  if segments:
    segments = (segments[0], segments[1].reshape(-1))  # as the queries are
  place = jnp.stack([offset, first_row], axis=-1).astype(jnp.int32)
  spec = _band.Spec(band, scale, tiles)
  kernels = _Kernels(
    Partial(_band.forward, spec=spec),
    Partial(_band_vjp.backward, spec=spec),
  )
  return _attend(
    spec.branch, kernels, query, key, value, (place, segments), elsewhere
  )


def _segments(
  key_segments: jax.Array | None, query_segments: jax.Array | None
) -> tuple[jax.Array, ...]:
  """What the kernels take: both, or neither."""
  if key_segments is None or query_segments is None:
    return ()
  # A segment that no key has, for queries that read nothing.
  return key_segments, jnp.where(query_segments > 0, query_segments, -1)


def selected_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  block_ids: jax.Array,
  *,
  selection_block: int,
  scale: float,
  query_offset: jax.Array,
  key_segments: jax.Array | None = None,
  query_segments: jax.Array | None = None,
  tiles: SelectedTiling | None = None,
  elsewhere: Elsewhere | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention over the tokens s <= t of the given blocks (Eq. 12).

  Reverse mode only.

  Args:
    query: [B, T, N, H], float16, bfloat16 or float32; H a multiple of 16, at
      most 256.
    key: [B, S, K, H].
    value: [B, S, K, V]; V like H, but it may be another.
    block_ids: int32 [B, T, K, m], strictly ascending, then -1.
    selection_block: l': 16, 32, 64 or 128.
    scale: softmax scale.
    query_offset: int32 [B], position of the first query. Queries outside
      [0, S) read nothing.
    key_segments: int32 [B, S], or None.
    query_segments: int32 [B, T]; 0 reads nothing. None iff `key_segments` is.
    tiles: tile sizes; None for the heuristic.
    elsewhere: what runs where no NVIDIA GPU is; None for the kernels,
      interpreted.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N],
    float32; 0 and -inf where nothing is read.

  Raises:
    NotImplementedError: if the kernels cannot take the shapes or the dtype.
  """
  support.check_where()
  support.check_heads(query, key, value)
  support.check_selection_block(selection_block)
  if tiles is None:
    tiles = tiling.selected_tiling(
      group=query.shape[2] // key.shape[2],
      head_dim=query.shape[-1],
      value_dim=value.shape[-1],
      dtype=query.dtype,
      block=selection_block,
      num_ids=block_ids.shape[-1],
    )
  segments = _segments(key_segments, query_segments)
  spec = _by_query.Spec(selection_block, scale, tiles)
  forward = (_by_block if tiles.by_block else _by_query).forward
  backward = (_by_block_vjp if tiles.by_block else _by_query_vjp).backward
  kernels = _Kernels(
    Partial(forward, spec=spec),
    Partial(backward, spec=spec),
  )
  return _attend(
    "selected",
    kernels,
    query,
    key,
    value,
    (block_ids, query_offset, segments),
    elsewhere,
  )


class _Kernels(NamedTuple):
  """A branch: of query, key, value, *integers, and then of the cotangents."""

  forward: Callable[..., Any]
  backward: Callable[..., Any]


def _attend(branch, kernels, query, key, value, integers, elsewhere):
  function, arguments = elsewhere or (None, ())
  return _attention(
    branch, kernels, function, query, key, value, integers, arguments
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
  branch, kernels, elsewhere, query, key, value, integers, arguments
):
  del branch
  if elsewhere is None:
    return kernels.forward(query, key, value, *integers)
  return by_platform(
    cuda=Partial(_forward, kernels), default=Partial(_forward_of_xla, elsewhere)
  )((query, key, value), integers, arguments)


def _forward(kernels, qkv, integers, _):
  return kernels.forward(*qkv, *integers)


def _forward_of_xla(elsewhere, qkv, _, arguments):
  return elsewhere(*qkv, *arguments)


def _attention_fwd(branch, kernels, elsewhere, *args):
  out, lse = _attention(branch, kernels, elsewhere, *args)
  out = checkpoint_name(out, f"nsa_{branch}_out")
  lse = checkpoint_name(lse, f"nsa_{branch}_lse")
  return (out, lse), (*args, out, lse)


def _attention_bwd(branch, kernels, elsewhere, residuals, cotangents):
  del branch
  *qkv, integers, arguments, out, lse = residuals

  backward: Any = Partial(_backward, kernels)
  if elsewhere is not None:
    backward = by_platform(
      cuda=backward, default=Partial(_backward_of_xla, elsewhere)
    )
  grads = backward(qkv, integers, arguments, (out, lse), cotangents)
  return *grads, None, None


def _backward(kernels, qkv, integers, _, results, cotangents):
  dout, dlse = cotangents
  # Rows that read nothing have no gradient, and NaN times 0 would be one.
  dlse = jnp.where(results[1] == -jnp.inf, 0, dlse)
  return tuple(kernels.backward(*qkv, *integers, *results, dout, dlse))


def _backward_of_xla(elsewhere, qkv, _, arguments, results, cotangents):
  # It runs the forward pass again, which the compiler finds to be the one it
  # has; so there is one kind of residuals, and a GPU stores none in vain.
  del results
  return jax.vjp(lambda *qkv: elsewhere(*qkv, *arguments), *qkv)[1](cotangents)


_attention.defvjp(_attention_fwd, _attention_bwd)


def select_blocks(
  query: jax.Array,
  compressed_key: jax.Array,
  lse: jax.Array,
  *,
  key_length: int,
  compression_block: int,
  compression_stride: int,
  selection_block: int,
  num_selected: int,
  num_initial: int,
  num_local: int,
  scale: float,
  query_offset: jax.Array,
  block_segments: jax.Array | None = None,
  query_segments: jax.Array | None = None,
  segment_starts: jax.Array | None = None,
  tiles: SelectionTiling | None = None,
  elsewhere: Elsewhere | None = None,
) -> jax.Array:
  """The forced blocks and the most important of the others (Eq. 8-11).

  No gradients.

  Args:
    query: [B, T, N, H], float16, bfloat16 or float32; H a multiple of 16, at
      most 256.
    compressed_key: [B, C, K, H].
    lse: [B, T, N], natural-log lse of the compressed branch; any value where a
      query sees no block.
    key_length: S.
    compression_block: l.
    compression_stride: d.
    selection_block: l': 16, 32, 64 or 128.
    num_selected: n.
    num_initial: forced blocks at the start of the sequence or segment.
    num_local: forced blocks that end at the query's own.
    scale: softmax scale.
    query_offset: int32 [B], position of the first query. Queries outside
      [0, S) select nothing.
    block_segments: int32 [B, C], 0 for a compressed block that no segment
      contains; None without segments, as are the next two.
    query_segments: int32 [B, T]; 0 selects nothing.
    segment_starts: int32 [B, T], position of the first token of every query's
      segment.
    tiles: tile sizes; None for the heuristic.
    elsewhere: what runs where no NVIDIA GPU is; None for the kernels,
      interpreted.

  Returns:
    int32 [B, T, K, n], ascending ids, then -1.

  Raises:
    NotImplementedError: if the kernels cannot take the shapes or the dtype.
  """
  support.check_where()
  support.check_heads(query, compressed_key, compressed_key)
  support.check_selection_block(selection_block)
  if tiles is None:
    tiles = tiling.selection_tiling(
      length=query.shape[1],
      dtype=query.dtype,
      ratio=selection_block // compression_stride,
    )
  segments = _segments(block_segments, query_segments)
  if query_segments is not None and segment_starts is not None:
    first = segment_starts // selection_block
    segments += (jnp.where(query_segments > 0, first, key_length),)
  spec = _selection.Spec(
    compression_block,
    compression_stride,
    selection_block,
    num_selected,
    num_initial,
    num_local,
    key_length,
    scale,
    tiles,
  )
  kernels = Partial(_select_by_kernels, spec)
  args = (query, compressed_key, lse, query_offset, segments)
  if elsewhere is None:
    return kernels(*args)
  return by_platform(
    cuda=kernels, default=Partial(_select_by_xla, elsewhere.function)
  )(*args, elsewhere.arguments)


def _select_by_kernels(spec, query, key, lse, offset, segments, _=()):
  length, (num_keys, kv_heads) = query.shape[1], key.shape[1:3]
  num_blocks = -(-spec.key_length // spec.block)
  if not spec.num_free or num_blocks <= spec.num_selected or not num_keys:
    return _selection.without_scores(
      length, kv_heads, offset, segments, spec=spec
    )
  return _selection.forward(query, key, lse, offset, segments, spec=spec)


def _select_by_xla(elsewhere, query, key, lse, offset, segments, arguments):
  del offset, segments
  return elsewhere(query, key, lse, *arguments)


def decode_attention(
  query: jax.Array,
  compressed_key: jax.Array,
  compressed_value: jax.Array,
  selected_key: jax.Array,
  selected_value: jax.Array,
  window_key: jax.Array | None,
  window_value: jax.Array | None,
  gates: jax.Array,
  query_offset: jax.Array,
  lengths: jax.Array,
  *,
  stride: int,
  span: int,
  selection_block: int,
  num_selected: int,
  num_initial: int,
  num_local: int,
  window: int,
  scale: float,
  compressed_query: jax.Array | None = None,
  tiles: DecodeTiling | None = None,
  elsewhere: Elsewhere | None = None,
) -> tuple[jax.Array, jax.Array]:
  """All of Native Sparse Attention for the newest tokens over a cache.

  No gradients. Made for a handful of queries: every query reads its selected
  blocks and its window by itself.

  Args:
    query: [B, T, N, H], float16, bfloat16 or float32; H a multiple of 16, at
      most 256. Query i of row b has position query_offset[b] + i.
    compressed_key: [B, C, K, H]; row i is read once the tokens from i * stride
      to i * stride + span - 1 are there. C is at least the number of blocks
      that are complete in a row; it may be 0.
    compressed_value: [B, C, K, V]; V like H, but it may be another.
    selected_key: [B, S, K, H], rows by position; S >= lengths.
    selected_value: [B, S, K, V].
    window_key: [B, R, K, H], a ring: the row r holds the largest position
      p < lengths with p % R == r. None if the window reads the rows of
      `selected_key`.
    window_value: [B, R, K, V]; None iff `window_key` is.
    gates: [B, T, N, 3]: of the compressed blocks, the selected, the window.
    query_offset: int32 [B].
    lengths: int32 [B], tokens that each row holds. Queries outside
      [0, lengths) get 0 and select nothing.
    stride: d.
    span: l, tokens of a compressed block.
    selection_block: l': 16, 32, 64 or 128.
    num_selected: n.
    num_initial: forced blocks at the start of the sequence.
    num_local: forced blocks that end at the query's own; at least 1.
    window: w.
    scale: softmax scale.
    compressed_query: [B, T, N, H], what the compressed branch and selection
      read in place of `query`.
    tiles: tile sizes; None for the heuristic.
    elsewhere: what runs where no NVIDIA GPU is; None for the kernels,
      interpreted.

  Returns:
    out [B, T, N, V] in the dtype of `query`, and block ids int32 [B, T, K, n],
    ascending, then -1.

  Raises:
    NotImplementedError: if the kernels cannot take the shapes or the dtype, or
      on differentiation.
    ValueError: if `tiles` do not fit each other or the shapes.
  """
  support.check_where()
  support.check_heads(query, selected_key, selected_value)
  support.check_selection_block(selection_block)
  support.check_blocks_of_a_row(selected_key.shape[1], selection_block)
  batch, length, heads, head_dim = query.shape
  key_length, kv_heads, value_dim = selected_value.shape[1:]
  if tiles is None:
    rows = (
      min(window, key_length) if window_key is None else window_key.shape[1]
    )
    tiles = tiling.decode_tiling(
      batch=batch,
      length=length,
      kv_heads=kv_heads,
      group=heads // kv_heads,
      head_dim=head_dim,
      value_dim=value_dim,
      dtype=query.dtype,
      block=selection_block,
      ratio=selection_block // stride,
      num_compressed=compressed_key.shape[1],
      num_selected=min(num_selected * selection_block, key_length),
      num_window=rows,
    )
  if tiles.rows < heads // kv_heads:
    raise ValueError(
      f"`tiles`={tiles} must have at least as many `rows` as a group has "
      f"heads, {heads // kv_heads}."
    )
  if selection_block % tiles.blocks.block_k:
    raise ValueError(
      f"`tiles`={tiles} must have a `block_k` of `blocks` that divides "
      f"`selection_block`={selection_block}."
    )
  ratio = selection_block // stride
  if tiles.compressed.block_k % ratio:
    raise ValueError(
      f"`tiles`={tiles} must have a `block_k` of `compressed` that is a "
      f"multiple of `selection_block` / `stride` = {ratio}."
    )
  columns = tiles.compressed.block_k // ratio
  if tiles.block_m % columns:
    raise ValueError(
      f"`tiles`={tiles} must have a `block_m` that is a multiple of the "
      f"{columns} selection blocks in a tile of compressed keys."
    )
  spec = _decode.Spec(
    stride,
    span,
    selection_block,
    num_selected,
    num_initial,
    num_local,
    window,
    scale,
    tiles,
  )
  ring = None
  if window_key is not None and window_value is not None:
    ring = _decode.Keys(window_key, window_value)
  arrays = (
    query,
    query if compressed_query is None else compressed_query,
    _decode.Keys(compressed_key, compressed_value),
    _decode.Keys(selected_key, selected_value),
    ring,
    gates,
    query_offset,
    lengths,
  )
  forward = Partial(_decode.forward, spec=spec)
  if elsewhere is None:
    return _decode_attention(Partial(_call, forward), arrays, ())
  run = by_platform(
    cuda=Partial(_call, forward),
    default=Partial(_decode_by_xla, elsewhere.function),
  )
  return _decode_attention(run, arrays, elsewhere.arguments)


def _call(function, arrays, _):
  return function(*arrays)


def _decode_by_xla(elsewhere, arrays, arguments):
  return elsewhere(arrays[0], *arrays[2:4], *arguments)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode_attention(run, arrays, arguments):
  return run(arrays, arguments)


@_decode_attention.defjvp
def _(run, primals, tangents):
  raise NotImplementedError(
    "decode_attention has no derivatives: differentiate native_sparse_attention"
  )
