"""What the tests share: inputs, a NumPy oracle, tolerances, comparisons.

The oracle is a second derivation of the operation, from the paper's equations
in 0-based form: plain Python loops over batch row, query and head, in float64,
with the gradients of each softmax row worked out by hand. It shares no code
with nsa_jax and is kept too slow to be clever.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import AbstractDevice, AbstractMesh

import nsa_jax
from nsa_jax import KV, NSAConfig, dispatch
from pallas_kernels.interface import Spec

# The one place to add an implementation to every behavioural test.
IMPLEMENTATIONS = ("reference", "xla")
# Those that support jax.jvp.
FORWARD_MODE = ("reference", "xla")

BRANCHES = ("compressed", "selected", "window")

# ----------------------------------------------------------------- tolerances

_ATOL = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
_RTOL = {
  "float64": 2.0**-40,  # XLA's float64 exp and log are not correctly rounded
  "float32": 2.0**-23,
  "float16": 2.0**-10,
  "bfloat16": 2.0**-7,
}


def score_dtype(dtype: str) -> str:
  """The dtype in which scores and lse are computed."""
  return "float64" if dtype == "float64" else "float32"


def assert_close(
  actual: Any,
  expected: Any,
  dtype: str,
  *,
  gradient: float = 0.0,
  what: str = "",
) -> None:
  """Compares trees at the tolerance of `dtype`.

  Args:
    actual: Any tree.
    expected: One of the same structure.
    dtype: Name of the dtype whose tolerance holds.
    gradient: 0 for results; for gradients `Dims.gradient_growth`, or 1.
    what: Prefix of the message.
  """
  actual_leaves = jax.tree.leaves_with_path(actual)
  expected_leaves = jax.tree.leaves(expected)
  assert len(actual_leaves) == len(expected_leaves), what
  for (path, a), e in zip(actual_leaves, expected_leaves, strict=True):
    np.testing.assert_allclose(
      np.asarray(a).astype(np.float64),
      np.asarray(e).astype(np.float64),
      atol=_ATOL[dtype] * (2 * gradient or 1),
      rtol=_RTOL[dtype],
      err_msg=f"{what}{jax.tree_util.keystr(path)}",
    )


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
  """Compares trees bit for bit (0 and -0 count as equal, NaN is refused)."""
  for (path, a), e in zip(
    jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    name = f"{what}{jax.tree_util.keystr(path)}"
    assert not np.isnan(np.asarray(a, np.float64)).any(), name
    np.testing.assert_array_equal(np.asarray(a), np.asarray(e), err_msg=name)


# --------------------------------------------------------------------- inputs


def int32(x: Any) -> Any:
  return np.asarray(x, np.int32)


def float32(x: Any) -> Any:
  return np.asarray(x, np.float32)


def float64(x: Any) -> np.ndarray:
  return np.asarray(x, np.float64)


def pair(key: Any, value: Any) -> Any:
  """A KV of NumPy arrays (or of whatever stands for arrays)."""
  return KV(key, value)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Any:
  """N(0, 1) samples, rounded to `dtype` (a NumPy array)."""
  return rng.standard_normal(shape).astype(getattr(ml_dtypes, dtype, dtype))


@dataclasses.dataclass(frozen=True)
class Dims:
  """Sizes of one call; the letters are those of semantics."""

  config: NSAConfig
  batch: int = 2
  queries: int = 29
  keys: int = 29
  kv_heads: int = 2
  group: int = 2
  head_dim: int = 16
  value_dim: int = 8

  @property
  def heads(self) -> int:
    return self.kv_heads * self.group

  def gradient_growth(self, dtype: str) -> float:
    """How much larger than 2 * atol rounding makes errors of gradients.

    The gradient of a probability, u = dout . v, is a sum of V products and so
    N(0, V). In half precision something of its size is rounded to the value
    dtype on its way into dq and dk. Autodiff of `xla` rounds u itself, the
    cotangent of the weights that were cast for the product with the values,
    before delta = sum p u is subtracted; flash kernels round p * (u - delta)
    for the products with keys and queries. Both are errors of sqrt(V) ulp where
    2 * atol allows for about two. dk and dv also sum the independent errors of
    the G heads of a group. In float32 both stay far below the tolerance.
    """
    if dtype not in ("float16", "bfloat16"):
      return 1.0
    return max(1.0, self.value_dim**0.5 / 2) * max(1.0, self.group**0.5 / 2)

  @property
  def num_compressed(self) -> int:
    return count_compressed(self.keys, self.config)


def make_inputs(
  dims: Dims, dtype: str, seed: int = 0, *, compressed_query: bool = False
) -> dict[str, Any]:
  """The differentiable arguments of native_sparse_attention."""
  rng = np.random.default_rng(seed)
  b, t, s = dims.batch, dims.queries, dims.keys

  def tokens(rows: int) -> KV:
    shape = (b, rows, dims.kv_heads)
    return KV(
      normal(rng, (*shape, dims.head_dim), dtype),
      normal(rng, (*shape, dims.value_dim), dtype),
    )

  query_shape = (b, t, dims.heads, dims.head_dim)
  inputs = {
    "query": normal(rng, query_shape, dtype),
    "compressed": tokens(dims.num_compressed),
    "selected": tokens(s),
    "window": tokens(s),
    "gates": rng.uniform(size=(b, t, dims.heads, 3)).astype(
      getattr(ml_dtypes, dtype, dtype)
    ),
  }
  if compressed_query:
    inputs["compressed_query"] = normal(rng, query_shape, dtype)
  return inputs


def make_cotangent(dims: Dims, dtype: str, seed: int = 1) -> Any:
  rng = np.random.default_rng(seed)
  shape = (dims.batch, dims.queries, dims.heads, dims.value_dim)
  return normal(rng, shape, dtype)


def packed_segments(dims: Dims) -> np.ndarray:
  """Aligned segment ids [B, S] with padding between, before and after."""
  out = np.zeros((dims.batch, dims.keys), np.int32)
  block = dims.config.selection_block
  for b in range(dims.batch):
    # Row 0: documents of 1.5 blocks, row 1: one block of padding first. The
    # ids are neither dense nor ascending: only equality has a meaning.
    start, ids = (0, (7, 2, 9)) if b % 2 == 0 else (block, (4, 1, 6))
    length = block + block // 2 + b
    for segment in ids:
      out[b, start : start + length] = segment
      start += -(-length // block) * block
  return out


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  """Rows that hold every pair of values of every two factors (greedy)."""
  names = list(factors)
  sizes = [len(factors[name]) for name in names]
  rng = np.random.default_rng(0)

  def pairs(row: Sequence[int]) -> set[Any]:
    return set(itertools.combinations(enumerate(row), 2))

  todo = set().union(*(pairs(r) for r in np.ndindex(*sizes)))
  rows = []
  while todo:
    (a, i), (b, j) = min(todo)
    tries = rng.integers(0, sizes, (200, len(sizes)))
    tries[:, a], tries[:, b] = i, j
    best = max(tries.tolist(), key=lambda row: len(pairs(row) & todo))
    todo -= pairs(best)
    rows.append({n: factors[n][i] for n, i in zip(names, best, strict=True)})
  return rows


# ------------------------------------------------------- what a query may read


def count_compressed(length: int, config: NSAConfig) -> int:
  """Blocks [i*d, i*d + l) that fit into the row, counted one by one."""
  starts = range(0, length, config.compression_stride)
  return sum(s + config.compression_block <= length for s in starts)


def count_selection(length: int, config: NSAConfig) -> int:
  return len(range(0, length, config.selection_block))


@dataclasses.dataclass(frozen=True)
class Oracle:
  """The rules of one call: positions, segments, and all that follows.

  Attributes:
    config: The hyper-parameters.
    length: S, tokens in a row of keys.
    queries: T.
    batch: B.
    offset: int or int [B]; None: the queries are the last T.
    segment_ids: int [B, S] or None.
    query_segment_ids: int [B, T] or None.
    key_offset: Position of the first key row (window only).
  """

  config: NSAConfig
  length: int
  queries: int
  batch: int
  offset: Any = None
  segment_ids: Any = None
  query_segment_ids: Any = None
  key_offset: int = 0

  def position(self, b: int, i: int) -> int:
    if self.offset is None:
      return self.length - self.queries + i
    return int(np.broadcast_to(self.offset, (self.batch,))[b]) + i

  def token_segment(self, b: int, s: int) -> int:
    return 1 if self.segment_ids is None else int(self.segment_ids[b, s])

  def query_segment(self, b: int, i: int) -> int:
    """The query's segment, 0 if it behaves like padding."""
    row = self.position(b, i) - self.key_offset
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
    t, segment = self.position(b, i), self.query_segment(b, i)
    if segment == 0:
      return []
    return [
      s
      for s in range(self.length)
      if s // self.config.selection_block in set(int(j) for j in ids)
      and s <= t
      and self.token_segment(b, s) == segment
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
      if first <= s + self.key_offset <= t
      and self.token_segment(b, s) == segment
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
    for b, i, h in np.ndindex(*lse.shape):
      k = h // group
      if see := rows(b, i, k):
        score = scale * key[b, see, k] @ query[b, i, h]
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
    group = query.shape[2] // key.shape[2]
    dq, dk, dv = (np.zeros_like(x) for x in (query, key, value))
    for b, i, h in np.ndindex(*query.shape[:3]):
      k = h // group
      if not (see := rows(b, i, k)):
        continue
      score = scale * key[b, see, k] @ query[b, i, h]
      p = np.exp(score - score.max())
      p /= p.sum()
      u = value[b, see, k] @ dout[b, i, h]
      dscore = p * (u - p @ u + (0.0 if dlse is None else dlse[b, i, h]))
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
    for b, i, h in np.ndindex(b_, t_, n_):
      if not (see := self.compressed_rows(b, i)):
        continue
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

  def assert_ids(self, ids: Any, scores: np.ndarray, dtype: str) -> None:
    """Checks the rule of Eq. 11, forgiving only flips within rounding.

    Every chosen free block must score at least as much as every rejected one,
    up to the tolerance: with a margin above it, exactly one set passes.
    """
    tolerance = _ATOL[score_dtype(dtype)]
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
  ) -> list[tuple[Any, KV, Callable]]:
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
    key = inputs["compressed"].key
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
      grads[BRANCHES[c]] = pair(dk, dv)
    return grads | {"gates": dgates}


