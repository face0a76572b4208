"""A call small enough to be worked out on paper, from Eq. 5-12, 0-based.

    T = 12 tokens, l = 4, d = 2, l' = 4, n = 2 (one local block forced, no
    initial one), w = 3, one key/value head, two query heads.

Compressed blocks (Eq. 7). Block i covers tokens 2i .. 2i+3, so there are
(12 - 4) // 2 + 1 = 5, and query t sees block i once 2i + 3 <= t:

    t      0-2    3-4   5-6    7-8      9-10       11
    sees   none   0     0,1    0,1,2    0,1,2,3    0,1,2,3,4

Probabilities (Eq. 8). The queries are unit vectors, e0 in head 0 and e1 in
head 1, key i is (log a_i, log b_i) and the scale is 1; hence head 0 gives the
blocks probabilities in proportion to a and head 1 in proportion to b:

    a = 4, 1, 1, 2, 8        b = 1, 1, 2, 4, 8

    t      sum of a   sum of b      these are exp(lse)
    3-4    4          1
    5-6    5          2
    7-8    6          4
    9-10   8          8
    11     16         16

Importance (Eq. 9). l'/d = 2 and l/d = 2: p_slc[j] sums p_cmp[2j + m - k] over
m, k in {0, 1}, that is p[2j - 1] + 2 p[2j] + p[2j + 1]: weights 1, 2, 1. The
group's importance (Eq. 10) adds both heads:

    t = 3, 4    block 0: 2 * 4/4 + 2 * 1/1                          = 4
                block 1: p[1] = 0, block 2: 0
    t = 5, 6    block 0: (2*4 + 1) / 5 + (2*1 + 1) / 2 = 9/5 + 3/2  = 33/10
                block 1: 1/5 + 1/2                                  = 7/10
    t = 7, 8    block 0: (2*4 + 1) / 6 + (2*1 + 1) / 4 = 9/6 + 3/4  = 9/4
                block 1: (1 + 2*1) / 6 + (1 + 2*2) / 4 = 3/6 + 5/4  = 7/4
    t = 9, 10   block 0: (2*4 + 1) / 8 + (2*1 + 1) / 8 = 12/8       = 3/2
                block 1: (1 + 2*1 + 2) / 8 + (1 + 2*2 + 4) / 8      = 7/4
                block 2: 2/8 + 4/8                                  = 3/4
    t = 11      block 0: 9/16 + 3/16                                = 3/4
                block 1: 5/16 + 9/16                                = 7/8
                block 2: (2 + 2*8) / 16 + (4 + 2*8) / 16            = 19/8

Each head hands out l/d = 2 in total, so every row sums to 4.

Top-n (Eq. 11). Candidates are 0 .. t // 4, the last one is forced, and one
place is left:

    t = 0..3    only block 0                                   -> 0, -1
    t = 4..7    blocks 0 and 1, both fit                       -> 0, 1
    t = 8       2 is forced; 9/4 > 7/4                         -> 0, 2
    t = 9, 10   2 is forced; 3/2 < 7/4                         -> 1, 2
    t = 11      2 is forced; 3/4 < 7/8                         -> 1, 2

At t = 8 head 1 alone would take block 1 (3/4 < 5/4), at t = 9 head 0 alone
would take block 0 (9/8 > 5/8): the heads decide together.

Compressed output: values 10, 12, 24, 8, 4:

    t      head 0                                  head 1
    3-4    10                                      10
    5-6    (40 + 12) / 5            = 52/5         (10 + 12) / 2        = 11
    7-8    (52 + 24) / 6            = 38/3         (22 + 48) / 4        = 35/2
    9-10   (76 + 16) / 8            = 23/2         (70 + 32) / 8        = 51/4
    11     (92 + 32) / 16           = 31/4         (102 + 32) / 16      = 67/8

Selected and window output: keys are 0 and value s is s, so the result is the
mean of the token indices read. Selected reads tokens s <= t of the blocks:

    t = 0..7   0 .. t, mean t/2
    t = 8      0 1 2 3 8, mean 14/5           t = 9    4 .. 9, mean 13/2
    t = 10     4 .. 10, mean 7                t = 11   4 .. 11, mean 15/2

The window reads t - 2, t - 1, t: mean t - 1 (0 and 1/2 for t = 0 and 1).
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

import nsa_jax
from nsa_jax import KV, NSAConfig
from tests import helpers

CONFIG = NSAConfig(
  compression_block=4,
  compression_stride=2,
  selection_block=4,
  num_selected=2,
  num_initial=0,
  num_local=1,
  window=3,
)
T = 12

# [T, heads]: exp(lse) of the compressed branch, 0 where nothing is seen.
EXP_LSE = 3 * [[0, 0]] + 2 * [[4, 1]] + 2 * [[5, 2]] + 2 * [[6, 4]]
EXP_LSE += 2 * [[8, 8]] + [[16, 16]]

# [T, M]
SCORES = (
  3 * [[0, 0, 0]]
  + 2 * [[4, 0, 0]]
  + 2 * [[33 / 10, 7 / 10, 0]]
  + 2 * [[9 / 4, 7 / 4, 0]]
  + 2 * [[3 / 2, 7 / 4, 3 / 4]]
  + [[3 / 4, 7 / 8, 19 / 8]]
)

# [T, n]
IDS = 4 * [[0, -1]] + 4 * [[0, 1]] + [[0, 2]] + 3 * [[1, 2]]

# [T, heads]
COMPRESSED = (
  3 * [[0, 0]]
  + 2 * [[10, 10]]
  + 2 * [[52 / 5, 11]]
  + 2 * [[38 / 3, 35 / 2]]
  + 2 * [[23 / 2, 51 / 4]]
  + [[31 / 4, 67 / 8]]
)
# [T], the same in both heads; and how many tokens were read.
SELECTED = [0, 1 / 2, 1, 3 / 2, 2, 5 / 2, 3, 7 / 2, 14 / 5, 13 / 2, 7, 15 / 2]
SELECTED_COUNT = [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8]
WINDOW = [0, 1 / 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
WINDOW_COUNT = [1, 2] + 10 * [3]

# Gates of head 0 and head 1, and the sum worked out for t = 9:
#   head 0: 23/2 * 1/2 + 13/2 * 1/4 + 8 * 1/8 = 23/4 + 13/8 + 1 = 67/8
#   head 1: 51/4 * 1/4 + 13/2 * 1/2 + 8 * 1   = 51/16 + 13/4 + 8 = 231/16
GATES = [[1 / 2, 1 / 4, 1 / 8], [1 / 4, 1 / 2, 1]]
OUT_AT_9 = [67 / 8, 231 / 16]


def _column(values: Any) -> Any:
  """[S] -> [1, S, 1, 1]."""
  return helpers.float32(values)[None, :, None, None]


QUERY: Any = np.broadcast_to(np.eye(2, dtype=np.float32), (1, T, 2, 2))
COMPRESSED_KV = helpers.pair(
  np.log(helpers.float32([[4, 1, 1, 2, 8], [1, 1, 2, 4, 8]])).T[None, :, None],
  _column([10, 12, 24, 8, 4]),
)
TOKENS_KV = helpers.pair(np.zeros((1, T, 1, 2), np.float32), _column(range(T)))


def _log(values: Any) -> np.ndarray:
  return np.array(
    [[math.log(x) if x else -math.inf for x in row] for row in values]
  )


def _check(actual: Any, expected: Any) -> None:
  """[1, T, heads(, 1)] against [T, heads]; values up to 20 in float32."""
  actual = np.asarray(actual)
  np.testing.assert_allclose(
    actual.reshape(actual.shape[1], -1),
    np.asarray(expected),
    rtol=1e-6,
    atol=1e-6,
  )


def _run(implementation: Any, **kwargs: Any) -> dict[str, Any]:
  """All primitives, under one jit."""
  call: Any = kwargs | {
    "config": CONFIG,
    "scale": 1.0,
    "implementation": implementation,
  }

  @jax.jit
  def run(query: Any, compressed: KV, tokens: KV) -> dict[str, Any]:
    key, value = compressed
    results: dict[str, Any] = {}
    results["compressed"] = nsa_jax.compressed_attention(
      query, key, value, key_length=T, **call
    )
    arguments = (query, key, results["compressed"][1])
    results["scores"] = nsa_jax.block_scores(*arguments, key_length=T, **call)
    ids = nsa_jax.select_blocks(*arguments, key_length=T, **call)
    results["ids"] = ids
    key, value = tokens
    results["selected"] = nsa_jax.selected_attention(
      query, key, value, ids, **call
    )
    results["window"] = nsa_jax.window_attention(query, key, value, **call)
    return results

  return run(QUERY, COMPRESSED_KV, TOKENS_KV)


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
def test_branches(implementation: Any) -> None:
  results = _run(implementation)
  out, lse = results["compressed"]
  _check(out, COMPRESSED)
  _check(lse, _log(EXP_LSE))
  if "scores" in results:
    _check(results["scores"], SCORES)
  np.testing.assert_array_equal(results["ids"][0, :, 0], IDS)
  out, lse = results["selected"]
  _check(out, np.stack([SELECTED, SELECTED], -1))
  _check(lse, _log(np.stack([SELECTED_COUNT, SELECTED_COUNT], -1)))
  out, lse = results["window"]
  _check(out, np.stack([WINDOW, WINDOW], -1))
  _check(lse, _log(np.stack([WINDOW_COUNT, WINDOW_COUNT], -1)))


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
def test_gated_sum(implementation: Any) -> None:
  call = functools.partial(
    nsa_jax.native_sparse_attention,
    config=CONFIG,
    scale=1.0,
    return_block_ids=True,
    implementation=implementation,
  )
  gates = np.broadcast_to(helpers.float32(GATES), (1, T, 2, 3))
  out, ids = jax.jit(call)(QUERY, COMPRESSED_KV, TOKENS_KV, TOKENS_KV, gates)
  np.testing.assert_array_equal(ids[0, :, 0], IDS)
  np.testing.assert_allclose(out[0, 9, :, 0], OUT_AT_9, rtol=1e-6)
  branches = [
    np.array(COMPRESSED),
    np.stack([SELECTED, SELECTED], -1),
    np.stack([WINDOW, WINDOW], -1),
  ]
  _check(out, sum(np.array(GATES)[:, c] * x for c, x in enumerate(branches)))


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
def test_two_segments(implementation: Any) -> None:
  """Tokens 0-7 are one document, 8-11 another.

  Compressed blocks 0, 1, 2 lie in the first, 4 (tokens 8-11) in the second and
  block 3 (tokens 6-9) in neither. Queries 8, 9, 10 see no compressed block;
  query 11 sees block 4 alone, with probability 1: exp(lse) = 8 in both heads,
  importance 2 + 2 for selection block 2, output 4. Block 2 is the second
  document's first block, its only candidate. The first document does not
  change.
  """
  segment_ids = helpers.int32([8 * [3] + 4 * [5]])
  results = _run(implementation, segment_ids=segment_ids)
  out, lse = results["compressed"]
  _check(out, COMPRESSED[:8] + 3 * [[0, 0]] + [[4, 4]])
  _check(lse, _log(EXP_LSE[:8] + 3 * [[0, 0]] + [[8, 8]]))
  if "scores" in results:
    _check(results["scores"], SCORES[:8] + 3 * [[0, 0, 0]] + [[0, 0, 4]])
  np.testing.assert_array_equal(
    results["ids"][0, :, 0], IDS[:8] + 4 * [[2, -1]]
  )
  # Queries 8..11 read 8 .. t of block 2, in both branches 3 tokens at most
  # but for the selected branch at t = 11, which reads all 4.
  for name, expected in {
    "selected": [*SELECTED[:8], 8, 17 / 2, 9, 19 / 2],
    "window": [*WINDOW[:8], 8, 17 / 2, 9, 10],
  }.items():
    _check(results[name][0], np.stack([expected, expected], -1))


@pytest.mark.parametrize("implementation", helpers.IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "num_initial, num_local, num_selected, expected",
  [
    # l = d = l' = 1, so p_slc = p_cmp. The one query t = 6 gives block 1 all
    # the probability; the others underflow to exactly 0: ties, which go to
    # the lower index.
    (0, 1, 1, [6]),
    (0, 1, 2, [1, 6]),
    (0, 1, 3, [0, 1, 6]),
    (0, 1, 4, [0, 1, 2, 6]),
    (1, 2, 4, [0, 1, 5, 6]),
    (1, 2, 5, [0, 1, 2, 5, 6]),
    # Forced sets that overlap count once: the freed places are filled.
    (3, 2, 6, [0, 1, 2, 3, 5, 6]),
    (4, 4, 8, [0, 1, 2, 3, 4, 5, 6, -1]),
    (0, 7, 7, [0, 1, 2, 3, 4, 5, 6]),
  ],
)
def test_ties_and_forced_blocks(
  implementation: Any,
  num_initial: int,
  num_local: int,
  num_selected: int,
  expected: list[int],
) -> None:
  config = NSAConfig(1, 1, 1, num_selected, num_initial, num_local, 1)
  query: Any = np.ones((1, 1, 1, 1), np.float32)
  lse: Any = np.zeros((1, 1, 1), np.float32)  # log(exp(0) + 6 exp(-500))
  key = _column([-500, 0, -500, -500, -500, -500, -500])
  select = functools.partial(
    nsa_jax.select_blocks,
    config=config,
    key_length=7,
    scale=1.0,
    implementation=implementation,
  )
  ids = np.asarray(jax.jit(select)(query, key, lse))
  np.testing.assert_array_equal(ids[0, 0, 0], expected)
