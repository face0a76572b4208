"""The folder of a run: its checkpoints, its metrics, its model."""

import argparse
import dataclasses
import errno
import functools
import gc
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

from nsa_jax import Implementation, TransformerConfig, TransformerLM

from .data import Corpus
from .devices import Devices
from .flags import UsageError
from .terminal import warn
from .tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
DIGESTS = "sha256.json"  # in the folder of a checkpoint
Params: TypeAlias = Any
State: TypeAlias = dict[str, Any]  # "params" and "opt_state"
DEFAULTS: dict[str, Any] = {  # of settings that older versions did not save
  "pack": False,
  "tokenizer": Tokenizer.digest,
  "warmup_steps": None,
  "final_learning_rate": None,
}


class Run:
  """The folder of a run, with checkpoints, metrics, plot and sample.

  A checkpoint is written under a temporary name and then renamed, so that a run
  can be killed at any time and resumed from its last checkpoint. Of several
  processes, which share the folder, each writes its part of the state; the
  first one writes the rest.

  Attributes:
    folder: its path.
    metrics_path: the file of the metrics, one JSON object per line.
    metrics: the losses so far, one entry per step.
    steps_before: `steps` of the checkpoint that was restored.
    data_state: state of the batches in that checkpoint; None if they have none.
  """

  def __init__(self, out: str, config: dict[str, Any], resume: bool):
    """Opens the folder.

    Args:
      out: its path; the folder is created if it does not exist.
      config: settings that must be equal to resume the run, from `run_config`.
      resume: the folder must have checkpoints.

    Raises:
      UsageError: if there is nothing to resume, or the folder cannot be
        written, or another process trains in it.
    """
    self.folder = pathlib.Path(out).absolute()
    self.metrics_path = self.folder / "metrics.jsonl"
    self.metrics: list[dict[str, float]] = []
    self.steps_before: int = config["steps"]
    self.data_state: Any = None
    self._config = config
    checkpoints = self.folder / "checkpoints"
    try:
      str(self.folder).encode()
    except UnicodeEncodeError as error:
      raise UsageError(
        f"--out {out}: checkpoints need a folder whose path is UTF-8."
      ) from error
    try:
      if resume and not checkpoints.is_dir():
        raise UsageError(f"--resume: no checkpoint in {self.folder}.")
      checkpoints.mkdir(parents=True, exist_ok=True)
      # Now, not at the first checkpoint.
      tempfile.TemporaryFile(dir=checkpoints).close()
      self._lock = (self.folder / "lock").open("a")
    except OSError as error:
      raise UsageError(f"--out {out}: {error}.") from error
    if _is_first() and not _try_lock(self._lock.fileno()):
      self._lock.close()
      raise UsageError(f"--out {out}: another process is training in it.")
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

  def save(self, step: int, state: State, data_state: Any = None) -> None:
    """Writes the metrics and, unless it is there already, a checkpoint.

    Args:
      step: number of steps done.
      state: the state after these steps.
      data_state: that of the batches, of JSON types; None if they have none.

    Raises:
      UsageError: if they cannot be written; the last checkpoint stays.
    """
    last = self.last_step

    def write() -> None:
      # The metrics are written first: resuming drops those after the last
      # checkpoint, but could not restore missing ones.
      lines = [json.dumps(line) + "\n" for line in self.metrics]
      if _is_first():
        temporary = self.metrics_path.with_suffix(".tmp")
        temporary.write_text("".join(lines))
        temporary.replace(self.metrics_path)
      if step != last:
        _check_space(self.folder, state)
        items = {
          "state": ocp.args.StandardSave(state),
          "config": ocp.args.JsonSave(self._config),
        }
        if data_state is not None:
          items["data"] = ocp.args.JsonSave(data_state)
        self._manager.save(step, args=ocp.args.Composite(**items))
        if _is_first():
          _save_digests(self.folder / "checkpoints" / str(step))

    _, problem = _quietly(write)
    if problem:
      rest = (
        "no checkpoint is saved yet"
        if last is None
        else f"that of step {last} stays, and --resume continues from it"
      )
      raise UsageError(
        f"--out {self.folder}: cannot save the checkpoint of step {step}: "
        f"{problem}; {rest}."
      )

  def restore(self, like: State) -> tuple[int, State]:
    """Reads the last checkpoint and the metrics up to it.

    A checkpoint that cannot be read is set aside, and the one before is taken.

    Args:
      like: shapes, dtypes and shardings of the state.

    Returns:
      The step of the checkpoint and its state.

    Raises:
      UsageError: if there is no checkpoint, it has another configuration, or
        none can be read.
    """

    def read(step: int) -> tuple[State, Any]:
      self._check_config(_read_json(self._manager, step, "config"))
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
      ).state
      has_data = (self.folder / "checkpoints" / str(step) / "data").is_dir()
      data = _read_json(self._manager, step, "data") if has_data else None
      return state, data

    try:
      step, (state, self.data_state), damaged = _read_newest(
        self._manager, self.folder, read
      )
      _meet("restored")
      for other in damaged if _is_first() else ():  # It will be saved again.
        aside = self.folder / f"damaged-{other}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / "checkpoints" / str(other)).rename(aside)
      _meet("set aside")
      if damaged:
        self._manager.reload()
      self.metrics = self._read_metrics(step)
    except OSError as error:
      raise UsageError(f"--resume: {error}.") from error
    except UsageError as error:
      raise UsageError(f"--resume: {error}") from error
    return step, state

  def _read_metrics(self, step: int) -> list[dict[str, float]]:
    """The saved metrics of the steps 1 to `step`."""
    try:
      lines = self.metrics_path.read_text().splitlines()
      metrics = [
        line for line in map(json.loads, lines) if line["step"] <= step
      ]
      complete = [line["step"] for line in metrics] == list(range(1, step + 1))
    except (ValueError, TypeError, KeyError):
      complete = False
    if not complete:
      raise UsageError(
        f"{self.metrics_path} is damaged: it must have one JSON object for "
        f"each of the steps 1 to {step}."
      )
    return metrics

  def _check_config(self, saved: dict[str, Any]) -> None:
    """Raises UsageError unless a run with these settings may continue."""
    current = dict(self._config)
    # What an older version did not have takes its default.
    fields = _model_config(saved, self.folder).to_dict()
    del fields["implementation"], fields["layout"]
    saved = DEFAULTS | saved | {"model": fields}
    self.steps_before = saved.get("steps", 0)
    if self.steps_before < current["steps"]:
      saved["steps"] = current["steps"]
    if different := differences(saved, current):
      raise UsageError(
        f"the checkpoint in {self.folder} is of another configuration: "
        f"{'; '.join(different)}. Only --steps may change, and only grow."
      )

  def series(self, name: str) -> tuple[list[float], list[float]]:
    """The steps that have the loss `name`, and its values."""
    lines = [line for line in self.metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]

  def close(self) -> None:
    """Closes the checkpoint manager, and unlocks the folder."""
    self._manager.close()
    self._lock.close()


