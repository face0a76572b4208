"""Keys and values in 8 bit: the same cache, but for their rounding."""

import dataclasses
import functools
import json
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from examples import quantized_cache
from nsa_jax import (
  KV,
  NSAConfig,
  SelectByMeans,
  TransformerConfig,
  TransformerLM,
  cache,
)
from nsa_jax.cache.state import dequantized
from nsa_jax.sampling import empty_cache
from tests import helpers, tiny_run

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 6)
B, CAPACITY = 2, 40
SLOW = pytest.mark.slow


def _phi(tokens: KV, first: Any) -> KV:
  del first
  return KV(*(nsa_jax.compress_mean(x, config=CONFIG) for x in tokens))


def _init(
  kind="nsa", share_kv=False, dtype="float32", capacity=CAPACITY, select=None
):
  return cache.init(
    B,
    capacity,
    config=CONFIG,
    num_kv_heads=2,
    head_dim=8,
    value_head_dim=5,
    max_append=3,
    kind=kind,
    share_kv=share_kv,
    select=select,
    dtype=dtype,
  )


def _pair(length, seed=0, dtype="float32"):
  rng = np.random.default_rng(seed)
  return KV(
    *(
      jnp.asarray(rng.normal(size=(B, length, 2, width)), dtype)
      for width in (8, 5)
    )
  )


@functools.partial(jax.jit, static_argnames="function")
def _add(held, pair, counts, function=cache.append):
  nsa = held.compressed is not None
  return function(
    held,
    config=CONFIG,
    selected=pair,
    compressed=pair if nsa else None,
    window=pair if held.window is not None else None,
    compress=_phi if nsa else None,
    counts=counts,
  )


def _filled(held, dtype="float32"):
  """After a ragged prompt, steps, and rejected tokens."""
  held, _ = _add(
    held, _pair(19, dtype=dtype), jnp.array([19, 5]), function=cache.prefill
  )
  for seed in range(4):
    held = _add(held, _pair(3, seed, dtype), jnp.array([3, 2]))
  held = cache.rewind(held, held.lengths - jnp.array([2, 0]))
  return _add(held, _pair(1, 9, dtype), jnp.array([1, 1]))


def _whole(held, dtype="float32"):
  """The cache without scales that holds the same numbers."""
  same = dequantized(held.selected, held.scales, dtype)
  return held._replace(selected=same, scales=None)


# ----------------------------------------------------------------- the integers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_error_is_half_a_step(dtype):
  """A step is a 127th of the largest magnitude of a key or value of a head."""
  rng = np.random.default_rng(0)
  sizes = 10.0 ** rng.uniform(-3, 3, (B, CAPACITY, 2, 1))
  held = _init(dtype=dtype)
  x = jax.tree.map(
    lambda x: jnp.asarray(sizes * rng.normal(size=x.shape), dtype),
    held.selected,
  )
  small = cache.quantize(held._replace(selected=x))
  for part, want in zip(
    dequantized(small.selected, small.scales, jnp.float32), x, strict=True
  ):
    want = np.asarray(want, np.float32)
    step = np.abs(want).max(axis=-1, keepdims=True) / 127
    assert (np.abs(part - want) <= 0.5001 * step).all()
  assert small.selected.key.dtype == jnp.int8
  assert small.scales.value.shape == (B, CAPACITY, 2)
  assert np.abs(small.selected.key).max(axis=-1).min() == 127


def test_zeros_and_what_is_not_finite():
  held = _init()
  key = held.selected.key.at[0, 0, 0, 3].set(jnp.nan)
  key = key.at[0, 1, 0, 2].set(-jnp.inf).at[0, 2, 0, :].set(1e-40)
  key = key.at[0, 3, 0].set(-2.0)
  held = held._replace(selected=held.selected._replace(key=key))
  small = cache.quantize(held)
  same = dequantized(small.selected, small.scales, jnp.float32).key[0]
  assert np.isnan(same[0, 0]).all()
  assert not np.isfinite(same[1, 0]).any()
  np.testing.assert_allclose(same[2, 0], 1e-40, atol=1e-40)
  np.testing.assert_array_equal(same[3, 0], np.full(8, -2, np.float32))
  assert not np.asarray(same[4:]).any()
  assert not np.asarray(same[0, 1]).any()


