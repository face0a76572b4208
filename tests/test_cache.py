"""The decode cache: many small appends equal one full pass, and cost little."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import (
  KV,
  NSAConfig,
  SelectByMeans,
  TransformerConfig,
  TransformerLM,
  cache,
)
from nsa_jax.layers.linen import NativeSparseAttention
from tests import helpers

CONFIG = NSAConfig(
  compression_block=4,
  compression_stride=2,
  selection_block=8,
  num_selected=3,
  num_initial=1,
  num_local=1,
  window=6,
)
B, T, D, VOCAB = 2, 40, 12, 17
MAX_APPEND = 3

# Calls of (tokens, of which real per row). Row 0 starts with a prompt shorter
# than l, row 1 with one longer than the ring of the window; then appends that
# cross several block boundaries, some of nothing; every position is once the
# last of an append of some row.
RAGGED = (
  (11, (2, 11)),
  (11, (9, 0)),
  *((1, (1, 1)),) * 9,
  (3, (3, 2)),
  (3, (0, 3)),
  (3, (2, 3)),
  *((1, (1, 1)),) * 10,
  (1, (1, 0)),
  (1, (1, 0)),
  (3, (1, 1)),
)
STEPS = ((1, (1, 1)),) * T
CHUNKS = ((20, (20, 20)),) * 2


def _draw(shapes, seed=0):
  """Random parameters; drawing them with `init` takes longer to compile."""
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.float32(
      (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape)
    ),
    shapes,
  )


def _zeros(shapes):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


class Model:
  """A layer or model: the full pass, and calls with its cache."""

  def __init__(
    self, make: Any, inputs: np.ndarray, max_append: int = MAX_APPEND
  ):
    decoder = make(decode=True, max_append=max_append)
    shapes = jax.eval_shape(
      decoder.init, jax.random.key(0), jnp.asarray(inputs[:, :1])
    )
    self.inputs = inputs
    params = _draw(shapes["params"])
    sample = jnp.zeros((B, T, *inputs.shape[2:]), inputs.dtype)
    self.shapes = jax.eval_shape(decoder.init, jax.random.key(0), sample)
    self.empty = _zeros(self.shapes["cache"])

    @jax.jit
    def full(inputs):
      return make().apply({"params": params}, inputs, mutable="intermediates")

    @functools.partial(jax.jit, static_argnames="prefix_length")
    def step(kv, inputs, ids=None, **kwargs):
      out, updated = decoder.apply(
        {"params": params, "cache": kv},
        inputs,
        segment_ids=ids,
        mutable=["cache", "intermediates"],
        **kwargs,
      )
      return out, updated["cache"], updated.get("intermediates", {})

    self.decoder, self.params, self.step = decoder, params, step
    out, updated = full(inputs)
    self.want = np.asarray(out)
    self.want_ids = _ids(updated.get("intermediates", {}))

  def call(self, kv, at, size, counts, ragged=True, **kwargs):
    """Appends `counts` tokens from positions `at` [B] on; checks the result."""
    counts = np.asarray(counts)
    rows = at[:, None] + np.arange(size)
    real = np.arange(size) < counts[:, None]
    index = np.arange(B)[:, None], rows.clip(0, self.inputs.shape[1] - 1)
    new = self.inputs[index]
    if np.issubdtype(new.dtype, np.floating):
      new = np.where(real[..., None], new, np.nan)
    # Rarely without, as each way is compiled.
    ids = real.astype(np.int32) if ragged else None
    out, kv, sown = self.step(kv, new, ids, **kwargs)
    np.testing.assert_allclose(
      np.asarray(out)[real], self.want[index][real], atol=1e-5, rtol=1e-6
    )
    # The seeds leave no near ties.
    for got, want in zip(_ids(sown), self.want_ids, strict=True):
      np.testing.assert_array_equal(
        got[..., real, :, :],
        want[..., index[0], index[1], :, :][..., real, :, :],
      )
    return kv, at + counts

  def run(self, schedule, kv=None, at=(0, 0), **kwargs):
    kv, at = self.empty if kv is None else kv, np.asarray(at)
    for size, counts in schedule:
      kv, at = self.call(kv, at, size, counts, **kwargs)
    return kv, at


def _ids(intermediates):
  return [
    np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(intermediates)
    if "block_ids" in jax.tree_util.keystr(path)
  ]


def _x(seed=0):
  return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


@functools.cache
def _layer(max_append: int = MAX_APPEND, **overrides: Any) -> Model:
  fields = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "config": CONFIG,
    "implementation": "reference",
    **overrides,
  }
  make = functools.partial(NativeSparseAttention, **fields)
  return Model(make, _x(), max_append)


@functools.cache
def _model(**overrides: Any) -> Model:
  config = TransformerConfig(
    **{
      "vocab_size": VOCAB,
      "num_layers": 3,
      "model_dim": D,
      "num_heads": 4,
      "num_kv_heads": 2,
      "head_dim": 8,
      "mlp_dim": 10,
      "nsa": CONFIG,
      "attention": ("nsa", "full", "window"),
      "implementation": "reference",
      **overrides,
    }
  )
  tokens = np.random.default_rng(0).integers(0, VOCAB, (B, T), np.int32)
  return Model(functools.partial(TransformerLM, config), tokens)


VARIANTS: dict[str, list[Any]] = {
  "compression": ["mlp", "linear", "weighted", "mean"],
  "rope_compressed": ["block", "tokens", "none"],
  "share_kv": [False, True],
  "normalize_qk": [False, True],
  "value_head_dim": [None, 5],
  "implementation": ["xla", "reference"],
  "select": [None, "means", SelectByMeans(1)],
}
PAIRWISE = helpers.pairwise(VARIANTS)
# Every value once.
FAST = [
  dict(zip(VARIANTS, row, strict=True))
  for row in (
    ("mlp", "block", False, False, None, "xla", "means"),
    ("linear", "tokens", True, True, 5, "reference", None),
    ("weighted", "none", True, False, 5, "xla", SelectByMeans(1)),
    ("mean", "block", False, True, None, "reference", "means"),
  )
]


def _name(variant):
  return "-".join(map(str, variant.values()))


# ------------------------------------------------- the same as one full pass


@pytest.mark.parametrize("variant", FAST, ids=_name)
def test_ragged_appends_equal_one_pass(variant):
  _layer(**variant).run(RAGGED)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [RAGGED, STEPS, CHUNKS])
@pytest.mark.parametrize("variant", PAIRWISE, ids=_name)
def test_every_append_equals_one_pass(variant, schedule):
  _layer(**variant).run(schedule)


@pytest.mark.parametrize("schedule", [STEPS, CHUNKS])
def test_steps_and_chunks_equal_one_pass(schedule):
  _layer(**FAST[0]).run(schedule, ragged=False)


@pytest.mark.parametrize(
  "overrides",
  [
    {},
    {
      "scan_layers": True,
      "num_layers": 2,
      "attention": "nsa",
      "remat": "full",
      "select": "means",
    },
    {
      "implementation": "xla",
      "num_layers": 2,
      "attention": ("full", "window"),
      "value_head_dim": 5,
      "rope": None,
    },
  ],
  ids=["mixed", "scan", "xla"],
)
def test_model_logits_equal_one_pass(overrides):
  _model(**overrides).run(RAGGED)


def test_a_prefix_known_when_tracing():
  """Chunks at static starts, in a cache that held something else before."""
  for model in (_model(), _layer(**FAST[1])):
    kv, _ = model.run(RAGGED)
    at = np.zeros(B, int)
    for start, counts in ((0, (11, 9)), (11, (11, 0))):
      kv, at = model.call(kv, at, 11, counts, prefix_length=start)
    # Row 1 goes on where it stopped.
    model.run([(11, (0, 11)), (3, (0, 3))], kv, at)


def test_a_prefix_concerns_rows_with_new_tokens_only():
  """One row starts anew or goes on; the other keeps what it holds."""
  model = _layer()
  kv, _ = model.run([(11, (7, 3))])
  ids = np.array([[0] * 11, [1] * 5 + [0] * 6], np.int32)
  for start, end in ((0, 5), (5, 10)):
    new = np.where(ids[..., None] > 0, model.inputs[:, start : start + 11], 0)
    out, kv, sown = model.step(kv, new, ids, prefix_length=start)
    assert kv["kv"].lengths.tolist() == [7, end]
    np.testing.assert_allclose(out[1, :5], model.want[1, start:end], atol=1e-5)
    assert not np.asarray(out)[ids == 0].any()
    assert (np.asarray(sown["block_ids"][0])[ids == 0] == -1).all()
  model.run([(1, (1, 1))], kv, (7, 10))
  # Tokens that follow nothing are not appended.
  ids = np.array([[1] * 2 + [0] * 9] * 2, np.int32)
  out, kv, _ = model.step(kv, model.inputs[:, 7:18], ids, prefix_length=7)
  assert np.isnan(out[1, :2]).all()
  assert np.isfinite(out[0]).all()
  assert kv["kv"].lengths.tolist() == [9, 10]
  model.run([(1, (1, 1))], kv, (9, 10))


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_rewinding_rejected_tokens(kind):
  """Wrong tokens are appended and taken back, at every kind of boundary."""
  model, poison = _model(), None
  if kind == "layer":
    model, poison = _layer(select="means"), np.nan
  for length in (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33):
    step = model.step
    kv, at = model.run([(11, (min(11, length),) * B)])
    while at[0] < length:
      kv, at = model.call(kv, at, 1, (1, 1))
    for kept in (0, 1, 2):
      wrong = model.inputs[:, length : length + 3].copy()
      wrong[:, kept:] = poison or (wrong[:, kept:] + 1) % VOCAB
      _, kv, _ = step(kv, wrong, np.ones((B, 3), np.int32))
      kv = cache.rewind(kv, jnp.array([length + kept, length]))
      kv, at = model.run([(3, (0, kept))], kv, at + np.array([kept, 0]))
      kv = cache.rewind(kv, jnp.full(B, length))
      at = np.full(B, length)
    model.run([(1, (1, 1))] * 4 + [(3, (3, 3))], kv, at)


# Geometries with l = d = l', l > 2 d, windows of 1 and beyond the rings, and no
# initial block.
GEOMETRIES = [
  NSAConfig(8, 2, 8, num_selected=3, num_local=1, window=1),
  NSAConfig(4, 4, 4, num_selected=3, window=5),
  NSAConfig(2, 2, 4, num_selected=4, num_initial=0, window=20),
  NSAConfig(1, 1, 1, num_selected=6, window=3),
  NSAConfig(6, 3, 12, num_selected=2, num_local=1, window=9),
]


def _slow(parameters):
  return [pytest.param(*p, marks=pytest.mark.slow) for p in parameters]


@pytest.mark.parametrize(
  "config, max_append, rope_compressed, share_kv, select",
  [
    (GEOMETRIES[0], 5, "block", False, SelectByMeans(2)),
    (GEOMETRIES[1], 1, "none", True, None),
    (GEOMETRIES[4], 5, "block", True, "means"),
    *_slow(
      itertools.product(
        GEOMETRIES,
        (1, 5),
        ("block", "tokens", "none"),
        (False, True),
        (None, SelectByMeans(1)),
      )
    ),
  ],
)
def test_random_appends_and_rewinds(
  config, max_append, rope_compressed, share_kv, select
):
  model = _layer(
    max_append,
    config=config,
    rope_compressed=rope_compressed,
    share_kv=share_kv,
    select=select,
    implementation="xla",
  )
  rng = np.random.default_rng(0)
  for _ in range(3):
    kv, at, earliest = model.empty, np.zeros(B, int), np.zeros(B, int)
    while (at < T).any():
      size = int(rng.choice([1, max_append, 13]))
      counts = np.minimum(rng.integers(0, size + 1, B), T - at)
      kv, now = model.call(kv, at, size, counts)
      least = np.maximum(now - max_append, 0)
      earliest = np.where(at > 0, np.maximum(earliest, least), least)
      np.testing.assert_array_equal(kv["kv"].earliest, earliest)
      at = now
      if rng.integers(4) == 0:
        at = rng.integers(np.minimum(earliest, at), at + 1)
        kv = cache.rewind(kv, jnp.asarray(at))


def test_rewinding_too_far_is_not_silent():
  model = _layer()
  kv, _ = model.run([(11, (11, 5))])
  with pytest.raises(
    ValueError, match=re.escape("`lengths`=[7, 5] must be 0 or at least [8, 2]")
  ):
    cache.rewind(kv, jnp.array([7, 5]))
  # Not even in two steps; where lengths are traced, by NaN.
  less = cache.rewind(kv, jnp.array([8, 2]))
  less, _ = model.run([(1, (1, 1))], less, (8, 2))
  with pytest.raises(ValueError, match=re.escape("at least [8, 2]")):
    cache.rewind(less, jnp.array([7, 2]))
  less = jax.jit(cache.rewind)(kv, jnp.array([7, 5]))
  # It stays so once the row is long again: its blocks were completed wrongly.
  for start in range(7, 22, 3):
    new = model.inputs[:, start : start + 3]
    out, less, _ = model.step(less, new, np.ones((B, 3), np.int32))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
  # An empty row starts anew.
  model.run(
    [(11, (4, 1)), (1, (1, 1))], cache.rewind(kv, jnp.array([0, 5])), (0, 5)
  )
  # Rows may be rewound beside one that is lost.
  less = cache.rewind(less, jnp.array([22, 19]))
  assert less["kv"].lengths.tolist() == [22, 19]


def test_positions_may_be_shifted():
  model = _layer()
  kv, outs = model.empty, []
  for start in range(0, 16, 3):
    now = slice(start, start + 3)
    shifted = np.tile(np.arange(100, 100 + T, dtype=np.int32)[now], (B, 1))
    out, kv, _ = model.step(kv, model.inputs[:, now], positions=shifted)
    outs.append(out)
  # RoPE knows distances only.
  np.testing.assert_allclose(
    np.concatenate(outs, axis=1), model.want[:, :18], atol=2e-5
  )


# --------------------------------------------------------- the pure functions


def _mean(tokens: KV, first: Any) -> KV:
  assert first.shape == (
    tokens.key.shape[0],
    nsa_jax.num_compressed_blocks(tokens.key.shape[1], CONFIG),
  )
  return KV(*(nsa_jax.compress_mean(x, config=CONFIG) for x in tokens))


def _empty(capacity=T, **kwargs):
  options = {"num_kv_heads": 2, "head_dim": 8, "max_append": MAX_APPEND}
  return cache.init(B, capacity, config=CONFIG, **{**options, **kwargs})


def _pair(length, seed=0):
  rng = np.random.default_rng(seed)
  key, value = rng.normal(size=(2, B, length, 2, 8)).astype(np.float32)
  return KV(jnp.asarray(key), jnp.asarray(value))


def _append(held, pair, function=cache.append, counts=None):
  own = None if held.window is None else pair
  return function(
    held,
    config=CONFIG,
    compressed=pair,
    selected=pair,
    window=own,
    compress=_mean,
    counts=counts,
  )


@functools.partial(jax.jit, static_argnames=("length", "implementation"))
def _attend(held, length, offset, window=None, implementation=None):
  select: Any = None if held.means is None else "means"
  rng = np.random.default_rng(1)
  query = rng.normal(size=(B, length, 4, 8)).astype(np.float32)
  gates = rng.uniform(size=(B, length, 4, 3)).astype(np.float32)
  return cache.attend(
    jnp.asarray(query),
    held,
    jnp.asarray(gates),
    config=CONFIG,
    query_offset=offset,
    prefill_window=window,
    select=select,
    return_block_ids=True,
    implementation=implementation,
  )


@pytest.mark.parametrize("share_kv, select", [(False, "means"), (True, None)])
def test_implementations_agree_on_poisoned_caches(share_kv, select):
  """Small and large T, through the ring or as a chunk; NaN where none reads."""
  pair = _pair(23)
  held, chunk = _append(
    _empty(share_kv=share_kv, select=select),
    pair,
    cache.prefill,
    counts=np.array([23, 9]),
  )
  lengths = np.array([23, 9])

  def spoil(pair, ends):
    where = (ends >= lengths[:, None])[..., None, None]
    return KV(*(jnp.where(where, jnp.nan, x) for x in pair))

  starts = np.arange(held.compressed.key.shape[1]) * CONFIG.compression_stride
  held = held._replace(
    selected=spoil(held.selected, np.arange(T)),
    compressed=spoil(held.compressed, starts + CONFIG.compression_block - 1),
  )
  if select is not None:
    ends = np.arange(3, T, 4)
    held = held._replace(means=spoil((held.means, held.means), ends).key)
  results = []
  for implementation in ("reference", "xla"):
    for length in (1, 3):
      # The last queries of a row; then two that are beyond the end.
      for offset in (lengths - length, lengths - 1, lengths - 30):
        out, ids = _attend(
          held,
          length,
          jnp.array(offset),
          implementation=implementation,
        )
        at = offset[:, None] + np.arange(length)
        outside = (at < 0) | (at >= lengths[:, None])
        assert not np.asarray(out)[outside].any()
        assert (np.asarray(ids)[outside] == -1).all()
        results.append((out, ids))
    results.append(
      _attend(
        held,
        23,
        jnp.zeros(B, jnp.int32),
        window=chunk,
        implementation=implementation,
      )
    )
  half = len(results) // 2
  for got, want in zip(results[half:], results[:half], strict=True):
    np.testing.assert_array_equal(got[1], want[1])
    helpers.assert_close(got[0], want[0], "float32")


@pytest.mark.parametrize("kind", ["nsa", "means", "window", "full"])
def test_rewound_nan_and_numpy_caches(kind):
  """What a rewound token left behind is not read; arrays may be NumPy's."""
  own = kind != "full"

  @jax.jit
  def extend(held, pair):
    if kind in ("nsa", "means"):
      return _append(held, pair)
    return cache.append(
      held, config=CONFIG, **{"window" if own else "selected": pair}
    )

  def attend(held):
    query = jnp.ones((B, 1, 4, 8))
    kwargs = {"query_offset": held.lengths - 1}
    if kind == "full":
      return cache.attend_full(query, held, **kwargs)
    kwargs |= {"config": CONFIG, "implementation": "xla"}
    if kind == "window":
      return cache.attend_window(query, held, **kwargs)
    return cache.attend(
      query, held, jnp.ones((B, 1, 4, 3)), select=select, **kwargs
    )

  select: Any = "means" if kind == "means" else None
  held = _empty(kind="nsa" if select else kind, select=select)
  for seed in range(4):
    held = extend(held, _pair(3, seed))
  want = attend(held)
  poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), _pair(2))
  spoilt = cache.rewind(extend(held, poison), 12)
  for read in (spoilt, jax.tree.map(np.asarray, held)):
    helpers.assert_close(attend(read), want, "float32")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_window_beyond_the_capacity_is_not_read(implementation):
  def step(config):
    held = cache.init(
      B, T, config=config, num_kv_heads=2, head_dim=8, share_kv=True
    )
    held, _ = _append(held, _pair(23), cache.prefill)
    return jax.jit(
      lambda held: cache.attend(
        jnp.ones((B, 1, 4, 8)),
        held,
        jnp.ones((B, 1, 4, 3)),
        config=config,
        query_offset=held.lengths - 1,
        implementation=implementation,
      )
    )(held)

  all_tokens = dataclasses.replace(CONFIG, window=T)
  helpers.assert_close(
    step(dataclasses.replace(CONFIG, window=2**31 - 1)),
    step(all_tokens),
    "float32",
  )


