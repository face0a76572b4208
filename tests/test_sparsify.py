"""The benchmark of dense models made sparse."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nsa_jax
from benchmarks import quality, sparsify
from examples.lm.tokenizer import train_bpe
from nsa_jax import TransformerConfig, TransformerLM
from tests.test_quality import write_sources

STUDY = dataclasses.replace(quality.QUICK, length=64, vocab_size=300)
DENSE = quality.Trial("full", 0, 1e-3, 3)


def test_distilling_adds_the_distance_to_the_dense_model():
  dense, optimizer, init = quality.make_init(STUDY, DENSE)
  teacher = init()["params"]
  # Sharp attention, which the sparse model cannot copy.
  teacher = jax.tree.map(lambda x: 2 * x, teacher)
  model, params = sparsify.make_sparse(
    STUDY, DENSE, "sparse, distilled", teacher
  )
  optimizer = optax.sgd(1.0)
  state = {
    "params": params,
    "opt_state": optimizer.init(params),
    "teacher": teacher,
  }
  batch = np.arange(2 * 65).reshape(2, 65) * 7 % 300
  step = jax.jit(sparsify.make_distilling_step(model, optimizer, dense))
  new, loss = step(state, batch)

  def expected(params):
    def of(model: Any, params: Any) -> Any:
      return jax.nn.log_softmax(model.apply({"params": params}, batch[:, :-1]))

    logits, wanted = of(model, params), of(dense, teacher)
    losses = -jnp.take_along_axis(logits, batch[:, 1:, None], axis=-1)
    kl = (jnp.exp(wanted) * (wanted - logits)).sum(-1)
    return losses.mean() + kl.mean(), losses.mean()

  grads, want = jax.jit(jax.grad(expected, has_aux=True))(params)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  for new_x, x, g in zip(
    *map(jax.tree.leaves, (new["params"], params, grads)), strict=True
  ):
    # Rounded sums over 128 tokens, in another order.
    atol = 1e-4 * np.abs(g).max()
    np.testing.assert_allclose(x - new_x, g, atol=atol)
  assert new["teacher"] is not None
  before = float(expected(params)[0] - expected(params)[1])
  assert before > 1e-3  # The distance takes part.


def test_tables_and_plot(tmp_path):
  distances = [
    {
      "by layers": [[16, [0.1, 0.8, 0.1], 1, 0.5], [64, [0.1, 0.8, 0.1], 1, 1]],
      "by blocks": [[64, "32 blocks", "best", 0.25]],
    }
  ]
  found = [
    {
      "kind": kind,
      "before": 3.0,
      "validation": after,
      "by position": [after] * 5,
      "curve": [[1, after]],
      "tokens/s": 10.0,
    }
    for kind, after in (("dense", 2.0), ("sparse", 2.25))
  ]
  before, blocks, after = sparsify.tables(STUDY, distances, found).values()
  assert before == [
    {"tokens": 16, "gates": "0.1 0.8 0.1", "1 layers": "0.5000"},
    {"tokens": 64, "gates": "0.1 0.8 0.1", "1 layers": "1.0000"},
  ]
  assert blocks == [{"tokens": 64, "blocks": "32 blocks", "best": "0.2500"}]
  assert [row["minus dense"] for row in after] == ["+0.0000", "+0.2500"]
  assert after[1]["0-4"] == "2.250"
  sparsify.plot(tmp_path / "plot.png", STUDY, found)
  assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
  write_sources(tmp_path / "source", folders=100)
  flags = [
    "--quick",
    "--tokenizer=bytes",
    "--tokens=6000",
    "--kinds",
    "dense",
    "sparse",
  ]
  flags += [f"--corpus={tmp_path / 'source'}", f"--runs={tmp_path / 'runs'}"]
  flags += [f"--out={tmp_path}"]
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  sparsify.main(flags)
  record = json.loads((tmp_path / "sparsify.json").read_text())
  assert [x.get("kind") for x in record["results"]] == ["dense", "sparse", None]
  for result in record["results"][:2]:
    assert result["validation"] < result["before"]


@pytest.mark.slow
def test_the_distances_of_a_checkpoint(tmp_path, monkeypatch, capsys):
  write_sources(tmp_path / "source", folders=100)
  config = TransformerConfig.preset(
    "tiny", num_layers=2, model_dim=32, attention="full", vocab_size=300
  )
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(TransformerLM(config).init)(jax.random.key(0), tokens)
  folder = tmp_path / "model"
  nsa_jax.save(folder, config, params["params"])
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  flags = ["--quick", f"--checkpoint={folder}", "--name=distances"]
  flags += [f"--corpus={tmp_path / 'source'}", f"--out={tmp_path}"]
  with pytest.raises(SystemExit, match=r"has no tokenizer\.json"):
    sparsify.main(flags)
  texts, _ = quality.read_sources(tmp_path / "source", 2**20)
  train_bpe(texts, 300, "--tokenizer bpe").save(folder)
  sparsify.main(flags)
  record = json.loads((tmp_path / "distances.json").read_text())
  assert record["checkpoint"] == "model"
  layers, blocks = record["tables"].values()
  assert [row["tokens"] for row in layers] == [64, 64, 256, 256]
  assert {row["blocks"] for row in blocks} == set(sparsify.BLOCKS)
  for row in blocks:
    assert float(row["best"]) <= float(row["random"])
