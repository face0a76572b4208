"""A wrong argument is a ValueError that names it, in every public function.

Each argument of a call that is valid is replaced in turn by odd values: of
another type, rank, dtype, shape or size. The call must then succeed, or raise a
ValueError with the argument's name in backticks, or a NotImplementedError.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from matplotlib import figure

import nsa_jax
from nsa_jax import (
  KV,
  NSAConfig,
  PackedRows,
  cache,
  compression,
  rope,
  sampling,
)
from nsa_jax import nnx as nsa_nnx
from nsa_jax.layers import core
from nsa_jax.layers import linen as layers
from nsa_jax.models import convert
from tests import helpers, parity

# S = T = 12, hence C = 5 and M = 3; N = 2, K = 1, H = V = 4, D = 8.
CONFIG = NSAConfig(4, 2, 4, 2, 0, 1, 3)
OPTIONS = nsa_jax.AttentionConfig(
  num_heads=2, num_kv_heads=1, head_dim=4, nsa=CONFIG, compression="mean"
)
MODEL = nsa_jax.TransformerLM(
  nsa_jax.TransformerConfig.preset(
    "tiny",
    num_layers=1,
    model_dim=8,
    mlp_dim=8,
    vocab_size=16,
    num_heads=2,
    head_dim=4,
    nsa=CONFIG,
    attention="window",
  )
)
SPARSE = MODEL.clone(
  config=dataclasses.replace(MODEL.config, attention="nsa", compression="mean")
)
STACKED = MODEL.clone(
  config=dataclasses.replace(MODEL.config, scan_layers=True)
)


def _f32(*shape: int) -> Any:
  return np.zeros(shape, np.float32)


def _i32(*shape: int) -> Any:
  return np.zeros(shape, np.int32)


def _ones(*shape: int) -> Any:
  return np.ones(shape, np.int32)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _params(module: Any, *inputs: Any, **options: Any) -> Any:
  """Variables of a module, as NumPy arrays of zeros."""
  init = functools.partial(module.init, jax.random.key(0), **options)
  return _zeros(jax.eval_shape(init, *inputs))


def _phi(tokens: KV, first: Any) -> KV:
  del first
  return KV(*(compression.compress_mean(x, config=CONFIG) for x in tokens))


def _held(kind: Any, length: int = 4, max_append: int = 2) -> cache.Cache:
  """A cache of two rows that hold `length` tokens each."""
  make = functools.partial(
    cache.init,
    2,
    12,
    config=CONFIG,
    num_kv_heads=1,
    head_dim=4,
    kind=kind,
    max_append=max_append,
  )
  return _zeros(jax.eval_shape(make))._replace(
    lengths=np.full(2, length, np.int32)
  )


X, IDS = _f32(2, 12, 1, 4), _ones(2, 12)
QUERY, LSE, GATES = _f32(2, 12, 2, 4), _f32(2, 12, 2), _f32(2, 12, 2, 3)
PAIR, BLOCKS = KV(X, X), _f32(2, 5, 1, 4)
BLOCK_IDS = np.broadcast_to(np.array([0, 1], np.int32), (2, 12, 1, 2))
INSPECTED = nsa_jax.inspect.Inspected(
  GATES,
  helpers.int32(BLOCK_IDS),
  helpers.int32(BLOCK_IDS) == 0,
  LSE,
  LSE,
  LSE,
  IDS > 0,
)
AXES = figure.Figure().add_subplot()
NEW = KV(_f32(2, 2, 1, 4), _f32(2, 2, 1, 4))
NEW_QUERY = _f32(2, 2, 2, 4)
TOKENS = _f32(2, 12, 8)
SEGMENTS = {"segment_ids": IDS, "query_segment_ids": IDS}


def _parts(kind: Any) -> Any:
  """What `core.sparse_attention` or `dense_attention` take as `parts`."""

  def heads(count: int, width: int) -> Callable[[Any], Any]:
    return lambda x: jnp.zeros((*x.shape[:2], count, width), x.dtype)

  parts: dict[str, Any] = {
    name: heads(*shape)
    for name, shape in core.projections(OPTIONS, kind).items()
  }
  for name in core.COMPRESSIONS:
    parts[name] = lambda x, ids: compression.compress_mean(x, config=CONFIG)
  return parts | {"out": lambda x: jnp.zeros((*x.shape[:2], 8), x.dtype)}


def _save(
  folder: Any,
  config: Any,
  params: Any,
  family: Any = None,
  tokenizer: Any = None,
  max_file_bytes: Any = 10**6,
) -> None:
  """`save`, for which every name is one of a folder that it makes."""
  options = {"family": family, "tokenizer": tokenizer}
  with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
    nsa_jax.save(
      folder, config, params, max_file_bytes=max_file_bytes, **options
    )


FULL = MODEL.clone(config=dataclasses.replace(MODEL.config, attention="full"))
FIELDS = {
  "model_type": "llama",
  "hidden_size": 8,
  "vocab_size": 16,
  "intermediate_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
}


def _init(module: Any) -> Callable[..., Any]:
  """`module.init` as a function of the arguments of `__call__`."""

  @functools.wraps(type(module).__call__)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.init(jax.random.key(0), *args, **kwargs)

  return functools.partial(call, module)


def _apply(module: Any, *inputs: Any, **options: Any) -> Callable[..., Any]:
  """`module.apply` as a function of the arguments of `__call__`."""
  variables = _params(module, *inputs, **options)

  @functools.wraps(type(module).__call__)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.apply(variables, *args, **kwargs, mutable=["cache"])

  return functools.partial(call, module)


RNGS = nnx.Rngs(0)


def _create(module: Any) -> Callable[..., Any]:
  """The constructor of a module of nnx; RNGS stands for some of the trace."""

  @functools.wraps(module.__init__)
  def call(self: Any, *args: Any, rngs: Any, **kwargs: Any) -> Any:
    rngs = nnx.Rngs(0) if rngs is RNGS else rngs
    return module(*args, rngs=rngs, **kwargs)

  return functools.partial(call, None)


def _call(module: Any, method: str = "__call__") -> Callable[..., Any]:
  """A method of a module of nnx, each time of a new copy."""

  @functools.wraps(getattr(type(module), method))
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(nnx.clone(self), method)(*args, **kwargs)

  return functools.partial(call, module)


@functools.wraps(PackedRows)
def _pack(*args: Any, **kwargs: Any) -> None:
  """Reads all rows, because documents are checked when they are read."""
  list(PackedRows(*args, **kwargs))


def _resume(state: Any) -> None:
  """Goes on from a state; for its own it must read a document again."""
  rows = PackedRows([[1] * 9], length=4, alignment=4)
  rows.set_state(state)
  list(rows)


def _packing_state() -> dict[str, Any]:
  rows = PackedRows([[1] * 9], length=4, alignment=4)
  next(rows)
  return rows.get_state()


LAYER = nsa_jax.NativeSparseAttention(
  2, 1, 4, config=CONFIG, compression="mean"
)
DENSE = layers.DenseAttention(OPTIONS, "full")
NNX_LAYER = nsa_nnx.NativeSparseAttention(
  2, 8, num_kv_heads=1, config=CONFIG, compression="mean", rngs=nnx.Rngs(0)
)
NNX_DECODER = nnx.view(NNX_LAYER, decode=True, batch_size=2, max_length=12)
NNX_MODEL = nsa_nnx.TransformerLM(MODEL.config, rngs=nnx.Rngs(0))
NO_IDS: dict[str, Any] = {"positions": None, "segment_ids": None}
SCORES: dict[str, Any] = {
  "query": QUERY,
  "compressed_key": BLOCKS,
  "lse": LSE,
  "config": CONFIG,
  "key_length": 12,
  **SEGMENTS,
}
CACHE: dict[str, Any] = {
  "config": CONFIG,
  "num_kv_heads": 1,
  "head_dim": 4,
}
PHI: dict[str, Any] = {"x": X, "config": CONFIG, "segment_ids": IDS}
SHAPE: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
SIZES: dict[str, Any] = {"num_layers": 1, "model_dim": 8, "mlp_dim": 8}

# A valid call for each public name, or several: the part after a space tells
# them apart.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
  "nsa_jax.NSAConfig": (NSAConfig, {}),
  "nsa_jax.AttentionConfig": (nsa_jax.AttentionConfig, SHAPE),
  "nsa_jax.TransformerConfig": (nsa_jax.TransformerConfig, SHAPE | SIZES),
  "nsa_jax.TransformerConfig.preset": (
    nsa_jax.TransformerConfig.preset,
    {"name": "tiny"},
  ),
  "nsa_jax.TransformerConfig.from_dict": (
    nsa_jax.TransformerConfig.from_dict,
    {"fields": MODEL.config.to_dict()},
  ),
  "nsa_jax.RopeConfig": (nsa_jax.RopeConfig, {}),
  "nsa_jax.apply_rope": (
    nsa_jax.apply_rope,
    {"x": X, "positions": IDS, "config": nsa_jax.RopeConfig()},
  ),
  "nsa_jax.rope.rope_frequencies": (
    rope.rope_frequencies,
    {"head_dim": 4, "config": nsa_jax.RopeConfig()},
  ),
  "nsa_jax.num_compressed_blocks": (
    nsa_jax.num_compressed_blocks,
    {"length": 12, "config": CONFIG},
  ),
  "nsa_jax.num_selection_blocks": (
    nsa_jax.num_selection_blocks,
    {"length": 12, "config": CONFIG},
  ),
  # layouts
  "nsa_jax.Layout": (nsa_jax.Layout, {"data": "data"}),
  "nsa_jax.zigzag": (nsa_jax.zigzag, {"x": _f32(1, 8), "shards": 2}),
  "nsa_jax.restore_zigzag": (
    nsa_jax.restore_zigzag,
    {"x": _f32(1, 8), "shards": 2},
  ),
  "nsa_jax.parameter_shardings": (
    nsa_jax.parameter_shardings,
    {
      "tree": {"mlp_up": {"kernel": _f32(8, 8)}},
      "mesh": jax.sharding.AbstractMesh((1,), ("data",)),
      "rules": {"embed": "data"},
    },
  ),
  "nsa_jax.PackedRows": (
    _pack,
    {"documents": _ones(2, 12), "length": 16, "alignment": 4},
  ),
  "nsa_jax.PackedRows.set_state": (_resume, {"state": _packing_state()}),
  # phi
  "nsa_jax.compress_mean": (nsa_jax.compress_mean, PHI),
  "nsa_jax.compress_weighted": (
    nsa_jax.compress_weighted,
    PHI | {"weight": _f32(1, 4)},
  ),
  "nsa_jax.compress_linear": (
    nsa_jax.compress_linear,
    PHI | {"position": _f32(1, 4, 4), "weight": _f32(1, 16, 3)},
  ),
  "nsa_jax.compress_mlp": (
    nsa_jax.compress_mlp,
    PHI
    | {
      "position": _f32(1, 4, 4),
      "w1": _f32(1, 16, 5),
      "b1": _f32(1, 5),
      "w2": _f32(1, 5, 3),
      "b2": _f32(1, 3),
    },
  ),
  # ops
  "nsa_jax.native_sparse_attention": (
    nsa_jax.native_sparse_attention,
    {
      "query": QUERY,
      "compressed": KV(BLOCKS, BLOCKS),
      "selected": PAIR,
      "window": PAIR,
      "gates": GATES,
      "config": CONFIG,
      "compressed_query": QUERY,
      **SEGMENTS,
    },
  ),
  "nsa_jax.native_sparse_attention with ids": (
    nsa_jax.native_sparse_attention,
    {
      "query": QUERY,
      "compressed": KV(BLOCKS, BLOCKS),
      "selected": PAIR,
      "window": PAIR,
      "gates": GATES,
      "config": CONFIG,
      "block_ids": BLOCK_IDS,
    },
  ),
  "nsa_jax.compressed_attention": (
    nsa_jax.compressed_attention,
    {
      "query": QUERY,
      "key": BLOCKS,
      "value": BLOCKS,
      "config": CONFIG,
      "key_length": 12,
      **SEGMENTS,
    },
  ),
  "nsa_jax.selected_attention": (
    nsa_jax.selected_attention,
    {
      "query": QUERY,
      "key": X,
      "value": X,
      "block_ids": BLOCK_IDS,
      "config": CONFIG,
      **SEGMENTS,
    },
  ),
  "nsa_jax.window_attention": (
    nsa_jax.window_attention,
    {"query": QUERY, "key": X, "value": X, "config": CONFIG, **SEGMENTS},
  ),
  "nsa_jax.full_attention": (
    nsa_jax.full_attention,
    {"query": QUERY, "key": X, "value": X, **SEGMENTS},
  ),
  "nsa_jax.block_scores": (nsa_jax.block_scores, SCORES),
  "nsa_jax.select_blocks": (nsa_jax.select_blocks, SCORES),
  "nsa_jax.block_ids_from_scores": (
    nsa_jax.block_ids_from_scores,
    {
      "scores": _f32(2, 12, 1, 3),
      "config": CONFIG,
      "key_length": 12,
      **SEGMENTS,
    },
  ),
  "nsa_jax.SelectByMeans": (nsa_jax.SelectByMeans, {"tokens": 4}),
  "nsa_jax.block_mass": (
    nsa_jax.block_mass,
    {"query": QUERY, "key": X, "config": CONFIG, **SEGMENTS},
  ),
  # inspect
  "nsa_jax.inspect.recall": (
    nsa_jax.inspect.recall,
    {
      "query": QUERY,
      "key": X,
      "block_ids": BLOCK_IDS,
      "config": CONFIG,
      **SEGMENTS,
    },
  ),
  "nsa_jax.inspect.distinct_blocks": (
    nsa_jax.inspect.distinct_blocks,
    {"block_ids": BLOCK_IDS, "neighbours": 3},
  ),
  "nsa_jax.inspect.inspect_model": (
    nsa_jax.inspect.inspect_model,
    {
      "model": SPARSE,
      "params": _params(SPARSE, IDS)["params"],
      "tokens": IDS,
      "segment_ids": IDS,
    },
  ),
  "nsa_jax.inspect.inspect_layer": (
    nsa_jax.inspect.inspect_layer,
    {
      "sown": {
        "selected_query": QUERY,
        "selected_key": X,
        "gates": GATES,
        "block_ids": BLOCK_IDS,
      },
      "config": CONFIG,
      "segment_ids": IDS,
    },
  ),
  "nsa_jax.inspect.summarize": (
    nsa_jax.inspect.summarize,
    {"inspected": INSPECTED, "neighbours": 3},
  ),
  "nsa_jax.inspect.plot_block_map": (
    nsa_jax.inspect.plot_block_map,
    {"inspected": INSPECTED, "ax": AXES},
  ),
  "nsa_jax.inspect.plot_gates": (
    nsa_jax.inspect.plot_gates,
    {"inspected": INSPECTED, "ax": AXES},
  ),
  "nsa_jax.inspect.plot_recall": (
    nsa_jax.inspect.plot_recall,
    {"layers": {"layer_0": INSPECTED}, "ax": AXES},
  ),
  # cache
  "nsa_jax.cache.init": (
    cache.init,
    CACHE | {"batch": 2, "capacity": 12},
  ),
  "nsa_jax.cache.bytes_per_token": (cache.bytes_per_token, CACHE),
  "nsa_jax.cache.num_bytes": (cache.num_bytes, {"cache": _held("nsa")}),
  "nsa_jax.cache.append": (
    cache.append,
    {
      "cache": _held("nsa"),
      "config": CONFIG,
      "compressed": NEW,
      "selected": NEW,
      "window": NEW,
      "compress": _phi,
      "counts": _ones(2),
    },
  ),
  "nsa_jax.cache.prefill": (
    cache.prefill,
    {
      "cache": _held("nsa", max_append=1),
      "config": CONFIG,
      "compressed": NEW,
      "selected": NEW,
      "window": NEW,
      "compress": _phi,
      "counts": _ones(2),
    },
  ),
  "nsa_jax.cache.rewind": (
    cache.rewind,
    {"cache": _held("nsa"), "lengths": np.array([3, 3], np.int32)},
  ),
  "nsa_jax.cache.too_short": (
    cache.too_short,
    {"cache": _held("nsa"), "lengths": np.array([3, 3], np.int32)},
  ),
  "nsa_jax.cache.insert": (
    cache.insert,
    {"cache": _held("nsa"), "rows": _held("nsa"), "index": np.array([1, 0])},
  ),
  "nsa_jax.cache.evict": (
    cache.evict,
    {"cache": _held("nsa"), "index": np.array([1, 0])},
  ),
  "nsa_jax.cache.quantize": (cache.quantize, {"cache": _held("nsa")}),
  "nsa_jax.cache.take": (
    cache.take,
    {"cache": _held("nsa"), "index": np.array([1, 1, 0])},
  ),
  "nsa_jax.cache.max_append": (
    cache.max_append,
    {"cache": _held("nsa"), "config": CONFIG},
  ),
  "nsa_jax.cache.attend": (
    cache.attend,
    {
      "query": NEW_QUERY,
      "cache": _held("nsa"),
      "gates": _f32(2, 2, 2, 3),
      "config": CONFIG,
      "query_offset": 2,
    },
  ),
  "nsa_jax.cache.attend_window": (
    cache.attend_window,
    {
      "query": NEW_QUERY,
      "cache": _held("window"),
      "config": CONFIG,
      "query_offset": 2,
    },
  ),
  "nsa_jax.cache.attend_full": (
    cache.attend_full,
    {"query": NEW_QUERY, "cache": _held("full"), "query_offset": 2},
  ),
  # layers and model
  "nsa_jax.NativeSparseAttention": (
    nsa_jax.NativeSparseAttention,
    SHAPE,
  ),
  "nsa_jax.NativeSparseAttention.__call__ init": (_init(LAYER), {"x": TOKENS}),
  "nsa_jax.NativeSparseAttention.__call__ apply": (
    _apply(LAYER, TOKENS),
    {"x": TOKENS},
  ),
  "nsa_jax.NativeSparseAttention.__call__ decode": (
    _apply(LAYER.clone(decode=True, max_append=2), TOKENS),
    {"x": TOKENS[:, :1]},
  ),
  "nsa_jax.layers.linen.DenseAttention": (
    layers.DenseAttention,
    {"config": OPTIONS, "kind": "full"},
  ),
  "nsa_jax.layers.linen.DenseAttention.__call__ init": (
    _init(DENSE),
    {"x": TOKENS} | NO_IDS,
  ),
  "nsa_jax.layers.linen.DenseAttention.__call__ decode": (
    _apply(DENSE.clone(decode=True), TOKENS, **NO_IDS),
    {"x": TOKENS[:, :1]} | NO_IDS,
  ),
  "nsa_jax.layers.linen.CompressBlocks": (
    layers.CompressBlocks,
    {"kind": "mlp", "config": CONFIG},
  ),
  "nsa_jax.layers.linen.CompressBlocks.__call__ init": (
    _init(layers.CompressBlocks("mlp", CONFIG)),
    {"x": X, "segment_ids": IDS},
  ),
  "nsa_jax.TransformerLM": (
    nsa_jax.TransformerLM,
    {"config": MODEL.config},
  ),
  "nsa_jax.TransformerLM.__call__ init": (_init(MODEL), {"tokens": IDS}),
  "nsa_jax.TransformerLM.__call__ apply": (
    _apply(MODEL, IDS),
    {"tokens": IDS, "labels": IDS},
  ),
  "nsa_jax.TransformerLM.__call__ decode": (
    _apply(MODEL.clone(decode=True), IDS),
    {"tokens": IDS[:, :1]},
  ),
  "nsa_jax.unstack_layers": (
    nsa_jax.unstack_layers,
    {"model": STACKED, "params": _params(STACKED, IDS)["params"]},
  ),
  "nsa_jax.load": (nsa_jax.load, {"folder": parity.FOLDER / "mistral"}),
  "nsa_jax.save": (
    _save,
    {
      "folder": "checkpoint",
      "config": FULL.config,
      "params": _params(FULL, IDS)["params"],
    },
  ),
  "nsa_jax.models.convert.read_config": (
    convert.read_config,
    {"fields": FIELDS, "overrides": {"vocab_multiple": 4}},
  ),
  "nsa_jax.models.convert.to_nsa": (
    convert.to_nsa,
    {
      "config": FULL.config,
      "params": _params(FULL, IDS)["params"],
      "layers": [0],
    },
  ),
  "nsa_jax.models.convert.write_config": (
    convert.write_config,
    {"config": FULL.config, "name": "llama"},
  ),
  "nsa_jax.remat_policy": (nsa_jax.remat_policy, {"name": "full"}),
  # nnx
  "nsa_jax.nnx.NativeSparseAttention": (
    _create(nsa_nnx.NativeSparseAttention),
    {
      "num_heads": 2,
      "in_features": 8,
      "config": CONFIG,
      "compression": "mean",
      "rngs": RNGS,
    },
  ),
  "nsa_jax.nnx.NativeSparseAttention.__call__": (
    _call(NNX_LAYER),
    {"inputs_q": TOKENS},
  ),
  "nsa_jax.nnx.NativeSparseAttention.__call__ decode": (
    _call(NNX_DECODER),
    {"inputs_q": TOKENS[:, :1]},
  ),
  "nsa_jax.nnx.NativeSparseAttention.attend": (
    _call(NNX_LAYER, "attend"),
    {"x": TOKENS},
  ),
  "nsa_jax.nnx.NativeSparseAttention.init_cache": (
    _call(NNX_LAYER, "init_cache"),
    {"input_shape": (2, 12, 8)},
  ),
  "nsa_jax.nnx.DenseAttention": (
    _create(nsa_nnx.DenseAttention),
    {"config": OPTIONS, "kind": "full", "in_features": 8, "rngs": RNGS},
  ),
  "nsa_jax.nnx.CompressBlocks": (
    _create(nsa_nnx.CompressBlocks),
    {
      "kind": "mlp",
      "config": CONFIG,
      "num_kv_heads": 1,
      "head_dim": 4,
      "rngs": RNGS,
    },
  ),
  "nsa_jax.nnx.CompressBlocks.__call__": (
    _call(nsa_nnx.CompressBlocks("mean", CONFIG, 1, 4, rngs=nnx.Rngs(0))),
    {"x": X, "segment_ids": IDS},
  ),
  "nsa_jax.nnx.TransformerLM": (
    _create(nsa_nnx.TransformerLM),
    {"config": MODEL.config, "rngs": RNGS},
  ),
  "nsa_jax.nnx.TransformerLM.__call__": (
    _call(NNX_MODEL),
    {"tokens": IDS, "labels": IDS},
  ),
  "nsa_jax.nnx.TransformerLM.init_cache": (
    _call(NNX_MODEL, "init_cache"),
    {"input_shape": (2, 12)},
  ),
  "nsa_jax.nnx.unstack_layers": (
    nsa_nnx.unstack_layers,
    {
      "model": nsa_nnx.TransformerLM(STACKED.config, rngs=nnx.Rngs(0)),
    },
  ),
  "nsa_jax.nnx.from_linen": (
    nsa_nnx.from_linen,
    {"module": NNX_LAYER, "params": nsa_nnx.to_linen(NNX_LAYER)},
  ),
  "nsa_jax.nnx.to_linen": (nsa_nnx.to_linen, {"module": NNX_LAYER}),
  # sampling
  "nsa_jax.generate": (
    nsa_jax.generate,
    {
      "model": MODEL,
      "params": _params(MODEL, IDS)["params"],
      "prompts": _ones(2, 3),
      "max_new_tokens": 2,
    },
  ),
  "nsa_jax.sampling.empty_cache": (
    sampling.empty_cache,
    {"model": MODEL, "batch": 2, "capacity": 12},
  ),
  "nsa_jax.sampling.filter_logits": (
    sampling.filter_logits,
    {"logits": _f32(2, 16), "top_k": 3, "top_p": 0.5},
  ),
  # core
  "nsa_jax.layers.core.projections": (core.projections, {"config": OPTIONS}),
  "nsa_jax.layers.core.norms": (core.norms, {"config": OPTIONS}),
  "nsa_jax.layers.core.vectors": (core.vectors, {"config": OPTIONS}),
  "nsa_jax.layers.core.initial_biases": (
    core.initial_biases,
    {"config": OPTIONS},
  ),
  "nsa_jax.layers.core.initial_kernel": (
    core.initial_kernel,
    {"config": OPTIONS, "name": "gate", "init": jax.nn.initializers.zeros},
  ),
  "nsa_jax.layers.core.phi_parameters": (
    core.phi_parameters,
    {"kind": "mlp", "config": CONFIG, "heads": 1, "head_dim": 4},
  ),
  "nsa_jax.layers.core.compress": (
    core.compress,
    {
      "kind": "weighted",
      "config": CONFIG,
      "parameters": {"weight": _f32(1, 4)},
      "x": X,
      "segment_ids": IDS,
    },
  ),
  "nsa_jax.layers.core.begin_decoding": (
    core.begin_decoding,
    {
      "held": _held("nsa"),
      "x": TOKENS[:, :2],
      "segment_ids": IDS[:, :2],
      "prefix_length": 4,
    },
  ),
  "nsa_jax.layers.core.empty_cache": (
    core.empty_cache,
    {
      "config": OPTIONS,
      "batch": 2,
      "capacity": 12,
      "max_append": 1,
      "dtype": "float32",
    },
  ),
  "nsa_jax.layers.core.complete_positions": (
    core.complete_positions,
    {"x": TOKENS, "positions": None, "segment_ids": IDS, "alignment": 4},
  ),
  "nsa_jax.layers.core.sparse_attention": (
    core.sparse_attention,
    {"config": OPTIONS, "parts": _parts("nsa"), "x": TOKENS} | NO_IDS,
  ),
  "nsa_jax.layers.core.dense_attention": (
    core.dense_attention,
    {
      "config": OPTIONS,
      "kind": "window",
      "parts": _parts("full"),
      "x": TOKENS,
    }
    | NO_IDS,
  ),
}

# Values that hardly any argument wants.
ODD: dict[str, Any] = {
  "None": None,
  "True": True,
  "False": False,
  "1.5": 1.5,
  "nan": float("nan"),
  "inf": float("inf"),
  "1j": 1j,
  "-1": -1,
  "0": 0,
  "2**31": 2**31,
  "2**40": 2**40,
  "2**70": 2**70,
  "-2**70": -(2**70),
  "10**5000": 10**5000,  # Python refuses to print it.
  "str": "x",
  "number in str": "1.5",
  "bytes": b"x",
  "[]": [],
  "[1]": [1],
  "ragged": [[1], [2, 3]],
  "[2**70]": [2**70],
  "[None]": [None],
  "['x']": ["x"],
  "()": (),
  "(None, None)": (None, None),
  "('x', 'x')": ("x", "x"),
  "{}": {},
  "{'a': 1}": {"a": 1},
  "{1: 2}": {1: 2},
  "set": {1},
  "object": object(),
  "lambda": lambda *args, **kwargs: None,
  "type": dict,
  "Ellipsis": ...,
  "slice": slice(3),
  "np.float32": np.float32(1.5),
  "np.bool": np.bool_(True),
  "np.str": np.str_("x"),
  "datetime": np.datetime64("2020-01-01"),
  "np scalar array": np.array(3),
  "np [1]": np.array([1]),
  "np [1.0]": np.array([1.0]),
  "np empty": np.zeros(0),
  "np bool": np.zeros((2, 12), bool),
  "np complex": np.zeros((2, 12), np.complex64),
  "np object": np.array([None, {}], object),
  "np str": np.array(["x", "y"]),
  "np one str": np.array(["nsa"]),
  "np 2**40": np.full((2, 12), 2**40),
  "np float8": np.zeros((2, 12), ml_dtypes.float8_e4m3fn),
  "np int4": np.zeros((2, 12), ml_dtypes.int4),
  "np rank 5": np.zeros((1, 1, 1, 1, 1), np.float32),
  "jnp scalar": jnp.int32(3),
  "jnp float": jnp.float32(1.5),
  "jnp bool": jnp.bool_(True),
  "jnp [1]": jnp.ones(1, jnp.int32),
  "key": jax.random.key(0),
  "keys": jax.random.split(jax.random.key(0), 2),
  "ShapeDtypeStruct": jax.ShapeDtypeStruct((2, 12), jnp.int32),
  "KV": PAIR,
  "Cache": _held("full"),
  "NSAConfig": NSAConfig(),
  "AttentionConfig": OPTIONS,
  "RopeConfig": nsa_jax.RopeConfig(),
  "Model": MODEL,
}


# What names an argument, if it is not a backtick and its name.
NAMES = {
  # "the cache's capacity", "of the cache"
  "cache": "`cache|the cache",
  # A field of the dictionary, by its own name.
  "fields": r"`\w+",
  "overrides": r"`overrides|`vocab_multiple",
  "parameters": "`parameters|`weight",
}


def _near(value: Any) -> Iterator[tuple[str, Any]]:
  """Values that are nearly valid: one property of `value` is changed."""
  if isinstance(value, np.ndarray):
    yield "rank - 1", value[0]
    yield "rank + 1", value[None]
    yield "no rows", value[:0]
    yield "no columns", value[..., :0]
    yield "more rows", np.concatenate([value] * 3)
    yield "more columns", np.concatenate([value] * 2, axis=-1)
    for dtype in (
      bool,
      np.int8,
      np.uint64,
      np.float16,
      np.complex64,
      object,
      str,
      ml_dtypes.float8_e5m2,
      ml_dtypes.int4,
    ):
      yield np.dtype(dtype).name, value.astype(dtype)
    yield "-5", np.full_like(value, -5)
    if value.dtype == np.int32:
      yield "2**40", np.full(value.shape, 2**40)
    yield "list", value.tolist()
    yield "shapes", jax.ShapeDtypeStruct(value.shape, value.dtype)
  elif isinstance(value, KV | cache.Cache):
    yield "as tuple", tuple(value)
    yield "as dict", value._asdict()
    yield "as list", list(value)
    for field, one in zip(value._fields, value, strict=True):
      for label in ("None", "1.5", "str", "{}", "[1]", "np bool", "KV"):
        yield f"{field}={label}", value._replace(**{field: ODD[label]})
      for label, part in _near(one):
        yield f"{field} {label}", value._replace(**{field: part})
  elif isinstance(value, dict):
    for key in list(value)[:3]:
      yield f"no {key}", {k: v for k, v in value.items() if k != key}
      for label in ("None", "1.5", "str", "{}", "np bool"):
        yield f"{key}={label}", value | {key: ODD[label]}
    yield "more", value | {"more": 1}


# Their errors are those of the function that they are given.
FUNCTIONS = (
  "compress",
  "kernel_init",
  "out_kernel_init",
  "bias_init",
  "out_bias_init",
  "logits_hook",
  "select",
  "stream",
)


def _wrong_arguments(name: str) -> Iterator[tuple[str, str, Any]]:
  """Argument, label and value of every odd call of an entry of CALLS."""
  call, valid = CALLS[name]
  for argument, parameter in inspect.signature(call).parameters.items():
    if argument in ("name", "parent") and argument not in valid:
      continue  # Of flax.
    if parameter.kind is parameter.VAR_KEYWORD:
      continue
    for label, value in (*ODD.items(), *_near(valid.get(argument))):
      if argument not in FUNCTIONS or not callable(value):
        yield argument, label, value


def _outcome(
  name: str,
  argument: str | None = None,
  value: Any = None,
  traced: bool = False,
) -> str:
  """How a call breaks the promise; empty if it does not."""
  call, valid = CALLS[name]

  def run(*values: Any) -> None:
    # Under `jax.eval_shape`, so that nothing is compiled; what a call closes
    # over, NumPy arrays among it, has known values.
    for one in values or (value,):
      call(**valid if argument is None else valid | {argument: one})

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      jax.eval_shape(run, *([value] if traced else []))
  except NotImplementedError:
    return ""
  except ValueError as error:
    if argument is None:
      return f"ValueError: {error}"
    if re.search(rf"({NAMES.get(argument, f'`{argument}')})\b", str(error)):
      return ""
    return f"ValueError without the name: {error}"
  except Exception as error:
    return f"{type(error).__name__}: {error}"
  return ""


def _broken(name: str, every: int) -> list[str]:
  """The odd calls of an entry that break the promise; one in `every`."""
  first = list(CALLS).index(name) % every
  calls = itertools.islice(_wrong_arguments(name), first, None, every)
  found = []
  for argument, label, value in calls:
    problem = _outcome(name, argument, value)
    if problem:
      found.append(f"{argument} = {label}: {problem[:300]}")
  return found


@pytest.mark.parametrize("name", CALLS)
def test_odd_values(name: str) -> None:
  """One in 12; which ones differs from argument to argument."""
  assert math.gcd(len(ODD), 12) == 1
  assert _broken(name, 12) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_all_odd_values(name: str) -> None:
  assert _broken(name, 1) == []


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_is_valid(name: str) -> None:
  """Otherwise the odd ones might fail for its reason."""
  assert _outcome(name) == ""


@pytest.mark.parametrize("name", CALLS)
def test_traced_values(name: str) -> None:
  """A traced value is served, or the argument is refused by its name."""
  call, _ = CALLS[name]
  found = []
  for argument, parameter in inspect.signature(call).parameters.items():
    if argument in ("name", "parent") or argument in FUNCTIONS:
      continue
    if parameter.kind is parameter.VAR_KEYWORD:
      continue
    problem = _outcome(name, argument, np.int32(3), traced=True)
    if problem:
      found.append(f"{argument}: {problem[:300]}")
  assert found == []


# --------------------------------------------------------------------- coverage

# Not functions, or functions whose arguments a backend gets and checks: the
# seam of the backends, which `nsa_jax` calls with what it has checked.
OTHERS = {
  "nsa_jax.EXPORT_DISABLED_CHECKS",
  "nsa_jax.Implementation",
  "nsa_jax.KV",
  "nsa_jax.PARAMETER_RULES",
  "nsa_jax.PackedRow",
  "nsa_jax.cache",
  "nsa_jax.cache.Cache",
  "nsa_jax.cache.Compress",
  "nsa_jax.cache.KINDS",
  "nsa_jax.cache.state",
  "nsa_jax.dispatch",
  "nsa_jax.inspect.Inspected",
  "nsa_jax.inspect.Summary",
  "nsa_jax.layers.core.Attended",
  "nsa_jax.layers.core.Decoding",
  "nsa_jax.layers.core",
  "nsa_jax.models.convert.Loaded",
  "nsa_jax.nnx.Inspect",
  "nsa_jax.packing.PackingReport",
  "nsa_jax.sampling.Generated",
  "nsa_jax.sampling.GeneratedDetails",
}


def _public_names() -> set[str]:
  """What `__all__` lists and what the pages of the reference show."""
  names = {f"nsa_jax.{name}" for name in nsa_jax.__all__}
  names |= {f"nsa_jax.cache.{name}" for name in cache.__all__}
  names |= {f"nsa_jax.nnx.{name}" for name in nsa_nnx.__all__}
  for page in (pathlib.Path(__file__).parents[1] / "docs/api").glob("*.md"):
    names |= set(re.findall(r"^::: (nsa_jax\S+)", page.read_text(), re.M))
  for name, value in vars(core).items():
    if getattr(value, "__module__", "") == core.__name__:
      names.add(f"nsa_jax.layers.core.{name}")
  return {name for name in names if not name.rsplit(".", 1)[1].startswith("_")}


def test_every_public_function_is_called() -> None:
  called = {name.split()[0] for name in CALLS}
  assert _public_names() - called - OTHERS == set()
  assert _public_names() >= OTHERS
  for name in called:  # One that is gone is an AttributeError.
    functools.reduce(getattr, name.split(".")[1:], nsa_jax)
