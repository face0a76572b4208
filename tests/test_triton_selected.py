"""The Triton kernels of the selected branch.

What the op computes is tested in suite.py; here is what is the kernels' own:
tiles, chunks, sums of pieces, lowering for CUDA.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import nsa_jax
from nsa_jax import NSAConfig
from pallas_kernels import query_chunks
from pallas_kernels.triton import tiling
from pallas_kernels.triton.list_pieces import sum_pieces
from tests import helpers

GPU = jax.default_backend() == "gpu"


def _inputs(
  *,
  batch: int = 1,
  length: int = 72,
  kv_heads: int = 1,
  group: int = 4,
  head_dim: int = 16,
  value_dim: int = 16,
  num_ids: int = 4,
  block: int = 16,
  dtype: Any = jnp.float32,
) -> tuple[Any, ...]:
  """Query, key, value, ids (initial and local blocks in them), cotangents."""
  keys = jax.random.split(jax.random.key(0), 6)

  def normal(key: Any, heads: int, *last: int) -> Any:
    shape = (batch, length, heads, *last)
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)

  heads = kv_heads * group
  ids = random_ids(keys[3], batch, length, kv_heads, num_ids, block)
  return (
    normal(keys[0], heads, head_dim),
    normal(keys[1], kv_heads, head_dim),
    normal(keys[2], kv_heads, value_dim),
    ids,
    normal(keys[4], heads, value_dim),
    normal(keys[5], heads).astype(jnp.float32),
  )


def random_ids(
  key: Any, batch: int, length: int, kv_heads: int, count: int, block: int
) -> Any:
  """One initial, two local blocks, the rest random: int32 [B, T, K, count]."""
  num_blocks = -(-length // block)
  own = jnp.arange(length)[:, None] // block
  index = jnp.arange(num_blocks)

  def row(key: Any) -> Any:
    score = jax.random.uniform(key, (length, num_blocks))
    forced = (index == 0) | ((index <= own) & (index > own - 2))
    score = jnp.where(index <= own, jnp.where(forced, 2.0, score), -1.0)
    best, ids = jax.lax.top_k(score, min(count, num_blocks))
    ids = jnp.sort(jnp.where(best >= 0, ids, num_blocks), axis=-1)
    return jnp.where(ids < num_blocks, ids, -1).astype(jnp.int32)

  rows = jax.lax.map(row, jax.random.split(key, batch * kv_heads))
  rows = rows.reshape(batch, kv_heads, length, -1)
  return jnp.swapaxes(rows, 1, 2)


def _pullback(implementation: Any, config: NSAConfig, **call: Any) -> Any:
  """A jitted function: out, lse and gradients of the selected branch."""

  @jax.jit
  def run(query, key, value, ids, dout, dlse):
    def op(query, key, value):
      return nsa_jax.selected_attention(
        query,
        key,
        value,
        ids,
        config=config,
        implementation=implementation,
        **call,
      )

    result, pullback = jax.vjp(op, query, key, value)
    return result, pullback((dout, dlse))

  return run


@pytest.mark.parametrize("group", [4, 16])
def test_out_and_lse_are_differentiable(group: int) -> None:
  query, key, value, ids, dout, dlse = _inputs(group=group)
  # The last rows read nothing: the block they chose is another segment's. What
  # the cotangent of an lse of -inf is does not matter.
  ids = ids.at[:, 48:].set(jnp.array([0, -1, -1, -1]))
  dlse = dlse.at[:, 48:].set(jnp.nan)
  inputs = (query, key, value, ids, dout, dlse)
  config = NSAConfig(16, 16, 16, 4)
  segment_ids = jnp.where(jnp.arange(72) < 48, 1, 2)[None]
  expected, actual = (
    _pullback(name, config, segment_ids=segment_ids)(*inputs)
    for name in ("reference", "triton")
  )
  assert (np.asarray(expected[0][1])[:, 48:] == -np.inf).all()
  helpers.assert_close(actual[0], expected[0], "float32")
  # dk and dv of the initial block are sums over all queries.
  helpers.assert_close(actual[1], expected[1], "float32", gradient=4)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_traced_ids_far_beyond_the_keys(implementation: Any) -> None:
  """Times the block length they leave int32, and may name block 0."""
  query, key, value, *_ = _inputs(length=24)

  @jax.jit
  def run(ids: Any) -> Any:
    return nsa_jax.selected_attention(
      query,
      key,
      value,
      ids,
      config=NSAConfig(16, 16, 16, 4),
      implementation=implementation,
    )

  near, far = (
    jnp.zeros((1, 24, 1, 3), jnp.int32).at[..., 1:].set(jnp.array(rest))
    for rest in ([-1, -1], [2**28, 2**31 - 1])
  )
  helpers.assert_same_bits(run(far), run(near))


@pytest.mark.parametrize("group", [4, 16])
def test_pieces_and_chunks_change_nothing(group: int) -> None:
  """Lists in pieces, queries in chunks, a block in more than one step."""
  inputs = _inputs(group=group, block=32)
  config = NSAConfig(16, 16, 32, 4)
  expected = _pullback("reference", config)(*inputs)
  tiles = tiling.selected_tiling(
    group=group,
    head_dim=16,
    value_dim=16,
    dtype=inputs[0].dtype,
    block=32,
    num_ids=4,
  )
  half = dataclasses.replace(tiles.fwd, block_k=16)
  tiles = dataclasses.replace(
    tiles,
    rows=16,
    piece=7,
    fwd=half,
    dq=half,
    dkv=half,
    scratch=32 * 4 * 4 * 64,
  )
  actual = _pullback("triton", config, tiles=tiles)(*inputs)
  helpers.assert_close(actual[0], expected[0], "float32")
  helpers.assert_close(actual[1], expected[1], "float32", gradient=4)


@pytest.mark.parametrize(
  "length, offset, segments",
  [
    (37, 0, True),
    (36, 5, False),
    pytest.param(37, 0, False, marks=pytest.mark.slow),
    pytest.param(36, 5, True, marks=pytest.mark.slow),
  ],
)
def test_pairs_of_queries(length: int, offset: int, segments: bool) -> None:
  """Two queries per program: odd lengths, pairs that lie in two blocks."""
  total = length + offset
  query, key, value, ids, dout, dlse = _inputs(
    length=total, batch=2, kv_heads=2, group=12, num_ids=3
  )
  query, ids, dout, dlse = (x[:, offset:] for x in (query, ids, dout, dlse))
  tile = tiling.Tile(16, 1, 2)
  pairs = dataclasses.replace(tile, queries=2)
  tiles = tiling.SelectedTiling(False, pairs, tile, tiling.Tile(16, 4, 2))
  call: dict[str, Any] = {}
  if segments:
    token = jnp.arange(total)
    row = jnp.where(token < 16, 1, jnp.where(token < 32, 2, 0))
    call["segment_ids"] = jnp.stack([row, jnp.ones_like(row)])
  expected = _pullback(
    "reference", NSAConfig(16, 16, 16, 3), query_offset=offset, **call
  )(query, key, value, ids, dout, dlse)

  actual = _pullback(
    "triton", NSAConfig(16, 16, 16, 3), query_offset=offset, tiles=tiles, **call
  )(query, key, value, ids, dout, dlse)
  helpers.assert_close(actual[0], expected[0], "float32")
  helpers.assert_close(actual[1], expected[1], "float32", gradient=4)


@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("length", [48, 80, 96])
def test_blocks_that_end_past_the_keys(length: int, group: int) -> None:
  """Steps of 16 keys in blocks of 64; beyond the keys is another row's NaN."""
  inputs = _inputs(length=length, batch=2, group=group, block=64, num_ids=3)
  query, key, value, ids, dout, dlse = inputs
  config = NSAConfig(16, 16, 64, 3)
  expected = _pullback("reference", config)(*inputs)
  key, value = (x.at[1].set(jnp.nan) for x in (key, value))
  tile = tiling.Tile(16, 4, 2)
  tiles = tiling.SelectedTiling(group <= 8, tile, tile, tile)
  actual = _pullback("triton", config, tiles=tiles)(
    query, key, value, ids, dout, dlse
  )
  actual, expected = jax.tree.map(lambda x: x[:1], (actual, expected))
  helpers.assert_close(actual[0], expected[0], "float32")
  helpers.assert_close(actual[1], expected[1], "float32", gradient=4)


