"""Rotary embedding: rotations, relative positions, YaRN's limits, messages."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.rope import RopeConfig, apply_rope, rope_frequencies


def _normal(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_matches_complex_rotation():
  x = np.asarray(_normal(2, 5, 3, 8), np.float64)
  positions = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 100, 31]])
  turn = np.exp(1j * positions[..., None] * 10_000.0 ** (-np.arange(4) / 4))[
    :, :, None
  ]
  pairs = (x[..., :4] + 1j * x[..., 4:]) * turn
  want = np.concatenate([pairs.real, pairs.imag], axis=-1)
  x32 = jnp.asarray(x, jnp.float32)
  got = apply_rope(x32, jnp.asarray(positions), RopeConfig())
  # Angles of up to 100 radians are rounded to float32.
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_position_zero_is_the_identity_and_norms_stay():
  x = _normal(1, 6, 2, 16)
  zero = jnp.zeros((1, 6), jnp.int32)
  np.testing.assert_array_equal(apply_rope(x, zero, RopeConfig()), x)
  moved = apply_rope(x, zero + 1234, RopeConfig())
  np.testing.assert_allclose(
    jnp.linalg.norm(moved, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )


@pytest.mark.parametrize("yarn_factor", [1.0, 4.0])
def test_scores_depend_on_the_distance_alone(yarn_factor):
  config = RopeConfig(yarn_factor=yarn_factor, original_max_position=64)
  query, key = _normal(1, 4, 1, 8, seed=1), _normal(1, 4, 1, 8, seed=2)
  positions = jnp.array([[5, 9, 0, 3]])

  def scores(shift):
    return jnp.einsum(
      "bqnh,bknh->bqk",
      apply_rope(query, positions + shift, config),
      apply_rope(key, positions + shift, config),
      precision="highest",
    )

  np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
  plain = rope_frequencies(128, RopeConfig())
  config = RopeConfig(yarn_factor=4.0)
  scaled = rope_frequencies(128, config)
  turns = config.original_max_position * plain / (2 * math.pi)
  np.testing.assert_allclose(scaled[turns >= 32], plain[turns >= 32])
  np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 4)
  between = (turns > 1) & (turns < 32)
  assert between.any()
  assert (scaled[between] < plain[between]).all()
  assert (scaled[between] > plain[between] / 4).all()


def test_yarn_temperature():
  x = _normal(1, 3, 1, 8)
  out = apply_rope(x, jnp.zeros((1, 3), int), RopeConfig(yarn_factor=4.0))
  np.testing.assert_allclose(out, x * (0.1 * math.log(4) + 1), rtol=1e-6)


def test_dtypes(x64):
  positions = jnp.arange(4)[None]
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
    x = _normal(1, 4, 2, 8).astype(dtype)
    out = apply_rope(x, positions, RopeConfig())
    assert out.dtype == dtype
    want = apply_rope(x.astype(jnp.float64), positions, RopeConfig())
    np.testing.assert_allclose(
      out.astype(jnp.float64), want, atol=4 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"base": 1.0}, "`base`=1.0 must be greater than 1."),
    ({"base": math.nan}, "`base`=nan must be a finite number."),
    ({"beta_slow": "1"}, "`beta_slow`='1' must be a finite number."),
    ({"beta_fast": True}, "`beta_fast`=True must be a finite number."),
    (
      {"yarn_factor": 0.5},
      "`yarn_factor`=0.5 must be at least 1 (1: no scaling).",
    ),
    (
      {"original_max_position": 0},
      "`original_max_position`=0 must be at least 1.",
    ),
    (
      {"original_max_position": 8.0},
      "`original_max_position`=8.0 must be a static integer.",
    ),
    ({"beta_slow": 0}, "`beta_slow`=0 must be positive."),
    (
      {"beta_fast": 1.0, "beta_slow": 2.0},
      "`beta_fast`=1.0 must be greater than `beta_slow`=2.0.",
    ),
  ],
)
def test_config_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    RopeConfig(**fields)


@pytest.mark.parametrize(
  "x_shape, positions, message",
  [
    ((1, 4, 8), np.arange(4)[None], "`x` of shape (1, 4, 8) must have rank 4"),
    (
      (1, 4, 2, 7),
      np.arange(4)[None],
      "`head_dim`=7 must be even: RoPE rotates pairs of features.",
    ),
    (
      (1, 4, 2, 8),
      np.arange(5)[None],
      "`positions` of shape (1, 5) must have shape (1, 4)",
    ),
    (
      (1, 4, 2, 8),
      np.zeros((1, 4)),
      "`positions` of dtype float32 must have an integer dtype.",
    ),
  ],
)
def test_messages(x_shape, positions, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    apply_rope(jnp.ones(x_shape), positions, RopeConfig())


def test_integer_input_message():
  with pytest.raises(ValueError, match="`x` of dtype int32 must have a float"):
    apply_rope(
      jnp.ones((1, 4, 2, 8), jnp.int32), jnp.zeros((1, 4), int), RopeConfig()
    )
