"""The command `train_lm.py`: its flags, its defaults, its exit codes."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nsa_jax.sampling import MIN_TEMPERATURE

from .flags import Parser, UsageError, positive
from .train import train


class Recipe(NamedTuple):
  """Defaults of a preset for flags that are not given."""

  seq_len: int
  batch_size: int
  steps: int
  learning_rate: float


RECIPES = {
  "tiny": Recipe(512, 8, 300, 5e-3),
  "small": Recipe(2048, 16, 5_000, 1e-3),
  "base": Recipe(8192, 16, 50_000, 3e-4),
}


def make_parser() -> argparse.ArgumentParser:
  """The flags; those of a Recipe default to None."""
  parser = Parser(
    prog="train_lm.py",
    description="Train a byte-level language model with Native Sparse "
    "Attention on real text.",
    epilog="Ctrl-C saves a checkpoint first; the same command with --resume "
    "continues, and ends where the uninterrupted run would have ended.",
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "--preset",
    choices=sorted(RECIPES, key=lambda name: RECIPES[name].seq_len),
    default="tiny",
    help="model and training recipe; tiny takes minutes on a CPU, the others "
    "want an accelerator (default: tiny)",
  )
  add(
    "--attention",
    choices=("nsa", "full", "window"),
    default="nsa",
    help="attention of every layer (default: nsa)",
  )
  add(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the computation; parameters are float32 (default: float32)",
  )
  add(
    "--implementation",
    choices=("reference", "xla", "triton"),
    help="of the attention (default: the fastest that the device has)",
  )
  add(
    "--corpus",
    metavar="PATH",
    help="text file, or folder of text files (default: the source of Python's "
    "standard library)",
  )
  add(
    "--max-bytes",
    type=positive(int),
    default=64 * 2**20,
    metavar="N",
    help="use at most N bytes of the corpus (default: 64 MiB)",
  )

  def recipe(name: str) -> str:
    values = [f"{getattr(r, name):g}" for r in RECIPES.values()]
    return f"(default: {', '.join(values)} for {', '.join(RECIPES)})"

  kinds: dict[str, tuple[Callable[[str], Any], str]] = {
    "steps": (int, "optimiser steps"),
    "seq-len": (int, "bytes in a sequence"),
    "batch-size": (int, "sequences in a step"),
    "learning-rate": (float, "peak learning rate"),
  }
  for name, (kind, text) in kinds.items():
    add(
      f"--{name}",
      type=positive(kind),
      metavar="N" if kind is int else "X",
      help=f"{text} {recipe(name.replace('-', '_'))}",
    )
  add(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="of parameters, data order and sample (default: 0)",
  )
  add(
    "--out",
    default="runs/train_lm",
    metavar="DIR",
    help="folder for checkpoints, metrics, plot and sample (default: "
    "runs/train_lm)",
  )
  add(
    "--resume",
    action="store_true",
    help="continue the run in --out; the other flags must be as before",
  )
  add(
    "--eval-every",
    type=positive(int),
    default=50,
    metavar="N",
    help="steps between evaluations (default: 50)",
  )
  add(
    "--eval-batches",
    type=positive(int),
    default=16,
    metavar="N",
    help="batches of held-out text in an evaluation (default: 16)",
  )
  add(
    "--checkpoint-every",
    type=positive(int),
    default=100,
    metavar="N",
    help="steps between checkpoints (default: 100)",
  )
  add(
    "--prompt",
    metavar="TEXT",
    help="start of the final sample (default: the start of the held-out text)",
  )
  add(
    "--sample-bytes",
    type=positive(int),
    default=400,
    metavar="N",
    help="length of the final sample; it ends with the sequence at the latest "
    "(default: 400)",
  )
  add(
    "--temperature",
    type=positive(float),
    default=0.8,
    metavar="X",
    help="of the final sample (default: 0.8)",
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = make_parser()
  args = parser.parse_args(argv)
  for name, value in RECIPES[args.preset]._asdict().items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  if not 0 <= args.seed < 2**32:
    parser.error(f"argument --seed: {args.seed} is not in [0, 2**32)")
  prompt_len = 1 if args.prompt is None else len(os.fsencode(args.prompt))
  if not 0 < prompt_len < args.seq_len:
    parser.error(
      f"argument --prompt: must have 1 to {args.seq_len - 1} bytes, has "
      f"{prompt_len}"
    )
  if not MIN_TEMPERATURE <= args.temperature < math.inf:
    parser.error(
      f"argument --temperature: {args.temperature} is not a finite number of "
      f"at least {MIN_TEMPERATURE}"
    )
  try:
    return train(args)
  # The library's errors for unsupported arguments are one sentence.
  except (UsageError, NotImplementedError) as error:
    parser.error(str(error))
