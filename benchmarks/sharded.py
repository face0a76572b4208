"""The op over the GPUs of a host, beside one of them.

    python -m benchmarks.sharded
    python -m benchmarks.sharded --processes 2

Forward and backward of phi and the op, bfloat16, 64 query and 4 key/value heads
of 128, in the layouts data (two rows), heads and sequence. With `--processes`
every GPU has a process of its own.
"""

import argparse
import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nsa_jax
from benchmarks import harness
from nsa_jax import KV, Layout, NSAConfig

LENGTHS = (32768, 65536, 131072)
LONG = 2**20
CONFIG = NSAConfig()
HEAD_DIM = 128
LAYOUTS = {
  "data": Layout(data="gpu"),
  "heads": Layout(heads="gpu"),
  "sequence": Layout(sequence="gpu"),
  "sequence, zigzag": Layout(sequence="gpu", zigzag=True),
}


def run(args: Any, dout: Any, layout: Layout | None) -> Any:
  """Out and the gradients of all arguments."""

  def attend(query, tokens, selected, window, gates, weight):
    compressed = KV(
      *(
        nsa_jax.compress_weighted(x, weight, config=CONFIG, layout=layout)
        for x in tokens
      )
    )
    return nsa_jax.native_sparse_attention(
      query, compressed, selected, window, gates, config=CONFIG, layout=layout
    )

  out, pullback = jax.vjp(attend, *args)
  return out, pullback(dout)


def tokens_in(layout: Layout | None, order: Callable[..., Any], x: Any) -> Any:
  """Reorders the arrays [B, T, N, ...] of a pytree for a zigzag layout."""
  if layout is None or not layout.zigzag:
    return x
  shards = len(jax.devices())
  return jax.tree.map(lambda x: order(x, shards) if x.ndim == 4 else x, x)


def arrays(
  seed: Any,
  rows: int,
  length: int,
  heads: int,
  kv_heads: int,
  layout: Layout | None,
) -> Any:
  """Random arguments of `run`."""
  keys = iter(jax.random.split(jax.random.key(seed), 9))

  def normal(heads: int, width: int = HEAD_DIM) -> Any:
    shape = rows, length, heads, width
    return jax.random.normal(next(keys), shape, jnp.bfloat16)

  query, dout = normal(heads), normal(heads)
  pairs = [KV(normal(kv_heads), normal(kv_heads)) for _ in range(3)]
  gates = jax.nn.sigmoid(normal(heads, 3).astype(jnp.float32))
  block = CONFIG.compression_block
  weight = jnp.full((kv_heads, block), 1 / block, jnp.float32)
  args = (query, *pairs, gates, weight), dout
  return tokens_in(layout, nsa_jax.zigzag, args)


def shardings(mesh: Any, layout: Layout) -> Any:
  """Where the results of `arrays` are."""
  split = NamedSharding(mesh, P(layout.data, layout.sequence, layout.heads))
  weight = NamedSharding(mesh, P(layout.heads))
  return (*(split,) * 5, weight), split


def moved_mib(text: str, devices: int) -> dict[str, float]:
  """MiB that a device receives in every kind of collective of a program."""
  sizes = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4}
  others = devices - 1
  factor = {
    "all-gather": others / devices,
    "reduce-scatter": others,
    "all-reduce": 2 * others / devices,
    "collective-permute": 1,
    "all-to-all": others / devices,
  }
  total = dict.fromkeys(factor, 0.0)
  for line in text.splitlines():
    found = re.search(
      r"= (.*?) (all-gather|reduce-scatter|all-reduce|collective-permute|"
      r"all-to-all)(-start)?\(",
      line,
    )
    if not found:
      continue
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
    if found[3]:  # The results of a start are its operands and its results.
      shapes = shapes[len(shapes) // 2 :]
    elements = sum(
      sizes.get(kind, 4) * math.prod(int(x) for x in dims.split(",") if x)
      for kind, dims in shapes
    )
    total[found[2]] += factor[found[2]] * elements / 2**20
  return {kind: mib for kind, mib in total.items() if mib}


def measure(
  name: str, length: int, rows: int, all_heads: Sequence[int], calls: int
) -> tuple[dict[str, Any], Any]:
  """Time, memory and bytes of a layout, or of one GPU; and the results."""
  heads, kv_heads = all_heads
  devices = jax.devices() if name != "one GPU" else jax.devices()[:1]
  layout = LAYOUTS.get(name)
  mesh = jax.make_mesh(
    (len(devices),), ("gpu",), axis_types=(AxisType.Auto,), devices=devices
  )
  with jax.set_mesh(mesh):
    placed = shardings(mesh, layout or Layout())
    sizes = rows, length, heads, kv_heads, layout
    make = jax.jit(lambda seed: arrays(seed, *sizes), out_shardings=placed)
    shapes = jax.eval_shape(make, 0)
    shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      jax.tree.map(
        lambda s, x: jax.tree.map(lambda _: s, x),
        placed,
        shapes,
        is_leaf=lambda x: isinstance(x, NamedSharding),
      ),
    )
    jitted = jax.jit(
      functools.partial(run, layout=layout),
      out_shardings=(placed[1], placed[0]),
    )
    compiled = jitted.lower(*shapes).compile()
    memory: Any = compiled.memory_analysis()
    gib = {
      "arguments": memory.argument_size_in_bytes,
      "results": memory.output_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
    }
    row = {
      "tokens": length,
      "rows": rows,
      "heads": f"{heads}/{kv_heads}",
      "layout": name,
      "GPUs": len(devices),
      "GiB per GPU": sum(gib.values()) / 2**30,
    }
    for kind, mib in moved_mib(compiled.as_text() or "", len(devices)).items():
      row[f"MiB received, {kind}"] = mib
    stats = devices[0].memory_stats() or {}
    if sum(gib.values()) > 0.97 * stats.get("bytes_limit", math.inf):
      return row | {"ms": "too large"}, None
    given = make(0)
    jax.block_until_ready(given)
    row["ms"] = harness.in_a_row_ms(compiled, *given, calls=calls)
    return row, compiled(*given) if length <= LENGTHS[0] else None


