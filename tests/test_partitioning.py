"""Parameters split over a mesh: shardings by rule, metadata, training.

Eight virtual CPU devices (conftest.py).
"""

import collections
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import Layout, NSAConfig, parameter_shardings
from nsa_jax.partitioning import PARAMETER_RULES

NSA = NSAConfig(4, 2, 8, num_selected=3, window=8)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 32)).astype(np.int32)
LABELS = np.roll(TOKENS, -1, axis=1)


def make_model(**options: Any) -> nsa_jax.TransformerLM:
  small: dict[str, Any] = {
    "vocab_size": 32,
    "num_layers": 1,
    "model_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "nsa": NSA,
    "implementation": "xla",
  }
  config = nsa_jax.TransformerConfig(**(small | options))
  return nsa_jax.TransformerLM(config)


@functools.cache
def shapes_of(model: Any) -> Any:
  return jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1])


def make_mesh(data: int = 4, heads: int = 2, kind: str = "Auto") -> Any:
  return jax.make_mesh(
    (data, heads),
    ("data", "heads"),
    axis_types=2 * (getattr(AxisType, kind),),
    devices=jax.devices()[: data * heads],
  )


def layout_of(kind: str) -> Layout | None:
  """Explicit axes need none."""
  return Layout("data", None, "heads") if kind == "Auto" else None


def step_of(model: Any) -> Any:
  """(loss, gradients) of tokens and labels."""

  def loss(params, tokens, labels):
    return model.apply(params, tokens, labels=labels).mean()

  return jax.jit(jax.value_and_grad(loss))


def put(mesh: Any, *arrays: np.ndarray) -> list[jax.Array]:
  return [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays]


@functools.cache
def on_one_device(attention: str) -> Any:
  """(parameters, loss and gradients)."""
  model = make_model(attention=attention)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS[:1])
  return params, jax.device_get(step_of(model)(params, TOKENS, LABELS))


def collectives(text: str) -> collections.Counter[str]:
  names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  return collections.Counter(
    re.findall(rf"= \(?\S+ .*?({names})(?:-start)?\(", text)
  )


@functools.cache
def compiled(attention: str, kind: str, data: int, heads: int) -> Any:
  """The compiled step, its arguments and the shardings of the parameters."""
  mesh = make_mesh(data, heads, kind)
  model = make_model(attention=attention, layout=layout_of(kind))
  params, _ = on_one_device(attention)
  shardings = parameter_shardings(params, mesh)
  arguments = [jax.device_put(params, shardings), *put(mesh, TOKENS, LABELS)]
  with jax.set_mesh(mesh):
    step = step_of(model).lower(*arguments).compile()
  return step, arguments, shardings


@pytest.mark.parametrize(
  "attention, kind, data, heads",
  [
    ("nsa", "Explicit", 4, 2),
    ("nsa", "Auto", 8, 1),
    pytest.param("nsa", "Auto", 4, 2, marks=pytest.mark.slow),
    pytest.param("nsa", "Explicit", 1, 2, marks=pytest.mark.slow),
  ],
)
def test_training_as_on_one_device(attention, kind, data, heads):
  step, arguments, shardings = compiled(attention, kind, data, heads)
  got = step(*arguments)
  _, want = on_one_device(attention)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    jax.device_get(got),
    want,
  )
  if kind == "Explicit":  # The types say it.
    equal = jax.tree.map(
      lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), got[1], shardings
    )
    assert all(jax.tree.leaves(equal))


def test_heads_need_the_all_reduces_of_a_dense_layer():
  dense, _, _ = compiled("full", "Auto", 1, 2)
  want = collectives(dense.as_text())
  # After "out" and "mlp_down"; their inputs' gradients; norms and embedding.
  assert set(want) == {"all-reduce"}
  for kind in ("Auto", "Explicit"):
    sparse, _, _ = compiled("nsa", kind, 1, 2)
    assert collectives(sparse.as_text()) == want


def test_fsdp_gathers_parameters_alone():
  step, _, _ = compiled("nsa", "Auto", 8, 1)
  text = step.as_text()
  assert collectives(text).keys() == {"all-gather", "all-reduce"}
  # The largest activation, [8, 32, N, H], would be much more.
  largest = max(x.size for x in jax.tree.leaves(on_one_device("nsa")[0]))
  for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text):
    assert np.prod([int(x) for x in shape.split(",")]) <= largest


