"""The op over the GPUs of a host, beside one of them.

    python -m benchmarks.sharded
    python -m benchmarks.sharded --processes 2
    python -m benchmarks.sharded --lengths 65536 262144 --train 1048576

Forward and backward of phi and the op, bfloat16, 64 query and 4 key/value heads
of 128, with the rows, the heads or the sequence split, and with several of them
where there are more than two GPUs. A layout is compared with one GPU that takes
as many rows, or, where these do not fit, as often one row. `--processes` gives
every GPU a process of its own. `--train` adds training steps of the `base`
preset with one long row.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nsa_jax
from benchmarks import harness, train_step
from examples.lm import data, train
from examples.lm.devices import MeshDevices
from nsa_jax import KV, Layout, NSAConfig, TransformerLM
from nsa_jax.typing import RematName

LENGTHS = (32768, 65536, 131072, 2**20)
CHECKED = 32768  # Results of up to so many tokens are compared.
CONFIG = NSAConfig()
HEAD_DIM = 128
ONE = "one GPU"
REMATS: tuple[RematName, ...] = ("full", "save_attention")


class Split(NamedTuple):
  """A layout and the devices along its mesh axes, named as its fields."""

  layout: Layout
  sizes: dict[str, int]


def splits(count: int) -> dict[str, Split]:
  """The ways to split over so many devices, by name."""
  half = count // 2
  every: list[tuple[dict[str, int], bool]] = [
    ({"data": count}, False),
    ({"heads": count}, False),
    ({"sequence": count}, False),
    ({"sequence": count}, True),
  ]
  if count > 2:
    every += [
      ({"data": 2, "heads": half}, False),
      ({"data": 2, "sequence": half}, True),
      ({"heads": 2, "sequence": half}, True),
    ]
  if count > 4:
    every += [({"data": 2, "heads": 2, "sequence": count // 4}, True)]
  found = {}
  for sizes, zigzag in every:
    name = " x ".join(sizes) + ", zigzag" * zigzag
    axes: dict[str, Any] = {axis: axis for axis in sizes}
    found[name] = Split(Layout(**axes, zigzag=zigzag), sizes)
  return found


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


def tokens_in(split: Split, order: Callable[..., Any], x: Any) -> Any:
  """Reorders the arrays [B, T, N, ...] of a pytree for a zigzag layout."""
  if not split.layout.zigzag:
    return x
  shards = split.sizes["sequence"]
  return jax.tree.map(lambda x: order(x, shards) if x.ndim == 4 else x, x)


def arrays(
  seed: Any,
  rows: int,
  length: int,
  heads: int,
  kv_heads: int,
  split: Split,
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
  return tokens_in(split, nsa_jax.zigzag, args)


def shardings(mesh: Any, layout: Layout) -> Any:
  """Where the results of `arrays` are."""
  split = NamedSharding(mesh, P(layout.data, layout.sequence, layout.heads))
  weight = NamedSharding(mesh, P(layout.heads))
  return (*(split,) * 5, weight), split


def received_mib(text: str, devices: int) -> dict[str, float]:
  """MiB that a device receives in every kind of collective of a program."""
  sizes = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4}
  kinds = "all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all"
  total: dict[str, float] = {}
  for line in text.splitlines():
    found = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
    if not found:
      continue
    results, kind, start = found.groups()
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", results)
    # What starts another one than an all-reduce has its operands first.
    if start and kind != "all-reduce":
      shapes = shapes[len(shapes) // 2 :]
    size = sum(
      sizes[dtype] * math.prod(int(x) for x in dims.split(",") if x)
      for dtype, dims in shapes
    )
    group = group_size(line) or devices
    others = group - 1
    factor = {
      "all-gather": others / group,
      "reduce-scatter": others,
      "all-reduce": 2 * others / group,
      "collective-permute": 1,
      "all-to-all": others / group,
    }
    total[kind] = total.get(kind, 0) + factor[kind] * size / 2**20
  return total


def group_size(line: str) -> int | None:
  """Devices of a group of a collective; None if all are one group."""
  for pattern, size in (
    (r"replica_groups=\{\{([\d,]+)\}", lambda x: len(x[1].split(","))),
    (r"replica_groups=\[\d+,(\d+)\]", lambda x: int(x[1])),
    (r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", _of_axes),
  ):
    if found := re.search(pattern, line):
      return size(found)
  return None


def _of_axes(found: re.Match[str]) -> int:
  """Devices along some axes, as in mesh['a'=2,'b'=4] {'b'}."""
  sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
  return math.prod(int(sizes[axis]) for axis in found[2].split(","))


class OnMesh(NamedTuple):
  """A function to compile for a mesh, in any thread."""

  mesh: Any
  function: Any

  def lower(self, *args: Any) -> Any:
    with jax.set_mesh(self.mesh):
      return self.function.lower(*args)


def program(
  split: Split, rows: int, length: int, heads: int, kv_heads: int
) -> tuple[Any, OnMesh, Any]:
  """What makes the arguments; `run`, to be compiled; the arguments' shapes."""
  sizes = split.sizes or {"gpu": 1}
  mesh = jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=jax.devices()[: math.prod(sizes.values())],
  )
  placed = shardings(mesh, split.layout)
  make = jax.jit(
    lambda seed: arrays(seed, rows, length, heads, kv_heads, split),
    out_shardings=placed,
  )
  shapes = make.eval_shape(0)  # With the shardings of the results.
  layout = split.layout if split.sizes else None
  jitted = jax.jit(
    functools.partial(run, layout=layout), out_shardings=(placed[1], placed[0])
  )
  return make, OnMesh(mesh, jitted), shapes