def test_no_other_token_stands_for_one_that_the_ring_has_lost():
  held, _ = _append(_empty(), _pair(23), cache.prefill)
  for offset in (20, 15, 2, -1):
    want, got = (
      _attend(held, 3, jnp.array([offset, 20]), implementation=name)
      for name in ("reference", "xla")
    )
    helpers.assert_close(got, want, "float32")


def test_scan_vmap_and_jit_equal_a_loop():
  pair = _pair(12)

  def step(held, new):
    offset = held.lengths
    held = _append(held, new)
    return held, _attend(held, 1, offset)[0]

  want, outs = _empty(select="means"), []
  for t in range(12):
    want, out = jax.jit(step)(want, KV(*(x[:, t : t + 1] for x in pair)))
    outs.append(out)
  xs = KV(*(jnp.moveaxis(x, 1, 0)[:, :, None] for x in pair))
  got, scanned = jax.lax.scan(step, _empty(select="means"), xs)
  helpers.assert_close(got, want, "float32")
  helpers.assert_close(scanned, np.stack(outs), "float32")

  # Two caches, the second of which gets the tokens in reverse.
  both = jax.tree.map(lambda x: jnp.stack([x, x]), _empty(select="means"))
  reverse = jax.tree.map(lambda x: x[::-1], xs)
  pairs = jax.tree.map(lambda *x: jnp.stack(x, axis=1), xs, reverse)
  got, mapped = jax.lax.scan(jax.vmap(step), both, pairs)
  helpers.assert_close(jax.tree.map(lambda x: x[0], got), want, "float32")
  helpers.assert_close(mapped[:, 0], np.stack(outs), "float32")
  assert (mapped[:, 1] != mapped[:, 0]).any()


