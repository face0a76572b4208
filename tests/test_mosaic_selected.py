"""The Mosaic GPU kernels of the selected branch.

On a CPU they are interpreted, which takes seconds a call; the tier `gpu` runs
the same cases compiled.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels.interface import Queries, Spec
from tests import helpers

pytestmark = [pytest.mark.jax_0_11, pytest.mark.usefixtures("no_races")]

CONFIG = NSAConfig()
GPU = jax.default_backend() == "gpu"


def _ids(
  rng: np.random.Generator, shape: tuple[int, ...], blocks: int, count: int
) -> np.ndarray:
  """Random ascending ids, then -1; some lists are empty, some name the future.

  Args:
    rng: generator.
    shape: B, T, K.
    blocks: M.
    count: n.
  """
  order = rng.random((*shape, blocks)).argsort(axis=-1)[..., :count]
  kept = rng.integers(0, count + 1, shape)[..., None]
  kept = np.where(rng.random((*shape, 1)) < 0.5, count, kept)
  ids = np.where(np.arange(order.shape[-1]) < kept, order, blocks)
  ids.sort(axis=-1)
  ids = np.where(ids < blocks, ids, -1)
  missing = count - ids.shape[-1]
  return np.pad(
    ids, [(0, 0)] * 3 + [(0, max(missing, 0))], constant_values=-1
  ).astype(np.int32)


def _inputs(
  *,
  batch: int = 1,
  length: int = 16,
  keys: int = 256,
  kv_heads: int = 1,
  group: int = 16,
  head_dim: int = 64,
  value_dim: int = 64,
  num_ids: int = 4,
  block: int = 64,
  dtype: str = "bfloat16",
) -> tuple[Any, ...]:
  """Query, key, value and ids."""
  rng = np.random.default_rng(0)
  heads = kv_heads * group
  return (
    helpers.normal(rng, (batch, length, heads, head_dim), dtype),
    helpers.normal(rng, (batch, keys, kv_heads, head_dim), dtype),
    helpers.normal(rng, (batch, keys, kv_heads, value_dim), dtype),
    _ids(rng, (batch, length, kv_heads), -(-keys // block), num_ids),
  )


def _attend(
  arrays: tuple[Any, ...],
  implementation: Any = "mosaic_gpu",
  block: int = 64,
  **call: Any,
) -> Any:
  """Out and lse of the selected branch."""
  static: dict[str, Any] = {k: x for k, x in call.items() if isinstance(x, int)}
  traced = {k: x for k, x in call.items() if k not in static}
  attend: Any = functools.partial(
    nsa_jax.selected_attention,
    config=NSAConfig(selection_block=block),
    implementation=implementation,
    **static,
  )
  return jax.jit(lambda arrays, call: attend(*arrays, **call))(arrays, traced)


def _segments(batch: int, length: int, block: int) -> np.ndarray:
  """Segments of random lengths, each from the start of a block, then padding.

  Args:
    batch: B.
    length: S.
    block: l'.
  """
  rng = np.random.default_rng(1)
  segments = np.zeros((batch, length), np.int32)
  for row in segments:
    start = 0
    for segment in range(1, length):
      end = start + int(rng.integers(1, 3 * block))
      row[start:end] = segment
      start = -(-end // block) * block
      if start >= length:
        break
  return segments


def _check(case: dict[str, Any]) -> None:
  """Compares a case with the reference."""
  case = dict(case)
  offset = case.pop("offset", None)
  packed = case.pop("packed", False)
  arrays = _inputs(**case)
  block = case.get("block", 64)
  call: dict[str, Any] = {}
  if offset is not None:
    call["query_offset"] = offset
  if packed:
    batch, keys = arrays[1].shape[:2]
    call["segment_ids"] = _segments(batch, keys, block)
  actual = _attend(arrays, block=block, **call)
  *exact, ids = arrays
  exact = [np.asarray(x, np.float32) for x in exact]
  expected = _attend((*exact, ids), "reference", block=block, **call)
  dtype = case.get("dtype", "bfloat16")
  assert actual[0].dtype == dtype
  helpers.assert_close(actual[0], expected[0], dtype)
  helpers.assert_close(actual[1], expected[1], "float32")


# `length` queries by default the last ones.
CASES: dict[str, dict[str, Any]] = {
  "one block": dict(keys=64, num_ids=1, length=8),
  "odd lengths": dict(
    batch=2, length=13, keys=300, kv_heads=2, head_dim=128, num_ids=3
  ),
  "from the first token": dict(keys=200, length=200, group=32),
  "before the keys and after them": dict(
    batch=2, length=33, offset=np.array([-3, 240], np.int32), group=8
  ),
  "no keys behind the queries": dict(length=20, offset=77, group=64),
  "rows of three heads in four": dict(length=7, group=24, dtype="float16"),
  "long blocks": dict(length=9, keys=512, block=128, kv_heads=2),
  "wide": dict(length=9, head_dim=192, value_dim=128, group=32),
  "wider": dict(length=9, head_dim=256, value_dim=256, num_ids=3),
  "packed": dict(batch=2, length=40, keys=320, offset=200, packed=True),
  "packed, whole": dict(length=320, keys=320, group=64, packed=True),
  "one query": dict(length=1, offset=130, num_ids=2),
  "more ids than blocks": dict(length=8, keys=128, num_ids=5),
}
FAST = ("odd lengths", "packed")


@pytest.mark.parametrize(
  "name",
  [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
  ],
)
def test_matches_the_reference(name: str) -> None:
  _check(CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference_on_a_card(name: str) -> None:
  _check(CASES[name])


LARGE: tuple[dict[str, Any], ...] = tuple(
  dict(
    length=1000,
    keys=4000,
    num_ids=16,
    kv_heads=2,
    group=group,
    dtype=dtype,
    head_dim=head_dim,
    value_dim=value_dim,
    block=block,
  )
  for group, dtype, head_dim, value_dim, block in (
    (16, "bfloat16", 128, 128, 64),
    (16, "float16", 128, 128, 64),
    (8, "bfloat16", 64, 128, 64),
    (32, "bfloat16", 192, 128, 64),
    (64, "float16", 256, 256, 64),
    (40, "bfloat16", 128, 64, 64),
    (16, "bfloat16", 128, 128, 128),
    (16, "bfloat16", 192, 192, 64),
    (16, "bfloat16", 64, 256, 64),
  )
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_matches_the_reference_over_many_blocks(case: dict[str, Any]) -> None:
  _check(case)


@pytest.mark.gpu
def test_a_second_run_has_the_same_bits() -> None:
  arrays = _inputs(**LARGE[0])
  first = _attend(arrays)
  for _ in range(20):
    helpers.assert_same_bits(_attend(arrays), first)


def _bits_do_not_depend_on_neighbours(length: int) -> None:
  query, key, value, ids = _inputs(length=length, keys=512, num_ids=6)
  others = _ids(np.random.default_rng(7), ids.shape[:3], 8, 6)
  even = (np.arange(length) % 2 == 0)[None, :, None, None]
  # A NaN in a query, or in a key that it alone reads, stays with it.
  strange = np.where(even, query, np.asarray(np.nan, query.dtype))
  first = _attend((query, key, value, ids))
  second = _attend((strange, key, value, np.where(even, ids, others)))
  first, second = ([x[:, ::2] for x in result] for result in (first, second))
  helpers.assert_same_bits(second, first)


def test_bits_do_not_depend_on_neighbours() -> None:
  _bits_do_not_depend_on_neighbours(16)


@pytest.mark.gpu
def test_bits_do_not_depend_on_neighbours_on_a_card() -> None:
  _bits_do_not_depend_on_neighbours(512)


@pytest.mark.parametrize(
  "tile",
  [(2, 3, 2), pytest.param((3, 2, 1), marks=pytest.mark.slow)],
  ids=str,
)
def test_tiles_change_no_bit(tile: Any) -> None:
  """Neither the neighbours in a piece nor pieces one after the other do."""
  from pallas_kernels.mosaic_gpu import selected, tiling

  arrays: Any = _inputs(length=29, keys=200, batch=2)
  tiles = tiling.SelectedTiling(tiling.UnionTile(*tile))
  spec = Spec(CONFIG, 64**-0.5, 200, tiles=tiles, interpret=not GPU)
  qkv, index = arrays[:3], (arrays[3], Queries(171))
  selected.check(spec, qkv, index)
  actual = jax.jit(functools.partial(selected.forward, spec))(qkv, index)
  helpers.assert_same_bits(actual, _attend(arrays))


def test_a_query_without_blocks_gets_zeros() -> None:
  """Whatever its neighbours read."""
  query, key, value, ids = _inputs(length=8, keys=64, num_ids=1)
  ids = np.where(np.arange(8)[None, :, None, None] % 2, -1, 0)
  value = np.full_like(value, np.nan)
  out, lse = _attend((query, key, value, ids.astype(np.int32)))
  assert np.isnan(np.asarray(out[:, ::2], np.float32)).all()
  np.testing.assert_array_equal(out[:, 1::2], 0)
  np.testing.assert_array_equal(lse[:, 1::2], -np.inf)


def _unreadable_tokens_change_nothing(packed: bool) -> None:
  query, key, value, ids = _inputs(length=24, keys=300)
  call: dict[str, Any] = {"query_offset": jnp.int32(100)}
  hidden = np.arange(300)[None] > 123
  if packed:
    call["segment_ids"] = _segments(1, 300, 64)
    hidden = hidden | (call["segment_ids"] == 0)
  first = _attend((query, key, value, ids), **call)
  key, value = (
    np.where(hidden[..., None, None], np.asarray(np.nan, x.dtype), x)
    for x in (key, value)
  )
  helpers.assert_same_bits(_attend((query, key, value, ids), **call), first)


@pytest.mark.parametrize("packed", [False, True])
def test_unreadable_tokens_change_nothing(packed: bool) -> None:
  _unreadable_tokens_change_nothing(packed)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "tile", [(2, 3, 2), (3, 2, 1), (3, 4, None), (2, 4, None, False)], ids=str
)
def test_tiles_change_no_bit_on_a_card(tile: Any) -> None:
  test_tiles_change_no_bit(tile)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_unreadable_tokens_change_nothing_on_a_card(packed: bool) -> None:
  _unreadable_tokens_change_nothing(packed)


@pytest.mark.slow
def test_gradients_are_those_of_triton() -> None:
  """With the residuals of this backend's forward."""
  *qkv, ids = _inputs(length=20, keys=100)
  run: Any = nsa_jax.selected_attention

  def gradients(implementation: str) -> Any:
    @jax.jit
    def pullback(qkv: Any) -> Any:
      def loss(*qkv: Any) -> Any:
        out, lse = run(*qkv, ids, config=CONFIG, implementation=implementation)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return out.astype(jnp.float32).sum() + finite.sum()

      return jax.grad(loss, (0, 1, 2))(*qkv)

    return pullback(qkv)

  helpers.assert_close(
    gradients("mosaic_gpu"), gradients("triton"), "bfloat16", gradient=1
  )


