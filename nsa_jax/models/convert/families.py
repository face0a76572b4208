"""What a checkpoint of each family holds: tensors, and fields of config.json.

A family is a table of tensors, by the name of our parameter, and a table of the
fields that have the same meaning in a `TransformerConfig`. The few fields that
have not are read and written by functions. Files are read in `tensors`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from nsa_jax import _checks
from nsa_jax.config import NSAConfig
from nsa_jax.models.config import TransformerConfig
from nsa_jax.rope import RopeConfig
from nsa_jax.typing import AttentionName


class Tensor(NamedTuple):
  """A tensor of a checkpoint.

  Attributes:
    name: in the file; of a layer's tensor, after `model.layers.{i}.`.
    inputs: of a linear map [outputs, inputs], how many leading axes of our
      parameter are inputs; 0 of a vector or table, which has our order.
    flat: a bias, whose heads and features are one axis.
  """

  name: str
  inputs: int = 0
  flat: bool = False

  def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
    """The shape in the file of a parameter of the shape `ours`."""
    if not self.inputs:
      return (math.prod(ours),) if self.flat else tuple(ours)
    inputs, outputs = ours[: self.inputs], ours[self.inputs :]
    return math.prod(outputs), math.prod(inputs)

  def read(self, x: Any, ours: Sequence[int]) -> Any:
    """Our parameter from the array in the file."""
    return (x.T if self.inputs else x).reshape(ours)

  def write(self, x: Any) -> Any:
    """The array in the file from our parameter."""
    theirs = self.shape(x.shape)
    return x.reshape(theirs[::-1]).T if self.inputs else x.reshape(theirs)


# Heads and their features are the rows of a projection, head by head; those of
# `g_proj` are the gates compressed, selected, window of the first head, then of
# the second.
_BLOCK = {
  "attention_norm/scale": Tensor("input_layernorm.weight"),
  "attention/query/kernel": Tensor("self_attn.q_proj.weight", 1),
  "attention/key/kernel": Tensor("self_attn.k_proj.weight", 1),
  "attention/value/kernel": Tensor("self_attn.v_proj.weight", 1),
  "attention/out/kernel": Tensor("self_attn.o_proj.weight", 2),
  "mlp_norm/scale": Tensor("post_attention_layernorm.weight"),
  "mlp_gate/kernel": Tensor("mlp.gate_proj.weight", 1),
  "mlp_up/kernel": Tensor("mlp.up_proj.weight", 1),
  "mlp_down/kernel": Tensor("mlp.down_proj.weight", 1),
}
_INPUT_BIASES = {
  "attention/query/bias": Tensor("self_attn.q_proj.bias", flat=True),
  "attention/key/bias": Tensor("self_attn.k_proj.bias", flat=True),
  "attention/value/bias": Tensor("self_attn.v_proj.bias", flat=True),
}
_BIASES = _INPUT_BIASES | {
  "attention/out/bias": Tensor("self_attn.o_proj.bias")
}
_QK_NORMS = {
  "attention/query_norm/scale": Tensor("self_attn.q_norm.weight"),
  "attention/key_norm/scale": Tensor("self_attn.k_norm.weight"),
}
_GATES = {"attention/gate/kernel": Tensor("self_attn.g_proj.weight", 1)}

# Outside the layers, the same in every family.
TABLES = {
  "embedding": Tensor("model.embed_tokens.weight"),
  "final_norm/scale": Tensor("model.norm.weight"),
  "head": Tensor("lm_head.weight"),
}
LAYER = "model.layers.{}."
# Tensors that some versions wrote and none reads.
UNREAD = (
  r"model\.rotary_emb\.inv_freq",
  r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


@dataclasses.dataclass(frozen=True)
class Family:
  """The checkpoints with one `model_type`.

  Attributes:
    architecture: the class in transformers.
    block: tensors of a layer, by the name of our parameter.
    has_biases: `attention_bias` says whether all projections have biases;
      None: those of the query, the keys and the values have.
    normalize_qk: queries and keys have norms.
    windows: which layers have a window, if there is one: "all", or "some" that
      fields name; None: none have.
    sparse: the layers are sparse.
    head_dim: where `head_dim` is missing; 0 for D / N.
  """

  architecture: str
  block: Mapping[str, Tensor]
  has_biases: bool | None = True
  normalize_qk: bool = False
  windows: Literal["all", "some"] | None = None
  sparse: bool = False
  head_dim: int = 0


FAMILIES: dict[str, Family] = {
  "llama": Family("LlamaForCausalLM", _BLOCK | _BIASES),
  "mistral": Family("MistralForCausalLM", _BLOCK, False, windows="all"),
  "qwen2": Family(
    "Qwen2ForCausalLM", _BLOCK | _INPUT_BIASES, None, windows="some"
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _BLOCK | _BIASES | _QK_NORMS,
    normalize_qk=True,
    windows="some",
    head_dim=128,
  ),
  "llama-nsa": Family(
    "LlamaNSAForCausalLM", _BLOCK | _BIASES | _GATES, sparse=True
  ),
}

# Fields with the same meaning, and ours.
_SAME = {
  "vocab_size": "vocab_size",
  "hidden_size": "model_dim",
  "intermediate_size": "mlp_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
}
# The only values that the model has.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False}
# These change neither parameters nor logits.
_IGNORED = frozenset(
  (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cls_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "mask_token_id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_version",
    "use_cache",
  )
)
_SPARSE = {"compression": "mean", "share_kv": True, "rope_compressed": "tokens"}
_WINDOW, _FULL = "sliding_attention", "full_attention"


class _Fields:
  """The fields of a config.json, and which were read."""

  def __init__(self, fields: Mapping[str, Any], where: str = ""):
    self._fields = fields
    self._where = where
    self.unread = set(fields)

  def get(self, name: str, default: Any = None, missing: Any = None) -> Any:
    """The value; the default if it is null, or missing without `missing`."""
    self.unread.discard(name)
    value = self._fields.get(name, missing)
    return default if value is None else value

  def need(self, name: str) -> Any:
    value = self.get(name)
    if value is None:
      raise ValueError(f"config.json lacks the field `{self._where}{name}`.")
    return value

  def integer(self, name: str, default: int | None = None) -> int:
    """A positive integer, needed if there is no default."""
    value = self.need(name) if default is None else self.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(
        f"config.json has `{self._where}{name}`={_checks.show(value)}, which "
        "must be a positive integer."
      )
    return value

  def number(self, name: str, default: float | None = None) -> float:
    """A positive number, needed if there is no default."""
    value = self.need(name) if default is None else self.get(name, default)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 < value < math.inf:
      raise ValueError(
        f"config.json has `{self._where}{name}`={_checks.show(value)}, which "
        "must be a positive number."
      )
    return value

  def flag(self, name: str, default: bool) -> bool:
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise ValueError(
        f"config.json has `{self._where}{name}`={_checks.show(value)}, which "
        "must be true or false."
      )
    return value

  def fixed(self, name: str, *known: Any) -> None:
    """Raises NotImplementedError unless the field has one of the values."""
    value = self.get(name, known[0])
    if value not in known:
      raise NotImplementedError(
        f"config.json has `{self._where}{name}`={_checks.show(value)}; "
        f"nsa_jax takes {' or '.join(map(repr, known))}."
      )

  def check_all_read(self, ignore: Sequence[str]) -> None:
    for name in sorted(self.unread):
      if self._where + name in ignore:
        continue
      value = self._fields[name]
      if value is None or value is False:  # An option that is off.
        continue
      raise ValueError(
        f"config.json has the field `{self._where}{name}`="
        f"{_checks.show(value)}, which nsa_jax does not know. If it changes "
        f"neither parameters nor logits, `ignore`=[{self._where + name!r}] "
        "passes over it."
      )


def family_of(fields: Mapping[str, Any]) -> Family:
  """The family of a config.json.

  Raises:
    ValueError: if it names none.
    NotImplementedError: if it names another one.
  """
  name = _Fields(fields).need("model_type")
  family = FAMILIES.get(str(name).replace("_", "-"))
  if family is None:
    raise NotImplementedError(
      f"config.json has `model_type`={_checks.show(name)}; nsa_jax reads "
      f"{', '.join(map(repr, FAMILIES))}."
    )
  return family


def check_ignore(value: Any) -> None:
  """Raises ValueError unless `value` is a sequence of names."""
  several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
  if not several or not all(isinstance(name, str) for name in value):
    raise ValueError(
      f"`ignore`={_checks.show(value)} must be a sequence of names."
    )


def check_overrides(argument: str, overrides: Any) -> None:
  """Raises ValueError unless the keys are fields of a TransformerConfig."""
  _checks.instance(argument, overrides, Mapping)
  known = {field.name for field in dataclasses.fields(TransformerConfig)}
  for name in overrides:
    if name not in known:
      raise ValueError(
        f"`{argument}` has {_checks.show(name)}, which must be a field of "
        f"TransformerConfig: {', '.join(sorted(known))}."
      )


def read_config(
  fields: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
  overrides: Mapping[str, Any] | None = None,
) -> TransformerConfig:
  """The configuration of a model from the fields of its config.json.

  Args:
    fields: what config.json holds.
    ignore: unknown fields to pass over, such as "a" or "rope_scaling.b".
    overrides: fields of the `TransformerConfig`, which come first.

  Raises:
    ValueError: if a field is missing or unknown.
    NotImplementedError: if it has a value that the model cannot have.

  Example:
    >>> from nsa_jax.models.convert import read_config
    >>> config = read_config({
    ...   "model_type": "qwen3", "vocab_size": 100, "hidden_size": 64,
    ...   "intermediate_size": 128, "num_hidden_layers": 2,
    ...   "num_attention_heads": 4, "num_key_value_heads": 2,
    ... })
    >>> config.head_dim, config.normalize_qk, config.attention
    (128, True, 'full')
  """
  _checks.instance("fields", fields, Mapping)
  check_ignore(ignore)
  overrides = {} if overrides is None else overrides
  check_overrides("overrides", overrides)
  family = family_of(fields)
  source = _Fields(fields)
  source.unread -= _IGNORED
  for name, value in _FIXED.items():
    source.fixed(name, value)
  options: dict[str, Any] = {
    ours: source.integer(name) for name, ours in _SAME.items()
  }
  heads = options["num_heads"]
  own = family.head_dim or max(options["model_dim"] // heads, 1)
  options |= {
    "num_kv_heads": source.integer("num_key_value_heads", heads),
    "head_dim": source.integer("head_dim", own),
    "norm_epsilon": source.number("rms_norm_eps", 1e-6),
    "tie_embeddings": source.flag("tie_word_embeddings", False),
    "normalize_qk": family.normalize_qk,
    "biases": _read_biases(source, family),
  }
  options["rope"] = _read_rope(source, options["head_dim"], ignore)
  options |= _read_layers(source, family, options["num_layers"])
  source.check_all_read(ignore)
  try:
    return TransformerConfig(**{**options, **overrides})
  except ValueError as error:
    raise ValueError(f"config.json and `overrides`: {error}") from error


def _read_biases(source, family):
  if family.has_biases is None:
    source.fixed("attention_bias", True)
    return ("query", "key", "value")
  if not family.has_biases:
    source.fixed("attention_bias", False)
    return ()
  every = ("query", "key", "value", "out")
  return every if source.flag("attention_bias", False) else ()


def _read_layers(
  source: _Fields, family: Family, num_layers: int
) -> dict[str, Any]:
  """Kinds of attention and the window."""
  if family.sparse:
    block = source.integer("block_size")
    nsa = NSAConfig(
      block,
      block,
      block,
      num_selected=source.integer("block_counts"),
      num_initial=0,
      num_local=1,
      window=source.integer("window_size"),
    )
    return _SPARSE | {"attention": "nsa", "nsa": nsa}
  if not family.windows:
    return {"attention": "full"}
  # null is none; one that is missing has transformers' default.
  window = source.get("sliding_window", missing=4096)
  types = source.get("layer_types")
  first = 0
  if family.windows == "some":
    if not source.flag("use_sliding_window", False):
      window = None
    first = source.get("max_window_layers", 28)
    if window is not None and first:  # 0: from the first layer on.
      first = source.integer("max_window_layers", 28)
  if types is None:
    wide = num_layers if window is None else first
    types = [_FULL if i < wide else _WINDOW for i in range(num_layers)]
  if not isinstance(types, list | tuple) or len(types) != num_layers:
    raise ValueError(
      f"config.json has `layer_types`={_checks.show(types)}, which must have "
      f"an entry for each of {num_layers} layers."
    )
  kinds: dict[str, AttentionName] = {_FULL: "full", _WINDOW: "window"}
  for i, kind in enumerate(types):
    if not isinstance(kind, str) or kind not in kinds:
      raise NotImplementedError(
        f"config.json has `layer_types[{i}]`={_checks.show(kind)}; nsa_jax "
        f"takes {' or '.join(map(repr, kinds))}."
      )
  layers = [kinds[kind] for kind in types]
  if "window" not in layers:
    return {"attention": "full"}
  if window is None:
    raise ValueError(
      "config.json has `layer_types` with 'sliding_attention', and "
      "`sliding_window`=None or `use_sliding_window`=False."
    )
  same = len(set(layers)) == 1
  return {
    "attention": layers[0] if same else layers,
    "nsa": NSAConfig(window=source.integer("sliding_window", window)),
  }


def _read_rope(
  source: _Fields, head_dim: int, ignore: Sequence[str]
) -> RopeConfig:
  """From `rope_theta` and `rope_scaling`, or `rope_parameters` of version 5."""
  longest = source.integer("max_position_embeddings", 2048)
  name = "rope_parameters"
  given = source.get(name)
  old = source.get("rope_scaling")
  if given is not None and old not in (None, given):
    raise ValueError(
      f"config.json has `{name}`={_checks.show(given)}, which must be "
      f"`rope_scaling`={_checks.show(old)} if it has both."
    )
  if given is None:
    name, given = "rope_scaling", old or {}
  if not isinstance(given, Mapping) or any(
    isinstance(value, Mapping) for value in given.values()
  ):
    raise NotImplementedError(
      f"config.json has `{name}`={_checks.show(given)}; nsa_jax takes one "
      "scaling for all layers."
    )
  scaling = _Fields(given, f"{name}.")

  def either(field: str, default: float) -> float:
    """A number that newer versions have in `rope_parameters`."""
    outer, inner = source.get(field), scaling.get(field)
    if outer is not None and inner not in (None, outer):
      raise ValueError(
        f"config.json has `{field}`={_checks.show(outer)}, which must be "
        f"`{name}.{field}`={_checks.show(inner)} if it has both."
      )
    return (source if inner is None else scaling).number(field, default)

  part = either("partial_rotary_factor", 1.0)
  options: dict[str, Any] = {
    "base": either("rope_theta", 10_000.0),
    "original_max_position": longest,
    "rotary_dim": None if part == 1 else int(head_dim * part),
  }
  kind = scaling.get("type", "default")
  kind = scaling.get("rope_type", kind)
  original = scaling.integer("original_max_position_embeddings", longest)
  if kind in ("linear", "dynamic"):
    options |= {"factor": scaling.number("factor"), "scaling": kind}
  elif kind == "llama3":
    options |= {
      "scaling": kind,
      "factor": scaling.number("factor"),
      "original_max_position": original,
      "beta_fast": scaling.number("high_freq_factor"),
      "beta_slow": scaling.number("low_freq_factor"),
    }
  elif kind == "yarn":
    scaling.fixed("truncate", True)
    factor = scaling.number("factor", longest / original)
    options |= {
      "scaling": "yarn_index",
      "factor": factor,
      "original_max_position": original,
      "beta_fast": scaling.number("beta_fast", 32),
      "beta_slow": scaling.number("beta_slow", 1),
      "temperature": _yarn_temperature(scaling, factor),
    }
  elif kind != "default":
    raise NotImplementedError(
      f"config.json has `{name}.rope_type`={_checks.show(kind)}; nsa_jax takes "
      "'default', 'linear', 'dynamic', 'llama3' or 'yarn'."
    )
  scaling.check_all_read(ignore)
  try:
    return RopeConfig(**options)
  except ValueError as error:
    raise ValueError(f"config.json has `{name}`: {error}") from error


def _yarn_temperature(scaling: _Fields, factor: float) -> float | None:
  names = ("mscale", "mscale_all_dim")
  parts = [scaling.number(name) for name in names if scaling.get(name)]
  if scaling.get("attention_factor") is not None:
    return scaling.number("attention_factor")
  if len(parts) < len(names):
    return None
  over, under = (0.1 * part * math.log(factor) + 1 for part in parts)
  return over / under


# ---------------------------------------------------------------------- export


def write_config(config: TransformerConfig, name: str) -> dict[str, Any]:
  """The fields of a config.json, from which `read_config` makes `config`.

  Args:
    config: of the model.
    name: of the family.

  Raises:
    ValueError: if a checkpoint of the family has no place for an option.
  """
  _checks.instance("config", config, TransformerConfig)
  _checks.choice("name", name, tuple(FAMILIES))
  family = FAMILIES[name]
  fields: dict[str, Any] = {
    "model_type": name,
    "architectures": [family.architecture],
    "torch_dtype": config.param_dtype.name,
  }
  fields |= {theirs: getattr(config, ours) for theirs, ours in _SAME.items()}
  fields |= _FIXED if family.has_biases else {"hidden_act": "silu"}
  fields |= {
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
  }
  if family.has_biases:
    fields["attention_bias"] = bool(config.biases)
  fields |= _write_rope(config.rope, config.head_dim)
  fields |= _write_layers(config, family)
  kept = read_config(fields)
  for option, found in _compared(kept).items():
    value = _compared(config)[option]
    if value != found:
      raise ValueError(
        f"`config.{option}`={_checks.show(value)} must be "
        f"{_checks.show(found)} in a checkpoint of `family`={name!r}."
      )
  return fields


def _write_rope(rope: RopeConfig | None, head_dim: int) -> dict[str, Any]:
  if rope is None:  # The comparison says so.
    return {}
  longest = rope.original_max_position
  fields: dict[str, Any] = {"rope_theta": rope.base}
  if rope.rotary_dim is not None:
    part = rope.rotary_dim / head_dim
    if int(head_dim * part) < rope.rotary_dim:  # By rounding.
      part = math.nextafter(part, 1)
    fields["partial_rotary_factor"] = part
  scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
  if rope.scaling == "llama3":
    scaling |= {
      "low_freq_factor": rope.beta_slow,
      "high_freq_factor": rope.beta_fast,
    }
  elif rope.scaling == "yarn_index":
    scaling |= {
      "rope_type": "yarn",
      "beta_fast": rope.beta_fast,
      "beta_slow": rope.beta_slow,
    }
    if rope.temperature is not None:
      scaling["attention_factor"] = rope.temperature
  if rope.scaling in ("llama3", "yarn_index"):
    scaling["original_max_position_embeddings"] = longest
    longest = round(longest * rope.factor)
  if rope.factor > 1:
    fields["rope_scaling"] = scaling
  return fields | {"max_position_embeddings": longest}


def _write_layers(config: TransformerConfig, family: Family) -> dict[str, Any]:
  nsa, kinds = config.nsa, config.layer_kinds
  if family.sparse:
    return {
      "block_size": nsa.selection_block,
      "block_counts": nsa.num_selected,
      "window_size": nsa.window,
    }
  if not family.windows or "window" not in kinds:
    return {"sliding_window": None} if family.windows else {}
  fields: dict[str, Any] = {"sliding_window": nsa.window}
  if family.windows == "some":
    fields["use_sliding_window"] = True
    # transformers knows no more of them than where they begin, before 4.53.
    fields["max_window_layers"] = kinds.index("window")
    names = {"full": _FULL, "window": _WINDOW}
    fields["layer_types"] = [names.get(kind, kind) for kind in kinds]
  return fields


def _compared(config: TransformerConfig) -> dict[str, Any]:
  """The options that a checkpoint fixes."""
  kinds = set(config.layer_kinds)
  names = [
    *_SAME.values(),
    "num_kv_heads",
    "head_dim",
    "value_dim",
    "norm_epsilon",
    "tie_embeddings",
    "normalize_qk",
    "biases",
    "embedding_scale",
    "logit_softcap",
    "score_softcap",
    "attention_sinks",
    "layer_kinds",
    "layer_nsa",
  ]
  if "nsa" in kinds:
    names += [*_SPARSE, "nsa", "branches", "select"]
  found = {name: getattr(config, name) for name in names}
  if "nsa" in kinds:
    # A bias of the gates is a parameter, whatever it starts as.
    found["gate_bias"] = config.gate_bias
  if "window" in kinds:
    found["nsa.window"] = config.nsa.window
  return found | {"rope": _rope_in_use(config.rope)}


def _rope_in_use(rope: RopeConfig | None) -> RopeConfig | None:
  """The fields that are read; the others have their defaults."""
  if rope is None:
    return None
  options: dict[str, Any] = {
    "base": rope.base,
    "rotary_dim": rope.rotary_dim,
    "temperature": rope.multiplier,
  }
  if rope.factor > 1:
    options |= {"factor": rope.factor, "scaling": rope.scaling}
    if rope.scaling != "linear":
      options["original_max_position"] = rope.original_max_position
    if rope.scaling not in ("linear", "dynamic"):
      options |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
  return RopeConfig(**options)


def choose_family(config: TransformerConfig) -> str:
  """The name of the family that is nearest to the options."""
  kinds = set(config.layer_kinds)
  if "nsa" in kinds:
    return "llama-nsa"
  if config.normalize_qk:
    return "qwen3"
  if "out" not in config.biases and config.biases:
    return "qwen2"
  if kinds == {"full"}:
    return "llama"
  return "mistral" if kinds == {"window"} else "qwen2"
