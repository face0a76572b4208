"""Generation: the loop, the sampler, the example that completes text."""

import dataclasses
import functools
import io
import re
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import generate as example
from examples import lm
from nsa_jax import NSAConfig, TransformerConfig, TransformerLM, generate
from nsa_jax.sampling import _decode, _init, _sample, _State, filter_logits
from tests import tiny_run

VOCAB = 8
TRACES: list[bool] = []  # an entry for each time that Bigram is traced


class Bigram(nn.Module):
  """The logits are a row of a table: little to compile, and known by hand."""

  decode: bool = False

  @nn.compact
  def __call__(self, tokens, *, segment_ids=None, prefix_length=None):
    TRACES.append(self.is_initializing())
    table = self.param("table", nn.initializers.zeros, (VOCAB, VOCAB))
    held = self.variable(
      "cache", "lengths", lambda: jnp.zeros(tokens.shape[0], jnp.int32)
    )
    if not self.is_initializing():
      counts = jnp.ones_like(tokens) if segment_ids is None else segment_ids
      held.value += counts.sum(axis=1)
    return table[tokens]


RANDOM = {
  "table": np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype("f4")
}
# The most likely token is the next one.
COUNTER = {"table": np.eye(VOCAB, k=1, dtype=np.float32)}
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def _run(params: Any = RANDOM, prompts: Any = PROMPTS, **options: Any):
  options = {"max_new_tokens": 7, **options}
  tokens, lengths = generate(Bigram(), params, prompts, **options)
  return np.asarray(tokens), np.asarray(lengths)


# -------------------------------------------------------------- with a cache


@pytest.mark.parametrize(
  "select, options",
  [
    pytest.param("means", {}, marks=pytest.mark.slow),
    (None, {"prefill_chunk": 4, "capacity": 40, "stop_token": 16}),
  ],
)
def test_greedy_is_the_argmax_of_full_passes(select, options):
  """Each row as if alone, in layers of every kind."""
  config = TransformerConfig(
    vocab_size=17,
    num_layers=3,
    attention=("nsa", "full", "window"),
    model_dim=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=16,
    nsa=NSAConfig(4, 2, 8, 3, 1, 1, 6),
    select=select,
  )
  model = TransformerLM(config)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
  )
  params = jax.tree.map(
    lambda x: jnp.float32(0.5 * rng.normal(size=x.shape)), shapes["params"]
  )
  lengths, new = np.array([1, 11, 6]), 14
  prompts = rng.integers(0, 16, (3, 11)).astype(np.int32)
  tokens, ends = generate(
    model,
    params,
    prompts,
    lengths=lengths,
    max_new_tokens=new,
    temperature=0,
    **options,
  )
  assert tokens.shape == (3, 11 + new)

  full = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
  want = np.zeros((3, 11 + new), np.int32)
  for b, length in enumerate(lengths):
    want[b, :length] = prompts[b, :length]
    for t in range(length, length + new):
      # Later tokens change nothing.
      want[b, t] = full(want[b : b + 1])[0, t - 1].argmax()
      if want[b, t] == options.get("stop_token"):
        break
    assert ends[b] == t + 1
  np.testing.assert_array_equal(tokens, want)
  assert len(np.unique(tokens)) > 5  # not one token again and again


