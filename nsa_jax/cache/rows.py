"""Rows of a running batch: they join, leave, are copied and reordered.

Everything here takes the cache of a layer or a model's whole `cache`
collection, with `scan_layers` or without, and works under `jit`. What the rows
hold is made in `nsa_jax.cache.state`.
"""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nsa_jax import _checks
from nsa_jax.cache.state import (
  Cache,
  check_lengths,
  map_caches,
  mean_tokens,
  named_parts,
)
from nsa_jax.sharding import explicit_sharding
from nsa_jax.typing import KV, Array

_T = TypeVar("_T")

# In order of position, so that a smaller capacity is a part of a larger one.
_BY_POSITION = ("selected", "compressed", "scales", "means")


def insert(cache: _T, rows: _T, index: ArrayLike) -> _T:
  """Copies rows of another cache into this one: requests join a batch.

  A request is read into a cache with one row, as long as it needs, and then
  takes the place of any row of the batch, whatever that held. One row may go to
  several places: a prefix that all of them share. That writes
  `num_bytes(rows)` for every place, however large the capacity of `cache`, and
  nothing else if `cache` is donated.

  Args:
    cache: a Cache, or any pytree of them, such as the `cache` collection of a
      model, with B rows.
    rows: the same of n rows, or of one row for all places; its capacity may be
      smaller. `max_append` is that of `cache`.
    index: int32 [n], the places in [0, B), all different; or one place.

  Returns:
    `cache` with these rows replaced. If `index` is traced, places out of range
    are dropped.

  Raises:
    ValueError: if structures, shapes or dtypes do not fit, or a concrete place
      is out of range or given twice.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> options = {"config": NSAConfig(), "num_kv_heads": 1, "head_dim": 8}
    >>> batch = cache.init(3, 256, **options)
    >>> one = cache.init(1, 64, **options)._replace(lengths=jnp.array([5]))
    >>> cache.insert(batch, one, 1).lengths.tolist()
    [0, 5, 0]
  """

  def one(held: Cache, new: Cache) -> Cache:
    held, new = _check(held, "cache"), _check(new, "rows")
    batch, count = held.lengths.shape[-1], new.lengths.shape[-1]
    places = _places(index, batch)
    if count not in (1, len(places)):
      raise ValueError(
        f"`rows` has {count} rows, which must be 1 or one for each of the "
        f"{len(places)} places of `index`."
      )
    own, tokens = mean_tokens(new, "rows"), mean_tokens(held)
    if own and tokens and own != tokens:
      raise ValueError(
        f"`rows.means` are of {own} tokens each, and must be of {tokens}, like "
        "`cache.means`."
      )
    fields: dict[str, Any] = {}
    for name, old in held._asdict().items():
      own = getattr(new, name)
      if (own is None) != (old is None):
        raise ValueError(
          f"`rows.{name}` must be None exactly if `cache.{name}` is: both must "
          "be caches of the same kind, quantized or not, with the same "
          "`select`."
        )
      axis = held.lengths.ndim - 1
      put = functools.partial(_put, f"rows.{name}", axis, places)
      fields[name] = jax.tree_util.tree_map_with_path(put, old, own)
    return Cache(**fields)

  return map_caches(one, cache=cache, rows=rows)


def evict(cache: _T, index: ArrayLike) -> _T:
  """Empties rows: requests leave a batch.

  Only `lengths` changes. An empty row takes part in every step until another
  request is inserted; with 0 in `segment_ids` it stays empty.

  Args:
    cache: as in `insert`.
    index: int32 [n] or (), the rows in [0, B).

  Returns:
    `cache` with these rows empty. If `index` is traced, rows out of range are
    dropped.

  Raises:
    ValueError: if an argument does not fit, or a concrete row is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   3, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8
    ... )._replace(lengths=jnp.array([9, 7, 8]))
    >>> cache.evict(held, jnp.array([0, 2])).lengths.tolist()
    [0, 7, 0]
  """

  def one(held: Cache) -> Cache:
    lengths, _ = check_lengths(held)
    rows = _places(index, lengths.shape[-1], distinct=False)
    lengths = lengths.at[..., rows].set(
      0,
      mode="drop",
      wrap_negative_indices=False,
      out_sharding=explicit_sharding(lengths),
    )
    return held._replace(lengths=lengths)

  return map_caches(one, cache=cache)


