"""What a user's type checker sees: mypy reads this file, and it runs."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import nsa_jax
from nsa_jax import KV, NSAConfig

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)


def _calls() -> tuple[Any, ...]:
  x = np.zeros((1, 16, 2, 8), np.float32)  # NumPy arrays are welcome
  blocks = jnp.zeros((1, 3, 2, 8))
  pair, compressed = KV(jnp.asarray(x), jnp.asarray(x)), KV(blocks, blocks)
  gates = np.zeros((1, 16, 2, 3), np.float32)
  out = nsa_jax.native_sparse_attention(
    x, compressed, pair, pair, gates, config=CONFIG
  )
  both = nsa_jax.native_sparse_attention(
    x, compressed, pair, pair, gates, config=CONFIG, return_block_ids=True
  )
  assert_type(out, jax.Array)
  assert_type(both, tuple[jax.Array, jax.Array])
  for pair_of in (
    nsa_jax.window_attention(x, x, x, config=CONFIG),
    nsa_jax.full_attention(x, x, x),
  ):
    assert_type(pair_of, tuple[jax.Array, jax.Array])
  for alone in (
    nsa_jax.window_attention(x, x, x, config=CONFIG, return_lse=False),
    nsa_jax.full_attention(x, x, x, return_lse=False),
  ):
    assert_type(alone, jax.Array)
  unknown = bool(x.ndim)
  assert_type(
    nsa_jax.full_attention(x, x, x, return_lse=unknown),
    jax.Array | tuple[jax.Array, jax.Array],
  )
  return out, both, pair_of, alone


def test_flags_change_the_type_of_the_result() -> None:
  """What a type checker says is what comes."""
  out, both, pair_of, alone = jax.eval_shape(_calls)
  assert out.shape == both[0].shape == pair_of[0].shape == alone.shape
  assert both[1].shape == (1, 16, 2, 3)
  assert pair_of[1].shape == (1, 16, 2)


def test_names_are_literals() -> None:
  """An ignore that is not needed is an error, too."""
  for wrong in (
    lambda: nsa_jax.NativeSparseAttention(2, 1, 8, compression="fast"),  # type: ignore[arg-type]
    lambda: nsa_jax.TransformerConfig.preset("tiny").from_dict(3),  # type: ignore[arg-type]
    lambda: nsa_jax.cache.init(
      1,
      8,
      config=CONFIG,
      num_kv_heads=1,
      head_dim=8,
      kind="dense",  # type: ignore[arg-type]
    ),
  ):
    try:
      wrong()
    except ValueError:
      continue
    raise AssertionError(wrong)
