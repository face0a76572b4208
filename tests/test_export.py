"""Programs through `jax.export`: platforms, and symbolic batch sizes."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import nsa_jax
from nsa_jax import NSAConfig
from tests import helpers
from tests.helpers import Dims


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


# ------------------------------------------------------------ symbolic batches


def _symbolic(tree: Any) -> Any:
  """Shapes of the arrays, with a batch of any size."""
  (batch,) = export.symbolic_shape("b")
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), tree
  )


def _repeated(tree: Any, batch: int) -> Any:
  return jax.tree.map(lambda x: np.repeat(x, batch, axis=0), tree)


@pytest.mark.parametrize(
  "implementation, platforms",
  [
    (None, ("cpu", "cuda")),
    pytest.param(None, ("cuda",), marks=pytest.mark.slow),
    pytest.param("xla", ("cpu",), marks=pytest.mark.slow),
    pytest.param("reference", ("cpu",), marks=pytest.mark.slow),
  ],
)
def test_symbolic_batch(implementation: Any, platforms: Any) -> None:
  """The kernels take static sizes, so None is "xla" on every platform."""
  config = NSAConfig(8, 4, 16, 3, 1, 1, 16)
  inputs = helpers.make_inputs(Dims(config, 1, 70, 70, 1, 2, 16, 16), "float32")

  @jax.jit
  def step(inputs: Any) -> Any:
    def loss(inputs: Any) -> Any:
      out = nsa_jax.native_sparse_attention(
        **inputs, config=config, implementation=implementation
      )
      return jnp.square(out).sum()

    return jax.value_and_grad(loss)(inputs)

  program = _round_trip(step, (_symbolic(inputs),), *platforms)
  assert "triton" not in program.mlir_module()
  if "cpu" in platforms:
    given = _repeated(inputs, 3)
    with jax.default_device(jax.devices("cpu")[0]):
      helpers.assert_close(
        jax.jit(program.call)(given), step(given), "float32", gradient=1
      )


def test_symbolic_batch_of_a_model() -> None:
  """Its training and, with a cache, its decoding."""
  config = nsa_jax.TransformerConfig.preset(
    "tiny", num_layers=1, model_dim=16, vocab_size=11, select="means"
  )
  model = nsa_jax.TransformerLM(config)
  tokens = jnp.zeros((1, 70), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)

  def step(params: Any, tokens: Any) -> Any:
    def loss(params: Any) -> Any:
      logits: Any = model.apply(params, tokens)
      return logits.mean()

    return jax.grad(loss)(params)

  decoder = model.clone(decode=True)
  cache = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["cache"]

  def decode(params: Any, cache: Any, tokens: Any) -> Any:
    variables = {**params, "cache": cache}
    return decoder.apply(variables, tokens, mutable=["cache"])

  many = _symbolic(tokens)
  assert _round_trip(jax.jit(step), (params, many), "cpu", "cuda")
  some = _symbolic((cache, tokens[:, :1]))
  assert _round_trip(jax.jit(decode), (params, *some), "cpu")


def test_symbolic_batch_of_a_cache() -> None:
  config = NSAConfig(8, 4, 16)
  held = nsa_jax.cache.init(
    1, 32, config=config, num_kv_heads=1, head_dim=16, kind="window"
  )
  new = nsa_jax.KV(*2 * (jnp.ones((1, 1, 1, 16)),))

  @jax.jit
  def append(held: Any, new: Any) -> Any:
    return nsa_jax.cache.append(held, config=config, window=new)

  program = _round_trip(append, _symbolic((held, new)), "cpu")
  given = _repeated((held, new), 3)
  with jax.default_device(jax.devices("cpu")[0]):
    helpers.assert_same_bits(program.call(*given), append(*given))


@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
def test_kernels_take_static_sizes(implementation: Any) -> None:
  x = _symbolic(jnp.ones((1, 20, 2, 16), jnp.bfloat16))

  @jax.jit
  def attend(x: Any) -> Any:
    return nsa_jax.window_attention(
      x,
      x,
      x,
      config=NSAConfig(window=8),
      return_lse=False,
      implementation=implementation,
    )

  match = rf"{implementation}.*`query` has the symbolic shape \(b, 20, 2, 16\)"
  with pytest.raises(NotImplementedError, match=match):
    _round_trip(attend, (x,), "cuda")
