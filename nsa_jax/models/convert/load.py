"""Whole checkpoints: a folder to a model with parameters, and back."""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nsa_jax import _checks
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.convert.families import (
  FAMILIES,
  LAYER,
  TABLES,
  UNREAD,
  Family,
  Tensor,
  check_ignore,
  check_overrides,
  choose_family,
  family_of,
  read_config,
  write_config,
)
from nsa_jax.models.convert.tensors import (
  Entry,
  Reader,
  import_extra,
  remove,
  write,
)
from nsa_jax.models.linen import TransformerLM
from nsa_jax.partitioning import parameter_shardings
from nsa_jax.sharding import MeshAxes

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


class Loaded(NamedTuple):
  """What `load` returns.

  Attributes:
    config: shape and options.
    model: the linen module of `config`.
    params: its parameters, what `init` returns under "params".
    tokenizer: a `tokenizers.Tokenizer`; None if the folder has none, or it was
      not asked for.
  """

  config: TransformerConfig
  model: TransformerLM
  params: dict[str, Any]
  tokenizer: Any


def load(
  folder: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  rules: Mapping[str, MeshAxes] | None = None,
  shardings: Any = None,
  tokenizer: bool = True,
  ignore: Sequence[str] = (),
  **overrides: Any,
) -> Loaded:
  """Reads a checkpoint of Llama, Mistral, Qwen2, Qwen3 or NSA-1B.

  The folder has config.json, safetensors files and perhaps tokenizer.json, as
  transformers writes them. All names and shapes are checked before the first
  array is read. Then one tensor at a time goes to the devices, so that the host
  needs memory for one and a copy of it, and a mesh for the parameters.

  Args:
    folder: of the checkpoint.
    mesh: parameters are split over it, as `parameter_shardings` says.
    rules: as in `parameter_shardings`.
    shardings: in place of `mesh`, a pytree of shardings with the structure of
      the parameters.
    tokenizer: read tokenizer.json, with the package tokenizers.
    ignore: fields of config.json and tensors to pass over, though they are
      unknown.
    **overrides: fields of `TransformerConfig`, such as `scan_layers`,
      `implementation` or `vocab_multiple`. By default `param_dtype` is that of
      the embedding in the file, which keeps all dtypes as they are; one that is
      given is that of all parameters. `dtype` is `param_dtype` by default.

  Returns:
    Loaded(config, model, params, tokenizer).

  Raises:
    ValueError: if a file, a field or a tensor is missing or unknown, or has
      another shape; names it.
    NotImplementedError: if the model cannot have the value of a field, or a
      tensor has another type.
    ImportError: if a package is missing; says what to install.

  Example:
    >>> import tempfile
    >>> import jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> config = nsa_jax.TransformerConfig.preset(
    ...   "tiny", num_layers=1, model_dim=16, attention="full"
    ... )
    >>> init = jax.jit(nsa_jax.TransformerLM(config).init)
    >>> params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> folder = tempfile.mkdtemp()
    >>> nsa_jax.save(folder, config, params)
    >>> loaded = nsa_jax.load(folder)
    >>> loaded.config.layer_kinds, sorted(loaded.params)
    (('full',), ['embedding', 'final_norm', 'layer_0'])
  """
  folder = _path(folder)
  if mesh is not None and shardings is not None:
    raise ValueError("`shardings` must be None if `mesh` is given.")
  if mesh is None and rules is not None:
    raise ValueError("`rules` needs `mesh`.")
  _checks.flag("tokenizer", tokenizer)
  check_ignore(ignore)
  check_overrides("**overrides", overrides)
  fields = _read_fields(folder)
  family = family_of(fields)
  reader = Reader(folder)
  try:
    config = _configure(fields, reader, ignore, overrides)
    model = TransformerLM(config)
    shapes = shapes_of(config)
    plan = _plan(family, config, shapes)
    _check(plan, reader.entries, config, ignore)
    if mesh is not None:
      shardings = parameter_shardings(shapes, mesh, rules)
    keep = "param_dtype" not in overrides
    dtype = None if keep else config.param_dtype
    params = _read(plan, reader, shapes, dtype, shardings)
  finally:
    reader.close()
  read = _tokenizer(folder) if tokenizer else None
  return Loaded(config, model, params, read)


