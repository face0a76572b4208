"""Layouts: the same numbers as on one device, and what is communicated.

Eight virtual CPU devices (conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import (
  KV,
  Layout,
  NSAConfig,
  TransformerConfig,
  TransformerLM,
  restore_zigzag,
  zigzag,
)
from nsa_jax.xla.top_k import top_k
from tests import helpers
from tests.helpers import Dims

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 10)
KERNELS = ("triton", "xla")  # "xla" for full attention, which has no kernel.
SIZES = {
  "data": {"data": 2},
  "heads": {"heads": 2},
  "sequence": {"sequence": 4},
  "data_heads": {"data": 4, "heads": 2},
  "data_sequence": {"data": 2, "sequence": 4},
  "all": {"data": 2, "sequence": 2, "heads": 2},
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A layout on a mesh of its own.

  Attributes:
    layout: its mesh axes have the names of its fields.
    types: of the mesh axes.
    sizes: devices by mesh axis.
  """

  layout: Layout
  types: str
  sizes: tuple[tuple[str, int], ...]

  @classmethod
  def make(cls, kind: str, types: str, zigzag: bool = False) -> Case:
    sizes = SIZES[kind]
    names: dict[str, Any] = {name: name for name in sizes}
    return cls(Layout(**names, zigzag=zigzag), types, tuple(sizes.items()))

  @contextlib.contextmanager
  def mesh(self) -> Iterator[Any]:
    names, shape = zip(*self.sizes, strict=True)
    kinds = (getattr(AxisType, self.types),) * len(names)
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=kinds, devices=devices)
    with jax.set_mesh(mesh):
      yield mesh

  @property
  def argument(self) -> Layout | None:
    """What a caller passes: with Explicit axes only `zigzag`, if at all."""
    if self.types == "Auto":
      return self.layout
    return Layout(zigzag=True) if self.layout.zigzag else None

  @property
  def shards(self) -> int:
    return dict(self.sizes).get("sequence", 1)

  def put(self, tree: Any, letters: str = "BTN") -> Any:
    """Arrays on the mesh, tokens in the order of the layout."""
    layout = self.layout
    axes = {"B": layout.data, "T": layout.sequence, "N": layout.heads}
    spec = P(*(axes.get(letter) for letter in letters))
    if letters[1:2] == "T" and layout.zigzag:
      tree = jax.tree.map(lambda x: np.asarray(zigzag(x, self.shards)), tree)
    return jax.device_put(tree, spec)

  def restore(self, tree: Any) -> Any:
    """Arrays [B, T, ...] on the host, tokens in the order of the text."""
    tree = jax.device_get(tree)
    if not self.layout.zigzag:
      return tree
    return jax.tree.map(
      lambda x: np.asarray(restore_zigzag(x, self.shards)), tree
    )


def _case_name(x: Any) -> str | None:
  return x if isinstance(x, str) else None


def collectives(program: Any) -> list[tuple[str, int]]:
  """Kind and bytes of the results of every collective of a compiled program.

  The results of one that XLA has fused count together.
  """
  sizes = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}
  kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  found = []
  for results, kind in re.findall(
    rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program.as_text()
  ):
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", results)
    count = sum(
      sizes[dtype] * math.prod(int(x) for x in shape.split(",") if x)
      for dtype, shape in arrays
    )
    found.append((kind, count))
  return found


def _counts(program: Any) -> dict[str, int]:
  return dict(Counter(kind for kind, _ in collectives(program)))


def _bytes(program: Any) -> dict[str, int]:
  total: Counter[str] = Counter()
  for kind, size in collectives(program):
    total[kind] += size
  return dict(total)


def _assert_gradients(actual: Any, expected: Any) -> None:
  """Equal to float32 rounding of the largest gradient of the tree.

  A gradient may be a sum of large terms that is 0: that of the positions of phi
  shifts all keys alike, which the softmax does not see.
  """
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  actual, expected = jax.tree.map(
    lambda x: np.asarray(x) / largest, (actual, expected)
  )
  helpers.assert_close(actual, expected, "float32")


# ------------------------------------------------------------------ the model


def _model(layout: Layout | None, **overrides: Any) -> TransformerLM:
  options: dict[str, Any] = {
    "vocab_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "model_dim": 32,
    "mlp_dim": 32,
    "nsa": CONFIG,
    "implementation": "xla",
  }
  return TransformerLM(TransformerConfig(**options | overrides, layout=layout))


def _batch(length: int, packed: bool, rows: int = 8) -> tuple[Any, ...]:
  """Tokens, labels and segment ids."""
  rng = np.random.default_rng(0)
  tokens = helpers.int32(rng.integers(0, 32, (rows, length)))
  labels = np.roll(tokens, -1, axis=1)
  dims = Dims(CONFIG, batch=rows, keys=length)
  return tokens, labels, helpers.packed_segments(dims) if packed else None


@functools.cache
def _parameters(**overrides: Any) -> Any:
  tokens, *_ = _batch(16, packed=False, rows=1)
  return jax.jit(_model(None, **overrides).init)(jax.random.key(0), tokens)


