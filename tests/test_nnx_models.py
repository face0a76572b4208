"""The model of nnx: the same bits as linen's, decoding, checkpoints, meshes."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import nsa_jax
from nsa_jax import cache, sampling
from nsa_jax import nnx as nsa_nnx
from nsa_jax.models.nnx import functional
from nsa_jax.sampling import empty_cache
from tests import test_transformer as twin
from tests.helpers import assert_same_bits
from tests.test_transformer import MIXED, NSA, SMALL, B, T

TOKENS = twin._tokens().astype(np.int32)
LABELS = twin._tokens(seed=1).astype(np.int32)
# What checkpoints need, in few programs: of all kinds of attention; of dense
# attention alone; and of a scan.
OPTIONS: dict[str, Any] = {
  "normalize_qk": True,
  "norm_epsilon": 1e-2,
  "biases": ("key", "out"),
  "vocab_multiple": 4,
  "embedding_scale": 3.0,
  "logit_softcap": 2.0,
}
NARROW = dataclasses.replace(NSA, window=3)
ALL_KINDS = MIXED | {
  **OPTIONS,
  "gate_bias": (1.0, 0.0, -1.0),
  "gate_init_scale": 0.5,
  "layer_nsa": (NSA, NARROW, NARROW),
  "rope": nsa_jax.RopeConfig(factor=2.0, scaling="llama3", rotary_dim=4),
}
DENSE = OPTIONS | {
  "attention": ("window", "full"),
  "layer_nsa": (NARROW, NSA),
  "attention_sinks": True,
  "score_softcap": 1.5,
  "rope": nsa_jax.RopeConfig(
    factor=2.0, scaling="dynamic", original_max_position=8
  ),
}
SCANNED = DENSE | {
  "attention": "window",
  "layer_nsa": (NARROW, NARROW),
  "scan_layers": True,
  "tie_embeddings": False,
}
MASK = np.array([[1] * 16 + [2] * 20 + [0] * 4, [1] * T], np.int32)


@functools.cache
def pair(**overrides: Any) -> Any:
  """linen's model, its parameters, and the model of nnx with the same."""
  config = twin._config(**SMALL, **overrides)
  params = twin._params(config)["params"]
  return nsa_jax.TransformerLM(config), params, of_linen(config, params)


def of_linen(config: Any, params: Any) -> Any:
  abstract = nnx.eval_shape(
    lambda: nsa_nnx.TransformerLM(config, rngs=nnx.Rngs(0))
  )
  return nsa_nnx.from_linen(abstract, params)


def slow(*values: Any) -> Any:
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "overrides",
  [
    ALL_KINDS,
    SCANNED | {"remat": "full"},
    slow(DENSE),
    slow({"scan_layers": True, "remat": "full", "tie_embeddings": False}),
    slow({"remat": "save_attention", "dtype": "bfloat16"}),
    slow({"scan_layers": True}),
    slow({"scan_layers": True, "attention": "window"}),
    slow({"normalize_qk": True, "share_kv": True, "remat": "offload_all"}),
  ],
  ids=lambda overrides: "-".join(overrides)[:40],
)
def test_same_bits_as_linen(overrides):
  """A step of training on labels, and the conversions."""
  model, params, ours = pair(**overrides)
  call = {"labels": LABELS, "segment_ids": MASK}
  sgd = optax.sgd(0.1)

  @jax.jit
  def want(params):
    def loss(params):
      return model.apply({"params": params}, TOKENS, **call).mean()

    loss, grads = jax.value_and_grad(loss)(params)
    updates, _ = sgd.update(grads, sgd.init(params), params)
    return loss, optax.apply_updates(params, updates)

  optimizer = nnx.Optimizer(ours, sgd, wrt=nnx.Param)

  @nnx.jit
  def step(ours, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: m(TOKENS, **call).mean())(ours)
    optimizer.update(ours, grads)
    return loss

  trained = nnx.clone(ours)
  loss = step(trained, optimizer)
  assert_same_bits((loss, nsa_nnx.to_linen(trained)), want(params))
  assert_same_bits(nsa_nnx.to_linen(ours), params)


