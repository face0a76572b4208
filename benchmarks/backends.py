"""Triton and Mosaic GPU kernels side by side, by branch, shape and length.

    python -m benchmarks.backends
    python -m benchmarks.backends --quick

Batch 1, bfloat16, default NSAConfig. Blocks of the selected branch are random,
or of a pool: every 16 neighbouring queries draw from so many blocks, as layers
of a trained model do (26 to 50). These tables decide which backend serves a
call without `implementation`.
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nsa_jax
from benchmarks import harness

CONFIG = nsa_jax.NSAConfig()
BACKENDS = {"Triton": "triton", "Mosaic": "mosaic_gpu"}
POOLS = {
  "selected, pool of 26": 26,
  "selected, pool of 50": 50,
  "selected, random": None,
}
BRANCHES = ("compressed", "window", *POOLS)


class Heads(NamedTuple):
  """Query and key/value heads, and their dimensions H and V."""

  query: int
  kv: int
  head_dim: int
  value_dim: int

  def __str__(self) -> str:
    return f"{self.query}/{self.kv} x {self.head_dim}/{self.value_dim}"


HEADLINE = Heads(64, 4, 128, 128)
PRESET = Heads(16, 1, 64, 64)  # "base"
OTHERS = (
  Heads(32, 4, 128, 128),
  Heads(64, 2, 128, 128),
  Heads(64, 1, 128, 128),
  Heads(64, 4, 192, 128),
  Heads(32, 2, 256, 256),
)


def arrays(branch: str, heads: Heads, length: int) -> tuple[Any, ...]:
  """Query, key, value; dout and dlse; block ids or ()."""
  keys = jax.random.split(jax.random.key(0), 6)
  rows = length
  if branch == "compressed":
    rows = nsa_jax.num_compressed_blocks(length, CONFIG)

  def normal(key, rows, heads, width):
    return jax.random.normal(key, (1, rows, heads, width), jnp.bfloat16)

  ids: list[jax.Array] = []
  if branch in POOLS:
    pool = POOLS[branch]
    ids.append(
      harness.selected_ids(keys[5], length, heads.kv, 16, 64, pool=pool)
    )
  return (
    normal(keys[0], length, heads.query, heads.head_dim),
    normal(keys[1], rows, heads.kv, heads.head_dim),
    normal(keys[2], rows, heads.kv, heads.value_dim),
    normal(keys[3], length, heads.query, heads.value_dim),
    jax.random.normal(keys[4], (1, length, heads.query), jnp.float32),
    *ids,
  )


def forward(branch, implementation, length, query, key, value, *ids):
  options: dict[str, Any] = {"config": CONFIG, "implementation": implementation}
  if branch == "compressed":
    return nsa_jax.compressed_attention(
      query, key, value, key_length=length, **options
    )
  if branch == "window":
    return nsa_jax.window_attention(query, key, value, **options)
  return nsa_jax.selected_attention(query, key, value, *ids, **options)


def both(branch, implementation, length, q, k, v, dout, dlse, *ids):
  """Results of the forward pass and gradients."""
  run = functools.partial(forward, branch, implementation, length)
  result, pullback = jax.vjp(lambda *x: run(*x, *ids), q, k, v)
  return result, pullback((dout, dlse))


def compare(branch: str, heads: Heads, length: int, repeats: int) -> dict:
  """A row: the times of both backends, and how far their results differ."""
  args = arrays(branch, heads, length)
  jobs: dict[tuple[str, str], tuple[Any, Any]] = {}
  for name, implementation in BACKENDS.items():
    call = branch, implementation, length
    ids = args[5:]
    jobs[name, "fwd"] = functools.partial(forward, *call), (*args[:3], *ids)
    jobs[name, "both"] = functools.partial(both, *call), args
  programs = harness.compile_all(jobs)
  row: dict[str, Any] = {"branch": branch, "tokens": length}
  results = []
  for name in BACKENDS:
    failed = [
      p
      for (of, _), p in programs.items()
      if of == name and isinstance(p, Exception)
    ]
    if failed:
      row[f"{name} fwd ms"] = f"{type(failed[0]).__name__}: {failed[0]}"[:200]
      continue
    _, fwd = harness.device_ms(
      programs[name, "fwd"], *jobs[name, "fwd"][1], repeats=repeats
    )
    result, total = harness.device_ms(
      programs[name, "both"], *args, repeats=repeats
    )
    row |= {f"{name} fwd ms": fwd, f"{name} bwd ms": total - fwd}
    results.append(result)
  if len(results) == len(BACKENDS):
    for part in ("fwd", "bwd"):
      row[f"Triton / Mosaic, {part}"] = (
        row[f"Triton {part} ms"] / row[f"Mosaic {part} ms"]
      )
    row["difference"] = harness.relative_error(*results)
  print(row, flush=True)
  return row


def parser() -> argparse.ArgumentParser:
  return harness.arguments(__doc__.splitlines()[0])


def main(argv: list[str] | None = None) -> None:
  args = parser().parse_args(argv)
  harness.require_gpu()
  shapes: dict[Heads, tuple[int, ...]] = {HEADLINE: (8192, 65536)}
  if not args.quick:
    shapes = {HEADLINE: (1024, 8192, 65536), PRESET: (8192, 32768)}
    shapes |= {heads: (8192,) for heads in OTHERS}
  tables = {}
  for heads, lengths in shapes.items():
    tables[f"{heads}, ms"] = [
      compare(branch, heads, length, 5)
      for branch in BRANCHES
      for length in lengths
    ]
    # After every shape, so that what was measured stays.
    harness.record(
      args.out, "backends", "Triton and Mosaic GPU kernels", tables
    )


if __name__ == "__main__":
  main()
