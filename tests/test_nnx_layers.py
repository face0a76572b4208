"""Layers of nnx: the same bits as linen's, in every transform of nnx."""

import dataclasses
import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nsa_jax
from nsa_jax import cache
from nsa_jax import nnx as nsa_nnx
from nsa_jax.layers import arguments, linen
from tests import test_layers as twin
from tests.helpers import assert_same_bits
from tests.test_layers import CONFIG, B, D, T

SEGMENTS = np.array([[1] * 16 + [2] * 20 + [0] * 4, [1] * T], np.int32)


def make(**overrides: Any) -> Any:
  fields = {
    "num_heads": 4,
    "in_features": D,
    "num_kv_heads": 2,
    "head_dim": 8,
    "config": CONFIG,
    "implementation": "reference",
    "rngs": nnx.Rngs(0),
  }
  return nsa_nnx.NativeSparseAttention(**{**fields, **overrides})


@functools.cache
def pair(**overrides: Any) -> Any:
  """linen's layer, its parameters, and the layer of nnx with the same."""
  layer, variables, _ = twin._setup(**overrides)
  params = variables["params"]
  abstract = nnx.eval_shape(lambda: make(**overrides))
  return layer, params, nsa_nnx.from_linen(abstract, params)


def loss_of(out: jax.Array) -> jax.Array:
  return jnp.sum(jnp.sin(out + jnp.arange(out.size).reshape(out.shape)))


VARIANTS: list[Any] = [
  *twin.VARIANTS,
  {"use_bias": True, "out_features": 6},
  {
    "dtype": jnp.bfloat16,
    "normalize_qk": True,
    "norm_epsilon": 1e-2,
    "biases": ("query", "value"),
    "gate_bias": (1.0, 0.0, -1.0),
    "gate_init_scale": 0.5,
    "rope": nsa_jax.RopeConfig(factor=2.0, scaling="linear", rotary_dim=4),
  },
]
FAST = (0, 2, len(VARIANTS) - 1)


@pytest.mark.parametrize(
  "overrides",
  [
    pytest.param(x, marks=() if i in FAST else pytest.mark.slow)
    for i, x in enumerate(VARIANTS)
  ],
  ids=str,
)
def test_same_bits_as_linen(overrides):
  layer, params, ours = pair(**overrides)

  @jax.jit
  def want(params, x):
    def loss(params):
      out = layer.apply({"params": params}, x, segment_ids=SEGMENTS)
      return loss_of(out), out

    return jax.grad(loss, has_aux=True)(params)

  @nnx.jit
  def got(ours, x):
    def loss(ours):
      out = ours(x, segment_ids=SEGMENTS)
      return loss_of(out), out

    return nnx.grad(loss, has_aux=True)(ours)

  grads, out = got(ours, twin._x())
  assert_same_bits((nnx.to_pure_dict(grads), out), want(params, twin._x()))
  assert_same_bits(nsa_nnx.to_linen(ours), params)


@pytest.mark.parametrize("kind", ["mlp", "linear", "weighted", "mean"])
def test_phi_has_the_same_bits(kind):
  x = jax.random.normal(jax.random.key(0), (B, T, 2, 8))
  phi = linen.CompressBlocks(kind, CONFIG)
  params = phi.init(jax.random.key(1), x).get("params", {})
  ours = nsa_nnx.CompressBlocks(kind, CONFIG, 2, 8, rngs=nnx.Rngs(0))
  ours = nsa_nnx.from_linen(ours, params)
  assert_same_bits(nsa_nnx.to_linen(ours), params)
  got = nnx.jit(lambda phi, x: phi(x, SEGMENTS))(ours, x)
  want = jax.jit(phi.apply)({"params": params}, x, SEGMENTS)
  assert_same_bits(got, want)


