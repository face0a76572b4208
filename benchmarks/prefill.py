"""A long prompt into the cache on a GPU, in chunks and at once.

    python -m benchmarks.prefill
    python -m benchmarks.prefill --quick

Headline shape: 64 query and 4 key/value heads, H = V = 128, the paper's
configuration, bfloat16, 64k tokens; phi is the mean. A chunk appends its keys
and values to the donated cache and then attends over the cache. Its offset is
static, as in `nsa_jax.generate`, or traced, with one program for all chunks.
Wall time is measured, from the first call until the last result is ready.
"""

import functools
import statistics
import time
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
  implementation: Any = None


class Tokens(NamedTuple):
  """Inputs that a layer computes from tokens."""

  query: Any  # [1, T, N, H]
  compressed: KV  # inputs of phi
  selected: KV
  window: KV
  gates: Any


def tokens(seed: Any, shape: Shape) -> Tokens:
  """Random tokens; call it under `jit`."""
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
    shape: shape of the prompt.
    offset: static offset of the chunk; f then ignores its own.
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
      prefill_window=window,
      implementation=shape.implementation,
    )
    return held, out

  return run


def wall_ms(
  programs: Sequence[Any], parts: Sequence[Tokens], shape: Shape, repeats: int
) -> tuple[Any, float]:
  """Out for the whole prompt, and the median time of all chunks in ms."""
  size = shape.length // len(parts)
  offsets = [jnp.full(1, i * size, jnp.int32) for i in range(len(parts))]
  times = []
  for _ in range(1 + repeats):  # The first one warms up.
    held = jax.block_until_ready((empty(shape), parts, offsets))[0]
    outs = []
    start = time.perf_counter()
    for program, part, offset in zip(programs, parts, offsets, strict=True):
      held, out = program(held, part, offset)
      outs.append(out)
    jax.block_until_ready((held, outs))
    times.append((time.perf_counter() - start) * 1e3)
  return jnp.concatenate(outs, axis=1), statistics.median(times[1:])


def measure(shape: Shape, sizes: Sequence[int], repeats: int) -> Any:
  """Rows of the table: the prompt at once, then in chunks of each size."""
  x = jax.eval_shape(functools.partial(tokens, shape=shape), 0)
  held = jax.eval_shape(functools.partial(empty, shape))
  offset = jax.ShapeDtypeStruct((1,), jnp.int32)

  def wanted(size, start):
    """A jitted step with donated cache, and its arguments."""
    part = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct((1, size, *a.shape[2:]), a.dtype), x
    )
    donating = jax.jit(step(shape, start), donate_argnums=0)
    return donating, (held, part, offset)

  # Start of each chunk, for every row of the table; None if it is traced.
  rows: dict[tuple[int, str], list[int | None]] = {
    (shape.length, "static"): [0]
  }
  for size in sizes:
    rows[size, "static"] = list(range(0, shape.length, size))
    rows[size, "traced"] = [None]
  jobs = {
    (size, start): wanted(size, start)
    for (size, _), starts in rows.items()
    for start in starts
  }
  programs = harness.compile_all(jobs)
  for program in programs.values():
    if isinstance(program, Exception):
      raise program

  given = jax.jit(functools.partial(tokens, shape=shape))(0)
  table: list[dict[str, Any]] = []
  want: Any = None
  for (size, place), starts in rows.items():
    spans = [slice(i, i + size) for i in range(0, shape.length, size)]
    parts = [
      jax.tree.map(lambda a, span=span: a[:, span], given) for span in spans
    ]
    chunks = [programs[size, start] for start in starts]
    chunks *= len(parts) // len(chunks)
    out, ms = wall_ms(chunks, parts, shape, repeats)
    want = out if want is None else want
    whole = table[0]["ms"] if table else ms
    table.append(
      {
        "chunk": size,
        "place": place,
        "ms": ms,
        "over the whole": ms / whole,
        "relative difference of out": harness.relative_error(out, want),
      }
    )
  return table


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  harness.add_implementation(result)
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  harness.require_gpu()
  shape = Shape(implementation=args.implementation)
  rows = measure(shape, (CHUNK,) if args.quick else CHUNKS, 9)
  harness.record(
    args.out,
    harness.named("prefill", args),
    f"A prompt of {shape.length} tokens into the cache, in chunks",
    {"Wall time": rows},
  )


if __name__ == "__main__":
  main()
