"""Text in JSON lines: one document in a field of every line."""

import json
import pathlib
from typing import Any

from .flags import UsageError

SUFFIX = ".jsonl"


def read_jsonl(path: pathlib.Path, max_bytes: int, field: str) -> list[bytes]:
  """The documents of a file, up to `max_bytes` bytes of all of them.

  Args:
    path: the file; empty lines are skipped.
    max_bytes: no more is read than it takes.
    field: the one that holds the text of a document.

  Raises:
    UsageError: if a line is not as it must be.
    OSError: if the file cannot be read.
  """
  texts, left = [], max_bytes
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not left:
        break
      if not line.strip():
        continue
      where = f"--corpus: {path}, line {number}"
      text = _text(line, field, where).encode(errors="replace")[:left]
      texts.append(text)
      left -= len(text)
  return texts


def _text(line: bytes, field: str, where: str) -> str:
  try:
    document: Any = json.loads(line)
  # Also for bytes that are not UTF-8; the second one for deep nesting.
  except (ValueError, RecursionError) as error:
    raise UsageError(f"{where}: is not JSON: {error}.") from error
  if not isinstance(document, dict):
    raise UsageError(
      f"{where}: is of type {type(document).__name__}, must be an object with "
      f"the field {field!r}."
    )
  if field not in document:
    names = ", ".join(map(repr, document)) or "none"
    raise UsageError(
      f"{where}: has no field {field!r}; its fields: {names}. --text-field "
      "names the one of the text."
    )
  text = document[field]
  if not isinstance(text, str):
    raise UsageError(
      f"{where}: the field {field!r} is of type {type(text).__name__}, must be "
      "a string."
    )
  return text