# Four heads of 37 queries, of which 3 heads fit; then 40 and 17 queries.
@pytest.mark.parametrize("group", [3, 12])
@pytest.mark.parametrize(
  ("fit", "heads", "rows"),
  [
    (3 * 37, 2, 37),
    (17, 1, 16),
    pytest.param(10**6, 4, 37, marks=pytest.mark.slow),
    pytest.param(40, 1, 37, marks=pytest.mark.slow),
  ],
)
def test_chunks_of_heads_and_of_queries(
  fit: int, heads: int, rows: int, group: int
) -> None:
  """Whole heads or part of one, over batch, offsets and segments.

  With large groups only the backward pass has chunks.
  """
  sizes: Any = {"batch": 2, "kv_heads": 2, "group": group}
  _, key, value, ids, *_ = _inputs(**sizes, length=53)
  query, _, _, _, dout, dlse = _inputs(**sizes, length=37)
  offset = jnp.array([16, 9], jnp.int32)
  row = jnp.arange(2)[:, None]
  ids = ids[row, offset[:, None] + jnp.arange(37)]
  segment_ids = jnp.array(
    [[1] * 32 + [2] * 18 + [0] * 3, [3] * 16 + [1] * 32 + [2] * 5]
  )
  config = NSAConfig(16, 16, 16, 4)
  call = {"query_offset": offset, "segment_ids": segment_ids}
  arrays = (query, key, value, ids, dout, dlse)
  expected = _pullback("reference", config, **call)(*arrays)
  # The padded group, H (which is l', too), float32.
  pair_bytes = (4 if group == 3 else 16) * 16 * 4
  scratch = fit * 4 * pair_bytes
  chunking = query_chunks.make_chunking(
    ids, pair_bytes=pair_bytes, key_length=53, block=16, scratch=scratch
  )
  assert (chunking.heads, chunking.queries) == (heads, rows)
  tiles = tiling.selected_tiling(
    group=group,
    head_dim=16,
    value_dim=16,
    dtype=query.dtype,
    block=16,
    num_ids=4,
  )
  tiles = dataclasses.replace(tiles, scratch=scratch)
  run = _pullback("triton", config, tiles=tiles, **call)
  actual = run(*arrays)
  helpers.assert_close(actual[0], expected[0], "float32")
  helpers.assert_close(actual[1], expected[1], "float32", gradient=4)


