"""Decoder language model (Flax nnx) with sparse or dense attention per layer.

What it computes is in `nsa_jax.models.decoder`; names of modules and parameters
are those of `nsa_jax.models.linen`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nsa_jax import _checks
from nsa_jax.layers import arguments
from nsa_jax.layers.nnx import (
  Attention,
  DenseAttention,
  Inspect,
  NativeSparseAttention,
  from_linen,
  linear_options,
  metadata,
  rms_norm,
  to_linen,
)
from nsa_jax.models import decoder
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.remat import remat_policy
from nsa_jax.typing import Array, AttentionName

_LAYERS = {nnx.PARTITION_NAME: "layers"}


class TransformerLM(nnx.Module):
  """Decoder language model.

  `nsa_jax.TransformerLM` for nnx: the same configuration, names of parameters
  and numbers. The blocks are the attributes "layer_0", "layer_1", ...; with
  `scan_layers` all of them are "layers", whose arrays have a leading axis.

  Args:
    config: shape and options.
    decode: append to a decode cache and attend over it, as in
      `NativeSparseAttention`; `init_cache` or `nnx.view` makes the cache.
    max_append: as in `NativeSparseAttention`.
    rngs: of the initial parameters.

  Raises:
    ValueError: if an argument does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> import nsa_jax
    >>> from flax import nnx
    >>> config = nsa_jax.TransformerConfig.preset(
    ...   "tiny", num_layers=1, model_dim=16
    ... )
    >>> model = nsa_jax.nnx.TransformerLM(config, rngs=nnx.Rngs(0))
    >>> nnx.jit(model)(jnp.zeros((1, 32), jnp.int32)).shape
    (1, 32, 256)
  """

  embedding: nnx.Param[Array]
  head: nnx.Param[Array]  # without `tie_embeddings`
  layers: "TransformerBlock"  # with `scan_layers`

  def __init__(
    self,
    config: TransformerConfig,
    *,
    decode: bool = False,
    max_append: int = 1,
    rngs: nnx.Rngs,
  ):
    decoder.check_model(config, decode, max_append)
    _checks.instance("rngs", rngs, nnx.Rngs)
    self.config, self.decode = config, decode
    for name, (init, shape) in decoder.tables(config).items():
      axes = metadata("", name) if config.logical_axes else {}
      table = init(rngs.params(), shape, config.param_dtype)
      setattr(self, name, nnx.Param(table, **axes))
    for name, (own, kind) in decoder.blocks(config).items():
      setattr(self, name, _make_block(own, kind, max_append, rngs))
    self.final_norm = rms_norm(
      config, "final_norm", config.model_dim, rngs=rngs
    )

  def __call__(
    self,
    tokens: Array,
    *,
    decode: bool | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    prefix_length: int | None = None,
    labels: Array | None = None,
  ) -> Array:
    """Logits of the next token at every position, or the losses of labels.

    Args:
      tokens: as in `nsa_jax.TransformerLM`, like the following arguments.
      decode: in place of the attribute.
      positions: see above.
      segment_ids: see above.
      prefix_length: see above.
      labels: see above.

    Returns:
      float32 [B, T, vocab_size]; with `labels` the cross-entropy in nats,
      float32 [B, T].

    Raises:
      ValueError: if an argument does not fit.
    """
    config = self.config
    decode = self.decode if decode is None else decode
    _checks.flag("decode", decode)
    inputs = decoder.check_inputs(
      config,
      tokens,
      positions,
      segment_ids,
      labels,
      decode=decode,
      caches=nnx.state(self, nnx.Cache) if decode else (),
    )
    embedding = self.embedding[...]
    x = decoder.embed_tokens(config, embedding, inputs.tokens, decode)
    where = inputs.positions, inputs.segment_ids
    x = self._blocks(x, where, prefix_length, decode)
    head = embedding if config.tie_embeddings else self.head[...]
    return decoder.finish(
      config, head, self.final_norm(x), inputs.labels, decode
    )

  def _blocks(self, x, where, prefix_length, decode):
    config = self.config

    def run(block, x, where):
      return block(x, *where, prefix_length=prefix_length, decode=decode)

    if config.remat != "none" and not decode:
      policy = remat_policy(config.remat)
      run = _remat(run, prevent_cse=decoder.prevent_cse(config), policy=policy)
    if config.scan_layers:
      run = _scan(run)
    for name in decoder.blocks(config):
      x = run(getattr(self, name), x, where)
    return x

  def init_cache(self, input_shape: Sequence[int]) -> None:
    """Makes empty decode caches for all layers, or empties them.

    Args:
      input_shape: (B, capacity).

    Raises:
      ValueError: if an argument does not fit.
    """
    sizes = arguments.cache_sizes(input_shape, "(B, capacity)")
    for _, layer in nnx.iter_modules(self):
      if isinstance(layer, Attention):
        layer.init_cache((*sizes, layer.in_features))

  def set_view(self, decode: bool | None = None) -> None:
    """What `nnx.view` changes here; the layers have more, such as the cache.

    Args:
      decode: append to the decode cache and attend over it.
    """
    if decode is not None:
      _checks.flag("decode", decode)
      self.decode = decode


class TransformerBlock(nnx.Module):
  """x + attention(norm(x)), then x + SwiGLU(norm(x)).

  Args:
    config: shape and options.
    kind: "nsa", "full" or "window".
    max_append: as in `NativeSparseAttention`.
    rngs: of the initial parameters.
  """

  attention: Attention
  attention_norm: nnx.RMSNorm

  def __init__(
    self,
    config: TransformerConfig,
    kind: AttentionName,
    *,
    max_append: int = 1,
    rngs: nnx.Rngs,
  ):
    self.config = config
    width = config.model_dim
    call: dict[str, Any] = {"max_append": max_append, "rngs": rngs}
    if kind == "nsa":
      self.attention = NativeSparseAttention(
        in_features=width, **arguments.layer_fields(config), **call
      )
    else:
      self.attention = DenseAttention(config, kind, width, **call)
    for name in ("attention_norm", "mlp_norm"):
      setattr(self, name, rms_norm(config, name, width, rngs=rngs))
    for name, (inputs, outputs) in decoder.mlp_features(config).items():
      linear = nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        **linear_options(config, name),
        rngs=rngs,
      )
      setattr(self, name, linear)

  def __call__(
    self,
    x: Array,
    positions: Array | None,
    segment_ids: Array | None,
    *,
    prefix_length: int | None = None,
    decode: bool = False,
  ) -> Array:
    """Maps [B, T, D] to [B, T, D]."""

    def attention(h):
      return self.attention(
        h,
        positions=positions,
        segment_ids=segment_ids,
        prefix_length=prefix_length,
        decode=decode,
      )

    names = ("mlp_norm", *decoder.mlp_features(self.config))
    return decoder.block(
      self.config,
      x,
      norm=lambda norm, x: norm(x),
      attention=attention,
      mlp=lambda parts, x: decoder.swiglu(parts, parts["mlp_norm"](x)),
      bound=(
        self.attention_norm,
        {name: getattr(self, name) for name in names},
      ),
      remat=_remat,
      decode=decode,
    )


# The transforms of nnx write all variables back, and so refuse a model that a
# function has closed over, as in `jax.jit(model)`. These write back what can
# have changed: decode caches and what is captured, but no parameters.

_CHANGING = nnx.Not(nnx.Param)


def _remat(run, **options):
  """`jax.checkpoint` of `run(modules, *arrays)`."""

  def recomputed(modules, *arrays):
    graph, params, *rest = nnx.split(modules, nnx.Param, ...)

    def pure(params, rest, arrays):
      own = nnx.merge(graph, params, *rest)
      return run(own, *arrays), nnx.state(own, _CHANGING)

    out, changed = jax.checkpoint(pure, **options)(params, rest, arrays)
    _write_back(modules, changed)
    return out

  return recomputed


def _scan(run):
  """A scan of `run(block, x, where)` over stacked blocks, with the carry x."""

  def scanned(blocks, x, where):
    graph, *states = nnx.split(blocks, nnx.Param, ...)

    def body(x, states):
      block = nnx.merge(graph, *states)
      return run(block, x, where), nnx.state(block, _CHANGING)

    x, changed = jax.lax.scan(body, x, states)
    _write_back(blocks, changed)
    return x

  return scanned


def _write_back(modules, changed):
  if jax.tree.leaves(changed):
    nnx.update(modules, changed)


def _make_block(config, kind, max_append, rngs):
  """A block, or with `scan_layers` all of them, stacked."""

  def make(rngs):
    return TransformerBlock(config, kind, max_append=max_append, rngs=rngs)

  if config.scan_layers:
    make = nnx.vmap(make, transform_metadata=_LAYERS)
    make = nnx.split_rngs(splits=config.num_layers)(make)
  return make(rngs)


def unstack_layers(model: TransformerLM) -> TransformerLM:
  """Converts a model with `scan_layers` to one without, for decoding.

  As `nsa_jax.unstack_layers` does for linen; decode caches are left out.

  Args:
    model: a model with `scan_layers`.

  Returns:
    The model without; the parameters of its layers are copies.

  Raises:
    ValueError: if the model is not stacked.

  Example:
    >>> import nsa_jax
    >>> from flax import nnx
    >>> config = nsa_jax.TransformerConfig.preset(
    ...   "tiny", num_layers=2, attention="window", scan_layers=True
    ... )
    >>> make = nnx.jit(lambda: nsa_jax.nnx.TransformerLM(
    ...   config, rngs=nnx.Rngs(0)
    ... ))
    >>> model = nsa_jax.nnx.unstack_layers(make())
    >>> sorted(nsa_jax.nnx.to_linen(model))
    ['embedding', 'final_norm', 'layer_0', 'layer_1']
  """
  _checks.instance("model", model, TransformerLM)
  if not model.config.scan_layers:
    raise ValueError("`model.config.scan_layers`=False: nothing is stacked.")
  config = dataclasses.replace(model.config, scan_layers=False)
  params = to_linen(model)
  stacked = params.pop("layers")
  for i in range(config.num_layers):
    params[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
  abstract = nnx.eval_shape(
    lambda: TransformerLM(
      config,
      decode=model.decode,
      max_append=model.layers.attention.max_append,
      rngs=nnx.Rngs(0),
    )
  )
  return from_linen(abstract, params)


@dataclasses.dataclass(frozen=True)
class Functional:
  """A model as a function of parameters and cache, as a linen module is one.

  For what calls compiled functions with a model as a static argument: sampling
  and inspection. Equal models are equal, and share what is compiled. Parameters
  and caches are nested dictionaries, as linen's.

  Attributes:
    graph: of the model with decode caches.
    params: structure and shapes of its state without them.
    cache: those of caches that are too small for anything.
  """

  graph: Any
  params: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]
  cache: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]

  # A call decodes if it is given a cache.
  decode = True

  def clone(self, decode: bool) -> "Functional":
    """Itself."""
    del decode
    return self

  def init_with_output(
    self, key: Array, tokens: Array
  ) -> tuple[Array, dict[str, Any]]:
    """Logits and variables, evaluated only for their shapes."""
    del key
    model = self._bind({}, decode=True)
    variables = {"params": nnx.to_pure_dict(nnx.state(model, _NO_CACHE))}
    model.init_cache(tokens.shape)
    variables["cache"] = nnx.to_pure_dict(nnx.state(model, nnx.Cache))
    return model(tokens), variables

  def init(self, key: Array, tokens: Array) -> dict[str, Any]:
    """As `init_with_output`, without logits."""
    return self.init_with_output(key, tokens)[1]

  def apply(
    self,
    variables: Mapping[str, Any],
    tokens: Array,
    *,
    mutable: Sequence[str],
    **call: Any,
  ) -> tuple[Array, dict[str, Any]]:
    """Logits, and the collection "cache" or "inspect"."""
    model = self._bind(variables, decode="cache" in variables)
    if "cache" in mutable:
      logits, state = model(tokens, **call), nnx.state(model, nnx.Cache)
    else:
      logits, state = nnx.capture(model, Inspect)(tokens, **call)
    return logits, {mutable[0]: nnx.to_pure_dict(state)}

  def _bind(self, variables, decode):
    """The model with these variables; zeros stand for missing ones."""
    states = []
    for name in ("params", "cache"):
      tree, shapes = getattr(self, name)
      state = jax.tree.unflatten(tree, shapes)
      if name in variables:
        nnx.replace_by_pure_dict(state, dict(variables[name]))
      else:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
      states.append(state)
    model = nnx.merge(self.graph, *states)
    model.set_attributes(decode=decode)
    return model


_NO_CACHE = nnx.Not(nnx.Cache)


def functional(model: Any) -> tuple[Functional, dict[str, Any]]:
  """A model as a function, and its parameters.

  Args:
    model: `TransformerLM`, or another nnx module with attributes `decode`, a
      method `init_cache((B, capacity))` and the arguments of its call.

  Raises:
    ValueError: if the model has no decode cache.
  """
  if not isinstance(model, nnx.Module) or not hasattr(model, "init_cache"):
    raise ValueError(
      f"`model` of type {type(model).__name__} must be a TransformerLM or "
      "another nnx module with a method `init_cache`."
    )
  model = nnx.clone(model)
  model.init_cache((1, 1))
  graph, params, *rest = nnx.split(model, _NO_CACHE, nnx.Cache)
  (cache,) = rest

  def shapes(state):
    leaves, tree = jax.tree.flatten(state)
    return tree, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)

  twin = Functional(graph, shapes(params), shapes(cache))
  return twin, nnx.to_pure_dict(params)
