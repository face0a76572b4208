"""Tokens of a text: its bytes, or those of a byte-level BPE.

A tokenizer is kept as `tokenizer.json`, the file of the package `tokenizers`,
in the folder of its run. Bytes need neither file nor package.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .data import Corpus
from .flags import BPE, UsageError

FILE = "tokenizer.json"
PIECE = 2**20  # characters that are encoded as one text
GROUP = 2**23  # characters that are encoded at once: a token takes 100 bytes


class Tokenizer:
  """Bytes as tokens.

  Attributes:
    digest: says whether two tokenizers are the same.
    pieces: the bytes of every token.
    unit: what one token is, for people.
  """

  digest = "bytes"
  unit = "byte"

  def __init__(self) -> None:
    self.pieces = [bytes([i]) for i in range(256)]

  def encode(self, texts: Iterable[bytes]) -> list[np.ndarray]:
    """The tokens of each text."""
    return [np.frombuffer(text, np.uint8) for text in texts]

  def decode(self, tokens: Iterable[int]) -> bytes:
    """The text of tokens."""
    return b"".join(self.pieces[token] for token in tokens)

  def sizes(self) -> np.ndarray:
    """The number of bytes of every token."""
    return np.array([len(piece) for piece in self.pieces])

  def save(self, folder: pathlib.Path) -> None:
    """Writes `tokenizer.json` into the folder, if there is one."""


class BPETokenizer(Tokenizer):
  """Tokens of a byte-level BPE; of text that is not UTF-8, U+FFFD is encoded.

  Args:
    content: of a `tokenizer.json`.
    where: start of the messages.

  Raises:
    UsageError: if the package is missing, or it is no byte-level BPE.
  """

  unit = "token"

  def __init__(self, content: bytes, where: str):
    package = _import(where)
    try:
      self._tokenizer = package.Tokenizer.from_buffer(content)
      decoder = json.loads(content)["decoder"]
    except Exception as error:  # The package raises Exception itself.
      raise UsageError(f"{where}: is no {FILE}: {error}.") from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._content = content
    self.digest = hashlib.sha256(content).hexdigest()[:16]
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    added = self._tokenizer.get_added_tokens_decoder()
    plain = {text for text, token in vocabulary.items() if token not in added}
    alphabet = _alphabet(package)
    decoder = decoder or {}
    kinds = [x.get("type") for x in (decoder, *decoder.get("decoders", ()))]
    if (
      "ByteLevel" not in kinds
      or not alphabet.keys() <= plain
      or not set("".join(plain)) <= alphabet.keys()
    ):
      raise UsageError(
        f"{where}: must be a byte-level BPE, with the decoder ByteLevel and a "
        "token for every byte."
      )
    self.pieces = [b""] * (max(vocabulary.values()) + 1)
    for text, token in vocabulary.items():
      if token in added:
        self.pieces[token] = text.encode()
      else:
        self.pieces[token] = bytes(alphabet[c] for c in text)

  def encode(self, texts: Iterable[bytes]) -> list[np.ndarray]:
    dtype = np.uint16 if len(self.pieces) <= 2**16 else np.int32
    found: list[list[np.ndarray]] = []
    for group in _groups(texts):
      encoded = self._tokenizer.encode_batch_fast(
        [piece for _, piece in group], add_special_tokens=False
      )
      for (first, _), encoding in zip(group, encoded, strict=True):
        if first:
          found.append([])
        found[-1].append(np.array(encoding.ids, dtype))
    return [np.concatenate(parts) for parts in found]

  def save(self, folder: pathlib.Path) -> None:
    temporary = folder / f"{FILE}.tmp"
    temporary.write_bytes(self._content)
    temporary.replace(folder / FILE)


def _import(where: str) -> Any:
  try:
    import tokenizers
  except ImportError as error:
    raise UsageError(
      f"{where}: needs the package tokenizers: pip install tokenizers"
    ) from error
  return tokenizers


def _alphabet(package: Any) -> dict[str, int]:
  """The byte that each character in a token of a byte-level BPE stands for."""
  characters = sorted(package.pre_tokenizers.ByteLevel.alphabet())
  # A printable one stands for itself, those from U+0100 on for the others.
  own = {c: ord(c) for c in characters if ord(c) < 256}
  others = sorted(set(range(256)) - set(own.values()))
  return own | dict(zip(characters[len(own) :], others, strict=True))


def _pieces(text: bytes) -> Iterator[tuple[bool, str]]:
  """Pieces of a text, at least one, and whether each one is the first."""
  characters = text.decode(errors="replace")
  for start in range(0, max(1, len(characters)), PIECE):
    yield start == 0, characters[start : start + PIECE]


def _groups(texts: Iterable[bytes]) -> Iterator[list[tuple[bool, str]]]:
  """The pieces of all texts, in lists of about GROUP characters."""
  group, size = [], 0
  for text in texts:
    for piece in _pieces(text):
      group.append(piece)
      size += len(piece[1])
      if size >= GROUP:
        yield group
        group, size = [], 0
  yield group


def train_bpe(texts: Iterable[bytes], size: int, where: str) -> BPETokenizer:
  """A byte-level BPE of `size` tokens, the same for the same texts.

  Args:
    texts: what it is trained on.
    size: of its vocabulary, more than 256.
    where: start of the messages.

  Raises:
    UsageError: if the package is missing, or there are not so many pairs.
  """
  package = _import(where)
  tokenizer = package.Tokenizer(package.models.BPE())
  byte_level = package.pre_tokenizers.ByteLevel
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = package.decoders.ByteLevel()
  trainer = package.trainers.BpeTrainer(
    vocab_size=size,
    initial_alphabet=sorted(byte_level.alphabet()),
    show_progress=False,
  )
  pieces = (piece for text in texts for _, piece in _pieces(text))
  tokenizer.train_from_iterator(pieces, trainer)
  if (most := tokenizer.get_vocab_size()) < size:
    raise UsageError(
      f"{where}: the text for training has pairs for {most:,} tokens only."
    )
  return BPETokenizer(tokenizer.to_str().encode(), where)


def open_tokenizer(
  spec: str, corpus: Corpus, trained: pathlib.Path | None = None
) -> Tokenizer:
  """The tokenizer of a run.

  Args:
    spec: "bytes", "bpe:" and the size of the vocabulary, or a path.
    corpus: what a BPE is trained on, its part for training.
    trained: file of the one that the same run has trained, if it is there.

  Raises:
    UsageError: if it cannot be read or trained.
  """
  where = f"--tokenizer {spec}"
  if spec == "bytes":
    return Tokenizer()
  if not spec.startswith(BPE):
    return _read(pathlib.Path(spec), where)
  size = int(spec.removeprefix(BPE))
  if trained is not None and trained.exists():
    tokenizer = _read(trained, str(trained))
    if (found := len(tokenizer.pieces)) != size:
      raise UsageError(
        f"{where}: the run in --out has a BPE of {found} tokens."
      )
    return tokenizer
  texts = (file.tobytes() for file in corpus.train_files())
  return train_bpe(texts, size, where)


def load_tokenizer(folder: pathlib.Path, digest: str) -> Tokenizer:
  """The tokenizer in the folder of a run, if it is the one of this digest."""
  if digest == Tokenizer.digest:
    return Tokenizer()
  path = folder / FILE
  tokenizer = _read(path, str(path))
  if tokenizer.digest != digest:
    raise UsageError(
      f"{path}: is not the tokenizer of the run: its hash was {digest}, now "
      f"{tokenizer.digest}."
    )
  return tokenizer


def _read(path: pathlib.Path, where: str) -> BPETokenizer:
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UsageError(f"{where}: {error}.") from error
  return BPETokenizer(content, where)


def encode_corpus(tokenizer: Tokenizer, corpus: Corpus, seq_len: int) -> Corpus:
  """A corpus of bytes as one of tokens.

  Args:
    tokenizer: makes them.
    corpus: bytes.
    seq_len: both parts must have at least seq_len + 1 tokens.

  Raises:
    UsageError: if they have not.
  """
  if tokenizer.unit == "byte":
    return corpus
  train, validation = (
    tokenizer.encode(file.tobytes() for file in files)
    for files in (corpus.train_files(), corpus.validation_files())
  )
  encoded = dataclasses.replace(
    corpus,
    train=np.concatenate(train),
    validation=np.concatenate(validation),
    train_sizes=[*map(len, train)],
    validation_sizes=[*map(len, validation)],
  )
  encoded.require(seq_len, tokenizer.unit)
  return encoded


@dataclasses.dataclass(frozen=True)
class Unit:
  """What losses are measured in.

  Attributes:
    name: what one token is, "byte" or "token".
    num_bytes: mean number of bytes of the tokens that are predicted.
  """

  name: str = Tokenizer.unit
  num_bytes: float = 1.0

  def bits_per_byte(self, nats: Any) -> Any:
    """A loss in nats per token as bits per byte."""
    return nats / (self.num_bytes * math.log(2))

  def describe(self, nats: float) -> str:
    """A loss in nats per token, for people."""
    token = "" if self.name == "byte" else f"{nats:.4f} nats/{self.name}, "
    return (
      f"{token}{nats / self.num_bytes:.4f} nats/byte "
      f"({self.bits_per_byte(nats):.4f} bits/byte)"
    )


def unit_of(tokenizer: Tokenizer, labels: Sequence[int] | np.ndarray) -> Unit:
  """The unit of the losses of these tokens; negative ones do not count."""
  predicted = np.asarray(labels)
  mean = tokenizer.sizes()[predicted[predicted >= 0]].mean()
  return Unit(tokenizer.unit, float(mean))