@pytest.mark.gpu
def test_gpu_greedy_is_the_argmax_of_a_full_pass_by_xla():
  """Kernels of prefill and decoding in a model; blocks are selected."""
  config = TransformerConfig(
    vocab_size=97,
    num_layers=3,
    attention=("nsa", "full", "nsa"),
    model_dim=128,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=256,
    nsa=NSAConfig(32, 16, 64, 4, 1, 2, 128),
  )
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, 97, (3, 700)).astype(np.int32)
  decoder = TransformerLM(config, decode=True)
  variables = decoder.init(jax.random.key(0), np.zeros((3, 800), np.int32))
  params = {"params": variables["params"]}
  lengths, new = np.array([1, 700, 333]), 100
  tokens, ends = generate(
    TransformerLM(config),
    params["params"],
    prompts,
    lengths=lengths,
    max_new_tokens=new,
    temperature=0,
    prefill_chunk=256,
  )
  np.testing.assert_array_equal(ends, lengths + new)
  full = TransformerLM(dataclasses.replace(config, implementation="xla"))
  want = jax.jit(full.apply)(params, tokens)
  for row, length in enumerate(lengths):
    np.testing.assert_array_equal(tokens[row, :length], prompts[row, :length])
    own = want[row, length - 1 : length + new - 1]
    chosen = tokens[row, length : length + new]
    below = own.max(axis=-1) - own[np.arange(new), chosen]
    assert below.max() < 5e-3

  # The logits themselves, which are of size 1.
  step = jax.jit(
    lambda variables, x: decoder.apply(variables, x, mutable=["cache"])
  )
  assert "nsa_decode_blocks" in step.lower(variables, tokens[:, :1]).as_text()
  _, cache = step(variables, tokens[:, :700])
  for t in range(700, 800):
    logits, cache = step(params | cache, tokens[:, t : t + 1])
    np.testing.assert_allclose(logits[:, 0], want[:, t], atol=5e-3)


# ------------------------------------------------- turns of a conversation


@functools.cache
def _mixed(scan_layers: bool = False):
  """A model with layers of every kind, or scanned ones, and its parameters."""
  config = TransformerConfig(
    vocab_size=17,
    num_layers=2 if scan_layers else 3,
    attention="nsa" if scan_layers else ("nsa", "full", "window"),
    model_dim=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=16,
    scan_layers=scan_layers,
    compression="mean",
    nsa=NSAConfig(4, 2, 8, 3, 1, 1, 6),
  )
  model = TransformerLM(config)
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
  )
  params = jax.tree.map(
    lambda x: jnp.float32(0.5 * rng.normal(size=x.shape)), shapes["params"]
  )
  return model, params


def _rows(out):
  """Tokens of each row without padding."""
  return [
    row[:length].tolist()
    for row, length in zip(out.tokens, out.lengths.tolist(), strict=True)
  ]


