"""Flax (linen) attention layers over `core`: what their parameters are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from nsa_jax import _checks, cache
from nsa_jax.config import AttentionConfig, NSAConfig, check_config
from nsa_jax.layers import core
from nsa_jax.rope import RopeConfig
from nsa_jax.typing import (
  Array,
  AttentionName,
  CompressionName,
  Implementation,
  RopeCompressedName,
  Selector,
)


class NativeSparseAttention(nn.Module):
  """Causal self-attention by Native Sparse Attention (arXiv 2502.11089).

      out = sum over c of gate_c * Attn_c(query, K_c, V_c)          (Eq. 5)

  for c in compressed, selected, window. It stands where
  `nn.MultiHeadDotProductAttention` stood for causal self-attention. Sows
  `gates` [B, T, N, 3] and `block_ids` [B, T, K, n] into the collection
  `intermediates`.

  Attributes:
    num_heads: as in `AttentionConfig`; as are the next three.
    num_kv_heads: K, key/value heads.
    head_dim: H, of queries and keys.
    value_head_dim: V, of values.
    config: the algorithm's hyper-parameters, `nsa` of `AttentionConfig`.
    compression: as in `AttentionConfig`; as are all up to `implementation`.
    share_kv: one key and one value projection for all branches.
    rope_compressed: "block", "tokens" or "none".
    rope: rotary embedding, or None.
    normalize_qk: RMSNorm of queries and keys.
    dtype: of the computation.
    param_dtype: of the parameters.
    select: a selector of one's own.
    implementation: of the attention.
    precision: of the projections, as in `nn.DenseGeneral`.
    kernel_init: initialiser of all projections; `nn.with_partitioning` works.
      The parameters of phi have initialisers of their own, not partitioned.
    use_bias: biases in the projections.
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
  compression: CompressionName = "mlp"
  share_kv: bool = False
  rope_compressed: RopeCompressedName = "block"
  rope: RopeConfig | None = RopeConfig()
  normalize_qk: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  select: Selector | None = None
  implementation: Implementation = None
  precision: PrecisionLike = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  use_bias: bool = False
  decode: bool = False
  max_append: int = 1

  def __post_init__(self):
    check_config(self.config)
    _ = self.attention  # which validates it
    _checks.flag("use_bias", self.use_bias)
    _checks.flag("decode", self.decode)
    _checks.static_int("max_append", self.max_append, 1)
    if not callable(self.kernel_init):
      raise ValueError(
        f"`kernel_init`={self.kernel_init!r} must be an initialiser function."
      )
    super().__post_init__()

  @property
  def attention(self) -> AttentionConfig:
    """The options that do not depend on the module system."""
    names = (field.name for field in dataclasses.fields(AttentionConfig))
    return AttentionConfig(
      **{name: getattr(self, _FIELDS.get(name, name)) for name in names}
    )

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
    config = self.attention
    dense = functools.partial(
      nn.DenseGeneral,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      kernel_init=self.kernel_init,
    )
    # The ids are asked for only if somebody collects them.
    collected = self.is_mutable_collection("intermediates")
    decoding = begin_decoding(self, x, segment_ids, prefix_length)
    parts = _parts(config, "nsa", dense, x.shape[-1])
    for name in core.COMPRESSIONS:
      parts[name] = CompressBlocks(
        self.compression, self.config, self.param_dtype, name=name
      )
    attended = core.sparse_attention(
      config,
      parts,
      x,
      positions=positions,
      segment_ids=segment_ids,
      decoding=decoding,
      return_block_ids=collected,
    )
    if collected:
      self.sow("intermediates", "gates", attended.gates)
      self.sow("intermediates", "block_ids", attended.block_ids)
    keep_cache(self, config, "nsa", attended, x)
    return attended.out


# The layer's names of the fields of `AttentionConfig`, where they differ.
_FIELDS = {"nsa": "config"}


