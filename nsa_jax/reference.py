"""The oracle: the equations of the paper with dense masks, slow on purpose.

Everything is computed in float32, or float64 for float64 inputs, and takes
memory quadratic in the length. The functions here get arguments that
`attention.py` has validated and completed; see there for shapes.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from nsa_jax import compression
from nsa_jax.config import NSAConfig
from nsa_jax.typing import KV, Array, Queries


def compressed_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float,
  queries: Queries,
) -> tuple[Array, Array]:
  """Softmax attention over the visible compressed blocks."""
  visible = _visible_blocks(config, key_length, queries)
  return _attend(query, key, value, visible[:, :, None], scale)


def block_scores(
  query: Array,
  compressed_key: Array,
  lse: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float,
  queries: Queries,
) -> Array:
  """Eq. 8-10: importance of every selection block, [B, T, K, M]."""
  visible = _visible_blocks(config, key_length, queries)
  scores = _scores(query, compressed_key, scale)  # [B, T, K, G, C]
  seen = visible[:, :, None, None]
  lse = rearrange(lse, "b t (k g) -> b t k g 1", k=scores.shape[2])
  lse = lse.astype(scores.dtype)
  p_cmp = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse, -jnp.inf)), 0)

  blocks = jnp.arange(compression.num_selection_blocks(key_length, config))
  per_selection = config.selection_block // config.compression_stride
  per_compression = config.compression_block // config.compression_stride
  num_compressed = p_cmp.shape[-1]
  p_slc = jnp.zeros((*p_cmp.shape[:-1], blocks.size), p_cmp.dtype)
  for m in range(per_selection):
    for k in range(per_compression):
      index = per_selection * blocks + m - k
      inside = (index >= 0) & (index < num_compressed)
      if num_compressed:
        term = p_cmp[..., index.clip(0, num_compressed - 1)]
        p_slc += jnp.where(inside, term, 0)
  return p_slc.sum(axis=3)


def select_blocks(
  query: Array,
  compressed_key: Array,
  lse: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float,
  queries: Queries,
) -> Array:
  """Eq. 11: the forced blocks and the best of the others, [B, T, K, n]."""
  scores = block_scores(
    query,
    compressed_key,
    lse,
    config=config,
    key_length=key_length,
    scale=scale,
    queries=queries,
  )
  num_blocks = scores.shape[-1]
  positions, key_segments, query_segments = queries
  first = jnp.zeros_like(positions)
  real = (positions >= 0) & (positions < key_length)
  if key_segments is not None and query_segments is not None:
    same = key_segments[:, None, :] == query_segments[:, :, None]  # [B, T, S]
    first = jnp.argmax(same, axis=-1) // config.selection_block
    real &= query_segments > 0
  first = first[..., None]
  last = positions[..., None] // config.selection_block
  block = jnp.arange(num_blocks)
  candidate = (first <= block) & (block <= last) & real[..., None]
  forced = (block < first + config.num_initial) | (
    block > last - config.num_local
  )

  rank = jnp.where(forced[:, :, None], jnp.inf, scores)
  rank = jnp.where(candidate[:, :, None], rank, -jnp.inf)
  # A stable sort sends ties to the lower index.
  order = jnp.argsort(-rank, axis=-1, stable=True)[..., : config.num_selected]
  chosen = jnp.take_along_axis(rank, order, axis=-1) > -jnp.inf
  ids = jnp.sort(jnp.where(chosen, order, num_blocks), axis=-1)
  ids = jnp.where(ids < num_blocks, ids, -1).astype(jnp.int32)
  missing = config.num_selected - ids.shape[-1]
  return jnp.pad(ids, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)


def selected_attention(
  query: Array,
  key: Array,
  value: Array,
  block_ids: Array,
  *,
  config: NSAConfig,
  scale: float,
  queries: Queries,
) -> tuple[Array, Array]:
  """Eq. 12: softmax attention over the causal tokens of the given blocks."""
  token = jnp.arange(key.shape[1])
  block = token // config.selection_block
  chosen = (block_ids[..., None] == block).any(axis=-2)  # [B, T, K, S]
  readable = _readable(token, *queries)
  return _attend(query, key, value, chosen & readable[:, :, None], scale)


def window_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  scale: float,
  key_offset: int | Array,
  queries: Queries,
) -> tuple[Array, Array]:
  """Softmax attention over the last w tokens, the query's own included."""
  token = jnp.reshape(key_offset, (-1, 1, 1)) + jnp.arange(key.shape[1])
  readable = _readable(token, *queries)
  readable &= (token > queries.positions[..., None] - config.window) & (
    token >= 0
  )
  return _attend(query, key, value, readable[:, :, None], scale)


