"""Trains many small models, one per GPU at a time, each in its own process.

A trial is a frozen dataclass with a `name`. Its result is a JSON file in the
folder of all trials, so that a command that was stopped continues.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import harness
from examples.lm.devices import draw_in_kernels

UNFINISHED = 3  # exit code of a trial that was stopped


def add_flags(parser: argparse.ArgumentParser, runs: pathlib.Path) -> None:
  """The flags of a command that trains models."""
  add = parser.add_argument
  add(
    "--runs",
    type=pathlib.Path,
    default=runs,
    help=f"folder for checkpoints and results (default: {runs})",
  )
  add("--workers", type=int, help="models at a time (default: one per GPU)")
  add("--minutes", type=float, default=float("inf"), help="stop after so long")
  add(
    "--known",
    type=pathlib.Path,
    nargs="+",
    default=[],
    metavar="RECORD",
    help="records of this command, such as benchmarks/results/NAME.json, whose "
    "trials are not repeated; they must be of the same text",
  )
  add("--trial", type=json.loads, help=argparse.SUPPRESS)
  add("--stop-at", type=float, help=argparse.SUPPRESS)


def write(
  folder: pathlib.Path,
  trial: Any,
  run: Callable[[Any], Mapping[str, Any] | None],
) -> None:
  """Runs a trial in this process and writes its result.

  Raises:
    SystemExit: if `run` returns None, because it was stopped.
  """
  with draw_in_kernels():
    result = run(trial)
  if result is None:
    raise SystemExit(UNFINISHED)
  path = folder / f"{trial.name}.json"
  temporary = path.with_suffix(".tmp")
  known = {"name": trial.name, **dataclasses.asdict(trial)}
  temporary.write_text(json.dumps(known | dict(result)))
  temporary.replace(path)


def keep_known(
  folder: pathlib.Path,
  records: Iterable[pathlib.Path],
  text: Mapping[str, Any],
) -> None:
  """Writes the results in records to `folder`, if they are not there.

  Raises:
    SystemExit: if a record is of another text than `text`.
  """
  for path in records:
    record = json.loads(path.read_text())
    for name in text.keys() - {"corpus"}:
      if record["text"].get(name) != text[name]:
        raise SystemExit(
          f"--known {path}: its text has {record['text'].get(name)} {name}, "
          f"not {text[name]}."
        )
    for result in (*record["results"], *record.get("searched", ())):
      file = folder / f"{result['name']}.json"
      if not file.exists():
        file.write_text(json.dumps(result))


class Queue:
  """Trials that wait for a GPU.

  Args:
    module: the command, which takes `--trial` and `--stop-at`.
    folder: of the results.
    args: the flags of the command.
    argv: the same as words; those of this process by default.
  """

  def __init__(
    self,
    module: str,
    folder: pathlib.Path,
    args: argparse.Namespace,
    argv: Sequence[str] | None = None,
  ):
    self._environment = dict(os.environ)
    # The models need the memory of the GPUs, this process only their number.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not args.quick:
      harness.require_gpu()
    self._command = [sys.executable, "-m", module]
    self._command += sys.argv[1:] if argv is None else argv
    self._folder = folder
    self._stop_at = time.time() + 60 * args.minutes
    workers = args.workers or len(jax.devices())
    visible = self._environment.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else range(len(jax.devices()))
    self._gpus: queue.Queue[str] = queue.Queue()
    for name in itertools.islice(itertools.cycle(names), workers):
      self._gpus.put(str(name))
    self._pool = concurrent.futures.ThreadPoolExecutor(workers)
    folder.mkdir(parents=True, exist_ok=True)

  def run(self, trials: Iterable[Any]) -> list[dict[str, Any]]:
    """Runs the trials that have no result; returns the results there are."""
    paths = {x: self._folder / f"{x.name}.json" for x in trials}
    waiting = [x for x, path in paths.items() if not path.exists()]
    for trial, code in zip(
      waiting, self._pool.map(self._run, waiting), strict=True
    ):
      if code not in (0, UNFINISHED):
        log = self._folder / f"{trial.name}.log"
        raise SystemExit(f"{trial.name} ended with {code}: see {log}")
    return [json.loads(x.read_text()) for x in paths.values() if x.exists()]

  def _run(self, trial: Any) -> int:
    if time.time() > self._stop_at - 20:
      return UNFINISHED
    gpu = self._gpus.get()
    fields = json.dumps(dataclasses.asdict(trial))
    command = [*self._command, "--trial", fields]
    command += ["--stop-at", str(self._stop_at)]
    environment = {**self._environment, "CUDA_VISIBLE_DEVICES": gpu}
    try:
      with (self._folder / f"{trial.name}.log").open("a") as log:
        return subprocess.run(
          command,
          env=environment,
          stdout=log,
          stderr=log,
          check=False,
        ).returncode
    finally:
      self._gpus.put(gpu)


def best(
  results: Iterable[Mapping[str, Any]], measure: str
) -> dict[str, float]:
  """The learning rate with the lowest measure, a finite number, by kind."""
  found: dict[str, Mapping[str, Any]] = {}
  for result in results:
    kind = result["kind"]
    if kind not in found or result[measure] < found[kind][measure]:
      found[kind] = result
  return {kind: result["rate"] for kind, result in found.items()}
