"""Attention layers without a module system: parameters in, arrays out.

A module system (linen, nnx) creates the parameters that the tables here name,
binds them to functions, and calls `sparse_attention` or `dense_attention`.
Everything here is shared by all module systems.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import _checks, cache, compression
from nsa_jax.cache.state import Cache, check_batch, check_cache
from nsa_jax.config import (
  AttentionConfig,
  NSAConfig,
  check_attention_config,
  check_config,
)
from nsa_jax.ops.branches import full_attention, window_attention
from nsa_jax.ops.nsa import native_sparse_attention
from nsa_jax.ops.scope import keep
from nsa_jax.precision import sum_dtype
from nsa_jax.rope import apply_rope
from nsa_jax.sharding import Layout, find_place, shard_order, text_order
from nsa_jax.typing import (
  BRANCHES,
  KV,
  Array,
  AttentionName,
  CompressionName,
)
from pallas_kernels.interface import query_positions

# Functions of an array with their parameters bound. The keys are the names from
# `projections`, `norms` and `COMPRESSIONS`, and "out"; and those of `vectors`,
# whose functions take no array.
Parts = Mapping[str, Callable[..., Array]]

COMPRESSIONS = ("compress_key", "compress_value")


DENSE_KINDS = ("full", "window")


def projections(
  config: AttentionConfig, kind: AttentionName = "nsa"
) -> dict[str, tuple[int, int]]:
  """Heads and features of every linear map of the input [B, T, D], by name.

  The output projection "out", from [B, T, N, V], is not included.

  Args:
    config: options of the layer.
    kind: "nsa", or "full" or "window" for dense attention.
  """
  check_attention_config(config)
  _checks.choice("kind", kind, cache.KINDS)
  heads, kv_heads = config.num_heads, config.num_kv_heads
  widths = {"key": config.head_dim, "value": config.value_dim}
  shapes = {"query": (heads, config.head_dim)}
  if kind == "nsa":
    shapes["gate"] = (heads, 3)
  for name, width in widths.items():
    if kind != "nsa" or config.share_kv:
      shapes[name] = kv_heads, width
    else:
      for branch in BRANCHES:
        shapes[f"{name}_{branch}"] = kv_heads, width
  return shapes


def norms(
  config: AttentionConfig, kind: AttentionName = "nsa"
) -> tuple[str, ...]:
  """Names of the RMSNorms over H; none without `normalize_qk`."""
  check_attention_config(config)
  _checks.choice("kind", kind, cache.KINDS)
  if not config.normalize_qk:
    return ()
  if kind != "nsa":
    return ("query_norm", "key_norm")
  own = ["key_norm"]
  if not config.share_kv:
    own = ["key_selected_norm", "key_window_norm"]
  return ("query_norm", *own, "key_compressed_norm")


def initial_kernel(
  config: AttentionConfig, name: str, init: Callable[..., Any]
) -> Callable[..., Any]:
  """The initialiser of a projection's kernel, given that of the others."""
  check_attention_config(config)
  names = [*projections(config), *projections(config, "full"), "out"]
  _checks.choice("name", name, names)
  if not callable(init):
    raise ValueError(
      f"`init`={_checks.show(init)} must be an initialiser function."
    )
  scale = config.gate_init_scale
  if name != "gate" or scale == 1:
    return init

  def scaled(*args: Any, **kwargs: Any) -> Any:
    kernel = init(*args, **kwargs)
    # It may be in a box with metadata: linen's is a pytree, that of nnx is not.
    if hasattr(kernel, "raw_value"):
      return dataclasses.replace(kernel, raw_value=kernel.raw_value * scale)
    return jax.tree.map(lambda x: x * scale, kernel)

  return scaled


