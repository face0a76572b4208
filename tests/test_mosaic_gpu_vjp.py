"""The backward kernels of the bands on Mosaic GPU.

What the ops compute is tested in suite.py; here is what is the kernels' own:
their steps, chunks and shares, what they refuse, lowering for CUDA. Interpreted
they need jax 0.11, as the kernels do.
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
from pallas_kernels import bands
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import band_vjp, tiling
from tests import helpers
from tests.test_triton_band import BRANCHES, _inputs, _pullback

pytestmark = pytest.mark.usefixtures("no_races")
needs_kernels = pytest.mark.jax_0_11
CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 19)
HALF: Any = {"dtype": jnp.bfloat16, "head_dim": 64, "value_dim": 64}


def _tiles(**kwargs: Any) -> Any:
  tile = tiling.BandGradientTile(**kwargs)
  return tiling.BandTiling(tiling.BandTile(64), tile)


# --------------------------------------------------------- interpreted kernels


def _spec_and_index(
  branch: str,
  config: NSAConfig,
  inputs: Any,
  length: int,
  *,
  offset: Any,
  segments: Any,
  key_offset: Any = 0,
  tiles: Any = None,
  scale: float | None = None,
) -> Any:
  """Arguments of a backend's functions, as the ops make them."""
  query = inputs[0]
  batch, queries = query.shape[:2]
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  spec = Spec(config, scale, length, tiles=tiles, interpret=True)
  of_queries: Any = None
  if segments is not None:
    position = np.reshape(offset, (-1, 1)) + np.arange(queries)[None]
    position = np.broadcast_to(position, (batch, queries))
    of_queries = np.take_along_axis(segments, position.clip(0, length - 1), 1)
    inside = (position >= 0) & (position < length)
    of_queries = np.where(inside, of_queries, 0)
  return spec, (None, Queries(offset, segments, of_queries, key_offset))


def _backward(branch: str, spec: Any, index: Any, *arrays: Any) -> Any:
  """dq, dk, dv of the kernels from q, k, v, out, lse, dout and dlse."""
  qkv, rest = arrays[:3], arrays[3:]
  reads = getattr(bands, f"{branch}_reads")(spec, qkv, index)
  return band_vjp.backward(spec, qkv, reads, *rest)


def _check(
  branch: str,
  config: NSAConfig = CONFIG,
  *,
  length: int = 61,
  queries: int | None = None,
  offset: Any = None,
  segments: Any = None,
  key_offset: Any = 0,
  tiles: Any = None,
  scale: float | None = None,
  **sizes: Any,
) -> None:
  """Compares the kernels with the reference's gradients."""
  sizes = HALF | {"group": 16} | sizes
  inputs = _inputs(branch, config, length=length, queries=queries, **sizes)
  query, _, _, dout, dlse = inputs
  if offset is None:
    offset = length - query.shape[1]
  call: dict[str, Any] = {"query_offset": offset, "segment_ids": segments}
  if branch == "compressed":
    call["key_length"] = length
  else:
    call["key_offset"] = key_offset
  if scale is not None:
    call["scale"] = scale
  op = functools.partial(
    getattr(nsa_jax, f"{branch}_attention"),
    config=config,
    implementation="reference",
    **call,
  )
  with jax.default_matmul_precision("highest"):
    wide = [x.astype(jnp.float32) for x in inputs]
    (out, lse), pullback = jax.vjp(op, *wide[:3])
    # As `nsa_jax` does: nothing comes to queries that read nothing.
    empty = lse == -jnp.inf
    dout = jnp.where(empty[..., None], 0, dout)
    dlse = jnp.where(empty, 0, dlse)
    expected = pullback((dout.astype(jnp.float32), dlse))
  spec, index = _spec_and_index(
    branch,
    config,
    inputs,
    length,
    offset=offset,
    segments=segments,
    key_offset=key_offset,
    tiles=tiles,
    scale=scale,
  )
  actual = jax.jit(functools.partial(_backward, branch, spec, index))(
    *inputs[:3], out.astype(query.dtype), lse, dout, dlse
  )
  helpers.assert_half_gradients(actual, expected, query.dtype)