@pytest.mark.gpu
def test_more_than_2_to_31_elements() -> None:
  """The last queries are those of a call of their own."""
  length, tail = 2**18 + 64, 40
  arrays = _inputs(
    length=length,
    keys=length,
    kv_heads=4,
    head_dim=128,
    value_dim=128,
    num_ids=8,
  )
  query, key, value, ids = map(jnp.asarray, arrays)
  actual = [x[:, -tail:] for x in _attend((query, key, value, ids))]
  expected = _attend((query[:, -tail:], key, value, ids[:, -tail:]))
  helpers.assert_same_bits(actual, expected)


@pytest.mark.slow
def test_vmap_with_shared_keys() -> None:
  query, key, value, ids = _inputs(length=8)
  queries, lists = np.stack([query, -query]), np.stack([ids, ids])

  def run(query: Any, ids: Any) -> Any:
    return nsa_jax.selected_attention(
      query, key, value, ids, config=CONFIG, implementation="mosaic_gpu"
    )

  mapped = jax.jit(jax.vmap(run))(queries, lists)
  alone = [jax.jit(run)(*x) for x in zip(queries, lists, strict=True)]
  helpers.assert_same_bits(mapped, jax.tree.map(lambda *x: np.stack(x), *alone))


# ------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
  ("sizes", "call", "message"),
  [
    ({"dtype": "float32"}, {}, "`query` of dtype float32"),
    ({"group": 12}, {}, "`query` has 12 heads per key/value head"),
    ({"head_dim": 96}, {}, "`query` has head dimension 96"),
    ({"value_dim": 32}, {}, "`value` has head dimension 32"),
    ({"block": 32}, {}, "`selection_block`=32: the kernels take 64, 128"),
    ({}, {"scale": -1.0}, r"`scale`=-1.0: the kernels take positive ones"),
    (
      {"block": 128, "head_dim": 256, "value_dim": 256},
      {},
      "`selection_block`=128 with head dimensions 256 and 256: two blocks",
    ),
  ],
)
def test_says_what_it_does_not_take(
  sizes: dict[str, Any], call: dict[str, Any], message: str
) -> None:
  arrays = _inputs(**sizes)
  config = NSAConfig(selection_block=sizes.get("block", 64))
  with pytest.raises(NotImplementedError, match=message):
    nsa_jax.selected_attention(
      *arrays, config=config, implementation="mosaic_gpu", **call
    )


