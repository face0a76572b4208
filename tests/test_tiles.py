"""Tile sizes go from the public ops down to the kernels."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import KV, NSAConfig, cache
from pallas_kernels.triton import tiling
from tests import helpers
from tests.helpers import Dims

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)
DIMS = Dims(CONFIG, 1, 40, 40, 1, 2, 16, 16)
SMALL: dict[str, Any] = {
  "compressed": tiling.BandTiling(
    tiling.BandTile(16, 1, 1, rows=16),
    tiling.BandTile(16, 1, 1, rows=16),
    tiling.BandTile(16, 1, 1, rows=16),
  ),
  "select_blocks": tiling.SelectionTiling(16, tiling.Tile(16, 1, 1), 4, 4, 1),
  "selected": dataclasses.replace(
    tiling.selected_tiling(
      group=2,
      head_dim=16,
      value_dim=16,
      dtype=jnp.float32,
      block=16,
      num_ids=3,
    ),
    rows=16,
    piece=7,
  ),
}
SMALL["window"] = SMALL["compressed"]


def _native(implementation: Any = "triton", **call: Any) -> Any:
  inputs = helpers.make_inputs(DIMS, "float32")
  run = jax.jit(
    lambda inputs: nsa_jax.native_sparse_attention(
      **inputs,
      config=CONFIG,
      return_block_ids=True,
      implementation=implementation,
      **call,
    )
  )
  return run(inputs)


def test_the_whole_op_takes_tiles_by_op() -> None:
  out, ids = _native()
  small, small_ids = _native(tiles=SMALL)
  np.testing.assert_array_equal(small_ids, ids)
  helpers.assert_close(small, out, "float32")
  # Implementations without kernels have no use for them.
  helpers.assert_close(_native("xla", tiles=SMALL)[0], out, "float32")


KINDS = {
  "compressed": "BandTiling",
  "select_blocks": "SelectionTiling",
  "selected": "SelectedTiling",
  "window": "BandTiling",
}


@pytest.mark.parametrize("op, kind", KINDS.items())
def test_each_op_gets_its_own(op: str, kind: str) -> None:
  """A wrong one is named, by whichever kernel it was for."""
  wrong = tiling.Tile(16, 1, 1)
  message = re.escape(f"`tiles`={wrong!r} must be a {kind}.")
  with pytest.raises(ValueError, match=message):
    _native(tiles={op: wrong})


def _changed(op: str, changes: dict[str, Any]) -> Any:
  """The tiles of an op with entries replaced; "fwd.block_k" is one of `fwd`."""
  tiles = SMALL[op]
  for name, value in changes.items():
    outer, _, inner = name.rpartition(".")
    if outer:
      tile = dataclasses.replace(getattr(tiles, outer), **{inner: value})
      tiles = dataclasses.replace(tiles, **{outer: tile})
    else:
      tiles = dataclasses.replace(tiles, **{name: value})
  return tiles


@pytest.mark.parametrize(
  "op, changes, message",
  [
    ("window", {"fwd.block_k": 24}, "`fwd.block_k` of"),
    ("window", {"fwd.rows": 8}, "`fwd.rows` of"),
    ("compressed", {"dq.num_warps": 3}, "`dq.num_warps` of"),
    ("selected", {"rows": 24}, "`rows` of"),
    ("selected", {"fwd.block_k": 32}, "a `fwd.block_k` that divides `sele"),
    ("selected", {"dkv.block_k": 8}, "`dkv.block_k` of"),
    ("selected", {"by_block": False, "dq.block_k": 8}, "`dq.block_k` of"),
    ("selected", {"by_block": False, "fwd.queries": 3}, "1 or 2 for `fwd.q"),
    ("selected", {"piece": 0}, "must have a `piece` of at least 1"),
    ("select_blocks", {"block_q": 8}, "`block_q` of"),
    ("select_blocks", {"rows": 32}, "must have `rows` that divide `block_q`"),
    ("select_blocks", {"block_m": 3}, "`block_m` of"),
    ("select_blocks", {"scores.block_k": 48}, "`scores.block_k` of"),
  ],
)
def test_tiles_that_do_not_fit(
  op: str, changes: dict[str, Any], message: str
) -> None:
  with pytest.raises(ValueError, match=re.escape(message)):
    _native(tiles={op: _changed(op, changes)})


def test_tiles_hold_a_group() -> None:
  """A group of 20 heads does not fit into 16 rows."""
  query: Any = np.zeros((1, 16, 20, 16), np.float32)
  key: Any = np.zeros((1, 16, 1, 16), np.float32)
  with pytest.raises(ValueError, match=r"`fwd\.rows` of .*, at least 20"):
    nsa_jax.window_attention(
      query,
      key,
      key,
      config=CONFIG,
      tiles=SMALL["window"],
      implementation="triton",
    )


def test_a_window_cache_takes_tiles() -> None:
  config = CONFIG
  held = cache.init(
    1, 48, config=config, num_kv_heads=1, head_dim=16, kind="window"
  )
  tokens = KV(*np.ones((2, 1, 1, 1, 16), np.float32))
  held = cache.append(held, config=config, window=tokens)
  query: Any = np.ones((1, 1, 2, 16), np.float32)
  attend = functools.partial(
    cache.attend_window,
    query,
    held,
    config=config,
    query_offset=0,
    implementation="triton",
  )
  helpers.assert_close(attend(tiles=SMALL["window"]), attend(), "float32")
  with pytest.raises(ValueError, match="`tiles`=3 must be a BandTiling"):
    attend(tiles=3)


@pytest.mark.parametrize("tiles", [3, {"windows": None}, {"decode": None}])
def test_tiles_of_unknown_ops(tiles: Any) -> None:
  message = re.escape(
    f"`tiles`={tiles!r} must be a mapping from 'compressed', 'select_blocks', "
    "'selected', 'window' to tile sizes."
  )
  for implementation in ("triton", "xla", None):
    with pytest.raises(ValueError, match=message):
      _native(implementation, tiles=tiles)


@functools.cache
def _held() -> Any:
  """A cache of 40 tokens."""
  inputs = helpers.make_inputs(DIMS, "float32")

  @jax.jit
  def fill(tokens: KV, window: KV) -> Any:
    held, _ = cache.prefill(
      cache.init(1, 48, config=CONFIG, num_kv_heads=1, head_dim=16),
      config=CONFIG,
      compressed=tokens,
      selected=tokens,
      window=window,
      compress=lambda pair, first: KV(
        *(nsa_jax.compress_mean(x, config=CONFIG) for x in pair)
      ),
    )
    return held

  return fill(inputs["selected"], inputs["window"])


def _decode(tiles: Any, implementation: Any = "triton") -> Any:
  inputs, held = helpers.make_inputs(DIMS, "float32"), _held()
  attend = functools.partial(
    cache.attend,
    config=CONFIG,
    query_offset=jnp.array([39]),
    tiles=tiles,
    implementation=implementation,
  )
  return jax.jit(attend)(inputs["query"][:, -1:], held, inputs["gates"][:, -1:])


def test_decoding_takes_tiles() -> None:
  small = tiling.DecodeTiling(
    rows=16,
    compressed=tiling.Tile(16, 4, 1),
    splits=3,
    block_m=4,
    blocks=tiling.Tile(16, 4, 1),
    selected_steps=1,
    window_steps=1,
    merge_warps=1,
  )
  expected = _decode(None, "xla")
  helpers.assert_close(_decode({"decode": small}), expected, "float32")
  with pytest.raises(ValueError, match="`tiles`=3 must be a DecodeTiling"):
    _decode({"decode": 3})
  with pytest.raises(ValueError, match=r"from .* 'window', 'decode' to tile"):
    _decode({"decoding": small})
