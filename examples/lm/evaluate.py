"""Evaluation alone: the losses of the last checkpoint of a run."""

import argparse
import functools

import jax
import numpy as np

from .data import (
  Batch,
  PackedRow,
  inputs_and_labels,
  load_corpus,
  split_batch,
  take_rows,
)
from .devices import Devices
from .flags import UsageError
from .run import load_run
from .terminal import printable, warn
from .tokenizer import Unit
from .train import open_validation, token_losses

FIRST = 64  # tokens of the first range of positions; each next one doubles


def evaluate(args: argparse.Namespace, devices: Devices | None = None) -> int:
  """Prints the validation loss of a run, of all tokens and by position.

  Args:
    args: the parsed flags of `train_lm.py`. The model and the tokenizer are
      those of the run, and so are `batch_size`, `seq_len` and `pack` if they
      are not given.
    devices: where; one device by default.

  Returns:
    The exit code, 0.

  Raises:
    UsageError: if the run or the text cannot be used.
    NotImplementedError: if the implementation cannot do this attention.
  """
  devices = devices or Devices()
  with devices.use():
    try:
      model, params, step, tokenizer, config = load_run(
        args.out, args.implementation, devices
      )
    except UsageError as error:
      raise UsageError(f"--evaluate: {error}") from error
    for name in ("batch_size", "seq_len"):
      if getattr(args, name) is None:
        setattr(args, name, config[name])
    args.pack = args.pack or config["pack"]
    devices.check(args.batch_size, args.seq_len, 1)
    text = load_corpus(
      args.corpus, args.max_bytes, args.seq_len, args.text_field
    )
    other = text.digest(with_sizes=config["pack"]) != config["corpus"]
    if other and devices.first:
      warn(
        f"--corpus {text.name}: is not the text of the run, which may have "
        "been trained on its validation part."
      )
    files = tokenizer.encode(file.tobytes() for file in text.validation_files())
    if (count := sum(map(len, files))) <= args.seq_len:
      raise UsageError(
        f"--seq-len {args.seq_len}: the validation text has only {count} "
        f"{tokenizer.unit}s."
      )
    batch = open_validation(args, model.config.nsa, files)
    rows, size = devices.rows(args.batch_size), args.batch_size
    losses_fn = jax.jit(
      functools.partial(token_losses, model), out_shardings=devices.whole
    )
    # The columns may come in another order.
    columns = np.argsort(devices.columns(args.seq_len))
    try:
      losses = [
        np.asarray(losses_fn(params, devices.put(take_rows(part, rows), size)))
        for part in split_batch(batch, args.eval_batches)
      ]
    except ValueError as error:
      raise UsageError(str(error)) from error
  tokens = "" if tokenizer.unit == "byte" else f", {count:,} tokens"
  print(
    f"text       {printable(text.name)}: {len(text.validation):,} bytes for "
    f"validation{tokens}\n"
    f"checkpoint {printable(args.out)}, step {step}"
  )
  sizes, unit = tokenizer.sizes(), tokenizer.unit
  for name, line in _report(
    np.concatenate(losses)[:, columns], batch, sizes, unit
  ):
    print(f"{name:<19}{line}")
  return 0


def _report(
  losses: np.ndarray, batch: Batch, sizes: np.ndarray, unit: str
) -> list[tuple[str, str]]:
  """Names and descriptions of the mean losses, of all tokens and by position.

  Args:
    losses: of every token, [B, T].
    batch: the tokens.
    sizes: bytes of each kind of token.
    unit: what a token is.
  """
  labels = inputs_and_labels(batch)[1]
  predicted = labels >= 0
  if isinstance(batch, PackedRow):
    positions = batch.positions
  else:
    positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)

  def mean(chosen: np.ndarray) -> str:
    num_bytes = float(sizes[labels[chosen]].mean())
    return Unit(unit, num_bytes).describe(
      float(losses[chosen].mean(dtype=np.float64))
    )

  lines = [("validation", mean(predicted))]
  last, low, high = int(positions[predicted].max()), 0, FIRST
  while low <= last:
    chosen = predicted & (low <= positions) & (positions < high)
    if chosen.any():
      name = f"at {low:,} to {min(high - 1, last):,}"
      lines.append((name, mean(chosen)))
    low, high = high, 2 * high
  return lines