def test_takes_fewer_than_2_to_31_keys() -> None:
  from pallas_kernels.mosaic_gpu import selected

  def array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  qkv: Any = array(2**16, 8, 16, 64), *(array(2**16, 2**15, 1, 64),) * 2
  spec = Spec(CONFIG, 1.0, 2**15)
  ids = jax.ShapeDtypeStruct((2**16, 8, 1, 4), jnp.int32)
  index: Any = (ids, Queries(0))
  with pytest.raises(NotImplementedError, match="fewer than 2\\^31 block ids"):
    selected.check(spec, qkv, index)


@pytest.mark.parametrize(
  ("tile", "message"),
  [
    ((1, 4), "`fwd.workers` of .* must be 2 or 3"),
    ((2, 1), "`fwd.num_stages` of .* must be at least 2"),
    ((3, 16), "bytes of shared memory with head dimensions 64 and 64"),
  ],
)
def test_tiles_must_fit(tile: tuple[int, int], message: str) -> None:
  from pallas_kernels.mosaic_gpu import tiling

  tiles = tiling.SelectedTiling(tiling.UnionTile(*tile))
  with pytest.raises(ValueError, match=message):
    tiles.check_fit(64, 64, 64)


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("group", range(8, 65, 8))
def test_no_warpgroup_waits_for_registers(
  lanes: bool, workers: int, group: int
) -> None:
  """A program starts with 65536 at most, the same number for each thread."""
  from pallas_kernels.mosaic_gpu import selected_union

  Sizes: Any = selected_union.Sizes
  given = {"workers": workers, "group": group, "lanes": lanes}
  sizes = Sizes(**dict.fromkeys(Sizes._fields, 1) | given)
  loading, computing = selected_union._registers(sizes)
  start = 65536 // (128 * (workers + 1)) // 8 * 8
  assert loading + workers * computing <= (workers + 1) * start
  assert loading % 8 == computing % 8 == 0
  assert loading <= start <= computing <= 255


