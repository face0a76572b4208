"""Checkpoints: the logits of transformers, round trips, shardings, messages."""

import dataclasses
import gc
import json
import pathlib
import re
import shutil
import sys
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import (
  AttentionConfig,
  NSAConfig,
  TransformerConfig,
  TransformerLM,
)
from nsa_jax.layers import core
from nsa_jax.models import convert
from nsa_jax.models.convert import tensors
from tests import parity

# What compiles fastest.
FAST: dict[str, Any] = {"implementation": "reference"}
FLOAT32: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32"}


def _results(case):
  return dict(np.load(parity.FOLDER / case / parity.RESULTS))


def _fast(*fast):
  """All cases; the others are slow."""
  slow = [case for case in parity.CASES if case not in fast]
  return [*fast, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]


def _equal(got: Any, want: Any) -> None:
  structure: Any = jax.tree.structure(got)
  assert structure == jax.tree.structure(want)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert x.dtype == y.dtype, path
    np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("case", parity.CASES)
def test_logits_are_those_of_transformers(case):
  loaded = nsa_jax.load(parity.FOLDER / case, **FLOAT32, **FAST)
  results = _results(case)
  apply = jax.jit(loaded.model.apply)
  logits = apply({"params": loaded.params}, results["tokens"])
  np.testing.assert_allclose(logits[:, ::4], results["logits"], atol=1e-4)
  assert loaded.tokenizer is None


@pytest.mark.parametrize(
  "case", _fast("llama3", "llama_dynamic", "mistral", "qwen3")
)
def test_greedy_tokens_are_those_of_transformers(case):
  loaded = nsa_jax.load(parity.FOLDER / case, **FLOAT32, **FAST)
  results = _results(case)
  prompts = results["tokens"][:, : parity.PROMPT]
  generated = nsa_jax.generate(
    loaded.model,
    loaded.params,
    prompts,
    max_new_tokens=parity.NEW,
    temperature=0,
  )
  np.testing.assert_array_equal(generated.tokens, results["generated"])


def test_the_cases_hit_every_option():
  configs = {
    case: nsa_jax.load(parity.FOLDER / case).config for case in parity.CASES
  }
  every = list(configs.values())
  ropes = [config.rope for config in every if config.rope is not None]
  assert {rope.scaling for rope in ropes if rope.factor > 1} == {
    "llama3",
    "linear",
    "dynamic",
    "yarn_index",
  }
  assert {rope.temperature for rope in ropes} == {None, 1.2}
  assert {config.biases for config in every} == {
    (),
    ("query", "key", "value"),
    ("query", "key", "value", "out"),
  }
  assert {config.norm_epsilon for config in every} == {1e-2, 1e-5, 1e-6}
  assert {config.attention for config in every} == {
    "full",
    "window",
    ("full", "window"),
  }
  for name in ("normalize_qk", "tie_embeddings"):
    assert {getattr(config, name) for config in every} == {False, True}
  wide = [c.head_dim * c.num_heads != c.model_dim for c in every]
  assert set(wide) == {False, True}
  kept = configs["llama_bfloat16"]
  assert kept.dtype == kept.param_dtype == jnp.bfloat16


@pytest.mark.parametrize("case", _fast("llama3", "qwen2", "qwen3", "mistral"))
def test_a_round_trip_keeps_the_bytes(case, tmp_path):
  """Of every tensor; and of the parameters, whether stacked or not."""
  folder = parity.FOLDER / case
  loaded = nsa_jax.load(folder)
  most = 8_000 if case == "llama3" else 10**9
  nsa_jax.save(tmp_path, loaded.config, loaded.params, max_file_bytes=most)
  again = nsa_jax.load(tmp_path)
  assert again.config == loaded.config
  _equal(again.params, loaded.params)
  ours, theirs = (
    {
      name: x
      for path in sorted(where.glob("*.safetensors"))
      for name, x in safetensors.numpy.load_file(path).items()
    }
    for where in (tmp_path, folder)
  )
  _equal(ours, theirs)
  if most < 10**9:
    index = json.loads((tmp_path / tensors.INDEX).read_text())
    assert set(index["weight_map"]) == set(theirs)
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(
      x.nbytes for x in theirs.values()
    )