@pytest.mark.parametrize("length", [1, 3, 11])
def test_only_counted_tokens_are_written(length):
  """The padding of a ragged batch overwrites nothing, wherever a row ends."""
  append = jax.jit(functools.partial(_append, function=cache.prefill))
  held, _ = append(_empty(select="means"), _pair(23), counts=np.array([23, 5]))
  poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), _pair(length))
  same, _ = append(held, poisoned, counts=np.array([0, 0]))
  helpers.assert_same_bits(same, held)
  one = jax.tree.map(lambda x, y: x.at[:, :1].set(y), poisoned, _pair(1))
  got, _ = append(held, one, counts=np.array([1, 1]))
  want, _ = append(held, _pair(1))
  helpers.assert_same_bits(got, want)


def test_traced_overflow_drops_what_does_not_fit():
  held, _ = _append(_empty(select="means"), _pair(38), cache.prefill)
  step = jax.jit(_append)
  full = step(held, _pair(2))
  for length in (1, 3):
    more = step(full, _pair(length, seed=3))
    helpers.assert_same_bits(more, full)
  over = step(held, _pair(3))
  assert over.lengths.tolist() == [T, T]
  np.testing.assert_array_equal(
    over.selected.key[:, :38], held.selected.key[:, :38]
  )
  np.testing.assert_array_equal(over.selected.key[:, 38:], _pair(3).key[:, :2])
  assert not np.asarray(_attend(over, 1, jnp.array([T, T]))[0]).any()
  # The layer says so.
  model = _layer()
  kv, at = model.run([(11, (11, 11)), *[(11, (11, 9))] * 2, (11, (6, 6))])
  out, kv, _ = model.step(kv, model.inputs[:, :3], np.ones((B, 3), np.int32))
  assert np.isnan(out[0, 1:]).all()
  assert np.isfinite(out[0, 0]).all()
  assert np.isfinite(out[1]).all()
  model.run([(1, (0, 1))], cache.rewind(kv, jnp.array(at)), at)


