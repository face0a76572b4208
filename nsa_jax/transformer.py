"""Decoder language model (Flax linen) with sparse or dense attention per layer.

Pre-norm RMSNorm and SwiGLU around `NativeSparseAttention`, or around full or
window attention with the same kind of projections as baselines. Sampling is in
`nsa_jax.generate`, training in `examples/`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from nsa_jax import _checks, cache
from nsa_jax.attention import window_attention
from nsa_jax.config import NSAConfig
from nsa_jax.layers import (
  NativeSparseAttention,
  begin_decoding,
  check_attributes,
  complete_positions,
  create_cache,
)
from nsa_jax.rope import RopeConfig, apply_rope
from nsa_jax.typing import KV, Array, Implementation

ATTENTIONS = ("nsa", "full", "window")
REMATS = ("none", "full", "save_attention")
# What the ops tag with `checkpoint_name`. With these kept, the selection never
# runs twice, nor does the forward pass of a branch whose implementation has a
# backward rule of its own.
SAVED_NAMES = (
  "nsa_compressed_out",
  "nsa_compressed_lse",
  "nsa_selected_out",
  "nsa_selected_lse",
  "nsa_window_out",
  "nsa_window_lse",
  "nsa_block_ids",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape and options of `TransformerLM`; frozen and hashable.

  Attributes:
    vocab_size: number of tokens; 256 for bytes.
    num_layers: blocks.
    model_dim: D, width of the residual stream.
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides `num_heads`.
    head_dim: H, of queries and keys.
    value_head_dim: V, of values; `head_dim` by default.
    mlp_dim: hidden width of SwiGLU.
    attention: "nsa", "full" or "window" (`nsa.window` tokens) for all layers,
      or one of them per layer. "full" runs in cuDNN on NVIDIA GPUs in half
      precision, without `segment_ids` and unless `implementation` is "xla" or
      "reference"; elsewhere its memory is quadratic in the length.
    nsa: hyper-parameters of the attention.
    compression: as in `NativeSparseAttention`; as are the next three.
    share_kv: one key/value projection for the three branches.
    rope_compressed: "block", "tokens" or "none".
    rope: rotary embedding, or None. Used by every kind of attention.
    normalize_qk: RMSNorm of queries and keys, in every kind of attention.
    tie_embeddings: the output head is the embedding.
    remat: "full" recomputes a block in the backward pass; "save_attention" as
      well, but keeps the results of the sparse attention and of the selection.
    scan_layers: one compiled block for all layers, which then share one kind
      of attention; parameters get a leading axis of `num_layers`. So does a
      decode cache, which the scan then copies at every step: `unstack_layers`.
    dtype: of the computation and of the residual stream; norms, softmax and
      logits are in float32.
    param_dtype: of the parameters.
    implementation: as in `native_sparse_attention`.

  Raises:
    ValueError: if a value breaks a rule.

  Example:
    >>> from nsa_jax import TransformerConfig
    >>> TransformerConfig.preset("tiny", num_layers=3).layer_kinds
    ('nsa', 'nsa', 'nsa')
  """

  vocab_size: int = 256
  num_layers: int
  model_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  value_head_dim: int | None = None
  mlp_dim: int
  attention: str | Sequence[str] = "nsa"
  nsa: NSAConfig = NSAConfig()  # noqa: RUF009, immutable
  compression: str = "mlp"
  share_kv: bool = False
  rope_compressed: str = "block"
  rope: RopeConfig | None = RopeConfig()  # noqa: RUF009, immutable
  normalize_qk: bool = False
  tie_embeddings: bool = True
  remat: str = "none"
  scan_layers: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  implementation: Implementation = None

  def __post_init__(self):
    check_attributes(self)
    for name in ("vocab_size", "num_layers", "model_dim", "mlp_dim"):
      _checks.static_int(name, getattr(self, name), 1)
    if not isinstance(self.nsa, NSAConfig):
      raise ValueError(f"`nsa`={self.nsa!r} must be an NSAConfig.")
    _checks.choice("remat", self.remat, REMATS)
    _checks.flag("tie_embeddings", self.tie_embeddings)
    _checks.flag("scan_layers", self.scan_layers)
    # Two spellings of one configuration must be equal and have one hash.
    for name in ("dtype", "param_dtype"):
      dtype = _checks.dtype(name, getattr(self, name))
      object.__setattr__(self, name, dtype)
    for name in ("attention", "implementation"):
      value = getattr(self, name)
      if isinstance(value, Sequence) and not isinstance(value, str):
        object.__setattr__(self, name, tuple(value))
    if not isinstance(self.attention, tuple):
      _checks.choice("attention", self.attention, ATTENTIONS)
      return
    for kind in self.attention:
      _checks.choice("attention", kind, ATTENTIONS)
    if len(self.attention) != self.num_layers:
      raise ValueError(
        f"`attention`={self.attention} must have `num_layers`="
        f"{self.num_layers} entries."
      )
    if self.scan_layers and len(set(self.attention)) > 1:
      raise ValueError(
        f"`attention`={self.attention} must be of one kind with `scan_layers`="
        "True: all layers are one compiled block."
      )

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """Kind of attention of every layer."""
    if isinstance(self.attention, str):
      return (self.attention,) * self.num_layers
    return tuple(self.attention)

  @classmethod
  def preset(cls, name: str, **overrides: Any) -> "TransformerConfig":
    """A named configuration.

    Args:
      name: "tiny" (T = 512, for a CPU), "small" (T = 2048) or "base"
        (T = 8192).
      **overrides: fields that replace the preset's.

    Raises:
      ValueError: if `name` is unknown or a field breaks a rule.

    Example:
      >>> from nsa_jax import TransformerConfig
      >>> TransformerConfig.preset("small", attention="full").model_dim
      384
    """
    _checks.choice("name", name, tuple(_PRESETS))
    _check_fields(cls, overrides)
    return cls(**{**_PRESETS[name], **overrides})

  def to_dict(self) -> dict[str, Any]:
    """The fields as JSON has them; `from_dict` is the inverse.

    Returns:
      A dictionary of strings, numbers, booleans, None, lists and dictionaries:
      a dtype is its name, `nsa` and `rope` are dictionaries of their fields.

    Example:
      >>> import json
      >>> from nsa_jax import TransformerConfig
      >>> config = TransformerConfig.preset("tiny", dtype="bfloat16")
      >>> fields = json.loads(json.dumps(config.to_dict()))
      >>> fields["dtype"], fields["nsa"]["window"], fields["rope"]["base"]
      ('bfloat16', 32, 10000.0)
      >>> TransformerConfig.from_dict(fields) == config
      True
    """
    fields = dataclasses.asdict(self)
    for name in ("dtype", "param_dtype"):
      fields[name] = fields[name].name
    return _to_json(fields)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "TransformerConfig":
    """The configuration of which `to_dict` gave the fields.

    Args:
      fields: what `to_dict` returned. A field that is missing takes its
        default: later versions read what earlier ones wrote.

    Raises:
      ValueError: if `fields` (or `nsa` or `rope` in it) is no dictionary, has
        an unknown field, or lacks one without a default, or if a value breaks
        a rule.

    Example:
      >>> from nsa_jax import TransformerConfig
      >>> fields = TransformerConfig.preset("tiny").to_dict()
      >>> del fields["rope"]
      >>> TransformerConfig.from_dict(fields).rope.base
      10000.0
    """
    _check_fields(cls, fields)
    values = dict(fields)
    if "nsa" in values:
      values["nsa"] = _nested(NSAConfig, "nsa", values["nsa"])
    if values.get("rope") is not None:
      values["rope"] = _nested(RopeConfig, "rope", values["rope"])
    for field in dataclasses.fields(cls):
      if field.name not in values and field.default is dataclasses.MISSING:
        raise ValueError(f"`{field.name}` is missing and has no default.")
    return cls(**values)


