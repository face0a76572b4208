"""Where a run computes: one device, or the mesh of several processes.

`train.py` is the same for both: it asks a `Devices` for the layout of the
model, the shardings of its state, and the arrays of a batch.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from nsa_jax import Layout, PackedRow, parameter_shardings, zigzag

from .data import Batch, inputs_and_labels
from .flags import UsageError
from .sharded import AXES

AGREE_EVERY = 10  # Steps after which processes ask one another for signals.


class Devices:
  """One device: the first of this process.

  Attributes:
    layout: of the model; None on one device.
    first: whether this is the process that prints and writes.
  """

  layout: Layout | None = None
  first = True

  @property
  def text(self) -> str:
    """What it is, for people."""
    return jax.devices()[0].device_kind

  def use(self) -> Any:
    """A context for everything that is compiled."""
    return contextlib.nullcontext()

  def check(self, batch_size: int, seq_len: int, accumulate: int) -> None:
    """Raises UsageError unless the devices divide a batch."""

  def shardings(self, tree: Any) -> Any:
    """Where every array of a state goes."""
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: device, tree)

  def create(self, init: Callable[[], Any], shapes: Any) -> Any:
    """The state that `init` makes, with the shardings of `shapes`."""
    with draw_in_kernels():
      return _create(init, shapes)

  @property
  def whole(self) -> Any:
    """The sharding of a number that every device has."""
    return SingleDeviceSharding(jax.local_devices()[0])

  def rows(self, batch_size: int) -> slice:
    """The rows of a batch that this process needs."""
    return slice(0, batch_size)

  def columns(self, length: int) -> np.ndarray:
    """The places in a row whose tokens `put` takes, in order."""
    return np.arange(length)

  def put(self, batch: Batch, batch_size: int) -> Any:
    """The arrays of a batch, from the rows that this process needs."""
    return batch

  def gather(self, tree: Any) -> Any:
    """Arrays that this process can read."""
    return tree

  def any(self, step: int, signal: int) -> int:
    """A signal that stops training after this step; 0 for none."""
    return signal


class MeshDevices(Devices):
  """All devices of all processes, in a mesh.

  Args:
    sizes: devices along each of AXES.
    fsdp: split the width of the parameters over "data".
    zigzag: order the tokens so that all devices of the sequence work equally.

  Raises:
    UsageError: if there are not so many devices.
  """

  def __init__(self, sizes: Mapping[str, int], fsdp: bool, zigzag: bool):
    count = math.prod(sizes.values())
    if count != jax.device_count():
      raise UsageError(
        f"--mesh has {count} devices, but {jax.process_count()} processes have "
        f"{jax.device_count()}."
      )
    self._mesh = jax.make_mesh(
      tuple(sizes[name] for name in AXES),
      AXES,
      axis_types=(AxisType.Auto,) * len(AXES),
    )
    # An axis of one device splits nothing.
    split = {name: name if sizes[name] > 1 else None for name in AXES}
    zigzag = zigzag and sizes["sequence"] > 1
    self.layout = Layout(**split, zigzag=zigzag)
    self.first = jax.process_index() == 0
    self._sizes = sizes
    self._rules = {} if fsdp else {"embed": None, "phi": None}

  @property
  def text(self) -> str:
    sizes = ", ".join(f"{name}={self._sizes[name]}" for name in AXES)
    return (
      f"{jax.device_count()} x {jax.devices()[0].device_kind} of "
      f"{jax.process_count()} processes ({sizes})"
    )

  def use(self) -> Any:
    return jax.set_mesh(self._mesh)

  def check(self, batch_size: int, seq_len: int, accumulate: int) -> None:
    if batch_size % (parts := self._sizes["data"] * accumulate):
      raise UsageError(
        f"--batch-size {batch_size} must be a multiple of {parts}, the devices "
        "along data times --accumulate."
      )
    zigzag = self.layout is not None and self.layout.zigzag
    if seq_len % (parts := self._sizes["sequence"] * (2 if zigzag else 1)):
      raise UsageError(
        f"--seq-len {seq_len} must be a multiple of {parts}, "
        f"{'twice ' if zigzag else ''}the devices along sequence."
      )

  def shardings(self, tree: Any) -> Any:
    return parameter_shardings(tree, self._mesh, self._rules)

  def create(self, init: Callable[[], Any], shapes: Any) -> Any:
    return _create(init, shapes)

  @property
  def whole(self) -> Any:
    return NamedSharding(self._mesh, P())

  @property
  def _of_batch(self) -> NamedSharding:
    assert self.layout is not None
    return NamedSharding(self._mesh, P(self.layout.data, self.layout.sequence))

  def rows(self, batch_size: int) -> slice:
    shape = (batch_size, self._sizes["sequence"])
    indices = self._of_batch.addressable_devices_indices_map(shape).values()
    ranges = [index[0].indices(batch_size) for index in indices if index]
    return slice(min(x[0] for x in ranges), max(x[1] for x in ranges))

  def columns(self, length: int) -> np.ndarray:
    order = np.arange(length)
    if self.layout is not None and self.layout.zigzag:
      order = np.asarray(zigzag(order[None], self._sizes["sequence"]))[0]
    return order

  def put(self, batch: Batch, batch_size: int) -> PackedRow:
    tokens, labels = inputs_and_labels(batch)
    others: tuple[Any, Any] = None, None  # The model makes both itself.
    if isinstance(batch, PackedRow):
      others = batch.segment_ids, batch.positions
    length, start = tokens.shape[1], self.rows(batch_size).start
    order = self.columns(length)

    def place(x: Any) -> Any:
      def piece(index: Any) -> np.ndarray:
        rows, columns = index[0].indices(batch_size), order[index[1]]
        return x[rows[0] - start : rows[1] - start, columns]

      shape = (batch_size, length)
      return jax.make_array_from_callback(shape, self._of_batch, piece)

    return jax.tree.map(place, PackedRow(tokens, labels, *others))

  def gather(self, tree: Any) -> Any:
    whole = jax.jit(lambda tree: tree, out_shardings=self.whole)(tree)
    return jax.tree.map(np.asarray, whole)

  def any(self, step: int, signal: int) -> int:
    if jax.process_count() == 1:
      return signal
    if step % AGREE_EVERY:
      return 0
    signals = multihost_utils.process_allgather(np.int32(signal))
    return int(np.max(signals))


@contextlib.contextmanager
def draw_in_kernels() -> Iterator[None]:
  """Within it jax draws random numbers in kernels of its own on a GPU.

  The bits are the same, and XLA compiles what initialises many parameters in a
  tenth of the time. It is for one device: of several, each would draw the
  numbers of all.
  """
  name = "jax_threefry_gpu_kernel_lowering"
  before = getattr(jax.config, name)
  jax.config.update(name, True)
  try:
    yield
  finally:
    jax.config.update(name, before)


def _create(init: Callable[[], Any], shapes: Any) -> Any:
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  return jax.jit(init, out_shardings=shardings)()


def connect(args: argparse.Namespace) -> Devices:
  """Joins the other processes; the mesh of all of them.

  Raises:
    UsageError: if the others do not come, or the mesh does not fit.
  """
  if args.cpu_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.cpu_devices)
  if args.processes and args.processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Gloo connects devices when they first talk. Of two programs that run at
    # once, two processes may begin with different ones, and wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
      jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process,
        initialization_timeout=args.timeout,
        heartbeat_timeout_seconds=args.timeout,
      )
    except (RuntimeError, ValueError) as error:
      raise UsageError(
        f"the {args.processes} processes have not met: {error}"
      ) from error
  sizes = args.mesh
  if sizes is None:
    sizes = dict.fromkeys(AXES, 1) | {"data": jax.device_count()}
  devices = MeshDevices(sizes, args.fsdp, args.zigzag)
  if not devices.first:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for the whole process
  return devices