@pytest.mark.slow  # The tests of the model have it, too.
@pytest.mark.parametrize("kind", ["window", "full"])
def test_dense_attention_has_the_same_bits(kind):
  config = nsa_jax.AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    nsa=CONFIG,
    normalize_qk=True,
    biases=("query", "out"),
    attention_sinks=True,
    score_softcap=2.0,
  )
  layer = linen.DenseAttention(config, kind)
  none: dict[str, Any] = {"positions": None, "segment_ids": None}
  params = layer.init(jax.random.key(0), twin._x(), **none)["params"]
  ours = nsa_nnx.DenseAttention(config, kind, D, rngs=nnx.Rngs(0))
  ours = nsa_nnx.from_linen(ours, params)
  want = jax.jit(lambda x: layer.apply({"params": params}, x, **none))
  assert_same_bits(nnx.jit(ours)(twin._x()), want(twin._x()))


# ------------------------------------------------------------ transforms of nnx


def test_split_merge_and_remat():
  _, _, ours = pair()
  x = twin._x()
  want = nnx.jit(ours)(x)
  graph, state = nnx.split(ours)
  assert set(map(type, jax.tree.leaves(state, is_leaf=_is_variable))) == {
    nnx.Param
  }
  assert_same_bits(
    jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x), want
  )

  @nnx.jit
  def grads(ours, x):
    policy = nsa_jax.remat_policy("save_attention")
    run = nnx.remat(lambda ours, x: ours(x), policy=policy)
    return [
      nnx.grad(lambda ours, f=f: loss_of(f(ours, x)))(ours)
      for f in (run, lambda ours, x: ours(x))
    ]

  recomputed, plain = grads(ours, x)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), recomputed, plain
  )


def _is_variable(x):
  return isinstance(x, nnx.Variable)


def test_vmap_and_scan():
  """An ensemble, and layers one after the other."""
  x = twin._x()

  @nnx.split_rngs(splits=3)
  @nnx.vmap
  def ensemble(rngs):
    return make(rngs=rngs, compression="weighted")

  layers = ensemble(nnx.Rngs(1))
  assert layers.query.kernel.shape == (3, D, 4, 8)
  call = nnx.jit(lambda layer, x: layer(x))
  out = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))(
    layers, x
  )
  graph, state = nnx.split(layers)
  single = [
    nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(3)
  ]
  for i, layer in enumerate(single):
    np.testing.assert_allclose(out[i], call(layer, x), atol=1e-5)

  @nnx.jit
  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def run(x, layer):
    return layer(x)

  want = x
  for layer in single:
    want = call(layer, want)
  np.testing.assert_allclose(run(x, layers), want, atol=1e-5)


