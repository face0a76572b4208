"""Flax (linen) attention layers: the parameters for `core`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from nsa_jax import _checks, cache
from nsa_jax.config import (
  AttentionConfig,
  NSAConfig,
  Select,
  check_attention_config,
  check_config,
)
from nsa_jax.layers import arguments, core
from nsa_jax.partitioning import parameter_axes
from nsa_jax.rope import RopeConfig
from nsa_jax.sharding import Layout, dot_general
from nsa_jax.typing import (
  BRANCHES,
  Array,
  AttentionName,
  BiasName,
  BranchName,
  CompressionName,
  Implementation,
  RopeCompressedName,
)


class NativeSparseAttention(nn.Module):
  """Causal self-attention by Native Sparse Attention (arXiv 2502.11089).

      out = sum over c of gate_c * Attn_c(query, K_c, V_c)          (Eq. 5)

  for c in compressed, selected, window. A drop-in replacement for
  `nn.MultiHeadDotProductAttention` in causal self-attention. Sows `gates`
  [B, T, N, 3] and `block_ids` [B, T, K, n] into the collection `intermediates`;
  into the collection `inspect`, unless it decodes, these two and what the
  selected branch attends with, `selected_query` [B, T, N, H] and `selected_key`
  [B, T, K, H]; `nsa_jax.inspect` reads them. A collection that is not mutable
  costs nothing.

  Attributes:
    num_heads: as in `AttentionConfig`.
    num_kv_heads: as in `AttentionConfig`; by default `num_heads`.
    head_dim: as in `AttentionConfig`; by default `qkv_features` / `num_heads`.
    value_head_dim: as in `AttentionConfig`.
    config: the algorithm's hyper-parameters, `nsa` of `AttentionConfig`.
    compression: as in `AttentionConfig`.
    share_kv: as in `AttentionConfig`.
    rope_compressed: as in `AttentionConfig`.
    rope: as in `AttentionConfig`.
    normalize_qk: as in `AttentionConfig`.
    norm_epsilon: as in `AttentionConfig`.
    biases: as in `AttentionConfig`.
    gate_bias: as in `AttentionConfig`.
    gate_init_scale: as in `AttentionConfig`.
    attention_sinks: must be False: `DenseAttention` has them.
    score_softcap: must be None: `DenseAttention` has it.
    dtype: as in `AttentionConfig`.
    param_dtype: as in `AttentionConfig`.
    precision: of the projections, as in `nn.DenseGeneral`.
    kernel_init: initialiser of all projections, or a mapping from "query",
      "key", "value", "gate" and "out" to initialisers, and from "phi" to that
      of the kernels in phi: "w1" and "w2" [K, _, _], or "weight" of "linear".
      `nn.with_partitioning` works. What is missing has its default.
    use_bias: all projections have biases, that of the gates too.
    implementation: as in `AttentionConfig`.
    decode: append to a decode cache and attend over it. `init` with
      x [B, capacity, D] makes it in the collection `cache`; then
      `apply({"params": ..., "cache": ...}, x, mutable=["cache"])` takes the
      next T >= 1 tokens of every row, whether a prompt or a single token. An
      empty cache is all zeros, so one can be made from the shapes that
      `jax.eval_shape` gives for `init`. `nsa_jax.cache` has `rewind` and the
      underlying functions.
    max_append: tokens that `cache.rewind` can remove. A call with at most this
      many tokens uses the decode kernels, a longer one runs as a prefill.
    select: as in `AttentionConfig`.
    layout: as in `AttentionConfig`.
    logical_axes: as in `AttentionConfig`.
    branches: as in `AttentionConfig`.
    qkv_features: N H, features of all query heads; by default D.
    out_features: features of the output; by default D.
    out_kernel_init: initialiser of the kernel of "out" in place of the one in
      `kernel_init`.
    bias_init: initialiser of the biases; `gate_bias` takes its place for the
      gates.
    out_bias_init: initialiser of the bias of "out", by default `bias_init`.
    broadcast_dropout: this and the fields below are those of
      `nn.MultiHeadDotProductAttention`. They have one value or are not read; an
      error says what stands in for another value.
    dropout_rate: must be 0.
    deterministic: not read.
    attention_fn: must be None.
    force_fp32_for_softmax: not read; the softmax is always in float32 at least.
    qkv_dot_general: must be None, as the following fields.
    out_dot_general: see above.
    qkv_dot_general_cls: see above.
    out_dot_general_cls: see above.
    qk_attn_weights_einsum_cls: see above.
    attn_weights_value_einsum_cls: see above.

  Raises:
    ValueError: if an attribute or argument does not fit.
    NotImplementedError: if no requested implementation can do the call.

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
  num_kv_heads: int | None = None
  head_dim: int | None = None
  value_head_dim: int | None = None
  config: NSAConfig = NSAConfig()
  compression: CompressionName = "mlp"
  share_kv: bool = False
  rope_compressed: RopeCompressedName = "block"
  rope: RopeConfig | None = RopeConfig()
  normalize_qk: bool = False
  norm_epsilon: float = 1e-6
  biases: Sequence[BiasName] = ()
  gate_bias: float | Sequence[float] | None = None
  gate_init_scale: float = 1.0
  attention_sinks: bool = False
  score_softcap: float | None = None
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: PrecisionLike = None
  kernel_init: Initializer | Mapping[str, Initializer] = arguments.LECUN
  use_bias: bool = False
  implementation: Implementation = None
  decode: bool = False
  max_append: int = 1
  select: Select = None
  layout: Layout | None = None
  logical_axes: bool = False
  branches: Sequence[BranchName] = BRANCHES
  qkv_features: int | None = None
  out_features: int | None = None
  out_kernel_init: Initializer | None = None
  bias_init: Initializer = arguments.ZEROS
  out_bias_init: Initializer | None = None
  broadcast_dropout: bool = True
  dropout_rate: float = 0.0
  deterministic: bool | None = None
  attention_fn: None = None
  force_fp32_for_softmax: bool = True
  qkv_dot_general: None = None
  out_dot_general: None = None
  qkv_dot_general_cls: None = None
  out_dot_general_cls: None = None
  qk_attn_weights_einsum_cls: None = None
  attn_weights_value_einsum_cls: None = None

  def __post_init__(self):
    check_config(self.config)
    _checks.flag("decode", self.decode)
    # Validates the options; any even number stands for an unknown head_dim.
    self._options(unknown_head_dim=2)
    _checks.flag("use_bias", self.use_bias)
    _checks.static_int("max_append", self.max_append, 1)
    arguments.output_width(self.out_features, 1)
    self._initializers()
    _checks.precision(self.precision)
    fixed = arguments.FIXED & set(self.__dataclass_fields__)
    arguments.check_fixed({name: getattr(self, name) for name in fixed})
    super().__post_init__()

  @property
  def attention(self) -> AttentionConfig:
    """The options that are independent of the module system."""
    return self._options()

  def _options(
    self, features: int | None = None, unknown_head_dim: int | None = None
  ) -> AttentionConfig:
    """`attention` for an input of so many features."""
    options = arguments.attention_fields(self)
    kv_heads, head_dim = arguments.head_sizes(
      self.num_heads,
      self.num_kv_heads,
      self.head_dim,
      self.qkv_features,
      features,
      "D of `x`",
    )
    options["num_kv_heads"] = kv_heads
    options["head_dim"] = unknown_head_dim if head_dim is None else head_dim
    return arguments.of_call(AttentionConfig(**options), self.decode)

  def _initializers(self) -> arguments.Initializers:
    return arguments.initializers(
      self.kernel_init, self.out_kernel_init, self.bias_init, self.out_bias_init
    )

  @nn.compact
  def __call__(
    self,
    x: Array,
    inputs_k: Array | None = None,
    inputs_v: Array | None = None,
    *,
    inputs_kv: Array | None = None,
    mask: Array | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    deterministic: bool | None = None,
    dropout_rng: Array | None = None,
    sow_weights: bool = False,
    prefix_length: int | None = None,
  ) -> Array:
    """Attends causally from every token.

    Args:
      x: [B, T, D].
      inputs_k: None, or x itself.
      inputs_v: None, or x itself.
      inputs_kv: None, or x itself.
      mask: None, or exactly causal and known outside of `jax.jit`, such as
        `nn.make_causal_mask` makes: the attention is causal without it, and
        `segment_ids` masks padding and other segments.
      positions: int32 [B, T] for RoPE; by default 0, 1, ... in each segment.
        With `decode` they must be consecutive, and start at the row's length by
        default.
      segment_ids: int32 [B, T] for packed or padded sequences: contiguous runs
        that start at multiples of `config.selection_block`; 0 is padding. With
        `decode`, one run per row from its first token on, then padding, which
        is not appended.
      deterministic: accepted for compatibility and ignored: no dropout.
      dropout_rng: accepted for compatibility and ignored.
      sow_weights: must be False; `gates` and `block_ids` are sown instead.
      prefix_length: with `decode`, the length of every row that gets new
        tokens, if it is known at trace time. Keys after the new tokens are then
        not read, and a prompt costs the same as without a cache. 0 empties the
        rows that get new tokens first.

    Returns:
      [B, T, D]. Padding gets 0, or the bias. With `decode` and traced lengths,
      which allow no ValueError, a token gets NaN if it exceeds the capacity or
      does not follow `prefix_length` tokens, and is then not appended; or if it
      follows a rewind of too many tokens.

    Raises:
      ValueError: if an argument does not fit.
    """
    del deterministic, dropout_rng
    others = {
      "inputs_k": inputs_k,
      "inputs_v": inputs_v,
      "inputs_kv": inputs_kv,
    }
    x = arguments.check_call("x", x, others, mask, sow_weights)
    check_width(self, x)
    width = x.shape[-1]
    config = self._options(width)
    dense = functools.partial(
      nn.DenseGeneral,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
    )
    # The ids are computed only if a collection is requested.
    collected = self.is_mutable_collection("intermediates")
    # `init` makes every collection mutable but "intermediates".
    inspected = (
      self.is_mutable_collection("inspect")
      and not self.decode
      and not self.is_initializing()
    )
    decoding = begin_decoding(self, x, segment_ids, prefix_length)
    inits = self._initializers()
    out_width = arguments.output_width(self.out_features, width)
    parts = _parts(self, config, "nsa", dense, out_width, inits, self.use_bias)
    for name in core.COMPRESSIONS:
      parts[name] = CompressBlocks(
        self.compression,
        self.config,
        self.param_dtype,
        config.layout,
        inits("phi", "kernel"),
        self.logical_axes,
        name=name,
      )
    attended = core.sparse_attention(
      config,
      parts,
      x,
      positions=positions,
      segment_ids=segment_ids,
      decoding=decoding,
      return_block_ids=collected or inspected,
    )
    asked = {"intermediates": collected, "inspect": inspected}
    for collection in (name for name, wanted in asked.items() if wanted):
      for name, value in arguments.sown(collection, attended).items():
        self.sow(collection, name, value)
    keep_cache(self, config, "nsa", attended, x)
    return attended.out


