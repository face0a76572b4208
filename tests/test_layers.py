"""The layer: equal to the op on hand-made projections, and its promises."""

import dataclasses
import functools
import inspect
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import AttentionConfig, NSAConfig
from nsa_jax.layers.linen import DenseAttention, NativeSparseAttention
from nsa_jax.rope import RopeConfig, apply_rope
from nsa_jax.typing import BRANCHES

CONFIG = NSAConfig(
  compression_block=4,
  compression_stride=2,
  selection_block=8,
  num_selected=3,
  num_initial=1,
  num_local=1,
  window=6,
)
B, T, D = 2, 40, 12


# Compiling is most of the time here; the ops are tested optimised.


def _layer(**overrides):
  fields = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "config": CONFIG,
    # Results do not depend on it, and it compiles fastest.
    "implementation": "reference",
  }
  return NativeSparseAttention(**{**fields, **overrides})


def _x(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape or (B, T, D))


@functools.cache
def _setup(**overrides):
  """A layer, random parameters (no zeros, no ones) and its jitted apply."""
  layer = _layer(**overrides)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), _x())
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  params = jax.tree.unflatten(
    tree, [jnp.float32(0.3 * rng.normal(size=leaf.shape)) for leaf in leaves]
  )
  return layer, params, jax.jit(layer.apply)


def _out_and_grads(layer, **kwargs):
  """Output, and gradients of an arbitrary loss by parameters and input."""

  def loss(params, x):
    out = layer.apply(params, x, **kwargs)
    return jnp.sum(jnp.sin(out + jnp.arange(out.size).reshape(out.shape))), out

  def run(params, x):
    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, grads

  return jax.jit(run)


def _rms_norm(x, scale):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _by_hand(layer, params, x, positions):
  """The layer written out from its documentation."""
  params = params["params"]

  def project(name):
    return jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"])

  def pick(name, branch):
    return project(name if layer.share_kv else f"{name}_{branch}")

  def norm(name, y):
    return _rms_norm(y, params[name]["scale"]) if layer.normalize_qk else y

  def rotate(y, positions=positions):
    return apply_rope(y, positions, layer.rope) if layer.rope else y

  def compress(name, y):
    order = {
      "mean": (),
      "weighted": ("weight",),
      "linear": ("position", "weight"),
      "mlp": ("position", "w1", "b1", "w2", "b2"),
    }[layer.compression]
    function = getattr(nsa_jax, f"compress_{layer.compression}")
    return function(y, *(params[name][p] for p in order), config=layer.config)

  query = norm("query_norm", project("query"))
  key = pick("key", "compressed")
  if layer.rope_compressed == "tokens":
    key = rotate(key)
  key = norm("key_compressed_norm", compress("compress_key", key))
  if layer.rope_compressed == "block":
    starts = np.arange(key.shape[1]) * layer.config.compression_stride
    key = rotate(key, positions[:, starts])
  compressed = nsa_jax.KV(
    key, compress("compress_value", pick("value", "compressed"))
  )

  def pair(branch):
    name = "key_norm" if layer.share_kv else f"key_{branch}_norm"
    key = rotate(norm(name, pick("key", branch)))
    return nsa_jax.KV(key, pick("value", branch))

  out = nsa_jax.native_sparse_attention(
    rotate(query),
    compressed,
    pair("selected"),
    pair("window"),
    jax.nn.sigmoid(project("gate")),
    config=layer.config,
    compressed_query=query if layer.rope_compressed == "none" else None,
    implementation="reference",
  )
  return jnp.einsum("btnv,nvd->btd", out, params["out"]["kernel"])


YARN = RopeConfig(base=100.0, yarn_factor=2.0, original_max_position=16)
VARIANTS = [
  {},
  {"compression": "linear", "share_kv": True, "rope_compressed": "tokens"},
  {
    "compression": "weighted",
    "rope_compressed": "none",
    "normalize_qk": True,
    "value_head_dim": 5,
  },
  {"compression": "mean", "share_kv": True, "normalize_qk": True},
  {"rope": None, "num_kv_heads": 1, "value_head_dim": 16},
  {"rope": YARN, "normalize_qk": True, "rope_compressed": "tokens"},
]


