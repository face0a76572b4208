"""One step of decoding on a GPU, against dense attention over the cache.

    python -m benchmarks.decode
    python -m benchmarks.decode --quick
    python -m benchmarks.decode --sweep

Headline shape: 64 query and 4 key/value heads, H = V = 128, the paper's
configuration, bfloat16, one new token per batch row; the window has its own
keys. `--sweep` times the tilings of the kernels at two batch sizes; the
heuristic in `pallas_kernels/triton/tiling.py` is chosen from it.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

import nsa_jax
from benchmarks import harness
from nsa_jax import KV, cache
from pallas_kernels.triton import tiling
from pallas_kernels.triton.tiling import DecodeTiling, Tile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCHES = (1, 8, 32, 64)
CONTEXTS = (8192, 32768, 65536, 131072)
QUICK = ((1, 65536), (32, 65536))
SHOWN = (32, 65536)  # The kernels of this shape are listed.
# Bytes per second, from the data sheets.
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
STEPS = 64  # Dependent steps per timed call.
DENSE = ("cuDNN", "XLA", "XLA, heads first")


class Shape(NamedTuple):
  batch: int
  context: int
  heads: int = 64
  kv_heads: int = 4
  head_dim: int = 128
  config: nsa_jax.NSAConfig = nsa_jax.NSAConfig()
  dtype: Any = jnp.bfloat16
  tiles: DecodeTiling | None = None

  @property
  def ring(self) -> int:
    """Size of the ring of a cache with `max_append` 8."""
    return self.config.window + 7


class Inputs(NamedTuple):
  query: Any  # [B, 1, N, H]
  compressed: KV
  selected: KV
  window: KV
  gates: Any
  offset: Any  # int32 [B]
  lengths: Any  # int32 [B]


def inputs(seed: Any, shape: Shape) -> Inputs:
  """Random inputs; call it under `jit`."""
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  blocks = nsa_jax.num_compressed_blocks(shape.context, shape.config)

  def normal(rows, heads, width=shape.head_dim, dtype=shape.dtype):
    # Row by row: the random bits of all rows would be the largest array.
    draw = functools.partial(
      jax.random.normal, shape=(rows, heads, width), dtype=dtype
    )
    return jax.lax.map(draw, jax.random.split(next(keys), shape.batch))

  def pair(rows):
    return KV(normal(rows, shape.kv_heads), normal(rows, shape.kv_heads))

  return Inputs(
    normal(1, shape.heads),
    pair(blocks),
    pair(shape.context),
    pair(shape.ring),
    jax.nn.sigmoid(normal(1, shape.heads, 3, jnp.float32)),
    lengths(shape) - 1,
    lengths(shape),
  )


def lengths(shape: Shape) -> Any:
  return jnp.full((shape.batch,), shape.context, jnp.int32)


def sparse(shape: Shape) -> Callable[..., Any]:
  """f(query, rest of the inputs) -> (out, ids)."""
  config = shape.config

  def run(query, compressed, selected, window, gates, offset, lengths):
    held = cache.Cache(
      selected,
      compressed,
      window,
      jax.tree.map(lambda x: x[:, : config.compression_block + 7], selected),
      lengths,
      earliest=jnp.zeros_like(lengths),
    )
    return cache.attend(
      query,
      held,
      gates,
      config=config,
      query_offset=offset,
      return_block_ids=True,
      tiles=None if shape.tiles is None else {"decode": shape.tiles},
      implementation="triton",
    )

  return run


def dense(name: str, shape: Shape) -> Callable[..., Any]:
  """f(query, key, value) -> out, over all keys that a batch row holds."""

  def cudnn(query, key, value):
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      query_seq_lengths=jnp.ones((shape.batch,), jnp.int32),
      key_value_seq_lengths=lengths(shape),
      implementation="cudnn",
    )

  def xla(keys):
    def run(query, key, value):
      q = query.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
      wide = {"preferred_element_type": jnp.float32}
      s = jnp.einsum(f"bkgh,{keys}h->bkgs", q, key, **wide)
      token = jnp.arange(shape.context)
      inside = token < lengths(shape)[:, None, None, None]
      s = jnp.where(inside, s * shape.head_dim**-0.5, -jnp.inf)
      p = jax.nn.softmax(s, axis=-1).astype(value.dtype)
      out = jnp.einsum(f"bkgs,{keys}h->bkgh", p, value, **wide)
      return out.astype(query.dtype).reshape(query.shape)

    return run

  return {"cuDNN": cudnn, "XLA": xla("bsk"), "XLA, heads first": xla("bks")}[
    name
  ]


def steps(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function of `STEPS` steps, each of which depends on the previous one."""

  def run(query, *rest):
    def step(_, query):
      out = jax.tree.leaves(function(query, *rest))[0]
      return query + out * 2**-10

    return jax.lax.fori_loop(0, STEPS, step, query)

  return run


