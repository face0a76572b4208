"""Configuration of the language models, for any module system."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from nsa_jax import _checks
from nsa_jax.config import AttentionConfig, NSAConfig, SelectByMeans
from nsa_jax.rope import RopeConfig
from nsa_jax.sharding import Layout
from nsa_jax.typing import AttentionName, RematName


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(AttentionConfig):
  """Shape and options of `TransformerLM`; frozen and hashable.

  Attributes:
    vocab_size: number of different tokens; 256 for bytes.
    num_layers: number of transformer blocks.
    model_dim: D, width of the residual stream.
    mlp_dim: hidden width of SwiGLU.
    attention: "nsa", "full" or "window" (`nsa.window` tokens) for all layers,
      or a sequence with one of them per layer. `rope` and `normalize_qk` apply
      to every kind.
    layer_nsa: an NSAConfig per layer in place of `nsa`, which is then that of
      the first; None: `nsa` for all.
    tie_embeddings: the output head shares the weights of the embedding.
    vocab_multiple: the embedding and the head have as many rows as the next
      multiple of this, so that devices can share them; the rows after
      `vocab_size` belong to no token and have no logit.
    embedding_scale: factor on the embeddings, such as sqrt(D).
    logit_softcap: c > 0, logits z become c tanh(z / c); None: they stay.
    remat: "none", or what is kept of each block, which the backward pass then
      recomputes: a name of `remat_policy`.
    scan_layers: one compiled block for all layers, which then have the same
      kind of attention; parameters get a leading axis of size `num_layers`. So
      does a decode cache, which the scan copies at every step:
      `unstack_layers` avoids this.
    dtype: dtype of the computation and of the residual stream; norms, softmax
      and logits are in float32.
    num_heads: as in `AttentionConfig`, like the remaining fields.

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
  mlp_dim: int
  attention: AttentionName | Sequence[AttentionName] = "nsa"
  layer_nsa: Sequence[NSAConfig] | None = None
  tie_embeddings: bool = True
  vocab_multiple: int = 1
  embedding_scale: float = 1.0
  logit_softcap: float | None = None
  remat: RematName = "none"
  scan_layers: bool = False
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    self._keep_integers(
      "vocab_size", "num_layers", "model_dim", "mlp_dim", "vocab_multiple"
    )
    self._keep_positive("embedding_scale")
    if self.logit_softcap is not None:
      self._keep_positive("logit_softcap")
    self._keep_layer_nsa()
    if isinstance(self.select, SelectByMeans):
      for nsa in self.layer_nsa or (self.nsa,):
        self.select.blocks(nsa)  # Raises if they do not fit.
    _checks.choice("remat", self.remat, get_args(RematName))
    _checks.flag("tie_embeddings", self.tie_embeddings)
    _checks.flag("scan_layers", self.scan_layers)
    _checks.dtype("dtype", self.dtype)
    layers = self.attention
    if isinstance(layers, Sequence) and not isinstance(layers, str):
      object.__setattr__(self, "attention", tuple(layers))
    kinds = get_args(AttentionName)
    if not isinstance(self.attention, tuple):
      _checks.choice("attention", self.attention, kinds)
      return
    for kind in self.attention:
      _checks.choice("attention", kind, kinds)
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

  def _keep_layer_nsa(self) -> None:
    """Checks the configurations of the layers; they become a tuple."""
    given: Any = self.layer_nsa
    if given is None:
      return
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
      raise ValueError(
        f"`layer_nsa`={_checks.show(given)} must be None or a sequence of "
        "NSAConfig."
      )
    for i, nsa in enumerate(given):
      _checks.instance(f"layer_nsa[{i}]", nsa, NSAConfig)
    if len(given) != self.num_layers:
      raise ValueError(
        f"`layer_nsa` of {len(given)} entries must have `num_layers`="
        f"{self.num_layers} entries."
      )
    if self.scan_layers and len(set(given)) > 1:
      raise ValueError(
        f"`layer_nsa`={_checks.show(given)} must have equal entries with "
        "`scan_layers`=True: all layers are one compiled block."
      )
    object.__setattr__(self, "nsa", given[0])
    # Two spellings of one configuration must be equal and have one hash.
    several = tuple(given) if len(set(given)) > 1 else None
    object.__setattr__(self, "layer_nsa", several)

  @property
  def vocab_rows(self) -> int:
    """Rows of the embedding and of the head."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def segment_alignment(self) -> int:
    """What the starts of segments are multiples of, for every layer."""
    layers = self.layer_nsa or (self.nsa,)
    return math.lcm(*(nsa.selection_block for nsa in layers))

  def of_layer(self, i: int) -> "TransformerConfig":
    """The configuration of layer i alone: `nsa` is its own.

    Raises:
      ValueError: if i is not the index of a layer.

    Example:
      >>> from nsa_jax import NSAConfig, TransformerConfig
      >>> layers = [NSAConfig(window=64), NSAConfig(window=128)]
      >>> config = TransformerConfig.preset("tiny", layer_nsa=layers)
      >>> config.of_layer(1).nsa.window
      128
    """
    i = _checks.static_int("i", i, 0)
    if i >= self.num_layers:
      raise ValueError(
        f"`i`={i} must be less than `num_layers`={self.num_layers}."
      )
    if self.layer_nsa is None:
      return self
    return dataclasses.replace(self, nsa=self.layer_nsa[i], layer_nsa=None)

  @property
  def layer_kinds(self) -> tuple[AttentionName, ...]:
    """Kind of attention per layer."""
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
    fields = {field.name for field in dataclasses.fields(cls)}
    for override in overrides:
      if override not in fields:
        raise ValueError(
          f"`{override}` must be a field of TransformerConfig: "
          f"{', '.join(sorted(fields))}."
        )
    return cls(**{**_PRESETS[name], **overrides})

  def to_dict(self) -> dict[str, Any]:
    """The fields as JSON types; `from_dict` is the inverse.

    Returns:
      A dictionary of strings, numbers, booleans, None, lists and dictionaries:
      a dtype is its name; `nsa`, each of `layer_nsa`, `rope`, `layout` and
      `select` are dictionaries of their fields.

    Raises:
      ValueError: if `select` is a function, which JSON does not have.

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
    if callable(self.select):
      raise ValueError(
        f"`select`={_checks.show(self.select)} must be a name, a SelectByMeans "
        "or None: JSON has no functions."
      )
    fields = dataclasses.asdict(self)
    for name in ("dtype", "param_dtype"):
      fields[name] = fields[name].name
    return _to_json(fields)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "TransformerConfig":
    """The configuration with the fields that `to_dict` returned.

    Args:
      fields: a result of `to_dict`. Missing fields take their defaults, so that
        later versions can read what earlier ones wrote.

    Raises:
      ValueError: if `fields` (or `nsa`, `rope` or `layout` in it) is not a
        dictionary, has an unknown field or lacks one without a default, or if a
        value breaks a rule.

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
    layers = values.get("layer_nsa")
    if isinstance(layers, Sequence) and not isinstance(layers, str):
      values["layer_nsa"] = [
        _nested(NSAConfig, f"layer_nsa[{i}]", x) for i, x in enumerate(layers)
      ]
    kinds = {"rope": RopeConfig, "layout": Layout}
    if isinstance(values.get("select"), Mapping):
      kinds["select"] = SelectByMeans
    for name, kind in kinds.items():
      if values.get(name) is not None:
        values[name] = _nested(kind, name, values[name])
    for field in dataclasses.fields(cls):
      if field.name not in values and field.default is dataclasses.MISSING:
        raise ValueError(f"`{field.name}` is missing and has no default.")
    return cls(**values)


def _check_fields(kind, fields, name=""):
  """Raises ValueError unless `fields` is a dictionary of fields of `kind`."""
  if not isinstance(fields, Mapping):
    raise ValueError(
      f"`{name or 'fields'}`={_checks.show(fields)} must be a dictionary of "
      f"fields of {kind.__name__}."
    )
  known = {field.name for field in dataclasses.fields(kind)}
  if kind is RopeConfig:  # An earlier version wrote this name.
    known.add("yarn_factor")
  for field in fields:
    if field not in known:
      raise ValueError(
        f"`{name}{'.' if name else ''}{field}` must be a field of "
        f"{kind.__name__}: {', '.join(sorted(known))}."
      )


def _nested(kind, name, fields):
  """The nested configuration in the field `name`."""
  _check_fields(kind, fields, name)
  return kind(**fields)


def _to_json(value):
  """`value` as `json.loads` returns it: no tuples, no NumPy scalars."""
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
