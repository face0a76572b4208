"""The folder of a run: its checkpoints, its metrics, its model."""

import argparse
import json
import pathlib
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nsa_jax import Implementation, TransformerConfig, TransformerLM

from .data import Corpus
from .flags import UsageError

Params: TypeAlias = Any
State: TypeAlias = dict[str, Any]  # "params" and "opt_state"


class Run:
  """The folder of a run, with checkpoints, metrics, plot and sample.

  A checkpoint is written under a temporary name and then renamed, so that a run
  can be killed at any time and resumed from its last checkpoint.

  Attributes:
    folder: its path.
    metrics_path: the file of the metrics, one JSON object per line.
    metrics: the losses so far, one entry per step.
  """

  def __init__(self, out: str, config: dict[str, Any], resume: bool):
    """Opens the folder.

    Args:
      out: its path; the folder is created if it does not exist.
      config: settings that must be equal to resume the run, from `run_config`.
      resume: the folder must have checkpoints.

    Raises:
      UsageError: if there is nothing to resume, or the folder cannot be
        created.
    """
    self.folder = pathlib.Path(out).absolute()
    self.metrics_path = self.folder / "metrics.jsonl"
    self.metrics: list[dict[str, float]] = []
    self._config = config
    checkpoints = self.folder / "checkpoints"
    if resume and not checkpoints.is_dir():
      raise UsageError(f"--resume: no checkpoint in {self.folder}.")
    try:
      checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UsageError(f"--out {out}: {error}.") from error
    self._manager = ocp.CheckpointManager(
      checkpoints,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=2,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
      ),
    )

  @property
  def last_step(self) -> int | None:
    """Step of the last checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: State) -> None:
    """Writes the metrics and, unless it is there already, a checkpoint."""
    # The metrics are written first: resuming drops those after the last
    # checkpoint, but could not restore missing ones.
    lines = [json.dumps(line) + "\n" for line in self.metrics]
    temporary = self.metrics_path.with_suffix(".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(self.metrics_path)
    if step != self.last_step:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          config=ocp.args.JsonSave(self._config),
        ),
      )

  def restore(self, like: State) -> tuple[int, State]:
    """Reads the last checkpoint and the metrics up to it.

    Args:
      like: shapes and dtypes of the state.

    Returns:
      The step of the checkpoint and its state.

    Raises:
      UsageError: if there is no checkpoint, or it has another configuration.
    """
    step = self.last_step
    if step is None:
      raise UsageError(f"--resume: no checkpoint in {self.folder}.")
    saved = self._manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config
    if different := differences(saved, self._config):
      raise UsageError(
        f"--resume: the checkpoint in {self.folder} is of another "
        f"configuration: {'; '.join(different)}."
      )
    state = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
    ).state
    try:
      lines = self.metrics_path.read_text().splitlines()
    except OSError as error:
      raise UsageError(f"--resume: {error}.") from error
    self.metrics = [
      line for line in map(json.loads, lines) if line["step"] <= step
    ]
    return step, state

  def series(self, name: str) -> tuple[list[float], list[float]]:
    """The steps that have the loss `name`, and its values."""
    lines = [line for line in self.metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]

  def close(self) -> None:
    """Closes the checkpoint manager."""
    self._manager.close()


def differences(
  saved: dict[str, Any], current: dict[str, Any], prefix: str = ""
) -> list[str]:
  """Names and values of the fields in which two configurations differ."""
  result = []
  for name in sorted(saved.keys() | current.keys()):
    old, new = saved.get(name), current.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      result += differences(old, new, f"{prefix}{name}.")
    elif old != new:
      result.append(f"`{prefix}{name}` was {old}, now {new}")
  return result


def run_config(
  args: argparse.Namespace, model: TransformerConfig, corpus: Corpus
) -> dict[str, Any]:
  """The settings that must be equal to resume a run, as JSON types."""
  fields = model.to_dict()
  # A run may continue on another machine with another implementation of the
  # same function.
  del fields["implementation"]
  names = ("batch_size", "learning_rate", "seed", "seq_len", "steps")
  return {
    "model": fields,
    "corpus": corpus.digest(),
    **{name: getattr(args, name) for name in names},
  }


def load_model(
  out: str, implementation: Implementation = None
) -> tuple[TransformerLM, Params, int]:
  """Reads the model of a run from its last checkpoint.

  Args:
    out: folder of the run.
    implementation: of the attention; it is not part of a checkpoint.

  Returns:
    The model, its parameters, and the step at which they were saved.

  Raises:
    UsageError: if there is no checkpoint.
  """
  checkpoints = pathlib.Path(out).absolute() / "checkpoints"
  if not checkpoints.is_dir():
    raise UsageError(f"no checkpoint in {out}; train_lm.py writes them.")
  options = ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(checkpoints, options=options) as manager:
    step = manager.latest_step()
    if step is None:
      raise UsageError(f"no checkpoint in {out} yet.")
    fields = manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config["model"]
    fields["implementation"] = implementation
    model = TransformerLM(TransformerConfig.from_dict(fields))
    # The parameters are restored to a device of this machine, wherever they
    # were saved; the optimiser state is not read.
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      {"params": shapes["params"]},
    )
    restore = ocp.args.PyTreeRestore(
      item=like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=True,
    )
    state = manager.restore(step, args=ocp.args.Composite(state=restore)).state
  return model, state["params"], step