def initial_biases(
  config: AttentionConfig, kind: AttentionName = "nsa"
) -> dict[str, Callable[..., Array]]:
  """Initialisers of the biases, by the name of the projection that has one.

  A bias has the shape that `projections` says, that of "out" D.

  Args:
    config: `biases` and `gate_bias` are read.
    kind: as in `projections`.
  """
  zeros = jax.nn.initializers.zeros
  inits: dict[str, Callable[..., Array]] = {
    name: zeros
    for name in (*projections(config, kind), "out")
    if name.split("_")[0] in config.biases
  }
  if kind == "nsa" and config.gate_bias is not None:
    gate_bias: Any = config.gate_bias  # A tuple, once checked.

    def gate(key: Any, shape: Any, dtype: Any, **kwargs: Any) -> Array:
      del key, kwargs
      # Of shape [N, 3], or flat: the three repeat.
      return jnp.resize(jnp.asarray(gate_bias, dtype), shape)

    inits["gate"] = gate
  return inits


def vectors(
  config: AttentionConfig, kind: AttentionName = "nsa"
) -> dict[str, tuple[Callable[..., Array], tuple[int, ...]]]:
  """Initialiser and shape of the layer's own parameters, by name.

  In `Parts` they are functions without arguments.

  Args:
    config: `attention_sinks` is read.
    kind: as in `projections`.

  Raises:
    NotImplementedError: if this kind of attention cannot do what `config` asks.
  """
  check_attention_config(config)
  _checks.choice("kind", kind, cache.KINDS)
  if kind == "nsa":
    _check_sparse(config)
  if not config.attention_sinks:
    return {}
  return {"sink": (jax.nn.initializers.zeros, (config.num_heads,))}


def _check_sparse(config):
  """Raises NotImplementedError for what dense attention alone can do."""
  for name, off in (("attention_sinks", False), ("score_softcap", None)):
    value = getattr(config, name)
    if value is not off:
      raise NotImplementedError(
        f"`{name}`={value}: Native Sparse Attention takes {off}, since its "
        "branches and its selection have no such softmax; `attention`='full' "
        "and 'window' (`DenseAttention`) do."
      )


def phi_parameters(
  kind: CompressionName,
  config: NSAConfig,
  heads: int,
  head_dim: int,
  kernel_init: Callable[..., Any] | None = None,
) -> dict[str, tuple[Any, tuple[int, ...]]]:
  """Initialiser and shape of every parameter of phi, by name.

  The names are those of the arguments of the functions in `compression`. The
  hidden layer of "mlp" has 2 * head_dim features.

  Args:
    kind: "mlp", "linear", "weighted" or "mean".
    config: `compression_block` is read.
    heads: K.
    head_dim: H for keys, V for values.
    kernel_init: of "w1" and "w2", or of "weight" of "linear"; LeCun's by
      default.
  """
  _checks.choice("kind", kind, get_args(CompressionName))
  check_config(config)
  heads = _checks.static_int("heads", heads, 1)
  head_dim = _checks.static_int("head_dim", head_dim, 1)
  block, hidden = config.compression_block, 2 * head_dim
  zeros = jax.nn.initializers.zeros
  kernel = kernel_init
  if kernel is None:
    kernel = jax.nn.initializers.lecun_normal(batch_axis=(0,))
  elif not callable(kernel):
    raise ValueError(
      f"`kernel_init`={_checks.show(kernel)} must be an initialiser function."
    )
  position = jax.nn.initializers.normal(0.02)
  average = jax.nn.initializers.constant(1 / block)
  tables: dict[str, dict[str, tuple[Any, tuple[int, ...]]]] = {
    "mean": {},
    "weighted": {"weight": (average, (heads, block))},
    "linear": {
      "position": (position, (heads, block, head_dim)),
      "weight": (kernel, (heads, block * head_dim, head_dim)),
    },
    "mlp": {
      "position": (position, (heads, block, head_dim)),
      "w1": (kernel, (heads, block * head_dim, hidden)),
      "b1": (zeros, (heads, hidden)),
      "w2": (kernel, (heads, hidden, head_dim)),
      "b2": (zeros, (heads, head_dim)),
    },
  }
  return tables[kind]


