"""Times the tilings of the selected branch; `tiling.py` is chosen from this.

python -m benchmarks.sweep_selected
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import harness
from pallas_kernels.triton import tiling

LENGTH = 32768
KV_HEADS = 4
# Group, H, V, dtype: what models use.
SHAPES = (
  (16, 128, 128, jnp.bfloat16),
  (16, 192, 128, jnp.bfloat16),
  (16, 64, 64, jnp.bfloat16),
  (16, 128, 128, jnp.float32),
  (4, 128, 128, jnp.bfloat16),
  (8, 128, 128, jnp.bfloat16),
  (1, 128, 128, jnp.bfloat16),
  (4, 64, 64, jnp.bfloat16),
)


def candidates(base: tiling.SelectedTiling) -> list[tiling.SelectedTiling]:
  """Variations of the heuristic's choice, that choice first."""
  tile, replace = tiling.Tile, dataclasses.replace
  result = [base]
  if base.by_block:
    for rows, warps, stages in itertools.product((32, 64), (4,), (1, 2, 3)):
      one = tile(64, warps, stages)
      result.append(replace(base, fwd=one, dkv=one, rows=rows))
    return result
  for keys, warps, stages in (
    (16, 1, 3),
    (32, 1, 2),
    (32, 2, 2),
    (64, 1, 2),
    (64, 2, 2),
  ):
    one = tile(keys, warps, stages)
    result.append(replace(base, fwd=one, dq=one))
  for keys, warps, stages in ((32, 4, 2), (64, 4, 2), (64, 4, 3)):
    result.append(replace(base, dkv=tile(keys, warps, stages)))
  return result


def measure(
  group: int, head_dim: int, value_dim: int, dtype: Any, length: int
) -> list[dict[str, Any]]:
  keys = jax.random.split(jax.random.key(0), 6)

  def normal(key, heads, width):
    shape = (1, length, heads, width)
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)

  heads = KV_HEADS * group
  query = normal(keys[0], heads, head_dim)
  key = normal(keys[1], KV_HEADS, head_dim)
  value = normal(keys[2], KV_HEADS, value_dim)
  dout = normal(keys[3], heads, value_dim)
  dlse = jnp.zeros((1, length, heads))
  ids = harness.selected_ids(keys[4], length, KV_HEADS, 16, 64)
  base = tiling.selected_tiling(
    group=group, head_dim=head_dim, value_dim=value_dim, dtype=dtype, block=64
  )
  rows = []
  for tiles in candidates(base):
    # The ids are an argument: XLA would fold a constant's sort at compile time.
    def op(query, key, value, ids, tiles=tiles):
      return pallas_kernels.selected_attention(
        query,
        key,
        value,
        ids,
        selection_block=64,
        scale=head_dim**-0.5,
        query_offset=jnp.zeros(1, jnp.int32),
        tiles=tiles,
      )

    def both(query, key, value, ids, op=op):
      _, pullback = jax.vjp(lambda q, k, v: op(q, k, v, ids), query, key, value)
      return pullback((dout, dlse))

    row: dict[str, Any] = {
      "G": group,
      "H": head_dim,
      "V": value_dim,
      "dtype": jnp.dtype(dtype).name,
      "fwd": dataclasses.astuple(tiles.fwd),
      "dq": dataclasses.astuple(tiles.dq),
      "dkv": dataclasses.astuple(tiles.dkv),
      "rows": tiles.rows if tiles.by_block else None,
    }
    try:
      _, row["fwd ms"] = harness.device_ms(
        op, query, key, value, ids, repeats=3
      )
      _, total = harness.device_ms(both, query, key, value, ids, repeats=3)
      row["bwd ms"] = total - row["fwd ms"]
    except Exception as error:
      # A tiling that does not fit the card is a result, not a failure.
      row["does not run"] = str(error).splitlines()[0][:60]
    rows.append(row)
    print(row, flush=True)
  return rows


def main():
  args = harness.arguments(__doc__.splitlines()[0]).parse_args()
  shapes = SHAPES[:1] + SHAPES[4:5] if args.quick else SHAPES
  rows: list[dict[str, Any]] = []
  for shape in shapes:
    rows += measure(*shape, LENGTH)
    # After every shape: a sweep that is cut short keeps what it has.
    harness.record(
      args.out,
      "sweep_selected",
      f"Tilings of the selected branch, {LENGTH} tokens, {KV_HEADS} key/value "
      "heads",
      {"Tiles are (keys, warps, stages)": rows},
    )


if __name__ == "__main__":
  main()