def _step(model: TransformerLM) -> Any:
  """f(params, tokens, labels, segment_ids) -> losses [B, T], gradients."""

  @jax.jit
  def step(params: Any, tokens: Any, labels: Any, segment_ids: Any) -> Any:
    def loss(params: Any) -> Any:
      losses: Any = model.apply(
        params, tokens, labels=labels, segment_ids=segment_ids
      )
      return losses.mean(), losses

    return jax.grad(loss, has_aux=True)(params)[::-1]

  return step


@functools.cache
def _on_one_device(length: int, packed: bool, **overrides: Any) -> Any:
  params = _parameters(**overrides)
  step = _step(_model(None, **overrides))
  return jax.device_get(step(params, *_batch(length, packed)))


def _head_spec(path: Any, x: Any) -> P:
  """The partition of a parameter over heads."""
  names = [entry.key for entry in path]
  if names[-2] == "out" or names[-2].startswith("compress_"):
    return P("heads")
  if "attention" in names and x.ndim == 3:  # [D, N, H]
    return P(None, "heads")
  return P()


def _place_parameters(case: Case, params: Any) -> Any:
  if not case.layout.heads:
    return jax.device_put(params, P())
  specs = jax.tree_util.tree_map_with_path(_head_spec, params)
  return jax.device_put(params, specs)


def _check_model(
  case: Case, length: int, packed: bool, implementation: Any, **overrides: Any
) -> None:
  losses, grads = _on_one_device(length, packed, **overrides)
  params = _parameters(**overrides)
  with case.mesh():
    model = _model(case.argument, implementation=implementation, **overrides)
    arrays = case.put(_batch(length, packed), "BT")
    found = _step(model)(_place_parameters(case, params), *arrays)
    helpers.assert_close(case.restore(found[0]), losses, "float32")
    _assert_gradients(jax.device_get(found[1]), grads)


FACTORS: dict[str, Any] = {
  "layout": [(kind, False) for kind in SIZES]
  + [(kind, True) for kind in ("sequence", "data_sequence", "all")],
  "types": ["Auto", "Explicit"],
  # Pieces of 16 tokens and more; then of 7, 14 and 28: not a multiple of the
  # stride, and in the order of `zigzag` shorter than the window.
  "length": [128, 56],
  "packed": [False, True],
  "sparse": [True, False],
  "share_kv": [False, True],
}


# Dense layers have no `share_kv`.
EVERY_CASE = [
  case
  for values in itertools.product(*FACTORS.values())
  if (case := dict(zip(FACTORS, values, strict=True)))["sparse"]
  or not case["share_kv"]
]


def _check_case(case: dict[str, Any], implementation: Any = "xla") -> None:
  kind, zigzag = case["layout"]
  options: dict[str, Any] = {"attention": "nsa"}
  if not case["sparse"]:
    options = {"attention": ("full", "window"), "num_layers": 2}
  elif case["share_kv"]:
    options |= {
      "share_kv": True,
      "compression": "linear",
      "normalize_qk": True,
      "rope_compressed": "tokens",
    }
  _check_model(
    Case.make(kind, case["types"], zigzag),
    case["length"],
    case["packed"],
    implementation,
    **options,
  )


def _some_slow(cases: Any) -> list[Any]:
  """Every third case in the fast tier."""
  return [
    pytest.param(case, marks=[pytest.mark.slow] * (i % 3 > 0))
    for i, case in enumerate(cases)
  ]


@pytest.mark.parametrize("case", _some_slow(helpers.pairwise(FACTORS)), ids=str)
def test_a_model_equals_one_device(case: dict[str, Any]) -> None:
  _check_case(case)


