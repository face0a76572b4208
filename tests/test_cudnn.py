"""`"cudnn"`: the window of the whole op, and what it refuses to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig, dispatch
from tests import helpers
from tests.helpers import Dims

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)
DIMS = Dims(CONFIG, 2, 40, 40, 2, 2, 16, 16)


def _program(implementation: Any, dims: Dims = DIMS, **kwargs: Any) -> Any:
  """Out and gradients, lowered but not compiled."""
  dtype = kwargs.pop("dtype", "bfloat16")

  @jax.jit
  def run(inputs: Any, dout: Any) -> Any:
    def attend(inputs: Any) -> Any:
      return nsa_jax.native_sparse_attention(
        **inputs, config=dims.config, implementation=implementation, **kwargs
      )

    out, pullback = jax.vjp(attend, inputs)
    return out, pullback(dout)

  return run.lower(*_arguments(dims, dtype))


def _arguments(dims: Dims, dtype: str = "bfloat16") -> Any:
  return helpers.make_inputs(dims, dtype), helpers.make_cotangent(dims, dtype)


def _native(implementation: Any, dims: Dims) -> Any:
  return _program(implementation, dims).compile()(*_arguments(dims))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
  """XLA in place of cuDNN, which is on NVIDIA GPUs only."""
  seen: list[Any] = []
  attend = jax.nn.dot_product_attention

  def stand_in(*args: Any, implementation: str, **kwargs: Any) -> Any:
    assert implementation == "cudnn"
    seen.append(kwargs)
    return attend(*args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  return seen


@pytest.mark.parametrize("keys", [40, 9])
def test_serves_the_window(keys: int, calls: list[Any]) -> None:
  dims = Dims(CONFIG, 2, keys, keys, 2, 2, 16, 16)
  actual = _native(("cudnn", "xla"), dims)
  window = min(16, keys)
  assert [c["local_window_size"] for c in calls] == [(window - 1, 0)]
  helpers.assert_close(
    actual, _native("xla", dims), "bfloat16", gradient=2, what="cudnn"
  )


def test_the_default_does_not_take_it(calls: list[Any]) -> None:
  _program(None)
  assert not calls


@pytest.mark.parametrize(
  "kwargs, dims",
  [
    ({"query_offset": 1}, DIMS),
    ({"query_offset": jnp.zeros((), jnp.int32)}, DIMS),
    ({"segment_ids": np.ones((2, 40), np.int32)}, DIMS),
    ({}, Dims(CONFIG, 2, 5, 40, 2, 2, 16, 16)),
    ({"dtype": "float32"}, DIMS),
    ({}, Dims(CONFIG, 2, 40, 40, 2, 2, 16, 32)),
  ],
  ids=["offset", "traced offset", "segments", "T < S", "float32", "V"],
)
def test_falls_through_where_it_cannot(
  kwargs: Any, dims: Dims, calls: list[Any]
) -> None:
  """To the program of the next name, to the letter."""
  actual = _program(("cudnn", "xla"), dims, **kwargs).as_text()
  assert not calls
  assert actual == _program("xla", dims, **kwargs).as_text()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"with_lse": True}, "returns lse.*`native_sparse_attention`"),
    ({"plain": False}, "`query_offset`, `segment_ids`"),
    ({"dtype": jnp.float32}, "`query` of dtype float32"),
    ({"value_dim": 8}, "`value` has head dimension 8.*16"),
  ],
)
def test_says_why(change: Any, message: str) -> None:
  with pytest.raises(NotImplementedError, match=f"'cudnn': .*{message}"):
    _window(**change)


def _window(
  dtype: Any = jnp.bfloat16,
  value_dim: int = 16,
  plain: bool = True,
  with_lse: bool = False,
) -> Any:
  x = jnp.zeros((1, 8, 2, 16), dtype)
  return dispatch.call(
    "window_attention",
    "cudnn",
    x,
    x,
    x[..., :value_dim],
    config=CONFIG,
    scale=1.0,
    key_offset=0,
    queries=None,
    cudnn={"plain": plain, "with_lse": with_lse},
  )


def test_the_public_op_says_why() -> None:
  x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match=r"'cudnn': .*returns lse"):
    nsa_jax.window_attention(x, x, x, config=CONFIG, implementation="cudnn")


def test_no_cudnn_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
  def attend(*_: Any, **__: Any) -> Any:
    raise RuntimeError("cuDNN is not detected.")

  if jax.default_backend() == "gpu":
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  with pytest.raises(NotImplementedError, match="cuDNN is not detected"):
    _window()


@pytest.mark.gpu
def test_gpu_matches_xla() -> None:
  dims = Dims(NSAConfig(), 1, 1024, 1024, 2, 4, 64, 64)
  actual, expected = (
    _native(name, dims) for name in (("cudnn", "triton", "xla"), "xla")
  )
  helpers.assert_close(actual[0], expected[0], "bfloat16")
  helpers.assert_close(actual[1], expected[1], "bfloat16", gradient=8)