# ------------------------------------------------------------ compiled callers


@functools.cache
def native(
  implementation: Any, config: NSAConfig, query_offset: int | None = None
) -> Callable:
  """A jitted f(inputs, integers) -> (out, block_ids).

  Args:
    implementation: Its name.
    config: The hyper-parameters.
    query_offset: A static offset; a traced one goes into `integers`.
  """
  static: dict[str, Any] = {}
  if query_offset is not None:
    static["query_offset"] = query_offset

  @jax.jit
  def run(inputs: Any, integers: Any) -> Any:
    return nsa_jax.native_sparse_attention(
      **inputs,
      **integers,
      **static,
      config=config,
      return_block_ids=True,
      implementation=implementation,
    )

  return run


@functools.cache
def native_vjp(implementation: Any, config: NSAConfig) -> Callable:
  """A jitted f(inputs, integers, dout) -> (out, block_ids, gradients).

  Cached, and so is jit's own cache: tests that share shapes share the compile.
  """

  @jax.jit
  def run(inputs: Any, integers: Any, dout: Any) -> Any:
    def forward(inputs: Any) -> Any:
      return nsa_jax.native_sparse_attention(
        **inputs,
        **integers,
        config=config,
        return_block_ids=True,
        implementation=implementation,
      )

    out, pullback, ids = jax.vjp(forward, inputs, has_aux=True)
    return out, ids, pullback(dout)[0]

  return run