KINDS = [("nsa", False), ("nsa", True), ("full", False)]


@pytest.mark.parametrize("kind, share_kv", KINDS)
def test_appending_quantizes_what_is_appended(kind, share_kv):
  """Bit for bit, whichever comes first: no token changes another."""
  held = _init(kind, share_kv, select=SelectByMeans(2))
  first, last = _filled(cache.quantize(held)), cache.quantize(_filled(held))
  helpers.assert_same_bits(first, last)
  helpers.assert_same_bits(cache.quantize(last), last)
  window = _init("window")
  helpers.assert_same_bits(cache.quantize({"a": window}), {"a": window})


@pytest.mark.parametrize("kind, share_kv", KINDS)
@pytest.mark.parametrize(
  "implementation", [None, pytest.param("reference", marks=SLOW)]
)
def test_attention_is_that_over_the_dequantized(kind, share_kv, implementation):
  """By steps, where the branch gathers blocks, and for prompts."""
  select: Any = "means" if share_kv else None
  held = _filled(cache.quantize(_init(kind, share_kv, select=select)))

  @functools.partial(jax.jit, static_argnames="length")
  def attend(held, length):
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.normal(size=(B, length, 4, 8)), jnp.float32)
    offset = held.lengths - length
    options: Any = {"query_offset": offset, "implementation": implementation}
    if kind == "full":
      return cache.attend_full(query, held, **options)
    return cache.attend(
      query,
      held,
      jnp.ones((B, length, 4, 3)),
      config=CONFIG,
      select=select,
      return_block_ids=True,
      **options,
    )

  # Without `prefill_window`, more than `max_append` read no ring.
  for length in (1, 15) if share_kv or kind == "full" else (1, 3):
    got, want = (attend(x, length) for x in (held, _whole(held)))
    helpers.assert_close(got, want, "float32")


def _kernel_case(batch, capacity, lengths, share_kv, dtype, **sizes):
  """A quantized cache of random numbers, and what attends to it."""
  config = sizes.pop("config")
  head_dim = sizes["head_dim"]
  held = jax.eval_shape(
    lambda: cache.init(
      batch,
      capacity,
      config=config,
      num_kv_heads=2,
      share_kv=share_kv,
      select="means",
      max_append=2,
      dtype=dtype,
      **sizes,
    )
  )
  rng = np.random.default_rng(0)

  def draw(x):
    return jnp.asarray(rng.normal(size=x.shape), x.dtype)

  held = jax.tree.map(draw, held)._replace(
    lengths=jnp.array(lengths), earliest=jnp.zeros(batch, jnp.int32)
  )
  query = jnp.asarray(rng.normal(size=(batch, 2, 8, head_dim)), dtype)
  gates = jnp.asarray(rng.uniform(size=(batch, 2, 8, 3)), jnp.float32)
  return cache.quantize(held), query, gates


def _attend_by(implementation, config):
  return jax.jit(
    lambda held, query, gates: cache.attend(
      query,
      held,
      gates,
      config=config,
      query_offset=held.lengths - 2,
      select="means" if held.window is None else None,
      return_block_ids=True,
      implementation=implementation,
    )
  )


@pytest.mark.parametrize("share_kv", [False, pytest.param(True, marks=SLOW)])
def test_the_decode_kernels_dequantize(share_kv):
  config = NSAConfig(8, 4, 16, 4, 1, 1, window=20)
  case = _kernel_case(
    2, 128, [128, 37], share_kv, "float32", config=config, head_dim=16
  )
  held, *rest = case
  # What no query may read.
  scale = held.scales.key.at[1, 37:].set(jnp.nan)
  held = held._replace(scales=held.scales._replace(key=scale))
  got, want = (
    _attend_by(name, config)(held, *rest) for name in ("triton", "xla")
  )
  helpers.assert_close(got, want, "float32")
  assert "nsa_decode_blocks" in _cuda_text(config, case)


