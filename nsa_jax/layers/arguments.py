"""Arguments of a layer that stands where flax's attention stood.

What the arguments of `nn.MultiHeadDotProductAttention` and
`nnx.MultiHeadAttention` mean here, in every module system: which are honoured,
which have one value only, and where to turn for the others. Nothing here knows
Flax; how a layer computes is in `core`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nsa_jax import _checks
from nsa_jax.config import AttentionConfig
from nsa_jax.layers import core
from nsa_jax.sharding import decoding_layout
from nsa_jax.typing import Array, AttentionName

Initializer = Callable[..., Any]
# Of a projection, by its name and "kernel" or "bias".
Initializers = Callable[[str, str], Any]

LECUN: Initializer = jax.nn.initializers.lecun_normal()
ZEROS: Initializer = jax.nn.initializers.zeros
# Keys of a mapping in `kernel_init`: of projections, and of phi.
_PROJECTIONS = ("query", "key", "value", "gate", "out")
_KERNELS = (*_PROJECTIONS, "phi")

_NO_DROPOUT = (
  "the weights are never materialised, and none can be dropped. `nn.Dropout` "
  "and `nnx.Dropout` stand after the layer."
)
_OWN_FUNCTION = (
  "`implementation` chooses the kernels, `select` the blocks, and the op "
  "`nsa_jax.native_sparse_attention` serves layers of your own."
)
_OWN_PRODUCTS = "`precision`, `dtype` and `layout` say how products are taken."
_OWN_INPUTS = "the attention is causal self-attention."
_OWN_AXES = (
  "`logical_axes` names the axes of parameters; initialisers by "
  "`nnx.with_metadata` bring metadata of your own."
)
# Arguments of flax's layers by name: the values that say what happens here
# anyway, and the way out for others. With None any value will do.
_FIXED: dict[str, tuple[tuple[Any, ...] | None, str]] = {
  "broadcast_dropout": (None, ""),
  "deterministic": (None, ""),
  "force_fp32_for_softmax": (None, ""),
  "keep_rngs": (None, ""),
  "dropout_rate": ((0,), _NO_DROPOUT),
  "attention_fn": ((None,), _OWN_FUNCTION),
  "in_kv_features": ((None,), _OWN_INPUTS),
  **dict.fromkeys(
    (
      "qkv_dot_general",
      "out_dot_general",
      "qkv_dot_general_cls",
      "out_dot_general_cls",
      "qk_attn_weights_einsum_cls",
      "attn_weights_value_einsum_cls",
      "qkv_promote_dtype",
      "out_promote_dtype",
      "ln_promote_dtype",
      "out_sharding",
      "qkv_sharding",
    ),
    ((None,), _OWN_PRODUCTS),
  ),
  **dict.fromkeys(
    (
      "kernel_metadata",
      "out_kernel_metadata",
      "bias_metadata",
      "out_bias_metadata",
      "query_ln_scale_metadata",
      "key_ln_scale_metadata",
    ),
    ((None,), _OWN_AXES),
  ),
}
FIXED = frozenset(_FIXED)


def check_fixed(arguments: Mapping[str, Any]) -> None:
  """Checks arguments named in `FIXED`, each with one meaning here."""
  for name, value in arguments.items():
    values, way = _FIXED[name]
    if values is not None and not any(
      value is x or (x is not None and np.isscalar(value) and value == x)
      for x in values
    ):
      raise ValueError(
        f"`{name}`={_checks.show(value)} must be {values[0]}: {way}"
      )


def head_sizes(
  num_heads: Any,
  num_kv_heads: Any,
  head_dim: Any,
  qkv_features: Any,
  features: int | None,
  name: str = "`in_features`",
) -> tuple[int, int | None]:
  """Resolves K, and H from the features of all heads or of the input.

  Args:
    num_heads: N.
    num_kv_heads: K; N if None.
    head_dim: H, or None.
    qkv_features: N H, or None.
    features: D, from which H follows without both; None if it is not known yet.
    name: of D in messages.

  Returns:
    (K, H), where H is None if nothing tells it.
  """
  num_heads = _checks.static_int("num_heads", num_heads, 1)
  if num_kv_heads is None:
    num_kv_heads = num_heads
  if qkv_features is not None:
    qkv_features = _checks.static_int("qkv_features", qkv_features, 1)
  if head_dim is not None:
    head_dim = _checks.static_int("head_dim", head_dim, 1)
    if qkv_features not in (None, num_heads * head_dim):
      raise ValueError(
        f"`qkv_features`={qkv_features} must be `num_heads` * `head_dim`="
        f"{num_heads * head_dim}, or None."
      )
    return num_kv_heads, head_dim
  total, what = qkv_features, "`qkv_features`"
  if total is None:
    total, what = features, name
  if total is None:
    return num_kv_heads, None
  if total % num_heads:
    raise ValueError(
      f"{what}={total} must be a multiple of `num_heads`={num_heads}, or "
      "`head_dim` be given."
    )
  return num_kv_heads, total // num_heads


# Fields of `AttentionConfig` that have another name in the layer.
_FIELDS = {"nsa": "config"}


def layer_fields(config: AttentionConfig) -> dict[str, Any]:
  """The options as keyword arguments of `NativeSparseAttention`."""
  return {
    _FIELDS.get(field.name, field.name): getattr(config, field.name)
    for field in dataclasses.fields(AttentionConfig)
  }


def attention_fields(layer: Any) -> dict[str, Any]:
  """The inverse: arguments of `AttentionConfig` from a layer's attributes."""
  names = (field.name for field in dataclasses.fields(AttentionConfig))
  return {name: getattr(layer, _FIELDS.get(name, name)) for name in names}