@pytest.mark.parametrize(
  "layout, types, packed",
  [
    (("data_sequence", True), "Explicit", True),
    pytest.param(("all", False), "Auto", False, marks=pytest.mark.slow),
    pytest.param(("all", True), "Explicit", True, marks=pytest.mark.slow),
  ],
)
def test_a_model_of_kernels(layout: Any, types: str, packed: bool) -> None:
  _check_model(Case.make(layout[0], types, layout[1]), 56, packed, KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", KERNELS])
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_every_model_equals_one_device(
  case: dict[str, Any], implementation: Any
) -> None:
  _check_case(case, implementation)


# ---------------------------------------------------------------- public ops


def _arrays(queries: int, keys: int, rows: int = 4) -> dict[str, Any]:
  """Arguments of `_all_ops` by their axes."""
  rng = np.random.default_rng(0)
  heads, width, block = 2, 16, CONFIG.compression_block

  def normal(*shape: int) -> Any:
    return helpers.normal(rng, shape, "float32")

  dims = Dims(CONFIG, batch=rows, keys=keys)
  segments = helpers.packed_segments(dims)
  blocks = nsa_jax.num_selection_blocks(keys, CONFIG)
  size = block * width
  return {
    "BTN": {
      "query": normal(rows, queries, 2 * heads, width),
      "compressed_query": normal(rows, queries, 2 * heads, width),
      "gates": rng.uniform(size=(rows, queries, 2 * heads, 3)).astype("f4"),
      "scores": normal(rows, queries, heads, blocks),
    },
    "BSK": {
      "key": normal(rows, keys, heads, width),
      "value": normal(rows, keys, heads, width),
    },
    "K": {
      "weight": normal(heads, block),
      "position": normal(heads, block, width),
      "linear": normal(heads, size, width) * size**-0.5,
      "w1": normal(heads, size, 32) * size**-0.5,
      "b1": normal(heads, 32),
      "w2": normal(heads, 32, width) * 32**-0.5,
      "b2": normal(heads, width),
    },
    "BS": {"segment_ids": segments},
    "BT": {"bound": rng.integers(0, 2, (rows, queries, 1, 1)).astype("i4")},
    "B": {"offset": helpers.int32([keys - queries, 3, 0, 2][:rows])},
  }


def _by_parity(*, query: Any, selected_key: Any, parity: Any, **_: Any) -> Any:
  """A selector: block 0 or 1, as an array bound to it says."""
  heads = selected_key.shape[2]
  return jnp.broadcast_to(parity, (*query.shape[:2], heads, 1))


def _all_ops(
  arrays: Any, layout: Layout | None, implementation: Any, offsets: bool
) -> dict[str, Any]:
  """Results of every op, from arrays on one device or on many."""
  x: dict[str, Any] = {}
  for group in arrays.values():
    x |= group
  keys = x["key"].shape[1]
  phi: dict[str, Any] = {
    "config": CONFIG,
    "segment_ids": x["segment_ids"],
    "layout": layout,
  }
  call = phi | {"implementation": implementation}
  if offsets:
    call["query_offset"] = x["offset"]
  length: dict[str, Any] = {"key_length": keys}
  query, key, value = x["query"], x["key"], x["value"]
  mlp = [x[name] for name in ("position", "w1", "b1", "w2", "b2")]
  blocks = KV(
    nsa_jax.compress_mlp(key, *mlp, **phi),
    nsa_jax.compress_linear(value, x["position"], x["linear"], **phi),
  )
  pair = KV(key, value)
  out, lse = nsa_jax.compressed_attention(
    query, blocks.key, blocks.value, **call, **length
  )
  chosen = nsa_jax.select_blocks(query, blocks.key, lse, **call, **length)
  others = {k: v for k, v in call.items() if k != "implementation"}
  dense = {k: v for k, v in call.items() if k != "config"}
  if implementation == "triton":
    dense["implementation"] = "xla"
  whole = functools.partial(
    nsa_jax.native_sparse_attention,
    query,
    blocks,
    pair,
    pair,
    x["gates"],
    **call,
  )
  return {
    "compress_mean": nsa_jax.compress_mean(key, **phi),
    "compress_weighted": nsa_jax.compress_weighted(key, x["weight"], **phi),
    "compress_linear": blocks.value,
    "compress_mlp": blocks.key,
    "compressed_attention": (out, lse),
    "select_blocks": chosen,
    "block_scores": nsa_jax.block_scores(
      query, blocks.key, lse, **call | {"implementation": "xla"}, **length
    ),
    "block_mass": nsa_jax.block_mass(
      query, key, **call | {"implementation": "xla"}
    ),
    "block_ids_from_scores": nsa_jax.block_ids_from_scores(
      x["scores"], **others, **length
    ),
    "selected_attention": nsa_jax.selected_attention(
      query, key, value, chosen, **call
    )[0],
    "window_attention": nsa_jax.window_attention(query, key, value, **call)[0],
    "full_attention": nsa_jax.full_attention(query, key, value, **dense)[0],
    "native_sparse_attention": whole(return_block_ids=True),
    "compressed_query": whole(compressed_query=x["compressed_query"]),
    "block_ids": whole(block_ids=chosen),
    "select": whole(select=functools.partial(_by_parity, parity=x["bound"])),
    "means": whole(select="means"),
  }


def _loss(results: dict[str, Any]) -> Any:
  """A sum with different weights over all floats."""
  total = jnp.zeros(())
  for x in jax.tree.leaves(results):
    if jnp.issubdtype(x.dtype, jnp.floating):
      total += jnp.sin(jnp.where(jnp.isfinite(x), x, 0)).sum()
  return total


def _run_ops(
  arrays: Any,
  layout: Layout | None,
  implementation: str,
  offsets: bool,
  gradients: bool,
) -> Any:
  """Results by op, and gradients by axes."""
  if not gradients:
    return _all_ops(arrays, layout, implementation, offsets), None
  floats = {k: arrays[k] for k in ("BTN", "BSK", "K")}
  rest = {k: v for k, v in arrays.items() if k not in floats}

  def loss(floats: Any) -> Any:
    results = _all_ops(floats | rest, layout, implementation, offsets)
    return _loss(results), results

  grads, results = jax.grad(loss, has_aux=True)(floats)
  return results, grads


def _jit_ops(*args: Any) -> Any:
  return jax.jit(lambda arrays: _run_ops(arrays, *args))


@functools.cache
def _ops_on_one_device(
  queries: int, keys: int, offsets: bool, gradients: bool
) -> Any:
  run = _jit_ops(None, "xla", offsets, gradients)
  return jax.device_get(run(_arrays(queries, keys)))


@pytest.mark.parametrize(
  "gradients", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "kind, types, zigzag, queries, keys, offsets, implementation",
  [
    ("all", "Explicit", True, 56, 56, False, "xla"),
    ("data_sequence", "Auto", False, 20, 57, False, "xla"),
    ("all", "Explicit", False, 20, 56, True, "triton"),
    *(
      pytest.param(*values, marks=pytest.mark.slow)
      for values in (
        ("all", "Auto", False, 64, 64, False, "xla"),
        ("data_sequence", "Explicit", False, 20, 56, True, "xla"),
        ("data_sequence", "Auto", True, 56, 56, False, "xla"),
        ("data_heads", "Explicit", False, 1, 50, True, "xla"),
        ("data_sequence", "Explicit", False, 64, 48, False, "xla"),
      )
    ),
  ],
)
def test_every_op_equals_one_device(
  kind: str,
  types: str,
  zigzag: bool,
  queries: int,
  keys: int,
  offsets: bool,
  implementation: str,
  gradients: bool,
) -> None:
  case = Case.make(kind, types, zigzag)
  expected, expected_grads = _ops_on_one_device(
    queries, keys, offsets, gradients
  )
  with case.mesh():
    placed = {
      letters: case.put(group, _placed(case, letters, keys))
      for letters, group in _arrays(queries, keys).items()
    }
    run = _jit_ops(case.argument, implementation, offsets, gradients)
    results, grads = jax.device_get(run(placed))
  for name, want in expected.items():
    found = results[name]
    if not name.startswith("compress_"):
      found = case.restore(found)
    helpers.assert_close(found, want, "float32", what=f"{name}: ")
  if gradients:
    for letters in ("BTN", "BSK"):
      grads[letters] = case.restore(grads[letters])
    _assert_gradients(grads, expected_grads)


def _placed(case: Case, letters: str, keys: int) -> str:
  """Axes in the letters of `Case.put`; not all keys can be split."""
  if letters.startswith("BS") and keys % case.shards:
    letters = letters.replace("S", ".")
  return letters.replace("S", "T").replace("K", "N")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_nothing_of_a_query_before_the_keys_is_seen(
  implementation: Any,
) -> None:
  """With T > S the first queries are padding, on any device."""
  dims = Dims(CONFIG, batch=1, queries=32, keys=24, value_dim=16)
  inputs = helpers.make_inputs(dims, "float32")
  hidden = inputs["query"].copy()
  hidden[:, : dims.queries - dims.keys] = np.nan

  def results(query: Any, layout: Layout | None = None) -> Any:
    def loss(inputs: Any) -> Any:
      out = nsa_jax.native_sparse_attention(
        **inputs, config=CONFIG, implementation=implementation, layout=layout
      )
      return jnp.square(out).sum(), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    return jax.device_get(run(inputs | {"query": query}))

  expected = results(inputs["query"])
  case = Case.make("sequence", "Auto")
  with case.mesh():
    helpers.assert_close(results(hidden, case.layout), expected, "float32")


@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_lists_are_arrays(types: str) -> None:
  x: Any = np.ones((2, 16, 2, 8), np.float32).tolist()
  weight: Any = np.full((2, 8), 0.125).tolist()
  layout = Case.make("data", types).layout
  with Case.make("data", types).mesh():
    _, lse = nsa_jax.window_attention(x, x, x, config=CONFIG, layout=layout)
    blocks = nsa_jax.compress_weighted(x, weight, config=CONFIG, layout=layout)
  assert lse.shape == (2, 16, 2)
  np.testing.assert_allclose(blocks, 1, rtol=1e-6)


# ------------------------------------------------------ what is communicated


def _model_program(case: Case, length: int, **overrides: Any) -> Any:
  """The compiled loss and gradients of a model on the mesh around the call."""
  params = _place_parameters(case, _parameters(**overrides))
  arrays = case.put(_batch(length, packed=False), "BT")
  step = _step(_model(case.argument, **overrides))
  return step.lower(params, *arrays).compile()


TYPES = ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]


