"""The lookup of embeddings: any vocabulary and length, every transformation."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.models.embedding import embed


def _tokens(length: int, vocabulary: int) -> Any:
  """Tokens like text, few of them frequent, and some outside: [2, length]."""
  rng = np.random.default_rng(0)
  weight = 1 / np.arange(1, vocabulary + 1)
  tokens = rng.choice(vocabulary, (2, length), p=weight / weight.sum())
  tokens = tokens.astype(np.int32)
  tokens[0, length // 2], tokens[1, length // 3] = -1, vocabulary
  return tokens


@jax.jit(static_argnums=3)
def _gradient(table: Any, tokens: Any, dout: Any, dtype: Any) -> Any:
  out, pullback = jax.vjp(lambda table: embed(table, tokens, dtype), table)
  return out, pullback(dout)[0]


@pytest.mark.parametrize(
  "length, vocabulary, dtype",
  [
    (1000, 300, "float32"),  # runs inside blocks and over their borders
    (500, 2, "bfloat16"),  # runs of many blocks
    (64, 5000, "float16"),  # exactly one block
    (9, 7, "float32"),
  ],
)
def test_rows_and_gradient(length: int, vocabulary: int, dtype: str) -> None:
  rng = np.random.default_rng(1)
  tokens = _tokens(length, vocabulary)
  table = rng.standard_normal((vocabulary, 6)).astype(np.float32)
  dout = jnp.asarray(rng.standard_normal((2, length, 6)), dtype)
  out, grad = _gradient(table, tokens, dout, dtype)
  inside = (tokens >= 0) & (tokens < vocabulary)
  expected = np.asarray(jnp.asarray(table, dtype))[tokens[inside]]
  np.testing.assert_array_equal(np.asarray(out)[inside], expected)
  assert np.isnan(np.asarray(out, np.float32)[~inside]).all()
  want = np.zeros(table.shape)
  np.add.at(want, tokens[inside], np.asarray(dout, np.float64)[inside])
  # Sums of N(0, 1), however many, whatever the dtype of the cotangent is.
  assert grad.dtype == jnp.float32
  np.testing.assert_allclose(grad, want, atol=1e-5 * max(1, length / 50))


def test_no_scatter_adds_two_rows() -> None:
  """Such sums would be in another order in every run on a GPU."""
  tokens = _tokens(200, 11)
  lowered = _gradient.lower(
    jnp.ones((11, 6)), tokens, jnp.ones((2, 200, 6)), "float32"
  )
  found = re.findall(r"unique_indices = (\w+)", lowered.as_text())
  assert found
  assert set(found) == {"true"}


def test_every_transformation() -> None:
  tokens = _tokens(9, 4)
  table = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))

  def loss(table: Any, tokens: Any) -> Any:
    return jnp.nansum(embed(table, tokens, "float32") ** 3)

  inside = (tokens >= 0) & (tokens < 4)
  counts = np.bincount(tokens[inside], minlength=4)
  want = 3 * counts[:, None] * np.asarray(table) ** 2
  np.testing.assert_allclose(jax.grad(loss)(table, tokens), want, rtol=1e-5)
  _, tangent = jax.jvp(lambda x: loss(x, tokens), (table,), (table,))
  np.testing.assert_allclose(tangent, (want * table).sum(), rtol=1e-5)
  rows = jax.vmap(jax.grad(loss), (None, 0))(table, tokens[:, None])
  np.testing.assert_allclose(rows.sum(0), want, rtol=1e-5)
  hessian = jax.hessian(loss)(table, tokens).reshape(12, 12)
  second = 6 * counts[:, None] * np.asarray(table)
  np.testing.assert_allclose(hessian, np.diag(second.ravel()), atol=1e-4)
