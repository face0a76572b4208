"""Flax (nnx) attention layers: the parameters for `core`.

Names of modules and parameters are those of `nsa_jax.layers.linen`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta, spmd, unfreeze
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax

from nsa_jax import _checks
from nsa_jax.cache.state import check_batch
from nsa_jax.config import (
  AttentionConfig,
  NSAConfig,
  check_attention_config,
  check_config,
)
from nsa_jax.layers import arguments, core
from nsa_jax.partitioning import parameter_axes
from nsa_jax.sharding import Layout, dot_general
from nsa_jax.typing import Array, AttentionName, CompressionName

Module = TypeVar("Module", bound=nnx.Module)


class Inspect(nnx.Variable[Any]):
  """What `nsa_jax.inspect` reads; layers sow it under `nnx.capture`.

  Flax keeps one value of a name: in a capture of `nnx.Intermediate` too, gates
  and block ids are there alone.
  """


# Types of what is sown, by the name of linen's collection.
_COLLECTIONS: dict[str, type[nnx.Variable[Any]]] = {
  "intermediates": nnx.Intermediate,
  "inspect": Inspect,
}


class Attention(nnx.Module):
  """What attention layers share: parameters, a decode cache, sowing.

  Attributes:
    attention: the options that are independent of the module system.
    kind: "nsa", "full" or "window".
    in_features: D.
    out_features: features of the output.
    decode: append to the decode cache and attend over it.
    max_append: as in `NativeSparseAttention`.
    kv: None, or the decode cache, an `nsa_jax.cache.Cache`.
  """

  attention: AttentionConfig
  kind: AttentionName
  in_features: int
  out_features: int
  decode: bool
  max_append: int
  kv: nnx.Cache[Any] | None
  query: nnx.LinearGeneral

  def _set_up(
    self,
    config: AttentionConfig,
    kind: AttentionName,
    in_features: int,
    out_features: int | None = None,
    *,
    decode: bool | None,
    max_append: int,
    inits: arguments.Initializers | None = None,
    use_bias: bool = False,
    precision: PrecisionLike = None,
    rngs: nnx.Rngs,
  ) -> None:
    """Makes the parameters that `core` names."""
    self.attention, self.kind = config, kind
    self.in_features = _checks.static_int("in_features", in_features, 1)
    self.out_features = arguments.output_width(out_features, self.in_features)
    decode = False if decode is None else decode
    _checks.flag("decode", decode)
    _checks.flag("use_bias", use_bias)
    self.decode = decode
    self.max_append = _checks.static_int("max_append", max_append, 1)
    _checks.precision(precision)
    _checks.instance("rngs", rngs, nnx.Rngs)
    self.kv = nnx.data(None)
    heads = config.num_heads, config.value_dim
    maps: dict[str, tuple[Any, Any, Any]] = {
      name: (self.in_features, shape, -1)
      for name, shape in core.projections(config, kind).items()
    }
    maps["out"] = heads, self.out_features, (-2, -1)
    start = arguments.of_projections(config, kind, inits, use_bias)
    for name, (inputs, outputs, axis) in maps.items():
      kernel_init, bias_init, has_bias = start(name)
      linear = nnx.LinearGeneral(
        inputs,
        outputs,
        axis=axis,
        use_bias=has_bias,
        precision=precision,
        **linear_options(config, name, kernel_init, bias_init),
        rngs=rngs,
      )
      setattr(self, name, linear)
    norms = core.norms(config, kind)
    for name in norms:
      setattr(self, name, rms_norm(config, name, config.head_dim, rngs=rngs))
    vectors = core.vectors(config, kind)
    for name, (init, shape) in vectors.items():
      axes = metadata("", name) if config.logical_axes else {}
      value = init(rngs.params(), shape, config.param_dtype)
      setattr(self, name, nnx.Param(value, **axes))
    self._names, self._vectors = (*maps, *norms), tuple(vectors)

  def _parts(self, config: AttentionConfig) -> dict[str, Any]:
    """The submodules and parameters for `core`, by name."""
    parts = {name: getattr(self, name) for name in self._names}
    for name in self._vectors:
      parts[name] = functools.partial(jnp.asarray, getattr(self, name)[...])
    return parts

  def _attend(
    self,
    x: Array,
    positions: Array | None,
    segment_ids: Array | None,
    prefix_length: int | None,
    decode: bool | None,
    return_block_ids: bool,
    name: str = "x",
  ) -> core.Attended:
    """What both kinds of layers do, with the new cache stored."""
    arguments.check_width(name, x, self.in_features)
    decode = self.decode if decode is None else decode
    _checks.flag("decode", decode)
    config = arguments.of_call(self.attention, decode)
    call: dict[str, Any] = {
      "positions": positions,
      "segment_ids": segment_ids,
      "decoding": self._decoding(x, segment_ids, prefix_length, decode, name),
    }
    parts = self._parts(config)
    if self.kind == "nsa":
      call["return_block_ids"] = return_block_ids
      attended = core.sparse_attention(config, parts, x, **call)
    else:
      attended = core.dense_attention(config, self.kind, parts, x, **call)
    if attended.cache is not None and self.kv is not None:
      self.kv.set_value(attended.cache)
    return attended

  def _decoding(self, x, segment_ids, prefix_length, decode, name):
    prefix_length = arguments.check_prefix_length(prefix_length, decode)
    if not decode:
      return None
    if self.kv is None:
      raise ValueError("`decode`=True needs a cache: call `init_cache` first.")
    held = self.kv.get_value()
    check_batch(name, x, held)
    return core.begin_decoding(held, x, segment_ids, prefix_length)

  def init_cache(
    self, input_shape: Sequence[int], dtype: Dtype | None = None
  ) -> None:
    """Makes an empty decode cache, or empties it.

    Args:
      input_shape: (B, capacity, D).
      dtype: of keys and values; by default that of the computation, or
        `param_dtype` if it is not given.

    Raises:
      ValueError: if an argument does not fit.
    """
    config = self.attention
    sizes = arguments.cache_sizes(input_shape, "(B, capacity, D)")
    batch, capacity, width = sizes
    if width != self.in_features:
      raise ValueError(
        f"`input_shape`={sizes} must end with D="
        f"{self.in_features}, as the parameters have."
      )
    if dtype is None:
      dtype = config.param_dtype if config.dtype is None else config.dtype
    empty = core.empty_cache(
      config,
      batch,
      capacity,
      max_append=self.max_append,
      dtype=dtype,
      kind=self.kind,
    )
    # Axes of layers that `nnx.vmap` has stacked come first.
    stacked = self.query.kernel.shape[:-3]
    self.kv = nnx.Cache(
      jax.tree.map(lambda x: jnp.broadcast_to(x, stacked + x.shape), empty)
    )

  def set_view(
    self,
    decode: bool | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    max_append: int | None = None,
  ) -> None:
    """What `nnx.view` changes.

    Args:
      decode: append to the decode cache and attend over it.
      batch_size: makes an empty cache of so many rows, with `max_length`.
      max_length: tokens per row of this cache.
      max_append: as in `NativeSparseAttention`, of this cache.

    Raises:
      ValueError: if an argument does not fit, or one of `batch_size` and
        `max_length` is missing.
    """
    if decode is not None:
      _checks.flag("decode", decode)
      self.decode = decode
    if max_append is not None:
      self.max_append = _checks.static_int("max_append", max_append, 1)
    if (batch_size is None) != (max_length is None):
      raise ValueError(
        f"`batch_size`={batch_size} and `max_length`={max_length} must come "
        "together."
      )
    if batch_size is not None and max_length is not None:
      self.init_cache((batch_size, max_length, self.in_features))


class NativeSparseAttention(Attention):
  """Causal self-attention by Native Sparse Attention (arXiv 2502.11089).

      out = sum over c of gate_c * Attn_c(query, K_c, V_c)          (Eq. 5)

  for c in compressed, selected, window. It stands where
  `nnx.MultiHeadAttention` stood in causal self-attention, and is
  `nsa_jax.NativeSparseAttention` for nnx: the same options, names of
  parameters and numbers. Under `nnx.capture` it sows `gates` [B, T, N, 3] and
  `block_ids` [B, T, K, n] as `nnx.Intermediate`; as `nsa_jax.nnx.Inspect`,
  unless it decodes, what `nsa_jax.inspect` reads. `attend` returns gates and
  block ids. With `decode`, `init_cache` or `nnx.view` makes the decode cache,
  an `nnx.Cache`; a call then takes the next T >= 1 tokens of every row, whether
  a prompt or a single token.

  Args:
    num_heads: as in `AttentionConfig`.
    in_features: D.
    qkv_features: N H, features of all query heads; by default D.
    out_features: features of the output; by default D.
    num_kv_heads: as in `AttentionConfig`; by default `num_heads`.
    head_dim: as in `AttentionConfig`; by default `qkv_features` / `num_heads`.
    config: the algorithm's hyper-parameters, `nsa` of `AttentionConfig`.
    precision: of the projections, as in `nnx.LinearGeneral`.
    kernel_init: as in `nsa_jax.NativeSparseAttention`; `nnx.with_partitioning`
      works.
    out_kernel_init: likewise.
    bias_init: likewise.
    out_bias_init: likewise.
    use_bias: the projections have biases; unlike `nnx.MultiHeadAttention` they
      have none by default.
    decode: append to the decode cache and attend over it; a call may say
      otherwise.
    max_append: tokens that `cache.rewind` can remove. A call with at most this
      many tokens uses the decode kernels, a longer one runs as a prefill.
    rngs: of the initial parameters.
    **options: the other fields of `AttentionConfig`, with its defaults. Other
      arguments of `nnx.MultiHeadAttention` have one value here; an error says
      what stands in for another.

  Raises:
    ValueError: if an argument does not fit.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax.numpy as jnp
    >>> import nsa_jax
    >>> from flax import nnx
    >>> layer = nsa_jax.nnx.NativeSparseAttention(
    ...   num_heads=4,
    ...   in_features=32,
    ...   num_kv_heads=2,
    ...   config=nsa_jax.NSAConfig(8, 4, 16, num_selected=4, window=16),
    ...   rngs=nnx.Rngs(0),
    ... )
    >>> x = jnp.ones((1, 64, 32))
    >>> nnx.jit(lambda layer, x: layer(x))(layer, x).shape
    (1, 64, 32)
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    *,
    head_dim: int | None = None,
    config: NSAConfig = NSAConfig(),  # noqa: B008, immutable
    precision: PrecisionLike = None,
    kernel_init: Initializer | Mapping[str, Initializer] = arguments.LECUN,
    out_kernel_init: Initializer | None = None,
    bias_init: Initializer = arguments.ZEROS,
    out_bias_init: Initializer | None = None,
    use_bias: bool = False,
    decode: bool | None = False,
    max_append: int = 1,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    check_config(config)
    in_features = _checks.static_int("in_features", in_features, 1)
    fixed = {name: options.pop(name) for name in arguments.FIXED & {*options}}
    if fixed.get("in_kv_features") == in_features:
      del fixed["in_kv_features"]
    arguments.check_fixed(fixed)
    kv_heads, head_size = arguments.head_sizes(
      num_heads, num_kv_heads, head_dim, qkv_features, in_features
    )
    attention = AttentionConfig(
      num_heads=num_heads,
      num_kv_heads=kv_heads,
      head_dim=head_size,  # type: ignore[arg-type]
      nsa=config,
      **options,
    )
    inits = arguments.initializers(
      kernel_init, out_kernel_init, bias_init, out_bias_init
    )
    self._set_up(
      attention,
      "nsa",
      in_features,
      out_features,
      decode=decode,
      max_append=max_append,
      inits=inits,
      use_bias=use_bias,
      precision=precision,
      rngs=rngs,
    )
    widths = attention.head_dim, attention.value_dim
    for name, width in zip(core.COMPRESSIONS, widths, strict=True):
      phi = CompressBlocks(
        attention.compression,
        config,
        attention.num_kv_heads,
        width,
        param_dtype=attention.param_dtype,
        kernel_init=inits("phi", "kernel"),
        logical_axes=attention.logical_axes,
        rngs=rngs,
      )
      setattr(self, name, phi)

  def _parts(self, config):
    def bind(phi):
      return lambda x, segment_ids: phi(x, segment_ids, layout=config.layout)

    phis = {name: bind(getattr(self, name)) for name in core.COMPRESSIONS}
    return super()._parts(config) | phis

  def __call__(
    self,
    inputs_q: Array,
    inputs_k: Array | None = None,
    inputs_v: Array | None = None,
    *,
    mask: Array | None = None,
    deterministic: bool | None = None,
    rngs: nnx.Rngs | nnx.RngStream | None = None,
    sow_weights: bool = False,
    decode: bool | None = None,
    is_causal: bool = True,
    out_sharding: None = None,
    qkv_sharding: None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    prefix_length: int | None = None,
  ) -> Array:
    """Attends causally from every token.

    Args:
      inputs_q: x [B, T, D].
      inputs_k: None, or `inputs_q` itself.
      inputs_v: None, or `inputs_q` itself.
      mask: None, or exactly causal and known outside of `nnx.jit`, such as
        `nnx.make_causal_mask` makes: the attention is causal without it, and
        `segment_ids` masks padding and other segments.
      deterministic: accepted for compatibility and ignored: no dropout.
      rngs: accepted for compatibility and ignored.
      sow_weights: must be False; `gates` and `block_ids` are sown instead.
      decode: in place of the attribute.
      is_causal: must be True.
      out_sharding: must be None; `layout` says how arrays are split.
      qkv_sharding: must be None, likewise.
      positions: as in `nsa_jax.NativeSparseAttention`.
      segment_ids: as in `nsa_jax.NativeSparseAttention`.
      prefix_length: as in `nsa_jax.NativeSparseAttention`.

    Returns:
      [B, T, out_features], as of `nsa_jax.NativeSparseAttention`.

    Raises:
      ValueError: if an argument does not fit.
    """
    del deterministic, rngs
    arguments.check_fixed(
      {"out_sharding": out_sharding, "qkv_sharding": qkv_sharding}
    )
    others = {"inputs_k": inputs_k, "inputs_v": inputs_v}
    x = arguments.check_call("inputs_q", inputs_q, others, mask, sow_weights)
    _checks.flag("is_causal", is_causal)
    if not is_causal:
      raise ValueError("`is_causal`=False must be True: causal only.")
    asked = [name for name in _COLLECTIONS if _captured(self, name)]
    attended = self._attend(
      x, positions, segment_ids, prefix_length, decode, bool(asked), "inputs_q"
    )
    done = set[str]()
    for name in asked:
      if name == "inspect" and attended.query is None:  # It decodes.
        continue
      for key, value in arguments.sown(name, attended).items():
        if key not in done:
          self.sow(_COLLECTIONS[name], key, value)
          done.add(key)
    return attended.out

  def attend(
    self,
    x: Array,
    *,
    decode: bool | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    prefix_length: int | None = None,
  ) -> core.Attended:
    """As a call, with gates and block ids in the result.

    Args:
      x: [B, T, D].
      decode: as in a call, like the following arguments.
      positions: see above.
      segment_ids: see above.
      prefix_length: see above.

    Returns:
      `nsa_jax.layers.core.Attended`.

    Raises:
      ValueError: if an argument does not fit.
    """
    x = _checks.layer_input(x)
    return self._attend(x, positions, segment_ids, prefix_length, decode, True)