def _cuda_text(config, case):
  with helpers.h200():
    traced = _attend_by(None, config).trace(*case)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu_kernels_dequantize(share_kv, dtype):
  config = NSAConfig()
  case = _kernel_case(
    3, 8192, [8000, 700, 5], share_kv, dtype, config=config, head_dim=128
  )
  got, want = (_attend_by(name, config)(*case) for name in (None, "xla"))
  np.testing.assert_array_equal(got[1], want[1])
  helpers.assert_close(got[0], want[0], dtype)


def test_rows_move_with_their_scales():
  held = _filled(cache.quantize(_init()))
  row = cache.take(held, jnp.array([1]))
  batch = cache.insert(
    cache.quantize(_init(capacity=64)), row, jnp.array([0, 1])
  )
  helpers.assert_same_bits(cache.take(batch, jnp.array([0])).tail, row.tail)
  np.testing.assert_array_equal(
    batch.scales.key[1, :CAPACITY], held.scales.key[1]
  )
  with pytest.raises(
    ValueError, match=r"`rows.scales` must be None exactly if `cache.scales`"
  ):
    cache.insert(_init()._replace(selected=held.selected), row, 0)
  with pytest.raises(ValueError, match="of dtype int8 must have the dtype of"):
    cache.insert(_init(), row, 0)