def h200() -> Any:
  """A context in which programs for CUDA are lowered for an H200."""
  device = AbstractDevice(
    device_kind="NVIDIA H200", num_cores=132, platform="gpu"
  )
  return jax.sharding.use_abstract_mesh(
    AbstractMesh((), (), abstract_device=device)
  )


def run_kernel(op: str, spec: Spec, arrays: Any, index: Any) -> Any:
  """An op of the Triton backend alone: nothing cleans up its arguments."""
  from pallas_kernels import triton

  served = getattr(triton, op)
  served.check(spec, arrays, index)
  kernel = dispatch.Kernel(served.forward, served.backward)
  return dispatch.attend(dispatch.Plan(op, spec, kernel, kernel), arrays, index)


def remat_vjp(keep: bool, config: NSAConfig) -> Callable:
  """f(inputs, dout) -> (out, gradients) of the op under `jax.checkpoint`.

  Args:
    keep: whether the values that the op names are saved.
    config: of the op.
  """
  policies = jax.checkpoint_policies
  names = (f"nsa_{b}_{x}" for b in BRANCHES for x in ("out", "lse"))
  saved = policies.save_only_these_names(*names, "nsa_block_ids")

  @functools.partial(
    jax.checkpoint, policy=saved if keep else policies.nothing_saveable
  )
  def attend(inputs: Any) -> Any:
    return nsa_jax.native_sparse_attention(**inputs, config=config)

  def run(inputs: Any, dout: Any) -> Any:
    out, pullback = jax.vjp(attend, inputs)
    return out, pullback(dout)

  return run


