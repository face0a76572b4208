"""The command `train_lm.py`: its flags, its defaults, its exit codes."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .flags import BPE, STOPPED, Parser, UsageError, positive
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


def tokenizer(text: str) -> str:
  """The type of --tokenizer."""
  number = text.removeprefix(BPE)
  if text != number and not (number.isdecimal() and int(number) > 256):
    raise argparse.ArgumentTypeError(
      f"{text!r} must name more tokens than the 256 bytes, such as bpe:8192"
    )
  return text


def make_parser(prog: str = "train_lm.py") -> argparse.ArgumentParser:
  """The flags; those of a Recipe default to None."""
  parser = Parser(
    prog=prog,
    description="Train a language model with Native Sparse Attention on real "
    "text. Its tokens are bytes, unless there is a --tokenizer.",
    epilog="Ctrl-C during training saves a checkpoint first, and a second one "
    "stops at once; the same command with --resume continues, and ends where "
    "the uninterrupted run would have ended. The model is in linen: nnx has "
    "the same numbers, and loads the parameters of a run (docs/nnx.md).",
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
    "--select",
    choices=("means",),
    help="how blocks are chosen: by means of the keys that are read (default: "
    "by the compressed keys, as in the paper)",
  )
  add(
    "--gate-bias",
    nargs=3,
    type=float,
    metavar=("COMPRESSED", "SELECTED", "WINDOW"),
    help="first biases of the gates' logits; -2.94 2.2 -2.94 start with gates "
    "of 0.05, 0.9 and 0.05 (default: no biases, gates of 0.5)",
  )
  add(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the computation; parameters are float32 (default: float32)",
  )
  add(
    "--implementation",
    choices=("reference", "xla", "triton", "mosaic_gpu"),
    help="of the attention (default: the fastest that the device has)",
  )
  add(
    "--corpus",
    metavar="PATH",
    help="text file, or folder of text files; of a .jsonl file, every line "
    "holds a document; what cannot be used is skipped and named (default: the "
    "source of Python's standard library)",
  )
  add(
    "--text-field",
    default="text",
    metavar="NAME",
    help="field of the text in a line of a .jsonl file (default: text)",
  )
  add(
    "--tokenizer",
    type=tokenizer,
    default="bytes",
    metavar="NAME",
    help="bytes; or bpe:N, a byte-level BPE of N tokens that is trained on the "
    "part of the corpus for training; or the path of a tokenizer.json with a "
    "byte-level BPE (default: bytes)",
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
    help="fill every sequence with files or documents, or pieces of longer "
    "ones, that do not read one another, each at a multiple of "
    "--selection-block (default: windows of the text, which cross from one "
    "file to the next)",
  )

  def recipe(name: str) -> str:
    values = [f"{getattr(r, name):g}" for r in RECIPES.values()]
    return f"(default: {', '.join(values)} for {', '.join(RECIPES)})"

  kinds: dict[str, tuple[Callable[[str], Any], str]] = {
    "steps": (int, "optimiser steps"),
    "seq-len": (int, "tokens in a sequence"),
    "batch-size": (int, "sequences in a step, of all devices"),
    "learning-rate": (float, "learning rate after the warm-up"),
  }
  for name, (kind, text) in kinds.items():
    add(
      f"--{name}",
      type=positive(kind),
      metavar="N" if kind is int else "X",
      help=f"{text} {recipe(name.replace('-', '_'))}",
    )
  add(
    "--warmup-steps",
    type=positive(int),
    metavar="N",
    help="steps over which the learning rate grows to --learning-rate, "
    "linearly (default: a tenth of --steps, at most 1000)",
  )
  add(
    "--final-learning-rate",
    type=float,
    metavar="X",
    help="learning rate after the last step, to which it decays along a "
    "cosine from the warm-up on (default: a twentieth of --learning-rate)",
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
    "compression-block": "tokens in a compressed block",
    "compression-stride": "tokens between the starts of compressed blocks",
    "selection-block": "tokens in a selection block",
    "num-selected": "blocks that a query selects, forced ones included",
    "num-local": "forced blocks ending at the query's own",
    "window": "tokens of the sliding window",
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
  resume_or_evaluate = parser.add_mutually_exclusive_group()
  resume_or_evaluate.add_argument(
    "--resume",
    action="store_true",
    help="continue the run in --out; the other flags must be as before, but "
    "--steps may grow: the learning rate then follows the schedule of the new "
    "number from there on, which is not that of a run of so many steps",
  )
  resume_or_evaluate.add_argument(
    "--evaluate",
    action="store_true",
    help="do not train, but print the validation loss of the last checkpoint "
    "in --out, of all tokens and by position; flags of the text must be as in "
    "training, while --seq-len, also longer, --batch-size and --pack are by "
    "default those of the run",
  )
  add(
    "--tensorboard",
    action="store_true",
    help="write event files for TensorBoard into the folder tensorboard of "
    "--out, with losses, learning rate and speed; needs the package "
    "tensorboardX",
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
    "--sample-tokens",
    type=positive(int),
    default=400,
    metavar="N",
    help="tokens of the final sample; it ends with the sequence at the latest "
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

  from .evaluate import evaluate
  from .train import train

  if args.evaluate:
    return _call(parser, evaluate, args, connect)
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
  if (warmup := args.warmup_steps) is not None and warmup >= args.steps:
    parser.error(
      f"argument --warmup-steps: {warmup} is not less than --steps {args.steps}"
    )
  final = args.final_learning_rate
  if final is not None and not 0 <= final <= args.learning_rate:
    parser.error(
      f"argument --final-learning-rate: {final:g} is not between 0 and "
      f"--learning-rate {args.learning_rate:g}"
    )
  if not MIN_TEMPERATURE <= args.temperature < math.inf:
    parser.error(
      f"argument --temperature: {args.temperature} is not a finite number of "
      f"at least {MIN_TEMPERATURE}"
    )
  return _call(parser, train, args, connect)


def _call(
  parser: argparse.ArgumentParser,
  command: Callable[..., int],
  args: argparse.Namespace,
  connect: Callable[[argparse.Namespace], Any] | None,
) -> int:
  """Calls `train` or `evaluate`, whose errors end this process in one line."""
  try:
    return command(args, connect and connect(args))
  # The library's errors for unsupported arguments are one sentence.
  except (UsageError, NotImplementedError) as error:
    parser.error(str(error))
  except OSError as error:  # such as a full disk behind standard output
    parser.error(f"{error}.")
