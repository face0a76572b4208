"""Phi: the four functions that compress blocks of keys and values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from tests import helpers
from tests.oracle import mean_blocks

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 5)


def test_compress() -> None:
  """The four kinds of phi against one block at a time, with padding in NaN."""
  config = NSAConfig(4, 2, 4, 1, 0, 1, 1)
  rng = np.random.default_rng(7)
  kv_heads, width, hidden, width_out = 2, 3, 5, 6
  x = rng.standard_normal((2, 11, kv_heads, width))
  segments = helpers.int32([[1] * 6 + [0] * 2 + [2] * 3, [0] * 4 + [3] * 7])
  padding = segments == 0
  weight = rng.standard_normal((kv_heads, 4))
  position = rng.standard_normal((kv_heads, 4, width))
  linear = rng.standard_normal((kv_heads, 4 * width, width_out))
  w1 = rng.standard_normal((kv_heads, 4 * width, hidden))
  b1 = rng.standard_normal((kv_heads, hidden))
  w2 = rng.standard_normal((kv_heads, hidden, width_out))
  b2 = rng.standard_normal((kv_heads, width_out))

  def gelu(z: np.ndarray) -> np.ndarray:
    inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    return z / 2 * (1 + np.tanh(inner))

  def mlp(block: np.ndarray, k: int) -> np.ndarray:
    return gelu((block + position[k]).ravel() @ w1[k] + b1[k]) @ w2[k] + b2[k]

  kinds: dict[str, tuple[Callable, tuple, Callable]] = {
    "mean": (nsa_jax.compress_mean, (), lambda block, k: block.mean(0)),
    "weighted": (
      nsa_jax.compress_weighted,
      (weight,),
      lambda block, k: weight[k] @ block,
    ),
    "linear": (
      nsa_jax.compress_linear,
      (position, linear),
      lambda block, k: (block + position[k]).ravel() @ linear[k],
    ),
    "mlp": (nsa_jax.compress_mlp, (position, w1, b1, w2, b2), mlp),
  }
  with jax.enable_x64(True):
    for name, (function, parameters, phi) in kinds.items():
      # Padding counts as zeros, whatever it holds.
      clean = np.where(padding[:, :, None, None], 0, x)
      expected = np.array(
        [
          [
            [phi(row[s : s + 4, k], k) for k in range(kv_heads)]
            for s in (0, 2, 4, 6)
          ]
          for row in clean
        ]
      )
      bound = functools.partial(function, config=config)

      @jax.jit
      def run(x: Any, *parameters: Any, bound: Callable = bound) -> Any:
        call = functools.partial(bound, segment_ids=segments)
        out, pullback = jax.vjp(call, x, *parameters)
        return out, pullback(jnp.ones_like(out)), bound(x, *parameters)

      actual, grads, _ = run(helpers.poison(x, padding), *parameters)
      helpers.assert_close(actual, expected, "float64", what=name)
      assert not np.asarray(grads[0])[padding].any(), name
      assert all(np.isfinite(g).all() for g in grads), name
      # Without segments nothing is padding; shorter than a block, no rows.
      _, _, plain = run(clean, *parameters)
      helpers.assert_close(plain, expected, "float64", what=name)
      short = jax.eval_shape(bound, clean[:, :3], *parameters)
      assert short.shape == (2, 0, kv_heads, expected.shape[-1]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compress_mean_dtype(dtype: str) -> None:
  x = helpers.normal(np.random.default_rng(8), (2, 29, 2, 4), dtype)
  actual = nsa_jax.compress_mean(x, config=CONFIG)
  assert actual.dtype == x.dtype
  helpers.assert_close(actual, mean_blocks(x, CONFIG), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compress_mlp_in_half_precision(dtype: str) -> None:
  """More than one head; a hidden layer beyond the range of float16."""
  x = np.full((1, 8, 2, 4), 300).astype(dtype)
  w1 = np.full((2, 16, 8), 30).astype(dtype)  # hidden 144000
  w2 = np.full((2, 8, 4), 1e-4).astype(dtype)
  position, zeros = np.zeros((2, 4, 4), dtype), np.zeros((2, 8), dtype)
  actual = nsa_jax.compress_mlp(
    *(jnp.asarray(a) for a in (x, position, w1, zeros, w2, zeros[:, :4])),
    config=CONFIG,
  )
  assert actual.dtype == x.dtype
  assert actual.shape == (1, 3, 2, 4)
  want = 8 * 144000 * float(w2[0, 0, 0])
  np.testing.assert_allclose(np.asarray(actual, np.float32), want, rtol=2**-7)