def take(cache: _T, index: ArrayLike) -> _T:
  """Gathers rows, in any order and number: the beams that go on.

  The result is a copy, also where a row is taken that stays in its place: it
  reads and writes n / B of `num_bytes(cache)`, and both caches exist while it
  runs.

  Args:
    cache: as in `insert`.
    index: int32 [n], rows in [0, B).

  Returns:
    A cache of n rows. If `index` is traced, rows out of range are the nearest
    ones.

  Raises:
    ValueError: if an argument does not fit, or a concrete row is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import NSAConfig, cache
    >>> held = cache.init(
    ...   3, 64, config=NSAConfig(), num_kv_heads=1, head_dim=8
    ... )._replace(lengths=jnp.array([9, 7, 8]))
    >>> cache.take(held, jnp.array([2, 0, 0, 1])).lengths.tolist()
    [8, 9, 9, 7]
  """

  def one(held: Cache) -> Cache:
    held = _check(held, "cache")
    rows = _places(index, held.lengths.shape[-1], distinct=False)
    where = (*(slice(None),) * (held.lengths.ndim - 1), rows)

    def gather(x: Array) -> Array:
      return x.at[where].get(
        mode="clip",
        wrap_negative_indices=False,
        out_sharding=explicit_sharding(x),
      )

    return jax.tree.map(gather, held)

  return map_caches(one, cache=cache)


def _put(
  name: str, axis: int, places: Array, path: Any, held: Array, new: Array
) -> Array:
  """`held` with `new`, of this name and path, at `places` of an axis."""
  label = f"{name}{jax.tree_util.keystr(path)}"
  new = _checks.array(label, new, held.ndim, f"like {held.shape} of `cache`")
  want = [*held.shape[:axis], new.shape[axis], *held.shape[axis + 1 :]]
  where: tuple[Any, ...] = (*(slice(None),) * axis, places)
  rule = "that of `cache`, with fewer rows"
  if name.endswith(_BY_POSITION):
    size = min(new.shape[axis + 1], held.shape[axis + 1])
    want[axis + 1] = size
    where += (slice(size),)
    rule = f"{rule} or a smaller capacity"
  _checks.shape(label, new, tuple(want), rule)
  if new.dtype != held.dtype:
    raise ValueError(
      f"`{label}` of dtype {new.dtype} must have the dtype of `cache`, "
      f"{held.dtype}."
    )
  want[axis] = len(places)
  return held.at[where].set(
    jnp.broadcast_to(new, want),
    mode="drop",
    unique_indices=True,
    wrap_negative_indices=False,
    out_sharding=explicit_sharding(held),
  )


def _check(held: Any, name: str) -> Cache:
  """Validates a cache, of one layer or of stacked ones; arrays of jax."""
  lengths, earliest = check_lengths(held, name)
  fields: dict[str, Any] = {"lengths": lengths, "earliest": earliest}
  for field, pair in held._asdict().items():
    if field in fields:
      continue
    if pair is None:
      fields[field] = None
      continue
    parts = named_parts(f"{name}.{field}", pair)
    for label, x in parts.items():
      rest = 2 if field == "scales" else 3
      x = _checks.array(label, x, lengths.ndim + rest, "[..., B, S, K, H]")
      rule = f"rows as in `{name}.lengths`"
      _checks.shape(label, x, (*lengths.shape, *(None,) * rest), rule)
      parts[label] = x
    fields[field] = KV(*parts.values()) if len(parts) > 1 else x
  return Cache(**fields)


def _places(index: Any, batch: int, distinct: bool = True) -> Array:
  """Validates rows [n] or () and returns them as int32 [n]."""
  given = _checks.as_array(index)
  if given is None or given.ndim > 1 or not given.size:
    raise ValueError(
      f"`index`={_checks.show(index)} must be a row, or rows [n]."
    )
  known = _checks.concrete(index)
  places = _checks.integers("index", index, given.shape, "rows [n]").reshape(-1)
  if known is None:
    return places
  wrong = (known < 0) | (known >= batch)
  if wrong.any():
    raise ValueError(
      f"`index` has the value {known[wrong].flat[0]}; rows must lie in [0, "
      f"{batch})."
    )
  if distinct and np.unique(known).size < known.size:
    raise ValueError(
      f"`index`={known.tolist()} must have every row at most once."
    )
  return places
