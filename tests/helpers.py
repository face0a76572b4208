"""What the tests share: inputs, tolerances, comparisons, compiled callers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
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
from tests.oracle import count_compressed

# Those that serve every call.
IMPLEMENTATIONS = ("reference", "xla")

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


def score_atol(dtype: str) -> float:
  """Absolute tolerance of scores of inputs of `dtype`."""
  return _ATOL[score_dtype(dtype)]


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


# Block selection: the paper's, one score per block, one per token, many blocks.
SELECTIONS = (
  NSAConfig(),
  NSAConfig(64, 64, 64, 16, 1, 2),
  NSAConfig(16, 1, 16, 5, 0, 1),
  NSAConfig(48, 16, 64, 70, 3, 1),
)


def assert_half_gradients(actual: Any, expected: Any, dtype: Any) -> None:
  """Compares dq, dk and dv of kernels in half precision, by norms.

  Args:
    actual: dq, dk and dv in `dtype`.
    expected: the same in float32.
    dtype: bfloat16 or float16.
  """
  for name, x, y in zip(("dq", "dk", "dv"), actual, expected, strict=True):
    assert x.dtype == dtype
    got, want = np.asarray(x, np.float64), np.asarray(y, np.float64)
    # Probabilities, ds and the results are rounded to the dtype: errors of a
    # fraction of an ulp each, relative to the sums.
    ulp = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
    error = np.linalg.norm(got - want) / np.maximum(np.linalg.norm(want), 1e-30)
    assert error < 1.5 * ulp, (name, error)
    where = np.abs(got - want).max() / np.maximum(np.abs(want).max(), 1e-30)
    assert where < 8 * ulp, (name, where)
    # Rows that nothing is read from, or that read nothing, are exactly 0.
    none = (want == 0).all(axis=-1)
    assert (got[none] == 0).all(), name


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


def pair(key: Any, value: Any) -> Any:
  """A KV of NumPy arrays (or of whatever stands for arrays)."""
  return KV(key, value)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Any:
  """N(0, 1) samples, rounded to `dtype` (a NumPy array)."""
  return rng.standard_normal(shape).astype(getattr(ml_dtypes, dtype, dtype))


@dataclasses.dataclass(frozen=True)
class Dims:
  """Sizes of one call; `nsa_jax.typing` explains the letters."""

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

  columns = [[(a, i) for i in range(size)] for a, size in enumerate(sizes)]
  todo = {
    pair
    for two in itertools.combinations(columns, 2)
    for pair in itertools.product(*two)
  }
  rows = []
  while todo:
    (a, i), (b, j) = min(todo)
    tries = rng.integers(0, sizes, (200, len(sizes)))
    tries[:, a], tries[:, b] = i, j
    best = max(tries.tolist(), key=lambda row: len(pairs(row) & todo))
    todo -= pairs(best)
    rows.append({n: factors[n][i] for n, i in zip(names, best, strict=True)})
  return rows


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


def on_cpu() -> Any:
  """A context in which uncommitted arrays are computed on a CPU.

  Expectations compile there faster than on a GPU, where XLA times variants of
  every product.
  """
  return jax.default_device(jax.devices("cpu")[0])


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
  policy = nsa_jax.remat_policy("save_attention" if keep else "full")

  @functools.partial(jax.checkpoint, policy=policy)
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


def poison(tree: Any, where: np.ndarray) -> Any:
  """NaN, inf and -inf in turn where the first axes are marked."""

  def one(x: Any) -> np.ndarray:
    values = np.resize([np.nan, np.inf, -np.inf], x.shape).astype(x.dtype)
    marked = where.reshape(*where.shape, *(x.ndim - where.ndim) * [1])
    return np.where(marked, values, x)

  return jax.tree.map(one, tree)
