"""The whole op on a GPU: time, parts, memory, against dense attention.

    python -m benchmarks.whole_op
    python -m benchmarks.whole_op --quick

Headline shape: 64 query and 4 key/value heads, H = V = 128, the paper's
configuration, bfloat16, batch 1, with gates and separate keys and values for
every branch (others: `--heads 16 --kv-heads 1 --head-dim 64`). In addition, one
row of 1M tokens with 16 query heads and one key/value head; and, once `python
-m benchmarks.trained_ids` has saved them, the blocks of a trained model in
place of the selection.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

import nsa_jax
from benchmarks import harness, trained_ids
from nsa_jax import KV

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
QUICK = (4096, 65536)
CHECKED = 8192  # Largest length at which the numerics are checked.
SHOWN = 65536  # Length at which the parts are drawn and the kernels listed.
# Maximum lengths of the baselines: the longest calls take seconds.
LONGEST = {"cuDNN": 131072, "Triton FA": 65536}
# Calls in a row for wall time; long ones take seconds and vary little.
CALLS, LONG_CALLS = 30, 3
# Speedups in Figure 6 of the paper: A100, over its Triton FlashAttention-2.
PAPER = {
  8192: (2.1, 1.1),
  16384: (3.8, 2.0),
  32768: (6.3, 3.4),
  65536: (9.0, 6.0),
}
BRANCHES = ("compressed", "selected", "window")
CHUNK = 4096

# Milliseconds by (what, "fwd" or "bwd"), and ("whole" or "cuDNN", "wall") for
# wall time of both.
Times = dict[tuple[str, str], float]


class Shape(NamedTuple):
  length: int
  heads: int = 64
  kv_heads: int = 4
  head_dim: int = 128
  config: nsa_jax.NSAConfig = nsa_jax.NSAConfig()
  dtype: Any = jnp.bfloat16
  implementation: Any = None


class Inputs(NamedTuple):
  query: Any
  compressed: KV
  selected: KV
  window: KV
  gates: Any
  dout: Any


def inputs(seed: Any, shape: Shape) -> Inputs:
  """Random inputs and the cotangent of out; call it under `jit`."""
  keys = iter(jax.random.split(jax.random.key(seed), 10))
  blocks = nsa_jax.num_compressed_blocks(shape.length, shape.config)

  def normal(rows, heads, width=shape.head_dim, dtype=shape.dtype):
    # In pieces: the random bits of 2^31 numbers would be the largest array of
    # the benchmark.
    pieces = jax.random.split(next(keys), -(-rows // CHUNK))
    draw = functools.partial(
      jax.random.normal, shape=(min(rows, CHUNK), heads, width), dtype=dtype
    )
    x = jax.lax.map(draw, pieces).reshape(1, -1, heads, width)
    return x[:, :rows]

  def pair(rows):
    return KV(normal(rows, shape.kv_heads), normal(rows, shape.kv_heads))

  return Inputs(
    normal(shape.length, shape.heads),
    pair(blocks),
    pair(shape.length),
    pair(shape.length),
    jax.nn.sigmoid(normal(shape.length, shape.heads, 3, jnp.float32)),
    normal(shape.length, shape.heads),
  )


class Part(NamedTuple):
  """A function of (*primals, *rest) that returns (out, auxiliary result)."""

  function: Callable[..., Any]
  primals: tuple[Any, ...]
  rest: tuple[Any, ...] = ()


def parts(shape: Shape, x: Inputs, lse: Any, ids: Any) -> dict[str, Part]:
  """The op, its parts and the baselines, for arrays or shapes."""
  options: Any = {
    "config": shape.config,
    "implementation": shape.implementation,
  }
  tokens = {**options, "key_length": shape.length}

  def whole(*args):
    return nsa_jax.native_sparse_attention(
      *args, return_block_ids=True, **options
    )

  def compressed(query, pair):
    return nsa_jax.compressed_attention(query, *pair, **tokens)

  def select(query, key, lse):
    return nsa_jax.select_blocks(query, key, lse, **tokens), None

  def selected(query, pair, ids):
    return nsa_jax.selected_attention(
      query, pair.key, pair.value, ids, **options
    )

  def window(query, pair):
    return nsa_jax.window_attention(query, *pair, **options)

  return {
    "whole": Part(
      whole, (x.query, x.compressed, x.selected, x.window, x.gates)
    ),
    "compressed": Part(compressed, (x.query, x.compressed)),
    "scores and top-n": Part(select, (x.query, x.compressed.key), (lse,)),
    "selected": Part(selected, (x.query, x.selected), (ids,)),
    "window": Part(window, (x.query, x.window)),
    "window, cuDNN": Part(
      functools.partial(harness.cudnn, window=shape.config.window),
      (x.query, *x.window),
    ),
    "cuDNN": Part(harness.cudnn, (x.query, *x.selected)),
    "Triton FA": Part(harness.triton_fa, (x.query, *x.selected)),
  }


def expected(shape: Shape, x: Inputs, ids: Any) -> Any:
  """Out and all gradients of `xla` in float32, with the given blocks."""
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), x)

  def op(*args):
    return nsa_jax.native_sparse_attention(
      *args, config=shape.config, block_ids=ids, implementation="xla"
    )

  with jax.default_matmul_precision("highest"):
    out, pullback = jax.vjp(op, *wide[:-1])
    return out, pullback(wide.dout)


def shapes(shape: Shape) -> tuple[Inputs, Any, Any]:
  """Shapes of the inputs, of lse and of the block ids."""
  x = jax.eval_shape(functools.partial(inputs, shape=shape), 0)
  rows = (1, shape.length)
  count = shape.config.num_selected
  return (
    x,
    jax.ShapeDtypeStruct((*rows, shape.heads), jnp.float32),
    jax.ShapeDtypeStruct((*rows, shape.kv_heads, count), jnp.int32),
  )


def jobs(
  shape: Shape,
  *,
  only: Collection[str] | None = None,
  check: bool = False,
  longest: Mapping[str, int] = LONGEST,
) -> dict[tuple[Any, ...], tuple[Callable[..., Any], Sequence[Any]]]:
  """The jobs that `measure` and `long_row` run, by (shape, what, kind).

  Args:
    shape: shape of the call.
    only: names of parts to run in addition to `inputs`; None for all.
    check: also compute the float32 result to compare with.
    longest: maximum length of each baseline.
  """
  x, lse, ids = shapes(shape)
  found: dict[tuple[Any, ...], Any] = {
    (shape, "inputs", "fwd"): (functools.partial(inputs, shape=shape), (0,))
  }
  for name, part in parts(shape, x, lse, ids).items():
    if only is not None and name not in only:
      continue
    if shape.length > longest.get(name, shape.length):
      continue
    args = (*part.primals, *part.rest)
    found[shape, name, "fwd"] = part.function, args
    if name != "scores and top-n":
      both = harness.forward_and_backward(part.function)
      found[shape, name, "both"] = both, (part.primals, part.rest, x.dout)
  if check:
    function = functools.partial(expected, shape)
    found[shape, "expected", "both"] = function, (x, ids)
  return found


class Failures(dict):
  """Reasons of failures, by label."""

  def attempt(self, label: str, function: Callable[[], Any]) -> Any:
    """Calls a function; if it raises, records the reason and returns None."""
    try:
      return function()
    except Exception as error:
      self[label] = str(error).splitlines()[0][:120]
      print(f"{label} did not run: {self[label]}", flush=True)
      return None


def program(programs: Mapping[Any, Any], key: Any) -> Any:
  """A compiled program; raises the error of its compilation, if any."""
  found = programs[key]
  if isinstance(found, Exception):
    raise found
  return found


def time_part(
  programs: Mapping[Any, Any],
  shape: Shape,
  name: str,
  part: Part,
  dout: Any,
  repeats: int,
) -> Times:
  """Device time of a part, forward and backward; wall time of whole calls."""
  # Results are dropped after each call: several of them would fill the card.
  _, fwd = harness.device_ms(
    program(programs, (shape, name, "fwd")),
    *part.primals,
    *part.rest,
    repeats=repeats,
  )
  times = {(name, "fwd"): fwd}
  if (shape, name, "both") in programs:
    _, both = harness.device_ms(
      program(programs, (shape, name, "both")),
      part.primals,
      part.rest,
      dout,
      repeats=repeats,
    )
    times[name, "bwd"] = both - fwd
  if name in ("whole", "cuDNN"):
    times[name, "wall"] = harness.in_a_row_ms(
      program(programs, (shape, name, "both")),
      part.primals,
      part.rest,
      dout,
      calls=CALLS if shape.length < SHOWN else LONG_CALLS,
    )
  return times


def measure(
  programs: Mapping[Any, Any],
  shape: Shape,
  repeats: int,
  failures: Failures,
) -> tuple[Times, dict[str, Any]]:
  """Times at one length; memory; errors and kernels at their lengths."""
  x = program(programs, (shape, "inputs", "fwd"))(0)
  primals = tuple(x[:-1])
  whole_fwd = program(programs, (shape, "whole", "fwd"))
  whole_both = program(programs, (shape, "whole", "both"))
  out, ids = whole_fwd(*primals)
  lse = None
  if (shape, "compressed", "fwd") in programs:
    compressed = program(programs, (shape, "compressed", "fwd"))
    _, lse = compressed(x.query, x.compressed)
  facts: dict[str, Any] = {
    "temporary MiB": {
      "fwd": harness.temporary_mib(whole_fwd),
      "fwd+bwd": harness.temporary_mib(whole_both),
    }
  }
  if (shape, "expected", "both") in programs:
    want = program(programs, (shape, "expected", "both"))(x, ids)
    facts["errors"] = errors(out, whole_both(primals, (), x.dout), *want)
    del want
  del out
  times: Times = {}
  for name, part in parts(shape, x, lse, ids).items():
    if (shape, name, "fwd") not in programs:
      continue
    dense = name in LONGEST
    # The long dense calls take a second and vary by less than a percent.
    count = 1 if dense and shape.length >= SHOWN else repeats
    run = functools.partial(
      time_part, programs, shape, name, part, x.dout, count
    )
    found = failures.attempt(f"{name}, {shape.length}", run) if dense else run()
    times |= found or {}
  if shape.length == SHOWN:
    facts["kernels"] = harness.kernel_ms(whole_both, primals, (), x.dout)
  return times, facts


def given_ids(
  shape: Shape, saved: Mapping[str, Any], repeats: int
) -> list[dict[str, Any]]:
  """Times of the op without its selection, for ids of several origins.

  Args:
    shape: shape of the call.
    saved: ids by name; those that the op selects for random inputs come first.
    repeats: calls per time.
  """

  def op(*args):
    *primals, ids = args
    return nsa_jax.native_sparse_attention(
      *primals,
      block_ids=ids,
      return_block_ids=True,
      config=shape.config,
      implementation=shape.implementation,
    )

  def select(*primals):
    return nsa_jax.native_sparse_attention(
      *primals,
      return_block_ids=True,
      config=shape.config,
      implementation=shape.implementation,
    )[1]

  x = jax.jit(functools.partial(inputs, shape=shape))(0)
  primals = tuple(x[:-1])
  forward = jax.jit(op)
  both = jax.jit(harness.forward_and_backward(op))
  rows = []
  for name, ids in {
    "random inputs": jax.jit(select)(*primals),
    **saved,
  }.items():
    _, fwd = harness.device_ms(forward, *primals, ids, repeats=repeats)
    _, total_ms = harness.device_ms(
      both, primals, (ids,), x.dout, repeats=repeats
    )
    rows.append({"ids": name, "fwd ms": fwd, "bwd ms": total_ms - fwd})
    print(rows[-1], flush=True)
  return rows


def errors(out, gradients, want_out, want_gradients) -> list[dict[str, Any]]:
  """Relative error of out and of every gradient."""
  names = ["dquery"]
  names += [f"d{kind}_{name}" for name in BRANCHES for kind in KV._fields]
  names.append("dgates")
  pairs = zip(
    ["out", *names],
    jax.tree.leaves((out, gradients)),
    jax.tree.leaves((want_out, want_gradients)),
    strict=True,
  )
  return [
    {"array": name, "relative error": harness.relative_error(actual, want)}
    for name, actual, want in pairs
  ]


def long_row(
  programs: Mapping[Any, Any], shape: Shape, peak: Callable[[], float | None]
) -> dict[str, Any]:
  """Time and memory of one long call, which must be the first of the process.

  Args:
    programs: compiled programs by (shape, what, kind).
    shape: shape of the call.
    peak: returns the peak memory since the start of the process, in GiB.
  """
  x = program(programs, (shape, "inputs", "fwd"))(0)
  args = tuple(x[:-1])
  fwd = program(programs, (shape, "whole", "fwd"))
  both = program(programs, (shape, "whole", "both"))
  size = sum(a.nbytes for a in jax.tree.leaves(x))
  _, fwd_ms = harness.device_ms(fwd, *args, repeats=1)
  fwd_peak = peak()
  _, both_ms = harness.device_ms(both, args, (), x.dout, repeats=1)
  return {
    "tokens": shape.length,
    "heads": f"{shape.heads}/{shape.kv_heads}",
    "fwd ms": fwd_ms,
    "bwd ms": both_ms - fwd_ms,
    "inputs GiB": size / 2**30,
    "temporary GiB, fwd": harness.temporary_mib(fwd) / 2**10,
    "temporary GiB, fwd+bwd": harness.temporary_mib(both) / 2**10,
    "peak GiB, fwd": fwd_peak,
    "peak GiB, fwd+bwd": peak(),
  }


def device_peak() -> float | None:
  """Peak memory since the start of the process, in GiB."""
  stats = jax.devices()[0].memory_stats()
  return stats["peak_bytes_in_use"] / 2**30 if stats else None


# Tables.


def keys_read_ratio(length: int, config: nsa_jax.NSAConfig) -> float:
  """Keys that dense attention reads, divided by those of the three branches.

  Means over the queries, as if each had all n selected blocks and a full
  window.
  """
  selected = config.num_selected * config.selection_block
  compressed = length / 2 / config.compression_stride
  return length / 2 / (compressed + selected + config.window)


def ratio(a: float | None, b: float | None) -> float | None:
  return a / b if a is not None and b is not None else None


def total(times: Times, name: str) -> float | None:
  """Forward and backward together."""
  both = (times.get((name, "fwd")), times.get((name, "bwd")))
  return None if None in both else sum(x for x in both if x is not None)


def speedup(times: Times, name: str, kind: str) -> float | None:
  """Time of a baseline over that of the op; a kind of `Times`, or "fwd+bwd"."""
  if kind == "fwd+bwd":
    return ratio(total(times, name), total(times, "whole"))
  return ratio(times.get((name, kind)), times.get(("whole", kind)))


def time_row(length: int, times: Times, facts: dict[str, Any]) -> dict:
  row: dict[str, Any] = {"tokens": length}
  for name, label in (
    ("whole", ""),
    ("cuDNN", "cuDNN dense "),
    ("Triton FA", "Triton FA "),
  ):
    for kind in ("fwd", "bwd"):
      row[f"{label}{kind} ms"] = times.get((name, kind))
    if name != "Triton FA":
      row[f"{label}wall ms, fwd+bwd"] = times.get((name, "wall"))
  for kind in ("fwd", "bwd"):
    ms = times["whole", kind]
    row[f"{kind} ns/token"] = 1e6 * ms / length
  for kind, mib in facts["temporary MiB"].items():
    row[f"temporary MiB, {kind}"] = mib
  return row


def ratio_row(length: int, times: Times, config: nsa_jax.NSAConfig) -> dict:
  row: dict[str, Any] = {"tokens": length}
  for name in LONGEST:
    for kind in ("fwd", "bwd", "fwd+bwd"):
      row[f"{name}, {kind}"] = speedup(times, name, kind)
  ceiling = keys_read_ratio(length, config)
  row["ceiling (keys read)"] = ceiling
  row["of the ceiling, Triton FA fwd"] = ratio(row["Triton FA, fwd"], ceiling)
  for i, kind in enumerate(("fwd", "bwd")):
    paper = PAPER[length][i] if length in PAPER else None
    row[f"paper, {kind}"] = paper
    row[f"of the paper, {kind}"] = ratio(row[f"Triton FA, {kind}"], paper)
  return row


def has_parts(times: Times) -> bool:
  return ("compressed", "fwd") in times


def part_row(length: int, times: Times) -> dict:
  """Parts timed alone; the rest is the difference to the whole op."""
  row: dict[str, Any] = {"tokens": length}
  for kind in ("fwd", "bwd"):
    rest = times["whole", kind]
    for name in ("compressed", "scores and top-n", "selected", "window"):
      if (name, kind) in times:
        row[f"{name} {kind}"] = times[name, kind]
        rest -= times[name, kind]
    row[f"gates and the rest {kind}"] = rest
    row[f"whole {kind}"] = times["whole", kind]
  return row


def window_row(length: int, times: Times) -> dict:
  """Times of the window by these kernels and by cuDNN."""
  row: dict[str, Any] = {"tokens": length}
  for name, label in (("window", "kernels"), ("window, cuDNN", "cuDNN")):
    for kind in ("fwd", "bwd"):
      row[f"{label} {kind}"] = times.get((name, kind))
    row[f"{label} fwd+bwd"] = total(times, name)
  return row


def break_even(
  lengths: Sequence[int], ratios: Sequence[float | None]
) -> float | str:
  """Length from which the op is faster, interpolated log-log."""
  points = [
    (t, r) for t, r in zip(lengths, ratios, strict=True) if r is not None
  ]
  if not points:
    return "not measured"
  slower = [i for i, (_, r) in enumerate(points) if r < 1]
  if not slower:
    return f"below {points[0][0]}"
  if slower[-1] == len(points) - 1:
    return f"above {points[-1][0]}"
  (t0, r0), (t1, r1) = points[slower[-1]], points[slower[-1] + 1]
  share = -math.log(r0) / (math.log(r1) - math.log(r0))
  return round(t0 * (t1 / t0) ** share)


def tables(
  measured: Mapping[int, tuple[Times, dict[str, Any]]],
  config: nsa_jax.NSAConfig,
  long: dict[str, Any] | None = None,
  failures: Mapping[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """All tables; lengths must be in ascending order."""
  found: dict[str, list[dict[str, Any]]] = {
    "Time": [time_row(n, *both) for n, both in measured.items()],
    "Times faster than dense attention": [
      ratio_row(n, times, config) for n, (times, _) in measured.items()
    ],
    "Break-even length, tokens": [
      {
        "against": name,
        **{
          kind: break_even(
            tuple(measured),
            [speedup(times, name, kind) for times, _ in measured.values()],
          )
          for kind in ("fwd", "bwd", "fwd+bwd", "wall")
        },
      }
      for name in LONGEST
    ],
    "Parts, ms (timed alone)": [
      part_row(n, times)
      for n, (times, _) in measured.items()
      if has_parts(times)
    ],
    "The window, ms": [
      window_row(n, times)
      for n, (times, _) in measured.items()
      if has_parts(times)
    ],
  }
  for length, (_, facts) in measured.items():
    if "kernels" in facts:
      every = sum(facts["kernels"].values())
      found[f"Kernels of fwd+bwd at {length} tokens"] = [
        {"kernel": name[:80], "ms": ms, "share": f"{ms / every:.1%}"}
        for name, ms in list(facts["kernels"].items())[:20]
      ]
    if "errors" in facts:
      label = f"Against xla in float32, {length} tokens, the same blocks"
      found[label] = facts["errors"]
  if long is not None:
    found["A long sequence"] = [long]
  if failures:
    found["Did not run"] = [
      {"what": name, "reason": reason} for name, reason in failures.items()
    ]
  return found


def plot(path, measured: Mapping[int, tuple[Times, dict[str, Any]]]) -> None:
  """Plots time against length, and the parts at one length."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.2), constrained_layout=True
  )
  for name, label, colour in (
    ("whole", "NSA (this op)", "#d1702f"),
    ("cuDNN", "cuDNN dense", "#4878a8"),
    ("Triton FA", "Pallas Triton FlashAttention", "#777777"),
  ):
    for kind, style in (("fwd", "-"), ("bwd", "--")):
      points = [
        (n, times[name, kind])
        for n, (times, _) in measured.items()
        if (name, kind) in times
      ]
      if points:
        left.loglog(
          *zip(*points, strict=True),
          style,
          marker="o",
          markersize=3,
          color=colour,
          label=f"{label}, {kind}",
        )
  left.set_xscale("log", base=2)
  left.set_xlabel("tokens")
  left.set_ylabel("ms")
  left.grid(alpha=0.3)
  left.legend(fontsize=7)

  with_parts = [n for n, (times, _) in measured.items() if has_parts(times)]
  length = SHOWN if SHOWN in with_parts else max(with_parts)
  row = part_row(length, measured[length][0])
  names = [*dict.fromkeys(k.rsplit(" ", 1)[0] for k in row if k != "tokens")]
  names.remove("whole")
  start = {"fwd": 0.0, "bwd": 0.0}
  for i, name in enumerate(names):
    kinds = [kind for kind in start if f"{name} {kind}" in row]
    # Parts alone may take a little more time than within the whole op.
    widths = [max(0.0, row[f"{name} {kind}"]) for kind in kinds]
    lefts = [start[kind] for kind in kinds]
    right.barh(kinds, widths, left=lefts, color=f"C{i}", label=name)
    for kind, width in zip(kinds, widths, strict=True):
      middle = start[kind] + width / 2
      if width > 0.04 * row["whole bwd"]:
        right.text(middle, kind, f"{width:.1f}", ha="center", va="center")
      start[kind] += width
  right.invert_yaxis()
  right.set_xlabel("ms")
  right.set_title(f"parts at {length} tokens", fontsize="medium")
  right.legend(fontsize=7)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--lengths",
    type=int,
    nargs="+",
    help=f"tokens (default: {' '.join(map(str, LENGTHS))})",
  )
  for name in ("heads", "kv_heads", "head_dim"):
    default = Shape._field_defaults[name]
    result.add_argument(
      f"--{name.replace('_', '-')}",
      type=int,
      default=default,
      help=f"(default: {default})",
    )
  result.add_argument(
    "--parts",
    type=int,
    nargs="+",
    help="those of the lengths at which the parts are timed too, half of the "
    "compilation (default: all; the last with --quick)",
  )
  result.add_argument(
    "--ids",
    type=pathlib.Path,
    default=harness.TRAINED_IDS,
    help="file that benchmarks.trained_ids has saved (default: "
    f"{harness.TRAINED_IDS})",
  )
  result.add_argument(
    "--long",
    type=int,
    default=2**20,
    help="tokens of the long sequence, 0 for none (default: 1048576; none "
    "with --quick or other heads)",
  )
  harness.add_implementation(result)
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  lengths = sorted(args.lengths or (QUICK if args.quick else LENGTHS))
  sizes = args.heads, args.kv_heads, args.head_dim
  shape = Shape(0, *sizes, implementation=args.implementation)
  every = [shape._replace(length=length) for length in lengths]
  in_parts = args.parts or (lengths[-1:] if args.quick else lengths)
  if not set(in_parts) & set(lengths):
    raise SystemExit(f"--parts {in_parts} must be among {lengths}")
  failures = Failures()
  wanted: dict[Any, Any] = {}
  long = None
  headline = sizes == Shape(0)[1:4]
  if args.long and headline and not args.quick:
    long = shape._replace(length=args.long, heads=16, kv_heads=1)
    wanted |= jobs(long, only=("whole",))
  for shape in every:
    only = None if shape.length in in_parts else ("whole", *LONGEST)
    # At the shortest length: `xla` is slow.
    check = shape.length == lengths[0] <= CHECKED
    wanted |= jobs(shape, only=only, check=check)
  programs = harness.compile_all(wanted)
  print(f"compiled {len(programs)} programs", flush=True)
  row = None
  if long is not None:
    # First, so that the peak of the process is that of this call.
    run = functools.partial(long_row, programs, long, device_peak)
    row = failures.attempt(f"whole, {long.length}", run)
    print(row, flush=True)
  measured: dict[int, tuple[Times, dict[str, Any]]] = {}
  for shape in every:
    found = measure(programs, shape, 3 if args.quick else 5, failures)
    measured[shape.length] = found
    print(time_row(shape.length, *found), flush=True)
  found_tables = tables(measured, Shape(0).config, row, failures)
  for shape in every:
    if saved := trained_ids.load(args.ids, shape.length, shape.kv_heads):
      found_tables[f"{shape.length} tokens, given ids, no selection"] = (
        given_ids(shape, saved, 3 if args.quick else 5)
      )
  record = "whole_op"
  if not headline:
    record += f"_{args.heads}_{args.kv_heads}_{args.head_dim}"
  record = harness.named(record, args)
  harness.record(
    args.out,
    record,
    "Native Sparse Attention, the whole op, {} and {} heads of {}".format(
      *sizes
    ),
    found_tables,
  )
  plot(args.out / f"{record}.png", measured)


if __name__ == "__main__":
  main()
