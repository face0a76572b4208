"""Packed rows: documents side by side in rows of one length.

Here is what happens on the host, in NumPy. What a segment may read is decided
in the ops, by the `segment_ids` of a row.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from nsa_jax import _checks

LongDocuments: TypeAlias = Literal["split", "truncate"]
NO_LABEL = -100  # No token of any vocabulary, so that its loss is 0.


class PackedRow(NamedTuple):
  """A row of T tokens, or a batch of rows once they are stacked.

  Attributes:
    tokens: int32 [T]; 0 at padding.
    labels: int32 [T], the next token of the same document; -100 at the last
      token of a document and at padding.
    segment_ids: int32 [T]: 1, 2, ... in the order of the row; 0 at padding.
    positions: int32 [T], from 0 on in every segment; 0 at padding.
  """

  tokens: np.ndarray
  labels: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray


class PackingReport(NamedTuple):
  """What the rows so far hold, in tokens.

  Attributes:
    rows: number of rows.
    tokens: tokens of documents in them.
    padding: the rest of these rows.
    truncated: tokens of documents that were left out by "truncate".
  """

  rows: int = 0
  tokens: int = 0
  padding: int = 0
  truncated: int = 0

  @property
  def padding_fraction(self) -> float:
    """Padding as a fraction of all tokens in the rows; 0.0 without rows."""
    return self.padding / max(self.tokens + self.padding, 1)


class PackedRows(Iterator[PackedRow]):
  """An iterator over rows into which documents are packed.

  Every document is a segment that starts at a multiple of `alignment`, so that
  a layer or a model gives it the result that it has alone, gradients included.
  A document goes into the first open row that has room for it. If none has, and
  `open_rows` rows are open, the fullest is returned to make room; a row without
  room for another document is returned at once, and the rest when the documents
  end. So documents are streamed, and the same ones always make the same rows.

  The rows need not be in the order of the documents, but the pieces of a long
  document follow one another: shuffle what should not be trained on together.

  Args:
    documents: vectors of token ids, at least 0; empty ones are skipped. If
      their iterator has `get_state` and `set_state`, as those of grain have,
      its state becomes part of the state. Otherwise `set_state` reads the
      documents from the start again, up to where the state was taken.
    length: T, tokens of a row.
    alignment: l', `NSAConfig.selection_block`; segments start at its multiples.
    open_rows: maximum number of rows that wait for more documents. More of them
      leave less padding, and are kept in the state.
    long_documents: what becomes of a document of more than T tokens: "split"
      makes segments of T tokens and one of the rest; the last label of a
      segment is then the first token of the next. "truncate" takes the first T
      tokens.

  Raises:
    ValueError: if an argument does not fit; on iteration, if a document does
      not.

  Example:
    >>> import nsa_jax
    >>> documents = [[5, 6, 7, 8, 9], [1, 2], [3]]
    >>> rows = nsa_jax.PackedRows(documents, length=12, alignment=4)
    >>> row = next(rows)
    >>> row.tokens.tolist()
    [5, 6, 7, 8, 9, 0, 0, 0, 1, 2, 0, 0]
    >>> row.labels.tolist()
    [6, 7, 8, 9, -100, -100, -100, -100, 2, -100, -100, -100]
    >>> row.segment_ids.tolist()
    [1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 0, 0]
    >>> rows.report.padding_fraction
    0.4166666666666667
  """

  def __init__(
    self,
    documents: Iterable[Any],
    *,
    length: int,
    alignment: int,
    open_rows: int = 16,
    long_documents: LongDocuments = "split",
  ):
    _checks.choice("long_documents", long_documents, get_args(LongDocuments))
    self._options: dict[str, Any] = {
      "length": _checks.static_int("length", length, 1),
      "alignment": _checks.static_int("alignment", alignment, 1),
      "open_rows": _checks.static_int("open_rows", open_rows, 1),
      "long_documents": long_documents,
    }
    self._length: int = self._options["length"]
    self._alignment: int = self._options["alignment"]
    self._documents = documents
    self._source: Any = _iterate(documents)
    self._resumes = all(
      callable(getattr(self._source, name, None))
      for name in ("get_state", "set_state")
    )
    self._source_state: Any = None  # before the current document
    self._read = 0  # documents taken from the source
    self._document = np.zeros(0, np.int32)
    self._offset = 0  # tokens of the current document that are in rows
    self._rows: list[_OpenRow] = []
    self._report = PackingReport()

  @property
  def report(self) -> PackingReport:
    """Tokens and padding of the rows so far."""
    return self._report

  def __next__(self) -> PackedRow:
    while True:
      for index, row in enumerate(self._rows):
        if row.end >= self._length:
          return self._close(index)
      size = min(self._remaining(), self._length)
      if not size:
        if self._rows:
          return self._close(0)
        raise StopIteration
      for row in self._rows:
        if row.end + size <= self._length:
          break
      else:
        # What fills a row alone takes no room from the others.
        alone = _round_up(size, self._alignment) >= self._length
        if not alone and len(self._rows) >= self._options["open_rows"]:
          ends = [row.end for row in self._rows]
          return self._close(ends.index(max(ends)))
        row = _OpenRow()
        self._rows.append(row)
      row.add(self._take(size), self._alignment)

  def get_state(self) -> dict[str, Any]:
    """The state after the rows so far, of JSON types.

    It holds the tokens of the open rows, fewer than `open_rows` T, and the
    state of the documents.
    """
    pending = self._offset < len(self._document)
    state = {
      "options": dict(self._options),
      "report": list(self._report),
      "documents": self._read - pending,
      "offset": self._offset if pending else 0,
      "rows": [
        [[segment.tokens.tolist(), segment.after] for segment in row.segments]
        for row in self._rows
      ],
    }
    if self._resumes:
      state["source"] = (
        self._source_state if pending else self._source.get_state()
      )
    return state

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from a state of `get_state`, with the very rows that followed it.

    Args:
      state: of an iterator with the same documents and options.

    Raises:
      ValueError: if it is no such state, or the documents cannot be read from
        the start again.
    """
    try:
      if not isinstance(state, Mapping):
        raise TypeError
      options = dict(state["options"])
      report = PackingReport._make(map(_count, state["report"]))
      read, offset = _count(state["documents"]), _count(state["offset"])
      source = (state["source"],) if "source" in state else ()
      rows = [
        [_Segment(_vector(tokens), int(after)) for tokens, after in segments]
        for segments in state["rows"]
      ]
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"`state`={_checks.show(state)} must be what `get_state` returns."
      ) from error
    for name, value in self._options.items():
      if options.get(name) != value:
        raise ValueError(
          f"`state` was taken with `{name}`={_checks.show(options.get(name))}, "
          f"which must be that of this iterator, {value!r}."
        )
    if bool(source) != self._resumes:
      with_, without = "`documents`", "`state`"
      if source:
        with_, without = without, with_
      raise ValueError(
        f"{with_} has a state of the documents' own, and {without} has none: "
        "they must be the same documents."
      )
    if source:
      self._source.set_state(source[0])
    else:
      self._skip(read)
    self._read, self._report = read, report
    self._document, self._offset = np.zeros(0, np.int32), 0
    if offset and self._remaining() <= offset:
      raise ValueError(
        f"`documents`[{read}] has {len(self._document)} tokens, which must be "
        f"more than `state` has of it in rows, {offset}: they must be the same "
        "documents."
      )
    self._offset = offset
    self._rows = []
    for segments in rows:
      self._rows.append(_OpenRow())
      for segment in segments:
        self._rows[-1].add(segment, self._alignment)

  def _skip(self, count: int) -> None:
    """Reads `count` documents from the start."""
    again = _iterate(self._documents)
    if again is self._source and self._read:
      raise ValueError(
        f"`documents` of type {type(again).__name__} can be read once, and "
        f"has been read up to `documents`[{self._read}]; `set_state` needs a "
        "new iterator, or documents that can be read again, such as a list."
      )
    found = sum(1 for _ in itertools.islice(again, count))
    if found < count:
      raise ValueError(
        f"`state` was taken after {count} documents; `documents` has {found}, "
        "and must be the same."
      )
    self._source = again

  def _remaining(self) -> int:
    """Tokens of the current document that are in no row yet; 0 at the end."""
    while self._offset >= len(self._document):
      if self._resumes:
        self._source_state = self._source.get_state()
      try:
        document = next(self._source)
      except StopIteration:
        return 0
      self._read += 1
      self._document, self._offset = np.zeros(0, np.int32), 0
      self._document = _vector(document, f"`documents`[{self._read - 1}]")
    return len(self._document) - self._offset

  def _take(self, size: int) -> "_Segment":
    """The next `size` tokens of the current document."""
    end = self._offset + size
    tokens, rest = self._document[self._offset : end], self._document[end:]
    self._offset = end
    if self._options["long_documents"] == "truncate" and len(rest):
      self._offset, truncated = len(self._document), len(rest)
      self._report = self._report._replace(
        truncated=self._report.truncated + truncated
      )
      rest = rest[:0]
    return _Segment(tokens, int(rest[0]) if len(rest) else NO_LABEL)

  def _close(self, index: int) -> PackedRow:
    """Removes an open row, and returns it with its padding."""
    length = self._length
    row = PackedRow(
      tokens=np.zeros(length, np.int32),
      labels=np.full(length, NO_LABEL, np.int32),
      segment_ids=np.zeros(length, np.int32),
      positions=np.zeros(length, np.int32),
    )
    start = used = 0
    for i, segment in enumerate(self._rows.pop(index).segments):
      size = len(segment.tokens)
      here = slice(start, start + size)
      row.tokens[here] = segment.tokens
      row.labels[here] = np.append(segment.tokens[1:], segment.after)
      row.segment_ids[here] = i + 1
      row.positions[here] = np.arange(size)
      start += _round_up(size, self._alignment)
      used += size
    self._report = self._report._replace(
      rows=self._report.rows + 1,
      tokens=self._report.tokens + used,
      padding=self._report.padding + length - used,
    )
    return row


