"""Memory of `xla` is linear in the length, by the compiler's own account.

Programs are compiled and not run. The reference passes through the same
measurement and grows fourfold: the tests can fail.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import nsa_jax
from nsa_jax import KV, NSAConfig, cache
from nsa_jax.gating import gated_sum
from nsa_jax.models.loss import token_losses

CONFIG = NSAConfig(16, 8, 32, 4, 1, 1, 128)
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 8
# Long enough that [T, S] and [T, C, N] arrays would stand out from the 16 MiB
# that a chunk may take.
LENGTH = 8192


def _program(
  op: str,
  implementation: Any,
  length: int,
  batch: int = 1,
  window: int = CONFIG.window,
) -> tuple[Callable, Any]:
  """The op as a function of its arrays, and the shapes of these."""
  count = nsa_jax.num_compressed_blocks(length, CONFIG)

  def array(rows: int, heads: int, *last: int) -> Any:
    return jax.ShapeDtypeStruct((batch, rows, heads, *last), jnp.float32)

  query = array(length, HEADS, HEAD_DIM)
  tokens = KV(*2 * [array(length, KV_HEADS, HEAD_DIM)])
  blocks = KV(*2 * [array(count, KV_HEADS, HEAD_DIM)])
  ids = jax.ShapeDtypeStruct(
    (batch, length, KV_HEADS, CONFIG.num_selected), jnp.int32
  )
  common: dict[str, Any] = {
    "config": dataclasses.replace(CONFIG, window=window),
    "implementation": implementation,
  }
  programs: dict[str, tuple[Callable, Any]] = {
    "compressed_attention": (
      functools.partial(
        nsa_jax.compressed_attention, key_length=length, **common
      ),
      (query, *blocks),
    ),
    "select_blocks": (
      functools.partial(nsa_jax.select_blocks, key_length=length, **common),
      (query, blocks.key, array(length, HEADS)),
    ),
    "selected_attention": (
      functools.partial(nsa_jax.selected_attention, **common),
      (query, *tokens, ids),
    ),
    "window_attention": (
      functools.partial(nsa_jax.window_attention, **common),
      (query, *tokens),
    ),
    "full_attention": (
      functools.partial(nsa_jax.full_attention, implementation=implementation),
      (query, *tokens),
    ),
    "native_sparse_attention": (
      functools.partial(nsa_jax.native_sparse_attention, **common),
      (query, blocks, tokens, tokens, array(length, HEADS, 3)),
    ),
  }
  return programs[op]


def _compile(
  op: str, implementation: Any, length: int, backward: bool, **sizes: int
) -> Any:
  function, shapes = _program(op, implementation, length, **sizes)

  def forward_and_backward(*args: Any) -> Any:
    floats = args[:3] if op == "selected_attention" else args
    rest = args[len(floats) :]  # block ids have no gradient
    out, pullback = jax.vjp(lambda *x: function(*x, *rest), *floats)
    return pullback(out)

  run = forward_and_backward if backward else function
  return jax.jit(run).lower(*shapes).compile()


def _largest(compiled: Any) -> int:
  """Elements of the largest array in the optimised program."""
  shapes = re.findall(r"\b(?:pred|[sufb]f?\d+)\[([\d,]+)\]", compiled.as_text())
  return max(math.prod(map(int, s.split(","))) for s in set(shapes))


@pytest.mark.parametrize(
  "op, backward",
  [
    ("compressed_attention", False),
    ("compressed_attention", True),
    ("select_blocks", False),
    ("selected_attention", False),
    ("selected_attention", True),
    ("window_attention", False),
    ("window_attention", True),
    ("full_attention", False),
    ("full_attention", True),
    ("native_sparse_attention", False),
    ("native_sparse_attention", True),
  ],
)
def test_xla_is_linear_in_the_length(op: str, backward: bool) -> None:
  once, twice = (
    _compile(op, "xla", length, backward) for length in (LENGTH, 2 * LENGTH)
  )
  ratio = (
    twice.memory_analysis().temp_size_in_bytes
    / once.memory_analysis().temp_size_in_bytes
  )
  assert ratio <= 2.2, ratio
  # No [T, S] array, and no [T, C, N] one.
  count = nsa_jax.num_compressed_blocks(2 * LENGTH, CONFIG)
  assert _largest(twice) < 2 * LENGTH * count


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
  "batch, window", [(1, LENGTH), (8, LENGTH), (8, CONFIG.window)]
)
def test_wide_windows_and_batches(
  batch: int, window: int, backward: bool
) -> None:
  """So is the window branch's, with w = T and with w fixed; and for a batch."""
  once, twice = (
    _compile(
      "window_attention", "xla", length, backward, batch=batch, window=window
    )
    for length in (LENGTH, 2 * LENGTH)
  )
  ratio = (
    twice.memory_analysis().temp_size_in_bytes
    / once.memory_analysis().temp_size_in_bytes
  )
  assert ratio <= 2.2, ratio
  # No [T, S] array, not even for all rows of the batch together.
  assert _largest(once) < LENGTH**2
  assert _largest(twice) < LENGTH**2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_reference_is_not(backward: bool) -> None:
  once, twice = (
    _compile("native_sparse_attention", "reference", length, backward)
    for length in (512, 1024)
  )
  ratio = (
    twice.memory_analysis().temp_size_in_bytes
    / once.memory_analysis().temp_size_in_bytes
  )
  assert 3.5 < ratio < 4.5, ratio
  assert _largest(twice) >= 1024 * 1024


