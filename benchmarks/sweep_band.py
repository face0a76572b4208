"""Times the tilings of the compressed branch and the window.

    python -m benchmarks.sweep_band
    python -m benchmarks.sweep_band --quick
    python -m benchmarks.sweep_band --first 2 --last 4

Every program has one tile per kernel, and the kernels are timed separately. dq
reads what dkv writes, so candidates of one are timed with the chosen tile of
the other. Programs of later shapes compile while earlier ones run.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nsa_jax
from benchmarks import harness
from pallas_kernels.triton import tiling
from pallas_kernels.triton.tiling import BandTile

LENGTH = 32768
KV_HEADS = 4
BRANCHES = ("compressed", "window")
CONFIG = nsa_jax.NSAConfig()
KERNELS = ("fwd", "dq", "dkv")


class Shape(NamedTuple):
  group: int
  head_dim: int
  value_dim: int
  dtype: Any = jnp.bfloat16


SHAPES = (
  Shape(16, 128, 128),
  Shape(4, 128, 128),
  Shape(16, 64, 64),
  Shape(16, 192, 128),
  Shape(16, 256, 256),
  Shape(1, 128, 128),
  Shape(64, 128, 128),
  Shape(16, 128, 128, jnp.float32),
)

# (keys, warps, stages, rows) of fwd, dq and dkv, by head dimension; the most
# promising first.
HEADLINE = (
  (
    (64, 8, 3, 256),
    (128, 8, 3, 128),
    (64, 8, 2, 256),
    (32, 8, 3, 256),
    (32, 8, 3, 128),
    (32, 4, 3, 64),
    (32, 8, 4, 256),
    (32, 8, 4, 128),
    (64, 4, 2, 64),
    (32, 4, 4, 64),
    (128, 8, 2, 128),
  ),
  (
    (64, 8, 3, 128),
    (32, 4, 4, 64),
    (64, 4, 3, 128),
    (32, 8, 4, 256),
    (64, 4, 3, 64),
    (64, 8, 3, 256),
    (64, 8, 4, 128),
    (16, 4, 4, 64),
  ),
  (
    (128, 8, 3, 64),
    (128, 8, 4, 64),
    (64, 4, 2, 64),
    (64, 4, 3, 32),
    (128, 8, 3, 32),
    (64, 8, 3, 64),
    (64, 4, 2, 32),
    (64, 4, 4, 32),
  ),
)
NORMAL = tuple(column[:6] for column in HEADLINE)
NARROW = (
  (
    (128, 8, 3, 256),
    (64, 8, 3, 256),
    (64, 8, 3, 128),
    (64, 4, 3, 128),
    (64, 4, 3, 64),
    (128, 8, 3, 128),
  ),
  (
    (64, 8, 3, 128),
    (32, 4, 4, 64),
    (64, 4, 3, 128),
    (64, 8, 4, 256),
    (64, 4, 3, 64),
    (32, 8, 4, 128),
  ),
  (
    (128, 8, 3, 64),
    (128, 8, 3, 128),
    (64, 4, 3, 64),
    (64, 4, 2, 128),
    (128, 4, 3, 64),
    (64, 8, 3, 128),
  ),
)
WIDE = (
  (
    (64, 8, 3, 128),
    (64, 8, 2, 128),
    (32, 8, 3, 128),
    (32, 4, 2, 64),
    (64, 4, 2, 64),
  ),
  (
    (64, 8, 3, 128),
    (64, 8, 2, 128),
    (32, 4, 3, 64),
    (32, 8, 3, 128),
    (32, 4, 2, 64),
  ),
  (
    (64, 8, 2, 64),
    (64, 8, 2, 32),
    (64, 8, 3, 32),
    (64, 4, 2, 32),
    (32, 8, 2, 64),
  ),
)
EXACT = (
  ((16, 8, 2, 32), (32, 8, 2, 32), (32, 8, 2, 64), (32, 4, 2, 32)),
  ((16, 8, 2, 32), (16, 4, 2, 32), (32, 8, 2, 32), (16, 8, 1, 32)),
  ((32, 8, 2, 16), (16, 8, 2, 16), (16, 4, 2, 16), (32, 8, 2, 32)),
)


def columns(shape: Shape) -> Any:
  """Candidate tiles of each kernel."""
  width = max(shape.head_dim, shape.value_dim)
  if jnp.dtype(shape.dtype).itemsize > 2:
    return EXACT
  if width > 128:
    return WIDE
  if width < 128:
    return NARROW
  return HEADLINE if shape == SHAPES[0] else NORMAL


def chosen(branch: str, shape: Shape) -> tiling.BandTiling:
  return tiling.band_tiling(
    windowed=branch == "window",
    group=shape.group,
    head_dim=shape.head_dim,
    value_dim=shape.value_dim,
    dtype=shape.dtype,
  )


def tilings(branch: str, shape: Shape) -> list[tiling.BandTiling]:
  """The chosen tiling, and others that together contain every candidate."""
  base = chosen(branch, shape)
  found = []
  for name, tiles in zip(KERNELS, columns(shape), strict=True):
    all_tiles = (BandTile(*tile) for tile in tiles)
    found.append(
      [
        {name: tile}
        for tile in all_tiles
        if tile.rows >= shape.group and tile != getattr(base, name)
      ]
    )
  fwd, dq, dkv = found
  pairs: Any = itertools.zip_longest(fwd, dq, fillvalue={})
  changes: list[Any] = [{}, *({**x, **y} for x, y in pairs), *dkv]
  return [changed(base, change) for change in changes]


def changed(base: tiling.BandTiling, change: Any) -> tiling.BandTiling:
  """Replaces tiles, and adapts dq so that it can read what dkv writes."""
  dq, dkv = change.get("dq", base.dq), change.get("dkv", base.dkv)
  dq = dataclasses.replace(
    dq, rows=max(dq.rows, dkv.rows), block_k=min(dq.block_k, dkv.block_k)
  )
  return dataclasses.replace(base, **change | {"dq": dq})


def shapes_of(branch: str, shape: Shape) -> Any:
  """Shapes of query, key, value and the cotangents of out and lse."""
  rows = LENGTH
  if branch == "compressed":
    rows = nsa_jax.num_compressed_blocks(LENGTH, CONFIG)
  heads = KV_HEADS * shape.group

  def array(length, heads, *width, dtype=shape.dtype):
    return jax.ShapeDtypeStruct((1, length, heads, *width), dtype)

  return (
    array(LENGTH, heads, shape.head_dim),
    array(rows, KV_HEADS, shape.head_dim),
    array(rows, KV_HEADS, shape.value_dim),
    array(LENGTH, heads, shape.value_dim),
    array(LENGTH, heads, dtype=jnp.float32),
  )


def compile_one(branch: str, shape: Shape, tiles: tiling.BandTiling) -> Any:
  """Compiles forward and backward; if that fails, returns the reason."""
  call: dict[str, Any] = {
    "config": CONFIG,
    "tiles": tiles,
    "implementation": "triton",
  }
  op = functools.partial(nsa_jax.window_attention, **call)
  if branch == "compressed":
    op = functools.partial(
      nsa_jax.compressed_attention, key_length=LENGTH, **call
    )

  def run(query, key, value, dout, dlse):
    return jax.vjp(op, query, key, value)[1]((dout, dlse))

  try:
    return jax.jit(run).lower(*shapes_of(branch, shape)).compile()
  except Exception as error:
    # That a tiling does not fit on the card is a result, not an error.
    return str(error).splitlines()[0][:60]


def compile_row(branch: str, shape: Shape, tiles: tiling.BandTiling) -> Any:
  """Pairs of tiling and `compile_one`; if it fails, one pair per new tile."""
  program = compile_one(branch, shape, tiles)
  base = chosen(branch, shape)
  changes: list[dict[str, Any]] = [
    {name: getattr(tiles, name)}
    for name in KERNELS
    if getattr(tiles, name) != getattr(base, name)
  ]
  if not isinstance(program, str) or len(changes) < 2:
    return [(tiles, program)]
  alone = [changed(base, change) for change in changes]
  return [(tiles, compile_one(branch, shape, tiles)) for tiles in alone]


def measure(
  branch: str,
  shape: Shape,
  futures: Sequence[concurrent.futures.Future],
) -> dict[str, list[dict[str, Any]]]:
  """One table per kernel."""
  arrays = shapes_of(branch, shape)
  keys = jax.random.split(jax.random.key(0), len(arrays))
  inputs = [
    jax.random.normal(key, x.shape, x.dtype)
    for key, x in zip(keys, arrays, strict=True)
  ]
  found: dict[str, dict[Any, Any]] = {name: {} for name in KERNELS}
  for tiles, program in (x for future in futures for x in future.result()):
    times: dict[str, float] = {}
    if not isinstance(program, str):
      times = harness.kernel_ms(program, *inputs)
    for name in KERNELS:
      tile = getattr(tiles, name)
      # The first of several chunks has its own kernel.
      kernels = [t for k, t in times.items() if f"nsa_{branch}_{name}" in k]
      ms = sum(kernels) if kernels else program
      before = found[name].get(tile, ms)
      # A tile may be in several programs, some of which may not compile.
      found[name][tile] = min(ms, before, key=harness.rank)
  label = (
    f"{branch}, G={shape.group} H={shape.head_dim} V={shape.value_dim} "
    f"{jnp.dtype(shape.dtype).name}"
  )

  return {
    f"{label}, {name}: (keys, warps, stages, rows)": [
      {"tile": str(dataclasses.astuple(tile)), "ms": ms}
      for tile, ms in sorted(tiles.items(), key=lambda x: harness.rank(x[1]))
    ]
    for name, tiles in found.items()
  }


def main():
  parser = harness.arguments(__doc__.splitlines()[0])
  parser.add_argument("--first", type=int, default=0, help="shape to begin at")
  parser.add_argument("--last", type=int, help="shape to stop before")
  args = parser.parse_args()
  last = 1 if args.quick else args.last
  jobs = [
    (branch, shape)
    for shape in SHAPES[args.first : last]
    for branch in BRANCHES
  ]
  # Other shapes keep the results of an earlier run.
  tables = harness.recorded(args.out, "sweep_band")
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    programs = [
      [pool.submit(compile_row, *job, tiles) for tiles in tilings(*job)]
      for job in jobs
    ]
    for job, futures in zip(jobs, programs, strict=True):
      tables |= measure(*job, futures)
      # After every shape, so that an interrupted sweep keeps its results.
      harness.record(
        args.out,
        "sweep_band",
        f"Tilings of the compressed branch and the window, {LENGTH} tokens, "
        f"{KV_HEADS} key/value heads, windows of {CONFIG.window}",
        tables,
      )


if __name__ == "__main__":
  main()
