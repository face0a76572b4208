"""Block ids that a trained model selects on text, for the other benchmarks.

    python -m benchmarks.trained_ids
    python -m benchmarks.trained_ids --quick

Trains a model of 8 layers (D = 512, 16 query heads and one key/value head of
64) on the source of Python's standard library, about a minute, then saves the
block ids of every layer for a row of held-out text. Neighbouring queries choose
alike and some blocks are chosen by most queries, which random ids hide.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from examples.lm import data, train
from examples.lm.devices import draw_in_kernels
from nsa_jax import TransformerConfig, TransformerLM, inspect

LENGTH = 65536
STEPS = 500
NEIGHBOURS = (2, 4, 8, 16)


def configure(**overrides: Any) -> TransformerConfig:
  fields: dict[str, Any] = {
    "num_layers": 8,
    "model_dim": 512,
    "num_heads": 16,
    "num_kv_heads": 1,
    "head_dim": 64,
    "mlp_dim": 1408,
    "dtype": jnp.bfloat16,
  }
  return TransformerConfig.preset("base", **{**fields, **overrides})


def trained(
  config: TransformerConfig,
  text: np.ndarray,
  length: int,
  steps: int,
  seed: int = 0,
) -> tuple[Any, float]:
  """Trains on rows of one text.

  Args:
    config: of the model.
    text: uint8 vector.
    length: bytes of a row; each step has one.
    steps: number of steps.
    seed: of the parameters and of the rows.

  Returns:
    The parameters and the last loss.
  """
  model = TransformerLM(config)
  optimizer = train.make_optimizer(1e-3, steps)

  @jax.jit
  def init() -> Any:
    params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
    return {
      "params": params["params"],
      "opt_state": optimizer.init(params["params"]),
    }

  state = init()
  windows = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
  step_fn = jax.jit(train.make_train_step(model, optimizer), donate_argnums=0)
  program = step_fn.lower(state, windows).compile()
  loss = jnp.inf
  for step in range(steps):
    batch = data.training_batch(
      text, seed=seed, step=step, batch_size=1, seq_len=length
    )
    state, loss = program(state, batch)
  return state["params"], float(loss)


def selected_by_layer(
  config: TransformerConfig, params: Any, tokens: Any
) -> dict[str, np.ndarray]:
  """Block ids [1, T, K, n] of every layer for tokens [1, T]."""
  model = TransformerLM(config)

  @jax.jit
  def run(params: Any, tokens: Any) -> Any:
    _, sown = model.apply({"params": params}, tokens, mutable=["intermediates"])
    return sown["intermediates"]

  sown = run(params, tokens)
  return {
    name: np.asarray(sown[name]["attention"]["block_ids"][0])
    for name in sorted(sown)
  }


def tables(by_layer: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
  rows = []
  for name, ids in by_layer.items():
    counts = np.bincount(ids[ids >= 0].ravel())
    row: dict[str, Any] = {"layer": name}
    for n in NEIGHBOURS:
      distinct = inspect.distinct_blocks(ids, n)
      row[f"of {n} neighbours"] = float(distinct.mean())
    row["longest list / mean"] = float(counts.max() / counts.mean())
    rows.append(row)
  return {"Distinct blocks that neighbouring queries choose": rows}


def load(
  path: pathlib.Path, length: int, kv_heads: int
) -> dict[str, jax.Array]:
  """Saved ids of every layer for the first `length` queries.

  Args:
    path: file that this command has written.
    length: T, at most that of the file.
    kv_heads: K; the ids of one head are those of all.

  Returns:
    int32 [1, T, K, n] by layer; {} if there is no such file or it is shorter.
  """
  if not path.exists():
    return {}
  with np.load(path) as saved:
    found = {name: saved[name] for name in saved.files}
  if any(ids.shape[1] < length for ids in found.values()):
    return {}
  return {
    name: jnp.repeat(jnp.asarray(ids[:, :length, :1], jnp.int32), kv_heads, 2)
    for name, ids in found.items()
  }


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--length", type=int, default=LENGTH, help=f"tokens (default: {LENGTH})"
  )
  result.add_argument(
    "--steps",
    type=int,
    help=f"of training (default: {STEPS}, with --quick {STEPS // 10})",
  )
  result.add_argument(
    "--ids",
    type=pathlib.Path,
    default=harness.TRAINED_IDS,
    help=f"file for the ids (default: {harness.TRAINED_IDS})",
  )
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  steps = args.steps or (STEPS // 10 if args.quick else STEPS)
  corpus = data.load_corpus(None, 2**26, args.length)
  config = configure()
  with draw_in_kernels():
    params, loss = trained(config, corpus.train, args.length, steps)
  print(f"{steps} steps, loss {loss:.4f} nats/byte", flush=True)
  tokens = data.validation_windows(
    corpus.validation, count=1, seq_len=args.length
  )
  by_layer = selected_by_layer(config, params, tokens[:, : args.length])
  args.ids.parent.mkdir(parents=True, exist_ok=True)
  small: dict[str, Any] = {
    name: ids.astype(np.int16) for name, ids in by_layer.items()
  }
  np.savez_compressed(args.ids, **small)
  harness.record(
    args.out,
    "trained_ids",
    f"Blocks that a model chooses on text after {steps} steps, "
    f"{args.length} tokens",
    tables(by_layer),
    training={
      "steps": steps,
      "loss": loss,
      "config": dataclasses.replace(config, dtype="bfloat16").to_dict(),
    },
  )


if __name__ == "__main__":
  main()
