"""A few new queries against a decode cache.

Nothing here makes a copy of the cache's selected keys and values, as the
functions of `attention.py` do: those are made for as many queries as keys.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nsa_jax import compression
from nsa_jax.config import NSAConfig
from nsa_jax.gating import gated_sum
from nsa_jax.typing import KV, Array, Queries
from nsa_jax.xla import attention
from nsa_jax.xla.chunks import chunk_rows, map_chunks


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
  """The gated sum of the three branches, and the block ids."""
  batch, length = query.shape[:2]
  key_length = selected.key.shape[1]
  positions = compression.query_positions(query_offset, batch, length)
  real = (positions >= 0) & (positions < lengths[:, None])
  common: dict[str, Any] = {
    "config": config,
    "scale": scale,
    "queries": Queries(positions, None, None),
  }

  # What a rewound token left behind may be NaN, and 0 * NaN is NaN.
  ends = compression.compressed_block_ends(key_length, config)
  compressed = keep_rows(compressed, ends < lengths[:, None])
  out_compressed, lse = attention.compressed_attention(
    compressed_query, *compressed, key_length=key_length, **common
  )
  ids = attention.select_blocks(
    compressed_query, compressed.key, lse, key_length=key_length, **common
  )
  ids = jnp.where(real[..., None, None], ids, -1)
  out_selected = _selected_attention(
    query, selected, ids, positions, config, scale
  )

  # The w - 1 tokens before the new ones, or as many as there can be, and the
  # new ones, in order: row j of them is at position query_offset - before + j.
  before = min(config.window, key_length) - 1
  token = compression.query_positions(
    query_offset - before, batch, before + length
  )
  known = (token >= 0) & (token < lengths[:, None])
  if window is None:
    rows = take_rows(selected, token)
  else:
    rows = ring(window, token)
    # Earlier ones are overwritten by others.
    known &= token >= lengths[:, None] - window.key.shape[1]
  out_window, _ = attention.window_attention(
    query,
    *keep_rows(rows, known),
    config=config,
    scale=scale,
    key_offset=0,
    queries=Queries(
      compression.query_positions(before, batch, length),
      known.astype(jnp.int32),
      real.astype(jnp.int32),
    ),
  )

  out = gated_sum(gates, (out_compressed, out_selected, out_window))
  return jnp.where(real[..., None, None], out, 0), ids


def _selected_attention(query, selected, block_ids, positions, config, scale):
  """Softmax attention over the blocks, gathered where they lie."""
  batch, _, _, head_dim = query.shape
  kv_heads = selected.key.shape[2]
  block = config.selection_block
  keys, values = (
    x.reshape(batch, -1, block, *x.shape[2:]) for x in selected
  )  # [B, M, l', K, H]
  row = jnp.arange(batch)[:, None, None, None]
  head = jnp.arange(kv_heads)[:, None]

  def body(query, ids, positions):
    index = ids.clip(0)
    token = index[..., None] * block + jnp.arange(block)  # [B, R, K, n, l']
    readable = (ids >= 0)[..., None] & (
      token <= positions[:, :, None, None, None]
    )

    def gather(blocks):
      chosen = jnp.where(readable[..., None], blocks[row, index, :, head], 0)
      return chosen.reshape(*ids.shape[:3], -1, blocks.shape[-1])

    scores = attention._scores("brkgh,brksh->brkgs", query, gather(keys), scale)
    mask = readable.reshape(*readable.shape[:3], 1, -1)
    return attention._attend(scores, mask, gather(values), "brkgs,brksv->brkgv")

  width = max(head_dim, values.shape[-1])
  rows = chunk_rows(
    query.shape[1], batch * kv_heads * block_ids.shape[-1] * block * width
  )
  grouped = attention._grouped(query, kv_heads)
  out, lse = map_chunks(body, rows, grouped, block_ids, positions)
  return attention._ungrouped(out, lse)[0]


def take_rows(pair: KV, rows: Array) -> KV:
  """Rows [B, n] of keys and values [B, S, ...]; out of range, the nearest."""
  batch = jnp.arange(rows.shape[0])[:, None]
  return jax.tree.map(lambda x: x.at[batch, rows].get(mode="clip"), pair)


def ring(pair: KV, positions: Array) -> KV:
  """Rows of a ring, in which position p lies in row p % R."""
  return take_rows(pair, positions % pair.key.shape[1])


def keep_rows(pair: KV, mask: Array) -> KV:
  """Keys and values where mask [B, S] holds, 0 elsewhere."""
  return jax.tree.map(lambda x: jnp.where(mask[..., None, None], x, 0), pair)
