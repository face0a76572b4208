"""The plot of the losses of a run."""

import math
import pathlib

import numpy as np
from matplotlib.figure import Figure

from .run import Run
from .tokenizer import Unit


def plot_losses(
  run: Run, bigram: float, title: str, unit: Unit
) -> pathlib.Path:
  """Draws training and validation loss over the steps.

  Args:
    run: the run; the plot is written to its folder.
    bigram: validation loss of the bigram model, in nats per token.
    title: title of the plot.
    unit: of the losses.

  Returns:
    The path of the plot.
  """
  figure = Figure(figsize=(7, 4.2), layout="constrained")
  axes = figure.subplots()
  steps, losses = run.series("train_loss")
  width = max(1, len(losses) // 40)
  kernel = np.ones(width) / width
  axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
  smooth = np.convolve(losses, kernel, mode="valid")
  first = width // 2  # Each mean is drawn at the middle of its steps.
  axes.plot(
    steps[first : first + len(smooth)],
    smooth,
    color="C0",
    label=f"training (mean of {width} steps)" if width > 1 else "training",
  )
  axes.plot(
    *run.series("validation_loss"), "o-", color="C1", label="validation"
  )
  axes.axhline(
    bigram, color="0.3", linestyle="--", label="bigram model, validation"
  )
  axes.set_xlabel("step")
  axes.set_ylabel(f"loss (nats per {unit.name})")
  axes.secondary_yaxis(
    "right",
    functions=(
      unit.bits_per_byte,
      lambda bits: np.multiply(bits, unit.num_bytes * math.log(2)),
    ),
  ).set_ylabel("bits per byte")
  axes.set_title(title, fontsize="medium")
  axes.grid(alpha=0.3)
  axes.legend()
  path = run.folder / "loss.png"
  figure.savefig(path, dpi=150)
  return path
