"""The behaviour of the ops: one suite, run over every implementation.

Expected values come from the NumPy oracle of oracle.py. Exact properties, those
of docs/exactness.md, are tested on top of it, most of them bit for bit. An
implementation joins by a line in `SUBJECTS`; what is special to it is tested in
a file of its own.
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
from tests.helpers import Dims
from tests.oracle import (
  BRANCHES,
  Oracle,
  count_compressed,
  count_selection,
  float64,
)

# -------------------------------------------------------------- who is tested


@dataclasses.dataclass(frozen=True)
class Calls:
  """Calls that a kind of implementation serves, and how many run each time.

  Attributes:
    configs: the first is that of the cases laid out by hand.
    groups: (K, G), for cases against the oracle.
    widths: (H, V).
    keys: S.
    dtypes: of cases against the oracle and of gradients.
    property_groups: (K, G), for the exact properties.
    property_widths: (H, V).
    property_keys: room for two documents of a block and more.
    more_configs: for the slow tier.
    unit: lengths of the cases laid out by hand are multiples of it.
    ops: the ops beside the whole one, by their names in `dispatch`.
    step: each `step`-th case against the oracle is in the fast tier.
    properties: this many cases of each exact property are in the fast tier.
    by_hand: whether the cases laid out by hand are in the fast tier.
  """

  configs: tuple[NSAConfig, ...]
  groups: tuple[tuple[int, int], ...]
  widths: tuple[tuple[int, int], ...]
  keys: tuple[int, ...]
  dtypes: tuple[str, ...]
  property_groups: tuple[tuple[int, int], ...]
  property_widths: tuple[tuple[int, int], ...]
  property_keys: tuple[int, ...]
  more_configs: tuple[NSAConfig, ...] = ()
  unit: int = 1
  ops: tuple[str, ...] = BRANCHES
  step: int = 1
  properties: int = 4
  by_hand: bool = True

  @property
  def branches(self) -> tuple[str, ...]:
    return tuple(op for op in self.ops if op != "block_scores")

  def dims(self, queries: int = 29, keys: int = 29, **sizes: Any) -> Dims:
    """Sizes of a case laid out by hand; lengths are in units."""
    return Dims(
      self.configs[0],
      queries=queries * self.unit,
      keys=keys * self.unit,
      value_dim=8 * self.unit,
      **sizes,
    )


#                     l, d, l', n, init, local, w
ANY = Calls(
  configs=(
    NSAConfig(4, 2, 8, 3, 1, 1, 5),
    NSAConfig(8, 4, 8, 3, 0, 2, 16),
    NSAConfig(4, 4, 4, 3, 0, 1, 1),
    NSAConfig(6, 3, 12, 2, 1, 1, 100),
  ),
  groups=((3, 1), (2, 2), (1, 4), (1, 16)),
  widths=((16, 16), (16, 8), (8, 16)),
  keys=(29, 40, 3, 1),  # 3 and 1 leave no compressed block in most configs
  dtypes=("float32", "bfloat16", "float16", "float64"),
  property_groups=((2, 2), (2, 1), (1, 4), (1, 16)),
  property_widths=((16, 8), (8, 16)),
  property_keys=(29, 37, 43),
  more_configs=(
    NSAConfig(4, 1, 4, 4, 3, 1, 3),
    NSAConfig(1, 1, 1, 5, 1, 2, 2),
    NSAConfig(2, 1, 6, 6, 3, 2, 7),
  ),
  ops=(*BRANCHES, "full", "block_scores"),
)
KERNELS = Calls(
  configs=(
    NSAConfig(8, 4, 16, 3, 1, 1, 9),
    NSAConfig(16, 16, 16, 3, 0, 1, 16),
    NSAConfig(16, 8, 32, 2, 0, 1, 100),
  ),
  # Small groups go block by block, large ones query by query.
  groups=((3, 1), (2, 2), (1, 5), (1, 12), (1, 16), (1, 24)),
  widths=((16, 16), (32, 16), (16, 48)),
  keys=(70, 40, 1),
  dtypes=("float32", "bfloat16", "float16"),
  property_groups=((1, 16), (2, 2)),
  property_widths=((16, 32), (32, 16)),
  property_keys=(70, 85),
  unit=2,
  step=4,
  properties=1,
  by_hand=False,
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """An implementation and the calls that try it; `marks` are of all cases."""

  name: str
  implementation: Any
  calls: Calls
  marks: tuple[pytest.MarkDecorator, ...] = ()


# The one place to add an implementation to the suite.
SUBJECTS = (
  Subject("reference", "reference", ANY),
  Subject("xla", "xla", ANY),
  Subject("triton", "triton", KERNELS),  # interpreted on a CPU
  Subject("triton-gpu", "triton", KERNELS, (pytest.mark.gpu,)),
)


def _param(subject: Subject, *values: Any, fast: bool = True, name: str = ""):
  slow = not fast and pytest.mark.gpu not in subject.marks
  return pytest.param(
    subject,
    *values,
    id=f"{subject.name}-{name}" if name else subject.name,
    marks=(*subject.marks, *[pytest.mark.slow][:slow]),
  )


def _for_each(names: str, cases: Callable[[Subject], list[Any]]) -> Any:
  """Parametrizes a test by the cases of every subject."""
  return pytest.mark.parametrize(
    names, [case for subject in SUBJECTS for case in cases(subject)]
  )


every_subject = _for_each(
  "subject", lambda subject: [_param(subject, fast=subject.calls.by_hand)]
)

MODES = ("full", "tail", "rows", "packed")


def _factors(calls: Calls) -> dict[str, Any]:
  return {
    "config": calls.configs,
    # full: T = S. tail: the last rows by default. rows: an offset per batch
    # row, queries before the first and after the last token among them. packed:
    # several segments and padding.
    "mode": MODES,
    "groups": calls.groups,
    "widths": calls.widths,
    "keys": calls.keys,
    "dtype": calls.dtypes,
    # own_query: a separate query for the compressed branch and selection.
    "extra": ("none", "own_query", "block_ids"),
  }


def case_name(case: dict[str, Any]) -> str:
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


def check_case(implementation: Any, case: dict[str, Any]) -> None:
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
    oracle.assert_ids(ids, oracle.scores(inputs), helpers.score_atol(dtype))
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
  blocks = count_selection(dims.keys, dims.config)
  rng = np.random.default_rng(seed)
  ids = np.full((dims.batch, dims.queries, dims.kv_heads, width), -1, np.int32)
  for index in np.ndindex(*ids.shape[:3]):
    count = rng.integers(0, min(width, blocks) + 1)
    ids[index][:count] = np.sort(rng.permutation(blocks)[:count])
  return ids


def _cases(subject: Subject) -> list[Any]:
  """Cases that hold every pair of values of every two factors."""
  cases = helpers.pairwise(_factors(subject.calls))
  return [
    _param(
      subject, case, fast=i % subject.calls.step == 0, name=case_name(case)
    )
    for i, case in enumerate(cases)
  ]


@_for_each("subject, case", _cases)
def test_matches_oracle(subject: Subject, case: dict[str, Any]) -> None:
  check_case(subject.implementation, case)


@pytest.mark.slow
@pytest.mark.parametrize(
  "subject", [_param(s) for s in SUBJECTS if s.calls is ANY]
)
@pytest.mark.parametrize("config", ANY.configs + ANY.more_configs, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matches_oracle_everywhere(
  subject: Subject, mode: str, config: NSAConfig
) -> None:
  """Every combination of config, mode, groups and dtype, once each.

  These four are crossed. keys, widths and extra are not: their combinations
  take turns from one case to the next, so that each of them meets some of the
  product and none meets all of it.
  """
  factors = _factors(ANY)
  configs = ANY.configs + ANY.more_configs
  first = configs.index(config) + MODES.index(mode)
  combinations = list(
    itertools.product(*(factors[n] for n in ("keys", "widths", "extra")))
  )
  rest = itertools.islice(itertools.cycle(combinations), 16 * first, None)
  for groups, dtype in itertools.product(factors["groups"], factors["dtype"]):
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
      check_case(subject.implementation, case)
    except AssertionError as error:
      raise AssertionError(case_name(case)) from error
  jax.clear_caches()


# ------------------------------------------------------------- the primitives


def _branch_calls(
  implementation: Any,
  config: NSAConfig,
  keys: int,
  branches: tuple[str, ...],
  block_ids: Any = None,
  **kwargs: Any,
) -> dict[str, Callable]:
  """Per branch f(query, key, value) -> (out, lse)."""
  full = kwargs | {"implementation": implementation}
  common = full | {"config": config}
  calls: dict[str, Callable] = {
    "compressed": lambda *qkv: nsa_jax.compressed_attention(
      *qkv, key_length=keys, **common
    ),
    "selected": lambda q, k, v: nsa_jax.selected_attention(
      q, k, v, block_ids, **common
    ),
    "window": lambda *qkv: nsa_jax.window_attention(*qkv, **common),
    "full": lambda *qkv: nsa_jax.full_attention(*qkv, return_lse=True, **full),
  }
  return {name: calls[name] for name in branches}


@functools.cache
def _primitives(
  implementation: Any,
  config: NSAConfig,
  keys: int,
  branches: tuple[str, ...],
  scores: bool,
) -> Callable:
  """A jitted function: (out, lse) and gradients of all, scores, ids."""

  @jax.jit
  def run(
    inputs: Any, douts: Any, dlses: Any, integers: Any, ids_given: Any
  ) -> Any:
    kwargs = integers | {"scale": SCALE}
    calls = _branch_calls(
      implementation, config, keys, branches, ids_given, **kwargs
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
    if scores:
      results["scores"] = nsa_jax.block_scores(*arguments, **common)
    results["ids"] = nsa_jax.select_blocks(*arguments, **common)
    return results

  return run


SCALE = 0.3  # not 1/sqrt(H)


def _rows(oracle: Oracle, ids: Any) -> dict[str, Callable]:
  """Per branch, the key rows that a query reads."""
  return {
    "compressed": lambda b, i, k: oracle.compressed_rows(b, i),
    "selected": lambda b, i, k: oracle.selected_rows(b, i, ids[b, i, k]),
    "window": lambda b, i, k: oracle.window_rows(b, i),
    "full": lambda b, i, k: oracle.full_rows(b, i),
  }


def _primitive_cases(subject: Subject) -> list[Any]:
  calls = subject.calls
  cases = [(calls.configs[0], True, "float32", True)]
  cases += [((calls.configs + calls.more_configs)[-1], False, "bfloat16", True)]
  if "float64" in calls.dtypes:
    cases += [(calls.configs[1], False, "float64", False)]
  return [
    _param(
      subject,
      config,
      packed,
      dtype,
      fast=fast,
      name=f"{'packed' if packed else 'offsets'}-{dtype}",
    )
    for config, packed, dtype, fast in cases
  ]


@_for_each("subject, config, packed, dtype", _primitive_cases)
def test_primitives(
  subject: Subject, config: NSAConfig, packed: bool, dtype: str
) -> None:
  """Each op alone: out, lse, the gradients through both, scores, poison."""
  calls = subject.calls
  dims = dataclasses.replace(calls.dims(queries=9), config=config)
  inputs = helpers.make_inputs(dims, dtype)
  inputs["full"] = inputs["window"]
  query = inputs["query"]
  offset = calls.unit * np.array([2, 24])  # the last lie behind the last key
  positions = offset[:, None] + np.arange(dims.queries)
  padding = positions >= dims.keys
  integers: dict[str, Any] = {"query_offset": helpers.int32(offset)}
  key_padding = np.zeros((2, dims.keys), bool)
  if packed:
    integers["segment_ids"] = segments = helpers.packed_segments(dims)
    # Callers that work chunk by chunk pass them; here equal to the default but
    # for one query that is declared padding.
    own = np.take_along_axis(segments, positions.clip(max=dims.keys - 1), 1)
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
  for seed, name in enumerate(calls.branches):
    douts[name] = helpers.make_cotangent(dims, dtype, seed)
    dlses[name] = helpers.normal(
      rng, query.shape[:3], helpers.score_dtype(dtype)
    )
  ids_given = _any_ids(dims, width=4)
  run = _primitives(
    subject.implementation,
    config,
    dims.keys,
    calls.branches,
    "block_scores" in calls.ops,
  )
  with jax.enable_x64(dtype == "float64"):
    results = jax.device_get(run(inputs, douts, dlses, integers, ids_given))

  rows = _rows(oracle, ids_given)
  score_dtype = helpers.score_dtype(dtype)
  for name in calls.branches:
    see = rows[name]
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
  oracle.assert_ids(results["ids"], scores, helpers.score_atol(dtype))

  # NaN and inf in padding rows of queries, in cotangents of queries that read
  # nothing, in padding keys and in keys after the last query: not one bit
  # changes.
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
    "full": helpers.poison(inputs["full"], hidden),
  }
  nothing = {name: results[name][0][1] == -np.inf for name in calls.branches}
  assert (nothing["selected"] > padding[..., None]).any()
  with jax.enable_x64(dtype == "float64"):
    again = run(
      poisoned,
      {name: helpers.poison(x, nothing[name]) for name, x in douts.items()},
      {name: helpers.poison(x, nothing[name]) for name, x in dlses.items()},
      integers,
      ids_given,
    )
  helpers.assert_same_bits(again, results)


@every_subject
def test_out_alone(subject: Subject) -> None:
  """`return_lse=False` gives the same out; its gradient is that of out."""
  dims = subject.calls.dims()
  inputs = helpers.make_inputs(dims, "float32")
  qkv = (inputs["query"], *inputs["window"])
  dout = helpers.make_cotangent(dims, "float32")
  implementation = {"implementation": subject.implementation}
  calls: dict[str, Callable] = {
    "window": functools.partial(
      nsa_jax.window_attention, config=dims.config, **implementation
    ),
    "full": functools.partial(nsa_jax.full_attention, **implementation),
  }

  @functools.partial(jax.jit, static_argnames="name")
  def run(qkv: Any, dout: Any, name: str) -> Any:
    (out, lse), both = jax.vjp(calls[name], *qkv)
    alone, pullback = jax.vjp(
      functools.partial(calls[name], return_lse=False), *qkv
    )
    zeros = jnp.zeros_like(lse)
    return (out, both((dout, zeros))), (alone, pullback(dout))

  for name in calls.keys() & set(subject.calls.branches):
    with_lse, without = run(qkv, dout, name)
    helpers.assert_same_bits(without[0], with_lse[0], what=name)
    helpers.assert_close(without, with_lse, "float32", gradient=1, what=name)


@every_subject
def test_key_offset_of_the_window(subject: Subject) -> None:
  """A shard of the keys with its halo gives the rows of the whole."""
  dims = subject.calls.dims(queries=16, keys=16)
  inputs = helpers.make_inputs(dims, "float32")

  def attend(query: Any, key: Any, value: Any, **offsets: Any) -> Any:
    call = functools.partial(
      nsa_jax.window_attention,
      **offsets,
      config=dims.config,
      implementation=subject.implementation,
    )
    return jax.device_get(jax.jit(call)(query, key, value))

  whole = attend(inputs["query"], *inputs["window"])
  # Keys 4..11 serve the queries 8..11: the window has 5 tokens.
  first, start, stop = (subject.calls.unit * i for i in (4, 8, 12))
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


@every_subject
@pytest.mark.parametrize("key_offset", [4, -3])
def test_key_offset_with_segments(subject: Subject, key_offset: int) -> None:
  """Segments belong to key rows, and each batch row has its own offset."""
  unit = subject.calls.unit
  dims = subject.calls.dims(queries=9, keys=21)
  config = dims.config
  inputs = helpers.make_inputs(dims, "float32")
  segments = np.zeros((2, dims.keys), np.int32)
  # Without compressed blocks nothing has to be aligned.
  segments[0, : 7 * unit], segments[0, 7 * unit : 18 * unit] = 2, 1
  segments[1, 2:] = 3
  # Row 0 begins before the keys, row 1 ends behind them.
  offset = helpers.int32([key_offset - 2, key_offset + 15 * unit])
  oracle = Oracle(
    config,
    dims.keys,
    dims.queries,
    dims.batch,
    offset,
    segment_ids=segments,
    key_offset=key_offset,
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
        implementation=subject.implementation,
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


def _property_cases(subject: Subject) -> list[Any]:
  """First, some that take each value in turn; in the slow tier all pairs."""
  calls = subject.calls
  factors: dict[str, Any] = {
    "config": calls.configs + calls.more_configs,
    "groups": calls.property_groups,
    "widths": calls.property_widths,
    "dtype": ("float32", "bfloat16", "float16"),
    "keys": calls.property_keys,
  }
  columns = [
    itertools.islice(itertools.cycle(values), calls.properties)
    for values in factors.values()
  ]
  rows = zip(*columns, strict=True)
  fast = [dict(zip(factors, row, strict=True)) for row in rows]
  slow = [c for c in helpers.pairwise(factors) if c not in fast]
  return [
    _param(
      subject,
      case,
      fast=case in fast,
      name=case_name(case | {"mode": "full", "extra": "none"}),
    )
    for case in fast + slow
  ]


for_property_cases = _for_each("subject, case", _property_cases)


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
  subject: Subject, case: dict[str, Any]
) -> None:
  """Property 1: all blocks, or a window as long as the row; so is the op."""
  dims, dtype = _property_dims(case), case["dtype"]
  length = dims.keys
  config = dataclasses.replace(dims.config, window=length)
  query, (key, value) = (
    helpers.make_inputs(dims, dtype)[n] for n in ("query", "selected")
  )
  expected, expected_lse = Oracle(config, length, length, 2).attend(
    query, key, value, lambda b, i, k: range(i + 1), dims.head_dim**-0.5
  )
  blocks = np.arange(count_selection(length, config), dtype=np.int32)
  ids = np.broadcast_to(blocks, (2, length, dims.kv_heads, blocks.size))

  branches = tuple(b for b in subject.calls.branches if b != "compressed")
  calls = _branch_calls(subject.implementation, config, length, branches, ids)

  @jax.jit
  def run(*qkv: Any) -> Any:
    return {name: call(*qkv) for name, call in calls.items()}

  for name, (out, lse) in run(query, key, value).items():
    helpers.assert_close(out, expected, dtype, what=name)
    helpers.assert_close(lse, expected_lse, "float32", what=name)


@_for_each(
  "subject", lambda s: [_param(s)] if "block_scores" in s.calls.ops else []
)
def test_equal_blocks_score_their_probability(subject: Subject) -> None:
  """Property 2: with l = d = l', p_slc = p_cmp, summed over the group."""
  config = next(
    c
    for c in subject.calls.configs
    if c.compression_block == c.compression_stride == c.selection_block
  )
  block = config.selection_block
  length = 7 * block + 1
  dims = Dims(config, queries=length, keys=length)
  inputs = helpers.make_inputs(dims, "float32")
  query, key = inputs["query"], inputs["compressed"].key
  call: Any = {
    "config": config,
    "key_length": length,
    "implementation": subject.implementation,
  }

  @jax.jit
  def run(query: Any, key: Any, value: Any) -> Any:
    _, lse = nsa_jax.compressed_attention(query, key, value, **call)
    return nsa_jax.block_scores(query, key, lse, **call)

  scores = run(query, key, key)
  logits = np.einsum(
    "btkgh,bckh->btkgc",
    float64(query).reshape(2, length, 2, 2, 16) / 4,
    float64(key),
  )
  visible = block * np.arange(1, 8) <= np.arange(1, length + 1)[:, None]
  weights = np.where(visible[:, None, None], np.exp(logits), 0)
  p = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  assert scores.shape == (2, length, 2, 8)
  helpers.assert_close(scores[..., :7], p.sum(3), "float32")
  assert not scores[..., 7].any()  # the last token: no complete block


