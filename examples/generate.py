"""Continue text with a model that train_lm.py has trained.

    python examples/train_lm.py
    python examples/generate.py --prompt "def main"
    head -c 500 notes.txt | python examples/generate.py --run runs/notes

The text is printed while it is sampled, token by token. Tokens are those of the
run: bytes, unless it has a tokenizer.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
  from examples import lm
  from examples.lm.flags import Parser, UsageError, positive
  from examples.lm.terminal import (
    StopRequest,
    make_printer,
    prepare_output,
    printable,
  )
else:  # a script; see lm/__init__.py
  import lm
  from lm.flags import Parser, UsageError, positive
  from lm.terminal import (
    StopRequest,
    make_printer,
    prepare_output,
    printable,
  )


def complete(args: argparse.Namespace) -> None:
  """Prints the prompt and its continuation by the model."""
  # Imported late: jax takes seconds, in which Ctrl-C is handled already.
  from nsa_jax import generate

  model, params, step, tokenizer, _ = lm.load_run(args.run, args.implementation)
  if args.prompt is None:
    prompt = sys.stdin.buffer.read()
  else:
    prompt = os.fsencode(args.prompt)
  if not prompt:
    raise UsageError("the prompt must have at least one byte.")
  tokens = tokenizer.encode([prompt])[0].tolist()
  print(f"{printable(args.run)}, step {step}", file=sys.stderr)
  show = make_printer()
  started = False

  def stream(new: Any) -> None:
    nonlocal started
    if not started:  # So that invalid arguments print no partial output.
      show(prompt)
      started = True
    show(tokenizer.decode(new[:1]))

  generate(
    model,
    params,
    [tokens],
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    key=args.seed,
    stream=stream,
  )
  show(b"")
  print()


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = Parser(
    prog="generate.py",
    description="Continue text with a model that train_lm.py has trained.",
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "--run",
    default="runs/train_lm",
    metavar="DIR",
    help="folder of the run, --out of train_lm.py (default: runs/train_lm)",
  )
  add(
    "--prompt",
    metavar="TEXT",
    help="text to continue (default: what standard input holds)",
  )
  add(
    "--max-new-tokens",
    type=positive(int),
    default=400,
    metavar="N",
    help="tokens to add (default: 400)",
  )
  add(
    "--temperature",
    type=float,
    default=0.8,
    metavar="X",
    help="of sampling; 0 takes the most likely token (default: 0.8)",
  )
  add(
    "--top-k",
    type=int,
    metavar="N",
    help="sample among the N most likely tokens (default: all)",
  )
  add(
    "--top-p",
    type=float,
    metavar="X",
    help="sample among the most likely tokens that together have probability "
    "X (default: all)",
  )
  add(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="another one gives another text (default: 0)",
  )
  add(
    "--implementation",
    choices=("reference", "xla", "triton"),
    help="of the attention (default: the fastest that the device has)",
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = make_parser()
  args = parser.parse_args(argv)
  prepare_output()
  try:
    with StopRequest("generate.py: stopped"):
      complete(args)
  # The library's errors for invalid or unsupported arguments are one sentence.
  except (UsageError, ValueError, NotImplementedError) as error:
    parser.error(str(error))
  except OSError as error:
    parser.error(f"{error}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
