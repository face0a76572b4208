"""Dense models made sparse: the same weights, with sparse attention."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nsa_jax import _checks
from nsa_jax.config import NSAConfig
from nsa_jax.layers import core
from nsa_jax.models import decoder
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.convert.load import check_params, shapes_of, unboxed
from nsa_jax.typing import BRANCHES, CompressionName, RopeCompressedName

# Those of phi that can start as the mean.
_COMPRESSIONS = ("mean", "weighted", "linear")


def to_nsa(
  config: TransformerConfig,
  params: Mapping[str, Any],
  *,
  layers: Sequence[int] | None = None,
  nsa: NSAConfig | None = None,
  compression: CompressionName = "mean",
  rope_compressed: RopeCompressedName = "tokens",
  gates: Sequence[float] = (0.05, 0.9, 0.05),
) -> tuple[TransformerConfig, dict[str, Any]]:
  """Replaces dense attention by Native Sparse Attention with its weights.

  All branches share the keys and values of the dense layer, phi starts as the
  mean of a block, and the gates start as constants with which the selected
  branch, nearest to full attention, does most. Training on teaches the model
  the rest.

  Args:
    config: of the dense model.
    params: its parameters, what `init` returns under "params".
    layers: indices of the layers to convert; all by default.
    nsa: hyper-parameters of the algorithm; by default every layer keeps its
      own. Layers that are not converted keep their window in any case.
    compression: phi: "mean", or "weighted" or "linear", which can learn.
    rope_compressed: as in `AttentionConfig`. The mean of rotated keys gives a
      block the mean of its tokens' scores.
    gates: initial gates, between 0 and 1, in the order compressed, selected,
      window.

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
    >>> config, params = to_nsa(config, params, layers=[1])
    >>> config.layer_kinds
    ('full', 'nsa')
    >>> nsa_jax.TransformerLM(config).apply({"params": params}, tokens).shape
    (1, 64, 256)
  """
  _checks.instance("config", config, TransformerConfig)
  _checks.choice("compression", compression, _COMPRESSIONS)
  chosen = _chosen(config, layers)
  biases = _gate_biases(gates)
  names = ["layers"] if config.scan_layers else [f"layer_{i}" for i in chosen]
  arrays = unboxed(params)
  check_params(arrays, shapes_of(config))
  kinds = list(config.layer_kinds)
  for i in chosen:
    kinds[i] = "nsa"
  sparse = dataclasses.replace(
    config,
    attention=kinds[0] if len(set(kinds)) == 1 else tuple(kinds),
    layer_nsa=_layer_nsa(config, chosen, nsa),
    compression=compression,
    share_kv=True,
    rope_compressed=rope_compressed,
    gate_bias=biases,
    gate_init_scale=0.0,
  )
  core.vectors(sparse)  # Raises NotImplementedError.
  blocks = decoder.blocks(sparse)
  made = dict(arrays)
  for name in names:
    convert = functools.partial(_sparse_parameters, blocks[name][0])
    if config.scan_layers:
      convert = jax.vmap(convert)
    made[name] = {
      **arrays[name],
      "attention": convert(arrays[name]["attention"]),
    }
  return sparse, made


def _layer_nsa(
  config: TransformerConfig, chosen: Sequence[int], nsa: Any
) -> list[NSAConfig]:
  """The hyper-parameters of every layer."""
  own = [config.of_layer(i).nsa for i in range(config.num_layers)]
  if nsa is None:
    return own
  _checks.instance("nsa", nsa, NSAConfig)
  # Dense layers read the window, and where segments may start.
  return [
    nsa
    if i in chosen or kind == "full"
    else dataclasses.replace(nsa, window=own[i].window)
    for i, kind in enumerate(config.layer_kinds)
  ]


def _gate_biases(gates: Any) -> tuple[float, ...]:
  """The logits of `gates`."""
  several = isinstance(gates, Sequence) and not isinstance(gates, str | bytes)
  found = [_checks.finite("gates", x) for x in gates] if several else []
  if len(found) != len(BRANCHES) or not all(0 < x < 1 for x in found):
    raise ValueError(
      f"`gates`={_checks.show(gates)} must be three numbers between 0 and 1."
    )
  return tuple(math.log(x / (1 - x)) for x in found)


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