@pytest.mark.parametrize("scan_layers", [True, slow(False)])
def test_sows_in_every_layer(scan_layers):
  model, params, ours = pair(scan_layers=scan_layers, remat="full")
  collect = functools.partial(model.apply, mutable=["intermediates"])
  _, want = jax.jit(collect)({"params": params}, TOKENS)
  logits, sown = nnx.jit(
    lambda ours, x: nnx.capture(ours, nnx.Intermediate)(x)
  )(ours, TOKENS)
  assert logits.shape == (B, T, twin.VOCAB)
  assert_same_bits(nnx.to_pure_dict(sown), want["intermediates"])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_transforms_of_jax_may_close_over_it(scan_layers):
  """As over a layer of flax; linen's `apply` is one function more."""
  _, _, ours = pair(scan_layers=scan_layers, remat="full")

  def loss(model, tokens):
    return model(tokens, labels=LABELS).mean()

  want = jax.eval_shape(nnx.jit(loss), ours, TOKENS)
  closed = functools.partial(loss, ours)
  assert jax.eval_shape(jax.jit(closed), TOKENS) == want
  graph, state = nnx.split(ours)
  grads = jax.eval_shape(
    jax.grad(lambda state: loss(nnx.merge(graph, state), TOKENS)), state
  )
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, state)


def test_unstacked_layers():
  model, params, ours = pair(**SCANNED)
  ours = nnx.view(ours, decode=True, max_append=3)
  single: Any = nsa_nnx.unstack_layers(ours)
  twin_model, want = nsa_jax.unstack_layers(model, params)
  assert single.config == twin_model.config
  assert_same_bits(nsa_nnx.to_linen(single), want)
  assert single.decode
  assert single.layer_1.attention.max_append == 3
  with pytest.raises(ValueError, match=r"`model\.config\.scan_layers`=F"):
    nsa_nnx.unstack_layers(single)


# --------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
  "overrides",
  [
    ALL_KINDS | {"select": "means"},
    DENSE,
    SCANNED,
    slow({"scan_layers": True, "select": "means"}),
  ],
  ids=["all_kinds", "dense", "scanned", "scanned_nsa"],
)
def test_decoding_has_the_same_bits(overrides):
  """A ragged prompt, then single tokens of some rows."""
  model, params, ours = pair(**overrides)
  model = model.clone(decode=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["cache"]
  held = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  ours = nnx.view(ours, decode=True, batch_size=B, max_length=T)
  assert_same_bits(nnx.to_pure_dict(nnx.state(ours, nnx.Cache)), held)

  @functools.partial(jax.jit, static_argnames="prefix_length")
  def want(params, held, tokens, ids, prefix_length):
    return model.apply(
      {"params": params, "cache": held},
      tokens,
      segment_ids=ids,
      prefix_length=prefix_length,
      mutable=["cache"],
    )

  def append(ours, tokens, ids, prefix_length):
    return ours(tokens, segment_ids=ids, prefix_length=prefix_length)

  got: Any = nnx.jit(append, static_argnames="prefix_length")
  at = np.zeros(B, int)
  for size, counts, prefix in [(11, (9, 11), 0), *[(1, (1, 0), None)] * 2]:
    new = TOKENS[np.arange(B)[:, None], at[:, None] + np.arange(size)]
    ids = (np.arange(size) < np.array(counts)[:, None]).astype(np.int32)
    out, updated = want(params, held, new, ids, prefix_length=prefix)
    held = updated["cache"]
    assert_same_bits(got(ours, new, ids, prefix_length=prefix), out)
    assert_same_bits(nnx.to_pure_dict(nnx.state(ours, nnx.Cache)), held)
    at += counts
  # Empty again.
  ours.init_cache((B, T))
  state = nnx.to_pure_dict(nnx.state(ours, nnx.Cache))
  assert not any(x.any() for x in jax.tree.leaves(state))
  whole = nnx.eval_shape(lambda ours: ours(TOKENS, decode=False), ours)
  assert whole.shape == (B, T, twin.VOCAB)


def test_generate_and_inspect_take_it():
  model, params, ours = pair(
    attention=("nsa", "window"), layer_nsa=(NARROW, NSA), vocab_multiple=4
  )
  call: dict[str, Any] = {
    "prompts": [[1, 2, 3], [4]],
    "max_new_tokens": 5,
    "prefill_chunk": 2,
  }
  want = nsa_jax.generate(model, params, **call)
  assert_same_bits(nsa_jax.generate(ours, None, **call), want)
  # With a cache made before, which stays its own.
  held = empty_cache(ours, 2, 8)
  assert_same_bits(held, empty_cache(model, 2, 8))
  assert_same_bits(nsa_jax.generate(ours, None, cache=held, **call), want)
  assert ours.layer_0.attention.kv is None  # As it was.
  found = nsa_jax.inspect.inspect_model(ours, None, TOKENS)
  assert_same_bits(found, nsa_jax.inspect.inspect_model(model, params, TOKENS))


@pytest.mark.slow
def test_inspect_takes_stacked_layers():
  model, params, ours = pair(scan_layers=True)
  found = nsa_jax.inspect.inspect_model(ours, None, TOKENS)
  assert_same_bits(found, nsa_jax.inspect.inspect_model(model, params, TOKENS))


def test_functions_of_serving_take_its_caches():
  model, _, ours = pair(num_layers=1, attention="window")
  batch, row = (
    nnx.view(ours, decode=True, batch_size=rows, max_length=16)
    for rows in (2, 1)
  )
  append = nnx.jit(lambda model, tokens: model(tokens))
  append(batch, TOKENS[:, :5])
  append(row, TOKENS[:1, 5:8])

  @jax.jit
  def change(held, new):
    return cache.evict(cache.insert(held, new, 1), 0)

  caches = [nnx.state(model, nnx.Cache) for model in (batch, row)]
  nnx.update(batch, change(*caches))
  assert batch.layer_0.attention.kv.get_value().lengths.tolist() == [0, 3]
  new = TOKENS[:, 8:9]
  got, want = append(batch, new), append(row, new[1:])
  np.testing.assert_allclose(got[1], want[0], atol=1e-5)
  assert_same_bits(
    sampling.empty_cache(ours, B, 16),
    sampling.empty_cache(model, B, 16),
  )
  with pytest.raises(ValueError, match="method `init_cache`"):
    sampling.empty_cache(3, B, 16)


class Bigrams(nnx.Module):
  """The least that `generate` needs."""

  def __init__(self, rngs: nnx.Rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))
    self.decode = False

  def init_cache(self, input_shape: Any) -> None:
    self.lengths = nnx.Cache(jnp.zeros(input_shape[0], jnp.int32))

  def __call__(self, tokens, segment_ids=None, prefix_length=None):
    if self.decode:
      self.lengths.set_value(self.lengths.get_value() + tokens.shape[1])
    return self.table[...][tokens]


