"""Times the tilings of block selection, for the choice in `tiling.py`.

    python -m benchmarks.sweep_selection
    python -m benchmarks.sweep_selection --quick

Every program has one tile per kernel, and the kernels are timed separately: the
best tile of a kernel does not depend on the other.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nsa_jax
from benchmarks import harness
from pallas_kernels.triton import tiling
from pallas_kernels.triton.tiling import SelectionTiling, Tile

LENGTH = 65536
KV_HEADS = 4


class Shape(NamedTuple):
  group: int
  head_dim: int
  dtype: Any = jnp.bfloat16


SHAPES = (
  Shape(16, 128),
  Shape(4, 128),
  Shape(16, 64),
  Shape(16, 192),
  Shape(64, 128),
  Shape(4, 128, jnp.float32),
)
# (queries, keys, warps, stages) of the score kernel.
SCORES = (
  (64, 128, 4, 2),
  (64, 128, 4, 3),
  (64, 128, 8, 2),
  (64, 64, 4, 2),
  (128, 64, 4, 2),
  (128, 64, 8, 2),
  (128, 128, 8, 2),
  (128, 128, 8, 3),
)
EXACT = (
  (32, 32, 4, 2),
  (16, 32, 4, 2),
  (32, 64, 4, 2),
  (64, 32, 4, 2),
  (32, 32, 8, 2),
)
# (queries, scores per step, warps) of the top-n kernel.
TOP_N = (
  (1, 128, 1),
  (2, 128, 1),
  (4, 128, 1),
  (2, 256, 1),
  (2, 128, 2),
  (4, 128, 4),
  (1, 256, 2),
)


def candidates(base: SelectionTiling, shape: Shape) -> list[SelectionTiling]:
  """The chosen tiling, then others that contain every candidate."""
  exact = jnp.dtype(shape.dtype).itemsize > 2
  found = [base]
  for scores, top_n in itertools.zip_longest(EXACT if exact else SCORES, TOP_N):
    changes: dict[str, Any] = {}
    if scores:
      block_q, *tile = scores
      changes |= {"block_q": block_q, "scores": Tile(*tile)}
    if top_n:
      changes |= zip(("rows", "block_m", "top_n_warps"), top_n, strict=True)
    found.append(dataclasses.replace(base, **changes))
  return found


def program(shape: Shape, tiles: SelectionTiling) -> Any:
  """A job for `harness.compile_all`, with shapes as arguments."""
  config = nsa_jax.NSAConfig()
  blocks = nsa_jax.num_compressed_blocks(LENGTH, config)
  heads = KV_HEADS * shape.group

  def run(query, key, lse):
    return nsa_jax.select_blocks(
      query,
      key,
      lse,
      config=config,
      key_length=LENGTH,
      tiles=tiles,
      implementation="triton",
    )

  arrays = (
    jax.ShapeDtypeStruct((1, LENGTH, heads, shape.head_dim), shape.dtype),
    jax.ShapeDtypeStruct((1, blocks, KV_HEADS, shape.head_dim), shape.dtype),
    jax.ShapeDtypeStruct((1, LENGTH, heads), jnp.float32),
  )
  return run, arrays


def measure(
  shape: Shape, programs: dict[SelectionTiling, Any], arrays: Any
) -> dict[str, list[dict[str, Any]]]:
  """One table per kernel."""
  keys = jax.random.split(jax.random.key(0), len(arrays))
  inputs = [
    jax.random.normal(key, x.shape, x.dtype)
    for key, x in zip(keys, arrays, strict=True)
  ]
  # The time does not depend on lse, but the scores must not overflow.
  inputs[-1] = jnp.full_like(inputs[-1], 10)
  found: dict[str, dict[Any, Any]] = {"scores": {}, "top-n": {}}
  for tiles, compiled in programs.items():
    times: Any = {}
    if not isinstance(compiled, Exception):
      times = harness.kernel_ms(compiled, *inputs)
    for name, kernel, tile in (
      (
        "scores",
        "nsa_block_scores",
        (tiles.block_q, *dataclasses.astuple(tiles.scores)[:3]),
      ),
      ("top-n", "nsa_top_n", (tiles.rows, tiles.block_m, tiles.top_n_warps)),
    ):
      # That a tiling does not fit on the card is a result, not an error.
      ms = times.get(kernel, str(compiled).splitlines()[0][:60])
      before = found[name].get(tile, ms)
      found[name][tile] = min(ms, before, key=harness.rank)
  label = f"G={shape.group} H={shape.head_dim} {jnp.dtype(shape.dtype).name}"
  columns = {
    "scores": "(queries, keys, warps, stages)",
    "top-n": "(queries, scores per step, warps)",
  }
  return {
    f"{label}, {name}: {columns[name]}": [
      {"tile": str(tile), "ms": ms}
      for tile, ms in sorted(times.items(), key=lambda x: harness.rank(x[1]))
    ]
    for name, times in found.items()
  }


def main():
  args = harness.arguments(__doc__.splitlines()[0]).parse_args()
  harness.require_gpu()
  config = nsa_jax.NSAConfig()
  ratio = config.selection_block // config.compression_stride
  jobs: dict[Any, Any] = {}
  for shape in SHAPES[: 1 if args.quick else None]:
    base = tiling.selection_tiling(
      length=LENGTH, dtype=shape.dtype, ratio=ratio
    )
    for tiles in candidates(base, shape):
      jobs[shape, tiles] = program(shape, tiles)
  programs = harness.compile_all(jobs)
  tables: dict[str, Any] = {}
  for shape in dict.fromkeys(shape for shape, _ in jobs):
    mine = {key[1]: found for key, found in programs.items() if key[0] == shape}
    arrays = next(job[1] for key, job in jobs.items() if key[0] == shape)
    tables |= measure(shape, mine, arrays)
  harness.record(
    args.out,
    "sweep_selection",
    f"Tilings of block selection, {LENGTH} tokens, {KV_HEADS} key/value heads",
    tables,
  )


if __name__ == "__main__":
  main()
