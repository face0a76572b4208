"""Layouts: how the arrays of a call are split over the devices of a mesh.

An op with a layout runs by `jax.shard_map`: every device calls the op with the
batch rows, queries and heads that it holds. What its queries read of the
keys on other devices is communicated first.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from nsa_jax import _checks
from nsa_jax.typing import Array
from pallas_kernels.platforms import vary_alike

# Name of one axis of a mesh, or of several that split an axis of an array
# together.
MeshAxes: TypeAlias = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Layout:
  """Mesh axes over which the arrays of a call are split; frozen and hashable.

  The mesh is that of `jax.set_mesh`. If its axes are Explicit, the ops read the
  layout off the types of their arguments and need none, except for `zigzag`.

  Attributes:
    data: over the batch B.
    sequence: over the tokens: queries T, and keys S before they are gathered.
    heads: over the key/value heads K, each with its group of query heads.
    zigzag: rows are in the order of `zigzag`, which gives every device of the
      sequence equal work. Needs T = S and queries at 0.

  Raises:
    ValueError: if a value breaks a rule.

  Example:
    >>> from nsa_jax import Layout
    >>> Layout(data="data", sequence=("host", "gpu"))
    Layout(data='data', sequence=('host', 'gpu'), heads=None, zigzag=False)
  """

  data: MeshAxes = None
  sequence: MeshAxes = None
  heads: MeshAxes = None
  zigzag: bool = False

  def __post_init__(self):
    used: list[str] = []
    for name in ("data", "sequence", "heads"):
      axes = getattr(self, name)
      if isinstance(axes, list):
        axes = tuple(axes)
        object.__setattr__(self, name, axes)
      if not all(isinstance(axis, str) for axis in axis_names(axes)):
        raise ValueError(
          f"`{name}`={_checks.show(axes)} must be the name of a mesh axis, a "
          "tuple of names, or None."
        )
      used += axis_names(axes)
    if len(set(used)) < len(used):
      raise ValueError(
        f"`data`={self.data!r}, `sequence`={self.sequence!r} and `heads`="
        f"{self.heads!r} must use a mesh axis once."
      )
    _checks.flag("zigzag", self.zigzag)


def decoding_layout(layout: Layout | None) -> Layout | None:
  """A layout for tokens that are appended to a cache: they are not split."""
  if layout is None:
    return None
  return dataclasses.replace(layout, sequence=None, zigzag=False)


def axis_names(axes: Any) -> tuple[Any, ...]:
  """A partition of an axis as a tuple of names."""
  if axes is None:
    return ()
  return axes if isinstance(axes, tuple) else (axes,)


def zigzag(x: ArrayLike, shards: int) -> Array:
  """Orders tokens so that causal work is even over shards of the sequence.

  The tokens are cut into 2 * shards chunks. Shard i gets chunks i and
  2 * shards - 1 - i: an early one, whose queries read few keys, and a late one.

  Args:
    x: [B, T, ...], in the order of the text.
    shards: devices along the sequence.

  Returns:
    [B, T, ...], in the order for `Layout(zigzag=True)`.

  Raises:
    ValueError: if T is not a multiple of 2 * shards.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import zigzag
    >>> zigzag(jnp.arange(8)[None], 2).tolist()
    [[0, 1, 6, 7, 2, 3, 4, 5]]
  """
  chunks = _chunks(x, shards)
  early, late = jnp.split(chunks, 2, axis=1)
  both = jnp.stack([early, jnp.flip(late, axis=1)], axis=2)
  return both.reshape(jnp.shape(x))


def restore_zigzag(x: ArrayLike, shards: int) -> Array:
  """The inverse of `zigzag`: tokens in the order of the text.

  Args:
    x: [B, T, ...], in the order of `zigzag`.
    shards: devices along the sequence.

  Raises:
    ValueError: if T is not a multiple of 2 * shards.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax import restore_zigzag
    >>> restore_zigzag(jnp.array([[0, 1, 6, 7, 2, 3, 4, 5]]), 2).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
  """
  chunks = _chunks(x, shards)
  early, late = chunks[:, ::2], chunks[:, 1::2]
  both = jnp.concatenate([early, jnp.flip(late, axis=1)], axis=1)
  return both.reshape(jnp.shape(x))


def _chunks(x, shards):
  """The 2 * shards chunks of an array, [B, 2 * shards, T', ...]."""
  x = _checks.batch_and_length("x", x)
  count = 2 * _checks.static_int("shards", shards, 1)
  if x.shape[1] % count:
    raise ValueError(
      f"`x` of shape {x.shape} must have a multiple of {count} tokens, twice "
      f"`shards`={shards}."
    )
  return x.reshape(x.shape[0], count, -1, *x.shape[2:])


class Place(NamedTuple):
  """A layout on a mesh, that fits the arrays of a call.

  Attributes:
    layout: over axes of the mesh.
    mesh: an abstract mesh.
  """

  layout: Layout
  mesh: Any

  def size(self, axes: MeshAxes) -> int:
    """Devices along some axes."""
    return math.prod(self.mesh.shape[name] for name in axis_names(axes))

  @property
  def shards(self) -> int:
    """Shards of the sequence."""
    return self.size(self.layout.sequence)

  @property
  def pieces(self) -> int:
    """Pieces of consecutive tokens per shard."""
    return 2 if self.layout.zigzag else 1

  def explicit(self, spec: Iterable[MeshAxes]) -> list[MeshAxes]:
    """A partition over the Explicit axes of the mesh alone."""
    types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
    kept = (
      tuple(x for x in axis_names(axes) if types[x] == AxisType.Explicit)
      for axes in spec
    )
    return [axes or None for axes in kept]

  def spec(self, letters: str, shape: tuple[int, ...]) -> P:
    """The partition of an array whose first axes are named by letters.

    Keys whose number the shards do not divide are not split.
    """
    layout = self.layout
    axes: list[MeshAxes] = [None] * len(shape)
    for axis, letter in enumerate(letters[: len(shape)]):
      if letter in "TSW":
        whole = letter != "T" and shape[axis] % (self.shards * self.pieces)
        axes[axis] = None if whole else layout.sequence
      elif letter in "NK":
        axes[axis] = layout.heads
      elif letter == "B":
        axes[axis] = layout.data
    return P(*axes)


def find_place(layout: Any, name: str, x: Any, letters: str) -> Place | None:
  """Where the arrays of a call are; None if no mesh or layout is in use.

  Args:
    layout: the argument of the caller.
    name: of the array, for messages.
    x: an array of the call.
    letters: its axes, such as "BTN".

  Raises:
    ValueError: if the layout does not fit the mesh or the array.
  """
  if layout is not None and not isinstance(layout, Layout):
    raise ValueError(
      f"`layout`={_checks.show(layout)} must be an nsa_jax.Layout or None."
    )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and isinstance(x, jax.Array):
    mesh = jax.typeof(x).sharding.mesh
  manual = set() if mesh.empty else set(mesh.manual_axes)
  if mesh.empty or manual == set(mesh.axis_names):
    if layout is None or layout == Layout():
      return None
    where = "no mesh" if mesh.empty else f"the Manual axes {sorted(manual)}"
    raise ValueError(
      f"`layout`={layout} needs a mesh with these axes, but there is {where}: "
      "call inside `jax.set_mesh(mesh)`, and outside `jax.shard_map`."
    )
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  explicit = AxisType.Explicit in types.values()
  if layout is None and not explicit:
    return None
  x = _checks.as_array(x)
  if x is None:
    return None  # The op says what it must be.
  found = _of_type(x, letters, name) if explicit else Layout()
  if layout is None:
    layout = found
  elif explicit and not any((layout.data, layout.sequence, layout.heads)):
    layout = dataclasses.replace(found, zigzag=layout.zigzag)
  if not layout.sequence:  # Of one shard, `zigzag` is the order of the text.
    layout = dataclasses.replace(layout, zigzag=False)
  place = Place(layout, mesh)
  used = [
    (axis, kind)
    for kind in ("data", "sequence", "heads")
    for axis in axis_names(getattr(layout, kind))
  ]
  for axis, kind in used:
    if axis not in mesh.axis_names or axis in manual:
      free = [axis for axis in mesh.axis_names if axis not in manual]
      raise ValueError(
        f"`layout.{kind}`={getattr(layout, kind)!r} must name axes of the mesh "
        f"around the call: {free}."
      )
  check_fit(place, name, x, letters)
  return place


def text_order(place: Place | None, x: Any) -> Any:
  """Numbers of tokens [B, T] in the order of the text, whole on every shard."""
  if place is None:
    return x
  x = _whole(place, x)
  return restore_zigzag(x, place.shards) if place.layout.zigzag else x


def shard_order(place: Place | None, x: Array) -> Array:
  """Numbers of tokens [B, T] from the order of the text to that of a layout."""
  if place is None or not place.layout.zigzag:
    return x
  return _whole(place, zigzag(_whole(place, x), place.shards))


def _whole(place, x):
  """Does not split numbers of tokens [B, T] over the sequence."""
  if not place.layout.sequence or isinstance(x, np.ndarray):
    return x
  spec = P(place.layout.data, None)
  if AxisType.Explicit in place.mesh.axis_types:
    return jax.reshard(x, NamedSharding(place.mesh, P(*place.explicit(spec))))
  return lax.with_sharding_constraint(x, spec)


def check_fit(place: Place, name: str, x: Array, letters: str) -> None:
  """Raises ValueError unless the layout divides the axes of an array."""
  letters = letters[: jnp.ndim(x)]
  kinds = {
    "B": ("data", 1),
    "T": ("sequence", place.pieces),
    "N": ("heads", 1),
    "K": ("heads", 1),
  }
  for axis, letter in enumerate(letters):
    kind, pieces = kinds.get(letter, (None, 1))
    axes = kind and getattr(place.layout, kind)
    parts = place.size(axes) * pieces if axes else 1
    if x.shape[axis] % parts:
      twice = "twice " if pieces > 1 else ""
      raise ValueError(
        f"`{name}` of shape {x.shape} must have {letter} a multiple of "
        f"{parts}, {twice}the devices of `layout.{kind}`={axes!r}."
      )


def _of_type(x: Array, letters: str, name: str) -> Layout:
  """The layout of an array by the Explicit axes of its type."""
  spec = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)
  named = dict(zip(letters, spec, strict=False))
  others = [axes for axes in spec[len(letters) : x.ndim] if axes is not None]
  if others:
    raise ValueError(
      f"`{name}` of type {jax.typeof(x)} must be split over the axes "
      f"{', '.join(letters)} only: `jax.reshard` it."
    )
  return Layout(
    named.get("B"),
    named.get("T", named.get("S")),
    named.get("N", named.get("K")),
  )