class DenseAttention(Attention):
  """Full or window attention, the baselines.

  Args:
    config: as in `nsa_jax.layers.linen.DenseAttention`.
    kind: "full" or "window".
    in_features: D.
    decode: as in `NativeSparseAttention`.
    max_append: as in `NativeSparseAttention`.
    rngs: of the initial parameters.

  Raises:
    ValueError: if an argument does not fit.
    NotImplementedError: if no requested implementation can do the call.
  """

  def __init__(
    self,
    config: AttentionConfig,
    kind: AttentionName,
    in_features: int,
    *,
    decode: bool = False,
    max_append: int = 1,
    rngs: nnx.Rngs,
  ):
    check_attention_config(config)
    _checks.choice("kind", kind, core.DENSE_KINDS)
    self._set_up(
      config,
      kind,
      in_features,
      decode=decode,
      max_append=max_append,
      rngs=rngs,
    )

  def __call__(
    self,
    x: Array,
    *,
    decode: bool | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    prefix_length: int | None = None,
  ) -> Array:
    """Attends causally within segments, [B, T, D] to [B, T, D]."""
    x = _checks.layer_input(x)
    return self._attend(
      x, positions, segment_ids, prefix_length, decode, False
    ).out


class CompressBlocks(nnx.Module):
  """phi with its parameters, one set per key/value head.

  Args:
    kind: "mlp", "linear", "weighted" or "mean".
    config: `compression_block` and `compression_stride` are read.
    num_kv_heads: K.
    head_dim: H, or V for values.
    param_dtype: dtype of the parameters.
    kernel_init: as in `core.phi_parameters`.
    logical_axes: as in `AttentionConfig`.
    rngs: of the initial parameters.

  Raises:
    ValueError: if an argument does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> import nsa_jax
    >>> from flax import nnx
    >>> phi = nsa_jax.nnx.CompressBlocks(
    ...   "weighted", nsa_jax.NSAConfig(), 2, 8, rngs=nnx.Rngs(0)
    ... )
    >>> phi(jnp.ones((1, 64, 2, 8))).shape
    (1, 3, 2, 8)
  """

  def __init__(
    self,
    kind: CompressionName,
    config: NSAConfig,
    num_kv_heads: int,
    head_dim: int,
    *,
    param_dtype: Dtype = jnp.float32,
    kernel_init: Initializer | None = None,
    logical_axes: bool = False,
    rngs: nnx.Rngs,
  ):
    _checks.choice("kind", kind, get_args(CompressionName))
    check_config(config)
    _checks.flag("logical_axes", logical_axes)
    _checks.instance("rngs", rngs, nnx.Rngs)
    self.kind, self.config = kind, config
    self.num_kv_heads = _checks.static_int("num_kv_heads", num_kv_heads, 1)
    self.head_dim = _checks.static_int("head_dim", head_dim, 1)
    dtype = _checks.dtype("param_dtype", param_dtype)
    if kernel_init is not None:
      arguments.check_initializer("kernel_init", kernel_init)
    table = core.phi_parameters(
      kind, config, self.num_kv_heads, self.head_dim, kernel_init
    )
    for name, (init, shape) in table.items():
      axes = metadata("compress_key", name, len(shape)) if logical_axes else {}
      setattr(self, name, nnx.Param(init(rngs.params(), shape, dtype), **axes))
    self._names = tuple(table)

  def __call__(
    self,
    x: Array,
    segment_ids: Array | None = None,
    *,
    layout: Layout | None = None,
  ) -> Array:
    """Compresses [B, S, K, H] keys or values to [B, C, K, H].

    Args:
      x: [B, S, K, H].
      segment_ids: int32 [B, S].
      layout: as in `compress_mean`.

    Returns:
      [B, C, K, H].

    Raises:
      ValueError: if an argument does not fit.
    """
    x = _checks.array("x", x, 4, "[B, S, K, H]")
    want = (None, None, self.num_kv_heads, self.head_dim)
    _checks.shape("x", x, want, "as the parameters have")
    parameters = {name: getattr(self, name)[...] for name in self._names}
    return core.compress(
      self.kind, self.config, parameters, x, segment_ids, layout
    )