def _check_fields(kind, fields, name=""):
  """Raises ValueError unless `fields` is a dictionary of fields of `kind`."""
  if not isinstance(fields, Mapping):
    raise ValueError(
      f"`{name or 'fields'}`={fields!r} must be a dictionary of fields of "
      f"{kind.__name__}."
    )
  known = {field.name for field in dataclasses.fields(kind)}
  for field in fields:
    if field not in known:
      raise ValueError(
        f"`{name}{'.' if name else ''}{field}` must be a field of "
        f"{kind.__name__}: {', '.join(sorted(known))}."
      )


def _nested(kind, name, fields):
  """The configuration in the field `name` of another one."""
  _check_fields(kind, fields, name)
  return kind(**fields)


def _to_json(value):
  """What `json.loads` gives back for `value`: no tuples, no NumPy scalars."""
  if isinstance(value, dict):
    return {name: _to_json(entry) for name, entry in value.items()}
  if isinstance(value, tuple):
    return [_to_json(entry) for entry in value]
  return value.item() if isinstance(value, np.generic) else value


_PRESETS: dict[str, dict[str, Any]] = {
  "tiny": {
    "num_layers": 2,
    "model_dim": 128,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 32,
    "mlp_dim": 352,
    "nsa": NSAConfig(
      compression_block=8,
      compression_stride=4,
      selection_block=16,
      num_selected=4,
      num_initial=1,
      num_local=1,
      window=32,
    ),
  },
  "small": {
    "num_layers": 6,
    "model_dim": 384,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mlp_dim": 1024,
    "nsa": NSAConfig(
      compression_block=16,
      compression_stride=8,
      selection_block=32,
      num_selected=8,
      num_initial=1,
      num_local=2,
      window=128,
    ),
  },
  "base": {
    "num_layers": 16,
    "model_dim": 1024,
    "num_heads": 16,
    "num_kv_heads": 1,
    "head_dim": 64,
    "mlp_dim": 2816,
    "nsa": NSAConfig(),
  },
}


