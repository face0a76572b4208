"""The Mosaic GPU kernels of the compressed branch and of the window.

What the ops compute is tested in suite.py; here is what is the kernels' own:
what they refuse, tiles, persistent blocks, lowering for CUDA. Without a GPU the
kernels are interpreted: products, barriers and copies, but not that they run at
the same time. The interpreter needs jax 0.11, as the kernels do.
"""

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import NSAConfig, dispatch
from pallas_kernels import mosaic_gpu, triton
from pallas_kernels.interface import Queries, Spec
from pallas_kernels.mosaic_gpu import band, support
from pallas_kernels.mosaic_gpu.tiling import (
  BandTile,
  BandTiling,
  band_tiling,
  shared_bytes,
)
from pallas_kernels.triton import tiling as triton_tiling
from tests import helpers
from tests.test_dispatch import _own_frames
from tests.test_triton_band import (
  BRANCHES,
  _inputs,
  _pullback,
  check_at_length,
)

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 19)
HEAD_DIMS = (64, 128, 192, 256)
NAME: Any = "mosaic_gpu"

pytestmark = pytest.mark.usefixtures("no_races")
needs_kernels = pytest.mark.jax_0_11


def on_gpu(test: Any) -> Any:
  """Marks a test that runs on a card."""
  return pytest.mark.gpu(needs_kernels(test))


def _op(branch: str, length: int, implementation: Any = NAME, **call: Any):
  """A function of query, key and value: one branch."""
  if branch == "compressed":
    call["key_length"] = length
  op = getattr(nsa_jax, f"{branch}_attention")
  return functools.partial(op, implementation=implementation, **call)


# ------------------------------------------------------------------- refusals


@pytest.fixture
def new_jax(monkeypatch: pytest.MonkeyPatch) -> None:
  """The version of jax is one that the kernels take."""
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))


def _refused(match: str, branch: str = "window", **sizes: Any) -> None:
  sizes = {"group": 8, "head_dim": 64, "value_dim": 64} | sizes
  sizes = {"dtype": jnp.bfloat16, "length": 20} | sizes
  call = sizes.pop("call", {})
  inputs = jax.eval_shape(functools.partial(_inputs, branch, CONFIG, **sizes))
  run = _op(branch, 20, config=CONFIG, **call)
  with pytest.raises(NotImplementedError, match=match):
    jax.eval_shape(run, *inputs[:3])


def test_old_versions_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  monkeypatch.setattr(jax, "__version__", "0.10.2")
  for branch in BRANCHES:
    _refused(r"jax has version 0\.10\.2: the kernels take 0\.11 and", branch)


@pytest.mark.usefixtures("new_jax")
@pytest.mark.parametrize(
  "sizes, match",
  [
    ({"dtype": jnp.float32}, r"dtype float32: .* float16, bfloat16"),
    ({"head_dim": 96}, r"`query` has head dimension 96: .* 64, 128, 192, 256"),
    ({"value_dim": 32}, r"`value` has head dimension 32: .* 64, 128, 192, 256"),
    ({"group": 4}, r"4 heads per key/value head: .* multiples of 8 up to 64"),
    ({"group": 12}, r"12 heads per key/value head"),
    ({"group": 72}, r"72 heads per key/value head"),
    ({"call": {"softcap": 30.0}}, r"`softcap`=30\.0: the kernels take None"),
  ],
  ids=str,
)
def test_what_the_kernels_cannot_do(sizes: Any, match: str) -> None:
  _refused(match, **sizes)


@pytest.mark.usefixtures("new_jax")
def test_symbolic_sizes() -> None:
  (batch,) = export.symbolic_shape("b")
  shape: Any = jax.ShapeDtypeStruct((batch, 20, 8, 64), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="symbolic shape"):
    mosaic_gpu.window.check(
      Spec(CONFIG, 1.0, 20), (shape, shape, shape), (None, Queries(0))
    )


def _cards(monkeypatch: pytest.MonkeyPatch, kind: str, version: str) -> None:
  card = SimpleNamespace(device_kind=kind, compute_capability=version)
  monkeypatch.setattr(jax, "local_devices", lambda backend: [card])