def expected(shape: Shape, x: Inputs, window: KV, ids: Any) -> Any:
  """Out of `xla` in float32 with these ids, and the ids that it selects."""
  wide = jax.tree.map(
    lambda a: a.astype(jnp.float32), x._replace(window=window)[:5]
  )
  op = functools.partial(
    nsa_jax.native_sparse_attention,
    *wide,
    config=shape.config,
    query_offset=shape.context - 1,
    implementation="xla",
  )
  with jax.default_matmul_precision("highest"):
    return op(block_ids=ids), op(return_block_ids=True)[1]


def ring_of(shape: Shape, window: KV) -> KV:
  """The ring of the newest keys and values of a window [B, S, K, H]."""
  newest = shape.context - 1
  rows = jnp.arange(shape.ring)
  position = newest - (newest - rows) % shape.ring
  return KV(*(x[:, position] for x in window))


def heads_first(shape: Shape) -> Any:
  return jax.ShapeDtypeStruct(
    (shape.batch, shape.kv_heads, shape.context, shape.head_dim), shape.dtype
  )


def checked(shape: Shape) -> bool:
  """Whether the numerics are checked; one batch row takes little memory."""
  return shape.batch == 1


def jobs(shape: Shape) -> dict[Any, Any]:
  """The jobs that `measure` runs, by (shape, what)."""
  x = jax.eval_shape(functools.partial(inputs, shape=shape), 0)
  found: dict[Any, Any] = {
    (shape, "inputs"): (functools.partial(inputs, shape=shape), (0,))
  }
  for name in ("NSA", *DENSE):
    pair = x.selected
    if name == "XLA, heads first":
      pair = KV(heads_first(shape), heads_first(shape))
    if name == "NSA":
      function, args = sparse(shape), tuple(x)
    else:
      function, args = dense(name, shape), (x.query, *pair)
    found[shape, name] = function, args
    found[shape, name, "steps"] = steps(function), args
  if checked(shape):
    config = shape.config
    ids = (1, 1, shape.kv_heads, config.num_selected)
    found[shape, "expected"] = (
      functools.partial(expected, shape),
      (x, x.selected, jax.ShapeDtypeStruct(ids, jnp.int32)),
    )
  return found


