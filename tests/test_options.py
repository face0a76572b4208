"""Options that checkpoints need of layer and model, each by its meaning."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import nsa_jax
from nsa_jax import (
  AttentionConfig,
  NSAConfig,
  RopeConfig,
  TransformerConfig,
  TransformerLM,
)
from nsa_jax.layers import core
from nsa_jax.layers.linen import DenseAttention
from nsa_jax.models.loss import token_losses
from nsa_jax.rope import rope_frequencies

NSA = NSAConfig(4, 2, 8, num_selected=3, num_initial=1, num_local=1, window=6)
T, VOCAB = 24, 10


def _config(**overrides):
  fields = {
    "vocab_size": VOCAB,
    "num_layers": 1,
    "model_dim": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "mlp_dim": 6,
    "nsa": NSA,
    "compression": "mean",
    "implementation": "reference",
  }
  return TransformerConfig(**{**fields, **overrides})


def _tokens():
  return np.random.default_rng(0).integers(0, VOCAB, (1, T))


@functools.cache
def _params(config, seed=0):
  shapes = jax.eval_shape(
    TransformerLM(config).init, jax.random.key(0), _tokens()
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)


def _logits(config, params=None, **call):
  params = _params(config) if params is None else params
  return jax.jit(functools.partial(TransformerLM(config).apply, **call))(
    params, _tokens()
  )


def test_epsilon():
  # So large that the norms divide by its root alone.
  huge = _logits(_config(norm_epsilon=1e12, normalize_qk=True))
  assert jnp.abs(huge).max() < 1e-3
  assert jnp.abs(_logits(_config(normalize_qk=True))).max() > 0.1


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_biases(attention):
  config = _config(attention=attention, biases=["out", "key", "query"])
  assert config.biases == ("query", "key", "out")
  layer = _params(config)["params"]["layer_0"]["attention"]
  keys = [name for name in layer if name.startswith("key")]
  for name, part in layer.items():
    assert ("bias" in part) == (name in ("query", "out", *keys)), name
  assert layer["query"]["bias"].shape == (2, 4)
  assert layer["out"]["bias"].shape == (8,)
  # With biases of 0, it is the layer without them.
  plain = _config(attention=attention)
  zeros = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if path[-1].key == "bias" else x,
    _params(config),
  )
  bare = jax.tree.map(lambda x: x, zeros)["params"]  # New dictionaries.
  for name in (*keys, "query", "out"):
    del bare["layer_0"]["attention"][name]["bias"]
  got, want = _logits(config, zeros), _logits(plain, {"params": bare})
  np.testing.assert_array_equal(got, want)
  assert jnp.abs(_logits(config) - want).max() > 1e-2


@pytest.mark.parametrize(
  "gate_bias, logical_axes", [(-2.0, True), ((1.0, 0.0, -1.0), False)]
)
def test_gates_start_as_told(gate_bias, logical_axes):
  layer = nsa_jax.NativeSparseAttention(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    config=NSA,
    compression="mean",
    gate_bias=gate_bias,
    gate_init_scale=0,
    logical_axes=logical_axes,
  )
  x = jax.random.normal(jax.random.key(0), (1, 8, 6))
  params = jax.jit(layer.init)(jax.random.key(0), x)
  collect = functools.partial(layer.apply, mutable=["intermediates"])
  _, sown = jax.jit(collect)(params, x)
  want = jax.nn.sigmoid(jnp.broadcast_to(jnp.asarray(gate_bias), (3,)))
  (gates,) = sown["intermediates"]["gates"]
  np.testing.assert_allclose(gates, jnp.broadcast_to(want, gates.shape))


def test_the_gates_kernel_is_scaled():
  kernels = [
    jax.jit(
      nsa_jax.NativeSparseAttention(
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        compression="mean",
        gate_init_scale=scale,
      ).init
    )(jax.random.key(0), jnp.ones((1, 8, 6)))["params"]["gate"]["kernel"]
    for scale in (1, 0.5)
  ]
  np.testing.assert_array_equal(kernels[0] * 0.5, kernels[1])


def test_a_configuration_per_layer():
  wide = dataclasses.replace(NSA, window=T, selection_block=12, num_selected=2)
  fields = {"num_layers": 2, "attention": "window"}
  config = _config(**fields, layer_nsa=[NSA, wide])
  assert config.nsa == NSA
  assert config.of_layer(1).nsa == wide
  assert config.segment_alignment == 24
  for one in (config, _config(**fields)):
    with pytest.raises(ValueError, match="`i`=2 must be less than `num_layer"):
      one.of_layer(2)
  same = _config(**fields, layer_nsa=[wide, wide])
  assert same == _config(**fields, nsa=wide)
  params = _params(config)
  logits = _logits(config, params)
  for other in (_config(**fields), same):
    assert jnp.abs(_logits(other, params) - logits).max() > 1e-2
  kinds = _config(num_layers=2, attention=["window", "full"])
  np.testing.assert_allclose(_logits(kinds, params), logits, atol=1e-5)
  tokens = jnp.asarray(_tokens())
  out = nsa_jax.generate(
    TransformerLM(config), params["params"], tokens, max_new_tokens=1
  )
  assert out.tokens.shape == (1, T + 1)
  with pytest.raises(ValueError, match="multiples of `selection_block`=24"):
    _logits(config, params, segment_ids=np.array([[1] * 8 + [2] * 16]))


def test_rows_without_a_token():
  fields = {"tie_embeddings": False, "attention": "window"}
  config = _config(**fields, vocab_multiple=4)
  padded, plain = _params(config), _config(**fields)
  assert padded["params"]["head"].shape == (12, 8)
  cut = {"params": dict(padded["params"])}
  for name in ("embedding", "head"):
    cut["params"][name] = padded["params"][name][:VOCAB]
  want = _logits(plain, cut)
  assert want.shape == (1, T, VOCAB)
  np.testing.assert_array_equal(_logits(config, padded), want)
  labels = np.where(_tokens() == 3, VOCAB, _tokens())
  losses = _logits(config, padded, labels=labels)
  np.testing.assert_array_equal(losses, _logits(plain, cut, labels=labels))
  assert not losses[labels == VOCAB].any()
  apply = jax.jit(TransformerLM(config).apply)
  assert jnp.isnan(apply(padded, np.full((1, 8), VOCAB))).all()


def test_scaled_embeddings_and_capped_logits():
  fields = {"tie_embeddings": False, "attention": "window"}
  config = _config(**fields, embedding_scale=3.0)
  scaled = {"params": dict(_params(config)["params"])}
  scaled["params"]["embedding"] = 3 * scaled["params"]["embedding"]
  want = _logits(_config(**fields), scaled)
  np.testing.assert_allclose(_logits(config), want, atol=1e-5)
  capped = _config(attention="window", logit_softcap=0.5)
  logits = _logits(capped)
  assert jnp.abs(logits).max() <= 0.5
  want = 0.5 * np.tanh(_logits(_config(attention="window")) / 0.5)
  np.testing.assert_allclose(logits, want, atol=1e-6)
  losses = _logits(capped, labels=_tokens())
  labels = _tokens()[..., None]
  own = jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
  np.testing.assert_allclose(
    losses, jax.nn.logsumexp(logits, axis=-1) - own, atol=1e-5
  )


def test_losses_of_a_cut_vocabulary_have_no_gradient_past_it():
  head = jax.random.normal(jax.random.key(0), (6, 4))
  x = jax.random.normal(jax.random.key(1), (1, 3, 4))

  def loss(head):
    return token_losses(head, x, jnp.array([[0, 4, 5]]), vocab_size=5).sum()

  grads = jax.jit(jax.grad(loss))(head)
  assert not grads[5].any()
  assert (jnp.abs(grads[:5]).max(axis=1) > 0).all()


# ------------------------------------------------------- sinks and a soft cap


def _dense(kind, **options):
  config = AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    nsa=NSA,
    rope=None,
    implementation="xla",
    **options,
  )
  return DenseAttention(config, kind)


@pytest.mark.parametrize("kind", core.DENSE_KINDS)
def test_a_sink_takes_weight(kind):
  x = jax.random.normal(jax.random.key(0), (1, T, 8))
  call = {"positions": None, "segment_ids": None}
  layer = _dense(kind, attention_sinks=True, logical_axes=True)
  boxed = jax.jit(functools.partial(layer.init, **call))(jax.random.key(1), x)
  box = boxed["params"]["sink"]
  assert box.names == ("heads",)
  params = meta.unbox(boxed)
  apply = jax.jit(functools.partial(layer.apply, **call))
  plain = {"params": dict(params["params"])}
  del plain["params"]["sink"]
  want = jax.jit(functools.partial(_dense(kind).apply, **call))(plain, x)
  none = {"params": params["params"] | {"sink": jnp.full(2, -1e9)}}
  np.testing.assert_allclose(apply(none, x), want, atol=1e-6)
  everything = {"params": params["params"] | {"sink": jnp.full(2, 1e9)}}
  np.testing.assert_array_equal(apply(everything, x), 0)
  grads = jax.jit(jax.grad(lambda p: (apply(p, x) ** 2).sum()))(params)
  assert jnp.abs(grads["params"]["sink"]).min() > 1e-6


@pytest.mark.parametrize(
  "op, implementation",
  [("full", "xla"), ("window", "reference"), ("window", None)],
)
def test_the_soft_cap_of_an_op(op, implementation):
  query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 16))
  function = getattr(nsa_jax, f"{op}_attention")
  config = {"config": NSA} if op == "window" else {}
  out, lse = function(
    3 * query, key, value, softcap=0.7, implementation=implementation, **config
  )
  scores = jnp.einsum("btnh,bsnh->bnts", 3 * query, key) / 4
  scores = 0.7 * jnp.tanh(scores / 0.7)
  distance = np.arange(12)[:, None] - np.arange(12)
  read = (distance >= 0) & (distance < (6 if op == "window" else 12))
  scores = jnp.where(read, scores, -jnp.inf)
  want = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)
  np.testing.assert_allclose(out, want, atol=1e-5)
  want = jax.nn.logsumexp(scores, axis=-1)
  np.testing.assert_allclose(lse, want.transpose(0, 2, 1), atol=1e-5)


@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
def test_kernels_have_no_soft_cap(implementation):
  x = jnp.ones((1, 16, 2, 16), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match=r"`softcap`=2\.0: .* None"):
    nsa_jax.window_attention(
      x,
      x,
      x,
      config=NSA,
      softcap=2.0,
      return_lse=False,
      implementation=implementation,
    )


@pytest.mark.parametrize("softcap", [0, -1.0, "1", math.nan])
def test_soft_cap_message(softcap):
  x = jnp.ones((1, 4, 1, 4))
  with pytest.raises(ValueError, match="`softcap`="):
    nsa_jax.full_attention(x, x, x, softcap=softcap)


def test_a_traced_soft_cap_message():
  x = jnp.ones((1, 4, 1, 4))
  with pytest.raises(ValueError, match=r"`softcap`=.* static Python number"):
    jax.jit(lambda cap: nsa_jax.full_attention(x, x, x, softcap=cap))(1.0)


@pytest.mark.parametrize(
  "option", [{"attention_sinks": True}, {"score_softcap": 30.0}]
)
def test_sparse_attention_has_neither(option):
  ((name, value),) = option.items()
  message = f"`{name}`={value}: Native Sparse Attention takes "
  layer = nsa_jax.NativeSparseAttention(
    num_heads=2, num_kv_heads=1, head_dim=4, **option
  )
  with pytest.raises(NotImplementedError, match=message):
    layer.init(jax.random.key(0), jnp.ones((1, 8, 4)))


# ------------------------------------------------------------------------ RoPE


def test_scalings_of_rope():
  plain = rope_frequencies(64, RopeConfig())
  for factor in (2.0, 8.0):
    linear = RopeConfig(scaling="linear", factor=factor)
    np.testing.assert_array_equal(rope_frequencies(64, linear), plain / factor)
    assert linear.multiplier == 1
  llama = RopeConfig(factor=8.0, beta_fast=4.0, scaling="llama3")
  yarn = dataclasses.replace(llama, scaling="yarn")
  np.testing.assert_array_equal(
    rope_frequencies(64, llama), rope_frequencies(64, yarn)
  )
  assert (llama.multiplier, yarn.multiplier) == (1, 0.1 * math.log(8) + 1)
  # Of the two YaRNs, 16 of 64 frequencies differ, by up to 1.7 times.
  paper = RopeConfig(base=1e6, factor=4.0, original_max_position=32768)
  theirs = dataclasses.replace(paper, scaling="yarn_index")
  ratio = rope_frequencies(128, theirs) / rope_frequencies(128, paper)
  assert (np.abs(ratio - 1) > 1e-3).sum() == 16
  assert 1.6 < max(ratio.max(), 1 / ratio.min()) < 1.8


def test_dynamic_rope_scales_long_rows():
  x = jax.random.normal(jax.random.key(0), (2, 6, 1, 8))
  config = RopeConfig(scaling="dynamic", factor=4.0, original_max_position=8)
  positions = jnp.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
  got = nsa_jax.apply_rope(x, positions, config)
  plain = nsa_jax.apply_rope(x, positions, RopeConfig())
  np.testing.assert_array_equal(got[0], plain[0])  # Short.
  grown = (4 * 12 / 8 - 3) ** (8 / 6)
  want = nsa_jax.apply_rope(x, positions, RopeConfig(base=1e4 * grown))
  np.testing.assert_allclose(got[1], want[1], atol=1e-5)
  told = nsa_jax.apply_rope(x, positions, config, jnp.array([12, 12]))
  np.testing.assert_allclose(told, want, atol=1e-5)
  # A row of padding counts its tokens alone.
  model = _config(rope=config, attention="full")
  ids = np.array([[1] * 8 + [0] * 16])
  logits = _logits(model, segment_ids=ids)
  usual = dataclasses.replace(model, rope=RopeConfig())
  want = _logits(usual, segment_ids=ids)
  np.testing.assert_array_equal(logits[:, :8], want[:, :8])
  # A pair turns by 1, whatever the base.
  two = nsa_jax.apply_rope(x[..., :2], positions, config)
  want = nsa_jax.apply_rope(x[..., :2], positions, RopeConfig())
  np.testing.assert_array_equal(two, want)


def test_partial_rotation():
  x = jax.random.normal(jax.random.key(0), (1, 6, 1, 9))
  positions = jnp.arange(6)[None]
  got = nsa_jax.apply_rope(x, positions, RopeConfig(rotary_dim=4))
  want = nsa_jax.apply_rope(x[..., :4], positions, RopeConfig())
  np.testing.assert_array_equal(got[..., :4], want)
  np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
  assert jnp.isfinite(_logits(_config(rope=RopeConfig(rotary_dim=2)))).all()


def test_the_earlier_name_of_the_factor():
  assert RopeConfig(yarn_factor=4.0) == RopeConfig(factor=4.0)
  old = _config(rope=RopeConfig(factor=4.0)).to_dict()
  old["rope"] = {
    "base": 10000.0,
    "yarn_factor": 4.0,
    "original_max_position": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
  }
  # Fields that an earlier version did not write.
  for name in ("layer_nsa", "biases", "gate_bias", "norm_epsilon"):
    del old[name]
  config = TransformerConfig.from_dict(old)
  assert config == _config(rope=RopeConfig(factor=4.0))


# -------------------------------------------------------------------- messages


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"scaling": "ntk"}, "`scaling`='ntk' must be one of 'yarn', 'yarn_index'"),
    ({"factor": 0.5}, "`factor`=0.5 must be at least 1 (1: no scaling)."),
    (
      {"factor": 2.0, "yarn_factor": 2.0},
      "`yarn_factor`=2.0 must not be given beside `factor`=2.0: it is the same",
    ),
    ({"rotary_dim": 3}, "`rotary_dim`=3 must be even: RoPE rotates pairs of"),
    ({"rotary_dim": 0}, "`rotary_dim`=0 must be at least 1."),
    ({"temperature": 0.0}, "`temperature`=0.0 must be positive."),
  ],
)
def test_rope_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    RopeConfig(**fields)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"norm_epsilon": 0.0}, "`norm_epsilon`=0.0 must be positive."),
    (
      {"biases": ["gate"]},
      "`biases`=['gate'] must be a sequence of none or more of 'query', 'key', "
      "'value', 'out'.",
    ),
    ({"biases": "query"}, "`biases`='query' must be a sequence of none or"),
    (
      {"gate_bias": [1.0]},
      "`gate_bias`=[1.0] must be None, a number, or one for each of 'compres",
    ),
    ({"gate_bias": "0"}, "`gate_bias`='0' must be a finite number."),
    (
      {"gate_bias": np.ones(3)},
      "`gate_bias`=array([1., 1., 1.]) must be None, a number, or one for each",
    ),
    ({"gate_bias": (0, None, 0)}, "`gate_bias[1]`=None must be a finite num"),
    ({"gate_init_scale": math.inf}, "`gate_init_scale`=inf must be a finite"),
    ({"attention_sinks": 1}, "`attention_sinks`=1 must be True or False."),
    ({"score_softcap": 0.0}, "`score_softcap`=0.0 must be positive."),
    ({"logit_softcap": -1.0}, "`logit_softcap`=-1.0 must be positive."),
    ({"embedding_scale": 0.0}, "`embedding_scale`=0.0 must be positive."),
    ({"vocab_multiple": 0}, "`vocab_multiple`=0 must be at least 1."),
    (
      {"rope": RopeConfig(rotary_dim=8)},
      "`rotary_dim`=8 must be at most `head_dim`=4.",
    ),
    ({"layer_nsa": "nsa"}, "`layer_nsa`='nsa' must be None or a sequence of"),
    ({"layer_nsa": [1]}, "`layer_nsa[0]`=1 must be an NSAConfig."),
    (
      {"layer_nsa": [NSA, NSA]},
      "`layer_nsa` of 2 entries must have `num_layers`=1 entries.",
    ),
    (
      {
        "num_layers": 2,
        "scan_layers": True,
        "layer_nsa": [NSA, NSAConfig()],
      },
      "must have equal entries with `scan_layers`=True",
    ),
  ],
)
def test_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _config(**fields)


def test_configurations_go_through_json():
  layers = [NSA, dataclasses.replace(NSA, window=3)]
  config = _config(
    num_layers=2,
    layer_nsa=layers,
    biases=["value"],
    gate_bias=[1, 2, 3],
    rope=RopeConfig(scaling="llama3", factor=2, beta_fast=4, rotary_dim=2),
  )
  fields = config.to_dict()
  assert fields["layer_nsa"][1]["window"] == 3
  assert TransformerConfig.from_dict(fields) == config
  assert hash(TransformerConfig.from_dict(fields)) == hash(config)
  with pytest.raises(
    ValueError, match=r"`layer_nsa\[0\].x` must be a field of"
  ):
    TransformerConfig.from_dict(fields | {"layer_nsa": [{"x": 1}]})