class DenseAttention(nn.Module):
  """Full or window attention, the baselines.

  Attributes:
    config: options; `compression`, `share_kv`, `rope_compressed`, `select`,
      `branches` and those of the gates are not read.
    kind: "full" or "window".
    decode: as in `NativeSparseAttention`.
    max_append: as in `NativeSparseAttention`.
  """

  config: AttentionConfig
  kind: AttentionName
  decode: bool = False
  max_append: int = 1

  def __post_init__(self):
    check_attention_config(self.config)
    _checks.choice("kind", self.kind, core.DENSE_KINDS)
    _checks.flag("decode", self.decode)
    _checks.static_int("max_append", self.max_append, 1)
    super().__post_init__()

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
    config = arguments.of_call(self.config, self.decode)
    x = _checks.layer_input(x)
    check_width(self, x)
    dense = functools.partial(
      nn.DenseGeneral,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
    )
    attended = core.dense_attention(
      config,
      self.kind,
      _parts(self, config, self.kind, dense, x.shape[-1]),
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
    param_dtype: dtype of the parameters.
    layout: as in `compress_mean`.
    kernel_init: as in `core.phi_parameters`.
    logical_axes: as in `AttentionConfig`.

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
  layout: Layout | None = None
  kernel_init: Initializer | None = None
  logical_axes: bool = False

  def __post_init__(self):
    _checks.choice("kind", self.kind, get_args(CompressionName))
    check_config(self.config)
    _checks.dtype("param_dtype", self.param_dtype)
    if self.kernel_init is not None:
      arguments.check_initializer("kernel_init", self.kernel_init)
    _checks.flag("logical_axes", self.logical_axes)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
    """Compresses [B, S, K, H] keys or values to [B, C, K, H]."""
    x = _checks.array("x", x, 4, "[B, S, K, H]")
    _checks.not_empty("x", x, axes=(2, 3))
    heads, width = x.shape[2:]
    table = core.phi_parameters(
      self.kind, self.config, heads, width, self.kernel_init
    )
    parameters = {}
    for name, (init, shape) in table.items():
      if self.logical_axes:
        init = named("compress_key", name, init, len(shape))
      parameters[name] = self.param(name, init, shape, self.param_dtype)
    return core.compress(
      self.kind, self.config, parameters, x, segment_ids, self.layout
    )


def rms_norm(config: AttentionConfig, name: str) -> nn.RMSNorm:
  """RMSNorm with statistics and scaling in float32, for any `dtype`."""
  init = nn.initializers.ones
  return nn.RMSNorm(
    epsilon=config.norm_epsilon,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    scale_init=named(name, "scale", init) if config.logical_axes else init,
    name=name,
  )


def projection_options(
  config: AttentionConfig,
  name: str,
  kernel_init: Initializer = arguments.LECUN,
  bias_init: Initializer = arguments.ZEROS,
) -> dict[str, Any]:
  """Keyword arguments of a linear map that has the sharding of its kernel."""
  if config.logical_axes:
    kernel_init = named(name, "kernel", kernel_init)
    bias_init = named(name, "bias", bias_init)
  return {
    "kernel_init": kernel_init,
    "bias_init": bias_init,
    "dot_general": dot_general,
    "name": name,
  }


def named(
  module: str, name: str, init: Initializer, ndim: int | None = None
) -> Initializer:
  """An initialiser that puts a parameter in a box with the names of its axes.

  What an initialiser has put in a box already stays as it is.

  Args:
    module: as in `parameter_axes`.
    name: as in `parameter_axes`.
    init: initialiser of the parameter.
    ndim: as in `parameter_axes`.
  """
  axes = parameter_axes(module, name, ndim)

  def box(*args: Any, **kwargs: Any) -> Any:
    x = init(*args, **kwargs)
    if isinstance(x, nn.meta.AxisMetadata) or axes is None:
      return x
    return nn.LogicallyPartitioned(x, axes)

  return box


class _Flat(nn.meta.AxisMetadata[Any]):
  """A box around a kernel that `nn.DenseGeneral` will give its shape.

  It initialises kernels flattened to two axes, and takes them out of the box by
  `unbox`. In a mesh that constrains the two axes by the names of all of them.
  """

  def __init__(self, box):
    self._box = box

  def unbox(self, apply_constraint=True):
    return self._box.unbox(apply_constraint=False)

  def replace_boxed(self, val):
    return self._box.replace_boxed(val)

  def add_axis(self, index, params):
    raise NotImplementedError

  def remove_axis(self, index, params):
    raise NotImplementedError


def _flat(init, key, shape, dtype):
  x = init(key, shape, dtype)
  return _Flat(x) if isinstance(x, nn.meta.AxisMetadata) else x


def _parts(
  module: nn.Module,
  config: AttentionConfig,
  kind: AttentionName,
  dense: Callable[..., Any],
  width: int,
  inits: arguments.Initializers | None = None,
  use_bias: bool = False,
) -> dict[str, Any]:
  """The submodules and parameters for `core`, by name."""
  start = arguments.of_projections(config, kind, inits, use_bias)

  def project(name, features, **options):
    kernel, bias, options["use_bias"] = start(name)
    options |= projection_options(config, name, kernel, bias)
    for each in ("kernel_init", "bias_init"):
      options[each] = functools.partial(_flat, options[each])
    return dense(features, **options)

  parts: dict[str, Any] = {
    name: project(name, shape)
    for name, shape in core.projections(config, kind).items()
  }
  for name in core.norms(config, kind):
    parts[name] = rms_norm(config, name)
  for name, (init, shape) in core.vectors(config, kind).items():
    if config.logical_axes:
      init = named("", name, init)
    value = module.param(name, init, shape, config.param_dtype)
    parts[name] = functools.partial(jnp.asarray, value)
  return parts | {"out": project("out", width, axis=(-2, -1))}


def check_width(module: nn.Module, x: Array) -> None:
  """Checks x [B, T, D] against the parameters; flax names only them."""
  query = module.variables.get("params", {}).get("query", {})
  kernels = jax.tree.leaves(query.get("kernel"))  # It may be in a box.
  if kernels and jnp.ndim(kernels[0]):
    arguments.check_width("x", x, jnp.shape(kernels[0])[0])


def begin_decoding(
  module: Any,
  x: Array,
  segment_ids: Array | None,
  prefix_length: int | None,
) -> core.Decoding | None:
  """Prepares appending tokens x [B, T, ...] to a layer's cache.

  Returns None if the layer does not decode or is being initialised.
  """
  prefix_length = arguments.check_prefix_length(prefix_length, module.decode)
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
  """Stores the updated cache; at `init`, makes one for x [B, capacity, D]."""
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