@pytest.mark.parametrize(
  "scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_turns_with_a_cache_equal_whole_prompts(scan_layers):
  """Rows stop at steps of their own, and get turns of other lengths."""
  model, params = _mixed(scan_layers)
  options: Any = {
    "max_new_tokens": np.array([6, 3]),
    "stop_token": [3, 8],
    "capacity": 48,
    "key": 4,
    "return_log_probs": True,
    "return_cache": True,
  }
  texts: list[list[int]] = [[1, 2, 3, 4, 5], [6]]
  cache = None
  for turn in ([], [[7], [3, 4, 5, 6, 7, 8]]):
    texts = [a + b for a, b in zip(texts, turn or [[], []], strict=True)]
    want = generate(model, params, texts, **options)
    assert want.cache is not None
    chunk = 4 if cache is not None else None
    out = generate(
      model, params, texts, cache=cache, prefill_chunk=chunk, **options
    )
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_array_equal(out.lengths, want.lengths)
    np.testing.assert_allclose(out.log_probs, want.log_probs, atol=1e-5)
    cache = out.cache
    first = next(x for x in jax.tree.leaves(cache) if x.dtype == jnp.int32)
    np.testing.assert_array_equal(
      first.reshape(-1, 2)[0], out.lengths - 1, strict=True
    )
    texts = _rows(out)
  # Its capacity is that of the cache.
  more = generate(
    model,
    params,
    [[*row, 1] for row in texts],
    cache=cache,
    prefill_chunk=4,
    **options | {"capacity": None},
  )
  if not scan_layers:
    assert more.cache["layer_1"]["attention"]["kv"].selected.key.shape[1] == 48


def test_a_cache_may_be_numpy_and_hold_whole_prompts():
  model, params = _mixed()
  options: Any = {"max_new_tokens": 3, "temperature": 0}
  first = generate(
    model, params, [[1, 2, 3]], capacity=16, return_cache=True, **options
  )
  # In one call: the same programs.
  want = generate(
    model, params, [[1, 2, 3]], capacity=16, **options | {"max_new_tokens": 6}
  )
  held = jax.tree.map(np.asarray, first.cache)
  out = generate(model, params, first.tokens, cache=held, **options)
  np.testing.assert_array_equal(out.tokens, want.tokens)


def test_wrong_caches():
  model, params = _mixed()
  options: Any = {"max_new_tokens": 3, "temperature": 0, "return_cache": True}
  first = generate(model, params, [[1, 2, 3]], capacity=16, **options)
  for prompts, cache, message in (
    ([[1] * 5], first.cache, "`cache` holds 5 tokens in row 0, whose prompt h"),
    ([[1] * 20], first.cache, "`capacity` of `cache`=16 must be at least 23"),
    ([[1] * 6] * 2, first.cache, "must have shape (2, 16, 1, 4): that of the"),
    ([[1] * 6], {}, "is missing or one too many: `cache` must be what an"),
    ([[1] * 6], 3, "is missing or one too many: `cache` must be what an"),
    (
      [[1] * 6],
      jax.tree.map(lambda x: x.astype(jnp.float16), first.cache),
      "of dtype float16 must have the dtype",
    ),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      generate(model, params, prompts, cache=cache, **options)
  whole = np.asarray(first.tokens)
  generate(model, params, whole, cache=first.cache, **options)
  with pytest.raises(ValueError, match="was donated to an earlier call"):
    generate(model, params, whole, cache=first.cache, **options)
  with pytest.raises(
    ValueError, match="`cache` must be None for a model whose"
  ):
    _run(cache={"lengths": jnp.zeros(3, jnp.int32)})


# ------------------------------------------------------------------ the loop


def test_forms_of_prompts():
  """Lists and padded arrays, whatever stands in the padding."""
  tokens, lengths = _run()
  assert tokens.shape == (3, 3 + 7)
  np.testing.assert_array_equal(lengths, [10, 8, 9])
  for row, length, prompt in zip(tokens, lengths, PROMPTS, strict=True):
    assert row[: len(prompt)].tolist() == prompt
    assert not row[length:].any()
  padded = np.array([[1, 2, 3], [4, -9, 99], [5, 6, 7]])
  for prompts in (padded, jnp.array(padded)):
    again = _run(prompts=prompts, lengths=[3, 1, 2])
    np.testing.assert_array_equal(tokens, again[0])


@pytest.mark.parametrize(
  "generator",
  ["threefry2x32", "rbg", pytest.param("unsafe_rbg", marks=pytest.mark.slow)],
)
def test_key_and_the_other_rows(generator):
  with jax.default_prng_impl(generator):
    _check_key_and_the_other_rows()


def _check_key_and_the_other_rows():
  tokens, _ = _run(key=3)
  np.testing.assert_array_equal(tokens, _run(key=jax.random.key(3))[0])
  assert (tokens != _run(key=4)[0]).any()
  # Alone, beside others, with more padding and a larger cache.
  for prompts in (PROMPTS[:1], [PROMPTS[0], [7] * 5]):
    row = _run(prompts=prompts, key=3, capacity=30)[0][0]
    np.testing.assert_array_equal(tokens[0, :10], row[:10])
  for first in ([7], [7] * 5):
    row = _run(prompts=[first, PROMPTS[1]], key=3)[0][1]
    np.testing.assert_array_equal(tokens[1, :8], row[:8])
  # Rows, and calls that go on, draw anew.
  same = _run({"table": np.zeros_like(RANDOM["table"])}, [[1], [1]])[0]
  assert (same[0] != same[1]).any()
  short = _run(prompts=PROMPTS[:1], key=3, max_new_tokens=3)[0]
  longer = _run(prompts=short, key=3, max_new_tokens=4)[0]
  np.testing.assert_array_equal(tokens[0], longer[0])


def test_stop_token():
  calls: list[Any] = []
  tokens, lengths = _run(
    COUNTER,
    [[1, 2, 3], [4], [5, 6]],
    temperature=0,
    stop_token=6,
    pad_token=-5,
    max_new_tokens=6,
    stream=calls.append,
  )
  # A stop token in the prompt stops nothing; after 7 comes 0.
  assert tokens.tolist() == [
    [1, 2, 3, 4, 5, 6, -5, -5, -5],
    [4, 5, 6, -5, -5, -5, -5, -5, -5],
    [5, 6, 7, 0, 1, 2, 3, 4, -5],
  ]
  assert lengths.tolist() == [6, 3, 8]
  assert [call.tolist() for call in calls] == [
    [4, 5, 7],
    [5, 6, 0],
    [6, -5, 1],
    [-5, -5, 2],
    [-5, -5, 3],
    [-5, -5, 4],
  ]


def test_several_stop_tokens():
  def run(stop):
    return _run(COUNTER, [[1], [4]], temperature=0, stop_token=stop)

  tokens, lengths = run((3, 6))
  assert tokens[:, :3].tolist() == [[1, 2, 3], [4, 5, 6]]
  assert lengths.tolist() == [3, 3]
  for one, several in ((3, [3]), (None, [])):
    for x, y in zip(run(one), run(several), strict=True):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("stop_token", [None, 6])
def test_new_tokens_per_row(stop_token):
  calls: list[Any] = []
  tokens, lengths = _run(
    COUNTER,
    [[1, 2, 3], [4], [5, 6]],
    temperature=0,
    max_new_tokens=[1, 5, 2],
    stop_token=stop_token,
    stream=calls.append,
  )
  last = 3 if stop_token else 6
  assert lengths.tolist() == [4, last, 4]
  assert tokens.tolist() == [
    [1, 2, 3, 4, 0, 0],
    [4, 5, 6, 7, 0, 1] if last == 6 else [4, 5, 6, 0, 0, 0],
    [5, 6, 7, 0, 0, 0],
  ]
  assert [call[0] for call in calls] == [4, *[0] * (len(calls) - 1)]
  # Each row is as if alone with its number.
  tokens, lengths = _run(max_new_tokens=[1, 5, 2], key=9)
  whole, _ = _run(max_new_tokens=5, key=9)
  for row, want, length in zip(tokens, whole, lengths, strict=True):
    np.testing.assert_array_equal(row[:length], want[:length])


def test_temperature_per_row():
  """Each row has the tokens of a call with its temperature."""
  mixed = _run(temperature=[0, 0.7, 2.0], top_p=0.9)[0]
  for row, temperature in enumerate((0, 0.7, 2.0)):
    want = _run(temperature=temperature, top_p=0.9)[0]
    np.testing.assert_array_equal(mixed[row], want[row])
  want = _run(temperature=0)[0]
  np.testing.assert_array_equal(_run(temperature=np.zeros(3))[0], want)


def test_log_probs_are_those_of_the_model():
  """Whatever is sampled from: hook, temperature and top_k come later."""
  prompts, new = [[1, 2, 3], [4], [5, 6]], 7
  out = generate(
    Bigram(),
    RANDOM,
    prompts,
    max_new_tokens=new,
    temperature=0.5,
    top_k=3,
    stop_token=2,
    logits_hook=_never_seven,
    return_log_probs=True,
  )
  assert out.cache is None
  assert out.log_probs is not None
  assert out.log_probs.shape == out.tokens.shape
  want = np.zeros(out.tokens.shape)
  table = jax.nn.log_softmax(RANDOM["table"])
  for row, prompt in enumerate(prompts):
    for t in range(len(prompt), int(out.lengths[row])):
      want[row, t] = table[out.tokens[row, t - 1], out.tokens[row, t]]
  assert (want < 0).sum() == (out.lengths - np.array([3, 1, 2])).sum()
  np.testing.assert_allclose(out.log_probs, want, rtol=1e-6)
  # Neither they nor the cache change tokens.
  options: Any = {"temperature": 0.5, "top_k": 3, "stop_token": 2}
  tokens, _ = _run(**options, logits_hook=_never_seven)
  np.testing.assert_array_equal(out.tokens, tokens)
  nan = {"table": np.full((VOCAB, VOCAB), np.nan, np.float32)}
  bad = generate(Bigram(), nan, [[1]], max_new_tokens=1, return_log_probs=True)
  assert bad.log_probs is not None
  assert np.isnan(bad.log_probs[0, 1])


def _never_seven(logits, tokens, lengths):
  del tokens, lengths
  return logits.at[:, 7].set(-jnp.inf)


def _no_token_twice(logits, tokens, lengths):
  """Forbids the tokens that a row has."""
  have = jnp.arange(tokens.shape[1]) < lengths[:, None]
  rows = jnp.arange(len(tokens))[:, None]
  forbidden = jnp.where(have, -jnp.inf, 0)
  return logits.at[rows, tokens].add(forbidden)


@pytest.mark.parametrize("temperature", [0, 3.0])
def test_logits_hook(temperature):
  tokens, lengths = _run(
    prompts=[[1, 2, 3], [4]],
    max_new_tokens=[5, 7],
    temperature=temperature,
    logits_hook=_no_token_twice,
  )
  for row, length in zip(tokens, lengths, strict=True):
    assert length == 8
    assert sorted(row) == [*range(8)]
  # Equal functions share a compiled loop.
  before = len(TRACES)
  _run(
    prompts=[[1, 2, 3], [4]],
    max_new_tokens=[5, 7],
    temperature=temperature,
    logits_hook=_no_token_twice,
  )
  assert len(TRACES) == before


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_hook_that_forbids_every_token_gives_none(temperature):
  out = generate(
    Bigram(),
    RANDOM,
    [[1, 2]],
    max_new_tokens=1,
    temperature=temperature,
    logits_hook=lambda logits, *_: jnp.full_like(logits, -jnp.inf),
    return_log_probs=True,
  )
  assert out.tokens.tolist() == [[1, 2, -1]]
  assert np.isnan(np.asarray(out.log_probs)[0, 2])


@pytest.mark.parametrize("every", [1, 3, 50])
def test_the_loop_ends_with_its_last_row(every):
  calls: list[Any] = []
  _, lengths = _run(
    COUNTER,
    [[3], [4]],
    temperature=0,
    stop_token=6,
    max_new_tokens=20,
    stream=calls.append,
    stream_every=every,
  )
  assert lengths.tolist() == [4, 3]
  assert [call.tolist() for call in calls] == [[4, 5], [5, 6], [6, 0]]


@pytest.mark.parametrize("options", [{}, {"stop_token": 1, "pad_token": -1}])
@pytest.mark.parametrize("every", [1, 3, 7, 10])
def test_streaming_changes_nothing(every, options):
  calls: list[Any] = []
  want, lengths = _run(**options)
  tokens, _ = _run(stream=calls.append, stream_every=every, **options)
  np.testing.assert_array_equal(tokens, want)
  streamed = np.stack(calls, axis=1)
  for row, new, prompt, length in zip(
    want, streamed, PROMPTS, lengths, strict=True
  ):
    count = length - len(prompt)
    np.testing.assert_array_equal(new[:count], row[len(prompt) : length])
    assert (new[count:] == options.get("pad_token")).all()
  assert calls[0].dtype == np.int32


def test_an_error_in_the_callback_ends_it():
  calls: list[Any] = []

  def stream(tokens):
    calls.append(tokens)
    if len(calls) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _run(stream=stream)
  assert len(calls) == 2


def test_the_same_shapes_compile_once():
  options = {"capacity": 20, "top_k": 3, "top_p": 0.9}
  _run(**options)
  before = len(TRACES)
  _run(**options)
  # Values, callbacks and lengths within the capacity compile nothing.
  _run(
    {"table": RANDOM["table"] + 1},
    [[1], [2, 3, 4], [5]],
    **options | {"top_p": 0.5, "temperature": 0.3, "key": 5},
    stream=lambda tokens: None,
    stream_every=2,
    max_new_tokens=4,
    pad_token=2,
  )
  assert len(TRACES) == before
  # Another length of prompts is read by another program; the loop stays.
  _run(prompts=[[1] * 5] * 3, **options)
  assert len(TRACES) == before + 1


def test_the_loop_updates_the_cache_in_place():
  model = TransformerLM(tiny_run.CONFIG, decode=True)
  model = model.clone(config=dataclasses.replace(model.config, attention="nsa"))
  batch, capacity = 2, 4096
  _, cache, _ = _init.eval_shape(model, batch, capacity)
  state = _State(
    cache,
    tokens=jnp.zeros((batch, capacity), jnp.int32),
    lengths=jnp.ones(batch, jnp.int32),
    live=jnp.ones(batch, bool),
    step=jnp.int32(0),
  )
  params = jax.eval_shape(model.init, jax.random.key(0), state.tokens)["params"]
  stop = jnp.array([3])
  lowered = _decode.lower(
    model, params, state, 1, jax.random.key(0), 1.0, None, None, stop
  )
  memory: Any = lowered.compile().memory_analysis()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size / 4


def test_logits_with_nan_give_no_token():
  table = RANDOM["table"].copy()
  table[4] = np.nan
  for temperature in (0, 1):
    tokens, _ = _run({"table": table}, [[4], [5]], temperature=temperature)
    assert tokens[0, 1] == -1
    assert tokens[1, 1] >= 0


# --------------------------------------------------------------- the sampler


def test_filter_logits_by_hand():
  def kept(probabilities, **options):
    logits = jnp.log(jnp.array(probabilities))
    filtered = filter_logits(logits, **options)
    np.testing.assert_array_equal(
      filtered, jnp.where(jnp.isfinite(filtered), logits, -jnp.inf)
    )
    return np.flatnonzero(np.isfinite(filtered)).tolist()

  some = [0.1, 0.4, 0.2, 0.3]
  assert kept(some) == [0, 1, 2, 3]
  assert kept(some, top_k=1) == [1]
  assert kept(some, top_k=3) == [1, 2, 3]
  assert kept(some, top_p=0.01) == [1]
  assert kept(some, top_p=0.39) == [1]
  assert kept(some, top_p=0.41) == [1, 3]
  assert kept(some, top_p=0.95) == [0, 1, 2, 3]
  # Of the two that top_k leaves, the first has probability 4/7.
  assert kept(some, top_k=2, top_p=0.56) == [1]
  assert kept(some, top_k=2, top_p=0.58) == [1, 3]
  # Equal ones: the lower tokens, as many as are needed.
  assert kept([0.25] * 4, top_k=2) == [0, 1]
  assert kept([0.25] * 4, top_p=0.5) == [0, 1]
  assert kept([0.25] * 4, top_p=0.51) == [0, 1, 2]
  # Rows on their own.
  rows = filter_logits(jnp.log(jnp.array([some, some[::-1]])), top_k=1)
  assert rows.argmax(axis=1).tolist() == [1, 2]


@pytest.mark.parametrize(
  "temperature, top_k, top_p, want",
  [
    (1.0, None, None, [0.1, 0.4, 0.2, 0.3]),
    (0.5, None, None, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    (1.0, 2, None, [0, 4 / 7, 0, 3 / 7]),
    (1.0, None, 0.8, [0, 4 / 9, 2 / 9, 3 / 9]),
    (0.5, 3, 0.8, [0, 16 / 25, 0, 9 / 25]),
    (1e-6, None, None, [0, 1, 0, 0]),
    (None, None, None, [0, 1, 0, 0]),
  ],
)
def test_distribution(temperature, top_k, top_p, want):
  count = 20_000
  logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3])) + 50
  drawn = _sample(
    jnp.broadcast_to(logits, (count, 4)),
    jax.random.key(0),
    jnp.zeros(count, jnp.int32),
    temperature,
    top_k,
    top_p,
  )
  share = np.bincount(drawn, minlength=4) / count
  # Five standard deviations at the most.
  np.testing.assert_allclose(share, want, atol=5 * 0.5 / count**0.5)
  assert (share[np.array(want) == 0] == 0).all()


