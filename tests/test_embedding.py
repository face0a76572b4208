"""The lookup of embeddings: any vocabulary and length, every transformation."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nsa_jax.models.embedding import embed

FEW, MANY = 2048, 2049  # vocabularies of the two ways


def text_like(length: int, used: int, vocabulary: int) -> Any:
  """Tokens like text, few of them frequent, and some outside: [2, length]."""
  rng = np.random.default_rng(0)
  weight = 1 / np.arange(1, used + 1)
  tokens = rng.choice(used, (2, length), p=weight / weight.sum())
  # Spread over the vocabulary.
  tokens = (tokens * (vocabulary // used)).astype(np.int32)
  tokens[0, length // 2], tokens[1, length // 3] = -1, vocabulary
  return tokens


@jax.jit(static_argnums=3)
def _gradient(table: Any, tokens: Any, dout: Any, dtype: Any) -> Any:
  out, pullback = jax.vjp(lambda table: embed(table, tokens, dtype), table)
  return out, pullback(dout)[0]


@pytest.mark.parametrize(
  "length, used, vocabulary, dtype",
  [
    (1000, 300, MANY, "float32"),  # runs inside blocks and over their borders
    (500, 2, MANY, "bfloat16"),  # runs of many blocks
    (64, 3000, 5000, "float16"),  # exactly one block
    (9, 7, MANY, "float32"),
    (300, 300, 300, "float32"),
    (100, 7, FEW, "bfloat16"),
  ],
)
def test_rows_and_gradient(
  length: int, used: int, vocabulary: int, dtype: str
) -> None:
  rng = np.random.default_rng(1)
  tokens = text_like(length, used, vocabulary)
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


@pytest.mark.parametrize("vocabulary", [FEW, MANY])
def test_no_scatter_adds_two_rows(vocabulary: int) -> None:
  """Such sums would be in another order in every run on a GPU."""
  tokens = text_like(200, 11, vocabulary)
  text = _gradient.lower(
    jnp.ones((vocabulary, 6)), tokens, jnp.ones((2, 200, 6)), "float32"
  ).as_text()
  found = re.findall(r"unique_indices = (\w+)", text)
  assert set(found) == ({"true"} if vocabulary == MANY else set())
  assert ("stablehlo.scatter" in text) == (vocabulary == MANY)


def test_a_sharded_batch_sums_on_its_device() -> None:
  """With a small vocabulary: one all-reduce of the table's gradient."""
  mesh = Mesh(np.array(jax.devices()[:4]), "batch")
  split = NamedSharding(mesh, P("batch"))
  whole = NamedSharding(mesh, P())

  def gradient(table: Any, tokens: Any, dout: Any) -> Any:
    return jax.vjp(lambda table: embed(table, tokens, "float32"), table)[1](
      dout
    )[0]

  text: Any = (
    jax.jit(gradient, in_shardings=(whole, split, split), out_shardings=whole)
    .lower(
      jnp.ones((300, 6)), jnp.zeros((4, 20), jnp.int32), jnp.ones((4, 20, 6))
    )
    .compile()
    .as_text()
  )
  assert "all-gather" not in text
  (reduced,) = re.findall(r"f32\[([\d,]+)\]\S* all-reduce\(", text)
  assert reduced in ("300,6", "6,300")


@pytest.mark.parametrize("vocabulary", [4, MANY])
def test_every_transformation(vocabulary: int) -> None:
  tokens = text_like(9, 4, 4)
  rng = np.random.default_rng(0)
  table: Any = jnp.float32(rng.standard_normal((vocabulary, 3)))

  def loss(table: Any, tokens: Any) -> Any:
    return jnp.nansum(embed(table, tokens, "float32") ** 3)

  inside = (tokens >= 0) & (tokens < vocabulary)
  counts = np.bincount(tokens[inside], minlength=vocabulary)
  want = 3 * counts[:, None] * np.asarray(table) ** 2
  np.testing.assert_allclose(jax.grad(loss)(table, tokens), want, rtol=1e-5)
  _, tangent = jax.jvp(lambda x: loss(x, tokens), (table,), (table,))
  np.testing.assert_allclose(tangent, (want * table).sum(), rtol=1e-5)
  rows = jax.vmap(jax.grad(loss), (None, 0))(table, tokens[:, None])
  np.testing.assert_allclose(rows.sum(0), want, rtol=1e-5)
  # The Hessian is diagonal: its product with ones is the second derivative.
  _, second = jax.jvp(
    lambda x: jax.grad(loss)(x, tokens), (table,), (jnp.ones_like(table),)
  )
  twice = 6 * counts[:, None] * np.asarray(table)
  np.testing.assert_allclose(second, twice, atol=1e-4)