# ------------------------------------------------------------------ its price


def _compiled(function, *args, **kwargs):
  lowered = jax.jit(function, **kwargs).lower(*args)
  return lowered.compile()


@pytest.mark.parametrize("length", [1, 3])
def test_a_step_does_not_compress_the_past(length):
  """The work of an append does not depend on the capacity."""
  flops = [
    _compiled(
      _append, _empty(capacity, select="means"), _pair(length)
    ).cost_analysis()["flops"]
    for capacity in (64, 1024)
  ]
  assert flops[0] == flops[1]


def test_phi_gets_no_more_than_the_blocks_that_may_complete():
  for length, blocks in ((1, 1), (2, 1), (3, 2), (11, 6)):
    seen: list[int] = []

    def compress(tokens, first, seen=seen):
      seen.append(first.shape[1])
      return _mean(tokens, first)

    pair = _pair(length)
    cache.prefill(
      _empty(),
      config=CONFIG,
      compressed=pair,
      selected=pair,
      window=pair,
      compress=compress,
    )
    assert seen == [blocks]


@pytest.mark.parametrize(
  "share_kv, select", [(False, None), (True, None), (True, "means")]
)
def test_a_donated_cache_is_updated_in_place(share_kv, select):
  """No second copy of it, neither of the keys nor of the values."""

  def step(held, new):
    offset = held.lengths
    held = _append(held, new)
    return held, _attend(held, 1, offset, implementation="xla")[0]

  held = _empty(4096, share_kv=share_kv, select=select)
  memory = _compiled(step, held, _pair(1), donate_argnums=0).memory_analysis()
  assert memory.alias_size_in_bytes == cache.num_bytes(held)
  # The products over the compressed blocks take them in another layout.
  compressed = cache.num_bytes([held.compressed, held.means])
  assert memory.temp_size_in_bytes < 1.5 * compressed
  assert compressed < cache.num_bytes(held.selected)


