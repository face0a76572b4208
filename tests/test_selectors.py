"""Selectors of one's own: `select` in op, layer and cache; ids from scores."""

import dataclasses
import functools
from typing import Any, get_args

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import nsa_jax
from examples.lm import cli
from nsa_jax import KV, NSAConfig, SelectByMeans, cache
from nsa_jax.config import SELECTORS
from nsa_jax.layers.linen import NativeSparseAttention
from nsa_jax.typing import SelectorName
from tests import helpers
from tests.helpers import Dims
from tests.oracle import Oracle, count_selection, mean_blocks

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)
DIMS = Dims(CONFIG, 2, 72, 72, 2, 2, 16, 16)


def importance(query, compressed_key, lse, **call: Any) -> Any:
  """The library's own selection as a user would write it."""
  where = {
    name: call[name]
    for name in (
      "config",
      "key_length",
      "query_offset",
      "segment_ids",
      "query_segment_ids",
    )
  }
  scores = nsa_jax.block_scores(
    query, compressed_key, lse, scale=call["scale"], **where
  )
  return nsa_jax.block_ids_from_scores(scores, **where)


def last_blocks(query, *, config, key_length, query_offset, **_: Any) -> Any:
  """The newest blocks: scores are their numbers."""
  blocks = nsa_jax.num_selection_blocks(key_length, config)
  shape = *query.shape[:2], 2, blocks  # K = 2
  scores = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.float32), shape)
  return nsa_jax.block_ids_from_scores(
    scores, config=config, key_length=key_length, query_offset=query_offset
  )


# ------------------------------------------------------------------- the op


def make_call(mode: str) -> tuple[Dims, dict[str, Any], dict[str, Any]]:
  """Sizes, inputs, and where the queries stand, of a call of the op."""
  dims, integers = DIMS, {}
  if mode == "rows":
    dims = Dims(CONFIG, 2, 5, 75, 2, 2, 16, 16)
    integers["query_offset"] = helpers.int32([-2, 69])
  if mode == "packed":
    integers["segment_ids"] = helpers.packed_segments(dims)
  if mode == "short":
    dims = Dims(CONFIG, 2, 3, 3, 2, 2, 16, 16)
  return dims, helpers.make_inputs(dims, "float32"), integers


@functools.partial(jax.jit, static_argnames=("select", "implementation"))
def run(inputs, integers, select=None, implementation="xla"):
  """The op and the ids of the blocks it selects."""
  return nsa_jax.native_sparse_attention(
    **inputs,
    **integers,
    config=CONFIG,
    select=select,
    return_block_ids=True,
    implementation=implementation,
  )


@pytest.mark.parametrize("mode", ["full", "rows", "packed"])
def test_the_importance_scores_as_a_selector_change_nothing(mode: str) -> None:
  _, inputs, integers = make_call(mode)
  out, ids = run(inputs, integers, importance)
  want, want_ids = run(inputs, integers)
  np.testing.assert_array_equal(ids, want_ids)
  helpers.assert_close(out, want, "float32")


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_a_selector_equals_its_block_ids(implementation: Any) -> None:
  inputs = helpers.make_inputs(DIMS, "float32")
  ids = last_blocks(
    inputs["query"], config=CONFIG, key_length=72, query_offset=0
  )

  def run(inputs: Any, **choice: Any) -> Any:
    def attend(inputs: Any) -> Any:
      return nsa_jax.native_sparse_attention(
        **inputs,
        **choice,
        config=CONFIG,
        return_block_ids=True,
        implementation=implementation,
      )

    out, pullback, ids = jax.vjp(attend, inputs, has_aux=True)
    return out, ids, pullback(out)

  actual = jax.jit(functools.partial(run, select=last_blocks))(inputs)
  expected = jax.jit(run)(inputs, block_ids=ids)
  helpers.assert_same_bits(actual, expected)