@pytest.mark.parametrize("types", TYPES)
def test_data_parallelism_reduces_gradients_once(types: str) -> None:
  case = Case.make("data", types)
  with case.mesh():
    found = collectives(_model_program(case, 64))
  ((kind, size),) = found
  assert kind == "all-reduce"
  _assert_of_parameters(size)


def _assert_of_parameters(size: int) -> None:
  """Bytes of all gradients; of the tied embedding one from each of its uses."""
  params = _parameters()["params"]
  every = sum(x.nbytes for x in jax.tree.leaves(params))
  # That of the positions in phi is a product with that of the bias.
  positions = sum(
    params["layer_0"]["attention"][name]["position"].nbytes
    for name in ("compress_key", "compress_value")
  )
  tied = params["embedding"].nbytes
  assert every - positions <= size <= every + tied


@pytest.mark.parametrize("types", TYPES)
def test_heads_cost_what_those_of_a_dense_layer_cost(types: str) -> None:
  """One sum of outputs, and one of cotangents: of each projection's input."""
  case = Case.make("heads", types)
  found, projections = {}, {"nsa": 8, "full": 3}
  with case.mesh():
    for kind in projections:
      found[kind] = collectives(_model_program(case, 64, attention=kind))
  tokens = 8 * 64 * 32 * 4  # [B, T, D]
  for kind, count in projections.items():
    sizes = [("all-reduce", tokens), ("all-reduce", count * tokens)]
    assert found[kind] == sizes