def test_generate_draws_from_the_distribution():
  """Transitions of long chains are those of the table."""
  tokens, _ = _run(prompts=[[0]] * 16, max_new_tokens=1000, temperature=2.0)
  counts = np.zeros((VOCAB, VOCAB))
  np.add.at(counts, (tokens[:, :-1], tokens[:, 1:]), 1)
  total = counts.sum(axis=1, keepdims=True)
  assert total.min() > 500
  want = jax.nn.softmax(RANDOM["table"] / 2)
  # Five standard deviations at the most.
  assert (np.abs(counts / total - want) < 5 * 0.5 / total**0.5).all()


def test_sampling_is_in_float32():
  """bfloat16 logits that float32 tells apart after the temperature."""
  logits = jnp.array([[1.0, 1.0078125]] * 1000, jnp.bfloat16)
  drawn = _sample(logits, jax.random.key(0), jnp.arange(1000), 1e-3, None, None)
  assert drawn.dtype == jnp.int32
  assert drawn.mean() > 0.99


@pytest.mark.parametrize("top_k, top_p", [(None, None), (2, None), (2, 0.5)])
def test_an_infinite_logit_is_certain(top_k, top_p):
  logits = jnp.array([[0.0, 1.0, jnp.inf]] * 9)
  drawn = _sample(logits, jax.random.key(0), jnp.arange(9), 1.0, top_k, top_p)
  assert drawn.tolist() == [2] * 9


