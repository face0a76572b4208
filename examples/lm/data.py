"""Text: reading, splitting, batches, and a bigram model."""

import dataclasses
import errno
import fnmatch
import hashlib
import os
import pathlib
import stat
import sysconfig
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .flags import UsageError
from .terminal import printable

CHUNK = 2**20  # bytes that are read at once
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
    train: uint8 vector, the bytes to train on.
    validation: uint8 vector, the held-out bytes.
    skipped: why a file or folder of the corpus was skipped, by its path.
  """

  name: str
  train: np.ndarray
  validation: np.ndarray
  skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def digest(self) -> str:
    """A hash of both parts, 16 hexadecimal digits."""
    parts = (self.train.tobytes(), b"|", self.validation.tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


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
  # Opening a pipe would wait for a writer.
  if not stat.S_ISREG(path.stat().st_mode):
    raise ValueError("not a regular file")
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
) -> bytes:
  """The first `max_bytes` bytes of the files that are text, joined.

  Nothing is read that is not used. Why a file is skipped is put in `skipped`.
  """
  texts, left = [], max_bytes
  for path in paths:
    if not left:
      break
    try:
      texts.append(_read_file(root / path, left))
      left -= len(texts[-1])
    except ValueError as error:
      skipped[path] = str(error)
    except OSError as error:
      skipped[path] = _reason(error)
  return b"".join(texts)


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


def load_corpus(path: str | None, max_bytes: int, seq_len: int) -> Corpus:
  """Reads and splits the corpus.

  Args:
    path: a text file, a folder of text files, or None for the Python files of
      the standard library. The last tenth of a single file, or of a folder too
      small to hold out whole files, is for validation.
    max_bytes: maximum number of bytes used, including validation.
    seq_len: both parts must have at least seq_len + 1 bytes.

  Raises:
    UsageError: if the path does not exist, cannot be read or holds too little
      text.
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
    train = validation = b""
    if len(files) > 1:
      kept, held_out = split_files(files)
      held_out_bytes = max_bytes // HELD_OUT
      validation = _read(folder, held_out, held_out_bytes, skipped)
      if len(validation) > seq_len:
        train = _read(folder, kept, max_bytes - held_out_bytes, skipped)
    if len(train) <= seq_len:
      ordered = sorted(files, key=os.fsencode)
      text = _read(folder, ordered, max_bytes, skipped)
      cut = len(text) - len(text) // HELD_OUT
      train, validation = text[:cut], text[cut:]
  except OSError as error:
    raise UsageError(f"--corpus {path}: {error}.") from error
  note = f" Skipped {describe_skipped(skipped)}." if skipped else ""
  if not train:
    raise UsageError(f"--corpus {name}: no text in it.{note}")
  if min(len(train), len(validation)) <= seq_len:
    raise UsageError(
      f"--corpus {name}: too small: {len(train)} bytes for training and "
      f"{len(validation)} for validation; --seq-len {seq_len} needs at least "
      f"{seq_len + 1} of each.{note}"
    )
  return Corpus(
    name,
    np.frombuffer(train, np.uint8),
    np.frombuffer(validation, np.uint8),
    skipped,
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
