"""Data-parallel training with `jax.pmap`, compared with one device.

    python examples/train_pmap.py

Runs on all accelerators of this machine, or else on eight virtual CPU devices.
The same batch goes through a `jit` step on one device and, split over the
devices, through a `pmap` step; both give the same loss and gradients.
"""

import os
import pathlib

# jax reads this when it creates its CPU client; accelerators ignore it.
if "--xla_force_host_platform_device_count" not in os.environ.get(
  "XLA_FLAGS", ""
):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
  )

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nsa_jax import NSAConfig, TransformerConfig, TransformerLM

AXIS = "batch"
SEQ_LEN = 128
STEPS = 5

PyTree: TypeAlias = Any
Step: TypeAlias = Callable[..., tuple[PyTree, PyTree, jax.Array, PyTree]]

CONFIG = TransformerConfig(
  num_layers=2,
  model_dim=64,
  num_heads=4,
  num_kv_heads=1,
  head_dim=16,
  mlp_dim=128,
  attention="nsa",
  nsa=NSAConfig(
    compression_block=8,
    compression_stride=4,
    selection_block=8,
    num_selected=3,
    num_initial=1,
    num_local=1,
    window=8,
  ),
)


def make_step(
  model: TransformerLM,
  optimizer: optax.GradientTransformation,
  axis_name: str | None = None,
) -> Step:
  """A training step; averages loss and gradients over `axis_name`, if any."""

  def loss_fn(params, windows):  # windows [B, T + 1]
    losses = model.apply(
      {"params": params}, windows[:, :-1], labels=windows[:, 1:]
    )
    return jnp.mean(jnp.asarray(losses))

  def step(params, opt_state, windows):
    loss, grads = jax.value_and_grad(loss_fn)(params, windows)
    if axis_name is not None:
      # The pieces are equal, so this is the mean over the batch.
      loss, grads = jax.lax.pmean((loss, grads), axis_name)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, grads

  return step


def make_batch(step: int, batch_size: int) -> np.ndarray:
  """Windows of the text of this file, int32 [batch_size, SEQ_LEN + 1]."""
  text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8)
  rng = np.random.default_rng(step)
  start = rng.integers(0, len(text) - SEQ_LEN, size=batch_size)
  return text[start[:, None] + np.arange(SEQ_LEN + 1)].astype(np.int32)


def replicate(tree: PyTree, count: int) -> PyTree:
  return jax.tree.map(lambda x: jnp.stack([x] * count), tree)


def largest_difference(one: PyTree, replicated: PyTree) -> float:
  """Largest |a - b| over all leaves and all devices."""
  pairs = jax.tree.map(
    lambda a, b: float(np.abs(np.asarray(b) - np.asarray(a)).max()),
    one,
    replicated,
  )
  return max(jax.tree.leaves(pairs))


def compare(steps: int = STEPS) -> list[tuple[float, float, float, float]]:
  """Trains on one device and on all of them.

  Returns:
    For each step the loss of `jit`, the loss of `pmap`, the largest difference
    between their gradients, and the largest gradient.
  """
  count = jax.local_device_count()
  model, optimizer = TransformerLM(CONFIG), optax.adam(1e-3)
  tokens = jnp.zeros((1, SEQ_LEN), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

  one = (params, optimizer.init(params))
  many = replicate(one, count)
  jit_step = jax.jit(make_step(model, optimizer))
  pmap_step = jax.pmap(make_step(model, optimizer, AXIS), axis_name=AXIS)

  rows = []
  for step in range(steps):
    batch = make_batch(step, count)
    *one, loss, grads = jit_step(*one, batch)
    *many, losses, many_grads = pmap_step(
      *many, batch.reshape(count, -1, SEQ_LEN + 1)
    )
    rows.append(
      (
        float(loss),
        float(losses[0]),
        largest_difference(grads, many_grads),
        max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)),
      )
    )
  return rows


def main() -> None:
  count = jax.local_device_count()
  print(f"{count} x {jax.local_devices()[0].device_kind}")
  print("step  loss (jit, 1)  loss (pmap)  largest gradient  difference")
  for step, (one, many, difference, largest) in enumerate(compare(), start=1):
    print(
      f"{step:4d}  {one:13.6f}  {many:11.6f}  {largest:16.6f}  "
      f"{difference:10.1e}"
    )


if __name__ == "__main__":
  main()
