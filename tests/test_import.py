"""What `import nsa_jax` must not do, in a fresh process."""

import pathlib
import subprocess
import sys

SCRIPT = """
import sys
import nsa_jax
from jax._src import xla_bridge
assert xla_bridge._backends == {}, xla_bridge._backends
for name in ("pallas_kernels.triton", "jax.experimental.pallas"):
  assert name not in sys.modules, name
"""


def test_import_creates_no_backend_and_imports_no_pallas() -> None:
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
