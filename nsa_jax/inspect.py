"""What a model reads: recall of its selection, block maps, gates; plots.

Layers sow what is needed into the collection `inspect`; nothing here changes
what they compute. The plots need matplotlib, which the first one imports.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nsa_jax import _checks, geometry
from nsa_jax.config import NSAConfig, check_config
from nsa_jax.models.config import TransformerConfig
from nsa_jax.ops.branches import (
  check_block_ids,
  full_attention,
  selected_attention,
)
from nsa_jax.ops.selection import block_ids_from_scores, block_mass
from nsa_jax.sampling import check_params, with_params
from nsa_jax.sharding import Layout
from nsa_jax.typing import BRANCHES, Array, Implementation
from nsa_jax.xla.chunks import chunk_queries, map_chunks
from pallas_kernels.interface import segment_starts

_COLOURS = ("#4878a8", "#d1702f", "#3f8f5b")
_GREY = "#9a9a9a"


class Inspected(NamedTuple):
  """What one layer reads. Padding has recall 0 and ids of -1.

  Attributes:
    gates: [B, T, N, 3], in the order compressed, selected, window.
    block_ids: int32 [B, T, K, n], the blocks that the layer selected.
    forced: bool [B, T, K, n], which of them are read whatever their scores are:
      the `num_initial` first and the `num_local` last ones.
    recall: float32 [B, T, N], the share of full attention's mass that these
      blocks hold, for every query head.
    oracle_recall: as `recall`, of the forced blocks and of those others for
      which `block_mass` is largest. No other selection of n blocks that has the
      forced ones holds more, in the mean over a group.
    random_recall: as `recall`, of the forced blocks and of random others.
    choosing: bool [B, T], queries that have more than n blocks to choose from;
      the others can read all of theirs.
  """

  gates: Array
  block_ids: Array
  forced: Array
  recall: Array
  oracle_recall: Array
  random_recall: Array
  choosing: Array


class Summary(NamedTuple):
  """Means of an `Inspected` over the queries that choose; NaN if none does.

  Attributes:
    recall: [N].
    oracle_recall: [N].
    random_recall: [N].
    gates: [N, 3].
    forced: [], share of the selected blocks that are forced.
    distinct_blocks: [], as `distinct_blocks` counts.
  """

  recall: Array
  oracle_recall: Array
  random_recall: Array
  gates: Array
  forced: Array
  distinct_blocks: Array


def recall(
  query: ArrayLike,
  key: ArrayLike,
  block_ids: ArrayLike,
  *,
  config: NSAConfig,
  scale: float | None = None,
  query_offset: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  implementation: Implementation = None,
  layout: Layout | None = None,
) -> Array:
  """The share of full attention's mass that the given blocks hold.

      recall = exp(lse of the blocks - lse of all tokens)

  which is exact, for every head of a group, and linear in memory.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    block_ids: as in `selected_attention`.
    config: only `selection_block` is read.
    scale: as in `native_sparse_attention`.
    query_offset: as in `native_sparse_attention`.
    segment_ids: as in `native_sparse_attention`.
    query_segment_ids: as in `native_sparse_attention`.
    implementation: as in `full_attention`.
    layout: as in `native_sparse_attention`.

  Returns:
    float32 [B, T, N] (float64 for float64), in [0, 1]; 0 for a query that reads
    nothing.

  Raises:
    ValueError: if an argument is invalid; names it, its value and the rule.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, inspect
    >>> query, key = jnp.ones((1, 96, 2, 8)), jnp.ones((1, 96, 1, 8))
    >>> ids = jnp.zeros((1, 96, 1, 1), jnp.int32)
    >>> recall = jax.jit(inspect.recall, static_argnames="config")
    >>> share = recall(query, key, ids, config=NSAConfig())
    >>> print(share[0, 79].round(3))  # block 0 has 64 of the 80 keys
    [0.8 0.8]
  """
  call: dict[str, Any] = {
    "scale": scale,
    "query_offset": query_offset,
    "segment_ids": segment_ids,
    "query_segment_ids": query_segment_ids,
    "implementation": implementation,
    "layout": layout,
  }
  # No value is read; any array of the shape will do.
  _, part = selected_attention(
    query, key, key, block_ids, config=config, **call
  )
  _, whole = full_attention(query, key, key, **call)
  return _share(part, whole)


def distinct_blocks(block_ids: ArrayLike, neighbours: int = 16) -> Array:
  """How many different blocks the queries of each run of neighbours select.

  A kernel that serves the run together reads so many blocks, between n, if all
  select the same, and n * neighbours.

  Args:
    block_ids: int32 [B, T, K, n].
    neighbours: queries per run, at most T.

  Returns:
    int32 [B, T // neighbours, K].

  Raises:
    ValueError: if an argument does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import inspect
    >>> ids = jnp.array([[0, -1], [0, 1], [0, 2], [0, 2]]).reshape(1, 4, 1, 2)
    >>> inspect.distinct_blocks(ids, neighbours=2).ravel().tolist()
    [2, 2]
  """
  ids = _checks.array("block_ids", block_ids, 4, "[B, T, K, n]")
  _checks.integer_dtype("block_ids", ids)
  _checks.not_empty("block_ids", ids)
  neighbours = _checks.static_int("neighbours", neighbours, 1)
  batch, length, heads, count = ids.shape
  if neighbours > length:
    raise ValueError(
      f"`neighbours`={neighbours} must be at most T={length}, the queries of "
      "`block_ids`."
    )
  runs = length // neighbours
  ids = ids[:, : runs * neighbours].reshape(batch, runs, -1, heads, count)
  ids = jnp.moveaxis(ids, 3, 2).reshape(batch, runs, heads, -1)
  ids = jnp.sort(ids, axis=-1)
  before = jnp.pad(ids[..., :-1], [(0, 0)] * 3 + [(1, 0)], constant_values=-1)
  return ((ids >= 0) & (ids != before)).sum(axis=-1, dtype=jnp.int32)


def inspect_model(
  model: Any,
  params: Mapping[str, Any] | None,
  tokens: ArrayLike,
  *,
  positions: ArrayLike | None = None,
  segment_ids: ArrayLike | None = None,
  key: int | Array = 0,
  implementation: Implementation = None,
) -> dict[str, Inspected]:
  """What every sparse layer of a model reads of some tokens.

  The model runs once. Queries and keys of all layers are held at the same time,
  and memory is linear in the length. Time is that of full attention, a few
  times per layer.

  Args:
    model: a `TransformerLM` of linen or nnx; `config.layout` must be None.
    params: its parameters, what `init` returns under "params"; None for a model
      of nnx.
    tokens: int32 [B, T].
    positions: as in `TransformerLM`.
    segment_ids: as in `TransformerLM`.
    key: `jax.random.key`, or a seed in [0, 2**32), of the random blocks.
    implementation: of what is measured, as in `full_attention`. The model has
      its own.

  Returns:
    By the names "layer_0", "layer_1", ..., also with `scan_layers`, what the
    layers of the kind "nsa" read. Others select nothing and are left out.

  Raises:
    ValueError: if an argument does not fit.
    NotImplementedError: if an implementation cannot do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import TransformerConfig, TransformerLM, inspect
    >>> config = TransformerConfig.preset(
    ...   "tiny", num_layers=1, model_dim=16, compression="mean"
    ... )
    >>> model, tokens = TransformerLM(config), jnp.zeros((1, 96), jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> layers = inspect.inspect_model(model, params, tokens)
    >>> {name: layer.recall.shape for name, layer in layers.items()}
    {'layer_0': (1, 96, 4)}
  """
  config = getattr(model, "config", None)
  if not isinstance(config, TransformerConfig):
    raise ValueError(f"`model`={_checks.show(model)} must be a TransformerLM.")
  model, params = with_params(model, params)
  if config.layout is not None:
    raise ValueError(
      f"`model` has `config.layout`={config.layout}, which must be None: the "
      "same parameters fit a model without one."
    )
  if "nsa" not in config.layer_kinds:
    raise ValueError(
      f"`model` has `config.attention`={config.attention!r}, in which at least "
      "one layer must be 'nsa'."
    )
  if isinstance(params, Mapping) and "params" in params:
    raise ValueError(
      f"`params` has the collections {sorted(params)}; it must be what `init` "
      'returns under "params".'
    )
  key = _checks.random_key(key)
  model = model.clone(decode=False)
  shape = _checks.array("tokens", tokens, 2, "[B, T]").shape
  tokens = _checks.integers("tokens", tokens, shape)
  _checks.not_empty("tokens", tokens)
  check_params(params, _init.eval_shape(model, tokens))
  given = {"positions": positions, "segment_ids": segment_ids}
  rule = "one entry per row and token of `tokens`"
  given = {
    name: None if x is None else _checks.integers(name, x, shape, rule)
    for name, x in given.items()
  }
  if segment_ids is not None:
    _checks.segments(segment_ids, config.segment_alignment)
  sown = _collect(model, params, tokens, given)
  found = {}
  for i, kind in enumerate(config.layer_kinds):
    if kind == "nsa":
      name = f"layer_{i}"
      if config.scan_layers:
        layer = jax.tree.map(lambda x, i=i: x[i], sown["layers"])
      else:
        layer = sown[name]
      found[name] = inspect_layer(
        layer["attention"],
        config=config.of_layer(i).nsa,
        segment_ids=segment_ids,
        key=jax.random.fold_in(key, i),
        implementation=implementation,
      )
  return found


def inspect_layer(
  sown: Mapping[str, Any],
  *,
  config: NSAConfig,
  segment_ids: ArrayLike | None = None,
  key: int | Array = 0,
  implementation: Implementation = None,
) -> Inspected:
  """What one `NativeSparseAttention` reads, in a model of your own.

  Args:
    sown: what the layer sowed into the collection `inspect`: the entries
      `selected_query` [B, T, N, H], `selected_key` [B, T, K, H], `gates`
      [B, T, N, 3] and `block_ids` [B, T, K, n].
    config: that of the layer.
    segment_ids: as in the call of the layer.
    key: as in `inspect_model`.
    implementation: as in `inspect_model`.

  Returns:
    Inspected.

  Raises:
    ValueError: if an argument does not fit.
    NotImplementedError: if no requested implementation can do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NativeSparseAttention, NSAConfig, inspect
    >>> config = NSAConfig(8, 4, 16, num_selected=4, window=16)
    >>> layer = NativeSparseAttention(
    ...   4, 2, 8, config=config, compression="mean"
    ... )
    >>> x = jnp.ones((1, 64, 32))
    >>> params = jax.jit(layer.init)(jax.random.key(0), x)
    >>> apply = jax.jit(layer.apply, static_argnames="mutable")
    >>> _, state = apply(params, x, mutable=("inspect",))
    >>> inspect.inspect_layer(state["inspect"], config=config).recall.shape
    (1, 64, 4)
  """
  check_config(config)
  query, keys, gates, block_ids = _read_sown(sown, config)
  shape = query.shape[:2]
  if segment_ids is not None:
    given = segment_ids
    segment_ids = _checks.integers(
      "segment_ids", given, shape, "one entry per row and token"
    )
    _checks.segments(given, config.selection_block)
  own, oracle, random = _measure(
    config,
    _static(implementation),
    query,
    keys,
    block_ids,
    segment_ids,
    _checks.random_key(key),
  )
  forced, choosing = _forced(config, block_ids, segment_ids)
  return Inspected(gates, block_ids, forced, own, oracle, random, choosing)


def summarize(inspected: Inspected, neighbours: int = 16) -> Summary:
  """Means over the queries that choose.

  Args:
    inspected: of one layer.
    neighbours: as in `distinct_blocks`; the mean is over runs in which every
      query chooses.

  Returns:
    Summary.

  Raises:
    ValueError: if an argument does not fit.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, inspect
    >>> x = jax.random.normal(jax.random.key(0), (1, 256, 1, 8))
    >>> sown = {
    ...   "selected_query": x,
    ...   "selected_key": x,
    ...   "gates": jnp.full((1, 256, 1, 3), 0.5),
    ...   "block_ids": jnp.zeros((1, 256, 1, 3), jnp.int32).at[..., 1:].set(-1),
    ... }
    >>> config = NSAConfig(8, 4, 16, num_selected=3, window=16)
    >>> layer = inspect.inspect_layer(sown, config=config)
    >>> summary = inspect.summarize(layer)
    >>> summary.gates.tolist(), float(summary.distinct_blocks)
    ([[0.5, 0.5, 0.5]], 1.0)
  """
  _checks.instance("inspected", inspected, Inspected)
  neighbours = _checks.static_int("neighbours", neighbours, 1)
  return _summarize(neighbours, inspected)


def plot_block_map(
  inspected: Inspected, *, row: int = 0, head: int = 0, ax: Any = None
) -> Any:
  """Draws which blocks every query selects.

  Args:
    inspected: of one layer.
    row: of the batch.
    head: a key/value head.
    ax: Axes of matplotlib; those of a new figure by default.

  Returns:
    The Axes.

  Raises:
    ValueError: if an argument does not fit.
    ImportError: if matplotlib is missing.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, inspect
    >>> x = jax.random.normal(jax.random.key(0), (1, 256, 1, 8))
    >>> sown = {
    ...   "selected_query": x,
    ...   "selected_key": x,
    ...   "gates": jnp.full((1, 256, 1, 3), 0.5),
    ...   "block_ids": jnp.zeros((1, 256, 1, 3), jnp.int32).at[..., 1:].set(-1),
    ... }
    >>> config = NSAConfig(8, 4, 16, num_selected=3, window=16)
    >>> layer = inspect.inspect_layer(sown, config=config)
    >>> ax = inspect.plot_block_map(layer)
    >>> ax.figure.savefig("/dev/null", format="png")
  """
  _checks.instance("inspected", inspected, Inspected)
  row = _index("row", row, inspected.block_ids.shape[0])
  head = _index("head", head, inspected.block_ids.shape[2])
  ax = _axes(ax)
  ids = np.asarray(inspected.block_ids)[row, :, head]
  forced = np.asarray(inspected.forced)[row, :, head]
  length, blocks = len(ids), max(int(ids.max()) + 1, 1)
  image = np.ones((length, blocks, 3))
  query, place = np.nonzero(ids >= 0)
  colours = np.array([_rgb(_COLOURS[1]), _rgb(_GREY)])
  image[query, ids[query, place]] = colours[forced[query, place].astype(int)]
  ax.imshow(
    image,
    aspect="auto",
    interpolation="nearest",
    extent=(-0.5, blocks - 0.5, length - 0.5, -0.5),
  )
  for colour, label in ((_COLOURS[1], "selected"), (_GREY, "forced")):
    ax.plot([], [], "s", color=colour, label=label)
  ax.legend(loc="upper right", frameon=False)
  ax.set_xlabel("block")
  ax.set_ylabel("query")
  return ax


def plot_gates(
  inspected: Inspected, *, row: int = 0, head: int | None = None, ax: Any = None
) -> Any:
  """Draws the gates of the three branches over the tokens.

  Args:
    inspected: of one layer.
    row: of the batch.
    head: a query head; by default the mean over all.
    ax: as in `plot_block_map`.

  Returns:
    The Axes.

  Raises:
    ValueError: if an argument does not fit.
    ImportError: if matplotlib is missing.
  """
  _checks.instance("inspected", inspected, Inspected)
  row = _index("row", row, inspected.gates.shape[0])
  gates = np.asarray(inspected.gates, np.float32)[row]
  if head is None:
    gates = gates.mean(axis=1)
  else:
    gates = gates[:, _index("head", head, gates.shape[1])]
  ax = _axes(ax)
  for branch, colour, gate in zip(BRANCHES, _COLOURS, gates.T, strict=True):
    ax.plot(gate, color=colour, label=branch, linewidth=1)
  ax.set_xlim(0, len(gates) - 1)
  ax.set_ylim(0, 1.12)  # room for the legend
  ax.set_xlabel("token")
  ax.set_ylabel("gate")
  ax.legend(loc="upper right", frameon=False, ncols=3)
  return ax


def plot_recall(layers: Mapping[str, Inspected], *, ax: Any = None) -> Any:
  """Draws the recall of every layer and head between random and oracle.

  The means are over the queries that choose.

  Args:
    layers: a result of `inspect_model`.
    ax: as in `plot_block_map`.

  Returns:
    The Axes.

  Raises:
    ValueError: if an argument does not fit.
    ImportError: if matplotlib is missing.
  """
  if not isinstance(layers, Mapping) or not layers:
    raise ValueError(
      f"`layers`={_checks.show(layers)} must be a dictionary of Inspected."
    )
  for name, layer in layers.items():
    _checks.instance(f"layers[{name!r}]", layer, Inspected)
    if not np.asarray(layer.choosing).any():
      raise ValueError(
        f"`layers[{name!r}]` must have a query that chooses: the tokens are so "
        "few that every query reads all of them."
      )
  ax = _axes(ax)
  start, middles = 0, list[float]()
  for layer in layers.values():
    choosing = np.asarray(layer.choosing)
    oracle, own, random = (
      np.asarray(x)[choosing].mean(axis=0)
      for x in (layer.oracle_recall, layer.recall, layer.random_recall)
    )
    heads = start + np.arange(len(own))
    ax.vlines(heads, random, oracle, color=_GREY)
    for values, marker, colour, label in (
      (oracle, "_", "black", "oracle"),
      (own, "o", _COLOURS[1], "selected"),
      (random, "_", _GREY, "random"),
    ):
      ax.plot(
        heads, values, marker, color=colour, label=None if start else label
      )
    middles.append(heads.mean())
    start += len(heads) + 1
  ax.set_xticks(middles, list(layers))
  ax.set_xlabel("layer, one mark per query head")
  ax.set_ylabel("share of full attention")
  ax.set_ylim(0, 1.12)  # room for the legend
  ax.legend(loc="upper right", frameon=False, ncols=3)
  return ax


@functools.partial(jax.jit, static_argnums=0)
def _init(model, tokens):
  """Parameters, evaluated only for their shapes."""
  return model.init(jax.random.key(0), tokens)["params"]


@functools.partial(jax.jit, static_argnums=0)
def _summarize(neighbours: int, inspected: Inspected) -> Summary:
  choosing = inspected.choosing
  counts = distinct_blocks(inspected.block_ids, neighbours)
  runs = counts.shape[1]
  together = choosing[:, : runs * neighbours]
  together = together.reshape(-1, runs, neighbours).all(axis=-1)
  chosen = (inspected.block_ids >= 0).sum(axis=-1)
  forced = inspected.forced.sum(axis=-1) / jnp.maximum(chosen, 1)
  return Summary(
    _mean(inspected.recall, choosing),
    _mean(inspected.oracle_recall, choosing),
    _mean(inspected.random_recall, choosing),
    _mean(inspected.gates, choosing),
    _mean(forced, choosing).mean(),
    _mean(counts, together).mean(),
  )


@functools.partial(jax.jit, static_argnums=0)
def _collect(model, params, tokens, options):
  _, sown = model.apply(
    {"params": params}, tokens, **options, mutable=["inspect"]
  )
  return sown["inspect"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
  config: NSAConfig,
  implementation: Implementation,
  query: Array,
  key: Array,
  block_ids: Array,
  segment_ids: Array | None,
  random_key: Array,
) -> tuple[Array, Array, Array]:
  """Recall of the given blocks, of the oracle's and of random ones, [B, T, N].

  The mass of all blocks is held for a chunk of queries only.
  """
  batch, length = query.shape[:2]
  heads, count = key.shape[2], block_ids.shape[-1]
  blocks = geometry.num_selection_blocks(length, config)
  same_size = _select_as_many(config, count)

  def body(query, positions, query_segments, block_ids):
    where: dict[str, Any] = {
      "query_offset": positions[0],
      "segment_ids": segment_ids,
      "query_segment_ids": query_segments,
    }
    call = where | {"implementation": implementation}

    def share(ids):
      _, part = selected_attention(query, key, key, ids, config=config, **call)
      return _share(part, whole)

    def best(scores):
      return block_ids_from_scores(
        scores, config=same_size, key_length=length, **where
      )

    _, whole = full_attention(query, key, key, **call)
    mass = block_mass(query, key, config=config, **call)
    noise = jax.random.uniform(
      jax.random.fold_in(random_key, positions[0]), mass.shape
    )
    # One after the other, in one compiled loop.
    ids = jnp.stack([block_ids, best(mass), best(noise)])
    return tuple(jax.lax.map(share, ids))

  size = chunk_queries(length, batch, heads * blocks)
  positions = jnp.broadcast_to(
    jnp.arange(length, dtype=jnp.int32), (batch, length)
  )
  return map_chunks(
    lambda query, positions, *rest: body(query, positions[0], *rest),
    size,
    query,
    positions,
    segment_ids,
    block_ids,
  )


def _select_as_many(config: NSAConfig, count: int) -> NSAConfig:
  """`config` with so many blocks per query: a selector may return any number.

  If the forced blocks alone are more, then only the query's own is forced.
  """
  if count < config.num_initial + config.num_local:
    config = dataclasses.replace(config, num_initial=0, num_local=1)
  return dataclasses.replace(config, num_selected=count)


@functools.partial(jax.jit, static_argnums=0)
def _forced(
  config: NSAConfig, block_ids: Array, segment_ids: Array | None
) -> tuple[Array, Array]:
  """Which ids are forced, [B, T, K, n], and which queries choose, [B, T]."""
  block = config.selection_block
  batch, length, _, count = block_ids.shape
  last = jnp.arange(length, dtype=jnp.int32)[None] // block
  first = jnp.zeros_like(last)
  choosing = last >= count
  if segment_ids is not None:
    first = segment_starts(segment_ids, segment_ids) // block
    choosing = (last - first >= count) & (segment_ids > 0)
  first, last = first[..., None, None], last[..., None, None]
  forced = block_ids < first + config.num_initial
  forced |= block_ids > last - config.num_local
  return (
    forced & (block_ids >= 0),
    jnp.broadcast_to(choosing, (batch, length)),
  )


def _share(part: Array, whole: Array) -> Array:
  """exp(part - whole) of two lse; 0 where there is nothing to read."""
  reads = whole > -jnp.inf
  share = jnp.exp(part - jnp.where(reads, whole, 0))
  # Rounding may exceed 1.
  return jnp.where(reads, jnp.minimum(share, 1), 0)


def _mean(x: Array, where: Array) -> Array:
  """Mean over the first two axes of the entries that are marked."""
  marked = where.reshape(*where.shape, *[1] * (x.ndim - 2))
  return jnp.where(marked, x, 0).sum(axis=(0, 1)) / where.sum()


def _read_sown(
  sown: Any, config: NSAConfig
) -> tuple[Array, Array, Array, Array]:
  """Query, key, gates and block ids of a layer."""
  names = ("selected_query", "selected_key", "gates", "block_ids")
  if not isinstance(sown, Mapping) or not set(names) <= set(sown):
    raise ValueError(
      f"`sown`={_checks.show(sown)} must be a mapping with the entries "
      f"{list(names)}, what a layer sows into the collection `inspect`."
    )
  values = []
  for name in names:
    value = sown[name]
    if isinstance(value, tuple):
      if len(value) != 1:
        raise ValueError(
          f"`sown[{name!r}]` has {len(value)} entries, and must have one: "
          "inspect one call of the layer."
        )
      value = value[0]
    values.append(
      _checks.array(f"sown[{name!r}]", value, 4, "as the layer sows it")
    )
  query, key, gates, block_ids = values
  for name, value in zip(names[:3], values[:3], strict=True):
    _checks.floating(f"sown[{name!r}]", value)
    _checks.not_empty(f"sown[{name!r}]", value)
  batch, length, heads, width = query.shape
  rule = f"that of `sown['selected_query']` of shape {query.shape}"
  _checks.shape("sown['selected_key']", key, (batch, length, None, width), rule)
  _checks.shape("sown['gates']", gates, (batch, length, heads, 3), rule)
  if heads % key.shape[2]:
    raise ValueError(
      f"`sown['selected_query']` has {heads} heads, which must be a multiple "
      f"of the {key.shape[2]} of `sown['selected_key']`."
    )
  block_ids = check_block_ids(
    block_ids, query, key, config, "sown['block_ids']"
  )
  return query, key.astype(query.dtype), gates, block_ids


def _static(implementation: Implementation) -> Any:
  """A hashable `implementation`; the ops say what is wrong with it."""
  _checks.implementation(implementation)
  if implementation is None or isinstance(implementation, str):
    return implementation
  return tuple(implementation)


def _index(name: str, value: Any, size: int) -> int:
  value = _checks.static_int(name, value, 0)
  if value >= size:
    raise ValueError(f"`{name}`={value} must be less than {size}.")
  return value


def _axes(ax: Any) -> Any:
  """`ax`, or the Axes of a new figure."""
  try:
    from matplotlib import pyplot
    from matplotlib.axes import Axes
  except ImportError as error:
    raise ImportError(
      "The plots of `nsa_jax.inspect` need matplotlib, which the extra "
      '"examples" installs: pip install "nsa-jax[examples]".'
    ) from error
  if ax is None:
    return pyplot.subplots(layout="constrained")[1]
  if not isinstance(ax, Axes):
    raise ValueError(f"`ax`={_checks.show(ax)} must be Axes of matplotlib.")
  return ax


def _rgb(colour: str) -> tuple[float, ...]:
  return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
