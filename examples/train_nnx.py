"""Train a byte-level language model with sparse attention: the loop in nnx.

    python examples/train_nnx.py
    python examples/train_nnx.py notes.txt --steps 1000

As `train_minimal.py`, which is in linen. The default text is the source of
`argparse`, which comes with every Python.
"""

import argparse
import pathlib

import jax
import numpy as np
import optax
from flax import nnx

from nsa_jax import TransformerConfig
from nsa_jax import nnx as nsa_nnx

CONFIG = TransformerConfig.preset("tiny")
BATCH_SIZE, SEQ_LEN = 2, 512


@nnx.jit(static_argnums=0)
def create(config: TransformerConfig) -> nsa_nnx.TransformerLM:
  return nsa_nnx.TransformerLM(config, rngs=nnx.Rngs(0))


@nnx.jit
def train_step(
  model: nsa_nnx.TransformerLM, optimizer: nnx.Optimizer, windows: jax.Array
) -> jax.Array:
  def loss_fn(model: nsa_nnx.TransformerLM) -> jax.Array:
    return model(windows[:, :-1], labels=windows[:, 1:]).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss


def train(path: str, steps: int) -> list[float]:
  """Trains on the bytes of a file; returns the loss of every step."""
  text = np.frombuffer(pathlib.Path(path).read_bytes(), np.uint8)
  model = create(CONFIG)
  optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
  rng, losses = np.random.default_rng(0), []
  for step in range(1, steps + 1):
    start = rng.integers(0, len(text) - SEQ_LEN, size=BATCH_SIZE)
    windows = text[start[:, None] + np.arange(SEQ_LEN + 1)].astype(np.int32)
    losses.append(float(train_step(model, optimizer, windows)))
    if step % 10 == 0:
      print(f"step {step}: {np.mean(losses[-10:]):.3f} nats/byte", flush=True)
  return losses


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("text", nargs="?", default=argparse.__file__)
  parser.add_argument("--steps", type=int, default=100)
  args = parser.parse_args()
  train(args.text, args.steps)