def _segments(dims: Dims) -> dict[str, Any]:
  return {"segment_ids": np.ones((dims.batch, dims.keys), np.int32)}


@for_property_cases
def test_causality_is_bitwise(subject: Subject, case: dict[str, Any]) -> None:
  """Property 3, through phi: values and gradients know no future."""
  dims, dtype = _property_dims(case), case["dtype"]
  run = helpers.pipeline_vjp(subject.implementation, dims.config)
  tokens = helpers.make_tokens(dims, dtype)
  other = helpers.make_tokens(dims, dtype, seed=9)
  for last in (0, 7, 14, dims.keys - 2):
    cut = last + 1

    def change(x: Any, y: Any, cut: int = cut) -> Any:
      return np.concatenate([x[:, :cut], y[:, cut:]], axis=1)

    dout = helpers.make_cotangent(dims, dtype)
    dout[:, cut:] = 0
    results = [
      jax.device_get(run(t, _segments(dims), dout))
      for t in (tokens, jax.tree.map(change, tokens, other))
    ]
    for grad in jax.tree.leaves([r[2] for r in results]):
      assert not np.asarray(grad)[:, cut:].any()
    past = [jax.tree.map(lambda x, cut=cut: x[:, :cut], r) for r in results]
    helpers.assert_same_bits(past[0], past[1], what=f"t <= {last}: ")


