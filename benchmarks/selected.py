"""The selected branch on a GPU by length and by overlap, against dense.

    python -m benchmarks.selected
    python -m benchmarks.selected --quick

Headline shape: 64 query and 4 key/value heads, H = V = 128, 16 blocks of 64
including the forced ones, bfloat16, batch 1. Small groups: 32 and 8 heads. The
ids are random and, once `python -m benchmarks.trained_ids` has saved them,
those of the layers of a trained model.
"""

import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

import nsa_jax
from benchmarks import harness, trained_ids

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = nsa_jax.NSAConfig()
HEAD_DIM = 128
SHAPES = {"G = 16 (64/4 heads)": (64, 4), "G = 4 (32/8 heads)": (32, 8)}
POOLS = (None, 52, 26, 18, 13)


def inputs(length, heads, kv_heads):
  """Query, key, value and the cotangents of out and lse."""
  keys = jax.random.split(jax.random.key(0), 5)

  def normal(key, heads):
    shape = (1, length, heads, HEAD_DIM)
    return jax.random.normal(key, shape, jnp.bfloat16)

  return (
    normal(keys[0], heads),
    normal(keys[1], kv_heads),
    normal(keys[2], kv_heads),
    normal(keys[3], heads),
    jax.random.normal(keys[4], (1, length, heads), jnp.float32),
  )


def forward(query, key, value, ids, implementation: Any = None):
  return nsa_jax.selected_attention(
    query, key, value, ids, config=CONFIG, implementation=implementation
  )


def both(query, key, value, ids, dout, dlse, implementation: Any = None):
  """Forward and backward."""
  _, pullback = jax.vjp(
    lambda q, k, v: forward(q, k, v, ids, implementation),
    query,
    key,
    value,
  )
  return pullback((dout, dlse))


def dense_times(function, query, key, value, dout, repeats):
  """Forward and backward time of a dense baseline, in ms."""
  args = (query, key, value)
  _, fwd = harness.device_ms(function, *args, repeats=repeats)
  pull = harness.forward_and_backward(function)
  _, total = harness.device_ms(pull, args, (), dout, repeats=repeats)
  return fwd, total - fwd


def check(heads, kv_heads, implementation):
  """Relative error of the gradients against `xla` in float32, at 4k tokens."""
  query, key, value, dout, dlse = inputs(4096, heads, kv_heads)
  ids = harness.selected_ids(jax.random.key(1), 4096, kv_heads, 16, 64)
  wide = [x.astype(jnp.float32) for x in (query, key, value, dout)]
  run = functools.partial(both, implementation=implementation)
  actual = jax.jit(run)(query, key, value, ids, dout, dlse)
  expected = jax.jit(functools.partial(both, implementation="xla"))(
    *wide[:3], ids, wide[3], dlse
  )
  return harness.relative_error(actual, expected)


def measure(length, heads, kv_heads, ids, implementation, repeats):
  query, key, value, dout, dlse = inputs(length, heads, kv_heads)
  fwd_fn, both_fn = (
    functools.partial(f, implementation=implementation) for f in (forward, both)
  )
  _, fwd = harness.device_ms(fwd_fn, query, key, value, ids, repeats=repeats)
  args = query, key, value, ids, dout, dlse
  _, total = harness.device_ms(both_fn, *args, repeats=repeats)
  return fwd, total - fwd, harness.temporary_mib(both_fn, *args)