@pytest.mark.parametrize("group", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_x64_changes_no_bit(group: int) -> None:
  inputs = _inputs(group=group, length=40, dtype=jnp.bfloat16)
  expected = _pullback("triton", NSAConfig(16, 16, 16, 4))(*inputs)
  with jax.enable_x64(True):
    actual = _pullback("triton", NSAConfig(16, 16, 16, 4))(*inputs)
  helpers.assert_same_bits(actual, expected)


@pytest.mark.parametrize(
  "interpret", [True, pytest.param(False, marks=pytest.mark.gpu)]
)
def test_pieces_are_added_in_order(interpret: bool) -> None:
  counts = [0, 1, 7, 8, 9, 30, 0]
  starts = np.cumsum([0, *counts])
  shape = starts[-1] + 3, 16, 48
  partial = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  partial[starts[-1] :] = np.nan  # Unused pieces.
  got = sum_pieces(
    jnp.asarray(partial),
    jnp.asarray(starts, jnp.int32),
    jnp.float32,
    interpret=interpret,
  )
  for total, first, last in zip(got, starts[:-1], starts[1:], strict=True):
    expected = np.zeros(shape[1:], np.float32)
    for piece in partial[first:last]:
      expected += piece
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
  "length,block,head_dim",
  [
    (72, 16, 16),
    # Two steps per block, and a last program of one query.
    pytest.param(205, 32, 16, marks=pytest.mark.slow),
    pytest.param(2048, 16, 128, marks=pytest.mark.gpu),
    pytest.param(2031, 64, 128, marks=pytest.mark.gpu),
  ],
)
def test_first_of_a_pair_knows_nothing_of_the_second(
  length: int, block: int, head_dim: int, segmented: bool
) -> None:
  """Its bits are the same whatever the second is and chose."""
  rng = np.random.default_rng(0)
  sizes: Any = {"head_dim": head_dim, "value_dim": head_dim, "block": block}
  query, key, value, ids, *cotangents = _inputs(
    length=length, group=16, num_ids=4, dtype=jnp.bfloat16, **sizes
  )
  pairs, tile = tiling.Tile(16, 1, 2, 2), tiling.Tile(16, 4, 2)
  position = jnp.arange(length)[None]
  segment_ids = jnp.where(position < 2 * block, 1, 2).astype(jnp.int32)
  pullback = _pullback(
    "triton",
    NSAConfig(16, 16, block, 4),
    tiles=tiling.SelectedTiling(False, pairs, tile, tile),
    segment_ids=segment_ids if segmented else None,
  )

  def run(query: Any, ids: Any) -> Any:
    return pullback(query, key, value, ids, *cotangents)[0]

  expected = run(query, ids)
  second = position[..., None, None] % 2 == 1
  for seed in range(3):
    other = random_ids(jax.random.key(9 + seed), 1, length, 1, 4, block)
    if seed == 2:  # Fewer blocks than the first.
      other = jnp.where(jnp.arange(4) < rng.integers(1, 4), other, -1)
    others = jnp.where(second, -query, query), jnp.where(second, other, ids)
    changed = run(*others)
    helpers.assert_same_bits(
      [x[:, ::2] for x in changed], [x[:, ::2] for x in expected]
    )


