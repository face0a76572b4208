"""The behaviour of the ops, one suite for every implementation.

Expected values come from the NumPy oracle of helpers.py (float64, loops). The
eight exact properties of semantics are tested on top of it, most of them bit
for bit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from tests import helpers
from tests.helpers import Dims, Oracle

pytestmark = pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def quick_reference(request: pytest.FixtureRequest) -> None:
  """All implementations but the oracle are compiled as users compile them."""
  if request.getfixturevalue("implementation") == "reference":
    request.getfixturevalue("fast_compilation")


#                     l, d, l', n, init, local, w
CONFIGS = (
  NSAConfig(4, 2, 8, 3, 1, 1, 5),
  NSAConfig(8, 4, 8, 3, 0, 2, 16),
  NSAConfig(4, 4, 4, 3, 0, 1, 1),
  NSAConfig(6, 3, 12, 2, 1, 1, 100),
)
MORE_CONFIGS = (
  NSAConfig(2, 1, 6, 6, 3, 2, 7),
  NSAConfig(4, 1, 4, 4, 3, 1, 3),
  NSAConfig(1, 1, 1, 5, 1, 2, 2),
)

FACTORS: dict[str, Any] = {
  "config": CONFIGS,
  # full: T = S. tail: the last rows by default. rows: an offset per batch row,
  # queries before the first and after the last token among them. packed:
  # several segments and padding.
  "mode": ("full", "tail", "rows", "packed"),
  "groups": ((3, 1), (2, 2), (1, 4), (1, 16)),  # K, G
  "widths": ((16, 16), (16, 8), (8, 16)),  # H, V
  "keys": (29, 40, 3, 1),  # 3 and 1 leave no compressed block in most configs
  "dtype": ("float32", "bfloat16", "float16", "float64"),
  # own_query: a separate query for the compressed branch and selection.
  "extra": ("none", "own_query", "block_ids"),
}


def _case_id(case: dict[str, Any]) -> str:
  c = case["config"]
  sizes = (c.compression_block, c.compression_stride, c.selection_block)
  return "-".join(
    [
      "x".join(map(str, sizes)),
      case["mode"],
      *(f"{a}x{b}" for a, b in (case["groups"], case["widths"])),
      f"S{case['keys']}",
      case["dtype"],
      case["extra"],
    ]
  )


def _check_case(implementation: Any, case: dict[str, Any]) -> None:
  """Output, ids and every gradient of the whole op against the oracle."""
  mode, keys, dtype = case["mode"], case["keys"], case["dtype"]
  queries = {"full": keys, "packed": keys, "tail": min(5, keys), "rows": 5}
  dims = Dims(
    case["config"], 2, queries[mode], keys, *case["groups"], *case["widths"]
  )
  inputs = helpers.make_inputs(
    dims, dtype, compressed_query=case["extra"] == "own_query"
  )
  dout = helpers.make_cotangent(dims, dtype)
  integers: dict[str, Any] = {}
  if mode == "rows":
    integers["query_offset"] = helpers.int32([-2, keys - 3])
  if mode == "packed":
    integers["segment_ids"] = helpers.packed_segments(dims)
  oracle = Oracle(
    dims.config,
    keys,
    dims.queries,
    dims.batch,
    offset=integers.get("query_offset"),
    segment_ids=integers.get("segment_ids"),
  )
  if case["extra"] == "block_ids":
    # Any ids will do: other ones per head, m != n, some in the future.
    integers["block_ids"] = _any_ids(dims, width=dims.config.num_selected + 1)
  with jax.enable_x64(dtype == "float64"):
    out, ids, grads = helpers.native_vjp(implementation, dims.config)(
      inputs, integers, dout
    )
  assert out.dtype == inputs["query"].dtype
  if case["extra"] == "block_ids":
    np.testing.assert_array_equal(ids, integers["block_ids"])
  else:
    oracle.assert_ids(ids, oracle.scores(inputs), dtype)
  helpers.assert_close(out, oracle.native(inputs, ids), dtype)
  expected = oracle.native_vjp(inputs, ids, dout)
  assert jax.tree.all(
    jax.tree.map(lambda g, x: g.dtype == x.dtype, grads, inputs)
  )
  helpers.assert_close(
    grads, expected, dtype, gradient=dims.gradient_growth(dtype)
  )


def _any_ids(dims: Dims, width: int, seed: int = 2) -> Any:
  """Ascending ids, then -1: [B, T, K, width]."""
  blocks = helpers.count_selection(dims.keys, dims.config)
  rng = np.random.default_rng(seed)
  ids = np.full((dims.batch, dims.queries, dims.kv_heads, width), -1, np.int32)
  for index in np.ndindex(*ids.shape[:3]):
    count = rng.integers(0, min(width, blocks) + 1)
    ids[index][:count] = np.sort(rng.permutation(blocks)[:count])
  return ids


@pytest.mark.parametrize("case", helpers.pairwise(FACTORS), ids=_case_id)
def test_matches_oracle(implementation: Any, case: dict[str, Any]) -> None:
  _check_case(implementation, case)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS + MORE_CONFIGS, ids=str)
@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_matches_oracle_everywhere(
  implementation: Any, mode: str, config: NSAConfig
) -> None:
  """Every combination of config, mode, groups and dtype, once each.

  These four are crossed. keys, widths and extra are not: their combinations
  take turns from one case to the next, so that each of them meets some of the
  product and none meets all of it.
  """
  first = (CONFIGS + MORE_CONFIGS).index(config) + FACTORS["mode"].index(mode)
  combinations = list(
    itertools.product(*(FACTORS[n] for n in ("keys", "widths", "extra")))
  )
  rest = itertools.islice(itertools.cycle(combinations), 16 * first, None)
  for groups, dtype in itertools.product(FACTORS["groups"], FACTORS["dtype"]):
    keys, widths, extra = next(rest)
    case = {
      "config": config,
      "mode": mode,
      "groups": groups,
      "dtype": dtype,
      "keys": keys,
      "widths": widths,
      "extra": extra,
    }
    try:
      _check_case(implementation, case)
    except AssertionError as error:
      raise AssertionError(_case_id(case)) from error
  jax.clear_caches()


# ------------------------------------------------------------- the primitives


def _branch_calls(
  implementation: Any, config: NSAConfig, keys: int, kwargs: dict[str, Any]
) -> dict[str, Callable]:
  """Per branch f(query, key, value) -> (out, lse)."""
  common = kwargs | {"config": config, "implementation": implementation}
  ids = common.pop("block_ids", None)
  return {
    "compressed": lambda *qkv: nsa_jax.compressed_attention(
      *qkv, key_length=keys, **common
    ),
    "selected": lambda q, k, v: nsa_jax.selected_attention(
      q, k, v, ids, **common
    ),
    "window": lambda *qkv: nsa_jax.window_attention(*qkv, **common),
  }


@functools.cache
def _primitives(implementation: Any, config: NSAConfig, keys: int) -> Callable:
  """A jitted function: (out, lse) and gradients of all, scores, ids."""

  @jax.jit
  def run(
    inputs: Any, douts: Any, dlses: Any, integers: Any, ids_given: Any
  ) -> Any:
    kwargs = integers | {"scale": SCALE}
    calls = _branch_calls(
      implementation, config, keys, kwargs | {"block_ids": ids_given}
    )
    results: dict[str, Any] = {}
    for name, call in calls.items():
      both, pullback = jax.vjp(call, inputs["query"], *inputs[name])
      results[name] = both, pullback((douts[name], dlses[name]))
    lse = results["compressed"][0][1]
    common: dict[str, Any] = kwargs | {
      "config": config,
      "key_length": keys,
      "implementation": implementation,
    }
    arguments = (inputs["query"], inputs["compressed"].key, lse)
    results["scores"] = nsa_jax.block_scores(*arguments, **common)
    results["ids"] = nsa_jax.select_blocks(*arguments, **common)
    return results

  return run


SCALE = 0.3  # not 1/sqrt(H)


@pytest.mark.parametrize(
  "config, packed, dtype",
  [
    (CONFIGS[0], True, "float32"),
    (MORE_CONFIGS[0], False, "bfloat16"),
    pytest.param(CONFIGS[1], False, "float64", marks=pytest.mark.slow),
  ],
  ids=["packed-float32", "offsets-bfloat16", "offsets-float64"],
)
def test_primitives(
  implementation: Any, config: NSAConfig, packed: bool, dtype: str
) -> None:
  """Each op alone: out, lse, the gradients through both, scores, poison."""
  dims = Dims(config, queries=9)
  inputs = helpers.make_inputs(dims, dtype)
  query = inputs["query"]
  offset = np.array([2, 24])  # the last queries lie behind the last key
  positions = offset[:, None] + np.arange(dims.queries)
  padding = positions >= dims.keys
  integers: dict[str, Any] = {"query_offset": helpers.int32(offset)}
  key_padding = np.zeros((2, dims.keys), bool)
  if packed:
    integers["segment_ids"] = segments = helpers.packed_segments(dims)
    # Callers that work chunk by chunk pass them; here equal to the default but
    # for one query that is declared padding.
    own = np.take_along_axis(segments, positions.clip(max=28), 1)
    own[0, 3] = 0
    integers["query_segment_ids"] = own
    padding |= own == 0
    key_padding = segments == 0
  oracle = Oracle(
    config,
    dims.keys,
    dims.queries,
    dims.batch,
    offset=offset,
    segment_ids=integers.get("segment_ids"),
    query_segment_ids=integers.get("query_segment_ids"),
  )
  rng = np.random.default_rng(4)
  douts, dlses = {}, {}
  for seed, name in enumerate(helpers.BRANCHES):
    douts[name] = helpers.make_cotangent(dims, dtype, seed)
    dlses[name] = helpers.normal(
      rng, query.shape[:3], helpers.score_dtype(dtype)
    )
  ids_given = _any_ids(dims, width=4)
  run = _primitives(implementation, config, dims.keys)
  with jax.enable_x64(dtype == "float64"):
    results = jax.device_get(run(inputs, douts, dlses, integers, ids_given))

  rows: dict[str, Callable] = {
    "compressed": lambda b, i, k: oracle.compressed_rows(b, i),
    "selected": lambda b, i, k: oracle.selected_rows(b, i, ids_given[b, i, k]),
    "window": lambda b, i, k: oracle.window_rows(b, i),
  }
  score_dtype = helpers.score_dtype(dtype)
  for name, see in rows.items():
    (out, lse), grads = results[name]
    key, value = inputs[name]
    expected_out, expected_lse = oracle.attend(query, key, value, see, SCALE)
    assert lse.dtype == score_dtype
    helpers.assert_close(out, expected_out, dtype, what=name)
    # lse is computed in float32 whatever the inputs are.
    helpers.assert_close(lse, expected_lse, score_dtype, what=f"{name} lse")
    assert (lse[padding] == -np.inf).all()
    expected = oracle.attend_vjp(
      query, key, value, see, SCALE, douts[name], dlses[name]
    )
    helpers.assert_close(
      grads, expected, dtype, gradient=dims.gradient_growth(dtype), what=name
    )
  scores = oracle.scores(inputs, SCALE)
  if "scores" in results:
    assert results["scores"].dtype == score_dtype
    helpers.assert_close(results["scores"], scores, score_dtype, what="scores")
  oracle.assert_ids(results["ids"], scores, dtype)

  # NaN and inf in padding rows of queries and cotangents, in padding keys and
  # in keys after the last query: not one bit changes.
  last = positions[:, -1:]
  index = np.arange(dims.keys)
  hidden = key_padding | (index > last)
  first = config.compression_stride * np.arange(dims.num_compressed)
  tokens = first[:, None] + np.arange(config.compression_block)
  # Where some tokens are padding, phi gives a finite row.
  hidden_blocks = key_padding[:, tokens].all(-1) | (tokens[:, -1] > last)
  poisoned = {
    "query": helpers.poison(query, padding),
    "compressed": helpers.poison(inputs["compressed"], hidden_blocks),
    "selected": helpers.poison(inputs["selected"], hidden),
    "window": helpers.poison(inputs["window"], hidden),
  }
  with jax.enable_x64(dtype == "float64"):
    again = run(
      poisoned,
      helpers.poison(douts, padding),
      helpers.poison(dlses, padding),
      integers,
      ids_given,
    )
  helpers.assert_same_bits(again, results)


def test_key_offset_of_the_window(implementation: Any) -> None:
  """A shard of the keys with its halo gives the rows of the whole."""
  config = CONFIGS[0]  # w = 5
  dims = Dims(config, keys=16, queries=16)
  inputs = helpers.make_inputs(dims, "float32")

  def attend(query: Any, key: Any, value: Any, **offsets: Any) -> Any:
    call = functools.partial(
      nsa_jax.window_attention,
      **offsets,
      config=config,
      implementation=implementation,
    )
    return jax.jit(call)(query, key, value)

  whole = attend(inputs["query"], *inputs["window"])
  first, start, stop = 4, 8, 12  # keys 4..11 serve the queries 8..11
  part = attend(
    inputs["query"][:, start:stop],
    *(x[:, first:stop] for x in inputs["window"]),
    key_offset=first,
    query_offset=start,
  )
  helpers.assert_close(
    part, [x[:, start:stop] for x in whole], "float32", what="halo"
  )
  # A negative offset is a halo before the first token: those rows are not
  # tokens and query rows there are padding, whatever they hold.
  padded: list[Any] = [
    np.pad(x, ((0, 0), (3, 0), (0, 0), (0, 0)), constant_values=7)
    for x in (inputs["query"], *inputs["window"])
  ]
  out, lse = attend(*padded, key_offset=-3, query_offset=-3)
  assert not out[:, :3].any()
  assert (lse[:, :3] == -np.inf).all()
  halo = out[:, 3:], lse[:, 3:]
  helpers.assert_close(halo, whole, "float32", what="negative offset")

  # Every row of a batch may have its own.
  offsets = (first, -3)
  starts = (start, -3)
  rows = (inputs["query"][:, start:stop], *inputs["window"])
  apart = attend(
    *rows,
    key_offset=helpers.int32(offsets),
    query_offset=helpers.int32(starts),
  )
  for b, (key_offset, query_offset) in enumerate(
    zip(offsets, starts, strict=True)
  ):
    alone = attend(*rows, key_offset=key_offset, query_offset=query_offset)
    helpers.assert_close(
      [x[b] for x in apart],
      [x[b] for x in alone],
      "float32",
      what="offsets of rows",
    )


@pytest.mark.parametrize("key_offset", [4, -3])
def test_key_offset_with_segments(implementation: Any, key_offset: int) -> None:
  """Segments belong to key rows, and each batch row has its own offset."""
  config = CONFIGS[0]
  dims = Dims(config, queries=9, keys=21)
  inputs = helpers.make_inputs(dims, "float32")
  segments = np.zeros((2, 21), np.int32)
  # Without compressed blocks nothing has to be aligned.
  segments[0, :7], segments[0, 7:18] = 2, 1
  segments[1, 2:] = 3
  # Row 0 begins before the keys, row 1 ends behind them.
  offset = helpers.int32([key_offset - 2, key_offset + 15])
  oracle = Oracle(
    config, 21, 9, 2, offset, segment_ids=segments, key_offset=key_offset
  )
  dout = helpers.make_cotangent(dims, "float32")
  dlse = np.random.default_rng(5).standard_normal(dout.shape[:3])
  dlse = helpers.float32(dlse)

  @jax.jit
  def run(query: Any, key: Any, value: Any, offset: Any, ids: Any) -> Any:
    both, pullback = jax.vjp(
      lambda *qkv: nsa_jax.window_attention(
        *qkv,
        config=config,
        key_offset=key_offset,
        query_offset=offset,
        segment_ids=ids,
        implementation=implementation,
      ),
      query,
      key,
      value,
    )
    return both, pullback((dout, dlse))

  query, (key, value) = inputs["query"], inputs["window"]
  both, grads = run(query, key, value, offset, segments)

  def rows(b: int, i: int, k: int) -> list[int]:
    return oracle.window_rows(b, i)

  scale = dims.head_dim**-0.5
  expected = oracle.attend(query, key, value, rows, scale)
  helpers.assert_close(both, expected, "float32")
  expected_grads = oracle.attend_vjp(query, key, value, rows, scale, dout, dlse)
  helpers.assert_close(grads, expected_grads, "float32", gradient=1)


# -------------------------------------------------------- the exact properties


PROPERTY_FACTORS: dict[str, Any] = {
  "config": CONFIGS + MORE_CONFIGS,
  "groups": ((2, 2), (2, 1), (1, 4), (1, 16)),  # K, G
  "widths": ((16, 8), (8, 16)),  # H, V
  "dtype": ("float32", "bfloat16", "float16"),
  "keys": (29, 37, 43),  # room for two documents of a block and more
}


def _property_cases() -> list[Any]:
  """Four, BASE first, that hold all but MORE_CONFIGS; slow: all pairs."""
  columns = [
    itertools.islice(itertools.cycle(values), 4)
    for values in PROPERTY_FACTORS.values()
  ]
  rows = zip(*columns, strict=True)
  fast = [dict(zip(PROPERTY_FACTORS, row, strict=True)) for row in rows]
  slow = [c for c in helpers.pairwise(PROPERTY_FACTORS) if c not in fast]
  return [
    pytest.param(
      case,
      id=_case_id(case | {"mode": "full", "extra": "none"}),
      marks=[pytest.mark.slow] if case in slow else [],
    )
    for case in fast + slow
  ]


for_property_cases = pytest.mark.parametrize("case", _property_cases())


def _property_dims(case: dict[str, Any]) -> Dims:
  keys = case["keys"]
  return Dims(case["config"], 2, keys, keys, *case["groups"], *case["widths"])


_compress = jax.jit(helpers.compress, static_argnums=1)


def _clear_tokens(dims: Dims, dtype: str, segment_ids: Any = None) -> Any:
  """Tokens without near ties, so that ids can be compared exactly."""
  oracle = Oracle(
    dims.config,
    dims.keys,
    dims.queries,
    dims.batch,
    segment_ids=segment_ids,
  )
  for seed in range(20):
    tokens = helpers.make_tokens(dims, dtype, seed)
    inputs = _compress(tokens, dims.config, segment_ids)
    if oracle.margin(oracle.scores(inputs)) > 1e-4:
      return tokens
  raise AssertionError("every seed has near ties")


@for_property_cases
def test_degenerate_branches_are_full_attention(
  implementation: Any, case: dict[str, Any]
) -> None:
  """Property 1: all blocks, or a window as long as the row."""
  dims, dtype = _property_dims(case), case["dtype"]
  length = dims.keys
  config = dataclasses.replace(dims.config, window=length)
  query, (key, value) = (
    helpers.make_inputs(dims, dtype)[n] for n in ("query", "selected")
  )
  expected, expected_lse = Oracle(config, length, length, 2).attend(
    query, key, value, lambda b, i, k: range(i + 1), dims.head_dim**-0.5
  )
  blocks = np.arange(helpers.count_selection(length, config), dtype=np.int32)
  ids = np.broadcast_to(blocks, (2, length, dims.kv_heads, blocks.size))

  @jax.jit
  def run(*qkv: Any) -> Any:
    calls = _branch_calls(implementation, config, length, {"block_ids": ids})
    return {name: calls[name](*qkv) for name in ("selected", "window")}

  for name, (out, lse) in run(query, key, value).items():
    helpers.assert_close(out, expected, dtype, what=name)
    helpers.assert_close(lse, expected_lse, "float32", what=name)


def test_equal_blocks_score_their_probability(implementation: Any) -> None:
  """Property 2: with l = d = l', p_slc = p_cmp, summed over the group."""
  config = CONFIGS[2]
  dims = Dims(config)
  inputs = helpers.make_inputs(dims, "float32")
  query, key = inputs["query"], inputs["compressed"].key
  call: Any = {
    "config": config,
    "key_length": 29,
    "implementation": implementation,
  }

  @jax.jit
  def run(query: Any, key: Any, value: Any) -> Any:
    _, lse = nsa_jax.compressed_attention(query, key, value, **call)
    return nsa_jax.block_scores(query, key, lse, **call)

  scores = run(query, *inputs["compressed"])
  logits = np.einsum(
    "btkgh,bckh->btkgc",
    helpers.float64(query).reshape(2, 29, 2, 2, 16) / 4,
    helpers.float64(key),
  )
  visible = 4 * np.arange(7) + 3 <= np.arange(29)[:, None]  # [T, C]
  weights = np.where(visible[:, None, None], np.exp(logits), 0)
  p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  assert scores.shape == (2, 29, 2, 8)
  helpers.assert_close(scores[..., :7], p.sum(3), "float32")
  assert not scores[..., 7].any()  # tokens 28..31: no complete block