def wall_ms(function: Callable[..., Any], *args: Any, repeats: int) -> float:
  """Wall time per step of a call of `STEPS` steps, in ms."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return statistics.median(times) * 1e3 / STEPS


def bytes_read(shape: Shape) -> dict[str, int]:
  """Bytes of keys and values that a step must read, by part."""
  config = shape.config
  row = 2 * shape.head_dim * jnp.dtype(shape.dtype).itemsize
  row *= shape.kv_heads * shape.batch
  keys = {
    "compressed": nsa_jax.num_compressed_blocks(shape.context, config),
    "selected": config.num_selected * config.selection_block,
    "window": config.window,
    "dense": shape.context,
  }
  return {name: rows * row for name, rows in keys.items()}


def measure(
  programs: Mapping[Any, Any], shape: Shape, repeats: int
) -> dict[str, Any]:
  """Times by name, or the reason of a failure; bandwidth, kernels, error."""

  def program(*name):
    found = programs[(shape, *name)]
    if isinstance(found, Exception):
      raise found
    return found

  x = program("inputs")(0)
  device = jax.devices()[0].device_kind
  found: dict[str, Any] = {"times": {}, "bandwidth": BANDWIDTH.get(device)}

  def take(name, *args):
    out, ms = harness.device_ms(program(name), *args, repeats=repeats)
    wall = wall_ms(program(name, "steps"), *args, repeats=repeats)
    found["times"][name] = {"kernels": ms, "wall": wall}
    return out

  out, ids = take("NSA", *x)
  if (shape.batch, shape.context) == SHOWN:
    found["kernels"] = harness.kernel_ms(program("NSA"), *x)
  if checked(shape):
    # `expected` takes one set of keys: the ring gets those of `selected`.
    ring = ring_of(shape, x.selected)
    out, ids = program("NSA")(*x._replace(window=ring))
    want, want_ids = program("expected")(x, x.selected, ids)
    found["error"] = {
      "context": shape.context,
      "relative error of out": harness.relative_error(out, want),
      "share of equal ids": float(jnp.mean(ids == want_ids)),
    }
  del out, ids
  outs: dict[str, Any] = {}
  for name in DENSE:
    try:
      pair: Any = x.selected
      if name == "XLA, heads first":
        pair = jax.jit(lambda kv: [jnp.swapaxes(a, 1, 2) for a in kv])(pair)
        x = x._replace(selected=None)
      outs[name] = take(name, x.query, *pair)
    except Exception as error:
      found["times"][name] = f"{type(error).__name__}: {error}"[:200]
  first = next(iter(outs), "")
  for name in outs:
    difference = harness.relative_error(outs[name], outs[first])
    if difference > 0.02:
      found["times"][name] = f"differs from {first} by {difference:.3f}"
  return found


# Tables.


def time_of(found: dict[str, Any], name: str, kind: str) -> float | None:
  times = found["times"].get(name)
  return times[kind] if isinstance(times, dict) else None


def fastest(found: dict[str, Any], kind: str) -> tuple[str, float] | None:
  """Name and time of the fastest dense attention."""
  times = [
    (name, ms)
    for name in DENSE
    if (ms := time_of(found, name, kind)) is not None
  ]
  return min(times, key=lambda item: item[1], default=None)


def row_of(shape: Shape, found: dict[str, Any]) -> dict[str, Any]:
  size = bytes_read(shape)
  sparse_bytes = sum(size.values()) - size["dense"]
  row: dict[str, Any] = {"batch": shape.batch, "context": shape.context}
  for kind in ("kernels", "wall"):
    ms = time_of(found, "NSA", kind)
    row[f"NSA {kind} ms"] = ms
    for name in DENSE:
      row[f"{name} {kind} ms"] = time_of(found, name, kind)
    best = fastest(found, kind)
    row[f"times faster, {kind}"] = best[1] / ms if best and ms else None
  ms = row["NSA kernels ms"]
  row["NSA MiB"] = sparse_bytes / 2**20
  bandwidth = found["bandwidth"]
  if bandwidth:
    best = fastest(found, "kernels")
    least = size["dense"] / bandwidth * 1e3  # ms
    row["of the bandwidth"] = sparse_bytes / (ms * 1e-3) / bandwidth
    row["dense, of the bandwidth"] = least / best[1] if best else None
    # Against dense attention at the full bandwidth.
    row["times faster than the bytes of dense"] = least / ms
  row["limit (bytes)"] = size["dense"] / sparse_bytes
  return row


def tables(measured: Mapping[Shape, dict[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {
    "One step": [row_of(*item) for item in measured.items()]
  }
  for shape, facts in measured.items():
    if "kernels" in facts:
      label = f"Kernels of a step, batch {shape.batch}, {shape.context} tokens"
      found[label] = [
        {"kernel": name[:80], "us": 1e3 * ms}
        for name, ms in facts["kernels"].items()
      ]
  errors = [facts["error"] for facts in measured.values() if "error" in facts]
  if errors:
    found["Against xla in float32, the same blocks"] = errors
  failures = [
    {"what": f"{name}, batch {s.batch}, {s.context} tokens", "reason": reason}
    for s, facts in measured.items()
    for name, reason in facts["times"].items()
    if isinstance(reason, str)
  ]
  if failures:
    found["Did not run"] = failures
  return found


def plot(path, measured: Mapping[Shape, dict[str, Any]]) -> None:
  """Plots time per step and speedup against the context."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.2), constrained_layout=True
  )
  batches = sorted({shape.batch for shape in measured})
  for i, batch in enumerate(batches):
    rows = [
      row_of(*item) | {"dense": fastest(item[1], "kernels")}
      for item in measured.items()
      if item[0].batch == batch
    ]
    contexts = [row["context"] for row in rows]
    style: Any = {"marker": "o", "markersize": 3, "color": f"C{i}"}
    ms = [row["NSA kernels ms"] for row in rows]
    left.loglog(contexts, ms, "-", label=f"NSA, batch {batch}", **style)
    pairs = [(r["context"], r["dense"][1]) for r in rows if r["dense"]]
    if pairs:
      label = f"dense, batch {batch}"
      left.loglog(*zip(*pairs, strict=True), "--", label=label, **style)
    ratios = [
      (r["context"], r["times faster, kernels"])
      for r in rows
      if r["times faster, kernels"]
    ]
    if ratios:
      right.plot(*zip(*ratios, strict=True), label=f"batch {batch}", **style)
  limits = {
    shape.context: row_of(shape, found)["limit (bytes)"]
    for shape, found in measured.items()
  }
  limits = dict(sorted(limits.items()))
  right.plot(*zip(*limits.items(), strict=True), "k:", label="bytes")
  for axes, label in ((left, "ms per step"), (right, "times faster")):
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
  figure.savefig(path, dpi=120)
  plt.close(figure)