class _Segment(NamedTuple):
  """Tokens of a segment, and the label of the last one."""

  tokens: np.ndarray
  after: int


class _OpenRow:
  """A row that waits for more segments.

  Attributes:
    segments: those it has.
    end: where the next one would start.
  """

  def __init__(self):
    self.segments: list[_Segment] = []
    self.end = 0

  def add(self, segment: _Segment, alignment: int) -> None:
    self.segments.append(segment)
    self.end += _round_up(len(segment.tokens), alignment)


def _round_up(size: int, alignment: int) -> int:
  return -(-size // alignment) * alignment


def _iterate(documents: Any) -> Iterator[Any]:
  # Keys of jax are iterable, but not while it traces a function.
  if not str(getattr(documents, "dtype", "")).startswith("key<"):
    try:
      return iter(documents)
    except TypeError:
      pass
  raise ValueError(
    f"`documents`={_checks.show(documents)} must be an iterable of vectors of "
    "integers."
  )


def _count(value: Any) -> int:
  return _checks.static_int("state", value, 0)


def _vector(document: Any, name: str = "`state`") -> np.ndarray:
  """Tokens as an int32 vector; `name` is for messages."""
  try:
    tokens = np.asarray(document)
  except Exception:  # Some types of jax raise others than TypeError.
    tokens = np.zeros((), object)
  if tokens.ndim == 1 and not tokens.size:  # An empty list has no integers.
    return np.zeros(0, np.int32)
  if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(
      f"{name}={_checks.show(document)} must be a vector of integers."
    )
  for worst in (tokens.min(), tokens.max()):
    if not 0 <= worst <= _checks.INT32.max:
      raise ValueError(
        f"{name} has the value {worst}; tokens must be at least 0 and fit "
        "int32."
      )
  return tokens.astype(np.int32)
