"""What a training step keeps per token and layer under each remat policy.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m benchmarks.remat
    python -m benchmarks.remat --quick

The `base` preset, bfloat16, AdamW, one row of text. First one step of 16 layers
with 256k tokens: whether it runs, its time and its memory. Then bytes per token
and layer, by the compiler's account: from two numbers of layers and two
lengths, so that neither the parameters and their gradients nor what lives
within one layer count. The losses of the first step and of the last, which
depends on the gradients, are to agree between the policies of a table; scanned
layers start from other parameters than those one by one.

`--quick` measures tiny models, on a CPU as well, where nothing goes to a host.
"""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, train_step
from examples.lm import data, train
from nsa_jax import NSAConfig, TransformerConfig, TransformerLM
from nsa_jax.typing import RematName

POLICIES: tuple[RematName, ...] = get_args(RematName)
FEW: tuple[RematName, ...] = ("full", "offload_attention")  # with --quick
PLACES = {"scan": True, "one by one": False}  # values of `scan_layers`
LAYERS = (2, 4)
LENGTHS = (16384, 32768)
LONG, LONG_LAYERS = 262144, 16
LONG_STEPS = 2  # in wall time, after one that is not timed
TABLE, LONG_TABLE = "Bytes per token and layer", "One long row"

QUICK: dict[str, Any] = {
  "model_dim": 32,
  "mlp_dim": 48,
  "num_heads": 2,
  "head_dim": 16,
  "compression": "mean",
  "nsa": NSAConfig(8, 4, 16, num_selected=4, window=16),
  "implementation": None,
  "dtype": jnp.float32,  # XLA widens half precision on CPUs
}


class Program(NamedTuple):
  """What a compiled step depends on."""

  remat: RematName
  scan: bool
  layers: int
  length: int


def configure(
  program: Program, attention: str = "nsa", **fields: Any
) -> TransformerConfig:
  return train_step.configure(
    attention,
    num_layers=program.layers,
    remat=program.remat,
    scan_layers=program.scan,
    **fields,
  )


def compiled(wanted: Iterable[Program], **fields: Any) -> dict[Program, Any]:
  """Steps that donate the state, or the exception that compilation raised."""
  optimizer = train.make_optimizer(3e-4, 1000)
  jobs = {}
  for program in wanted:
    config = configure(program, **fields)
    step = train.make_train_step(TransformerLM(config), optimizer)
    start = functools.partial(
      train_step.init, config=config, optimizer=optimizer
    )
    windows = jax.ShapeDtypeStruct((1, program.length + 1), jnp.int32)
    arguments = jax.eval_shape(start, 0), windows
    jobs[program] = jax.jit(step, donate_argnums=0), arguments
  return harness.compile_all(jobs)


@functools.cache
def _start(config: TransformerConfig) -> Any:
  return jax.jit(
    functools.partial(
      train_step.init,
      config=config,
      optimizer=train.make_optimizer(3e-4, 1000),
    )
  )


def timed(
  step: Any, program: Program, windows: Any, steps: int, **fields: Any
) -> dict[str, float]:
  """Wall time of `steps` steps after one more, and losses."""
  # Parameters do not depend on the policy.
  state = _start(configure(program._replace(remat="none"), **fields))(0)
  state, first = step(state, windows)
  jax.block_until_ready((state, first))
  started = time.perf_counter()
  for _ in range(steps):
    state, last = step(state, windows)
  jax.block_until_ready((state, last))
  ms = 1e3 * (time.perf_counter() - started) / steps
  return {
    "step ms": ms,
    "tokens/s": 1e3 * program.length / ms,
    "first loss": float(first),
    "last loss": float(last),
  }


def host_gib(step: Any) -> float:
  return step.memory_analysis().host_temp_size_in_bytes / 2**30


def slope(sizes: Mapping[tuple[int, int], float]) -> float:
  """c of a + b layers + (c layers + d) length, through four sizes.

  Args:
    sizes: by (layers, length), for two numbers of layers and two lengths.
  """
  (few, many), (short, long) = (
    sorted(set(x)) for x in zip(*sizes, strict=True)
  )
  growth = [sizes[many, t] - sizes[few, t] for t in (short, long)]
  return (growth[1] - growth[0]) / ((many - few) * (long - short))


def bytes_kept(steps: Mapping[Program, Any]) -> dict[str, float]:
  """Bytes per token and layer, on the device and on the host."""
  found = {}
  for name, attribute in (
    ("bytes on the device", "temp_size_in_bytes"),
    ("bytes on the host", "host_temp_size_in_bytes"),
  ):
    sizes = {
      (program.layers, program.length): getattr(
        step.memory_analysis(), attribute
      )
      for program, step in steps.items()
    }
    found[name] = slope(sizes)
  return found