def compress(
  kind: CompressionName,
  config: NSAConfig,
  parameters: Mapping[str, Array],
  x: Array,
  segment_ids: Array | None = None,
  layout: Layout | None = None,
) -> Array:
  """phi: keys or values [B, S, K, H] to compressed blocks [B, C, K, H].

  Args:
    kind: as in `phi_parameters`.
    config: the block length and the stride are read.
    parameters: those that `phi_parameters` names.
    x: [B, S, K, H].
    segment_ids: int32 [B, S].
    layout: as in `compress_mean`.
  """
  _checks.choice("kind", kind, get_args(CompressionName))
  x = _checks.array("x", x, 4, "[B, S, K, H]")
  _checks.not_empty("x", x, axes=(2, 3))
  heads, width = x.shape[2:]
  known = phi_parameters(kind, config, heads, width)
  if not isinstance(parameters, Mapping) or set(parameters) != set(known):
    raise ValueError(
      f"`parameters`={_checks.show(parameters)} must be a mapping with the "
      f"entries {sorted(known)} of `kind`={kind!r}."
    )
  function = getattr(compression, f"compress_{kind}")
  return function(
    x, **parameters, config=config, segment_ids=segment_ids, layout=layout
  )


class Attended(NamedTuple):
  """Results of a layer.

  Attributes:
    out: [B, T, D].
    gates: [B, T, N, 3]; None for dense attention.
    block_ids: int32 [B, T, K, n] if requested, otherwise None.
    cache: the cache with the new tokens; None without decoding.
    query: [B, T, N, H], normalised and rotated; None for dense attention and
      with decoding.
    key: [B, T, K, H] of the selected branch, likewise.
  """

  out: Array
  gates: Array | None = None
  block_ids: Array | None = None
  cache: Cache | None = None
  query: Array | None = None
  key: Array | None = None


class Decoding(NamedTuple):
  """A call that appends T tokens to a cache.

  Attributes:
    held: the cache before the call.
    counts: int32 [B], number of tokens appended to each row; the rest of a row
      is padding.
    offset: position of each row's first token, static or int32 [B].
    positions: int32 [B, T], position of every token.
  """

  held: Cache
  counts: Array
  offset: int | Array
  positions: Array

  def add(self, config: AttentionConfig, **new: Any) -> tuple[Cache, KV | None]:
    """The new cache and the argument `prefill_window` of `attend`."""
    made = next(x.key.dtype for x in new.values() if isinstance(x, KV))
    held = self.held
    # Quantized keys fit any dtype.
    kept = next(
      (
        x.key.dtype
        for x in (held.selected, held.window, held.tail)
        if x is not None and x.key.dtype != jnp.int8
      ),
      made,
    )
    if made != kept:
      raise ValueError(
        f"`x` gives keys of dtype {made}, which must be that of the cache, "
        f"{kept}: make the cache with inputs and parameters of these dtypes."
      )
    most = cache.max_append(self.held, config.nsa)
    few = most is None or self.positions.shape[1] <= most
    # Tokens that do not follow the cache were rotated to wrong positions: they
    # are not appended.
    counts = jnp.where(self.offset == self.held.lengths, self.counts, 0)
    new |= {"config": config.nsa, "counts": counts}
    if few:
      return cache.append(self.held, **new), None
    return cache.prefill(self.held, **new)

  def keep_new(self, x: Array, fill: int = 0) -> Array:
    """x [B, T, ...] with `fill` at padding.

    With a static offset, padding may be at positions that the cache holds, so
    that `attend` does not mask it.
    """
    new = jnp.arange(x.shape[1])[None] < self.counts[:, None]
    return keep(x, new, fill)

  def mark_lost(self, out: Array) -> Array:
    """`out` with NaN at tokens that could not be appended correctly."""
    held = self.held
    index = jnp.arange(out.shape[1])[None]
    lost = cache.too_short(held, held.lengths) | (self.offset != held.lengths)
    lost = lost[:, None]
    if held.selected is not None:
      lost |= held.lengths[:, None] + index >= held.selected.key.shape[1]
    lost &= index < self.counts[:, None]
    return jnp.where(lost[..., None], jnp.nan, out)