def decode_attention(
  query: Array,
  compressed: KV,
  selected: KV,
  window: KV | None,
  gates: Array,
  query_offset: Array,
  lengths: Array,
  *,
  config: NSAConfig,
  scale: float,
  compressed_query: Array,
) -> tuple[Array, Array]:
  """The newest queries over a decode cache: the gated sum and the ids."""
  key_length = selected.key.shape[1]
  held = lengths[:, None]
  positions = compression.query_positions(query_offset, *query.shape[:2])
  real = (positions >= 0) & (positions < held)
  positions = jnp.where(real, positions, -1)  # which reads nothing
  queries = Queries(positions, None, None)

  def keep(pair, mask):
    return KV(*(jnp.where(mask[..., None, None], x, 0) for x in pair))

  ends = compression.compressed_block_ends(key_length, config)
  compressed = keep(compressed, ends < held)
  selected = keep(selected, jnp.arange(key_length) < held)
  out_compressed, lse = compressed_attention(
    compressed_query,
    *compressed,
    config=config,
    key_length=key_length,
    scale=scale,
    queries=queries,
  )
  ids = select_blocks(
    compressed_query,
    compressed.key,
    lse,
    config=config,
    key_length=key_length,
    scale=scale,
    queries=queries,
  )
  out_selected, _ = selected_attention(
    query, *selected, ids, config=config, scale=scale, queries=queries
  )
  if window is None:
    out_window, _ = window_attention(
      query,
      *selected,
      config=config,
      scale=scale,
      key_offset=0,
      queries=queries,
    )
  else:
    # Row r of the ring holds the last position before `held` that is r modulo
    # its size; negative: none yet.
    size = window.key.shape[1]
    token = held - 1 - (held - 1 - jnp.arange(size)) % size
    first = positions[..., None] - config.window + 1
    token = token[:, None]
    readable = (token >= jnp.maximum(first, 0)) & (
      token <= positions[..., None]
    )
    window = keep(window, readable.any(axis=1))
    out_window, _ = _attend(
      query, window.key, window.value, readable[:, :, None], scale
    )

  out = jnp.einsum(
    "btnc,cbtnv->btnv",
    gates.astype(lse.dtype),
    jnp.stack([out_compressed, out_selected, out_window]).astype(lse.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  out = jnp.where(real[..., None, None], out, 0)
  return out.astype(query.dtype), ids


def _visible_blocks(config, key_length, queries):
  """Which compressed blocks a query sees, bool [B, T, C]."""
  ends = compression.compressed_block_ends(key_length, config)
  segments = None
  if queries.key_segments is not None:
    segments = compression.compressed_block_segments(
      queries.key_segments, config
    )
  return _readable(ends, queries.positions, segments, queries.query_segments)


def _readable(token, positions, key_segments, query_segments):
  """Causality and segments, bool [B, T, S] for keys at positions `token`."""
  readable = token <= positions[..., None]
  if key_segments is not None:
    query_segments = query_segments[..., None]
    readable &= key_segments[:, None, :] == query_segments
    readable &= query_segments > 0
  return readable


def _scores(query, key, scale):
  """Scaled dot products of every head with its keys, [B, T, K, G, S]."""
  acc = jnp.promote_types(jnp.float32, query.dtype)
  query = rearrange(query, "b t (k g) h -> b t k g h", k=key.shape[2])
  return scale * jnp.einsum(
    "btkgh,bskh->btkgs",
    query.astype(acc),
    key.astype(acc),
    precision=jax.lax.Precision.HIGHEST,
  )


def _attend(query, key, value, mask, scale):
  """Masked softmax attention; mask [B, T, K or 1, S] is shared by a group."""
  scores = _scores(query, key, scale)
  mask = mask[:, :, :, None]
  acc = scores.dtype
  # Rows with nothing to attend keep finite arithmetic in both directions.
  some = mask.any(axis=-1, keepdims=True)
  scores = jnp.where(mask, scores, -jnp.inf)
  high = jnp.where(
    some, scores.max(axis=-1, keepdims=True, initial=-jnp.inf), 0
  )
  high = jax.lax.stop_gradient(high)
  weights = jnp.exp(scores - high)
  total = weights.sum(axis=-1, keepdims=True)
  safe_total = jnp.where(some, total, 1)
  lse = jnp.where(some, high + jnp.log(safe_total), -jnp.inf)
  # As flash attention does: weights not yet divided by their sum, in the dtype
  # of the values.
  out = jnp.einsum(
    "btkgs,bskv->btkgv",
    weights.astype(value.dtype).astype(acc),
    value.astype(acc),
    precision=jax.lax.Precision.HIGHEST,
  )
  out = (out / safe_total).astype(query.dtype)
  return (
    rearrange(out, "b t k g v -> b t (k g) v"),
    rearrange(lse, "b t k g 1 -> b t (k g)"),
  )
