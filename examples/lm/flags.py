"""Parsing of flags and its errors, shared by the commands."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from .terminal import printable

BPE = "bpe:"  # --tokenizer: a BPE of so many tokens is trained

# What train_lm.py says when a signal ends it at once.
STOPPED = (
  "train_lm.py: stopped at once; if a checkpoint is saved, it stays, and "
  "--resume continues from it"
)


class UsageError(Exception):
  """An error that the user can correct; the commands print it as one line."""


class Parser(argparse.ArgumentParser):
  """A parser that prints an error as one line and exits with code 2."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
  """The type of a flag whose value is a finite number greater than 0.

  Args:
    kind: `int` or `float`.
  """

  def convert(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = 0
    if not 0 < value < math.inf:
      noun = "integer" if kind is int else "number"
      raise argparse.ArgumentTypeError(f"{text!r} is not a positive {noun}")
    return value

  return convert
