"""Differentiable entry points of the kernels; imports jax and nothing else.

Arguments are those of the public ops of `nsa_jax`, validated and completed
there. What a kernel cannot take raises `NotImplementedError`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.triton import selected_attention as _by_query
from pallas_kernels.triton import selected_attention_vjp as _by_query_vjp
from pallas_kernels.triton import selected_by_block as _by_block
from pallas_kernels.triton import selected_by_block_vjp as _by_block_vjp
from pallas_kernels.triton import support, tiling
from pallas_kernels.triton.tiling import SelectedTiling, Tile

__all__ = ["SelectedTiling", "Tile", "selected_attention"]


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

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N],
    float32; 0 and -inf where nothing is read.

  Raises:
    NotImplementedError: if the kernels cannot take the shapes or the dtype.
  """
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
  segments: tuple[jax.Array, ...] = ()
  if key_segments is not None and query_segments is not None:
    # A segment that no key has, for queries that read nothing.
    nowhere = jnp.where(query_segments > 0, query_segments, -1)
    segments = (key_segments, nowhere)
  spec = _by_query.Spec(selection_block, scale, tiles)
  return _selected_attention(
    spec, query, key, value, block_ids, query_offset, segments
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected_attention(spec, query, key, value, ids, offset, segments):
  forward = (_by_block if spec.tiling.by_block else _by_query).forward
  return forward(query, key, value, ids, offset, segments, spec=spec)


def _selected_attention_fwd(spec, *args):
  out, lse = _selected_attention(spec, *args)
  out = checkpoint_name(out, "nsa_selected_out")
  lse = checkpoint_name(lse, "nsa_selected_lse")
  return (out, lse), (*args, out, lse)


def _selected_attention_bwd(spec, residuals, cotangents):
  module = _by_block_vjp if spec.tiling.by_block else _by_query_vjp
  dq, dk, dv = module.backward(*residuals, *cotangents, spec=spec)
  segments = residuals[5]
  return dq, dk, dv, None, None, (None,) * len(segments)


_selected_attention.defvjp(_selected_attention_fwd, _selected_attention_bwd)
