"""The four kinds of attention and the selection, chunked over queries.

The functions and arguments are those of `reference.py`. No array is larger than
a chunk of queries times the keys.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from nsa_jax import geometry
from nsa_jax.config import NSAConfig
from nsa_jax.precision import einsum, sum_dtype
from nsa_jax.typing import Array, Queries
from nsa_jax.xla.chunks import chunk_queries, map_chunks
from nsa_jax.xla.top_k import top_k
from pallas_kernels.interface import (
  Spec,
  compressed_block_segments,
  segment_starts,
)

# With blocks of one token the compressed branch is full attention.
_TOKENS = NSAConfig(1, 1, 1)


def compressed(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> tuple[Array, Array]:
  """Softmax attention over the visible compressed blocks."""
  query, key, value = qkv
  _, queries = index
  batch, length, heads, _ = query.shape
  dtype = query.dtype
  mask = _visible_blocks(spec, queries.key_segments)

  def body(query, positions, query_segments):
    visible = mask(positions, query_segments)  # [B, R, C]
    return _attend(
      _scores(spec, "brkgh,bckh->brkgc", query, key.astype(dtype)),
      visible[:, :, None, None],
      value.astype(dtype),
      "brkgc,bckv->brkgv",
    )

  size = chunk_queries(length, batch, heads * key.shape[1])
  query = _grouped(query, key.shape[2])
  key, value = _shared(key), _shared(value)
  positions = queries.positions(batch, length)
  out, lse = map_chunks(body, size, query, positions, queries.query_segments)
  return _ungrouped(out, lse)


def full(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> tuple[Array, Array]:
  """Softmax attention over all tokens up to the query's own.

  Computed as the compressed branch with blocks of one token.
  """
  return compressed(spec._replace(config=_TOKENS), qkv, index)


def block_scores(
  spec: Spec, arrays: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> Array:
  """Eq. 8-10: importance of every selection block, [B, T, K, M]."""
  return _for_block_scores(lambda scores, *_: scores, spec, arrays, index)


def select_blocks(
  spec: Spec, arrays: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> Array:
  """Eq. 11: the forced blocks and the best others, int32 [B, T, K, n]."""
  _, queries = index
  first = first_candidates(spec, queries, *arrays[0].shape[:2])

  def consume(scores, positions, query_segments, first):
    return top_n(spec, scores, positions, query_segments, first)

  return _for_block_scores(consume, spec, arrays, index, first)


def first_candidates(
  spec: Spec, queries: Queries, batch: int, length: int
) -> Array:
  """The first block of every query's segment, int32 [B, T]."""
  if queries.key_segments is None or queries.query_segments is None:
    return jnp.zeros((batch, length), jnp.int32)
  starts = segment_starts(queries.key_segments, queries.query_segments)
  return starts // spec.config.selection_block


def top_n(
  spec: Spec,
  scores: Array,
  positions: Array,
  query_segments: Array | None,
  first: Array,
) -> Array:
  """The forced blocks, then the others with the largest scores (Eq. 11).

  Args:
    spec: static arguments of the call.
    scores: [B, T, K, M]; a NaN counts as the lowest score.
    positions: int32 [B, T].
    query_segments: int32 [B, T], 0 for queries that select nothing; or None.
    first: int32 [B, T], from `first_candidates`.

  Returns:
    int32 [B, T, K, n]: block ids strictly ascending, then -1.
  """
  config = spec.config
  num_blocks = scores.shape[-1]
  first = first[..., None]
  last = positions[..., None] // config.selection_block
  block = jnp.arange(num_blocks)[None, None]
  candidate = (first <= block) & (block <= last)
  candidate &= ((positions >= 0) & (positions < spec.key_length))[..., None]
  if query_segments is not None:
    candidate &= (query_segments > 0)[..., None]
  forced = (block < first + config.num_initial) | (
    block > last - config.num_local
  )
  # Forced blocks rank above all scores, and those above non-candidates.
  limits = jnp.finfo(scores.dtype)
  rank = jnp.clip(
    jnp.where(scores == scores, scores, -jnp.inf), limits.min, limits.max
  )
  rank = jnp.where(forced[:, :, None], jnp.inf, rank)
  rank = jnp.where(candidate[:, :, None], rank, -jnp.inf)
  best, ids = top_k(rank, min(config.num_selected, num_blocks))
  ids = jnp.sort(jnp.where(best > -jnp.inf, ids, num_blocks), axis=-1)
  ids = jnp.where(ids < num_blocks, ids, -1).astype(jnp.int32)
  missing = config.num_selected - ids.shape[-1]
  return jnp.pad(ids, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)


