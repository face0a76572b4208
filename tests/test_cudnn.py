"""`"cudnn"`: window and full attention, and what it refuses to do."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import nsa_jax
from nsa_jax import NSAConfig, TransformerConfig, TransformerLM, cudnn
from tests import helpers
from tests.helpers import Dims

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
  monkeypatch.setattr(cudnn, "max_head_dim", lambda: 256)
  return seen


@pytest.mark.parametrize("keys, value_dim", [(40, 16), (9, 16), (40, 32)])
def test_serves_the_window(keys: int, value_dim: int, calls: list[Any]) -> None:
  dims = Dims(CONFIG, 2, keys, keys, 2, 2, 16, value_dim)
  actual = _native(("cudnn", "xla"), dims)
  window = min(16, keys)
  assert {c["local_window_size"] for c in calls} == {(window - 1, 0)}
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
    ({}, Dims(CONFIG, 2, 40, 40, 2, 2, 16, 12)),
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


WINDOW: dict[str, Any] = {
  "config": CONFIG,
  "return_lse": False,
  "implementation": "cudnn",
}


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
  "change, widths, message",
  [
    ({"return_lse": True}, (16, 16), "returns lse.*`return_lse`=False"),
    ({"query_offset": 1}, (16, 16), "start at the same static position"),
    ({"dtype": jnp.float32}, (16, 16), "`query` of dtype float32"),
    ({}, (12, 16), "`query` has head dimension 12.* up to 256"),
    ({}, (16, 264), "`value` has head dimension 264.* up to 256"),
  ],
)
def test_says_why(
  change: dict[str, Any], widths: tuple[int, int], message: str
) -> None:
  call = WINDOW | change
  dtype = call.pop("dtype", jnp.bfloat16)
  x, value = (jnp.zeros((1, 8, 2, width), dtype) for width in widths)
  with pytest.raises(NotImplementedError, match=f"'cudnn': .*{message}"):
    nsa_jax.window_attention(x, x, value, **call)


def test_no_cudnn_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(cudnn, "max_head_dim", lambda: 256)
  if jax.default_backend() == "gpu":

    def attend(*_: Any, **__: Any) -> Any:
      raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="cuDNN is not detected"):
    nsa_jax.window_attention(x, x, x, **WINDOW)


def test_the_device_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
  class Device:
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    compute_capability = "9.0"
    device_kind = "NVIDIA H100"

  if jax.default_backend() != "gpu":
    with pytest.raises(NotImplementedError, match="no NVIDIA GPU"):
      cudnn.max_head_dim()
  monkeypatch.setattr(jax, "devices", lambda backend=None: [Device])
  assert cudnn.max_head_dim() == 256
  monkeypatch.setattr(Device, "compute_capability", "8.6")
  assert cudnn.max_head_dim() == 128
  monkeypatch.setattr(Device, "compute_capability", "7.5")
  with pytest.raises(NotImplementedError, match=r"7\.5.*8\.0 and newer"):
    cudnn.max_head_dim()


# ------------------------------------------------------------- full attention


def test_full_attention_takes_it_by_default(calls: list[Any]) -> None:
  """Where nobody asks for the lse, with heads of two sizes as well."""
  inputs, _ = _arguments(Dims(CONFIG, 2, 40, 40, 2, 2, 16, 32))
  query, (key, value) = inputs["query"], inputs["window"]
  out = nsa_jax.full_attention(query, key, value, return_lse=False)
  assert [c["local_window_size"] for c in calls] == [None] * len(calls)
  assert calls
  calls.clear()
  expected, _ = nsa_jax.full_attention(query, key, value)
  assert not calls
  helpers.assert_close(out, expected, "bfloat16")
  nsa_jax.full_attention(
    query, key, value, return_lse=False, segment_ids=jnp.ones((2, 40), int)
  )
  assert not calls


def _pullback(implementation: Any) -> Any:
  """Parameters of a model with full attention, and its loss and gradients."""
  config = TransformerConfig(
    vocab_size=17,
    num_layers=2,
    model_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=10,
    attention="full",
    scan_layers=True,
    dtype=jnp.bfloat16,
    implementation=implementation,
  )
  model = TransformerLM(config)
  tokens = jnp.zeros((2, 40), jnp.int32)
  reference = dataclasses.replace(config, implementation="reference")
  params = jax.jit(TransformerLM(reference).init)(jax.random.key(0), tokens)

  def loss(params: Any, tokens: Any) -> Any:
    return jnp.square(jnp.asarray(model.apply(params, tokens))).mean()

  return params, jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
  "implementation", [None, "xla", ("xla",), ("cudnn", "xla")]
)
def test_models_take_what_was_asked_for(
  implementation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As if a GPU with cuDNN were here: lowering needs no more."""
  monkeypatch.setattr(cudnn, "max_head_dim", lambda: 256)
  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )
  params, pullback = _pullback(implementation)
  traced = pullback.trace(params, jnp.zeros((2, 88), jnp.int32))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  taken = implementation is None or "cudnn" in implementation
  assert ("__cudnn$fmhaSoftmax(" in text) == taken
  assert ("__cudnn$fmhaSoftmaxBackward(" in text) == taken


@pytest.mark.gpu
def test_gpu_full_attention_matches_xla() -> None:
  params, default = _pullback(None)
  _, portable = _pullback("xla")
  tokens = np.random.default_rng(0).integers(0, 17, (2, 40))
  assert "cudnn" in default.lower(params, tokens).as_text()
  loss, grads = default(params, tokens)
  want_loss, want_grads = portable(params, tokens)
  np.testing.assert_allclose(loss, want_loss, rtol=2e-2)
  for a, b in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
  ):
    assert jnp.linalg.norm(a - b) <= 5e-2 * jnp.linalg.norm(b)


@pytest.mark.gpu
def test_gpu_matches_xla() -> None:
  dims = Dims(NSAConfig(), 1, 1024, 1024, 2, 4, 64, 64)
  actual, expected = (
    _native(name, dims) for name in (("cudnn", "triton", "xla"), "xla")
  )
  helpers.assert_close(actual[0], expected[0], "bfloat16")
  helpers.assert_close(actual[1], expected[1], "bfloat16", gradient=8)