def begin_decoding(
  held: Cache,
  x: Array,
  segment_ids: Array | None,
  prefix_length: int | None,
) -> Decoding:
  """Prepares appending tokens x [B, T, ...] to a layer's cache.

  Args:
    held: the cache.
    x: the new tokens.
    segment_ids: int32 [B, T]: one segment per row, then padding.
    prefix_length: the length, if static, of every row that gets new tokens; 0
      empties these rows first.

  Raises:
    ValueError: if an argument does not fit.
  """
  held = check_cache(held, "held")
  x = _checks.batch_and_length("x", x)
  batch, length = x.shape[:2]
  check_batch("x", x, held)
  counts = jnp.full(batch, length, jnp.int32)
  if segment_ids is not None:
    known = _checks.concrete(segment_ids)
    ids = _checks.integers("segment_ids", segment_ids, (batch, length))
    follows = jnp.cumprod(ids > 0, axis=1)
    counts = follows.sum(axis=1).astype(jnp.int32)
    if known is not None:
      right = known == known[:, :1] * (np.cumprod(known > 0, axis=1))
      if not right.all():
        row = int(np.argmin(right.all(axis=1)))
        raise ValueError(
          f"`segment_ids`[{row}]={known[row].tolist()} must be one segment, "
          "then padding, with `decode`=True."
        )
  if prefix_length is not None:
    prefix_length = _checks.static_int("prefix_length", prefix_length, 0)
  if prefix_length == 0:
    held = cache.rewind(held, jnp.where(counts > 0, 0, held.lengths))
  offset = held.lengths if prefix_length is None else prefix_length
  lengths, new = _checks.concrete(held.lengths), _checks.concrete(counts)
  if prefix_length is not None and lengths is not None and new is not None:
    wrong = (lengths != prefix_length) & (new > 0)
    if wrong.any():
      raise ValueError(
        f"`prefix_length`={prefix_length} must be what every row with new "
        f"tokens holds: {lengths.tolist()}."
      )
  return Decoding(held, counts, offset, query_positions(offset, batch, length))


def empty_cache(
  config: AttentionConfig,
  batch: int,
  capacity: int,
  *,
  max_append: int,
  dtype: Any,
  kind: AttentionName = "nsa",
) -> Cache:
  """An empty cache for a layer, made by `cache.init`."""
  check_attention_config(config)
  _checks.choice("kind", kind, cache.KINDS)
  return cache.init(
    batch,
    capacity,
    config=config.nsa,
    num_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    value_head_dim=config.value_dim,
    max_append=max_append,
    share_kv=config.share_kv if kind == "nsa" else False,
    kind=kind,
    select=config.select,
    dtype=dtype,
  )


def complete_positions(
  x: Array,
  positions: Array | None,
  segment_ids: Array | None,
  alignment: int,
  name: str = "x",
  layout: Layout | None = None,
) -> tuple[Array, Array | None]:
  """Validates positions and segments of tokens `x` [B, T, ...]; int32.

  By default positions restart at 0 at each segment start. Segments must start
  at multiples of `alignment`. Both are in the order of `layout`.
  """
  alignment = _checks.static_int("alignment", alignment, 1)
  x = _checks.batch_and_length(name, x)
  place = find_place(layout, name, x, "BT")
  rule = f"one entry per row and token of `{name}`"
  if segment_ids is not None:
    given = segment_ids
    segment_ids = _checks.integers(
      "segment_ids", segment_ids, x.shape[:2], rule
    )
    known = _checks.concrete(given)
    if known is not None:
      _checks.segments(np.asarray(text_order(place, known)), alignment)
  if positions is not None:
    positions = _checks.integers("positions", positions, x.shape[:2], rule)
    return positions, segment_ids
  index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
  if segment_ids is not None:
    in_order = text_order(place, segment_ids)
    starts = in_order != jnp.roll(in_order, 1, axis=1)
    index -= jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return shard_order(place, index), segment_ids


