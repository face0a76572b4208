"""Text: reading, splitting, batches, and a bigram model.

A batch is either windows of a text, int32 [batch_size, seq_len + 1], of which
every token but the first is predicted, or packed rows of files, a PackedRow of
[batch_size, seq_len]. Tokens are bytes, or those of `tokenizer`.
"""

import dataclasses
import errno
import fnmatch
import hashlib
import os
import pathlib
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from nsa_jax import PackedRow, PackedRows

from .flags import UsageError
from .jsonl import SUFFIX, read_jsonl
from .terminal import printable

Batch: TypeAlias = np.ndarray | PackedRow

ALL = slice(None)  # rows of a batch
CHUNK = 2**20  # bytes that are read at once
MAX_TABLE = 2**24  # pairs of tokens that are counted in a table
HELD_OUT = 10  # About one file in HELD_OUT is for validation.
NOT_TEXT = {  # Parts of the standard library without library source.
  ".*",
  "__pycache__",
  "_sysconfig*",
  "config-*",
  "dist-packages",
  "encodings",  # tables of numbers
  "idlelib",
  "lib2to3",
  "pydoc_data",
  "site-packages",
  "test",
  "tests",
}


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A text in two parts.

  Attributes:
    name: its name in messages.
    train: the tokens to train on; as it is read, bytes in a uint8 vector.
    validation: the held-out tokens.
    skipped: why a file or folder of the corpus was skipped, by its path.
    train_sizes: tokens of each file in `train`, in order. A document of a
      .jsonl file counts as a file.
    validation_sizes: tokens of each file in `validation`, in order.
  """

  name: str
  train: np.ndarray
  validation: np.ndarray
  skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
  train_sizes: Sequence[int] = ()
  validation_sizes: Sequence[int] = ()

  def digest(self, with_sizes: bool = False) -> str:
    """A hash of both parts, 16 hexadecimal digits.

    Args:
      with_sizes: of the sizes of the files, too.
    """
    parts = [self.train.tobytes(), b"|", self.validation.tobytes()]
    if with_sizes:
      sizes = (list(self.train_sizes), list(self.validation_sizes))
      parts.append(f"|{sizes}".encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

  def require(self, seq_len: int, unit: str) -> None:
    """Raises UsageError unless both parts have more than seq_len tokens.

    Args:
      seq_len: tokens of a sequence.
      unit: what a token is.
    """
    note = f" Skipped {describe_skipped(self.skipped)}." if self.skipped else ""
    sizes = len(self.train), len(self.validation)
    if not sizes[0]:
      raise UsageError(f"--corpus {self.name}: no text in it.{note}")
    if min(sizes) <= seq_len:
      raise UsageError(
        f"--corpus {self.name}: too small: {sizes[0]} {unit}s for training and "
        f"{sizes[1]} for validation; --seq-len {seq_len} needs at least "
        f"{seq_len + 1} of each.{note}"
      )

  def train_files(self) -> list[np.ndarray]:
    """The files of `train`, as views of it."""
    return _split(self.train, self.train_sizes)

  def validation_files(self) -> list[np.ndarray]:
    """The files of `validation`, as views of it."""
    return _split(self.validation, self.validation_sizes)


def _split(text: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
  return np.split(text, np.cumsum(sizes, dtype=int)[:-1])


def _rank(path: str) -> int:
  """A hash of the path, the same on every machine."""
  # Its bytes on the disk: a name need not be text.
  return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big")


def split_files(paths: Iterable[str]) -> tuple[list[str], list[str]]:
  """Splits files into training and validation by a hash of their paths.

  Args:
    paths: relative paths; their order does not matter.

  Returns:
    The files for training and those for validation. Both lists are ordered by
    the hash. So a limit on the bytes takes a random sample of the corpus, not
    the first names of the alphabet, and a new file moves no other file.
  """
  ordered = sorted(paths, key=lambda path: (_rank(path), path))
  held_out = [path for path in ordered if _rank(path) % HELD_OUT == 0]
  kept = [path for path in ordered if _rank(path) % HELD_OUT]
  return kept, held_out


def _reason(error: OSError) -> str:
  """Why a file cannot be read, in a few words."""
  if error.errno == errno.ENOENT:  # It was listed, so it is a link.
    return "broken link"
  if error.errno == errno.ELOOP:
    return "circular link"
  return (error.strerror or type(error).__name__).lower()


def _list_files(
  root: pathlib.Path, suffix: str, patterns: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
  """Lists the files below a folder, without following links to folders.

  Args:
    root: the folder.
    suffix: what the names of the files end with.
    patterns: of the names of files and folders that are left out.

  Returns:
    The paths of the files, relative to `root`, and why others are skipped.
  """
  found, skipped = [], {}

  def relative(*parts: str) -> str:
    return pathlib.Path(*parts).relative_to(root).as_posix()

  def fail(error: OSError) -> None:
    if error.filename == os.fspath(root):
      raise error
    skipped[relative(error.filename)] = _reason(error)

  def keep(folder: str, names: list[str]) -> list[str]:
    kept = []
    for name in names:
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
        skipped[relative(folder, name)] = "hidden or a cache"
      else:
        kept.append(name)
    return kept

  for folder, subfolders, names in os.walk(root, onerror=fail):
    subfolders[:] = keep(folder, subfolders)
    for name in subfolders:
      if os.path.islink(os.path.join(folder, name)):
        skipped[relative(folder, name)] = "link to a folder"
    for name in keep(folder, names):
      if name.endswith(suffix):
        found.append(relative(folder, name))
  return found, skipped


def _read_file(path: pathlib.Path, max_bytes: int) -> bytes:
  """The first `max_bytes` bytes of a file.

  Raises:
    ValueError: if it is not a text file.
    OSError: if it cannot be read.
  """
  chunks, left = [], max_bytes
  with path.open("rb", buffering=0) as file:
    while left and (chunk := file.read(min(left, CHUNK))):
      if b"\0" in chunk:
        raise ValueError("not text: has a zero byte")
      chunks.append(chunk)
      left -= len(chunk)
  return b"".join(chunks)


def _read(
  root: pathlib.Path,
  paths: Sequence[str],
  max_bytes: int,
  skipped: dict[str, str],
  text_field: str,
) -> list[bytes]:
  """The files that are text, up to `max_bytes` bytes of all of them.

  Of a .jsonl file, each document is one. Nothing is read that is not used. Why
  a file is skipped is put in `skipped`.
  """
  texts, left = [], max_bytes
  for path in paths:
    if not left:
      break
    try:
      # Opening a pipe would wait for a writer.
      if not stat.S_ISREG((root / path).stat().st_mode):
        raise ValueError("not a regular file")
      if path.endswith(SUFFIX):
        found = read_jsonl(root / path, left, text_field)
      else:
        found = [_read_file(root / path, left)]
      texts += found
      left -= _num_bytes(found)
    except ValueError as error:
      skipped[path] = str(error)
    except OSError as error:
      skipped[path] = _reason(error)
  return texts


def _cut(texts: Sequence[bytes], size: int) -> tuple[list[bytes], list[bytes]]:
  """Splits texts after `size` bytes; the one that they end in is cut in two."""
  first, second = [], []
  for text in texts:
    first.append(text[:size])
    second.append(text[size:])
    size -= len(first[-1])
  return first, second


def _num_bytes(texts: Iterable[bytes]) -> int:
  return sum(map(len, texts))


def describe_skipped(skipped: Mapping[str, str]) -> str:
  """How many files were skipped, which, and why; at most 10 names a reason."""
  by_reason: dict[str, list[str]] = {}
  for path, reason in sorted(skipped.items()):
    by_reason.setdefault(reason, []).append(printable(path))
  parts = []
  for reason, names in sorted(by_reason.items()):
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    parts.append(f"{len(names):,} {reason}: {', '.join(names[:10])}{more}")
  return f"{len(skipped):,} ({'; '.join(parts)})"


def load_corpus(
  path: str | None, max_bytes: int, seq_len: int, text_field: str = "text"
) -> Corpus:
  """Reads and splits the corpus.

  Args:
    path: a text file, a folder of text files, or None for the Python files of
      the standard library. The last tenth of a single file, or of a folder too
      small to hold out whole files, is for validation. A .jsonl file holds a
      document in every line.
    max_bytes: maximum number of bytes used, including validation.
    seq_len: both parts must have at least seq_len + 1 bytes.
    text_field: the field of the text in a line of a .jsonl file.

  Raises:
    UsageError: if the path does not exist, cannot be read or holds too little
      text, or a line of a .jsonl file has no text.
  """
  skipped: dict[str, str] = {}
  try:
    if path is None:
      name = "the standard library"
      folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
      # What its patterns leave out is no part of the text.
      files, _ = _list_files(folder, ".py", NOT_TEXT)
    else:
      name, folder = path, pathlib.Path(path)
      if not folder.exists():
        raise UsageError(f"--corpus {path}: no such file or folder.")
      if folder.is_dir():
        files, skipped = _list_files(folder, "", (".*", "__pycache__"))
      else:
        folder, files = folder.parent, [folder.name]

    def read(paths: Sequence[str], max_bytes: int) -> list[bytes]:
      return _read(folder, paths, max_bytes, skipped, text_field)

    train: list[bytes] = []
    validation: list[bytes] = []
    if len(files) > 1:
      kept, held_out = split_files(files)
      held_out_bytes = max_bytes // HELD_OUT
      validation = read(held_out, held_out_bytes)
      if _num_bytes(validation) > seq_len:
        train = read(kept, max_bytes - held_out_bytes)
    if _num_bytes(train) <= seq_len:
      ordered = sorted(files, key=os.fsencode)
      texts = read(ordered, max_bytes)
      size = _num_bytes(texts)
      train, validation = _cut(texts, size - size // HELD_OUT)
  except OSError as error:
    raise UsageError(f"--corpus {path}: {error}.") from error
  corpus = Corpus(
    name,
    np.frombuffer(b"".join(train), np.uint8),
    np.frombuffer(b"".join(validation), np.uint8),
    skipped,
    [*map(len, train)],
    [*map(len, validation)],
  )
  corpus.require(seq_len, "byte")
  return corpus


class Batches(Protocol):
  """The batches to train on, with a state of JSON types for checkpoints."""

  def read(self, step: int, rows: slice = ALL) -> Batch:
    """These rows of the batch of a step; steps are read in order."""

  def get_state(self) -> Any: ...

  def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class RandomWindows:
  """Random windows of a text, by `training_batch`: without a state."""

  text: np.ndarray
  seed: int
  batch_size: int
  seq_len: int

  def read(self, step: int, rows: slice = ALL) -> np.ndarray:
    return training_batch(
      self.text,
      seed=self.seed,
      step=step,
      batch_size=self.batch_size,
      seq_len=self.seq_len,
      rows=rows,
    )

  def get_state(self) -> None:
    return None

  def set_state(self, state: None) -> None:
    pass


class ShuffledPieces(Iterator[np.ndarray]):
  """Pieces of files without end, in every epoch all of them in a new order.

  Whole files would put neighbouring pieces of a long one into the same batch.

  Args:
    files: vectors of tokens.
    size: tokens of a piece; the last one of a file may be shorter.
    seed: of the orders.
  """

  def __init__(self, files: Iterable[np.ndarray], size: int, seed: int):
    self._pieces = [
      file[start : start + size]
      for file in files
      for start in range(0, len(file), size)
    ]
    self._seed = seed
    self.set_state({"epoch": 0, "read": 0})

  def __next__(self) -> np.ndarray:
    if self._read == len(self._order):
      self.set_state({"epoch": self._epoch + 1, "read": 0})
    self._read += 1
    return self._pieces[self._order[self._read - 1]]

  def get_state(self) -> dict[str, int]:
    return {"epoch": self._epoch, "read": self._read}

  def set_state(self, state: Mapping[str, int]) -> None:
    self._epoch, self._read = state["epoch"], state["read"]
    rng = np.random.default_rng((self._seed, self._epoch))
    self._order = rng.permutation(len(self._pieces))


class PackedFiles:
  """Batches of packed rows of shuffled pieces of files.

  Args:
    files: vectors of tokens.
    seed: of the order of the pieces.
    batch_size: rows of a batch.
    seq_len: tokens of a row.
    alignment: as in `PackedRows`.
  """

  def __init__(
    self,
    files: Iterable[np.ndarray],
    *,
    seed: int,
    batch_size: int,
    seq_len: int,
    alignment: int,
  ):
    self._batch_size = batch_size
    self.rows = PackedRows(
      ShuffledPieces(files, seq_len, seed), length=seq_len, alignment=alignment
    )

  def read(self, step: int, rows: slice = ALL) -> PackedRow:
    del step  # They are read in order.
    # Where a row begins depends on those before it: all are made.
    return _stack([next(self.rows) for _ in range(self._batch_size)][rows])

  def get_state(self) -> dict[str, Any]:
    return self.rows.get_state()

  def set_state(self, state: Mapping[str, Any]) -> None:
    self.rows.set_state(state)


def _stack(rows: Iterable[PackedRow]) -> PackedRow:
  return PackedRow(*(np.stack(x) for x in zip(*rows, strict=True)))


def split_batch(batch: Batch, count: int) -> list[Batch]:
  """A batch as `count` batches of equal size."""
  if isinstance(batch, PackedRow):
    parts = zip(*(np.split(x, count) for x in batch), strict=True)
    return [PackedRow(*part) for part in parts]
  return [*np.split(batch, count)]


def take_rows(batch: Batch, rows: slice) -> Batch:
  """Some rows of a batch."""
  if isinstance(batch, PackedRow):
    return PackedRow(*(x[rows] for x in batch))
  return batch[rows]


def inputs_and_labels(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [B, T], and the token after each one; -100 for none."""
  if isinstance(batch, PackedRow):
    return batch.tokens, batch.labels
  return batch[:, :-1], batch[:, 1:]