class TransformerLM(nn.Module):
  """Decoder language model.

  Attributes:
    config: shape and options.
    decode: append to a decode cache and attend over it, as in
      `NativeSparseAttention`; `init` with tokens [B, capacity] makes it.
    max_append: as in `NativeSparseAttention`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import TransformerConfig, TransformerLM
    >>> config = TransformerConfig.preset("tiny", num_layers=1, model_dim=16)
    >>> model = TransformerLM(config)
    >>> tokens = jnp.zeros((1, 32), jnp.int32)
    >>> init = jax.jit(model.init_with_output)
    >>> logits, params = init(jax.random.key(0), tokens)
    >>> logits.shape
    (1, 32, 256)
  """

  config: TransformerConfig
  decode: bool = False
  max_append: int = 1

  def __post_init__(self):
    _checks.flag("decode", self.decode)
    _checks.static_int("max_append", self.max_append, 1)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    prefix_length: int | None = None,
  ) -> Array:
    """Logits of the token after each token.

    Args:
      tokens: int32 [B, T], in [0, vocab_size); any other token makes the
        logits at its place NaN, and may do so in all of its row.
      positions: int32 [B, T] for RoPE; by default 0, 1, ... in each segment.
        With `decode` consecutive, by default from each row's length on.
      segment_ids: int32 [B, T] for packed or padded rows: contiguous runs that
        start at multiples of `config.nsa.selection_block`; 0 is padding. With
        `decode` one run per row from its first token on, and padding after it.
      prefix_length: as in `NativeSparseAttention`.

    Returns:
      float32 [B, T, vocab_size].

    Raises:
      ValueError: if an argument does not fit.
    """
    config = self.config
    tokens = _checks.array("tokens", tokens, 2, "[B, T]")
    tokens = _checks.integers("tokens", tokens, tokens.shape)
    # Each layer knows the positions that follow what its cache holds.
    if positions is not None or not self.decode:
      positions, segment_ids = complete_positions(
        tokens, positions, segment_ids, config.nsa.selection_block
      )

    shape = (config.vocab_size, config.model_dim)
    embedding = self.param(
      "embedding",
      nn.initializers.normal(config.model_dim**-0.5),
      shape,
      config.param_dtype,
    )
    # Out-of-range tokens give NaN instead of another token's embedding.
    x = (
      embedding.astype(config.dtype)
      .at[tokens]
      .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    x = self._blocks(x, positions, segment_ids, prefix_length)
    x = _norm(config, "final_norm")(x)
    head = embedding
    if not config.tie_embeddings:
      head = self.param(
        "head",
        nn.initializers.normal(config.model_dim**-0.5),
        shape,
        config.param_dtype,
      )
    return jnp.einsum(
      "btd,vd->btv",
      x,
      head.astype(config.dtype),
      preferred_element_type=jnp.float32,
    )

  def _blocks(self, x, positions, segment_ids, prefix_length):
    config = self.config
    block: Any = TransformerBlock
    if config.remat != "none" and not self.decode:
      saved = SAVED_NAMES if config.remat == "save_attention" else ()
      block = nn.remat(
        block,
        # Inside a scan XLA cannot merge the two passes anyway.
        prevent_cse=not config.scan_layers,
        policy=jax.checkpoint_policies.save_only_these_names(*saved),
      )
    if config.scan_layers:
      block = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      names = {"layers": config.layer_kinds[0]}
    else:
      names = {f"layer_{i}": kind for i, kind in enumerate(config.layer_kinds)}
    fields = (self.decode, self.max_append, prefix_length)
    blocks = [
      block(config, kind, *fields, name=name) for name, kind in names.items()
    ]
    for one in blocks:
      x, _ = one(x, positions, segment_ids)
    return x


def unstack_layers(
  model: TransformerLM, params: Mapping[str, Any]
) -> tuple[TransformerLM, dict[str, Any]]:
  """A model with `scan_layers` as one without it, for decoding.

  A scan copies the stacked cache at every step; single layers update theirs in
  place.

  Args:
    model: trained with `scan_layers`.
    params: its parameters, what `init` returns under "params".

  Returns:
    The model without `scan_layers`, and its parameters, copies of the layers.

  Raises:
    ValueError: if the model or the parameters are not stacked.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import TransformerConfig, TransformerLM, unstack_layers
    >>> config = TransformerConfig.preset(
    ...   "tiny", num_layers=2, model_dim=16, scan_layers=True
    ... )
    >>> model = TransformerLM(config)
    >>> init = jax.jit(model.init)
    >>> params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> model, params = unstack_layers(model, params)
    >>> sorted(params)
    ['embedding', 'final_norm', 'layer_0', 'layer_1']
  """
  config = model.config
  if not config.scan_layers:
    raise ValueError("`model.config.scan_layers`=False: nothing is stacked.")
  if "layers" not in params:
    raise ValueError(
      f"`params` has the entries {sorted(params)}; it must have 'layers', as "
      'what `init` returns under "params" has.'
    )
  single = dict(params)
  stacked = single.pop("layers")
  for i in range(config.num_layers):
    single[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
  config = dataclasses.replace(config, scan_layers=False)
  return model.clone(config=config), single


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + SwiGLU(norm(x)).

  Attributes:
    config: shape and options.
    kind: "nsa", "full" or "window".
    decode: as in `TransformerLM`; as are the next two.
    max_append: of the cache.
    prefix_length: of the call.
  """

  config: TransformerConfig
  kind: str
  decode: bool = False
  max_append: int = 1
  prefix_length: int | None = None

  @nn.compact
  def __call__(
    self, x: Array, positions: Array | None, segment_ids: Array | None
  ) -> tuple[Array, None]:
    """Maps [B, T, D] to [B, T, D]; the None is what `nn.scan` stacks."""
    config = self.config
    h = _norm(config, "attention_norm")(x)
    x = x + self._attention()(
      h,
      positions=positions,
      segment_ids=segment_ids,
      prefix_length=self.prefix_length,
    )
    h = _norm(config, "mlp_norm")(x)
    dense = functools.partial(
      nn.Dense,
      use_bias=False,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
    )
    gate = dense(config.mlp_dim, name="mlp_gate")(h)
    up = dense(config.mlp_dim, name="mlp_up")(h)
    x = x + dense(config.model_dim, name="mlp_down")(nn.silu(gate) * up)
    return x, None

  def _attention(self):
    config = self.config
    if self.kind != "nsa":
      return DenseAttention(
        config, self.kind, self.decode, self.max_append, name="attention"
      )
    return NativeSparseAttention(
      num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      value_head_dim=config.value_head_dim,
      config=config.nsa,
      compression=config.compression,
      share_kv=config.share_kv,
      rope_compressed=config.rope_compressed,
      rope=config.rope,
      normalize_qk=config.normalize_qk,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      implementation=config.implementation,
      decode=self.decode,
      max_append=self.max_append,
      name="attention",
    )


class DenseAttention(nn.Module):
  """Full or window attention, the baselines.

  Attributes:
    config: shape and options.
    kind: "full" or "window".
    decode: as in `TransformerLM`.
    max_append: of the cache.
  """

  config: TransformerConfig
  kind: str
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
    decoding = begin_decoding(self, x, segment_ids, prefix_length)
    if decoding is not None and positions is None:
      positions = decoding.positions
    positions, segment_ids = complete_positions(
      x, positions, segment_ids, config.nsa.selection_block
    )
    dense = functools.partial(
      nn.DenseGeneral,
      use_bias=False,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
    )
    kv_heads, head_dim = config.num_kv_heads, config.head_dim
    value_dim = config.value_head_dim or head_dim
    query = dense((config.num_heads, head_dim), name="query")(x)
    key = dense((kv_heads, head_dim), name="key")(x)
    value = dense((kv_heads, value_dim), name="value")(x)
    if config.normalize_qk:
      query = _norm(config, "query_norm")(query)
      key = _norm(config, "key_norm")(key)
    if config.rope is not None:
      query = apply_rope(query, positions, config.rope)
      key = apply_rope(key, positions, config.rope)
    if decoding is not None:
      out = self._attend_cache(query, KV(key, value), decoding)
    elif self.kind == "window":
      out, _ = window_attention(
        query,
        key,
        value,
        config=config.nsa,
        segment_ids=segment_ids,
        implementation=config.implementation,
      )
    else:
      out = _full_attention(query, key, value, segment_ids, self._portable())
    if self.decode and decoding is None:
      create_cache(
        self,
        KV(key, value),
        config=config.nsa,
        max_append=self.max_append,
        kind=self.kind,
      )
    out = dense(x.shape[-1], axis=(-2, -1), name="out")(out)
    return out if decoding is None else decoding.mark_lost(out)

  def _attend_cache(self, query, pair, decoding):
    config = self.config
    if self.kind == "window":
      held, chunk = decoding.add(self, config.nsa, window=pair)
      return cache.attend_window(
        query,
        held,
        config=config.nsa,
        query_offset=decoding.offset,
        window=chunk,
        implementation=config.implementation,
      )
    held, _ = decoding.add(self, config.nsa, selected=pair)
    if isinstance(decoding.offset, int) and decoding.offset == 0:
      return _full_attention(
        query, pair.key, pair.value, None, self._portable()
      )
    return cache.attend_full(query, held, query_offset=decoding.offset)

  def _portable(self):
    return self.config.implementation in ("xla", "reference")


def _full_attention(query, key, value, segment_ids, portable):
  """Causal attention in segments; head dimensions of any two sizes."""
  mask = None
  if segment_ids is not None:
    mask = (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
  head_dim, value_dim = query.shape[-1], value.shape[-1]
  # jax.nn.dot_product_attention wants one head dimension; zeros change nothing.
  width = max(head_dim, value_dim)
  query, key, value = (
    jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])
    for x in (query, key, value)
  )
  # With a mask cuDNN would take a [B, 1, T, T] bias: nothing is gained.
  cudnn = not portable and mask is None and _cudnn_can(query)
  out = jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=head_dim**-0.5,
    is_causal=True,
    implementation="cudnn" if cudnn else "xla",
  )
  return out[..., :value_dim]


def _cudnn_can(query):
  """Whether cuDNN's attention takes this dtype and width on the device here.

  Judged when tracing: differentiated, `lax.platform_dependent` would carry the
  [T, T] residuals of the branch not taken through a scan over layers.
  """
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    return False
  if query.shape[-1] % 8 or query.shape[-1] > 128:
    return False
  config: Any = jax.config
  device = config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.devices(device)[0]
  if "cuda" not in device.client.platform_version:
    return False
  return tuple(map(int, device.compute_capability.split("."))) >= (8, 0)


def _norm(config, name):
  # Statistics and scaling are in float32 whatever the dtype of the result.
  return nn.RMSNorm(
    dtype=config.dtype, param_dtype=config.param_dtype, name=name
  )
