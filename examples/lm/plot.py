"""The plot of the losses of a run."""

import math
import pathlib

import numpy as np
from matplotlib.figure import Figure

from .run import Run


def plot_losses(run: Run, bigram: float, title: str) -> pathlib.Path:
  """Draws training and validation loss over the steps.

  Args:
    run: the run; the plot is written to its folder.
    bigram: validation loss of the bigram model, in nats per byte.
    title: title of the plot.

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
  axes.set_ylabel("loss (nats per byte)")
  axes.secondary_yaxis(
    "right",
    functions=(
      lambda nats: np.divide(nats, math.log(2)),
      lambda bits: np.multiply(bits, math.log(2)),
    ),
  ).set_ylabel("bits per byte")
  axes.set_title(title, fontsize="medium")
  axes.grid(alpha=0.3)
  axes.legend()
  path = run.folder / "loss.png"
  figure.savefig(path, dpi=150)
  return path
