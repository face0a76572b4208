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
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import _checks
from nsa_jax.cache.state import Cache, check_batch
from nsa_jax.layers import core
from nsa_jax.layers.linen import (
  DenseAttention,
  NativeSparseAttention,
  layer_fields,
  named,
  projection_options,
  rms_norm,
)
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.embedding import embed
from nsa_jax.models.loss import logits_of, token_losses
from nsa_jax.models.remat import INPUT_NAME, remat_policy
from nsa_jax.ops.scope import keep
from nsa_jax.sharding import constrain, decoding_layout, per_token
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
    _checks.instance("config", self.config, TransformerConfig)
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
    layout = config.layout
    if self.decode:
      layout = decoding_layout(layout)
    shape = _checks.array("tokens", tokens, 2, "[B, T]").shape
    tokens = _checks.integers("tokens", tokens, shape)
    _checks.not_empty("tokens", tokens)
    caches = jax.tree.leaves(
      self.variables.get("cache", {}), is_leaf=lambda x: isinstance(x, Cache)
    )
    for held in caches[:1]:
      check_batch("tokens", tokens, held)
    if labels is not None:
      labels = _checks.integers(
        "labels",
        labels,
        tokens.shape,
        "one entry per row and token of `tokens`",
      )
    # With `decode`, each layer derives the positions from its cache.
    if positions is not None or not self.decode:
      positions, segment_ids = core.complete_positions(
        tokens,
        positions,
        segment_ids,
        config.segment_alignment,
        name="tokens",
        layout=layout,
      )

    if segment_ids is not None:
      # Even without a cotangent, the NaN of a padding token such as -1 would
      # reach the gradients of all parameters.
      ids = _checks.integers(
        "segment_ids",
        segment_ids,
        tokens.shape,
        "one entry per row and token of `tokens`",
      )
      tokens = keep(tokens, ids > 0)
    if config.vocab_rows > config.vocab_size:  # The other rows are no tokens.
      tokens = jnp.where(tokens < config.vocab_size, tokens, -1)
    embedding = self._table("embedding")
    # Out-of-range tokens give NaN instead of another token's embedding.
    x = per_token(
      layout,
      lambda table, tokens: embed(table, tokens, config.dtype),
      embedding,
      tokens,
    )
    if config.embedding_scale != 1:
      x = x * jnp.asarray(config.embedding_scale, x.dtype)
    x = self._blocks(x, positions, segment_ids, prefix_length)
    x = rms_norm(config, "final_norm")(x)
    head = embedding
    if not config.tie_embeddings:
      head = jnp.asarray(self._table("head"))
    capped: dict[str, Any] = {
      "vocab_size": config.vocab_size,
      "softcap": config.logit_softcap,
    }
    if labels is not None:
      losses = functools.partial(token_losses, **capped)
      return per_token(layout, losses, head, x, labels)
    return logits_of(x, head.astype(config.dtype), **capped)

  def _table(self, name):
    """A parameter with a row per token of the vocabulary."""
    config = self.config
    init: Any = nn.initializers.normal(config.model_dim**-0.5)
    if config.logical_axes:
      init = named("", name, init)
    shape = (config.vocab_rows, config.model_dim)
    return self.param(name, init, shape, config.param_dtype)

  def _blocks(self, x, positions, segment_ids, prefix_length):
    config = self.config
    block: Any = TransformerBlock
    if config.remat != "none" and not self.decode:
      block = nn.remat(
        block,
        prevent_cse=_prevent_cse(config),
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
      names = {"layers": config.layer_kinds[0]}
    else:
      names = {f"layer_{i}": kind for i, kind in enumerate(config.layer_kinds)}
    fields = (self.decode, self.max_append, prefix_length)
    blocks = [
      block(config.of_layer(i), kind, *fields, name=name)
      for i, (name, kind) in enumerate(names.items())
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


def _prevent_cse(config: TransformerConfig) -> bool:
  """Whether a recomputation needs barriers to stay apart from the first pass.

  Inside a scan, CSE cannot merge the two anyway.
  """
  return not config.scan_layers


# What the backward pass of SwiGLU keeps.
_MLP_NAMES = ("mlp_gate", "mlp_up")


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
  h = rms_norm(config, "mlp_norm")(x)
  gate, up = (
    checkpoint_name(
      dense(config.mlp_dim, **projection_options(config, name))(h), name
    )
    for name in _MLP_NAMES
  )
  down = dense(config.model_dim, **projection_options(config, "mlp_down"))
  return down(nn.silu(gate) * up)


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
    norm, mlp, layout = _norm, _mlp, self.config.layout
    if self.decode:
      layout = decoding_layout(layout)
    else:
      # Left to itself, the backward pass keeps every step of norms and SwiGLU,
      # in float32 or as wide as the hidden layer: more than twice its needs.
      recompute = functools.partial(
        nn.remat, prevent_cse=_prevent_cse(self.config)
      )
      saved = jax.checkpoint_policies.save_only_these_names(*_MLP_NAMES)
      norm, mlp = recompute(_norm), recompute(_mlp, policy=saved)
      x = checkpoint_name(x, INPUT_NAME)
    x = constrain(layout, x)
    h = norm(self, x)
    x = x + self._attention()(
      h,
      positions=positions,
      segment_ids=segment_ids,
      prefix_length=self.prefix_length,
    )
    x = constrain(layout, x)
    return constrain(layout, x + mlp(self, x)), None

  def _attention(self):
    config = self.config
    call: dict[str, Any] = {
      "decode": self.decode,
      "max_append": self.max_append,
      "name": "attention",
    }
    if self.kind == "nsa":
      return NativeSparseAttention(**layer_fields(config), **call)
    return DenseAttention(config, self.kind, **call)
