"""The backward kernels of the selected branch on Mosaic GPU.

What the ops compute is tested in suite.py; here is what is the kernels' own:
pieces and their order, chunks, unions of neighbours, what they leave to Triton,
lowering for CUDA. On a CPU they are interpreted; the tier `gpu` runs the same
cases compiled.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import selected_vjp, tiling
from pallas_kernels.mosaic_gpu.selected_lists import COUNT_BITS, union_lists
from pallas_kernels.query_chunks import (
  first_rows,
  ids_of_rows,
  make_chunk,
)
from tests import helpers
from tests.test_mosaic_selected import GPU, LARGE, _ids, _inputs, _segments

pytestmark = [pytest.mark.jax_0_11, pytest.mark.usefixtures("no_races")]

CONFIG = NSAConfig()


def _tile(
  query: Any, value: Any, **changes: Any
) -> tiling.SelectedGradientTile:
  """The heuristic's tiles, some of them changed; two programs interpreted."""
  tile = tiling.selected_gradient_tile(query.shape[-1], value.shape[-1])
  few = {} if GPU else {"blocks": 2}
  return dataclasses.replace(tile, **(few | changes))


def _index(
  arrays: tuple[Any, ...], offset: Any, segments: Any
) -> tuple[Any, Queries]:
  """Block ids and queries, as the op makes them."""
  query, key, _, ids = arrays
  batch, length = query.shape[:2]
  of_queries: Any = None
  if segments is not None:
    position = np.reshape(offset, (-1, 1)) + np.arange(length)[None]
    position = np.broadcast_to(position, (batch, length))
    last = key.shape[1] - 1
    of_queries = np.take_along_axis(segments, position.clip(0, last), 1)
    inside = (position >= 0) & (position <= last)
    of_queries = np.where(inside, of_queries, 0)
  return ids, Queries(offset, segments, of_queries)


def _cotangents(arrays: tuple[Any, ...], call: dict[str, Any]) -> Any:
  """Out, lse, dout and dlse, and the gradients, of the reference in float32."""
  query, key, value, ids = arrays
  rng = np.random.default_rng(3)
  shape = *query.shape[:3], value.shape[-1]
  dout = rng.standard_normal(shape).astype(query.dtype)
  dlse = rng.standard_normal(query.shape[:3]).astype(np.float32)

  @jax.jit
  def run(query: Any, key: Any, value: Any, dout: Any, dlse: Any) -> Any:
    op: Any = functools.partial(
      nsa_jax.selected_attention,
      config=CONFIG,
      implementation="reference",
      **call,
    )
    (out, lse), pullback = jax.vjp(
      lambda *qkv: op(*qkv, ids), query, key, value
    )
    # As `nsa_jax` does: nothing comes to queries that read nothing.
    empty = lse == -jnp.inf
    dout = jnp.where(empty[..., None], 0, dout)
    dlse = jnp.where(empty, 0, dlse)
    return out, lse, dout, dlse, pullback((dout, dlse))

  with jax.default_matmul_precision("highest"):
    wide = [np.asarray(x, np.float32) for x in (query, key, value, dout)]
    out, lse, dout, dlse, expected = run(*wide, dlse)
  return (
    (out.astype(query.dtype), lse, dout.astype(query.dtype), dlse),
    expected,
  )


def _gradients(
  arrays: tuple[Any, ...],
  rest: tuple[Any, ...],
  *,
  offset: Any = None,
  segments: Any = None,
  **changes: Any,
) -> Any:
  """dq, dk and dv of the kernels."""
  query, key, value, _ = arrays
  if offset is None:
    offset = key.shape[1] - query.shape[1]
  spec = Spec(CONFIG, query.shape[-1] ** -0.5, key.shape[1], interpret=not GPU)
  tile = _tile(query, value, **changes)
  index = _index(arrays, offset, segments)

  @jax.jit
  def run(qkv: Any, index: Any, rest: Any) -> Any:
    return selected_vjp.backward(spec, tile, qkv, index, *rest)

  return run(arrays[:3], index, rest)