# ------------------------------------------------------------------ messages


@pytest.mark.parametrize(
  "change, message",
  [
    ({"max_new_tokens": 0}, "`max_new_tokens`=0 must be at least 1."),
    ({"capacity": 9}, "`capacity`=9 must be at least 10, for prompts of 3"),
    ({"prefill_chunk": 0}, "`prefill_chunk`=0 must be at least 1."),
    ({"stream_every": 0}, "`stream_every`=0 must be at least 1."),
    ({"stream": 3}, "`stream`=3 must be a function or None."),
    ({"temperature": -1}, "`temperature`=-1.0 must be 0, for the most likely"),
    ({"temperature": 1e-9}, "`temperature`=1e-09 must be 0, for the most"),
    ({"temperature": np.inf}, "`temperature`=inf must be 0, for the most"),
    ({"temperature": "hot"}, "`temperature`='hot' must be a number."),
    ({"top_k": 0}, "`top_k`=0 must be at least 1."),
    ({"top_k": 9}, "`top_k`=9 must be at most 8, the vocabulary."),
    ({"top_p": 0}, "`top_p`=0.0 must lie in (0, 1]."),
    ({"top_p": 1.5}, "`top_p`=1.5 must lie in (0, 1]."),
    ({"top_p": np.nan}, "`top_p`=nan must be a number."),
    ({"stop_token": 8}, "`stop_token`=8 must lie in [0, 8)."),
    ({"stop_token": -1}, "`stop_token`=-1 must be at least 0."),
    ({"stop_token": [1, 8]}, "`stop_token`=8 must lie in [0, 8)."),
    ({"stop_token": [[1]]}, "`stop_token` of shape (1, 1) must have rank 1."),
    ({"stop_token": [0.5]}, "`stop_token` of dtype float64 must have an int"),
    (
      {"max_new_tokens": [1, 2]},
      "`max_new_tokens` of shape (2,) must have shape (3): one entry for each",
    ),
    (
      {"max_new_tokens": [1, 0, 2]},
      "`max_new_tokens`[1]=0 must be at least 1.",
    ),
    (
      {"max_new_tokens": [1, 9, 2], "capacity": 9},
      "`capacity`=9 must be at least 10, for prompts of 3 tokens and `max_new",
    ),
    (
      {"temperature": [1.0, 2.0]},
      "`temperature`=[1.0, 2.0] must be a number, or 3 numbers that are known",
    ),
    (
      {"temperature": [1.0, -2.0, 0]},
      "`temperature[1]`=-2.0 must be 0, for the most likely token, or a fini",
    ),
    ({"logits_hook": 3}, "`logits_hook`=3 must be a function, with a hash, or"),
    (
      {"logits_hook": lambda logits, tokens, lengths: logits[:1]},
      "`logits_hook` returns ShapeDtypeStruct(shape=(1, 8), dtype=float32), w",
    ),
    ({"return_cache": 1}, "`return_cache`=1 must be True or False."),
    ({"return_log_probs": None}, "`return_log_probs`=None must be True or"),
    ({"cache": 3}, "`cache` must be None for a model whose layers have no"),
    ({"pad_token": 0.5}, "`pad_token`=0.5 must be a static integer."),
    ({"key": -1}, "`key`=-1 must be one key made by jax.random.key"),
    ({"key": "a"}, "`key`='a' must be one key made by jax.random.key"),
    ({"prompts": []}, "`prompts` must hold at least one row"),
    ({"prompts": [[1], []]}, "`lengths`[1]=0 must lie in [1, 1]"),
    ({"prompts": [[1.5]]}, "`prompts[0]` of dtype float64 must have an int"),
    ({"prompts": [[[1]]]}, "`prompts[0]` of shape (1, 1) must have rank 1."),
    ({"prompts": np.zeros(3, int)}, "`prompts` of shape (3,) must have rank"),
    ({"prompts": [[1, 8]]}, "`prompts` has the token 8; tokens must lie in"),
    ({"prompts": [[1, -1]]}, "`prompts` has the token -1; tokens must lie"),
    ({"lengths": [1, 1, 1]}, "`lengths` must be None for `prompts` that are"),
    (
      {"prompts": np.ones((2, 3), int), "lengths": [1]},
      "`lengths` of shape (1,) must have one entry for each of the 2",
    ),
    (
      {"prompts": np.ones((2, 3), int), "lengths": [1, 4]},
      "`lengths`[1]=4 must lie in [1, 3]",
    ),
    ({"params": {"params": RANDOM}}, "`params` has the collections ['params'"),
    ({"model": nn.Dense(3)}, "`model` of type Dense must be a TransformerLM"),
  ],
)
def test_messages(change, message):
  calls: list[Any] = []
  arguments = {
    "model": Bigram(),
    "params": RANDOM,
    "prompts": PROMPTS,
    "max_new_tokens": 7,
    "stream": calls.append,
  }
  with pytest.raises(ValueError) as caught:
    generate(**arguments | change)
  assert message in str(caught.value)
  assert str(caught.value).endswith(".")
  assert not calls


