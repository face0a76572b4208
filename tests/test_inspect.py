"""What a model reads, against the oracle and brute force."""

import dataclasses
import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig, TransformerConfig, TransformerLM, inspect
from nsa_jax.inspect import Inspected
from nsa_jax.xla import chunks
from tests import helpers
from tests.helpers import Dims
from tests.oracle import Oracle

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 8)
TOKENS = NSAConfig(1, 1, 8)
DIMS = Dims(CONFIG, queries=61, keys=61)
MODEL = TransformerConfig(
  num_layers=2,
  model_dim=16,
  mlp_dim=16,
  vocab_size=11,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  nsa=CONFIG,
  compression="mean",
)


def _segments() -> Any:
  """Two documents and padding; padding and one document."""
  segments = np.zeros((2, 61), np.int32)
  segments[0, :30], segments[0, 32:] = 7, 2
  segments[1, 8:60] = 5
  return segments


def _sown(segments: Any = None) -> dict[str, Any]:
  """What a layer would sow; the blocks are chosen by random scores."""
  inputs = helpers.make_inputs(DIMS, "float32")
  oracle = Oracle(CONFIG, 61, 61, 2, None, segments)
  scores = np.random.default_rng(3).standard_normal((2, 61, 2, 8))
  return {
    "selected_query": inputs["query"],
    "selected_key": 3 * inputs["selected"].key,
    "gates": inputs["gates"],
    "block_ids": oracle.select(scores),
  }


@functools.cache
def _inspected() -> tuple[dict[str, Any], Inspected]:
  sown = _sown()
  return sown, inspect.inspect_layer(sown, config=CONFIG)


def _dense_recall(oracle: Oracle, sown: Any, ids: Any) -> np.ndarray:
  """By the probabilities of full attention, [B, T, N]."""
  query, key = sown["selected_query"], sown["selected_key"]
  scale = query.shape[-1] ** -0.5
  _, part = oracle.attend(
    query,
    key,
    key,
    lambda b, i, k: oracle.selected_rows(b, i, ids[b, i, k]),
    scale,
  )
  _, whole = oracle.attend(
    query, key, key, lambda b, i, k: oracle.full_rows(b, i), scale
  )
  return np.where(whole > -np.inf, np.exp(part - np.maximum(whole, -1e9)), 0)


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_recall_is_the_mass_of_the_blocks(packed: bool) -> None:
  segments = _segments() if packed else None
  oracle = Oracle(CONFIG, 61, 61, 2, None, segments)
  sown = _sown(segments)
  layer = inspect.inspect_layer(sown, config=CONFIG, segment_ids=segments)
  want = _dense_recall(oracle, sown, sown["block_ids"])
  helpers.assert_close(layer.recall, want, "float32")
  # The oracle ranks by the mean over a group, which shares its blocks.
  mass = dataclasses.replace(oracle, config=TOKENS).block_scores(
    sown["selected_query"], sown["selected_key"], 2, 0.25
  )
  want = _dense_recall(oracle, sown, oracle.select(mass))
  helpers.assert_close(layer.oracle_recall, want, "float32")
  # No other choice with the forced blocks holds more.
  best, own, random = (
    np.asarray(x).reshape(2, 61, 2, 2).mean(-1)
    for x in (layer.oracle_recall, layer.recall, layer.random_recall)
  )
  assert (own <= best + 1e-5).all()
  assert (random <= best + 1e-5).all()
  reads, choosing = np.asarray(layer.recall).any(-1), layer.choosing
  np.testing.assert_allclose(random[reads & ~choosing], 1, atol=1e-5)
  assert random[choosing].mean() < own[choosing].mean() + 0.1 < best.mean()


def test_which_blocks_are_forced_and_which_queries_choose() -> None:
  segments = _segments()
  oracle = Oracle(CONFIG, 61, 61, 2, None, segments)
  sown = _sown(segments)
  layer = inspect.inspect_layer(sown, config=CONFIG, segment_ids=segments)
  for b, i in np.ndindex(2, 61):
    candidates, forced = list[int](), set[int]()
    if oracle.query_segment(b, i):
      candidates, forced = oracle.candidates(b, i)
    assert layer.choosing[b, i] == (len(candidates) > 3)
    for k, c in np.ndindex(2, 3):
      want = sown["block_ids"][b, i, k, c] in forced
      assert layer.forced[b, i, k, c] == want, (b, i, k, c)


