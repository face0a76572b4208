"""Parameters may be NumPy arrays, as readers of checkpoints return them.

Outside `jit` nothing turns them into arrays of jax: what a layer does with a
parameter itself must not need one. Their dtype may be one of `ml_dtypes`.
"""

import functools
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from nsa_jax.layers import linen

CONFIG = NSAConfig(4, 2, 4, 2, 0, 1, 3)
X = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)
DTYPES = (np.float32, ml_dtypes.bfloat16)


def _layer(**fields: Any) -> Any:
  return nsa_jax.NativeSparseAttention(
    2, 1, 4, config=CONFIG, normalize_qk=True, use_bias=True, **fields
  )


def _dense(**fields: Any) -> Any:
  options = nsa_jax.AttentionConfig(
    num_heads=2, num_kv_heads=1, head_dim=4, nsa=CONFIG, normalize_qk=True
  )
  return linen.DenseAttention(options, "full", **fields)


def _model(decode: bool = False, **fields: Any) -> Any:
  config = nsa_jax.TransformerConfig.preset(
    "tiny",
    **{
      "num_layers": 1,
      "model_dim": 8,
      "mlp_dim": 8,
      "vocab_size": 16,
      "num_heads": 2,
      "head_dim": 4,
      "nsa": CONFIG,
    }
    | fields,
  )
  return nsa_jax.TransformerLM(config, decode=decode)


MODULES: dict[str, Any] = {
  **{
    name: (_layer(compression=name), X)
    for name in ("mlp", "linear", "weighted", "mean")
  },
  "shared": (_layer(share_kv=True), X),
  "decode": (_layer(decode=True), X),
  "dense": (_dense(), X),
  "dense decode": (_dense(decode=True), X),
  "model": (_model(), TOKENS),
  "model, full": (_model(attention="full", tie_embeddings=False), TOKENS),
  "model, decode": (_model(decode=True, attention="full"), TOKENS),
  "model, scan": (_model(attention="full", scan_layers=True), TOKENS),
}


def _variables(module: Any, inputs: Any, dtype: Any, **call: Any) -> Any:
  """Variables in NumPy; parameters of `dtype`, an empty cache."""
  init = functools.partial(module.init, jax.random.key(0), **call)
  rng = np.random.default_rng(1)

  def fill(path: Any, x: Any) -> np.ndarray:
    if path[0].key != "params":
      return np.zeros(x.shape, x.dtype)
    return (0.3 * rng.standard_normal(x.shape)).astype(dtype)

  return jax.tree.map_with_path(fill, jax.eval_shape(init, inputs))


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
  """They see NumPy arrays here, as they do outside `jit`; nothing compiles.

  `test_wrong_arguments` does the same with float32.
  """
  module, inputs = MODULES[name]
  call: dict[str, Any] = {}
  if isinstance(module, linen.DenseAttention):
    call = {"positions": None, "segment_ids": None}
  variables = _variables(module, inputs, ml_dtypes.bfloat16, **call)
  run = functools.partial(module.apply, mutable=["cache"], **call)
  new = inputs[:, :1] if module.decode else inputs
  out, _ = jax.eval_shape(lambda: run(variables, new))
  assert out.shape[:2] == new.shape[:2]


def test_model_runs() -> None:
  """The same numbers as with arrays of jax, and `generate` takes them."""
  model = _model(attention="window", tie_embeddings=False, scan_layers=True)
  params = _variables(model, TOKENS, ml_dtypes.bfloat16)["params"]
  model, params = nsa_jax.unstack_layers(model, params)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
  actual: Any = model.apply({"params": params}, TOKENS)
  expected: Any = jax.jit(model.apply)({"params": params}, TOKENS)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  out = nsa_jax.generate(
    model, params, TOKENS[:, :3], max_new_tokens=2, temperature=0
  )
  assert out.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mlp", "linear", "weighted", "mean"])
def test_compress(name: str, dtype: Any) -> None:
  shapes: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {
      "position": (1, 4, 8),
      "w1": (1, 32, 5),
      "b1": (1, 5),
      "w2": (1, 5, 8),
      "b2": (1, 8),
    },
    "linear": {"position": (1, 4, 8), "weight": (1, 32, 8)},
    "weighted": {"weight": (1, 4)},
    "mean": {},
  }
  call = functools.partial(
    getattr(nsa_jax, f"compress_{name}"), config=CONFIG, x=X[:, :, None]
  )
  rng = np.random.default_rng(2)
  parameters = {
    key: rng.standard_normal(shape).astype(dtype)
    for key, shape in shapes[name].items()
  }
  actual, expected = call(**parameters), jax.jit(call)(**parameters)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