# A key that is not rotated any more adds the same to all scores of a query
# when it is shifted: these parameters have no effect.
INERT = {1: ("compress_key", "position"), 4: ("compress_key", "b2")}


@pytest.mark.parametrize("index", range(len(VARIANTS)))
def test_equals_the_op_on_projections_by_hand_and_learns(index):
  layer, params, _ = _setup(**VARIANTS[index])
  positions = jnp.arange(B * T).reshape(B, T) * 3 % 50
  want = jax.jit(functools.partial(_by_hand, layer))(params, _x(), positions)
  run = _out_and_grads(layer, positions=positions)
  got, (grads, _) = jax.device_get(run(params, _x()))
  assert got.shape == (B, T, D)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all(), path
    inert = tuple(key.key for key in path[1:]) == INERT.get(index)
    largest = np.abs(grad).max()
    assert largest < 1e-4 if inert else largest > 1e-3, path


def test_implementations_agree():
  _, params, apply = _setup()
  other = _layer(implementation="xla").apply
  np.testing.assert_allclose(
    jax.jit(other)(params, _x()), apply(params, _x()), atol=1e-5
  )


def test_causal_bitwise():
  _, params, apply = _setup()
  x = _x()
  for t in (0, 7, 8, 31):
    changed = x.at[:, t + 1 :].set(_x(seed=3)[:, t + 1 :])
    got = apply(params, changed)[:, : t + 1]
    np.testing.assert_array_equal(got, apply(params, x)[:, : t + 1])


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]])
def test_packed_equals_alone_and_padding_is_inert(variant):
  layer, params, apply = _setup(**variant)
  ids = np.zeros((B, T), np.int32)
  ids[0, :13], ids[0, 16:40] = 1, 2
  ids[1, 8:32] = 5
  x = jnp.where(ids[..., None] > 0, _x(), jnp.nan)
  run = _out_and_grads(layer, segment_ids=ids)
  packed, poisoned = run(params, x)
  alone = apply(params, jnp.stack([x[0, 16:40], x[1, 8:32]]))
  np.testing.assert_allclose(packed[0, 16:40], alone[0], atol=1e-5)
  np.testing.assert_allclose(packed[1, 8:32], alone[1], atol=1e-5)
  np.testing.assert_array_equal(packed[ids == 0], 0)
  again, clean = run(params, jnp.nan_to_num(x))
  np.testing.assert_array_equal(packed, again)
  jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))


@pytest.mark.parametrize("kind", ["full", "window"])
def test_padding_of_the_baselines_is_inert(kind):
  config = AttentionConfig(
    num_heads=2, num_kv_heads=1, head_dim=8, nsa=CONFIG, implementation="xla"
  )
  layer = DenseAttention(config, kind)
  ids = np.ones((B, T), np.int32)
  ids[0, 13:], ids[1, :8] = 0, 0
  clean = jnp.where(ids[..., None] > 0, _x(), 0)
  call: dict[str, Any] = {"positions": None, "segment_ids": ids}
  params = jax.jit(functools.partial(layer.init, **call))(
    jax.random.key(0), clean
  )
  run = _out_and_grads(layer, **call)
  expected = run(params, clean)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
  poisoned = jnp.where(ids[..., None] > 0, clean, jnp.nan)
  actual = run(params, poisoned)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", ["nsa", "full", "window"])