def test_a_selector_sees_what_it_may_read() -> None:
  """All that the docstring names, and no NaN of what is masked."""
  inputs = helpers.make_inputs(DIMS, "float32")
  segments = np.ones((2, 72), np.int32)
  segments[:, 48:] = 0
  inputs["selected"] = helpers.poison(inputs["selected"], segments == 0)
  seen: dict[str, Any] = {}

  def select(**call: Any) -> Any:
    seen.update(call)
    return importance(**call)

  nsa_jax.native_sparse_attention(
    **inputs,
    config=CONFIG,
    scale=0.3,
    segment_ids=segments,
    select=select,
    implementation="xla",
  )
  shapes = {k: v.shape for k, v in seen.items() if hasattr(v, "shape")}
  assert shapes == {
    "query": (2, 72, 4, 16),
    "compressed_key": (2, 17, 2, 16),
    "lse": (2, 72, 4),
    "selected_query": (2, 72, 4, 16),
    "selected_key": (2, 72, 2, 16),
    "segment_ids": (2, 72),
    "query_segment_ids": (2, 72),
  }
  rest = {k: v for k, v in seen.items() if k not in shapes}
  assert rest == {
    "config": CONFIG,
    "key_length": 72,
    "scale": 0.3,
    "query_offset": 0,
  }
  for name in ("query", "compressed_key", "selected_key"):
    assert np.isfinite(np.asarray(seen[name])).all(), name


@pytest.mark.parametrize(
  "select, message",
  [
    (
      3,
      "`select`=3 must be a function that returns block ids, 'means'",
    ),
    ("mean", "`select`='mean' must be a function"),
    (SelectByMeans, "`select`=.* must be a function that returns block ids"),
    (
      SelectByMeans(5),
      "`tokens`=5 of `select` must divide `selection_block`=16",
    ),
    (
      lambda **_: jnp.zeros((2, 72, 2, 2), jnp.int32),
      r"`select\(\.\.\.\)`.*strictly ascending",
    ),
    (
      lambda **_: jnp.zeros((2, 72, 4, 2), jnp.int32),
      r"`select\(\.\.\.\)` of shape \(2, 72, 4, 2\)",
    ),
    (lambda **_: None, r"`select\(\.\.\.\)`=None must be an array"),
  ],
)
def test_bad_selectors(select: Any, message: str) -> None:
  inputs = helpers.make_inputs(DIMS, "float32")
  with pytest.raises(ValueError, match=message):
    nsa_jax.native_sparse_attention(
      **inputs, config=CONFIG, select=select, implementation="xla"
    )


def test_ids_and_a_selector_are_one_too_many() -> None:
  inputs = helpers.make_inputs(DIMS, "float32")
  with pytest.raises(ValueError, match=r"`select`=.* must be None where"):
    nsa_jax.native_sparse_attention(
      **inputs,
      config=CONFIG,
      select=last_blocks,
      block_ids=np.zeros((2, 72, 2, 1), np.int32),
    )


# ------------------------------------------------- means of the selected keys


@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("mode", ["full", "rows", "packed", "short", "finer"])
def test_means_select_as_the_oracle(mode: str, implementation: Any) -> None:
  dims, inputs, integers = make_call(mode)
  # The compressed branch and its selection have a query of their own.
  inputs["compressed_query"] = -inputs["query"]
  tokens: int = 4
  select: Any = "means"
  if mode == "finer":
    tokens, select = 2, SelectByMeans(2)
  out, ids = run(inputs, integers, select, implementation)
  offset = integers.get("query_offset")
  segments = integers.get("segment_ids")
  means = dataclasses.replace(
    CONFIG, compression_block=tokens, compression_stride=tokens
  )
  oracle = Oracle(means, dims.keys, dims.queries, 2, offset, segments)
  query, key = inputs["query"], inputs["selected"].key
  scale = query.shape[-1] ** -0.5
  oracle.assert_ids(
    ids, oracle.block_scores(query, mean_blocks(key, means), 2, scale)
  )
  want = nsa_jax.native_sparse_attention(
    **inputs,
    **integers,
    config=CONFIG,
    block_ids=ids,
    implementation="reference",
  )
  helpers.assert_close(out, want, "float32")


