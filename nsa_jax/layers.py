"""Flax (linen) layer around the op: projections, RoPE, phi, gates.

What the parameters are is decided here; what is computed from them is in
`attention.py`, `compression.py` and `rope.py`, which this module only calls.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer, PrecisionLike

from nsa_jax import _checks, cache, compression, dispatch
from nsa_jax.attention import native_sparse_attention
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.rope import RopeConfig, apply_rope, check_head_dim
from nsa_jax.typing import KV, Array, Implementation

BRANCHES = ("compressed", "selected", "window")
COMPRESSIONS = ("mean", "weighted", "linear", "mlp")
ROPE_COMPRESSED = ("block", "tokens", "none")


class NativeSparseAttention(nn.Module):
  """Causal self-attention by Native Sparse Attention (arXiv 2502.11089).

      out = sum over c of gate_c * Attn_c(query, K_c, V_c)          (Eq. 5)

  for c in compressed, selected, window. It stands where
  `nn.MultiHeadDotProductAttention` stood for causal self-attention. Sows
  `gates` [B, T, N, 3] and `block_ids` [B, T, K, n] into the collection
  `intermediates`.

  Attributes:
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides `num_heads`. All N / K heads of a
      group read the same blocks.
    head_dim: H, of queries and keys; even if `rope` is used.
    value_head_dim: V, of values; `head_dim` by default.
    config: the algorithm's hyper-parameters.
    compression: phi, "mlp" (the paper's), "linear", "weighted" or "mean";
      separate parameters for keys and values.
    share_kv: one key and one value projection for all branches, instead of
      the paper's own pair for each.
    rope_compressed: "block": phi sees keys that are not rotated, its output is
      rotated to the position of the block's first token; "tokens": phi sees
      rotated keys; "none": the compressed branch and the selection use neither
      rotated keys nor rotated queries.
    rope: rotary embedding, or None for no positions at all.
    normalize_qk: RMSNorm over H of the queries and of the keys that enter a
      dot product (phi's output in the compressed branch), before rotation;
      the query and each key have a learned scale.
    dtype: of the computation; by default that of the input and parameters,
      promoted. The gates and the softmax are in float32 at least.
    param_dtype: of the parameters.
    precision: of the projections, as in `nn.DenseGeneral`.
    kernel_init: initialiser of all projections; `nn.with_partitioning` works.
      The parameters of phi have initialisers of their own, not partitioned.
    use_bias: biases in the projections.
    implementation: as in `native_sparse_attention`.
    decode: append to a decode cache and attend over it. `init` with
      x [B, capacity, D] makes it in the collection `cache`; then
      `apply({"params": ..., "cache": ...}, x, mutable=["cache"])` takes the
      next T >= 1 tokens of every row, a prompt or one token alike. An empty
      cache is all zeros, so the shapes that `jax.eval_shape` gives for `init`
      suffice to make one. `nsa_jax.cache` has `rewind` and the functions below.
    max_append: tokens that `cache.rewind` can take back; up to as many are
      attended by the kernels for decoding, more as a prompt.

  Raises:
    ValueError: if an attribute or argument does not fit.
    NotImplementedError: if no implementation asked for can do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NativeSparseAttention, NSAConfig
    >>> config = NSAConfig(8, 4, 16, num_selected=4, window=16)
    >>> layer = NativeSparseAttention(
    ...   num_heads=4, num_kv_heads=2, head_dim=8, config=config
    ... )
    >>> x = jnp.ones((1, 64, 32))
    >>> out, params = jax.jit(layer.init_with_output)(jax.random.key(0), x)
    >>> out.shape
    (1, 64, 32)
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  value_head_dim: int | None = None
  config: NSAConfig = NSAConfig()
  compression: str = "mlp"
  share_kv: bool = False
  rope_compressed: str = "block"
  rope: RopeConfig | None = RopeConfig()
  normalize_qk: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: PrecisionLike = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  use_bias: bool = False
  implementation: Implementation = None
  decode: bool = False
  max_append: int = 1

  def __post_init__(self):
    check_attributes(self)
    check_config(self.config)
    _checks.flag("use_bias", self.use_bias)
    _checks.flag("decode", self.decode)
    _checks.static_int("max_append", self.max_append, 1)
    if self.dtype is not None:
      _checks.dtype("dtype", self.dtype)
    if not callable(self.kernel_init):
      raise ValueError(
        f"`kernel_init`={self.kernel_init!r} must be an initialiser function."
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: Array,
    inputs_k: None = None,
    inputs_v: None = None,
    *,
    mask: None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    deterministic: bool | None = None,
    dropout_rng: Array | None = None,
    sow_weights: bool = False,
    prefix_length: int | None = None,
  ) -> Array:
    """Attends from every token to the tokens before it.

    Args:
      x: [B, T, D].
      inputs_k: must be None.
      inputs_v: must be None.
      mask: must be None; the attention is causal, `segment_ids` does the rest.
      positions: int32 [B, T] for RoPE; by default 0, 1, ... in each segment.
        With `decode` consecutive, by default from each row's length on.
      segment_ids: int32 [B, T] for packed or padded sequences: contiguous runs
        that start at multiples of `config.selection_block`; 0 is padding. With
        `decode` one run per row from its first token on, and padding after it,
        which is not appended.
      deterministic: accepted for drop-in use, without effect: no dropout.
      dropout_rng: likewise.
      sow_weights: must be False; `gates` and `block_ids` are sown instead.
      prefix_length: with `decode`, tokens that every row holds which gets new
        ones, where that is known when tracing: what lies beyond them is then
        not read, and a prompt costs what it costs without a cache. 0 starts all
        such rows anew.

    Returns:
      [B, T, D]. At padding: 0, or the bias. With `decode`, NaN for tokens that
      the cache has no room for or that do not follow `prefix_length` others,
      which are not appended, and for those that follow a rewind by too much,
      where no ValueError could be raised because lengths are traced.

    Raises:
      ValueError: if an argument does not fit.
    """
    for name, value in (("inputs_k", inputs_k), ("inputs_v", inputs_v)):
      if value is not None:
        raise ValueError(
          f"`{name}` must be None: causal self-attention only. Pass `x` alone; "
          "for padded or packed sequences pass `segment_ids`."
        )
    if mask is not None:
      raise ValueError(
        "`mask` must be None: the attention is causal. For padded or packed "
        "sequences pass `segment_ids`."
      )
    if sow_weights:
      raise ValueError(
        f"`sow_weights`={sow_weights} must be False: the weights are never "
        "materialised. `gates` and `block_ids` are sown."
      )
    del deterministic, dropout_rng
    x = _checks.array("x", x, 3, "[B, T, D]")
    _checks.floating("x", x)
    decoding = begin_decoding(self, x, segment_ids, prefix_length)
    if decoding is not None and positions is None:
      positions = decoding.positions
    positions, segment_ids = complete_positions(
      x, positions, segment_ids, self.config.selection_block
    )
    if segment_ids is not None:
      # A NaN in the padding would reach the gradients of the projections.
      x = jnp.where((segment_ids > 0)[..., None], x, 0)

    dense = functools.partial(
      nn.DenseGeneral,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      kernel_init=self.kernel_init,
    )
    heads, kv_heads = self.num_heads, self.num_kv_heads
    value_dim = self.value_head_dim or self.head_dim
    query = dense((heads, self.head_dim), name="query")(x)
    logits = dense((heads, 3), name="gate")(x)
    gates = nn.sigmoid(
      logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    )

    def project(name, dim):
      if self.share_kv:
        projected = dense((kv_heads, dim), name=name)(x)
        return dict.fromkeys(BRANCHES, projected)
      return {
        branch: dense((kv_heads, dim), name=f"{name}_{branch}")(x)
        for branch in BRANCHES
      }

    keys, values = project("key", self.head_dim), project("value", value_dim)
    query = self._normalize("query_norm", query)
    rotated_query = self._rotate(query, positions)
    selected_key, window_key = self._token_keys(keys, positions)
    tokens = KV(keys["compressed"], values["compressed"])
    if self.rope_compressed == "tokens":
      tokens = tokens._replace(key=self._rotate(tokens.key, positions))
    selected = KV(selected_key, values["selected"])
    window = KV(window_key, values["window"])
    compressed_query = query if self.rope_compressed == "none" else None
    # The ids are asked for only if somebody collects them.
    collected = self.is_mutable_collection("intermediates")
    options: dict[str, Any] = {
      "config": self.config,
      "compressed_query": compressed_query,
      "return_block_ids": collected,
      "implementation": self.implementation,
    }
    out: Any
    if decoding is None:
      compressed = self._phi(
        tokens, positions[:, :: self.config.compression_stride], segment_ids
      )
      out = native_sparse_attention(
        rotated_query,
        compressed,
        selected,
        window,
        gates,
        segment_ids=segment_ids,
        **options,
      )
      if self.decode:
        create_cache(
          self,
          tokens,
          config=self.config,
          max_append=self.max_append,
          share_kv=self.share_kv,
        )
    else:
      shift = positions - decoding.positions
      held, chunk = decoding.add(
        self,
        self.config,
        compressed=tokens,
        selected=selected,
        window=None if self.share_kv else window,
        compress=lambda tokens, first: self._phi(tokens, first + shift[:, :1]),
      )
      out = cache.attend(
        rotated_query,
        held,
        gates,
        query_offset=decoding.offset,
        window=chunk,
        **options,
      )
    if collected:
      out, block_ids = out
      if decoding is not None:
        block_ids = decoding.keep_new(block_ids, -1)
      self.sow("intermediates", "gates", gates)
      self.sow("intermediates", "block_ids", block_ids)
    if decoding is not None:
      out = decoding.keep_new(out)
    out = dense(x.shape[-1], axis=(-2, -1), name="out")(out)
    return out if decoding is None else decoding.mark_lost(out)

  def _token_keys(self, keys, positions):
    """Keys of the selected and of the window branch."""
    if self.share_kv:
      key = self._normalize("key_norm", keys["selected"])
      return (self._rotate(key, positions),) * 2
    return tuple(
      self._rotate(
        self._normalize(f"key_{branch}_norm", keys[branch]), positions
      )
      for branch in ("selected", "window")
    )

  def _phi(self, tokens, first, segment_ids=None):
    """Compressed keys and values of blocks with first tokens at `first`."""
    key = self._compress("compress_key", tokens.key, segment_ids)
    key = self._normalize("key_compressed_norm", key)
    if self.rope_compressed == "block":
      key = self._rotate(key, first[:, : key.shape[1]])
    return KV(key, self._compress("compress_value", tokens.value, segment_ids))

  def _compress(self, name, x, segment_ids):
    return CompressBlocks(
      self.compression, self.config, self.param_dtype, name=name
    )(x, segment_ids)

  def _normalize(self, name, x):
    if not self.normalize_qk:
      return x
    return nn.RMSNorm(
      dtype=self.dtype, param_dtype=self.param_dtype, name=name
    )(x)

  def _rotate(self, x, positions):
    return x if self.rope is None else apply_rope(x, positions, self.rope)


class CompressBlocks(nn.Module):
  """phi with its parameters, one set per key/value head.

  Attributes:
    kind: "mlp", "linear", "weighted" or "mean".
    config: `compression_block` and `compression_stride` are read.
    param_dtype: of the parameters.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NSAConfig
    >>> from nsa_jax.layers import CompressBlocks
    >>> phi = CompressBlocks("weighted", NSAConfig())
    >>> x = jnp.ones((1, 64, 2, 8))
    >>> phi.init_with_output(jax.random.key(0), x)[0].shape
    (1, 3, 2, 8)
  """

  kind: str
  config: NSAConfig
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
    """Compresses [B, S, K, H] keys or values to [B, C, K, H].

    The hidden layer of "mlp" has 2 H features.
    """
    heads, head_dim = x.shape[2:]
    block = self.config.compression_block
    hidden = 2 * head_dim
    zeros = nn.initializers.zeros_init()
    kernel = nn.initializers.lecun_normal(batch_axis=(0,))
    position = nn.initializers.normal(0.02)
    average = nn.initializers.constant(1 / block)
    # In the order in which the functions of `compression.py` take them.
    specs: dict[str, dict[str, Any]] = {
      "mean": {},
      "weighted": {"weight": (average, block)},
      "linear": {
        "position": (position, block, head_dim),
        "weight": (kernel, block * head_dim, head_dim),
      },
      "mlp": {
        "position": (position, block, head_dim),
        "w1": (kernel, block * head_dim, hidden),
        "b1": (zeros, hidden),
        "w2": (kernel, hidden, head_dim),
        "b2": (zeros, head_dim),
      },
    }
    params = [
      self.param(name, init, (heads, *shape), self.param_dtype)
      for name, (init, *shape) in specs[self.kind].items()
    ]
    function = getattr(compression, f"compress_{self.kind}")
    return function(x, *params, config=self.config, segment_ids=segment_ids)


class Decoding(NamedTuple):
  """A call that appends to a cache: where its tokens go.

  Attributes:
    held: the cache before them.
    counts: int32 [B], tokens each row gets: the first ones.
    offset: position of the first one, static or int32 [B].
    positions: int32 [B, T].
  """

  held: cache.Cache
  counts: Array
  offset: int | Array
  positions: Array

  def add(
    self, module: nn.Module, config: NSAConfig, **new: Any
  ) -> tuple[cache.Cache, KV | None]:
    """Appends; the new cache, and the argument `window` of `attend`."""
    most = cache.max_append(self.held, config)
    few = most is None or self.positions.shape[1] <= most
    # What does not follow has keys rotated to other positions.
    counts = jnp.where(self.offset == self.held.lengths, self.counts, 0)
    new |= {"config": config, "counts": counts}
    chunk = None
    if few:
      held = cache.append(self.held, **new)
    else:
      held, chunk = cache.prefill(self.held, **new)
    module.put_variable("cache", "kv", held)
    return held, chunk

  def keep_new(self, x: Array, fill: int = 0) -> Array:
    """x [B, T, ...] with `fill` at padding.

    With a static offset padding may lie where a row already holds tokens.
    """
    new = jnp.arange(x.shape[1]) < self.counts[:, None]
    return jnp.where(new.reshape(*new.shape, *(1,) * (x.ndim - 2)), x, fill)

  def mark_lost(self, out: Array) -> Array:
    """NaN at tokens that could not be appended where they should be."""
    held = self.held
    index = jnp.arange(out.shape[1])
    lost = cache.too_short(held, held.lengths) | (self.offset != held.lengths)
    lost = lost[:, None]
    if held.selected is not None:
      lost |= held.lengths[:, None] + index >= held.selected.key.shape[1]
    lost &= index < self.counts[:, None]
    return jnp.where(lost[..., None], jnp.nan, out)


def begin_decoding(
  module: Any,
  x: Array,
  segment_ids: Array | None,
  prefix_length: int | None,
) -> Decoding | None:
  """What a layer's call with tokens x [B, T, ...] appends to its cache.

  None if it does not decode, or makes its cache only now.
  """
  if prefix_length is not None:
    prefix_length = _checks.static_int("prefix_length", prefix_length, 0)
    if not module.decode:
      raise ValueError(f"`prefix_length`={prefix_length} needs `decode`=True.")
  if not module.decode or module.is_initializing():
    return None
  if not module.has_variable("cache", "kv"):
    raise ValueError(
      "`decode`=True needs the collection `cache`: make it by `init` with "
      "[B, capacity] tokens, and pass it beside the parameters."
    )
  if not module.is_mutable_collection("cache"):
    raise ValueError(
      '`decode`=True updates the cache: `mutable`=["cache"] must be passed.'
    )
  held = module.get_variable("cache", "kv")
  batch, length = x.shape[:2]
  if held.lengths.shape != (batch,):
    raise ValueError(
      f"`x` has {batch} rows, which must be the {held.lengths.shape[0]} of the "
      "cache."
    )
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
  positions = compression.query_positions(offset, batch, length)
  return Decoding(held, counts, offset, positions)


def create_cache(module: nn.Module, tokens: KV, **options: Any) -> None:
  """Makes an empty cache for keys and values of [B, capacity] tokens."""
  batch, capacity, heads, head_dim = tokens.key.shape
  module.variable(
    "cache",
    "kv",
    lambda: cache.init(
      batch,
      capacity,
      num_kv_heads=heads,
      head_dim=head_dim,
      value_head_dim=tokens.value.shape[-1],
      dtype=tokens.key.dtype,
      **options,
    ),
  )


def complete_positions(
  x: Array,
  positions: Array | None,
  segment_ids: Array | None,
  alignment: int,
) -> tuple[Array, Array | None]:
  """Validated int32 positions and segments of tokens `x` [B, T, ...].

  Positions restart at 0 at each segment start by default. Segments start at
  multiples of `alignment`.
  """
  if segment_ids is not None:
    given = segment_ids
    segment_ids = _checks.integers("segment_ids", segment_ids, x.shape[:2])
    _checks.segments(given, alignment)
  if positions is not None:
    return _checks.integers("positions", positions, x.shape[:2]), segment_ids
  index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
  if segment_ids is None:
    return index, None
  starts = segment_ids != jnp.roll(segment_ids, 1, axis=1)
  first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return index - first, segment_ids


def check_attributes(spec: Any) -> None:
  """Validates what the layer and the model's configuration have in common."""
  for name in ("num_heads", "num_kv_heads", "head_dim"):
    _checks.static_int(name, getattr(spec, name), 1)
  if spec.value_head_dim is not None:
    _checks.static_int("value_head_dim", spec.value_head_dim, 1)
  if spec.num_heads % spec.num_kv_heads:
    raise ValueError(
      f"`num_heads`={spec.num_heads} must be a multiple of `num_kv_heads`="
      f"{spec.num_kv_heads}."
    )
  _checks.choice("compression", spec.compression, COMPRESSIONS)
  _checks.choice("rope_compressed", spec.rope_compressed, ROPE_COMPRESSED)
  if spec.rope is not None:
    if not isinstance(spec.rope, RopeConfig):
      raise ValueError(f"`rope`={spec.rope!r} must be a RopeConfig or None.")
    check_head_dim(spec.head_dim)
  for name in ("share_kv", "normalize_qk"):
    _checks.flag(name, getattr(spec, name))
  _checks.dtype("param_dtype", spec.param_dtype)
  dispatch.names(spec.implementation)
