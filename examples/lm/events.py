"""Event files of a run, which TensorBoard draws while it trains."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from .flags import UsageError

Write: TypeAlias = Callable[[int, Mapping[str, float]], None]


def check_package() -> Any:
  """The package that writes event files.

  Raises:
    UsageError: if it is missing.
  """
  try:
    import tensorboardX
  except ImportError as error:
    raise UsageError(
      "--tensorboard: needs the package tensorboardX: pip install tensorboardX"
    ) from error
  return tensorboardX


@contextlib.contextmanager
def open_events(folder: pathlib.Path | None, step: int) -> Iterator[Write]:
  """A function that writes numbers of a step, by name.

  Args:
    folder: of the event files; None writes nothing.
    step: number of steps already done. TensorBoard forgets what earlier
      processes have written of later ones, which are done again.
  """
  if folder is None:
    yield lambda step, numbers: None
    return
  package = check_package()
  with package.SummaryWriter(str(folder), purge_step=step + 1) as writer:

    def write(step: int, numbers: Mapping[str, float]) -> None:
      for name, number in numbers.items():
        writer.add_scalar(name, number, step)

    yield write
