"""Block selection by the Mosaic GPU score kernel, against the oracle.

On a CPU the kernel is interpreted, which takes seconds a call; the tier `gpu`
runs the same cases compiled.
"""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels import mosaic_gpu
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import select_blocks
from pallas_kernels.mosaic_gpu.tiling import (
  ROWS,
  ScoresTile,
  SelectionTiling,
  scores_bytes,
  selection_tiling,
)
from tests import helpers
from tests.helpers import Dims
from tests.test_triton_selection import _check, _select, check_at_length

NAME: Any = "mosaic_gpu"
BASE = NSAConfig(8, 4, 16, 3, 1, 1)
# 128 keys and more from few tokens.
DENSE = NSAConfig(4, 2, 16, 4, 1, 2)

needs_kernels = pytest.mark.jax_0_11
pytestmark = [needs_kernels, pytest.mark.usefixtures("no_races")]


def _tiles(scratch: int = 2**26, **tile: Any) -> SelectionTiling:
  """Tiles with which every loop takes several steps at test sizes."""
  tile = {"block_k": 64, "num_stages": 4, "blocks": 2} | tile
  return SelectionTiling(ScoresTile(**tile), scratch)


def _dims(config: NSAConfig, queries: int, keys: int, **sizes: Any) -> Dims:
  sizes = {"batch": 1, "kv_heads": 1, "group": 8, "head_dim": 64} | sizes
  return Dims(config, queries=queries, keys=keys, **sizes)


def _segments(length: int) -> dict[str, Any]:
  """Documents and padding, of two rows."""
  segments = np.zeros((2, length), np.int32)
  segments[0, :70], segments[0, 80:155], segments[0, 160:] = 5, 2, 9
  segments[1, 32:150], segments[1, 192:] = 3, 4
  return {"segment_ids": segments}


# Together: one and several units per block, query tiles and key tiles; key
# tiles that are left out; every way in which compressed blocks overlap.
CASES: dict[str, dict[str, Any]] = {
  "ragged": {"dims": _dims(BASE, 70, 70)},
  "offsets, rows outside the keys": {
    "dims": _dims(NSAConfig(8, 4, 16, 3, 0, 1), 21, 91, batch=2),
    "integers": {"query_offset": helpers.int32([-3, 80])},
  },
  "segments": {
    "dims": _dims(DENSE, 210, 210, batch=2),
    "integers": _segments(210),
  },
  "many tiles": {
    "dims": _dims(NSAConfig(8, 1, 16, 3, 0, 2), 140, 300, kv_heads=2),
    "tiles": _tiles(block_k=128, blocks=3),
  },
  "segments in chunks": {
    "dims": _dims(DENSE, 300, 300, batch=2, group=24, head_dim=128),
    "integers": _segments(300),
    "tiles": _tiles(2**18, key_stages=1),
    "dtype": "float16",
  },
  "no overlap": {
    "dims": _dims(
      NSAConfig(16, 16, 16, 3, 1, 1), 200, 200, batch=2, head_dim=256
    ),
    "tiles": _tiles(num_stages=2),
  },
  "one tile of keys": {
    "dims": _dims(
      NSAConfig(12, 2, 16, 4, 1, 2), 140, 300, group=64, head_dim=192
    ),
    "tiles": _tiles(num_stages=5, key_stages=1),
  },
}
FAST = ("offsets, rows outside the keys", "segments")