def to_linen(module: nnx.Module) -> dict[str, Any]:
  """Parameters of a layer or model as those of its linen twin.

  Args:
    module: an nnx module of this package.

  Returns:
    Nested dictionaries with the same arrays, what linen's `init` returns under
    "params".

  Raises:
    ValueError: if `module` is no nnx module.

  Example:
    >>> import nsa_jax
    >>> from flax import nnx
    >>> phi = nsa_jax.nnx.CompressBlocks(
    ...   "weighted", nsa_jax.NSAConfig(), 2, 8, rngs=nnx.Rngs(0)
    ... )
    >>> nsa_jax.nnx.to_linen(phi)["weight"].shape
    (2, 32)
  """
  _checks.instance("module", module, nnx.Module)
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def from_linen(module: Module, params: Mapping[str, Any]) -> Module:
  """A layer or model with the parameters of its linen twin.

  Args:
    module: an nnx module of this package with the options of the twin. Its own
      parameters are not read, so that one from `nnx.eval_shape` will do.
    params: what linen's `init` returns under "params", with or without boxes
      of metadata; arrays of jax or NumPy, whose dtypes stay.

  Returns:
    A module like `module`.

  Raises:
    ValueError: if a parameter is missing, unknown, or has another shape.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> from flax import nnx
    >>> from nsa_jax.layers.linen import CompressBlocks
    >>> config, x = nsa_jax.NSAConfig(4, 2, 8), jnp.ones((1, 16, 2, 8))
    >>> twin = CompressBlocks("weighted", config)
    >>> params = twin.init(jax.random.key(0), x)["params"]
    >>> abstract = nnx.eval_shape(
    ...   lambda: nsa_jax.nnx.CompressBlocks(
    ...     "weighted", config, 2, 8, rngs=nnx.Rngs(0)
    ...   )
    ... )
    >>> phi = nsa_jax.nnx.from_linen(abstract, params)
    >>> bool((phi(x) == twin.apply({"params": params}, x)).all())
    True
  """
  _checks.instance("module", module, nnx.Module)
  if not isinstance(params, Mapping) or "params" in params:
    raise ValueError(
      f"`params`={_checks.show(params)} must be what linen's `init` returns "
      'under "params".'
    )
  graph, own, *rest = nnx.split(module, nnx.Param, ...)
  given = {
    tuple(str(key.key) for key in path): x
    for path, x in jax.tree.leaves_with_path(meta.unbox(unfreeze({**params})))
  }
  parameters: dict[Any, Any] = dict(nnx.to_flat_state(own))
  for path in (*parameters, *given):
    name = "params" + "".join(f"[{key!r}]" for key in path)
    if path not in given:
      raise ValueError(f"`{name}` is missing: the module has it.")
    if path not in parameters:
      raise ValueError(f"`{name}` is unknown: the module has no such.")
    want = parameters[path].shape
    if jnp.shape(given[path]) != want:
      raise ValueError(
        f"`{name}` of shape {jnp.shape(given[path])} must have shape {want}, "
        "that of the module's parameter."
      )
  state = nnx.from_flat_state(
    (path, variable.replace(jnp.asarray(given[path])))
    for path, variable in parameters.items()
  )
  return nnx.merge(graph, state, *rest)


