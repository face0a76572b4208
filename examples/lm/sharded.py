"""The command `train_sharded.py`: its flags, and how a process ends."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .cli import make_parser, run
from .flags import STOPPED, positive
from .terminal import StopRequest, prepare_output

AXES = ("data", "sequence", "heads")
NAME = "train_sharded.py"


def mesh_sizes(text: str) -> dict[str, int]:
  """The type of --mesh: "data=4,sequence=2" to devices along each of AXES."""
  sizes = dict.fromkeys(AXES, 1)
  for part in text.split(","):
    name, _, number = part.partition("=")
    if name not in AXES or not number.isdecimal() or int(number) < 1:
      raise argparse.ArgumentTypeError(
        f"{part!r} is not one of {', '.join(AXES)}, an equals sign and a "
        "positive integer"
      )
    sizes[name] = int(number)
  return sizes


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `train_sharded.py` that `train_lm.py` does not have."""
  add = parser.add_argument
  add(
    "--mesh",
    type=mesh_sizes,
    metavar="SIZES",
    help="devices along the rows of a batch, the tokens of a row and the "
    "key/value heads, such as data=4,sequence=2,heads=1 (default: all along "
    "data)",
  )
  add(
    "--fsdp",
    action="store_true",
    help="split parameters and optimiser over the devices along data as well",
  )
  add(
    "--zigzag",
    action="store_true",
    help="give every device along sequence an early and a late piece of the "
    "tokens, which evens out the work",
  )
  add(
    "--coordinator",
    metavar="HOST:PORT",
    help="address of process 0, for several processes (default: what the "
    "cluster says, if --processes is given)",
  )
  add(
    "--processes",
    type=positive(int),
    metavar="N",
    help="number of processes, all with the same flags (default: 1)",
  )
  add(
    "--process",
    type=int,
    metavar="I",
    help="number of this process, from 0 on",
  )
  add(
    "--timeout",
    type=positive(int),
    default=60,
    metavar="SECONDS",
    help="wait for the other processes at the start, and for a sign of life "
    "of each of them, at most so long (default: 60)",
  )
  add(
    "--cpu-devices",
    type=positive(int),
    metavar="N",
    help="compute on N virtual devices of the CPU in every process",
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = make_parser(NAME)
  add_flags(parser)
  args = parser.parse_args(argv)
  several = args.processes is not None and args.processes > 1
  if several and args.coordinator and args.process is None:
    parser.error("argument --process: is missing, beside --coordinator")

  def connect(args: argparse.Namespace) -> Any:
    # Imported late, as in `cli`.
    from .devices import connect

    return connect(args)

  prepare_output()
  code: Any = 1
  try:
    with StopRequest(STOPPED.replace("train_lm.py", NAME)):
      code = run(parser, args, connect)
  except SystemExit as error:
    code = error.code
    raise
  finally:
    if several and code:
      _leave(code)
  return code


def _leave(code: int) -> None:
  """Ends this process at once; jax would first wait for the others."""
  error = sys.exc_info()[1]
  if error and not isinstance(error, SystemExit):
    sys.excepthook(type(error), error, error.__traceback__)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