SEGMENTS = np.repeat(helpers.int32([[3, 0, 7, 7], [0, 5, 5, 0]]), 16, 1)[:, :61]
# Chunks of one query tile, shares of the queries, several key tiles and tiles
# at both ends of the band; groups, widths, offsets, segments.
CASES: dict[str, Any] = {
  "rows, segments, chunks, widths": {
    "batch": 2,
    "group": 32,
    "queries": 7,
    "offset": helpers.int32([-3, 50]),
    "segments": SEGMENTS,
    "value_dim": 128,
    "tiles": {"scratch": 1, "steps": 2},
  },
  "ragged": {},
  "segments, group of 8, widths": {
    "batch": 2,
    "group": 8,
    "queries": 20,
    "offset": helpers.int32([-7, 50]),
    "segments": SEGMENTS,
    "head_dim": 128,
  },
  "group of 64, other widths, float16": {
    "group": 64,
    "queries": 7,
    "value_dim": 128,
    "dtype": jnp.float16,
  },
  "chunks, heads": {
    "length": 70,
    "kv_heads": 2,
    "group": 32,
    "tiles": {"scratch": 1},
  },
  "key tiles, shares": {
    "config": NSAConfig(4, 1, 16, 3, 1, 1, 150),
    "length": 300,
    "group": 8,
    "tiles": {"programs": 8, "steps": 2},
  },
  "key tiles, chunks": {
    "config": NSAConfig(4, 2, 16, 3, 1, 1, 200),
    "length": 400,
    "group": 8,
    "tiles": {"scratch": 2**20, "programs": 4},
  },
  "wide heads": {
    "length": 140,
    "queries": 20,
    "batch": 2,
    "offset": helpers.int32([-3, 120]),
    "head_dim": 256,
    "value_dim": 192,
  },
  "wide queries, chunks": {
    "length": 90,
    "group": 32,
    "head_dim": 192,
    "value_dim": 128,
    "tiles": {"scratch": 1, "dq_stages": 2, "steps": 2},
  },
  "a scale of 0": {"queries": 5, "scale": 0.0},
  "a negative scale": {"queries": 5, "scale": -0.3},
}
FAST = ("rows, segments, chunks, widths",)


def _check_case(branch: str, case: dict[str, Any]) -> None:
  if "tiles" in case:
    case = case | {"tiles": _tiles(**case["tiles"])}
  _check(branch, **case)


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      case, id=name, marks=[] if name in FAST else [pytest.mark.slow]
    )
    for name, case in CASES.items()
  ],
)
def test_matches_reference(branch: str, case: dict[str, Any]) -> None:
  _check_case(branch, case)


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gpu_matches_reference(branch: str, case: dict[str, Any]) -> None:
  _check_case(branch, case)


def _check_halo() -> None:
  """Keys that do not start at position 0; rows before it are no tokens."""
  _check(
    "window",
    batch=2,
    queries=24,
    offset=helpers.int32([7, 20]),
    key_offset=helpers.int32([5, -6]),
  )


@needs_kernels
@pytest.mark.slow
def test_halo_of_the_window() -> None:
  _check_halo()


@needs_kernels
@pytest.mark.gpu
def test_gpu_halo_of_the_window() -> None:
  _check_halo()


def _check_queries_that_read_nothing(branch: str) -> None:
  """They have no gradient, though a value that they do not read is NaN.

  Nor has the query that repeats after the last one an effect.
  """
  inputs = _inputs(branch, CONFIG, queries=10, group=8, **HALF)
  query, key, value, dout, dlse = inputs
  spec, index = _spec_and_index(
    branch, CONFIG, inputs, 61, offset=-6, segments=None
  )
  empty = np.arange(-6, 4) < (7 if branch == "compressed" else 0)
  value = value.at[:, -1].set(jnp.nan)
  out = jnp.where(empty[None, :, None, None], 0, dout)
  lse = jnp.where(empty[None, :, None], -jnp.inf, dlse)
  dout, dlse = out, jnp.where(empty[None, :, None], 0, dlse)
  dq, _, dv = jax.jit(functools.partial(_backward, branch, spec, index))(
    query, key, value, out, lse, dout, dlse
  )
  assert (np.asarray(dq)[:, empty] == 0).all()
  # Both are finite where every value that the tile's queries read is.
  assert np.isfinite(np.asarray(dv, np.float32)[:, :-1]).all()


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
def test_queries_that_read_nothing(branch: str) -> None:
  _check_queries_that_read_nothing(branch)


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
def test_gpu_queries_that_read_nothing(branch: str) -> None:
  _check_queries_that_read_nothing(branch)