@for_property_cases
def test_chunks_and_decode_steps_equal_one_pass(
  subject: Subject, case: dict[str, Any]
) -> None:
  """Property 4, and what lies behind a call's last query may hold NaN."""
  dims, dtype = _property_dims(case), case["dtype"]
  config, length = dims.config, dims.keys
  tokens = _clear_tokens(dims, dtype)
  inputs = jax.tree.map(np.asarray, _compress(tokens, config, None))
  oracle = Oracle(config, length, length, dims.batch)
  run = helpers.native(subject.implementation, config)
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
    for name in BRANCHES:
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


@every_subject
def test_offsets_of_every_integer_type(subject: Subject) -> None:
  """Narrow and unsigned types: nothing wraps around."""
  rng = np.random.default_rng(0)
  query: Any = rng.normal(size=(1, 2, 2, 16)).astype(np.float32)
  key, value = rng.normal(size=(2, 1, 300, 1, 16)).astype(np.float32)

  def run(offset):
    return nsa_jax.window_attention(
      query,
      key,
      value,
      config=NSAConfig(window=200),
      query_offset=offset,
      implementation=subject.implementation,
    )

  for offset in (100, 0):
    want = run(offset)
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
      helpers.assert_close(
        run(jnp.asarray(offset, dtype)), want, "float32", what=dtype
      )
  out, _ = run(jnp.asarray(2**32 - 1, "uint32"))
  assert not np.asarray(out).any()


