"""Block selection by the Triton kernels, against the oracle.

Where the scores leave a margin ids are equal; elsewhere the scores of the
chosen blocks are (`Oracle.assert_ids`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.triton.tiling import SelectionTiling, Tile
from tests import helpers
from tests.helpers import Dims
from tests.oracle import Oracle

BASE = NSAConfig(8, 4, 16, 3, 1, 1)
# Every loop of both kernels takes several steps at test sizes.
SMALL = SelectionTiling(16, Tile(16, 1, 1), 4, 4, 1)


def _lse(oracle: Oracle, query: Any, key: Any) -> Any:
  """The lse of the compressed branch."""

  def rows(b: int, i: int, k: int) -> list[int]:
    return oracle.compressed_rows(b, i)

  scale = query.shape[-1] ** -0.5
  return helpers.float32(oracle.attend(query, key, key, rows, scale)[1])


def _select(
  implementation: Any,
  config: NSAConfig,
  key_length: int,
  tiles: Any = None,
) -> Any:
  """A jitted function f(query, key, lse, integers) -> ids."""

  @jax.jit
  def run(query, key, lse, integers):
    return nsa_jax.select_blocks(
      query,
      key,
      lse,
      **integers,
      config=config,
      key_length=key_length,
      tiles=tiles,
      implementation=implementation,
    )

  return run


def _check(
  dims: Dims,
  dtype: str,
  integers: Any = None,
  tiles: Any = SMALL,
  implementation: Any = "triton",
) -> Any:
  """Ids of the kernels against the oracle, and exactly where it is clear."""
  integers = integers or {}
  config, keys = dims.config, dims.keys
  inputs = helpers.make_inputs(dims, dtype)
  query, key = inputs["query"], inputs["compressed"].key
  oracle = Oracle(
    config,
    keys,
    dims.queries,
    dims.batch,
    offset=integers.get("query_offset"),
    segment_ids=integers.get("segment_ids"),
    query_segment_ids=integers.get("query_segment_ids"),
  )
  lse = _lse(oracle, query, key)
  run = _select(implementation, config, keys, tiles)
  ids = run(query, key, lse, integers)
  scores = oracle.scores(inputs)
  oracle.assert_ids(ids, scores)
  expected = oracle.select(scores)
  if oracle.margin(scores) > 1e-4:
    np.testing.assert_array_equal(ids, expected)
  different = np.mean(np.asarray(ids) != expected)
  assert different < 0.01, "near ties are rare"
  return inputs, lse, ids


CASES: dict[str, tuple[Dims, str]] = {
  "overlap": (Dims(BASE, 2, 70, 70, 1, 3), "float32"),
  "no initial": (Dims(NSAConfig(8, 4, 16, 2, 0, 1), 1, 70, 70), "bfloat16"),
  "three initial": (Dims(NSAConfig(8, 4, 16, 5, 3, 1), 1, 90, 90), "float16"),
  "one ratio": (Dims(NSAConfig(16, 16, 16, 3, 1, 1), 1, 90, 90), "float32"),
  "longer": (Dims(NSAConfig(16, 4, 16, 3, 1, 1), 1, 70, 70), "float32"),
  "odd reach": (Dims(NSAConfig(12, 4, 16, 4, 1, 2), 1, 91, 91), "bfloat16"),
  "stride 1": (Dims(NSAConfig(8, 1, 16, 3, 0, 2), 1, 81, 81), "float32"),
  "large group": (
    Dims(BASE, 1, 70, 70, kv_heads=1, group=12, head_dim=48),
    "float32",
  ),
  "all forced": (Dims(NSAConfig(8, 4, 16, 3, 2, 1), 1, 70, 70), "float32"),
  "few blocks": (Dims(NSAConfig(8, 4, 16, 8, 1, 2), 1, 70, 70), "float32"),
  "no compressed block": (Dims(BASE, 1, 5, 5), "float32"),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name: str) -> None:
  _check(*CASES[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_tiles(dtype: str) -> None:
  _check(Dims(BASE, 1, 70, 70), dtype, tiles=None)


@pytest.mark.parametrize("initial", [0, 1])
def test_offsets(initial: int) -> None:
  """T < S; queries before the first and after the last token."""
  config = NSAConfig(8, 4, 16, 3, initial, 1)
  offset = helpers.int32([-3, 80])
  _check(Dims(config, 2, 21, 91), "float32", {"query_offset": offset})


@pytest.mark.parametrize("initial", [0, 1])
def test_segments(initial: int) -> None:
  config = NSAConfig(8, 4, 16, 3, initial, 1)
  dims = Dims(config, 2, 160, 160, kv_heads=1)
  segments = np.zeros((2, 160), np.int32)
  segments[0, :70], segments[0, 80:155] = 5, 2
  segments[1, 32:150] = 3
  inputs, lse, ids = _check(dims, "float32", {"segment_ids": segments})
  assert (np.asarray(ids)[segments == 0] == -1).all()

  # Nothing in the padding is felt, nor what later tokens and the other segment
  # hold; given to the kernels themselves, before anything cleans it up.
  tokens = jnp.asarray(segments)
  spec = Spec(config, 0.25, 160, tiles=SMALL)

  @jax.jit
  def run(*arrays):
    index = None, Queries(0, tokens, tokens)
    return helpers.run_kernel("select_blocks", spec, arrays, index)

  query, key = inputs["query"], inputs["compressed"].key
  whole = segments[:, 4 * np.arange(dims.num_compressed)[:, None] + range(8)]
  hidden = (whole != whole[..., :1]).any(-1) | (whole[..., 0] == 0)
  poisoned = run(
    helpers.poison(query, segments == 0),
    helpers.poison(key, hidden),
    helpers.poison(lse, segments == 0),
  )
  np.testing.assert_array_equal(poisoned, ids)
  other = np.arange(dims.num_compressed) * 4 + 8 > 120
  later = np.array(run(query, helpers.poison(key, other[None] | hidden), lse))
  np.testing.assert_array_equal(later[:, :120], np.asarray(ids)[:, :120])


def test_queries_of_other_segments() -> None:
  """Blocks between a query and the segment it reads are candidates of score 0.

  So are those in which a misaligned segment begins, as far as others go.
  """
  config = NSAConfig(8, 4, 16, 3, 0, 1)
  dims = Dims(config, 1, 112, 112, kv_heads=1)
  segments = np.full((1, 112), 2, np.int32)
  segments[:, :58] = 1
  own = segments.copy()
  own[:, 80:96] = 1  # reads the first document from the second
  own[:, 20] = 9  # a document that the keys do not have
  own[:, 21] = 0
  integers = {"segment_ids": segments, "query_segment_ids": own}
  # Traced segments need not be aligned.
  _check(dims, "float32", integers)


def test_ties_go_to_the_lower_index() -> None:
  """With equal keys all blocks but the first, which has 7 of 8 shares, tie."""
  config = NSAConfig(8, 4, 16, 5, 0, 2)
  query = np.ones((1, 160, 2, 16), np.float32)
  key = np.ones((1, 39, 1, 16), np.float32)
  lse = _lse(Oracle(config, 160, 160, 1), query, key)
  run = _select("triton", config, 160, SMALL)
  ids = np.asarray(run(query, key, lse, {}))[0, :, 0]
  for t in range(96, 160):
    own = t // 16
    assert ids[t].tolist() == [1, 2, 3, own - 1, own], t


def test_chunks_change_nothing() -> None:
  dims = Dims(BASE, 2, 70, 70)
  *_, whole = _check(dims, "float32")
  tiles = dataclasses.replace(SMALL, scratch=2**14)
  *_, chunked = _check(dims, "float32", tiles=tiles)
  np.testing.assert_array_equal(chunked, whole)


def test_rows_of_many_blocks() -> None:
  """The groups of the top-n kernel at a length that fills them."""
  config = NSAConfig(16, 16, 16, 16, 1, 2)
  rng = np.random.default_rng(0)
  query: Any = rng.standard_normal((1, 3, 2, 16))
  key: Any = rng.standard_normal((1, 2100, 1, 16))
  query, key = query.astype(np.float32), key.astype(np.float32)
  oracle = Oracle(config, 33600, 3, 1)
  lse = _lse(oracle, query, key)
  ids = _select("triton", config, 33600)(query, key, lse, {})
  scores = oracle.block_scores(query, key, 1, 0.25)
  assert oracle.margin(scores) > 1e-5
  np.testing.assert_array_equal(ids, oracle.select(scores))


def test_vmap() -> None:
  inputs = helpers.make_inputs(Dims(BASE, 2, 60, 60), "float32")
  query, key = inputs["query"], inputs["compressed"].key
  lse = _lse(Oracle(BASE, 60, 60, 2), query, key)
  run = _select("triton", BASE, 60)
  one_by_one = jax.vmap(lambda *x: run(*x, {}))(
    query[:, None], key[:, None], lse[:, None]
  )
  np.testing.assert_array_equal(one_by_one[:, 0], run(query, key, lse, {}))


def test_memory_is_linear() -> None:
  """Twice the length does not take twice the memory once chunks are full."""
  config = NSAConfig()

  def temporary(length: int) -> int:
    sizes = ((1, length, 4, 16), (1, length // 16 - 1, 1, 16), (1, length, 4))
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes]
    lowered = _select("triton", config, length).lower(*args, {})
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes

  small, large = temporary(2**16), temporary(2**17)
  assert large < 2.5 * small


# ------------------------------------------------------------------- lowering


def _lower(
  *,
  config: NSAConfig,
  group: int,
  head_dim: int,
  dtype: Any,
  length: int = 5000,
  queries: int | None = None,
  packed: bool = False,
  kv_heads: int = 2,
) -> str:
  """Block selection lowered for an H200."""
  queries = queries or length
  blocks = nsa_jax.num_compressed_blocks(length, config)
  args = [
    jax.ShapeDtypeStruct((1, queries, kv_heads * group, head_dim), dtype),
    jax.ShapeDtypeStruct((1, blocks, kv_heads, head_dim), dtype),
    jax.ShapeDtypeStruct((1, queries, kv_heads * group), jnp.float32),
  ]
  integers = {}
  if packed:
    integers["segment_ids"] = jax.ShapeDtypeStruct((1, length), jnp.int32)
  with helpers.h200():
    traced = _select("triton", config, length).trace(*args, integers)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


LOWERED: dict[str, Any] = {
  "config": (
    *helpers.SELECTIONS,
    NSAConfig(128, 1, 128, 5, 3, 1),
    NSAConfig(32, 32, 128, 4, 0, 3),
  ),
  "group": (1, 3, 4, 12, 16, 64),
  "head_dim": (16, 32, 64, 96, 128, 192, 256),
  "dtype": (jnp.float16, jnp.bfloat16, jnp.float32),
  "length": (5000, 16384),
  "queries": (1, 7, None),
  "packed": (False, True),
}


@pytest.mark.parametrize(
  "sizes",
  [
    {"length": 65536, "kv_heads": 4},
    {"length": 5001, "queries": 77, "packed": True},
  ],
  ids=str,
)
def test_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  text = _lower(
    config=NSAConfig(), group=16, head_dim=128, dtype=jnp.bfloat16, **sizes
  )
  assert "nsa_block_scores" in text
  assert "nsa_top_n" in text


@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_every_tiling_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert "nsa_top_n" in _lower(**sizes)


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_matches_oracle(name: str) -> None:
  _check(*CASES[name], tiles=None)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group", [4, 16])
def test_gpu_matches_xla_at_length(group: int, packed: bool) -> None:
  check_at_length("triton", group, packed)


def check_at_length(implementation: Any, group: int, packed: bool) -> None:
  """The ids differ only where scores do by less than rounding explains."""
  config, length = NSAConfig(), 8192
  keys = jax.random.split(jax.random.key(0), 2)
  blocks = nsa_jax.num_compressed_blocks(length, config)
  query = jax.random.normal(keys[0], (1, length, 2 * group, 128), jnp.bfloat16)
  key = jax.random.normal(keys[1], (1, blocks, 2, 128), jnp.bfloat16)
  integers = {}
  if packed:
    segments = jnp.repeat(jnp.array([2, 0, 1, 3]), length // 4)
    integers["segment_ids"] = segments[None].astype(jnp.int32)
  wide = query.astype(jnp.float32), key.astype(jnp.float32)
  call: dict[str, Any] = {
    **integers,
    "config": config,
    "key_length": length,
    "implementation": "xla",
  }
  lse = nsa_jax.compressed_attention(*wide, wide[1], **call)[1]
  scores = nsa_jax.block_scores(*wide, lse, **call)
  run = _select(implementation, config, length)
  got = run(query, key, lse, integers)
  again = run(query, key, lse, integers)
  np.testing.assert_array_equal(got, again)
  expected = nsa_jax.select_blocks(*wide, lse, **call)

  def chosen(ids):
    x = jnp.take_along_axis(scores, jnp.maximum(ids, 0), axis=-1)
    return jnp.where(ids < 0, 0, x)

  # Forced blocks are in both; the others are the largest in both.
  np.testing.assert_array_equal(got < 0, expected < 0)
  got, expected = (jnp.sort(chosen(x), axis=-1) for x in (got, expected))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