@pytest.mark.parametrize(
  "scan, compression",
  [(True, "mlp"), (False, "linear"), (True, "weighted"), (False, "mean")],
)
def test_metadata_say_what_the_rules_say(scan, compression):
  mesh, options = make_mesh(), {"scan_layers": scan, "normalize_qk": True}
  options |= {"compression": compression, "tie_embeddings": False}
  plain = shapes_of(make_model(**options))
  boxed = shapes_of(make_model(**options, logical_axes=True))
  assert nn.meta.unbox(boxed) == plain
  boxes = jax.tree.leaves(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  assert all(isinstance(x, nn.LogicallyPartitioned) for x in boxes)
  specs = nn.get_partition_spec(boxed)
  rules = [*PARAMETER_RULES.items()]
  named = nn.logical_to_mesh_sharding(specs, mesh, rules)
  by_rule = parameter_shardings(plain, mesh)
  equal = jax.tree.map(
    lambda a, b, x: a.is_equivalent_to(b, x.ndim), named, by_rule, plain
  )
  assert all(jax.tree.leaves(equal))
  # Boxes change nothing in the paths.
  assert jax.tree.leaves(parameter_shardings(boxed, mesh)) == jax.tree.leaves(
    by_rule
  )


def test_table():
  got = parameter_shardings(
    shapes_of(make_model(scan_layers=True)), make_mesh()
  )["params"]
  block = got["layers"]
  assert got["embedding"].spec == P(None, "data")
  assert block["mlp_norm"]["scale"].spec == P(None, None)
  assert block["mlp_up"]["kernel"].spec == P(None, "data", "heads")
  assert block["mlp_down"]["kernel"].spec == P(None, "heads", "data")
  attention = block["attention"]
  want = {
    "query": P(None, "data", "heads", None),
    "gate": P(None, "data", "heads", None),
    "value_window": P(None, "data", "heads", None),
    "out": P(None, "heads", None, "data"),
  }
  assert {name: attention[name]["kernel"].spec for name in want} == want
  assert attention["compress_key"]["w1"].spec == P(None, "heads", "data", None)


def test_biases_of_the_layer():
  layer = nsa_jax.NativeSparseAttention(4, 2, 8, config=NSA, use_bias=True)
  x = np.zeros((1, 32, 16), np.float32)
  tree = jax.eval_shape(layer.init, jax.random.key(0), x)
  got = parameter_shardings(tree, make_mesh())["params"]
  assert got["query"]["bias"].spec == P("heads", None)
  assert got["out"]["bias"].spec == P(None)


@pytest.mark.parametrize("make", [optax.adamw, optax.adafactor])
def test_optimiser_state(make):
  params = shapes_of(make_model())["params"]
  optimizer = optax.MultiSteps(make(1e-3), 2).gradient_transformation()
  state = {
    "params": params,
    "opt_state": jax.eval_shape(optimizer.init, params),
  }
  got = parameter_shardings(state, make_mesh())
  jax.tree.map(lambda *_: None, got, state)  # of one structure
  want = parameter_shardings(params, make_mesh())
  assert got["params"] == want == got["opt_state"].acc_grads
  assert got["opt_state"].mini_step.spec == P()
  if make is optax.adamw:
    assert got["opt_state"].inner_opt_state[0].mu == want


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_init_never_holds_the_whole_on_a_device(kind):
  model = make_model(model_dim=128, mlp_dim=512, vocab_size=512)
  mesh, arguments = make_mesh(kind=kind), (jax.random.key(0), TOKENS[:1])
  shapes = shapes_of(model)
  shardings = parameter_shardings(shapes, mesh)
  init = jax.jit(model.init, out_shardings=shardings)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  memory: Any = init.lower(*arguments).compile().memory_analysis()
  assert memory.output_size_in_bytes < whole / 6
  used = memory.output_size_in_bytes + memory.temp_size_in_bytes
  assert used < whole / 2
  params = init(*arguments)
  for device in jax.devices():
    held = sum(
      shard.data.nbytes
      for x in jax.tree.leaves(params)
      for shard in x.addressable_shards
      if shard.device == device
    )
    assert held == memory.output_size_in_bytes or held < whole / 6
  want = jax.jit(model.init)(*arguments)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    jax.device_get(params),
    jax.device_get(want),
  )


