"""Block geometry and selection, property by property (hypothesis)."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

import nsa_jax
from nsa_jax import NSAConfig
from tests import helpers
from tests.oracle import Oracle, count_compressed, count_selection


@st.composite
def configs(draw: st.DrawFn) -> NSAConfig:
  """Any valid configuration of moderate size."""
  stride = draw(st.integers(1, 8))
  overlap = draw(st.integers(1, 4))
  selection = draw(st.integers(overlap, 8))  # l <= l'
  initial = draw(st.integers(0, 3))
  local = draw(st.integers(1, 3))
  return NSAConfig(
    compression_block=stride * overlap,
    compression_stride=stride,
    selection_block=stride * selection,
    num_selected=draw(st.integers(initial + local, 8)),
    num_initial=initial,
    num_local=local,
    window=draw(st.integers(1, 40)),
  )


@given(config=configs(), length=st.integers(0, 300))
def test_block_counts(config: NSAConfig, length: int) -> None:
  compressed = nsa_jax.num_compressed_blocks(length, config)
  blocks = nsa_jax.num_selection_blocks(length, config)
  assert compressed == count_compressed(length, config)
  assert blocks == count_selection(length, config)
  # The same numbers, from what they mean.
  block, stride = config.compression_block, config.compression_stride
  assert (compressed == 0) == (length < block)
  if compressed:
    assert (compressed - 1) * stride + block <= length
    assert compressed * stride + block > length
  assert (blocks - 1) * config.selection_block < max(length, 1)
  assert blocks * config.selection_block >= length


def test_block_counts_of_the_paper() -> None:
  """l, d, l' = 32, 16, 64; at S = 65536, (65536 - 32) / 16 + 1 = 4095."""
  config = NSAConfig()
  counts = {
    31: (0, 1),
    32: (1, 1),
    47: (1, 1),
    48: (2, 1),
    64: (3, 1),
    65: (3, 2),
    65536: (4095, 1024),
  }
  for length, expected in counts.items():
    actual = (
      nsa_jax.num_compressed_blocks(length, config),
      nsa_jax.num_selection_blocks(length, config),
    )
    assert actual == expected, length


