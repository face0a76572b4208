"""The short examples run and say what they should."""

import re
import subprocess
import sys

import numpy as np
import pytest

from examples import check_kernels, plot_reads, train_minimal, train_nnx
from nsa_jax import TransformerConfig


def test_check_kernels(capsys):
  check_kernels.main()
  title, *rows = capsys.readouterr().out.splitlines()
  assert "relative difference" in title
  for row, name in zip(rows, ("xla", "triton", "mosaic_gpu"), strict=True):
    implementation, differences = row.split(": ", 1)
    if "jax has version" in row:
      continue
    dtype = "bfloat16" if name == "mosaic_gpu" else "float32"
    assert implementation == f"{name} in {dtype}"
    words = differences.replace(",", "").split()
    assert words[::2] == ["out", "dq", "dk", "dv"]
    most = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    assert max(map(float, words[1::2])) < most


def test_plot_reads(tmp_path):
  plot_reads.draw(tmp_path / "reads.png")
  assert (tmp_path / "reads.png").stat().st_size > 10_000


def test_plot_reads_that_cannot_be_written(capsys, monkeypatch):
  monkeypatch.setattr("sys.argv", ["plot_reads.py", "--out=/dev/null/a.png"])
  with pytest.raises(SystemExit):
    plot_reads.main()
  assert "argument --out: [Errno 20] Not a dir" in capsys.readouterr().err


@pytest.mark.parametrize("example", [train_minimal, train_nnx])
def test_train_minimal(capsys, monkeypatch, example):
  """A smaller model here, which compiles faster."""
  config = TransformerConfig.preset(
    "tiny", num_layers=1, compression="mean", implementation="reference"
  )
  monkeypatch.setattr(example, "CONFIG", config)
  monkeypatch.setattr(example, "SEQ_LEN", 64)
  losses = example.train(train_minimal.__file__, steps=20)
  assert len(losses) == 20
  assert losses[0] > 5  # that of a uniform guess is log(256) = 5.5
  assert np.mean(losses[-5:]) < losses[0] - 1.5
  for step, line in zip(
    (10, 20), capsys.readouterr().out.splitlines(), strict=True
  ):
    assert re.fullmatch(rf"step {step}: \d\.\d{{3}} nats/byte", line)


@pytest.mark.slow
def test_train_minimal_script():
  script = train_minimal.__file__
  run = subprocess.run(
    [sys.executable, script, script, "--steps=10"],
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.startswith("step 10: ")
