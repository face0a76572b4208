"""`implementation=None`: kernels on NVIDIA GPUs, XLA elsewhere, one program."""

import functools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels import platforms
from tests import helpers, suite
from tests.helpers import Dims

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)
DIMS = Dims(CONFIG, 2, 70, 70, 2, 2, 16, 16)
KERNELS = (
  "nsa_compressed_fwd",
  "nsa_block_scores",
  "nsa_top_n",
  "nsa_selected_by_block_fwd",
  "nsa_selected_by_block_bwd",
  "nsa_compressed_dq",
  "nsa_compressed_dkv",
  "nsa_window_fwd",
  "nsa_window_dq",
  "nsa_window_dkv",
)


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
  """Also where a GPU is."""
  with jax.default_device(jax.devices("cpu")[0]):
    yield


def _arguments(dims: Dims = DIMS, dtype: str = "float32") -> tuple[Any, ...]:
  return (
    helpers.make_inputs(dims, dtype),
    {},
    helpers.make_cotangent(dims, dtype),
  )


def _cuda(function: Any, *args: Any) -> str:
  """The program of a jitted function, lowered for an H200."""
  with helpers.h200():
    return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# ------------------------------------------------------------ what is computed


@pytest.mark.parametrize(
  "mode, dtype",
  [("full", "float32"), ("rows", "bfloat16"), ("packed", "float16")],
)
def test_a_cpu_gets_the_bits_of_xla(mode: str, dtype: str) -> None:
  dims = DIMS
  integers: dict[str, Any] = {}
  if mode == "rows":
    dims = Dims(CONFIG, 2, 5, 70, 2, 2, 16, 16)
    integers["query_offset"] = helpers.int32([-2, 67])
  if mode == "packed":
    integers["segment_ids"] = helpers.packed_segments(dims)
  inputs, _, dout = _arguments(dims, dtype)
  actual, expected = (
    helpers.native_vjp(implementation, CONFIG)(inputs, integers, dout)
    for implementation in (None, "xla")
  )
  helpers.assert_same_bits(actual, expected)


def test_without_jit() -> None:
  inputs, _, dout = _arguments(Dims(CONFIG, 1, 9, 9, 1, 2, 16, 16))

  def run(implementation: Any) -> Any:
    (out, lse), pullback = jax.vjp(
      lambda query, key, value: nsa_jax.window_attention(
        query, key, value, config=CONFIG, implementation=implementation
      ),
      inputs["query"],
      *inputs["window"],
    )
    return (out, lse), pullback((dout, lse))

  (actual, grads), (expected, expected_grads) = run(None), run("xla")
  helpers.assert_same_bits(actual, expected)
  # Without jit, jax compiles other pieces of the backward pass.
  helpers.assert_close(grads, expected_grads, "float32", gradient=1)


def test_without_jit_nothing_is_compiled_twice() -> None:
  inputs, _, dout = _arguments(Dims(CONFIG, 1, 21, 21, 1, 2, 16, 16))
  platforms._compiled.cache_clear()

  def run() -> Any:
    out, pullback = jax.vjp(
      lambda x: nsa_jax.native_sparse_attention(**x, config=CONFIG), inputs
    )
    return out, pullback(dout)

  first = run()
  programs = platforms._compiled.cache_info().misses
  assert programs == 4 + 3  # branches and selection forward, branches backward
  helpers.assert_same_bits(run(), first)
  assert platforms._compiled.cache_info().misses == programs


@pytest.mark.parametrize(
  "case",
  [
    {
      "mode": "rows",
      "groups": (2, 2),
      "dtype": "float16",
      "extra": "own_query",
    },
    {"mode": "packed", "groups": (1, 5), "dtype": "float64", "extra": "none"},
    {
      "mode": "tail",
      "groups": (1, 1),
      "dtype": "float32",
      "extra": "block_ids",
    },
  ],
  ids=lambda case: case["mode"],
)
def test_matches_oracle(case: dict[str, Any]) -> None:
  """float64 falls back to XLA, inside a program with 64-bit types."""
  suite.check_case(
    None, {"config": CONFIG, "widths": (16, 32), "keys": 40, **case}
  )


def test_64_bit_types(x64: None) -> None:
  run: Any = helpers.native_vjp.__wrapped__(None, CONFIG)
  out, ids, _ = jax.eval_shape(run, *_arguments())
  assert (out.dtype, ids.dtype) == (jnp.float32, jnp.int32)
  text = _cuda(run, *_arguments())
  assert all(name in text for name in KERNELS)