def _check(case: dict[str, Any]) -> None:
  """Compares a case with the reference."""
  case = dict(case)
  tiles = case.pop("tiles", {})
  offset = case.pop("offset", None)
  packed = case.pop("packed", False)
  arrays = _inputs(**case)
  batch, keys = arrays[1].shape[:2]
  call: dict[str, Any] = {}
  if offset is not None:
    call["query_offset"] = offset
  segments = _segments(batch, keys, 64) if packed else None
  if packed:
    call["segment_ids"] = segments
  rest, expected = _cotangents(arrays, call)
  actual = _gradients(arrays, rest, offset=offset, segments=segments, **tiles)
  helpers.assert_half_gradients(actual, expected, arrays[0].dtype)


# Odd lengths, pieces that end within a step, several chunks and heads of a
# chunk, groups, widths (of the last ones a piece has two warpgroups).
CASES: dict[str, dict[str, Any]] = {
  "packed, widths": dict(
    length=24, keys=256, offset=150, packed=True, value_dim=128
  ),
  "chunks, pieces": dict(
    length=20,
    kv_heads=2,
    tiles=dict(piece=6, near=4, scratch=1),
  ),
  "odd lengths": dict(batch=2, length=37, keys=300, kv_heads=2, num_ids=3),
  "packed rows": dict(batch=2, length=40, keys=320, offset=200, packed=True),
  "rows, group of 8": dict(
    batch=2, length=33, offset=helpers.int32([-3, 240]), group=8
  ),
  "group of 64, float16": dict(
    length=9, group=64, head_dim=128, dtype="float16"
  ),
  "wide, pieces": dict(
    length=24,
    keys=200,
    group=32,
    head_dim=192,
    value_dim=128,
    tiles=dict(piece=5, near=7),
  ),
  "wider, packed": dict(
    length=80,
    keys=128,
    offset=40,
    group=8,
    head_dim=256,
    value_dim=256,
    num_ids=2,
    packed=True,
  ),
  "from the first token": dict(
    length=200, keys=200, tiles=dict(piece=20, near=16, blocks=3)
  ),
  "no keys behind the queries": dict(length=20, offset=77),
  "one query": dict(length=1, offset=130, num_ids=2),
}
FAST = ("packed, widths", "chunks, pieces")


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


@pytest.mark.gpu
@pytest.mark.parametrize(
  "case",
  [
    case | tiles
    for case in LARGE
    if 64 % case["group"] == 0 and case["block"] == 64
    for tiles in ({}, {"tiles": dict(piece=32, near=100, scratch=2**24)})
  ],
  ids=str,
)
def test_matches_the_reference_over_many_blocks(case: dict[str, Any]) -> None:
  _check({k: x for k, x in case.items() if k != "block"})


@pytest.mark.gpu
def test_a_second_run_has_the_same_bits() -> None:
  arrays = _inputs(**LARGE[0])
  rest, _ = _cotangents(arrays, {})
  first = _gradients(arrays, rest)
  for _ in range(20):
    helpers.assert_same_bits(_gradients(arrays, rest), first)


def _neighbours_change_no_bit(length: int) -> None:
  """dq of a query does not depend on what its neighbours chose."""
  query, key, value, ids = _inputs(length=length, keys=512, num_ids=6)
  others = _ids(np.random.default_rng(7), ids.shape[:3], 8, 6)
  even = (np.arange(length) % 2 == 0)[None, :, None, None]
  rest, _ = _cotangents((query, key, value, ids), {})
  first, second = (
    _gradients((query, key, value, chosen), rest)[0][:, ::2]
    for chosen in (ids, np.where(even, ids, others))
  )
  helpers.assert_same_bits(second, first)


def test_neighbours_change_no_bit() -> None:
  _neighbours_change_no_bit(8)


@pytest.mark.gpu
def test_neighbours_change_no_bit_on_a_card() -> None:
  _neighbours_change_no_bit(512)