# ------------------------------------------------------------------------ steps


def _schedule(
  window: int | None,
  group: int,
  length: int,
  num_keys: int,
  width: int,
  **tiles: Any,
) -> Any:
  stride, span = (2, 4) if window is None else (1, 1)
  tokens = (num_keys - 1) * stride + span
  band = bands.Band(stride, span, window, tokens)
  query: Any = jax.ShapeDtypeStruct((1, length, group, width), jnp.bfloat16)
  key: Any = jax.ShapeDtypeStruct((1, num_keys, 1, width), jnp.bfloat16)
  tile = tiling.BandGradientTile(**tiles)
  spec = Spec(None, 1.0, tokens)
  return band_vjp.make_schedule(spec, band, tile, query, key, width)


@pytest.mark.parametrize("window", [None, 1, 70, 130, 1000])
@pytest.mark.parametrize("group, width", [(16, 64), (64, 64), (16, 256)])
@pytest.mark.parametrize(
  "tiles",
  [{}, {"scratch": 2**18, "programs": 8, "steps": 2}, {"scratch": 2**17}],
  ids=str,
)
def test_steps_are_what_dq_reads(
  window: int | None, group: int, width: int, tiles: Any
) -> None:
  """Each ds that dq reads is written once, in its place, masked if need be."""
  length, num_keys, rows = 101, 300, tiling.ROWS
  schedule = _schedule(window, group, length, num_keys, width, **tiles)
  band, steps = schedule.band, schedule.tile.steps
  shape = schedule.num_chunks, schedule.num_key_tiles, schedule.splits, 2
  programs = np.stack([x.reshape(-1) for x in np.indices(shape)]).astype(
    "int32"
  )
  walk_of = jax.jit(
    lambda place: jax.vmap(
      lambda chunk, tile, split, worker: band_vjp.steps_of(
        schedule, chunk, place, tile, split, worker
      )
    )(*programs)
  )
  keys_of = jax.jit(
    lambda place, tile, size: schedule.keys_of(tile, place, size),
    static_argnums=2,
  )
  for place in ((0, 0), (199, 0), (-30, 0), (460, 9), (7, 140)):
    if window is None:
      place = place[0], 0
    place = tuple(helpers.int32(x) for x in place)
    walks = [np.asarray(x) for x in walk_of(place)]
    tiles_read = np.arange(schedule.num_tiles, dtype=np.int32)
    begin, end = map(np.asarray, keys_of(place, tiles_read, rows))
    begin = np.broadcast_to(begin, tiles_read.shape)
    parts = schedule.block_k // rows
    base = keys_of(place, tiles_read, schedule.block_k)[0]
    base = np.broadcast_to(np.asarray(base), tiles_read.shape) * parts
    written: dict[Any, bool] = {}
    for number, (chunk, key_tile, _, worker) in enumerate(programs.T):
      walk = band_vjp.Walk(*(int(x[number]) for x in walks))
      assert list(walk) == sorted(walk)
      start, apart = schedule.tiles_of(int(chunk))
      keys = parts * int(key_tile) + (0 if schedule.shared else int(worker))
      if schedule.shared and worker == 0:
        continue  # It computes dv and stores no ds.
      for i in range(walk.first, walk.last):
        tile = start + i // steps * apart
        full = walk.full_first <= i < walk.full_last
        assert (tile, i % steps, keys) not in written
        written[tile, i % steps, keys] = full
        assert 0 <= keys - base[tile] < parts * schedule.slots
    read = {
      (tile, i, keys)
      for tile in tiles_read.tolist()
      for i in range(steps)
      for keys in range(begin[tile], end[tile])
    }
    assert read == set(written)
    for (tile, _, keys), full in written.items():
      queries = np.arange(tile, tile + 1)[:, None] * schedule.block_q
      queries = queries + np.arange(schedule.block_q)
      t = place[0] + queries[queries < length]
      key_rows = keys * rows + np.arange(rows)
      mask = band.readable(key_rows[None], t[:, None], place[1])
      # Queries that read nothing at all need no mask.
      mask = mask | (t[:, None] >= band.length) | (t[:, None] < 0)
      assert mask.all() or not full


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  "tile, match",
  [
    ({"num_stages": 1}, "stages of `bwd` of .* must be at least 2"),
    ({"dq_stages": 1}, "stages of `bwd` of .* must be at least 2"),
    ({"steps": 3}, "`bwd.steps` of .* must be a multiple of 2 up to 6 with"),
    ({"steps": 8}, "`bwd.steps` of .* up to 6 with head dimension 128"),
    ({"programs": 0}, "`bwd.programs` of .* must be at least 1"),
    ({"num_stages": 5}, "takes 265984 bytes .* in the dk, dv kernel"),
    ({"dq_stages": 6}, "takes 327680 bytes of shared memory in the dq kernel"),
  ],
  ids=str,
)
def test_tiles_that_do_not_fit(tile: Any, match: str) -> None:
  with pytest.raises(ValueError, match=match):
    _tiles(**tile).check_fit(128, 128)


