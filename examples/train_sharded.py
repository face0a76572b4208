"""Train the model of `train_lm.py` on several devices and processes.

    python examples/train_sharded.py --mesh data=4,sequence=2 --fsdp

On several machines, every one runs the same command with its own --process:

    python examples/train_sharded.py --mesh data=16 --fsdp --out /shared/run \
        --coordinator host0:9911 --processes 2 --process 0

The text, the training and the checkpoints are those of `train_lm.py`, with the
same flags; those of the mesh are in `lm/devices.py`. --out is a folder that all
processes share. A checkpoint says nothing about devices: --resume continues on
any mesh, also by `train_lm.py`. If a process ends, so do the others, with an
error; start them again with --resume.

On virtual devices of a CPU: --cpu-devices 8.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
  from examples.lm.sharded import main
else:  # a script; see lm/__init__.py
  from lm.sharded import main

if __name__ == "__main__":
  sys.exit(main())