def test_recall_of_queries_elsewhere() -> None:
  """With positions by row, and by the reference."""
  sown = _sown()
  offset = helpers.int32([-1, 36])
  query, ids = (sown[name][:, 30:] for name in ("selected_query", "block_ids"))
  oracle = Oracle(CONFIG, 61, 31, 2, offset)
  want = _dense_recall(oracle, sown | {"selected_query": query}, ids)
  for implementation in ("xla", "reference"):
    run = jax.jit(
      functools.partial(
        inspect.recall, config=CONFIG, implementation=implementation
      )
    )
    share = run(query, sown["selected_key"], ids, query_offset=offset)
    helpers.assert_close(share, want, "float32", what=implementation)


def test_chunks_of_queries_change_nothing(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """But the random blocks."""
  sown, whole = _inspected()
  monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 512)
  measure: Any = inspect._measure
  again = jax.jit(measure.__wrapped__, static_argnums=(0, 1))
  monkeypatch.setattr(inspect, "_measure", again)
  parts = inspect.inspect_layer(sown, config=CONFIG)
  same = {"random_recall": whole.random_recall}
  helpers.assert_close(parts._replace(**same), whole, "float32")
  helpers.assert_close(
    parts.random_recall.mean(), whole.random_recall.mean(), "bfloat16"
  )


def test_the_key_is_that_of_the_random_blocks() -> None:
  sown, first = _inspected()
  again, other = (
    inspect.inspect_layer(sown, config=CONFIG, key=key)
    for key in (jax.random.key(0), 1)
  )
  helpers.assert_same_bits(again, first)
  assert (other.random_recall != first.random_recall).any()
  same = {"random_recall": first.random_recall}
  helpers.assert_same_bits(other._replace(**same), first)


def test_a_selector_may_choose_any_number_of_blocks() -> None:
  """The oracle and the random blocks are then as many."""
  sown = _sown()
  own = np.arange(61, dtype=np.int32)[None, :, None, None] // 8
  ids = np.broadcast_to(own, (2, 61, 2, 1))  # fewer than are forced
  layer = inspect.inspect_layer(sown | {"block_ids": ids}, config=CONFIG)
  helpers.assert_same_bits(layer.oracle_recall, layer.recall)
  helpers.assert_same_bits(layer.random_recall, layer.recall)
  assert np.asarray(layer.choosing).sum() == 2 * (61 - 8)
  all_of_them = np.arange(8, dtype=np.int32)
  ids = np.broadcast_to(all_of_them, (2, 61, 2, 8))
  layer = inspect.inspect_layer(sown | {"block_ids": ids}, config=CONFIG)
  for share in (layer.recall, layer.oracle_recall, layer.random_recall):
    np.testing.assert_allclose(share, 1, atol=1e-5)
  assert not np.asarray(layer.choosing).any()
  summary = inspect.summarize(layer)
  assert all(np.isnan(x).all() for x in summary)


def test_distinct_blocks() -> None:
  ids = _sown()["block_ids"]
  counts = inspect.distinct_blocks(ids, 4)
  assert counts.shape == (2, 15, 2)
  for b, run, k in np.ndindex(2, 15, 2):
    chosen = set(ids[b, 4 * run : 4 * run + 4, k].ravel()) - {-1}
    assert counts[b, run, k] == len(chosen)


def test_means_are_over_the_queries_that_choose() -> None:
  _, layer = _inspected()
  summary = inspect.summarize(layer, neighbours=4)
  choosing = np.arange(61) >= 24  # of blocks of 8, more than 3
  np.testing.assert_array_equal(layer.choosing, [choosing] * 2)
  for name in ("recall", "oracle_recall", "random_recall", "gates"):
    want = np.asarray(getattr(layer, name))[:, 24:].mean((0, 1))
    helpers.assert_close(getattr(summary, name), want, "float32", what=name)
  counts = np.asarray(inspect.distinct_blocks(layer.block_ids, 4))
  helpers.assert_close(summary.distinct_blocks, counts[:, 6:].mean(), "float32")
  # The first and the own of three.
  helpers.assert_close(summary.forced, 2 / 3, "float32")


def test_memory_is_linear() -> None:
  """That of recall, of the oracle and of random blocks."""
  config = NSAConfig(16, 8, 32, 4, 1, 1, 128)

  def temporaries(length: int) -> int:
    def array(heads: int, width: int, dtype: Any = jnp.float32) -> Any:
      return jax.ShapeDtypeStruct((1, length, heads, width), dtype)

    key = jax.eval_shape(jax.random.key, 0)
    arrays = array(2, 8), array(1, 8), array(1, 4, jnp.int32), None, key
    program = inspect._measure.lower(config, None, *arrays)
    memory: Any = program.compile().memory_analysis()
    return memory.temp_size_in_bytes

  once, twice = temporaries(16384), temporaries(32768)
  assert twice <= 2.2 * once