def _captured(module: nnx.Module, collection: str) -> bool:
  """Whether `nnx.capture` collects it, found out as `Module.sow` does."""
  kind = _COLLECTIONS[collection]
  return any(type(x) is kind for x in getattr(module, "__captures__", ()))


def _keep_dtypes(
  values: Any, /, *, dtype: Any = None, inexact: bool = True
) -> Any:
  del dtype, inexact
  return values


def rms_norm(
  config: AttentionConfig, name: str, features: int, *, rngs: nnx.Rngs
) -> nnx.RMSNorm:
  """RMSNorm with statistics and scaling in float32, for any `dtype`."""
  return nnx.RMSNorm(
    features,
    epsilon=config.norm_epsilon,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    # Left alone, nnx would round x and the scale to `dtype` first.
    promote_dtype=_keep_dtypes,
    scale_metadata=metadata(name, "scale") if config.logical_axes else {},
    rngs=rngs,
  )


def linear_options(
  config: AttentionConfig,
  name: str,
  kernel_init: Initializer = arguments.LECUN,
  bias_init: Initializer = arguments.ZEROS,
) -> dict[str, Any]:
  """Keyword arguments of a linear map that has the sharding of its kernel."""
  options: dict[str, Any] = {
    "dtype": config.dtype,
    "param_dtype": config.param_dtype,
    "kernel_init": kernel_init,
    "bias_init": bias_init,
    "dot_general": _dot_general,
  }
  if config.logical_axes:
    options["kernel_metadata"] = metadata(name, "kernel")
    options["bias_metadata"] = metadata(name, "bias")
  return options


def _dot_general(
  lhs: Array,
  rhs: Array,
  dimensions: Any,
  *,
  out_sharding: Any = None,
  **how: Any,
) -> Array:
  """`sharding.dot_general` with the arguments that nnx gives."""
  if out_sharding is not None:
    return lax.dot_general(
      lhs, rhs, dimensions, out_sharding=out_sharding, **how
    )
  return dot_general(lhs, rhs, dimensions, **how)


def metadata(module: str, name: str, ndim: int | None = None) -> dict[str, Any]:
  """Metadata of an `nnx.Param` with the names of its axes.

  Flax puts a parameter on the mesh when it is made, if the names have rules
  there; without a mesh and rules that would be an error.

  Args:
    module: as in `parameter_axes`.
    name: as in `parameter_axes`.
    ndim: as in `parameter_axes`.
  """
  axes = parameter_axes(module, name, ndim)
  if axes is None:
    return {}
  known = spmd.get_logical_axis_rules()
  here = bool(known) and not jax.sharding.get_abstract_mesh().empty
  names: dict[str, Any] = {"out_sharding": axes}
  return names if here else names | {"eager_sharding": False}
