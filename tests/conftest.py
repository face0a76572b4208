"""Settings of every test: XLA flags, float64 on request, hypothesis."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import pytest

# Several processes share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# derandomize: a run of the fast tier says the same thing twice.
hypothesis.settings.register_profile(
  "fast",
  derandomize=True,
  deadline=None,
  max_examples=20,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
  "slow", hypothesis.settings.get_profile("fast"), max_examples=300
)

DEVICES = {"xla_force_host_platform_device_count": 8}
# Most of the fast tier's time is compilation. Without optimisation programs for
# a CPU compile in an eighth of the time (in half of it from jax 0.11 on, where
# the last flag is gone); the tiers `slow` and `gpu` compile as users do.
QUICK: dict[str, Any] = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  # One test a core: a program need not be split over several.
  "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):
  QUICK["xla_cpu_use_fusion_emitters"] = False


def pytest_configure(config: pytest.Config) -> None:
  tiers = config.getoption("markexpr")
  slow = "slow" in tiers and "not slow" not in tiers
  hypothesis.settings.load_profile("slow" if slow else "fast")
  fast = not slow and "not gpu" in tiers
  # Read once, when jax creates its CPU client; a user's own choice stands.
  flags = os.environ.get("XLA_FLAGS", "").split()
  for name, value in (DEVICES | (QUICK if fast else {})).items():
    if not any(flag.startswith(f"--{name}=") for flag in flags):
      flags.append(f"--{name}={str(value).lower()}")
  os.environ["XLA_FLAGS"] = " ".join(flags)
  if fast:
    jax.config.update("jax_traceback_in_locations_limit", 0)
  # Traces keep many small objects alive; the collector spent a tenth of the
  # time scanning them.
  gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Leaves out what this jax cannot run; `.ci/run` has the newest as well."""
  if jax.__version_info__ >= (0, 11):
    return
  left_out = [x for x in items if x.get_closest_marker("jax_0_11")]
  items[:] = [x for x in items if not x.get_closest_marker("jax_0_11")]
  config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
  # Asked for by name: a skip would look like success.
  if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
    pytest.fail("needs a GPU", pytrace=False)
  if item.get_closest_marker("parity"):
    for package in ("torch", "transformers"):
      if importlib.util.find_spec(package) is None:
        pytest.fail(f"needs {package}", pytrace=False)


@pytest.fixture
def x64() -> Iterator[None]:
  """64-bit types inside the test, whatever the process's default is."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def script_environment(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """For scripts in processes of their own: what they compile, they share."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # that of all workers of this run
  return os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  }


@pytest.fixture
def no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
  """In kernels of Mosaic GPU, whose interpreter prints what it finds."""
  yield
  out, _ = capfd.readouterr()
  assert "RACE DETECTED" not in out, out