# Axes of the arguments of the ops: "B" rows, "T" tokens of the queries, "S"
# tokens of the keys, "N" and "K" heads. Any other letter is not split. "W" are
# tokens of keys that only a window reads.
LETTERS = {
  "query": "BTN",
  "compressed_query": "BTN",
  "gates": "BTN",
  "lse": "BTN",
  "scores": "BTK",
  "block_ids": "BTK",
  "bound": "BT",
  "key": "BSK",
  "value": "BSK",
  "selected": "BSK",
  "compressed": "B.K",
  "compressed_key": "B.K",
  "window": "BWK",
  "segment_ids": "BS",
  "window_segment_ids": "BW",
  "query_segment_ids": "BT",
  "query_offset": "B",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def partitioned(**letters: str) -> Callable[[Function], Function]:
  """Decorates an op: with a layout, it is called on every device.

  Args:
    **letters: axes of arguments that differ from `LETTERS`.
  """
  return functools.partial(_with_layout, _call_op, LETTERS | letters)


def partitioned_phi(phi: Function) -> Function:
  """Decorates phi, [B, S, K, H] -> [B, C, K, H'], likewise.

  A device computes the blocks that begin in its tokens. The last of them also
  need l - d tokens of the next piece. The blocks of all shards are gathered.
  """
  letters = {"x": "BSK", "parameters": "K", "segment_ids": "BS"}
  return _with_layout(_call_phi, letters, phi)


def _with_layout(call_on_devices, letters, function):
  """Decorates a function with a keyword `layout`."""
  signature = inspect.signature(function)

  @functools.wraps(function)
  def call(*args, layout=None, **kwargs):
    try:
      given = signature.bind(*args, **kwargs).arguments
    except TypeError:
      return function(*args, **kwargs)  # Raises, with the name of the function.
    name, first = next(iter(given.items()))
    place = find_place(layout, name, first, letters[name])
    if place is None:
      return function(*args, **kwargs)
    return call_on_devices(place, letters, function, given)

  return call


def _call_op(place, letters, op, given):
  arrays = {name: given.pop(name) for name in [*given] if name in letters}
  function = functools.partial(op, **given)
  _validate(function, arrays)
  arrays = _without_lists(arrays)
  arrays["bound"] = bound_arrays(given.get("select"))
  if arrays["bound"]:
    function = functools.partial(_call_bound, op, given)
  config: Any = given.get("config")
  windowed = letters["key"] == "BWK"
  key_length = given.get("key_length")
  if key_length is None:
    keys = arrays.get("key", next(iter(arrays.values())))
    key_length = jax.tree.leaves(keys)[0].shape[1]
  return run(
    place,
    function,
    arrays,
    key_length=key_length,
    query_offset=arrays.pop("query_offset", None),
    alignment=1 if windowed or not config else config.selection_block,
    halo=config.window if windowed and "key_offset" not in given else 0,
    letters=letters,
  )


def bound_arrays(select: Any) -> dict[str, Array] | None:
  """Arrays that `functools.partial` bound to keywords of a selector."""
  if not isinstance(select, functools.partial):
    return None
  bound = {k: x for k, x in select.keywords.items() if isinstance(x, jax.Array)}
  return bound or None


def bind(select: Any, bound: Mapping[str, Array] | None) -> Any:
  """A selector with other arrays in place of those of `bound_arrays`."""
  if not bound:
    return select
  keywords = select.keywords | bound
  return functools.partial(select.func, *select.args, **keywords)


def _without_lists(arrays):
  """Lists as the arrays that they stand for; to jax they are pytrees."""
  return {
    name: jnp.asarray(x) if isinstance(x, list) else x
    for name, x in arrays.items()
  }


def _call_bound(op, given, *, bound, **arrays):
  return op(**arrays, **given | {"select": bind(given["select"], bound)})


def _validate(function, arrays):
  """Lets an op check the arrays before they are split; shapes of its result."""

  def shape(x):
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype)

  with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
    return jax.eval_shape(
      lambda arrays: function(**arrays), jax.tree.map(shape, arrays)
    )