@pytest.mark.parametrize(
  "kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]
)
def test_init_in_a_mesh(kind):
  # With boxes, flax would constrain flattened kernels by three names.
  model = make_model(logical_axes=True, layout=layout_of(kind))
  mesh = make_mesh(kind=kind)
  rules = [*PARAMETER_RULES.items()] if kind == "Auto" else []
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    got = jax.jit(model.apply)(params, *put(mesh, TOKENS))
  plain = make_model()
  want = jax.jit(plain.apply)(on_one_device("nsa")[0], TOKENS)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_unstacked_boxes_have_no_name_for_the_layers():
  options = {"attention": "window", "num_layers": 2, "logical_axes": True}
  model = make_model(scan_layers=True, **options)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS[:1])["params"]
  single, unstacked = nsa_jax.unstack_layers(model, params)
  want = nn.get_partition_spec(shapes_of(single)["params"])
  assert nn.get_partition_spec(unstacked) == want


def test_an_initialiser_for_each_projection():
  parts = {
    "query": "heads",
    "key": "kv",
    "value": "kv",
    "gate": "gates",
    "phi": "blocks",
  }
  inits: dict[str, Any] = {
    name: nn.with_partitioning(nn.initializers.ones, (None, axis, None))
    for name, axis in parts.items()
  }
  layer = nsa_jax.NativeSparseAttention(4, 2, 8, config=NSA, kernel_init=inits)
  x = np.zeros((1, 32, 16), np.float32)
  params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
  specs = nn.get_partition_spec(params)
  for name, module in specs.items():
    part = parts.get(name.split("_")[0])
    for kernel in module.keys() & {"kernel"}:
      assert module[kernel] == (P(None, part, None) if part else P())
  phi = specs["compress_value"]
  assert phi["w1"] == phi["w2"] == P(None, "blocks", None)
  assert phi["position"] == phi["b1"] == P()
  np.testing.assert_array_equal(params["key_selected"]["kernel"].value, 1)
  np.testing.assert_array_equal(params["compress_key"]["w2"].value, 1)
  assert np.ptp(params["out"]["kernel"]) > 0  # the default


def _error(function, *args: Any, **kwargs: Any) -> str:
  with pytest.raises(ValueError) as error:
    function(*args, **kwargs)
  return str(error.value)


def test_messages():
  shapes = shapes_of(make_model())
  shard = parameter_shardings
  assert _error(shard, shapes, make_mesh(2, 4)) == (
    "`tree`['params']['layer_0']['attention']['compress_key']['b1'] of shape "
    "(2, 16) must have 'kv_heads' a multiple of 4, the devices of "
    "`rules`['kv_heads']='heads': 1, 2 would fit, and {'kv_heads': None} "
    "leaves it whole on every device."
  )
  whole = shard(shapes, make_mesh(2, 4), {"kv_heads": None})
  layer = whole["params"]["layer_0"]["attention"]
  assert layer["key_window"]["kernel"].spec == P("data", None, None)
  assert layer["query"]["kernel"].spec == P("data", "heads", None)
  assert _error(shard, shapes, make_mesh(), {"mlp": "data"}).endswith(
    "with the axes ('mlp', 'embed') must use a mesh axis once: "
    "`rules`['embed']='data'."
  )
  assert "`rules` has 'width', which must be one of ['embed'" in _error(
    shard, shapes, make_mesh(), {"width": "data"}
  )
  assert "`rules`['mlp']='tensor' must name axes of the mesh" in _error(
    shard, shapes, make_mesh(), {"mlp": "tensor"}
  )
  layer = functools.partial(nsa_jax.NativeSparseAttention, 4, 2, 8)
  assert "`kernel_init` has 'keys', which must be one of" in _error(
    layer, kernel_init={"keys": nn.initializers.ones}
  )
  assert "`kernel_init`['key']='zeros' must be an initialiser" in _error(
    layer, kernel_init={"key": "zeros"}
  )


def test_other_mesh_axes_split_nothing_by_default():
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  shapes = shapes_of(make_model())
  assert {
    x.spec for x in jax.tree.leaves(parameter_shardings(shapes, mesh))
  } <= {P(*(None,) * n) for n in range(4)}
  got = parameter_shardings(shapes, mesh, {"embed": ("fsdp",)})
  assert got["params"]["embedding"].spec == P(None, ("fsdp",))


def test_a_layout_in_json():
  config = make_model(layout=Layout(("a", "b"), None, "heads")).config
  assert nsa_jax.TransformerConfig.from_dict(config.to_dict()) == config
