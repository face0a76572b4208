"""Train a byte-level language model with sparse attention: the bare loop.

    python examples/train_minimal.py
    python examples/train_minimal.py notes.txt --steps 1000

The default text is the source of `argparse`, which comes with every Python.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nsa_jax import TransformerConfig, TransformerLM

CONFIG = TransformerConfig.preset("tiny")
BATCH_SIZE, SEQ_LEN = 2, 512


def train(path: str, steps: int) -> list[float]:
  """Trains on the bytes of a file; returns the loss of every step."""
  text = np.frombuffer(pathlib.Path(path).read_bytes(), np.uint8)
  model, optimizer = TransformerLM(CONFIG), optax.adamw(3e-3)
  tokens = jnp.zeros((1, SEQ_LEN), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  opt_state = optimizer.init(params)

  def loss_fn(params, windows):
    losses = model.apply(params, windows[:, :-1], labels=windows[:, 1:])
    return jnp.mean(jnp.asarray(losses))

  @jax.jit
  def train_step(params, opt_state, windows):
    loss, grads = jax.value_and_grad(loss_fn)(params, windows)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  rng, losses = np.random.default_rng(0), []
  for step in range(1, steps + 1):
    start = rng.integers(0, len(text) - SEQ_LEN, size=BATCH_SIZE)
    windows = text[start[:, None] + np.arange(SEQ_LEN + 1)].astype(np.int32)
    params, opt_state, loss = train_step(params, opt_state, windows)
    losses.append(float(loss))
    if step % 10 == 0:
      print(f"step {step}: {np.mean(losses[-10:]):.3f} nats/byte", flush=True)
  return losses


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("text", nargs="?", default=argparse.__file__)
  parser.add_argument("--steps", type=int, default=100)
  args = parser.parse_args()
  train(args.text, args.steps)