def _is_first() -> bool:
  return jax.process_index() == 0


def _meet(name: str) -> None:
  """Waits for the other processes, if any."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _try_lock(fd: int) -> bool:
  """Locks a file until it is closed or its process ends; False if it is."""
  if fcntl is None:  # Then nothing is locked.
    return True
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # Some network file systems have no locks.
    pass
  return True


def _quietly(call: Callable[[], T]) -> tuple[T | None, str]:
  """Calls Orbax without the pages that it prints for one error.

  Args:
    call: may raise UsageError, which passes, and errors of any type.

  Returns:
    What it returned, and what went wrong: "" for nothing.
  """
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels = [logger.level for logger in loggers]
  hooks = sys.excepthook, sys.unraisablehook
  try:
    sys.excepthook = lambda *unused: None  # of threads of TensorStore
    sys.unraisablehook = lambda unused: None
    for logger in loggers:
      logger.setLevel(logging.CRITICAL + 1)
    try:
      return call(), ""
    except UsageError:
      raise
    except Exception as error:
      problem = brief(error)
    # The coroutines that Orbax has abandoned complain when they are collected.
    gc.collect()
    return None, problem
  finally:
    sys.excepthook, sys.unraisablehook = hooks
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def brief(error: Exception) -> str:
  """What an error says, in less than a line."""
  if isinstance(error, OSError):
    return str(error)
  if found := re.search(r"os_error_code='(\d+)'", str(error)):
    return os.strerror(int(found[1]))  # The messages of TensorStore are long.
  return f"{type(error).__name__}: {error}"[:160]


def _check_space(folder: pathlib.Path, state: State) -> None:
  """Raises OSError if the disk is too full for a checkpoint."""
  needed = sum(x.nbytes for x in jax.tree.leaves(state))
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise OSError(
      errno.ENOSPC,
      f"{os.strerror(errno.ENOSPC)}: it needs {needed:,} bytes, and {free:,} "
      "are free",
    )


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _save_digests(checkpoint: pathlib.Path) -> None:
  """Writes a hash of each file of the states into a checkpoint's folder."""
  digests = {
    path.relative_to(checkpoint).as_posix(): _digest(path)
    for name in ("state", "data")
    for path in (checkpoint / name).rglob("*")
    if path.is_file()
  }
  temporary = checkpoint / f"{DIGESTS}.tmp"
  temporary.write_text(json.dumps(digests))
  temporary.replace(checkpoint / DIGESTS)