# Sweep.

# ((keys, warps, stages), programs per multiprocessor).
COMPRESSED = (
  *itertools.product(((64, 4, 3), (64, 4, 2)), (2, 3, 4, 6)),
  *itertools.product(((128, 4, 3), (128, 8, 3)), (1, 2, 3)),
  *itertools.product(((32, 2, 3), (64, 2, 3)), (2, 3, 4)),
)
# (block_m, (keys, warps, stages), (keys per piece of the selected blocks, keys
# per piece of the window)).
BLOCKS = tuple(
  itertools.product(
    (512, 1024),
    ((64, 4, 3), (64, 4, 2), (32, 4, 3), (64, 8, 3)),
    ((64, 64), (256, 256), (512, 576)),
  )
)
MERGE = (1, 2, 4)
KERNELS = ("compressed", "blocks", "merge")


def default_tiles(shape: Shape) -> DecodeTiling:
  config = shape.config
  return tiling.decode_tiling(
    batch=shape.batch,
    length=1,
    kv_heads=shape.kv_heads,
    group=shape.heads // shape.kv_heads,
    head_dim=shape.head_dim,
    value_dim=shape.head_dim,
    dtype=shape.dtype,
    block=config.selection_block,
    ratio=config.selection_block // config.compression_stride,
    num_compressed=nsa_jax.num_compressed_blocks(shape.context, config),
    num_selected=config.num_selected * config.selection_block,
    num_window=shape.ring,
  )


