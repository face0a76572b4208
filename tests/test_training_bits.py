"""Two processes that train the same end with the same bits."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def _start(environment: dict[str, str], *args: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, "-m", "tests.training_bits", *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=os.environ | environment,
  )


def _end(process: subprocess.Popen[str]) -> str:
  try:
    out, errors = process.communicate(timeout=500)
  finally:
    process.kill()
  assert process.returncode == 0, errors
  return out


def _assert_agree(*runs: str) -> None:
  assert "state and loss" in runs[0]
  assert len({*runs}) == 1, runs


@pytest.mark.slow
def test_on_a_cpu() -> None:
  args = ("nsa", "xla", "--steps=3", "--length=64")
  environment = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  _assert_agree(*map(_end, [_start(environment, *args) for _ in range(2)]))
  # Another run has another end.
  other = _end(_start(environment, *args[:2], "--steps=2", "--length=64"))
  assert other != _end(_start(environment, *args))


# cuDNN, the default of full attention, has other bits in every run.
RUNS = [("nsa", "triton"), ("full", "xla")]


@pytest.mark.gpu
@pytest.mark.parametrize("attention, implementation", RUNS)
def test_gpu_without_autotuning(attention: str, implementation: str) -> None:
  """XLA does not choose the fastest of its kernels, which may be another."""
  environment = {"XLA_FLAGS": DETERMINISTIC}
  runs = [_start(environment, attention, implementation) for _ in range(2)]
  _assert_agree(*map(_end, runs))


@pytest.mark.gpu
@pytest.mark.parametrize("attention, implementation", RUNS)
def test_gpu_with_a_compilation_cache(
  attention: str, implementation: str, tmp_path: pathlib.Path
) -> None:
  """The second process runs the programs of the first."""
  environment = {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
  runs = [_end(_start(environment, attention, implementation))]
  assert any(tmp_path.iterdir())
  runs.append(_end(_start(environment, attention, implementation)))
  _assert_agree(*runs)