@every_subject
def test_static_and_default_offsets(subject: Subject) -> None:
  """An int, an int32 scalar and the default name the same queries."""
  dims = subject.calls.dims(queries=8)
  offset = dims.keys - dims.queries
  inputs = helpers.make_inputs(dims, "float32")
  run = helpers.native(subject.implementation, dims.config)
  expected = helpers.native(
    subject.implementation, dims.config, query_offset=offset
  )(inputs, {})
  oracle = Oracle(dims.config, dims.keys, dims.queries, dims.batch)
  helpers.assert_close(
    expected[0], oracle.native(inputs, expected[1]), "float32"
  )
  for name, integers in {
    "default": {},
    "scalar": {"query_offset": jnp.int32(offset)},
    "rows": {"query_offset": jnp.int32([offset, offset])},
  }.items():
    out, ids = run(inputs, integers)
    np.testing.assert_array_equal(ids, expected[1])
    helpers.assert_close(out, expected[0], "float32", what=name)


@for_property_cases
def test_permutations(subject: Subject, case: dict[str, Any]) -> None:
  """Property 5: batch rows and key/value heads are independent."""
  dims, dtype = _property_dims(case), case["dtype"]
  run = helpers.pipeline_vjp(subject.implementation, dims.config)
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
  subject: Subject, case: dict[str, Any]
) -> None:
  """Property 6, through phi: outputs, ids and gradients."""
  dims, dtype = _property_dims(case), case["dtype"]
  config, block = dims.config, dims.config.selection_block
  run = helpers.pipeline_vjp(subject.implementation, config)
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