def test_rows_without_new_tokens_get_zeros(kind):
  """Of a static prefix, padding is at positions that the cache holds."""
  layer = _layer(decode=True, compression="mean", implementation="xla")
  call: dict[str, Any] = {"positions": None}
  if kind != "nsa":
    layer = DenseAttention(layer.attention, kind, decode=True)
    call["segment_ids"] = None
  variables = jax.jit(functools.partial(layer.init, **call))(
    jax.random.key(0), _x()
  )
  ids = np.array([[1] * 4, [0] * 4])

  @functools.partial(jax.jit, static_argnames="prefix_length")
  def append(cache, ids, prefix_length):
    return layer.apply(
      variables | cache,
      _x()[:, :4],
      positions=None,
      segment_ids=ids,
      prefix_length=prefix_length,
      mutable=["cache"],
    )

  empty = {"cache": jax.tree.map(jnp.zeros_like, variables["cache"])}
  out, full = append(empty, np.ones_like(ids), prefix_length=0)
  again, _ = append(full, ids, prefix_length=0)
  np.testing.assert_array_equal(again[0], out[0])
  np.testing.assert_array_equal(again[1], 0)


@pytest.mark.parametrize(
  "branches", [("window", "compressed"), ["selected"], ("window",)]
)
def test_branches(branches):
  """The others have a gate of 0, and no gradient."""
  layer, params, apply = _setup()
  x = _x()
  part = layer.clone(branches=branches)
  collect = functools.partial(part.apply, mutable=["intermediates"])
  out, sown = jax.jit(collect)(params, x)
  gates = np.asarray(sown["intermediates"]["gates"][0])
  kept = np.array([name in branches for name in BRANCHES])
  assert (gates[..., ~kept] == 0).all()
  assert (gates[..., kept] > 0).all()
  assert part.attention == layer.clone(branches=sorted(branches)).attention
  if len(branches) == 1:  # Of one branch and the others the sum is the whole.
    rest = tuple(name for name in BRANCHES if name not in branches)
    both = out + jax.jit(layer.clone(branches=rest).apply)(params, x)
    np.testing.assert_allclose(both, apply(params, x), atol=1e-5)
  grads = jax.jit(jax.grad(lambda p: (part.apply(p, x) ** 2).sum()))(params)
  for name, kernel in grads["params"].items():
    branch = name.rsplit("_", 1)[-1]
    if name.startswith(("key_", "value_")):
      assert (np.abs(kernel["kernel"]).max() > 0) == (branch in branches), name


@pytest.mark.parametrize("rope_compressed", ["block", "tokens", "none"])
def test_only_distances_matter(rope_compressed):
  # phi = mean commutes with a rotation, so all three are shift-invariant.
  _, params, apply = _setup(rope_compressed=rope_compressed, compression="mean")
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  base = apply(params, _x(), positions=positions)
  np.testing.assert_allclose(
    base, apply(params, _x(), positions=positions + 100), atol=1e-4
  )
  assert jnp.abs(base - apply(params, _x(), positions=positions * 2)).max() > (
    1e-3
  )


