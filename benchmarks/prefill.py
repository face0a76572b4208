"""A long prompt into the cache on a GPU, in chunks and at once.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --quick

Headline shape: 64 query and 4 key/value heads, H = V = 128, the paper's
configuration, bfloat16, 64k tokens; phi is the mean. A chunk appends its keys
and values to the cache and attends over what the cache then holds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nsa_jax
from benchmarks import harness
from nsa_jax import KV, cache

LENGTH = 65536
CHUNKS = (4096, 8192, 16384)
CHUNK = 8192  # of `--quick`


class Shape(NamedTuple):
  length: int = LENGTH
  heads: int = 64
  kv_heads: int = 4
  head_dim: int = 128
  config: nsa_jax.NSAConfig = nsa_jax.NSAConfig()
  dtype: Any = jnp.bfloat16
  implementation: Any = "triton"


class Tokens(NamedTuple):
  """What a layer makes of some tokens."""

  query: Any  # [1, T, N, H]
  compressed: KV  # inputs of phi
  selected: KV
  window: KV
  gates: Any


def tokens(seed: Any, shape: Shape) -> Tokens:
  """Random tokens; to be called under `jit`."""
  keys = iter(jax.random.split(jax.random.key(seed), 8))

  def normal(heads, width=shape.head_dim, dtype=shape.dtype):
    size = (1, shape.length, heads, width)
    return jax.random.normal(next(keys), size, dtype)

  def pair():
    return KV(normal(shape.kv_heads), normal(shape.kv_heads))

  gates = jax.nn.sigmoid(normal(shape.heads, 3, jnp.float32))
  return Tokens(normal(shape.heads), pair(), pair(), pair(), gates)


def empty(shape: Shape) -> cache.Cache:
  return cache.init(
    1,
    shape.length,
    config=shape.config,
    num_kv_heads=shape.kv_heads,
    head_dim=shape.head_dim,
    dtype=shape.dtype,
  )


def step(shape: Shape, offset: int | None = None) -> Callable[..., Any]:
  """f(cache, tokens, offset) -> (cache, out) of a chunk.

  Args:
    shape: of the prompt.
    offset: of a chunk whose place is static; the argument is not read then.
  """

  def phi(pair, first):
    del first
    return KV(*(nsa_jax.compress_mean(x, config=shape.config) for x in pair))

  def run(held, new, traced):
    held, window = cache.prefill(
      held,
      config=shape.config,
      compressed=new.compressed,
      selected=new.selected,
      window=new.window,
      compress=phi,
    )
    out = cache.attend(
      new.query,
      held,
      new.gates,
      config=shape.config,
      query_offset=traced if offset is None else offset,
      window=window,
      implementation=shape.implementation,
    )
    return held, out

  return run


def in_chunks(
  program: Callable[..., Any], held: Any, x: Tokens, size: int, repeats: int
) -> tuple[Any, list[float]]:
  """Out of the whole prompt, and the time of every chunk in ms."""
  outs, times = [], []
  for start in range(0, x.query.shape[1], size):
    part = jax.tree.map(lambda a, i=start: a[:, i : i + size], x)
    offset = jnp.full(1, start, jnp.int32)
    (held, out), ms = harness.device_ms(
      program, held, part, offset, repeats=repeats
    )
    outs.append(out)
    times.append(ms)
  return jnp.concatenate(outs, axis=1), times


def measure(shape: Shape, sizes: Sequence[int], repeats: int) -> Any:
  """Rows of the table: the prompt at once, then in chunks of every size."""
  x = jax.eval_shape(functools.partial(tokens, shape=shape), 0)
  held = jax.eval_shape(functools.partial(empty, shape))
  offset = jax.ShapeDtypeStruct((1,), jnp.int32)

  def of_size(size):
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct((1, size, *a.shape[2:]), a.dtype), x
    )

  wanted: dict[Any, Any] = {
    "tokens": (functools.partial(tokens, shape=shape), (0,)),
    "whole": (step(shape, 0), (held, x, offset)),
  }
  for size in sizes:
    wanted[size] = step(shape), (held, of_size(size), offset)
  programs = harness.compile_all(wanted)
  for program in programs.values():
    if isinstance(program, Exception):
      raise program
  given = programs["tokens"](0)
  want, (whole_ms,) = in_chunks(
    programs["whole"], empty(shape), given, shape.length, repeats
  )
  rows = [{"chunk": shape.length, "ms": whole_ms, "over the whole": 1.0}]
  for size in sizes:
    out, times = in_chunks(programs[size], empty(shape), given, size, repeats)
    rows.append(
      {
        "chunk": size,
        "ms": sum(times),
        "over the whole": sum(times) / whole_ms,
        "first chunk ms": times[0],
        "last chunk ms": times[-1],
        "relative difference of out": harness.relative_error(out, want),
      }
    )
  return rows


def parser():
  return harness.arguments(__doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  shape = Shape()
  rows = measure(shape, (CHUNK,) if args.quick else CHUNKS, 3)
  harness.record(
    args.out,
    "prefill",
    f"A prompt of {shape.length} tokens into the cache, in chunks",
    {"Device time": rows},
  )


if __name__ == "__main__":
  main()