def test_traced_prompts():
  with pytest.raises(
    ValueError, match=r"`prompts`=.* are known here, not trac"
  ):
    jax.jit(lambda tokens: _run(prompts=tokens))(jnp.ones((1, 3), jnp.int32))


# --------------------------------------------------------------- the example


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return tiny_run.save(tmp_path_factory.mktemp("run"))


def test_example_completes_text(run, capsys, monkeypatch):
  args = [f"--run={run}", "--max-new-tokens=12", "--temperature=0"]
  assert example.main([*args, "--prompt=def é"]) == 0
  out, err = capsys.readouterr()
  assert err == f"{run}, step {tiny_run.STEP}\n"
  assert out.startswith("def é")
  assert out.endswith("\n")

  # Standard input says the same; the text is what `generate` gives.
  stdin = SimpleNamespace(buffer=io.BytesIO("def é".encode()))
  monkeypatch.setattr("sys.stdin", stdin)
  assert example.main(args) == 0
  assert capsys.readouterr().out == out
  model, params, step = lm.load_model(str(run))
  assert step == tiny_run.STEP
  prompt = list("def é".encode())
  tokens = generate(model, params, [prompt], max_new_tokens=12, temperature=0)[
    0
  ]
  show = example.make_printer()
  show(np.asarray(tokens[0]).astype(np.uint8).tobytes())
  show(b"")
  assert capsys.readouterr().out + "\n" == out


