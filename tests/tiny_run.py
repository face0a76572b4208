"""A run of train_lm.py that never trained: what reads its checkpoints."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from examples.lm.cli import make_parser
from examples.lm.data import Corpus
from examples.lm.run import Run, State, run_config
from examples.lm.tokenizer import Tokenizer
from examples.lm.train import make_optimizer
from nsa_jax import TransformerConfig, TransformerLM

STEP = 3
CONFIG = TransformerConfig.preset(
  "tiny", num_layers=1, model_dim=16, mlp_dim=16, attention="window"
)


def make_state() -> State:
  """Random parameters, large enough to give every byte a chance."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  shapes = jax.eval_shape(TransformerLM(CONFIG).init, jax.random.key(0), tokens)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.float32(rng.normal(size=x.shape)), shapes["params"]
  )
  optimizer = make_optimizer(1e-3, 10)
  return {"params": params, "opt_state": optimizer.init(params)}


def open_run(folder: pathlib.Path, resume: bool, *flags: str) -> Run:
  args = make_parser().parse_args(["--steps=10", *flags])
  text = np.zeros(1, np.uint8)
  config = run_config(args, CONFIG, Corpus("none", text, text), Tokenizer())
  return Run(str(folder), config, resume)


def save(folder: pathlib.Path, last_step: int = STEP) -> pathlib.Path:
  """Saves the same state at the steps STEP to `last_step`."""
  run = open_run(folder, False)
  run.metrics = [{"step": i + 1, "train_loss": 2.0} for i in range(last_step)]
  for step in range(STEP, last_step + 1):
    run.save(step, make_state())
  run.close()
  return folder
