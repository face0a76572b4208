"""Decoder language model (Flax linen) with sparse or dense attention per layer.

Pre-norm RMSNorm and SwiGLU around `NativeSparseAttention` or, as baselines,
around full or window attention with the same kind of projections. Sampling is
in `nsa_jax.sampling`, training in `examples/`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nsa_jax import _checks
from nsa_jax.layers import arguments
from nsa_jax.layers.linen import (
  DenseAttention,
  NativeSparseAttention,
  named,
  projection_options,
  rms_norm,
)
from nsa_jax.models import decoder
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.remat import remat_policy
from nsa_jax.typing import Array, AttentionName


class TransformerLM(nn.Module):
  """Decoder language model.

  Attributes:
    config: shape and options.
    decode: append to a decode cache and attend over it, as in
      `NativeSparseAttention`; `init` with tokens [B, capacity] makes the cache.
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
    decoder.check_model(self.config, self.decode, self.max_append)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    prefix_length: int | None = None,
    labels: Array | None = None,
  ) -> Array:
    """Logits of the next token at every position, or the losses of labels.

    Args:
      tokens: int32 [B, T], in [0, vocab_size). Any other value makes its logits
        NaN, and may do so for its whole row; but padding (segment 0) may hold
        anything.
      positions: as in `NativeSparseAttention`.
      segment_ids: as in `NativeSparseAttention`; the block length is that of
        `config.nsa`, or the least that is a multiple of every layer's.
      prefix_length: as in `NativeSparseAttention`.
      labels: int32 [B, T], the tokens to predict, if losses are wanted. Any
        outside [0, vocab_size), such as -100, has loss 0 and no gradient.

    Returns:
      float32 [B, T, vocab_size]; with `labels` the cross-entropy in nats,
      float32 [B, T], computed in chunks of at most 2^26 logits.

    Raises:
      ValueError: if an argument does not fit.
    """
    config = self.config
    inputs = decoder.check_inputs(
      config,
      tokens,
      positions,
      segment_ids,
      labels,
      decode=self.decode,
      caches=self.variables.get("cache", {}),
    )
    embedding = self._table("embedding")
    x = decoder.embed_tokens(config, embedding, inputs.tokens, self.decode)
    x = self._blocks(x, inputs.positions, inputs.segment_ids, prefix_length)
    x = rms_norm(config, "final_norm")(x)
    head = embedding if config.tie_embeddings else self._table("head")
    return decoder.finish(config, head, x, inputs.labels, self.decode)

  def _table(self, name):
    """A parameter with a row per token of the vocabulary."""
    config = self.config
    init, shape = decoder.tables(config)[name]
    if config.logical_axes:
      init = named("", name, init)
    return self.param(name, init, shape, config.param_dtype)

  def _blocks(self, x, positions, segment_ids, prefix_length):
    config = self.config
    block: Any = TransformerBlock
    if config.remat != "none" and not self.decode:
      block = nn.remat(
        block,
        prevent_cse=decoder.prevent_cse(config),
        policy=remat_policy(config.remat),
      )
    if config.scan_layers:
      block = nn.scan(
        block,
        variable_axes=dict.fromkeys(
          ("params", "intermediates", "inspect", "cache"), 0
        ),
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
    fields = (self.decode, self.max_append, prefix_length)
    blocks = [
      block(own, kind, *fields, name=name)
      for name, (own, kind) in decoder.blocks(config).items()
    ]
    for one in blocks:
      x, _ = one(x, positions, segment_ids)
    return x


def unstack_layers(
  model: TransformerLM, params: Mapping[str, Any]
) -> tuple[TransformerLM, dict[str, Any]]:
  """Converts a model with `scan_layers` to one without, for decoding.

  A scan copies the stacked cache at every step; separate layers update their
  caches in place.

  Args:
    model: a model with `scan_layers`.
    params: its parameters, what `init` returns under "params".

  Returns:
    The model without `scan_layers`, and its parameters; those of the layers are
    copies.

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
  if not isinstance(model, TransformerLM):
    raise ValueError(
      f"`model` of type {type(model).__name__} must be a TransformerLM."
    )
  config = model.config
  if not config.scan_layers:
    raise ValueError("`model.config.scan_layers`=False: nothing is stacked.")
  if not isinstance(params, Mapping) or "layers" not in params:
    entries = _checks.show(params)
    if isinstance(params, Mapping):
      entries = f"the entries {sorted(map(str, params))}"
    raise ValueError(
      f"`params` has {entries}; it must have 'layers', as what `init` returns "
      'under "params" has.'
    )
  single = dict(params)
  stacked = single.pop("layers")
  leaves = jax.tree.leaves_with_path(stacked)
  if not leaves:
    raise ValueError("`params['layers']` holds no parameters.")
  for path, x in leaves:
    known = isinstance(x, np.ndarray | jax.Array)
    if not known or x.shape[:1] != (config.num_layers,):
      raise ValueError(
        f"`params['layers']{jax.tree_util.keystr(path)}` must be an array with "
        f"a leading axis of size `num_layers`={config.num_layers}, not "
        f"{_checks.show(x)}."
      )

  def layer(x: Any, i: int) -> Any:
    if not isinstance(x, nn.meta.AxisMetadata):
      return x[i]
    own: Any = x.remove_axis(0, {nn.PARTITION_NAME: "layers"})
    return own.replace_boxed(own.unbox(apply_constraint=False)[i])

  for i in range(config.num_layers):
    single[f"layer_{i}"] = jax.tree.map(
      functools.partial(layer, i=i),
      stacked,
      is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )
  config = dataclasses.replace(config, scan_layers=False)
  return model.clone(config=config), single


def _norm(block: "TransformerBlock", x: Array) -> Array:
  return rms_norm(block.config, "attention_norm")(x)


def _mlp(block: "TransformerBlock", x: Array) -> Array:
  """SwiGLU(norm(x))."""
  config = block.config
  dense = functools.partial(
    nn.Dense,
    use_bias=False,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
  )
  parts = {
    name: dense(features, **projection_options(config, name))
    for name, (_, features) in decoder.mlp_features(config).items()
  }
  return decoder.swiglu(parts, rms_norm(config, "mlp_norm")(x))


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + SwiGLU(norm(x)).

  Attributes:
    config: shape and options.
    kind: "nsa", "full" or "window".
    decode: as in `TransformerLM`.
    max_append: as in `TransformerLM`.
    prefix_length: as in the call of `TransformerLM`.
  """

  config: TransformerConfig
  kind: AttentionName
  decode: bool = False
  max_append: int = 1
  prefix_length: int | None = None

  @nn.compact
  def __call__(
    self, x: Array, positions: Array | None, segment_ids: Array | None
  ) -> tuple[Array, None]:
    """Maps [B, T, D] to [B, T, D]; the None is for `nn.scan` to stack."""

    def attention(h):
      return self._attention()(
        h,
        positions=positions,
        segment_ids=segment_ids,
        prefix_length=self.prefix_length,
      )

    x = decoder.block(
      self.config,
      x,
      norm=_norm,
      attention=attention,
      mlp=_mlp,
      bound=(self, self),
      remat=nn.remat,
      decode=self.decode,
    )
    return x, None

  def _attention(self):
    config = self.config
    call: dict[str, Any] = {
      "decode": self.decode,
      "max_append": self.max_append,
      "name": "attention",
    }
    if self.kind == "nsa":
      return NativeSparseAttention(**arguments.layer_fields(config), **call)
    return DenseAttention(config, self.kind, **call)