def test_is_multi_head_attention_when_only_a_wide_window_is_open():
  config = NSAConfig(4, 2, 8, num_selected=3, window=T)
  layer = _layer(
    num_kv_heads=4,
    config=config,
    compression="mean",
    share_kv=True,
    rope=None,
    use_bias=True,
  )
  dense = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32)
  params = jax.jit(dense.init)(jax.random.key(0), _x())["params"]
  params = jax.tree.map(lambda p: p + 0.1, params)
  own = jax.jit(layer.init)(jax.random.key(0), _x())["params"]
  closed, opened = -1e3, 1e3
  gate = {
    "kernel": jnp.zeros_like(own["gate"]["kernel"]),
    "bias": jnp.tile(jnp.array([closed, closed, opened]), (4, 1)),
  }
  # The argument a caller of the other layer passes.
  got = jax.jit(functools.partial(layer.apply, deterministic=True))(
    {"params": {**own, **params, "gate": gate}}, _x()
  )
  mask = nn.make_causal_mask(jnp.ones((B, T)))
  want: Any = dense.apply(
    {"params": params}, _x(), mask=mask, deterministic=True
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_normalize_qk_forgets_the_scale_of_the_projections():
  _, params, apply = _setup(normalize_qk=True, compression="linear")
  base = apply(params, _x())
  louder = jax.tree.map(lambda p: p, params)
  for name in ("query", "key_compressed", "key_selected", "key_window"):
    louder["params"][name]["kernel"] *= 8
  louder["params"]["compress_key"]["position"] *= 8
  np.testing.assert_allclose(apply(louder, _x()), base, atol=1e-3)


@pytest.mark.parametrize("compression", ["mean", "weighted", "linear", "mlp"])
def test_parameters_do_not_depend_on_the_length(compression):
  layer = _layer(compression=compression)
  init = functools.partial(jax.eval_shape, layer.init, jax.random.key(0))
  assert init(_x(1, 1, D)) == init(_x(1, T, D)) == init(_x(2, 3, D))


@pytest.mark.parametrize("length", [1, 4])
def test_short_sequences_are_prefixes(length):
  _, params, apply = _setup()
  short = apply(params, _x()[:, :length])
  np.testing.assert_allclose(short, apply(params, _x())[:, :length], atol=1e-5)


def test_initial_values():
  def phi(compression):
    init = jax.jit(_layer(compression=compression).init)
    params = init(jax.random.key(0), _x())["params"]
    return params["compress_key"], params["compress_value"]

  for params in phi("weighted"):
    np.testing.assert_array_equal(params["weight"], np.full((2, 4), 0.25))
  for params in phi("mlp"):
    assert params["w1"].shape == (2, 4 * 8, 16)
    assert params["w2"].shape == (2, 16, 8)
    np.testing.assert_allclose(params["position"].std(), 0.02, rtol=0.3)
    np.testing.assert_allclose(params["w1"].std(), 32**-0.5, rtol=0.2)
    assert not params["b1"].any()
    assert not params["b2"].any()


def test_sows_gates_and_block_ids():
  layer, params, apply = _setup()
  collect = jax.jit(functools.partial(layer.apply, mutable="intermediates"))
  out, state = collect(params, _x())
  (gates,), (ids,) = (
    state["intermediates"][name] for name in ("gates", "block_ids")
  )
  assert gates.shape == (B, T, 4, 3)
  assert gates.dtype == jnp.float32
  assert ((gates > 0) & (gates < 1)).all()
  assert ids.shape == (B, T, 2, CONFIG.num_selected)
  assert ids.dtype == jnp.int32
  # Nobody sees more than the blocks up to its own.
  assert (ids <= (jnp.arange(T) // 8)[:, None, None]).all()
  np.testing.assert_allclose(out, apply(params, _x()), atol=1e-5)
  assert set(params) == {"params"}


def test_dtypes(x64):
  x32 = _x().astype(jnp.float32)

  def dtypes(x, **fields):
    layer = _layer(normalize_qk=True, **fields)

    def run(x):
      params = layer.init(jax.random.key(0), x)
      return params, layer.apply(params, x, mutable=["intermediates"])

    params, (out, state) = jax.eval_shape(run, x)
    (stored,) = {leaf.dtype for leaf in jax.tree.leaves(params)}
    return stored, out.dtype, state["intermediates"]["gates"][0].dtype

  f16, bf16, f32, f64 = (
    jnp.dtype(name) for name in ("float16", "bfloat16", "float32", "float64")
  )
  assert dtypes(x32) == (f32, f32, f32)
  assert dtypes(x32, dtype=bf16) == (f32, bf16, f32)
  assert dtypes(x32, dtype="float16", param_dtype=f16) == (f16, f16, f32)
  assert dtypes(x32.astype(bf16)) == (f32, f32, f32)
  assert dtypes(x32.astype(bf16), param_dtype=bf16) == (bf16, bf16, f32)
  assert dtypes(x32.astype(f64)) == (f32, f64, f64)


def test_bfloat16_is_close_to_float32():
  # Every block is selected, so that rounding cannot change the choice.
  config = NSAConfig(4, 2, 8, num_selected=5, window=6)
  _, params, apply = _setup(config=config)
  want = apply(params, _x())
  half = _layer(config=config, dtype=jnp.bfloat16)
  got = jax.jit(half.apply)(params, _x())
  assert got.dtype == jnp.bfloat16
  # Five products in a row, each of whose inputs is rounded to 8 bits.
  error = jnp.abs(got.astype(jnp.float32) - want)
  assert error.max() < 0.03 * jnp.abs(want).max()


@pytest.mark.parametrize("names", [(None, "heads"), (None, "heads", None)])
def test_partitioning_metadata(names):
  init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
  layer, (plain, params, apply) = _layer(kernel_init=init), _setup()
  boxed = jax.eval_shape(layer.init, jax.random.key(0), _x())
  spec = nn.get_partition_spec(boxed)["params"]
  want = jax.sharding.PartitionSpec(*names)
  assert spec["query"]["kernel"] == spec["key_window"]["kernel"] == want
  # phi is not partitioned.
  assert spec["compress_key"]["w1"] == jax.sharding.PartitionSpec()
  unboxed = jax.eval_shape(plain.init, jax.random.key(0), _x())
  assert nn.unbox(boxed) == unboxed
  boxed_params = jax.tree.map(
    lambda box, value: (
      box.replace_boxed(value) if isinstance(box, nn.Partitioned) else value
    ),
    boxed,
    params,
    is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
  )
  np.testing.assert_array_equal(
    jax.jit(layer.apply)(boxed_params, _x()), apply(params, _x())
  )


def test_partitioned_over_devices():
  mesh = jax.make_mesh(
    (2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  # Initialisers see kernels flattened to two axes: two names fit both.
  init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "heads"))
  layer = _layer(kernel_init=init)
  abstract = jax.eval_shape(layer.init, jax.random.key(0), _x())
  shardings = nn.get_sharding(abstract, mesh)
  params = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), _x())
  kernel = params["params"]["query"]["kernel"].unbox(apply_constraint=False)
  assert kernel.sharding.shard_shape(kernel.shape) == (D, 2, 8)
  got = jax.jit(layer.apply)(params, _x())
  _, _, apply = _setup()
  host = jax.device_get(nn.meta.unbox(params))
  np.testing.assert_allclose(got, apply(host, _x()), atol=1e-5)


ATTRIBUTE_MESSAGES: list[Any] = [
  ({"num_heads": 0}, "`num_heads`=0 must be at least 1."),
  ({"num_heads": 4.0}, "`num_heads`=4.0 must be a static integer."),
  ({"num_kv_heads": -1}, "`num_kv_heads`=-1 must be at least 1."),
  (
    {"num_kv_heads": 3},
    "`num_heads`=4 must be a multiple of `num_kv_heads`=3.",
  ),
  ({"head_dim": 0}, "`head_dim`=0 must be at least 1."),
  ({"head_dim": 7}, "`head_dim`=7 must be even: RoPE rotates pairs"),
  ({"value_head_dim": 0}, "`value_head_dim`=0 must be at least 1."),
  ({"config": None}, "`config`=None must be an NSAConfig."),
  (
    {"compression": "max"},
    "`compression`='max' must be one of 'mean', 'weighted', 'linear', 'mlp'.",
  ),
  ({"share_kv": 1}, "`share_kv`=1 must be True or False."),
  (
    {"rope_compressed": None},
    "`rope_compressed`=None must be one of 'block', 'tokens', 'none'.",
  ),
  ({"rope": 10_000.0}, "`rope`=10000.0 must be a RopeConfig or None."),
  (
    {"branches": "window"},
    "`branches`='window' must be a sequence of one or more of 'compressed', "
    "'selected', 'window'.",
  ),
  ({"branches": ()}, "`branches`=() must be a sequence of one or more of"),
  ({"branches": ("window", "all")}, "`branches`=('window', 'all') must be"),
  ({"branches": 2 * ["window"]}, "`branches`=['window', 'window'] must be"),
  ({"branches": [{}]}, "`branches`=[{}] must be a sequence of one or more"),
  ({"normalize_qk": "yes"}, "`normalize_qk`='yes' must be True or False."),
  ({"dtype": "int32"}, "`dtype`='int32' must be a floating-point dtype."),
  ({"dtype": "f33"}, "`dtype`='f33' must be a floating-point dtype."),
  (
    {"param_dtype": None},
    "`param_dtype`=None must be a floating-point dtype.",
  ),
  (
    {"kernel_init": "zeros"},
    "`kernel_init`='zeros' must be an initialiser function.",
  ),
  ({"use_bias": None}, "`use_bias`=None must be True or False."),
  ({"implementation": "cuda"}, "`implementation`='cuda' must be None, one"),
  ({"decode": 1}, "`decode`=1 must be True or False."),
  ({"max_append": 0}, "`max_append`=0 must be at least 1."),
  (
    {"qkv_features": 24},
    "`qkv_features`=24 must be `num_heads` * `head_dim`=32, or None.",
  ),
  (
    {"qkv_features": 6, "head_dim": None},
    "`qkv_features`=6 must be a multiple of `num_heads`=4, or `head_dim`",
  ),
  ({"out_features": 0}, "`out_features`=0 must be at least 1."),
  ({"bias_init": 0}, "`bias_init`=0 must be an initialiser function."),
  ({"out_kernel_init": 0}, "`out_kernel_init`=0 must be an initialiser"),
  ({"dropout_rate": 0.1}, "`dropout_rate`=0.1 must be 0: the weights are"),
  ({"attention_fn": len}, "must be None: `implementation` chooses the"),
  ({"out_dot_general": len}, "must be None: `precision`, `dtype` and"),
]


@pytest.mark.parametrize("fields, message", ATTRIBUTE_MESSAGES)
def test_attribute_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _layer(**fields)
  # Those of the layer alone are not fields of the configuration.
  own = {field.name for field in dataclasses.fields(AttentionConfig)}
  if set(fields) <= own:
    with pytest.raises(ValueError, match=re.escape(message)):
      AttentionConfig(
        **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **fields}
      )