@pytest.mark.usefixtures("new_jax")
@pytest.mark.parametrize(
  "kind, version", [("NVIDIA A100", "8.0"), ("NVIDIA B200", "10.0")]
)
def test_other_cards(
  monkeypatch: pytest.MonkeyPatch, kind: str, version: str
) -> None:
  _cards(monkeypatch, kind, version)
  _refused(rf"{kind} has compute capability {version}: .* 9\.0 only")


@pytest.mark.usefixtures("new_jax")
@pytest.mark.parametrize(
  "isa, match",
  [
    (88, r"ptxas is of CUDA 12\.9 \(PTX ISA 8\.8\).* CUDA 13\.0 or newer"),
    (85, r"CUDA 12\.5 \(PTX ISA 8\.5\)"),
    (None, r"ptxas has an unknown version: .* CUDA 13\.0 or newer"),
  ],
)
def test_assemblers_that_corrupt_products(
  monkeypatch: pytest.MonkeyPatch, isa: int | None, match: str
) -> None:
  _cards(monkeypatch, "NVIDIA H100", "9.0")
  monkeypatch.setattr(support, "ptx_isa", lambda: isa)
  _refused(match)


@pytest.mark.usefixtures("new_jax")
@pytest.mark.parametrize("isa", [90, 95])
def test_assemblers_that_do_not(
  monkeypatch: pytest.MonkeyPatch, isa: int
) -> None:
  _cards(monkeypatch, "NVIDIA H100", "9.0")
  monkeypatch.setattr(support, "ptx_isa", lambda: isa)
  support.check_where()


def test_the_assembler_tells_its_version() -> None:
  """Or nothing does: without the CUDA plugin of jax, or without ptxas."""
  isa = support.ptx_isa()
  assert isa is None or 80 <= isa < 200


def _lowering_for(kind: str) -> Any:
  device = AbstractDevice(device_kind=kind, num_cores=114, platform="gpu")
  mesh = AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.usefixtures("new_jax")
def test_abstract_cards(monkeypatch: pytest.MonkeyPatch) -> None:
  """Those that a program is lowered for without a GPU."""
  monkeypatch.setattr(jax, "local_devices", lambda backend: [])
  for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA L40S"):
    with _lowering_for(kind):
      _refused(f"{kind} is not a Hopper card: .* capability 9.0 only")
  for kind in (
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA GH200 480GB",
    "NVIDIA H20",
  ):
    with _lowering_for(kind):
      support.check_where()
      assert support.multiprocessors() == 114
  assert support.multiprocessors() == 132


# ------------------------------------------------------------------- dispatch


def _default(op: str) -> Any:
  """The kernel that a call without `implementation` takes on a GPU."""
  x = jnp.ones((1, 64, 16, 64), jnp.bfloat16)
  arrays = x, x[:, :, :2], x[:, :, :2]
  if op == "select_blocks":
    arrays = x, x[:, :, :2], jnp.ones(x.shape[:3])
  ids = jnp.zeros((1, 64, 2, 1), jnp.int32) if op == "selected" else None
  compressed = op in ("compressed", "select_blocks")
  spec = Spec(NSAConfig(32, 16, 64), 1.0, 1040 if compressed else 64)
  run: Any = dispatch.choose(op, None, spec, arrays, (ids, Queries(0)))
  return run.args[0].cuda