def sparse_attention(
  config: AttentionConfig,
  parts: Parts,
  x: Array,
  *,
  positions: Array | None,
  segment_ids: Array | None,
  decoding: Decoding | None = None,
  return_block_ids: bool = False,
) -> Attended:
  """Causal Native Sparse Attention of tokens x [B, T, D].

  Args:
    config: options of the layer.
    parts: functions by name; those of `COMPRESSIONS` also take segment ids.
    x: [B, T, D].
    positions: int32 [B, T] for RoPE, or None.
    segment_ids: int32 [B, T], or None.
    decoding: appends the tokens to a cache, over which they then attend.
    return_block_ids: also return the block ids.
  """
  check_attention_config(config)
  _check_parts(config, "nsa", parts)
  _checks.flag("return_block_ids", return_block_ids)
  x = _checks.layer_input(x)
  x, positions, segment_ids = _tokens(
    config, x, positions, segment_ids, decoding
  )

  def normalize(name, x):
    return parts[name](x) if config.normalize_qk else x

  rotate = _rotation(config, positions, segment_ids)

  def project(name):
    if config.share_kv:
      return dict.fromkeys(BRANCHES, parts[name](x))
    return {branch: parts[f"{name}_{branch}"](x) for branch in BRANCHES}

  def phi(tokens, first, segment_ids=None):
    """Compressed keys and values; `first` are the blocks' first positions."""
    key = parts["compress_key"](tokens.key, segment_ids)
    key = normalize("key_compressed_norm", key)
    if config.rope_compressed == "block":
      key = rotate(key, first[:, : key.shape[1]])
    return KV(key, parts["compress_value"](tokens.value, segment_ids))

  query = parts["query"](x)
  logits = parts["gate"](x)
  gates = jax.nn.sigmoid(logits.astype(sum_dtype(logits.dtype)))
  if config.branches != BRANCHES:
    gates *= jnp.array([x in config.branches for x in BRANCHES], gates.dtype)
  keys, values = project("key"), project("value")
  query = normalize("query_norm", query)
  rotated_query = rotate(query)
  if config.share_kv:
    selected_key = rotate(normalize("key_norm", keys["selected"]))
    window_key = selected_key
  else:
    selected_key, window_key = (
      rotate(normalize(f"key_{branch}_norm", keys[branch]))
      for branch in ("selected", "window")
    )
  tokens = KV(keys["compressed"], values["compressed"])
  if config.rope_compressed == "tokens":
    tokens = tokens._replace(key=rotate(tokens.key))
  selected = KV(selected_key, values["selected"])
  window = KV(window_key, values["window"])
  select = config.select
  if callable(select):
    select = functools.partial(select, x=x)
  call: dict[str, Any] = {
    "config": config.nsa,
    "compressed_query": query if config.rope_compressed == "none" else None,
    "select": select,
    "implementation": config.implementation,
    "layout": config.layout,
  }
  held = None
  if decoding is None:
    stride = config.nsa.compression_stride
    place = find_place(config.layout, "x", x, "BT")
    in_order = text_order(place, positions)
    compressed = phi(tokens, in_order[:, ::stride], segment_ids)
    heads, block_ids = native_sparse_attention(
      rotated_query,
      compressed,
      selected,
      window,
      gates,
      segment_ids=segment_ids,
      return_block_ids=True,
      **call,
    )
  else:
    shift = positions - decoding.positions
    held, chunk = decoding.add(
      config,
      compressed=tokens,
      selected=selected,
      window=None if config.share_kv else window,
      compress=lambda tokens, first: phi(tokens, first + shift[:, :1]),
    )
    heads, block_ids = cache.attend(
      rotated_query,
      held,
      gates,
      query_offset=decoding.offset,
      prefill_window=chunk,
      return_block_ids=True,
      **call,
    )
    heads = decoding.keep_new(heads)
    block_ids = decoding.keep_new(block_ids, -1)
  out = parts["out"](heads)
  if decoding is not None:
    out = decoding.mark_lost(out)
  attended = Attended(out, gates, block_ids if return_block_ids else None, held)
  if decoding is None:
    attended = attended._replace(query=rotated_query, key=selected_key)
  return attended