def test_an_optimizer_trains_it():
  ours, x = make(compression="mean"), twin._x()
  optimizer = nnx.Optimizer(ours, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(ours, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(ours)
    optimizer.update(ours, grads)
    return loss

  losses = [float(step(ours, optimizer)) for _ in range(20)]
  assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_initial_values_are_those_of_linen():
  """The same initialisers: as wide, and the same where they are constant."""
  want = twin._layer().init(jax.random.key(0), twin._x())["params"]
  got = nsa_nnx.to_linen(make())
  for (path, a), b in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a.std(), b.std(), rtol=0.3, err_msg=str(path))
  other = nsa_nnx.to_linen(make(rngs=nnx.Rngs(params=1)))
  assert (other["query"]["kernel"] != got["query"]["kernel"]).any()


def test_gates_start_as_told():
  ours = make(
    compression="mean",
    gate_bias=(1.0, 0.0, -1.0),
    gate_init_scale=0,
    use_bias=True,
    bias_init=nnx.initializers.ones,
  )
  np.testing.assert_array_equal(ours.gate.bias[...], [(1.0, 0.0, -1.0)] * 4)
  assert not ours.gate.kernel[...].any()
  assert (ours.query.bias[...] == 1).all()


@pytest.mark.parametrize(
  "option", [{"attention_sinks": True}, {"score_softcap": 30.0}]
)
def test_sparse_attention_has_no_sinks_and_no_soft_cap(option):
  with pytest.raises(NotImplementedError, match=f"`{next(iter(option))}`="):
    make(**option)


# --------------------------------------------------------------------- decoding


@pytest.mark.slow  # The tests of the model have it, too.
@pytest.mark.parametrize("view", [False, True])
def test_decoding_has_the_same_bits(view):
  """A ragged prompt, single tokens, and a prefix known when tracing."""
  layer, params, ours = pair()
  layer = layer.clone(decode=True, max_append=2)
  if view:
    ours = nnx.view(ours, decode=True, batch_size=B, max_length=T, max_append=2)
  else:
    ours = nnx.clone(ours)
    ours.decode, ours.max_append = True, 2
    ours.init_cache((B, T, D))
  held = jax.eval_shape(layer.init, jax.random.key(0), twin._x())["cache"]
  held = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), held)
  assert_same_bits(nnx.to_pure_dict(nnx.state(ours, nnx.Cache)), held)

  @functools.partial(jax.jit, static_argnames="prefix_length")
  def want(params, held, x, ids, prefix_length=None):
    out, new = layer.apply(
      {"params": params, "cache": held},
      x,
      segment_ids=ids,
      prefix_length=prefix_length,
      mutable=["cache"],
    )
    return out, new["cache"]

  def append(ours, x, ids, prefix_length=None):
    return ours(x, segment_ids=ids, prefix_length=prefix_length)

  got: Any = nnx.jit(append, static_argnames="prefix_length")

  x, at = np.asarray(twin._x()), np.zeros(B, int)
  calls = [(11, (9, 11), 0), *[(1, (1, 1), None)] * 3, (2, (2, 0), None)]
  for size, counts, prefix in calls:
    new = x[np.arange(B)[:, None], at[:, None] + np.arange(size)]
    ids = (np.arange(size) < np.array(counts)[:, None]).astype(np.int32)
    out, held = want(params, held, new, ids, prefix_length=prefix)
    assert_same_bits(got(ours, new, ids, prefix_length=prefix), out)
    assert_same_bits(nnx.to_pure_dict(nnx.state(ours, nnx.Cache)), held)
    at += counts
  # The functions of `nsa_jax.cache` work on the value.
  assert isinstance(ours.kv.get_value(), cache.Cache)
  ours.kv.set_value(cache.rewind(ours.kv.get_value(), jnp.asarray(at - 1)))
  assert ours.kv.get_value().lengths.tolist() == (at - 1).tolist()
  # A call may say otherwise.
  assert ours(twin._x(), decode=False).shape == (B, T, D)


# ----------------------------------------------------------------------- sowing


def test_gates_and_block_ids():
  """By `sow`, and as results."""
  layer, params, ours = pair()
  x = twin._x()
  collect = functools.partial(layer.apply, mutable=["intermediates", "inspect"])
  _, want = jax.jit(collect)({"params": params}, x)

  @nnx.jit
  def run(ours, x):
    captured = nnx.capture(ours, nnx.Intermediate, nsa_nnx.Inspect)(x)
    return captured, ours.attend(x)

  (out, sown, inspected), attended = run(ours, x)
  assert_same_bits(nnx.to_pure_dict(sown), want["intermediates"])
  assert set(inspected) == {"selected_query", "selected_key"}
  state = nnx.to_pure_dict(nnx.merge_state(sown, inspected))
  assert_same_bits(state, want["inspect"])
  assert_same_bits(attended.out, out)
  assert_same_bits(attended.gates, want["intermediates"]["gates"][0])
  assert_same_bits(attended.block_ids, want["intermediates"]["block_ids"][0])
  # Nothing stays behind.
  assert not hasattr(ours, "__captures__")
  found = nsa_jax.inspect.inspect_layer(state, config=CONFIG)
  assert found.recall.shape == (B, T, 4)