def _check_digests(checkpoint: pathlib.Path) -> None:
  """Raises ValueError or OSError if a file is not as it was saved.

  Orbax does not see every damage, and of what it sees it prints pages.
  """
  path = checkpoint / DIGESTS
  if not path.exists():  # An older version saved it.
    return
  for name, digest in json.loads(path.read_text()).items():
    if _digest(checkpoint / name) != digest:
      raise ValueError(f"{name} is not as it was saved")


def _read_json(manager: ocp.CheckpointManager, step: int, name: str) -> Any:
  """Reads a JSON item of a checkpoint."""
  args = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
  return manager.restore(step, args=args)[name]


def _read_newest(
  manager: ocp.CheckpointManager,
  folder: str | pathlib.Path,
  read: Callable[[int], T],
) -> tuple[int, T, list[int]]:
  """Reads the newest checkpoint that can be read; warns of the newer ones.

  Args:
    manager: the checkpoints.
    folder: of the run, for messages.
    read: reads the checkpoint of a step.

  Returns:
    Its step, what `read` returned, and the newer steps.

  Raises:
    UsageError: if there is none, or `read` raises it.
  """
  damaged: dict[int, str] = {}

  def check_and_read(step: int) -> T:
    _check_digests(pathlib.Path(folder) / "checkpoints" / str(step))
    return read(step)

  for step in sorted(manager.all_steps(), reverse=True):
    result, problem = _quietly(functools.partial(check_and_read, step))
    if result is None:
      damaged[step] = problem
      continue
    for other, why in damaged.items():
      warn(
        f"the checkpoint of step {other} in {folder} is damaged ({why}); "
        f"taking that of step {step}."
      )
    return step, result, list(damaged)
  if not damaged:
    raise UsageError(f"no checkpoint in {folder} yet.")
  reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
  raise UsageError(f"no checkpoint in {folder} can be read ({reasons}).")


def _model_config(
  saved: dict[str, Any], folder: str | pathlib.Path
) -> TransformerConfig:
  """The configuration of the model in that of a run.

  Raises:
    UsageError: if this version does not know a field of it.
  """
  try:
    return TransformerConfig.from_dict(saved["model"])
  except ValueError as error:
    raise UsageError(
      f"the checkpoint in {folder} was made by another version: {error}"
    ) from error