BASE = Dims(CONFIGS[0])


def _segments(dims: Dims = BASE) -> dict[str, Any]:
  return {"segment_ids": np.ones((dims.batch, dims.keys), np.int32)}


@for_property_cases
def test_causality_is_bitwise(
  implementation: Any, case: dict[str, Any]
) -> None:
  """Property 3, through phi: values and gradients know no future."""
  dims, dtype = _property_dims(case), case["dtype"]
  run = helpers.pipeline_vjp(implementation, dims.config)
  tokens = helpers.make_tokens(dims, dtype)
  other = helpers.make_tokens(dims, dtype, seed=9)
  for last in (0, 7, 14, dims.keys - 2):
    cut = last + 1

    def change(x: Any, y: Any, cut: int = cut) -> Any:
      return np.concatenate([x[:, :cut], y[:, cut:]], axis=1)

    dout = helpers.make_cotangent(dims, dtype)
    dout[:, cut:] = 0
    results = [
      run(t, _segments(dims), dout)
      for t in (tokens, jax.tree.map(change, tokens, other))
    ]
    past = [jax.tree.map(lambda x, cut=cut: x[:, :cut], r) for r in results]
    helpers.assert_same_bits(past[0], past[1], what=f"t <= {last}: ")
    for grad in jax.tree.leaves([r[2] for r in results]):
      assert not np.asarray(grad)[:, cut:].any()


