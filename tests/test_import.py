"""What imports what, and what `import nsa_jax` must not do."""

import ast
import pathlib
import subprocess
import sys

import pytest

import nsa_jax

ROOT = pathlib.Path(__file__).parents[1]

SCRIPT = """
import sys
import nsa_jax
from jax._src import xla_bridge
assert xla_bridge._backends == {}, xla_bridge._backends
for name in (
  "pallas_kernels.triton",
  "pallas_kernels.mosaic_gpu",
  "jax.experimental.pallas",
  "flax.nnx",
):
  assert name not in sys.modules, name
assert nsa_jax.nnx is sys.modules["nsa_jax.nnx"]
for implementation in (None, "triton", ("mosaic_gpu", "xla")):
  config = nsa_jax.TransformerConfig.preset(
    "tiny", implementation=implementation
  )
  nsa_jax.TransformerLM(config)
  nsa_jax.NativeSparseAttention(num_heads=4, implementation=implementation)
assert xla_bridge._backends == {}, xla_bridge._backends
"""


def test_import_creates_no_backend_and_imports_no_pallas() -> None:
  """Nor do configurations: jax.distributed may be initialised after them."""
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_other_names_are_missing() -> None:
  """Though some modules are imported on demand."""
  with pytest.raises(AttributeError, match="'nsa_jax' has no attribute 'mlx'"):
    nsa_jax.mlx  # noqa: B018


def _imports(path: pathlib.Path) -> set[str]:
  """Top-level names of the packages that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add((node.module or "").split(".")[0])
  return names


def test_only_the_modules_of_flax_import_flax() -> None:
  """So that layers of nnx can share everything else."""
  users = {
    path.relative_to(ROOT).as_posix()
    for package in ("nsa_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if "flax" in _imports(path)
  }
  assert users == {
    "nsa_jax/layers/linen.py",
    "nsa_jax/layers/nnx.py",
    "nsa_jax/models/linen.py",
    "nsa_jax/models/nnx.py",
    "nsa_jax/sampling.py",
  }


def test_packing_needs_no_jax_of_its_own() -> None:
  """It runs in processes that read data."""
  own = sys.stdlib_module_names | {"numpy", "nsa_jax"}
  assert _imports(ROOT / "nsa_jax/packing.py") <= own


def test_the_kernels_import_jax_alone() -> None:
  for path in (ROOT / "pallas_kernels").rglob("*.py"):
    own = sys.stdlib_module_names | {"jax", "pallas_kernels"}
    assert _imports(path) <= own, path


def test_the_oracle_imports_numpy_alone() -> None:
  own = sys.stdlib_module_names | {"numpy"}
  assert _imports(ROOT / "tests/oracle.py") <= own
