"""One training step of a 16-layer model on a GPU: where the time goes.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --quick

The `base` preset, one row of 32k tokens, bfloat16, AdamW, without `remat`;
compared with the same model with full attention by cuDNN. The tokens are text,
and random ones beside it: the gradient of the embedding depends on how often a
token occurs.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks import harness
from examples.lm import data, train
from examples.lm.devices import draw_in_kernels
from nsa_jax import TransformerConfig, TransformerLM
from nsa_jax.layers.linen import CompressBlocks
from nsa_jax.models.embedding import embed

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTH = 32768
ATTENTIONS = ("nsa", "full")
STEPS = 5  # In wall time.
# Kinds of kernels by the kernel's name; the first match counts.
NAMED = (
  ("NSA: compressed", r"nsa_compressed"),
  ("NSA: window", r"nsa_window"),
  ("NSA: scores and top-n", r"nsa_(block_scores|top_n)"),
  ("NSA: selected", r"nsa_(selected|sum_pieces)"),
  ("sorts (NSA: selected, embedding)", r"radix_?sort|\bcub\b|^sort"),
  ("NSA: other kernels", r"nsa_"),
  ("full attention (cuDNN)", r"cudnn|sdpa|flash|fmha"),
)
PRODUCTS = r"gemm|nvjet|cutlass|cublas|split_?k|xmma"
# Kinds of all others by the operation that they come from; first match.
OPERATIONS = (
  ("attention: RoPE, gates, layout", r"/attention/"),
  ("scan over layers: residuals", r"/jit\(dynamic_(update_)?index_in_dim\)"),
  ("embedding", r"/embed\b"),
  ("loss", r"\btoken_losses\b"),
  ("norms, SwiGLU", r"jvp\("),
  ("optimiser", r"jit\(train_step\)/"),
)
PHI = "phi (fused kernels)"


def configure(attention: str, **overrides: Any) -> TransformerConfig:
  fields = {
    "attention": attention,
    "dtype": jnp.bfloat16,
  }
  return TransformerConfig.preset("base", **{**fields, **overrides})


def init(seed: Any, config: TransformerConfig, optimizer: Any) -> Any:
  """Parameters and optimiser state; call it under `jit`."""
  # Parameters depend neither on the implementation nor on the length.
  model = TransformerLM(dataclasses.replace(config, implementation="xla"))
  tokens = jnp.zeros((1, config.nsa.selection_block), jnp.int32)
  params = model.init(jax.random.key(seed), tokens)["params"]
  return {"params": params, "opt_state": optimizer.init(params)}


def jobs(
  configs: Mapping[str, TransformerConfig], length: int, rows: int = 1
) -> dict[tuple[str, str], Any]:
  """Programs to compile, by (model, what)."""
  optimizer = train.make_optimizer(3e-4, 1000)
  windows = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
  found: dict[tuple[str, str], Any] = {}
  for name, config in configs.items():
    start = functools.partial(init, config=config, optimizer=optimizer)
    step = train.make_train_step(TransformerLM(config), optimizer)
    found[name, "init"] = start, (0,)
    found[name, "step"] = step, (jax.eval_shape(start, 0), windows)
  config = configs["nsa"]
  found["nsa", "phi"] = phi_job(config, length, rows)
  found["nsa", "embedding"] = embedding_job(config, length, rows)
  return found


def embedding_job(config: TransformerConfig, length: int, rows: int) -> Any:
  """The lookup and its gradient; shapes of table, cotangent and tokens."""
  widths = config.vocab_size, config.model_dim
  table = jax.ShapeDtypeStruct(widths, config.param_dtype)
  out = jax.ShapeDtypeStruct((rows, length, widths[1]), config.dtype)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

  def run(table, dout, tokens):
    out, pullback = jax.vjp(lambda x: embed(x, tokens, config.dtype), table)
    return out, pullback(dout)

  return run, (table, out, tokens)


def phi_job(config: TransformerConfig, length: int, rows: int) -> Any:
  """phi of one layer's keys and values, forward and backward; its shapes."""
  phi = CompressBlocks(config.compression, config.nsa, config.param_dtype)
  value_dim = config.value_head_dim or config.head_dim
  shapes = [
    jax.ShapeDtypeStruct(
      (rows, length, config.num_kv_heads, width), config.dtype
    )
    for width in (config.head_dim, value_dim)
  ]
  params = [jax.eval_shape(phi.init, jax.random.key(0), x) for x in shapes]
  outs: Any = [
    jax.eval_shape(phi.apply, p, x) for p, x in zip(params, shapes, strict=True)
  ]

  def run(params, xs, douts):
    def both(params, xs):
      return [phi.apply(p, x) for p, x in zip(params, xs, strict=True)]

    return jax.vjp(both, params, xs)[1](douts)

  return run, (params, shapes, outs)


