"""Random configurations of the Mosaic GPU kernels against the oracle."""

import random
from typing import Any

import jax
import numpy as np
import pytest

from nsa_jax import NSAConfig
from tests import helpers

pytestmark = [pytest.mark.jax_0_11, pytest.mark.gpu]
NAMES = ("mosaic_gpu", "triton")


def _configuration(seed: int) -> tuple[helpers.Dims, str, dict[str, Any]]:
  """Sizes, dtype, and what says which keys the queries read."""
  pick = random.Random(seed)
  config = NSAConfig(
    32,
    pick.choice((8, 16, 32)),
    pick.choice((64, 64, 128)),
    num_selected=pick.randint(3, 12),
    window=pick.choice((1, 63, 100, 512, 3000)),
  )
  keys = pick.randint(1, 1200)
  queries = keys if keys < 300 else pick.randint(1, 300)
  dims = helpers.Dims(
    config,
    batch=pick.randint(1, 2),
    queries=queries,
    keys=keys,
    kv_heads=pick.randint(1, 2),
    group=pick.choice((8, 16, 16, 24, 32, 40, 64)),
    head_dim=pick.choice((64, 128, 128, 192, 256)),
    value_dim=pick.choice((64, 128, 128, 192, 256)),
  )
  rng = np.random.default_rng(seed)
  blocks = -(-keys // config.selection_block)
  count = min(blocks, config.num_selected)
  shape = dims.batch, queries, dims.kv_heads
  ids = rng.random((*shape, blocks)).argsort(-1)[..., :count]
  # Padding at the end; no query is without blocks but by its position.
  kept = rng.integers(1, count + 1, (*shape, 1))
  ids = np.sort(np.where(np.arange(count) < kept, ids, blocks))
  integers: dict[str, Any] = {
    "block_ids": np.where(ids < blocks, ids, -1).astype(np.int32)
  }
  kind = pick.choice(("last", "rows", "packed"))
  if kind == "rows":
    offset = rng.integers(-5, keys + 5, dims.batch)
  else:
    offset = np.full(dims.batch, keys - queries)
  integers["query_offset"] = offset.astype(np.int32)
  if kind == "packed":
    integers["segment_ids"] = helpers.packed_segments(dims)
  return dims, pick.choice(("bfloat16", "bfloat16", "float16")), integers


def _errors(actual: Any, expected: Any) -> np.ndarray:
  """Norms of the differences of out and of each gradient."""
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  return np.array(
    [
      np.linalg.norm(helpers.float32(got) - helpers.float32(want))
      for got, want in pairs
    ]
  )


@pytest.mark.parametrize("seed", range(200))
def test_matches_the_oracle(seed: int) -> None:
  dims, dtype, integers = _configuration(seed)
  inputs = helpers.make_inputs(dims, dtype, seed)
  dout = helpers.make_cotangent(dims, dtype)

  def run(implementation: Any, inputs: Any, dout: Any) -> Any:
    vjp = helpers.native_vjp(implementation, dims.config)
    out, _, grads = vjp(inputs, integers, dout)
    return out, grads

  actual = run(NAMES, inputs, dout)
  with helpers.on_cpu():
    wide = jax.tree.map(helpers.float32, (inputs, dout))
    expected = run("reference", *wide)
    rounded = run("xla", inputs, dout)
  helpers.assert_close(actual[0], expected[0], dtype)
  # A few units in the last place of what is not a difference of larger terms.
  # Gradients of queries that read one key are nothing but such a difference:
  # there the error of `xla` in this dtype says what rounding does.
  most = 2**-7 if dtype == "bfloat16" else 2**-10
  size = _errors(expected, jax.tree.map(np.zeros_like, expected))
  allowed = np.maximum(most * size, 2 * _errors(rounded, expected))
  assert (_errors(actual, expected) <= allowed).all()