def num_predicted(batch: Batch) -> int:
  """Number of tokens of a batch that are predicted."""
  return int(np.count_nonzero(inputs_and_labels(batch)[1] >= 0))


def training_batch(
  data: np.ndarray,
  *,
  seed: int,
  step: int,
  batch_size: int,
  seq_len: int,
  rows: slice = ALL,
) -> np.ndarray:
  """The windows of one step, int32 [batch_size, seq_len + 1], or some of them.

  They depend only on the seed and the step, so that a checkpoint needs no state
  of a reader, and no window is read but those of `rows`.
  """
  rng = np.random.default_rng((seed, step))
  start = rng.integers(0, len(data) - seq_len, size=batch_size)[rows]
  return data[start[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def validation_windows(
  data: np.ndarray, *, count: int, seq_len: int
) -> np.ndarray:
  """Evenly spaced windows, always the same: int32 [count, seq_len + 1]."""
  start = np.linspace(0, len(data) - seq_len - 1, count).astype(np.int64)
  return data[start[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def validation_rows(
  files: Sequence[np.ndarray], *, count: int, seq_len: int, alignment: int
) -> PackedRow:
  """Evenly spaced packed rows, always the same: PackedRow of [count, seq_len].

  Args:
    files: vectors of tokens, which are packed in order.
    count: number of rows; if there are fewer, some are there several times.
    seq_len: tokens of a row.
    alignment: as in `PackedRows`.
  """

  def rows() -> PackedRows:
    return PackedRows(files, length=seq_len, alignment=alignment)

  total = sum(1 for _ in rows())
  chosen = np.linspace(0, total - 1, count).astype(np.int64)
  wanted = set(chosen.tolist())
  found = {i: row for i, row in enumerate(rows()) if i in wanted}
  return _stack(found[i] for i in chosen.tolist())


def bigram_loss(
  train: np.ndarray, batch: Batch, vocab_size: int = 256
) -> float:
  """Mean loss in nats per token of a bigram model fitted to `train`.

  Args:
    train: tokens [length]; its pairs are counted with add-one smoothing.
    batch: the bigram model predicts the same tokens of it as the language
      model.
    vocab_size: tokens lie below it.
  """
  inputs, labels = inputs_and_labels(batch)
  predicted = labels >= 0
  first = inputs[predicted].astype(np.int64)
  pairs = _count(
    train[:-1].astype(np.int64) * vocab_size + train[1:],
    first * vocab_size + labels[predicted],
    vocab_size**2,
  )
  before = _count(train[:-1], first, vocab_size)
  return float(-np.log((pairs + 1) / (before + vocab_size)).mean())


def _count(values: np.ndarray, wanted: np.ndarray, size: int) -> np.ndarray:
  """How often each number of `wanted` is among `values`, all below `size`."""
  if size <= MAX_TABLE:
    return np.bincount(values, minlength=size)[wanted]
  found, counts = np.unique(values, return_counts=True)
  at = np.searchsorted(found, wanted).clip(max=len(found) - 1)
  return np.where(found[at] == wanted, counts[at], 0)
