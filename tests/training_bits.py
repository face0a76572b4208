"""A training run on text in a process of its own; prints a hash of its end.

python -m tests.training_bits nsa triton
"""

import argparse
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from examples.lm import data, train
from nsa_jax import TransformerConfig, TransformerLM


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("attention", choices=["nsa", "full"])
  parser.add_argument("implementation")
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--length", type=int, default=2048)
  args = parser.parse_args()
  config = TransformerConfig.preset(
    "base",
    num_layers=2,
    model_dim=256,
    mlp_dim=512,
    num_heads=16,
    num_kv_heads=1,
    head_dim=64,
    attention=args.attention,
    implementation=args.implementation,
    dtype=jnp.bfloat16,
  )
  model = TransformerLM(config)
  optimizer = train.make_optimizer(1e-3, args.steps)

  @jax.jit
  def init() -> train.State:
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    params = params["params"]
    return {"params": params, "opt_state": optimizer.init(params)}

  corpus = data.load_corpus(None, 2**22, args.length)
  step_fn = jax.jit(train.make_train_step(model, optimizer), donate_argnums=0)
  state = init()
  for step in range(args.steps):
    batch = data.training_batch(
      corpus.train, seed=0, step=step, batch_size=4, seq_len=args.length
    )
    state, loss = step_fn(state, batch)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves((state, loss)):
    digest.update(np.asarray(leaf).tobytes())
  print(f"loss {float(loss):.8f}, state and loss {digest.hexdigest()}")


if __name__ == "__main__":
  main()