def test_generate_takes_other_models():
  model = Bigrams(nnx.Rngs(0))
  out = nsa_jax.generate(model, None, [[1]], max_new_tokens=3, temperature=0)
  # Equal models share what is compiled.
  twins = [functional(Bigrams(nnx.Rngs(seed)))[0] for seed in range(2)]
  assert twins[0] == twins[1]
  assert hash(twins[0]) == hash(twins[1])
  want, table = [1], model.table[...]
  for _ in range(3):
    want.append(int(table[want[-1]].argmax()))
  assert out.tokens.tolist() == [want]


# ------------------------------------------------------------------ checkpoints


def test_orbax_checkpoints(tmp_path):
  """Of the model with its cache, and of an optimizer."""
  _, _, ours = pair(num_layers=1)
  model = nnx.view(ours, decode=True, batch_size=B, max_length=16)
  run = nnx.jit(lambda model, tokens: model(tokens))
  run(model, TOKENS[:, :9])
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
  saved = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "step", saved)
    checkpointer.wait_until_finished()
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
    restored = checkpointer.restore(tmp_path / "step", like)
  graph, _ = nnx.split(model)
  again = nnx.merge(graph, restored["model"])
  assert_same_bits(nnx.state(again), nnx.state(model))
  assert_same_bits(restored["optimizer"], saved["optimizer"])
  assert isinstance(again.layer_0.attention.kv.get_value(), nsa_jax.cache.Cache)
  new = TOKENS[:, 9:10]
  assert_same_bits(run(again, new), run(model, new))


# ----------------------------------------------------------------------- meshes


def make_mesh(kind: str = "Auto") -> Any:
  return jax.make_mesh(
    (4, 2),
    ("data", "heads"),
    axis_types=2 * (getattr(jax.sharding.AxisType, kind),),
  )