def test_example_loads_what_was_saved(run):
  model, params, _ = lm.load_model(str(run), "xla")
  assert model.config.implementation == "xla"
  saved = tiny_run.make_state()
  jax.tree.map(np.testing.assert_array_equal, params, saved["params"])


def test_example_errors_are_one_line(run, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO()))
  empty = tmp_path / "empty"
  (empty / "checkpoints").mkdir(parents=True)
  for args, message in (
    ([f"--run={tmp_path}"], f"no checkpoint in {tmp_path}; train_lm.py writes"),
    ([f"--run={empty}"], f"no checkpoint in {empty} yet."),
    ([f"--run={run}"], "the prompt must have at least one byte."),
    ([f"--run={run}", "--prompt=a", "--top-p=2"], "`top_p`=2.0 must lie in"),
    (["--max-new-tokens=0"], "'0' is not a positive integer"),
  ):
    with pytest.raises(SystemExit) as caught:
      example.main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, line = err.splitlines()
    assert line.startswith("generate.py: error: ")
    assert message in line


def test_printer_shows_whole_characters(capsys):
  show = example.make_printer()
  for byte in "aé\n€".encode() + b"\x1b\xff\x00\xe2\x82":
    show(bytes([byte]))
  show(b"")
  assert capsys.readouterr().out == "aé\n€" + "\ufffd" * 4