def run(
  place: Place,
  function: Callable[..., Any],
  arrays: Mapping[str, Any],
  *,
  key_length: int,
  query_offset: Any = None,
  alignment: int = 1,
  halo: int = 0,
  letters: Mapping[str, str] = LETTERS,
) -> Any:
  """Calls function(**arrays, query_offset=...) on every device.

  Args:
    place: where the arrays are.
    function: gets the rows, heads and queries of the device, of the latter one
      piece at a time; and the keys, gathered. With `halo` also `key_offset`.
      Its results have the axes B, T, N or K.
    arrays: arrays or pytrees of arrays by name; None is left out.
    key_length: S.
    query_offset: as in `native_sparse_attention`.
    alignment: each segment must start at a multiple of it.
    halo: tokens before a piece that its window reads, for T = S and queries at
      0. "W" is then these and the piece; without a halo it is "S".
    letters: the axes of the arrays.
  """
  layout = place.layout
  arrays = {name: x for name, x in arrays.items() if x is not None}
  length, split = next(
    (x.shape[1], "T" in letters[name])
    for name, x in arrays.items()
    if name in ("query", "scores")
  )
  if not split:
    layout = dataclasses.replace(layout, sequence=None, zigzag=False)
    place = place._replace(layout=layout)
  if layout.zigzag and (length != key_length or query_offset is not None):
    raise ValueError(
      f"`layout`={layout} needs T = S and no `query_offset`: there are "
      f"{length} queries and {key_length} keys."
    )
  offset = query_offset
  if offset is None:
    offset = key_length - length
  if not isinstance(offset, int):
    arrays["query_offset"] = jnp.asarray(offset)
  for name, y in arrays.items():
    for x in jax.tree.leaves(y):
      check_fit(place, name, x, letters[name])
  known = _checks.concrete(arrays.get("segment_ids"))
  if known is not None and layout.zigzag:
    known = np.asarray(restore_zigzag(known, place.shards))
  _checks.segments(known, alignment)
  piece = length // (place.shards * place.pieces)
  at_start = isinstance(offset, int) and not offset and length == key_length
  if not (layout.sequence and at_start and halo <= piece):
    halo = 0
  specs = _specs(place, letters, arrays)

  def gather(x, spec):
    """Keys of all shards, in the order of the text."""
    if len(spec) < 2 or spec[1] is None:
      return x
    x = lax.all_gather(x, layout.sequence, axis=1, tiled=True)
    return restore_zigzag(x, place.shards) if layout.zigzag else x

  def body(arrays):
    # Once: every use would sum its gradient over devices.
    arrays = vary_alike(arrays)
    local = {}
    for name, x in arrays.items():
      if "T" in letters[name]:
        cut = functools.partial(_pieces, place)
      elif "W" in letters[name] and halo:
        cut = functools.partial(_pieces_and_before, place, halo)
      else:
        x = jax.tree.map(gather, x, specs[name])
        cut = functools.partial(_repeated, place)
      local[name] = jax.tree.map(cut, x)
    first = local.pop("query_offset", offset)
    if layout.sequence:
      rows = jax.tree.leaves(local)[0].shape[0] // place.pieces
      start = _first_tokens(place, piece, rows)
      first += start
      if halo:
        local["key_offset"] = start - halo
    result = function(**local, query_offset=first)
    return jax.tree.map(functools.partial(_joined, place), result)

  out = P(layout.data, layout.sequence, layout.heads)
  return _shard_map(place, body, (specs,), out)(arrays)


