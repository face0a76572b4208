"""The command `train_lm.py`: its flags, its defaults, its exit codes."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .flags import STOPPED, Parser, UsageError, positive
from .terminal import StopRequest, prepare_output


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


def make_parser(prog: str = "train_lm.py") -> argparse.ArgumentParser:
  """The flags; those of a Recipe default to None."""
  parser = Parser(
    prog=prog,
    description="Train a byte-level language model with Native Sparse "
    "Attention on real text.",
    epilog="Ctrl-C during training saves a checkpoint first, and a second one "
    "stops at once; the same command with --resume continues, and ends where "
    "the uninterrupted run would have ended.",
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
    help="text file, or folder of text files; what cannot be used is skipped "
    "and named (default: the source of Python's standard library)",
  )
  add(
    "--max-bytes",
    type=positive(int),
    default=64 * 2**20,
    metavar="N",
    help="read and use at most N bytes of the corpus (default: 64 MiB)",
  )

  add(
    "--pack",
    action="store_true",
    help="fill every sequence with files, or pieces of longer ones, that do "
    "not read one another, each at a multiple of --selection-block (default: "
    "windows of the text, which cross from one file to the next)",
  )

  def recipe(name: str) -> str:
    values = [f"{getattr(r, name):g}" for r in RECIPES.values()]
    return f"(default: {', '.join(values)} for {', '.join(RECIPES)})"

  kinds: dict[str, tuple[Callable[[str], Any], str]] = {
    "steps": (int, "optimiser steps"),
    "seq-len": (int, "bytes in a sequence"),
    "batch-size": (int, "sequences in a step, of all devices"),
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
    "--accumulate",
    type=positive(int),
    default=1,
    metavar="N",
    help="compute the gradients of a step in N parts of its sequences, one "
    "after the other, in the memory of one (default: 1)",
  )
  for name, text in {
    "compression-block": "bytes in a compressed block",
    "compression-stride": "bytes between the starts of compressed blocks",
    "selection-block": "bytes in a selection block",
    "num-selected": "blocks that a query selects, forced ones included",
    "num-local": "forced blocks ending at the query's own",
    "window": "bytes of the sliding window",
  }.items():
    add(
      f"--{name}",
      type=positive(int),
      metavar="N",
      help=f"{text} (default: that of the preset)",
    )
  add(
    "--num-initial",
    type=int,
    metavar="N",
    help="forced blocks at the start (default: that of the preset)",
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
    help="continue the run in --out; the other flags must be as before, but "
    "--steps may grow: the learning rate then follows the schedule of the new "
    "number from there on, which is not that of a run of so many steps",
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
  prepare_output()
  with StopRequest(STOPPED):
    return run(parser, args)


def run(
  parser: argparse.ArgumentParser,
  args: argparse.Namespace,
  connect: Callable[[argparse.Namespace], Any] | None = None,
) -> int:
  """Checks the flags and trains; returns the exit code.

  Args:
    parser: for messages.
    args: the flags.
    connect: makes the `Devices` of the flags; None for one device.
  """
  # Imported late: jax takes seconds, in which Ctrl-C is handled already.
  from nsa_jax.sampling import MIN_TEMPERATURE

  from .train import train

  for name, value in RECIPES[args.preset]._asdict().items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  if not 0 <= args.seed < 2**32:
    parser.error(f"argument --seed: {args.seed} is not in [0, 2**32)")
  if args.seq_len < 2:
    parser.error(f"argument --seq-len: {args.seq_len} is not at least 2")
  if args.batch_size % args.accumulate:
    parser.error(
      f"argument --accumulate: {args.accumulate} does not divide --batch-size "
      f"{args.batch_size}"
    )
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
    return train(args, connect and connect(args))
  # The library's errors for unsupported arguments are one sentence.
  except (UsageError, NotImplementedError) as error:
    parser.error(str(error))
  except OSError as error:  # such as a full disk behind standard output
    parser.error(f"{error}.")
