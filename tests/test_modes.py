"""jax's debugging modes: everything works under each of them.

A mode that looks at traces is tested by tracing and lowering, for CPUs and
CUDA; one that looks at values by running.
"""

import contextlib
import functools
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nsa_jax
from nsa_jax import KV, NSAConfig, cache
from nsa_jax.layers import core
from pallas_kernels import platforms
from tests import helpers
from tests.helpers import Dims

CONFIG = NSAConfig(8, 4, 16, 3, 1, 1, 16)
LENGTH = 70  # more blocks than are selected

MODES: dict[str, Callable[[], Any]] = {
  "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
  "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
  "leaks": jax.checking_leaks,
  "x64": lambda: jax.enable_x64(True),
  "nans": lambda: jax.debug_nans(True),
  "infs": lambda: jax.debug_infs(True),
  "guard": lambda: jax.transfer_guard("disallow"),
  "no_jit": jax.disable_jit,
}


@pytest.fixture(autouse=True)
def cpu() -> Any:
  """Also where a GPU is."""
  with helpers.on_cpu():
    yield


def modes(*names: str) -> contextlib.ExitStack:
  """All of these modes at once."""
  stack = contextlib.ExitStack()
  for name in names:
    stack.enter_context(MODES[name]())
  return stack


def dims(group: int = 2) -> Dims:
  return Dims(CONFIG, 1, LENGTH, LENGTH, 1, group, 16, 16)


def random_like(shapes: Any) -> Any:
  """Small values for a tree of floating-point shapes; zeros for integers."""
  rng = np.random.default_rng(0)

  def one(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
      return 0.1 * helpers.normal(rng, x.shape, "float32").astype(x.dtype)
    return np.zeros(x.shape, x.dtype)

  return jax.tree.map(one, shapes)


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
  """Results and the gradients of their sum."""

  def run(*args: Any) -> Any:
    out, pullback = jax.vjp(function, *args)
    return out, pullback(jax.tree.map(jnp.ones_like, out))

  return run


def ops(
  implementation: Any,
  group: int = 2,
  dtype: str = "float32",
  packed: bool = False,
) -> dict[str, tuple[Callable[..., Any], Any]]:
  """Every public op as (function, arguments), with gradients where it has."""
  x = helpers.make_inputs(dims(group), dtype)
  call: dict[str, Any] = {"implementation": implementation}
  integers: dict[str, Any] = {}
  if packed:
    integers["segment_ids"] = helpers.packed_segments(dims(group))
  portable = implementation if implementation != "triton" else "xla"
  call |= integers | {"config": CONFIG}
  from_blocks = call | {"key_length": LENGTH}
  query, (key, value) = x["query"], x["window"]
  blocks = x["compressed"]
  lse = np.full(query.shape[:3], 3, np.float32)
  ids = np.zeros((1, LENGTH, 1, 2), np.int32)
  ids[..., 1] = -1
  part = functools.partial
  found: dict[str, tuple[Callable[..., Any], Any]] = {
    "native_sparse_attention": (
      with_gradient(lambda x: nsa_jax.native_sparse_attention(**x, **call)),
      (x,),
    ),
    "compressed_attention": (
      with_gradient(part(nsa_jax.compressed_attention, **from_blocks)),
      (query, *blocks),
    ),
    "selected_attention": (
      with_gradient(
        lambda q, k, v: nsa_jax.selected_attention(q, k, v, ids, **call)
      ),
      (query, key, value),
    ),
    "window_attention": (
      with_gradient(part(nsa_jax.window_attention, **call)),
      (query, key, value),
    ),
    "full_attention": (
      with_gradient(
        part(nsa_jax.full_attention, implementation=portable, **integers)
      ),
      (query, key, value),
    ),
    "block_scores": (
      part(nsa_jax.block_scores, **from_blocks | {"implementation": portable}),
      (query, blocks.key, lse),
    ),
    "select_blocks": (
      part(nsa_jax.select_blocks, **from_blocks),
      (query, blocks.key, lse),
    ),
    "block_mass": (
      with_gradient(
        part(nsa_jax.block_mass, **call | {"implementation": portable})
      ),
      (query, key),
    ),
    "block_ids_from_scores": (
      part(
        nsa_jax.block_ids_from_scores,
        config=CONFIG,
        key_length=LENGTH,
        **integers,
      ),
      (helpers.normal(np.random.default_rng(0), (1, LENGTH, 1, 5), dtype),),
    ),
    "apply_rope": (
      with_gradient(
        lambda x: nsa_jax.apply_rope(
          x, np.arange(LENGTH)[None], nsa_jax.RopeConfig()
        )
      ),
      (query,),
    ),
  }
  kinds: Any = ("mean", "weighted", "linear", "mlp")
  for kind in kinds:
    table = core.phi_parameters(kind, CONFIG, 1, 16)
    shapes = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, (_, shape) in table.items()
    }
    found[f"compress_{kind}"] = (
      with_gradient(
        lambda parameters, x, kind=kind: core.compress(
          kind, CONFIG, parameters, x, integers.get("segment_ids")
        )
      ),
      (random_like(shapes), key),
    )
  return found


