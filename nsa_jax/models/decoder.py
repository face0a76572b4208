"""What `TransformerLM` computes, without a module system.

A module system makes the parameters, binds them to functions and calls these
steps in order: `check_inputs`, `embed_tokens`, `block` for every one of
`blocks`, `finish`. Attention is in `nsa_jax.layers`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import _checks
from nsa_jax.cache.state import Cache, check_batch
from nsa_jax.layers import core
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.embedding import embed
from nsa_jax.models.loss import logits_of, token_losses
from nsa_jax.models.remat import INPUT_NAME
from nsa_jax.ops.scope import keep
from nsa_jax.sharding import Layout, constrain, decoding_layout, per_token
from nsa_jax.typing import Array, AttentionName


class Inputs(NamedTuple):
  """Valid arguments of a call; positions may be None with a decode cache."""

  tokens: Array
  positions: Array | None
  segment_ids: Array | None
  labels: Array | None


def check_model(config: Any, decode: Any, max_append: Any) -> None:
  """Checks what every `TransformerLM` is made of."""
  _checks.instance("config", config, TransformerConfig)
  _checks.flag("decode", decode)
  _checks.static_int("max_append", max_append, 1)


def layout_of(config: TransformerConfig, decode: bool) -> Layout | None:
  """How the arrays of a call are split."""
  return decoding_layout(config.layout) if decode else config.layout


def check_inputs(
  config: TransformerConfig,
  tokens: Any,
  positions: Any,
  segment_ids: Any,
  labels: Any,
  *,
  decode: bool,
  caches: Any,
) -> Inputs:
  """Validates the arguments of a call; padding becomes token 0.

  Args:
    config: that of the model.
    tokens: int [B, T].
    positions: int [B, T], or None.
    segment_ids: int [B, T], or None.
    labels: int [B, T], or None.
    decode: whether the model decodes.
    caches: a pytree with the caches of its layers.
  """
  shape = _checks.array("tokens", tokens, 2, "[B, T]").shape
  tokens = _checks.integers("tokens", tokens, shape)
  _checks.not_empty("tokens", tokens)
  held = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, Cache))
  for one in held[:1]:
    check_batch("tokens", tokens, one)
  rule = "one entry per row and token of `tokens`"
  if labels is not None:
    labels = _checks.integers("labels", labels, tokens.shape, rule)
  # With `decode`, each layer derives the positions from its cache.
  if positions is not None or not decode:
    positions, segment_ids = core.complete_positions(
      tokens,
      positions,
      segment_ids,
      config.segment_alignment,
      name="tokens",
      layout=layout_of(config, decode),
    )
  if segment_ids is not None:
    # Even without a cotangent, the NaN of a padding token such as -1 would
    # reach the gradients of all parameters.
    ids = _checks.integers("segment_ids", segment_ids, tokens.shape, rule)
    tokens = keep(tokens, ids > 0)
  return Inputs(tokens, positions, segment_ids, labels)


def tables(config: TransformerConfig) -> dict[str, tuple[Any, tuple[int, int]]]:
  """Initialiser and shape of the parameters with a row per token, by name."""
  init = jax.nn.initializers.normal(config.model_dim**-0.5)
  shape = config.vocab_rows, config.model_dim
  names = ["embedding"] if config.tie_embeddings else ["embedding", "head"]
  return {name: (init, shape) for name in names}


def blocks(
  config: TransformerConfig,
) -> dict[str, tuple[TransformerConfig, AttentionName]]:
  """Options and kind of attention of every block, by name; one if scanned."""
  kinds = config.layer_kinds
  names = [f"layer_{i}" for i in range(len(kinds))]
  if config.scan_layers:
    names = ["layers"]
  return {name: (config.of_layer(i), kinds[i]) for i, name in enumerate(names)}


def embed_tokens(
  config: TransformerConfig, table: Array, tokens: Array, decode: bool
) -> Array:
  """The residual stream before the first block, [B, T, D]."""
  if config.vocab_rows > config.vocab_size:  # The other rows are no tokens.
    tokens = jnp.where(tokens < config.vocab_size, tokens, -1)
  # Out-of-range tokens give NaN instead of another token's embedding.
  x = per_token(
    layout_of(config, decode),
    lambda table, tokens: embed(table, tokens, config.dtype),
    table,
    tokens,
  )
  if config.embedding_scale != 1:
    x = x * jnp.asarray(config.embedding_scale, x.dtype)
  return x


def finish(
  config: TransformerConfig,
  head: Array,
  x: Array,
  labels: Array | None,
  decode: bool,
) -> Array:
  """Logits or losses of the normalised residual stream x [B, T, D]."""
  capped: dict[str, Any] = {
    "vocab_size": config.vocab_size,
    "softcap": config.logit_softcap,
  }
  if labels is not None:
    losses = functools.partial(token_losses, **capped)
    return per_token(layout_of(config, decode), losses, head, x, labels)
  return logits_of(x, jnp.asarray(head).astype(config.dtype), **capped)


def prevent_cse(config: TransformerConfig) -> bool:
  """Whether a recomputation needs barriers to stay apart from the first pass.

  Inside a scan, CSE cannot merge the two anyway.
  """
  return not config.scan_layers


# What the backward pass of SwiGLU keeps.
_MLP_NAMES = ("mlp_gate", "mlp_up")


def mlp_features(config: TransformerConfig) -> dict[str, tuple[int, int]]:
  """Features of input and output of the linear maps of SwiGLU, by name."""
  width, hidden = config.model_dim, config.mlp_dim
  up = dict.fromkeys(_MLP_NAMES, (width, hidden))
  return up | {"mlp_down": (hidden, width)}


def swiglu(parts: Mapping[str, Callable[[Array], Array]], x: Array) -> Array:
  """SwiGLU of x [B, T, D] with the maps that `mlp_features` names."""
  gate, up = (checkpoint_name(parts[name](x), name) for name in _MLP_NAMES)
  return parts["mlp_down"](jax.nn.silu(gate) * up)


def block(
  config: TransformerConfig,
  x: Array,
  *,
  norm: Callable[..., Array],
  attention: Callable[[Array], Array],
  mlp: Callable[..., Array],
  bound: tuple[Any, Any],
  remat: Callable[..., Any],
  decode: bool,
) -> Array:
  """x + attention(norm(x)), then x + mlp(x), for x [B, T, D].

  Args:
    config: that of the model.
    x: the residual stream.
    norm: a function of the first of `bound` and x, the norm before attention.
    attention: of its result.
    mlp: a function of the second of `bound` and x, SwiGLU after its norm.
    bound: what hold the parameters of `norm` and `mlp`.
    remat: `jax.checkpoint` for functions of such.
    decode: whether the model decodes.
  """
  layout = layout_of(config, decode)
  if not decode:
    # Left to itself, the backward pass keeps every step of norms and SwiGLU,
    # in float32 or as wide as the hidden layer: more than twice its needs.
    recompute = functools.partial(remat, prevent_cse=prevent_cse(config))
    saved = jax.checkpoint_policies.save_only_these_names(*_MLP_NAMES)
    norm, mlp = recompute(norm), recompute(mlp, policy=saved)
    x = checkpoint_name(x, INPUT_NAME)
  x = constrain(layout, x)
  x = x + attention(norm(bound[0], x))
  x = constrain(layout, x)
  return constrain(layout, x + mlp(bound[1], x))
