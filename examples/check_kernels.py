"""Compares the Triton kernels with the oracle, forward and backward.

    python examples/check_kernels.py

On an NVIDIA GPU the kernels are compiled; elsewhere they are interpreted, which
is slow but gives the same results up to rounding.
"""

import functools

import jax
import jax.numpy as jnp

import nsa_jax

config = nsa_jax.NSAConfig(16, 16, 16, num_selected=4, window=16)
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (1, 96, 16, 32))  # 16 query heads
key, value = jax.random.normal(keys[1], (2, 1, 96, 1, 32))  # one for them all

NAMES = ("out", "dq", "dk", "dv")


@jax.jit
def select(query, key):
  """Selects the blocks that each query reads, with mean compression."""
  blocks = nsa_jax.compress_mean(key, config=config)
  _, lse = nsa_jax.compressed_attention(
    query, blocks, blocks, config=config, key_length=96
  )
  return nsa_jax.select_blocks(query, blocks, lse, config=config, key_length=96)


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, query, key, value, ids):
  """Output of the selected branch, and gradients of the sum of its squares."""

  def loss(query, key, value):
    out, _ = nsa_jax.selected_attention(
      query, key, value, ids, config=config, implementation=implementation
    )
    return jnp.square(out).sum(), out

  grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
    query, key, value
  )
  return out, *grads


def relative(x, want):
  return float(jnp.linalg.norm(x - want) / jnp.linalg.norm(want))


def main():
  ids = select(query, key)
  expected = run("reference", query, key, value, ids)
  print(f"{jax.devices()[0].device_kind}: relative difference to the oracle")
  for implementation in ("xla", "triton"):
    actual = run(implementation, query, key, value, ids)
    print(
      f"{implementation:8}"
      + "  ".join(
        f"{name} {relative(x, want):.1e}"
        for name, x, want in zip(NAMES, actual, expected, strict=True)
      )
    )


if __name__ == "__main__":
  main()