def _non_finite_cases(subject: Subject) -> list[Any]:
  groups = ((2, 2), (1, 16)) if subject.calls is KERNELS else ((2, 2),)
  return [
    _param(subject, *g, name=f"{g[0]}x{g[1]}", fast=g == groups[0])
    for g in groups
  ]


@_for_each("subject, kv_heads, group", _non_finite_cases)
def test_what_is_not_finite_is_seen(
  subject: Subject, kv_heads: int, group: int
) -> None:
  """A NaN or an infinity shows wherever it is read.

  It shows nowhere else in outputs, if it is in a query, a key or a gate. A
  product with an unread value or key is 0 * NaN: such a NaN may spread, but not
  further than in the dense products of `reference`. The gradients of keys and
  values are sums over queries: what is not finite in a cotangent may spread
  over their batch row and head.
  """
  dims = subject.calls.dims(kv_heads=kv_heads, group=group)
  inputs = helpers.make_inputs(dims, "float32")
  oracle = Oracle(dims.config, dims.keys, dims.queries, dims.batch)
  run = helpers.native_vjp(subject.implementation, dims.config)
  reference = helpers.native_vjp("reference", dims.config)
  middle = dims.keys // 2
  places = {
    "query": (0, middle, 1, 3),
    "compressed": (0, 1, kv_heads - 1, 3),
    "selected": (0, middle, kv_heads - 1, 3),
    "window": (0, middle, kv_heads - 1, 3),
    "gates": (0, middle, 1, 1),
    "dout": (0, middle, 1, 3),
  }
  for name, part, value in itertools.product(
    places, (0, 1), (np.nan, np.inf, -np.inf)
  ):
    call = {**inputs, "dout": helpers.make_cotangent(dims, "float32")}
    is_pair = isinstance(call[name], nsa_jax.KV)
    if part and not is_pair:
      continue
    arrays = [x.copy() for x in (call[name] if is_pair else [call[name]])]
    arrays[part][places[name]] = value
    call[name] = helpers.pair(*arrays) if is_pair else arrays[0]
    dout = call.pop("dout")
    out, ids, grads = jax.device_get(run(call, {}, dout))
    with np.errstate(all="ignore"):
      expected = oracle.native(call, ids), oracle.native_vjp(call, ids, dout)
    most = jax.device_get(reference(call, {}, dout))
    message = f"{value} in {name}, part {part}"
    np.testing.assert_array_equal(ids, most[1], err_msg=message)
    read, found, bound = (
      jax.tree.map(lambda x: ~np.isfinite(x), x)
      for x in (expected, (out, grads), (most[0], most[2]))
    )
    assert read[0].any() or name == "dout"
    if name in ("gates", "dout"):  # A gate makes that of its branch.
      for pair in (bound[1][branch] for branch in BRANCHES):
        for x in pair:
          x[0, :, places[name][2] // group] = True
    if name == "query" or (name != "dout" and not part):
      np.testing.assert_array_equal(found[0], read[0], err_msg=message)
      np.testing.assert_array_equal(bound[0], read[0], err_msg=message)
    for (path, seen), want, may in zip(
      jax.tree.leaves_with_path(found),
      jax.tree.leaves(read),
      jax.tree.leaves(bound),
      strict=True,
    ):
      where = f"{message}: {jax.tree_util.keystr(path)}"
      assert not (want & ~seen).any(), f"hidden, {where}"
      assert not (seen & ~may).any(), f"more than in `reference`, {where}"


@every_subject
def test_forced_blocks_rank_above_infinite_scores(subject: Subject) -> None:
  """With an lse that is not of these scores, they may overflow."""
  config, unit = subject.calls.configs[0], subject.calls.unit
  length = 8 * config.selection_block
  blocks = count_compressed(length, config)
  ids = nsa_jax.select_blocks(
    jnp.ones((1, 2 * unit, 1, 16)),
    jnp.ones((1, blocks, 1, 16)),
    jnp.full((1, 2 * unit, 1), -100.0),
    config=config,
    key_length=length,
    implementation=subject.implementation,
  )
  # The initial block, the first of the equal ones, the query's own.
  assert ids[0, -1, 0].tolist() == [0, 1, 7]


@_for_each("subject, kv_heads, group", _non_finite_cases)
def test_what_is_not_finite_shows_in_lse(
  subject: Subject, kv_heads: int, group: int
) -> None:
  dims = subject.calls.dims(kv_heads=kv_heads, group=group)
  oracle = Oracle(dims.config, dims.keys, dims.queries, dims.batch)
  inputs = helpers.make_inputs(dims, "float32")
  inputs["full"] = inputs["selected"]
  inputs["query"][0, dims.keys // 2, 1, 3] = np.nan
  for branch in subject.calls.branches:
    inputs[branch].key[1, 1, 0, 5] = np.nan
  ids = _any_ids(dims, width=2)
  calls = _branch_calls(
    subject.implementation, dims.config, dims.keys, subject.calls.branches, ids
  )
  rows = _rows(oracle, ids)
  found = jax.jit(
    lambda inputs: {
      name: call(inputs["query"], *inputs[name]) for name, call in calls.items()
    }
  )(inputs)
  for name, results in found.items():
    key, value = inputs[name]
    expected = oracle.attend(inputs["query"], key, value, rows[name], 0.25)
    assert np.isnan(expected[1]).any()
    for result, want in zip(results, expected, strict=True):
      np.testing.assert_array_equal(np.isnan(result), np.isnan(want), name)


@every_subject
def test_one_segment_changes_nothing(subject: Subject) -> None:
  """Rows that are one segment equal rows without segments."""
  dims = subject.calls.dims()
  run = helpers.pipeline_vjp(subject.implementation, dims.config)
  tokens = helpers.make_tokens(dims, "float32", seed=3)
  dout = helpers.make_cotangent(dims, "float32")
  ones = run(tokens, _segments(dims), dout)
  none = run(tokens, {}, dout)
  np.testing.assert_array_equal(ones[1], none[1])
  helpers.assert_close(
    (ones[0], ones[2]), (none[0], none[2]), "float32", gradient=1
  )


@every_subject
def test_traced_misaligned_segments_leak_nothing(subject: Subject) -> None:
  """Starts inside a block: no token of another segment is felt, bit for bit."""
  dims = subject.calls.dims()
  run = helpers.pipeline_vjp(subject.implementation, dims.config)
  segments = np.zeros((2, 29), np.int32)
  segments[0, :5], segments[0, 5:18], segments[0, 19:] = 3, 1, 2
  segments[1, 3:12], segments[1, 12:27] = 5, 4
  segments = segments.repeat(subject.calls.unit, axis=1)
  tokens = helpers.make_tokens(dims, "float32")
  other = helpers.make_tokens(dims, "float32", seed=9)
  for b, segment in ((0, 3), (0, 1), (0, 2), (1, 5), (1, 4)):
    inside = np.zeros(segments.shape, bool)
    inside[b] = segments[b] == segment

    def keep(x: Any, y: Any, inside: np.ndarray = inside) -> np.ndarray:
      return np.where(inside[..., None, None], x, y)

    dout = helpers.make_cotangent(dims, "float32")
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


@every_subject
def test_queries_of_other_segments(subject: Subject) -> None:
  """query_segment_ids decides: another segment of the keys, or none of them."""
  dims, unit = subject.calls.dims(), subject.calls.unit
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  segments = helpers.packed_segments(dims)
  own = segments.copy()
  own[0, 13 * unit : 20 * unit] = 7  # reads the first document from the second
  own[0, 3 * unit] = 2  # a document that begins later
  # One that the keys do not have.
  own[0, 21 * unit : 24 * unit] = own[1, : 12 * unit] = 99
  own[1, 12 * unit :] = 4
  integers = {"segment_ids": segments, "query_segment_ids": own}
  oracle = Oracle(
    dims.config,
    dims.keys,
    dims.queries,
    dims.batch,
    segment_ids=segments,
    query_segment_ids=own,
  )
  out, ids, grads = helpers.native_vjp(subject.implementation, dims.config)(
    inputs, integers, dout
  )
  assert not np.asarray(out)[own == 99].any()
  oracle.assert_ids(ids, oracle.scores(inputs))
  helpers.assert_close(out, oracle.native(inputs, ids), "float32")
  helpers.assert_close(
    grads, oracle.native_vjp(inputs, ids, dout), "float32", gradient=1
  )


@every_subject
def test_rows_outside_the_keys_are_padding(subject: Subject) -> None:
  """Query rows before 0 and from S on: 0, -1, no gradient, poison or not.

  So are keys after the last query.
  """
  dims = subject.calls.dims(queries=8)
  run = helpers.native_vjp(subject.implementation, dims.config)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  offset = np.array([-3, dims.keys - 4])
  positions = offset[:, None] + np.arange(dims.queries)
  outside = (positions < 0) | (positions >= dims.keys)
  assert outside.sum() == 3 + dims.queries - 4
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
  for name in BRANCHES:
    needs = np.arange(inputs[name].key.shape[1])
    if name == "compressed":
      config = dims.config
      needs = config.compression_stride * needs + config.compression_block - 1
    bad[name] = helpers.poison(inputs[name], needs > last)
  dirty = run(bad, integers, helpers.poison(dout, outside))
  helpers.assert_same_bits(dirty, clean)


@every_subject
@pytest.mark.parametrize("offset", [12, 2**31 - 1, -40])
def test_queries_beyond_the_keys_read_nothing(
  subject: Subject, offset: int
) -> None:
  """A finished row of a decode batch: no key reaches a gradient."""
  query: Any = np.ones((1, 4, 2, 16), np.float32)
  key: Any = np.full((1, 12, 1, 16), np.nan, np.float32)

  def loss(query: Any, key: Any) -> Any:
    out, lse = nsa_jax.window_attention(
      query,
      key,
      key,
      config=subject.calls.configs[0],
      query_offset=offset,
      implementation=subject.implementation,
    )
    return out.sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  value, grads = run(query, key)
  assert value == 0
  assert all((np.asarray(x) == 0).all() for x in grads)


@for_property_cases
def test_a_second_run_has_the_same_bits(
  subject: Subject, case: dict[str, Any]
) -> None:
  """Nothing depends on the order in which programs of a kernel run."""
  dims, dtype = _property_dims(case), case["dtype"]
  run = helpers.pipeline_vjp(subject.implementation, dims.config)
  tokens = helpers.make_tokens(dims, dtype)
  dout = helpers.make_cotangent(dims, dtype)
  helpers.assert_same_bits(
    run(tokens, _segments(dims), dout), run(tokens, _segments(dims), dout)
  )


# ----------------------------------------------- rows longer than one chunk


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes `xla` loop over queries at test sizes; the others do not notice."""
  monkeypatch.setattr("nsa_jax.xla.chunks.CHUNK_ELEMENTS", 2**12)


@every_subject
@pytest.mark.usefixtures("small_chunks")
def test_long_rows(subject: Subject) -> None:
  """Many chunks, the last one incomplete, with segments and offsets."""
  dims = dataclasses.replace(
    subject.calls.dims(), queries=150, keys=150, kv_heads=1
  )
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  segments = np.zeros((2, 150), np.int32)
  segments[0, :61], segments[0, 64:] = 1, 2
  segments[1, 16:139] = 1
  integers = {
    "query_offset": helpers.int32([-20, 7]),
    "segment_ids": segments,
  }
  oracle = Oracle(
    dims.config,
    dims.keys,
    dims.queries,
    dims.batch,
    offset=integers["query_offset"],
    segment_ids=segments,
  )
  out, ids, grads = helpers.native_vjp(subject.implementation, dims.config)(
    inputs, integers, dout
  )
  oracle.assert_ids(ids, oracle.scores(inputs))
  helpers.assert_close(out, oracle.native(inputs, ids), "float32")
  helpers.assert_close(
    grads, oracle.native_vjp(inputs, ids, dout), "float32", gradient=1
  )


@every_subject
@pytest.mark.usefixtures("small_chunks")
def test_gradients_accumulate_in_float32(subject: Subject) -> None:
  """A sum over all queries kept in bfloat16 would stop growing on the way.

  Every query reads block 0; with a cotangent of ones nothing cancels, and its
  dv is a sum of about a thousand probabilities near one in three blocks.
  """
  config = subject.calls.configs[0]
  dims = Dims(config, 1, 1024, 1024, kv_heads=1, group=1, value_dim=16)
  inputs = helpers.make_inputs(dims, "bfloat16")
  dout = np.ones_like(helpers.make_cotangent(dims, "bfloat16"))
  _, ids, actual = helpers.native_vjp(subject.implementation, dims.config)(
    inputs, {}, dout
  )
  wide = jax.tree.map(helpers.float32, inputs)
  _, _, expected = helpers.native_vjp("reference", dims.config)(
    wide, {"block_ids": ids}, helpers.float32(dout)
  )
  # It would stop where half a unit in the last place is more than one of them.
  stop = 128 / config.selection_block
  assert np.max(expected["selected"].value) > 1.5 * stop
  helpers.assert_close(actual, expected, "bfloat16", gradient=1)


# ------------------------------------------------------------------- gradients


@every_subject
def test_gradients_match_float64_autodiff(subject: Subject) -> None:
  """Property 7: float32 against autodiff of the reference in float64."""
  dims = subject.calls.dims(queries=13, keys=21)
  inputs = helpers.make_inputs(dims, "float32", compressed_query=True)
  dout = helpers.make_cotangent(dims, "float32")
  out, ids, grads = helpers.native_vjp(subject.implementation, dims.config)(
    inputs, {}, dout
  )
  wide = jax.tree.map(float64, (inputs, dout))
  with jax.enable_x64(True):
    expected = helpers.native_vjp("reference", dims.config)(
      wide[0], {"block_ids": np.asarray(ids)}, wide[1]
    )
  assert expected[0].dtype == np.float64
  helpers.assert_close(out, expected[0], "float32")
  helpers.assert_close(grads, expected[2], "float32", gradient=1)


@pytest.mark.parametrize(
  "subject", [_param(s) for s in SUBJECTS if s.calls is ANY]
)
def test_finite_differences(subject: Subject) -> None:
  """Float64, through out and lse of all ops; forward mode where it exists."""
  config = NSAConfig(4, 2, 4, 2, 0, 1, 3)
  dims = Dims(config, batch=1, queries=9, keys=11, kv_heads=1, head_dim=4)
  rng = np.random.default_rng(6)
  inputs = helpers.make_inputs(dims, "float64", compressed_query=True)
  ids = _any_ids(dims, width=2)
  branches = subject.calls.branches
  douts = {b: rng.standard_normal((1, 9, 2, 8)) for b in (*branches, "all")}
  dlses = {b: rng.standard_normal((1, 9, 2)) for b in branches}
  tangent = jax.tree.map(lambda x: rng.standard_normal(x.shape), inputs)

  def loss(inputs: Any, ids: Any, douts: Any, dlses: Any) -> jax.Array:
    calls = _branch_calls(subject.implementation, config, 11, branches, ids)
    total = jnp.zeros(())
    for name, call in calls.items():
      kv = inputs["window" if name == "full" else name]
      out, lse = call(inputs["query"], *kv)
      total += (out * douts[name]).sum()
      total += jnp.where(jnp.isfinite(lse), lse * dlses[name], 0).sum()
    out = nsa_jax.native_sparse_attention(
      **inputs,
      block_ids=ids,
      config=config,
      implementation=subject.implementation,
    )
    return total + (out * douts["all"]).sum()

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
    _, forward = jax.jit(
      lambda x, v, rest: jax.jvp(lambda y: loss(y, *rest), (x,), (v,))
    )(inputs, tangent, rest)
    np.testing.assert_allclose(forward, slope, rtol=1e-12)
