"""Shared by all benchmarks: device time, memory, records, tables.

Times are device times (CUPTI: the sum over the kernels of a call), medians over
several calls, after a warm-up. Records go to `benchmarks/results/` as JSON,
Markdown and PNG, with device, versions, command and date.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

RESULTS = pathlib.Path(__file__).parent / "results"
# What `benchmarks.trained_ids` saves; too large for the repository.
TRAINED_IDS = pathlib.Path("runs/trained_ids.npz")
Name = TypeVar("Name", bound=Hashable)


def require_gpu() -> None:
  """Exits on a machine without an NVIDIA GPU."""
  device = jax.devices()[0]
  if "cuda" not in device.client.platform_version:
    raise SystemExit(
      f"needs an NVIDIA GPU: JAX found {device.device_kind!r} only"
    )


def compile_all(
  jobs: Mapping[Name, tuple[Callable[..., Any], Sequence[Any]]],
) -> dict[Name, Any]:
  """Compiles functions for their arguments or shapes, in parallel.

  Functions may already be jitted, with their own options.

  If a job fails, its exception takes the place of the program: that a baseline
  does not fit on the card is a result, not an error of the benchmark.
  """

  def one(job):
    function, args = job
    try:
      jitted: Any = function
      if not hasattr(function, "lower"):
        jitted = jax.jit(function)
      return jitted.lower(*args).compile()
    except Exception as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(jobs, pool.map(one, jobs.values()), strict=True))


def forward_and_backward(function: Callable[..., Any]) -> Callable[..., Any]:
  """The gradients of a function that returns out and an auxiliary result.

  The returned function takes a tuple of arguments to differentiate, a tuple of
  the arguments that follow them, and the cotangent of out.
  """

  def run(primals, rest, dout):
    _, pullback, _ = jax.vjp(
      lambda *args: function(*args, *rest), *primals, has_aux=True
    )
    return pullback(dout)

  return run


def cudnn(query, key, value, window=None):
  """Causal attention by cuDNN, dense or windowed; returns (out, None)."""
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    is_causal=True,
    local_window_size=window and (window - 1, 0),
    implementation="cudnn",
  ), None


def triton_fa(query, key, value):
  """Dense causal attention by jax's Pallas Triton kernel; (out, None)."""
  from jax.experimental.pallas.ops.gpu import attention

  group = query.shape[2] // key.shape[2]
  # The kernel requires as many key/value heads as query heads.
  key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
  return attention.mha(
    query, key, value, None, sm_scale=query.shape[-1] ** -0.5, causal=True
  ), None


def device_ms(
  function: Callable[..., Any], *args: Any, repeats: int = 5
) -> tuple[Any, float]:
  """The result of a jitted function and its median device time in ms.

  Raises:
    RuntimeError: on a machine without an NVIDIA GPU.
  """
  from jax.experimental.mosaic.gpu import profiler

  times: Any
  result, times = profiler.measure(function, iterations=repeats)(*args)
  if times is None:
    raise RuntimeError("the profiler saw no kernel")
  # The profiler returns a number for one repeat, a list for several.
  return result, statistics.median([times] if repeats == 1 else times)


def in_a_row_ms(function: Callable[..., Any], *args: Any, calls: int) -> float:
  """Wall time per call in ms of so many calls in a row, after a warm-up."""
  jax.block_until_ready(function(*args))
  started = time.perf_counter()
  for _ in range(calls):
    result = function(*args)
  jax.block_until_ready(result)
  return 1e3 * (time.perf_counter() - started) / calls


def kernel_ms(function: Callable[..., Any], *args: Any) -> dict[str, float]:
  """Device time of each kernel of one call in ms, largest first.

  Raises:
    RuntimeError: on a machine without an NVIDIA GPU.
  """
  from jax.experimental.mosaic.gpu import profiler

  _, times = profiler.measure(function, aggregate=False)(*args)
  if times is None:
    raise RuntimeError("the profiler saw no kernel")
  total: dict[str, float] = {}
  for name, ms in times:
    total[name] = total.get(name, 0.0) + ms
  return dict(sorted(total.items(), key=lambda item: -item[1]))


def temporary_mib(function: Callable[..., Any], *args: Any) -> float:
  """Temporary memory of a call in MiB, without arguments and results.

  Args:
    function: a function of `args`, or a compiled program (no `args`).
    *args: arrays or shapes.
  """
  program = (
    function
    if isinstance(function, jax.stages.Compiled)
    else jax.jit(function).lower(*args).compile()
  )
  memory = program.memory_analysis()
  assert memory is not None
  return memory.temp_size_in_bytes / 2**20