def checked(name: str, result: Any, expected: Any) -> float | None:
  """The relative error against one GPU."""
  if result is None or expected is None:
    return None
  result, expected = jax.tree.map(np.asarray, (result, expected))
  result = tokens_in(LAYOUTS[name], nsa_jax.restore_zigzag, result)
  return harness.relative_error(result, expected)


def child(args: argparse.Namespace) -> None:
  """Measures all layouts in this process."""
  if args.process is not None:
    jax.distributed.initialize(
      "localhost:12421", args.processes, args.process, [args.process]
    )
  alone = args.process is None
  table: list[dict[str, Any]] = []
  count = len(jax.devices())
  title = f"Phi and the op on {count} GPUs, {args.processes} process(es)"

  def add(row: dict[str, Any]) -> None:
    table.append(row)
    if not args.process:
      name = "sharded" if alone else f"sharded_{args.processes}_processes"
      harness.record(args.out, name, title, {"Forward and backward": table})

  for length in args.lengths:
    calls = min(max(3, 2**20 // length), 20)
    expected: dict[int, Any] = {}
    base: dict[int, float] = {}
    for rows in (1, 2) if alone else ():
      row, result = measure("one GPU", length, rows, args.heads, calls)
      expected[rows], base[rows] = result, row["ms"]
      add(row)
    for name in LAYOUTS:
      rows = count if name == "data" else 1
      row, result = measure(name, length, rows, args.heads, calls)
      if rows in base and isinstance(row["ms"], float):
        row["times faster"] = base[rows] / row["ms"]
        row["error"] = checked(name, result, expected[rows])
      add(row)
      del result
  if args.long:
    for heads in (args.heads, [x // 2 for x in args.heads]):
      for name in ("one GPU", "sequence, zigzag"):
        if name == "one GPU" and not alone:
          continue
        add(measure(name, args.long, 1, heads, 2)[0])
  if not alone:
    multihost_utils.sync_global_devices("done")


def parser() -> argparse.ArgumentParser:
  """The flags."""
  result = harness.arguments("The op over the GPUs of a host, beside one.")
  result.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
  result.add_argument(
    "--heads", type=int, nargs=2, default=(64, 4), help="N and K"
  )
  result.add_argument(
    "--long", type=int, default=LONG, help="tokens of a long row; 0: none"
  )
  result.add_argument("--processes", type=int, default=1)
  result.add_argument("--process", type=int, help=argparse.SUPPRESS)
  return result


def main(argv: list[str] | None = None) -> None:
  """Runs the benchmark."""
  args = parser().parse_args(argv)
  if args.quick:
    args.lengths, args.long = (4096,), 0
  if args.processes == 1 or args.process is not None:
    child(args)
    return
  command = [sys.executable, "-m", "benchmarks.sharded", *sys.argv[1:]]
  children = [
    subprocess.Popen([*command, "--process", str(i)], env=os.environ)
    for i in range(args.processes)
  ]
  codes = [x.wait() for x in children]
  if any(codes):
    raise SystemExit(f"the processes ended with {codes}")


if __name__ == "__main__":
  main()