def _path(folder: Any) -> pathlib.Path:
  try:
    return pathlib.Path(folder)
  except TypeError as error:
    raise ValueError(
      f"`folder`={_checks.show(folder)} must be a path."
    ) from error


def _read_fields(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / CONFIG
  try:
    fields = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"`folder`: {path} cannot be read: {error}.") from error
  if not isinstance(fields, dict):
    raise ValueError(f"`folder`: {path} must hold an object of JSON.")
  return fields


def _configure(
  fields: Mapping[str, Any],
  reader: Reader,
  ignore: Sequence[str],
  overrides: Mapping[str, Any],
) -> TransformerConfig:
  options = dict(overrides)
  if "param_dtype" not in options:
    name = TABLES["embedding"].name
    if name not in reader.entries:
      raise ValueError(f"The checkpoint lacks the tensor `{name}`.")
    options["param_dtype"] = _kept(reader, name)
  options.setdefault("dtype", options["param_dtype"])
  return read_config(fields, ignore=ignore, overrides=options)


def _kept(reader: Reader, name: str) -> jnp.dtype:
  """The dtype of a tensor, which its parameter keeps."""
  dtype = reader.dtype(name)
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError(
      f"The tensor `{name}` has the type {dtype.name}, which jax has only with "
      "`jax_enable_x64`: `param_dtype` must say another."
    )
  return dtype


def shapes_of(config: TransformerConfig) -> Any:
  """Shapes and dtypes of the parameters, without boxes."""
  model = TransformerLM(dataclasses.replace(config, logical_axes=False))
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


class _Step(NamedTuple):
  """A parameter and its tensors.

  Attributes:
    path: of the parameter.
    tensor: how it lies in the file.
    names: of the tensors; several if the parameter is stacked.
    shape: of the parameter of one layer.
    stacked: the names are those of all layers.
  """

  path: tuple[str, ...]
  tensor: Tensor
  names: list[str]
  shape: tuple[int, ...]
  stacked: bool


def _plan(
  family: Family, config: TransformerConfig, shapes: Any
) -> list[_Step]:
  """Every parameter of the model, with the names of its tensors.

  Raises:
    ValueError: if a checkpoint of the family has no tensor for one.
  """
  plan = []
  for keys, leaf in jax.tree.leaves_with_path(shapes):
    path = tuple(key.key for key in keys)
    shape, stacked = tuple(leaf.shape), path[0] == "layers"
    if stacked:
      shape = shape[1:]
    in_layer = stacked or path[0].startswith("layer_")
    name = "/".join(path[1:] if in_layer else path)
    tensor = (family.block if in_layer else TABLES).get(name)
    if tensor is None:
      raise ValueError(
        f"The parameter `{'/'.join(path)}` has no tensor in a checkpoint of "
        f"{family.architecture}."
      )
    layers = range(config.num_layers)
    if in_layer and not stacked:
      layers = range(int(path[0].removeprefix("layer_")), config.num_layers)[:1]
    names = [LAYER.format(i) + tensor.name for i in layers]
    plan.append(
      _Step(path, tensor, names if in_layer else [tensor.name], shape, stacked)
    )
  return plan


def _their_shape(step: _Step, config: TransformerConfig) -> tuple[int, ...]:
  """The shape of a tensor in the file, whose tables are not padded."""
  shape = step.shape
  if step.path in (("embedding",), ("head",)):
    shape = (config.vocab_size, *shape[1:])
  return step.tensor.shape(shape)


def _check(
  plan: list[_Step],
  entries: Mapping[str, Entry],
  config: TransformerConfig,
  ignore: Sequence[str],
) -> None:
  """Compares the names and shapes of all tensors."""
  wanted = set()
  for step in plan:
    want = _their_shape(step, config)
    for name in step.names:
      wanted.add(name)
      if name not in entries:
        raise ValueError(
          f"The checkpoint lacks the tensor `{name}`, for the parameter "
          f"`{'/'.join(step.path)}`."
        )
      if entries[name].shape != want:
        raise ValueError(
          f"The tensor `{name}` of shape {entries[name].shape} must have shape "
          f"{want}, by {CONFIG} and the arguments of `load`."
        )
  passed = [*UNREAD, *map(re.escape, ignore)]
  if config.tie_embeddings:  # Some versions write the table twice.
    passed.append(re.escape(TABLES["head"].name))
  for name in sorted(set(entries) - wanted):
    if not any(re.fullmatch(pattern, name) for pattern in passed):
      raise ValueError(
        f"The checkpoint has the tensor `{name}`, which the model of {CONFIG} "
        f"has not. `ignore`=[{name!r}] passes over it."
      )