@for_property_cases
def test_chunks_and_decode_steps_equal_one_pass(
  implementation: Any, case: dict[str, Any]
) -> None:
  """Property 4, and what lies behind a call's last query may hold NaN."""
  dims, dtype = _property_dims(case), case["dtype"]
  config, length = dims.config, dims.keys
  tokens = _clear_tokens(dims, dtype)
  inputs = jax.tree.map(np.asarray, _compress(tokens, config, None))
  oracle = Oracle(config, length, length, dims.batch)
  run = helpers.native(implementation, config)
  whole, whole_ids = run(inputs, {})
  np.testing.assert_array_equal(whole_ids, oracle.select(oracle.scores(inputs)))

  def step(start: np.ndarray, size: int, offset: Any) -> None:
    """Runs `size` queries from `start` [B] on, the rest poisoned."""
    rows = start[:, None] + np.arange(size)
    inside = rows < dims.queries
    rows = np.minimum(rows, dims.queries - 1)
    part = {}
    for name in ("query", "gates"):
      part[name] = np.take_along_axis(
        inputs[name], rows[:, :, None, None], axis=1
      )
    for name in helpers.BRANCHES:
      kv = []
      for x in inputs[name]:
        x = x.copy()
        # Position of the last token that a row of the keys depends on.
        last = np.arange(x.shape[1])
        if name == "compressed":
          last = config.compression_stride * last + config.compression_block - 1
        x[last > start[:, None] + size - 1] = np.nan
        kv.append(x)
      part[name] = helpers.pair(*kv)
    out, ids = run(part, {"query_offset": offset})
    expected = np.take_along_axis(
      np.asarray(whole), rows[:, :, None, None], axis=1
    )
    helpers.assert_close(
      out, np.where(inside[..., None, None], expected, 0), dtype
    )
    expected_ids = np.take_along_axis(
      np.asarray(whole_ids), rows[:, :, None, None], axis=1
    )
    np.testing.assert_array_equal(
      ids, np.where(inside[..., None, None], expected_ids, -1)
    )

  # The last chunk is longer than what is left.
  for start in range(0, length, 8):
    step(np.full(2, start), 8, jnp.int32(start))
  for start in range(length):  # both rows decode, from different lengths
    rows = np.array([start, (start + 11) % length])
    step(rows, 1, jnp.asarray(rows, jnp.int32))


