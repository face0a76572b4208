"""The way from a public op to a kernel, and what a backend has to bring."""

import collections
import inspect
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import nsa_jax
from nsa_jax import NSAConfig, dispatch
from pallas_kernels import mosaic_gpu, triton
from tests import helpers
from tests.helpers import Dims

ROOT = pathlib.Path(nsa_jax.__file__).parents[1]
CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)


# ------------------------------------------------------------------- the path


def _own_frames() -> list[str]:
  """Functions of the two packages on the stack, the innermost last."""
  frames, frame = [], sys._getframe(1)
  while frame is not None:
    code = frame.f_code
    for package in ("nsa_jax", "pallas_kernels"):
      if pathlib.Path(code.co_filename).is_relative_to(ROOT / package):
        frames.append(f"{pathlib.Path(code.co_filename).stem}.{code.co_name}")
    frame = frame.f_back  # type: ignore[assignment]
  return frames[::-1]


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
  """The deepest stack of our own at `pl.pallas_call`, by name of the kernel."""
  found: dict[str, list[str]] = {}
  call = pl.pallas_call

  def recorded(*args: Any, name: str, **kwargs: Any) -> Any:
    found[name] = max(_own_frames(), found.get(name, []), key=len)
    return call(*args, name=name, **kwargs)

  monkeypatch.setattr(pl, "pallas_call", recorded)
  return found


@pytest.mark.parametrize("group", [2, 16])
def test_from_op_to_kernel_in_four_hops(
  group: int, paths: dict[str, list[str]]
) -> None:
  """Op, its branch, `attend`, the backend's `forward`; without `jit`.

  The hops are in this order, and all frames of ours, the switch of platforms
  and the loops over chunks included, are ten at most.
  """
  dims = Dims(CONFIG, 1, 23, 23, 1, group, 16, 16)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")

  def run(inputs: Any, dout: Any) -> Any:
    _, pullback = jax.vjp(
      lambda x: nsa_jax.native_sparse_attention(
        **x, config=CONFIG, implementation="triton"
      ),
      inputs,
    )
    return pullback(dout)

  run(inputs, dout)
  selected = "selected" if group > 8 else "selected_by_block"
  forward = ("compressed", selected, "window")
  for branch in forward:
    path = paths[f"nsa_{branch}_fwd"]
    op = branch.removesuffix("_by_block")
    hops = [
      "nsa.native_sparse_attention",
      "branches.attend_branch",
      "dispatch._attend_fwd",
      f"{op}.forward",
    ]
    assert [frame for frame in path if frame in hops] == hops, path
  backward = {
    "compressed": ("compressed_dq", "compressed_dkv"),
    "selected": ("selected_dq", "selected_dkv")
    if group > 8
    else ("selected_by_block_bwd",),
    "window": ("window_dq", "window_dkv"),
  }
  for op, kernels in backward.items():
    for kernel in kernels:
      path = paths[f"nsa_{kernel}"]
      hops = ["dispatch._attend_bwd", f"{op}.backward"]
      assert [frame for frame in path if frame in hops] == hops, path
  longest = max(paths.values(), key=len)
  assert len(longest) <= 10, longest


