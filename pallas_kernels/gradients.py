"""What backward passes compute beside their kernels."""

import jax
import jax.numpy as jnp


def delta_of(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
  """sum(dout * out) - dlse, float32 [B, T, N].

  The gradient of a score is its probability times (dp - delta).

  Args:
    out: [B, T, N, V].
    dout: [B, T, N, V], cotangent of `out`.
    dlse: [B, T, N], cotangent of the lse.
  """
  products = dout.astype(jnp.float32) * out.astype(jnp.float32)
  return jnp.sum(products, axis=-1) - dlse


def keep_finite(delta: jax.Array, lse: jax.Array) -> jax.Array:
  """`delta` of a backward pass, 0 for queries whose lse is NaN.

  Their probabilities are NaN for what they read and 0 for other keys, which get
  0 * delta.
  """
  return jnp.where(lse == lse, delta, 0)


def gradient_of(
  sums: jax.Array, like: jax.Array, scale: float = 1.0
) -> jax.Array:
  """The gradient of keys or values from what the kernels have summed.

  Args:
    sums: float32 [shares, B K, S or more, H], of shares of the queries.
    like: the keys or values, [B, S, K, H].
    scale: of the gradient.
  """
  batch, length, heads, _ = like.shape
  x = sum_splits(sums)[:, :length] * scale
  x = jnp.swapaxes(x.reshape(batch, heads, *x.shape[1:]), 1, 2)
  return x.astype(like.dtype)


def sum_splits(x: jax.Array) -> jax.Array:
  """Sum over the first axis, half by half.

  The bits of `x.sum(axis=0)` depend on the variant of the sum that XLA finds
  fastest when it compiles.
  """
  while len(x) > 1:
    half = len(x) // 2
    pairs = x[:half] + x[half : 2 * half]
    x = jnp.concatenate([pairs, x[2 * half :]]) if len(x) % 2 else pairs
  return x[0]