def selected(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[Array, Queries]
) -> tuple[Array, Array]:
  """Eq. 12: softmax attention over the causal tokens of the given blocks."""
  query, key, value = qkv
  block_ids, queries = index
  batch, length, _, head_dim = query.shape
  key_length, kv_heads = key.shape[1:3]
  block = spec.config.selection_block
  num_ids = block_ids.shape[-1]
  keys_per_query = num_ids * block
  keys, values = (_shared(_blocks(x, block)) for x in (key, value))
  # Many queries gather faster if the data of a block id is contiguous. With few
  # queries, as in a step of decoding, this would copy the whole cache.
  together = length * num_ids > keys.shape[1]
  if together:
    keys, values = (
      rearrange(x, "b m l k h -> b k m l h") for x in (keys, values)
    )
  within = jnp.arange(block)[None, None, None, None]
  positions = queries.positions(batch, length)
  key_segments = queries.key_segments
  segments = None
  if key_segments is not None:
    segments = _pad_to(key_segments, block).reshape(batch, -1, block)

  def body(query, ids, positions, query_segments):
    index = ids.clip(0)
    token = index[..., None] * block + within  # [B, R, K, m, l']
    readable = (ids >= 0)[..., None] & (token < key_length)
    readable &= token <= positions[:, :, None, None, None]
    if segments is not None:
      wanted = query_segments[:, :, None, None, None]
      readable &= (jax.vmap(_at)(segments, index) == wanted) & (wanted > 0)
    mask = readable.reshape(*readable.shape[:3], 1, -1)

    def gather(blocks):
      # XLA partitions a mapped gather over batch and heads, but not a gather
      # with indices of rows and heads.
      axes = (0 if together else 2, 1)
      of_row = jax.vmap(_at, in_axes=axes, out_axes=1)
      chosen = jax.vmap(of_row)(blocks, index).astype(query.dtype)
      return chosen.reshape(*ids.shape[:3], keys_per_query, -1)

    return _attend(
      _scores(spec, "brkgh,brksh->brkgs", query, gather(keys)),
      mask,
      gather(values),
      "brkgs,brksv->brkgv",
    )

  width = max(head_dim, value.shape[-1])
  # In the backward pass every chunk adds its share to all of dk and dv. A floor
  # of 8 S / (m l') queries per chunk bounds the number of chunks, so that this
  # traffic also stays linear in the length.
  size = chunk_queries(
    length,
    batch,
    kv_heads * keys_per_query * width,
    floor=8 * key_length // keys_per_query,
  )
  out, lse = map_chunks(
    body,
    size,
    _grouped(query, kv_heads),
    block_ids,
    positions,
    queries.query_segments,
  )
  return _ungrouped(out, lse)