def test_two_spellings_of_a_configuration_are_equal():
  make = functools.partial(
    AttentionConfig, num_heads=4, num_kv_heads=2, head_dim=8
  )
  one = make(dtype="bfloat16", implementation=["triton", "xla"])
  other = make(dtype=jnp.bfloat16, implementation=("triton", "xla"))
  assert one == other
  assert hash(one) == hash(other)


def test_the_configuration_names_its_own_fields():
  with pytest.raises(ValueError, match="`nsa`=3 must be an NSAConfig"):
    AttentionConfig(
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      nsa=3,  # type: ignore[arg-type]
    )


def test_heads_from_features():
  """As in `nn.MultiHeadDotProductAttention`."""

  def shapes(**fields):
    layer = NativeSparseAttention(4, config=CONFIG, **fields)
    tree = jax.eval_shape(layer.init, jax.random.key(0), _x(1, T, 16))
    params = tree["params"]
    return [params[name]["kernel"].shape for name in ("query", "key_window")]

  assert shapes() == [(16, 4, 4), (16, 4, 4)]
  assert shapes(qkv_features=24) == [(16, 4, 6), (16, 4, 6)]
  assert shapes(num_kv_heads=2, head_dim=8) == [(16, 4, 8), (16, 2, 8)]
  assert shapes(head_dim=8, qkv_features=32) == [(16, 4, 8), (16, 4, 8)]