@pytest.mark.parametrize("group", [2, 16])
def test_vmap(group: int) -> None:
  query, key, value, ids, _, _ = _inputs(batch=2, length=40, group=group)
  config = NSAConfig(16, 16, 16, 4)

  def op(*arrays):
    return nsa_jax.selected_attention(
      *arrays, config=config, implementation="triton"
    )

  arrays = (query, key, value, ids)
  whole = jax.jit(op)(*arrays)
  one_by_one = jax.jit(jax.vmap(op))(*(x[:, None] for x in arrays))
  helpers.assert_close([x[:, 0] for x in one_by_one], whole, "float32")


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma: bool) -> None:
  query, key, value, ids, *_ = _inputs(batch=2, length=40)
  config = NSAConfig(16, 16, 16, 4)
  mesh = jax.make_mesh(
    (2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
  )

  def op(*arrays):
    return nsa_jax.selected_attention(
      *arrays, config=config, implementation="triton"
    )

  spec = PartitionSpec("batch")
  sharded = jax.shard_map(
    op, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
  )
  arrays = (query, key, value, ids)
  helpers.assert_same_bits(jax.jit(sharded)(*arrays), jax.jit(op)(*arrays))


def test_unsupported_calls_say_why() -> None:
  query, key, value, ids, *_ = _inputs(length=16)
  config = NSAConfig(16, 16, 16, 4)

  def op(query, key, value, config=config, implementation: Any = "triton"):
    return nsa_jax.selected_attention(
      query, key, value, ids, config=config, implementation=implementation
    )

  def narrow(x):
    return x[..., :8]

  with pytest.raises(NotImplementedError, match=r"`query`.*dimension 8.*16"):
    op(narrow(query), narrow(key), value)
  with pytest.raises(NotImplementedError, match=r"`value`.*dimension 8.*16"):
    op(query, key, narrow(value))
  with pytest.raises(NotImplementedError, match=r"`selection_block`=48"):
    op(query, key, value, NSAConfig(16, 16, 48, 4))
  with pytest.raises(NotImplementedError, match=r"`query` has 65 heads"):
    op(jnp.tile(query[:, :, :1], (1, 1, 65, 1)), key, value)
  with jax.enable_x64(True):
    wide = [x.astype(jnp.float64) for x in (query, key, value)]
    with pytest.raises(NotImplementedError, match=r"`query` of dtype float64"):
      op(*wide)
  assert op(narrow(query), narrow(key), value, implementation=("triton", "xla"))


# ------------------------------------------------------------------- lowering


def _lower(**sizes: Any) -> str:
  """The selected branch, forward and backward, lowered for an H200."""
  inputs = jax.eval_shape(functools.partial(_inputs, **sizes))
  config = NSAConfig(16, 16, sizes.get("block", 16), 4)
  with helpers.h200():
    traced = _pullback("triton", config).trace(*inputs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


LOWERED: dict[str, Any] = {
  "group": (1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
  "head_dim": (16, 32, 64, 96, 128, 192, 256),
  "value_dim": (16, 32, 64, 96, 128, 192, 256),
  "block": (16, 32, 64, 128),
  "dtype": (jnp.float16, jnp.bfloat16, jnp.float32),
  # The second is a multiple of all steps, and not of the longer blocks.
  "length": (333, 352),
}


@pytest.mark.parametrize(
  "sizes",
  [
    {"group": 4, "head_dim": 96, "value_dim": 64, "block": 64},
    {"group": 16, "head_dim": 192, "value_dim": 128, "block": 64},
    # Too many ids for pairs of queries.
    {"group": 16, "head_dim": 128, "num_ids": 80, "length": 2048},
  ],
  ids=str,
)
def test_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  text = _lower(**{"length": 256, "dtype": jnp.bfloat16, **sizes})
  names = (
    ("nsa_selected_by_block_fwd", "nsa_selected_merge")
    if sizes["group"] <= 8
    else ("nsa_selected_fwd", "nsa_selected_dq", "nsa_selected_dkv")
  )
  assert all(name in text for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_every_tiling_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  assert "__gpu$xla.gpu.triton" in _lower(**sizes)


def test_cpu_programs_hold_no_kernel() -> None:
  inputs = jax.eval_shape(_inputs)
  lowered = _pullback("triton", NSAConfig(16, 16, 16, 4)).lower(*inputs)
  if not GPU:
    assert "triton" not in lowered.as_text()


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_gpu_matches_reference_everywhere(sizes: dict[str, Any]) -> None:
  """Every head size, block length, dtype and many group sizes, compiled."""
  config = NSAConfig(16, 16, sizes["block"], 4)
  with helpers.on_cpu():
    inputs = _inputs(**sizes, kv_heads=2)
    wide = [x.astype(jnp.float32) for x in (*inputs[:3], inputs[4])]
    expected = _pullback("reference", config)(
      *wide[:3], inputs[3], wide[3], inputs[5]
    )
  actual = _pullback("triton", config)(*inputs)
  dtype = jnp.dtype(sizes["dtype"]).name
  helpers.assert_close(actual[0], expected[0], dtype)
  # Sums over all queries times the group, of terms rounded to the dtype.
  growth = sizes["length"] ** 0.5 * sizes["group"] ** 0.5
  helpers.assert_close(actual[1], expected[1], dtype, gradient=growth)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("length", [8192, 32768])
def test_gpu_matches_xla_at_length(group: int, length: int) -> None:
  inputs = _inputs(
    length=length,
    kv_heads=2,
    group=group,
    head_dim=128,
    value_dim=128,
    num_ids=16,
    block=64,
    dtype=jnp.bfloat16,
  )
  config = NSAConfig()
  wide = [x.astype(jnp.float32) for x in (*inputs[:3], inputs[4])]
  expected = _pullback("xla", config)(*wide[:3], inputs[3], wide[3], inputs[5])
  actual = _pullback("triton", config)(*inputs)
  again = _pullback("triton", config)(*inputs)
  helpers.assert_same_bits(actual, again)
  helpers.assert_close(actual[0], expected[0], "bfloat16")
  dq, dk, dv = zip(actual[1], expected[1], strict=True)
  helpers.assert_close(*dq, "bfloat16", gradient=2)
  for pair in (dk, dv):
    got, want = (np.asarray(x, np.float32) for x in pair)
    # Terms rounded to bfloat16 add up over as many queries as chose the block,
    # all of them for the first: the error follows the size of the sum.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 2**-7, error


@pytest.mark.gpu
@pytest.mark.parametrize("heads,kv_heads", [(64, 4), (32, 8)])
def test_gpu_more_than_2_to_31_elements(heads: int, kv_heads: int) -> None:
  """A long call, against calls of a quarter of its heads.

  On a card of 80 GiB it needs a process of its own (`-n 0`) and
  XLA_PYTHON_CLIENT_PREALLOCATE=true: without, memory is too fragmented.
  """
  length = 2**31 // (heads * 128) + 4096
  count, block = 16, 64
  keys = jax.random.split(jax.random.key(0), 6)

  def normal(key: Any, heads: int) -> Any:
    return jax.random.normal(key, (1, length, heads, 128), jnp.bfloat16)

  # One block of every sixteenth of what a query sees.
  blocks = (jnp.arange(length) // block + 1)[:, None]
  place = jnp.arange(count)
  low, high = (blocks * (place + i) // count for i in range(2))
  some = jax.random.randint(keys[3], (kv_heads, length, count), 0, 2**30)
  ids = jnp.where(
    blocks >= count,
    low + some % jnp.maximum(high - low, 1),
    jnp.where(place < blocks, place, -1),
  )
  ids = jnp.swapaxes(ids, 0, 1)[None].astype(jnp.int32)
  query, dout = normal(keys[0], heads), normal(keys[4], heads)
  assert query.size > 2**31
  key, value = normal(keys[1], kv_heads), normal(keys[2], kv_heads)
  dlse = jax.random.normal(keys[5], (1, length, heads))
  inputs = query, key, value, ids, dout, dlse
  run = _pullback("triton", NSAConfig())
  (out, lse), (dq, dk, dv) = run(*inputs)
  # On the host: a card of 80 GiB has no room for more.
  rows = [np.asarray(x) for x in (out, lse, dq)]
  del out, lse, dq
  for quarter in range(4):

    def part(x: Any, quarter: int = quarter) -> Any:
      heads = x.shape[2] // 4
      return x[:, :, quarter * heads : (quarter + 1) * heads]

    expected, (want_dq, *want) = run(*map(part, inputs))
    for x, y in zip(rows, (*expected, want_dq), strict=True):
      bits = f"u{x.itemsize}"
      assert (part(x).view(bits) == np.asarray(y).view(bits)).all()
    for x, y in zip((dk, dv), want, strict=True):
      # The lists of the blocks may be cut at other places.
      got, wide = part(x).astype(jnp.float32), y.astype(jnp.float32)
      error = jnp.linalg.norm(got - wide) / jnp.linalg.norm(wide)
      assert error < 2**-7, error
