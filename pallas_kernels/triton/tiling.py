"""Tile sizes of the kernels and the heuristics that choose them.

The numbers come from sweeps (`benchmarks/sweep_selected.py`); the tables are in
`benchmarks/results/`. Nothing here changes a result beyond rounding.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.triton import common


@dataclasses.dataclass(frozen=True)
class Tile:
  """How one kernel is cut and compiled.

  Attributes:
    block_k: keys per step; divides the selection block.
    num_warps: warps per program.
    num_stages: depth of the pipeline that loads a step's inputs.
    queries: neighbouring queries per program, 1 or 2; two read the blocks that
      both chose once (query-outer kernels only).
  """

  block_k: int
  num_warps: int
  num_stages: int
  queries: int = 1


@dataclasses.dataclass(frozen=True)
class SelectedTiling:
  """Tiles of the selected branch.

  Attributes:
    by_block: blocks outside, queries gathered (small groups), instead of one
      program per query and group.
    fwd: forward kernel.
    dq: gradient of the query; not used with `by_block`, whose one backward
      kernel `dkv` describes.
    dkv: gradient of keys and values.
    rows: with `by_block`, rows (queries x heads of a group) of a step.
    piece: queries in one piece of the list of a block.
  """

  by_block: bool
  fwd: Tile
  dq: Tile
  dkv: Tile
  rows: int = 64
  piece: int = 1024


def selected_tiling(
  *,
  group: int,
  head_dim: int,
  value_dim: int,
  dtype: jnp.dtype,
  block: int,
  num_ids: int,
) -> SelectedTiling:
  """Tiles of the selected branch by shape.

  Args:
    group: G, heads per key/value head.
    head_dim: H.
    value_dim: V.
    dtype: of query, key and value.
    block: l'.
    num_ids: m, blocks per query.
  """
  rows = common.padded_rows(group)
  width = max(head_dim, value_dim)
  # Bytes of a key: a step holds block_k keys and values in shared memory,
  # num_stages times, and scores and accumulators in registers.
  cost = width * jnp.dtype(dtype).itemsize
  if group <= 8:
    keys = 64 if cost <= 256 else 32 if cost <= 512 else 16
    keys = min(keys, block)
    # A step gathers `rows` queries and cotangents.
    step_rows = 64 if cost <= 256 else 32 if cost <= 512 else 16
    fwd = Tile(keys, 4, 1)
    bwd = Tile(keys, 4, 3 if cost <= 256 else 2)
    return SelectedTiling(True, fwd, bwd, bwd, rows=step_rows)
  num_warps = max(1, rows // 16)
  if width > 128:
    num_warps = max(2, num_warps)
  single = Tile(min(32 if cost <= 256 else 16, block), num_warps, 2)
  # Two accumulators fill the registers; the lists of a pair are compared all
  # with all.
  pair = rows <= 16 and cost <= 256 and num_ids <= 64
  fwd = Tile(16, 1, 2, queries=2) if pair else single
  dkv_keys = 64 if cost <= 256 and rows <= 16 else 32 if cost <= 512 else 16
  dkv = Tile(min(dkv_keys, block), 4, 3 if cost <= 256 else 2)
  return SelectedTiling(False, fwd, single, dkv)
