"""Train a byte-level language model with Native Sparse Attention on real text.

    python examples/train_lm.py
    python examples/train_lm.py --corpus notes/ --steps 1000 --out runs/notes
    python examples/train_lm.py --corpus notes/ --steps 1000 --out runs/notes \
        --resume

The default corpus is the source of Python's own standard library, which every
machine that can run this has. Every tenth file is held out for validation, and
the validation loss is compared with that of a bigram model fitted on the same
training bytes. Batches are a function of the seed and the step alone, so that
a resumed run sees the data that the uninterrupted one would have seen.

The flags are in `lm/cli.py`, the text in `lm/data.py`, the training in
`lm/train.py`, the checkpoints in `lm/run.py`. The bare loop, in one short file,
is `train_minimal.py`.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
  from examples.lm.cli import main
else:  # a script; see lm/__init__.py
  from lm.cli import main

if __name__ == "__main__":
  sys.exit(main())