def test_initialisers_of_out_and_biases():
  constant = nn.initializers.constant
  layer = _layer(
    out_features=6,
    kernel_init=constant(1.0),
    out_kernel_init=constant(2.0),
    use_bias=True,
    bias_init=constant(3.0),
    out_bias_init=constant(4.0),
    compression="mean",
  )
  init = jax.jit(layer.init_with_output)
  out, params = init(jax.random.key(0), _x())
  assert out.shape == (B, T, 6)
  for name, module in params["params"].items():
    if not name.startswith("compress_"):
      own = name == "out"
      assert (module["kernel"] == 1 + own).all()
      assert (module["bias"] == 3 + own).all()


def test_every_argument_of_flax_attention_is_known():
  dense = nn.MultiHeadDotProductAttention
  fields = {field.name for field in dataclasses.fields(dense)}
  ours = {field.name for field in dataclasses.fields(NativeSparseAttention)}
  assert fields <= ours
  call, own = (
    set(inspect.signature(kind.__call__).parameters)
    for kind in (dense, NativeSparseAttention)
  )
  assert call - own == {"inputs_q"}  # It is `x` here.


def test_what_says_the_same_in_a_call():
  _, params, apply = _setup()
  layer, x = _layer(deterministic=True, dropout_rate=0), _x()
  call = functools.partial(layer.apply, params, deterministic=True)
  mask = nn.make_causal_mask(x[..., 0])
  out = jax.jit(lambda x: call(x, x, x, mask=mask))(x)
  np.testing.assert_allclose(out, apply(params, x), atol=1e-5)
  for mask in (np.tri(T), np.tri(T) > 0):
    out = jax.eval_shape(lambda x, mask=mask: call(x, mask=mask), x)
    assert out.shape == x.shape
  with pytest.raises(ValueError, match=r"^`mask`=.* is traced and cannot be"):
    jax.eval_shape(lambda mask: layer.apply(params, x, mask=mask), np.tri(T))


