"""The whole op compiled for a GPU, through the transformations of JAX."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import NSAConfig
from nsa_jax.models.embedding import embed
from tests import helpers, test_embedding, test_modes
from tests.helpers import Dims

pytestmark = pytest.mark.gpu

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)
GROUPS = (2, 16)  # each design of the selected branch
FORWARD = ("compressed_fwd", "block_scores", "top_n", "window_fwd")
# Sizes and dtype; the last is what Mosaic GPU serves on a Hopper card.
CASES: dict[str, tuple[Dims, str]] = {
  **{
    f"{group} heads per group": (
      Dims(CONFIG, 2, 150, 150, 2, group, 32, 16),
      "float32",
    )
    for group in GROUPS
  },
  "bfloat16": (
    Dims(NSAConfig(32, 16, 64, 3, 1, 1, 100), 2, 300, 300, 2, 8, 64, 64),
    "bfloat16",
  ),
}


@functools.cache
def _named_case(name: str) -> Any:
  """A function -> (out, ids, gradients), its arguments, and its result."""
  dims, dtype = CASES[name]
  run = helpers.native_vjp(None, dims.config)
  args: Any = (
    helpers.make_inputs(dims, dtype),
    {},
    helpers.make_cotangent(dims, dtype),
  )
  args = jax.device_put(args)
  return run, args, run(*args)


def _case(group: int) -> Any:
  return _named_case(f"{group} heads per group")[1:]


def _split(args: Any) -> Any:
  """[B, ...] -> [1, B, ...]."""
  return jax.tree.map(lambda x: x[None], args)


def _one_by_one(run: Any, *args: Any) -> Any:
  """Mapped over the batch."""
  rows = jax.tree.map(lambda x: x[:, None], args)
  return jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(run))(*rows))


def _sharded(run: Any, *args: Any, check_vma: bool = True) -> Any:
  spec = P("batch", None, "head")
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "head"))
  run = jax.shard_map(
    run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
  )
  return jax.jit(run)(*args)


def _first(x: Any) -> Any:
  return jax.tree.map(lambda x: x[0], x)


WAYS: dict[str, Any] = {
  "again": lambda run, *args: run(*args),
  "eager": lambda run, *args: run.__wrapped__(*args),
  "vmap": _one_by_one,
  "pmap": lambda run, *args: _first(
    jax.pmap(run, devices=jax.devices()[:1])(*_split(args))
  ),
  "shard_map": _sharded,
  "shard_map, check_vma=False": functools.partial(_sharded, check_vma=False),
}


@pytest.mark.parametrize("group", GROUPS)
def test_matches_xla(group: int) -> None:
  args, (out, ids, grads) = _case(group)
  want_out, want_ids, want_grads = helpers.native_vjp("xla", CONFIG)(*args)
  # Random scores of float32 are far enough apart for one order.
  np.testing.assert_array_equal(ids, want_ids)
  helpers.assert_close(out, want_out, "float32")
  helpers.assert_close(grads, want_grads, "float32", gradient=4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_the_same(case: str, way: str) -> None:
  run, args, want = _named_case(case)
  dims, dtype = CASES[case]
  actual = WAYS[way](run, *args)
  np.testing.assert_array_equal(actual[1], want[1])
  # XLA may fuse the sums around the kernels otherwise.
  growth = 0.0 if dtype == "float32" else dims.gradient_growth(dtype)
  helpers.assert_close(actual[0], want[0], dtype)
  helpers.assert_close(actual[2], want[2], dtype, gradient=growth)
  if way == "again":
    helpers.assert_same_bits(actual, want)


@pytest.mark.parametrize("group", GROUPS)
def test_remat_of_named_values_runs_no_forward_kernel_twice(
  group: int,
) -> None:
  """Counted in the compiled program."""
  (inputs, _, dout), _ = _case(group)
  selected = "selected_fwd" if group > 8 else "selected_by_block_fwd"
  for keep, times in ((True, 1), (False, 2)):
    run = jax.jit(helpers.remat_vjp(keep, CONFIG))
    text = run.lower(inputs, dout).compile().as_text() or ""
    calls = re.findall(r'custom-call\(.*?op_name="([^"]*)"', text)
    counts = {
      kernel: sum(f"nsa_{kernel}/" in call for call in calls)
      for kernel in (*FORWARD, selected)
    }
    assert counts == dict.fromkeys(counts, times)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_offloaded_values_live_on_the_host(scan_layers: bool) -> None:
  length, results = 128, {}
  tokens = jax.random.randint(jax.random.key(0), (1, length), 0, 256)
  for remat in ("save_attention", "offload_attention"):
    config = nsa_jax.TransformerConfig.preset(
      "tiny", scan_layers=scan_layers, remat=remat, implementation="triton"
    )
    model = nsa_jax.TransformerLM(config)
    params = jax.jit(model.init)(jax.random.key(1), tokens)

    def loss(params: Any, model: Any = model) -> Any:
      return jnp.asarray(model.apply(params, tokens, labels=tokens)).mean()

    # XLA may choose another algorithm for a product in TF32.
    with jax.default_matmul_precision("float32"):
      program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    memory = program.memory_analysis()
    assert memory is not None
    heads = config.num_layers * length * config.num_heads
    on_host = memory.host_temp_size_in_bytes
    if "offload" not in remat:
      assert on_host == 0
    elif scan_layers:
      assert on_host >= 3 * 4 * heads * config.head_dim
    else:  # XLA keeps some of it on the device.
      assert on_host > 0
    results[remat] = program(params)
  helpers.assert_close(
    results["offload_attention"], results["save_attention"], "float32"
  )


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")])
def test_exported_programs_run(platforms: tuple[str, ...]) -> None:
  step, args = helpers.training_step(None)
  exported = export.export(
    step, platforms=platforms, disabled_checks=nsa_jax.EXPORT_DISABLED_CHECKS
  )(*args)
  program = export.deserialize(exported.serialize())
  assert "xla.gpu.triton" in program.mlir_module()
  helpers.assert_close(jax.jit(program.call)(*args), step(*args), "float32")
  xla, _ = helpers.training_step("xla")
  helpers.assert_close(step(*args), xla(*args), "float32")


@pytest.mark.jax_0_11
def test_exported_programs_for_hopper_run() -> None:
  run, args, want = _named_case("bfloat16")
  exported = export.export(run, disabled_checks=nsa_jax.EXPORT_DISABLED_CHECKS)(
    *args
  )
  program = export.deserialize(exported.serialize())
  hopper = jax.devices()[0].compute_capability == "9.0"
  assert ("mosaic_gpu" in program.mlir_module()) == hopper
  out, ids, _ = jax.jit(program.call)(*args)
  np.testing.assert_array_equal(ids, want[1])
  helpers.assert_close(out, want[0], "bfloat16")


@pytest.mark.parametrize("mode", test_modes.MODES)
def test_debugging_modes(mode: str) -> None:
  """Nothing is wrong, so that no mode finds anything or changes results."""
  step = test_modes.training(None, optax.sgd(1e-3))
  for name, (function, args) in {
    **test_modes.ops(None),
    **test_modes.decoding(None),
    "training": step,
  }.items():
    # The lse of a query that reads nothing is -inf.
    if mode == "infs" and name == "compressed_attention":
      continue
    args = jax.device_put(args)
    expected = jax.jit(function)(*args)

    def run(*args: Any, function: Any = function) -> Any:
      return function(*args)  # not in jax's cache of traces

    with test_modes.modes(mode):
      actual = run(*args) if mode == "no_jit" else jax.jit(run)(*args)
    helpers.assert_close(actual, expected, "float32", gradient=1, what=name)


def test_debug_nans_names_a_kernel() -> None:
  query, key, value = jax.device_put(test_modes.overflowing())
  attend = functools.partial(nsa_jax.window_attention, config=CONFIG)
  match = r"nan.*in pallas_kernels\.triton\.window\.forward"
  with (
    test_modes.modes("nans"),
    pytest.raises(FloatingPointError, match=match),
  ):
    jax.jit(attend)(query, key, value)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.hessian])
def test_forward_mode_names_the_way(transform: Any) -> None:
  (inputs, _, _), _ = _case(2)

  def total(query: Any) -> Any:
    return nsa_jax.native_sparse_attention(
      **inputs | {"query": query}, config=CONFIG
    ).sum()

  with pytest.raises(NotImplementedError, match=r'`implementation`="xla"'):
    transform(total)(inputs["query"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [test_embedding.FEW, 32768])
def test_the_gradient_of_an_embedding(vocabulary: int, dtype: str) -> None:
  rng = np.random.default_rng(0)
  tokens = test_embedding.text_like(8192, 2048, vocabulary)
  dout = jnp.asarray(rng.standard_normal((*tokens.shape, 64)), dtype)

  @jax.jit
  def gradient(table: Any, dout: Any) -> Any:
    return jax.vjp(lambda table: embed(table, tokens, dtype), table)[1](dout)

  table = jnp.zeros((vocabulary, 64))
  (grad,) = gradient(table, dout)
  want = np.zeros(table.shape)
  inside = (tokens >= 0) & (tokens < vocabulary)
  np.add.at(want, tokens[inside], np.asarray(dout, np.float64)[inside])
  # The most frequent token adds some 2000 numbers of N(0, 1).
  np.testing.assert_allclose(grad, want, atol=1e-3)
  helpers.assert_same_bits(gradient(table, dout), (grad,))


def test_losses_of_labels() -> None:
  """Those of the logits, with their gradients."""
  lm, tokens = test_modes.model(None)
  params = test_modes.parameters(lm, tokens)
  labels = np.roll(tokens, -1, axis=1)

  def by_labels(params: Any) -> Any:
    return lm.apply({"params": params}, tokens, labels=labels).mean()

  def by_logits(params: Any) -> Any:
    logits = lm.apply({"params": params}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  actual, expected = (
    jax.jit(jax.value_and_grad(f))(params) for f in (by_labels, by_logits)
  )
  helpers.assert_close(actual, expected, "float32", gradient=1)