def by_layer(length, heads, kv_heads, saved, implementation, repeats):
  """Rows of random ids and of those of every trained layer."""
  random = harness.selected_ids(jax.random.key(1), length, kv_heads, 16, 64)
  rows: list[dict[str, Any]] = []
  for name, ids in {"random": random, **saved}.items():
    query, key, value, dout, dlse = inputs(length, heads, kv_heads)
    args = (query, key, value, ids, dout, dlse)
    run = functools.partial(both, implementation=implementation)
    kernels = harness.kernel_ms(jax.jit(run), *args)
    fwd, bwd, _ = measure(length, heads, kv_heads, ids, implementation, repeats)
    row = {"ids": name, "fwd ms": fwd, "bwd ms": bwd}
    for part in ("dq", "dkv", "bwd"):
      found = [
        ms
        for kernel, ms in kernels.items()
        if re.search(f"nsa_selected.*_{part}(_|$)", kernel)
      ]
      if found:
        row[f"kernel {part} ms"] = sum(found)
    first = rows[0] if rows else row
    row["bwd / random"] = bwd / first["bwd ms"]
    rows.append(row)
    print(row, flush=True)
  return rows


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--ids",
    type=pathlib.Path,
    default=harness.TRAINED_IDS,
    help=f"file of trained ids (default: {harness.TRAINED_IDS})",
  )
  harness.add_implementation(result)
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  implementation = args.implementation
  lengths = (8192, 32768) if args.quick else (8192, 32768, 65536, 131072)
  repeats = 3 if args.quick else 5
  tables: dict[str, list[dict[str, Any]]] = {}
  key = jax.random.key(1)
  for name, (heads, kv_heads) in SHAPES.items():
    error = check(heads, kv_heads, implementation)
    rows = []
    for length in lengths:
      ids = harness.selected_ids(key, length, kv_heads, 16, 64)
      fwd, bwd, memory = measure(
        length, heads, kv_heads, ids, implementation, repeats
      )
      row = {
        "tokens": length,
        "fwd ms": fwd,
        "bwd ms": bwd,
        "fwd ns/token": 1e6 * fwd / length,
        "bwd ns/token": 1e6 * bwd / length,
        "temporary MiB": memory,
        "error at 4k": error,
      }
      if length <= 65536:
        query, k, v, dout, _ = inputs(length, heads, kv_heads)
        dense = dense_times(harness.cudnn, query, k, v, dout, 3)
        row |= {"cuDNN dense fwd": dense[0], "cuDNN dense bwd": dense[1]}
      if length <= 32768:
        dense = dense_times(harness.triton_fa, query, k, v, dout, 3)
        row |= {"Triton FA fwd": dense[0], "Triton FA bwd": dense[1]}
      rows.append(row)
      print(row, flush=True)
    tables[f"{name}, forced and random blocks"] = rows

  length = lengths[-1] if args.quick else 65536
  for name, (heads, kv_heads) in SHAPES.items():
    rows = []
    for pool in POOLS:
      ids = harness.selected_ids(key, length, kv_heads, 16, 64, pool=pool)
      fwd, bwd, _ = measure(
        length, heads, kv_heads, ids, implementation, repeats
      )
      rows.append(
        {
          "free blocks of 16 neighbours": pool or "random",
          "fwd ms": fwd,
          "bwd ms": bwd,
        }
      )
    tables[f"{name}, {length} tokens, by overlap"] = rows
  length = 32768
  for name, (heads, kv_heads) in SHAPES.items():
    saved = trained_ids.load(args.ids, length, kv_heads)
    if saved:
      tables[f"{name}, {length} tokens, random ids and those of layers"] = (
        by_layer(length, heads, kv_heads, saved, implementation, repeats)
      )
  name = harness.named("selected", args)
  harness.record(args.out, name, "Selected branch", tables)
  plot(args.out / f"{name}.png", tables)


def plot(path, tables):
  """Plots time against length, with the dense baselines."""
  figure, axes = plt.subplots(
    1, 2, figsize=(10, 4), sharey=True, constrained_layout=True
  )
  for axis, name in zip(axes, SHAPES, strict=True):
    rows = tables[f"{name}, forced and random blocks"]
    for label, prefix, colour in (
      ("selected branch", "", "#d1702f"),
      ("cuDNN dense", "cuDNN dense ", "#4878a8"),
      ("Pallas Triton FlashAttention", "Triton FA ", "#777777"),
    ):
      for kind, style in (("fwd", "-"), ("bwd", "--")):
        column = prefix + kind + (" ms" if not prefix else "")
        points = [(r["tokens"], r[column]) for r in rows if column in r]
        axis.loglog(
          *zip(*points, strict=True),
          style,
          marker="o",
          markersize=3,
          color=colour,
          label=f"{label}, {kind}",
        )
    axis.set_title(name)
    axis.set_xlabel("tokens")
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("ms")
  axes[1].legend(fontsize=7)
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == "__main__":
  main()