def _call_phi(place, letters, phi, given):
  config = given.pop("config")
  function = functools.partial(phi, config=config)
  blocks = _validate(function, given).shape[1]
  given = _without_lists(given)
  x = given.pop("x")
  arrays = {
    "x": x,
    "segment_ids": given.pop("segment_ids", None),
    "parameters": given,
  }
  layout = place.layout
  piece = x.shape[1] // (place.shards * place.pieces)
  halo = config.compression_block - config.compression_stride
  # Otherwise a block may begin between two pieces or end behind the next.
  local = piece % config.compression_stride == 0 and halo <= piece
  specs = _specs(place, letters, arrays)
  split = specs["x"][1] is not None

  def gather(x):
    """Blocks or tokens of all shards, in the order of the text."""
    x = lax.all_gather(x, layout.sequence, axis=1, tiled=True, to="invarying")
    return restore_zigzag(x, place.shards) if layout.zigzag else x

  def body(arrays):
    x, segment_ids = arrays["x"], arrays["segment_ids"]
    if split and not local:
      x, segment_ids = jax.tree.map(gather, (x, segment_ids))
    # Once: every use would sum its gradient over devices.
    x, segment_ids, parameters = vary_alike(
      (x, segment_ids, arrays["parameters"])
    )

    if split and local:
      cut = functools.partial(_pieces_and_after, place, halo)
      x, segment_ids = jax.tree.map(cut, (x, segment_ids))
    made = function(x, **parameters, segment_ids=segment_ids)
    return gather(_joined(place, made)) if split and local else made

  out = P(layout.data, None, layout.heads)
  return _shard_map(place, body, (specs,), out)(arrays)[:, :blocks]


