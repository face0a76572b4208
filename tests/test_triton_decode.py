"""The decode kernels against the reference.

It knows neither caches nor lengths: it gets full rows of keys and the positions
of the queries. What no query may read is poisoned: rows after the last query,
rows of the ring that no window covers, padding of queries and gates.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import KV, NSAConfig
from pallas_kernels.interface import DecodeArrays, Queries, Spec
from pallas_kernels.triton.tiling import DecodeTiling, Tile
from tests import helpers
from tests.helpers import Dims
from tests.oracle import Oracle, mean_blocks

BASE = NSAConfig(8, 4, 16, 4, 1, 1, window=20)
# Every loop takes several steps at test sizes, and no cut is even.
SMALL = DecodeTiling(
  rows=16,
  compressed=Tile(16, 4, 1),
  splits=3,
  block_m=4,
  blocks=Tile(16, 4, 1),
  selected_steps=1,
  window_steps=1,
  merge_warps=1,
)


@functools.cache
def _decode(
  config: NSAConfig,
  tiles: DecodeTiling | None,
  means: NSAConfig | None = None,
) -> Any:
  """A jitted f(inputs, ring or None, offset, lengths) -> (out, ids)."""

  @jax.jit
  def run(inputs, ring, offset, lengths):
    query, selected = inputs["query"], inputs["selected"]
    scale = query.shape[-1] ** -0.5
    return helpers.run_kernel(
      "decode",
      Spec(config, scale, selected.key.shape[1], tiles=tiles, means=means),
      DecodeArrays(
        query,
        inputs.get("compressed_query", query),
        inputs["compressed"],
        selected,
        ring,
        inputs["gates"],
        means=inputs.get("means"),
      ),
      (lengths, Queries(offset)),
    )

  return run


def _ring(window: KV, lengths: Any, rows: int) -> KV:
  """The newest `rows` positions, each at its place; NaN where there are none.

  So that a position read twice or not at all shows, rows are as many as a cache
  has, no multiple of a tile.
  """

  def one(x):
    ring = np.full((len(x), rows, *x.shape[2:]), np.nan, x.dtype)
    for b, length in enumerate(lengths):
      for p in range(max(0, length - rows), length):
        ring[b, p % rows] = x[b, p]
    return ring

  return KV(*map(one, window))


@dataclasses.dataclass(frozen=True)
class Case:
  """Newest tokens of ragged rows.

  Attributes:
    dims: sizes; `keys` is the capacity.
    dtype: of all arrays.
    offset: position of the first query of each row.
    lengths: tokens of each row.
    ring: the window has keys of its own.
    append: max_append of the cache, which makes the ring longer.
    compressed_query: the compressed branch has a query of its own.
    means: tokens of the means that select; None for the compressed keys.
    tiles: tile sizes.
  """

  dims: Dims
  dtype: str
  offset: tuple[int, ...]
  lengths: tuple[int, ...]
  ring: bool = False
  append: int = 5
  compressed_query: bool = False
  means: int | None = None
  tiles: DecodeTiling | None = SMALL


def _run(case: Case) -> tuple[Any, Any, Any]:
  """Inputs, and out and ids of the kernels on poisoned ones."""
  dims, config = case.dims, case.dims.config
  inputs = helpers.make_inputs(
    dims, case.dtype, compressed_query=case.compressed_query
  )
  if not case.ring:
    inputs["window"] = inputs["selected"]
  offset, lengths = helpers.int32(case.offset), helpers.int32(case.lengths)
  position = offset[:, None] + np.arange(dims.queries)
  padding = (position < 0) | (position >= lengths[:, None])
  last = np.where(padding, -1, position).max(1, initial=-1)[:, None]
  future = np.arange(dims.keys) > last
  ends = (
    np.arange(dims.num_compressed) * config.compression_stride
    + config.compression_block
    - 1
  )
  poisoned = inputs | {
    "compressed": helpers.poison(inputs["compressed"], ends > last),
    "selected": helpers.poison(inputs["selected"], future),
  }
  means = _means(case)
  if means is not None:
    inputs["means"] = mean_blocks(inputs["selected"].key, means).astype(
      inputs["query"].dtype
    )
    stride = means.compression_stride
    ends = (np.arange(inputs["means"].shape[1]) + 1) * stride - 1
    poisoned["means"] = helpers.poison(inputs["means"], ends > last)
  for name in ("query", "gates", "compressed_query"):
    if name in poisoned:
      poisoned[name] = helpers.poison(inputs[name], padding)
  ring = None
  if case.ring:
    ring = _ring(
      helpers.poison(inputs["window"], future),
      case.lengths,
      config.window + case.append - 1,
    )
  run = _decode(config, case.tiles, means)
  out, ids = run(poisoned, ring, offset, lengths)
  assert out.dtype == inputs["query"].dtype
  assert (np.asarray(out)[padding] == 0).all()
  assert (np.asarray(ids)[padding] == -1).all()
  return inputs, out, ids


def _means(case: Case) -> NSAConfig | None:
  """The config whose compressed blocks are the means of a case."""
  if case.means is None:
    return None
  return nsa_jax.SelectByMeans(case.means).blocks(case.dims.config)


def _check(case: Case) -> None:
  dims, config = case.dims, case.dims.config
  inputs, out, ids = _run(case)
  offset, lengths = helpers.int32(case.offset), helpers.int32(case.lengths)
  # The oracle knows no lengths: it judges the queries that are there.
  oracle = Oracle(config, dims.keys, dims.queries, dims.batch, offset=offset)
  scores = oracle.scores(inputs)
  means = _means(case)
  if means is not None:
    query = inputs["query"]
    scores = dataclasses.replace(oracle, config=means).block_scores(
      query,
      inputs["means"],
      dims.kv_heads,
      query.shape[-1] ** -0.5,
    )
  expected_ids = oracle.select(scores)
  position = offset[:, None] + np.arange(dims.queries)
  padding = (position < 0) | (position >= lengths[:, None])
  judged = np.where(padding[..., None, None], expected_ids, ids)
  oracle.assert_ids(judged, scores)
  if oracle.margin(scores) > 1e-4:
    np.testing.assert_array_equal(judged, expected_ids)
  expected = oracle.native(inputs, ids)
  expected[padding] = 0
  helpers.assert_close(out, expected, case.dtype)


def _dims(queries: int, group: int, **kwargs: Any) -> Dims:
  sizes: dict[str, Any] = {
    "config": BASE,
    "keys": 101,
    "kv_heads": 2,
    "value_dim": 16,
  }
  return Dims(**(sizes | kwargs), queries=queries, group=group)


CASES: dict[str, Case] = {
  "one token": Case(_dims(1, 2), "float32", (100, 57), (101, 58)),
  "bfloat16": Case(
    _dims(2, 3, head_dim=48, value_dim=32), "bfloat16", (98, 66), (100, 68)
  ),
  # Three queries have more rows than a tile takes: several tiles.
  "large group": Case(
    _dims(3, 16, kv_heads=1), "float32", (97, 79), (100, 82), ring=True
  ),
  "rows of a tile left over": Case(
    _dims(5, 3, kv_heads=1),
    "float32",
    (96, 33),
    (101, 38),
    compressed_query=True,
  ),
  "group of one": Case(
    _dims(5, 1), "bfloat16", (93, 15), (98, 20), ring=True, append=8
  ),
  # Padding before, after, everywhere; keys after the last query.
  "padding": Case(
    _dims(5, 2, batch=4, kv_heads=1),
    "float32",
    (-2, 98, 40, 70),
    (3, 100, 40, 90),
    ring=True,
    append=21,
  ),
  "short prompts": Case(
    _dims(2, 2, batch=4), "float32", (0, 5, 6, 7), (2, 7, 8, 9), ring=True
  ),
  "no compressed block": Case(
    _dims(2, 2, keys=7), "float32", (0, 5), (2, 7), ring=True
  ),
  "few blocks": Case(_dims(1, 2, keys=61), "float32", (60, 30), (61, 31)),
  # More places than all warps together compare: one list, sorted one by one.
  "many selected blocks": Case(
    _dims(1, 2, keys=1501, config=NSAConfig(8, 4, 16, 70, 2, 1, window=20)),
    "float32",
    (1500, 1200),
    (1501, 1201),
    tiles=dataclasses.replace(SMALL, block_m=128),
  ),
  "all forced": Case(
    _dims(1, 2, config=NSAConfig(8, 4, 16, 3, 2, 1, window=20)),
    "float32",
    (100, 30),
    (101, 31),
  ),
  "no initial block, one ratio": Case(
    _dims(2, 2, config=NSAConfig(16, 16, 16, 3, 0, 2, window=20)),
    "float32",
    (99, 64),
    (101, 66),
    tiles=dataclasses.replace(SMALL, block_m=16),
  ),
  "no initial block, overlap": Case(
    _dims(1, 2, config=NSAConfig(12, 4, 16, 5, 0, 1, window=120)),
    "float32",
    (100, 64),
    (101, 65),
  ),
  "means of 4": Case(
    _dims(2, 3, head_dim=32, value_dim=16),
    "float32",
    (98, 57),
    (100, 59),
    ring=True,
    compressed_query=True,
    means=4,
  ),
  "means of one token": Case(
    _dims(1, 2), "bfloat16", (100, 57), (101, 58), means=1
  ),
  "means of half a block": Case(
    _dims(2, 2, config=NSAConfig(16, 16, 16, 3, 0, 2, window=20)),
    "float32",
    (99, 64),
    (101, 66),
    means=8,
    tiles=dataclasses.replace(SMALL, block_m=16),
  ),
  "means, default tiles": Case(
    _dims(5, 16, kv_heads=1),
    "bfloat16",
    (96, 33),
    (101, 38),
    means=4,
    tiles=None,
  ),
  "default tiles": Case(
    _dims(5, 16, kv_heads=1),
    "bfloat16",
    (96, 33),
    (101, 38),
    ring=True,
    tiles=None,
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name: str) -> None:
  _check(CASES[name])


MORE: dict[str, Any] = {
  "config": (
    BASE,
    NSAConfig(8, 2, 16, 3, 0, 2, window=7),
    NSAConfig(16, 8, 32, 3, 1, 1, window=33),
  ),
  "queries": (1, 2, 5),
  "group": (1, 2, 3, 16),
  "widths": ((16, 16), (48, 16), (16, 32)),
  "dtype": ("float32", "bfloat16", "float16"),
  "offset": ((120, 64), (-1, 47), (7, 95)),
  "ring": (False, True),
  "compressed_query": (False, True),
  "means": (None, 2, 4),
  "tiles": (
    None,
    SMALL,
    dataclasses.replace(
      SMALL, splits=1, rows=32, block_m=16, window_steps=2, selected_steps=3
    ),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", helpers.pairwise(MORE), ids=str)
def test_matches_oracle_more(case: dict[str, Any]) -> None:
  _check(_more(case))


def _more(case: dict[str, Any]) -> Case:
  case = dict(case)
  head_dim, value_dim = case.pop("widths")
  dims = _dims(
    case.pop("queries"),
    case.pop("group"),
    config=case.pop("config"),
    keys=131,
    head_dim=head_dim,
    value_dim=value_dim,
  )
  lengths = tuple(o + dims.queries for o in case["offset"])
  return Case(dims, lengths=lengths, **case)


@pytest.mark.parametrize(
  "implementation",
  [
    "reference",
    "xla",
    "triton",
    pytest.param("triton", marks=pytest.mark.gpu, id="triton-gpu"),
  ],
)
def test_what_is_not_finite_is_seen(implementation: Any) -> None:
  """One query: a NaN or an infinity shows where it is read, nowhere else."""
  dims = _dims(1, 2, keys=112)
  lengths = helpers.int32([101, 58])
  inputs = helpers.make_inputs(dims, "float32")
  oracle = Oracle(BASE, dims.keys, 1, 2, offset=lengths - 1)
  held = nsa_jax.cache.init(
    2,
    dims.keys,
    config=BASE,
    num_kv_heads=2,
    head_dim=dims.head_dim,
    value_head_dim=dims.value_dim,
  )

  @jax.jit
  def run(inputs: Any, ring: Any) -> Any:
    return nsa_jax.cache.attend(
      inputs["query"],
      held._replace(
        lengths=lengths,
        compressed=inputs["compressed"],
        selected=inputs["selected"],
        window=ring,
      ),
      inputs["gates"],
      config=BASE,
      query_offset=lengths - 1,
      return_block_ids=True,
      implementation=implementation,
    )

  places = {
    "query": (0, 0, 1, 3),
    "compressed": (0, 4, 1, 3),
    "selected": (0, 5, 1, 3),
    "window": (0, 90, 1, 3),
    "gates": (0, 0, 1, 1),
  }
  for name, value in itertools.product(places, (np.nan, np.inf, -np.inf)):
    pair = isinstance(inputs[name], KV)
    for part in range(2 if pair else 1):
      arrays = [x.copy() for x in (inputs[name] if pair else [inputs[name]])]
      arrays[part][places[name]] = value
      call = {**inputs, name: KV(*arrays) if pair else arrays[0]}
      ring = _ring(call["window"], lengths, BASE.window)
      out, ids = jax.device_get(run(call, ring))
      with np.errstate(all="ignore"):
        expected = oracle.native(call, ids)
        scores = oracle.scores(call)
      assert not np.isfinite(expected).all()
      # A NaN is the lowest score: the first blocks are chosen.
      unknown = np.isnan(scores).any(-1)
      scores = np.where(np.isnan(scores), -1, scores)
      np.testing.assert_array_equal(
        ids[unknown], oracle.select(scores)[unknown]
      )
      np.testing.assert_array_equal(
        np.isfinite(out),
        np.isfinite(expected),
        err_msg=f"{value} in {name}, part {part}",
      )


def test_a_second_run_has_the_same_bits() -> None:
  case = CASES["large group"]
  helpers.assert_same_bits(_run(case)[1:], _run(case)[1:])


@pytest.mark.slow
def test_splits_and_pieces_change_rounding_only() -> None:
  case = CASES["one token"]
  other = dataclasses.replace(
    SMALL, splits=1, block_m=16, window_steps=7, selected_steps=7
  )
  *_, out, ids = _run(case)
  *_, out_2, ids_2 = _run(dataclasses.replace(case, tiles=other))
  np.testing.assert_array_equal(ids, ids_2)
  helpers.assert_close(out, out_2, "float32")


def _ids_of_equal_keys(
  config: NSAConfig,
  keys: int,
  offset: int,
  queries: int,
  tiles: DecodeTiling | None,
) -> Any:
  """Ids [T, n] of queries of two heads."""
  row = np.ones((1, keys, 1, 16), np.float32)
  blocks = row[:, : nsa_jax.num_compressed_blocks(keys, config)]
  inputs = {
    "query": np.ones((1, queries, 2, 16), np.float32),
    "compressed": helpers.pair(blocks, blocks),
    "selected": helpers.pair(row, row),
    "gates": np.ones((1, queries, 2, 3), np.float32),
  }
  start, length = helpers.int32([offset]), helpers.int32([offset + queries])
  return _decode(config, tiles)(inputs, None, start, length)[1][0, :, 0]


def test_ties_go_to_the_lower_index() -> None:
  """With equal keys all blocks but the first, which has 7 of 8 shares, tie."""
  config = NSAConfig(8, 4, 16, 5, 0, 2, window=16)
  ids = _ids_of_equal_keys(config, 160, 143, 2, SMALL)
  assert ids.tolist() == [[1, 2, 3, 7, 8], [1, 2, 3, 8, 9]]


def test_ties_among_many_blocks() -> None:
  """All blocks tie, in the shares of all warps and in several chunks."""
  config = NSAConfig(16, 16, 16, 16, 0, 2, window=16)
  ids = _ids_of_equal_keys(config, 33600, 33599, 1, None)
  assert ids.tolist() == [[*range(14), 2098, 2099]]


def test_many_blocks() -> None:
  """A row of blocks that fills several chunks of the selection kernel."""
  config = NSAConfig(16, 16, 16, 16, 1, 2, window=16)
  dims = Dims(config, 1, 1, 33600, kv_heads=1, value_dim=16)
  case = Case(dims, "float32", (33599,), (33600,), tiles=None)
  inputs, _, ids = _run(case)
  expected = helpers.native("reference", config, 33599)(inputs, {})[1]
  np.testing.assert_array_equal(ids, expected)


def test_vmap() -> None:
  case = CASES["one token"]
  inputs = helpers.make_inputs(case.dims, "float32")
  offset, lengths = helpers.int32(case.offset), helpers.int32(case.lengths)
  run = _decode(BASE, SMALL)
  rows = jax.tree.map(lambda x: x[:, None], (inputs, offset, lengths))
  one_by_one = jax.vmap(lambda x, o, n: run(x, None, o, n))(*rows)
  together = run(inputs, None, offset, lengths)
  for got, want in zip(one_by_one, together, strict=True):
    np.testing.assert_array_equal(got[:, 0], want)


def test_x64_changes_no_bit() -> None:
  case = CASES["one token"]
  expected = _run(case)[1:]
  with jax.enable_x64(True):
    helpers.assert_same_bits(_run(case)[1:], expected)


def test_has_no_derivative() -> None:
  case = CASES["one token"]
  inputs = helpers.make_inputs(case.dims, "float32")
  offset, lengths = helpers.int32(case.offset), helpers.int32(case.lengths)

  def loss(inputs):
    return _decode(BASE, SMALL)(inputs, None, offset, lengths)[0].sum()

  with pytest.raises(NotImplementedError, match=r"cache\.attend has no"):
    jax.grad(loss)(inputs)


@pytest.mark.parametrize(
  ("dims", "changes", "message"),
  [
    # A tile has 4 selection blocks of 4 compressed keys.
    (_dims(1, 2), {"block_m": 2}, "`tiles`=.* multiple of the 4 selec"),
    (
      _dims(1, 2),
      {"blocks": Tile(32, 4, 1)},
      "`blocks` that divides `selection_block`=16",
    ),
    (_dims(1, 17), {}, "`tiles`=.* as many `rows` as a group has heads, 17"),
    (
      _dims(1, 2, config=NSAConfig(8, 4, 128, 4, 1, 1, window=20)),
      {},
      "`compressed` that is a multiple of .* 32",
    ),
  ],
)
def test_tiles_that_do_not_fit(
  dims: Dims, changes: dict[str, Any], message: str
) -> None:
  inputs = helpers.make_inputs(dims, "float32")
  offset, lengths = (helpers.int32([x] * dims.batch) for x in (99, 100))
  tiles = dataclasses.replace(SMALL, **changes)
  with pytest.raises(ValueError, match=message):
    _decode(dims.config, tiles)(inputs, None, offset, lengths)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"splits": 0}, "`splits` of DecodeTiling.* at least 1"),
    ({"window_steps": 0}, "`window_steps` of DecodeTiling.* at least 1"),
    ({"block_m": 6}, "`block_m` of DecodeTiling.* power of two"),
    ({"rows": 8}, "`rows` of DecodeTiling.* power of two, at least 16"),
    (
      {"blocks": Tile(16, 3, 1)},
      r"`blocks\.num_warps` of .* power of two",
    ),
    (
      {"blocks": Tile(-16, 4, 1)},
      r"`blocks\.block_k` of .* power of two",
    ),
  ],
)
def test_tiles_that_are_none(changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **changes)


def test_too_many_blocks() -> None:
  with pytest.raises(
    NotImplementedError, match="`cache` has room for 2097152 tokens"
  ):
    _lower(group=1, length=2**21, config=NSAConfig())


# ------------------------------------------------------------------- lowering


def _lower(
  *,
  config: NSAConfig,
  group: int,
  head_dim: int = 128,
  value_dim: int = 128,
  dtype: Any = jnp.bfloat16,
  length: int = 5001,
  queries: int = 1,
  batch: int = 1,
  ring: bool = False,
  kv_heads: int = 2,
  tokens: int | None = None,
) -> str:
  """The kernels lowered for an H200."""

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct((batch, *shape), dtype)

  def pair(rows):
    heads = (rows, kv_heads)
    return KV(array(*heads, head_dim), array(*heads, value_dim))

  heads = queries, kv_heads * group
  inputs = {
    "query": array(*heads, head_dim),
    "compressed": pair(nsa_jax.num_compressed_blocks(length, config)),
    "selected": pair(length),
    "gates": array(*heads, 3),
  }
  means = None
  if tokens is not None:
    means = nsa_jax.SelectByMeans(tokens).blocks(config)
    inputs["means"] = pair(length // tokens).key
  rows = pair(config.window + queries - 1) if ring else None
  integers = [array(dtype=jnp.int32)] * 2
  with helpers.h200():
    traced = _decode(config, None, means).trace(inputs, rows, *integers)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


KERNELS = ("compressed", "blocks", "merge")


def _assert_lowers(**sizes: Any) -> None:
  text = _lower(**sizes)
  for name in KERNELS:
    assert f"nsa_decode_{name}" in text


@pytest.mark.parametrize(
  "sizes",
  [
    {"group": 16, "length": 65536, "kv_heads": 4, "ring": True},
    {"group": 3, "queries": 5, "batch": 3, "dtype": jnp.float32},
    {"group": 16, "length": 65536, "kv_heads": 4, "tokens": 4},
  ],
  ids=str,
)
def test_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  _assert_lowers(config=NSAConfig(), **sizes)


LOWERED: dict[str, Any] = {
  "config": (
    *helpers.SELECTIONS,
    NSAConfig(128, 1, 128, 5, 3, 1),
    NSAConfig(32, 32, 128, 4, 1, 3),
  ),
  "group": (1, 3, 4, 12, 16, 64),
  "head_dim": (16, 32, 64, 96, 128, 192, 256),
  "value_dim": (16, 128, 192, 256),
  "dtype": (jnp.float16, jnp.bfloat16, jnp.float32),
  "length": (77, 5001, 65536),
  "queries": (1, 2, 7, 8),
  "batch": (1, 32),
  "ring": (False, True),
  "tokens": (None, 1, 4, 16),
}


@pytest.mark.parametrize("count", [129, 257, 1025])
def test_many_selected_blocks_lower_for_cuda(count: int) -> None:
  config = NSAConfig(32, 16, 64, count, 1, 2)
  _assert_lowers(config=config, group=16, length=2**17, dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_every_tiling_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  if sizes["length"] < sizes["config"].compression_block:
    assert "nsa_decode_compressed" not in _lower(**sizes)
  else:
    _assert_lowers(**sizes)


# ------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_matches_oracle(name: str) -> None:
  _check(dataclasses.replace(CASES[name], tiles=None))


@pytest.mark.gpu
@pytest.mark.parametrize("case", helpers.pairwise(MORE), ids=str)
def test_gpu_matches_oracle_more(case: dict[str, Any]) -> None:
  _check(dataclasses.replace(_more(case), tiles=None))


def _plain(inputs, window, ids, offset, lengths, config):
  """Out of the three branches with these ids, and the importance of blocks.

  In float32, linear in the length: T is small.
  """
  query = inputs["query"]
  batch, queries, heads, width = query.shape
  kv_heads = inputs["selected"].key.shape[2]
  q = query.reshape(batch, queries, kv_heads, -1, width) * width**-0.5
  t = offset[:, None] + jnp.arange(queries)

  def attend(pair, mask):  # [B, T, K or 1, S]
    s = jnp.einsum("btkgh,bskh->btkgs", q, pair.key)
    s = jnp.where(mask[:, :, :, None], s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1)
    return p, jnp.einsum("btkgs,bskv->btkgv", p, pair.value)

  def ends(pair, stride, span):
    end = jnp.arange(pair.key.shape[1]) * stride + span - 1
    return (end <= t[..., None])[:, :, None]

  d, span = config.compression_stride, config.compression_block
  block, length = config.selection_block, inputs["selected"].key.shape[1]
  p, out = attend(inputs["compressed"], ends(inputs["compressed"], d, span))
  token = jnp.arange(length)
  chosen = (ids[..., None] == jnp.arange(-(-length // block))).any(-2)
  chosen = jnp.repeat(chosen, block, axis=-1)[..., :length]
  causal = (token <= t[..., None])[:, :, None]
  near = causal & (token > t[..., None] - config.window)[:, :, None]
  outs = [
    out,
    attend(inputs["selected"], chosen & causal)[1],
    attend(window, near)[1],
  ]
  gates = inputs["gates"].reshape(batch, queries, kv_heads, -1, 3)
  total = sum(gates[..., c, None] * x for c, x in enumerate(outs))
  # Tokens of a compressed block in each selection block.
  first = np.arange(p.shape[-1])[:, None] * d
  edge = np.arange(-(-length // block)) * block
  shared = np.minimum(first + span, edge + block) - np.maximum(first, edge)
  overlap = jnp.asarray(np.maximum(shared, 0) / d, jnp.float32)
  return total.reshape(batch, queries, heads, -1), p.sum(3) @ overlap


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length,queries", [(8192, 8), (32768, 2), (65536, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_matches_jnp_at_length(
  dtype: str, length: int, queries: int, ring: bool
) -> None:
  """Rows of different lengths; capacity is a little more than the longest."""
  config = NSAConfig()
  capacity, rows = length + 192, config.window + 7
  keys = iter(jax.random.split(jax.random.key(0), 9))

  def normal(rows, heads, width=128):
    x = jax.random.normal(next(keys), (2, rows, heads, width), jnp.float32)
    return x.astype(dtype)

  def pair(rows):
    return KV(normal(rows, 2), normal(rows, 2))

  inputs = {
    "query": normal(queries, 32),
    "compressed": pair(nsa_jax.num_compressed_blocks(capacity, config)),
    "selected": pair(capacity),
    "gates": jax.nn.sigmoid(normal(queries, 32, 3)),
  }
  lengths = jnp.array([length, length // 3 + 5], jnp.int32)
  offset = lengths - queries
  window = pair(capacity) if ring else inputs["selected"]
  at = jnp.arange(rows)
  newest = (lengths - 1)[:, None]
  position = newest - (newest - at) % rows
  index = position[..., None, None]
  own = KV(*(jnp.take_along_axis(x, index, 1) for x in window))
  run = _decode(config, None)
  out, ids = run(inputs, own if ring else None, offset, lengths)
  again = run(inputs, own if ring else None, offset, lengths)
  helpers.assert_same_bits((out, ids), again)

  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, window))
  with jax.default_matmul_precision("highest"):
    expected, scores = jax.jit(_plain, static_argnums=5)(
      *wide, ids, offset, lengths, config
    )
  helpers.assert_close(out, expected, dtype)
  t = np.asarray(offset)[:, None] + np.arange(queries)
  last = t // config.selection_block
  scores = np.array(scores)
  block = np.arange(scores.shape[-1])
  forced = (block == 0) | (block > last[..., None] - config.num_local)
  scores[np.broadcast_to(forced[:, :, None], scores.shape)] = np.inf
  candidate = np.broadcast_to(block <= last[..., None], forced.shape)
  scores[np.broadcast_to(~candidate[:, :, None], scores.shape)] = -1
  best = np.sort(scores, axis=-1)[..., -config.num_selected :]
  got = np.take_along_axis(scores, np.asarray(ids), axis=-1)
  np.testing.assert_allclose(np.sort(got, axis=-1), best, rtol=1e-5, atol=1e-7)