# ------------------------------------------------------------------ lowering


def _lower(workers: int = 2, packed: bool = False, **sizes: Any) -> str:
  from pallas_kernels.mosaic_gpu import selected_union, tiling

  head_dims = {k: sizes.get(k, 64) for k in ("head_dim", "value_dim")}
  tiles = tiling.selected_tiling(**head_dims, block=sizes.get("block", 64))
  assert tiles is not None
  tile = tiling.UnionTile(workers, tiles.fwd.num_stages)
  shapes = jax.eval_shape(functools.partial(_shapes, **sizes))
  *qkv, ids, segments = shapes
  config = NSAConfig(selection_block=sizes.get("block", 64))
  spec = Spec(config, 1.0, qkv[1].shape[1])

  def run(query, key, value, ids, segments, offset):
    of_queries = segments[:, : query.shape[1]]
    queries = Queries(
      offset, *((segments, of_queries) if packed else (None, None))
    )
    return selected_union.forward(
      spec, tile, (query, key, value), (ids, queries)
    )

  with helpers.h200():
    traced = jax.jit(run).trace(*qkv, ids, segments, jnp.int32(0))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _shapes(**sizes: Any) -> Any:
  arrays = _inputs(**sizes)
  return *map(jnp.asarray, arrays), jnp.zeros(arrays[1].shape[:2], jnp.int32)