def test_offsets_of_every_integer_type(implementation: Any) -> None:
  """Narrow and unsigned types: nothing wraps around."""
  rng = np.random.default_rng(0)
  query: Any = rng.normal(size=(1, 2, 2, 8)).astype(np.float32)
  key, value = rng.normal(size=(2, 1, 300, 1, 8)).astype(np.float32)

  def run(offset):
    return nsa_jax.window_attention(
      query,
      key,
      value,
      config=NSAConfig(window=200),
      query_offset=offset,
      implementation=implementation,
    )

  for offset in (100, 0):
    want = run(offset)
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
      helpers.assert_close(
        run(jnp.asarray(offset, dtype)), want, "float32", what=dtype
      )
  out, _ = run(jnp.asarray(2**32 - 1, "uint32"))
  assert not np.asarray(out).any()


def test_static_and_default_offsets(implementation: Any) -> None:
  """An int, an int32 scalar and the default name the same queries."""
  dims = Dims(CONFIGS[0], queries=8)
  inputs = helpers.make_inputs(dims, "float32")
  run = helpers.native(implementation, dims.config)
  expected = helpers.native(implementation, dims.config, query_offset=21)(
    inputs, {}
  )
  oracle = Oracle(dims.config, dims.keys, dims.queries, dims.batch)
  helpers.assert_close(
    expected[0], oracle.native(inputs, expected[1]), "float32"
  )
  for name, integers in {
    "default": {},
    "scalar": {"query_offset": jnp.int32(21)},
    "rows": {"query_offset": jnp.int32([21, 21])},
  }.items():
    out, ids = run(inputs, integers)
    np.testing.assert_array_equal(ids, expected[1])
    helpers.assert_close(out, expected[0], "float32", what=name)