@pytest.mark.parametrize(
  "types, zigzag",
  [
    ("Auto", False),
    ("Explicit", True),
    pytest.param("Explicit", False, marks=pytest.mark.slow),
    pytest.param("Auto", True, marks=pytest.mark.slow),
  ],
)
def test_what_the_sequence_communicates(types: str, zigzag: bool) -> None:
  """Selected keys and blocks are gathered; of the window, w tokens."""
  case = Case.make("sequence", types, zigzag)
  length, pieces = 128, 2 if zigzag else 1
  with case.mesh():
    program = _model_program(case, length)
  token = 2 * 8 * 2 * 16 * 4  # a key and a value, [B, 1, K, H]
  blocks = length // CONFIG.compression_stride
  halo = CONFIG.window + CONFIG.compression_block - CONFIG.compression_stride
  found = _bytes(program)
  _assert_of_parameters(found.pop("all-reduce") - (blocks - 1) * token)
  assert found == {
    "all-gather": (length + blocks) * token,
    "collective-permute": 2 * pieces * halo * token,
    "reduce-scatter": length // case.shards * token,
  }
  assert _counts(program) == {
    "all-gather": 4,
    "collective-permute": 8 * pieces,
    "reduce-scatter": 2,
    "all-reduce": 2,
  }


@pytest.mark.parametrize("types", TYPES)
def test_a_window_gathers_nothing(types: str) -> None:
  case = Case.make("data_sequence", types)
  with case.mesh():
    found = _counts(_model_program(case, 128, attention="window"))
  assert found.keys() == {"collective-permute", "all-reduce"}


# ----------------------------------------- kernels where nothing is said