@pytest.mark.parametrize("implementation", ["triton", "xla", "reference"])
def test_few_values_change_no_ids(implementation: Any) -> None:
  """Selection computes only the lse: it takes few of the values for that."""
  dims = Dims(CONFIG, 2, 72, 72, 2, 2, 32, 32)
  inputs = helpers.make_inputs(dims, "float32")
  means = SelectByMeans().blocks(CONFIG)
  where: dict[str, Any] = {
    "config": means,
    "key_length": 72,
    "implementation": implementation,
  }

  @jax.jit
  def by_all_values(query: Any, key: Any) -> Any:
    blocks = nsa_jax.compress_mean(key, config=means)
    _, lse = nsa_jax.compressed_attention(query, blocks, blocks, **where)
    return nsa_jax.select_blocks(query, blocks, lse, **where)

  _, ids = run(inputs, {}, "means", implementation)
  np.testing.assert_array_equal(
    ids, by_all_values(inputs["query"], inputs["selected"].key)
  )


def test_tokens_are_positive() -> None:
  with pytest.raises(ValueError, match="`tokens`=0 must be"):
    SelectByMeans(0)


def test_every_name_has_a_selector() -> None:
  assert set(SELECTORS) == set(get_args(SelectorName))
  (names,) = (
    action.choices
    for action in cli.make_parser()._actions
    if action.dest == "select"
  )
  assert names is not None
  assert set(names) == set(SELECTORS)


# --------------------------------------------------------- layer and cache


def test_a_layer_selects_by_the_name_of_a_selector() -> None:
  layer = NativeSparseAttention(4, 2, 16, config=CONFIG, select="means")
  x = jax.random.normal(jax.random.key(0), (2, 72, 24))
  params = {"params": jax.jit(layer.init)(jax.random.key(1), x)["params"]}
  apply = jax.jit(layer.apply, static_argnames="mutable")
  out, sown = apply(params, x, mutable=("intermediates",))
  _assert_steps(layer, params, x, out)
  _, plain = jax.jit(
    functools.partial(layer.clone(select=None).apply, mutable=["intermediates"])
  )(params, x)
  ids, other = (
    np.asarray(v["intermediates"]["block_ids"][0]) for v in (sown, plain)
  )
  assert (ids != other).any()


def test_a_layer_gives_its_input_to_the_selector() -> None:
  seen: list[Any] = []

  def select(x, **call: Any) -> Any:
    seen.append(x.shape)
    return last_blocks(**call)

  layer = NativeSparseAttention(4, 2, 16, config=CONFIG, select=select)
  x = jax.random.normal(jax.random.key(0), (2, 72, 24))
  params = {"params": jax.jit(layer.init)(jax.random.key(1), x)["params"]}
  apply = jax.jit(layer.apply, static_argnames="mutable")
  out, sown = apply(params, x, mutable=("intermediates",))
  ids = np.asarray(sown["intermediates"]["block_ids"][0])
  assert ids[0, 71, 0].tolist() == [0, 3, 4]
  assert set(seen) == {(2, 72, 24)}
  plain = jax.jit(layer.clone(select=None).apply)(params, x)
  assert np.abs(np.asarray(out) - np.asarray(plain)).max() > 1e-3

  _assert_steps(layer, params, x, out)


def _assert_steps(layer: Any, params: Any, x: Any, out: Any) -> None:
  """The cache selects as the whole pass does, a prompt and step by step."""
  decoder = layer.clone(decode=True)
  held = jax.jit(decoder.init)(jax.random.key(1), x)["cache"]
  apply = jax.jit(decoder.apply, static_argnames="mutable")
  pieces = []
  for start, stop in ((0, 69), (69, 70), (70, 71), (71, 72)):
    piece, updated = apply(
      params | {"cache": held}, x[:, start:stop], mutable=("cache",)
    )
    held = updated["cache"]
    pieces.append(piece)
  helpers.assert_close(jnp.concatenate(pieces, 1), out, "float32")


def _attend(held: Any, query: Any, gates: Any, **call: Any) -> Any:
  """Output and block ids of the queries that `_cache` makes."""
  return cache.attend(
    query,
    held,
    gates,
    config=CONFIG,
    query_offset=jnp.array([61, 30]),
    return_block_ids=True,
    **call,
  )