def noise(seed: int, shapes: Any) -> Any:
  """Small random arrays of the given shapes."""
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  draw = [
    0.1 * jax.random.normal(key, x.shape, x.dtype)
    for key, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, draw)


# Kinds of kernels.


def operations(hlo: str) -> dict[str, str]:
  """The operation that each instruction of a compiled program comes from.

  Args:
    hlo: `compiled.as_text()`.

  Returns:
    The `op_name` of each instruction, by the name of its kernel.
  """
  found: dict[str, str] = {}
  roots: dict[str, str] = {}  # `op_name` of each fused computation
  unnamed: dict[str, str] = {}
  inside = ""
  for line in hlo.splitlines():
    if line.endswith("{") and (
      start := re.match(r"(?:ENTRY )?%?([\w.-]+)", line)
    ):
      inside = start[1]
    instruction = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not instruction:
      continue
    name = re.sub(r"[^\w]", "_", instruction[2])
    if op := re.search(r'op_name="([^"]*)"', line):
      found[name] = op[1]
      # The root comes last; without an `op_name`, an earlier one stays.
      roots[inside] = op[1]
    elif calls := re.search(r"calls=%?([\w.-]+)", line):
      unnamed[name] = calls[1]
  for name, computation in unnamed.items():
    if computation in roots:
      found[name] = roots[computation]
  return found


def kind_of(kernel: str, comes_from: Mapping[str, str]) -> str:
  """The row of the profile that a kernel belongs to."""
  for kind, pattern in NAMED:
    if re.search(pattern, kernel, re.IGNORECASE):
      return kind
  operation = comes_from.get(kernel, "")
  if "/compress_" in operation:
    return PHI
  if re.search(PRODUCTS, kernel, re.IGNORECASE):
    return "matrix products"
  for kind, pattern in OPERATIONS:
    if re.search(pattern, operation):
      return kind
  return "rest"


def by_kind(
  kernels: Mapping[str, float], comes_from: Mapping[str, str]
) -> dict[str, float]:
  """Milliseconds per kind, largest first."""
  total: dict[str, float] = {}
  for kernel, ms in kernels.items():
    kind = kind_of(kernel, comes_from)
    total[kind] = total.get(kind, 0.0) + ms
  return dict(sorted(total.items(), key=lambda item: -item[1]))


# Measuring.


def clock_ms(step: Any, state: Any, windows: Any, steps: int = STEPS) -> float:
  """Wall time per step; each step takes the result of the previous one."""
  state, loss = step(state, windows)
  jax.block_until_ready(loss)
  started = time.perf_counter()
  for _ in range(steps):
    state, loss = step(state, windows)
  jax.block_until_ready((state, loss))
  return 1e3 * (time.perf_counter() - started) / steps


def memory_gib(program: Any) -> dict[str, float]:
  memory = program.memory_analysis()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "results": memory.output_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
  }
  found = {f"{name} GiB": size / 2**30 for name, size in sizes.items()}
  donated = memory.alias_size_in_bytes / 2**30  # results in arguments' place
  return found | {"peak GiB": sum(found.values()) - donated}


def measure(
  programs: Mapping[Any, Any], name: str, tokens: str, windows: Any
) -> Any:
  """Facts of one model's step, times of its kernels, and their origins."""
  step = programs[name, "step"]
  state = programs[name, "init"](0)
  text = step.as_text()
  if name == "full" and "cudnn" not in text:
    raise RuntimeError("full attention did not go through cuDNN")
  _, loss = step(state, windows)
  ms = clock_ms(step, state, windows)
  kernels = harness.kernel_ms(step, state, windows)
  facts = {
    "attention": name,
    "tokens": tokens,
    "step ms (clock)": ms,
    "step ms (kernels)": sum(kernels.values()),
    "tokens/s": 1e3 * len(windows) * (windows.shape[1] - 1) / ms,
    **memory_gib(step),
    "loss": float(loss),
  }
  return facts, kernels, operations(text)