def window(
  spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[None, Queries]
) -> tuple[Array, Array]:
  """Softmax attention over the last w tokens, the query's own included."""
  query, key, value = qkv
  _, queries = index
  width, key_offset = spec.config.window, queries.key_offset
  batch, length, heads, _ = query.shape
  key_length, kv_heads = key.shape[1:3]
  positions = queries.positions(batch, length)
  # A chunk of R queries reads one slice of R + w - 1 keys. With R >= w all
  # slices together are at most twice the keys, so they are cut beforehand:
  # their gradients are then added once instead of once per chunk.
  size = min(length, max(width, 128))
  chunks = -(-length // size)
  span = min(key_length, size + width - 1)
  first = positions[:, :1] + size * jnp.arange(chunks)[None]  # [B, chunks]
  start = first - (width - 1) - jnp.reshape(key_offset, (-1, 1))
  start = start.clip(0, key_length - span).T  # [chunks, B]

  def slices(x):
    def one(start, row):
      return jax.lax.dynamic_slice_in_dim(row, start, span)

    cut = jax.vmap(jax.vmap(one), in_axes=(0, None))
    return None if x is None else cut(start, x)  # [chunks, B, span, ...]

  def body(query, positions, query_segments, start, key, value, segments):
    token = (key_offset + start)[:, None, None] + jnp.arange(span)[None, None]
    dtype = query.dtype
    key, value = _shared(key), _shared(value)

    def attend(query, positions, query_segments):
      readable = (token <= positions[..., None]) & (token >= 0)
      readable &= token > positions[..., None] - width
      if segments is not None:
        readable &= segments[:, None] == query_segments[..., None]
        readable &= (query_segments > 0)[..., None]
      return _attend(
        _scores(spec, "brkgh,bskh->brkgs", query, key.astype(dtype)),
        readable[:, :, None, None],
        value.astype(dtype),
        "brkgs,bskv->brkgv",
      )

    # A wide window or a large batch would make the scores [size, span] too
    # large.
    inner = chunk_queries(query.shape[1], batch, heads * span)
    return map_chunks(attend, inner, query, positions, query_segments)

  out, lse = map_chunks(
    body,
    size,
    _grouped(query, kv_heads),
    positions,
    queries.query_segments,
    per_chunk=(start, slices(key), slices(value), slices(queries.key_segments)),
  )
  return _ungrouped(out, lse)


def _for_block_scores(consume, spec, arrays, index, *per_query):
  """Maps `consume` over chunks of (p_slc, positions, segments, *per_query)."""
  query, compressed_key, lse = arrays
  _, queries = index
  batch, length, heads, _ = query.shape
  num_compressed, kv_heads = compressed_key.shape[1:3]
  mask = _visible_blocks(spec, queries.key_segments)

  def body(query, lse, positions, query_segments, *per_query):
    visible = mask(positions, query_segments)[:, :, None, None]
    scores = _scores(spec, "brkgh,bckh->brkgc", query, compressed_key)
    lse = lse.astype(scores.dtype)[..., None]
    p_cmp = jnp.exp(jnp.where(visible, scores - lse, -jnp.inf)).sum(axis=3)
    p_slc = _to_selection_blocks(p_cmp, spec)
    return consume(p_slc, positions, query_segments, *per_query)

  size = chunk_queries(length, batch, heads * max(num_compressed, 1))
  return map_chunks(
    body,
    size,
    _grouped(query, kv_heads),
    _grouped(lse, kv_heads),
    queries.positions(batch, length),
    queries.query_segments,
    *per_query,
  )


def _to_selection_blocks(p_cmp, spec):
  """Eq. 9, [..., C] -> [..., M]: a box filter, then sums of neighbours.

  p_slc[j] = sum_m box[(l'/d) j + m] with box[i] = sum_k p_cmp[i - k].
  """
  num_blocks = geometry.num_selection_blocks(spec.key_length, spec.config)
  ratio = spec.ratio
  length = num_blocks * ratio
  lead = [(0, 0)] * (p_cmp.ndim - 1)
  box = jnp.zeros((*p_cmp.shape[:-1], length), p_cmp.dtype)
  for k in range(spec.reach):
    box += jnp.pad(p_cmp, [*lead, (k, length - k - p_cmp.shape[-1])])
  return box.reshape(*p_cmp.shape[:-1], num_blocks, ratio).sum(axis=-1)


def _visible_blocks(spec, key_segments):
  """A function from R queries to the compressed blocks they see, [B, R, C]."""
  ends = geometry.compressed_block_ends(spec.key_length, spec.config)
  segments = None
  if key_segments is not None:
    segments = compressed_block_segments(key_segments, spec.config)

  def mask(positions, query_segments):
    visible = ends[None, None] <= positions[..., None]
    if segments is not None:
      visible &= segments[:, None] == query_segments[..., None]
      visible &= (query_segments > 0)[..., None]
    return visible

  return mask


def _grouped(query, kv_heads):
  return rearrange(query, "b t (k g) ... -> b t k g ...", k=kv_heads)


def _ungrouped(out, lse):
  return (
    rearrange(out, "b t k g v -> b t (k g) v"),
    rearrange(lse, "b t k g -> b t (k g)"),
  )


def _blocks(x, block):
  """[B, S, K, H] -> [B, M, l', K, H], padded to whole blocks."""
  return rearrange(_pad_to(x, block), "b (m l) k h -> b m l k h", l=block)


def _shared(x):
  """Keys or values that all chunks share, in float32 at least.

  Their gradient is a sum over the chunks in this dtype; in bfloat16 a long sum
  would stop growing.
  """
  return x.astype(sum_dtype(x.dtype))


def _at(x, index):
  return x[index]


def _pad_to(x, block):
  """Pads axis 1 to a multiple of `block`."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, -x.shape[1] % block)
  return jnp.pad(x, pad)


def _scores(spec, equation, query, key):
  scores = einsum(equation, query, key) * spec.scale
  if spec.softcap is None:
    return scores
  return spec.softcap * jnp.tanh(scores / spec.softcap)


def _attend(scores, mask, value, equation):
  """Masked softmax over the last axis, then the product with the values.

  Returns out in the dtype of the values and lse in that of the scores. Queries
  that read nothing get 0 and -inf, and no gradient whatever their cotangent.
  """
  scores = jnp.where(mask, scores, -jnp.inf)
  high = jax.lax.stop_gradient(
    scores.max(axis=-1, keepdims=True, initial=-jnp.inf)
  )
  high = jnp.where(high == -jnp.inf, 0, high)
  weights = jnp.exp(scores - high)
  total = weights.sum(axis=-1, keepdims=True)
  some = total != 0  # Unlike a sum, a maximum on a CPU may ignore a NaN.
  total = jnp.where(some, total, 1)
  lse = jnp.where(some, high + jnp.log(total), -jnp.inf)[..., 0]
  out = einsum(equation, weights.astype(value.dtype), value) / total
  return jnp.where(some, out, 0).astype(value.dtype), lse
