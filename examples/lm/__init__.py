"""A language model, shared by the commands in `examples/`.

`data` and `jsonl` read text, `tokenizer` makes tokens of it, `train` trains,
`evaluate` does not, `devices` says where, `run` manages the folder of a run,
`plot` and `events` draw its losses, `cli` and `sharded` are the commands
`train_lm.py` and `train_sharded.py`, and `flags` and `terminal` are shared with
`generate.py`.
"""

# This package has two names. From the root of the repository, and for mypy, it
# is `examples.lm`. A script next to it imports it as `lm`, because Python
# searches the folder of the script. The scripts choose the name by their
# `__package__`; the modules of the package use relative imports.

from typing import TYPE_CHECKING, Any

from .flags import UsageError

if TYPE_CHECKING:
  from .run import load_model, load_run

__all__ = ["UsageError", "load_model", "load_run"]


def __getattr__(name: str) -> Any:
  # Imported when it is used: jax takes seconds, and the commands handle Ctrl-C
  # before.
  if name in ("load_model", "load_run"):
    from . import run

    return getattr(run, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
