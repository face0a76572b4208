"""Selectors that have a name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from nsa_jax import _checks
from nsa_jax.compression import compress_mean
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.ops.branches import compressed_attention
from nsa_jax.ops.selection import select_blocks
from nsa_jax.typing import Array, Selector


def select_by_means(
  *,
  selected_query: ArrayLike,
  selected_key: ArrayLike,
  config: NSAConfig,
  key_length: int,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  tokens: int | None = None,
  **_: Any,
) -> Array:
  """A selector: the paper's rule over means of the keys that are read.

  Eq. 8-11 with compressed keys that are means of the selected branch's keys,
  instead of the compressed branch's, which have to learn how to select. No
  gradient passes through.

  It is a `select` of `native_sparse_attention`, where "means" is its name;
  `functools.partial` binds another `tokens`.

  Args:
    selected_query: [B, T, N, H], of the selected branch.
    selected_key: [B, S, K, H], likewise, in the dtype of the queries.
    config: its selection blocks, selected and forced, are read.
    key_length: S, static.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`.
    query_segment_ids: as in `native_sparse_attention`.
    tokens: length and stride of the means, which divides `selection_block`;
      `compression_stride` by default. Shorter ones come closer to what full
      attention reads, and cost more: as many compressed keys as that is.
    **_: what else a selector is given, and this one does not need.

  Returns:
    int32 [B, T, K, n]: block ids strictly ascending, then -1.

  Raises:
    ValueError: if an argument is invalid, such as `tokens` that do not divide
      `selection_block`; names it, its value and the rule.

  Example:
    >>> import functools
    >>> from nsa_jax import TransformerConfig, select_by_means
    >>> select = functools.partial(select_by_means, tokens=8)
    >>> config = TransformerConfig.preset("tiny", select=select)
    >>> TransformerConfig.preset("tiny", select="means").select
    'means'
  """
  check_config(config)
  query = _checks.queries(selected_query, "selected_query")
  key = _checks.array("selected_key", selected_key, 4, "[B, S, K, H]")
  key_length = _checks.static_int("key_length", key_length, minimum=1)
  _checks.shape(
    "selected_key",
    key,
    (query.shape[0], key_length, None, query.shape[-1]),
    "[B, S, K, H] with those of `selected_query`, and S=`key_length`",
  )
  _checks.same_dtype("selected_key", key, query, "selected_query")
  if tokens is None:
    tokens = config.compression_stride
  tokens = _checks.static_int("tokens", tokens, minimum=1)
  if config.selection_block % tokens:
    raise ValueError(
      f"`tokens`={tokens} must divide `selection_block`="
      f"{config.selection_block}."
    )
  config = dataclasses.replace(
    config, compression_block=tokens, compression_stride=tokens
  )
  query, key = jax.lax.stop_gradient((query, key))
  means = compress_mean(key, config=config, segment_ids=segment_ids)
  where: dict[str, Any] = {
    "config": config,
    "key_length": key_length,
    "scale": scale,
    "query_offset": query_offset,
    "segment_ids": segment_ids,
    "query_segment_ids": query_segment_ids,
  }
  lse = compressed_attention(query, means, means, **where)[1]
  return select_blocks(query, means, lse, **where)


SELECTORS: Mapping[str, Selector] = {"means": select_by_means}