@pytest.mark.parametrize(
  "implementation, share_kv",
  [(None, False), (None, True), ("xla", True), ("triton", False)],
)
def test_a_selector_over_a_cache(implementation: Any, share_kv: bool) -> None:
  """The branches run one by one, with the kernels that were asked for."""
  held, query, gates = _cache(share_kv)

  def run(select: Any, implementation: Any) -> Any:
    return _attend(
      held, query, gates, select=select, implementation=implementation
    )

  out, ids = run(importance, implementation)
  want, want_ids = run(None, "reference")
  np.testing.assert_array_equal(ids, want_ids)
  helpers.assert_close(out, want, "float32")
  _, newest = run(last_blocks, implementation)
  assert newest[0, 0, 0].tolist() == [0, 2, 3]


@pytest.mark.parametrize("tokens", [4, 1])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("implementation", [None, "triton", "reference"])
def test_means_of_a_cache(
  implementation: Any, share_kv: bool, tokens: int
) -> None:
  """The kept means choose as those of all keys."""
  select = SelectByMeans(tokens)
  held, query, gates = _cache(share_kv, select)
  length = held.selected.key.shape[1]
  means = nsa_jax.compress_mean(held.selected.key, config=select.blocks(CONFIG))
  valid = (np.arange(length // tokens) + 1) * tokens <= held.lengths[:, None]
  np.testing.assert_array_equal(held.means[valid], means[valid])
  # What is not valid is not read.
  spoilt = held._replace(
    means=jnp.where(valid[..., None, None], held.means, jnp.nan)
  )

  def run(held: Any, **call: Any) -> Any:
    # The means do not meet the query of the compressed branch.
    return _attend(held, query, gates, compressed_query=-query, **call)

  def by_hand(selected_query, selected_key, **call: Any) -> Any:
    where = {
      name: call[name] for name in ("key_length", "scale", "query_offset")
    }
    where["config"] = select.blocks(CONFIG)
    means = nsa_jax.compress_mean(selected_key, config=where["config"])
    _, lse = nsa_jax.compressed_attention(selected_query, means, means, **where)
    return nsa_jax.select_blocks(selected_query, means, lse, **where)

  out, ids = run(spoilt, select=select, implementation=implementation)
  want, want_ids = run(held, select=by_hand, implementation="reference")
  np.testing.assert_array_equal(ids, want_ids)
  helpers.assert_close(out, want, "float32")
  _, other = run(held, select=None, implementation=implementation)
  assert (np.asarray(other) != ids).any()


@pytest.mark.parametrize(
  "kept, select, message",
  [
    (None, "means", r"`select`=SelectByMeans\(tokens=4\) .* keeps no means"),
    ("means", SelectByMeans(8), "that of `init`: the cache keeps means of 4 t"),
  ],
)
def test_a_cache_without_these_means(
  kept: Any, select: Any, message: str
) -> None:
  held, query, gates = _cache(False, kept)
  with pytest.raises(ValueError, match=message):
    cache.attend(
      query, held, gates, config=CONFIG, query_offset=61, select=select
    )


@functools.cache
def _cache(share_kv: bool, select: Any = None) -> Any:
  """A filled cache of ragged rows, and the newest query of each."""
  rng = np.random.default_rng(0)

  def normal(*shape: int) -> Any:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  held = cache.init(
    2,
    64,
    config=CONFIG,
    num_kv_heads=2,
    head_dim=16,
    share_kv=share_kv,
    select=select,
  )
  tokens = KV(normal(2, 62, 2, 16), normal(2, 62, 2, 16))

  def phi(pair: KV, first: Any) -> KV:
    return KV(*(nsa_jax.compress_mean(x, config=CONFIG) for x in pair))

  held, _ = cache.prefill(
    held,
    config=CONFIG,
    compressed=tokens,
    selected=tokens,
    window=None if share_kv else tokens,
    compress=phi,
    counts=jnp.array([62, 31]),
  )
  return held, normal(2, 1, 4, 16), jax.nn.sigmoid(normal(2, 1, 4, 3))


def test_the_decode_kernels_refuse_a_function() -> None:
  """Then no fused kernel is in the program, but those of the branches are."""
  held, query, gates = _cache(False, "means")

  @functools.partial(jax.jit, static_argnames="select")
  def run(query, select=None):
    return cache.attend(
      query,
      held,
      gates,
      config=CONFIG,
      query_offset=jnp.array([61, 30]),
      select=select,
    )

  with helpers.h200():
    fused, by_means, apart = (
      run.trace(query, select=select)
      .lower(lowering_platforms=("cuda",))
      .as_text()
      for select in (None, "means", importance)
    )
  for text, reads in ((fused, 1), (by_means, 2)):
    assert text.count('"nsa_decode_compressed') == reads
    assert text.count('"nsa_decode_blocks') == 1
  assert "nsa_decode" not in apart
  assert "nsa_selected_by_block_fwd" in apart


# --------------------------------------------------------- ids from scores


@st.composite
def _calls(draw: Any) -> tuple[Oracle, np.ndarray]:
  initial, local = draw(st.integers(0, 3)), draw(st.integers(1, 3))
  config = NSAConfig(
    2,
    2,
    draw(st.sampled_from([2, 4, 8])),
    draw(st.integers(initial + local, 9)),
    initial,
    local,
  )
  keys = draw(st.integers(1, 40))
  queries = draw(st.integers(1, keys))
  offset = draw(st.one_of(st.none(), st.integers(-3, keys + 2)))
  segments = None
  if draw(st.booleans()):
    block = config.selection_block
    starts = sorted(draw(st.sets(st.integers(0, 5), max_size=3)))
    segments = np.zeros((2, keys), np.int32)
    for number, start in enumerate(starts, 1):
      length = draw(st.integers(1, 3 * block))
      segments[:, start * block :] = 0  # No segment begins again later.
      segments[:, start * block : start * block + length] = number
  oracle = Oracle(config, keys, queries, 2, offset, segments)
  shape = (2, queries, 1, count_selection(keys, config))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  few = [-np.inf, -1e30, -2.0, 0.0, 1.0, 1e30, np.inf, np.nan]
  scores = rng.choice(np.array(few, np.float32), shape)
  return oracle, scores


@hypothesis.given(_calls())
@hypothesis.example(
  (
    Oracle(NSAConfig(2, 2, 2, 3, 0, 1), 9, 9, 2),
    np.full((2, 9, 1, 5), -np.inf, np.float32),
  )
)
def test_any_scores_give_valid_ids(call: tuple[Oracle, np.ndarray]) -> None:
  """Forced blocks in, causal, n of them, ascending, the best by the rule."""
  oracle, scores = call

  def run(scores: Any) -> Any:
    return nsa_jax.block_ids_from_scores(
      scores,
      config=oracle.config,
      key_length=oracle.length,
      query_offset=oracle.offset,
      segment_ids=oracle.segment_ids,
    )

  ids = jax.jit(run)(scores)
  # A NaN is the lowest score, and an infinity a score like others.
  limits = np.finfo(np.float32)
  ranked = np.where(np.isnan(scores), limits.min, scores)
  ranked = np.clip(ranked, limits.min, limits.max)
  np.testing.assert_array_equal(ids, oracle.select(ranked))
  if oracle.length < 6:  # compiles every operation, anew for every shape
    np.testing.assert_array_equal(run(scores), ids)


@pytest.mark.parametrize(
  "scores, message",
  [
    (jnp.zeros((1, 9, 5)), r"`scores` of shape \(1, 9, 5\) must have rank 4"),
    (jnp.zeros((1, 9, 1, 4)), r"`scores` of shape .*num_selection_blocks"),
    (jnp.zeros((1, 9, 1, 5), int), "`scores` of dtype int32.*floating"),
    (jnp.zeros((1, 0, 1, 5)), "`scores` of shape .* at least one entry"),
  ],
)
def test_scores_that_do_not_fit(scores: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    nsa_jax.block_ids_from_scores(
      scores, config=NSAConfig(2, 2, 2, 3, 0, 1), key_length=9
    )