def decoding(implementation: Any) -> dict[str, tuple[Any, Any]]:
  """A step and a prefill of a decode cache."""
  x = helpers.make_inputs(dims(), "float32")
  held = cache.init(
    1, LENGTH, config=CONFIG, num_kv_heads=1, head_dim=16, max_append=2
  )

  def phi(tokens: KV, first: Any) -> KV:
    del first
    return KV(*(nsa_jax.compress_mean(y, config=CONFIG) for y in tokens))

  def run(held: Any, query: Any, new: KV, gates: Any) -> Any:
    few = query.shape[1] <= 2
    add: Any = cache.append if few else cache.prefill
    offset = held.lengths
    held = add(
      held,
      config=CONFIG,
      compressed=new,
      selected=new,
      window=new,
      compress=phi,
    )
    window = None
    if not few:
      held, window = held
    out = cache.attend(
      query,
      held,
      gates,
      config=CONFIG,
      query_offset=offset,
      prefill_window=window,
      implementation=implementation,
    )
    return out, held

  def args(length: int) -> Any:
    tree = held, x["query"], x["window"], x["gates"]
    return tree[0], *jax.tree.map(lambda y: y[:, :length], tree[1:])

  return {"append": (run, args(2)), "prefill": (run, args(20))}


def model(implementation: Any, kind: Any = "nsa") -> Any:
  """A small TransformerLM, and tokens for it."""
  config = nsa_jax.TransformerConfig.preset(
    "tiny",
    num_layers=1,
    model_dim=16,
    mlp_dim=16,
    vocab_size=11,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    nsa=CONFIG,
    attention=kind,
    implementation=implementation,
  )
  tokens = np.random.default_rng(1).integers(0, 11, (1, LENGTH))
  return nsa_jax.TransformerLM(config), tokens.astype(np.int32)


def parameters(lm: Any, tokens: Any) -> Any:
  return random_like(jax.eval_shape(lm.init, jax.random.key(0), tokens))[
    "params"
  ]


def training(
  implementation: Any, optimizer: Any, kind: Any = "nsa"
) -> tuple[Any, Any]:
  """A training step of the model as (function, arguments)."""
  lm, tokens = model(implementation, kind)
  params = parameters(lm, tokens)

  def step(params: Any, state: Any, tokens: Any) -> Any:
    def loss(params: Any) -> Any:
      logits = lm.apply({"params": params}, tokens)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
      ).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return value, optax.apply_updates(params, updates), state

  state = random_like(jax.eval_shape(optimizer.init, params))
  return step, (params, state, tokens)


def generate(implementation: Any, *names: str) -> Any:
  """Tokens of a call that uses every option of sampling, under the modes."""
  lm, tokens = model(implementation)
  params = jax.device_put(parameters(lm, tokens))
  streamed: list[Any] = []
  with modes(*names):
    out = nsa_jax.generate(
      lm,
      params,
      [[1, 2, 3], [4]],
      max_new_tokens=[3, 3],
      temperature=[0.5, 0],
      top_k=5,
      top_p=0.9,
      stop_token=[7, 9],
      logits_hook=lambda logits, tokens, lengths: logits,
      key=1,
      return_log_probs=True,
      return_cache=True,
      stream=streamed.append,
    )
  return np.asarray(out.tokens), np.array(streamed)


def trace(
  call: tuple[Callable[..., Any], Any], names: Any, *platforms: str
) -> None:
  """Traces and lowers under the modes, without jax's caches of traces."""
  function, args = call
  with modes(*names), helpers.h200():
    # Another function: a trace of this one may be in jax's cache.
    traced = jax.jit(lambda *args: function(*args)).trace(*args)
    traced.lower(lowering_platforms=platforms)


