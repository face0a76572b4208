"""Rows join, leave and share a batch; pages and example of serving."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nsa_jax import (
  NSAConfig,
  SelectByMeans,
  TransformerConfig,
  TransformerLM,
  cache,
)
from nsa_jax.sampling import empty_cache
from tests import helpers

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 6)
SLOTS, CAPACITY, PROMPT = 3, 48, 16
MAX_APPEND = 3
KINDS: dict[str, Any] = {
  "mixed": ("nsa", "full", "window"),
  "shared": "nsa",
  "scanned": "nsa",
}
SLOW = pytest.mark.slow


class Server:
  """The compiled steps of a model, as a server would have them."""

  def __init__(self, kind: str):
    config = TransformerConfig(
      vocab_size=17,
      num_layers=3 if kind == "mixed" else 2,
      attention=KINDS[kind],
      model_dim=12,
      num_heads=2,
      num_kv_heads=1,
      head_dim=4,
      mlp_dim=16,
      share_kv=kind == "shared",
      scan_layers=kind == "scanned",
      compression="mean" if kind == "scanned" else "mlp",
      select=None if kind == "shared" else "means",
      nsa=CONFIG,
    )
    self.model = TransformerLM(config, decode=True, max_append=MAX_APPEND)
    shapes = jax.eval_shape(
      self.model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    )
    rng = np.random.default_rng(0)
    self.params = jax.tree.map(
      lambda x: jnp.float32(0.4 * rng.normal(size=x.shape)), shapes["params"]
    )
    self.insert = jax.jit(cache.insert, donate_argnums=0)
    self.evict = jax.jit(cache.evict, donate_argnums=0)
    self.take = jax.jit(cache.take)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def step(self, held, tokens, counts):
    """Logits [B, T, vocabulary] of new tokens, and the cache."""
    real = jnp.arange(tokens.shape[1])[None] < counts[:, None]
    logits, updated = self.model.apply(
      {"params": self.params, "cache": held},
      tokens,
      segment_ids=real.astype(jnp.int32),
      mutable=["cache"],
    )
    return logits, updated["cache"]

  def read(self, prompt, capacity=PROMPT):
    """Logits after a prompt, and its cache of one row."""
    tokens = np.zeros((1, PROMPT), np.int32)
    tokens[0, : len(prompt)] = prompt
    counts = np.array([len(prompt)])
    logits, held = self.step(
      empty_cache(self.model, 1, capacity), tokens, counts
    )
    return np.asarray(logits)[0, len(prompt) - 1], held

  def serve(self, requests, slots, spoil=False):
    """Logits of every new token of each request, in a batch of `slots` rows.

    Args:
      requests: (arrival, prompt, number of new tokens, slot) of each.
      slots: B.
      spoil: what the batch holds before is NaN.
    """
    batch = empty_cache(self.model, slots, CAPACITY)
    if spoil:
      batch = jax.tree.map(
        lambda x: x + jnp.nan if x.dtype == jnp.float32 else x, batch
      )
    found: list[list[Any]] = [[] for _ in requests]
    tokens = np.zeros((slots, 1), np.int32)
    active = np.full(slots, -1)
    steps = max(at + new for at, _, new, _ in requests)
    for now in range(steps):
      for i, (at, prompt, _, slot) in enumerate(requests):
        if at == now:
          assert active[slot] < 0
          logits, row = self.read(prompt)
          batch = self.insert(batch, row, slot)
          active[slot] = i
          found[i].append(logits)
          tokens[slot] = logits.argmax()
      logits, batch = self.step(batch, tokens, (active >= 0).astype(np.int32))
      for slot, i in enumerate(active):
        if i < 0:
          continue
        own = np.asarray(logits)[slot, 0]
        found[i].append(own)
        tokens[slot] = own.argmax()
        if len(found[i]) == requests[i][2]:
          batch = self.evict(batch, slot)
          active[slot] = -1
    return found


@functools.cache
def _server(kind: str) -> Server:
  return Server(kind)


def _requests():
  """More requests than slots: a slot is used again, at other lengths."""
  rng = np.random.default_rng(0)
  return [
    (at, rng.integers(0, 17, length).tolist(), new, slot)
    for at, length, new, slot in (
      (0, 11, 12, 0),
      (0, 1, 5, 1),
      (3, 16, 9, 2),
      (6, 5, 8, 1),
      (13, 2, 6, 2),
      (14, 9, 4, 0),
    )
  ]


@pytest.mark.parametrize(
  "kind",
  ["mixed", *(pytest.param(x, marks=SLOW) for x in ("shared", "scanned"))],
)
def test_continuous_batching_equals_every_request_alone(kind):
  """Bit for bit in the same programs; within rounding in a batch of one."""
  server, requests = _server(kind), _requests()
  found = server.serve(requests, SLOTS)
  for request, own in zip(requests, found, strict=True):
    assert len(own) == request[2]
    _, prompt, new, slot = request
    alone = server.serve([(0, prompt, new, slot)], SLOTS, spoil=True)[0]
    helpers.assert_same_bits(own, alone)
    single = server.serve([(0, prompt, new, 0)], 1)[0]
    np.testing.assert_allclose(own, single, atol=1e-5)
    assert np.argmax(own, axis=1).tolist() == np.argmax(single, 1).tolist()


def test_a_shared_prefix_is_read_once():
  """Copies of one row go on as if each had been read."""
  server = _server("mixed")
  rng = np.random.default_rng(1)
  prefix, own = rng.integers(0, 17, 13), rng.integers(0, 17, (SLOTS, 6))
  _, row = server.read(prefix)
  batch = server.insert(
    empty_cache(server.model, SLOTS, CAPACITY), row, np.arange(SLOTS)
  )
  plain = TransformerLM(server.model.config)
  whole = np.concatenate([np.tile(prefix, (SLOTS, 1)), own], axis=1)
  want = jax.jit(plain.apply)({"params": server.params}, whole)
  for t in range(6):
    logits, batch = server.step(batch, own[:, t : t + 1], np.ones(SLOTS, int))
    np.testing.assert_allclose(logits[:, 0], want[:, 13 + t], atol=1e-5)


@pytest.mark.parametrize("kind", ["mixed", pytest.param("scanned", marks=SLOW)])
def test_rows_by_hand(kind):
  """Gathered rows, rows out of range, a larger capacity."""
  server = _server(kind)
  rng = np.random.default_rng(2)
  counts = np.array([7, 3, 16])
  tokens = rng.integers(0, 17, (SLOTS, PROMPT))
  small = empty_cache(server.model, SLOTS, PROMPT)
  _, small = server.step(small, tokens, counts)
  index = np.array([2, 0, 0, 1])
  taken = server.take(small, index)
  for x, y in zip(jax.tree.leaves(taken), jax.tree.leaves(small), strict=True):
    axis = 1 if kind == "scanned" else 0
    np.testing.assert_array_equal(x, np.take(np.asarray(y), index, axis))
  # Traced: nothing happens out of range.
  empty = empty_cache(server.model, SLOTS, CAPACITY)
  same = jax.jit(cache.insert)(empty, small, np.array([-1, 3, 5]))
  helpers.assert_same_bits(same, empty)
  same = jax.jit(cache.evict)(small, np.array([-1, 3]))
  helpers.assert_same_bits(same, small)
  # All rows move into a cache of a larger capacity, and go on there.
  grown = server.insert(empty, small, np.arange(SLOTS))
  small_more, _ = server.step(
    server.take(small, np.array([0])), tokens[:1, :1], np.array([1])
  )
  more, grown = server.step(grown, tokens[:, :1], np.array([1, 1, 1]))
  np.testing.assert_allclose(more[0], small_more[0], atol=1e-5)
  # And back to what it held.
  less = cache.rewind(grown, jnp.asarray(counts))
  again, _ = server.step(less, tokens[:, :1], np.array([1, 1, 1]))
  helpers.assert_same_bits(again, more)


def test_stacked_layers_are_layers():
  """As `scan_layers` stacks them."""
  rng = np.random.default_rng(0)

  def draw(held, lengths):
    held = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), held
    )
    return held._replace(lengths=jnp.array(lengths))

  def stack(layers):
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)

  options = {"select": "means"}
  layers = [draw(_held(3, **options), [5, 6, 7]) for _ in range(2)]
  rows = [draw(_held(2, 8, **options), [3, 2]) for _ in range(2)]
  index = jnp.array([2, 0])
  for got, want in (
    (
      cache.insert(stack(layers), stack(rows), index),
      cache.insert(layers, rows, index),
    ),
    (cache.evict(stack(layers), index), cache.evict(layers, index)),
    (cache.take(stack(layers), index), cache.take(layers, index)),
  ):
    helpers.assert_same_bits(got, stack(want))
  inserted = cache.insert(layers, rows, index)[0]
  assert inserted.lengths.tolist() == [2, 6, 3]
  np.testing.assert_array_equal(
    inserted.selected.key[0, :8], rows[0].selected.key[1]
  )
  np.testing.assert_array_equal(inserted.tail.value[2], rows[0].tail.value[0])
  np.testing.assert_array_equal(inserted.means[0, :2], rows[0].means[1])


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_rows_of_a_batch_on_many_devices(kind):
  """Rows and heads are split, as by a layout."""
  rng = np.random.default_rng(0)
  held = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    cache.quantize(_held(4, num_kv_heads=2, select="means")),
  )._replace(lengths=jnp.array([4, 3, 2, 1]))
  row = cache.take(held, jnp.array([3]))
  index = jnp.array([1, 2])
  calls: dict[Any, Any] = {
    cache.insert: (row, index),
    cache.evict: (index,),
    cache.take: (jnp.array([3, 3, 0, 1]),),
  }
  want = [call(held, *rest) for call, rest in calls.items()]
  mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    spread = jax.tree.map(
      lambda x: jax.device_put(
        x, P("rows", None, "heads") if x.ndim > 1 else P("rows")
      ),
      held,
    )
    for (call, rest), one in zip(calls.items(), want, strict=True):
      got = jax.jit(call)(spread, *rest)
      helpers.assert_same_bits(got, one)
      if kind == AxisType.Explicit:  # else the compiler chooses
        assert got.tail.key.sharding.spec[:3] == ("rows", None, "heads")


def test_a_donated_batch_is_updated_in_place():
  """What is copied is the row, however large the batch."""
  server = _server("mixed")
  make = functools.partial(empty_cache, server.model)
  batch, row = make(8, 4096), make(1, PROMPT)
  size = cache.num_bytes(batch)
  for function, args in ((server.insert, (row, 1)), (server.evict, (1,))):
    compiled = function.lower(batch, *args).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 100
  cost: Any = server.insert.lower(batch, row, 1).compile().cost_analysis()
  assert cost["bytes accessed"] < 20 * cache.num_bytes(row)


def _held(batch=2, capacity=16, **options):
  options = {"num_kv_heads": 1, "head_dim": 4, **options}
  return cache.init(batch, capacity, config=CONFIG, **options)


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: cache.insert(
        _held(select="means"), _held(1, select=SelectByMeans(2)), 0
      ),
      "`rows.means` are of 2 tokens each, and must be of 4, like `cache.means`",
    ),
    (
      lambda: cache.insert(_held(select="means"), _held(1), 0),
      "`rows.means` must be None exactly if `cache.means` is",
    ),
    (
      lambda: cache.insert(_held(), _held(1), 2),
      "`index` has the value 2; rows must lie in [0, 2).",
    ),
    (
      lambda: cache.insert(_held(), _held(), np.array([1, 1])),
      "`index`=[1, 1] must have every row at most once.",
    ),
    (
      lambda: cache.insert(_held(), _held(), 1),
      "`rows` has 2 rows, which must be 1 or one for each of the 1 places of",
    ),
    (
      lambda: cache.insert(_held(), _held(1, 24), 1),
      "`rows.selected.key` of shape (1, 24, 1, 4) must have shape (1, 16, 1, 4)"
      ": that of `cache`, with fewer rows or a smaller capacity.",
    ),
    (
      lambda: cache.insert(_held(), _held(1, max_append=2), 1),
      "`rows.window.key` of shape (1, 7, 1, 4) must have shape (1, 6, 1, 4): ",
    ),
    (
      lambda: cache.insert(_held(), _held(1, dtype="bfloat16"), 1),
      "`rows.selected.key` of dtype bfloat16 must have the dtype of `cache`, f",
    ),
    (
      lambda: cache.insert(_held(), _held(1, kind="full"), 1),
      "`rows.compressed` must be None exactly if `cache.compressed` is: both",
    ),
    (
      lambda: cache.insert({"a": _held()}, {"b": _held(1)}, 1),
      "`rows` must have the layers of `cache`, of the same model: PyTreeDef(",
    ),
    (
      lambda: cache.insert([_held()], [_held(1), jnp.ones(2)], 1),
      "`rows` holds a ",
    ),
    (
      lambda: cache.insert({}, {}, 1),
      "`cache` of type dict must be a pytree o",
    ),
    (lambda: cache.evict(_held(), -1), "`index` has the value -1; rows must"),
    (lambda: cache.evict(_held(), 0.5), "`index` of dtype float32 must have"),
    (
      lambda: cache.take(_held(), np.array([], int)),
      "`index`=array([], dtype=int64) must be a row, or rows [n].",
    ),
    (
      lambda: cache.take(_held(), np.array([[1]])),
      "`index`=array([[1]]) must be a row, or row",
    ),
    (
      lambda: cache.take(_held(), np.array([0, 2])),
      "`index` has the value 2; rows must",
    ),
    (
      lambda: empty_cache(
        TransformerLM(TransformerConfig.preset("tiny")), 0, 1
      ),
      "`batch`=0 must be at least 1.",
    ),
  ],
)
def test_messages(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()