def test_block_scores_is_xla() -> None:
  query, key = _arguments()[0]["query"], _arguments()[0]["compressed"].key
  lse: Any = np.zeros(query.shape[:3], np.float32)
  names: Any = (None, "xla")
  actual, expected = (
    jax.jit(
      functools.partial(
        nsa_jax.block_scores, config=CONFIG, key_length=70, implementation=name
      )
    )(query, key, lse)
    for name in names
  )
  helpers.assert_same_bits(actual, expected)


# -------------------------------------------------------- what is in a program


def test_cpu_programs_hold_no_kernel() -> None:
  run: Any = helpers.native_vjp(None, CONFIG)
  traced = run.trace(*_arguments())
  assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_cuda_programs_are_those_of_the_kernels() -> None:
  """Forward and backward, to the letter: no switch and nothing of XLA's."""
  inputs = _arguments(dtype="bfloat16")
  text, triton, xla = (
    _cuda(helpers.native_vjp(name, CONFIG), *inputs)
    for name in (None, "triton", "xla")
  )

  def without_kernels(text: str) -> str:
    # Their code holds the stack of its tracing.
    return re.sub(r'ir = "[^"]*"', "", text)

  assert without_kernels(text) == without_kernels(triton)
  assert all(name in text for name in KERNELS)
  assert "triton" not in xla


def test_calls_that_the_kernels_cannot_take_are_those_of_xla() -> None:
  inputs = _arguments(Dims(CONFIG, 2, 70, 70, 2, 2, 8, 16))
  text, xla = (
    _cuda(helpers.native_vjp(name, CONFIG), *inputs) for name in (None, "xla")
  )
  assert text == xla


def test_old_gpus_get_xla(monkeypatch: pytest.MonkeyPatch) -> None:
  def devices(backend: str) -> list[Any]:
    assert backend == "cuda"
    return [SimpleNamespace(device_kind="Tesla T4", compute_capability="7.5")]

  run: Any = helpers.native_vjp.__wrapped__
  monkeypatch.setattr(jax, "local_devices", devices)
  with pytest.raises(NotImplementedError, match=r"Tesla T4 has .* 7\.5.*8\.0"):
    run("triton", CONFIG).trace(*_arguments())
  traced = run(None, CONFIG).trace(*_arguments())
  monkeypatch.undo()
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "triton" not in text


def test_residuals_are_those_of_the_kernels() -> None:
  """What crosses from one program to another: nothing of XLA's on a GPU."""
  inputs, _, _ = _arguments()

  def kept(implementation: Any) -> int:
    @jax.jit
    def run(inputs: Any) -> Any:
      return nsa_jax.native_sparse_attention(
        **inputs, config=CONFIG, implementation=implementation
      )

    pullback = jax.eval_shape(lambda x: jax.vjp(run, x)[1], inputs)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))

  assert kept(None) == kept("triton")


def _count(jaxpr: Any) -> int:
  """Passes of a branch or of the selection in a program."""
  inner = [
    getattr(leaf, "jaxpr", leaf)
    for eqn in jaxpr.eqns
    for leaf in jax.tree.leaves(eqn.params)
  ]
  return sum(
    eqn.primitive.name == "nsa_by_platform" for eqn in jaxpr.eqns
  ) + sum(_count(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))


def test_remat_of_named_values_runs_no_forward_pass_twice() -> None:
  inputs, _, dout = _arguments()
  # Three branches and the selection forward, three branches backward.
  for keep, calls in ((True, 4 + 3), (False, 8 + 3)):
    run = helpers.remat_vjp(keep, CONFIG)
    assert _count(jax.make_jaxpr(run)(inputs, dout).jaxpr) == calls


# ------------------------------------------------------------- transformations


def _vjp(inputs: Any, dout: Any, implementation: Any = None) -> Any:
  """(out, ids, gradients)."""

  def attend(inputs: Any) -> Any:
    return nsa_jax.native_sparse_attention(
      **inputs,
      config=CONFIG,
      implementation=implementation,
      return_block_ids=True,
    )

  out, pullback, ids = jax.vjp(attend, inputs, has_aux=True)
  return out, ids, pullback(dout)[0]


@pytest.fixture(scope="module")
def plain() -> Any:
  """(out, ids, gradients) on one device."""
  inputs, _, dout = _arguments()
  with jax.default_device(jax.devices("cpu")[0]):
    return jax.jit(_vjp)(inputs, dout)


def _check(actual: Any, expected: Any) -> None:
  np.testing.assert_array_equal(actual[1], expected[1])
  helpers.assert_close(actual[::2], expected[::2], "float32", gradient=1)