def test_a_kernel_is_traced_once_for_each_platform(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Only for those that a program is lowered for, forward and backward."""
  traced: collections.Counter[tuple[str, bool]] = collections.Counter()
  call = pl.pallas_call

  def counted(kernel: Any, *args: Any, name: str, **kwargs: Any) -> Any:
    def body(*refs: Any) -> Any:
      traced[name, kwargs["interpret"]] += 1
      return kernel(*refs)

    return call(body, *args, name=name, **kwargs)

  monkeypatch.setattr(pl, "pallas_call", counted)
  dims = Dims(CONFIG, 1, 23, 23, 1, 2, 16, 16)
  inputs = helpers.make_inputs(dims, "float32")
  query, (key, value) = inputs["query"], inputs["window"]
  kernels = ("nsa_window_fwd", "nsa_window_dkv", "nsa_window_dq")
  for implementation, platforms, expected in (
    ("triton", ("cuda",), {False}),
    ("triton", ("cpu",), {True}),
    ("triton", ("cpu", "cuda"), {False, True}),
    (None, ("cpu", "cuda"), {False}),
    (None, ("cpu",), set()),
  ):
    traced.clear()

    @jax.jit
    def run(query: Any, implementation: Any = implementation) -> Any:
      out, pullback = jax.vjp(
        lambda *qkv: nsa_jax.window_attention(
          *qkv, config=CONFIG, implementation=implementation
        )[0],
        query,
        key,
        value,
      )
      return pullback(out)

    with helpers.h200():
      jax.export.export(
        run,
        platforms=platforms,
        disabled_checks=nsa_jax.EXPORT_DISABLED_CHECKS,
      )(query)
    assert traced == {(k, i): 1 for k in kernels for i in expected}


# ----------------------------------------------------------------- a backend


@pytest.mark.parametrize("backend", [triton, mosaic_gpu])
def test_every_module_of_a_backend_has_the_same_three_functions(
  backend: Any,
) -> None:
  served = [name for name in backend.__all__]
  assert set(served) <= {*dispatch.ATTENTION_OPS, "select_blocks", "decode"}
  for name in served:
    module = getattr(backend, name)
    for function, rest in (
      ("check", []),
      ("forward", []),
      ("backward", ["out", "lse", "dout", "dlse"]),
    ):
      parameters = inspect.signature(getattr(module, function)).parameters
      names = list(parameters)
      assert len(names[:3]) == 3
      assert (names[0], names[2]) == ("spec", "index"), (name, function)
      if name in dispatch.ATTENTION_OPS:
        assert names[3:] == rest, (name, function)


class _Toy:
  """The window alone, by XLA, for one head dimension."""

  calls: list[str]

  def __init__(self) -> None:
    self.calls = []

  def check(self, spec: Any, qkv: Any, index: Any) -> None:
    if qkv[0].shape[-1] != 16:
      raise NotImplementedError(f"width {qkv[0].shape[-1]}: the toy takes 16")

  def forward(self, spec: Any, qkv: Any, index: Any) -> Any:
    self.calls.append("forward")
    return dispatch.PORTABLE["xla"].window(spec, qkv, index)

  def backward(
    self, spec: Any, qkv: Any, index: Any, out: Any, lse: Any, dout: Any,
    dlse: Any,
  ) -> Any:  # fmt: skip
    self.calls.append("backward")
    del out, lse
    xla = dispatch.PORTABLE["xla"].window
    return jax.vjp(lambda *x: xla(spec, x, index), *qkv)[1]((dout, dlse))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> _Toy:
  """Registered, as a backend of one's own would be, by one object."""
  window = _Toy()
  monkeypatch.setitem(dispatch.BACKENDS, "toy", SimpleNamespace(window=window))
  return window


def _vjp(implementation: Any, width: int = 16) -> Any:
  dims = Dims(CONFIG, 1, 23, 23, 1, 2, width, 16)
  inputs = helpers.make_inputs(dims, "float32")
  dout = helpers.make_cotangent(dims, "float32")

  @jax.jit
  def run(inputs: Any, dout: Any) -> Any:
    out, pullback = jax.vjp(
      lambda x: nsa_jax.native_sparse_attention(
        **x, config=CONFIG, implementation=implementation
      ),
      inputs,
    )
    return out, pullback(dout)

  return run(inputs, dout)


def test_a_backend_serves_what_it_has_and_the_rest_falls_back(
  toy: _Toy,
) -> None:
  names: Any = ("toy", "xla")
  actual, expected = _vjp(names), _vjp("xla")
  assert toy.calls == ["forward", "backward"]
  helpers.assert_close(actual, expected, "float32", gradient=1)
  # It says that it cannot do this width; the next one can.
  helpers.assert_close(_vjp(names, 32), _vjp("xla", 32), "float32", gradient=1)
  assert toy.calls == ["forward", "backward"]


def test_a_backend_by_name_says_why_it_cannot(toy: _Toy) -> None:
  name: Any = "toy"
  with pytest.raises(
    NotImplementedError,
    match=r"`implementation`='toy' cannot do this call of "
    r"`compressed_attention`: 'toy' has no `compressed_attention`",
  ):
    _vjp(name)
  wide: Any = np.zeros((1, 8, 1, 32), np.float32)
  with pytest.raises(
    NotImplementedError, match=r"`window_attention`: 'toy': width 32"
  ):
    nsa_jax.window_attention(
      wide, wide, wide, config=CONFIG, implementation=name
    )
  both: Any = ("toy", "triton")
  with pytest.raises(
    NotImplementedError,
    match=r"'toy' has no `block_scores`.*; 'triton' has no `block_scores`",
  ):
    nsa_jax.block_scores(
      wide,
      wide[:, :1],
      jnp.zeros((1, 8, 1)),
      config=CONFIG,
      key_length=8,
      implementation=both,
    )


class _Served:
  """An op of a backend that can do every call."""

  def __init__(self, forward: Any, backward: Any = None) -> None:
    self.forward, self.backward = forward, backward

  def check(self, spec: Any, arrays: Any, index: Any) -> None:
    pass


def _refuse(*arguments: Any) -> Any:
  assert len(arguments) == 7  # spec, arrays, index, out, lse, dout, dlse
  raise NotImplementedError("no derivatives here")


def test_a_backend_serves_the_selection(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Scores and ids; `backward` gets the arguments that the interface names."""
  xla = dispatch.PORTABLE["xla"]
  backend = SimpleNamespace(
    block_scores=_Served(xla.block_scores, _refuse),
    select_blocks=_Served(xla.select_blocks, _refuse),
  )
  monkeypatch.setitem(dispatch.BACKENDS, "toy", backend)
  dims = Dims(CONFIG, 1, 40, 40, 1, 2, 16, 16)
  inputs = helpers.make_inputs(dims, "float32")
  query, key = inputs["query"], inputs["compressed"].key
  lse: Any = np.zeros(query.shape[:3], np.float32)

  def run(op: Any, query: Any, name: Any) -> Any:
    return op(
      query, key, lse, config=CONFIG, key_length=40, implementation=name
    )

  for op in (nsa_jax.block_scores, nsa_jax.select_blocks):
    np.testing.assert_array_equal(run(op, query, "toy"), run(op, query, "xla"))
  gradient = jax.grad(lambda q: run(nsa_jax.block_scores, q, "toy").sum())
  with pytest.raises(NotImplementedError, match="no derivatives here"):
    gradient(query)


def test_decoding_without_a_backward_is_differentiated_by_jax(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def forward(spec: Any, arrays: Any, index: Any) -> Any:
    batch, length = arrays.query.shape[:2]
    ids = jnp.zeros((batch, length, 1, CONFIG.num_selected), jnp.int32)
    return 2 * arrays.query, ids

  backend = SimpleNamespace(decode=_Served(forward))
  monkeypatch.setitem(dispatch.BACKENDS, "toy", backend)
  held = nsa_jax.cache.init(
    1, 32, config=CONFIG, num_kv_heads=1, head_dim=16
  )._replace(lengths=jnp.array([9]))
  name: Any = "toy"

  def total(query: Any) -> Any:
    gates = jnp.ones((1, 1, 2, 3))
    return nsa_jax.cache.attend(
      query, held, gates, config=CONFIG, query_offset=8, implementation=name
    ).sum()

  grad = jax.grad(total)(jnp.ones((1, 1, 2, 16)))
  np.testing.assert_array_equal(grad, np.full(grad.shape, 2))


def test_a_backend_that_returns_another_shape_is_named(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def forward(spec: Any, qkv: Any, index: Any) -> Any:
    return qkv[0], jnp.zeros(3)

  backend = SimpleNamespace(window=_Served(forward, _refuse))
  monkeypatch.setitem(dispatch.BACKENDS, "toy", backend)
  x: Any = np.ones((1, 8, 1, 16), np.float32)
  name: Any = "toy"
  with pytest.raises(TypeError, match=r"forward.* returned .*\(3,\).*, not "):
    nsa_jax.window_attention(x, x, x, config=CONFIG, implementation=name)