def compiled_size(compiled: Any, devices: int) -> dict[str, float]:
  """GiB of a device and MiB that it receives."""
  memory = compiled.memory_analysis()
  size = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
  received = received_mib(compiled.as_text() or "", devices)
  return {"GiB per GPU": size / 2**30} | {
    f"MiB received, {kind}": mib for kind, mib in received.items()
  }


def fits(gib: float) -> bool:
  """Whether a program runs in the memory of a device."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get(
    "bytes_limit", math.inf
  )
  return gib * 2**30 <= 0.97 * limit


def compile_all(jobs: dict[Any, Any]) -> dict[Any, Any]:
  """`harness.compile_all`; several processes compile in the same order."""
  if jax.process_count() == 1:
    return harness.compile_all(jobs)
  return {
    name: function.lower(*args).compile()
    for name, (function, args) in jobs.items()
  }


def measure(
  wanted: dict[str, Split], length: int, heads: tuple[int, int], calls: int
) -> list[dict[str, Any]]:
  """Time, memory and bytes of every split.

  Where `ONE` is among them, it takes as many rows as each of the others, and
  they are compared with it.
  """
  counts = {name: split.sizes.get("data", 1) for name, split in wanted.items()}
  sizes = [(name, rows) for name, rows in counts.items() if name != ONE]
  if ONE in wanted:
    sizes = [(ONE, rows) for rows in sorted({*counts.values()})] + sizes
  makes, jobs = {}, {}
  for name, rows in sizes:
    makes[name, rows], function, shapes = program(
      wanted[name], rows, length, *heads
    )
    jobs[name, rows] = function, shapes
  table, one = [], {}
  for (name, rows), compiled in compile_all(jobs).items():
    devices = math.prod(wanted[name].sizes.values())
    row: dict[str, Any] = {
      "tokens": length,
      "rows": rows,
      "heads": "/".join(map(str, heads)),
      "layout": name,
      "GPUs": devices,
    }
    table.append(row)
    if isinstance(compiled, Exception):
      row["ms"] = str(compiled)[:60]
      continue
    row |= compiled_size(compiled, devices)
    if not fits(row["GiB per GPU"]):
      row["ms"] = "too large"
      continue
    given = makes[name, rows](0)
    jax.block_until_ready(given)
    row["ms"] = harness.in_a_row_ms(compiled, *given, calls=calls)
    result = None
    if length <= CHECKED and ONE in wanted:
      result = tokens_in(
        wanted[name],
        nsa_jax.restore_zigzag,
        jax.tree.map(np.asarray, compiled(*given)),
      )
    del given
    if name == ONE:
      one[rows] = row["ms"], result
    elif 1 in one:
      ms, expected = one.get(rows, (rows * one[1][0], None))
      row["times faster"] = ms / row["ms"]
      if expected is not None:
        row["error"] = harness.relative_error(result, expected)
  return table


def train_row(
  length: int, remat: RematName, steps: int = 2, **fields: Any
) -> dict[str, Any]:
  """A training step with one row of text, in zigzag order over all devices."""
  count = len(jax.devices())
  devices = MeshDevices(
    {"data": 1, "sequence": count, "heads": 1}, fsdp=False, zigzag=True
  )
  config = train_step.configure(
    "nsa", remat=remat, scan_layers=True, layout=devices.layout, **fields
  )
  optimizer = train.make_optimizer(3e-4, 1000)
  start = functools.partial(
    train_step.init,
    config=dataclasses.replace(config, layout=None),
    optimizer=optimizer,
  )
  placed = devices.shardings(jax.eval_shape(start, 0))
  corpus = data.load_corpus(None, 2**26, 1)
  text = data.training_batch(
    corpus.train, seed=0, step=0, batch_size=1, seq_len=length
  )
  batch = devices.put(text, 1)
  state = jax.jit(start, out_shardings=placed)(0)
  step = jax.jit(
    train.make_train_step(TransformerLM(config), optimizer),
    donate_argnums=0,
    out_shardings=(placed, devices.whole),
  )
  with devices.use():
    compiled = step.lower(state, batch).compile()
  row: dict[str, Any] = {"tokens": length, "GPUs": count, "remat": remat}
  row |= compiled_size(compiled, count)
  if not fits(row["GiB per GPU"]):
    return row | {"ms": "too large"}
  state, first = compiled(state, batch)
  jax.block_until_ready(state)
  started = time.perf_counter()
  for _ in range(steps):
    state, last = compiled(state, batch)
  jax.block_until_ready(state)
  ms = 1e3 * (time.perf_counter() - started) / steps
  return row | {
    "ms": ms,
    "tokens/s": 1e3 * length / ms,
    "first loss": float(first),
    "last loss": float(last),
  }


def child(args: argparse.Namespace) -> None:
  """Measures all layouts in this process."""
  if args.process is not None:
    jax.distributed.initialize(
      "localhost:12421", args.processes, args.process, [args.process]
    )
  harness.require_gpu()
  alone = args.process is None
  count = len(jax.devices())
  name = "sharded" if count == 2 else f"sharded_{count}"
  if not alone:
    name += f"_{args.processes}_processes"
  tables: dict[str, list[dict[str, Any]]] = {}

  def add(heading: str, rows: Sequence[dict[str, Any]]) -> None:
    tables.setdefault(heading, []).extend(rows)
    if not args.process:
      harness.record(
        args.out,
        name,
        f"Phi and the op on {count} GPUs, {args.processes} process(es)",
        tables,
      )

  wanted = splits(count)
  if alone:
    wanted = {ONE: Split(Layout(), {})} | wanted
  wanted = {
    name: split
    for name, split in wanted.items()
    if args.heads[1] % split.sizes.get("heads", 1) == 0
  }
  for length in args.lengths:
    calls = min(max(2, 2**20 // length), 20)
    add(
      "Forward and backward", measure(wanted, length, tuple(args.heads), calls)
    )
  for remat in REMATS if args.train else ():
    heading = "Training step of one row; MiB of a layer count once"
    add(heading, [train_row(args.train, remat)])
  if not alone:
    jax.distributed.shutdown()


def parser() -> argparse.ArgumentParser:
  """The flags."""
  result = harness.arguments("The op over the GPUs of a host, beside one.")
  result.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
  result.add_argument(
    "--heads", type=int, nargs=2, default=(64, 4), help="N and K"
  )
  result.add_argument(
    "--train", type=int, default=0, help="tokens of a training step; 0: none"
  )
  result.add_argument("--processes", type=int, default=1)
  result.add_argument("--process", type=int, help=argparse.SUPPRESS)
  return result


def main(argv: list[str] | None = None) -> None:
  """Runs the benchmark."""
  args = parser().parse_args(argv)
  if args.quick:
    args.lengths = (4096,)
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