def _run(dims: Dims, dtype: str = "bfloat16", **call: Any) -> Any:
  call = {"tiles": _tiles()} | call
  return _check(dims, dtype, implementation=NAME, **call)


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      case, id=name, marks=[] if name in FAST else [pytest.mark.slow]
    )
    for name, case in CASES.items()
  ],
)
def test_matches_oracle(case: dict[str, Any]) -> None:
  _run(**case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("tuned", [False, True])
def test_gpu_matches_oracle(case: dict[str, Any], tuned: bool) -> None:
  _run(**case | ({"tiles": None} if tuned else {}))


def test_without_scores() -> None:
  """Nothing is free to choose."""
  _run(_dims(NSAConfig(8, 4, 16, 3, 2, 1), 70, 70))


# ----------------------------------------------------------------------- units


@pytest.mark.parametrize("offset", [-200, 0, 77, 3000])
@pytest.mark.parametrize("start", [0, 256])
def test_every_unit_has_one_block(offset: int, start: int) -> None:
  """All pairs of query and key tiles of which some entry is visible, once."""
  config, length, keys, blocks = NSAConfig(8, 2, 16), 500, 1101, 7
  call = select_blocks.Call(
    select_blocks.Band(2, 8, None, 2 * keys + 6),
    ScoresTile(64),
    1.0,
    ratio=8,
    reach=4,
    batch=2,
    length=length,
    chunk=256,
    kv_heads=3,
    group=8,
    num_keys=keys,
    blocks=blocks,
    interpret=True,
  )
  none: Any = dict.fromkeys(select_blocks.Refs._fields)
  offsets = jnp.array([offset, offset + 100], jnp.int32)
  refs = select_blocks.Refs(
    **none | {"start": jnp.array([start], jnp.int32), "offset": offsets}
  )

  @jax.jit
  def unit(index: Any) -> Any:
    zero = jnp.int32(0)
    place = select_blocks.Place(zero, jnp.int32(1), zero)
    x, _ = select_blocks._unit(call, refs, index, place)
    return x.b, x.h, x.row, x.tile

  seen = []
  counts = [
    int(select_blocks._num_units(call, refs, jnp.int32(block)))
    for block in range(blocks)
  ]
  assert max(counts) - min(counts) <= 1
  for block, count in enumerate(counts):
    indices = jnp.int32(block) + jnp.arange(count, dtype=jnp.int32) * blocks
    seen += [tuple(map(int, unit(index))) for index in indices]
  expected = []
  for b, h in itertools.product(range(2), range(3)):
    position = int(offsets[b]) + start
    for row in range(0, min(256, length - start), ROWS):
      if position + row >= call.band.length:
        continue
      last = position + row + ROWS - 1
      for tile in range(call.key_tiles):
        if tile * 128 * 2 + config.compression_block - 1 <= last:
          expected.append((b, h, row, tile))
  assert sorted(seen) == sorted(expected)


# ----------------------------------------------------------------------- tiles


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("group", [8, 16, 64])
@pytest.mark.parametrize("ratio", [1, 4, 8, 16])
def test_tiles_of_the_heuristic_fit(
  head_dim: int, group: int, ratio: int
) -> None:
  tiles = selection_tiling(head_dim=head_dim, group=group, ratio=ratio)
  tiles.check_fit(head_dim, group, ratio)
  assert scores_bytes(tiles.scores, head_dim, group) < 232448 - 1024


@pytest.mark.parametrize(
  "tile, match",
  [
    ({"block_k": 96}, "`scores.block_k` of .* must be 64 or 128"),
    ({"block_k": 64}, "must be a multiple of 8 times .* = 16"),
    ({"key_stages": 0}, "`scores.key_stages` of .* must be at least 1"),
    ({"num_stages": 1}, "`scores.num_stages` of .* must be at least 2"),
    ({"blocks": 0}, "`scores.blocks` of .* must be at least 1, or None"),
    ({"num_stages": 6}, "`scores` of .* takes 233472 bytes of shared memory"),
  ],
  ids=str,
)
def test_tiles_that_do_not_fit(tile: dict[str, Any], match: str) -> None:
  with pytest.raises(ValueError, match=match):
    SelectionTiling(ScoresTile(**tile)).check_fit(128, 8, 16)


@pytest.mark.parametrize(
  "config, sizes, match",
  [
    (NSAConfig(32, 1, 32), {}, "`compression_stride` = 32: .* divisors of 16"),
    (NSAConfig(256, 64, 256), {}, "`selection_block`=256"),
    (BASE, {"group": 4}, "4 heads per key/value head"),
    (BASE, {"head_dim": 80}, "head dimension 80"),
    (BASE, {"dtype": "float32"}, "dtype float32"),
  ],
  ids=str,
)
def test_what_the_kernel_cannot_do(
  config: NSAConfig, sizes: Any, match: str
) -> None:
  sizes = {"group": 8, "head_dim": 64, "dtype": "bfloat16"} | sizes
  shape = 1, 300, sizes["group"], sizes["head_dim"]
  query = jnp.zeros(shape, sizes["dtype"])
  arrays = query, query[:, :, :1], jnp.zeros(query.shape[:3])
  with pytest.raises(NotImplementedError, match=match):
    mosaic_gpu.select_blocks.check(
      Spec(config, 1.0, 300), arrays, (None, Queries(0))
    )


def test_tiles_of_another_class() -> None:
  x = jnp.ones((1, 16, 8, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match="`tiles`=3 must be a SelectionTiling"):
    nsa_jax.select_blocks(
      x,
      x[:, :3, :1],
      jnp.ones((1, 16, 8)),
      config=BASE,
      key_length=16,
      tiles=3,
      implementation=NAME,
    )


# -------------------------------------------------------------------- lowering


def _shapes(
  config: NSAConfig,
  length: int,
  queries: int | None = None,
  kv_heads: int = 2,
  group: int = 16,
  head_dim: int = 128,
  dtype: Any = jnp.bfloat16,
) -> list[Any]:
  queries, heads = queries or length, kv_heads * group
  blocks = nsa_jax.num_compressed_blocks(length, config)
  return [
    jax.ShapeDtypeStruct((2, queries, heads, head_dim), dtype),
    jax.ShapeDtypeStruct((2, blocks, kv_heads, head_dim), dtype),
    jax.ShapeDtypeStruct((2, queries, heads), jnp.float32),
  ]


def _lower(
  config: NSAConfig, length: int, packed: bool = False, **sizes: Any
) -> str:
  """Block selection lowered for an H200."""
  integers = {}
  if packed:
    integers["segment_ids"] = jax.ShapeDtypeStruct((2, length), jnp.int32)
  run = _select(NAME, config, length)
  with helpers.h200():
    traced = run.trace(*_shapes(config, length, **sizes), integers)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _assert_kernels(text: str) -> None:
  """The scores by Mosaic, the choice by Triton."""
  assert len(re.findall(r"custom_call @mosaic_gpu\w*", text)) == 1
  assert "nsa_block_scores" in text
  assert "nsa_top_n" in text


LOWERED: dict[str, Any] = {
  "config": (
    *helpers.SELECTIONS,
    NSAConfig(32, 32, 128, 4, 0, 3),
  ),
  "group": (8, 16, 24, 64),
  "head_dim": (64, 128, 192, 256),
  "dtype": (jnp.float16, jnp.bfloat16),
  "length": (5001, 16384),
  "queries": (1, 77, None),
  "packed": (False, True),
}


def test_lowers_for_cuda() -> None:
  _assert_kernels(_lower(NSAConfig(), 16384))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_everything_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  _assert_kernels(_lower(**sizes))


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_lowers_for_cuda(check_vma: bool) -> None:
  config, length = NSAConfig(), 4000
  call: dict[str, Any] = {"config": config, "key_length": length}
  device = AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
  run = jax.shard_map(
    functools.partial(nsa_jax.select_blocks, implementation=NAME, **call),
    mesh=AbstractMesh(
      (2,), ("batch",), (AxisType.Auto,), abstract_device=device
    ),
    in_specs=P("batch"),
    out_specs=P("batch"),
    check_vma=check_vma,
  )
  traced = jax.jit(run).trace(*_shapes(config, length))
  _assert_kernels(traced.lower(lowering_platforms=("cuda",)).as_text())


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group", [8, 16])
def test_gpu_matches_xla_at_length(group: int, packed: bool) -> None:
  check_at_length(NAME, group, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_gpu_selects_as_triton_does(sizes: dict[str, Any]) -> None:
  """But for rare near ties."""
  sizes = dict(sizes)
  config, length = sizes.pop("config"), sizes.pop("length")
  packed = sizes.pop("packed")
  shapes = _shapes(config, length, **sizes)
  rng = np.random.default_rng(0)
  query, key = (
    helpers.normal(rng, x.shape, jnp.dtype(x.dtype).name) for x in shapes[:2]
  )
  integers: dict[str, Any] = {}
  if packed:
    part = -(-length // 512) * 128
    segments = np.repeat(helpers.int32([[2, 0, 1, 3]] * 2), part, 1)
    integers["segment_ids"] = jnp.asarray(segments[:, :length])
  lse = nsa_jax.compressed_attention(
    query, key, key, config=config, key_length=length, **integers
  )[1]
  got, expected = (
    np.asarray(_select(name, config, length)(query, key, lse, integers))
    for name in (NAME, "triton")
  )
  assert (got != expected).any(axis=-1).mean() < 1e-3