def _read(
  plan: list[_Step],
  reader: Reader,
  shapes: Any,
  dtype: jnp.dtype | None,
  shardings: Any,
) -> dict[str, Any]:
  """The tree of parameters, one tensor after the other."""
  params: dict[str, Any] = {}
  if shardings is not None:
    structure: Any = jax.tree.structure(shapes)
    if jax.tree.structure(shardings) != structure:
      raise ValueError(
        f"`shardings` must have the structure of the parameters, {structure}."
      )
    for path, leaf in jax.tree.leaves_with_path(shardings):
      where = f"shardings{jax.tree_util.keystr(path)}"
      _checks.instance(where, leaf, jax.sharding.Sharding)
  for step in plan:
    sharding = shardings
    for key in step.path:
      sharding = None if sharding is None else sharding[key]
    place = params
    for key in step.path[:-1]:
      place = place.setdefault(key, {})
    place[step.path[-1]] = _parameter(step, reader, dtype, sharding)
  return params


def _parameter(
  step: _Step, reader: Reader, dtype: jnp.dtype | None, sharding: Any
) -> jax.Array:
  of = _kept if dtype is None else Reader.dtype
  kept = {of(reader, name) for name in step.names}
  if dtype is None and len(kept) > 1:
    raise ValueError(
      f"The tensors from `{step.names[0]}` to `{step.names[-1]}` have several "
      f"types, {', '.join(sorted(x.name for x in kept))}: `param_dtype` must "
      "say which one the stacked parameter has."
    )
  (kind,) = kept if dtype is None else {dtype}

  def array(name: str) -> np.ndarray:
    x = reader.read(name).astype(kind, copy=False)
    if step.tensor.inputs or step.tensor.flat:
      return step.tensor.read(x, step.shape)
    missing = step.shape[0] - x.shape[0]  # Rows of no token.
    return np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])

  if not step.stacked:
    return _put(array(step.names[0]), sharding)
  # Layer by layer into one buffer, so that no second copy of it is needed.
  of_layer = sharding
  if isinstance(sharding, NamedSharding):
    axes = tuple(sharding.spec)[1:]
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*axes))
  shape = (len(step.names), *step.shape)
  zeros = jax.jit(lambda: jnp.zeros(shape, kind), out_shardings=sharding)
  stacked = zeros()
  insert = jax.jit(_insert, donate_argnums=0, out_shardings=sharding)
  for i, name in enumerate(step.names):
    stacked = insert(stacked, _put(array(name), of_layer), i)
  return stacked


def _insert(stacked, x, i):
  return jax.lax.dynamic_update_index_in_dim(stacked, x, i, 0)


def _put(x: np.ndarray, sharding: Any) -> jax.Array:
  """An array on the devices of a sharding, which may be of several hosts."""
  if sharding is None:
    return jnp.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def _tokenizer(folder: pathlib.Path) -> Any:
  path = folder / TOKENIZER
  if not path.exists():
    return None
  package = import_extra(
    "tokenizers", f"Reading {TOKENIZER} (or `tokenizer`=False)"
  )
  try:
    return package.Tokenizer.from_file(str(path))
  except Exception as error:  # The package has no type of its own.
    raise ValueError(f"{path} cannot be read: {error}.") from error