def of_call(config: AttentionConfig, decode: bool) -> AttentionConfig:
  """The options of a call: tokens that go to a cache are not split."""
  if not decode:
    return config
  layout = decoding_layout(config.layout)
  return dataclasses.replace(config, layout=layout)


def output_width(out_features: Any, features: int) -> int:
  """Features of the output: D without `out_features`."""
  if out_features is None:
    return features
  return _checks.static_int("out_features", out_features, 1)


def cache_sizes(value: Any, letters: str) -> tuple[int, ...]:
  """Checks the `input_shape` of a cache with so many sizes."""
  if (
    isinstance(value, Sequence)
    and not isinstance(value, str)
    and len(value) == letters.count(",") + 1
  ):
    return tuple(_checks.static_int("input_shape", size, 1) for size in value)
  raise ValueError(f"`input_shape`={_checks.show(value)} must be {letters}.")


def check_initializer(name: str, value: Any, entry: str = "") -> None:
  """Raises ValueError unless `value`, or this entry of it, is a function."""
  if not callable(value):
    raise ValueError(
      f"`{name}`{entry}={_checks.show(value)} must be an initialiser function."
    )


def initializers(
  kernel_init: Any,
  out_kernel_init: Any = None,
  bias_init: Any = ZEROS,
  out_bias_init: Any = None,
) -> Initializers:
  """Who initialises what.

  Args:
    kernel_init: an initialiser of all projections, or a mapping by `_KERNELS`.
    out_kernel_init: of "out", if it has one of its own.
    bias_init: of all projections.
    out_bias_init: of "out", if it has one of its own.

  Returns:
    A function of the name of a projection, such as "key_window", and "kernel"
    or "bias". For "phi" it returns None if phi has its defaults.

  Raises:
    ValueError: if something is no initialiser.
  """
  if isinstance(kernel_init, Mapping):
    for name, init in kernel_init.items():
      if name not in _KERNELS:
        raise ValueError(
          f"`kernel_init` has {_checks.show(name)}, which must be one of "
          f"{[*_KERNELS]}."
        )
      check_initializer("kernel_init", init, f"[{name!r}]")
    kernels = dict.fromkeys(_PROJECTIONS, LECUN) | dict(kernel_init)
  else:
    check_initializer("kernel_init", kernel_init)
    kernels = dict.fromkeys(_PROJECTIONS, kernel_init)
  check_initializer("bias_init", bias_init)
  biases = dict.fromkeys(_PROJECTIONS, bias_init)
  own = {"out_kernel_init": out_kernel_init, "out_bias_init": out_bias_init}
  for (name, init), table in zip(own.items(), (kernels, biases), strict=True):
    if init is not None:
      check_initializer(name, init)
      table["out"] = init
  tables = {"kernel": kernels, "bias": biases}
  return lambda name, what: tables[what].get(name.split("_")[0])