@pytest.mark.parametrize(
  "overrides, kind",
  [
    (SCANNED, "Auto"),
    slow(SCANNED, "Explicit"),
    slow(DENSE, "Auto"),
    slow({"scan_layers": True}, "Auto"),
  ],
  ids=str,
)
def test_parameters_on_a_mesh(overrides, kind):
  """By rule, by metadata, and as flax puts them there."""
  mesh, rules = make_mesh(kind), [*nsa_jax.PARAMETER_RULES.items()]
  config = twin._config(
    **{**overrides, "tie_embeddings": False},
    model_dim=16,
    mlp_dim=8,
    logical_axes=True,
  )

  def make():
    return nsa_nnx.TransformerLM(config, rngs=nnx.Rngs(0))

  state = nnx.state(nnx.eval_shape(make))
  by_rule = nsa_jax.parameter_shardings(state, mesh)
  model = nsa_jax.TransformerLM(config)
  boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
  want = nsa_jax.parameter_shardings(boxed, mesh)
  assert jax.tree.leaves(by_rule) == jax.tree.leaves(want)
  with nnx.logical_axis_rules(rules):
    specs = nnx.get_partition_spec(state)
    with jax.set_mesh(mesh):
      created = nnx.jit(make)()
  leaves = map(jax.tree.leaves, (specs, by_rule, state, nnx.state(created)))
  for spec, sharding, shape, x in zip(*leaves, strict=True):
    named = jax.sharding.NamedSharding(mesh, spec)
    assert named.is_equivalent_to(sharding, shape.ndim)
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  if overrides is SCANNED:
    sink = created.layers.attention.sink
    assert sink.out_sharding == ("layers", "heads")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_training_on_a_mesh_as_on_one_device(kind):
  _, _, ours = pair(scan_layers=True, model_dim=16, mlp_dim=8)
  mesh = make_mesh(kind)

  @nnx.jit
  def loss_and_grads(model, tokens, labels):
    return nnx.value_and_grad(lambda m: m(tokens, labels=labels).mean())(model)

  batch = [np.tile(x, (4, 1)) for x in (TOKENS, LABELS)]
  want = loss_and_grads(ours, *batch)
  graph, state = nnx.split(ours)
  state = jax.device_put(state, nsa_jax.parameter_shardings(state, mesh))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  with jax.set_mesh(mesh):
    got = loss_and_grads(
      nnx.merge(graph, state), *(jax.device_put(x, rows) for x in batch)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    *map(jax.device_get, (got, want)),
  )


# --------------------------------------------------------------------- messages


@pytest.mark.parametrize("arguments, message", twin.CALL_MESSAGES)
def test_call_messages(arguments, message):
  _, _, ours = pair()
  with pytest.raises(ValueError, match=re.escape(message)):
    ours(**{"tokens": TOKENS, **arguments})


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda m: nsa_nnx.TransformerLM(3, rngs=nnx.Rngs(0)),  # type: ignore
      "`config`=3 must be a TransformerConfig.",
    ),
    (
      lambda m: nsa_nnx.TransformerLM(m.config, rngs=0),  # type: ignore
      "`rngs`=0 must be a Rngs.",
    ),
    (
      lambda m: nsa_nnx.TransformerLM(
        m.config,
        decode=1,  # type: ignore
        rngs=nnx.Rngs(0),
      ),
      "`decode`=1 must be True or False.",
    ),
    (lambda m: m(TOKENS, decode=0), "`decode`=0 must be True or False."),
    (
      lambda m: m(TOKENS, decode=True),
      "`decode`=True needs a cache: call `init_cache` first.",
    ),
    (
      lambda m: m.init_cache((B, T, 1)),
      "`input_shape`=(2, 40, 1) must be (B, capacity).",
    ),
    (
      lambda m: nnx.view(m, decode=True, batch_size=1, max_length=8)(TOKENS),
      "`tokens`",
    ),
    (
      lambda m: nsa_jax.generate(m, {}, [[1]], max_new_tokens=1),
      "for one of nnx, which holds its parameters, `params` must be None.",
    ),
    (
      lambda m: nsa_jax.generate(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)), None, [[1]], max_new_tokens=1
      ),
      "`model` of type Linear must be a TransformerLM or another nnx module",
    ),
    (
      lambda m: nsa_jax.inspect.inspect_model(
        Bigrams(nnx.Rngs(0)), None, TOKENS
      ),
      "must be a TransformerLM.",
    ),
  ],
)
def test_more_messages(call, message):
  _, _, ours = pair()
  with pytest.raises(ValueError, match=re.escape(message)):
    call(nnx.clone(ours))
