"""The share of full attention that each block holds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from tests import helpers
from tests.helpers import Dims
from tests.oracle import Oracle

# Only l' is read.
CONFIG = NSAConfig(6, 3, 12, 3, 1, 1, 7)
TOKENS = NSAConfig(1, 1, 12)


@functools.cache
def _jitted(implementation: Any, scale: float | None) -> Callable[..., Any]:
  """A jitted f(query, key, integers)."""
  return jax.jit(
    lambda query, key, integers: nsa_jax.block_mass(
      query,
      key,
      **integers,
      config=CONFIG,
      scale=scale,
      implementation=implementation,
    )
  )


def _arrays(dims: Dims, dtype: str = "float32") -> tuple[Any, Any]:
  """A query and a key whose mass is uneven."""
  inputs = helpers.make_inputs(dims, dtype)
  return inputs["query"], (3 * inputs["selected"].key).astype(dtype)


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "mode, sizes, scale",
  [
    ("plain", {"queries": 29, "keys": 53, "kv_heads": 2, "group": 3}, None),
    ("offsets", {"queries": 29, "keys": 53, "kv_heads": 1, "group": 4}, 0.3),
    ("packed", {"queries": 65, "keys": 65, "kv_heads": 2, "group": 1}, None),
    ("one token", {"queries": 1, "keys": 1, "kv_heads": 2, "group": 2}, None),
  ],
)
def test_it_is_the_mass_of_dense_attention(
  implementation: str, mode: str, sizes: Any, scale: float | None
) -> None:
  dims = Dims(CONFIG, **sizes)
  query, key = _arrays(dims)
  offset, segments, integers = None, None, {}
  if mode == "offsets":  # the first and the last queries read nothing
    offset = helpers.int32([-2, 30])
    integers["query_offset"] = offset
  if mode == "packed":
    segments = helpers.packed_segments(dims)
    integers["segment_ids"] = segments
  oracle = Oracle(TOKENS, dims.keys, dims.queries, dims.batch, offset, segments)
  mass = _jitted(implementation, scale)(query, key, integers)
  want = oracle.block_scores(query, key, dims.kv_heads, scale or 0.25)
  helpers.assert_close(mass, want / dims.group, "float32")
  assert mass.dtype == jnp.float32
  reads = [
    [oracle.query_segment(b, i) > 0 for i in range(dims.queries)]
    for b in range(dims.batch)
  ]
  total = np.broadcast_to(np.array(reads)[..., None], mass.shape[:3])
  np.testing.assert_allclose(mass.sum(-1), total, atol=1e-5)


def test_half_precision_sums_to_one() -> None:
  """Scores and mass are in float32; only the inputs are rounded."""
  dims = Dims(CONFIG, queries=40, keys=40)
  query, key = _arrays(dims, "bfloat16")
  mass = _jitted("xla", None)(query, key, {})
  oracle = Oracle(TOKENS, 40, 40, 2)
  want = oracle.block_scores(query, key, dims.kv_heads, 0.25) / dims.group
  helpers.assert_close(mass, want, "float32")


def test_the_lse_of_the_kernels() -> None:
  """On a GPU the default takes the lse from them; here they are interpreted."""
  config = NSAConfig(16, 16, 16)
  dims = Dims(config, queries=65, keys=65, head_dim=16)
  query, key = _arrays(dims)
  segments = helpers.packed_segments(dims)

  def run(implementation: Any) -> Any:
    return jax.jit(
      lambda query, key: nsa_jax.block_mass(
        query,
        key,
        segment_ids=segments,
        config=config,
        implementation=implementation,
      )
    )(query, key)

  helpers.assert_close(run(("triton", "xla")), run("xla"), "float32")
  with pytest.raises(NotImplementedError, match="has no `block_scores`"):
    run("triton")


def test_a_poisoned_padding_changes_nothing() -> None:
  dims = Dims(CONFIG, queries=65, keys=65)
  segments = helpers.packed_segments(dims)
  arrays = _arrays(dims)
  run = _jitted("xla", None)
  clean = run(*arrays, {"segment_ids": segments})
  poisoned = helpers.poison(arrays, segments == 0)
  helpers.assert_same_bits(run(*poisoned, {"segment_ids": segments}), clean)


def test_the_gradient_is_that_of_dense_attention(x64: None) -> None:
  """In float64, through an explicit softmax."""
  dims = Dims(CONFIG, queries=25, keys=37)
  query, key = _arrays(dims, "float64")
  blocks = nsa_jax.num_selection_blocks(37, CONFIG)
  rng = np.random.default_rng(2)
  weights = rng.standard_normal((2, 25, 2, blocks))

  def dense(query: Any, key: Any) -> Any:
    grouped = query.reshape(2, 25, 2, 2, 16)
    scores = jnp.einsum("btkgh,bskh->btkgs", grouped, key) / 4
    causal = np.arange(37) <= np.arange(12, 37)[:, None]
    p = jax.nn.softmax(
      jnp.where(causal[:, None, None], scores, -jnp.inf), axis=-1
    )
    p = jnp.pad(p, [(0, 0)] * 4 + [(0, blocks * 12 - 37)])
    return p.reshape(*p.shape[:-1], blocks, 12).sum(-1).mean(3)

  def op(query: Any, key: Any) -> Any:
    return nsa_jax.block_mass(query, key, config=CONFIG)

  actual, want = (
    jax.jit(
      jax.value_and_grad(
        lambda *args, f=f: (weights * f(*args)).sum(), argnums=(0, 1)
      )
    )(query, key)
    for f in (op, dense)
  )
  helpers.assert_close(actual, want, "float64", gradient=1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_beside_the_result_is_linear(backward: bool) -> None:
  """Blocks of 512 tokens keep the result itself, T M, small."""

  def run(query: Any, key: Any) -> Any:
    config = NSAConfig(selection_block=512)
    function = functools.partial(nsa_jax.block_mass, config=config)
    if not backward:
      return function(query, key)
    mass, pullback = jax.vjp(function, query, key)
    return pullback(mass)

  def temporaries(length: int) -> int:
    shapes = (
      jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32),
      jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32),
    )
    memory: Any = jax.jit(run).lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes

  once, twice = temporaries(8192), temporaries(16384)
  assert twice <= 2.2 * once
  assert twice < 16384**2  # bytes; the scores of one head have four times these
