"""Every code block of the README runs."""

import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from tests import tiny_run

# What is shown is that the blocks run.
pytestmark = pytest.mark.usefixtures("fast_compilation")

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(
  r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
  command.strip()
  for language, code in BLOCKS
  if language == "bash"
  for line in code.splitlines()
  for command in line.split("&&")
]
# Flags that make a documented run short; its other flags stay.
SHORT = {
  "train_lm.py": (
    # As in test_train_lm.py: the same programs are compiled once.
    "--steps=6 --seq-len=384 --batch-size=1 --max-bytes=200000"
    " --eval-batches=1 --sample-bytes=8"
  ),
  "generate.py": "--max-new-tokens=8",
}


def test_blocks_are_of_known_languages():
  assert {language for language, _ in BLOCKS} == {"bash", "python"}


def _folder(tmp_path, uses_run):
  """Where a block runs: beside the trained model that it may read."""
  if uses_run:
    tiny_run.save(tmp_path / "runs" / "train_lm")
  return tmp_path


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(code, tmp_path, monkeypatch):
  monkeypatch.chdir(_folder(tmp_path, "runs/train_lm" in code))
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path, script_environment):
  program, *arguments = shlex.split(command)
  if program == "python":
    script = ROOT / arguments[0]
    short = shlex.split(SHORT.get(script.name, ""))
    if script.name == "train_lm.py" and "--out" not in arguments:
      short.append(f"--out={tmp_path / 'run'}")
    subprocess.run(
      [sys.executable, script, *arguments[1:], *short],
      cwd=_folder(tmp_path, script.name == "generate.py"),
      env=script_environment,
      check=True,
      capture_output=True,
    )
  elif program == "pip":  # Continuous integration installs; here: it exists.
    assert arguments[:2] == ["install", "-e"]
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra is not None
    assert extra[1] is None or extra[1] in project["optional-dependencies"]
  else:
    assert command == "pytest"
