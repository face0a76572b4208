"""The public ops: validate, choose an implementation, call it.

What is the same for every implementation happens here, once: defaults,
positions of the queries, and the removal of everything that no query may read
(padding, keys after the last query), so that a NaN there reaches no result.
Letters in shapes are explained in `nsa_jax.typing`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import _checks, compression, dispatch
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.gating import gated_sum
from nsa_jax.typing import KV, Array, Implementation, Queries


def native_sparse_attention(
  query: Array,
  compressed: KV,
  selected: KV,
  window: KV,
  gates: Array,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: int | Array | None = None,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  compressed_query: Array | None = None,
  block_ids: Array | None = None,
  return_block_ids: bool = False,
  implementation: Implementation = None,
) -> Array | tuple[Array, Array]:
  """Native Sparse Attention (arXiv 2502.11089, Eq. 5), causal.

      out[t] = sum over c of gates[t, :, c] * Attn_c(query[t], K_c, V_c)

  for c in compressed, selected, window, each with a softmax of its own.

  Args:
    query: [B, T, N, H].
    compressed: keys [B, C, K, H] and values [B, C, K, V] made by a
      `compress_*` function from S tokens, C = num_compressed_blocks(S).
    selected: keys [B, S, K, H] and values [B, S, K, V] of the selected blocks.
    window: keys [B, S, K, H] and values [B, S, K, V] of the sliding window.
    gates: [B, T, N, 3], any floating-point dtype, in the order compressed,
      selected, window, already through the sigmoid.
    config: the algorithm's hyper-parameters.
    scale: static softmax scale, 1/sqrt(H) by default.
    query_offset: position of the first query in the row of keys: an integer,
      or an int32 array of shape () or [B]; S - T by default. Rows at positions
      outside [0, S) behave like padding.
    segment_ids: int32 [B, S] for packed sequences: contiguous runs that start
      at multiples of `selection_block`; 0 is padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    compressed_query: [B, T, N, H], the query of the compressed branch and of
      the selection, if it is another one (for example not rotated).
    block_ids: int32 [B, T, K, m] to skip the selection: block ids strictly
      ascending, then -1.
    return_block_ids: also return the ids of the selected blocks.
    implementation: a name ("triton", "xla", "reference"), or a sequence of
      names to try in order; in one, "cudnn" may serve the window alone. None
      is "triton" on NVIDIA GPUs and "xla" elsewhere, in one traced program and
      with reverse mode only; or "xla" alone, if the kernels cannot do the call.

  Returns:
    out [B, T, N, V] in the dtype of `query`, or (out, block_ids) with block_ids
    int32 [B, T, K, n], or as given. Rows with nothing to attend are 0.

  Raises:
    ValueError: if an argument does not fit, with its name, value and the rule.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> config = nsa_jax.NSAConfig(8, 4, 16, num_selected=4, window=16)
    >>> query = jax.random.normal(jax.random.key(0), (1, 128, 4, 16))
    >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 128, 1, 16))
    >>> compressed = nsa_jax.KV(
    ...   nsa_jax.compress_mean(key, config=config),
    ...   nsa_jax.compress_mean(value, config=config),
    ... )
    >>> pair = nsa_jax.KV(key, value)
    >>> gates = jnp.full((1, 128, 4, 3), 0.5)
    >>> nsa_jax.native_sparse_attention(
    ...   query, compressed, pair, pair, gates, config=config
    ... ).shape
    (1, 128, 4, 16)
  """
  check_config(config)
  query, selected = _checks.pair("selected", query, selected)
  _, window = _checks.pair("window", query, window)
  _, compressed = _checks.pair("compressed", query, compressed, min_length=0)
  key, value = selected
  key_length = key.shape[1]
  _checks.shape(
    "window.key", window.key, key.shape, "the shape of `selected.key`"
  )
  num_compressed = compression.num_compressed_blocks(key_length, config)
  _checks.shape(
    "compressed.key",
    compressed.key,
    (key.shape[0], num_compressed, *key.shape[2:]),
    "num_compressed_blocks(S) blocks, and the heads of `selected.key`",
  )
  for name, other in (
    ("window.value", window.value),
    ("compressed.value", compressed.value),
  ):
    _checks.shape(
      name,
      other,
      (None, None, None, value.shape[-1]),
      "the head dimension of `selected.value`",
    )
  gates = _checks.array("gates", gates, 4, "[B, T, N, 3]")
  _checks.floating("gates", gates)
  _checks.shape("gates", gates, (*query.shape[:3], 3), "[B, T, N, 3]")
  if compressed_query is None:
    compressed_query = query
  else:
    compressed_query = _checks.same_as(
      "compressed_query", compressed_query, "query", query
    )
  scale = _checks.scale(scale, query.shape[-1])
  rows = _query_rows(
    query, key_length, query_offset, segment_ids, query_segment_ids, config
  )
  if block_ids is not None:
    block_ids = _block_ids(block_ids, query, key, config)

  out_compressed, lse = _compressed(
    compressed_query,
    compressed.key,
    compressed.value,
    rows,
    config=config,
    scale=scale,
    implementation=implementation,
  )
  if block_ids is None:
    block_ids = _select(
      compressed_query,
      compressed.key,
      lse,
      rows,
      config=config,
      scale=scale,
      implementation=implementation,
    )
  out_selected, _ = _selected(
    query,
    key,
    value,
    block_ids,
    rows,
    config=config,
    scale=scale,
    implementation=implementation,
  )
  out_window, _ = _window(
    query,
    window.key,
    window.value,
    rows,
    config=config,
    scale=scale,
    implementation=implementation,
    with_lse=False,
  )
  out = gated_sum(
    _keep(gates, rows.real), (out_compressed, out_selected, out_window)
  )
  out = _keep(out, rows.real)
  return (out, block_ids) if return_block_ids else out


def compressed_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float | None = None,
  query_offset: int | Array | None = None,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  implementation: Implementation = None,
) -> tuple[Array, Array]:
  """Attention over compressed blocks (Eq. 7), those wholly at or before t.

  Args:
    query: [B, T, N, H].
    key: [B, C, K, H], compressed; C = num_compressed_blocks(key_length).
    value: [B, C, K, V], compressed.
    config: `compression_block` and `compression_stride` are read.
    key_length: S, static: the number of tokens the blocks were made from.
    scale: static softmax scale, 1/sqrt(H) by default.
    query_offset: position of the first query, int or int32 () or [B]; S - T by
      default.
    segment_ids: int32 [B, S], of the tokens; 0 is padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    implementation: None, a name, or a sequence, as in
      `native_sparse_attention`.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N]
    in float32 (float64 for float64). A query that sees no block gets 0 and
    -inf, and no gradient.

  Raises:
    ValueError: if an argument does not fit, with its name, value and the rule.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compressed_attention
    >>> query, blocks = jnp.ones((1, 64, 2, 8)), jnp.ones((1, 3, 1, 8))
    >>> out, lse = compressed_attention(
    ...   query, blocks, blocks, config=NSAConfig(), key_length=64
    ... )
    >>> out.shape, lse.shape
    ((1, 64, 2, 8), (1, 64, 2))
  """
  check_config(config)
  query, key, value = _checks.attention_inputs(query, key, value, min_length=0)
  rows = _compressed_rows(
    query, key, "key", config, key_length, query_offset, segment_ids,
    query_segment_ids,
  )  # fmt: skip
  return _compressed(
    query,
    key,
    value,
    rows,
    config=config,
    scale=_checks.scale(scale, query.shape[-1]),
    implementation=implementation,
  )


def block_scores(
  query: Array,
  compressed_key: Array,
  lse: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float | None = None,
  query_offset: int | Array | None = None,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  implementation: Implementation = None,
) -> Array:
  """Importance of every selection block (Eq. 8-10), for study and tests.

  Takes O(T M) memory; `select_blocks` does not.

  Args:
    query: [B, T, N, H].
    compressed_key: [B, C, K, H]; C = num_compressed_blocks(key_length).
    lse: [B, T, N], from `compressed_attention` with the same arguments.
    config: the block lengths and the stride are read.
    key_length: S, static: the number of tokens the blocks were made from.
    scale: static softmax scale, 1/sqrt(H) by default.
    query_offset: position of the first query, int or int32 () or [B]; S - T by
      default.
    segment_ids: int32 [B, S], of the tokens; 0 is padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    implementation: None, a name, or a sequence, as in
      `native_sparse_attention`.

  Returns:
    [B, T, K, M], float32 (float64 for float64): attention probability of the
    compressed blocks, weighted by their overlap with each selection block in
    units of the stride, summed over the heads of a group.

  Raises:
    ValueError: if an argument does not fit, with its name, value and the rule.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, block_scores, compressed_attention
    >>> query, blocks = jnp.ones((1, 64, 2, 8)), jnp.ones((1, 3, 1, 8))
    >>> config = NSAConfig()
    >>> _, lse = compressed_attention(
    ...   query, blocks, blocks, config=config, key_length=64
    ... )
    >>> block_scores(query, blocks, lse, config=config, key_length=64).shape
    (1, 64, 1, 1)
  """
  query, compressed_key, lse, rows = _selection_inputs(
    query, compressed_key, lse, config, key_length, query_offset, segment_ids,
    query_segment_ids,
  )  # fmt: skip
  scores = _dispatch(
    "block_scores",
    implementation,
    rows,
    query,
    _keep(compressed_key, _read_blocks(rows, config)),
    _keep(lse, rows.real),
    config=config,
    key_length=rows.key_length,
    scale=_checks.scale(scale, query.shape[-1]),
  )
  return _keep(scores, rows.real)


def select_blocks(
  query: Array,
  compressed_key: Array,
  lse: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float | None = None,
  query_offset: int | Array | None = None,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  implementation: Implementation = None,
) -> Array:
  """The n blocks each query reads (Eq. 8-11), the same for a whole group.

  The first `num_initial` blocks of the sequence (or segment) and the
  `num_local` blocks ending at the query's own are always chosen; the other
  places go to the largest importance scores, ties to the lower index. No
  gradient passes through.

  Args:
    query: [B, T, N, H].
    compressed_key: [B, C, K, H]; C = num_compressed_blocks(key_length).
    lse: [B, T, N], from `compressed_attention` with the same arguments.
    config: the algorithm's hyper-parameters; all but `window` are read.
    key_length: S, static: the number of tokens the blocks were made from.
    scale: static softmax scale, 1/sqrt(H) by default.
    query_offset: position of the first query, int or int32 () or [B]; S - T by
      default.
    segment_ids: int32 [B, S], of the tokens; 0 is padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    implementation: None, a name, or a sequence, as in
      `native_sparse_attention`.

  Returns:
    int32 [B, T, K, n]: block ids strictly ascending, then -1.

  Raises:
    ValueError: if an argument does not fit, with its name, value and the rule.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, compressed_attention, select_blocks
    >>> query, blocks = jnp.ones((1, 128, 2, 8)), jnp.ones((1, 7, 1, 8))
    >>> config = NSAConfig(num_selected=4)
    >>> _, lse = compressed_attention(
    ...   query, blocks, blocks, config=config, key_length=128
    ... )
    >>> ids = select_blocks(query, blocks, lse, config=config, key_length=128)
    >>> ids[0, 100, 0].tolist()
    [0, 1, -1, -1]
  """
  query, compressed_key, lse, rows = _selection_inputs(
    query, compressed_key, lse, config, key_length, query_offset, segment_ids,
    query_segment_ids,
  )  # fmt: skip
  return _select(
    query,
    compressed_key,
    lse,
    rows,
    config=config,
    scale=_checks.scale(scale, query.shape[-1]),
    implementation=implementation,
  )


def selected_attention(
  query: Array,
  key: Array,
  value: Array,
  block_ids: Array,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: int | Array | None = None,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  implementation: Implementation = None,
) -> tuple[Array, Array]:
  """Attention over the tokens s <= t of the given blocks (Eq. 12).

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, V].
    block_ids: int32 [B, T, K, m], m >= 1, shared by the heads of a group:
      strictly ascending, then -1. Any selector may have made them.
    config: only `selection_block` is read.
    scale: static softmax scale, 1/sqrt(H) by default.
    query_offset: position of the first query, int or int32 () or [B]; S - T by
      default.
    segment_ids: int32 [B, S]; 0 is padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    implementation: None, a name, or a sequence, as in
      `native_sparse_attention`.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N]
    in float32 (float64 for float64). A query with nothing to attend gets 0 and
    -inf.

  Raises:
    ValueError: if an argument does not fit, with its name, value and the rule.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, selected_attention
    >>> query, key = jnp.ones((1, 128, 2, 8)), jnp.ones((1, 128, 1, 8))
    >>> ids = jnp.zeros((1, 128, 1, 1), jnp.int32)
    >>> out, lse = selected_attention(query, key, key, ids, config=NSAConfig())
    >>> out.shape, lse.shape
    ((1, 128, 2, 8), (1, 128, 2))
  """
  check_config(config)
  query, key, value = _checks.attention_inputs(query, key, value)
  rows = _query_rows(
    query, key.shape[1], query_offset, segment_ids, query_segment_ids, config
  )
  return _selected(
    query,
    key,
    value,
    _block_ids(block_ids, query, key, config),
    rows,
    config=config,
    scale=_checks.scale(scale, query.shape[-1]),
    implementation=implementation,
  )


def window_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  scale: float | None = None,
  key_offset: int | Array = 0,
  query_offset: int | Array | None = None,
  segment_ids: Array | None = None,
  query_segment_ids: Array | None = None,
  implementation: Implementation = None,
) -> tuple[Array, Array]:
  """Attention over the last w tokens, max(0, t - w + 1) .. t.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H]; row s has position key_offset + s. Rows at negative
      positions are no tokens and are not read.
    value: [B, S, K, V].
    config: only `window` is read.
    scale: static softmax scale, 1/sqrt(H) by default.
    key_offset: position of the first key, int or int32 () or [B].
    query_offset: position of the first query, int or int32 () or [B];
      key_offset + S - T by default.
    segment_ids: int32 [B, S], contiguous runs, of any alignment here; 0 is
      padding.
    query_segment_ids: int32 [B, T]; by default `segment_ids` at the queries'
      positions.
    implementation: None, a name, or a sequence, as in
      `native_sparse_attention`.

  Returns:
    out [B, T, N, V] in the dtype of `query` and the natural-log lse [B, T, N]
    in float32 (float64 for float64). A query with nothing to attend gets 0 and
    -inf.

  Raises:
    ValueError: if an argument does not fit, with its name, value and the rule.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, window_attention
    >>> query, key = jnp.ones((1, 100, 2, 8)), jnp.ones((1, 100, 1, 8))
    >>> out, lse = window_attention(query, key, key, config=NSAConfig(window=8))
    >>> round(float(jnp.exp(lse[0, 50, 0]) / jnp.exp(8**0.5)))  # keys it saw
    8
  """
  check_config(config)
  query, key, value = _checks.attention_inputs(query, key, value)
  key_offset = _checks.offset("key_offset", key_offset, ((), query.shape[:1]))
  rows = _query_rows(
    query,
    key.shape[1],
    query_offset,
    segment_ids,
    query_segment_ids,
    key_offset=key_offset,
  )
  return _window(
    query,
    key,
    value,
    rows,
    config=config,
    scale=_checks.scale(scale, query.shape[-1]),
    implementation=implementation,
  )


class _Rows(NamedTuple):
  """Where the queries of a call lie; None for what needs no mask."""

  key_length: int
  key_offset: int | Array
  queries: Queries
  real: Array | None  # bool [B, T]: not padding, not out of range
  read: Array | None  # bool [B or 1, S]: keys that some query may read
  last: Array | None  # int32 [B, 1]: position of the last query


def _query_rows(
  query,
  key_length,
  query_offset,
  segment_ids,
  query_segment_ids,
  config=None,
  key_offset=0,
):
  """Positions and segments of the queries, and what they can read at all."""
  batch, length = query.shape[:2]
  first: int | Array = jnp.maximum(key_offset, 0)
  stop = key_offset + key_length
  if query_offset is None:
    query_offset = stop - length
  query_offset = _checks.offset("query_offset", query_offset, ((), (batch,)))
  if isinstance(query_offset, int) and isinstance(key_offset, int):
    # What is known here needs no mask.
    first = max(key_offset, 0)
    inside = first <= query_offset <= stop - length
    all_read = key_offset >= 0 and stop - length <= query_offset < stop
  else:
    inside = all_read = False
  # Rows far outside are padding as much as those just outside, and their
  # positions fit int32.
  query_offset = jnp.clip(query_offset, first - length, stop)
  positions = compression.query_positions(query_offset, batch, length)
  first, stop, start = (_column(x) for x in (first, stop, key_offset))
  real = last = read = None
  if not inside:
    real = (positions >= first) & (positions < stop)
  if not all_read:
    token = start + jnp.arange(key_length)
    none = positions[:, :1] >= stop
    last = jnp.where(none, -1, positions[:, -1:])
    read = (token >= 0) & (token <= last)

  key_segments = query_segments = None
  if segment_ids is not None:
    key_segments = _checks.integers(
      "segment_ids", segment_ids, (batch, key_length)
    )
    # A halo of the window need not start where a block does.
    alignment = config.selection_block if config is not None else 1
    _checks.segments(segment_ids, alignment)
    if query_segment_ids is None:
      at = (positions - start).clip(0, key_length - 1)
      query_segments = jnp.take_along_axis(key_segments, at, axis=1)
    else:
      query_segments = _checks.integers(
        "query_segment_ids", query_segment_ids, (batch, length)
      )
      _checks.not_negative("query_segment_ids", query_segment_ids)
    padding = query_segments <= 0
    real = ~padding if real is None else real & ~padding
    query_segments = jnp.where(real, query_segments, 0)
    read = key_segments > 0 if read is None else read & (key_segments > 0)
  elif query_segment_ids is not None:
    raise ValueError(
      "`query_segment_ids` needs `segment_ids`, the segments of the keys."
    )
  return _Rows(
    key_length,
    key_offset,
    Queries(positions, key_segments, query_segments),
    real,
    read,
    last,
  )


def _column(offset):
  """An offset that broadcasts against [B, ...]."""
  return offset[:, None] if jnp.ndim(offset) else offset


def _read_blocks(rows: _Rows, config: NSAConfig) -> Array | None:
  """Compressed blocks that some query may read, bool [B or 1, C]."""
  read = None
  if rows.last is not None:
    read = compression.compressed_block_ends(rows.key_length, config)
    read = read <= rows.last
  tokens = rows.queries.key_segments
  if tokens is not None:
    segments = compression.compressed_block_segments(tokens, config)
    read = segments > 0 if read is None else read & (segments > 0)
  return read


def _keep(x, mask, fill=0):
  """`x` where mask [B, rows] holds; elsewhere no value and no gradient."""
  if mask is None:
    return x
  return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, fill)


def _dispatch(op, implementation, rows, query, *args, **kwargs):
  return dispatch.call(
    op,
    implementation,
    _keep(query, rows.real),
    *args,
    queries=rows.queries,
    **kwargs,
  )


def _branch(op, implementation, rows, read, query, key, value, *args, **kwargs):
  """One softmax branch: masks what nobody reads."""
  out, lse = _dispatch(
    op,
    implementation,
    rows,
    query,
    _keep(key, read),
    _keep(value, read),
    *args,
    **kwargs,
  )
  return _keep(out, rows.real), _keep(lse, rows.real, -jnp.inf)


def _compressed(query, key, value, rows, *, config, scale, implementation):
  if not key.shape[1]:  # No complete block: no kernel to run.
    dispatch.names(implementation)
    shape = query.shape[:3]
    acc = jnp.promote_types(jnp.float32, query.dtype)
    out = jnp.zeros((*shape, value.shape[-1]), query.dtype)
    return out, jnp.full(shape, -jnp.inf, acc)
  return _branch(
    "compressed_attention",
    implementation,
    rows,
    _read_blocks(rows, config),
    query,
    key,
    value,
    config=config,
    key_length=rows.key_length,
    scale=scale,
  )


def _select(query, key, lse, rows, *, config, scale, implementation):
  query, key, lse = jax.lax.stop_gradient((query, key, lse))
  ids = _dispatch(
    "select_blocks",
    implementation,
    rows,
    query,
    _keep(key, _read_blocks(rows, config)),
    _keep(lse, rows.real),
    config=config,
    key_length=rows.key_length,
    scale=scale,
  )
  return checkpoint_name(ids, "nsa_block_ids")


def _selected(query, key, value, ids, rows, *, config, scale, implementation):
  return _branch(
    "selected_attention",
    implementation,
    rows,
    rows.read,
    query,
    key,
    value,
    ids,
    config=config,
    scale=scale,
  )


def _window(
  query, key, value, rows, *, config, scale, implementation, with_lse=True
):
  """Returns (out, lse), or (out, anything) if lse is not asked for."""
  same_rows = query.shape[1] == key.shape[1] and rows.real is rows.read is None
  # A traced offset of 0 would not be known to be one.
  plain = same_rows and isinstance(rows.key_offset, int)
  return _branch(
    "window_attention",
    implementation,
    rows,
    rows.read,
    query,
    key,
    value,
    config=config,
    scale=scale,
    key_offset=rows.key_offset,
    cudnn={"plain": plain, "with_lse": with_lse},
  )


def _block_ids(ids, query, key, config):
  given = ids
  ids = _checks.array("block_ids", ids, 4, "[B, T, K, m]")
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"`block_ids` of dtype {ids.dtype} must have an integer dtype."
    )
  _checks.shape(
    "block_ids",
    ids,
    (*query.shape[:2], key.shape[2], None),
    "[B, T, K, m], one list per query and key/value head",
  )
  if not ids.shape[-1]:
    raise ValueError(
      f"`block_ids` of shape {ids.shape} must have at least one block (m >= 1)."
    )
  num_blocks = compression.num_selection_blocks(key.shape[1], config)
  _checks.block_ids(given, num_blocks)
  # Nobody reads a block beyond the keys, but a token in it may leave int32.
  return jnp.minimum(ids, jnp.int32(num_blocks)).astype(jnp.int32)


def _compressed_rows(
  query, key, name, config, key_length, query_offset, segment_ids,
  query_segment_ids,
):  # fmt: skip
  key_length = _checks.static_int("key_length", key_length, minimum=1)
  num_compressed = compression.num_compressed_blocks(key_length, config)
  if key.shape[1] != num_compressed:
    raise ValueError(
      f"`{name}` of shape {key.shape} must have {num_compressed} blocks, "
      f"num_compressed_blocks of `key_length`={key_length}."
    )
  return _query_rows(
    query, key_length, query_offset, segment_ids, query_segment_ids, config
  )


def _selection_inputs(
  query, compressed_key, lse, config, key_length, query_offset, segment_ids,
  query_segment_ids,
):  # fmt: skip
  check_config(config)
  query = _checks.queries(query)
  compressed_key = _checks.keys("compressed_key", compressed_key, query, 0)
  lse = _checks.array("lse", lse, 3, "[B, T, N]")
  _checks.floating("lse", lse)
  _checks.shape("lse", lse, query.shape[:3], "[B, T, N] of `query`")
  rows = _compressed_rows(
    query, compressed_key, "compressed_key", config, key_length, query_offset,
    segment_ids, query_segment_ids,
  )  # fmt: skip
  return query, compressed_key, lse, rows