def differences(
  saved: dict[str, Any], current: dict[str, Any], prefix: str = ""
) -> list[str]:
  """Names and values of the fields in which two configurations differ."""
  result = []
  for name in sorted(saved.keys() | current.keys()):
    old, new = saved.get(name, "absent"), current.get(name, "absent")
    if isinstance(old, dict) and isinstance(new, dict):
      result += differences(old, new, f"{prefix}{name}.")
    elif old != new:
      result.append(f"`{prefix}{name}` was {old}, now {new}")
  return result


def run_config(
  args: argparse.Namespace,
  model: TransformerConfig,
  corpus: Corpus,
  tokenizer: Tokenizer,
) -> dict[str, Any]:
  """The settings that must be equal to resume a run, as JSON types.

  Args:
    args: the flags.
    model: its configuration.
    corpus: the text, as bytes.
    tokenizer: makes tokens of it.
  """
  fields = model.to_dict()
  # A run may continue on another machine with another implementation of the
  # same function, and on other devices.
  del fields["implementation"], fields["layout"]
  names = (
    "batch_size",
    "final_learning_rate",
    "learning_rate",
    "pack",
    "seed",
    "seq_len",
    "steps",
    "warmup_steps",
  )
  return {
    "model": fields,
    "corpus": corpus.digest(with_sizes=args.pack),
    "tokenizer": tokenizer.digest,
    **{name: getattr(args, name) for name in names},
  }


class Loaded(NamedTuple):
  """What a run has trained.

  Attributes:
    model: the model.
    params: its parameters.
    step: the step at which they were saved.
    tokenizer: makes the tokens that it reads.
    config: the settings of the run, from `run_config`.
  """

  model: TransformerLM
  params: Params
  step: int
  tokenizer: Tokenizer
  config: dict[str, Any]


def load_model(
  out: str, implementation: Implementation = None
) -> tuple[TransformerLM, Params, int]:
  """The model, parameters and step of `load_run`, with the same arguments."""
  return load_run(out, implementation)[:3]


def load_run(
  out: str,
  implementation: Implementation = None,
  devices: Devices | None = None,
) -> Loaded:
  """Reads what a run has trained, from the last checkpoint that can be read.

  Args:
    out: folder of the run.
    implementation: of the attention; it is not part of a checkpoint.
    devices: where the parameters go; one device by default.

  Raises:
    UsageError: if there is no checkpoint that can be read, or the tokenizer is
      not the one of the run.
  """
  devices = devices or Devices()
  checkpoints = pathlib.Path(out).absolute() / "checkpoints"
  if not checkpoints.is_dir():
    raise UsageError(f"no checkpoint in {out}; train_lm.py writes them.")

  def read(step: int) -> tuple[TransformerConfig, Params, dict[str, Any]]:
    saved = DEFAULTS | _read_json(manager, step, "config")
    config = dataclasses.replace(
      _model_config(saved, out), implementation=implementation
    )
    # The parameters are restored to these devices, wherever they were saved;
    # the optimiser state is not read.
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = TransformerLM(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), tokens)
    shapes = {"params": shapes["params"]}
    like = jax.tree.map(
      lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y),
      shapes,
      devices.shardings(shapes),
    )
    restore = ocp.args.PyTreeRestore(
      item=like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=True,
    )
    state = manager.restore(step, args=ocp.args.Composite(state=restore)).state
    return config, state["params"], saved

  options = ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(checkpoints, options=options) as manager:
    step, (config, params, saved), _ = _read_newest(manager, out, read)
  model = TransformerLM(dataclasses.replace(config, layout=devices.layout))
  tokenizer = load_tokenizer(pathlib.Path(out), saved["tokenizer"])
  return Loaded(model, params, step, tokenizer, saved)