def layer_fields(config: AttentionConfig) -> dict[str, Any]:
  """The options as keyword arguments of `NativeSparseAttention`."""
  return {
    _FIELDS.get(field.name, field.name): getattr(config, field.name)
    for field in dataclasses.fields(AttentionConfig)
  }


class DenseAttention(nn.Module):
  """Full or window attention, the baselines.

  Attributes:
    config: options; those of phi and the gates are not read.
    kind: "full" or "window".
    decode: as in `NativeSparseAttention`.
    max_append: likewise.
  """

  config: AttentionConfig
  kind: AttentionName
  decode: bool = False
  max_append: int = 1

  @nn.compact
  def __call__(
    self,
    x: Array,
    *,
    positions: Array | None,
    segment_ids: Array | None,
    prefix_length: int | None = None,
  ) -> Array:
    """Attends causally within segments, [B, T, D] to [B, T, D]."""
    config = self.config
    dense = functools.partial(
      nn.DenseGeneral,
      use_bias=False,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
    )
    attended = core.dense_attention(
      config,
      self.kind,
      _parts(config, self.kind, dense, x.shape[-1]),
      x,
      positions=positions,
      segment_ids=segment_ids,
      decoding=begin_decoding(self, x, segment_ids, prefix_length),
    )
    keep_cache(self, config, self.kind, attended, x)
    return attended.out


class CompressBlocks(nn.Module):
  """phi with its parameters, one set per key/value head.

  Attributes:
    kind: "mlp", "linear", "weighted" or "mean".
    config: `compression_block` and `compression_stride` are read.
    param_dtype: of the parameters.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NSAConfig
    >>> from nsa_jax.layers.linen import CompressBlocks
    >>> phi = CompressBlocks("weighted", NSAConfig())
    >>> x = jnp.ones((1, 64, 2, 8))
    >>> phi.init_with_output(jax.random.key(0), x)[0].shape
    (1, 3, 2, 8)
  """

  kind: CompressionName
  config: NSAConfig
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
    """Compresses [B, S, K, H] keys or values to [B, C, K, H]."""
    table = core.phi_parameters(self.kind, self.config, *x.shape[2:])
    parameters = {
      name: self.param(name, init, shape, self.param_dtype)
      for name, (init, shape) in table.items()
    }
    return core.compress(self.kind, self.config, parameters, x, segment_ids)


def rms_norm(config: AttentionConfig, name: str) -> nn.RMSNorm:
  """RMSNorm with statistics and scaling in float32, whatever `dtype` is."""
  return nn.RMSNorm(
    dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )


def _parts(
  config: AttentionConfig,
  kind: AttentionName,
  dense: Callable[..., Any],
  width: int,
) -> dict[str, Any]:
  """The submodules that `core` asks for by name."""
  parts: dict[str, Any] = {
    name: dense(shape, name=name)
    for name, shape in core.projections(config, kind).items()
  }
  for name in core.norms(config, kind):
    parts[name] = rms_norm(config, name)
  return parts | {"out": dense(width, axis=(-2, -1), name="out")}


def begin_decoding(
  module: Any,
  x: Array,
  segment_ids: Array | None,
  prefix_length: int | None,
) -> core.Decoding | None:
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
  held: cache.Cache = module.get_variable("cache", "kv")
  return core.begin_decoding(held, x, segment_ids, prefix_length)


def keep_cache(
  module: Any,
  config: AttentionConfig,
  kind: AttentionName,
  attended: core.Attended,
  x: Array,
) -> None:
  """Stores the cache of a call, or makes it for [B, capacity] tokens x."""
  if attended.cache is not None:
    module.put_variable("cache", "kv", attended.cache)
  elif module.decode:
    module.variable(
      "cache",
      "kv",
      core.empty_cache,
      config,
      *x.shape[:2],
      max_append=module.max_append,
      dtype=attended.out.dtype,
      kind=kind,
    )