# --------------------------------------------------------------------- models


def _params(config: TransformerConfig) -> Any:
  """Random parameters, from shapes: no `init` is compiled."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  shapes = jax.eval_shape(TransformerLM(config).init, jax.random.key(0), tokens)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.float32(0.3 * rng.standard_normal(x.shape)), shapes["params"]
  )


def _tokens() -> Any:
  return np.random.default_rng(0).integers(0, 11, (2, 61)).astype(np.int32)


def test_a_model_is_inspected_layer_by_layer() -> None:
  """Scanned and recomputed or not, with the same numbers."""
  config = dataclasses.replace(MODEL, scan_layers=True, remat="full")
  stacked = _params(config)
  scanned = inspect.inspect_model(TransformerLM(config), stacked, _tokens())
  model, params = nsa_jax.unstack_layers(TransformerLM(config), stacked)
  layers = inspect.inspect_model(model, params, _tokens())
  assert list(layers) == list(scanned) == ["layer_0", "layer_1"]
  for name, layer in layers.items():
    assert layer.recall.shape == (2, 61, 4)
    # A rounding difference may flip a near tie, here and there.
    same = np.asarray(layer.block_ids == scanned[name].block_ids)
    assert same.mean() > 0.99
    means, others = map(inspect.summarize, (layer, scanned[name]))
    for x, y in zip(means, others, strict=True):
      np.testing.assert_allclose(x, y, atol=0.01)


def test_dense_layers_are_left_out() -> None:
  config = dataclasses.replace(MODEL, attention=("window", "nsa"))
  model = TransformerLM(config)
  params = _params(config)
  segments = np.ones((2, 61), np.int32)
  segments[:, 40:] = 0
  layers = inspect.inspect_model(
    model.clone(decode=True), params, _tokens(), segment_ids=segments
  )
  assert list(layers) == ["layer_1"]
  layer = layers["layer_1"]
  assert (np.asarray(layer.recall[:, :40]) > 0).all()
  assert not np.asarray(layer.recall[:, 40:]).any()
  assert not np.asarray(layer.choosing[:, 40:]).any()
  assert (np.asarray(layer.block_ids[:, 40:]) == -1).all()


def test_a_layer_sows_only_where_it_is_asked() -> None:
  layer = nsa_jax.NativeSparseAttention(
    4, 2, 8, config=CONFIG, compression="mean", share_kv=True
  )
  x = jnp.ones((1, 24, 16))
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  assert set(variables) == {"params"}

  def sown(layer: Any, variables: Any, mutable: Any) -> Any:
    apply = functools.partial(layer.apply, mutable=mutable)
    return jax.eval_shape(apply, variables, x)[1]

  assert set(sown(layer, variables, ["intermediates"])["intermediates"]) == {
    "gates",
    "block_ids",
  }
  found = sown(layer, variables, ["inspect"])["inspect"]
  assert {name: x.shape for name, (x,) in found.items()} == {
    "selected_query": (1, 24, 4, 8),
    "selected_key": (1, 24, 2, 8),
    "gates": (1, 24, 4, 3),
    "block_ids": (1, 24, 2, 3),
  }
  decoder = layer.clone(decode=True)
  variables = jax.eval_shape(decoder.init, jax.random.key(0), x)
  assert set(variables) == {"params", "cache"}
  assert set(sown(decoder, variables, ["cache", "inspect"])) == {"cache"}


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
  "change, message",
  [
    (
      {"layout": nsa_jax.Layout(data="data")},
      r"`model` has `config.layout`=Layout.*must be None",
    ),
    ({"attention": "full"}, r"`model` has `config.attention`='full'.*'nsa'"),
  ],
)
def test_models_that_cannot_be_inspected(change: Any, message: str) -> None:
  model = TransformerLM(dataclasses.replace(MODEL, **change))
  with pytest.raises(ValueError, match=message):
    inspect.inspect_model(model, {}, _tokens())


def test_wrong_parameters_and_tokens() -> None:
  model, params = TransformerLM(MODEL), _params(MODEL)
  run = functools.partial(inspect.inspect_model, model)
  with pytest.raises(ValueError, match="`params` has the collections"):
    run({"params": params}, _tokens())
  with pytest.raises(ValueError, match=r"`params\['embedding'\]` is missing"):
    run({}, _tokens())
  with pytest.raises(ValueError, match=r"`tokens` of shape .*rank 2"):
    run(params, _tokens()[0])
  with pytest.raises(ValueError, match="`positions` of shape"):
    run(params, _tokens(), positions=_tokens()[:, 1:])
  with pytest.raises(ValueError, match="`segment_ids` starts segment 2"):
    run(params, _tokens(), segment_ids=helpers.int32([9 * [1] + 52 * [2]] * 2))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"gates": None}, r"`sown\['gates'\]`=None must be an array"),
    ({"selected_key": np.zeros((2, 61, 3, 16), "f4")}, "multiple of the 3"),
    ({"selected_key": np.zeros((2, 60, 2, 16), "f4")}, r"`sown\['selected_key"),
    ({"gates": np.zeros((2, 61, 4, 2), "f4")}, r"`sown\['gates'\]` of shape"),
    ({"block_ids": np.ones((2, 61, 2, 2), "i4")}, "strictly ascending"),
    ({"gates": (np.zeros(1), np.zeros(1))}, "has 2 entries, and must have one"),
  ],
)
def test_what_no_layer_sows(change: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    inspect.inspect_layer(_sown() | change, config=CONFIG)
  with pytest.raises(ValueError, match=r"`sown`=\{\} must be a mapping"):
    inspect.inspect_layer({}, config=CONFIG)


def test_too_many_neighbours() -> None:
  with pytest.raises(ValueError, match="`neighbours`=62 must be at most T=61"):
    inspect.distinct_blocks(_sown()["block_ids"], 62)


# ---------------------------------------------------------------------- plots


def test_plots() -> None:
  """What is drawn is what the arrays hold."""
  sown, layer = _inspected()
  _, axes = plt.subplots(1, 3)
  drawn = inspect.plot_block_map(layer, row=1, head=1, ax=axes[0])
  assert drawn is axes[0]
  image = np.asarray(drawn.images[0].get_array())
  assert image.shape == (61, 8, 3)
  ids = sown["block_ids"][1, :, 1]
  for query, block in itertools.product(range(61), range(8)):
    chosen = block in ids[query]
    assert (image[query, block] < 1).any() == chosen, (query, block)
  # Forced blocks are grey: the first and the query's own.
  grey = np.ptp(image, axis=-1) == 0
  assert grey[60, [0, 7]].all()
  assert (~grey).sum() == 61 - 16  # one free place from the third block on

  inspect.plot_gates(layer, row=1, head=2, ax=axes[1])
  for line, gate in zip(axes[1].lines, sown["gates"][1, :, 2].T, strict=True):
    np.testing.assert_allclose(line.get_ydata(), gate)
  inspect.plot_recall({"a": layer, "b": layer}, ax=axes[2])
  summary = inspect.summarize(layer)
  for line, name in zip(
    axes[2].lines, 2 * ["oracle_recall", "recall", "random_recall"], strict=True
  ):
    want = getattr(summary, name)
    np.testing.assert_allclose(line.get_ydata(), want, atol=1e-5)
  assert [tick.get_text() for tick in axes[2].get_xticklabels()] == ["a", "b"]
  plt.close("all")


def test_plots_on_a_new_figure() -> None:
  _, layer = _inspected()
  ax = inspect.plot_gates(layer)
  want = np.asarray(layer.gates)[0].mean(1).T
  for line, gate in zip(ax.lines, want, strict=True):
    np.testing.assert_allclose(line.get_ydata(), gate)
  plt.close("all")


def test_what_cannot_be_drawn() -> None:
  _, layer = _inspected()
  with pytest.raises(ValueError, match="`head`=2 must be less than 2"):
    inspect.plot_block_map(layer, head=2)
  with pytest.raises(ValueError, match="`ax`=3 must be Axes"):
    inspect.plot_gates(layer, ax=3)
  with pytest.raises(ValueError, match=r"`layers`=\{\} must be a dictionary"):
    inspect.plot_recall({})
  none = layer._replace(choosing=jnp.zeros_like(layer.choosing))
  with pytest.raises(ValueError, match=r"`layers\['a'\]` must have a query"):
    inspect.plot_recall({"a": none})
  plt.close("all")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r"nsa-jax\[examples\]"):
    inspect.plot_gates(_inspected()[1])
