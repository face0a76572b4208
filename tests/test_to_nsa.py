"""Dense models made sparse."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, TransformerConfig, TransformerLM
from nsa_jax.models.convert import to_nsa

NSA = NSAConfig(8, 4, 16, num_selected=4, window=16)
TOKENS = jax.random.randint(jax.random.key(1), (2, 160), 0, 256)


def dense(**options: Any) -> tuple[TransformerConfig, Any]:
  """A dense model whose attention is not uniform."""
  fields: dict[str, Any] = {
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "attention": "full",
    "nsa": NSA,
  }
  config = TransformerConfig(**fields | options)
  shapes = jax.eval_shape(TransformerLM(config).init, jax.random.key(0), TOKENS)
  rng = np.random.default_rng(0)
  return config, jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    shapes["params"],
  )


def logits(config: TransformerConfig, params: Any, tokens: Any) -> Any:
  apply = jax.jit(TransformerLM(config).apply)
  return jax.nn.log_softmax(apply({"params": params}, tokens))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"scan_layers": True, "normalize_qk": True, "tie_embeddings": False},
    {"biases": ("query", "key", "value", "out"), "param_dtype": "bfloat16"},
    {"attention": ("window", "full"), "select": "means"},
  ],
  ids=["plain", "scanned", "biases", "kinds"],
)
def test_parameters_are_those_of_the_sparse_model(options):
  for compression in ("mean", "weighted", "linear"):
    config, params = dense(**options)
    config, params = to_nsa(config, params, compression=compression)
    assert config.layer_kinds == ("nsa", "nsa")
    assert config.select == dense(**options)[0].select
    expected = jax.eval_shape(
      TransformerLM(config).init, jax.random.key(0), TOKENS
    )["params"]
    found = jax.eval_shape(lambda x: x, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_phi_starts_as_the_mean():
  config, params = dense()
  means, *others = (
    logits(*to_nsa(config, params, compression=kind), TOKENS)
    for kind in ("mean", "weighted", "linear")
  )
  for other in others:
    np.testing.assert_allclose(other, means, rtol=1e-5, atol=2e-5)


def test_chosen_layers_and_hyperparameters():
  config, params = dense()
  nsa = NSAConfig(4, 4, 8, num_selected=4, window=8)
  sparse, made = to_nsa(config, params, layers=[1], nsa=nsa)
  assert sparse.layer_kinds == ("full", "nsa")
  assert sparse.nsa == nsa
  first, second = (params[f"layer_{i}"]["attention"] for i in range(2))
  kept, new = (made[f"layer_{i}"]["attention"] for i in range(2))
  assert kept["out"]["kernel"] is first["out"]["kernel"]
  assert new["out"]["kernel"] is second["out"]["kernel"]
  assert "gate" not in second
  np.testing.assert_allclose(
    jax.nn.sigmoid(new["gate"]["bias"]),
    np.tile([0.05, 0.9, 0.05], (4, 1)),
    atol=1e-6,
  )


def test_layers_keep_hyperparameters_of_their_own():
  wide, new = (
    dataclasses.replace(NSA, window=64),
    NSAConfig(4, 4, 8, num_selected=4),
  )
  config, params = dense(
    num_layers=3,
    attention=["window", "full", "window"],
    layer_nsa=[NSA, NSA, wide],
  )
  for nsa, want in (
    (None, [NSA, NSA, wide]),
    (new, [dataclasses.replace(new, window=16), new, new]),
  ):
    sparse, made = to_nsa(
      config, params, layers=[1, 2], nsa=nsa, compression="weighted"
    )
    assert [sparse.of_layer(i).nsa for i in range(3)] == want
    expected = jax.eval_shape(
      TransformerLM(sparse).init, jax.random.key(0), TOKENS
    )["params"]
    chex.assert_trees_all_equal_shapes(made, expected)


def test_rows_that_are_read_whole_are_as_before():
  # 64 tokens are 4 blocks: the selected branch is full attention.
  config, params = dense()
  short = TOKENS[:, :64]
  before = logits(config, params, short)

  def distance(gates):
    after = logits(*to_nsa(config, params, gates=gates), short)
    return float((jnp.exp(before) * (before - after)).sum(-1).mean())

  uniform = float((jnp.exp(before) * (before + np.log(256))).sum(-1).mean())
  assert distance((1e-6, 1 - 1e-6, 1e-6)) < 1e-6 * uniform
  assert distance((0.05, 0.9, 0.05)) < 0.05 * uniform


def test_wrong_arguments():
  config, params = dense()
  sparse = dataclasses.replace(config, attention="nsa")
  scanned, stacked = dense(scan_layers=True)
  for call, message in (
    ((sparse, params), r"`config.attention`='nsa' must be dense"),
    ((3, params), "`config`=3 must be a TransformerConfig"),
    ((config, {}), r"`params` has `embedding` of shape None; by `config`"),
    ((scanned, params), r"`params` has `layer_0/.*` of shape .*; by `config`"),
  ):
    with pytest.raises(ValueError, match=message):
      to_nsa(*call)
  for options, message in (
    ({"layers": []}, r"`layers`=\[\] must be a sequence"),
    ({"layers": "0"}, "`layers`='0' must be a sequence"),
    ({"layers": [2]}, r"`layers`=\[2\] must be less than `num_layers`=2"),
    ({"layers": [-1]}, "`layers`=-1 must be at least 0"),
    ({"compression": "mlp"}, "`compression`='mlp' must be one of"),
    ({"nsa": 3}, "`nsa`=3 must be an NSAConfig"),
    ({"gates": (0.5, 0.5)}, r"`gates`=\(0.5, 0.5\) must be three numbers"),
    ({"gates": (0, 1, 0)}, r"`gates`=\(0, 1, 0\) must be three numbers"),
    ({"rope_compressed": "no"}, "`rope_compressed`='no' must be one of"),
  ):
    with pytest.raises(ValueError, match=message):
      to_nsa(config, params, **options)
  with pytest.raises(ValueError, match=r"`layers`=\[0\] must be all with"):
    to_nsa(scanned, stacked, layers=[0])
  with pytest.raises(NotImplementedError, match="`attention_sinks`=True"):
    to_nsa(*dense(attention_sinks=True))
