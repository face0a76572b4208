"""Text: reading, splitting, batches, and a bigram model."""

import dataclasses
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Sequence

import numpy as np

from .flags import UsageError

HELD_OUT = 10  # About one file in HELD_OUT is for validation.
NOT_TEXT = {  # Folders of the standard library without library source.
  "__pycache__",
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
    train: uint8 vector, the bytes to train on.
    validation: uint8 vector, the held-out bytes.
  """

  name: str
  train: np.ndarray
  validation: np.ndarray

  def digest(self) -> str:
    """A hash of both parts, 16 hexadecimal digits."""
    parts = (self.train.tobytes(), b"|", self.validation.tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _rank(path: str) -> int:
  """A hash of the path, the same on every machine."""
  return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


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


def _list_files(root: pathlib.Path, suffix: str, skip: set[str]) -> list[str]:
  """Paths below `root`, relative to it, without hidden files and `skip`."""
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [
      name
      for name in subfolders
      if name not in skip and not name.startswith((".", "config-"))
    ]
    for name in names:
      if name.endswith(suffix) and not name.startswith((".", "_sysconfig")):
        path = pathlib.Path(folder, name).relative_to(root)
        found.append(path.as_posix())
  return found


def _read(root: pathlib.Path, paths: Sequence[str], max_bytes: int) -> bytes:
  """The first `max_bytes` bytes of the files that are text, joined."""
  texts, size = [], 0
  for path in paths:
    if size >= max_bytes:
      break
    text = (root / path).read_bytes()
    if b"\0" not in text:  # A file with a zero byte is not text.
      texts.append(text)
      size += len(text)
  return b"".join(texts)[:max_bytes]


def load_corpus(path: str | None, max_bytes: int, seq_len: int) -> Corpus:
  """Reads and splits the corpus.

  Args:
    path: a text file, a folder of text files, or None for the Python files of
      the standard library. The last tenth of a single file, or of a folder too
      small to hold out whole files, is for validation.
    max_bytes: maximum number of bytes used, including validation.
    seq_len: both parts must have at least seq_len + 1 bytes.

  Raises:
    UsageError: if the path does not exist or holds too little text.
  """
  if path is None:
    name = "the standard library"
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = _list_files(folder, ".py", NOT_TEXT)
  else:
    name, folder = path, pathlib.Path(path)
    if not folder.exists():
      raise UsageError(f"--corpus {path}: no such file or folder.")
    if folder.is_file():
      folder, files = folder.parent, [folder.name]
    else:
      files = _list_files(folder, "", {"__pycache__"})

  try:
    kept, held_out = split_files(files)
    held_out_bytes = max_bytes // HELD_OUT
    validation = _read(folder, held_out, held_out_bytes)
    train = _read(folder, kept, max_bytes - held_out_bytes)
    if min(len(train), len(validation)) <= seq_len:
      text = _read(folder, sorted(files), max_bytes)
      cut = len(text) - len(text) // HELD_OUT
      train, validation = text[:cut], text[cut:]
  except OSError as error:
    raise UsageError(f"--corpus {name}: {error}.") from error
  if not train:
    raise UsageError(f"--corpus {name}: no text in it.")
  if min(len(train), len(validation)) <= seq_len:
    raise UsageError(
      f"--corpus {name}: too small: {len(train)} bytes for training and "
      f"{len(validation)} for validation; --seq-len {seq_len} needs at least "
      f"{seq_len + 1} of each."
    )
  return Corpus(
    name, np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)
  )


def training_batch(
  data: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int
) -> np.ndarray:
  """The windows of one step, int32 [batch_size, seq_len + 1].

  They depend only on the seed and the step, so that a checkpoint needs no state
  of a reader.
  """
  rng = np.random.default_rng((seed, step))
  start = rng.integers(0, len(data) - seq_len, size=batch_size)
  return data[start[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def validation_windows(
  data: np.ndarray, *, count: int, seq_len: int
) -> np.ndarray:
  """Evenly spaced windows, always the same: int32 [count, seq_len + 1]."""
  start = np.linspace(0, len(data) - seq_len - 1, count).astype(np.int64)
  return data[start[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def bigram_loss(train: np.ndarray, windows: np.ndarray) -> float:
  """Mean loss in nats per byte of a bigram model fitted to `train`.

  Args:
    train: uint8 [length]; its pairs are counted with add-one smoothing.
    windows: [count, seq_len + 1]; the bigram model predicts the same bytes as
      the language model.
  """
  pairs = train[:-1].astype(np.int64) * 256 + train[1:]
  counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + 1.0
  log_prob = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
  return float(-log_prob[windows[:, :-1], windows[:, 1:]].mean())