# -------------------------------------------------- modes that look at traces

TRACED = ("rank_promotion", "dtype_promotion", "leaks", "x64")
# The first three are independent, so one trace tests them all.
TOGETHER = (TRACED[:3], TRACED[3:])
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [TRACED[:3], slow(TRACED[3:])], ids="+".join)
@pytest.mark.parametrize("dtype", ["bfloat16", slow("float32")])
@pytest.mark.parametrize("packed", [slow(False), True])
@pytest.mark.parametrize("implementation", ["xla", slow("reference")])
def test_traces_of_portable_ops(
  implementation: str, packed: bool, dtype: str, names: Any
) -> None:
  for call in ops(implementation, dtype=dtype, packed=packed).values():
    trace(call, names, "cpu")


KERNELS = (
  "compressed_attention",
  "selected_attention",
  "window_attention",
  "select_blocks",
)


@pytest.mark.parametrize(
  "names, group, dtype, packed, kernels, platforms",
  [
    (TRACED[:3], 2, "float32", True, KERNELS, ("cuda",)),
    (TRACED[:3], 16, "bfloat16", False, KERNELS[1:2], ("cuda",)),
    (TRACED[3:], 2, "float32", False, KERNELS[1::2], ("cpu", "cuda")),
    *(
      slow(names, group, dtype, packed, KERNELS, ("cpu", "cuda"))
      for names in TOGETHER
      for group in (2, 16)
      for dtype in ("float32", "bfloat16")
      for packed in (False, True)
    ),
  ],
)
def test_traces_of_kernels(
  names: Any, group: int, dtype: str, packed: bool, kernels: Any, platforms: Any
) -> None:
  """Compiled and interpreted, in both designs of the selected branch."""
  calls = ops("triton", group, dtype, packed)
  for name in kernels:
    trace(calls[name], names, *platforms)


@pytest.mark.parametrize("names", [TRACED[:3], slow(TRACED[3:])], ids="+".join)
def test_traces_of_models(names: Any) -> None:
  trace(training(None, optax.sgd(1e-3)), names, "cpu")
  trace(decoding("triton")["append"], names, "cuda")


def test_rewind_of_a_scanned_model() -> None:
  """Its caches have an axis of layers before the batch."""
  held = cache.init(1, 16, config=CONFIG, num_kv_heads=1, head_dim=16)
  held = jax.tree.map(lambda x: jnp.stack([x, x]), held)
  held = held._replace(lengths=jnp.full((2, 1), 3))
  with modes(*TRACED[:3]):
    shorter = cache.rewind(held, jnp.array([2]))
  assert shorter.lengths.tolist() == [[2], [2]]


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
@pytest.mark.parametrize("implementation", [None, "triton", "xla"])
def test_traces_of_all_models(implementation: Any, names: Any) -> None:
  """optax's Adam itself fails under strict dtype promotion, its SGD not."""
  optimizer = optax.adamw(1e-3) if "x64" in names else optax.sgd(1e-3)
  trace(training(implementation, optimizer), names, "cpu", "cuda")
  for kind in ("full", "window"):
    other = None if kind == "full" else implementation
    trace(training(other, optimizer, kind), names, "cpu", "cuda")
  for call in decoding(implementation).values():
    trace(call, names, "cpu", "cuda")


# --------------------------------------------------- modes that look at values


def test_generate() -> None:
  """Nothing is wrong, so no mode finds anything."""
  tokens, streamed = generate(None, *TRACED[:3], "nans", "infs", "guard")
  assert tokens[0, :3].tolist() == [1, 2, 3]
  np.testing.assert_array_equal(streamed[:, 0], tokens[0, 3:][: len(streamed)])


def test_queries_that_read_nothing_are_no_find() -> None:
  function, args = ops(None)["compressed_attention"]
  args = jax.device_put(args)
  with modes("nans", "guard"):
    (_, lse), _ = jax.jit(function)(*args)
  assert (lse[:, 0] == -jnp.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", sorted({*MODES} - {"no_jit"}))
@pytest.mark.parametrize("implementation", [None, "triton"])
def test_runs(implementation: Any, mode: str) -> None:
  jax.clear_caches()
  generate(implementation, mode)
  calls = [
    *decoding(implementation).values(),
    training(implementation, optax.sgd(1e-3)),
  ]
  for name, call in ops(implementation).items():
    # The lse of a query that reads nothing is -inf.
    if mode != "infs" or name != "compressed_attention":
      calls.append(call)
  for function, args in calls:
    args = jax.device_put(args)
    with MODES[mode]():
      jax.block_until_ready(jax.jit(function)(*args))


# ------------------------------------------------------------------ without jit


def _without_jit(call: tuple[Callable[..., Any], Any]) -> None:
  function, args = call
  with MODES["no_jit"]():
    actual = function(*args)
  helpers.assert_close(actual, jax.jit(function)(*args), "float32", gradient=1)


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_without_jit(implementation: Any) -> None:
  _without_jit(ops(implementation)["window_attention"])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "xla", "triton"])
