"""Bad input: every message names the argument, its value and the rule.

Names are matched as an opening backtick and the name, so that a message may
say `compressed` or `compressed.key`; values and rules by a key word.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig, sampling
from nsa_jax.layers import core, linen
from tests import helpers

# S = T = 12, hence C = 5 and M = 3; N = 4, K = 2, H = 8, V = 6.
CONFIG = NSAConfig(4, 2, 4, 2, 0, 1, 3)
DIMS = helpers.Dims(
  CONFIG, queries=12, keys=12, head_dim=8, value_dim=6, kv_heads=2, group=2
)


def _says(
  call: Callable[[], Any],
  name: str,
  value: str,
  rule: str,
  error: type[Exception] = ValueError,
) -> None:
  with pytest.raises(error, match=f"`({name})") as info:
    call()
  message = str(info.value)
  assert value in message, message
  assert re.search(rule, message), message
  assert message.endswith("."), message


# ------------------------------------------------------------------ NSAConfig


@pytest.mark.parametrize(
  "change, name, value, rule",
  [
    *(
      ({name: 0}, name, "0", "at least 1|positive")
      for name in (
        "compression_block",
        "compression_stride",
        "selection_block",
        "num_selected",
        "num_local",
        "window",
      )
    ),
    ({"window": -3}, "window", "-3", "at least 1|positive"),
    ({"num_initial": -1}, "num_initial", "-1", "at least 0|negative"),
    # l = 32, d = 16, l' = 64, n = 16 by default
    ({"compression_block": 40}, "compression_block", "40", "multiple|divide"),
    ({"selection_block": 72}, "selection_block", "72", "multiple|divide"),
    ({"compression_block": 96}, "compression_block", "96", "selection_block"),
    ({"num_initial": 15}, "num_selected|num_initial", "17", "num_local"),
    ({"window": 2.5}, "window", "2.5", "integer"),
    ({"num_selected": True}, "num_selected", "True", "integer"),
    ({"selection_block": "64"}, "selection_block", "'64'", "integer"),
  ],
)
def test_config(
  change: dict[str, Any], name: str, value: str, rule: str
) -> None:
  _says(lambda: NSAConfig(**change), name, value, rule)


def test_config_limits_are_valid() -> None:
  """The rules are not stricter than they say."""
  NSAConfig(64, 64, 64, 1, 0, 1, 1)
  NSAConfig(1, 1, 1, 5, 2, 3, 1)
  config = NSAConfig(num_selected=np.int64(16))  # type: ignore[arg-type]
  assert config == NSAConfig()
  assert hash(config) == hash(NSAConfig())


# ---------------------------------------------------------------------- calls


def _arguments() -> dict[str, Any]:
  return helpers.make_inputs(DIMS, "float32") | {"config": CONFIG}


def _native(change: dict[str, Any]) -> Any:
  return nsa_jax.native_sparse_attention(**(_arguments() | change))


def _f32(*shape: int) -> Any:
  return np.zeros(shape, np.float32)


def _i32(*shape: int) -> Any:
  return np.zeros(shape, np.int32)


def _ids(*row: int) -> Any:
  return np.broadcast_to(helpers.int32(row), (2, 12, 2, len(row)))


def _segments(*row: int) -> Any:
  return helpers.int32([12 * [1], row])


_KEY, _VALUE = _f32(2, 12, 2, 8), _f32(2, 12, 2, 6)
_PAIR = helpers.pair(_KEY, _VALUE)

NATIVE: list[tuple[dict[str, Any], str, str, str]] = [
  # query
  ({"query": _f32(12, 4, 8)}, "query", "(12, 4, 8)", "rank|\\[B, T, N, H\\]"),
  ({"query": _i32(2, 12, 4, 8)}, "query", "int32", "floating"),
  ({"query": _f32(2, 12, 3, 8)}, "num_heads|query", "3", "multiple"),
  ({"query": _f32(2, 12, 4, 9)}, "query|compressed|key", "9", "head|H"),
  ({"query": _f32(3, 12, 4, 8)}, "query|compressed|key", "3", "batch|B"),
  # the pairs
  (
    {"compressed": helpers.pair(_f32(2, 6, 2, 8), _f32(2, 6, 2, 6))},
    "compressed",
    "6",
    "num_compressed_blocks|complete|\\b5\\b",
  ),
  (
    {"compressed": helpers.pair(_f32(2, 5, 1, 8), _f32(2, 5, 1, 6))},
    "compressed|selected",
    "1",
    "heads|K",
  ),
  ({"compressed": _f32(2, 5, 2, 8)}, "compressed", "", "pair|KV|key"),
  (
    {"selected": helpers.pair(_f32(2, 12, 2, 9), _VALUE)},
    "selected",
    "9",
    "head|H|\\b8\\b",
  ),
  (
    {"selected": helpers.pair(_KEY, _f32(2, 11, 2, 6))},
    "selected",
    "11",
    "length|key|\\b12\\b",
  ),
  (
    {"selected": helpers.pair(_KEY, _f32(2, 12, 2))},
    "selected",
    "(2, 12, 2)",
    "rank",
  ),
  (
    {"selected": helpers.pair(_KEY.astype(np.float16), _VALUE)},
    "selected",
    "float16",
    "dtype",
  ),
  (
    {"selected": helpers.pair(_KEY, _VALUE.astype(np.float16))},
    "selected",
    "float16",
    "dtype",
  ),
  (
    {"window": helpers.pair(_KEY, _f32(2, 12, 2, 7))},
    "window",
    "7",
    "\\b6\\b",  # V is one for all branches
  ),
  (
    {"window": helpers.pair(_f32(2, 11, 2, 8), _f32(2, 11, 2, 6))},
    "window",
    "11",
    "\\b12\\b",
  ),
  (
    {"window": helpers.pair(_f32(1, 12, 2, 8), _f32(1, 12, 2, 6))},
    "window",
    "1",
    "\\b2\\b",
  ),
  # gates
  ({"gates": _f32(2, 12, 4, 2)}, "gates", "(2, 12, 4, 2)", "3"),
  ({"gates": _f32(2, 12, 2, 3)}, "gates", "(2, 12, 2, 3)", "4"),
  ({"gates": _i32(2, 12, 4, 3)}, "gates", "int32", "floating"),
  # compressed_query
  (
    {"compressed_query": _f32(2, 12, 2, 8)},
    "compressed_query",
    "(2, 12, 2, 8)",
    "query",
  ),
  (
    {"compressed_query": _f32(2, 12, 4, 8).astype(np.float16)},
    "compressed_query",
    "float16",
    "dtype",
  ),
  # segments
  ({"segment_ids": _i32(2, 11)}, "segment_ids", "(2, 11)", "12"),
  ({"segment_ids": _f32(2, 12)}, "segment_ids", "float32", "integer"),
  (
    {"segment_ids": _segments(1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)},
    "segment_ids",
    "2",
    "multiple",
  ),
  (
    {"segment_ids": _segments(0, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3)},
    "segment_ids",
    "3",
    "multiple",
  ),
  (
    {"segment_ids": _segments(1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1)},
    "segment_ids",
    "8",
    "contiguous",
  ),
  (
    {"segment_ids": _segments(1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1)},
    "segment_ids",
    "4",
    "contiguous",
  ),
  (
    {"segment_ids": _segments(-1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1)},
    "segment_ids",
    "-1",
    "padding|at least 0|negative",
  ),
  (
    {"segment_ids": _i32(2, 12), "query_segment_ids": _i32(2, 11)},
    "query_segment_ids",
    "(2, 11)",
    "12",
  ),
  (
    {"segment_ids": _i32(2, 12), "query_segment_ids": _f32(2, 12)},
    "query_segment_ids",
    "float32",
    "integer",
  ),
  (
    {"query_segment_ids": _i32(2, 12)},
    "query_segment_ids",
    "",
    "`segment_ids`",
  ),
  # offsets
  ({"query_offset": _i32(3)}, "query_offset", "(3,)", "2"),
  ({"query_offset": _i32(2, 1)}, "query_offset", "(2, 1)", "shape|rank"),
  ({"query_offset": _f32(2)}, "query_offset", "float32", "integer"),
  ({"query_offset": 1.5}, "query_offset", "1.5", "integer"),
  # block ids: M = 3
  ({"block_ids": _ids(1, 0)}, "block_ids", "[1, 0]", "ascending"),
  ({"block_ids": _ids(1, 1)}, "block_ids", "[1, 1]", "ascending"),
  ({"block_ids": _ids(-1, 1)}, "block_ids", "[-1, 1]", "ascending"),
  ({"block_ids": _ids(1, 3)}, "block_ids", "3", "ascending|\\[0, 3\\)"),
  ({"block_ids": _ids(0, -2)}, "block_ids", "-2", "ascending|-1"),
  ({"block_ids": _ids()}, "block_ids", "0", "at least"),
  ({"block_ids": _i32(2, 12, 4, 2)}, "block_ids", "(2, 12, 4, 2)", "2"),
  ({"block_ids": _i32(2, 12, 2)}, "block_ids", "(2, 12, 2)", "rank"),
  ({"block_ids": _f32(2, 12, 2, 2)}, "block_ids", "float32", "integer"),
  # static arguments
  ({"config": None}, "config", "None", "NSAConfig"),
  ({"config": {"window": 3}}, "config", "window", "NSAConfig"),
  ({"scale": "big"}, "scale", "big", "number"),
  ({"scale": float("nan")}, "scale", "nan", "finite"),
  ({"implementation": "cuda"}, "implementation", "cuda", "reference.*xla"),
  ({"implementation": ()}, "implementation", "()", "reference.*xla"),
  (
    {"implementation": ("xla", "fast")},
    "implementation",
    "fast",
    "reference.*xla",
  ),
]


@pytest.mark.parametrize(
  "change, name, value, rule",
  NATIVE,
  ids=[f"{i}-{'-'.join(c[0])}" for i, c in enumerate(NATIVE)],
)
def test_native(
  change: dict[str, Any], name: str, value: str, rule: str
) -> None:
  _says(lambda: _native(change), name, value, rule)


_QUERY, _CMP = (
  _f32(2, 12, 4, 8),
  helpers.pair(_f32(2, 5, 2, 8), _f32(2, 5, 2, 6)),
)
_LSE = _f32(2, 12, 4)


def _call(op: str, change: dict[str, Any]) -> Any:
  """One of the primitives with valid arguments but for `change`."""
  base: dict[str, dict[str, Any]] = {
    "compressed_attention": {
      "key": _CMP.key,
      "value": _CMP.value,
      "key_length": 12,
    },
    "block_scores": {
      "compressed_key": _CMP.key,
      "lse": _LSE,
      "key_length": 12,
    },
    "select_blocks": {
      "compressed_key": _CMP.key,
      "lse": _LSE,
      "key_length": 12,
    },
    "selected_attention": {
      "key": _KEY,
      "value": _VALUE,
      "block_ids": _ids(0, 1),
    },
    "window_attention": {"key": _KEY, "value": _VALUE},
    "block_mass": {"key": _KEY},
  }
  arguments = {"query": _QUERY, "config": CONFIG} | base[op] | change
  return getattr(nsa_jax, op)(**arguments)


OPS = (
  "compressed_attention",
  "block_scores",
  "select_blocks",
  "selected_attention",
  "window_attention",
  "block_mass",
)
WITH_LENGTH = OPS[:3]


@pytest.mark.parametrize("op", OPS)
def test_what_all_primitives_check(op: str) -> None:
  """They validate by themselves, not only below the whole op."""
  key = "compressed_key" if op in OPS[1:3] else "key"
  cases: list[tuple[dict[str, Any], str, str, str]] = [
    ({"query": _f32(2, 4, 8)}, "query", "(2, 4, 8)", "rank"),
    ({"query": _i32(2, 12, 4, 8)}, "query", "int32", "floating"),
    ({"query": _f32(2, 12, 5, 8)}, "num_heads|query", "5", "multiple"),
    ({"query": _f32(2, 12, 4, 6)}, f"query|{key}", "6", "head|H|8"),
    ({"query": _QUERY.astype(np.float16)}, f"query|{key}", "float16", "dtype"),
    ({key: _f32(2, 12, 8)}, key, "(2, 12, 8)", "rank"),
    ({"config": "tiny"}, "config", "tiny", "NSAConfig"),
    ({"scale": float("inf")}, "scale", "inf", "finite"),
    ({"query_offset": _i32(5)}, "query_offset", "(5,)", "2"),
    ({"segment_ids": _i32(2, 13)}, "segment_ids", "(2, 13)", "12"),
    (
      {"segment_ids": _segments(1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1)},
      "segment_ids",
      "8",
      "contiguous",
    ),
    (
      {"segment_ids": _i32(2, 12), "query_segment_ids": _i32(2, 12, 1)},
      "query_segment_ids",
      "(2, 12, 1)",
      "12|rank",
    ),
    ({"implementation": "fastest"}, "implementation", "fastest", "xla"),
  ]
  if op != "window_attention":  # alone, it has no blocks to align to
    cases.append(
      (
        {"segment_ids": _segments(1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)},
        "segment_ids",
        "1",
        "multiple",
      )
    )
  if op in WITH_LENGTH:
    cases += [
      # C = 5 rows come from S = 12 or 13, not from 14 (C = 6).
      ({"key_length": 14}, f"{key}|key_length", "14", "\\b6\\b"),
      ({"key_length": -1}, "key_length", "-1", "at least|negative"),
      ({"key_length": 12.0}, "key_length", "12.0", "integer"),
    ]
  if op not in (*OPS[1:3], "block_mass"):
    cases += [
      ({"value": _f32(2, 7, 2, 6)}, "value", "7", "key|\\b12\\b|\\b5\\b"),
      ({"value": _f32(2, 12, 1, 6)}, "value", "1", "key|heads|\\b2\\b"),
    ]
  for change, name, value, rule in cases:
    _says(functools.partial(_call, op, change), name, value, rule)


@pytest.mark.parametrize(
  "op, change, name, value, rule",
  [
    *(
      case
      for op in OPS[1:3]
      for case in (
        (op, {"lse": _f32(2, 12, 2)}, "lse", "(2, 12, 2)", "4|N"),
        (op, {"lse": _f32(2, 12)}, "lse", "(2, 12)", "rank|N"),
        (op, {"lse": _i32(2, 12, 4)}, "lse", "int32", "float"),
      )
    ),
    (
      "selected_attention",
      {"block_ids": _ids(2, 0)},
      "block_ids",
      "[2, 0]",
      "ascending",
    ),
    (
      "selected_attention",
      {"block_ids": _i32(2, 11, 2, 2)},
      "block_ids",
      "(2, 11, 2, 2)",
      "12",
    ),
    ("window_attention", {"key_offset": 0.5}, "key_offset", "0.5", "integer"),
  ],
)
def test_what_one_primitive_checks(
  op: str, change: dict[str, Any], name: str, value: str, rule: str
) -> None:
  _says(lambda: _call(op, change), name, value, rule)


def test_static_arguments_are_not_traced() -> None:
  """A traced scale or length is refused by name, not by a jax error."""
  for op, name in (
    ("window_attention", "scale"),
    ("compressed_attention", "key_length"),
  ):

    def call(x: Any, op: str = op, name: str = name) -> Any:
      return _call(op, {name: x})

    _says(functools.partial(jax.eval_shape, call, 12), name, "", "static")


def test_traced_values_are_not_checked() -> None:
  """What is wrong only by value passes where the value is not known."""

  def call(ids: Any, segment_ids: Any) -> Any:
    return _native({"block_ids": ids, "segment_ids": segment_ids})

  out = jax.eval_shape(call, _ids(1, 0), _segments(*range(12)))
  assert out.shape == (2, 12, 4, 6)


# ------------------------------------------------------------ implementations


def test_an_implementation_that_cannot_says_why() -> None:
  """NotImplementedError with a reason, and a sequence falls through."""
  args = _arguments()
  triton: Any = "triton"
  for call in (
    lambda: nsa_jax.native_sparse_attention(**args, implementation=triton),
    lambda: _call("window_attention", {"implementation": ("triton",)}),
  ):
    _says(
      call, "implementation", "triton", r"triton'?\b.{9}", NotImplementedError
    )
  _says(
    lambda: _call("window_attention", {"implementation": "cudnn"}),
    "implementation",
    "cudnn",
    r"cudnn'?\b.{9}",
    NotImplementedError,
  )
  out = _call("window_attention", {"implementation": ("triton", "xla")})
  helpers.assert_same_bits(
    out, _call("window_attention", {"implementation": "xla"})
  )


def test_a_wrong_call_is_not_swallowed_by_the_fallback() -> None:
  _says(
    lambda: _native({"gates": _f32(1), "implementation": ("triton", "xla")}),
    "gates",
    "(1,)",
    "rank|3",
  )


# ------------------------------------------------------------------------ phi

_X = _f32(2, 12, 2, 8)
_PHI: dict[str, dict[str, np.ndarray]] = {
  "compress_mean": {},
  "compress_weighted": {"weight": _f32(2, 4)},
  "compress_linear": {"position": _f32(2, 4, 8), "weight": _f32(2, 32, 6)},
  "compress_mlp": {
    "position": _f32(2, 4, 8),
    "w1": _f32(2, 32, 5),
    "b1": _f32(2, 5),
    "w2": _f32(2, 5, 6),
    "b2": _f32(2, 6),
  },
}


@pytest.mark.parametrize("op", _PHI)
def test_compress(op: str) -> None:
  def call(**change: Any) -> Any:
    arguments = {"x": _X, **_PHI[op], "config": CONFIG} | change
    return getattr(nsa_jax, op)(**arguments)

  _says(lambda: call(x=_f32(2, 12, 8)), "x", "(2, 12, 8)", "rank")
  _says(lambda: call(x=_i32(2, 12, 2, 8)), "x", "int32", "float")
  _says(lambda: call(config=3), "config", "3", "NSAConfig")
  _says(lambda: call(segment_ids=_i32(2, 5)), "segment_ids", "(2, 5)", "12")
  _says(
    lambda: call(segment_ids=_f32(2, 12)), "segment_ids", "float32", "integer"
  )
  for name, value in _PHI[op].items():
    wrong_heads = np.zeros((3, *value.shape[1:]), np.float32)
    _says(
      functools.partial(call, **{name: wrong_heads}),
      name,
      str(wrong_heads.shape),
      "2|K",
    )
    wrong_rank = value[0]
    _says(
      functools.partial(call, **{name: wrong_rank}),
      name,
      str(wrong_rank.shape),
      "rank|shape",
    )
    _says(
      functools.partial(call, **{name: value.astype(np.int32)}),
      name,
      "int32",
      "float",
    )
    if name not in ("w2", "b2"):
      wrong_width = np.concatenate([value, value], axis=1)
      _says(
        functools.partial(call, **{name: wrong_width}),
        "|".join(_PHI[op]),  # w1 and b1 fix F together: either may be named
        str(wrong_width.shape[1]),
        "shape",
      )


@pytest.mark.parametrize(
  "function", ["num_compressed_blocks", "num_selection_blocks"]
)
def test_block_counts(function: str) -> None:
  count = getattr(nsa_jax, function)
  _says(lambda: count(-1, CONFIG), "length", "-1", "at least|negative")
  _says(lambda: count(1.5, CONFIG), "length", "1.5", "integer")
  _says(lambda: count(8, None), "config", "None", "NSAConfig")
  assert count(np.int32(8), CONFIG) > 0


def test_values_outside_int32_are_not_wrapped() -> None:
  """Two documents whose ids differ by 2^32 would become one."""
  wide: Any = np.array([[5] * 4 + [5 + 2**32] * 8])
  x: Any = np.ones((1, 12, 2, 8), np.float32)
  call: Any = functools.partial(
    nsa_jax.window_attention, x, x, x, config=NSAConfig(4, 2, 4, 3, 1, 1, 4)
  )
  _says(lambda: call(segment_ids=wide), "segment_ids", str(2**32 + 5), "int32")
  _says(lambda: call(query_offset=2**40), "query_offset", str(2**40), "int32")
  _says(lambda: call(key_offset=2**31), "key_offset", str(2**31), "int32")
  _says(lambda: NSAConfig(window=2**31), "window", str(2**31), "int32")


def test_constants_are_checked_inside_jit() -> None:
  """A NumPy array that a jitted function closes over is known."""
  x: Any = np.ones((1, 12, 2, 8), np.float32)
  config = NSAConfig(4, 2, 4, 3, 1, 1, 4)
  ids: Any = np.broadcast_to(np.array([1, 0], np.int32), (1, 12, 2, 2))
  misaligned: Any = np.array([[1] * 3 + [2] * 9], np.int32)

  def selected(query: Any) -> Any:
    return nsa_jax.selected_attention(query, x, x, ids, config=config)

  _says(lambda: jax.jit(selected)(x), "block_ids", "[1, 0]", "ascending")
  layer = nsa_jax.NativeSparseAttention(2, 1, 8, config=config)
  model = nsa_jax.TransformerLM(
    nsa_jax.TransformerConfig.preset("tiny", attention="full", nsa=config)
  )
  tokens: Any = np.zeros((1, 12), np.int32)
  for module, inputs in ((layer, x[..., 0]), (model, tokens)):

    def init(inputs: Any, module: Any = module) -> Any:
      return module.init(jax.random.key(0), inputs, segment_ids=misaligned)

    _says(
      functools.partial(jax.jit(init), inputs), "segment_ids", "3", "multiples"
    )


def test_what_else_is_refused() -> None:
  config = NSAConfig(4, 2, 4, 3, 1, 1, 4)
  x: Any = np.ones((1, 12, 2, 8), np.float32)
  ids: Any = np.ones((1, 12), np.int32)
  kwargs: dict[str, Any] = {"config": config, "key_length": 3}
  none = x[:, :0]
  _says(
    lambda: nsa_jax.compressed_attention(
      x[:, :3], none, none, implementation=cast(Any, "foo"), **kwargs
    ),
    "implementation",
    "foo",
    "one of",
  )
  window: Any = functools.partial(nsa_jax.window_attention, config=config)
  _says(
    lambda: window(x, x, x, segment_ids=ids, query_segment_ids=-ids),
    "query_segment_ids",
    "-1",
    "at least 0",
  )
  for shape in ((0, 12, 2, 8), (1, 0, 2, 8), (1, 12, 0, 8), (1, 12, 2, 0)):
    empty: Any = np.ones(shape, np.float32)
    call = functools.partial(window, empty, empty, empty)
    _says(call, "query", str(shape), "at least one")
  _says(lambda: window(x, x, x, scale=True), "scale", "True", "number")
  small = jnp.ones((1, 12, 2, 8), jnp.float8_e4m3fn)
  _says(lambda: window(small, small, small), "query", "float8", "float16")
  _says(lambda: window(cast(Any, None), x, x), "query", "None", "array")
  _says(
    lambda: nsa_jax.compress_mean(x, config=config, segment_ids=-ids),
    "segment_ids",
    "-1",
    "at least 0",
  )
  _says(
    lambda: nsa_jax.apply_rope(x, ids, cast(Any, None)),
    "config",
    "None",
    "RopeConfig",
  )
  _says(
    lambda: nsa_jax.TransformerConfig.preset("tiny", foo=1),
    "foo",
    "",
    "field of TransformerConfig",
  )
  layer = nsa_jax.NativeSparseAttention(2, 1, 8, config=config)
  _says(
    lambda: layer.init(jax.random.key(0), x[..., 0], sow_weights=True),
    "sow_weights",
    "True",
    "False",
  )


# --------------------------------------------- what the odd calls have found
# `test_wrong_arguments` tries many more values; these are the words.

_TOKENS, _INT_TOKENS = _f32(2, 4, 8), _i32(2, 4)
_OPTIONS = nsa_jax.AttentionConfig(
  num_heads=2, num_kv_heads=1, head_dim=4, nsa=CONFIG
)
_MODEL = nsa_jax.TransformerLM(
  nsa_jax.TransformerConfig.preset(
    "tiny",
    num_layers=1,
    model_dim=8,
    mlp_dim=8,
    vocab_size=16,
    nsa=CONFIG,
    attention="window",
  )
)


def _zeros(call: Callable[..., Any], *args: Any) -> Any:
  """The result of `call`, with zeros in place of what it computes."""
  shapes = jax.eval_shape(call, *args)
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _held(kind: Any = "nsa", dtype: Any = "float32") -> nsa_jax.cache.Cache:
  return _zeros(
    functools.partial(
      nsa_jax.cache.init,
      2,
      12,
      config=CONFIG,
      num_kv_heads=2,
      head_dim=8,
      kind=kind,
      dtype=dtype,
    )
  )


def _attend(held: Any) -> Any:
  return nsa_jax.cache.attend(
    _f32(2, 1, 4, 8), held, _f32(2, 1, 4, 3), config=CONFIG, query_offset=0
  )


def _layer(**fields: Any) -> Any:
  return nsa_jax.NativeSparseAttention(2, 1, 4, config=CONFIG, **fields)


def _apply(module: Any, inputs: Any, wrong: Any, **call: Any) -> Any:
  """Applies a module, made for `inputs`, to `wrong` ones."""
  variables = _zeros(module.init, jax.random.key(0), inputs)
  run = functools.partial(module.apply, mutable=["cache"], **call)
  return jax.eval_shape(lambda: run(variables, wrong))


def _generate(change: dict[str, Any]) -> Any:
  params = _zeros(_MODEL.init, jax.random.key(0), _INT_TOKENS)["params"]
  valid = {"model": _MODEL, "params": params, "prompts": [[1]]}
  change = change | {
    name: value(params) for name, value in change.items() if name == "params"
  }
  return nsa_jax.generate(**{"max_new_tokens": 1} | valid | change)


def _phi_of(**change: Any) -> Any:
  arguments = {"x": _X, **_PHI["compress_mlp"], "config": CONFIG} | change
  return nsa_jax.compress_mlp(**arguments)


_PARTS: Any = dict.fromkeys(["query", "key", "value", "out"], lambda x: x)
_DENSE: dict[str, Any] = {
  "config": _OPTIONS,
  "kind": "full",
  "parts": _PARTS,
  "x": _TOKENS,
  "positions": None,
  "segment_ids": None,
}


def _dense(**change: Any) -> Any:
  return core.dense_attention(**_DENSE | change)


def _pair_of(name: str, **change: Any) -> Any:
  """A cache with another key or value in one of its fields."""
  held = _held()
  return held._replace(**{name: getattr(held, name)._replace(**change)})


FOUND: dict[str, tuple[Callable[[], Any], str, str, str]] = {
  "array for a size": (
    lambda: NSAConfig(window=cast(Any, np.ones(2))),
    "window",
    "array([1., 1.])",
    "static integer",
  ),
  "unprintable integer": (
    lambda: NSAConfig(window=10**5000),
    "window",
    "<int>",
    "at most",
  ),
  "long value": (
    lambda: NSAConfig(window=cast(Any, "x" * 9999)),
    "window",
    "xxx...",
    "static integer",
  ),
  "array for a name": (
    lambda: nsa_jax.TransformerConfig.preset(cast(Any, np.array(["a", "b"]))),
    "name",
    "['a', 'b']",
    "one of 'tiny'",
  ),
  "array for an implementation": (
    lambda: _call("window_attention", {"implementation": np.ones(2)}),
    "implementation",
    "array([1., 1.])",
    "must be None, one of",
  ),
  "array for a dtype": (
    lambda: _layer(dtype=np.ones(2, np.float32)),
    "dtype",
    "array([1., 1.]",
    "floating-point",
  ),
  "small dtype": (
    lambda: _layer(param_dtype="float8_e4m3fn"),
    "param_dtype",
    "float8_e4m3fn",
    "one of float16, bfloat16",
  ),
  "dtype of a cache": (
    lambda: _held(dtype="float8_e5m2"),
    "dtype",
    "float8_e5m2",
    "one of float16, bfloat16",
  ),
  "string for a number": (
    lambda: _call("window_attention", {"scale": "1.5"}),
    "scale",
    "'1.5'",
    "finite number",
  ),
  "huge scale": (
    lambda: _call("window_attention", {"scale": 2**5000}),
    "scale",
    "1412467",
    "finite number",
  ),
  "huge position": (
    lambda: nsa_jax.apply_rope(_X, cast(Any, 2**40), nsa_jax.RopeConfig()),
    "positions",
    str(2**40),
    r"array of shape \(2, 12\)",
  ),
  "huge token": (
    lambda: _MODEL.init(jax.random.key(0), np.full((2, 4), 2**40)),
    "tokens",
    str(2**40),
    "int32",
  ),
  "huge offset": (
    lambda: _call("window_attention", {"query_offset": [2**70]}),
    "query_offset",
    str(2**70),
    "integer array of shape",
  ),
  "flag": (
    lambda: _native({"return_block_ids": np.ones(2)}),
    "return_block_ids",
    "array([1., 1.])",
    "True or False",
  ),
  "precision": (
    lambda: _layer(precision="exact"),
    "precision",
    "exact",
    "jax.lax.dot",
  ),
  "configuration of a layer": (
    lambda: linen.DenseAttention(cast(Any, CONFIG), "full"),
    "config",
    "NSAConfig(",
    "an AttentionConfig",
  ),
  "kind of a dense layer": (
    lambda: linen.DenseAttention(_OPTIONS, "nsa"),
    "kind",
    "'nsa'",
    "'full', 'window'",
  ),
  "kind of phi": (
    lambda: linen.CompressBlocks(cast(Any, "max"), CONFIG),
    "kind",
    "'max'",
    "'mlp'",
  ),
  "configuration of a model": (
    lambda: nsa_jax.TransformerLM(cast(Any, _OPTIONS)),
    "config",
    "AttentionConfig(",
    "a TransformerConfig",
  ),
  "no token": (
    lambda: _MODEL.init(jax.random.key(0), _i32(2, 0)),
    "tokens",
    "(2, 0)",
    "at least one",
  ),
  "no row": (
    lambda: _layer().init(jax.random.key(0), _f32(0, 4, 8)),
    "x",
    "(0, 4, 8)",
    "at least one",
  ),
  "width of a layer": (
    lambda: _apply(_layer(), _TOKENS, _f32(2, 4, 9)),
    "x",
    "(2, 4, 9)",
    "D=8",
  ),
  "segments of tokens": (
    lambda: _MODEL.init(jax.random.key(0), _INT_TOKENS, segment_ids=_i32(2, 5)),
    "segment_ids",
    "(2, 5)",
    "token of `tokens`",
  ),
  "rows of tokens": (
    lambda: _apply(_MODEL.clone(decode=True), _INT_TOKENS, _i32(3, 1)),
    "tokens",
    "3",
    "2 of the cache",
  ),
  # phi: the argument that fixes the size is named, too.
  "no head": (lambda: _phi_of(x=_f32(2, 12, 0, 8)), "x", "0", "at least one"),
  "x of phi": (
    lambda: _phi_of(x=_f32(2, 12, 2, 9)),
    "position",
    "(2, 4, 8)",
    "for this `x` and `config`",
  ),
  "w1 of phi": (
    lambda: _phi_of(w1=_f32(2, 32, 6)),
    "b1",
    "(2, 5)",
    "for this `w1`",
  ),
  # The cache.
  "dictionary for a cache": (
    lambda: _attend({"lengths": 3}),
    "cache",
    "dict",
    "a Cache",
  ),
  "cache of no arrays": (
    lambda: _attend(_held()._replace(lengths=cast(Any, 3))),
    "cache.lengths",
    "3",
    r"shape \[B\]",
  ),
  "float lengths": (
    lambda: _attend(_held()._replace(lengths=cast(Any, _f32(2)))),
    "cache.lengths",
    "float32",
    "integer dtype",
  ),
  "stacked cache": (
    lambda: _attend(
      _held()._replace(
        lengths=cast(Any, _i32(3, 2)), earliest=cast(Any, _i32(3, 2))
      )
    ),
    "cache.lengths",
    "(3, 2)",
    r"\[B\]",
  ),
  "earliest": (
    lambda: _attend(_held()._replace(earliest=cast(Any, _i32(3)))),
    "cache.earliest",
    "(3,)",
    "that of `cache.lengths`",
  ),
  "heads of a cache": (
    lambda: _attend(_pair_of("tail", value=_f32(2, 4, 1, 8))),
    "cache.tail.value",
    "(2, 4, 1, 8)",
    "same in all of the cache",
  ),
  "dtype in a cache": (
    lambda: _attend(_pair_of("window", key=_held("nsa", "bfloat16").window[0])),  # type: ignore[index]
    "cache.window.key",
    "bfloat16",
    "rest of the cache, float32",
  ),
  "half a cache": (
    lambda: _attend(_held()._replace(compressed=None)),
    "cache",
    "'tail'",
    "together",
  ),
  "queries over a cache of another dtype": (
    lambda: _attend(_held(dtype="bfloat16")),
    "cache.selected.key",
    "bfloat16",
    "dtype of `query`, float32",
  ),
  "inputs of a layer with a cache of another dtype": (
    lambda: _apply(
      _layer(decode=True, param_dtype="bfloat16"),
      _TOKENS.astype("bfloat16"),
      _f32(2, 1, 8),
    ),
    "x",
    "float32",
    "that of the cache, bfloat16",
  ),
  "bytes": (
    lambda: nsa_jax.cache.num_bytes([1.5]),
    "cache",
    "1.5",
    "pytree of arrays",
  ),
  "no cache": (
    lambda: nsa_jax.cache.rewind({}, 0),
    "cache",
    "dict",
    "pytree of Cache",
  ),
  # Without a module system.
  "no rows of tokens": (
    lambda: core.complete_positions(cast(Any, None), None, None, 4),
    "x",
    "None",
    r"\[B, T, ...\]",
  ),
  "parts": (lambda: _dense(parts=[]), "parts", "[]", "mapping.*'query'"),
  "part": (
    lambda: _dense(parts=_PARTS | {"key": 3}),
    "parts",
    "['key']",
    "function",
  ),
  "decoding": (
    lambda: _dense(decoding=3),
    "decoding",
    "3",
    "`begin_decoding`",
  ),
  "parameters": (
    lambda: core.compress("weighted", CONFIG, {}, cast(Any, _X)),
    "parameters",
    "{}",
    r"\['weight'\] of `kind`='weighted'",
  ),
  # Sampling.
  "no prompt": (
    lambda: _generate({"prompts": []}),
    "prompts",
    "0",
    "at least one row",
  ),
  "empty prompt": (
    lambda: _generate({"prompts": [[]]}),
    "lengths",
    "0",
    "row of `prompts` has at least one token",
  ),
  "prompts of no tokens": (
    lambda: _generate({"prompts": _i32(1, 0)}),
    "lengths",
    "0",
    "row of `prompts` has at least one token",
  ),
  "words for prompts": (
    lambda: _generate({"prompts": ["to be"]}),
    "prompts\\[0\\]",
    "'to be'",
    "integers",
  ),
  "flag for a key": (lambda: _generate({"key": True}), "key", "True", "seed"),
  "array for a key": (
    lambda: _generate({"key": np.ones(2, int)}),
    "key",
    "array([1, 1])",
    "seed",
  ),
  "missing parameter": (
    lambda: _generate({"params": lambda params: {"a": 1}}),
    "params",
    "missing",
    "what `init` returns",
  ),
  "shape of a parameter": (
    lambda: _generate({"params": lambda p: p | {"embedding": _f32(3, 8)}}),
    "params\\['embedding'\\]",
    "(3, 8)",
    "model's parameter",
  ),
  "dtype of a parameter": (
    lambda: _generate(
      {"params": lambda p: p | {"embedding": _f32(16, 8).astype(np.complex64)}}
    ),
    "params\\['embedding'\\]",
    "complex64",
    "floating-point",
  ),
  "model without a cache": (
    lambda: _generate({"model": _layer()}),
    "model",
    "NativeSparseAttention",
    "must make logits",
  ),
  "logits": (
    lambda: sampling.filter_logits(cast(Any, 1.5), 3),
    "logits",
    "1.5",
    "vocabulary",
  ),
  "more tokens than logits": (
    lambda: sampling.filter_logits(cast(Any, _f32(2)), 3),
    "top_k",
    "3",
    "last axis of `logits`",
  ),
  "share of the tokens": (
    lambda: sampling.filter_logits(cast(Any, _f32(2)), top_p=0),
    "top_p",
    "0",
    "lie in",
  ),
  # Conversion.
  "model that is none": (
    lambda: nsa_jax.unstack_layers(cast(Any, 3), {}),
    "model",
    "int",
    "a TransformerLM",
  ),
  **{
    f"stacked parameters {i}": (
      functools.partial(
        nsa_jax.unstack_layers,
        _MODEL.clone(
          config=dataclasses.replace(_MODEL.config, scan_layers=True)
        ),
        params,
      ),
      "params",
      value,
      rule,
    )
    for i, (params, value, rule) in enumerate(
      [
        (cast(Any, None), "None", "'layers'"),
        ({"layers": {}}, "layers", "no parameters"),
        ({"layers": {"a": _f32(2)}}, "['layers']['a']", "`num_layers`=1"),
      ]
    )
  },
}


@pytest.mark.parametrize("what", FOUND)
def test_wrong_arguments(what: str) -> None:
  _says(*FOUND[what])


def test_numbers_may_be_arrays() -> None:
  """Of NumPy or jax, without axes: the configurations keep their hash."""
  integer, number = cast(Any, jnp.int32(2)), cast(Any, np.array(2.0))
  options = dataclasses.replace(_OPTIONS, num_heads=integer)
  assert options == _OPTIONS
  assert hash(options) == hash(_OPTIONS)
  rope = nsa_jax.RopeConfig(yarn_factor=number, original_max_position=integer)
  assert hash(rope) == hash(
    nsa_jax.RopeConfig(yarn_factor=2.0, original_max_position=2)
  )
  assert nsa_jax.num_compressed_blocks(np.array(12), CONFIG) == 5  # type: ignore[arg-type]
