"""The training script: its data, its error lines, its exact resume."""

import argparse
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples import train_lm
from examples.lm import UsageError, cli, data, load_model, terminal, train
from examples.lm import run as runs
from examples.lm.tokenizer import Tokenizer
from nsa_jax import NSAConfig, PackedRow, SelectByMeans, TransformerConfig
from tests import tiny_run

SCRIPT = Path(train_lm.__file__)
# Short, but long enough for the preset's attention to be sparse.
SMALL = ["--seq-len=384", "--batch-size=1", "--steps=6", "--max-bytes=200000"]
SMALL += ["--eval-batches=2", "--eval-every=2", "--checkpoint-every=2"]
SMALL += ["--sample-tokens=8"]

# Runs the script, and sends it SIGINT while it prepares its fourth step.
INTERRUPT = """
import os, signal, sys
from examples.lm import cli, data

batch = data.training_batch
def interrupt(text, *, step, **kwargs):
  if step == 3:
    os.kill(os.getpid(), signal.SIGINT)
  return batch(text, step=step, **kwargs)

data.training_batch = interrupt
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
  [("train_lm", "main", "lm.cli"), ("generate", "Parser", "lm.flags")],
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
  windows = data.RandomWindows(text, seed=0, batch_size=1, seq_len=384)
  run: Any = SimpleNamespace(metrics=[])
  losses = iter([2.0, np.inf, 2.0])

  def train_step(state, batch):
    return state, next(losses)

  def eval_step(params, batch):
    raise AssertionError("not before the losses are known")

  with pytest.raises(UsageError, match="is not finite at step 2; a lower"):
    train.run_steps(
      args, run, 0, {"params": {}}, train_step, eval_step, windows, []
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
    "--num-selected=5",
    "--steps=5",
  )
  assert f"the checkpoint in {out} is of another configuration" in line
  assert "`model.attention` was nsa, now window" in line
  assert "`seed` was 0, now 3" in line
  assert "`model.nsa.num_selected` was 4, now 5" in line
  assert "`steps` was 6, now 5. Only --steps may change, and only grow." in line
  assert "`batch_size`" not in line


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
    (["--prompt="], "--prompt: must have 1 to 511 bytes, has 0."),
    (["--temperature=1e-9"], "argument --temperature: 1e-09 is not a finite"),
    (["--seq-len=1"], "argument --seq-len: 1 is not at least 2"),
    (["--window=0"], "argument --window: '0' is not a positive integer"),
    (["--num-initial=-1"], "`num_initial`=-1 must be at least 0"),
    (["--compression-stride=3"], "must be a multiple of `compression_stride`"),
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


# -------------------------------------------------------------------- packing


def write_files(folder: Path, sizes: Iterable[int]) -> str:
  """Files of random bytes, so that a part of one is found in no other."""
  rng = np.random.default_rng(0)
  folder.mkdir()
  for i, size in enumerate(sizes):
    text = rng.integers(1, 256, size).astype(np.uint8)
    (folder / f"{i}.txt").write_bytes(text.tobytes())
  return str(folder)


SIZES = [*range(20, 200, 7), *range(300, 600, 23)]


def segments(rows: PackedRow) -> list[bytes]:
  """The segments of rows [B, T], checked to be runs at multiples of 8."""
  found = []
  for tokens, _, ids, positions in zip(*rows, strict=True):
    for i in range(1, ids.max() + 1):
      places = np.flatnonzero(ids == i)
      assert places[0] % 8 == 0
      np.testing.assert_array_equal(places - places[0], positions[places])
      np.testing.assert_array_equal(places - places[0], np.arange(len(places)))
      found.append(tokens[places].astype(np.uint8).tobytes())
  return found


def test_the_parts_of_a_corpus_are_files(tmp_path):
  path = write_files(tmp_path / "text", SIZES)
  corpus = data.load_corpus(path, 2**20, 64)
  files = [file.tobytes() for file in corpus.train_files()]
  held_out = [file.tobytes() for file in corpus.validation_files()]
  written = [file.read_bytes() for file in Path(path).iterdir()]
  assert sorted(files + held_out) == sorted(written)

  # Too few to hold one out: the file at nine tenths is cut in two.
  few = write_files(tmp_path / "few", [100, 300, 600])
  corpus = data.load_corpus(few, 2**20, 64)
  sizes = [len(file) for file in corpus.train_files() if len(file)]
  assert sizes == [100, 300, 500]
  assert [len(file) for file in corpus.validation_files()][-1] == 100
  assert corpus.digest() != corpus.digest(with_sizes=True)


def test_no_packed_row_reads_across_files(tmp_path):
  corpus = data.load_corpus(write_files(tmp_path / "text", SIZES), 2**20, 64)
  files = [file.tobytes() for file in corpus.train_files()]
  pieces = [file[i : i + 64] for file in files for i in range(0, len(file), 64)]

  def start(seed=0):
    return data.PackedFiles(
      corpus.train_files(), seed=seed, batch_size=2, seq_len=64, alignment=8
    )

  batches = start()
  read = [batches.read(step) for step in range(300)]
  found = [segment for batch in read for segment in segments(batch)]
  # Two epochs and more; every piece is there as often, but for open rows.
  counts = Counter(found)
  assert set(counts) == set(pieces)
  assert max(counts.values()) - min(counts.values()) <= 2
  assert min(counts.values()) >= 2
  report = batches.rows.report
  assert report.tokens == sum(map(len, found))
  assert report.tokens + report.padding == 300 * 2 * 64
  assert 0 < report.padding_fraction < 0.1
  assert segments(start(seed=1).read(0)) != segments(read[0])

  # The state goes on with the very same batches.
  again = start()
  for step in range(100):
    again.read(step)
  resumed = start()
  resumed.set_state(json.loads(json.dumps(again.get_state())))
  for step in range(100, 200):
    for a, b in zip(resumed.read(step), read[step], strict=True):
      np.testing.assert_array_equal(a, b)


def test_validation_rows_are_packed_files(tmp_path):
  corpus = data.load_corpus(write_files(tmp_path / "text", SIZES), 2**20, 64)
  files = [file.tobytes() for file in corpus.validation_files()]
  rows = data.validation_rows(
    corpus.validation_files(), count=6, seq_len=64, alignment=8
  )
  assert rows.tokens.shape == (6, 64)
  for segment in segments(rows):
    assert any(segment in file for file in files)
  predicted = data.num_predicted(rows)
  assert predicted == (rows.labels >= 0).sum()
  parts = data.split_batch(rows, 3)
  assert sum(map(data.num_predicted, parts)) == predicted
  np.testing.assert_array_equal(parts[1], [x[2:4] for x in rows])
  # Uniform guesses: every predicted byte counts alike, padding does not.
  one = data.bigram_loss(np.zeros(1, np.uint8), rows)
  np.testing.assert_allclose(one, np.log(256))


def test_packed_training_resumes_exactly(tmp_path, capsys, monkeypatch):
  sample = tmp_path / "sample.txt"
  monkeypatch.setattr(train, "model_config", lambda args: tiny_run.CONFIG)
  monkeypatch.setattr(train, "write_sample", lambda *args: sample)
  monkeypatch.setattr(train, "plot_losses", lambda *args: tmp_path / "plot.png")
  args = [
    *("--pack", "--attention=window", "--batch-size=2", "--seq-len=64"),
    *("--steps=4", "--eval-batches=2", "--checkpoint-every=2"),
    f"--corpus={write_files(tmp_path / 'text', SIZES)}",
  ]
  straight, resumed = tmp_path / "straight", tmp_path / "resumed"
  assert cli.main([*args, f"--out={straight}"]) == 0
  printed = capsys.readouterr().out
  padding = re.search(r"^padding    \d+\.\d% of 8 packed rows$", printed, re.M)
  assert padding

  shutil.copytree(straight, resumed)
  shutil.rmtree(resumed / "checkpoints" / "4")
  assert cli.main([*args, f"--out={resumed}", "--resume"]) == 0
  printed = capsys.readouterr().out
  assert "steps 2 to 4" in printed
  assert padding[0] in printed
  assert (resumed / "metrics.jsonl").read_bytes() == (
    straight / "metrics.jsonl"
  ).read_bytes()
  for a, b in zip(
    leaves(checkpoint(resumed, 4)), leaves(checkpoint(straight, 4)), strict=True
  ):
    assert a.tobytes() == b.tobytes()

  del args[0]
  line = error_line(capsys, *args, f"--out={resumed}", "--resume")
  assert "`pack` was True, now False" in line
  # What a checkpoint says of the batches is checked as its arrays are.
  saved = resumed / "checkpoints" / "4" / "data" / "metadata"
  saved.write_text(saved.read_text().replace("1", "2"))
  assert load_model(str(resumed))[2] == 2


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


# ----------------------------------------------------- any corpus and machine


def test_file_names_that_are_not_utf8(tmp_path):
  names = [os.fsdecode(b"\xff%d.txt" % i) for i in range(40)]
  kept, held_out = data.split_files(names)
  assert sorted([*kept, *held_out]) == sorted(names)
  assert held_out
  for i, name in enumerate(names):
    text = f"file {i}. " * 100
    try:
      (tmp_path / name).write_text(text)
    except OSError:  # macOS has no such names.
      (tmp_path / f"{i}.txt").write_text(text)
  corpus = data.load_corpus(str(tmp_path), 2**20, 64)
  assert len(corpus.train) > 30 * 700
  assert not corpus.skipped
  # By its bytes, so the same on a machine that shows the name otherwise.
  assert data._rank("\udcc3\udca9") == data._rank("é")


def test_what_is_no_text_is_skipped_and_named(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)  # the path of a socket must be short
  Path("folder").mkdir()
  Path("folder/text").write_text("text " * 200)
  Path("folder/.hidden").mkdir()
  Path("folder/config-1").write_text("more " * 200)
  Path("folder/binary\x1b[31m").write_bytes(b"a\0b")
  os.mkfifo("folder/pipe")
  with socket.socket(socket.AF_UNIX) as endpoint:
    endpoint.bind("folder/socket")
  Path("folder/broken").symlink_to("nowhere")
  Path("folder/circle").symlink_to("circle")
  Path("folder/up").symlink_to("..")
  corpus = data.load_corpus("folder", 2**20, 64)
  assert len(corpus.train) + len(corpus.validation) == 2000
  assert data.describe_skipped(corpus.skipped) == (
    "7 (1 broken link: broken; 1 circular link: circle; 1 hidden or a cache: "
    ".hidden; 1 link to a folder: up; 2 not a regular file: pipe, socket; 1 "
    "not text: has a zero byte: binary\ufffd[31m)"
  )
  many = data.describe_skipped({f"{i:02}": "hidden" for i in range(12)})
  assert many.endswith("08, 09 and 2 more)")
  line = error_line(capsys, "--corpus=folder/pipe")
  assert "no text in it. Skipped 1 (1 not a regular file: pipe)." in line


def test_max_bytes_are_all_that_is_read(tmp_path, monkeypatch):
  huge = tmp_path / "huge"
  huge.write_text("text " * 200)
  os.truncate(huge, 2**36)  # zeros, which take no room
  corpus = data.load_corpus(str(huge), 1000, 64)
  assert len(corpus.train) + len(corpus.validation) == 1000

  for i in range(40):
    (tmp_path / f"{i}.txt").write_text("text " * 200)
  huge.unlink()
  total = 0

  def read_file(path, max_bytes, read=data._read_file):
    nonlocal total
    text = read(path, max_bytes)
    total += len(text)
    return text

  monkeypatch.setattr(data, "_read_file", read_file)
  data.load_corpus(str(tmp_path), 3000, 64)
  assert total == 3000


def test_a_sample_is_safe_on_an_ascii_terminal(tmp_path, monkeypatch):
  args = cli.make_parser().parse_args([])
  args.seq_len = 100
  sample = b"a\x1b[31m\xc3\xa9\n\tb"
  out: Any = SimpleNamespace(tokens=np.frombuffer(sample, np.uint8)[None])
  monkeypatch.setattr(train, "generate", lambda *args, **kwargs: out)
  shown = io.BytesIO()
  monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))
  terminal.prepare_output()
  run: Any = SimpleNamespace(folder=tmp_path)
  model: Any = None
  train.write_sample(args, model, {}, Tokenizer(), np.array([97]), run)
  assert shown.getvalue() == b"---- sample, after b'a'\n?[31m?\n\tb\n----\n"
  assert (tmp_path / "sample.txt").read_bytes() == sample


# The command listens before it imports jax; and the main thread is not needed:
# here it sleeps, as if XLA compiled.
BUSY = """
import os, signal, sys, time
from examples.lm import cli, terminal
assert "jax" not in sys.modules
with terminal.StopRequest("stopped", wait="wait" in sys.argv) as request:
  os.kill(os.getpid(), signal.SIGINT)
  if "wait" in sys.argv:
    assert request.signal == signal.SIGINT
    os.kill(os.getpid(), signal.SIGTERM)
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  time.sleep(100)
"""


@pytest.mark.parametrize("word, code", [("now", 130), ("wait", 143)])
def test_a_signal_ends_it_in_one_line(word, code):
  run = run_process("-c", BUSY, word)
  assert (run.returncode, run.stderr) == (code, "stopped\n")


def test_ctrl_c_while_compiling(finished, tmp_path, script_environment):
  out, _ = finished
  folder = shutil.copytree(out, tmp_path / "run")
  environment = script_environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  process = subprocess.Popen(
    [sys.executable, SCRIPT, *SMALL, f"--out={folder}", "--resume"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )
  with process:
    assert process.stdout is not None
    assert any(line.startswith("run ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
  assert process.returncode == 130
  assert "compiled" not in stdout
  assert re.fullmatch("train_lm.py: stopped at once; .*\n", stderr)
  assert load_model(str(folder))[2] == 6


def test_full_disk(tmp_path, monkeypatch):
  tiny_run.save(tmp_path)
  run = tiny_run.open_run(tmp_path, True)
  state = tiny_run.make_state()
  full = mock.Mock(return_value=SimpleNamespace(free=1000))
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", full)
    with pytest.raises(UsageError, match=r"step 4: .* 1,000 are free"):
      run.save(4, state)
    # Or the library finds out, in a message of pages.
    error = ValueError("page\npage [os_error_code='28']")
    full.side_effect = error
    with pytest.raises(UsageError) as caught:
      run.save(4, state)
  assert str(caught.value) == (
    f"--out {tmp_path}: cannot save the checkpoint of step 4: No space left on "
    "device; that of step 3 stays, and --resume continues from it."
  )
  run.close()
  assert load_model(str(tmp_path))[2] == 3


def test_unwritable_folder(tmp_path, monkeypatch):
  tiny_run.save(tmp_path)
  error = PermissionError(13, "Permission denied", "checkpoints")
  monkeypatch.setattr("tempfile.TemporaryFile", mock.Mock(side_effect=error))
  with pytest.raises(UsageError, match=r"--out .*: .* Permission denied: 'che"):
    tiny_run.open_run(tmp_path, True)


def test_a_path_that_checkpoints_cannot_have(tmp_path):
  with pytest.raises(UsageError, match="need a folder whose path is UTF-8"):
    tiny_run.open_run(tmp_path / "\udcff", False)


def damage(folder: Path, step: int) -> None:
  """Changes a bit in the middle of the largest file of a state."""
  files = [*(folder / f"checkpoints/{step}/state").rglob("*")]
  path = max(files, key=lambda path: path.stat().st_size * path.is_file())
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def test_damaged_checkpoints(tmp_path, capsys):
  tiny_run.save(tmp_path, last_step=4)
  damage(tmp_path, 4)
  state = tiny_run.make_state()
  for read in ("load_model", "restore"):
    if read == "load_model":
      _, params, step = load_model(str(tmp_path))
    else:
      run = tiny_run.open_run(tmp_path, True)
      step, restored = run.restore(jax.eval_shape(lambda: state))
      params = restored["params"]
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, state["params"])
    assert re.fullmatch(
      r"warning: the checkpoint of step 4 in .* is damaged \(.*not as it was "
      r"saved\); taking that of step 3.\n",
      capsys.readouterr().err,
    )
  assert (tmp_path / "damaged-4" / "state").is_dir()
  run.save(4, state)
  run.close()
  assert load_model(str(tmp_path))[2] == 4

  damage(tmp_path, 3)
  # Also without hashes, which older versions did not write.
  (tmp_path / "checkpoints/4" / runs.DIGESTS).unlink()
  (tmp_path / "checkpoints/4/config/metadata").write_text("{")
  with pytest.raises(UsageError, match=r"no checkpoint in .* can be read \(st"):
    load_model(str(tmp_path))
  assert (tmp_path / "checkpoints/4").is_dir()


def test_damaged_metrics(tmp_path):
  tiny_run.save(tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text()
  like = jax.eval_shape(tiny_run.make_state)
  for text in (lines[:-5], "3\n", lines.replace('"step": 2', '"step": 1')):
    (tmp_path / "metrics.jsonl").write_text(text)
    run = tiny_run.open_run(tmp_path, True)
    with pytest.raises(UsageError, match="one JSON object for each of the st"):
      run.restore(like)
    run.close()


def test_resume_of_another_version(tmp_path):
  tiny_run.save(tmp_path)
  path = tmp_path / "checkpoints/3/config/metadata"
  saved = json.loads(path.read_text())
  del saved["model"]["normalize_qk"], saved["model"]["nsa"]["window"]
  for name in runs.DEFAULTS:
    del saved[name]
  path.write_text(json.dumps(saved))
  run = tiny_run.open_run(tmp_path, True)
  # The default of NSAConfig, not of the preset.
  with pytest.raises(UsageError, match=r"`model.nsa.window` was 512, now"):
    run.restore({})

  saved["model"] |= {"nsa": tiny_run.CONFIG.to_dict()["nsa"], "new": 1}
  path.write_text(json.dumps(saved))
  for read in (lambda: run.restore({}), lambda: load_model(str(tmp_path))):
    with pytest.raises(UsageError, match="another version: `new` must be a fi"):
      read()
  del saved["model"]["new"]
  path.write_text(json.dumps(saved))
  state = tiny_run.make_state()
  assert run.restore(jax.eval_shape(lambda: state))[0] == 3
  run.close()


def test_steps_may_grow(tmp_path):
  tiny_run.save(tmp_path)
  run = tiny_run.open_run(tmp_path, True, "--steps=20")
  state = tiny_run.make_state()
  assert run.restore(jax.eval_shape(lambda: state))[0] == 3
  assert run.steps_before == 10
  run.close()
  args = cli.make_parser().parse_args(["--steps=20", "--learning-rate=1"])
  # Cosine decay to 1 / 20, from the end of the warm-up on: step 1 or 2.
  before, now = (
    1 / 20 + 19 / 20 * (1 + np.cos(np.pi * done)) / 2
    for done in (2 / 9, 1 / 18)
  )
  assert train.describe_growth(args, 10, 3) == (
    "--steps was 10, now 20: the learning rate follows the schedule of 20 "
    f"steps from step 3 on, where it is {now:.2e} instead of {before:.2e}; a "
    "run of 20 steps from the start would end elsewhere."
  )


def test_sizes_of_the_attention(capsys):
  sizes = {
    "compression_block": 4,
    "compression_stride": 2,
    "selection_block": 8,
    "num_selected": 5,
    "num_initial": 0,
    "num_local": 2,
    "window": 7,
  }
  flags = [f"--{k.replace('_', '-')}={v}" for k, v in sizes.items()]
  parse = cli.make_parser().parse_args
  assert train.model_config(parse(flags)).nsa == NSAConfig(**sizes)
  flags = ["--select=means", "--gate-bias", "-2.94", "2.2", "-2.94"]
  config = train.model_config(parse(flags))
  assert config.select == SelectByMeans()
  assert config.gate_bias == (-2.94, 2.2, -2.94)
  with pytest.raises(UsageError, match=r"gate_bias\[1\].*finite"):
    train.model_config(parse(["--gate-bias", "0", "nan", "0"]))
  for preset in cli.RECIPES:
    config = train.model_config(parse([f"--preset={preset}"]))
    assert config == TransformerConfig.preset(preset)

  with pytest.raises(SystemExit):
    cli.main(["--seq-len=64", "--corpus=/dev/null"])
  warning, error = capsys.readouterr().err.splitlines()
  assert warning.startswith("warning: --seq-len 64 is short for this attention")
  assert "reads 173.4% of the keys" in warning
  assert "no text in it" in error


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
  first = tiny_run.open_run(tmp_path, False)
  with pytest.raises(UsageError, match="another process is training in it"):
    tiny_run.open_run(tmp_path, False)
  with monkeypatch.context() as patch:
    patch.setattr(runs, "fcntl", None)
    tiny_run.open_run(tmp_path, False).close()
  first.close()
  tiny_run.open_run(tmp_path, False).close()


@pytest.mark.slow
def test_default_run_beats_the_bigram_model(tmp_path):
  run = run_process(SCRIPT, f"--out={tmp_path}")
  assert run.returncode == 0, run.stderr
  assert "the model beats it" in run.stdout