def test_losses_hold_no_logits_of_the_sequence() -> None:
  length, vocabulary = LENGTH, 4096

  def loss(x: Any, head: Any, labels: Any) -> Any:
    return token_losses(head, x, labels, chunk_logits=2**20).mean()

  float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  compiled = (
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    .lower(
      float32((1, length, 16)),
      float32((vocabulary, 16)),
      jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    .compile()
  )
  memory = compiled.memory_analysis()
  assert memory is not None
  assert memory.temp_size_in_bytes < length * vocabulary * 4 / 4
  assert _largest(compiled) <= 2**20


def test_a_block_keeps_little_for_its_backward_pass() -> None:
  """Of SwiGLU its two inputs, of the norms what they are applied to."""
  width, hidden, length = 64, 512, 2048

  def temporary(layers: int) -> int:
    config = nsa_jax.TransformerConfig.preset(
      "tiny",
      num_layers=layers,
      model_dim=width,
      mlp_dim=hidden,
      num_heads=1,
      num_kv_heads=1,
      head_dim=16,
      attention="window",
      scan_layers=True,
    )
    model = nsa_jax.TransformerLM(config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params: Any, tokens: Any) -> Any:
      return jnp.asarray(model.apply(params, tokens, labels=tokens)).mean()

    program = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes

  numbers = (temporary(5) - temporary(2)) / 3 / length / 4
  attention = 4 * 16  # query, key, value, output
  # The inputs of both norms, and that of the attention.
  assert numbers <= 2 * hidden + 3 * width + attention + 16, numbers


def test_gates_read_and_write_no_more_than_said() -> None:
  """In units of one [T, N, V] tensor, by the compiler's account."""
  branches = 3 * [jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.float32)]
  gates = jax.ShapeDtypeStruct((1, 2048, 4, 3), jnp.float32)

  def backward(gates: Any, branches: Any, dout: Any) -> Any:
    return jax.vjp(gated_sum, gates, branches)[1](dout)

  for function, args, units in (
    (gated_sum, (gates, branches), 4),
    (backward, (gates, branches, branches[0]), 12),
  ):
    cost: Any = jax.jit(function).lower(*args).compile().cost_analysis()
    moved = cost["bytes accessed"]
    assert moved / (4 * branches[0].size) < units + 0.3


def test_gates_keep_no_copy_in_another_dtype() -> None:
  branches = 3 * [jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)]
  gates = jax.ShapeDtypeStruct((1, 256, 4, 3), jnp.bfloat16)
  kept = jax.eval_shape(lambda *x: jax.vjp(gated_sum, *x)[1], gates, branches)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
  assert size <= 2 * (gates.size + 3 * branches[0].size)


@pytest.mark.parametrize("select", [None, "means"])
def test_a_step_of_decoding_by_xla_copies_no_cache(select: Any) -> None:
  """Temporary memory does not grow with the capacity as the cache does."""
  config = NSAConfig()

  @jax.jit
  def step(query: Any, held: Any, gates: Any, offset: Any) -> Any:
    return cache.attend(
      query,
      held,
      gates,
      config=config,
      query_offset=offset,
      select=select,
      implementation="xla",
    )

  def sizes(capacity: int) -> tuple[int, int]:
    held = jax.eval_shape(
      lambda: cache.init(
        1, capacity, config=config, num_kv_heads=2, head_dim=16, select=select
      )
    )
    query, gates = (
      jax.ShapeDtypeStruct((1, 1, 4, width), jnp.float32) for width in (16, 3)
    )
    offset = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled: Any = step.lower(query, held, gates, offset).compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes, cache.num_bytes(held)

  (small, held), (large, longer) = sizes(2**15), sizes(2**16)
  assert large - small < (longer - held) / 4