def candidates(shape: Shape) -> list[DecodeTiling]:
  """Tilings that together contain every candidate of every kernel."""
  base = default_tiles(shape)
  heads = shape.batch * shape.kv_heads
  blocks = nsa_jax.num_compressed_blocks(shape.context, shape.config)
  found = [base]
  for compressed, per_device in COMPRESSED:
    splits = min(132 * per_device // heads, -(-blocks // compressed[0]), 128)
    found.append(
      dataclasses.replace(
        base, compressed=Tile(*compressed), splits=max(1, splits)
      )
    )
  # The second launch also depends on the splits, which stay the default here.
  for (block_m, tile, pieces), merge_warps in zip(
    BLOCKS, itertools.cycle(MERGE), strict=False
  ):
    selected, window = (-(-keys // tile[0]) for keys in pieces)
    found.append(
      dataclasses.replace(
        base,
        block_m=block_m,
        blocks=Tile(*tile),
        selected_steps=selected,
        window_steps=window,
        merge_warps=merge_warps,
      )
    )
  return found


def label(tiles: DecodeTiling, kernel: str) -> str:
  """The fields of a tiling that determine the time of a kernel."""

  def text(tile):
    return f"keys {tile.block_k} warps {tile.num_warps} st {tile.num_stages}"

  selected = tiles.blocks.block_k * tiles.selected_steps
  window = tiles.blocks.block_k * tiles.window_steps
  return {
    "compressed": f"{text(tiles.compressed)} splits {tiles.splits}",
    "blocks": f"{text(tiles.blocks)} pieces of {selected}, {window} "
    f"block_m {tiles.block_m} (splits {tiles.splits} "
    f"keys {tiles.compressed.block_k})",
    "merge": f"warps {tiles.merge_warps} (splits {tiles.splits} "
    f"pieces of {selected}, {window})",
  }[kernel]


def sweep(shapes: Sequence[Shape]) -> dict[str, list[dict[str, Any]]]:
  """Time of every kernel with every tiling, in us."""
  wanted: dict[Any, Any] = {}
  for shape in shapes:
    x = jax.eval_shape(functools.partial(inputs, shape=shape), 0)
    wanted[shape, None] = functools.partial(inputs, shape=shape), (0,)
    for tiles in candidates(shape):
      function = sparse(shape._replace(tiles=tiles))
      wanted[shape, tiles] = function, tuple(x)
  start = time.perf_counter()
  programs = harness.compile_all(wanted)
  seconds = time.perf_counter() - start
  print(f"compiled {len(programs)} programs in {seconds:.0f} s", flush=True)
  found: dict[str, list[dict[str, Any]]] = {}
  for shape in shapes:
    x = programs[shape, None](0)
    best: dict[str, dict[str, Any]] = {kernel: {} for kernel in KERNELS}
    for tiles in candidates(shape):
      program = programs[shape, tiles]
      if isinstance(program, Exception):
        for kernel in ("compressed", "blocks"):
          reason = str(program).splitlines()[0][:60]
          best[kernel].setdefault(label(tiles, kernel), reason)
        continue
      program(*x)
      times = harness.kernel_ms(program, *x)
      for kernel in KERNELS:
        ms = sum(t for k, t in times.items() if f"nsa_decode_{kernel}" in k)
        name = label(tiles, kernel)
        before = best[kernel].get(name, ms)
        best[kernel][name] = min(ms, before, key=harness.rank)
    del x
    default = default_tiles(shape)
    for kernel, times in best.items():
      title = f"batch {shape.batch}, {shape.context} tokens, {kernel}"
      found[title] = [
        {
          "tile": name + " *" * (name == label(default, kernel)),
          "us": 1e3 * ms if isinstance(ms, float) else ms,
        }
        for name, ms in sorted(times.items(), key=lambda x: harness.rank(x[1]))
      ]
  return found


def save(out: pathlib.Path, measured: Mapping[Shape, dict[str, Any]]) -> None:
  title = "Native Sparse Attention, one step of decoding"
  harness.record(out, "decode", title, tables(measured))
  plot(out / "decode.png", measured)


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--batches", type=int, nargs="+", help=f"rows (default: {BATCHES})"
  )
  result.add_argument(
    "--contexts", type=int, nargs="+", help=f"tokens (default: {CONTEXTS})"
  )
  result.add_argument(
    "--sweep", action="store_true", help="time tilings instead, about a minute"
  )
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  sizes = QUICK if args.quick else itertools.product(BATCHES, CONTEXTS)
  if args.batches or args.contexts:
    sizes = itertools.product(
      args.batches or BATCHES, args.contexts or CONTEXTS
    )
  if args.sweep:
    sizes = QUICK if not (args.batches or args.contexts) else sizes
    found = sweep([Shape(*size) for size in sizes])
    title = "Tilings of the decode kernels (*: the default)"
    harness.record(args.out, "sweep_decode", title, found)
    return
  shapes = [Shape(*size) for size in sizes]
  measured: dict[Shape, dict[str, Any]] = {}
  for shape in shapes:
    # Not all at once: XLA autotunes its products on arrays of full size.
    programs = harness.compile_all(jobs(shape))
    measured[shape] = measure(programs, shape, 3 if args.quick else 5)
    print(row_of(shape, measured[shape]), flush=True)
    # An interrupted run keeps its results so far.
    with contextlib.redirect_stdout(io.StringIO()):
      save(args.out, measured)
  print((args.out / "decode.md").read_text())


if __name__ == "__main__":
  main()