@pytest.mark.parametrize(
  "sizes",
  [
    dict(group=16, head_dim=128, value_dim=128),
    dict(group=16, head_dim=128, value_dim=128, workers=3),
    dict(group=8, length=31, packed=True),
    dict(group=8, length=31, packed=True, workers=3),
    dict(group=24, head_dim=192, value_dim=128, batch=2, kv_heads=2),
    dict(group=64, head_dim=256, value_dim=256, keys=333),
    dict(group=32, block=128, dtype="float16"),
  ],
  ids=str,
)
def test_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert "nsa_selected_fwd" in _lower(**sizes)


LOWERED: dict[str, Any] = {
  "group": tuple(range(8, 65, 8)),
  "head_dim": (64, 128, 192, 256),
  "value_dim": (64, 128, 192, 256),
  "dtype": ("float16", "bfloat16"),
  "packed": (False, True),
  "keys": (65, 333, 1024),
  "length": (1, 48, 65),
  "num_ids": (1, 6, 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_everything_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert "nsa_selected_fwd" in _lower(batch=2, kv_heads=2, **sizes)


def _op(*arrays: Any) -> Any:
  return nsa_jax.selected_attention(
    *arrays, config=CONFIG, implementation="mosaic_gpu"
  )


@pytest.mark.slow
def test_several_devices() -> None:
  """Interpreted, under Auto axes, which compiled kernels are split along."""
  inputs = _inputs(batch=2, length=8, keys=64, kv_heads=2, group=8)
  expected = jax.jit(_op)(*inputs)
  devices = np.array(jax.devices("cpu")[:4]).reshape(2, 2)
  mesh = jax.sharding.Mesh(devices, ("batch", "head"))
  spec = jax.sharding.PartitionSpec("batch", None, "head")
  place = jax.sharding.NamedSharding(mesh, spec)
  split = [jax.device_put(x, place) for x in inputs]
  helpers.assert_same_bits(jax.jit(_op)(*split), expected)


def _gradients(*arrays: Any) -> Any:
  """The forward and the backward."""
  *qkv, ids = arrays
  return jax.grad(
    lambda *qkv: _op(*qkv, ids)[0].astype(jnp.float32).sum(), (0, 1, 2)
  )(*qkv)


def _sharded(*arrays: Any) -> Any:
  mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("batch",))
  spec = P("batch")
  return jax.shard_map(_op, mesh=mesh, in_specs=spec, out_specs=spec)(*arrays)


def _mapped(query: Any, key: Any, value: Any, ids: Any) -> Any:
  """With shared keys, which are not copied."""
  rows = query[:, None], ids[:, None]
  run = jax.vmap(lambda query, ids: _op(query, key[:1], value[:1], ids))
  return run(*rows)


@pytest.mark.parametrize("run", [_gradients, _sharded, _mapped])
def test_every_way_lowers_for_cuda(run: Any) -> None:
  arrays = _shapes(batch=2, length=70, keys=300, group=16)[:4]
  # Triton's kernels ask for the card; inside a mesh of another kind none is
  # known.
  with contextlib.nullcontext() if run is _sharded else helpers.h200():
    traced = jax.jit(run).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  kernels = 3 if run is _gradients else 1
  assert text.count("custom_call @mosaic_gpu") == kernels
  assert "nsa_selected_fwd" in text


def test_exports_without_disabled_checks() -> None:
  arrays = jax.eval_shape(functools.partial(_shapes, length=70, keys=300))[:4]
  program = export.export(jax.jit(_op), platforms=("cuda",))(*arrays)
  text = export.deserialize(program.serialize()).mlir_module()
  assert "nsa_selected_fwd" in text
