"""Times the tilings of the selected branch, for the choice in `tiling.py`.

    python -m benchmarks.sweep_selected
    python -m benchmarks.sweep_selected --quick

Every program has one tile per kernel, and the kernels are timed separately: the
best tile of a kernel does not depend on the others.
"""

import concurrent.futures
import dataclasses
import itertools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nsa_jax
from benchmarks import harness
from pallas_kernels.triton import tiling
from pallas_kernels.triton.tiling import Tile

LENGTH = 16384
KV_HEADS = 4


class Shape(NamedTuple):
  group: int
  head_dim: int
  value_dim: int
  dtype: Any = jnp.bfloat16
  block: int = 64


SHAPES = (
  Shape(16, 128, 128),
  Shape(4, 128, 128),
  Shape(16, 64, 64),
  Shape(16, 192, 128),
  Shape(16, 256, 256),
  Shape(16, 128, 128, jnp.float32),
  Shape(16, 128, 128, block=32),
  Shape(32, 128, 128),
  Shape(64, 128, 128),
  Shape(1, 128, 128),
  Shape(8, 128, 128),
  Shape(4, 64, 64),
  Shape(4, 192, 128),
  Shape(4, 256, 256),
  Shape(64, 256, 256),
  Shape(16, 64, 64, jnp.float32),
  Shape(4, 128, 128, jnp.float32),
)

# (keys, warps, stages[, queries]) of the query-outer kernels.
FWD = (
  (16, 1, 2, 2),
  (16, 1, 3, 2),
  (32, 1, 2, 2),
  (16, 1, 2),
  (16, 1, 3),
  (32, 1, 2),
  (64, 1, 2),
  (32, 2, 2),
  (64, 2, 2),
  (32, 4, 2),
)
DQ = (
  (32, 1, 2),
  (16, 1, 2),
  (16, 1, 3),
  (64, 1, 2),
  (16, 2, 2),
  (32, 2, 2),
  (64, 2, 2),
  (64, 1, 3),
  (64, 2, 3),
)
DKV = (
  (64, 4, 5),
  (64, 4, 4),
  (64, 4, 3),
  (64, 4, 2),
  (32, 4, 2),
  (32, 2, 2),
  (32, 2, 3),
  (32, 1, 2),
  (16, 1, 2),
  (16, 1, 3),
  (16, 2, 2),
  (64, 8, 3),
)
# (keys, warps, stages, rows) of the block-outer kernels.
BY_BLOCK_FWD = tuple(
  (keys, warps, stages, rows)
  for keys, rows in ((64, 64), (64, 32), (32, 64), (32, 32), (16, 32))
  for warps, stages in ((4, 1), (4, 2), (2, 2))
)
BY_BLOCK_BWD = (
  *(
    (keys, 4, stages, rows)
    for keys, rows in ((64, 64), (64, 32), (32, 64), (32, 32), (16, 32))
    for stages in (1, 2, 3)
  ),
  (64, 8, 1, 64),
  (64, 8, 1, 32),
  (64, 8, 2, 32),
)


def candidates(base: tiling.SelectedTiling, block: int) -> list[Any]:
  """Tilings that together contain every candidate of every kernel."""
  if base.by_block:
    pairs = itertools.zip_longest(BY_BLOCK_FWD, BY_BLOCK_BWD)
    found = []
    for fwd, bwd in pairs:
      for entry, name in ((fwd, "fwd"), (bwd, "dkv")):
        if entry is None or entry[0] > block:
          continue
        *tile, rows = entry
        new: dict[str, Any] = {name: Tile(*tile), "rows": rows}
        found.append(dataclasses.replace(base, **new))
    return found
  columns: list[list[Any]] = []
  for name, tiles in (("fwd", FWD), ("dq", DQ), ("dkv", DKV)):
    fitting = [tile for tile in tiles if tile[0] <= block]
    columns.append([(name, Tile(*tile)) for tile in fitting])
  return [
    dataclasses.replace(base, **dict(cell for cell in row if cell))
    for row in itertools.zip_longest(*columns)
  ]


