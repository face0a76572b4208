"""The Triton kernels of the compressed branch and of the window.

What the ops compute is tested in suite.py; here is what is the kernels' own:
tiles, splits, offsets, lowering for CUDA.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels.bands import Band, key_tiles, query_tiles
from pallas_kernels.interface import Spec
from pallas_kernels.triton import band as bands
from pallas_kernels.triton import band_vjp, tiling
from tests import helpers
from tests.oracle import Oracle

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 19)
BRANCHES = ("compressed", "window")


def _inputs(
  branch: str,
  config: NSAConfig,
  *,
  length: int = 61,
  queries: int | None = None,
  batch: int = 1,
  kv_heads: int = 1,
  group: int = 4,
  head_dim: int = 16,
  value_dim: int = 16,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, ...]:
  """Query, key, value and the cotangents of out and lse."""
  keys = jax.random.split(jax.random.key(0), 5)
  rows = length
  if branch == "compressed":
    rows = nsa_jax.num_compressed_blocks(length, config)
  queries = length if queries is None else queries
  heads = kv_heads * group

  def normal(key: Any, *shape: int) -> Any:
    return jax.random.normal(key, (batch, *shape), jnp.float32).astype(dtype)

  return (
    normal(keys[0], queries, heads, head_dim),
    normal(keys[1], rows, kv_heads, head_dim),
    normal(keys[2], rows, kv_heads, value_dim),
    normal(keys[3], queries, heads, value_dim),
    normal(keys[4], queries, heads).astype(jnp.float32),
  )


def _tiles(
  rows: int = 16, block_k: int = 16, **kwargs: Any
) -> tiling.BandTiling:
  """Small tiles, so that short inputs have many."""
  tile = tiling.BandTile(block_k, 4, 2, rows=rows)
  dq = tiling.BandTile(16, 4, 2, rows=2 * rows)
  return tiling.BandTiling(tile, dq, tile, **kwargs)


def _pullback(
  branch: str,
  implementation: str,
  config: NSAConfig,
  *,
  length: int = 61,
  tiles: tiling.BandTiling | None = None,
  **call: Any,
) -> Any:
  """A jitted function: out, lse and gradients of one branch."""

  def op(query, key, value):
    static = {"key_length": length} if branch == "compressed" else {}
    return getattr(nsa_jax, f"{branch}_attention")(
      query,
      key,
      value,
      config=config,
      implementation=implementation,
      tiles=tiles,
      **static,
      **call,
    )

  @jax.jit
  def run(query, key, value, dout, dlse):
    (out, lse), pullback = jax.vjp(op, query, key, value)
    # An lse of -inf has no gradient, whatever its cotangent.
    dlse = jnp.where(lse == -jnp.inf, jnp.nan, dlse)
    return (out, lse), pullback((dout, dlse))

  return run


def _check(
  branch: str,
  tiles: tiling.BandTiling | None,
  config: NSAConfig = CONFIG,
  *,
  call: Any = None,
  growth: float = 4,
  **sizes: Any,
) -> None:
  inputs = _inputs(branch, config, **sizes)
  query, key, value, dout, dlse = inputs
  length, call = sizes.get("length", 61), call or {}
  oracle = Oracle(
    config,
    length,
    query.shape[1],
    query.shape[0],
    offset=call.get("query_offset"),
    segment_ids=call.get("segment_ids"),
    key_offset=call.get("key_offset", 0),
  )

  def rows(b: int, i: int, k: int) -> list[int]:
    return getattr(oracle, f"{branch}_rows")(b, i)

  scale = call.get("scale", query.shape[-1] ** -0.5)
  run = _pullback(branch, "triton", config, length=length, tiles=tiles, **call)
  actual = run(*inputs)
  out = oracle.attend(query, key, value, rows, scale)
  helpers.assert_close(actual[0], out, "float32")
  # dk and dv are sums over all queries that read the row.
  grads = oracle.attend_vjp(query, key, value, rows, scale, dout, dlse)
  helpers.assert_close(actual[1], grads, "float32", gradient=growth)


CASES: dict[str, Any] = {
  "branch": BRANCHES,
  # Groups that fill a tile of rows, that do not, and several lengths of it.
  "group": (1, 3, 5, 16),
  "rows": (16, 32),
  "block_k": (16, 32),
  "widths": ((16, 16), (48, 16), (16, 32)),
  # Offsets of the last queries, of rows, of queries outside the keys.
  "queries": ((61, 0), (13, 48), (20, (-7, 50))),
  "segments": (False, True),
  # One tile of queries in a chunk of the backward, a few, or all.
  "scratch": (1, 2**14, 2**31),
}


def _check_pair(case: dict[str, Any]) -> None:
  queries, offset = case["queries"]
  call: dict[str, Any] = {"query_offset": helpers.int32(offset)}
  if case["segments"]:
    segments = np.repeat(helpers.int32([[3, 0, 7, 7], [0, 5, 5, 0]]), 16, 1)
    call["segment_ids"] = segments[:, :61]
  _check(
    case["branch"],
    _tiles(case["rows"], case["block_k"], scratch=case["scratch"]),
    call=call,
    batch=2,
    queries=queries,
    group=case["group"],
    head_dim=case["widths"][0],
    value_dim=case["widths"][1],
  )


@pytest.mark.parametrize("case", helpers.pairwise(CASES)[::3], ids=str)
def test_matches_oracle(case: dict[str, Any]) -> None:
  _check_pair(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", helpers.pairwise(CASES), ids=str)
def test_matches_oracle_more(case: dict[str, Any]) -> None:
  _check_pair(case)


@pytest.mark.parametrize("key_offset", [-6, [5, -6]], ids=str)
def test_halo_of_the_window(key_offset: Any) -> None:
  """Keys that do not start at position 0; rows before it are no tokens."""
  call = {
    "key_offset": helpers.int32(key_offset),
    "query_offset": helpers.int32([np.max(key_offset) + 2, 20]),
  }
  _check("window", _tiles(), call=call, batch=2, queries=24)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("programs", [1, 99])
def test_queries_split_over_programs(branch: str, programs: int) -> None:
  tiles = _tiles(programs=programs)
  _check(branch, tiles, batch=2, kv_heads=2, group=2, length=139)


def _reads(band: Band, block_q: int, length: int, block_k: int) -> Any:
  """[offset, first row, tile of queries, tile of keys]: the place of a pair.

  The number of the keys' tile, counted from the first that the queries read,
  for the pairs that the dk, dv kernel visits, and for those that dq reads; -1
  for others.
  """
  shape = (length + 90, 9, -(-length // block_q), -(-band.length // block_k))
  offset, first_row, i, j = (jnp.asarray(x) for x in np.indices(shape))
  offset -= 50
  begin, end = query_tiles(
    band, offset, first_row, j * block_k, block_k, length, block_q
  )
  keys = key_tiles(
    band,
    offset,
    first_row,
    i * block_q,
    jnp.minimum((i + 1) * block_q, length),
    block_k,
  )
  written = np.where((begin <= i) & (i < end), j - keys.begin, -1)
  read = np.where((keys.begin <= j) & (j < keys.end), j - keys.begin, -1)
  return np.where((begin <= i) & (i < end) & (written < 0), 99, written), read


@pytest.mark.parametrize("window", [None, 1, 5, 19, 40])
@pytest.mark.parametrize("block_q", [1, 3, 8])
def test_the_scratch_of_a_tile_holds_all_that_is_read(
  window: int | None, block_q: int
) -> None:
  """What dq reads has been written, and nothing is written out of bounds."""
  length = 23
  stride, span = (4, 8) if window is None else (1, 1)
  band = Band(stride, span, window, 37)
  tile = tiling.BandTile(4, 4, 2, rows=block_q)
  tiles = tiling.BandTiling(tile, tile, tile)
  schedule = band_vjp.make_schedule(
    Spec(None, 1.0, 37, tiles=tiles),
    band,
    bands.QuerySizes(length, 1, 1),
    batch=1,
    num_keys=37 if window else 8,
    dtype=jnp.float32,
  )
  written, read = _reads(band, block_q, length, 4)
  assert (read >= 0).any()
  assert (written[read >= 0] == read[read >= 0]).all()
  assert written.max() < schedule.slots


@pytest.mark.parametrize("keys, rows", [(32, 16), (16, 8), (16, 24)])
def test_tiles_of_dq_fit_those_of_dk_and_dv(keys: int, rows: int) -> None:
  tile = tiling.BandTile(16, 4, 2, rows=16)
  dq = tiling.BandTile(keys, 4, 2, rows=rows)
  with pytest.raises(ValueError, match=r"`dq`=.* must have a `block_k` that"):
    tiling.BandTiling(tile, dq, tile)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_finite_scale(scale: float) -> None:
  _check("window", None, call={"scale": scale})


def test_group_of_64_and_one_query() -> None:
  _check("compressed", None, group=64, queries=1, length=30)


@pytest.mark.parametrize("branch", BRANCHES)
def test_poisoned_padding(branch: str) -> None:
  """NaN in segment 0, after the last query, and in rows outside the keys."""
  config = NSAConfig(8, 4, 16, 3, 1, 1, 19)
  inputs = _inputs(branch, config, queries=40, group=3)
  segments = np.repeat(helpers.int32([[0, 4, 9, 9]]), 16, 1)[:, :61]
  call = {"segment_ids": segments, "query_offset": helpers.int32(10)}
  run = _pullback(branch, "triton", config, tiles=_tiles(), **call)
  clean = run(*inputs)
  rows = np.arange(inputs[1].shape[1])
  if branch == "compressed":
    bad_keys = (rows * 4 < 16) | (rows * 4 + 7 > 49)
  else:
    bad_keys = (rows < 16) | (rows > 49)
  bad_queries = np.arange(10, 50) < 16
  query, dout, dlse = helpers.poison(
    (inputs[0], inputs[3], inputs[4]), bad_queries[None]
  )
  key, value = helpers.poison(inputs[1:3], bad_keys[None])
  helpers.assert_same_bits(
    run(query, key, value, dout, dlse)[1], clean[1], "gradients"
  )
  out, lse = run(query, key, value, dout, dlse)[0]
  assert np.isfinite(np.asarray(out)).all()
  assert (np.asarray(lse)[:, bad_queries] == -np.inf).all()


@pytest.mark.parametrize("branch", BRANCHES)
def test_vmap(branch: str) -> None:
  query, key, value, *_ = _inputs(branch, CONFIG, batch=2, length=40)
  static = {"key_length": 40} if branch == "compressed" else {}
  op = functools.partial(
    getattr(nsa_jax, f"{branch}_attention"),
    config=CONFIG,
    implementation="triton",
    **static,
  )
  whole = jax.jit(op)(query, key, value)
  one_by_one = jax.jit(jax.vmap(op))(*(x[:, None] for x in (query, key, value)))
  helpers.assert_close([x[:, 0] for x in one_by_one], whole, "float32")


# ------------------------------------------------------------------- lowering

LOWERED: dict[str, Any] = {
  "branch": BRANCHES,
  "group": (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64),
  "head_dim": (16, 32, 64, 96, 128, 192, 256),
  "value_dim": (16, 32, 64, 96, 128, 192, 256),
  "dtype": (jnp.float16, jnp.bfloat16, jnp.float32),
}


def _lower(branch: str, **sizes: Any) -> str:
  """One branch, forward and backward, lowered for an H200."""
  config = NSAConfig(32, 16, 64, window=100)
  inputs = jax.eval_shape(
    functools.partial(_inputs, branch, config, length=333, **sizes)
  )

  run = _pullback(branch, "triton", config, length=333, scale=0.1)
  with helpers.h200():
    traced = run.trace(*inputs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("branch", BRANCHES)
def test_lowers_for_cuda(branch: str) -> None:
  text = _lower(
    branch, group=12, head_dim=192, value_dim=128, dtype=jnp.bfloat16
  )
  assert all(f'nsa_{branch}_{name}"' in text for name in ("fwd", "dq", "dkv"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_every_tiling_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert "__gpu$xla.gpu.triton" in _lower(**sizes)


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_gpu_matches_reference_everywhere(sizes: dict[str, Any]) -> None:
  """Every head size and dtype, many group sizes, compiled."""
  branch = sizes["branch"]
  config = NSAConfig(32, 16, 64, window=100)
  with helpers.on_cpu():
    inputs = _inputs(config=config, length=333, kv_heads=2, **sizes)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = _pullback(branch, "reference", config, length=333)(*wide)
  run = _pullback(branch, "triton", config, length=333)
  actual = run(*inputs)
  helpers.assert_same_bits(actual, run(*inputs))
  dtype = jnp.dtype(sizes["dtype"]).name
  helpers.assert_close(actual[0], expected[0], dtype)
  # Sums over up to 333 queries times the group, of terms rounded to the dtype.
  growth = 333**0.5 * sizes["group"] ** 0.5
  helpers.assert_close(actual[1], expected[1], dtype, gradient=growth)


def check_at_length(branch: str, implementation: Any, **call: Any) -> None:
  """Forward and backward against `xla`; the second run has the same bits."""
  config, length = NSAConfig(), 8192
  inputs = _inputs(
    branch,
    config,
    length=length,
    kv_heads=2,
    group=16,
    head_dim=128,
    value_dim=128,
    dtype=jnp.bfloat16,
  )
  wide = [x.astype(jnp.float32) for x in inputs]
  expected = _pullback(branch, "xla", config, length=length)(*wide)
  run = _pullback(branch, implementation, config, length=length, **call)
  actual = run(*inputs)
  helpers.assert_same_bits(actual, run(*inputs))
  helpers.assert_close(actual[0], expected[0], "bfloat16")
  for got, want in zip(actual[1], expected[1], strict=True):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    # Terms rounded to bfloat16 add up over as many queries as read the row:
    # the error follows the size of the sum.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 2**-7, error


@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("scratch", [2**25, 2**31])
def test_gpu_matches_xla_at_length(branch: str, scratch: int) -> None:
  tiles = tiling.band_tiling(
    windowed=branch == "window",
    group=16,
    head_dim=128,
    value_dim=128,
    dtype=jnp.bfloat16,
  )
  tiles = dataclasses.replace(tiles, scratch=scratch)
  check_at_length(branch, "triton", tiles=tiles)