# ----------------------------------------------------------------- partitioning


def test_metadata_say_what_the_rules_say():
  mesh = jax.make_mesh(
    (4, 2), ("data", "heads"), axis_types=2 * (jax.sharding.AxisType.Auto,)
  )
  rules = [*nsa_jax.PARAMETER_RULES.items()]
  named = functools.partial(
    make,
    in_features=16,
    logical_axes=True,
    normalize_qk=True,
    use_bias=True,
    gate_bias=1.0,
    gate_init_scale=0.5,
  )
  state = nnx.state(named())
  by_rule = nsa_jax.parameter_shardings(state, mesh)
  with nnx.logical_axis_rules(rules):
    specs = nnx.get_partition_spec(state)
  for (path, spec), sharding, x in zip(
    jax.tree.leaves_with_path(specs),
    jax.tree.leaves(by_rule),
    jax.tree.leaves(state),
    strict=True,
  ):
    named_by = jax.sharding.NamedSharding(mesh, spec)
    assert named_by.is_equivalent_to(sharding, x.ndim), path
  # With a mesh and rules flax puts them there as they are made.
  with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
    created = nnx.jit(named)()
  for x, sharding in zip(
    jax.tree.leaves(nnx.state(created)), jax.tree.leaves(by_rule), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_partitioned_initialisers():
  init = nnx.with_partitioning(
    nnx.initializers.lecun_normal(), (None, "heads", None)
  )
  mesh = jax.make_mesh(
    (2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  with jax.set_mesh(mesh):
    layer = make(kernel_init={"query": init, "gate": init}, compression="mean")
    assert layer.query.kernel.sharding.shard_shape((D, 4, 8)) == (D, 2, 8)
    half = make(
      kernel_init={"gate": init}, gate_init_scale=0.5, compression="mean"
    )
  assert half.gate.kernel.out_sharding == (None, "heads", None)
  assert_same_bits(half.gate.kernel[...], 0.5 * layer.gate.kernel[...])


# --------------------------------------------------------------------- messages


OWN = {"deterministic", "broadcast_dropout"}


@pytest.mark.parametrize("fields, message", twin.ATTRIBUTE_MESSAGES)
def test_attribute_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make(**fields)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"in_features": 0}, "`in_features`=0 must be at least 1."),
    ({"rngs": 0}, "`rngs`=0 must be a Rngs."),
    ({"in_kv_features": 3}, "`in_kv_features`=3 must be None: the attention"),
    ({"kernel_metadata": {"a": 1}}, "must be None: `logical_axes` names the"),
    (
      {"head_dim": None, "in_features": 10},
      "`in_features`=10 must be a multiple of `num_heads`=4, or",
    ),
  ],
)
def test_own_attribute_messages(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make(**fields)


@pytest.mark.parametrize("arguments, message", twin.CALL_MESSAGES)
def test_call_messages(arguments, message):
  _, _, ours = pair()
  arguments = {"x": twin._x(), **arguments}
  x = arguments.pop("x")
  message = message.replace("`x`", "`inputs_q`")
  with pytest.raises(ValueError, match=re.escape(message)):
    ours(x, **arguments)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m, x: m(x, is_causal=False), "`is_causal`=False must be True"),
    (
      lambda m, x: m(x[..., :5]),
      "`inputs_q` of shape (2, 40, 5) must have D=12, as the parameters have.",
    ),
    (
      lambda m, x: m(x, decode=True),
      "`decode`=True needs a cache: call `init_cache` first.",
    ),
    (
      lambda m, x: m(x, prefix_length=0),
      "`prefix_length`=0 needs `decode`=True.",
    ),
    (
      lambda m, x: m(x, out_sharding="data"),
      "`out_sharding`='data' must be None: `precision`, `dtype` and `layout`",
    ),
    (lambda m, x: m(x, decode="no"), "`decode`='no' must be True or False."),
    (
      lambda m, x: m.init_cache((2, 8)),
      "`input_shape`=(2, 8) must be (B, capacity, D).",
    ),
    (
      lambda m, x: m.init_cache((2, 8, 5)),
      "`input_shape`=(2, 8, 5) must end with D=12, as the parameters have.",
    ),
    (
      lambda m, x: nnx.view(m, batch_size=2),
      "`batch_size`=2 and `max_length`=None must come together.",
    ),
    (
      lambda m, x: nsa_nnx.from_linen(m, {"params": {}}),
      'must be what linen\'s `init` returns under "params".',
    ),
    (
      lambda m, x: nsa_nnx.from_linen(m, {}),
      "`params['compress_key']['b1']` is missing: the module has it.",
    ),
    (
      lambda m, x: nsa_nnx.from_linen(m, nsa_nnx.to_linen(m) | {"a": x}),
      "`params['a']` is unknown: the module has no such.",
    ),
    (
      lambda m, x: nsa_nnx.from_linen(
        m, nsa_nnx.to_linen(m) | {"query": {"kernel": x}}
      ),
      "`params['query']['kernel']` of shape (2, 40, 12) must have shape "
      "(12, 4, 8), that of the module's parameter.",
    ),
    (
      lambda m, x: nsa_nnx.to_linen(x),
      "must be a Module.",
    ),
  ],
)
def test_more_messages(call, message):
  _, _, ours = pair()
  with pytest.raises(ValueError, match=re.escape(message)):
    call(nnx.clone(ours), twin._x())