def test_a_prompt_costs_what_it_costs_without_a_cache():
  """With `prefix_length`, whatever the capacity."""
  layer = functools.partial(
    NativeSparseAttention,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    config=CONFIG,
    implementation="xla",
  )
  model = layer(decode=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, 512, D)))
  x = jax.ShapeDtypeStruct((B, 64, D), jnp.float32)

  def prompt(variables, x):
    return model.apply(variables, x, prefix_length=0, mutable=["cache"])

  def plain(variables, x):
    return layer().apply({"params": variables["params"]}, x)

  flops = [
    _compiled(f, shapes, x).cost_analysis()["flops"] for f in (prompt, plain)
  ]
  assert flops[0] < 1.05 * flops[1]


@pytest.mark.parametrize(
  "kind, share_kv, select",
  [
    ("nsa", False, None),
    ("nsa", True, "means"),
    ("full", False, "means"),
    ("window", False, None),
  ],
)
def test_bytes(kind, share_kv, select):
  config = NSAConfig()
  options: Any = {
    "config": config,
    "num_kv_heads": 2,
    "head_dim": 16,
    "value_head_dim": 8,
    "kind": kind,
    "select": select,
    "dtype": "bfloat16",
  }
  sizes = [
    cache.num_bytes(
      jax.eval_shape(
        functools.partial(
          cache.init, 3, s, max_append=5, share_kv=share_kv, **options
        )
      )
    )
    for s in (1024, 4096)
  ]
  per_token = cache.bytes_per_token(**options)
  assert sizes[1] - sizes[0] == 3 * (4096 - 1024) * per_token
  row = 2 * (16 + 8) * 2  # one key and one value of each head
  own_window = kind == "window" or (kind == "nsa" and not share_kv)
  rings = (512 + 4) * own_window + (32 + 4) * (kind == "nsa")
  # The last block has l tokens, not d: one compressed block less.
  blocks = kind == "nsa"
  assert sizes[0] == 3 * (1024 * per_token + row * (rings - blocks) + 8)


