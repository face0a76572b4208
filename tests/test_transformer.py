"""The language model: causality, packing, remat, scan, presets, messages."""

import dataclasses
import functools
import json
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nsa_jax
from nsa_jax import (
  NSAConfig,
  RopeConfig,
  SelectByMeans,
  TransformerConfig,
  TransformerLM,
)
from nsa_jax.models.loss import token_losses
from nsa_jax.typing import RematName, RematPolicyName
from tests import helpers

NSA = NSAConfig(
  compression_block=4,
  compression_stride=2,
  selection_block=8,
  num_selected=3,
  num_initial=1,
  num_local=1,
  window=6,
)
B, T, VOCAB = 2, 40, 17


# Compiling is most of the time here; the ops are tested optimised.


def _config(**overrides):
  fields = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "model_dim": 12,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 10,
    "nsa": NSA,
    # Results do not depend on it, and it compiles fastest.
    "implementation": "reference",
  }
  return TransformerConfig(**{**fields, **overrides})


def _tokens(seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, (B, T))


def _shapes(config, **kwargs):
  model = TransformerLM(config)
  init = functools.partial(model.init, **kwargs)
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((B, T), jnp.int32))


def _params(config):
  """Random parameters; drawing them with `init` takes longer to compile."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    scale = path[-1].key == "scale"
    return jnp.float32(scale + 0.3 * rng.normal(size=leaf.shape))

  return jax.tree_util.tree_map_with_path(draw, _shapes(config))


@functools.cache
def _setup(**overrides):
  config = _config(**overrides)
  model = TransformerLM(config)
  return model, _params(config), jax.jit(model.apply)


# Every kind of attention in one model.
MIXED = {"num_layers": 3, "attention": ("nsa", "full", "window")}


def test_logits():
  _, params, apply = _setup(**MIXED)
  logits = apply(params, _tokens())
  assert logits.shape == (B, T, VOCAB)
  assert logits.dtype == jnp.float32
  assert jnp.isfinite(logits).all()
  assert set(params["params"]) == {
    "embedding",
    "final_norm",
    "layer_0",
    "layer_1",
    "layer_2",
  }


def test_causal_bitwise():
  _, params, apply = _setup(**MIXED)
  tokens, others = _tokens(), _tokens(seed=1)
  want = apply(params, tokens)
  for t in (0, 7, 8, 30):
    changed = np.concatenate([tokens[:, : t + 1], others[:, t + 1 :]], axis=1)
    got = apply(params, changed)
    np.testing.assert_array_equal(got[:, : t + 1], want[:, : t + 1])
    assert (got[:, t + 1 :] != want[:, t + 1 :]).any()


def test_packed_documents_equal_them_alone():
  _, params, apply = _setup(**MIXED)
  tokens = _tokens()
  ids = np.zeros((B, T), np.int32)
  ids[0, :13], ids[0, 16:40] = 1, 2
  ids[1, 8:32] = 5
  packed = apply(params, tokens, segment_ids=ids)
  alone = apply(params, np.stack([tokens[0, 16:40], tokens[1, 8:32]]))
  np.testing.assert_allclose(packed[0, 16:40], alone[0], atol=1e-4)
  np.testing.assert_allclose(packed[1, 8:32], alone[1], atol=1e-4)
  # Neither the padding nor the other documents are read.
  changed = np.where(ids == 2, tokens, _tokens(seed=1))
  again = apply(params, changed, segment_ids=ids)
  np.testing.assert_array_equal(again[ids == 2], packed[ids == 2])


@pytest.mark.parametrize("value_head_dim", [4, 12])
def test_a_window_over_everything_is_full_attention(value_head_dim):
  fields = {
    "num_layers": 1,
    "num_kv_heads": 1,
    "value_head_dim": value_head_dim,
    "normalize_qk": True,
    "nsa": dataclasses.replace(NSA, window=T),
  }
  ids = np.repeat(np.array([[1] * 24 + [2] * 16]), B, axis=0)
  _, params, full = _setup(attention="full", **fields)
  _, _, window = _setup(attention="window", **fields)
  np.testing.assert_allclose(
    window(params, _tokens(), segment_ids=ids),
    full(params, _tokens(), segment_ids=ids),
    atol=1e-5,
  )


def test_positions_are_used_by_every_kind():
  for kind in ("nsa", "full", "window"):
    _, params, apply = _setup(num_layers=1, attention=kind, compression="mean")
    positions = np.tile(np.arange(T), (B, 1))
    base = apply(params, _tokens(), positions=positions)
    shifted = apply(params, _tokens(), positions=positions + 50)
    np.testing.assert_allclose(base, shifted, atol=1e-4)
    stretched = apply(params, _tokens(), positions=positions * 3)
    assert np.abs(base - stretched).max() > 1e-2


def _loss(model, params):
  logits = model.apply(params, _tokens())
  picked = jnp.take_along_axis(logits, _tokens(seed=1)[..., None], axis=-1)
  return jnp.mean(jax.nn.logsumexp(logits, -1, keepdims=True) - picked)


# The smallest phi with parameters: the layer's tests have them all.
SMALL = {"compression": "weighted"}


@functools.cache
def _loss_and_grads(**overrides):
  model = TransformerLM(_config(**SMALL, **overrides))
  return jax.jit(jax.value_and_grad(functools.partial(_loss, model)))


def _stacked(params):
  """Parameters of a model with `scan_layers` from those of one without."""
  params = dict(params["params"])
  layers = [params.pop("layer_0"), params.pop("layer_1")]
  params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  return {"params": params}


def _assert_close(got, want):
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=2e-5), got, want
  )


def test_every_parameter_learns():
  params = _params(_config(**SMALL))
  loss, grads = _loss_and_grads()(params)
  assert 1 < loss < 10
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert jnp.isfinite(grad).all(), path
    assert jnp.abs(grad).max() > 1e-5, path


# Each with one that offloads what it keeps.
@pytest.mark.parametrize(
  "remat, offload",
  [
    pytest.param("full", "offload_inputs", marks=pytest.mark.slow),
    ("save_attention", "offload_all"),
  ],
)
def test_remat_changes_nothing(remat, offload):
  params = _params(_config(**SMALL))
  kept = _loss_and_grads(remat=remat)(params)
  _assert_close(kept, _loss_and_grads()(params))
  moved = _loss_and_grads(remat=offload)(params)
  jax.tree.map(np.testing.assert_array_equal, moved, kept)


@pytest.mark.parametrize("remat", ["none", "save_attention"])
def test_scanned_layers_equal_unrolled_ones(remat):
  params = _params(_config(**SMALL))
  scanned = _loss_and_grads(scan_layers=True, remat=remat)
  loss, grads = _loss_and_grads()(params)
  stacked = _stacked(params)
  shapes = _shapes(_config(**SMALL, scan_layers=True))
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
  _assert_close(scanned(stacked), (loss, _stacked(grads)))


def test_unstacked_layers_are_the_unrolled_ones():
  params = _params(_config(**SMALL))
  scanned = TransformerLM(_config(**SMALL, scan_layers=True), decode=True)
  model, single = nsa_jax.unstack_layers(scanned, _stacked(params)["params"])
  assert model == TransformerLM(_config(**SMALL), decode=True)
  jax.tree.map(np.testing.assert_array_equal, single, dict(params["params"]))
  with pytest.raises(ValueError, match=r"scan_layers`=False"):
    nsa_jax.unstack_layers(model, single)
  with pytest.raises(ValueError, match=r"`params` has .*'params'.*'layers'"):
    nsa_jax.unstack_layers(scanned, params)


def _count_primitives(jaxpr, name):
  count = 0
  for eqn in jaxpr.eqns:
    count += eqn.primitive.name == name
    for parameter in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
    ):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        count += _count_primitives(inner, name)
  return count


def _important_blocks(x, query, compressed_key, lse, scale, **call):
  del x
  for name in ("selected_query", "selected_key"):
    call.pop(name)
  scores = nsa_jax.block_scores(
    query, compressed_key, lse, scale=scale, implementation="xla", **call
  )
  return nsa_jax.block_ids_from_scores(scores, **call)


def _gradient(**fields):
  """The gradient of the loss, traced and not compiled."""
  config = _config(**{"implementation": "xla", **fields})
  loss = functools.partial(_loss, TransformerLM(config))
  return jax.jit(jax.grad(loss)).trace(_shapes(config))


@pytest.mark.parametrize("select", [None, "means", _important_blocks])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_kept_attention_selects_once(scan_layers, select):
  for remat, selections in {
    "none": 1,
    "full": 2,
    "save_attention": 1,
    "offload_attention": 1,
    "offload_inputs": 2,
    "offload_all": 1,
  }.items():
    jaxpr = _gradient(
      num_layers=1, scan_layers=scan_layers, remat=remat, select=select
    ).jaxpr
    assert _count_primitives(jaxpr.jaxpr, "nsa_top_k") == selections, remat


# Named values of a block that a backward pass needs. That of the kernels takes
# out and lse of three branches; jax differentiates `xla` and needs no lse.
NEEDED = {None: 7, "xla": 4}


@pytest.mark.parametrize(
  "scan_layers, implementation",
  [
    (True, None),
    *(
      pytest.param(*values, marks=pytest.mark.slow)
      for values in ((False, None), (False, "xla"), (True, "xla"))
    ),
  ],
)
def test_offloaded_names_go_to_the_host(scan_layers, implementation):
  """By the program for CUDA; one for a CPU has one memory."""
  fields = {
    "num_layers": 1,
    "scan_layers": scan_layers,
    "implementation": implementation,
    # Sizes that the kernels take.
    "head_dim": 16,
    "nsa": NSAConfig(8, 4, 16, 3, 1, 1, 16),
  }
  attention = NEEDED[implementation]
  for remat, count in {
    "save_attention": 0,
    "offload_attention": attention,
    "offload_inputs": 1,
    "offload_all": attention + 1,
  }.items():
    with helpers.h200():
      program = _gradient(remat=remat, **fields)
    for platform, copies in {"cuda": count, "cpu": 0}.items():
      with helpers.h200():
        text = program.lower(lowering_platforms=(platform,)).as_text()
      for place in ("pinned_host", "device"):
        found = text.count(f'_xla_buffer_placement = "{place}"')
        assert found == copies, (remat, platform, place)


def test_policies_are_values():
  for name in get_args(RematPolicyName):
    assert nsa_jax.remat_policy(name) is nsa_jax.remat_policy(name)
  assert get_args(RematName) == ("none", *get_args(RematPolicyName))


@pytest.mark.parametrize("name", ["none", None, True, ["full"]])
def test_policy_message(name):
  message = (
    f"`name`={name!r} must be one of 'full', 'save_attention', "
    "'offload_attention', 'offload_inputs', 'offload_all'."
  )
  with pytest.raises(ValueError, match=re.escape(message)):
    nsa_jax.remat_policy(name)


@pytest.mark.parametrize("remat", ["none", "save_attention"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_sows_in_every_layer(scan_layers, remat):
  config = _config(scan_layers=scan_layers, remat=remat)
  model = TransformerLM(config)
  _, state = jax.eval_shape(
    functools.partial(model.apply, mutable=["intermediates"]),
    _shapes(config),
    jnp.zeros((B, T), jnp.int32),
  )
  lead = (2,) if scan_layers else ()
  layers = state["intermediates"]
  assert sorted(layers) == (
    ["layers"] if scan_layers else ["layer_0", "layer_1"]
  )
  for layer in layers.values():
    (gates,) = layer["attention"]["gates"]
    (block_ids,) = layer["attention"]["block_ids"]
    assert gates.shape == (*lead, B, T, 4, 3)
    assert block_ids.shape == (*lead, B, T, 2, NSA.num_selected)


def test_scanned_block_ids_are_those_of_each_layer():
  config = _config(**SMALL)
  params = _params(config)

  def ids(config, params):
    model = TransformerLM(config)
    apply = functools.partial(model.apply, mutable=["intermediates"])
    _, state = jax.jit(apply)(params, _tokens())
    layers = state["intermediates"]
    return [
      layers[name]["attention"]["block_ids"][0] for name in sorted(layers)
    ]

  unrolled = np.stack(ids(config, params))
  (scanned,) = ids(_config(**SMALL, scan_layers=True), _stacked(params))
  # A rounding difference may flip a near tie, here and there.
  assert (unrolled == scanned).mean() > 0.99


def test_untied_head():
  tied, untied = (
    _shapes(_config(tie_embeddings=tie))["params"] for tie in (True, False)
  )
  assert "head" not in tied
  assert untied["head"].shape == untied["embedding"].shape == (VOCAB, 12)
  _, params, apply = _setup(
    num_layers=1, tie_embeddings=False, compression="mean"
  )
  params["params"]["head"] = jnp.zeros((VOCAB, 12))
  assert not apply(params, _tokens()).any()


def test_bfloat16():
  # Every block is selected, so that rounding cannot change the choice.
  fields = {"num_layers": 1, "nsa": dataclasses.replace(NSA, num_selected=5)}
  _, params, apply = _setup(**fields)
  _, _, half = _setup(dtype="bfloat16", **fields)
  want, got = apply(params, _tokens()), half(params, _tokens())
  assert got.dtype == jnp.float32
  # About ten roundings to 8 bits in a row.
  assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
  shapes = _shapes(_config(param_dtype=jnp.bfloat16))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {
    jnp.dtype(jnp.bfloat16)
  }


def test_losses_of_labels():
  """Those of the logits; labels outside the vocabulary do not count."""
  _, params, apply = _setup(num_layers=1, attention="window")
  labels = _tokens(seed=1)
  labels[0, :5], labels[1, 7] = -100, VOCAB
  losses = apply(params, _tokens(), labels=labels)
  assert losses.dtype == jnp.float32
  logits = np.asarray(apply(params, _tokens()), np.float64)
  picked = np.take_along_axis(logits, _tokens(seed=1)[..., None], -1)[..., 0]
  want = np.log(np.exp(logits).sum(-1)) - picked
  inside = (labels >= 0) & (labels < VOCAB)
  np.testing.assert_allclose(losses, np.where(inside, want, 0), atol=1e-5)


def test_losses_chunk_by_chunk():
  rng = np.random.default_rng(0)
  x, head = rng.normal(size=(2, 13, 4)), rng.normal(size=(9, 4))
  labels = rng.integers(-1, 9, (2, 13))
  weights = rng.normal(size=(2, 13))

  def run(chunk_logits):
    def loss(x, head):
      losses = token_losses(head, x, jnp.asarray(labels), chunk_logits)
      return (weights * losses).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
      jnp.float32(x), jnp.float32(head)
    )

  whole = run(2**20)
  for chunk_logits in (1, 2 * 9 * 4):  # One token, then four tokens.
    _assert_close(run(chunk_logits), whole)
  # d loss / d logits = softmax - one-hot.
  logits = x @ head.T
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  p -= labels[..., None] == np.arange(9)
  p *= (weights * (labels >= 0))[..., None]
  _assert_close(whole[1], (p @ head, np.einsum("btv,btd->vd", p, x)))


@pytest.mark.parametrize("attention", ["nsa", "full", "window"])
def test_padding_may_hold_any_token(attention):
  """Those that other libraries pad with, too: -1 and -100."""
  config = _config(**SMALL, num_layers=1, attention=attention)
  segment_ids = np.zeros((B, T), np.int32)
  segment_ids[0, :13], segment_ids[1, 8:40] = 1, 2

  @jax.jit
  @jax.value_and_grad
  def loss_and_grads(params, tokens):
    logits = jnp.asarray(
      TransformerLM(config).apply(params, tokens, segment_ids=segment_ids)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-1], tokens[:, 1:]
    )
    return jnp.where(segment_ids[:, 1:] > 0, losses, 0).mean()

  results = [
    loss_and_grads(_params(config), np.where(segment_ids, _tokens(), padding))
    for padding in (0, -1, -100, VOCAB, 2**31 - 1)
  ]
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(results[0]))
  for result in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, result, results[0])


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary_give_nan(token):
  _, params, apply = _setup(num_layers=1, attention="window")
  tokens = _tokens()
  tokens[0, 20] = token
  logits = apply(params, tokens)
  assert jnp.isnan(logits[0, 20]).all()
  assert jnp.isfinite(logits[1]).all()


@pytest.mark.parametrize(
  "name, length, millions",
  [("tiny", 512, 0.50), ("small", 2048, 14.7), ("base", 8192, 188)],
)
def test_presets(name, length, millions):
  config = TransformerConfig.preset(name)
  nsa = config.nsa
  read = (
    (length - nsa.compression_block) // nsa.compression_stride
    + 1
    + nsa.num_selected * nsa.selection_block
    + nsa.window
  )
  assert read < length / 2
  sizes = [leaf.size for leaf in jax.tree.leaves(_shapes(config))]
  np.testing.assert_allclose(sum(sizes) / 1e6, millions, rtol=0.01)
  assert TransformerConfig.preset(name, num_layers=1).num_layers == 1


def test_configurations_are_values():
  one = _config(attention=["nsa", "full"], dtype="float32")
  two = _config(attention=("nsa", "full"), dtype=jnp.float32)
  assert one == two
  assert hash(one) == hash(two)
  assert one.layer_kinds == ("nsa", "full")
  sequence = _config(implementation=["xla", "reference"])
  assert hash(sequence) == hash(_config(implementation=("xla", "reference")))
  with pytest.raises(dataclasses.FrozenInstanceError):
    one.num_layers = 3


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"vocab_size": 0}, "`vocab_size`=0 must be at least 1."),
    ({"num_layers": 0}, "`num_layers`=0 must be at least 1."),
    ({"model_dim": 1.5}, "`model_dim`=1.5 must be a static integer."),
    ({"mlp_dim": -4}, "`mlp_dim`=-4 must be at least 1."),
    (
      {"num_heads": 6, "num_kv_heads": 4},
      "`num_heads`=6 must be a multiple of `num_kv_heads`=4.",
    ),
    ({"head_dim": 9}, "`head_dim`=9 must be even: RoPE rotates pairs"),
    ({"nsa": 16}, "`nsa`=16 must be an NSAConfig."),
    (
      {"attention": "dense"},
      "`attention`='dense' must be one of 'nsa', 'full', 'window'.",
    ),
    (
      {"attention": ("nsa", 3)},
      "`attention`=3 must be one of 'nsa', 'full', 'window'.",
    ),
    (
      {"attention": ("nsa",)},
      "`attention`=('nsa',) must have `num_layers`=2 entries.",
    ),
    (
      {"attention": ("nsa", "full"), "scan_layers": True},
      "`attention`=('nsa', 'full') must be of one kind with `scan_layers`=True",
    ),
    (
      {"compression": "median"},
      "`compression`='median' must be one of 'mean', 'weighted', 'linear', 'ml",
    ),
    (
      {"remat": True},
      "`remat`=True must be one of 'none', 'full', 'save_attention', "
      "'offload_attention', 'offload_inputs', 'offload_all'.",
    ),
    ({"tie_embeddings": 0}, "`tie_embeddings`=0 must be True or False."),
    ({"scan_layers": None}, "`scan_layers`=None must be True or False."),
    ({"dtype": None}, "`dtype`=None must be a floating-point dtype."),
    ({"param_dtype": int}, "must be a floating-point dtype."),
    ({"implementation": "gpu"}, "`implementation`='gpu' must be None, one of"),
  ],
)
def test_config_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _config(**fields)


@pytest.mark.parametrize(
  "config",
  [
    *map(TransformerConfig.preset, ("tiny", "small", "base")),
    _config(attention=("nsa", "window"), value_head_dim=4),
    _config(rope=None, tie_embeddings=False, remat="full", scan_layers=True),
    _config(rope=RopeConfig(base=1e6, yarn_factor=4)),
    _config(num_layers=np.int64(3), dtype=jnp.bfloat16, param_dtype="float16"),
    _config(implementation=None, select=SelectByMeans(2)),
    _config(implementation=("triton", "xla")),
  ],
)
def test_dictionaries_hold_a_configuration(config):
  fields = config.to_dict()
  text = json.dumps(fields)
  assert json.loads(text) == fields
  again = TransformerConfig.from_dict(json.loads(text))
  assert again == config
  assert hash(again) == hash(config)
  names = [field.name for field in dataclasses.fields(config)]
  assert list(fields) == names


def test_the_name_of_a_selector_is_what_it_stands_for():
  """Also in a file, which a later default does not change."""
  config = _config(select="means")
  assert config == _config(select=SelectByMeans(4))
  fields = config.to_dict()
  assert fields["select"] == {"tokens": 4}
  assert TransformerConfig.from_dict(fields | {"select": "means"}) == config
  for wrong, message in (
    ("mean", "`select`='mean' must be a function"),
    (4, "`select`=4 must be a function that returns block ids, 'means'"),
    ({"tokens": 3}, "`tokens`=3 of `select` must divide `selection_block`="),
    ({"token": 4}, "`select.token` must be a field of SelectByMeans: tokens"),
  ):
    with pytest.raises(ValueError, match=message):
      TransformerConfig.from_dict(fields | {"select": wrong})


def test_a_selector_is_no_json():
  config = _config(select=lambda **_: None)
  with pytest.raises(ValueError, match=r"`select`=.* JSON has no functions"):
    config.to_dict()


def test_entries_of_a_dictionary():
  config = _config(
    attention=("nsa", "full"), dtype=jnp.bfloat16, implementation=["xla"]
  )
  fields = config.to_dict()
  assert fields["attention"] == ["nsa", "full"]
  assert fields["implementation"] == ["xla"]
  assert (fields["dtype"], fields["param_dtype"]) == ("bfloat16", "float32")
  assert fields["nsa"] == dataclasses.asdict(NSA)
  assert fields["rope"] == dataclasses.asdict(RopeConfig())
  assert _config(rope=None).to_dict()["rope"] is None
  # The dictionary is the caller's own.
  fields["nsa"]["window"] = 1
  assert config.nsa.window == NSA.window


def test_missing_entries_take_their_defaults():
  fields = TransformerConfig.preset("base", dtype="bfloat16").to_dict()
  for name in ("dtype", "rope", "implementation", "vocab_size"):
    del fields[name]
  del fields["nsa"]["window"]
  config = TransformerConfig.from_dict(fields)
  assert config == TransformerConfig.preset("base")
  assert "dtype" not in fields  # the argument is left as it is


@pytest.mark.parametrize(
  "change, message",
  [
    ({"heads": 4}, "`heads` must be a field of TransformerConfig: attention, "),
    ({3: 4}, "`3` must be a field of TransformerConfig: attention, "),
    (
      {"nsa": {"block": 16}},
      "`nsa.block` must be a field of NSAConfig: compression_block, ",
    ),
    (
      {"rope": {"theta": 1e4}},
      "`rope.theta` must be a field of RopeConfig: base, beta_fast, ",
    ),
    ({"nsa": None}, "`nsa`=None must be a dictionary of fields of NSAConfig."),
    ({"nsa": [16]}, "`nsa`=[16] must be a dictionary of fields of NSAConfig."),
    ({"rope": 1e4}, "`rope`=10000.0 must be a dictionary of fields of RopeCo"),
    ({"nsa": {"window": 0}}, "`window`=0 must be at least 1."),
    ({"rope": {"base": "a"}}, "`base`='a' must be a finite number."),
    ({"model_dim": "12"}, "`model_dim`='12' must be a static integer."),
    ({"dtype": "f33"}, "`dtype`='f33' must be a floating-point dtype."),
    ({"attention": ["nsa"]}, "`attention`=('nsa',) must have `num_layers`=2"),
  ],
)
def test_dictionary_messages(change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    TransformerConfig.from_dict({**_config().to_dict(), **change})


@pytest.mark.parametrize(
  "fields, message",
  [
    ("{}", "`fields`='{}' must be a dictionary of fields of TransformerConfig"),
    (None, "`fields`=None must be a dictionary of fields of TransformerConfig"),
    ({"num_layers": 2}, "`num_heads` is missing and has no default."),
  ],
)
def test_dictionaries_that_hold_no_configuration(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    TransformerConfig.from_dict(fields)


def test_preset_message():
  message = "`name`='huge' must be one of 'tiny', 'small', 'base'."
  with pytest.raises(ValueError, match=re.escape(message)):
    TransformerConfig.preset("huge")


CALL_MESSAGES: list[Any] = [
  ({"tokens": np.zeros(3, int)}, "`tokens` of shape (3,) must have rank 2"),
  (
    {"tokens": np.zeros((1, 3))},
    "`tokens` of dtype float32 must have an integer dtype.",
  ),
  (
    {"positions": np.zeros((B, 3), int)},
    "`positions` of shape (2, 3) must have shape (2, 40)",
  ),
  (
    {"segment_ids": np.tile([1] * 5 + [2] * (T - 5), (B, 1))},
    "`segment_ids` starts segment 2 of row 0 at position 5; starts must be "
    "multiples of `selection_block`=8.",
  ),
]


@pytest.mark.parametrize("arguments, message", CALL_MESSAGES)
def test_call_messages(arguments, message):
  model, params, _ = _setup(num_layers=1, compression="mean")
  with pytest.raises(ValueError, match=re.escape(message)):
    model.apply(params, **{"tokens": _tokens(), **arguments})
