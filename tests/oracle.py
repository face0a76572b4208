"""The whole operation by NumPy: loops in float64, gradients by hand.

A second derivation from the paper's equations in 0-based form. It imports
nothing of nsa_jax, so that no fault can be in both, and is kept too slow to be
clever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

BRANCHES = ("compressed", "selected", "window")


def float64(x: Any) -> np.ndarray:
  return np.asarray(x, np.float64)


# ------------------------------------------------------- what a query may read


def count_compressed(length: int, config: Any) -> int:
  """Blocks [i*d, i*d + l) that fit into the row, counted one by one."""
  starts = range(0, length, config.compression_stride)
  return sum(s + config.compression_block <= length for s in starts)


def count_selection(length: int, config: Any) -> int:
  return len(range(0, length, config.selection_block))


@dataclasses.dataclass(frozen=True)
class Oracle:
  """The rules of one call: positions, segments, and all that follows.

  Attributes:
    config: The hyper-parameters, an NSAConfig.
    length: S, tokens in a row of keys.
    queries: T.
    batch: B.
    offset: int or int [B]; None: the queries are the last T.
    segment_ids: int [B, S] or None.
    query_segment_ids: int [B, T] or None.
    key_offset: Position of the first key row (window only), int or int [B].
  """

  config: Any
  length: int
  queries: int
  batch: int
  offset: Any = None
  segment_ids: Any = None
  query_segment_ids: Any = None
  key_offset: Any = 0

  def position(self, b: int, i: int) -> int:
    if self.offset is None:
      return self.length - self.queries + i
    return int(np.broadcast_to(self.offset, (self.batch,))[b]) + i

  def first_key(self, b: int) -> int:
    return int(np.broadcast_to(self.key_offset, (self.batch,))[b])

  def token_segment(self, b: int, s: int) -> int:
    return 1 if self.segment_ids is None else int(self.segment_ids[b, s])

  def query_segment(self, b: int, i: int) -> int:
    """The query's segment, 0 if it behaves like padding."""
    row = self.position(b, i) - self.first_key(b)
    if self.position(b, i) < 0 or row >= self.length:
      return 0
    if self.query_segment_ids is not None:
      return int(self.query_segment_ids[b, i])
    if self.segment_ids is None:
      return 1
    return self.token_segment(b, row) if row >= 0 else 0

  def compressed_rows(self, b: int, i: int) -> list[int]:
    """Compressed blocks that query i of batch row b sees."""
    c, t, segment = self.config, self.position(b, i), self.query_segment(b, i)
    if segment == 0:
      return []
    rows = []
    for row in range(count_compressed(self.length, c)):
      first = row * c.compression_stride
      tokens = range(first, first + c.compression_block)
      if tokens[-1] <= t and all(
        self.token_segment(b, s) == segment for s in tokens
      ):
        rows.append(row)
    return rows

  def selected_rows(self, b: int, i: int, ids: Iterable[int]) -> list[int]:
    """Tokens of the given blocks that the query may read."""
    blocks = {int(j) for j in ids}
    return [
      s
      for s in self.full_rows(b, i)
      if s // self.config.selection_block in blocks
    ]

  def window_rows(self, b: int, i: int) -> list[int]:
    """Key rows (not positions) of the w tokens that end at the query."""
    t, segment = self.position(b, i), self.query_segment(b, i)
    if segment == 0:
      return []
    first = max(0, t - self.config.window + 1)
    return [
      s
      for s in range(self.length)
      if first <= s + self.first_key(b) <= t
      and self.token_segment(b, s) == segment
    ]

  def full_rows(self, b: int, i: int) -> list[int]:
    """All tokens up to the query."""
    t, segment = self.position(b, i), self.query_segment(b, i)
    if segment == 0:
      return []
    return [
      s
      for s in range(self.length)
      if s <= t and self.token_segment(b, s) == segment
    ]

  def candidates(self, b: int, i: int) -> tuple[list[int], set[int]]:
    """Blocks that may be chosen (ascending), and those that must be."""
    segment = self.query_segment(b, i)
    if segment == 0:
      return [], set()
    c, block = self.config, self.config.selection_block
    last = self.position(b, i) // block
    # A segment that the keys do not have counts from the start of the row.
    tokens = range(self.length)
    start = next((s for s in tokens if self.token_segment(b, s) == segment), 0)
    candidates = list(range(start // block, last + 1))
    forced = set(candidates[: c.num_initial] + candidates[-c.num_local :])
    return candidates, forced

  # Attention of one branch. `rows(b, i, k)` lists the key rows of a query.

  def attend(
    self, query: Any, key: Any, value: Any, rows: Callable, scale: float
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns out [B, T, N, V], 0 without keys, and lse [B, T, N]."""
    query, key, value = (float64(x) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    out = np.zeros((*query.shape[:3], value.shape[3]))
    lse = np.full(query.shape[:3], -np.inf)
    for b, i, k in np.ndindex(*query.shape[:2], key.shape[2]):
      see = rows(b, i, k)
      for h in range(k * group, (k + 1) * group) if see else ():
        score = scale * key[b, see, k] @ query[b, i, h]
        if score.max() == -np.inf:  # All weights are 0: it reads nothing.
          continue
        lse[b, i, h] = score.max() + np.log(np.exp(score - score.max()).sum())
        out[b, i, h] = np.exp(score - lse[b, i, h]) @ value[b, see, k]
    return out, lse

  def attend_vjp(
    self,
    query: Any,
    key: Any,
    value: Any,
    rows: Callable,
    scale: float,
    dout: Any,
    dlse: Any = None,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of one branch: dq, dk, dv.

    out = sum_s p_s v_s and d lse / d score_s = p_s, so with u_s = dout . v_s
    d score_s = p_s * (u_s - sum_r p_r u_r + dlse).
    """
    query, key, value, dout = (float64(x) for x in (query, key, value, dout))
    dlse = np.zeros(query.shape[:3]) if dlse is None else float64(dlse)
    group = query.shape[2] // key.shape[2]
    dq, dk, dv = (np.zeros_like(x) for x in (query, key, value))
    for b, i, k in np.ndindex(*query.shape[:2], key.shape[2]):
      see = rows(b, i, k)
      for h in range(k * group, (k + 1) * group) if see else ():
        score = scale * key[b, see, k] @ query[b, i, h]
        if score.max() == -np.inf:
          continue
        p = np.exp(score - score.max())
        p /= p.sum()
        u = value[b, see, k] @ dout[b, i, h]
        dscore = p * (u - p @ u + dlse[b, i, h])
        dq[b, i, h] += scale * dscore @ key[b, see, k]
        dk[b, see, k] += scale * np.outer(dscore, query[b, i, h])
        dv[b, see, k] += np.outer(p, dout[b, i, h])
    return dq, dk, dv

  def block_scores(
    self, query: Any, key: Any, num_kv_heads: int, scale: float
  ) -> np.ndarray:
    """Eq. 8-10: the group's importance of each block, [B, T, K, M]."""
    c = self.config
    query, key = float64(query), float64(key)
    b_, t_, n_ = query.shape[:3]
    group = n_ // num_kv_heads
    per_block = c.selection_block // c.compression_stride
    per_cmp = c.compression_block // c.compression_stride
    num_blocks = count_selection(self.length, c)
    scores = np.zeros((b_, t_, num_kv_heads, num_blocks))
    for b, i in np.ndindex(b_, t_):
      see = self.compressed_rows(b, i)
      for h in range(n_) if see else ():
        k = h // group
        logits = scale * key[b, see, k] @ query[b, i, h]
        weights = np.exp(logits - logits.max())
        p_cmp = dict(zip(see, weights / weights.sum(), strict=True))
        for j in range(num_blocks):
          scores[b, i, k, j] += sum(
            p_cmp.get(per_block * j + m - kk, 0.0)
            for m in range(per_block)
            for kk in range(per_cmp)
          )
    return scores

  def select(self, scores: np.ndarray) -> np.ndarray:
    """Eq. 11 from given scores: int32 [B, T, K, n]."""
    n = self.config.num_selected
    ids = np.full((*scores.shape[:3], n), -1, np.int32)
    for b, i, k in np.ndindex(*scores.shape[:3]):
      candidates, forced = self.candidates(b, i)
      free = [j for j in candidates if j not in forced]
      free.sort(key=lambda j: (-scores[b, i, k, j], j))
      chosen = sorted([*forced, *free[: n - len(forced)]])
      ids[b, i, k, : len(chosen)] = chosen
    return ids

  def margin(self, scores: np.ndarray) -> float:
    """The smallest distance of a chosen and a rejected free block.

    Relative, as probabilities have relative errors. Zeros come from masks, and
    tie exactly.
    """
    gap = np.inf
    for b, i, k in np.ndindex(*scores.shape[:3]):
      candidates, forced = self.candidates(b, i)
      free = sorted(scores[b, i, k, j] for j in candidates if j not in forced)
      places = self.config.num_selected - len(forced)
      if 0 < places < len(free) and free[-places] > 0:
        gap = min(gap, 1 - free[-places - 1] / free[-places])
    return gap

  def assert_ids(
    self, ids: Any, scores: np.ndarray, tolerance: float = 1e-5
  ) -> None:
    """Checks the rule of Eq. 11, forgiving only flips within rounding.

    Every chosen free block must score at least as much as every rejected one,
    up to the tolerance: with a margin above it, exactly one set passes.

    Args:
      ids: int32 [B, T, K, n].
      scores: [B, T, K, M], from `scores`.
      tolerance: of scores; by default that of float32, in which every
        implementation computes them unless the inputs are float64.
    """
    ids = np.asarray(ids)
    assert ids.dtype == np.int32
    assert ids.shape == (*scores.shape[:3], self.config.num_selected)
    for b, i, k in np.ndindex(*scores.shape[:3]):
      candidates, forced = self.candidates(b, i)
      where = f"query {(b, i)}, head {k}, ids {ids[b, i, k]}"
      count = min(self.config.num_selected, len(candidates))
      chosen = ids[b, i, k, :count].tolist()
      assert (ids[b, i, k, count:] == -1).all(), where
      assert chosen == sorted(set(chosen)), where
      assert forced <= set(chosen) <= set(candidates), where
      inside = [scores[b, i, k, j] for j in chosen if j not in forced]
      outside = [scores[b, i, k, j] for j in candidates if j not in chosen]
      if inside and outside:
        assert min(inside) >= max(outside) - tolerance, where

  # The whole operation.

  def _branches(
    self, inputs: Mapping[str, Any], ids: Any
  ) -> list[tuple[Any, tuple[Any, Any], Callable]]:
    query = inputs["query"]
    return [
      (
        inputs.get("compressed_query", query),
        inputs["compressed"],
        lambda b, i, k: self.compressed_rows(b, i),
      ),
      (
        query,
        inputs["selected"],
        lambda b, i, k: self.selected_rows(b, i, ids[b, i, k]),
      ),
      (query, inputs["window"], lambda b, i, k: self.window_rows(b, i)),
    ]

  def scores(
    self, inputs: Mapping[str, Any], scale: float | None = None
  ) -> np.ndarray:
    query = inputs.get("compressed_query", inputs["query"])
    key, _ = inputs["compressed"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return self.block_scores(query, key, key.shape[2], scale)

  def native(
    self, inputs: Mapping[str, Any], ids: Any, scale: float | None = None
  ) -> np.ndarray:
    """Eq. 5 with the given block ids."""
    ids = np.asarray(ids)
    scale = inputs["query"].shape[-1] ** -0.5 if scale is None else scale
    gates = float64(inputs["gates"])
    return sum(
      gates[..., c, None] * self.attend(query, *kv, rows, scale)[0]
      for c, (query, kv, rows) in enumerate(self._branches(inputs, ids))
    )

  def native_vjp(
    self,
    inputs: Mapping[str, Any],
    ids: Any,
    dout: Any,
    scale: float | None = None,
  ) -> dict[str, Any]:
    """Gradients of Eq. 5, as a dict like `inputs`."""
    ids = np.asarray(ids)
    scale = inputs["query"].shape[-1] ** -0.5 if scale is None else scale
    gates, dout = float64(inputs["gates"]), float64(dout)
    grads: dict[str, Any] = {
      name: np.zeros(inputs[name].shape)
      for name in ("query", "compressed_query")
      if name in inputs
    }
    dgates = np.zeros(gates.shape)
    for c, (query, kv, rows) in enumerate(self._branches(inputs, ids)):
      out, _ = self.attend(query, *kv, rows, scale)
      dgates[..., c] = (dout * out).sum(-1)
      dq, dk, dv = self.attend_vjp(
        query, *kv, rows, scale, gates[..., c, None] * dout
      )
      own = c == 0 and "compressed_query" in inputs
      grads["compressed_query" if own else "query"] += dq
      grads[BRANCHES[c]] = dk, dv
    return grads | {"gates": dgates}


def mean_blocks(x: Any, config: Any) -> np.ndarray:
  """Block means, one by one: x [B, S, K, H] -> [B, C, K, H]."""
  x = float64(x)
  size, stride = config.compression_block, config.compression_stride
  count = count_compressed(x.shape[1], config)
  out = np.zeros((x.shape[0], count, *x.shape[2:]))
  for i in range(count):
    out[:, i] = x[:, i * stride : i * stride + size].mean(1)
  return out
