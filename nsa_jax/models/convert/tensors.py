"""Tensors in safetensors files: names, shapes, one array at a time.

What the tensors mean is in `families`.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")
# Of jax.numpy, whose bfloat16 NumPy knows by then.
_DTYPES = {
  "F64": jnp.dtype(jnp.float64),
  "F32": jnp.dtype(jnp.float32),
  "F16": jnp.dtype(jnp.float16),
  "BF16": jnp.dtype(jnp.bfloat16),
}


class Entry(NamedTuple):
  """A tensor in a file.

  Attributes:
    file: name of the file.
    shape: of the array.
    dtype: name of its type in the file.
  """

  file: str
  shape: tuple[int, ...]
  dtype: str


def import_extra(package: str, why: str) -> Any:
  """A package of the extra `checkpoints`.

  Raises:
    ImportError: if it is missing; says what to install.
  """
  try:
    return __import__(package, fromlist=["*"])
  except ImportError as error:
    raise ImportError(
      f"{why} needs the package {package.split('.')[0]}: "
      'pip install "nsa-jax[checkpoints]"'
    ) from error


class Reader:
  """The tensors of a folder; files stay open until `close`.

  Attributes:
    entries: the tensors by name.

  Raises:
    ValueError: if there is no safetensors file, one that the index names is
      missing, or a tensor is in two files.
    ImportError: if the package safetensors is missing.
  """

  def __init__(self, folder: pathlib.Path):
    package = import_extra("safetensors", "Reading a checkpoint")
    self._stack = contextlib.ExitStack()
    self._files: dict[str, Any] = {}
    self.entries: dict[str, Entry] = {}
    with contextlib.ExitStack() as failed:
      failed.callback(self.close)
      for name in _files(folder):
        path = folder / name
        try:
          opened = package.safe_open(path, framework="numpy")
          file = self._stack.enter_context(opened)
        except (OSError, package.SafetensorError) as error:
          raise ValueError(f"{path} cannot be read: {error}.") from error
        self._files[name] = file
        self._add(name, file)
      failed.pop_all()

  def _add(self, name, file):
    for tensor in file.keys():  # noqa: SIM118, no mapping
      if tensor in self.entries:
        raise ValueError(
          f"The tensor `{tensor}` is in two files: "
          f"{self.entries[tensor].file} and {name}."
        )
      part = file.get_slice(tensor)
      shape = tuple(part.get_shape())
      self.entries[tensor] = Entry(name, shape, part.get_dtype())

  def dtype(self, name: str) -> jnp.dtype:
    """The dtype of a tensor.

    Raises:
      NotImplementedError: if it is none of those of parameters.
    """
    dtype = self.entries[name].dtype
    if dtype not in _DTYPES:
      raise NotImplementedError(
        f"The tensor `{name}` has the type {dtype}; nsa_jax reads "
        f"{', '.join(_DTYPES)}."
      )
    return _DTYPES[dtype]

  def read(self, name: str) -> np.ndarray:
    """The array, on the host."""
    return self._files[self.entries[name].file].get_tensor(name)

  def close(self) -> None:
    """Closes the files."""
    self._stack.close()


def _files(folder: pathlib.Path) -> list[str]:
  """Names of the files of a checkpoint."""
  index = folder / INDEX
  if index.exists():
    try:
      places = json.loads(index.read_text())["weight_map"]
      names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
      raise ValueError(
        f"{index} must hold an object of JSON whose `weight_map` has the file "
        f"of every tensor: {type(e).__name__}: {e}."
      ) from e
  elif (folder / SINGLE).exists():
    names = [SINGLE]
  else:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
  missing = [name for name in names if not (folder / name).exists()]
  if missing or not names:
    raise ValueError(
      f"{folder} must have {missing[0] if missing else SINGLE}"
      f"{f', which {INDEX} names' if missing else ''}."
    )
  return names


def write(
  folder: pathlib.Path,
  sizes: Mapping[str, int],
  tensors: Iterator[tuple[str, np.ndarray]],
  max_file_bytes: int,
) -> None:
  """Writes tensors in order, one file in memory at a time.

  Args:
    folder: where to.
    sizes: bytes of every tensor, in the same order.
    tensors: names and arrays.
    max_file_bytes: what a file holds at most, unless it is one tensor.
  """
  package = import_extra("safetensors.numpy", "Writing a checkpoint")
  parts: list[list[str]] = [[]]
  size = 0
  for name, more in sizes.items():
    if parts[-1] and size + more > max_file_bytes:
      parts.append([])
      size = 0
    parts[-1].append(name)
    size += more
  places: dict[str, str] = {}
  for i, names in enumerate(parts):
    file = SINGLE
    if len(parts) > 1:
      file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
    held = {}
    for name in names:
      found, array = next(tensors)
      if found != name:
        raise ValueError(f"`tensors` has {found!r} in place of {name!r}.")
      # The file has the bytes as they lie.
      held[name] = np.ascontiguousarray(array)
    # transformers reads no file without this.
    package.save_file(held, folder / file, metadata={"format": "pt"})
    places |= dict.fromkeys(names, file)
  if len(parts) > 1:
    index = {
      "metadata": {"total_size": sum(sizes.values())},
      "weight_map": places,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def remove(folder: pathlib.Path) -> None:
  """Removes the files that `write` has made in a folder before."""
  for path in list(folder.iterdir()):
    if path.name in (SINGLE, INDEX) or _PART.fullmatch(path.name):
      path.unlink()
