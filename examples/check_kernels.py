"""Compares all implementations with the oracle, forward and backward.

    python examples/check_kernels.py

On an NVIDIA GPU the kernels are compiled; elsewhere those of Triton are
interpreted, which is slow but gives the same results up to rounding. Those of
Mosaic GPU are for Hopper cards and compute in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp

import nsa_jax

config = nsa_jax.NSAConfig(32, 16, 64, num_selected=3, window=64)
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (1, 300, 16, 64))  # 16 query heads
key, value = jax.random.normal(keys[1], (2, 1, 300, 1, 64))  # one for them all

NAMES = ("out", "dq", "dk", "dv")
DTYPES = {"xla": "float32", "triton": "float32", "mosaic_gpu": "bfloat16"}


@jax.jit
def select(query, key):
  """Selects the blocks that each query reads, with mean compression."""
  blocks = nsa_jax.compress_mean(key, config=config)
  call = {"config": config, "key_length": key.shape[1]}
  _, lse = nsa_jax.compressed_attention(query, blocks, blocks, **call)
  return nsa_jax.select_blocks(query, blocks, lse, **call)


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, query, key, value, ids):
  """Output of the selected branch, and gradients of the sum of its squares."""

  def loss(query, key, value):
    out, _ = nsa_jax.selected_attention(
      query, key, value, ids, config=config, implementation=implementation
    )
    out = out.astype(jnp.float32)
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
  for implementation, dtype in DTYPES.items():
    arrays = [x.astype(dtype) for x in (query, key, value)]
    try:
      actual = run(implementation, *arrays, ids)
    except NotImplementedError as error:
      print(f"{implementation}: {error}")
      continue
    differences = zip(NAMES, actual, expected, strict=True)
    print(
      f"{implementation} in {dtype}: "
      + ", ".join(f"{name} {relative(x, y):.1e}" for name, x, y in differences)
    )


if __name__ == "__main__":
  main()
