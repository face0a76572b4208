"""Hyper-parameters of the algorithm, and the options of an attention layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np

from nsa_jax import _checks
from nsa_jax.rope import RopeConfig, check_head_dim
from nsa_jax.sharding import Layout
from nsa_jax.typing import (
  BRANCHES,
  BiasName,
  BranchName,
  CompressionName,
  Implementation,
  RopeCompressedName,
  Selector,
  SelectorName,
)


@dataclasses.dataclass(frozen=True)
class NSAConfig:
  """What Native Sparse Attention reads per query (arXiv 2502.11089).

  The defaults are the paper's. Lengths are in tokens. Instances are frozen and
  hashable, so they can be static arguments of `jax.jit`.

  Attributes:
    compression_block: l, tokens per compressed block.
    compression_stride: d, tokens between the starts of consecutive compressed
      blocks; divides `compression_block` and `selection_block`.
    selection_block: l', tokens per selection block; at least
      `compression_block`.
    num_selected: n, blocks per query, including the forced ones.
    num_initial: forced blocks at the start of the sequence (or segment).
    num_local: forced blocks ending at the query's own; at least 1.
    window: w, tokens of the sliding window, including the query's own.

  Raises:
    ValueError: if a value is not an integer or breaks a rule above.

  Example:
    >>> from nsa_jax import NSAConfig
    >>> NSAConfig(num_selected=8).selection_block
    64
  """

  compression_block: int = 32
  compression_stride: int = 16
  selection_block: int = 64
  num_selected: int = 16
  num_initial: int = 1
  num_local: int = 2
  window: int = 512

  def __post_init__(self):
    for field in dataclasses.fields(self):
      low = 0 if field.name == "num_initial" else 1
      value = _checks.static_int(field.name, getattr(self, field.name), low)
      object.__setattr__(self, field.name, value)
    for name in ("compression_block", "selection_block"):
      if getattr(self, name) % self.compression_stride:
        raise ValueError(
          f"`{name}`={getattr(self, name)} must be a multiple of "
          f"`compression_stride`={self.compression_stride}."
        )
    if self.compression_block > self.selection_block:
      raise ValueError(
        f"`compression_block`={self.compression_block} must be at most "
        f"`selection_block`={self.selection_block}."
      )
    if self.num_initial + self.num_local > self.num_selected:
      raise ValueError(
        f"`num_selected`={self.num_selected} must be at least `num_initial` + "
        f"`num_local`={self.num_initial + self.num_local}, the forced blocks."
      )


@dataclasses.dataclass(frozen=True)
class SelectByMeans:
  """A `select`: the paper's rule over means of the keys that are read.

  Eq. 8-11 with the query of the selected branch and with compressed keys that
  are means of its consecutive keys, instead of those of the compressed branch,
  which have to learn how to select. A mean counts once its last token is
  visible, and if its tokens are of one segment. No gradient passes through.
  With the defaults "means" is its name.

  Attributes:
    tokens: length and stride of the means; divides `selection_block`. Shorter
      ones come closer to what full attention reads, and cost more: selection
      reads S / tokens keys, and a decode cache keeps them. Means of one token
      choose what holds the most of full attention, at its cost.

  Raises:
    ValueError: if `tokens` is not a positive integer.

  Example:
    >>> from nsa_jax import SelectByMeans, TransformerConfig
    >>> TransformerConfig.preset("tiny", select="means").select
    SelectByMeans(tokens=4)
    >>> config = TransformerConfig.preset("tiny", select=SelectByMeans(8))
  """

  tokens: int = 4

  def __post_init__(self):
    tokens = _checks.static_int("tokens", self.tokens, 1)
    object.__setattr__(self, "tokens", tokens)

  def blocks(self, config: NSAConfig) -> NSAConfig:
    """`config` with the means as its compressed blocks.

    Raises:
      ValueError: if `tokens` does not divide `selection_block`.
    """
    check_config(config)
    if config.selection_block % self.tokens:
      raise ValueError(
        f"`tokens`={self.tokens} of `select` must divide `selection_block`="
        f"{config.selection_block}."
      )
    return dataclasses.replace(
      config, compression_block=self.tokens, compression_stride=self.tokens
    )


Select: TypeAlias = Selector | SelectByMeans | SelectorName | None

SELECTORS: Mapping[str, SelectByMeans] = {"means": SelectByMeans()}


def check_select(
  value: Any, config: NSAConfig | None = None
) -> Selector | SelectByMeans | None:
  """Validates a `select`, for a configuration if that is known.

  A name becomes what it stands for.
  """
  if isinstance(value, str) and value in SELECTORS:
    value = SELECTORS[value]
  if config is not None and isinstance(value, SelectByMeans):
    value.blocks(config)  # Raises if they do not fit.
  known = value is None or isinstance(value, SelectByMeans)
  if not known and (isinstance(value, type) or not callable(value)):
    names = ", ".join(map(repr, SELECTORS))
    raise ValueError(
      f"`select`={_checks.show(value)} must be a function that returns block "
      f"ids, {names}, a SelectByMeans, or None."
    )
  return value


def check_config(value: Any) -> None:
  """Raises ValueError unless `value` is an NSAConfig."""
  _checks.instance("config", value, NSAConfig)


def check_attention_config(value: Any) -> None:
  """Raises ValueError unless `value` is an AttentionConfig."""
  _checks.instance("config", value, AttentionConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Options of an attention layer, shared by the models; frozen, hashable.

  Attributes:
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides `num_heads`. All N / K heads of a
      group read the same blocks.
    head_dim: H, of queries and keys; even if `rope` is used.
    value_head_dim: V, of values; `head_dim` by default.
    nsa: the algorithm's hyper-parameters.
    compression: phi, "mlp" (the paper's), "linear", "weighted" or "mean";
      separate parameters for keys and values.
    share_kv: one key and one value projection for all branches, instead of
      one pair per branch as in the paper.
    rope_compressed: "block": phi gets unrotated keys, and its output is rotated
      to the position of the block's first token; "tokens": phi gets rotated
      keys; "none": the compressed branch and the selection use neither rotated
      keys nor rotated queries.
    rope: rotary embedding, or None for no position information.
    normalize_qk: RMSNorm over H, before rotation, of the queries and of the
      keys that enter a dot product (in the compressed branch, phi's output);
      the query and each key have a learned scale. In full and window attention
      this is the norm of Qwen3.
    norm_epsilon: added to the mean square in every RMSNorm, those of a model
      too.
    biases: which projections have a bias: "query", "key" (all branches),
      "value" (likewise), "out". `use_bias` of a layer gives one to all of
      them and to the gates.
    gate_bias: initial bias of the gates' logits, one number or one per branch
      in the order compressed, selected, window; None: they have no bias.
    gate_init_scale: factor on the gates' initial kernel; with 0 the gates start
      as sigmoid(gate_bias) for every token.
    attention_sinks: a learned logit per head in the denominator of the softmax,
      beside those of the keys, which takes weight and adds nothing. Full and
      window attention can; "nsa" raises NotImplementedError.
    score_softcap: c > 0, scores s of queries and keys become c tanh(s / c);
      None: they stay. Full and window attention can, with "xla" and
      "reference"; others raise NotImplementedError.
    dtype: dtype of the computation; None promotes those of the input and the
      parameters. Gates, norms and softmax are in float32 at least.
    param_dtype: dtype of the parameters.
    select: as in `native_sparse_attention`; a function also gets the layer's
      input `x` [B, T, D].
    implementation: as in `native_sparse_attention`.
    logical_axes: parameters come in boxes with the names of their axes, as of
      `flax.linen.with_logical_partitioning`; the names are those of
      `parameter_shardings`, which needs no boxes.
    layout: as in `native_sparse_attention`. Without `zigzag` or a `sequence`,
      XLA partitions the rest of a layer by what its inputs and parameters say.
      Tokens appended to a cache are not split.
    branches: those whose outputs are summed, for ablations; the gate of the
      others is 0. Blocks are selected as they are with all three, but without
      "compressed" phi has no gradient, nor have the projections that
      `share_kv` does not share.

  Raises:
    ValueError: if a value breaks a rule.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  value_head_dim: int | None = None
  nsa: NSAConfig = NSAConfig()
  compression: CompressionName = "mlp"
  share_kv: bool = False
  rope_compressed: RopeCompressedName = "block"
  rope: RopeConfig | None = RopeConfig()  # noqa: RUF009, immutable
  normalize_qk: bool = False
  norm_epsilon: float = 1e-6
  biases: Sequence[BiasName] = ()
  gate_bias: float | Sequence[float] | None = None
  gate_init_scale: float = 1.0
  attention_sinks: bool = False
  score_softcap: float | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  select: Select = None
  implementation: Implementation = None
  layout: Layout | None = None
  logical_axes: bool = False
  branches: Sequence[BranchName] = BRANCHES

  def __post_init__(self):
    names = ["num_heads", "num_kv_heads", "head_dim"]
    if self.value_head_dim is not None:
      names.append("value_head_dim")
    self._keep_integers(*names)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"`num_heads`={self.num_heads} must be a multiple of `num_kv_heads`="
        f"{self.num_kv_heads}."
      )
    _checks.instance("nsa", self.nsa, NSAConfig)
    _checks.choice("compression", self.compression, get_args(CompressionName))
    _checks.choice(
      "rope_compressed", self.rope_compressed, get_args(RopeCompressedName)
    )
    self._keep_names("branches", BRANCHES, "one or more")
    self._keep_names("biases", get_args(BiasName), "none or more")
    self._keep_gate_bias()
    self._keep_positive("norm_epsilon")
    if self.score_softcap is not None:
      self._keep_positive("score_softcap")
    scale = _checks.finite("gate_init_scale", self.gate_init_scale)
    object.__setattr__(self, "gate_init_scale", scale)
    if self.rope is not None:
      if not isinstance(self.rope, RopeConfig):
        raise ValueError(
          f"`rope`={_checks.show(self.rope)} must be a RopeConfig or None."
        )
      check_head_dim(self.head_dim, self.rope)
    for name in (
      "share_kv",
      "normalize_qk",
      "attention_sinks",
      "logical_axes",
    ):
      _checks.flag(name, getattr(self, name))
    # Two spellings of one configuration must be equal and have one hash.
    dtypes = {"param_dtype": self.param_dtype}
    if self.dtype is not None:
      dtypes["dtype"] = self.dtype
    for name, dtype in dtypes.items():
      object.__setattr__(self, name, _checks.dtype(name, dtype))
    _checks.implementation(self.implementation)
    tried = self.implementation
    if isinstance(tried, Sequence) and not isinstance(tried, str):
      object.__setattr__(self, "implementation", tuple(tried))
    # A file then says what the name stood for when it was written.
    object.__setattr__(self, "select", check_select(self.select))
    if self.layout is not None:
      _checks.instance("layout", self.layout, Layout)
    # Imported late: the implementations import this module.
    from nsa_jax import dispatch

    dispatch.named(self.implementation)

  def _keep_integers(self, *names: str) -> None:
    """Checks sizes; arrays become integers, which have a hash."""
    for name in names:
      value = _checks.static_int(name, getattr(self, name), 1)
      object.__setattr__(self, name, value)

  def _keep_names(
    self, field: str, known: Sequence[str], how_many: str
  ) -> None:
    """Checks a sequence of names; it becomes a tuple in the order of `known`.

    Two spellings of one configuration must be equal and have one hash.
    """
    names: Any = getattr(self, field)
    several = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    given = [x for x in names if isinstance(x, str)] if several else []
    in_order = tuple(x for x in known if x in given)
    few = not in_order and how_many == "one or more"
    if not several or few or len(in_order) != len(names):
      raise ValueError(
        f"`{field}`={_checks.show(names)} must be a sequence of {how_many} of "
        f"{', '.join(map(repr, known))}."
      )
    object.__setattr__(self, field, in_order)

  def _keep_positive(self, field: str) -> None:
    """Checks a positive number."""
    value = _checks.finite(field, getattr(self, field))
    if value <= 0:
      raise ValueError(f"`{field}`={value} must be positive.")
    object.__setattr__(self, field, value)

  def _keep_gate_bias(self) -> None:
    """Checks the bias of the gates; it becomes a tuple of three."""
    given: Any = self.gate_bias
    if given is None:
      return
    several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    # Arrays have no hash, and are no sequences.
    if len(given) != len(BRANCHES) if several else np.ndim(given):
      raise ValueError(
        f"`gate_bias`={_checks.show(given)} must be None, a number, or one for "
        f"each of {', '.join(map(repr, BRANCHES))}."
      )
    if several:
      kept = [_checks.finite(f"gate_bias[{i}]", x) for i, x in enumerate(given)]
    else:
      kept = [_checks.finite("gate_bias", given)] * len(BRANCHES)
    object.__setattr__(self, "gate_bias", tuple(kept))

  @property
  def value_dim(self) -> int:
    """V, head dimension of values."""
    return self.value_head_dim or self.head_dim