KERNELS = {
  "fwd": ("nsa_selected_fwd", "nsa_selected_by_block_fwd"),
  "dq": ("nsa_selected_dq",),
  "dkv": ("nsa_selected_dkv", "nsa_selected_by_block_bwd"),
}


def both(shape: Shape, tiles: tiling.SelectedTiling) -> Any:
  """Forward and backward with these tiles."""
  config = nsa_jax.NSAConfig(16, 16, shape.block)

  def op(query, key, value, ids):
    return nsa_jax.selected_attention(
      query,
      key,
      value,
      ids,
      config=config,
      tiles=tiles,
      implementation="triton",
    )

  # The ids are an argument: XLA would fold a constant's sort at compile time.
  def run(query, key, value, ids, dout, dlse):
    _, pullback = jax.vjp(lambda q, k, v: op(q, k, v, ids), query, key, value)
    return pullback((dout, dlse))

  return jax.jit(run)


def measure(shape: Shape) -> dict[str, list[dict[str, Any]]]:
  keys = jax.random.split(jax.random.key(0), 6)
  heads = KV_HEADS * shape.group

  def normal(key, heads, width):
    x = jax.random.normal(key, (1, LENGTH, heads, width), jnp.float32)
    return x.astype(shape.dtype)

  inputs = (
    normal(keys[0], heads, shape.head_dim),
    normal(keys[1], KV_HEADS, shape.head_dim),
    normal(keys[2], KV_HEADS, shape.value_dim),
    harness.selected_ids(
      keys[4], LENGTH, KV_HEADS, 1024 // shape.block, shape.block
    ),
    normal(keys[3], heads, shape.value_dim),
    jnp.zeros((1, LENGTH, heads)),
  )
  base = tiling.selected_tiling(
    group=shape.group,
    head_dim=shape.head_dim,
    value_dim=shape.value_dim,
    dtype=shape.dtype,
    block=shape.block,
    num_ids=1024 // shape.block,
  )
  choices = [base, *candidates(base, shape.block)]

  def compile_one(tiles):
    try:
      return both(shape, tiles).lower(*inputs).compile()
    except Exception as error:
      # That a tiling does not fit on the card is a result, not an error.
      return str(error).splitlines()[0][:60]

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    programs = list(pool.map(compile_one, choices))
  found: dict[str, dict[Any, Any]] = {name: {} for name in KERNELS}
  for tiles, program in zip(choices, programs, strict=True):
    times: Any = program
    if not isinstance(program, str):
      times = harness.kernel_ms(program, *inputs)
    for name, kernels in KERNELS.items():
      tile = dataclasses.astuple(getattr(tiles, name))
      if tiles.by_block:
        tile = (*tile[:3], tiles.rows)
      every: list[Any] = [times]
      if not isinstance(times, str):
        every = [x for kernel, x in times.items() if kernel in kernels]
      # A tile may be in several programs, some of which may not compile.
      for ms in every:
        before = found[name].get(tile, ms)
        found[name][tile] = min(ms, before, key=harness.rank)
  label = (
    f"G={shape.group} H={shape.head_dim} V={shape.value_dim} "
    f"{jnp.dtype(shape.dtype).name} l'={shape.block}"
  )
  last = "rows" if base.by_block else "queries"

  return {
    f"{label}, {name}: (keys, warps, stages, {last})": [
      {"tile": str(tile), "ms": ms}
      for tile, ms in sorted(times.items(), key=lambda x: harness.rank(x[1]))
    ]
    for name, times in found.items()
    if times
  }


def main():
  parser = harness.arguments(__doc__.splitlines()[0])
  parser.add_argument("--first", type=int, default=0, help="shape to begin at")
  args = parser.parse_args()
  # Other shapes keep the results of an earlier run.
  tables = harness.recorded(args.out, "sweep_selected")
  for shape in SHAPES[args.first : 2 if args.quick else None]:
    tables |= measure(shape)
    # After every shape, so that an interrupted sweep keeps its results.
    harness.record(
      args.out,
      "sweep_selected",
      f"Tilings of the selected branch, {LENGTH} tokens, {KV_HEADS} key/value "
      "heads, 1024 keys per query",
      tables,
    )


if __name__ == "__main__":
  main()
