"""A byte-level language model: what the commands in `examples/` share.

`data` reads text, `train` optimises, `run` keeps the folder of a run, `plot`
draws its losses, `cli` is the command `train_lm.py`, and `flags` holds what it
has in common with `generate.py`.
"""

# This package has two names. From the root of the repository, and for mypy, it
# is `examples.lm`. A script beside it finds it as `lm`, because Python looks
# for modules in the folder of the script. The scripts choose by their own
# `__package__`; the modules in here import one another relatively.

from .flags import UsageError
from .run import load_model

__all__ = ["UsageError", "load_model"]