@for_property_cases
def test_permutations(implementation: Any, case: dict[str, Any]) -> None:
  """Property 5: batch rows and key/value heads are independent."""
  dims, dtype = _property_dims(case), case["dtype"]
  run = helpers.pipeline_vjp(implementation, dims.config)
  tokens = _clear_tokens(dims, dtype)
  dout = helpers.make_cotangent(dims, dtype)
  expected = run(tokens, _segments(dims), dout)

  def swap(x: Any) -> np.ndarray:
    """Swaps the rows, and the heads group by group."""
    x = np.asarray(x)[::-1]
    groups = x.reshape(*x.shape[:2], dims.kv_heads, -1, *x.shape[3:])
    return np.ascontiguousarray(groups[:, :, ::-1]).reshape(x.shape)

  actual = run(jax.tree.map(swap, tokens), _segments(dims), swap(dout))
  np.testing.assert_array_equal(actual[1], swap(expected[1]))
  helpers.assert_close(
    (actual[0], actual[2]),
    jax.tree.map(swap, (expected[0], expected[2])),
    dtype,
    gradient=dims.gradient_growth(dtype),
  )


@for_property_cases
def test_packed_equals_alone_and_poison_stays_out(
  implementation: Any, case: dict[str, Any]
) -> None:
  """Property 6, through phi: outputs, ids and gradients."""
  dims, dtype = _property_dims(case), case["dtype"]
  config, block = dims.config, dims.config.selection_block
  run = helpers.pipeline_vjp(implementation, config)
  # Row 0 holds two documents as long as fit, row 1 one behind a padding block.
  size = max(n for n in range(dims.keys) if -n % block + 2 * n <= dims.keys)
  second = size + -size % block
  places = [(0, 0, 3), (0, second, 1), (1, block, 1)]
  segments = np.zeros((2, dims.keys), np.int32)
  for b, start, segment in places:
    segments[b, start : start + size] = segment
  padding = segments == 0
  tokens = _clear_tokens(dims, dtype, segments)
  dout = helpers.make_cotangent(dims, dtype)
  integers = {"segment_ids": segments}
  packed = run(tokens, integers, dout)
  out, ids, grads = packed
  assert not np.asarray(out)[padding].any()
  assert (np.asarray(ids)[padding] == -1).all()
  for grad in jax.tree.leaves(grads):
    assert not np.asarray(grad)[padding].any()

  poisoned = run(
    helpers.poison(tokens, padding), integers, helpers.poison(dout, padding)
  )
  helpers.assert_same_bits(poisoned, packed, what="poisoned padding: ")

  def alone(x: Any) -> np.ndarray:
    return np.stack([np.asarray(x)[b, s : s + size] for b, s, _ in places])

  lone = run(jax.tree.map(alone, tokens), {}, alone(dout))
  shift = np.array([s // block for _, s, _ in places])[:, None, None, None]
  packed_ids = alone(ids)
  np.testing.assert_array_equal(
    np.where(packed_ids < 0, -1, packed_ids - shift), lone[1]
  )
  helpers.assert_close(
    jax.tree.map(alone, (out, grads)),
    (lone[0], lone[2]),
    dtype,
    gradient=dims.gradient_growth(dtype),
    what="packed against alone",
  )


def test_one_segment_changes_nothing(implementation: Any) -> None:
  """Rows that are one segment equal rows without segments."""
  run = helpers.pipeline_vjp(implementation, BASE.config)
  tokens = helpers.make_tokens(BASE, "float32", seed=3)
  dout = helpers.make_cotangent(BASE, "float32")
  ones = run(tokens, _segments(), dout)
  none = run(tokens, {}, dout)
  np.testing.assert_array_equal(ones[1], none[1])
  helpers.assert_close(
    (ones[0], ones[2]), (none[0], none[2]), "float32", gradient=1
  )


def test_traced_misaligned_segments_leak_nothing(implementation: Any) -> None:
  """Starts inside a block: no token of another segment is felt, bit for bit."""
  run = helpers.pipeline_vjp(implementation, BASE.config)
  segments = np.zeros((2, 29), np.int32)
  segments[0, :5], segments[0, 5:18], segments[0, 19:] = 3, 1, 2
  segments[1, 3:12], segments[1, 12:27] = 5, 4
  tokens = helpers.make_tokens(BASE, "float32")
  other = helpers.make_tokens(BASE, "float32", seed=9)
  for b, segment in ((0, 3), (0, 1), (0, 2), (1, 5), (1, 4)):
    inside = np.zeros((2, 29), bool)
    inside[b] = segments[b] == segment

    def keep(x: Any, y: Any, inside: np.ndarray = inside) -> np.ndarray:
      return np.where(inside[..., None, None], x, y)

    dout = helpers.make_cotangent(BASE, "float32")
    dout = keep(dout, np.zeros_like(dout))
    results = [
      run(x, {"segment_ids": segments}, dout)
      for x in (tokens, jax.tree.map(keep, tokens, other))
    ]
    own = [
      jax.tree.map(lambda x, inside=inside: np.asarray(x)[inside], r)
      for r in results
    ]
    assert np.abs(own[0][0]).max() > 0
    helpers.assert_same_bits(own[0], own[1], what=f"segment {segment}: ")
    for grad in jax.tree.leaves([r[2] for r in results]):
      assert not np.asarray(grad)[~inside].any()


def test_queries_of_other_segments(implementation: Any) -> None:
  """query_segment_ids decides: another segment of the keys, or none of them."""
  dims = BASE
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  segments = helpers.packed_segments(dims)
  own = segments.copy()
  own[0, 13:20] = 7  # reads the first document from the second
  own[0, 3] = 9  # a document that begins later
  own[0, 21:24] = own[1, :12] = 99  # one that the keys do not have
  own[1, 12:] = 4
  integers = {"segment_ids": segments, "query_segment_ids": own}
  oracle = Oracle(
    dims.config, 29, 29, 2, segment_ids=segments, query_segment_ids=own
  )
  out, ids, grads = helpers.native_vjp(implementation, dims.config)(
    inputs, integers, dout
  )
  assert not np.asarray(out)[own == 99].any()
  oracle.assert_ids(ids, oracle.scores(inputs), "float32")
  helpers.assert_close(out, oracle.native(inputs, ids), "float32")
  helpers.assert_close(
    grads, oracle.native_vjp(inputs, ids, dout), "float32", gradient=1
  )


def test_rows_outside_the_keys_are_padding(implementation: Any) -> None:
  """Query rows before 0 and from S on: 0, -1, no gradient, poison or not.

  So are keys after the last query.
  """
  dims = Dims(BASE.config, queries=8)
  run = helpers.native_vjp(implementation, dims.config)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  offset = np.array([-3, 25])
  positions = offset[:, None] + np.arange(8)
  outside = (positions < 0) | (positions >= dims.keys)
  assert outside.sum() == 3 + 4
  integers = {"query_offset": jnp.asarray(offset, jnp.int32)}
  clean = run(inputs, integers, dout)
  assert not np.asarray(clean[0])[outside].any()
  assert (np.asarray(clean[1])[outside] == -1).all()
  for name in ("query", "gates"):
    assert not np.asarray(clean[2][name])[outside].any()

  bad = dict(inputs)
  for name in ("query", "gates"):
    bad[name] = helpers.poison(inputs[name], outside)
  last = positions[:, -1:]
  for name in helpers.BRANCHES:
    index = np.arange(inputs[name].key.shape[1])
    needs = 2 * index + 3 if name == "compressed" else index
    bad[name] = helpers.poison(inputs[name], needs > last)
  dirty = run(bad, integers, helpers.poison(dout, outside))
  helpers.assert_same_bits(dirty, clean)


@pytest.mark.parametrize("offset", [12, 2**31 - 1, -40])
def test_queries_beyond_the_keys_read_nothing(
  implementation: Any, offset: int
) -> None:
  """A finished row of a decode batch: no key reaches a gradient."""
  query: Any = np.ones((1, 4, 2, 8), np.float32)
  key: Any = np.full((1, 12, 1, 8), np.nan, np.float32)

  def loss(query: Any, key: Any) -> Any:
    out, lse = nsa_jax.window_attention(
      query,
      key,
      key,
      config=CONFIGS[0],
      query_offset=offset,
      implementation=implementation,
    )
    return out.sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(query, key)
  assert value == 0
  assert all((np.asarray(x) == 0).all() for x in grads)


def test_a_second_run_has_the_same_bits(implementation: Any) -> None:
  run = helpers.pipeline_vjp(implementation, BASE.config)
  tokens = helpers.make_tokens(BASE, "float32")
  dout = helpers.make_cotangent(BASE, "float32")
  helpers.assert_same_bits(
    run(tokens, _segments(), dout), run(tokens, _segments(), dout)
  )


# ----------------------------------------------- rows longer than one chunk


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes `xla` loop over queries at test sizes; the others do not notice."""
  monkeypatch.setattr("nsa_jax.xla.chunks.CHUNK_ELEMENTS", 2**12)


LONG = Dims(CONFIGS[0], queries=150, keys=150, kv_heads=1, head_dim=8)


@pytest.mark.usefixtures("small_chunks")
def test_long_rows(implementation: Any) -> None:
  """Many chunks, the last one incomplete, with segments and offsets."""
  inputs = helpers.make_inputs(LONG, "float32")
  dout = helpers.make_cotangent(LONG, "float32")
  segments = np.zeros((2, 150), np.int32)
  segments[0, :61], segments[0, 64:] = 1, 2
  segments[1, 8:139] = 1
  integers = {
    "query_offset": helpers.int32([-20, 7]),
    "segment_ids": segments,
  }
  oracle = Oracle(
    LONG.config,
    LONG.keys,
    LONG.queries,
    LONG.batch,
    offset=integers["query_offset"],
    segment_ids=segments,
  )
  out, ids, grads = helpers.native_vjp(implementation, LONG.config)(
    inputs, integers, dout
  )
  oracle.assert_ids(ids, oracle.scores(inputs), "float32")
  helpers.assert_close(out, oracle.native(inputs, ids), "float32")
  helpers.assert_close(
    grads, oracle.native_vjp(inputs, ids, dout), "float32", gradient=1
  )


@pytest.mark.usefixtures("small_chunks")
def test_gradients_accumulate_in_float32(implementation: Any) -> None:
  """A sum over all queries kept in bfloat16 would stop growing on the way.

  Every query reads block 0; with a cotangent of ones nothing cancels, and its
  dv is a sum of about a thousand probabilities near 1/24.
  """
  dims = Dims(
    CONFIGS[0], 1, 1024, 1024, kv_heads=1, group=1, head_dim=8, value_dim=8
  )
  inputs = helpers.make_inputs(dims, "bfloat16")
  dout = np.ones_like(helpers.make_cotangent(dims, "bfloat16"))
  _, ids, actual = helpers.native_vjp(implementation, dims.config)(
    inputs, {}, dout
  )
  wide = jax.tree.map(helpers.float32, inputs)
  _, _, expected = helpers.native_vjp("reference", dims.config)(
    wide, {"block_ids": ids}, helpers.float32(dout)
  )
  assert np.max(expected["selected"].value) > 20
  helpers.assert_close(actual, expected, "bfloat16", gradient=1)


# ------------------------------------------------------------------- gradients


def test_gradients_match_float64_autodiff(implementation: Any) -> None:
  """Property 7: float32 against autodiff of the reference in float64."""
  dims = Dims(CONFIGS[0], queries=13, keys=21)
  inputs = helpers.make_inputs(dims, "float32", compressed_query=True)
  dout = helpers.make_cotangent(dims, "float32")
  out, ids, grads = helpers.native_vjp(implementation, dims.config)(
    inputs, {}, dout
  )
  wide = jax.tree.map(helpers.float64, (inputs, dout))
  with jax.enable_x64(True):
    expected = helpers.native_vjp("reference", dims.config)(
      wide[0], {"block_ids": np.asarray(ids)}, wide[1]
    )
  assert expected[0].dtype == np.float64
  helpers.assert_close(out, expected[0], "float32")
  helpers.assert_close(grads, expected[2], "float32", gradient=1)


def test_finite_differences(implementation: Any) -> None:
  """Float64, through out and lse of all ops; forward mode where it exists."""
  config = NSAConfig(4, 2, 4, 2, 0, 1, 3)
  dims = Dims(config, batch=1, queries=9, keys=11, kv_heads=1, head_dim=4)
  rng = np.random.default_rng(6)
  inputs = helpers.make_inputs(dims, "float64", compressed_query=True)
  ids = _any_ids(dims, width=2)
  douts = [rng.standard_normal((1, 9, 2, 8)) for _ in range(4)]
  dlses = [rng.standard_normal((1, 9, 2)) for _ in range(3)]
  tangent = jax.tree.map(lambda x: rng.standard_normal(x.shape), inputs)

  def loss(inputs: Any, ids: Any, douts: Any, dlses: Any) -> jax.Array:
    calls = _branch_calls(implementation, config, 11, {"block_ids": ids})
    total = jnp.zeros(())
    for (name, call), dout, dlse in zip(
      calls.items(), douts, dlses, strict=False
    ):
      out, lse = call(inputs["query"], *inputs[name])
      total += (out * dout).sum()
      total += jnp.where(jnp.isfinite(lse), lse * dlse, 0).sum()
    out = nsa_jax.native_sparse_attention(
      **inputs, block_ids=ids, config=config, implementation=implementation
    )
    return total + (out * douts[3]).sum()

  with jax.enable_x64(True):
    rest = (ids, douts, dlses)
    value = jax.jit(loss)
    grads = jax.jit(jax.grad(loss))(inputs, *rest)
    slope = sum(
      (g * v).sum()
      for g, v in zip(
        jax.tree.leaves(grads), jax.tree.leaves(tangent), strict=True
      )
    )

    def along(step: float) -> float:
      moved = jax.tree.map(lambda x, v: x + step * v, inputs, tangent)
      return float(value(moved, *rest))

    # The fourth-order difference leaves about 1e-9 of relative error.
    h = 1e-3
    numeric = 8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))
    np.testing.assert_allclose(slope, numeric / (12 * h), rtol=1e-7)
    if implementation in helpers.FORWARD_MODE:
      _, forward = jax.jit(
        lambda x, v, rest: jax.jvp(lambda y: loss(y, *rest), (x,), (v,))
      )(inputs, tangent, rest)
      np.testing.assert_allclose(forward, slope, rtol=1e-12)