def test_capacity_and_append_of_the_cache():
  held = _empty(33, max_append=5)
  assert held.selected.key.shape[1] == 40
  assert cache.max_append(held, CONFIG) == 5
  assert cache.max_append(_empty(kind="window"), CONFIG) == MAX_APPEND
  assert cache.max_append(_empty(kind="full"), CONFIG) is None


# ------------------------------------------------------------------- messages


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: _empty(capacity=0), "`capacity`=0 must be at least 1"),
    (lambda: _empty(kind="dense"), "`kind`='dense' must be one of"),
    (lambda: _empty(max_append=0), "`max_append`=0 must be at least 1"),
    (
      lambda: _empty(select=SelectByMeans(3)),
      "`tokens`=3 of `select` must divide `selection_block`=8",
    ),
    (
      lambda: _empty(kind="full", select=SelectByMeans(3)),
      "`tokens`=3 of `select` must divide `selection_block`=8",
    ),
    (
      lambda: _append(
        _empty()._replace(means=jnp.zeros((B, 7, 2, 8))), _pair(1)
      ),
      "`cache.means` of shape (2, 7, 2, 8) must have a number of rows that div",
    ),
    (
      lambda: cache.attend_window(
        jnp.ones((B, 1, 4, 8)),
        _empty(kind="window")._replace(means=jnp.zeros((B, 10, 2, 8))),
        config=CONFIG,
        query_offset=0,
      ),
      "`cache.means` must be None without `selected`",
    ),
    (
      lambda: _append(
        _empty()._replace(means=jnp.zeros((B, 10, 2, 4))), _pair(1)
      ),
      "`cache.means` of shape (2, 10, 2, 4) must have shape (2, any, 2, 8)",
    ),
    (
      lambda: _append(
        _empty()._replace(means=jnp.zeros((B, 8, 2, 8))), _pair(1)
      ),
      "does not fit the rows of the cache, {'selected': 40, 'compressed': 19",
    ),
    (
      lambda: _append(_empty(), _pair(4)),
      "`append` of 4 tokens: at most `max_append`=3; `prefill` takes any",
    ),
    (
      lambda: _append(_empty(), _pair(1), counts=np.array([2, 0])),
      "`counts`=[2, 0] must lie in [0, 1]",
    ),
    (
      lambda: _append(_empty(), _pair(T + 1), cache.prefill),
      "capacity of 40 tokens must hold 41: `lengths`=[0, 0] and `counts`=",
    ),
    (
      lambda: jax.jit(lambda c: _append(c, _pair(T + 1), cache.prefill))(
        _empty()
      ),
      "capacity of 40 tokens must hold 41: `lengths`=None and `counts`=",
    ),
    (
      lambda: _append(
        _empty()._replace(lengths=jnp.array([T - 1, 3])), _pair(2)
      ),
      "capacity of 40 tokens must hold 41: `lengths`=[39, 3] and `counts`=",
    ),
    (
      lambda: _append(_empty(head_dim=4), _pair(1)),
      "`selected.key` of shape (2, 1, 2, 8) must have shape (2, 1, 2, 4)",
    ),
    (
      lambda: _append(_empty(dtype="bfloat16"), _pair(1)),
      "`selected.key` of dtype float32 must have the dtype of the cache, bfl",
    ),
    (
      lambda: _append(_empty(kind="full"), _pair(1)),
      "`compressed` must be None: the cache does not keep it",
    ),
    (
      lambda: cache.append(_empty(), config=CONFIG, selected=_pair(1)),
      "`compressed` of type NoneType must be a KV(key, value) pair",
    ),
    (
      lambda: cache.append(
        _empty(kind="full"), config=CONFIG, selected=_pair(1), compress=_mean
      ),
      "must be a function for a cache of kind 'nsa', and None for others",
    ),
    *(
      (
        functools.partial(
          cache.max_append, _empty(), dataclasses.replace(CONFIG, **other)
        ),
        "must be that of `init`: it does not fit the rows of the cache, {'sel",
      )
      for other in (
        {"window": 7},
        {"compression_block": 6},
        {"compression_stride": 4},
        {"selection_block": 16},
      )
    ),
    (
      lambda: cache.append(
        _empty(),
        config=CONFIG,
        compressed=_pair(1),
        selected=_pair(1),
        window=_pair(1),
        compress=lambda tokens, first: tokens,
      ),
      "`compress(...).key` of shape (2, 4, 2, 8) must have shape (2, 1, 2, 8)",
    ),
    (
      lambda: _attend(
        _empty(), 1, 0, KV(_pair(6).key, _pair(6).value[..., :4])
      ),
      "`prefill_window.value` of shape (2, 6, 2, 4) must have shape (any, any,",
    ),
    (
      lambda: _attend(_empty(), 4, 0),
      "`query` has 4 tokens, more than `max_append`=3: `prefill_window`",
    ),
    (
      lambda: _attend(_empty(kind="full"), 1, 0),
      "`cache` must be of kind 'nsa'",
    ),
    (
      lambda: _attend(_empty(), 1, np.zeros(3, int)),
      "of shape (3,) must be an integer, or an integer array of shape () or",
    ),
    (
      lambda: cache.rewind(_empty(), jnp.array([-1, 0])),
      "`lengths` has the value -1, which must be at least 0",
    ),
    (
      lambda: cache.rewind(_empty(), jnp.float32(1.5)),
      "`lengths` of dtype float32 must have an integer dtype",
    ),
    (
      lambda: cache.rewind(_empty(), jnp.zeros(3, int)),
      "`lengths` of shape (3,) must have shape (2)",
    ),
    (
      lambda: cache.rewind({"a": jnp.ones(2)}, jnp.array(0)),
      "must be a pytree of Cache",
    ),
  ],
)
def test_messages(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_layer_messages():
  model = _layer()
  variables = {"params": model.params, "cache": model.empty}
  x = model.inputs

  def apply(variables=variables, x=x[:, :4], mutable=("cache",), **kwargs):
    return model.decoder.apply(variables, x, mutable=list(mutable), **kwargs)

  for kwargs, message in (
    ({"variables": {"params": model.params}}, "needs the collection `cache`"),
    ({"mutable": ["intermediates"]}, '`mutable`=["cache"] must be passed'),
    ({"x": x[:1, :4]}, "`x` has 1 rows, which must be the 2 of the cache"),
    ({"x": np.zeros((B, T + 1, D))}, "capacity of 40 tokens must hold 41"),
    (
      {"segment_ids": np.array([[1, 1, 0, 0], [0, 1, 1, 1]])},
      "`segment_ids`[1]=[0, 1, 1, 1] must be one segment, then padding",
    ),
    ({"prefix_length": 4}, "`prefix_length`=4 must be what every row"),
    ({"prefix_length": -1}, "`prefix_length`=-1 must be at least 0"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      apply(**kwargs)
  plain = model.decoder.clone(decode=False)
  with pytest.raises(ValueError, match="`prefix_length`=0 needs `decode`=True"):
    plain.apply({"params": model.params}, x, prefix_length=0)
