"""Loss curves of one model trained with `xla` and with `triton`, on a GPU.

    python -m benchmarks.loss_curve
    python -m benchmarks.loss_curve --quick

The `small` preset in bfloat16 on the source of Python's standard library, with
the same seed and the same batches. Two more runs show by how much curves may
differ: `xla` with the rows of every batch reversed, which changes only the
order of sums, and `xla` in float32.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks import harness
from examples.lm import data, train
from nsa_jax import TransformerConfig, TransformerLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = 200
BASE = "xla"
# Implementation, dtype, rows reversed.
RUNS: dict[str, tuple[Any, Any, bool]] = {
  BASE: ("xla", jnp.bfloat16, False),
  "triton": ("triton", jnp.bfloat16, False),
  "xla, rows reversed": ("xla", jnp.bfloat16, True),
  "xla, float32": ("xla", jnp.float32, False),
}


def curves(
  config: TransformerConfig,
  corpus: data.Corpus,
  *,
  runs: Mapping[str, tuple[Any, Any, bool]],
  steps: int,
  batch_size: int,
  seq_len: int,
  learning_rate: float = 1e-3,
  seed: int = 0,
) -> dict[str, list[float]]:
  """Training loss at every step of every run, from the same parameters.

  Args:
    config: configuration of the model; the runs replace `implementation` and
      `dtype`.
    corpus: the text.
    runs: (implementation, dtype, rows reversed) by name.
    steps: number of steps.
    batch_size: rows per batch.
    seq_len: bytes per row.
    learning_rate: peak learning rate.
    seed: seed of the parameters and of the batches.
  """
  optimizer = train.make_optimizer(learning_rate, steps)

  def init(seed):
    model = TransformerLM(dataclasses.replace(config, implementation="xla"))
    tokens = jnp.zeros((1, config.nsa.selection_block), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    return {"params": params, "opt_state": optimizer.init(params)}

  shapes = jax.eval_shape(init, seed)
  batch = jax.ShapeDtypeStruct((batch_size, seq_len + 1), jnp.int32)
  # Runs with equal implementation and dtype share a program.
  wanted: dict[Any, Any] = {}
  for implementation, dtype, _ in runs.values():
    changed = dataclasses.replace(
      config, implementation=implementation, dtype=dtype
    )
    step = train.make_train_step(TransformerLM(changed), optimizer)
    wanted[implementation, dtype] = step, (shapes, batch)
  programs = harness.compile_all(wanted)
  start = jax.jit(init)(seed)
  draw = functools.partial(
    data.training_batch,
    corpus.train,
    seed=seed,
    batch_size=batch_size,
    seq_len=seq_len,
  )
  batches = [draw(step=step) for step in range(steps)]
  found = {}
  for name, (implementation, dtype, reverse) in runs.items():
    program = programs[implementation, dtype]
    if isinstance(program, Exception):
      raise program
    started = time.perf_counter()
    state, losses = start, []
    for windows in batches:
      # A contiguous copy: the program is compiled for one layout.
      windows = np.ascontiguousarray(windows[::-1]) if reverse else windows
      state, loss = program(state, windows)
      losses.append(loss)
    found[name] = [float(loss) for loss in losses]
    seconds = time.perf_counter() - started
    print(f"{name}: {found[name][-1]:.4f} after {seconds:.1f} s", flush=True)
  return found


def summary(found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
  """Last losses, and the distance of every curve from that of `xla`."""
  base = np.asarray(found[BASE])
  rows = []
  for name, losses in found.items():
    apart = np.abs(np.asarray(losses) - base)
    row: dict[str, Any] = {
      "run": name,
      "first loss": losses[0],
      "last loss": losses[-1],
      "mean of the last 20": float(np.mean(losses[-20:])),
    }
    if name != BASE:
      row |= {
        "largest difference": float(apart.max()),
        "at step": int(apart.argmax()) + 1,
        "mean difference": float(apart.mean()),
      }
    rows.append(row)
  return rows


def plot(path, found: Mapping[str, Sequence[float]]) -> None:
  """Plots the curves and their differences from that of `xla`."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), constrained_layout=True
  )
  base = np.asarray(found[BASE])
  steps = np.arange(1, len(base) + 1)
  for i, (name, losses) in enumerate(found.items()):
    style = {"color": f"C{i}", "label": name, "linewidth": 1.0}
    left.plot(steps, losses, linestyle="--" if i else "-", **style)
    if name != BASE:
      apart = np.abs(np.asarray(losses) - base)
      # A zero cannot be drawn on a log scale.
      right.semilogy(steps, np.where(apart > 0, apart, np.nan), **style)
  left.set_ylabel("loss (nats per byte)")
  right.set_ylabel(f"difference from {BASE}")
  for axis in (left, right):
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  add = result.add_argument
  add("--steps", type=int, help=f"default: {STEPS}, with --quick 50")
  add("--batch-size", type=int, default=4, help="rows (default: 4)")
  add("--seq-len", type=int, default=2048, help="bytes (default: 2048)")
  add("--seed", type=int, default=0)
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  steps = args.steps or (50 if args.quick else STEPS)
  found = curves(
    TransformerConfig.preset("small", scan_layers=True),
    data.load_corpus(None, 2**23, args.seq_len),
    runs=RUNS,
    steps=steps,
    batch_size=args.batch_size,
    seq_len=args.seq_len,
    seed=args.seed,
  )
  harness.record(
    args.out,
    "loss_curve",
    f"Training loss, small preset, {steps} steps of {args.batch_size} x "
    f"{args.seq_len} bytes",
    {
      "Losses": [
        {"step": step, **{name: loss[step - 1] for name, loss in found.items()}}
        for step in (1, *range(20, steps + 1, 20))
      ],
      "Differences from xla": summary(found),
    },
    losses=found,
  )
  plot(args.out / "loss_curve.png", found)


if __name__ == "__main__":
  main()