# --------------------------------------------------------------------- a model


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=SLOW)])
def test_generate_with_a_quantized_cache(scan_layers):
  """Log-probabilities near those of the other cache; turns go on with it."""
  config = TransformerConfig.preset(
    "tiny",
    num_layers=2,
    vocab_size=32,
    model_dim=16,
    num_heads=2,
    head_dim=16,
    mlp_dim=16,
    nsa=CONFIG,
    compression="mean",
    attention="nsa" if scan_layers else ("nsa", "full"),
    scan_layers=scan_layers,
  )
  model = TransformerLM(config)
  tokens = jnp.zeros((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes
  )
  options: Any = {
    "temperature": 0,
    "return_log_probs": True,
    "return_cache": True,
    "capacity": 48,
  }
  prompts = [[1], [6]]  # There is nothing to prefill in the first turn.
  plain = nsa_jax.generate(model, params, prompts, max_new_tokens=20, **options)
  held = cache.quantize(empty_cache(model, 2, 48))
  size = cache.num_bytes(held)
  out = nsa_jax.generate(
    model, params, prompts, max_new_tokens=20, cache=held, **options
  )
  assert cache.num_bytes(out.cache) == size < cache.num_bytes(plain.cache)
  assert plain.log_probs is not None
  # Rounding moves the logits by less than a hundredth of their size.
  np.testing.assert_array_equal(out.tokens, plain.tokens)
  np.testing.assert_allclose(out.log_probs, plain.log_probs, atol=0.05)
  assert (out.log_probs != plain.log_probs).any()
  whole = [
    [*row[:length].tolist(), 1]
    for row, length in zip(out.tokens, out.lengths, strict=True)
  ]
  more = nsa_jax.generate(
    model, params, whole, max_new_tokens=20, cache=out.cache, **options
  )
  assert more.lengths.tolist() == [42, 42]


def test_a_step_reads_what_it_selects():
  """No copy of the cache, dequantized or not."""
  config = dataclasses.replace(CONFIG, window=16)

  def step(held, pair, query, gates):
    offset = held.lengths
    held = cache.append(
      held,
      config=config,
      compressed=pair,
      selected=pair,
      window=pair,
      compress=lambda tokens, first: KV(
        *(nsa_jax.compress_mean(x, config=config) for x in tokens)
      ),
    )
    return held, cache.attend(
      query, held, gates, config=config, query_offset=offset
    )

  empty = cache.init(2, 8192, config=config, num_kv_heads=2, head_dim=16)
  new = KV(*2 * [jnp.ones((2, 1, 2, 16))])
  rest = new, jnp.ones((2, 1, 4, 16)), jnp.ones((2, 1, 4, 3))
  sizes = []
  for held in (empty, cache.quantize(empty)):
    lowered = jax.jit(step, donate_argnums=0).lower(held, *rest)
    memory: Any = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.num_bytes(held)
    sizes.append(memory.temp_size_in_bytes)
  # The products with the compressed blocks, which are not quantized.
  assert sizes[1] < 1.05 * sizes[0]
  assert sizes[1] < cache.num_bytes(empty.selected)


@pytest.mark.parametrize("kind", ["nsa", "full", "window"])
def test_bytes(kind):
  options: Any = {"config": CONFIG, "num_kv_heads": 2, "head_dim": 8}
  options |= {"kind": kind, "dtype": "bfloat16"}
  sizes = [
    cache.num_bytes(
      jax.eval_shape(
        lambda size=size: cache.quantize(cache.init(1, size, **options))
      )
    )
    for size in (64, 128)
  ]
  per_token = cache.bytes_per_token(**options, quantized=True)
  assert sizes[1] - sizes[0] == 64 * per_token


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: cache.quantize(3), "`cache` holds a int; it must be a pytree of "),
    (lambda: cache.quantize({}), "`cache` of type dict must be a pytree of"),
    (
      lambda: cache.quantize(
        _init()._replace(selected=KV(*2 * [jnp.ones((B, 8, 1, 4), int)]))
      ),
      "`cache.selected.key` of dtype int32 must have a floating-point dtype",
    ),
    (
      lambda: cache.attend_full(
        jnp.ones((B, 1, 2, 8)),
        _init("full")._replace(scales=KV(*2 * [jnp.ones((B, CAPACITY, 2))])),
        query_offset=0,
      ),
      "`cache.selected.key` of dtype float32 must be int8, as it has `scales`.",
    ),
    (
      lambda: cache.attend_full(
        jnp.ones((B, 1, 2, 8)),
        cache.quantize(_init("full"))._replace(
          scales=KV(*2 * [jnp.ones((B, 1, 2))])
        ),
        query_offset=0,
      ),
      "`cache.scales.key` of shape (2, 1, 2) must have shape (2, 40, 2): one",
    ),
    (
      lambda: cache.attend_window(
        jnp.ones((B, 1, 2, 8)),
        _init("window")._replace(scales=KV(*2 * [jnp.ones((B, 1, 2))])),
        config=CONFIG,
        query_offset=0,
      ),
      "`cache.scales` must be None without `selected`.",
    ),
    (
      lambda: cache.bytes_per_token(
        config=CONFIG, num_kv_heads=1, head_dim=8, quantized=cast(Any, 8)
      ),
      "`quantized`=8 must be True or False.",
    ),
  ],
)
def test_messages(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


# ------------------------------------------------------------------ the example


def test_example(tmp_path, capsys):
  run = tiny_run.save(tmp_path / "run")
  path = tmp_path / "found.json"
  args = [f"--run={run}", "--rows=2", "--tokens=40", f"--json={path}"]
  assert quantized_cache.main(args) == 0
  full, small, differences = capsys.readouterr().out.splitlines()
  pattern = r": \d+\.\d{4} nats, \d\.\d\d MiB, \d+\.\d\d ms per step"
  assert re.fullmatch("full" + pattern, full)
  assert re.fullmatch("int8" + pattern, small)
  assert differences.startswith("KL ")
  found = json.loads(path.read_text())["results"]
  # Layers of the window alone have nothing to quantize.
  assert found["loss_full"] == found["loss_int8"]
  assert found["same_argmax"] == 1
  for wrong, message in (
    ([f"--run={tmp_path}"], "no checkpoint in"),
    ([*args, "--tokens=9999999"], "and rows have 9999999."),
    (["--seq-len=99999999"], "too few to train on."),
    ([*args, f"--text={tmp_path}/none"], "No such file or directory"),
  ):
    with pytest.raises(SystemExit):
      quantized_cache.main(wrong)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model_hardly_changes(tmp_path):
  """The numbers of docs/serving.md, up to what other rounding does to them."""
  path = tmp_path / "found.json"
  quantized_cache.main([f"--json={path}"])
  found = json.loads(path.read_text())["results"]
  assert abs(found["loss_full"] - found["loss_int8"]) < 1e-3
  assert found["kl"] < 2e-4
  assert found["same_argmax"] > 0.99
  assert found["bytes_int8"] < 0.5 * found["bytes_full"]
