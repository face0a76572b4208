"""From a cold start to the first result on a GPU.

    python -m benchmarks.cold_compile
    python -m benchmarks.cold_compile --quick

Each program starts in a process of its own and finds no compiled programs on
disk. XLA times variants of products and fusions while it compiles; a second
process, in which it does not (`--xla_gpu_autotune_level=0`), shows what that
takes. Programs with NSA stand beside the same programs with full attention.
"init" makes the parameters of a model; with "in kernels", jax draws the random
numbers in kernels of its own, as `examples/lm` does on one GPU.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import nsa_jax
from benchmarks import harness, train_step
from examples.lm import train
from nsa_jax import KV, NSAConfig, TransformerConfig, TransformerLM

LENGTH = 8192
LAYERS = 8
ATTENTIONS = ("nsa", "full")
IN_KERNELS = "init, in kernels"
PROGRAMS = ("op", "init", IN_KERNELS, "step", "step, scanned", "decode")
QUICK = ("op", "step")
NO_AUTOTUNING = "--xla_gpu_autotune_level=0"
SECONDS = ("trace", "lower", "compile", "first call")

Program = tuple[Callable[..., Any], Sequence[Any]]


def op(
  attention: str,
  length: int,
  heads: int = 64,
  kv_heads: int = 4,
  head_dim: int = 128,
  implementation: Any = None,
) -> Program:
  """Forward and backward of one attention, and shapes for it."""
  config = NSAConfig()

  def array(rows: int, heads: int, width: int = head_dim, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, rows, heads, width), dtype)

  def pair(rows: int) -> KV:
    return KV(array(rows, kv_heads), array(rows, kv_heads))

  query = array(length, heads)
  args: tuple[Any, ...]
  if attention == "full":
    function: Any = nsa_jax.full_attention
    args = query, *pair(length)
  else:
    function = functools.partial(
      nsa_jax.native_sparse_attention,
      config=config,
      return_block_ids=True,
      implementation=implementation,
    )
    blocks = nsa_jax.num_compressed_blocks(length, config)
    gates = array(length, heads, 3, jnp.float32)
    args = query, *map(pair, (blocks, length, length)), gates
  return harness.forward_and_backward(function), (args, (), query)


def init(config: TransformerConfig) -> Program:
  """What makes parameters and optimiser state, and the shape of its seed."""
  optimizer = train.make_optimizer(3e-4, 1000)
  start = functools.partial(train_step.init, config=config, optimizer=optimizer)
  return start, (jax.ShapeDtypeStruct((), jnp.int32),)


def step(config: TransformerConfig, length: int) -> Program:
  """A training step, and shapes for it."""
  start, seed = init(config)
  windows = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
  optimizer = train.make_optimizer(3e-4, 1000)
  function = train.make_train_step(TransformerLM(config), optimizer)
  return function, (jax.eval_shape(start, *seed), windows)


def decode(config: TransformerConfig, length: int) -> Program:
  """One step of decoding with a cache of `length` tokens, and shapes for it."""
  model = TransformerLM(config, decode=True)
  start = jax.ShapeDtypeStruct((1, length), jnp.int32)
  variables: Any = jax.eval_shape(model.init, jax.random.key(0), start)

  def run(params: Any, cache: Any, tokens: Any) -> Any:
    return model.apply(
      {"params": params, "cache": cache}, tokens, mutable=["cache"]
    )

  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return run, (variables["params"], variables["cache"], tokens)


def make(name: str, attention: str, length: int, **overrides: Any) -> Program:
  """The program of a row.

  Args:
    name: one of PROGRAMS.
    attention: one of ATTENTIONS.
    length: tokens.
    **overrides: of the op's sizes, or of the model's configuration.
  """
  if name == "op":
    return op(attention, length, **overrides)
  fields: dict[str, Any] = {
    "num_layers": LAYERS,
    "scan_layers": name == "step, scanned",
  }
  config = train_step.configure(attention, **{**fields, **overrides})
  if name in ("init", IN_KERNELS):
    return init(config)
  return (decode if name == "decode" else step)(config, length)


def measure(program: Program) -> dict[str, float]:
  """Seconds of each stage of a first call."""
  function, shapes = program
  # Before the clock starts: the programs that make the arrays are not measured.
  args = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  )()
  jax.block_until_ready(args)
  ends = [time.perf_counter()]

  def end(value: Any) -> Any:
    ends.append(time.perf_counter())
    return value

  traced = end(jax.jit(function).trace(*shapes))
  compiled = end(end(traced.lower()).compile())
  end(jax.block_until_ready(compiled(*args)))
  stages = zip(SECONDS, ends[:-1], ends[1:], strict=True)
  return {name: after - before for name, before, after in stages}


def run_child(
  name: str, attention: str, implementation: str | None, flags: str
) -> dict[str, float]:
  """Measures a program in a process of its own."""
  command = [sys.executable, "-m", "benchmarks.cold_compile"]
  if implementation:
    command.append(f"--implementation={implementation}")
  environment = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    "JAX_THREEFRY_GPU_KERNEL_LOWERING": str(name == IN_KERNELS),
  }
  done = subprocess.run(
    [*command, "--child", name, attention],
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def tables(
  measured: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]],
) -> dict[str, list[dict[str, Any]]]:
  """The tables of the record.

  Args:
    measured: seconds of the stages by (program, attention), with autotuning
      ("default") and without ("no autotuning").
  """
  rows = []
  for (name, attention), kinds in measured.items():
    seconds = kinds["default"]
    total = sum(seconds.values())
    dense = measured[name, "full"]["default"]
    rows.append(
      {
        "program": name,
        "attention": attention,
        **{f"{stage} s": seconds[stage] for stage in SECONDS},
        "total s": total,
        "more than without autotuning": total
        - sum(kinds["no autotuning"].values()),
        "times full attention": total / sum(dense.values()),
      }
    )
  return {"From the call to the first result": rows}


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--child",
    nargs=2,
    metavar=("PROGRAM", "ATTENTION"),
    help="measure one program in this process and print JSON",
  )
  harness.add_implementation(result)
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  if args.child:
    harness.require_gpu()
    name, attention = args.child
    program = make(
      name,
      attention,
      LENGTH,
      # Full attention has none of the kernels.
      implementation=args.implementation if attention == "nsa" else None,
    )
    print(json.dumps(measure(program)))
    return
  # The children need the card: this process must not take its memory.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  harness.require_gpu()
  measured: dict[Any, Any] = {}
  for name in QUICK if args.quick else PROGRAMS:
    for attention in ATTENTIONS:
      measured[name, attention] = {
        kind: run_child(name, attention, args.implementation, flags)
        for kind, flags in (("default", ""), ("no autotuning", NO_AUTOTUNING))
      }
      print(name, attention, measured[name, attention], flush=True)
  harness.record(
    args.out,
    harness.named("cold_compile", args),
    f"Compilation from a cold start, {LENGTH} tokens, {LAYERS} layers",
    tables(measured),
  )


if __name__ == "__main__":
  main()
