"""Data parallelism changes neither the loss nor the gradients."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import train_pmap

EXAMPLES = Path(train_pmap.__file__).parent


def test_pmap_agrees_with_one_device(monkeypatch):
  """One layer here, two in the script."""
  one_layer = dataclasses.replace(train_pmap.CONFIG, num_layers=1)
  monkeypatch.setattr(train_pmap, "CONFIG", one_layer)
  assert jax.local_device_count() > 1
  rows = train_pmap.compare(steps=3)
  for one, many, difference, largest in rows:
    # The mean over the batch is taken in another order.
    np.testing.assert_allclose(many, one, rtol=1e-6)
    assert difference < 1e-5
    assert largest > 1e-3
  assert rows[-1][0] < rows[0][0]


@pytest.mark.slow
def test_script_prints_a_table():
  run = subprocess.run(
    [sys.executable, "-W", "error", EXAMPLES / "train_pmap.py"],
    capture_output=True,
    text=True,
    cwd=EXAMPLES.parent,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr
  header, titles, *rows = run.stdout.splitlines()
  assert header.startswith(f"{jax.local_device_count()} x")
  assert "pmap" in titles
  assert len(rows) == train_pmap.STEPS