def of_projections(
  config: AttentionConfig,
  kind: AttentionName,
  inits: Initializers | None = None,
  use_bias: bool = False,
) -> Callable[[str], tuple[Any, Any, bool]]:
  """How every projection starts.

  Args:
    config: options of the layer.
    kind: "nsa", "full" or "window".
    inits: what `initializers` returns; the defaults if None.
    use_bias: all projections have a bias.

  Returns:
    A function of a name that returns the initialisers of kernel and bias, and
    whether there is a bias.
  """
  inits = inits or initializers(LECUN)
  biases = core.initial_biases(config, kind)

  def of(name: str) -> tuple[Any, Any, bool]:
    kernel = core.initial_kernel(config, name, inits(name, "kernel"))
    bias = inits(name, "bias")
    if name == "gate" and config.gate_bias is not None:
      bias = biases[name]
    return kernel, bias, use_bias or name in biases

  return of


def check_call(
  name: str, x: Any, others: Mapping[str, Any], mask: Any, sow_weights: Any
) -> Array:
  """Checks what a call of flax's attention may say beside its input.

  Args:
    name: of the input in messages.
    x: [B, T, D].
    others: None, or the input itself, by the names of arguments.
    mask: None, or one that can be read and is exactly causal.
    sow_weights: False.

  Returns:
    x.
  """
  for other, value in others.items():
    if value is not None and value is not x:
      raise ValueError(
        f"`{other}` must be None or `{name}` itself: causal self-attention "
        f"only. Pass `{name}` alone; for padded or packed sequences pass "
        "`segment_ids`."
      )
  x = _checks.layer_input(x, name)
  if mask is not None:
    _check_mask(mask, x)
  _checks.flag("sow_weights", sow_weights)
  if sow_weights:
    raise ValueError(
      f"`sow_weights`={sow_weights} must be False: the weights are never "
      "materialised. `gates` and `block_ids` are sown."
    )
  return x


def _check_mask(mask: Any, x: Array) -> None:
  """Raises ValueError unless `mask` says exactly what is done anyway."""
  way = (
    "the attention is causal without it. For padded or packed sequences pass "
    "`segment_ids`."
  )
  known = _checks.concrete(mask)
  if known is None:
    what = "traced and" if isinstance(mask, jax.core.Tracer) else "no array and"
    raise ValueError(
      f"`mask`={_checks.show(mask)} is {what} cannot be read. It must be None, "
      f"or exactly causal and known outside of `jax.jit`: leave it out, {way}"
    )
  batch, length = x.shape[:2]
  fits = known.ndim in (2, 3, 4) and known.shape[-2:] == (length, length)
  if fits and known.ndim == 4:
    fits = known.shape[0] in (1, batch)
  causal = np.tri(length, dtype=bool)
  if not fits or not ((known != 0) == causal).all():
    raise ValueError(
      f"`mask` of shape {known.shape} must be None or exactly causal, "
      f"`nn.make_causal_mask` of {length} tokens: {way}"
    )


def check_width(name: str, x: Array, width: int) -> None:
  """Checks that x [B, T, D] fits the parameters."""
  if x.shape[-1] != width:
    raise ValueError(
      f"`{name}` of shape {x.shape} must have D={width}, as the parameters "
      "have."
    )


def check_prefix_length(prefix_length: Any, decode: bool) -> int | None:
  """Checks a `prefix_length` and returns it."""
  if prefix_length is None:
    return None
  prefix_length = _checks.static_int("prefix_length", prefix_length, 0)
  if not decode:
    raise ValueError(f"`prefix_length`={prefix_length} needs `decode`=True.")
  return prefix_length


# What layers sow: of which collection, by name, the fields of `Attended`. Names
# of projections are taken.
SOWN: Mapping[str, Mapping[str, str]] = {
  "intermediates": {"gates": "gates", "block_ids": "block_ids"},
  "inspect": {
    "gates": "gates",
    "block_ids": "block_ids",
    "selected_query": "query",
    "selected_key": "key",
  },
}


def sown(collection: str, attended: core.Attended) -> dict[str, Any]:
  """What a layer sows into a collection, by name."""
  names = SOWN[collection]
  return {name: getattr(attended, field) for name, field in names.items()}
