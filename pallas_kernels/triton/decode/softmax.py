"""What the decode kernels share: softmaxes over pieces of the keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.interface import Spec
from pallas_kernels.triton import common


class PartialSoftmax(NamedTuple):
  """Softmaxes over pieces of the keys, not yet divided by their sums."""

  acc: jax.Array  # [pieces, B T N, V], float32
  top: jax.Array  # [pieces, B T N], largest score, base 2
  total: jax.Array  # [pieces, B T N], sum of weights; 0 if no key is read


class Weights(NamedTuple):
  """Weights of compressed blocks, summed over each selection block.

  Those of a tile of compressed keys are relative to the largest score so far.
  """

  # The values of a group in a tile are contiguous, so that no write is smaller
  # than a memory transaction.
  tops: jax.Array  # [B, T, K, tiles, G], largest scores so far
  sums: jax.Array  # [B, T, K, G, M'], M' >= M: whole tiles
  # [B, T, K, tiles, G], weights of a tile in the first block of the next tile;
  # one array, or none if l = d.
  edges: tuple[jax.Array, ...]


def columns_of(spec: Spec) -> int:
  """Selection blocks per tile of compressed keys."""
  return spec.tiles.compressed.block_k // spec.ratio


def arange(size: int) -> jax.Array:
  """0 .. size - 1 in int32, also under jax_enable_x64."""
  return jnp.arange(size, dtype=jnp.int32)


def empty_softmax(rows: int, value_dim: int) -> Any:
  """A softmax over nothing: accumulators, maximum and sum."""
  return (
    common.accumulators(rows, common.pieces(value_dim)),
    jnp.full((rows,), common.MAX_INIT, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
  )


def fold_keys(
  carry: Any,
  q: Any,
  k: Any,
  load_v: Callable[[], Any],
  mask: Any,
  factor: float,
  exp2: Callable[[jax.Array], jax.Array],
) -> tuple[Any, jax.Array]:
  """One step of a softmax; returns the carry and the weights of the step.

  The weights are relative to the new maximum.

  Args:
    carry: as in `empty_softmax`.
    q: pieces [rows, H].
    k: pieces [keys, H].
    load_v: loads pieces [keys, V].
    mask: bool, broadcasts to [rows, keys]; None if all are read.
    factor: scale of the scores times log2(e).
    exp2: 2^x.
  """
  acc, m_i, l_i = carry
  s = common.dot_pieces(q, k) * factor
  if mask is not None:
    s = jnp.where(mask, s, common.MASK)
  m_next = jnp.maximum(m_i, s.max(axis=1))
  p = exp2(s - m_next[:, None])
  correction = exp2(m_i - m_next)
  acc = tuple(
    a * correction[:, None] + common.dot(p.astype(x.dtype), x)
    for a, x in zip(acc, load_v(), strict=True)
  )
  return (acc, m_next, l_i * correction + p.sum(axis=1)), p
