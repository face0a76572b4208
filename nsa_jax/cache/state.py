"""The decode cache of one attention layer, as pure functions of one pytree.

`init` makes a cache, `append` and `prefill` add tokens, `rewind` removes
tokens; `nsa_jax.ops.cached` attends over the cache. Shapes are static and every
batch row has its own length, so that everything works under `jit`, `scan` and
`vmap`, and in place if the cache is donated. The lengths alone determine which
entries are valid: nothing is ever cleared.

Per token and key/value head an NSA layer keeps one key and one value (H + V
numbers) for the selected branch and 1/d of that for the compressed blocks. In
addition each batch row has two ring buffers whose size does not depend on the
capacity: w + A - 1 keys and values of the window (none with `share_kv`) and the
last l + A - 1 inputs of phi, where A is `max_append`. Means that select take
H / `tokens` numbers more per token. `bytes_per_token` and `num_bytes` give the
sizes in bytes.

`nsa_jax.typing` explains the letters in shapes; here S is the capacity.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from nsa_jax import _checks, geometry
from nsa_jax.config import (
  NSAConfig,
  Select,
  SelectByMeans,
  check_config,
  check_select,
)
from nsa_jax.precision import sum_dtype
from nsa_jax.sharding import explicit_sharding
from nsa_jax.typing import KV, Array, AttentionName
from pallas_kernels.interface import query_positions

KINDS = get_args(AttentionName)
_SCALE = jnp.dtype(jnp.float32)

# phi with the layer's parameters bound: maps keys and values of (n - 1) d + l
# tokens, and the index of each block's first token, int32 [B, n], to n
# compressed blocks.
Compress = Callable[[KV, Array], KV]

_T = TypeVar("_T")


class Cache(NamedTuple):
  """State of one attention layer; fields that its kind does not use are None.

  Attributes:
    selected: keys and values [B, S, K, H or V] of all tokens, by position, for
      the selected branch (or full attention). S is a multiple of l'.
    compressed: [B, C, K, H or V], C = num_compressed_blocks(S). Block i is
      valid once its last token, i d + l - 1, is in the cache.
    window: ring [B, w + A - 1, K, H or V]; position p is stored at
      p % (w + A - 1). None with `share_kv`: the window reads `selected`.
    tail: ring [B, l + A - 1, K, H or V] of the inputs of phi.
    lengths: int32 [B], tokens in each batch row.
    earliest: int32 [B], the shortest nonzero length to which a row may be
      rewound; the rings no longer hold what a shorter row needs. It is the
      largest int32 after tokens were appended to a row that was too short: such
      a row must be emptied.
    scales: float32 [B, S, K] for keys and values, of a cache that `quantize`
      made: `selected` is then int8, and its numbers are these times those.
    means: [B, S / tokens, K, H], means of `tokens` consecutive keys each of
      `selected`, if the blocks are selected by means. One is valid once its
      last token is in the cache. The keys of an incomplete one are in
      `selected`, so that it needs no ring.
  """

  selected: KV | None
  compressed: KV | None
  window: KV | None
  tail: KV | None
  lengths: Array
  earliest: Array
  scales: KV | None = None
  means: Array | None = None


export.register_namedtuple_serialization(
  Cache, serialized_name="nsa_jax.cache.Cache"
)


def init(
  batch: int,
  capacity: int,
  *,
  config: NSAConfig,
  num_kv_heads: int,
  head_dim: int,
  value_head_dim: int | None = None,
  max_append: int = 1,
  share_kv: bool = False,
  kind: AttentionName = "nsa",
  select: Select = None,
  dtype: Any = jnp.float32,
) -> Cache:
  """An empty cache, all zeros.

  Args:
    batch: B.
    capacity: S, maximum tokens per batch row; rounded up to a multiple of
      `selection_block`. A cache of kind "window" has no limit.
    config: the algorithm's hyper-parameters.
    num_kv_heads: K.
    head_dim: H, of keys.
    value_head_dim: V, of values; H by default.
    max_append: A, the maximum number of tokens that one `append` adds and that
      `rewind` removes.
    share_kv: the window reads the keys and values of the selected branch.
    kind: "nsa"; "full", for attention to all tokens; or "window", for
      attention to the last w tokens.
    select: that of `attend`. With "means" or a SelectByMeans, whose `tokens`
      divide `selection_block`, a cache of kind "nsa" keeps the means; anything
      else needs nothing of it.
    dtype: dtype of keys and values, one that the ops take: float16, bfloat16,
      float32 or float64.

  Returns:
    A Cache with `lengths` 0.

  Raises:
    ValueError: if an argument breaks a rule.

  Example:
    >>> from nsa_jax import NSAConfig, cache
    >>> empty = cache.init(
    ...   2, 1000, config=NSAConfig(), num_kv_heads=1, head_dim=8
    ... )
    >>> empty.selected.key.shape, empty.compressed.key.shape
    ((2, 1024, 1, 8), (2, 63, 1, 8))
  """
  check_config(config)
  batch = _checks.static_int("batch", batch, 1)
  capacity = _checks.static_int("capacity", capacity, 1)
  heads = _checks.static_int("num_kv_heads", num_kv_heads, 1)
  head_dim = _checks.static_int("head_dim", head_dim, 1)
  value_dim = head_dim
  if value_head_dim is not None:
    value_dim = _checks.static_int("value_head_dim", value_head_dim, 1)
  extra = _checks.static_int("max_append", max_append, 1) - 1
  _checks.flag("share_kv", share_kv)
  _checks.choice("kind", kind, KINDS)
  dtype = _checks.dtype("dtype", dtype)
  select = check_select(select, config)

  def empty(rows):
    return KV(
      jnp.zeros((batch, rows, heads, head_dim), dtype),
      jnp.zeros((batch, rows, heads, value_dim), dtype),
    )

  blocks = geometry.num_selection_blocks(capacity, config)
  capacity = blocks * config.selection_block
  nsa = kind == "nsa"
  own_window = kind == "window" or (nsa and not share_kv)
  means = None
  if nsa and isinstance(select, SelectByMeans):
    count = geometry.num_compressed_blocks(capacity, select.blocks(config))
    means = empty(count).key
  return Cache(
    selected=None if kind == "window" else empty(capacity),
    compressed=empty(geometry.num_compressed_blocks(capacity, config))
    if nsa
    else None,
    window=empty(config.window + extra) if own_window else None,
    tail=empty(config.compression_block + extra) if nsa else None,
    lengths=jnp.zeros(batch, jnp.int32),
    earliest=jnp.zeros(batch, jnp.int32),
    means=means,
  )


def mean_tokens(cache: Cache, name: str = "cache") -> int:
  """Tokens of each mean that a cache keeps; 0 if it keeps none.

  Raises:
    ValueError: if it cannot have so many.
  """
  if cache.means is None:
    return 0
  if cache.selected is None:
    raise ValueError(f"`{name}.means` must be None without `selected`.")
  count, length = cache.means.shape[-3], cache.selected.key.shape[-3]
  if not count or length % count:
    raise ValueError(
      f"`{name}.means` of shape {cache.means.shape} must have a number of rows "
      f"that divides {length}, the tokens of `{name}.selected`."
    )
  return length // count


def named_parts(name: str, field: Any) -> dict[str, Any]:
  """The arrays of a field of a cache by their names: a pair, or the means."""
  if name.endswith(".means"):
    return {name: field}
  pair = _checks.two(name, field)
  return {f"{name}.{part}": x for part, x in pair._asdict().items()}


def check_cache(cache: Any, name: str = "cache") -> Cache:
  """Validates the cache of one layer and returns it with arrays of jax.

  Raises:
    ValueError: if something is not as `init` makes it.
  """
  lengths, earliest = check_lengths(cache, name)
  _checks.shape(f"{name}.lengths", lengths, (None,), "[B]")
  fields: dict[str, Any] = {"lengths": lengths, "earliest": earliest}
  first: dict[str, Array] = {}  # the first key and the first value
  dtype = None
  for field in ("selected", "compressed", "window", "tail", "means"):
    pair = getattr(cache, field)
    if pair is None:
      continue
    parts = named_parts(f"{name}.{field}", pair)
    rows = None
    for label, x in parts.items():
      part = "value" if label.endswith("value") else "key"
      x = _checks.array(label, x, 4, "[B, S, K, H]")
      if field == "selected" and cache.scales is not None:
        _check_int8(label, x)
      else:
        _checks.floating(label, x)
        dtype = dtype or x.dtype
        if x.dtype != dtype:
          raise ValueError(
            f"`{label}` of dtype {x.dtype} must have the dtype of the rest of "
            f"the cache, {dtype}."
          )
      _checks.not_empty(label, x, axes=(0, 2, 3))
      like = first.setdefault(part, x)
      heads = first["key"].shape[2]
      _checks.shape(
        label,
        x,
        (lengths.shape[0], rows, heads, like.shape[3]),
        "B, K, H and V are the same in all of the cache",
      )
      rows = x.shape[1]
      parts[label] = x
    fields[field] = KV(*parts.values()) if len(parts) > 1 else x
  if cache.scales is not None:
    fields["scales"] = _check_scales(name, cache.scales, fields.get("selected"))
  nsa = cache.compressed is not None
  if nsa != (cache.tail is not None) or (nsa and cache.selected is None):
    raise ValueError(
      f"`{name}` has the fields {[*fields][2:]}; `compressed` and `tail` come "
      "together, and with `selected`."
    )
  cache = cache._replace(**fields)
  mean_tokens(cache, name)  # Raises if there cannot be so many.
  return cache


def _check_int8(label, x):
  if x.dtype != jnp.int8:
    raise ValueError(
      f"`{label}` of dtype {x.dtype} must be int8, as it has `scales`."
    )


def _check_scales(name, scales, selected):
  """Validates the field `scales` of a cache and returns it."""
  parts = _checks.two(f"{name}.scales", scales)._asdict()
  if selected is None:
    raise ValueError(f"`{name}.scales` must be None without `selected`.")
  for part, x in parts.items():
    label = f"{name}.scales.{part}"
    like = getattr(selected, part)
    x = _checks.array(label, x, like.ndim - 1, "[B, S, K]")
    _checks.shape(label, x, like.shape[:-1], "one for each key or value")
    _checks.floating(label, x)
    parts[part] = x
  return KV(**parts)


def check_lengths(cache: Any, name: str = "cache") -> tuple[Array, Array]:
  """Validates `lengths` and `earliest` of a cache, stacked or not."""
  if not isinstance(cache, Cache):
    raise ValueError(
      f"`{name}` of type {type(cache).__name__} must be a Cache, as `init` "
      "returns."
    )
  integers = []
  for field in ("lengths", "earliest"):
    label = f"{name}.{field}"
    x = _checks.as_array(getattr(cache, field))
    if x is None or not x.ndim:
      raise ValueError(
        f"`{label}`={_checks.show(getattr(cache, field))} must be an array of "
        "shape [B]."
      )
    _checks.integer_dtype(label, x)
    integers.append(_checks.clip_int32(x))
  lengths, earliest = integers
  _checks.shape(
    f"{name}.earliest", earliest, lengths.shape, f"that of `{name}.lengths`"
  )
  return lengths, earliest


def check_batch(name: str, x: Array, held: Cache) -> None:
  """Checks that x [B, ...] has a row for each row of a cache."""
  batch = held.lengths.shape[-1]  # A scanned model stacks its layers.
  if x.shape[0] != batch:
    raise ValueError(
      f"`{name}` has {x.shape[0]} rows, which must be the {batch} of the cache."
    )


def num_bytes(cache: Any) -> int:
  """Size in bytes of a cache or of a model's `cache` collection.

  Args:
    cache: a pytree of arrays or of `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: if a leaf is neither.

  Example:
    >>> import functools, jax
    >>> from nsa_jax import NSAConfig, cache
    >>> make = functools.partial(
    ...   cache.init, 1, 65536, config=NSAConfig(), num_kv_heads=4,
    ...   head_dim=128, dtype="bfloat16"
    ... )
    >>> cache.num_bytes(jax.eval_shape(make)) / 2**20  # MiB
    137.06055450439453
  """
  total = 0
  for leaf in jax.tree.leaves(cache):
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      raise ValueError(
        f"`cache` holds {_checks.show(leaf)}; it must be a pytree of arrays or "
        "of jax.ShapeDtypeStruct."
      )
    total += math.prod(leaf.shape) * leaf.dtype.itemsize
  return total


def bytes_per_token(
  *,
  config: NSAConfig,
  num_kv_heads: int,
  head_dim: int,
  value_head_dim: int | None = None,
  kind: AttentionName = "nsa",
  select: Select = None,
  dtype: Any = jnp.float32,
  quantized: bool = False,
) -> float:
  """Bytes per batch row of a cache and per token of capacity.

      K (H + V) itemsize (1 + 1 / d)

  for kind "nsa", without the 1 / d for kind "full", and 0 for kind "window".
  After `quantize` the 1 is 1 / itemsize, and there are 8 K more for the scales.
  Selection by means adds K H itemsize / tokens.

  Args:
    config: `compression_stride` (d) is read.
    num_kv_heads: K.
    head_dim: H.
    value_head_dim: V; H by default.
    kind: as in `init`.
    select: as in `init`.
    dtype: dtype of keys and values.
    quantized: whether `quantize` made the cache.

  Raises:
    ValueError: if an argument breaks a rule.

  Example:
    >>> from nsa_jax import NSAConfig, cache
    >>> cache.bytes_per_token(
    ...   config=NSAConfig(), num_kv_heads=4, head_dim=128, dtype="bfloat16"
    ... )
    2176.0
  """
  check_config(config)
  _checks.flag("quantized", quantized)
  _checks.choice("kind", kind, KINDS)
  heads = _checks.static_int("num_kv_heads", num_kv_heads, 1)
  key_dim = _checks.static_int("head_dim", head_dim, 1)
  value_dim = key_dim
  if value_head_dim is not None:
    value_dim = _checks.static_int("value_head_dim", value_head_dim, 1)
  width = key_dim + value_dim
  itemsize = _checks.dtype("dtype", dtype).itemsize
  row = heads * width * itemsize
  select = check_select(select, config)
  if kind == "window":
    return 0.0
  token = heads * (width + 2 * _SCALE.itemsize) if quantized else row
  if kind == "nsa":
    token += row / config.compression_stride
    if isinstance(select, SelectByMeans):
      token += heads * key_dim * itemsize / select.tokens
  return float(token)


def quantize(cache: _T) -> _T:
  """Keys and values of the selected branch (or of full attention) in 8 bit.

  Each key and each value of a head gets a scale of its own, a 127th of its
  largest magnitude, so that appended tokens change no earlier ones. The
  compressed blocks, which are 1/d of the size, and the rings, whose size does
  not depend on the capacity, stay as they are, and so does the selection of
  blocks, except by means: these become the means of the keys in 8 bit.

  The functions of this module and the layers take such a cache as any other:
  they quantize what they append, and attend to its dequantized values.

  Args:
    cache: a Cache, or any pytree of them, such as the `cache` collection of a
      model; empty or not.

  Returns:
    The same pytree with `selected` in int8 and `scales`. A Cache without
    `selected`, of kind "window", or with `scales` does not change.

  Raises:
    ValueError: if it is no pytree of Cache.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   1, 65536, config=NSAConfig(), num_kv_heads=1, head_dim=128,
    ...   dtype="bfloat16"
    ... )
    >>> small = cache.quantize(held)
    >>> small.selected.key.dtype, small.scales.key.shape
    (dtype('int8'), (1, 65536, 1))
    >>> round(cache.num_bytes(small) / cache.num_bytes(held), 2)
    0.55
  """

  def one(held: Cache) -> Cache:
    lengths, _ = check_lengths(held)
    if held.selected is None or held.scales is not None:
      return held
    parts = _checks.two("cache.selected", held.selected)._asdict()
    for part, x in parts.items():
      label = f"cache.selected.{part}"
      x = _checks.array(label, x, lengths.ndim + 3, "[..., B, S, K, H]")
      _checks.floating(label, x)
      _checks.not_empty(label, x, axes=(x.ndim - 1,))
      parts[part] = x
    small, scales = _quantized(KV(**parts))
    means = held.means
    if means is not None:
      key, rank = parts["key"], lengths.ndim + 3
      means = _checks.array("cache.means", means, rank, "[..., B, n, K, H]")
      size = mean_tokens(held._replace(means=means))
      shape = *key.shape[:-3], means.shape[-3], *key.shape[-2:]
      _checks.shape("cache.means", means, shape, "as of `cache.selected.key`")
      ends = jnp.arange(size, key.shape[-3] + 1, size)
      complete = (ends <= lengths[..., None])[..., None, None]
      new = _means(small.key, scales.key, size, means.dtype)
      means = jnp.where(complete, new, means)
    return held._replace(selected=small, scales=scales, means=means)

  return map_caches(one, cache=cache)


def _quantized(pair):
  """int8 of the shape of a pair, and scales without its last axis."""

  def scale_of(x):
    return (jnp.abs(x).max(axis=-1).astype(_SCALE) / 127).astype(_SCALE)

  def round_by(x, scale):
    # With a scale of 0 or not finite the product is so, whatever is rounded.
    scale = jnp.where(scale > 0, scale, 1)[..., None]
    return jnp.round(x.astype(_SCALE) / scale).clip(-127, 127).astype(jnp.int8)

  scales = jax.tree.map(scale_of, pair)
  return jax.tree.map(round_by, pair, scales), scales


def dequantized(selected: _T, scales: _T | None, dtype: Any) -> _T:
  """Keys and values of a cache's `selected`, or one of both, in `dtype`.

  Elementwise, so that XLA computes only the entries that are read.

  Args:
    selected: [B, S, K, H or V].
    scales: [B, S, K], or None if `selected` is not quantized.
    dtype: of the result if it is.
  """
  if scales is None:
    return selected
  return jax.tree.map(
    lambda x, scale: (x * scale[..., None]).astype(dtype), selected, scales
  )


def append(
  cache: Cache,
  *,
  config: NSAConfig,
  compressed: KV | None = None,
  selected: KV | None = None,
  window: KV | None = None,
  compress: Compress | None = None,
  counts: Array | None = None,
) -> Cache:
  """Adds up to `max_append` tokens to every batch row.

  phi is applied only to the blocks that these tokens complete, at most
  ceil(T / d) per call.

  Args:
    cache: a cache of B rows.
    config: the one given to `init`.
    compressed: inputs of phi, keys [B, T, K, H] and values [B, T, K, V].
    selected: keys and values of the selected branch (or of full attention).
    window: keys and values of the window.
    compress: phi; maps keys and values of (n - 1) d + l tokens, and the index
      of the first token of each block, int32 [B, n], to n blocks.
    counts: int32 [B], the number of tokens appended to each row, T by default.
      Later tokens of a row are not read.

  `compressed`, `selected`, `window` and `compress` must be None exactly if the
  cache does not have the field (for `compress`: `tail`).

  Returns:
    The cache with the new tokens. If lengths are traced, tokens beyond the
    capacity are dropped, `lengths` stays at the capacity and earlier tokens are
    not modified; `attend` returns 0 for dropped tokens.

  Raises:
    ValueError: if an argument does not fit, or if lengths are concrete and the
      tokens exceed the capacity.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import KV, NSAConfig, cache, compress_mean
    >>> config = NSAConfig(8, 4, 16, num_selected=4, window=16)
    >>> held = cache.init(1, 64, config=config, num_kv_heads=1, head_dim=8)
    >>> def phi(tokens, first):
    ...   return KV(*(compress_mean(x, config=config) for x in tokens))
    >>> new = KV(jnp.ones((1, 1, 1, 8)), jnp.ones((1, 1, 1, 8)))
    >>> held = cache.append(
    ...   held, config=config, compressed=new, selected=new, window=new,
    ...   compress=phi
    ... )
    >>> held.lengths.tolist()
    [1]
  """
  new = (selected, compressed, window)
  cache, new, counts = _check_new(cache, new, compress, counts, config)
  length = jax.tree.leaves(new)[0].shape[1]
  most = checked_max_append(cache, config)
  if most is not None and length > most:
    raise ValueError(
      f"`append` of {length} tokens: at most `max_append`={most}; `prefill` "
      "takes any number."
    )
  return _append(cache, new, compress, counts, config)


def prefill(
  cache: Cache,
  *,
  config: NSAConfig,
  compressed: KV | None = None,
  selected: KV | None = None,
  window: KV | None = None,
  compress: Compress | None = None,
  counts: Array | None = None,
) -> tuple[Cache, KV | None]:
  """Adds any number of tokens to every batch row: a prompt or a chunk of one.

  The window's ring keeps only the last w + A - 1 tokens, but the first queries
  of a longer chunk read earlier ones. This function therefore returns the
  window's keys and values for `attend`.

  Args:
    cache: a cache of B rows.
    config: the one given to `init`.
    compressed: as in `append`, with any T.
    selected: as in `append`, with any T.
    window: as in `append`, with any T.
    compress: as in `append`.
    counts: as in `append`.

  Returns:
    The cache, as from `append`, and the argument `prefill_window` of `attend`:
    keys and values [B, w - 1 + T, K, H or V] of the w - 1 tokens before the
    chunk and of the chunk, or None if the cache has no ring for the window.

  Raises:
    ValueError: as in `append`.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import KV, NSAConfig, cache, compress_mean
    >>> config = NSAConfig(8, 4, 16, num_selected=4, window=16)
    >>> held = cache.init(2, 64, config=config, num_kv_heads=1, head_dim=8)
    >>> def phi(tokens, first):
    ...   return KV(*(compress_mean(x, config=config) for x in tokens))
    >>> new = KV(jnp.ones((2, 40, 1, 8)), jnp.ones((2, 40, 1, 8)))
    >>> held, window = cache.prefill(
    ...   held, config=config, compressed=new, selected=new, window=new,
    ...   compress=phi, counts=jnp.array([40, 3])
    ... )
    >>> held.lengths.tolist(), window.key.shape
    ([40, 3], (2, 55, 1, 8))
  """
  new = (selected, compressed, window)
  cache, new, counts = _check_new(cache, new, compress, counts, config)
  chunk = None
  if cache.window is not None:
    chunk = _with_last(cache.window, new[2], cache.lengths, config.window - 1)
  return _append(cache, new, compress, counts, config), chunk


def rewind(cache: _T, lengths: int | Array) -> _T:
  """Removes the newest tokens, for example rejected speculative ones.

  Only `lengths` changes. Blocks that become incomplete are compressed again
  once new tokens complete them.

  A row may lose at most `max_append` tokens, counted from its greatest length
  since it was last empty, because the rings do not hold more: the new length is
  `cache.earliest` or more, or 0, which empties the row.

  Args:
    cache: a Cache, or any pytree of them, such as the `cache` collection of a
      model.
    lengths: int32 [B] or (), the new lengths. A row that is already as short
      does not change.

  Returns:
    The same pytree with the new lengths.

  Raises:
    ValueError: if a shape or dtype does not fit, or a concrete length is
      negative or too short. If lengths are traced and too short, the next
      attention is undefined; the layers return NaN.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   2, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8
    ... )._replace(lengths=jnp.array([9, 7]))
    >>> cache.rewind(held, jnp.array([8, 8])).lengths.tolist()
    [8, 7]
  """

  def one(part: Cache) -> Cache:
    held, earliest = check_lengths(part)
    # A scanned model stacks its layers on an axis before the batch.
    given = _checks.as_array(lengths)
    shape = held.shape[-1:] if given is None or given.ndim else ()
    new = _checks.integers(
      "lengths", lengths, shape, "one entry per row of `cache`"
    )
    known = _checks.concrete(lengths)
    if known is not None and known.size and known.min() < 0:
      raise ValueError(
        f"`lengths` has the value {known.min()}, which must be at least 0."
      )
    new = jnp.broadcast_to(new, held.shape).clip(0, held)
    wrong = _checks.concrete((new > 0) & (new < earliest) & (new < held))
    if wrong is not None and wrong.any():
      raise ValueError(
        f"`lengths`={np.asarray(new).tolist()} must be 0 or at least "
        f"{np.asarray(earliest).tolist()}: the rings have lost what shorter "
        "rows need; a larger `max_append` keeps more."
      )
    return part._replace(lengths=new)

  return map_caches(one, cache=cache)


def map_caches(function: Callable[..., Cache], **caches: Any) -> Any:
  """Maps the caches of the layers in pytrees of the same structure.

  Args:
    function: gets a Cache of each pytree.
    caches: pytrees of Cache, by the names of the arguments that they are.

  Returns:
    A pytree like the first.

  Raises:
    ValueError: if a pytree holds something else, or another structure.
  """

  def is_cache(part: Any) -> bool:
    return isinstance(part, Cache)

  flat: dict[str, tuple[list[Any], Any]] = {}
  for name, tree in caches.items():
    leaves = jax.tree.leaves(tree, is_leaf=is_cache)
    if not leaves:
      raise ValueError(
        f"`{name}` of type {type(tree).__name__} must be a pytree of Cache."
      )
    for part in leaves:
      if not is_cache(part):
        raise ValueError(
          f"`{name}` holds a {type(part).__name__}; it must be a pytree of "
          "Cache."
        )
    flat[name] = leaves, jax.tree.structure(tree, is_leaf=is_cache)
  (first, (_, structure)), *others = flat.items()
  for name, (_, other) in others:
    if other != structure:
      raise ValueError(
        f"`{name}` must have the layers of `{first}`, of the same model: "
        f"{other} differs from {structure}."
      )
  parts = zip(*(leaves for leaves, _ in flat.values()), strict=True)
  return jax.tree.unflatten(structure, [function(*one) for one in parts])


def too_short(cache: Cache, lengths: Array) -> Array:
  """Batch rows, bool [B], that cannot continue from these lengths.

  Args:
    cache: only `earliest` is read.
    lengths: int32 [B].

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   3, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8
    ... )._replace(earliest=jnp.array([8, 8, 8]))
    >>> cache.too_short(held, jnp.array([0, 7, 8])).tolist()
    [False, True, False]
  """
  _, earliest = check_lengths(cache)
  known = jnp.asarray(_checks.offset("lengths", lengths, (earliest.shape, ())))
  return (known > 0) & (known < earliest)


def max_append(cache: Cache, config: NSAConfig) -> int | None:
  """A of a cache, from the sizes of its rings; None if it has no ring.

  Args:
    cache: a cache made by `init`.
    config: the one given to `init`.

  Raises:
    ValueError: if the sizes of the cache do not match `config`.

  Example:
    >>> from nsa_jax import NSAConfig, cache
    >>> cache.max_append(
    ...   cache.init(
    ...     1, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8, max_append=4
    ...   ),
    ...   NSAConfig(),
    ... )
    4
  """
  check_config(config)
  return checked_max_append(check_cache(cache), config)


def checked_max_append(cache: Cache, config: NSAConfig) -> int | None:
  """`max_append` of validated arguments."""
  most = set()
  if cache.tail is not None:
    most.add(cache.tail.key.shape[1] - config.compression_block + 1)
  if cache.window is not None:
    most.add(cache.window.key.shape[1] - config.window + 1)
  fits = not most or (len(most) == 1 and min(most) > 0)
  if cache.selected is not None and cache.compressed is not None:
    capacity = cache.selected.key.shape[1]
    blocks = geometry.num_compressed_blocks(capacity, config)
    fits &= blocks == cache.compressed.key.shape[1]
    fits &= not capacity % config.selection_block
    fits &= not config.selection_block % (mean_tokens(cache) or 1)
  if not fits:
    sizes = {
      name: pair.key.shape[1]
      for name, pair in zip(Cache._fields, cache, strict=True)
      if isinstance(pair, KV) and name != "scales"
    }
    if cache.means is not None:
      sizes["means"] = cache.means.shape[1]
    raise ValueError(
      f"`config`={config} must be that of `init`: it does not fit the rows of "
      f"the cache, {sizes}."
    )
  return min(most, default=None)


def _check_new(cache, new, compress, counts, config):
  """Validates the cache, the new tokens and `counts`, and returns them."""
  check_config(config)
  cache = check_cache(cache)
  checked_max_append(cache, config)  # Raises if they do not fit.
  batch = cache.lengths.shape[0]
  fields = {
    "selected": (cache.selected, new[0]),
    "compressed": (cache.tail, new[1]),
    "window": (cache.window, new[2]),
  }
  length = 0
  for name, (held, pair) in fields.items():
    if held is None:
      if pair is not None:
        raise ValueError(f"`{name}` must be None: the cache does not keep it.")
      continue
    pair = _checks.two(name, pair)
    for part, old, x in zip(KV._fields, held, pair, strict=True):
      label = f"{name}.{part}"
      x = _checks.array(label, x, 4, "[B, T, K, H]")
      length = length or x.shape[1]
      _checks.shape(
        label,
        x,
        (batch, length, *old.shape[2:]),
        "B, K, H and V of the cache, and one T for `compressed`, "
        "`selected` and `window`",
      )
      _checks.not_empty(label, x, axes=(1,))
      if name == "selected" and cache.scales is not None:
        _checks.floating(label, x)
      elif x.dtype != old.dtype:
        raise ValueError(
          f"`{label}` of dtype {x.dtype} must have the dtype of the cache, "
          f"{old.dtype}."
        )
  if not (compress is None if cache.tail is None else callable(compress)):
    raise ValueError(
      f"`compress`={_checks.show(compress)} must be a function for a cache "
      "of kind 'nsa', and None for others."
    )
  new = tuple(
    None if pair is None else KV(*map(jnp.asarray, pair)) for pair in new
  )
  known = _checks.concrete(counts)
  if counts is None:
    # The batch may be symbolic, as in `jax.export`.
    known = np.full(batch if isinstance(batch, int) else 1, length)
    counts = jnp.full(batch, length, jnp.int32)
  else:
    counts = _checks.integers(
      "counts", counts, (batch,), "one entry per row of `cache`"
    )
    if known is not None and (known.min() < 0 or known.max() > length):
      raise ValueError(
        f"`counts`={known.tolist()} must lie in [0, {length}], the tokens "
        "given."
      )
    counts = counts.clip(0, length)
  if cache.selected is not None and known is not None:
    capacity = cache.selected.key.shape[1]
    held = _checks.concrete(cache.lengths)
    # Traced lengths are at least 0.
    total = known + (0 if held is None else held)
    if (total > capacity).any():
      raise ValueError(
        f"the cache's capacity of {capacity} tokens must hold {total.max()}: "
        f"`lengths`={held if held is None else held.tolist()} and "
        f"`counts`={known.tolist()} more."
      )
  return cache, new, counts


def _append(cache, new, compress, counts, config):
  selected, compressed, window = new
  length = jax.tree.leaves(new)[0].shape[1]
  lengths = cache.lengths
  stop = lengths + counts
  fields = {}
  if cache.selected is not None:
    capacity = cache.selected.key.shape[1]
    stop = jnp.minimum(stop, capacity)
    positions = query_positions(lengths, *selected.key.shape[:2])
    valid = positions < stop[:, None]
    if cache.scales is not None:
      selected, scales = _quantized(selected)
      fields["scales"] = _write(cache.scales, scales, positions, valid)
    fields["selected"] = _write(cache.selected, selected, positions, valid)
    if cache.means is not None:
      added = cache._replace(**fields)
      fields["means"] = _with_means(added, stop, length)
  if cache.window is not None:
    fields["window"] = _write_ring(cache.window, window, lengths, stop)
  if cache.tail is not None:
    # The first incomplete block of a row starts after position length - l, so
    # it contains at most the last l - 1 tokens before the new ones.
    span, stride = config.compression_block, config.compression_stride
    blocks = -(-length // stride)  # most blocks that T tokens can complete
    first = jnp.maximum((lengths - span) // stride + 1, 0)
    index = query_positions(first, first.shape[0], blocks)
    tokens = _with_last(cache.tail, compressed, lengths, span - 1)
    rows = query_positions(
      first * stride - lengths + span - 1,
      first.shape[0],
      (blocks - 1) * stride + span,
    )
    done = compress(take_rows(tokens, rows), index * stride)
    done = _checks.two("compress(...)", done)
    for name, x, old in zip(KV._fields, done, cache.compressed, strict=True):
      x = _checks.array(f"compress(...).{name}", x, 4, "[B, n, K, H]")
      _checks.shape(
        f"compress(...).{name}",
        x,
        (first.shape[0], blocks, *old.shape[2:]),
        "a block for each first token, with K, H and V of the cache",
      )
    complete = index * stride + span <= stop[:, None]
    fields["compressed"] = _write(cache.compressed, done, index, complete)
    fields["tail"] = _write_ring(cache.tail, compressed, lengths, stop)
  most = checked_max_append(cache, config)
  if most is not None:
    new = jnp.maximum(stop - most, 0)
    earliest = jnp.where(lengths > 0, jnp.maximum(cache.earliest, new), new)
    if cache.tail is not None:
      # Blocks that are completed without the lost inputs of phi stay wrong.
      lost = too_short(cache, lengths)
      earliest = jnp.where(lost, _checks.INT32.max, earliest)
    fields["earliest"] = earliest
  return cache._replace(lengths=stop, **fields)


def _means(keys, scales, size, dtype):
  """Means of `size` keys each, [..., n, K, H] of [..., n size, K, H]."""
  keys = dequantized(keys, scales, dtype).astype(sum_dtype(dtype))
  keys = keys.reshape(*keys.shape[:-3], -1, size, *keys.shape[-2:])
  return keys.mean(axis=-3).astype(dtype)


def _with_means(cache, stop, length):
  """`cache.means` with those that at most `length` new tokens complete.

  The new tokens are in `cache.selected`; `cache.lengths` does not count them.
  """
  size = mean_tokens(cache)
  count = -(-length // size)
  batch, first = stop.shape[0], cache.lengths // size
  index = query_positions(first, batch, count)
  rows = query_positions(first * size, batch, count * size)
  scales = None if cache.scales is None else cache.scales.key
  keys, scales = take_rows((cache.selected.key, scales), rows)
  means = _means(keys, scales, size, cache.means.dtype)
  return _write(cache.means, means, index, (index + 1) * size <= stop[:, None])


def _write(held, new, rows, valid):
  """Writes n keys and values to indices `rows` [B, n] where `valid`."""
  batch, size = jax.tree.leaves(held)[0].shape[:2]
  # Invalid entries go out of range and are dropped. All indices differ, so that
  # the scatter needs no order.
  place = jnp.where(valid, rows, size + jnp.arange(rows.shape[1]))
  index = jnp.arange(batch)[:, None], place

  def one(held, new):
    return held.at[index].set(
      new,
      mode="drop",
      unique_indices=True,
      wrap_negative_indices=False,
      out_sharding=explicit_sharding(held),
    )

  return jax.tree.map(one, held, new)


def _write_ring(held, new, lengths, stop):
  """Writes the newest keys and values to a ring, position p to p % R."""
  size, length = held.key.shape[1], new.key.shape[1]
  positions = query_positions(lengths, lengths.shape[0], length)
  if length > size:  # Only the last `size` tokens that are not padding.
    start = jnp.maximum(stop - size, lengths)
    positions = query_positions(start, lengths.shape[0], size)
    new = take_rows(new, positions - lengths[:, None])
  return _write(held, new, positions % size, positions < stop[:, None])


def _with_last(held, new, lengths, count):
  """The last `count` entries of a ring, followed by the new ones."""
  token = query_positions(lengths - count, lengths.shape[0], count)
  last = ring_rows(held, token)
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), last, new)


def take_rows(pair: _T, rows: Array) -> _T:
  """Gathers arrays [B, S, ...] at `rows` [B, n], clipped to [0, S)."""
  index = jnp.arange(rows.shape[0])[:, None], rows

  def one(x):
    return x.at[index].get(
      mode="clip",
      wrap_negative_indices=False,
      out_sharding=explicit_sharding(x),
    )

  return jax.tree.map(one, pair)


def ring_rows(pair: KV, positions: Array) -> KV:
  """Gathers a ring at `positions` [B, n]; position p is stored at p % R."""
  return take_rows(pair, positions % pair.key.shape[1])