def _specs(place, letters, arrays):
  """The partitions of arrays, or of pytrees of arrays, by name."""
  return {
    name: jax.tree.map(
      lambda x, name=name: place.spec(letters[name], x.shape), y
    )
    for name, y in arrays.items()
  }


def per_token(
  layout: Layout | None,
  function: Callable[..., Array],
  table: Array,
  *arrays: Array,
) -> Array:
  """function(table, *arrays) for the tokens of every device.

  Args:
    layout: as in `native_sparse_attention`.
    function: its result is [B, T, ...].
    table: an array that all devices get; its gradient is summed over them.
    *arrays: [B, T, ...].
  """
  place = find_place(layout, "tokens", arrays[0], "BT")
  if place is None:
    return function(table, *arrays)
  split = P(place.layout.data, place.layout.sequence)
  specs = (P(), *(split for _ in arrays))
  return _shard_map(place, function, specs, split)(table, *arrays)


def explicit_sharding(x: Array) -> NamedSharding | None:
  """The sharding in the type of an array, where jax asks for one.

  None without Explicit axes, where XLA finds that of a gather or a scatter.
  """
  sharding: Any = jax.typeof(x).sharding
  explicit = AxisType.Explicit in sharding.mesh.axis_types
  return sharding if explicit else None


def dot_general(
  lhs: Array,
  rhs: Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Array:
  """`lax.dot_general` of activations and a parameter, for any sharding of both.

  On Explicit axes jax asks how a product is split. It stays where the
  activations are: over their axes, and over those of the parameter that they do
  not use. A sum over a split axis is an all-reduce; an axis of the parameter
  that the activations use for another one, as in FSDP, is gathered.

  Args:
    lhs: the activations.
    rhs: the parameter.
    dimension_numbers: as in `lax.dot_general`, without batch dimensions.
    precision: as in `lax.dot_general`.
    preferred_element_type: as in `lax.dot_general`.
  """
  product = functools.partial(
    lax.dot_general,
    dimension_numbers=dimension_numbers,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  types = jax.typeof(lhs).sharding, jax.typeof(rhs).sharding
  meshes = [x.mesh for x in types if not x.mesh.empty]
  if not any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
    return product(lhs, rhs)
  (sums, kernel_sums), _ = dimension_numbers
  of_lhs, of_rhs = (
    [*x.spec, *(None,) * (y.ndim - len(x.spec))]
    for x, y in zip(types, (lhs, rhs), strict=True)
  )
  used = {name for axes in of_lhs for name in axis_names(axes)}
  split = [None if used & set(axis_names(axes)) else axes for axes in of_rhs]
  for axis, kernel_axis in zip(sums, kernel_sums, strict=True):
    split[kernel_axis] = of_lhs[axis]
  kept = [axes for i, axes in enumerate(of_lhs) if i not in sums]
  free = [axes for i, axes in enumerate(split) if i not in kernel_sums]
  out = jax.NamedSharding(meshes[0], P(*kept, *free))
  return product(lhs, jax.reshard(rhs, P(*split)), out_sharding=out)


def constrain(layout: Layout | None, x: Array) -> Array:
  """Keeps activations [B, T, D] where the tokens of a layout are.

  On Auto axes XLA could as well move them to where a parameter is.
  """
  place = find_place(layout, "x", x, "BT")
  if place is None or AxisType.Explicit in place.mesh.axis_types:
    return x
  return lax.with_sharding_constraint(x, place.spec("BT", x.shape))


def _shard_map(place, body, specs, out):
  def reshard(spec, x):
    return jax.reshard(x, NamedSharding(place.mesh, P(*place.explicit(spec))))

  def call(*args):
    if AxisType.Explicit in place.mesh.axis_types:
      args = jax.tree.map(
        reshard, specs, args, is_leaf=lambda x: isinstance(x, P)
      )
    mapped = jax.shard_map(body, mesh=place.mesh, in_specs=specs, out_specs=out)
    return mapped(*args)

  return jax.jit(call)


# The pieces of a shard are rows of a batch [B * pieces], so that one call does
# both of a zigzag shard.


def _pieces(place, x):
  """[B, T, ...] -> [B * pieces, T / pieces, ...]."""
  return x.reshape(-1, x.shape[1] // place.pieces, *x.shape[2:])


def _joined(place, x):
  """[B * pieces, T / pieces, ...] -> [B, T, ...]."""
  return x.reshape(-1, x.shape[1] * place.pieces, *x.shape[2:])


def _repeated(place, x):
  """[B, ...] -> [B * pieces, ...]: the same for every piece."""
  if place.pieces == 1 or not x.ndim:
    return x
  return jnp.repeat(x, place.pieces, axis=0)


def _first_tokens(place, piece, rows):
  """Position of the first token of every piece of this shard."""
  shard = lax.axis_index(place.layout.sequence)
  if place.pieces == 1:
    return shard * piece
  starts = jnp.stack([shard, 2 * place.shards - 1 - shard]) * piece
  return jnp.tile(starts, rows)


def _shift(place, x, by):
  """What another shard holds; zeros at the ends of the sequence."""
  names, count = axis_names(place.layout.sequence), place.shards
  # `lax.ppermute` numbers the devices of several axes in the order of the mesh.
  order = [name for name in place.mesh.axis_names if name in names]
  numbers = np.arange(count).reshape([place.mesh.shape[x] for x in order])
  numbers = numbers.transpose([order.index(x) for x in names]).flatten()
  pairs = [
    (numbers[j], numbers[j + by]) for j in range(count) if 0 <= j + by < count
  ]
  return lax.ppermute(x, tuple(order), pairs)


def _pieces_and_before(place, halo, x):
  """`_pieces` with `halo` tokens before each; zeros before the first token."""
  x = _pieces(place, x)
  ends = x[:, x.shape[1] - halo :]
  if place.pieces == 1:
    before = _shift(place, ends, 1)
  else:
    # The late pieces of later shards come first. The last shard has two
    # neighbouring pieces.
    early, late = ends[::2], ends[1::2]
    last = lax.axis_index(place.layout.sequence) == place.shards - 1
    before_late = jnp.where(last, early, _shift(place, late, -1))
    before = _interleaved(_shift(place, early, 1), before_late)
  return jnp.concatenate([before, x], axis=1)


def _pieces_and_after(place, halo, x):
  """`_pieces` with `halo` tokens after each; zeros after the last token."""
  x = _pieces(place, x)
  starts = x[:, :halo]
  if place.pieces == 1:
    after = _shift(place, starts, -1)
  else:
    early, late = starts[::2], starts[1::2]
    last = lax.axis_index(place.layout.sequence) == place.shards - 1
    after_early = jnp.where(last, late, _shift(place, early, -1))
    after = _interleaved(after_early, _shift(place, late, 1))
  return jnp.concatenate([x, after], axis=1)


def _interleaved(early, late):
  """The rows of two arrays in turns."""
  return jnp.stack([early, late], axis=1).reshape(-1, *early.shape[1:])