def relative_error(actual: Any, expected: Any) -> float:
  """max over the leaves of |actual - expected| / |expected|, in norms."""

  def one(a, e):
    a, e = a.astype(jnp.float32), e.astype(jnp.float32)
    return float(jnp.linalg.norm(a - e) / jnp.linalg.norm(e))

  return max(jax.tree.leaves(jax.tree.map(one, actual, expected)))


def selected_ids(
  key: jax.Array,
  length: int,
  kv_heads: int,
  count: int,
  block: int,
  *,
  pool: int | None = None,
  neighbours: int = 16,
) -> jax.Array:
  """Block ids of forced and random blocks: int32 [1, T, K, count].

  One initial block, two ending at the query's own, and the rest random among
  the other earlier ones. With `pool`, each run of `neighbours` queries draws
  its free blocks from only `pool` random blocks.
  """
  num_blocks = -(-length // block)
  own = jnp.arange(length)[:, None] // block
  index = jnp.arange(num_blocks)

  def row(key):
    first, second = jax.random.split(key)
    score = jax.random.uniform(first, (length, num_blocks))
    if pool is not None:
      shared = jax.random.uniform(second, (length // neighbours, num_blocks))
      start = own[::neighbours]
      shared = jnp.where((index > 0) & (index < start - 1), shared, -1.0)
      least = jax.lax.top_k(shared, min(pool, num_blocks))[0][:, -1:]
      inside = jnp.repeat((shared >= least) & (shared >= 0), neighbours, axis=0)
      score = jnp.where(inside, score, score - 1)
    forced = (index == 0) | ((index <= own) & (index > own - 2))
    score = jnp.where(forced, 2.0, score)
    score = jnp.where(index <= own, score, -2.0)
    best, ids = jax.lax.top_k(score, min(count, num_blocks))
    ids = jnp.sort(jnp.where(best >= -1, ids, num_blocks), axis=-1)
    return jnp.where(ids < num_blocks, ids, -1).astype(jnp.int32)

  rows = [jax.jit(row)(k) for k in jax.random.split(key, kv_heads)]
  return jnp.stack(rows, axis=1)[None]


def arguments(description: str) -> argparse.ArgumentParser:
  """The flags of every benchmark."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument(
    "--quick", action="store_true", help="fewer sizes, under two minutes"
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=RESULTS,
    help="folder of the records (default: benchmarks/results)",
  )
  return parser


def add_implementation(parser: argparse.ArgumentParser) -> None:
  """Adds `--implementation`, which a record is named after."""
  parser.add_argument(
    "--implementation",
    choices=("mosaic_gpu", "triton", "xla"),
    help="of the sparse attention (default: what a call without one takes)",
  )


def named(record: str, args: argparse.Namespace) -> str:
  """The name of a record, of the implementation that was asked for."""
  return "_".join(filter(None, (record, args.implementation)))


def environment() -> dict[str, str]:
  """Device, versions, command and date."""
  device = jax.devices()[0]
  module = f"benchmarks.{pathlib.Path(sys.argv[0]).stem}"
  return {
    "device": device.device_kind,
    "jax": jax.__version__,
    "python": sys.version.split()[0],
    "platform_version": device.client.platform_version.replace("\n", " "),
    "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    "date": datetime.date.today().isoformat(),
  }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
  """Rows as a Markdown table; columns are in order of appearance."""
  columns = list(dict.fromkeys(name for row in rows for name in row))

  def text(value: Any) -> str:
    if value is None:
      return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

  lines = [columns, ["---"] * len(columns)]
  lines += [[text(row.get(name)) for name in columns] for row in rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rank(ms: Any) -> float:
  """Sort key of times; a string, the reason of a failure, goes last."""
  return ms if isinstance(ms, float) else float("inf")


def recorded(out: pathlib.Path, name: str) -> dict[str, list[dict]]:
  """The tables of name.json, or {} if it does not exist."""
  path = out / f"{name}.json"
  return json.loads(path.read_text())["tables"] if path.exists() else {}


def record(
  out: pathlib.Path,
  name: str,
  title: str,
  tables: dict[str, list[dict]],
  **data: Any,
) -> None:
  """Writes name.json and name.md, and prints the tables.

  Args:
    out: folder of the files.
    name: name of the files.
    title: title of the record.
    tables: rows by heading.
    **data: additional entries of the JSON file.
  """
  out.mkdir(parents=True, exist_ok=True)
  facts = environment()
  (out / f"{name}.json").write_text(
    json.dumps({"title": title, **facts, "tables": tables, **data}, indent=2)
    + "\n"
  )
  parts = [f"# {title}", "\n".join(f"- {k}: {v}" for k, v in facts.items())]
  for heading, rows in tables.items():
    parts.append(f"## {heading}\n\n{markdown(rows)}")
  (out / f"{name}.md").write_text("\n\n".join(parts) + "\n")
  print("\n\n".join(parts), flush=True)