def attempt(row: dict[str, Any], what: Any) -> None:
  """Adds what a function returns to a row, or the reason why it failed."""
  try:
    row |= {"runs": "yes"} | what()
  except Exception as error:  # That it does not fit is a result.
    lines = str(error).splitlines() or [type(error).__name__]
    row["runs"] = f"no: {lines[0][:160]}".replace("|", "/")
  print(row, flush=True)


def working(steps: Iterable[Any]) -> None:
  """Raises the first exception that stands for a program."""
  for step in steps:
    if isinstance(step, Exception):
      raise step


def long_row(
  program: Program, step: Any, text: Any, **fields: Any
) -> dict[str, Any]:
  """Whether a step runs, its memory and its time."""
  row: dict[str, Any] = {"remat": program.remat}

  def run():
    working([step])
    row.update(train_step.memory_gib(step), **{"host GiB": host_gib(step)})
    before = _allocated("peak_bytes_in_use")
    found = timed(step, program, text, LONG_STEPS, **fields)
    peak = _allocated("peak_bytes_in_use")
    # The allocator's peak is of the whole process.
    grown = peak is not None and before is not None and peak > before
    return {"allocated peak GiB": peak if grown else None, **found}

  attempt(row, run)
  return row


def _allocated(name: str) -> float | None:
  size = (jax.devices()[0].memory_stats() or {}).get(name)
  return None if size is None else size / 2**30


def table_row(
  steps: Mapping[Program, Any], place: str, text: Any, **fields: Any
) -> dict[str, Any]:
  """Memory by the four programs of a policy; time of the largest."""
  program = max(steps, key=lambda p: (p.layers, p.length))
  row: dict[str, Any] = {"remat": program.remat, "layers": place}

  def run():
    working(steps.values())
    row.update(
      bytes_kept(steps),
      **train_step.memory_gib(steps[program]),
      **{"host GiB": host_gib(steps[program])},
    )
    return timed(steps[program], program, text, train_step.STEPS, **fields)

  attempt(row, run)
  return row


def parser():
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument(
    "--policies",
    nargs="+",
    choices=POLICIES,
    metavar="NAME",
    help=f"default: {' '.join(POLICIES)}; with --quick {' '.join(FEW)}",
  )
  result.add_argument(
    "--long",
    type=int,
    help=f"tokens of the long row (default: {LONG}, with --quick 256); 0: none",
  )
  return result


def main(argv: Sequence[str] | None = None):
  args = parser().parse_args(argv)
  if not args.quick:
    harness.require_gpu()
  fields = QUICK if args.quick else {}
  policies = args.policies or (FEW if args.quick else POLICIES)
  long = args.long
  if long is None:
    long = 256 if args.quick else LONG
  long_layers = 2 if args.quick else LONG_LAYERS
  lengths = (64, 128) if args.quick else LENGTHS
  corpus = data.load_corpus(None, 2**26, max(long, *lengths))

  def text(length: int) -> np.ndarray:
    return data.training_batch(
      corpus.train, seed=0, step=0, batch_size=1, seq_len=length
    )

  tables: dict[str, list[dict[str, Any]]] = {}

  def add(table: str, row: dict[str, Any]) -> None:
    # After every row, so that a process that is killed leaves a record.
    tables.setdefault(table, []).append(row)
    harness.record(
      args.out,
      "remat",
      f"Remat policies: {LONG_TABLE.lower()} of {long} tokens in "
      f"{long_layers} layers, scanned; bytes and time of {lengths[1]} tokens "
      f"in {LAYERS[1]} layers",
      tables,
      pool_gib=_allocated("bytes_limit"),
    )

  # All that "none" keeps of 256k tokens would take 120 GB.
  wanted = [
    Program(name, True, long_layers, long)
    for name in policies
    if long and name != "none"
  ]
  started = time.perf_counter()
  for program, step in compiled(wanted, **fields).items():
    add(LONG_TABLE, long_row(program, step, text(long), **fields))
  print(f"{time.perf_counter() - started:.0f} s", flush=True)
  for place, scan in PLACES.items():
    steps = compiled(
      [
        Program(name, scan, layers, length)
        for name in policies
        for layers in LAYERS
        for length in lengths
      ],
      **fields,
    )
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    for name in policies:
      own = {p: step for p, step in steps.items() if p.remat == name}
      add(TABLE, table_row(own, place, text(lengths[1]), **fields))


if __name__ == "__main__":
  main()
