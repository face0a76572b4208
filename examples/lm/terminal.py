"""What the commands show at a terminal, and what Ctrl-C does to them."""

import codecs
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any


def printable(text: str, keep: str = "") -> str:
  """`text` with U+FFFD for what could control the terminal.

  Args:
    text: any text, such as the name of a file.
    keep: control characters that stay.
  """
  return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def make_printer() -> Callable[[bytes], None]:
  """A function that prints bytes as they come; an empty call prints the rest.

  A character is printed once its last byte has come. Invalid UTF-8 is printed
  as U+FFFD, and so are control characters, which could control the terminal.
  """
  decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def show(data: bytes) -> None:
    text = decoder.decode(data, final=not data)
    print(printable(text, keep="\n\t"), end="", flush=True)

  return show


def warn(message: str) -> None:
  """Prints a warning as one line on standard error."""
  print(f"warning: {printable(message)}", file=sys.stderr)


def prepare_output() -> None:
  """Prints "?" for what the terminal lacks, and every line at once."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace", line_buffering=True)


class StopRequest:
  """While it is entered: what SIGINT and SIGTERM do.

  They end the process at once: with one line, and 128 + the signal as the exit
  code. With `wait`, the first one only sets `signal`.

  A thread of its own handles them. Python would do so in the main thread and
  between two of its instructions, so not before XLA has compiled, and raise a
  KeyboardInterrupt, which callbacks lose and which jax may not survive.

  Attributes:
    signal: number of the first signal, or 0.
  """

  def __init__(self, message: str, wait: bool = False):
    self.signal = 0
    self._message = message
    self._wait = wait

  def __enter__(self) -> "StopRequest":
    self._numbers, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    self._wakeup = wakeup
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    self._fd_before = signal.set_wakeup_fd(
      wakeup.fileno(), warn_on_full_buffer=False
    )
    self._before = {
      number: signal.signal(number, self._handle)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _handle(self, number: int, frame: Any) -> None:
    self.signal = self.signal or number

  def _listen(self) -> None:
    wait = self._wait
    while data := self._numbers.recv(1):  # Nothing comes once it is closed.
      number = data[0]
      if number not in (signal.SIGINT, signal.SIGTERM):
        continue
      if wait:
        wait = False
        continue
      # Neither `print` nor `sys.exit`: the main thread may be in the midst of
      # printing or of compiling.
      os.write(2, f"{self._message}\n".encode())
      os._exit(128 + number)

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._fd_before)
    self._wakeup.close()
    self._thread.join()
    self._numbers.close()