def _weights(implementation: Any, config: NSAConfig, length: int) -> np.ndarray:
  """The [C, M] weights of Eq. 9, read off the op.

  Batch row i holds one query, at the end of the row, that gives compressed
  block i all its probability: keys are unit vectors and the query is 200 times
  the i-th, so that the others underflow.
  """
  count = count_compressed(length, config)
  eye = np.eye(count, dtype=np.float32)
  query: Any = 200 * eye[:, None, None]
  key: Any = np.broadcast_to(eye[None, :, None], (count, count, 1, count))
  lse: Any = np.full((count, 1, 1), 200, np.float32)
  score = functools.partial(
    nsa_jax.block_scores,
    config=config,
    key_length=length,
    scale=1.0,
    implementation=implementation,
  )
  return np.asarray(jax.jit(score)(query, key, lse))[:, 0, 0]


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
def test_weights_of_the_paper(implementation: Any) -> None:
  """l, d, l' = 32, 16, 64: indices 4j-1 .. 4j+3 with weights 1, 2, 2, 2, 1."""
  weights = _weights(implementation, NSAConfig(), 200)
  # C = (200 - 32) // 16 + 1 = 11, M = 4. Block 3 (tokens 48..79) lies half in
  # selection block 0 and half in 1.
  expected = np.zeros((11, 4))
  expected[[0, 1, 2, 3], 0] = 2, 2, 2, 1
  expected[[3, 4, 5, 6, 7], 1] = 1, 2, 2, 2, 1
  expected[[7, 8, 9, 10], 2] = 1, 2, 2, 2
  np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "config, length",
  [
    (NSAConfig(4, 2, 4, 1, 0, 1, 1), 13),
    (NSAConfig(6, 2, 6, 1, 0, 1, 1), 21),  # weights 1, 2, 3, 2, 1
    (NSAConfig(3, 1, 5, 1, 0, 1, 1), 11),
    (NSAConfig(4, 4, 8, 1, 0, 1, 1), 20),  # blocks side by side
  ],
  ids=str,
)
def test_weights_are_the_overlap(
  implementation: Any, config: NSAConfig, length: int
) -> None:
  """Eq. 9 equals shared tokens / d, and hands out l/d per block in all."""
  weights = _weights(implementation, config, length)
  expected = np.zeros_like(weights)
  for i, j in np.ndindex(*weights.shape):
    first = i * config.compression_stride
    tokens = range(first, first + config.compression_block)
    shared = sum(s // config.selection_block == j for s in tokens)
    expected[i, j] = shared / config.compression_stride
  np.testing.assert_array_equal(weights, expected)
  np.testing.assert_array_equal(
    weights.sum(1), config.compression_block // config.compression_stride
  )


# One compile per configuration: sizes are fixed, what they hold is drawn.
SELECT_CONFIGS = (
  NSAConfig(4, 2, 4, 4, 1, 1, 1),
  NSAConfig(2, 1, 6, 3, 0, 2, 1),
  NSAConfig(4, 4, 4, 6, 3, 2, 1),
)
LENGTH = 41


@functools.cache
def _select(implementation: Any, config: NSAConfig) -> Callable:
  def run(query: Any, key: Any, offset: Any, segments: Any) -> Any:
    call: dict[str, Any] = {
      "config": config,
      "key_length": LENGTH,
      "query_offset": offset,
      "segment_ids": segments,
      "implementation": implementation,
    }
    _, lse = nsa_jax.compressed_attention(query, key, key, **call)
    return nsa_jax.select_blocks(query, key, lse, **call)

  return jax.jit(run)


@st.composite
def segments(draw: st.DrawFn, block: int) -> np.ndarray:
  """Aligned runs of random lengths, some of them padding: [1, LENGTH]."""
  ids = np.zeros((1, LENGTH), np.int32)
  start, segment = 0, 0
  while start < LENGTH:
    length = draw(st.integers(1, LENGTH))
    if draw(st.integers(0, 4)):  # else padding
      segment += 1
      ids[0, start : start + length] = segment
    start += -(-length // block) * block
  return ids


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
@pytest.mark.parametrize("config", SELECT_CONFIGS, ids=str)
@given(data=st.data())
def test_select_blocks(
  implementation: Any, config: NSAConfig, data: st.DataObject
) -> None:
  """Ascending then -1, forced ones in, candidates only, the best, and full.

  `Oracle.assert_ids` checks each of these by the scores; small integers as
  inputs make equal keys, hence ties, frequent.
  """
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
  ties = data.draw(st.booleans())
  offset = data.draw(st.integers(-8, LENGTH))
  segment_ids = data.draw(segments(config.selection_block))
  count = count_compressed(LENGTH, config)
  query, key = (
    (rng.integers(-1, 2, shape) if ties else rng.standard_normal(shape)).astype(
      np.float32
    )
    for shape in ((1, 8, 4, 4), (1, count, 2, 4))
  )
  oracle = Oracle(config, LENGTH, 8, 1, offset=offset, segment_ids=segment_ids)
  run = _select(implementation, config)
  ids = run(query, key, helpers.int32(offset), segment_ids)
  scores = oracle.block_scores(query, key, 2, 0.5)
  oracle.assert_ids(ids, scores)
  # All heads of a group decide together: their order does not matter.
  flipped = query.reshape(1, 8, 2, 2, 4)[:, :, :, ::-1].reshape(query.shape)
  oracle.assert_ids(
    run(flipped, key, helpers.int32(offset), segment_ids), scores
  )


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
@given(data=st.data())
def test_equal_scores_go_to_the_lower_index(
  implementation: Any, data: st.DataObject
) -> None:
  """Exact ties: l = d = l', and keys that are zero or far below.

  Each row has some blocks with score 0 and the others at -1000, whose
  probability underflows to 0. Chosen are the first of those at 0, then, as
  ties, the first of the others.
  """
  config = NSAConfig(4, 4, 4, 6, 1, 1, 1)
  count = LENGTH // 4
  high = np.array(
    data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
  )
  # The first block is high, so that the lse is finite and near 0.
  high[0] = True
  key = np.where(high, 0, -1000).astype(np.float32)[None, :, None, None]
  t = 4 * count - 1  # sees all complete blocks; the last one is forced
  ids = _select(implementation, config)(
    np.ones((1, 1, 1, 1), np.float32),
    key,
    helpers.int32(t),
    np.ones((1, LENGTH), np.int32),
  )
  free = sorted(range(1, count - 1), key=lambda j: (not high[j], j))
  expected = sorted([0, count - 1, *free[:4]])
  np.testing.assert_array_equal(np.asarray(ids)[0, 0, 0], expected)