def test_every_argument_of_flax_attention_is_known():
  options = {x.name for x in dataclasses.fields(nsa_jax.AttentionConfig)}
  for method, more in (
    ("__init__", options | arguments.FIXED),
    ("__call__", set()),
  ):
    dense, own = (
      set(inspect.signature(getattr(kind, method)).parameters)
      for kind in (nnx.MultiHeadAttention, nsa_nnx.NativeSparseAttention)
    )
    assert dense - own - more == set()


def test_arguments_of_flax_attention():
  """What `nnx.MultiHeadAttention` takes and means the same."""
  dense = nnx.MultiHeadAttention(4, D, 16, 8, 2, rngs=nnx.Rngs(0), decode=False)
  ours = nsa_nnx.NativeSparseAttention(
    4,
    D,
    16,
    8,
    2,
    config=CONFIG,
    use_bias=True,
    dropout_rate=0.0,
    deterministic=True,
    broadcast_dropout=False,
    keep_rngs=False,
    in_kv_features=D,
    decode=None,
    rngs=nnx.Rngs(0),
  )
  x = twin._x()
  mask = nnx.make_causal_mask(x[..., 0])
  call: dict[str, Any] = {"mask": mask, "deterministic": True}
  out = nnx.eval_shape(
    lambda ours, x: ours(x, x, x, **call, rngs=nnx.Rngs(0), sow_weights=False),
    ours,
    x,
  )
  assert out.shape == dense(x, x, x, **call).shape
  for name in ("query", "out"):
    kernels = getattr(ours, name).kernel, getattr(dense, name).kernel
    assert kernels[0].shape == kernels[1].shape
    assert getattr(ours, name).bias.shape == getattr(dense, name).bias.shape
  for name in ("num_heads", "num_kv_heads", "head_dim", "dtype"):
    assert getattr(ours.attention, name) == getattr(dense, name)
  assert (ours.in_features, ours.out_features) == (D, 8)


def test_options_are_those_of_the_configuration():
  layer = make(share_kv=True, rope=None, branches=("window",))
  want = nsa_jax.AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    nsa=CONFIG,
    share_kv=True,
    rope=None,
    branches=("window",),
    implementation="reference",
  )
  assert layer.attention == want
  with pytest.raises(TypeError, match="'chains'"):
    make(chains=1)