def training_step(implementation: Any) -> Any:
  """A jitted training step of one layer, and its arguments."""
  layer = nsa_jax.NativeSparseAttention(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    config=NSAConfig(8, 4, 16, 3, 1, 1, 16),
    implementation=implementation,
  )
  x = jax.random.normal(jax.random.key(0), (1, 40, 32))
  params = jax.jit(layer.init)(jax.random.key(1), x)

  @jax.jit
  def step(params: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
      return jnp.square(layer.apply(params, x) - x).mean()

    loss, grads = jax.value_and_grad(loss)(params)
    return loss, optax.apply_updates(params, grads)

  return step, (params, x)


@functools.cache
def pipeline_vjp(implementation: Any, config: NSAConfig) -> Callable:
  """Like `native_vjp`, from tokens: the compressed pair is made by `mean`.

  `tokens` holds query, gates and three token-level pairs, so that a property
  of the whole computation (causality, packing, padding) can be tested.
  """

  @jax.jit
  def run(tokens: Any, integers: Any, dout: Any) -> Any:
    def forward(tokens: Any) -> Any:
      return nsa_jax.native_sparse_attention(
        **compress(tokens, config, integers.get("segment_ids")),
        **integers,
        config=config,
        return_block_ids=True,
        implementation=implementation,
      )

    out, pullback, ids = jax.vjp(forward, tokens, has_aux=True)
    return out, ids, pullback(dout)[0]

  return run


def compress(tokens: Any, config: NSAConfig, segment_ids: Any = None) -> Any:
  """Replaces the token-level compressed pair by its block means."""
  blocks = KV(
    *(
      nsa_jax.compress_mean(x, config=config, segment_ids=segment_ids)
      for x in tokens["compressed"]
    )
  )
  return {**tokens, "compressed": blocks}


def make_tokens(dims: Dims, dtype: str, seed: int = 0) -> dict[str, Any]:
  """Inputs of `pipeline_vjp`: the compressed pair is at token level."""
  tokens = make_inputs(dims, dtype, seed)
  rng = np.random.default_rng(seed + 100)
  # Block means of N(0, 1) tokens have scores near 0; sharper keys keep the
  # selection away from ties, so that ids can be compared exactly.
  tokens["compressed"] = KV(
    4 * normal(rng, tokens["selected"].key.shape, dtype),
    normal(rng, tokens["selected"].value.shape, dtype),
  )
  return tokens


def mean_blocks(x: Any, config: NSAConfig) -> np.ndarray:
  """Block means, one by one: x [B, S, K, H] -> [B, C, K, H]."""
  x = float64(x)
  size, stride = config.compression_block, config.compression_stride
  count = count_compressed(x.shape[1], config)
  out = np.zeros((x.shape[0], count, *x.shape[2:]))
  for i in range(count):
    out[:, i] = x[:, i * stride : i * stride + size].mean(1)
  return out


def poison(tree: Any, where: np.ndarray) -> Any:
  """NaN, inf and -inf in turn in the rows [B, rows] that are marked."""

  def one(x: Any) -> np.ndarray:
    values = np.resize([np.nan, np.inf, -np.inf], x.shape).astype(x.dtype)
    return np.where(where.reshape(*where.shape, *(x.ndim - 2) * [1]), values, x)

  return jax.tree.map(one, tree)
