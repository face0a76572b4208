"""Training steps through `jax.export`: for CUDA, a CPU, both at once."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

import nsa_jax
from tests import helpers


@pytest.fixture(autouse=True)
def h200() -> Iterator[None]:
  """What programs for CUDA are lowered for, with or without a GPU here."""
  with helpers.h200():
    yield


def _round_trip(step: Any, args: Any, *platforms: str) -> Any:
  exported = export.export(
    step,
    platforms=platforms,
    disabled_checks=nsa_jax.EXPORT_DISABLED_CHECKS,
  )(*args)
  return export.deserialize(exported.serialize())


PLATFORMS = (("cuda",), ("cpu",), ("cpu", "cuda"))


@pytest.mark.parametrize(
  "implementation, every",
  [
    (None, PLATFORMS),
    ("triton", PLATFORMS[2:]),  # lowers the kernels for both
    pytest.param("triton", PLATFORMS[:2], marks=pytest.mark.slow),
  ],
)
def test_training_step(implementation: Any, every: Any) -> None:
  step, args = helpers.training_step(implementation)
  for platforms in every:
    program = _round_trip(step, args, *platforms)
    assert program.platforms == platforms
    text = program.mlir_module()
    assert ("xla.gpu.triton" in text) == ("cuda" in platforms)
    if "cpu" in platforms and implementation is None:
      with jax.default_device(jax.devices("cpu")[0]):
        helpers.assert_close(
          jax.jit(program.call)(*args), step(*args), "float32"
        )


def test_pairs_are_serialized() -> None:
  pair = nsa_jax.KV(jnp.ones(2), jnp.zeros(3))
  program = _round_trip(jax.jit(lambda kv: kv), (pair,), "cpu")
  assert isinstance(
    jax.tree.unflatten(program.in_tree, range(2))[0][0], nsa_jax.KV
  )


def test_without_the_checks_disabled() -> None:
  step, args = helpers.training_step(None)
  with pytest.raises(ValueError, match=r"custom call.*(.|\n)*triton"):
    export.export(step, platforms=("cuda",))(*args)