def save(
  folder: str | pathlib.Path,
  config: TransformerConfig,
  params: Mapping[str, Any],
  *,
  family: str | None = None,
  tokenizer: Any = None,
  max_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes a checkpoint that `load`, and transformers, can read.

  Once it is complete, it takes the place of one that is in the folder; until
  then the disk has both. An interruption leaves either of them, or a folder
  without config.json, but no mixture.

  Args:
    folder: made if it does not exist.
    config: of the model. Options that change neither parameters nor logits,
      such as `remat`, are not kept.
    params: its parameters, as of `TransformerLM` with or without `scan_layers`;
      they may be split over the devices of this host.
    family: "llama", "mistral", "qwen2", "qwen3" or "llama-nsa"; None is the one
      that is nearest to the options.
    tokenizer: a `tokenizers.Tokenizer`, kept as tokenizer.json; with None, one
      that is there stays.
    max_file_bytes: a larger checkpoint has several files and an index. One file
      at a time is in memory.

  Raises:
    ValueError: if a checkpoint of the family has no place for an option or a
      parameter, or the parameters are not those of `config`.
    ImportError: if the package safetensors is missing.

  Example:
    >>> import json, pathlib, tempfile
    >>> import jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> config = nsa_jax.TransformerConfig.preset(
    ...   "tiny", num_layers=1, model_dim=16, attention="full"
    ... )
    >>> init = jax.jit(nsa_jax.TransformerLM(config).init)
    >>> params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> nsa_jax.save(folder, config, params)
    >>> json.loads((folder / "config.json").read_text())["model_type"]
    'llama'
  """
  _checks.instance("config", config, TransformerConfig)
  max_file_bytes = int(_checks.finite("max_file_bytes", max_file_bytes))
  if max_file_bytes < 1:
    raise ValueError(f"`max_file_bytes`={max_file_bytes} must be at least 1.")
  if tokenizer is not None and not callable(getattr(tokenizer, "save", None)):
    raise ValueError(
      f"`tokenizer`={_checks.show(tokenizer)} must be a tokenizers.Tokenizer "
      "or None."
    )
  folder = _path(folder)
  name = choose_family(config) if family is None else family
  _checks.choice("family", name, tuple(FAMILIES))
  fields = write_config(config, name)
  shapes = shapes_of(config)
  plan = _plan(FAMILIES[name], config, shapes)
  arrays = unboxed(params)
  check_params(arrays, shapes)
  folder.mkdir(parents=True, exist_ok=True)
  sizes, order = {}, []
  for step in plan:
    leaf = _leaf(arrays, step.path)
    size = int(np.prod(_their_shape(step, config))) * leaf.dtype.itemsize
    for i, tensor in enumerate(step.names):
      sizes[tensor] = size
      order.append((tensor, step, i))

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for tensor, step, i in order:
      x = _leaf(arrays, step.path)
      x = np.asarray(jax.device_get(x[i] if step.stacked else x))
      if step.path in (("embedding",), ("head",)):
        x = x[: config.vocab_size]
      yield tensor, step.tensor.write(x)

  counts = Counter(
    _leaf(arrays, step.path).dtype.name for step in plan for _ in step.names
  )
  fields["torch_dtype"] = counts.most_common(1)[0][0]
  made = pathlib.Path(tempfile.mkdtemp(prefix=".save-", dir=folder))
  try:
    write(made, sizes, tensors(), max_file_bytes)
    if tokenizer is not None:
      tokenizer.save(str(made / TOKENIZER))
    (made / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
  except BaseException:
    shutil.rmtree(made)
    raise
  _replace(folder, made)


def _replace(folder: pathlib.Path, made: pathlib.Path) -> None:
  """Moves the files of a checkpoint to its folder, in place of earlier ones."""
  # Without config.json no folder is read: it goes first and comes last.
  (folder / CONFIG).unlink(missing_ok=True)
  remove(folder)
  for path in sorted(made.iterdir(), key=lambda path: path.name == CONFIG):
    path.replace(folder / path.name)
  made.rmdir()


def _leaf(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def unboxed(params: Any) -> Any:
  """Arrays in place of boxes with the names of their axes."""
  return jax.tree.map(
    lambda x: x.unbox() if hasattr(x, "unbox") else x,
    params,
    is_leaf=lambda x: hasattr(x, "unbox"),
  )


def check_params(params: Any, shapes: Any) -> None:
  """Raises ValueError unless `params` has the parameters of `shapes_of`."""
  _checks.instance("params", params, Mapping)
  found = dict(_shapes_by_name(params))
  wanted = dict(_shapes_by_name(shapes))
  for name in sorted({*found, *wanted}):
    if found.get(name) != wanted.get(name):
      raise ValueError(
        f"`params` has `{name}` of shape {found.get(name)}; by `config` it "
        f"must be a floating-point array of shape {wanted.get(name)}."
      )


def _shapes_by_name(tree):
  for keys, leaf in jax.tree.leaves_with_path(tree):
    dtype = getattr(leaf, "dtype", None)
    known = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    name = "/".join(str(getattr(key, "key", key)) for key in keys)
    yield name, tuple(leaf.shape) if known else None
