"""`xla` under jax's transformations: vmap, remat, pmap, shard_map.

shard_map runs with check_vma=True: nothing in the implementation may lose
track of what varies over the mesh. Eight virtual CPU devices (conftest.py).
"""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import NSAConfig
from tests import helpers
from tests.helpers import Dims

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 5)
DIMS = Dims(CONFIG, batch=8, queries=24, keys=24, head_dim=8)
DTYPE = "float32"


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Any:
  """Short chunks, so that there are loops for the transformations to meet."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("nsa_jax.xla.chunks.CHUNK_ELEMENTS", 2**9)
    yield


def _attend(inputs: Any, **kwargs: Any) -> Any:
  return nsa_jax.native_sparse_attention(
    **inputs,
    **kwargs,
    config=CONFIG,
    implementation="xla",
    return_block_ids=True,
  )


def _vjp(inputs: Any, dout: Any, **kwargs: Any) -> Any:
  """(out, ids, gradients)."""
  out, pullback, ids = jax.vjp(
    lambda inputs: _attend(inputs, **kwargs), inputs, has_aux=True
  )
  return out, ids, pullback(dout)[0]


@pytest.fixture(scope="module")
def data() -> Any:
  """inputs, cotangent, segments, and what one device makes of them."""
  inputs = helpers.make_inputs(DIMS, DTYPE)
  dout = helpers.make_cotangent(DIMS, DTYPE)
  segments = helpers.packed_segments(DIMS)
  expected = jax.jit(_vjp)(inputs, dout, segment_ids=segments)
  return inputs, dout, segments, expected


def _check(actual: Any, expected: Any) -> None:
  np.testing.assert_array_equal(actual[1], expected[1])
  helpers.assert_close(
    (actual[0], actual[2]), (expected[0], expected[2]), DTYPE, gradient=1
  )


def test_shard_map_over_batch_and_heads(data: Any) -> None:
  inputs, dout, segments, expected = data
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("batch", "heads"))
  spec = P("batch", None, "heads")
  sharded = jax.shard_map(
    lambda inputs, dout, segments: _vjp(inputs, dout, segment_ids=segments),
    mesh=mesh,
    in_specs=(spec, spec, P("batch")),
    out_specs=spec,
    check_vma=True,
  )
  _check(jax.jit(sharded)(inputs, dout, segments), expected)


def test_shard_map_over_queries(data: Any) -> None:
  """Sequence sharding: local queries, all keys, an offset that varies.

  The keys are the same on all devices, so shard_map itself adds up their
  gradients; that needs the vma types to be right.
  """
  inputs, dout, segments, expected = data
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("time", "batch"))

  def loss(inputs: Any, dout: Any, segments: Any) -> Any:
    offset = jax.lax.axis_index("time") * inputs["query"].shape[1]
    out, ids = _attend(inputs, query_offset=offset, segment_ids=segments)
    total = jax.lax.psum((out * dout).sum(), ("time", "batch"))
    return total, (out, ids)

  rows = P("batch", "time")
  specs = {
    name: rows
    if name in ("query", "gates")
    else helpers.pair(P("batch"), P("batch"))
    for name in inputs
  }
  sharded = jax.shard_map(
    loss,
    mesh=mesh,
    in_specs=(specs, rows, P("batch")),
    out_specs=(P(), (rows, rows)),
    check_vma=True,
  )
  (total, (out, ids)), grads = jax.jit(
    jax.value_and_grad(sharded, has_aux=True)
  )(inputs, dout, segments)
  np.testing.assert_allclose(total, np.sum(out * dout), rtol=1e-5)
  _check((out, ids, grads), expected)


def test_shard_map_without_compressed_blocks() -> None:
  """C = 0: the constants that stand for the branch fit the vma types."""
  dims = Dims(CONFIG, batch=8, queries=3, keys=3, head_dim=8)
  assert not dims.num_compressed
  inputs = helpers.make_inputs(dims, DTYPE)
  dout = helpers.make_cotangent(dims, DTYPE)
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("batch", "heads"))
  spec = P("batch", None, "heads")
  sharded = jax.shard_map(
    _vjp, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True
  )
  expected = jax.jit(_vjp)(inputs, dout)
  _check(jax.jit(sharded)(inputs, dout), expected)


def test_pmap(data: Any) -> None:
  """One batch row per device."""
  inputs, dout, segments, expected = data
  split = jax.tree.map(lambda x: x[:, None], (inputs, dout, segments))
  actual = jax.pmap(lambda x, dout, ids: _vjp(x, dout, segment_ids=ids))(*split)
  _check(jax.tree.map(lambda x: np.asarray(x)[:, 0], actual), expected)


def test_vmap(data: Any) -> None:
  """The vmap of a gradient and the gradient of a vmap, over a new axis."""
  inputs, dout, segments, expected = data
  split = jax.tree.map(
    lambda x: x.reshape(4, 2, *x.shape[1:]), (inputs, dout, segments)
  )

  def vmap_of_grad(inputs: Any, dout: Any, segments: Any) -> Any:
    return jax.vmap(lambda x, dout, ids: _vjp(x, dout, segment_ids=ids))(
      inputs, dout, segments
    )

  def grad_of_vmap(inputs: Any, dout: Any, segments: Any) -> Any:
    attend = jax.vmap(lambda x, ids: _attend(x, segment_ids=ids))
    out, pullback, ids = jax.vjp(
      lambda inputs: attend(inputs, segments), inputs, has_aux=True
    )
    return out, ids, pullback(dout)[0]

  for transformed in (vmap_of_grad, grad_of_vmap):
    actual = jax.jit(transformed)(*split)
    merged = jax.tree.map(
      lambda x: np.asarray(x).reshape(8, *x.shape[2:]), actual
    )
    _check(merged, expected)


def test_vmap_over_one_argument(data: Any) -> None:
  """Keys without the new axis, two offsets along it."""
  inputs, _, _, _ = data
  offsets = helpers.int32([0, -7])

  def attend(offset: Any) -> Any:
    return _attend(inputs, query_offset=offset)

  out, ids = jax.jit(jax.vmap(attend))(offsets)
  for i, offset in enumerate(offsets):
    alone = jax.jit(attend)(offset)
    np.testing.assert_array_equal(ids[i], alone[1])
    helpers.assert_close(out[i], alone[0], DTYPE)


NAMES = (
  "nsa_compressed_out",
  "nsa_compressed_lse",
  "nsa_selected_out",
  "nsa_selected_lse",
  "nsa_window_out",
  "nsa_window_lse",
  "nsa_block_ids",
)


def test_remat_with_named_checkpoints(data: Any) -> None:
  """Results do not change, and selection runs once if its ids are kept."""
  inputs, dout, segments, expected = data
  policies = jax.checkpoint_policies
  recomputed = {}
  for label, policy in {
    "nothing": policies.nothing_saveable,
    "names": policies.save_only_these_names(*NAMES),
  }.items():

    def run(inputs: Any, dout: Any, segments: Any, policy: Any = policy) -> Any:
      attend = jax.checkpoint(
        lambda inputs: _attend(inputs, segment_ids=segments), policy=policy
      )
      out, pullback, ids = jax.vjp(attend, inputs, has_aux=True)
      return out, ids, pullback(dout)[0]

    recomputed[label] = str(jax.make_jaxpr(run)(inputs, dout, segments))
    if label == "names":
      _check(jax.jit(run)(inputs, dout, segments), expected)
  # Selection is the only user of top_k. Saving the ids keeps it out of the
  # backward pass; saving nothing runs it twice.
  count = {k: v.count("top_k[") for k, v in recomputed.items()}
  assert count["names"] == 1, count
  assert count["nothing"] == 2, count