def test_vmap(plain: Any) -> None:
  inputs, _, dout = _arguments()
  split = jax.tree.map(lambda x: x[:, None], (inputs, dout))
  mapped = jax.jit(jax.vmap(_vjp))
  _check(jax.tree.map(lambda x: x[:, 0], mapped(*split)), plain)
  text = _cuda(mapped, *split)
  assert all(name in text for name in KERNELS)

  def kernels(text: str) -> list[str]:
    """Shapes of the arguments and results, temporary ones among them."""
    return sorted(re.findall(r"custom_call @[^(]*triton.*?(\(tensor.*)", text))

  # Mapped calls are batch rows: not each has its own temporary arrays.
  assert kernels(text)
  assert kernels(text) == kernels(_cuda(jax.jit(_vjp), inputs, dout))


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_nested_vmap_with_shared_keys(implementation: Any) -> None:
  rng = np.random.default_rng(0)
  query = helpers.normal(rng, (2, 3, 1, 9, 2, 16), "float32")
  key, value = (
    helpers.normal(rng, (2, 1, 9, 1, 16), "float32") for _ in range(2)
  )

  def attend(query: Any, key: Any, value: Any) -> Any:
    return nsa_jax.window_attention(
      query, key, value, config=CONFIG, implementation=implementation
    )[0]

  inner = jax.vmap(attend, in_axes=(0, None, None))
  mapped = jax.jit(jax.vmap(inner))(query, key, value)
  # As batch rows, without vmap.
  rows = query.reshape(6, *query.shape[3:])
  want = attend(rows, *(x.repeat(3, axis=0)[:, 0] for x in (key, value)))
  helpers.assert_close(mapped.reshape(want.shape), want, "float32")


def test_vmap_of_size_0() -> None:
  query, key = np.ones((0, 1, 9, 2, 16)), np.ones((0, 1, 9, 1, 16))

  def attend(query: Any, key: Any) -> Any:
    return nsa_jax.window_attention(query, key, key, config=CONFIG)[0]

  assert jax.vmap(attend)(query, key).shape == (0, 1, 9, 2, 16)


def test_pmap(plain: Any) -> None:
  inputs, _, dout = _arguments()
  split = jax.tree.map(lambda x: x[:, None], (inputs, dout))
  mapped = jax.pmap(_vjp, devices=jax.devices("cpu")[:2])
  actual = jax.tree.map(lambda x: np.asarray(x)[:, 0], mapped(*split))
  _check(actual, plain)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma: bool, plain: Any) -> None:
  """Interpreted kernels too."""
  inputs, _, dout = _arguments()
  mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("batch", "head"))
  spec = P("batch", None, "head")

  for implementation in (None, "triton"):
    run = jax.jit(
      jax.shard_map(
        functools.partial(_vjp, implementation=implementation),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
      )
    )
    _check(run(inputs, dout), plain)
    if implementation is None:
      with jax.default_device(None):
        traced = run.trace(inputs, dout)
        text = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "triton" not in text


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize(
  "derivative, kind",
  [
    (lambda f: lambda x: jax.jvp(f, (x,), (x,)), "reverse-mode"),
    (lambda f: lambda x: jax.linearize(f, x)[1](x), "reverse-mode"),
    (jax.jacfwd, "reverse-mode"),
    (jax.hessian, "second"),
    (lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()), "second"),
  ],
  ids=["jvp", "linearize", "jacfwd", "hessian", "grad of grad"],
)
def test_other_derivatives_need_the_name_xla(
  derivative: Any, kind: str, implementation: Any
) -> None:
  query, (key, value) = _arguments()[0]["query"], _arguments()[0]["window"]

  def derive(implementation: Any) -> Any:
    def total(query: Any) -> Any:
      out = nsa_jax.window_attention(
        query, key, value, config=CONFIG, implementation=implementation
      )[0]
      return out.sum()

    return derivative(total)

  assert jax.jit(derive("xla")).lower(query)
  match = rf'{kind}.* derivatives.*pass `implementation`="xla"'
  with pytest.raises(NotImplementedError, match=match):
    jax.jit(derive(implementation)).lower(query)
  with pytest.raises(NotImplementedError, match=match):
    derive(implementation)(query)


def test_arrays_without_a_tangent_get_none() -> None:
  """In a loop whose tangents are zero at first, and where none is."""
  query, (key, value) = _arguments()[0]["query"], _arguments()[0]["window"]

  def loop(key: Any) -> Any:
    def step(query: Any, _: Any) -> Any:
      out, _ = nsa_jax.window_attention(query, key, value, config=CONFIG)
      return out, None

    return jax.lax.scan(step, query, None, length=2)[0].sum()

  assert jax.jit(jax.grad(loop)).lower(key)
  assert jax.jit(lambda x: jax.jvp(lambda x: x * loop(key), (x,), (x,))).lower(
    1.0
  )