def dense_attention(
  config: AttentionConfig,
  kind: AttentionName,
  parts: Parts,
  x: Array,
  *,
  positions: Array | None,
  segment_ids: Array | None,
  decoding: Decoding | None = None,
) -> Attended:
  """Full or window attention of tokens x [B, T, D], the baselines.

  Args:
    config: options of the layer.
    kind: "full" or "window".
    parts: functions by name.
    x: [B, T, D].
    positions: as in `sparse_attention`.
    segment_ids: as in `sparse_attention`.
    decoding: as in `sparse_attention`.
  """
  check_attention_config(config)
  _checks.choice("kind", kind, DENSE_KINDS)
  _check_parts(config, kind, parts)
  x = _checks.layer_input(x)
  x, positions, segment_ids = _tokens(
    config, x, positions, segment_ids, decoding
  )
  rotate = _rotation(config, positions, segment_ids)
  query, key, value = (parts[name](x) for name in ("query", "key", "value"))
  if config.normalize_qk:
    query, key = parts["query_norm"](query), parts["key_norm"](key)
  query, key = rotate(query), rotate(key)
  call: dict[str, Any] = {
    "softcap": config.score_softcap,
    "return_lse": config.attention_sinks,
    "implementation": config.implementation,
    "layout": config.layout,
  }
  held = None
  if decoding is None:
    call["segment_ids"] = segment_ids
    if kind == "window":
      heads = window_attention(query, key, value, config=config.nsa, **call)
    else:
      heads = full_attention(query, key, value, **call)
  elif kind == "window":
    held, chunk = decoding.add(config, window=KV(key, value))
    heads = cache.attend_window(
      query,
      held,
      config=config.nsa,
      query_offset=decoding.offset,
      prefill_window=chunk,
      **call,
    )
  else:
    held, _ = decoding.add(config, selected=KV(key, value))
    heads = cache.attend_full(query, held, query_offset=decoding.offset, **call)
  if config.attention_sinks:
    heads, lse = heads
    # The sink takes its share of the weights: lse - log(e^lse + e^sink).
    share = jax.nn.sigmoid(lse - parts["sink"]().astype(lse.dtype)[None, None])
    heads = (heads * share[..., None]).astype(query.dtype)
  if decoding is not None:
    heads = decoding.keep_new(heads)
  out = parts["out"](heads)
  if decoding is not None:
    out = decoding.mark_lost(out)
  return Attended(out, cache=held)


def _rotation(config, positions, segment_ids):
  """The function that rotates queries or keys, by default to `positions`."""
  rope = config.rope
  if rope is None:
    return lambda x, positions=None: x
  lengths = None
  if rope.is_dynamic:
    used = (
      positions if segment_ids is None else keep(positions, segment_ids > 0)
    )
    lengths = used.max(axis=1) + 1

  def rotate(x, positions=positions):
    return apply_rope(x, positions, rope, lengths)

  return rotate


def _tokens(config, x, positions, segment_ids, decoding):
  """Tokens without padding, with their positions and segments."""
  if decoding is not None and not isinstance(decoding, Decoding):
    raise ValueError(
      f"`decoding`={_checks.show(decoding)} must be a Decoding, as "
      "`begin_decoding` returns, or None."
    )
  if decoding is not None and positions is None:
    positions = decoding.positions
  positions, segment_ids = complete_positions(
    x,
    positions,
    segment_ids,
    config.nsa.selection_block,
    layout=config.layout,
  )
  if segment_ids is not None:
    # A NaN in the padding would reach the gradients of the projections.
    x = keep(x, segment_ids > 0)
  return x, positions, segment_ids


def _check_parts(
  config: AttentionConfig, kind: AttentionName, parts: Any
) -> None:
  """Raises ValueError unless `parts` has a function for every name."""
  names = [
    *projections(config, kind),
    *norms(config, kind),
    *vectors(config, kind),
    "out",
  ]
  if kind == "nsa":
    names += COMPRESSIONS
  if not isinstance(parts, Mapping):
    raise ValueError(
      f"`parts`={_checks.show(parts)} must be a mapping from the names "
      f"{names} to functions."
    )
  for name in names:
    if not callable(parts.get(name)):
      raise ValueError(
        f"`parts`[{name!r}]={_checks.show(parts.get(name))} must be a function."
      )