@pytest.mark.usefixtures("new_jax")
@pytest.mark.parametrize(
  "op", ["compressed", "select_blocks", "selected", "window"]
)
def test_the_default_by_card(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
  """The card that a program is for decides, else those that are visible."""
  monkeypatch.setattr(support, "ptx_isa", lambda: 90)
  _cards(monkeypatch, "NVIDIA H100", "9.0")
  assert _default(op).forward is getattr(mosaic_gpu, op).forward
  with _lowering_for("NVIDIA A100"):
    assert _default(op).forward is getattr(triton, op).forward
  _cards(monkeypatch, "NVIDIA A100", "8.0")
  assert _default(op).forward is getattr(triton, op).forward
  monkeypatch.setattr(jax, "local_devices", lambda backend: [])
  assert _default(op).forward is getattr(triton, op).forward
  with _lowering_for("NVIDIA H100"):
    assert _default(op).forward is getattr(mosaic_gpu, op).forward


@needs_kernels
def test_tiles_of_another_backend_pass_a_default_on(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(support, "ptx_isa", lambda: 90)
  _cards(monkeypatch, "NVIDIA H100", "9.0")
  tiles = triton_tiling.band_tiling(
    windowed=True, group=8, head_dim=64, value_dim=64, dtype=jnp.bfloat16
  )
  spec = Spec(CONFIG, 1.0, 64, tiles=tiles)
  x = jnp.ones((1, 64, 16, 64), jnp.bfloat16)
  call: Any = spec, (x, x[:, :, :2], x[:, :, :2]), (None, Queries(0))
  run: Any = dispatch.choose("window", None, *call)
  assert run.args[0].cuda.forward is triton.window.forward
  match = r"`tiles` is a pallas_kernels\.triton\.tiling\.BandTiling"
  with pytest.raises(NotImplementedError, match=match):
    dispatch.choose("window", NAME, *call)


def test_the_default_for_what_it_does_not_serve(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  _cards(monkeypatch, "NVIDIA H100", "9.0")
  for op in ("full", "block_scores", "decode"):
    assert NAME not in dispatch.names(None, op)


def test_by_name_it_says_what_it_lacks() -> None:
  x = jnp.ones((1, 16, 8, 64), jnp.bfloat16)
  with pytest.raises(
    NotImplementedError, match="'mosaic_gpu' has no `full_attention`"
  ):
    nsa_jax.full_attention(x, x, x, implementation=NAME)


def test_a_sequence_falls_back() -> None:
  """To the next one, for a call that the kernels cannot do."""
  inputs = _inputs("window", CONFIG, group=8, head_dim=64, value_dim=64)[:3]
  both: Any = (NAME, "xla")
  actual, expected = (
    jax.jit(_op("window", 61, name, config=CONFIG))(*inputs)
    for name in (both, "xla")
  )
  helpers.assert_same_bits(actual, expected)


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
def test_from_op_to_kernel_in_four_hops(
  branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  path: list[str] = []
  kernel = band.plgpu.kernel

  def recorded(*args: Any, **kwargs: Any) -> Any:
    path[:] = _own_frames()
    return kernel(*args, **kwargs)

  monkeypatch.setattr(band.plgpu, "kernel", recorded)
  inputs = _inputs(
    branch,
    CONFIG,
    length=9,
    group=8,
    head_dim=64,
    value_dim=64,
    dtype=jnp.bfloat16,
  )
  _op(branch, 9, config=CONFIG)(*inputs[:3])
  hops = [
    f"branches.{branch}_attention",
    "branches.attend_branch",
    "dispatch._attend_fwd",
    f"{branch}.forward",
  ]
  assert [frame for frame in path if frame in hops] == hops, path
  assert len(path) <= 10, path


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize("value_dim", HEAD_DIMS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_of_the_heuristic_fit(head_dim: int, value_dim: int) -> None:
  tiles = band_tiling(head_dim=head_dim, value_dim=value_dim)
  tiles.check_fit(head_dim, value_dim)
  assert shared_bytes(tiles.fwd, head_dim, value_dim) <= 232448 - 1024


@pytest.mark.parametrize(
  "tile, match",
  [
    (BandTile(96), "`fwd.block_k` of .* must be 64, 128, 192 or 256"),
    (BandTile(64, 1), "`fwd.num_stages` of .* must be at least 2"),
    (BandTile(64, 2, 0), "`fwd.blocks` of .* must be at least 1, or None"),
    (BandTile(128, 3), "`fwd` of .* takes 231424 bytes of shared memory"),
  ],
  ids=str,
)
def test_tiles_that_do_not_fit(tile: BandTile, match: str) -> None:
  with pytest.raises(ValueError, match=match):
    BandTiling(tile).check_fit(128, 128)


@pytest.mark.usefixtures("new_jax")
def test_tiles_of_another_class() -> None:
  x = jnp.ones((1, 16, 8, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match="`tiles`=3 must be a BandTiling"):
    nsa_jax.window_attention(
      x, x[:, :, :1], x[:, :, :1], config=CONFIG, tiles=3, implementation=NAME
    )


@pytest.mark.parametrize("pieces", [1, 5, 7, 12, 13, 24, 25])
@pytest.mark.parametrize("blocks", [1, 2, 5, 12])
def test_every_piece_has_one_block(pieces: int, blocks: int) -> None:
  """Also those of the last round, in which some blocks have nothing to do."""
  if blocks > pieces:
    blocks = pieces
  call: Any = SimpleNamespace(num_pieces=pieces, blocks=blocks)
  done = [
    n * blocks + int(band._place(call, block, n))
    for block in range(blocks)
    for n in range(int(band._num_pieces(call, block)))
  ]
  assert sorted(done) == list(range(pieces))


# ---------------------------------------------------------------- interpreted


def _tiles(blocks: int | None = None, num_stages: int = 2) -> BandTiling:
  return BandTiling(BandTile(64, num_stages, blocks))


def _check(
  branch: str,
  config: NSAConfig = CONFIG,
  *,
  tiles: BandTiling | None = None,
  call: Any = None,
  length: int = 61,
  **sizes: Any,
) -> Any:
  """Compares with the reference, whose inputs are upcast; returns out, lse."""
  sizes = {"group": 16, "head_dim": 64, "value_dim": 64} | sizes
  sizes = {"dtype": jnp.bfloat16} | sizes
  inputs = _inputs(branch, config, length=length, **sizes)[:3]
  call = {"config": config} | (call or {})
  actual = jax.jit(_op(branch, length, tiles=tiles, **call))(*inputs)
  wide = [x.astype(jnp.float32) for x in inputs]
  with helpers.on_cpu():
    expected = jax.jit(_op(branch, length, "reference", **call))(*wide)
  dtype = jnp.dtype(sizes["dtype"]).name
  helpers.assert_close(actual[0], expected[0], dtype)
  helpers.assert_close(actual[1], expected[1], "float32")
  return actual


def _segments(length: int, part: int = 16) -> Any:
  segments = np.repeat(helpers.int32([[3, 0, 7, 7], [0, 5, 5, 0]]), part, 1)
  return segments[:, :length]


SMALL_STRIDE = NSAConfig(4, 1, 16, 3, 1, 1, 40)
# Together: one and several pieces and rounds per block; tiles at both ends of
# the band and between; groups that fill 64 rows and that do not.
INTERPRETED: dict[str, Any] = {
  "ragged": {},
  "several tiles, rounds": {
    "config": NSAConfig(8, 1, 16, 3, 1, 1, 150),
    "tiles": _tiles(3),
    "length": 333,
    "queries": 33,
  },
  "group of 8, segments": {
    "config": SMALL_STRIDE,
    "tiles": _tiles(2),
    "batch": 2,
    "group": 8,
    "call": {"segment_ids": _segments(61)},
  },
  "offsets of rows, rows outside the keys": {
    "config": SMALL_STRIDE,
    "tiles": _tiles(3, 3),
    "batch": 2,
    "queries": 20,
    "group": 24,
    "head_dim": 128,
    "call": {"query_offset": helpers.int32([-7, 50])},
  },
  "group of 64, other widths": {
    "config": SMALL_STRIDE,
    "length": 140,
    "queries": 3,
    "group": 64,
    "head_dim": 192,
    "value_dim": 128,
    "dtype": jnp.float16,
  },
  "output through the queries' buffer": {
    "config": SMALL_STRIDE,
    "tiles": _tiles(1),
    "length": 70,
    "queries": 10,
    "head_dim": 256,
    "value_dim": 256,
  },
  "without turns": {
    "config": SMALL_STRIDE,
    "tiles": BandTiling(BandTile(64, 2, 2, turns=False)),
    "queries": 20,
  },
  "negative scale": {"queries": 5, "call": {"scale": -0.3}},
}
FAST = ("ragged", "group of 8, segments", "group of 64, other widths")


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      case, id=name, marks=[] if name in FAST else [pytest.mark.slow]
    )
    for name, case in INTERPRETED.items()
  ],
)
def test_matches_reference(branch: str, case: dict[str, Any]) -> None:
  _check(branch, **case)


@on_gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("case", INTERPRETED.values(), ids=list(INTERPRETED))
def test_gpu_matches_reference(branch: str, case: dict[str, Any]) -> None:
  _check(branch, **case)


def _check_halo() -> None:
  """Keys that do not start at position 0; rows before it are no tokens."""
  call = {
    "key_offset": helpers.int32([5, -6]),
    "query_offset": helpers.int32([7, 20]),
  }
  _check("window", batch=2, queries=8, call=call)


@needs_kernels
def test_halo_of_the_window() -> None:
  _check_halo()


@on_gpu
def test_gpu_halo_of_the_window() -> None:
  _check_halo()


def _check_non_finite(branch: str) -> None:
  """Keys and values that are not finite show where they are read.

  In keys nowhere else; in values they may, but not in other rows or heads. What
  lies in padding is not read.
  """
  config = NSAConfig(8, 4, 16, 3, 1, 1, 30)
  sizes: dict[str, Any] = {
    "batch": 2,
    "kv_heads": 2,
    "group": 8,
    "head_dim": 64,
    "value_dim": 64,
    "dtype": jnp.bfloat16,
  }
  query, key, value, *_ = _inputs(
    branch, config, length=40, queries=16, **sizes
  )
  run = jax.jit(_op(branch, 40, config=config))
  reference = jax.jit(_op(branch, 40, "reference", config=config))
  row = 7 if branch == "compressed" else 36  # the last queries read it
  for bad in (np.nan, np.inf, -np.inf):
    for part in (0, 1):
      pair = [np.array(x) for x in (key, value)]
      pair[part][0, row, 1, 3] = bad
      actual = jax.device_get(run(query, *pair))
      wide = [jnp.asarray(x, jnp.float32) for x in (query, *pair)]
      expected = jax.device_get(reference(*wide))
      seen, want = (
        np.isnan(np.asarray(x, np.float32)) for x in (actual[1], expected[1])
      )
      np.testing.assert_array_equal(seen, want)
      seen, most = (
        ~np.isfinite(np.asarray(x, np.float32))
        for x in (actual[0], expected[0])
      )
      if part:  # The dense products of the reference spread it everywhere.
        assert seen[0, -1, 8:].any()
        assert not (seen & ~most).any()
      else:
        np.testing.assert_array_equal(seen, most)
  segments = np.repeat(helpers.int32([[4, 0, 9]]), 16, 1)[:, :40]
  run = jax.jit(_op(branch, 40, config=config, segment_ids=segments))
  clean = run(query[:1], key[:1], value[:1])
  rows = np.arange(key.shape[1])
  first, last = (
    (rows * 4, rows * 4 + 7) if branch == "compressed" else (rows,) * 2
  )
  bad_keys = (last >= 16) & (first < 32)
  pair = helpers.poison((key[:1], value[:1]), bad_keys[None])
  poisoned = run(query[:1], *pair)
  for x, y in zip(poisoned, clean, strict=True):
    np.testing.assert_array_equal(
      np.asarray(x, np.float32), np.asarray(y, np.float32)
    )


@needs_kernels
@pytest.mark.slow
# NumPy says so of the interpreter's products.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("branch", BRANCHES)
def test_what_is_not_finite(branch: str) -> None:
  _check_non_finite(branch)


@on_gpu
@pytest.mark.parametrize("branch", BRANCHES)
def test_gpu_what_is_not_finite(branch: str) -> None:
  _check_non_finite(branch)


@needs_kernels
@pytest.mark.slow
def test_gradients_match_triton() -> None:
  """With the residuals of this backend's forward."""
  sizes: dict[str, Any] = {"group": 8, "head_dim": 64, "value_dim": 64}
  inputs = _inputs("window", CONFIG, length=20, dtype=jnp.bfloat16, **sizes)
  actual = _pullback("window", NAME, CONFIG, length=20)(*inputs)
  expected = _pullback("window", "triton", CONFIG, length=20)(*inputs)
  helpers.assert_close(actual, expected, "bfloat16", gradient=1)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_vmap(shared: bool) -> None:
  sizes: dict[str, Any] = {"group": 8, "head_dim": 64, "value_dim": 64}
  query, key, value, *_ = _inputs(
    "window", CONFIG, batch=2, length=12, dtype=jnp.bfloat16, **sizes
  )
  op = _op("window", 12, config=CONFIG)
  axes: Any = (0, 0, 0)
  rows: Any = [x[:, None] for x in (query, key, value)]
  if shared:  # The keys are not copied.
    axes, rows = (0, None, None), [query[:, None], key[:1], value[:1]]
    key, value = (jnp.repeat(x[:1], 2, axis=0) for x in (key, value))
  whole = jax.jit(op)(query, key, value)
  one_by_one = jax.jit(jax.vmap(op, in_axes=axes))(*rows)
  helpers.assert_same_bits([x[:, 0] for x in one_by_one], whole)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("way", ["Auto axes", "shard_map"])
def test_several_devices(way: str) -> None:
  sizes: dict[str, Any] = {"group": 8, "head_dim": 64, "value_dim": 64}
  sizes = sizes | {"batch": 2, "kv_heads": 2, "dtype": jnp.bfloat16}
  inputs = _inputs("window", CONFIG, length=12, **sizes)[:3]
  op = _op("window", 12, config=CONFIG)
  expected = jax.jit(op)(*inputs)
  devices = np.array(jax.devices("cpu")[:4]).reshape(2, 2)
  mesh = Mesh(devices, ("batch", "head"))
  spec = P("batch", None, "head")
  if way == "shard_map":
    op = jax.shard_map(op, mesh=mesh, in_specs=spec, out_specs=spec)
  split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs]
  helpers.assert_same_bits(jax.jit(op)(*split), expected)


def test_few_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  """An interpreted kernel would wait forever for a thread."""
  from pallas_kernels.mosaic_gpu import interpreter

  monkeypatch.setattr(interpreter.os, "cpu_count", lambda: 2)
  monkeypatch.setattr(jax, "devices", lambda platform: [platform])
  with pytest.raises(NotImplementedError, match=r"8 threads, and XLA has 2"):
    interpreter.interpreted(lambda x: x, None, jnp.zeros(1))


# ------------------------------------------------------------------- lowering

LOWERED: dict[str, Any] = {
  "branch": BRANCHES,
  "group": tuple(range(8, 65, 8)),
  "head_dim": HEAD_DIMS,
  "value_dim": HEAD_DIMS,
  "dtype": (jnp.float16, jnp.bfloat16),
  "segments": (False, True),
  "stride": (1, 16),
  # Sizes that are no multiples of a tile, or less than one.
  "length": (33, 333, 1024),
}


def _lower(
  branch: str, segments: bool = False, stride: int = 16, **sizes: Any
) -> str:
  """The forward of one branch, lowered for an H200."""
  config = NSAConfig(32, stride, 64, window=100)
  sizes = {"dtype": jnp.bfloat16, "batch": 2, "kv_heads": 2} | sizes
  length = sizes["length"]
  inputs = jax.eval_shape(functools.partial(_inputs, branch, config, **sizes))
  ids = (jax.ShapeDtypeStruct((2, length), jnp.int32),) if segments else ()

  @jax.jit
  def run(query: Any, key: Any, value: Any, *ids: Any) -> Any:
    more = {"segment_ids": ids[0]} if ids else {}
    return _op(branch, length, config=config, **more)(query, key, value)

  with helpers.h200():
    traced = run.trace(*inputs[:3], *ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _assert_kernel(text: str, branch: str, count: int | None = None) -> None:
  calls = re.findall(r"custom_call @mosaic_gpu\w*", text)
  assert len(calls) == count if count is not None else calls
  assert f"nsa_{branch}_fwd" in text


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
def test_lowers_for_cuda(branch: str) -> None:
  text = _lower(branch, group=16, head_dim=128, value_dim=128, length=333)
  _assert_kernel(text, branch, 1)
  # Pieces of 8 queries are stored whole: 336 of them, with 16 heads.
  assert "tensor<2x2x5376xf32>" in text


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_everything_lowers_for_cuda(sizes: dict[str, Any]) -> None:
  _assert_kernel(_lower(**sizes), sizes["branch"], 1)


def _bf16(*shape: int) -> Any:
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _lowered(run: Any, *args: Any) -> str:
  with helpers.h200():
    traced = jax.jit(run).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_kernels
def test_gradients_of_some_groups_are_those_of_triton() -> None:
  """The forward of this backend and the backward of Triton, lowered."""
  op = _op("window", 200, config=CONFIG)

  def loss(*qkv: Any) -> Any:
    return op(*qkv)[0].astype(jnp.float32).sum()

  keys = _bf16(1, 200, 1, 64)
  text = _lowered(jax.grad(loss, (0, 1, 2)), _bf16(1, 200, 24, 64), keys, keys)
  _assert_kernel(text, "window", 1)
  assert all(f'nsa_window_{name}"' in text for name in ("dq", "dkv"))


@needs_kernels
def test_a_sequence_mixes_backends() -> None:
  """Each op by the first that has it, in one program."""
  dims = helpers.Dims(NSAConfig(), 1, 1100, 1100, 1, 8, 64, 64)
  inputs = jax.tree.map(
    lambda x: _bf16(*x.shape), helpers.make_inputs(dims, "float32")
  )
  both: Any = (NAME, "triton")

  def run(inputs: Any) -> Any:
    return nsa_jax.native_sparse_attention(
      **inputs, config=dims.config, implementation=both
    )

  text = _lowered(run, inputs)
  for branch in (*BRANCHES, "selected"):
    _assert_kernel(text, branch, 4)  # With the scores.
  assert "nsa_top_n" in text


@needs_kernels
@pytest.mark.parametrize("branch", BRANCHES)
def test_vmap_with_shared_keys_lowers_for_cuda(branch: str) -> None:
  rows = 200 if branch == "window" else 49
  run = jax.vmap(_op(branch, 200, config=CONFIG), in_axes=(0, None, None))
  keys = _bf16(1, rows, 1, 64)
  text = _lowered(run, _bf16(3, 1, 200, 8, 64), keys, keys)
  _assert_kernel(text, branch, 1)


@needs_kernels
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_lowers_for_cuda(check_vma: bool) -> None:
  devices = jax.devices("cpu")[:2]
  run = jax.shard_map(
    _op("window", 200, config=CONFIG),
    mesh=Mesh(np.array(devices), ("batch",)),
    in_specs=P("batch"),
    out_specs=P("batch"),
    check_vma=check_vma,
  )
  keys = _bf16(2, 200, 1, 64)
  traced = jax.jit(run).trace(_bf16(2, 200, 8, 64), keys, keys)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  _assert_kernel(text, "window", 1)


@needs_kernels
def test_exports_without_disabled_checks() -> None:
  """The custom call is one that jax promises to keep."""
  keys = _bf16(1, 200, 1, 64)
  run = jax.jit(_op("window", 200, config=CONFIG))
  with helpers.h200():
    program = export.export(run, platforms=("cuda",))(
      _bf16(1, 200, 8, 64), keys, keys
    )
  text = export.deserialize(program.serialize()).mlir_module()
  _assert_kernel(text, "window", 1)


# ------------------------------------------------------------------- on a GPU


@on_gpu
@pytest.mark.parametrize("sizes", helpers.pairwise(LOWERED), ids=str)
def test_gpu_matches_reference_everywhere(sizes: dict[str, Any]) -> None:
  sizes = dict(sizes)
  config = NSAConfig(32, sizes.pop("stride"), 64, window=100)
  call: dict[str, Any] = {}
  if sizes.pop("segments"):
    call["segment_ids"] = _segments(sizes["length"], part=256)
  _check(config=config, batch=2, kv_heads=2, call=call, **sizes)


@on_gpu
@pytest.mark.parametrize("branch", BRANCHES)
def test_gpu_matches_xla_at_length(branch: str) -> None:
  check_at_length(branch, NAME)


@on_gpu
def test_gpu_more_than_2_to_31_elements() -> None:
  """The last queries are those of a call of their own."""
  config, length, tail = NSAConfig(window=100), 2**18 + 100, 64
  query, key, value, *_ = _inputs(
    "window",
    config,
    length=length,
    kv_heads=4,
    group=16,
    head_dim=128,
    value_dim=128,
    dtype=jnp.bfloat16,
  )
  run = jax.jit(_op("window", length, config=config))
  out, lse = run(query, key, value)
  got = jax.device_get((out[:, -tail:], lse[:, -tail:]))
  del out, lse
  part = _op("window", length, "reference", config=config)
  want = jax.jit(part)(
    query[:, -tail:].astype(jnp.float32),
    *(x[:, -tail - 100 :].astype(jnp.float32) for x in (key, value)),
  )
  helpers.assert_close(got[0], want[0], "bfloat16")
  helpers.assert_close(got[1], want[1], "float32")
