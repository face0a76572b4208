"""Time and memory of `xla` and of the oracle, on the default device.

Prints a table and the largest difference between their results.

    python -m benchmarks.xla_vs_reference
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import nsa_jax

IMPLEMENTATIONS = ("reference", "xla")


def inputs(args):
  keys = jax.random.split(jax.random.key(0), 8)
  heads = (1, args.length, args.heads, args.head_dim)
  kv_heads = (1, args.length, args.kv_heads, args.head_dim)
  query = jax.random.normal(keys[0], heads)
  pairs = [
    nsa_jax.KV(*jax.random.normal(key, (2, *kv_heads))) for key in keys[1:4]
  ]
  gates = jax.nn.sigmoid(jax.random.normal(keys[4], (*heads[:3], 3)))
  return query, *pairs, gates


def functions(implementation):
  config = nsa_jax.NSAConfig()

  def forward(query, compressed, selected, window, gates):
    blocks = jax.tree.map(
      lambda x: nsa_jax.compress_mean(x, config=config), compressed
    )
    return nsa_jax.native_sparse_attention(
      query,
      blocks,
      selected,
      window,
      gates,
      config=config,
      implementation=implementation,
    )

  def loss(*args):
    return jnp.square(forward(*args)).mean()

  return {"fwd": forward, "fwd+bwd": jax.grad(loss, argnums=(0, 1, 2, 3, 4))}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--length", type=int, default=4096, help="tokens")
  parser.add_argument("--heads", type=int, default=8, help="query heads")
  parser.add_argument("--kv-heads", type=int, default=2)
  parser.add_argument("--head-dim", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  data = inputs(args)
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}; T={args.length} "
    f"N={args.heads} K={args.kv_heads} H={args.head_dim} float32"
  )
  print(f"{'':10}{'implementation':16}{'seconds':>9}{'temporary MiB':>15}")
  results = {}
  for kind in ("fwd", "fwd+bwd"):
    for name in IMPLEMENTATIONS:
      compiled = jax.jit(functions(name)[kind]).lower(*data).compile()
      results[kind, name] = jax.block_until_ready(compiled(*data))
      times = []
      for _ in range(args.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*data))
        times.append(time.perf_counter() - start)
      analysis = compiled.memory_analysis()
      assert analysis is not None
      memory = analysis.temp_size_in_bytes / 2**20
      print(
        f"{kind:10}{name:16}{statistics.median(times):9.3f}{memory:15.0f}",
        flush=True,
      )
    apart = jax.tree.map(
      lambda x, y: jnp.abs(x - y).max(),
      *(results[kind, name] for name in IMPLEMENTATIONS),
    )
    print(f"{kind:10}largest difference {max(jax.tree.leaves(apart)):.1e}")


if __name__ == "__main__":
  main()
