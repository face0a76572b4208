"""The oracle: the paper's equations with dense masks, simple and slow.

It computes in float32 (float64 for float64 inputs) and takes memory quadratic
in the length. `ops` validates and completes the arguments, which
`pallas_kernels.interface` documents.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from nsa_jax import geometry
from nsa_jax.precision import sum_dtype
from nsa_jax.typing import Array, Queries
from pallas_kernels.interface import Spec, compressed_block_segments


def compressed(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> tuple[Array, Array]:
  """Eq. 7: softmax attention over the visible compressed blocks."""
  visible = _visible_blocks(spec, qkv[0], index[1])
  return _attend(spec, qkv, visible[:, :, None])


def block_scores(
  spec: Spec, arrays: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> Array:
  """Eq. 8-10: importance of every selection block, [B, T, K, M]."""
  query, compressed_key, lse = arrays
  visible = _visible_blocks(spec, query, index[1])
  scores = _scores(spec, query, compressed_key)  # [B, T, K, G, C]
  seen = visible[:, :, None, None]
  lse = rearrange(lse, "b t (k g) -> b t k g 1", k=scores.shape[2])
  lse = lse.astype(scores.dtype)
  p_cmp = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse, -jnp.inf)), 0)

  num_blocks = geometry.num_selection_blocks(spec.key_length, spec.config)
  blocks = jnp.arange(num_blocks)
  num_compressed = p_cmp.shape[-1]
  p_slc = jnp.zeros((*p_cmp.shape[:-1], num_blocks), p_cmp.dtype)
  for m in range(spec.ratio):
    for k in range(spec.reach):
      place = spec.ratio * blocks + m - k
      inside = (place >= 0) & (place < num_compressed)
      if num_compressed:
        term = p_cmp[..., place.clip(0, num_compressed - 1)]
        p_slc += jnp.where(inside, term, 0)
  return p_slc.sum(axis=3)


def select_blocks(
  spec: Spec, arrays: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> Array:
  """Eq. 11: the forced blocks and the best others, int32 [B, T, K, n]."""
  config, queries = spec.config, index[1]
  scores = block_scores(spec, arrays, index)
  num_blocks = scores.shape[-1]
  positions = queries.positions(*scores.shape[:2])
  key_segments, query_segments = queries.key_segments, queries.query_segments
  first = jnp.zeros_like(positions)
  valid = (positions >= 0) & (positions < spec.key_length)
  if key_segments is not None and query_segments is not None:
    same = key_segments[:, None, :] == query_segments[:, :, None]  # [B, T, S]
    first = jnp.argmax(same, axis=-1) // config.selection_block
    valid &= query_segments > 0
  first = first[..., None]
  last = positions[..., None] // config.selection_block
  block = jnp.arange(num_blocks)[None, None]
  candidate = (first <= block) & (block <= last) & valid[..., None]
  forced = (block < first + config.num_initial) | (
    block > last - config.num_local
  )

  # A NaN counts as the lowest score, and an infinite one as less than a forced
  # block; scores are not negative.
  rank = jnp.where(scores == scores, scores, -1)
  rank = jnp.minimum(rank, jnp.finfo(rank.dtype).max)
  rank = jnp.where(forced[:, :, None], jnp.inf, rank)
  rank = jnp.where(candidate[:, :, None], rank, -jnp.inf)
  # A stable sort sends ties to the lower index.
  order = jnp.argsort(-rank, axis=-1, stable=True)[..., : config.num_selected]
  chosen = jnp.take_along_axis(rank, order, axis=-1) > -jnp.inf
  ids = jnp.sort(jnp.where(chosen, order, num_blocks), axis=-1)
  ids = jnp.where(ids < num_blocks, ids, -1).astype(jnp.int32)
  missing = config.num_selected - ids.shape[-1]
  return jnp.pad(ids, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)


def selected(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[Array, Queries]
) -> tuple[Array, Array]:
  """Eq. 12: softmax attention over the causal tokens of the given blocks."""
  block_ids, queries = index
  token = jnp.arange(qkv[1].shape[1])
  block = token[None, None, None, None] // spec.config.selection_block
  chosen = (block_ids[..., None] == block).any(axis=-2)  # [B, T, K, S]
  readable = _readable(token[None, None], qkv[0], queries, queries.key_segments)
  return _attend(spec, qkv, chosen & readable[:, :, None])


def window(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> tuple[Array, Array]:
  """Softmax attention over the last w tokens, the query's own included."""
  query, key, _ = qkv
  queries = index[1]
  token = jnp.arange(key.shape[1])[None, None]
  token += jnp.reshape(queries.key_offset, (-1, 1, 1))
  readable = _readable(token, query, queries, queries.key_segments)
  positions = queries.positions(*query.shape[:2])
  readable &= (token > positions[..., None] - spec.config.window) & (token >= 0)
  return _attend(spec, qkv, readable[:, :, None])