def _unreadable_tokens_change_nothing(packed: bool) -> None:
  arrays = _inputs(length=24, keys=300)
  query, key, value, ids = arrays
  call: dict[str, Any] = {"query_offset": 100}
  hidden = np.arange(300)[None] > 123
  segments = None
  if packed:
    segments = call["segment_ids"] = _segments(1, 300, 64)
    hidden = hidden | (segments == 0)
  rest, _ = _cotangents(arrays, call)
  where = {"offset": jnp.int32(100), "segments": segments}
  first = _gradients(arrays, rest, **where)
  key, value = (
    np.where(hidden[..., None, None], np.asarray(np.nan, x.dtype), x)
    for x in (key, value)
  )
  second = _gradients((query, key, value, ids), rest, **where)
  helpers.assert_same_bits(second, first)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_unreadable_tokens_change_nothing(packed: bool) -> None:
  _unreadable_tokens_change_nothing(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_unreadable_tokens_change_nothing_on_a_card(packed: bool) -> None:
  _unreadable_tokens_change_nothing(packed)


def _one_call(key: Any, value: Any) -> Any:
  """A call's gradients, as a function of queries, ids and cotangent."""
  run: Any = functools.partial(
    nsa_jax.selected_attention, config=CONFIG, implementation="mosaic_gpu"
  )

  def one(query: Any, ids: Any, dout: Any) -> Any:
    (_, lse), pull = jax.vjp(lambda *qkv: run(*qkv, ids), query, key, value)
    return pull((dout, jnp.zeros_like(lse)))

  return one


def _mapped_twice(query: Any, key: Any, value: Any, ids: Any, dout: Any) -> Any:
  """The gradients of calls mapped over [2, 2] queries."""
  return jax.vmap(jax.vmap(_one_call(key, value)))(query, ids, dout)


def _four_calls() -> tuple[Any, ...]:
  """Inputs of `_mapped_twice`, with shared keys.

  Each query's cotangent has one entry that is not 0: so the sum of its products
  with the output is exact, in whichever order XLA adds them.
  """
  query, key, value, ids = _inputs(batch=4, length=100, keys=500, num_ids=3)
  rng = np.random.default_rng(1)
  shape = *query.shape[:3], value.shape[-1]
  place = rng.integers(0, shape[-1], (*shape[:3], 1))
  dout = rng.standard_normal(shape, np.float32) * (
    np.arange(shape[-1]) == place
  )
  query, ids, dout = (
    x.reshape(2, 2, 1, *x.shape[1:])
    for x in (query, ids, jnp.asarray(dout, query.dtype))
  )
  return query, key[:1], value[:1], ids, dout


@pytest.mark.gpu
def test_mapped_calls_on_a_card() -> None:
  """A call that is mapped twice has the bits of single calls."""
  query, key, value, ids, dout = _four_calls()
  actual = jax.jit(_mapped_twice)(query, key, value, ids, dout)
  for i, j in np.ndindex(2, 2):
    one = jax.jit(_one_call(key, value))
    alone = one(query[i, j], ids[i, j], dout[i, j])
    helpers.assert_same_bits([x[i, j] for x in actual], list(alone))


# ----------------------------------------------------------------------- pieces


def test_the_order_of_pieces() -> None:
  """Each piece once, by range of the middle query, the longest first."""
  arrays = _inputs(batch=2, length=100, keys=300, kv_heads=2, num_ids=3)
  tile = _tile(arrays[0], arrays[2], piece=7, near=16)
  spec = Spec(CONFIG, 1.0, 300)
  schedule = selected_vjp.make_schedule(spec, tile, arrays[:3], arrays[3])
  chunking = schedule.chunking
  rows = ids_of_rows(jnp.asarray(arrays[3]), chunking)
  offset = jnp.full(2, 200, jnp.int32)
  chunk = make_chunk(first_rows(rows, chunking)[0], rows, offset, chunking, 7)
  work = np.asarray(selected_vjp.work_of(schedule, chunk)).reshape(-1, 4)
  assert len(work) == schedule.num_pieces
  assert sorted(work[:, 3]) == list(range(len(work)))
  pieces = np.asarray(chunk.lists.pieces)
  np.testing.assert_array_equal(work[:, :3], pieces[work[:, 3]])
  owner, first, last, _ = work.T
  full = int((last > first).sum())
  assert (last > first)[:full].all()
  middle = np.asarray(chunk.lists.items)[(first + last) // 2]
  query = middle // chunking.num_ids
  keys = zip(
    owner // chunking.num_blocks, query // 16, first - last, strict=True
  )
  order = list(keys)[:full]
  assert order == sorted(order)


# ----------------------------------------------------------------------- unions


def _unions(
  ids: np.ndarray, offset: np.ndarray, first: int, queries: int, per_tile: int
) -> list[list[tuple[int, list[int]]]]:
  """Blocks and their readers, of the tiles of a chunk of one or more heads.

  Args:
    ids: [rows, T, n], padded with -1.
    offset: [rows], positions of the first queries.
    first: first query of the chunk.
    queries: queries of the chunk.
    per_tile: queries of a tile.
  """
  tiles = []
  for row, position in zip(ids, offset, strict=True):
    for start in range(0, queries, per_tile):
      union: dict[int, list[int]] = {}
      for reader in range(min(per_tile, queries - start)):
        t = first + start + reader
        last = (position + t) // 64 if 0 <= position + t < 300 else -1
        for block in row[t] if t < len(row) else ():
          if 0 <= block <= last:
            union.setdefault(int(block), []).append(reader)
      tiles.append(sorted(union.items()))
  return tiles


@pytest.mark.parametrize("group", [8, 16, 64])
@pytest.mark.parametrize("scratch", [2**31, 1])
def test_unions_of_tiles(group: int, scratch: int) -> None:
  """Of whole heads, and of 16 queries of a head at a time."""
  arrays = _inputs(
    batch=2, length=53, keys=300, kv_heads=2, num_ids=3, group=group
  )
  ids = _ids(np.random.default_rng(5), (2, 53, 2), 5, 3)
  ids[:, 7:9] = -1
  # Some queries are before the first key, and some after the last one.
  offset = np.asarray([-9, 261], np.int32)
  schedule = selected_vjp.make_schedule(
    Spec(CONFIG, 1.0, 300),
    _tile(arrays[0], arrays[2], scratch=scratch),
    arrays[:3],
    jnp.asarray(ids),
  )
  chunking, per_tile = schedule.chunking, 2 * 64 // group
  assert chunking.heads == (4 if scratch > 1 else 1)
  rows = ids_of_rows(jnp.asarray(ids), chunking)
  by_head = ids.swapaxes(1, 2).reshape(4, 53, 3)
  for first_row in first_rows(rows, chunking):
    chunk = make_chunk(first_row, rows, jnp.asarray(offset), chunking, 7)
    lists = selected_vjp.tile_lists(schedule, chunk)
    actual = []
    for blocks, readers, count in zip(*map(np.asarray, lists), strict=True):
      at, union = 0, []
      for _ in range(count):
        bits = [x for x in range(per_tile) if readers[at] >> x & 1]
        assert readers[at] >> COUNT_BITS == len(bits)
        union.append((int(blocks[at]), bits))
        at += len(bits)
      assert readers[at] == 0
      actual.append(union)
    head, first = divmod(int(first_row), chunking.length)
    heads = np.arange(head, head + chunking.heads)
    expected = _unions(
      by_head[heads], offset[heads // 2], first, chunking.queries, per_tile
    )
    assert actual == expected


def test_a_repeated_id_is_no_other_query() -> None:
  """Under `jit` no argument check sees it; its neighbours stay right."""
  ids = jnp.asarray([[[0, 1, 2], [0, 3, -1], [0, 1, 1], [0, 2, -1]]])
  lists = union_lists(ids)
  mask = 2**COUNT_BITS - 1
  found = {
    int(block): int(readers & mask)
    for block, readers in reversed(
      list(zip(lists.blocks[0], lists.readers[0], strict=True))
    )
    if readers
  }
  assert found == {0: 0b1111, 1: 0b0101, 2: 0b1001, 3: 0b0010}
  assert lists.counts.tolist() == [4]


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ("tile", "match"),
  [
    ({"num_stages": 1}, "stages of `bwd` of .* must be at least 2"),
    ({"dq_stages": 1}, "stages of `bwd` of .* must be at least 2"),
    ({"piece": 0}, "`bwd.piece` of .* must be at least 1"),
    ({"near": 0}, "`bwd.near` of .* must be at least 1"),
    ({"blocks": 0}, "`bwd.blocks` of .* must be at least 1, or None"),
    ({"num_stages": 3}, "takes 281984 bytes .* in the dk, dv kernel"),
    ({"dq_stages": 7}, "takes 262144 bytes of shared memory in the dq kernel"),
  ],
  ids=str,
)
def test_tiles_that_do_not_fit(tile: Any, match: str) -> None:
  bwd = tiling.SelectedGradientTile(**tile)
  tiles = tiling.SelectedTiling(tiling.UnionTile(2, 2), bwd)
  with pytest.raises(ValueError, match=match):
    tiles.check_fit(128, 128, 64)


@pytest.mark.parametrize("value_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_tiles_of_the_heuristic_fit(head_dim: int, value_dim: int) -> None:
  tiles = tiling.SelectedTiling(
    tiling.UnionTile(2, 2), tiling.selected_gradient_tile(head_dim, value_dim)
  )
  tiles.check_fit(head_dim, value_dim, 64)


# -------------------------------------------------------------------- lowering


def _lower(
  packed: bool = False, tiles: Any = None, block: int = 64, **sizes: Any
) -> str:
  """The backward pass of the backend, lowered for an H200."""
  from pallas_kernels.mosaic_gpu import selected

  def inputs() -> Any:
    query, key, value, ids = map(jnp.asarray, _inputs(block=block, **sizes))
    dout = jnp.zeros((*query.shape[:3], value.shape[-1]), query.dtype)
    lse = jnp.zeros(query.shape[:3], jnp.float32)
    return (query, key, value), ids, dout, lse

  shapes = jax.eval_shape(inputs)
  query, key, value = shapes[0]
  tiles = tiles and tiling.SelectedTiling(
    tiling.UnionTile(2, 2), _tile(query, value, **tiles)
  )
  config = NSAConfig(selection_block=block)
  spec = Spec(config, 1.0, key.shape[1], tiles=tiles)

  def run(qkv: Any, ids: Any, dout: Any, lse: Any) -> Any:
    ones = [jnp.ones(x.shape[:2], jnp.int32) for x in (key, query)]
    queries = Queries(0, *(ones if packed else (None, None)))
    index = ids, queries
    return selected.backward(spec, qkv, index, dout, lse, dout, lse)

  with helpers.h200():
    traced = jax.jit(run).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  "sizes",
  [
    dict(group=16, head_dim=128, value_dim=128),
    dict(group=32, length=31, packed=True),
    dict(group=64, head_dim=256, value_dim=256, keys=333),
  ],
  ids=str,
)
def test_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert _lower(**sizes).count("custom_call @mosaic_gpu") == 2


def test_mapped_calls_lower_for_cuda() -> None:
  arrays = map(jnp.asarray, _four_calls())
  with helpers.h200():
    traced = jax.jit(_mapped_twice).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 3


def test_chunks_write_in_place() -> None:
  text = _lower(length=70, kv_heads=2, tiles=dict(scratch=1))
  assert text.count("custom_call @mosaic_gpu") == 2  # in a loop
  assert "output_operand_aliases = [#" in text


LOWERED: dict[str, Any] = {
  "group": (8, 16, 32, 64),
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
  text = _lower(batch=2, kv_heads=2, **sizes)
  assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("sizes", [dict(group=24), dict(block=128)], ids=str)
def test_triton_does_the_rest(sizes: dict[str, Any]) -> None:
  text = _lower(length=20, keys=300, **sizes)
  assert "custom_call @mosaic_gpu" not in text