def test_all_without_jit(implementation: Any) -> None:
  calls = ops(implementation) | decoding(implementation)
  calls["training"] = training(implementation, optax.adamw(1e-3))
  for call in calls.values():
    _without_jit(call)
  function, (query, *pair) = calls["window_attention"]
  mapped = jax.vmap(function, in_axes=(0, None, None))
  _without_jit((mapped, (query[None], *pair)))
  helpers.assert_same_bits(
    generate(implementation, "no_jit"), generate(implementation)
  )


def test_portable_functions_run_step_by_step() -> None:
  """They see values, which a user who disables jit wants to print."""
  seen: list[float] = []

  def portable(_: None, x: Any) -> Any:
    seen.append(float(x))
    return x

  def kernel(_: None, x: Any) -> Any:
    raise AssertionError(x)

  like = jax.ShapeDtypeStruct((), jnp.float32)
  with MODES["no_jit"]():
    platforms.by_platform((kernel, None), (portable, None), like, jnp.ones(()))
  assert seen == [1.0]


# ------------------------------------------------------------- NaN and infinity


def overflowing() -> Any:
  """Finite query, key and value whose scores are infinite at one position."""
  _, (query, key, value) = ops(None)["window_attention"]
  query = query.copy()
  query[0, 40, 0] = 3e38
  return query, np.abs(key) + 1, value


@pytest.mark.parametrize("transform", ["none", "jit", "vmap", "grad"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_debug_nans_leads_to_the_line(
  implementation: Any, transform: str
) -> None:
  query, key, value = overflowing()

  def attend(query: Any) -> Any:
    return nsa_jax.window_attention(
      query, key, value, config=CONFIG, implementation=implementation
    )[0]

  run: Any = {
    "none": attend,
    "jit": jax.jit(attend),
    "vmap": lambda x: jax.vmap(attend)(x[None]),
    "grad": jax.grad(lambda x: attend(x).sum()),
  }[transform]
  with MODES["nans"](), pytest.raises(FloatingPointError, match="in sub") as e:
    run(query)
  place = [f for f in traceback.extract_tb(e.tb) if "nsa_jax" in f.filename][-1]
  assert place.name == "_attend"
  assert place.line is not None
  assert "scores - high" in place.line


@pytest.mark.parametrize("names", [("nans",), ("nans", "no_jit")])
@pytest.mark.parametrize("implementation", ["triton", None])
def test_debug_nans_names_a_kernel(
  implementation: Any, names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """None as if on a GPU. jax would call the rule of a kernel without end."""
  monkeypatch.setattr(platforms, "_on_nvidia", lambda _: implementation is None)
  query, key, value = overflowing()
  attend = functools.partial(
    nsa_jax.window_attention, config=CONFIG, implementation=implementation
  )
  match = r"nan.*in pallas_kernels\.triton\.window\.forward"
  with modes(*names), pytest.raises(FloatingPointError, match=match):
    jax.jit(attend)(query, key, value)


@pytest.mark.parametrize(
  "implementation, place",
  [
    (None, "nsa_jax.xla.attention.compressed"),
    ("triton", "pallas_kernels.triton.compressed.forward"),
  ],
)
def test_debug_infs(implementation: Any, place: str) -> None:
  """The masks and the lse of queries that read nothing are no find."""
  _, (query, key, value) = ops(None)["compressed_attention"]

  def attend(value: Any) -> Any:
    return nsa_jax.compressed_attention(
      query,
      key,
      value,
      config=CONFIG,
      key_length=LENGTH,
      implementation=implementation,
    )

  with MODES["infs"]():
    _, lse = attend(value)
    with pytest.raises(FloatingPointError, match=rf"inf.*in {place}"):
      attend(np.full_like(value, 3e38))
  assert (lse[:, 0] == -jnp.inf).all()
