"""The training script: its data, its error lines, its exact resume."""

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples import train_lm
from examples.lm import UsageError, cli, data, train
from nsa_jax import TransformerConfig

SCRIPT = Path(train_lm.__file__)
# Short, but long enough for the preset's attention to be sparse.
SMALL = ["--seq-len=384", "--batch-size=1", "--steps=6", "--max-bytes=200000"]
SMALL += ["--eval-batches=2", "--eval-every=2", "--checkpoint-every=2"]
SMALL += ["--sample-bytes=8"]

# Runs the script, and sends it SIGINT while it prepares its fourth step.
INTERRUPT = """
import os, signal, sys
from examples.lm import cli, train

batch = train.training_batch
def interrupt(text, *, step, **kwargs):
  if step == 3:
    os.kill(os.getpid(), signal.SIGINT)
  return batch(text, step=step, **kwargs)

train.training_batch = interrupt
sys.exit(cli.main(sys.argv[1:]))
"""


def run_process(
  *args: object, env: Any = None
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, *map(str, args)],
    capture_output=True,
    text=True,
    cwd=SCRIPT.parents[1],
    env=env,
    timeout=600,
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, script_environment):
  """A run that nothing interrupted, and what it printed."""
  out = tmp_path_factory.mktemp("finished")
  run = run_process(SCRIPT, *SMALL, f"--out={out}", env=script_environment)
  assert run.returncode == 0, run.stderr
  return out, run


def error_line(capsys, *args: object) -> str:
  """The one line that wrong arguments give."""
  with pytest.raises(SystemExit) as caught:
    cli.main([str(arg) for arg in args])
  assert caught.value.code == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("train_lm.py: error: ")
  assert err.count("\n") == 1
  return err


def checkpoint(out: Path, step: int):
  # Absolute: orbax refuses other paths.
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(out / "checkpoints" / str(step) / "state")


