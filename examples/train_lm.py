"""Train a language model with Native Sparse Attention on real text.

    python examples/train_lm.py
    python examples/train_lm.py --corpus notes/ --steps 1000 --out runs/notes
    python examples/train_lm.py --corpus notes/ --steps 1000 --out runs/notes \
        --resume
    python examples/train_lm.py --corpus notes.jsonl --pack --out runs/packed
    python examples/train_lm.py --tokenizer bpe:4096 --out runs/bpe
    python examples/train_lm.py --evaluate

The default corpus is the source of Python's standard library, which every
Python installation contains. About one file in ten is held out for validation,
and the validation loss is compared with that of a bigram model fitted to the
same training text. Batches depend only on the seed and the step; with --pack,
where a row holds files that do not read one another, the checkpoints hold what
the next batch depends on. So a resumed run sees the same data as an
uninterrupted one.

The flags are in `lm/cli.py`, the text in `lm/data.py`, its tokens in
`lm/tokenizer.py`, the training in `lm/train.py`, and the checkpoints in
`lm/run.py`. `train_minimal.py` is the bare loop in one short file.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
  from examples.lm.cli import main
else:  # a script; see lm/__init__.py
  from lm.cli import main

if __name__ == "__main__":
  sys.exit(main())