def test_odd_head_dim_without_rope():
  layer = _layer(head_dim=7, rope=None)
  out, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), _x())
  assert out.shape == (B, T, D)


CALL_MESSAGES: list[Any] = [
  ({"inputs_k": 1}, "`inputs_k` must be None or `x` itself: causal"),
  ({"inputs_v": 1}, "`inputs_v` must be None or `x` itself: causal"),
  (
    {"mask": np.ones((B, 1, T, T))},
    f"`mask` of shape ({B}, 1, {T}, {T}) must be None or exactly causal, ",
  ),
  ({"mask": np.tri(T - 1)}, "`mask` of shape (39, 39) must be None or exact"),
  ({"mask": "causal"}, "`mask`='causal' is no array and cannot be read. It"),
  ({"sow_weights": True}, "`sow_weights`=True must be False: the weights"),
  ({"x": jnp.ones((T, D))}, "`x` of shape (40, 12) must have rank 3"),
  (
    {"x": jnp.ones((B, T, D), jnp.int32)},
    "`x` of dtype int32 must have a floating-point dtype",
  ),
  (
    {"positions": jnp.zeros((T,), jnp.int32)},
    "`positions` of shape (40,) must have rank 2",
  ),
  (
    {"segment_ids": jnp.ones((B, T))},
    "`segment_ids` of dtype float32 must have an integer dtype.",
  ),
  (
    {"segment_ids": np.r_[np.ones(5, int), np.full(T - 5, 2)][None]},
    "`segment_ids` of shape (1, 40) must have shape (2, 40)",
  ),
  (
    {"segment_ids": np.tile(np.r_[[1] * 5, [2] * (T - 5)], (B, 1))},
    "`segment_ids` starts segment 2 of row 0 at position 5; starts must be "
    "multiples of `selection_block`=8.",
  ),
]


@pytest.mark.parametrize("arguments, message", CALL_MESSAGES)
def test_call_messages(arguments, message):
  layer, params, _ = _setup()
  with pytest.raises(ValueError, match=re.escape(message)):
    layer.apply(params, **{"x": _x(), **arguments})
