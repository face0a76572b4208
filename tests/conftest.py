"""Settings of every test: eight CPU devices, float64 on request, hypothesis."""

import os

# Read once, when jax creates its CPU client; a user's own choice stands. The
# flag has no effect on accelerators.
_DEVICE_COUNT = "--xla_force_host_platform_device_count"
if _DEVICE_COUNT not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {_DEVICE_COUNT}=8".strip()
  )

# Several processes share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import pytest

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


def pytest_configure(config: pytest.Config) -> None:
  selected = config.getoption("markexpr")
  slow = "slow" in selected and "not slow" not in selected
  hypothesis.settings.load_profile("slow" if slow else "fast")


def pytest_runtest_setup(item: pytest.Item) -> None:
  # Asked for by name: a skip would look like success.
  if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
    pytest.fail("needs a GPU", pytrace=False)


@pytest.fixture
def x64() -> Iterator[None]:
  """64-bit types inside the test, whatever the process's default is."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def script_environment(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """For scripts in processes of their own: what they compile, they share.

  Programs compile in a half or a third of the time, as in `fast_compilation`.
  """
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # that of all workers of this run
  return os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "jax_cache"),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  }


@pytest.fixture
def fast_compilation() -> Iterator[None]:
  """Programs compile in a half or a third of the time."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)