def test_stacked_layers(tmp_path):
  folder = parity.FOLDER / "llama_bfloat16"
  single = nsa_jax.load(folder)
  stacked = nsa_jax.load(folder, scan_layers=True)
  model, unstacked = nsa_jax.unstack_layers(stacked.model, stacked.params)
  assert model == single.model
  _equal(unstacked, single.params)
  nsa_jax.save(tmp_path, stacked.config, stacked.params)
  _equal(nsa_jax.load(tmp_path).params, single.params)


def test_rows_of_the_vocabulary(tmp_path):
  folder = parity.FOLDER / "qwen2"
  loaded = nsa_jax.load(folder, vocab_multiple=32, **FAST)
  assert loaded.params["head"].shape == (64, 16)
  assert not loaded.params["embedding"][parity.VOCAB :].any()
  results = _results("qwen2")
  logits = jax.jit(loaded.model.apply)(
    {"params": loaded.params}, results["tokens"]
  )
  assert logits.shape[-1] == parity.VOCAB
  np.testing.assert_allclose(logits[:, ::4], results["logits"], atol=1e-4)
  nsa_jax.save(tmp_path, loaded.config, loaded.params)
  _equal(nsa_jax.load(tmp_path).params, nsa_jax.load(folder).params)


@pytest.mark.parametrize("before, after", [(16_000, 10**9), (10**9, 16_000)])
def test_an_interrupted_save_leaves_no_mixture(
  before, after, tmp_path, monkeypatch
):
  """Over a checkpoint with another number of files, at any step."""
  old = nsa_jax.load(parity.FOLDER / "llama3")
  new = jax.tree.map(lambda x: x + 1, old.params)
  folder, saved = tmp_path / "folder", tmp_path / "saved"
  nsa_jax.save(saved, old.config, old.params, max_file_bytes=before)
  steps: list[str] = []

  def counted(function, allowed):
    def call(self, *args, **options):
      if len(steps) == allowed:
        raise KeyboardInterrupt
      steps.append(self.name)
      return function(self, *args, **options)

    return call

  found = []
  for allowed in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    steps.clear()
    with monkeypatch.context() as patch:
      for name in ("write_text", "unlink", "replace"):
        function = counted(getattr(pathlib.Path, name), allowed)
        patch.setattr(pathlib.Path, name, function)
      try:
        nsa_jax.save(folder, old.config, new, max_file_bytes=after)
      except KeyboardInterrupt:
        done = False
      else:
        done = True
    if not done and not (folder / "config.json").exists():
      with pytest.raises(ValueError, match=r"config.json cannot be read"):
        nsa_jax.load(folder)
      found.append("none")
      continue
    params = nsa_jax.load(folder).params
    _equal(params, new if done else old.params)
    found.append("new" if done else "old")
    if done:
      break
  assert found == sorted(found, key=["old", "none", "new"].index)
  assert {*found} == {"old", "none", "new"}
  # Nothing else is left: transformers may read other files first.
  names = {path.name for path in folder.iterdir()}
  assert ("model.safetensors" in names) == (after > before)
  assert (tensors.INDEX in names) == (after < before)
  assert not [name for name in names if name.startswith(".")]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
  old = nsa_jax.load(parity.FOLDER / "mistral")
  nsa_jax.save(tmp_path, old.config, old.params)
  names = sorted(path.name for path in tmp_path.iterdir())

  def full(*_, **__):
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match="No space"):
    nsa_jax.save(tmp_path, old.config, jax.tree.map(jnp.zeros_like, old.params))
  assert sorted(path.name for path in tmp_path.iterdir()) == names
  _equal(nsa_jax.load(tmp_path).params, old.params)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_one_tensor_at_a_time(scan_layers, tmp_path, monkeypatch):
  config = TransformerConfig.preset(
    "tiny",
    num_layers=6,
    model_dim=512,
    mlp_dim=1024,
    attention="full",
    scan_layers=scan_layers,
  )
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = TransformerLM(config).init
  shapes = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  nsa_jax.save(tmp_path, config, zeros)
  total = sum(x.nbytes for x in jax.tree.leaves(zeros))
  del zeros
  gc.collect()
  before = sum(x.nbytes for x in jax.live_arrays())
  on_devices = []
  read = tensors.Reader.read

  def counted(self, name):
    if not tracemalloc.is_tracing():
      tracemalloc.start()
    on_devices.append(sum(x.nbytes for x in jax.live_arrays()) - before)
    return read(self, name)

  monkeypatch.setattr(tensors.Reader, "read", counted)
  nsa_jax.load(tmp_path, scan_layers=scan_layers)
  _, on_host = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  largest = 4 * 512 * 1024
  assert max(on_devices) <= total + largest
  # What is read, a copy of it in our order, and what Python needs meanwhile.
  assert on_host < 3 * largest < total / 4


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_mesh(scan_layers, tmp_path):
  folder = parity.FOLDER / "llama_bfloat16"
  mesh = jax.make_mesh((2, 2), ("data", "heads"))
  want = nsa_jax.load(folder, scan_layers=scan_layers)
  got = nsa_jax.load(folder, mesh=mesh, scan_layers=scan_layers)
  _equal(jax.device_get(got.params), jax.device_get(want.params))
  shardings = nsa_jax.parameter_shardings(got.params, mesh)
  for x, sharding in zip(
    jax.tree.leaves(got.params), jax.tree.leaves(shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  layer = got.params["layers" if scan_layers else "layer_0"]
  query = layer["attention"]["query"]["kernel"]
  lead = (None,) if scan_layers else ()
  assert tuple(query.sharding.spec) == (*lead, "data", "heads", None)
  nsa_jax.save(tmp_path, got.config, got.params)
  _equal(
    jax.device_get(nsa_jax.load(tmp_path).params),
    jax.device_get(nsa_jax.load(folder).params),
  )
  given = jax.tree.map(
    lambda _: jax.sharding.NamedSharding(mesh, P()), shardings
  )
  again = nsa_jax.load(folder, shardings=given, scan_layers=scan_layers)
  _equal(jax.device_get(again.params), jax.device_get(want.params))
  for x in jax.tree.leaves(again.params):
    assert x.sharding.is_fully_replicated
    assert len(x.sharding.device_set) == 4


# ------------------------------------------------------- options of a layer


def check_rope(index, angles, multiplier):
  """The rotation of the last of 200 tokens, from a vector of (1, 0) pairs."""
  _, options, head_dim = parity.ROPES[index]
  config = nsa_jax.RopeConfig(**options)
  width = 2 * len(angles)
  x = jnp.zeros((1, 200, 1, head_dim)).at[..., : width // 2].set(1)
  x = x.at[..., width:].set(7)
  positions = jnp.arange(200)[None]
  turned = nsa_jax.apply_rope(x, positions, config)[0, -1, 0]
  want = np.concatenate([np.cos(angles), np.sin(angles)]) * multiplier
  # Angles of up to 200 radians are rounded to float32, here and there.
  np.testing.assert_allclose(turned[:width], want, atol=5e-5)
  np.testing.assert_array_equal(turned[width:], 7)
  assert config.multiplier == pytest.approx(multiplier)


@pytest.mark.parametrize("index", range(len(parity.ROPES)))
def test_rope_is_that_of_transformers(index):
  stored = np.load(parity.FOLDER / "rope.npz")
  check_rope(index, stored[f"angles_{index}"], stored[f"multiplier_{index}"])


def check_attention(kind, arrays):
  """Dense attention, all at once and token by token over a cache."""
  config = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=None,
    attention_sinks=kind == "sink",
    score_softcap=0.5 if kind == "softcap" else None,
    nsa=NSAConfig(window=12),
    implementation="xla",
  )
  query, key, value = (
    jnp.asarray(arrays[name]) for name in ("query", "key", "value")
  )
  parts: Any = {
    "query": lambda x: query[:, x[0, :, 0].astype(jnp.int32)],
    "key": lambda x: key[:, x[0, :, 0].astype(jnp.int32)],
    "value": lambda x: value[:, x[0, :, 0].astype(jnp.int32)],
    "sink": lambda: jnp.asarray(arrays["sinks"]),
    "out": lambda heads: heads.reshape(*heads.shape[:2], -1),
  }
  x: Any = np.arange(12, dtype=np.float32)[None, :, None]
  want = arrays["out"].reshape(1, 12, -1)
  call: dict[str, Any] = {"positions": None, "segment_ids": None}
  dense: Any
  for dense in core.DENSE_KINDS:

    @jax.jit
    def run(x, dense=dense):
      every = [core.dense_attention(config, dense, parts, x, **call).out]
      held: Any = core.empty_cache(
        config, 1, 12, max_append=1, dtype=jnp.float32, kind=dense
      )
      for token in (x[:, :11], x[:, 11:]):
        decoding = core.begin_decoding(held, token, None, None)
        step = core.dense_attention(
          config, dense, parts, token, decoding=decoding, **call
        )
        held = step.cache
        every.append(step.out)
      return every

    for got, part in zip(
      run(x), (want, want[:, :11], want[:, 11:]), strict=True
    ):
      np.testing.assert_allclose(got, part, atol=1e-5)


@pytest.mark.parametrize("kind", ["softcap", "sink"])
def test_attention_is_that_of_transformers(kind):
  check_attention(kind, np.load(parity.FOLDER / f"{kind}.npz"))


# ------------------------------------------------------------------------ NSA

NSA_1B = {
  "architectures": ["LlamaNSAForCausalLM"],
  "model_type": "llama-nsa",
  "vocab_size": 128256,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 16,
  "num_attention_heads": 32,
  "num_key_value_heads": 2,
  "head_dim": 64,
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "block_size": 16,
  "block_counts": 16,
  "window_size": 128,
}


def test_the_public_configuration_of_nsa_1b():
  config = convert.read_config(NSA_1B)
  assert config.nsa == NSAConfig(16, 16, 16, 16, 0, 1, 128)
  assert (config.compression, config.share_kv) == ("mean", True)
  assert config.rope_compressed == "tokens"
  assert config.layer_kinds == ("nsa",) * 16
  assert config.rope is not None
  assert (config.rope.base, config.norm_epsilon) == (5e5, 1e-5)
  shapes = jax.eval_shape(
    TransformerLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  sizes = [x.size for x in jax.tree.leaves(shapes)]
  # Query and out, keys and values, gates, the MLP, norms.
  columns = 2 * 2048 + 2 * 2 * 64 + 3 * 32 + 3 * 8192 + 2
  assert sum(sizes) == 2048 * (128256 + 16 * columns + 1)
  fields = convert.write_config(config, "llama-nsa")
  assert convert.read_config(fields) == config


def test_gates_are_interleaved_by_head(tmp_path):
  """The rows of g_proj: the gates of head 0, then of head 1, and so on."""
  tiny = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 4,
    "block_size": 4,
    "block_counts": 2,
    "window_size": 6,
  }
  config = convert.read_config(NSA_1B | tiny)
  tokens = jnp.arange(12, dtype=jnp.int32)[None]
  params = jax.jit(TransformerLM(config).init)(jax.random.key(0), tokens)
  nsa_jax.save(tmp_path, config, params["params"])
  stored = safetensors.numpy.load_file(tmp_path / tensors.SINGLE)
  rows = stored["model.layers.0.self_attn.g_proj.weight"]
  assert rows.shape == (12, 8)
  kernel = params["params"]["layer_0"]["attention"]["gate"]["kernel"]
  for head in range(4):
    for branch in range(3):
      np.testing.assert_array_equal(
        rows[3 * head + branch], kernel[:, head, branch]
      )
  loaded = nsa_jax.load(tmp_path)
  _equal(loaded.params, params["params"])
  assert set(loaded.params["layer_0"]["attention"]) == {
    *("query", "key", "value", "gate", "out")
  }


# ------------------------------------------------------------------- messages


@pytest.fixture
def folder(tmp_path):
  """A copy of a checkpoint that a test may change."""
  return shutil.copytree(parity.FOLDER / "llama_linear", tmp_path / "copy")


def _change(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _write(folder, change):
  path = folder / tensors.SINGLE
  stored = safetensors.numpy.load_file(path)
  change(stored)
  safetensors.numpy.save_file(stored, path)


def test_defaults_are_those_of_transformers():
  fields = {name: NSA_1B[name] for name in convert.families._SAME}
  fields |= {"model_type": "mistral", "num_hidden_layers": 2}
  config = convert.read_config(fields)
  assert (config.attention, config.nsa.window) == ("window", 4096)
  assert convert.read_config(fields | {"sliding_window": None}) == (
    dataclasses.replace(config, attention="full", nsa=NSAConfig())
  )


def test_notes_of_other_tools_are_passed_over():
  """SmolLM2 has such notes beside the fields of Llama."""
  fields = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"dtype": "q4"},
    "unk_token_id": 0,
    "vocab_size": 49152,
  }
  config = convert.read_config(fields)
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
  assert (config.norm_epsilon, config.rope) == (
    1e-5,
    nsa_jax.RopeConfig(base=1e5),
  )


def test_every_rotary_dimension_is_written():
  for head_dim, width in ((44, 30), (46, 26), (86, 62), (64, 32)):
    rope = nsa_jax.RopeConfig(rotary_dim=width)
    config = TransformerConfig.preset(
      "tiny", attention="full", head_dim=head_dim, rope=rope
    )
    fields = convert.write_config(config, "llama")
    # As transformers reads it.
    assert int(head_dim * fields["partial_rotary_factor"]) == width


def test_fields_to_pass_over():
  fields = {name: NSA_1B[name] for name in convert.families._SAME}
  scaling = {"rope_type": "linear", "factor": 2.0, "new": 1}
  fields |= {"model_type": "llama", "rope_scaling": scaling, "other": 2}
  config = convert.read_config(fields, ignore=["rope_scaling.new", "other"])
  assert config.rope is not None
  assert config.rope.factor == 2
  both = fields | {"rope_parameters": scaling}
  convert.read_config(both, ignore=["rope_parameters.new", "other"])
  message = "`ignore`=['rope_scaling.new'] passes over it."
  with pytest.raises(ValueError, match=re.escape(message)):
    convert.read_config(fields, ignore=["new", "other"])


UNKNOWN = "config.json has the field `{}`={}, which nsa_jax does not know."


@pytest.mark.parametrize(
  "fields, kind, message",
  [
    ({"hidden_size": None}, ValueError, "lacks the field `hidden_size`."),
    ({"model_type": None}, ValueError, "lacks the field `model_type`."),
    (
      {"model_type": "gpt2"},
      NotImplementedError,
      "config.json has `model_type`='gpt2'; nsa_jax reads 'llama', 'mistral', ",
    ),
    (
      {"hidden_act": "gelu"},
      NotImplementedError,
      "config.json has `hidden_act`='gelu'; nsa_jax takes 'silu'.",
    ),
    (
      {"mlp_bias": True},
      NotImplementedError,
      "config.json has `mlp_bias`=True; nsa_jax takes False.",
    ),
    (
      {"quantization_config": {"bits": 4}},
      ValueError,
      UNKNOWN.format("quantization_config", "{'bits': 4}"),
    ),
    ({"layer_types": ["full"]}, ValueError, UNKNOWN.split("`")[0]),
    (
      {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
      NotImplementedError,
      "config.json has `rope_parameters.rope_type`='longrope'; nsa_jax takes",
    ),
    (
      {"rope_parameters": {"rope_type": "linear"}},
      ValueError,
      "config.json lacks the field `rope_parameters.factor`.",
    ),
    (
      {"rope_parameters": {"rope_type": "default", "short_factor": [1.0]}},
      ValueError,
      UNKNOWN.format("rope_parameters.short_factor", "[1.0]"),
    ),
    (
      {"rope_parameters": {"rope_type": "yarn", "truncate": False}},
      NotImplementedError,
      "config.json has `rope_parameters.truncate`=False; nsa_jax takes True.",
    ),
    (
      {"rope_parameters": {"full_attention": {}}},
      NotImplementedError,
      "config.json has `rope_parameters`={'full_attention': {}}; nsa_jax takes "
      "one scaling for all layers.",
    ),
    (
      {"rope_parameters": {}, "rope_scaling": {"factor": 2.0}},
      ValueError,
      "config.json has `rope_parameters`={}, which must be `rope_scaling`="
      "{'factor': 2.0} if it has both.",
    ),
    (
      {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
      ValueError,
      "config.json has `rope_theta`=500000.0, which must be `rope_parameters."
      "rope_theta`=1000000.0 if it has both.",
    ),
    (
      {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
      ValueError,
      "config.json has `rope_parameters`: `factor`=0.5 must be at least 1",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn", "mscale": "x", "factor": 2.0}},
      ValueError,
      "config.json has `rope_parameters.mscale`='x', which must be a positive",
    ),
    (
      {"head_dim": 8},
      ValueError,
      "The tensor `model.layers.0.self_attn.k_proj.bias` of shape (8,) must "
      "have shape (16,), by config.json and the arguments of `load`.",
    ),
    (
      {"tie_word_embeddings": False},
      ValueError,
      "The checkpoint lacks the tensor `lm_head.weight`, for the parameter "
      "`head`.",
    ),
    (
      {"attention_bias": False},
      ValueError,
      "The checkpoint has the tensor `model.layers.0.self_attn.k_proj.bias`, "
      "which the model of config.json has not. `ignore`=[",
    ),
  ],
)
def test_messages_about_fields(folder, fields, kind, message):
  _change(folder, **fields)
  with pytest.raises(kind, match=re.escape(message)):
    nsa_jax.load(folder)


def test_messages_about_layers():
  fields = NSA_1B | {"model_type": "qwen2", "attention_bias": None}
  fields = {k: x for k, x in fields.items() if "block" not in k}
  del fields["window_size"]
  fields["num_hidden_layers"] = 2
  message = "config.json has `layer_types[1]`='chunked'; nsa_jax takes"
  with pytest.raises(NotImplementedError, match=re.escape(message)):
    convert.read_config(fields | {"layer_types": ["full_attention", "chunked"]})
  with pytest.raises(NotImplementedError, match=r"`layer_types\[0\]`=\[\]"):
    convert.read_config(fields | {"layer_types": [[], []]})
  message = "config.json has `layer_types` with 'sliding_attention', and `slid"
  with pytest.raises(ValueError, match=re.escape(message)):
    convert.read_config(fields | {"layer_types": ["sliding_attention"] * 2})


def test_messages_about_tensors(folder):
  name = "model.layers.1.mlp.up_proj.weight"

  def refused(change, kind, message):
    shutil.copy(parity.FOLDER / "llama_linear" / tensors.SINGLE, folder)
    _write(folder, change)
    with pytest.raises(kind, match=re.escape(message)):
      nsa_jax.load(folder)

  refused(
    lambda stored: stored.pop(name),
    ValueError,
    f"The checkpoint lacks the tensor `{name}`, for the parameter "
    "`layer_1/mlp_up/kernel`.",
  )
  refused(
    lambda stored: stored.update({name: stored[name][:, :8].copy()}),
    ValueError,
    f"The tensor `{name}` of shape (24, 8) must have shape (24, 16)",
  )
  refused(
    lambda stored: stored.update({name: stored[name].astype(np.int8)}),
    NotImplementedError,
    f"The tensor `{name}` has the type I8; nsa_jax reads F64, F32, F16, BF16.",
  )
  refused(
    lambda stored: stored.pop("model.embed_tokens.weight"),
    ValueError,
    "The checkpoint lacks the tensor `model.embed_tokens.weight`.",
  )
  refused(
    lambda stored: stored.update({"score.weight": np.ones(1)}),
    ValueError,
    "The checkpoint has the tensor `score.weight`, which",
  )
  nsa_jax.load(folder, ignore=["score.weight"])
  # What older versions wrote, and the tied table once more.
  shutil.copy(parity.FOLDER / "llama_linear" / tensors.SINGLE, folder)
  rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
  _write(
    folder,
    lambda stored: stored.update(
      {
        rotary: np.ones(2),
        "lm_head.weight": stored["model.embed_tokens.weight"],
      }
    ),
  )
  nsa_jax.load(folder)


def test_messages_about_dtypes(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  _write(
    folder,
    lambda stored: stored.update({name: stored[name].astype(np.float16)}),
  )
  mixed = nsa_jax.load(folder)
  assert mixed.config.param_dtype == jnp.float32
  assert mixed.params["layer_1"]["mlp_up"]["kernel"].dtype == jnp.float16
  wide = dict.fromkeys([name], np.zeros((24, 16)))
  _write(folder, lambda stored: stored.update(wide))
  message = f"The tensor `{name}` has the type float64, which jax has only with"
  with pytest.raises(ValueError, match=re.escape(message)):
    nsa_jax.load(folder)
  same = nsa_jax.load(folder, param_dtype="float32")
  assert same.params["layer_1"]["mlp_up"]["kernel"].dtype == jnp.float32
  narrow = {name: np.zeros((24, 16), np.float16)}
  _write(folder, lambda stored: stored.update(narrow))
  with pytest.raises(ValueError, match=r"several types, float16, float32"):
    nsa_jax.load(folder, scan_layers=True)
  half = nsa_jax.load(folder, param_dtype="bfloat16", scan_layers=True)
  assert {x.dtype for x in jax.tree.leaves(half.params)} == {
    jnp.dtype(jnp.bfloat16)
  }


def test_messages_about_files(folder, tmp_path):
  with pytest.raises(ValueError, match=r"`folder`: .*config.json cannot be"):
    nsa_jax.load(tmp_path / "none")
  shutil.copy(folder / tensors.SINGLE, folder / "other.safetensors")
  index = {"weight_map": {"a": "other.safetensors", "b": tensors.SINGLE}}
  path = folder / tensors.INDEX
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"The tensor `.*` is in two files: mod"):
    nsa_jax.load(folder)
  for text in ("{}", "[]", "x", '{"weight_map": 3}'):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"index.json must hold an object"):
      nsa_jax.load(folder)
  path.write_text(json.dumps(index))
  (folder / "other.safetensors").write_bytes(b"12345678")
  with pytest.raises(ValueError, match=r"other.safetensors cannot be read: "):
    nsa_jax.load(folder)
  (folder / "other.safetensors").unlink()
  message = f"must have other.safetensors, which {tensors.INDEX} names."
  with pytest.raises(ValueError, match=re.escape(message)):
    nsa_jax.load(folder)
  path.unlink()
  (folder / tensors.SINGLE).unlink()
  with pytest.raises(ValueError, match=r"must have model.safetensors\."):
    nsa_jax.load(folder)
  (folder / "config.json").write_text("[]")
  with pytest.raises(ValueError, match="must hold an object of JSON"):
    nsa_jax.load(folder)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"mesh": 1, "shardings": 2}, "`shardings` must be None if `mesh` is giv"),
    ({"rules": {}}, "`rules` needs `mesh`."),
    ({"shardings": {"a": 1}}, "`shardings` must have the structure of the pa"),
    ({"tokenizer": None}, "`tokenizer`=None must be True or False."),
    ({"ignore": "x"}, "`ignore`='x' must be a sequence of names."),
    ({"layers": 3}, "`**overrides` has 'layers', which must be a field of Tr"),
  ],
)
def test_messages_about_arguments(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    nsa_jax.load(parity.FOLDER / "mistral", **arguments)


@pytest.mark.parametrize(
  "options, family, message",
  [
    (
      {"norm_epsilon": 1e-5, "embedding_scale": 2.0},
      None,
      "`config.embedding_scale`=2.0 must be 1.0 in a checkpoint of `family`="
      "'llama'.",
    ),
    ({"rope": None}, None, "`config.rope`=None must be RopeConfig("),
    (
      {"rope": nsa_jax.RopeConfig(factor=2.0)},
      None,
      "`config.rope`=RopeConfig(base=10000.0, factor=2.0",
    ),
    (
      {"attention": "nsa"},
      None,
      "`config.compression`='mlp' must be 'mean' in a checkpoint of `family`="
      "'llama-nsa'.",
    ),
    (
      {"attention": ("full", "nsa")},
      "llama",
      "`config.layer_kinds`=('full', 'nsa') must be ('full', 'full')",
    ),
    (
      {
        "attention": "nsa",
        "compression": "mean",
        "share_kv": True,
        "rope_compressed": "tokens",
        "nsa": NSAConfig(16, 16, 16, 4, 0, 1),
        "select": "means",
      },
      None,
      "`config.select`=SelectByMeans(tokens=4) must be None",
    ),
    ({"biases": ["query"]}, None, "`config.biases`=('query',) must be"),
    ({}, "gpt2", "`family`='gpt2' must be one of 'llama', 'mistral', "),
  ],
)
def test_messages_about_export(options, family, message, tmp_path):
  fields = {"num_layers": 2, "model_dim": 16, "attention": "full"} | options
  config = TransformerConfig.preset("tiny", **fields)
  with pytest.raises(ValueError, match=re.escape(message)):
    nsa_jax.save(tmp_path, config, {}, family=family)


def test_messages_about_exported_parameters(tmp_path):
  loaded = nsa_jax.load(parity.FOLDER / "mistral")
  params = dict(loaded.params) | {"head": jnp.zeros((3, 16))}
  message = "`params` has `head` of shape (3, 16); by `config` it must be a"
  with pytest.raises(ValueError, match=re.escape(message)):
    nsa_jax.save(tmp_path, loaded.config, params)
  message = "`max_file_bytes`=0 must be at least 1."
  with pytest.raises(ValueError, match=message):
    nsa_jax.save(tmp_path, loaded.config, loaded.params, max_file_bytes=0)


# ------------------------------------------------------------------ tokenizer


def test_a_tokenizer(folder, tmp_path, monkeypatch):
  words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
  tokenizer = tokenizers.Tokenizer(words)
  loaded = nsa_jax.load(folder)
  nsa_jax.save(tmp_path, loaded.config, loaded.params, tokenizer=tokenizer)
  again = nsa_jax.load(tmp_path).tokenizer
  assert again.encode("b").ids == [1]
  assert nsa_jax.load(tmp_path, tokenizer=False).tokenizer is None
  nsa_jax.save(tmp_path, loaded.config, loaded.params)
  assert nsa_jax.load(tmp_path).tokenizer.encode("b").ids == [1]
  (tmp_path / "tokenizer.json").write_text("x")
  with pytest.raises(ValueError, match=r"tokenizer.json cannot be read: "):
    nsa_jax.load(tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"`tokenizer`=False.*checkpoints"):
    nsa_jax.load(tmp_path)


def test_a_missing_package(tmp_path, monkeypatch):
  loaded = nsa_jax.load(parity.FOLDER / "mistral")
  message = 'needs the package safetensors: pip install "nsa-jax[checkpoints]"'
  monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
  with pytest.raises(ImportError, match=re.escape(message)):
    nsa_jax.save(tmp_path, loaded.config, loaded.params)
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(ImportError, match=re.escape(message)):
    nsa_jax.load(parity.FOLDER / "mistral")


def test_paths_may_be_strings():
  loaded = nsa_jax.load(str(parity.FOLDER / "mistral"))
  assert loaded.config.attention == "window"
