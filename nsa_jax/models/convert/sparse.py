"""Dense models made sparse: the same weights, with sparse attention."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nsa_jax import _checks
from nsa_jax.config import NSAConfig
from nsa_jax.layers import core
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.convert.load import check_params, shapes_of
from nsa_jax.models.linen import TransformerLM
from nsa_jax.typing import (
  BRANCHES,
  Array,
  CompressionName,
  RopeCompressedName,
)

# Those of phi that can start as the mean.
_COMPRESSIONS = ("mean", "weighted", "linear")
# Without tokens to fit them: the gates of a small trained model, rounded.
_GATES = (0.05, 0.85, 0.1)
# What a gate may be fitted to: it must be able to learn.
_LEAST, _MOST = 0.02, 0.98


def to_nsa(
  config: TransformerConfig,
  params: Mapping[str, Any],
  *,
  tokens: Any = None,
  layers: Sequence[int] | None = None,
  nsa: NSAConfig | None = None,
  compression: CompressionName = "mean",
  rope_compressed: RopeCompressedName = "tokens",
) -> tuple[TransformerConfig, dict[str, Any]]:
  """Replaces dense attention by Native Sparse Attention with its weights.

  All branches share the keys and values of the dense layer, and phi starts as
  the mean. Gates start the same for all tokens: with `tokens`, for every head
  what brings its output nearest to the dense one, by least squares; otherwise
  0.05, 0.85 and 0.1. Their kernels start at 0. A model that is trained on
  afterwards learns the rest.

  Args:
    config: of the dense model.
    params: its parameters, what `init` returns under "params".
    tokens: int32 [B, T], text to fit the gates on; its rows should be as long
      as those that the model will read.
    layers: indices of the layers to convert; all by default.
    nsa: hyper-parameters of the converted layers; by default those that they
      have. Other layers keep their window.
    compression: phi: "mean", or "weighted" or "linear", which can learn.
    rope_compressed: as in `AttentionConfig`.

  Returns:
    The configuration and parameters of the sparse model. Arrays that the dense
    one has are not copied.

  Raises:
    ValueError: if an argument does not fit.
    NotImplementedError: if the attention has what the sparse one cannot do.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> from nsa_jax.models.convert import to_nsa
    >>> config = nsa_jax.TransformerConfig.preset(
    ...   "tiny", num_layers=2, model_dim=16, attention="full"
    ... )
    >>> tokens = jnp.arange(64)[None]
    >>> init = jax.jit(nsa_jax.TransformerLM(config).init)
    >>> params = init(jax.random.key(0), tokens)["params"]
    >>> config, params = to_nsa(config, params, tokens=tokens, layers=[1])
    >>> config.layer_kinds
    ('full', 'nsa')
    >>> nsa_jax.TransformerLM(config).apply({"params": params}, tokens).shape
    (1, 64, 256)
  """
  _checks.instance("config", config, TransformerConfig)
  _checks.choice("compression", compression, _COMPRESSIONS)
  chosen = _chosen(config, layers)
  # The blocks of parameters, by the first of their layers.
  names = {0: "layers"}
  if not config.scan_layers:
    names = {i: f"layer_{i}" for i in chosen}
  arrays = nn.meta.unbox(params)
  check_params(arrays, shapes_of(config))
  kinds = list(config.layer_kinds)
  for i in chosen:
    kinds[i] = "nsa"
  layer_nsa = [config.of_layer(i).nsa for i in range(config.num_layers)]
  if nsa is not None:
    _checks.instance("nsa", nsa, NSAConfig)
    # A layer that keeps its window keeps the width of it.
    layer_nsa = [
      own if kind == "window" else nsa
      for own, kind in zip(layer_nsa, kinds, strict=True)
    ]
  sparse = dataclasses.replace(
    config,
    attention=kinds[0] if len(set(kinds)) == 1 else tuple(kinds),
    layer_nsa=layer_nsa,
    compression=compression,
    share_kv=True,
    rope_compressed=rope_compressed,
    gate_bias=tuple(math.log(x / (1 - x)) for x in _GATES),
    gate_init_scale=0.0,
  )
  core.vectors(sparse)  # Raises NotImplementedError.
  params = dict(arrays)
  inputs = None
  if tokens is not None:
    shape = _checks.array("tokens", tokens, 2, "[B, T]").shape
    tokens = _checks.integers("tokens", tokens, shape)
    _checks.not_empty("tokens", tokens)
    inputs = _attention_inputs(config, params, tokens)

  def convert(i: int, dense: Any, x: Any) -> dict[str, Any]:
    before, after = config.of_layer(i), sparse.of_layer(i)
    made = _sparse_parameters(after, dense)
    if x is not None:
      kind = config.layer_kinds[i]
      made["gate"]["bias"] = _fit_gates(before, kind, after, dense, made, x)
    return made

  for i, name in names.items():
    block = dict(params[name])
    one = functools.partial(convert, i)
    x = None if inputs is None else inputs[name]
    if config.scan_layers:
      axes = (0, None if x is None else 0)
      block["attention"] = jax.vmap(one, axes)(block["attention"], x)
    else:
      block["attention"] = one(block["attention"], x)
    params[name] = block
  return sparse, params


def _chosen(config: TransformerConfig, layers: Any) -> list[int]:
  """The layers to convert, ascending."""
  kinds = config.layer_kinds
  if "nsa" in kinds:
    raise ValueError(
      f"`config.attention`={config.attention!r} must be dense in every layer."
    )
  if layers is None:
    return [*range(config.num_layers)]
  several = isinstance(layers, Sequence) and not isinstance(layers, str)
  if not several or not layers:
    raise ValueError(
      f"`layers`={_checks.show(layers)} must be a sequence of indices."
    )
  chosen = sorted({_checks.static_int("layers", x, 0) for x in layers})
  if chosen[-1] >= config.num_layers:
    raise ValueError(
      f"`layers`={_checks.show(layers)} must be less than `num_layers`="
      f"{config.num_layers}."
    )
  if config.scan_layers and len(chosen) < config.num_layers:
    raise ValueError(
      f"`layers`={_checks.show(layers)} must be all with `scan_layers`=True; "
      "`unstack_layers` makes them separate."
    )
  return chosen


def _sparse_parameters(
  config: TransformerConfig, dense: Mapping[str, Any]
) -> dict[str, Any]:
  """Parameters of a sparse layer from those of a dense one."""
  made = dict(dense)
  kernel = dense["query"]["kernel"]
  heads, dtype = (config.num_heads, len(BRANCHES)), kernel.dtype
  made["gate"] = {
    "kernel": jnp.zeros((kernel.shape[0], *heads), dtype),
    "bias": jnp.broadcast_to(jnp.asarray(config.gate_bias, dtype), heads),
  }
  for name in set(core.norms(config)) - set(dense):
    made[name] = dict(dense["key_norm"])
  for name, width in zip(
    core.COMPRESSIONS, (config.head_dim, config.value_dim), strict=True
  ):
    phi = _phi_of_means(config, width, dtype)
    if phi:
      made[name] = phi
  return made


def _phi_of_means(
  config: TransformerConfig, width: int, dtype: Any
) -> dict[str, Any]:
  """Parameters with which phi is the mean of the tokens."""
  block, kind = config.nsa.compression_block, config.compression
  phi = {}
  for name, (_, shape) in core.phi_parameters(
    kind, config.nsa, config.num_kv_heads, width
  ).items():
    value = jnp.zeros(shape, dtype)
    if name == "weight":
      mean = jnp.eye(width, dtype=dtype) if kind == "linear" else jnp.ones(())
      mean = jnp.tile(mean / block, (block, 1) if kind == "linear" else block)
      value = jnp.broadcast_to(mean, shape).astype(dtype)
    phi[name] = value
  return phi


@functools.partial(jax.jit, static_argnums=0)
def _attention_inputs(
  config: TransformerConfig, params: Mapping[str, Any], tokens: Array
) -> dict[str, Any]:
  """What every layer attends from, [B, T, D], by the name of its block."""
  _, found = TransformerLM(config).apply(
    {"params": params},
    tokens,
    capture_intermediates=lambda module, _: module.name == "attention_norm",
    mutable=["intermediates"],
  )
  return {
    name: block["attention_norm"]["__call__"][0]
    for name, block in found["intermediates"].items()
  }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_gates(
  config: TransformerConfig,
  kind: Any,
  sparse: TransformerConfig,
  dense: Mapping[str, Any],
  made: Mapping[str, Any],
  x: Array,
) -> Array:
  """Biases [N, 3] that bring the heads nearest to those of dense attention.

  Minimises |dense - sum over c of g_c Attn_c|^2 over the gates g of each head,
  within their bounds, by coordinate descent.
  """
  where: dict[str, Any] = {"positions": None, "segment_ids": None}
  target = core.dense_attention(
    config, kind, _bind(config, kind, dense), x, **where
  ).out
  heads = made["gate"]["bias"].shape
  parts = _bind(sparse, "nsa", made)
  # Gates of 1 in float32.
  parts["gate"] = lambda x: jnp.full((*x.shape[:2], *heads), 40.0)
  branches = []
  for branch in BRANCHES:
    alone = dataclasses.replace(sparse, branches=(branch,))
    branches.append(core.sparse_attention(alone, parts, x, **where).out)
  found = jnp.stack(branches).astype(jnp.float32)
  target = target.astype(jnp.float32)
  products = jnp.einsum("ibtnv,jbtnv->nij", found, found)
  wanted = jnp.einsum("ibtnv,btnv->ni", found, target)

  def sweep(_: Any, gates: Array) -> Array:
    for i in range(len(BRANCHES)):
      rest = (products[:, i] * gates).sum(1) - products[:, i, i] * gates[:, i]
      best = (wanted[:, i] - rest) / jnp.maximum(products[:, i, i], 1e-30)
      gates = gates.at[:, i].set(jnp.clip(best, _LEAST, _MOST))
    return gates

  start = jnp.broadcast_to(jnp.asarray(_GATES), heads)
  gates = jax.lax.fori_loop(0, 200, sweep, start)
  return jax.scipy.special.logit(gates).astype(made["gate"]["bias"].dtype)


def _bind(
  config: TransformerConfig, kind: Any, params: Mapping[str, Any]
) -> dict[str, Callable[..., Array]]:
  """The functions that `core` calls; "out" leaves the heads as they are."""

  def project(name: str) -> Callable[..., Array]:
    kernel, bias = params[name]["kernel"], params[name].get("bias", 0)
    return lambda x: jnp.einsum("btd,dnh->btnh", x, kernel) + bias

  def normalize(name: str) -> Callable[..., Array]:
    scale = params[name]["scale"]

    def apply(x: Array) -> Array:
      square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
      return x * jax.lax.rsqrt(square + config.norm_epsilon) * scale

    return apply

  def compress(name: str) -> Callable[..., Array]:
    own = params.get(name, {})
    return lambda x, ids: core.compress(
      config.compression, config.nsa, own, x, ids
    )

  parts = {name: project(name) for name in core.projections(config, kind)}
  parts |= {name: normalize(name) for name in core.norms(config, kind)}
  if kind == "nsa":
    parts |= {name: compress(name) for name in core.COMPRESSIONS}
  for name in core.vectors(config, kind):
    parts[name] = lambda name=name: params[name]
  return parts | {"out": lambda x: x}