def full(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> tuple[Array, Array]:
  """Softmax attention over all tokens up to the query's own."""
  queries = index[1]
  token = jnp.arange(qkv[1].shape[1])[None, None]
  readable = _readable(token, qkv[0], queries, queries.key_segments)
  return _attend(spec, qkv, readable[:, :, None])


def _visible_blocks(spec, query, queries):
  """Compressed blocks that each query sees, bool [B, T, C]."""
  ends = geometry.compressed_block_ends(spec.key_length, spec.config)
  segments = queries.key_segments
  if segments is not None:
    segments = compressed_block_segments(segments, spec.config)
  return _readable(ends[None, None], query, queries, segments)


def _readable(token, query, queries, key_segments):
  """Causal and segment mask, bool [B, T, S].

  `token` [B or 1, 1, S] are the positions of the keys.
  """
  readable = token <= queries.positions(*query.shape[:2])[..., None]
  if key_segments is not None:
    query_segments = queries.query_segments[..., None]
    readable &= key_segments[:, None, :] == query_segments
    readable &= query_segments > 0
  return readable


def _scores(spec, query, key):
  """Scaled dot products of queries and keys, capped, [B, T, K, G, S]."""
  acc = sum_dtype(query.dtype)
  query = rearrange(query, "b t (k g) h -> b t k g h", k=key.shape[2])
  scores = spec.scale * jnp.einsum(
    "btkgh,bskh->btkgs",
    query.astype(acc),
    key.astype(acc),
    precision=jax.lax.Precision.HIGHEST,
  )
  if spec.softcap is None:
    return scores
  return spec.softcap * jnp.tanh(scores / spec.softcap)


def _attend(spec, qkv, mask):
  """Masked softmax attention; a group shares the mask [B, T, K or 1, S]."""
  query, key, value = qkv
  scores = _scores(spec, query, key)
  mask = mask[:, :, :, None]
  acc = scores.dtype
  # Queries that read nothing stay finite, forward and backward. A key with a
  # score of -inf has weight 0: only such keys give 0 and -inf, too.
  scores = jnp.where(mask, scores, -jnp.inf)
  high = scores.max(axis=-1, keepdims=True, initial=-jnp.inf)
  high = jax.lax.stop_gradient(jnp.where(high == -jnp.inf, 0, high))
  weights = jnp.exp(scores - high)
  total = weights.sum(axis=-1, keepdims=True)
  some = total != 0
  safe_total = jnp.where(some, total, 1)
  lse = jnp.where(some, high + jnp.log(safe_total), -jnp.inf)
  # As in flash attention: unnormalised weights in the dtype of the values.
  out = jnp.einsum(
    "btkgs,bskv->btkgv",
    weights.astype(value.dtype).astype(acc),
    value.astype(acc),
    precision=jax.lax.Precision.HIGHEST,
  )
  out = jnp.where(some, out / safe_total, 0).astype(query.dtype)
  return (
    rearrange(out, "b t k g v -> b t (k g) v"),
    rearrange(lse, "b t k g 1 -> b t (k g)"),
  )