@pytest.mark.parametrize("value_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_tiles_of_the_heuristic_fit(head_dim: int, value_dim: int) -> None:
  tile = tiling.gradient_tile(head_dim, value_dim)
  tiles = dataclasses.replace(_tiles(), bwd=tile)
  tiles = dataclasses.replace(tiles, fwd=tiling.BandTile(64))
  tiles.check_fit(head_dim, value_dim)


# --------------------------------------------------------------------- lowering


def _lower(branch: str, **sizes: Any) -> str:
  """One branch, backward alone, lowered for an H200."""
  config = NSAConfig(32, 16, 64, window=100)
  length = sizes.pop("length", 333)
  segmented = sizes.pop("segmented", False)
  segments = np.ones((1, length), np.int32) if segmented else None
  tiles = _tiles(**sizes.pop("tiles")) if "tiles" in sizes else None
  sizes = HALF | sizes
  inputs = jax.eval_shape(
    functools.partial(_inputs, branch, config, length=length, **sizes)
  )
  spec, index = _spec_and_index(
    branch, config, inputs, length, offset=0, segments=segments, tiles=tiles
  )
  spec = spec._replace(interpret=False)

  def run(query, key, value, dout, dlse):
    return _backward(
      branch, spec, index, query, key, value, dout, dlse, dout, dlse
    )

  with helpers.h200():
    traced = jax.jit(run).trace(*inputs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
def test_lowers_for_cuda(branch: str) -> None:
  """In several chunks: the first kernels, and those that add to them."""
  text = _lower(branch, group=16, head_dim=128, tiles={"scratch": 1})
  assert text.count("@mosaic_gpu") == 4
  assert "output_operand_aliases = [#" in text


LOWERED: dict[str, Any] = {
  "branch": BRANCHES,
  "group": (8, 16, 32, 64),
  "head_dim": (64, 128, 192, 256),
  "value_dim": (64, 128, 192, 256),
  "dtype": (jnp.float16, jnp.bfloat16),
  "segmented": (False, True),
}


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_every_shape_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert _lower(**sizes).count("@mosaic_gpu") == 2


# --------------------------------------------------------------------- on a GPU


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("scratch", [2**25, 2**31])
@pytest.mark.parametrize("group, width", [(16, 128), (8, 64), (64, 128)])
def test_gpu_matches_xla_at_length(
  branch: str, scratch: int, group: int, width: int
) -> None:
  """Forward and backward, twice with the same bits."""
  config, length = NSAConfig(), 8192
  bwd = tiling.BandGradientTile(scratch=scratch)
  tiles: Any = tiling.band_tiling(head_dim=width, value_dim=width)
  tiles = dataclasses.replace(tiles, bwd=bwd)
  inputs = _inputs(
    branch,
    config,
    length=length,
    kv_heads=2,
    group=group,
    head_dim=width,
    value_dim=width,
    dtype=jnp.bfloat16,
  )
  wide = [x.astype(jnp.float32) for x in inputs]
  expected = _pullback(branch, "xla", config, length=length)(*wide)
  run = _pullback(branch, "mosaic_gpu", config, length=length, tiles=tiles)
  actual = run(*inputs)
  helpers.assert_same_bits(actual, run(*inputs))
  for got, want in zip(actual[1], expected[1], strict=True):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 2**-7, error