@pytest.mark.parametrize(
  "spec",
  [
    P("data", None, "heads"),
    pytest.param(P("data"), marks=pytest.mark.slow),
    pytest.param(P(None, None, "heads"), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_kernels_without_a_layout_gather_nothing(spec: P) -> None:
  """XLA partitions calls of kernels over rows and heads by itself."""
  dims = Dims(CONFIG, batch=4, queries=20, keys=20, value_dim=16)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  expected = helpers.native_vjp("xla", CONFIG)(inputs, {}, dout)
  with Case.make("data_heads", "Auto").mesh():
    args = jax.device_put((inputs, {}, dout), spec)
    run: Any = helpers.native_vjp("triton", CONFIG)
    program = run.lower(*args).compile()
    assert collectives(program) == []
    out, ids, grads = program(*args)
    assert out.sharding.spec == spec
  np.testing.assert_array_equal(ids, expected[1])
  helpers.assert_close(out, expected[0], "float32")
  _assert_gradients(grads, expected[2])


def test_kernels_in_a_shard_map_of_the_caller() -> None:
  """check_vma=True: gradients of keys that all devices share are summed."""
  dims = Dims(CONFIG, batch=1, queries=20, keys=20, value_dim=16)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  expected = helpers.native_vjp("xla", CONFIG)(inputs, {}, dout)
  rows = {"query": P(None, "sequence"), "gates": P(None, "sequence")}

  def attend(inputs: Any) -> Any:
    length = inputs["query"].shape[1]
    return nsa_jax.native_sparse_attention(
      **inputs,
      query_offset=jax.lax.axis_index("sequence") * length,
      config=CONFIG,
      implementation="triton",
    )

  with Case.make("sequence", "Auto").mesh():
    mapped = jax.shard_map(
      attend,
      in_specs=({name: rows.get(name, P()) for name in inputs},),
      out_specs=P(None, "sequence"),
    )
    out, pullback = jax.vjp(jax.jit(mapped), inputs)
    grads = jax.jit(pullback)(dout)[0]
  helpers.assert_close(out, expected[0], "float32")
  _assert_gradients(grads, expected[2])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("layout", [None, Layout(heads="heads")])
def test_a_region_over_some_axes(
  implementation: Any, layout: Layout | None
) -> None:
  """As docs/many-devices.md says, gradients included."""
  dims = Dims(CONFIG, batch=4, queries=20, keys=20, kv_heads=2, value_dim=16)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")
  expected = helpers.native_vjp("xla", CONFIG)(inputs, {}, dout)

  def attend(inputs: Any) -> Any:
    return nsa_jax.native_sparse_attention(
      **inputs, config=CONFIG, implementation=implementation, layout=layout
    )

  with Case.make("data_heads", "Auto").mesh():
    args = jax.device_put(inputs, P("data", None, "heads"))
    region = jax.shard_map(
      attend, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    program = jax.jit(region).lower(args).compile()
    gathers = "all-gather" in _counts(program)
    assert gathers == (implementation == "triton" and layout is None)
    helpers.assert_close(program(args), expected[0], "float32")

    def loss(inputs: Any) -> Any:
      return (region(inputs) * dout).sum()

    if layout is None:
      _assert_gradients(jax.jit(jax.grad(loss))(args), expected[2])
    else:
      with pytest.raises(ValueError, match="Cannot lower jaxpr with verifier"):
        jax.jit(jax.grad(loss))(args)


def test_the_largest_in_rounds() -> None:
  """Where XLA partitions a program, with ties, infinities and n = M."""
  rng = np.random.default_rng(0)
  x = helpers.float32(rng.integers(0, 4, (8, 3, 7)))
  x[0, 0, 2], x[1, 1, 3] = np.inf, -np.inf
  with Case.make("data", "Auto").mesh():
    for n in (1, 3, 6):
      run = jax.jit(functools.partial(top_k, n=n))
      args = jax.device_put(x, P("data"))
      assert collectives(run.lower(args).compile()) == []
      best, ids = run(args)
      wanted = jax.lax.top_k(x, n)
      np.testing.assert_array_equal(best, wanted[0])
      np.testing.assert_array_equal(ids, wanted[1])
      mapped = jax.jit(jax.vmap(functools.partial(top_k, n=n), in_axes=1))
      np.testing.assert_array_equal(
        mapped(args)[1], jnp.moveaxis(wanted[1], 1, 0)
      )


def test_the_largest_in_a_region_with_auto_axes() -> None:
  """XLA still partitions what a `shard_map` over other axes contains."""
  x = helpers.normal(np.random.default_rng(0), (4, 2, 7), "float32")
  with Case.make("data_heads", "Auto").mesh():
    region = jax.jit(
      jax.shard_map(
        lambda x: top_k(x, 3),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
      )
    )
    args = jax.device_put(x, P("data", "heads"))
    assert collectives(region.lower(args).compile()) == []
    best, ids = region(args)
  wanted = jax.lax.top_k(x, 3)
  np.testing.assert_array_equal(best, wanted[0])
  np.testing.assert_array_equal(ids, wanted[1])


# ------------------------------------------------------------ ways to call


def _window(x: Any, layout: Layout | None = None, **options: Any) -> Any:
  """The cheapest op: [B, T, N, H] is query, keys and values."""
  return nsa_jax.window_attention(
    x, x, x, config=CONFIG, implementation="xla", layout=layout, **options
  )[0]


@pytest.fixture(scope="module")
def tokens() -> Any:
  return helpers.normal(np.random.default_rng(0), (4, 48, 2, 16), "float32")


MESHES: list[Any] = [
  # sizes, types, layout, partition of x
  ("an axis that is not used", (2, 2), "AA", Layout("a"), P("a")),
  ("two axes", (2, 2), "AA", Layout(sequence=("a", "b")), P(None, ("a", "b"))),
  ("two axes, turned", (2, 2), "AA", Layout(sequence=("b", "a")), P()),
  ("two Explicit axes", (2, 2), "EE", None, P(None, ("b", "a"))),
  ("two kinds", (2, 2), "EA", Layout("a", "b"), P("a")),
  ("two kinds, no layout", (2, 2), "EA", None, P("a")),
  ("axes of one device", (1, 1), "EE", Layout(None, "a", "b"), P()),
  ("arrays elsewhere", (2, 2), "AA", Layout("a", "b"), P("b", "a")),
  ("pieces below the window", (2, 4), "AA", Layout(None, ("a", "b")), P()),
]


@pytest.mark.parametrize(
  "sizes, types, layout, spec",
  [case[1:] for case in MESHES],
  ids=[case[0] for case in MESHES],
)
def test_meshes(
  sizes: Any, types: str, layout: Any, spec: P, tokens: Any
) -> None:
  kinds = {"A": AxisType.Auto, "E": AxisType.Explicit}
  mesh = jax.make_mesh(
    sizes,
    ("a", "b"),
    axis_types=tuple(kinds[x] for x in types),
    devices=jax.devices()[: math.prod(sizes)],
  )
  expected = _window(tokens)
  with jax.set_mesh(mesh):
    x = jax.device_put(tokens, spec)
    found = jax.jit(functools.partial(_window, layout=layout))(x)
  helpers.assert_close(found, expected, "float32")


@pytest.mark.parametrize("jit", [True, False])
def test_explicit_arrays_need_no_set_mesh(jit: bool, tokens: Any) -> None:
  with Case.make("data_sequence", "Explicit").mesh() as mesh:
    pass
  x = jax.device_put(tokens, NamedSharding(mesh, P("data", "sequence")))
  out = (jax.jit(_window) if jit else _window)(x)
  assert out.sharding.spec[:2] == ("data", "sequence")
  helpers.assert_close(out, _window(tokens), "float32")


@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_zigzag_without_a_sequence_is_the_order_of_the_text(
  types: str, tokens: Any
) -> None:
  case = Case.make("data", types)
  with case.mesh():
    layout = dataclasses.replace(case.argument or Layout(), zigzag=True)
    found = jax.jit(functools.partial(_window, layout=layout))(
      jax.device_put(tokens[:, :47], P("data"))
    )
  helpers.assert_close(found, _window(tokens[:, :47]), "float32")


@pytest.mark.parametrize("types", ["Auto", "Explicit"])
def test_vmap_grad_and_remat(types: str, tokens: Any) -> None:
  def loss(x: Any, layout: Any) -> Any:
    return (_window(x, layout) ** 2).sum()

  def every(x: Any, layout: Any = None) -> Any:
    one = functools.partial(loss, layout=layout)
    both = jax.vmap(one)
    return (
      jax.vmap(jax.grad(one))(x),
      jax.grad(lambda x: both(x).sum())(x),
      jax.grad(lambda x: jax.checkpoint(both)(x).sum())(x),
    )

  two = np.stack([tokens, tokens[::-1]])
  expected = jax.jit(every)(two)
  case = Case.make("data_sequence", types)
  with case.mesh():
    x = jax.device_put(two, P(None, "data", "sequence"))
    found = jax.jit(functools.partial(every, layout=case.argument))(x)
  _assert_gradients(jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize(
  "kind, types, zigzag",
  [
    ("data_sequence", "Explicit", True),
    *(
      pytest.param(*values, marks=pytest.mark.slow)
      for values in (
        ("data", "Auto", False),
        ("heads", "Explicit", False),
        ("sequence", "Auto", False),
        ("all", "Auto", True),
      )
    ),
  ],
)
def test_programs_for_cuda(kind: str, types: str, zigzag: bool) -> None:
  """Lowered and exported without a GPU; the default holds the kernels."""
  case = Case.make(kind, types, zigzag)
  dims = Dims(CONFIG, batch=4, queries=64, keys=64, value_dim=16)
  names, sizes = zip(*case.sizes, strict=True)
  device = AbstractDevice(
    device_kind="NVIDIA H200", num_cores=132, platform="gpu"
  )
  mesh = AbstractMesh(
    sizes,
    names,
    axis_types=(getattr(AxisType, types),) * len(names),
    abstract_device=device,
  )
  layout = case.layout

  def shape(axes: Any, x: Any) -> Any:
    sharding = NamedSharding(mesh, P(layout.data, axes, layout.heads))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  args = {
    name: jax.tree.map(
      functools.partial(
        shape, None if name == "compressed" else layout.sequence
      ),
      x,
    )
    for name, x in helpers.make_inputs(dims, "float32").items()
  }

  def loss(implementation: Any, inputs: Any) -> Any:
    out = nsa_jax.native_sparse_attention(
      **inputs,
      config=CONFIG,
      implementation=implementation,
      layout=case.argument,
    )
    return out.sum()

  count = {}
  with jax.sharding.use_abstract_mesh(mesh):
    for name in (None, "triton"):
      run = jax.jit(jax.grad(functools.partial(loss, name)))
      text = run.trace(args).lower(lowering_platforms=("cuda",)).as_text()
      count[name] = text.count("xla.gpu.triton")
    exported = export.export(
      jax.jit(functools.partial(loss, None)),
      platforms=("cpu", "cuda"),
      disabled_checks=nsa_jax.EXPORT_DISABLED_CHECKS,
    )(args)
  assert count[None] == count["triton"] > 0
  program = export.deserialize(exported.serialize())
  assert program.nr_devices == math.prod(sizes)


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize(
  "kind, types, zigzag",
  [
    ("data_heads", "Explicit", False),
    # That of training: tokens of a step are not split.
    ("data_sequence", "Auto", True),
    pytest.param("data_heads", "Auto", False, marks=pytest.mark.slow),
    pytest.param("data_sequence", "Explicit", True, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize(
  "attention, select",
  [
    ("nsa", None),
    ("nsa", "means"),
    *(
      pytest.param(x, None, marks=pytest.mark.slow) for x in ("full", "window")
    ),
  ],
)
def test_decoding(
  kind: str, types: str, zigzag: bool, attention: Any, select: Any
) -> None:
  """A prompt and two steps equal one pass over the tokens."""
  params = _parameters(attention=attention)
  tokens, *_ = _batch(18, packed=False)
  fields = {"attention": attention, "select": select}
  model = _model(None, **fields)
  expected = jax.jit(model.apply)(params, tokens)
  case = Case.make(kind, types, zigzag)
  model = _model(case.argument, **fields).clone(decode=True)
  plain = _model(None, **fields).clone(decode=True)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), tokens)["cache"]

  def empty(x: Any) -> Any:
    spec = P(case.layout.data, *(None, case.layout.heads)[: x.ndim - 1])
    return jax.device_put(np.zeros(x.shape, x.dtype), spec)

  @jax.jit
  def step(params: Any, cache: Any, tokens: Any) -> Any:
    logits, new = model.apply(
      {**params, "cache": cache}, tokens, mutable=["cache"]
    )
    return logits, new["cache"]

  with case.mesh():
    cache = jax.tree.map(empty, shapes)
    params = _place_parameters(case, params)
    for start, stop in ((0, 16), (16, 17), (17, 18)):
      part = jax.device_put(tokens[:, start:stop], P(case.layout.data))
      logits, cache = step(params, cache, part)
      helpers.assert_close(
        jax.device_get(logits), expected[:, start:stop], "float32"
      )


# ------------------------------------------------------------------ messages


def _explicit(spec: P, *shape: int) -> Any:
  return jax.device_put(jnp.zeros(shape), spec)


def _in_shard_map() -> Any:
  return jax.shard_map(
    lambda x: _window(x, Layout("data")), in_specs=P("data"), out_specs=P()
  )(jnp.zeros((4, 8, 2, 16)))


X = (4, 8, 2, 16)
# Axes of the mesh (those of "all"), the call, the message.
MESSAGES: list[Any] = [
  (
    "Auto",
    lambda: _window(jnp.zeros(X), "data"),  # type: ignore[arg-type]
    "`layout`='data' must be an nsa_jax.Layout or None.",
  ),
  (
    "Auto",
    lambda: _window(jnp.zeros(X), Layout("rows")),
    "`layout.data`='rows' must name axes of the mesh around the call: "
    "['data', 'sequence', 'heads'].",
  ),
  (
    "Auto",
    _in_shard_map,
    "`layout`=Layout(data='data', sequence=None, heads=None, zigzag=False) "
    "needs a mesh with these axes, but there is the Manual axes ['data', "
    "'heads', 'sequence']: call inside `jax.set_mesh(mesh)`, and outside "
    "`jax.shard_map`.",
  ),
  (
    "Auto",
    lambda: _window(jnp.zeros((3, 8, 2, 16)), Layout("data")),
    "`query` of shape (3, 8, 2, 16) must have B a multiple of 2, the devices "
    "of `layout.data`='data'.",
  ),
  (
    "Auto",
    lambda: _window(jnp.zeros((4, 7, 2, 16)), Layout(None, "sequence")),
    "`query` of shape (4, 7, 2, 16) must have T a multiple of 2, the devices "
    "of `layout.sequence`='sequence'.",
  ),
  (
    "Auto",
    lambda: _window(
      jnp.zeros((4, 6, 2, 16)), Layout(None, "sequence", zigzag=True)
    ),
    "`query` of shape (4, 6, 2, 16) must have T a multiple of 4, twice the "
    "devices of `layout.sequence`='sequence'.",
  ),
  (
    "Auto",
    lambda: nsa_jax.full_attention(
      jnp.zeros(X), *jnp.zeros((2, 4, 8, 1, 16)), layout=Layout(heads="heads")
    ),
    "`key` of shape (4, 8, 1, 16) must have K a multiple of 2, the devices of "
    "`layout.heads`='heads'.",
  ),
  (
    "Auto",
    lambda: nsa_jax.full_attention(
      jnp.zeros(X),
      *jnp.zeros((2, 4, 16, 2, 16)),
      layout=Layout(None, "sequence", zigzag=True),
    ),
    "`layout`=Layout(data=None, sequence='sequence', heads=None, zigzag=True) "
    "needs T = S and no `query_offset`: there are 8 queries and 16 keys.",
  ),
  (
    "Explicit",
    lambda: _window(_explicit(P(None, None, None, "data"), *X)),
    "`query` of type float32[4,8,2,16@data] must be split over the axes B, T, "
    "N only: `jax.reshard` it.",
  ),
  (
    "Auto",
    lambda: Layout(3),  # type: ignore[arg-type]
    "`data`=3 must be the name of a mesh axis, a tuple of names, or None.",
  ),
  (
    "Auto",
    lambda: Layout("data", ("heads", "data")),
    "`data`='data', `sequence`=('heads', 'data') and `heads`=None must use a "
    "mesh axis once.",
  ),
  (
    "Auto",
    lambda: zigzag(jnp.zeros((1, 6)), 2),
    "`x` of shape (1, 6) must have a multiple of 4 tokens, twice `shards`=2.",
  ),
]


@pytest.mark.parametrize(
  "types, call, message", MESSAGES, ids=range(len(MESSAGES))
)
def test_messages(types: str, call: Any, message: str) -> None:
  with (
    Case.make("all", types).mesh(),
    pytest.raises(ValueError, match=re.escape(message)) as info,
  ):
    call()
  assert str(info.value) == message


def test_a_layout_needs_a_mesh() -> None:
  message = (
    "`layout`=Layout(data='data', sequence=None, heads=None, zigzag=False) "
    "needs a mesh with these axes, but there is no mesh: call inside "
    "`jax.set_mesh(mesh)`, and outside `jax.shard_map`."
  )
  with pytest.raises(ValueError, match=re.escape(message)):
    _window(jnp.zeros(X), Layout("data"))