def tables(
  measured: Mapping[str, Any],
  alone: Mapping[str, tuple[float, int]],
  random: Sequence[Mapping[str, Any]] = (),
) -> dict[str, list[dict[str, Any]]]:
  """The tables of the record.

  Args:
    measured: (facts, kernels, origins) by model, on text.
    alone: ms of a part that was timed alone, forward and backward, and how
      many of it a step has.
    random: facts by model on random tokens, in the same order.
  """
  kinds = {name: by_kind(*rest) for name, (_, *rest) in measured.items()}
  rows = []
  for kind in dict.fromkeys(k for found in kinds.values() for k in found):
    row: dict[str, Any] = {"kind": kind}
    for name, found in kinds.items():
      ms = found.get(kind)
      row[f"{name} ms"] = ms
      row[f"{name} share"] = ms and f"{ms / sum(found.values()):.1%}"
    rows.append(row)
  _, kernels, origins = measured["nsa"]
  step_ms = sum(kernels.values())
  steps: list[dict[str, Any]] = []
  for facts in ([facts for facts, _, _ in measured.values()], random):
    steps += [
      {**row, "nsa is faster by": facts[0]["tokens/s"] / row["tokens/s"]}
      for row in facts
    ]
  return {
    "One step": steps,
    "Where the time goes": rows,
    "Parts timed alone, forward and backward": [
      {
        "part": name,
        "ms": ms,
        "in a step": count,
        "share of the nsa step": f"{count * ms / step_ms:.1%}",
      }
      for name, (ms, count) in alone.items()
    ],
    "Largest kernels of the nsa step": [
      {
        "kernel": kernel[:70],
        "kind": kind_of(kernel, origins),
        "ms": ms,
        "from": origins.get(kernel, "")[-90:].replace("|", "/"),
      }
      for kernel, ms in list(kernels.items())[:40]
    ],
  }


def plot(path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
  """Plots a stacked bar per model."""
  figure, axis = plt.subplots(figsize=(10, 3.6), constrained_layout=True)
  start = dict.fromkeys(names, 0.0)
  colours = plt.get_cmap("tab20")
  for i, row in enumerate(rows):
    widths = [row[f"{name} ms"] or 0.0 for name in names]
    lefts = list(start.values())
    axis.barh(
      names, widths, left=lefts, color=colours(i % 20), label=row["kind"]
    )
    for name, width in zip(names, widths, strict=True):
      start[name] += width
  axis.invert_yaxis()
  axis.set_xlabel("ms of kernels in one step")
  axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--length", type=int, default=LENGTH, help=f"tokens (default: {LENGTH})"
  )
  result.add_argument(
    "--rows", type=int, default=1, help="rows of a batch (default: 1)"
  )
  result.add_argument("--layers", type=int, help="default: 16, with --quick 4")
  result.add_argument(
    "--vocab-size",
    type=int,
    default=256,
    help="more than the 256 bytes: tokens are pairs of bytes (default: 256)",
  )
  result.add_argument(
    "--scan", action="store_true", help="layers in a scan: compiles faster"
  )
  harness.add_implementation(result)
  return result


def pairs_of_bytes(text: Any, vocab_size: int) -> Any:
  """A token for each byte of [B, T] and the next one, as frequent as in text.

  ASCII pairs are different tokens if the vocabulary has 2^15.
  """
  return (text * 256 + np.roll(text, -1, axis=1)) % vocab_size


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  layers = args.layers or (4 if args.quick else 16)
  configs = {
    name: configure(
      name,
      num_layers=layers,
      scan_layers=args.scan,
      vocab_size=args.vocab_size,
      # Full attention has none of the kernels.
      implementation=args.implementation if name == "nsa" else None,
    )
    for name in ATTENTIONS
  }
  wanted = jobs(configs, args.length, args.rows)
  with draw_in_kernels():
    programs = harness.compile_all(wanted)
  for program in programs.values():
    if isinstance(program, Exception):
      raise program
  print(f"compiled {len(programs)} programs", flush=True)
  corpus = data.load_corpus(None, 2**26, args.length)
  text = data.training_batch(
    corpus.train, seed=0, step=0, batch_size=args.rows, seq_len=args.length
  )
  if args.vocab_size > 256:
    text = pairs_of_bytes(text, args.vocab_size)
  noise_tokens = jax.random.randint(
    jax.random.key(1), text.shape, 0, args.vocab_size
  )
  measured, random = {}, []
  for name in ATTENTIONS:
    measured[name] = measure(programs, name, "text", text)
    random.append(measure(programs, name, "random", noise_tokens)[0])
    print(measured[name][0], random[-1], flush=True)
  alone = {}
  table, out, _ = wanted["nsa", "embedding"][1]
  tokens = jnp.asarray(text[:, :-1], jnp.int32)
  for name, count, values in (
    ("phi", layers, noise(2, wanted["nsa", "phi"][1])),
    ("embedding", 1, (*noise(2, (table, out)), tokens)),
  ):
    ms = sum(harness.kernel_ms(programs["nsa", name], *values).values())
    alone[name] = ms, count
  found = tables(measured, alone, random)
  record = "train_step"
  if (args.rows, args.length) != (1, LENGTH):
    record += f"_{args.rows}x{args.length}"
  if args.vocab_size > 256:
    record += f"_vocab_{args.vocab_size}"
  record += "_scan" * args.scan
  record = harness.named(record, args)
  harness.record(
    args.out,
    record,
    f"One training step, {layers} layers of the base preset, {args.rows} x "
    f"{args.length} tokens",
    found,
  )
  plot(args.out / f"{record}.png", found["Where the time goes"], ATTENTIONS)


if __name__ == "__main__":
  main()