def test_a_finished_run_leaves_everything_it_names(finished):
  out, run = finished
  for pattern in (
    r"sparsity .* reads \d+\.\d% of the keys",
    r"bigram .* \(\d\.\d+ bits/byte\): the model (beats|does NOT beat) it",
    r"validation \d\.\d+ nats/byte",
    r"---- sample",
  ):
    assert re.search(pattern, run.stdout), pattern
  for text in ("6/6", "loss ", "tokens/s"):
    assert text in run.stderr
  for name in ("metrics.jsonl", "loss.png", "sample.txt"):
    assert str(out / name) in run.stdout
    assert (out / name).stat().st_size > 0
  assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert len((out / "sample.txt").read_bytes()) == 64 + 8
  assert (out / "checkpoints" / "6").is_dir()

  text = (out / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert [line["step"] for line in lines if "validation_loss" in line] == [
    2,
    4,
    6,
  ]


# What each process compiles anew is the same too; that takes longer.
@pytest.mark.parametrize(
  "cached", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_resume_is_exact_across_processes(
  cached, finished, tmp_path, script_environment
):
  expected, _ = finished
  env = script_environment
  if not cached:
    env = env | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  args = (*SMALL, f"--out={tmp_path}")
  stopped = run_process("-c", INTERRUPT, *args, env=env)
  assert stopped.returncode == 130, stopped.stderr
  assert "stopped at step 4 of 6; continue with" in stopped.stdout
  assert "--resume" in stopped.stdout
  assert not (tmp_path / "sample.txt").exists()
  # What a run killed after its last checkpoint would leave behind.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "train_loss": 0.0}\n')

  resumed = run_process(SCRIPT, *args, "--resume", env=env)
  assert resumed.returncode == 0, resumed.stderr
  assert "steps 4 to 6" in resumed.stdout
  for name in ("metrics.jsonl", "sample.txt"):
    assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()
  saved, straight = checkpoint(tmp_path, 6), checkpoint(expected, 6)
  assert saved["params"]
  assert saved["opt_state"]
  # Equal to the last bit, NaN and signs of zero included.
  for a, b in zip(leaves(saved), leaves(straight), strict=True):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def leaves(tree) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
  "name, function, module",
  [("train_lm", "main", "lm.cli"), ("generate", "load_model", "lm.run")],
)
def test_scripts_need_their_own_folder_alone(
  name, function, module, monkeypatch
):
  """The path of a script holds its folder, not the root of the repository."""
  monkeypatch.syspath_prepend(SCRIPT.parent)
  with mock.patch.dict(sys.modules):
    for imported in [key for key in sys.modules if key.startswith("examples")]:
      del sys.modules[imported]
    found = runpy.run_path(str(SCRIPT.with_name(f"{name}.py")))
    assert found[function].__module__ == module
    assert not any(key.startswith("examples") for key in sys.modules)


def test_a_loss_that_is_not_finite_ends_the_run():
  args = cli.make_parser().parse_args(SMALL)
  text = np.zeros(1000, np.uint8)
  windows = data.validation_windows(text, count=2, seq_len=384)
  run: Any = SimpleNamespace(metrics=[])
  losses = iter([2.0, np.inf, 2.0])

  def train_step(state, batch):
    return state, next(losses)

  def eval_step(params, batch):
    raise AssertionError("not before the losses are known")

  with pytest.raises(UsageError, match="is not finite at step 2; a lower"):
    train.run_steps(
      args, run, 0, {"params": {}}, train_step, eval_step, text, windows
    )
  assert run.metrics == [{"step": 1, "train_loss": 2.0}]


def test_checkpoint_of_another_config(finished, capsys):
  out, _ = finished
  line = error_line(
    capsys,
    *SMALL,
    f"--out={out}",
    "--resume",
    "--attention=window",
    "--seed=3",
  )
  assert f"the checkpoint in {out} is of another configuration" in line
  assert "`model.attention` was nsa, now window" in line
  assert "`seed` was 0, now 3" in line
  assert "`steps`" not in line


def test_out_holds_a_run_already(finished, capsys):
  out, _ = finished
  line = error_line(capsys, *SMALL, f"--out={out}")
  assert f"--out {out}: holds a run of 6 steps already" in line
  assert "--resume" in line


def test_nothing_to_resume(tmp_path, capsys):
  out = tmp_path / "typo"
  line = error_line(capsys, *SMALL, f"--out={out}", "--resume")
  assert f"--resume: no checkpoint in {out}." in line
  assert not out.exists()


def test_an_implementation_that_cannot_leaves_no_folder(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr("pallas_kernels.triton.support._MAX_GROUP", 1)
  out = tmp_path / "run"
  args = (*SMALL, f"--out={out}", "--implementation=triton")
  assert "heads per key/value head: the kernels take" in error_line(
    capsys, *args
  )
  assert not out.exists()


@pytest.mark.parametrize(
  "args, message",
  [
    (["--steps=0"], "argument --steps: '0' is not a positive integer"),
    (["--steps=2.5"], "argument --steps: '2.5' is not a positive integer"),
    (["--learning-rate=inf"], "--learning-rate: 'inf' is not a positive num"),
    (["--seed=-1"], "argument --seed: -1 is not in [0, 2**32)"),
    ([f"--seed={2**64}"], f"argument --seed: {2**64} is not in [0, 2**32)"),
    (["--attention=dense"], "argument --attention: invalid choice: 'dense'"),
    (["--preset=huge"], "argument --preset: invalid choice: 'huge'"),
    (["--implementation=tpu"], "--implementation: invalid choice: 'tpu'"),
    (["--atention=nsa"], "unrecognized arguments: --atention=nsa"),
    (["--prompt="], "argument --prompt: must have 1 to 511 bytes, has 0"),
    (["--temperature=1e-9"], "argument --temperature: 1e-09 is not a finite"),
    (["--seq-len=256"], "--seq-len 256: too short for the preset tiny"),
    (["--out=/dev/null/run"], "--out /dev/null/run: "),
  ],
)
def test_wrong_arguments(args, message, capsys):
  assert message in error_line(capsys, *args)


def test_wrong_corpus(tmp_path, capsys):
  missing = tmp_path / "missing"
  line = error_line(capsys, f"--corpus={missing}")
  assert f"--corpus {missing}: no such file or folder." in line

  line = error_line(capsys, f"--corpus={tmp_path}")
  assert f"--corpus {tmp_path}: no text in it." in line

  binary = tmp_path / "binary"
  binary.write_bytes(b"\0" * 10_000)
  line = error_line(capsys, f"--corpus={binary}")
  assert f"--corpus {binary}: no text in it." in line

  small = tmp_path / "small.txt"
  small.write_text("a" * 1000)
  line = error_line(capsys, f"--corpus={small}")
  assert "too small: 900 bytes for training and 100 for validation" in line
  assert "--seq-len 512 needs at least 513 of each" in line


def test_help(capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(["--help"])
  assert caught.value.code == 0
  text = capsys.readouterr().out
  for action in cli.make_parser()._actions:
    assert action.help is not argparse.SUPPRESS
    assert action.option_strings[-1] in text


def test_split_depends_on_the_names_alone():
  paths = [f"folder/file{i}.py" for i in range(400)]
  kept, held_out = data.split_files(paths)
  assert data.split_files(reversed(paths)) == (kept, held_out)
  assert sorted(kept + held_out) == sorted(paths)
  assert 20 < len(held_out) < 60
  # A file more moves no other.
  more_kept, more_held_out = data.split_files([*paths, "another.py"])
  assert [path for path in more_kept if path != "another.py"] == kept
  assert [path for path in more_held_out if path != "another.py"] == held_out
  # The same on every machine.
  kept, _ = data.split_files(["a.py", "b/c.py", "d.py"])
  assert kept == ["d.py", "b/c.py", "a.py"]


def test_standard_library_corpus():
  corpus = data.load_corpus(None, 2**20, 512)
  again = data.load_corpus(None, 2**20, 512)
  assert corpus.digest() == again.digest()
  assert len(corpus.train) + len(corpus.validation) <= 2**20
  assert len(corpus.validation) > 2**15
  assert b"import" in corpus.train.tobytes()


def test_folder_and_file_corpus(tmp_path):
  for i in range(40):
    (tmp_path / f"{i}.txt").write_text(f"file {i}. " * 100)
  (tmp_path / ".hidden").write_text("secret" * 100)
  (tmp_path / "image").write_bytes(b"\0secret" * 100)
  corpus = data.load_corpus(str(tmp_path), 2**20, 64)
  _, held_out = data.split_files(f"{i}.txt" for i in range(40))
  for path in tmp_path.glob("*.txt"):
    text = path.read_bytes()
    assert (text in corpus.validation.tobytes()) == (path.name in held_out)
    assert (text in corpus.train.tobytes()) == (path.name not in held_out)
  assert b"secret" not in corpus.train.tobytes()

  path = tmp_path / "0.txt"
  corpus = data.load_corpus(str(path), 2**20, 64)
  joined = corpus.train.tobytes() + corpus.validation.tobytes()
  assert joined == path.read_bytes()
  assert len(corpus.validation) == len(joined) // data.HELD_OUT


def test_batches_are_a_function_of_seed_and_step():
  text = np.arange(200, dtype=np.uint8)

  def batch(seed, step):
    return data.training_batch(
      text, seed=seed, step=step, batch_size=64, seq_len=16
    )

  first = batch(0, 5)
  np.testing.assert_array_equal(first, batch(0, 5))
  assert first.shape == (64, 17)
  assert (np.diff(first, axis=1) == 1).all()
  assert (first != batch(0, 6)).any()
  assert (first != batch(1, 5)).any()

  windows = data.validation_windows(text, count=5, seq_len=16)
  assert windows[0, 0] == 0
  assert windows[-1, -1] == 199


def test_bigram_loss_by_hand():
  # After a: b twice, c once. With add-one smoothing over 256 bytes
  # P(b | a) = 3 / 259, P(c | a) = 2 / 259, P(a | b) = (2 + 1) / (2 + 256).
  train = np.frombuffer(b"ababac", np.uint8)
  windows = np.frombuffer(b"abac", np.uint8)[None].astype(np.int32)
  expected = -np.mean(np.log([3 / 259, 3 / 258, 2 / 259]))
  np.testing.assert_allclose(
    data.bigram_loss(train, windows), expected, rtol=1e-12
  )


def test_sparsity_of_every_preset():
  for name, recipe in cli.RECIPES.items():
    config = TransformerConfig.preset(name).nsa
    fraction = train.read_fraction("nsa", config, recipe.seq_len)
    assert 0 < fraction < 0.5
  assert train.read_fraction("full", config, 100) == 1.0
  assert train.read_fraction("window", config, 10_000) == (
    config.window / 10_000
  )


@pytest.mark.slow
def test_default_run_beats_the_bigram_model(tmp_path):
  run = run_process(SCRIPT, f"--out={tmp_path}")
  assert run.returncode == 0, run.stderr
  assert "the model beats it" in run.stdout
