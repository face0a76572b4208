"""Whether models find what stands far back, with sparse and full attention.

    python -m benchmarks.recall
    python -m benchmarks.recall --quick

Two tasks, each trained and tested at 2k, 8k and 32k tokens, one length after
the other with the same model, which starts with 128 tokens:

- "pairs": multi-query associative recall. Pairs of a key and a value stand at
  random places among noise. At the end all keys come again, in another order,
  and the model is to say their values.
- "needle": lines `# name = number` stand in the source of Python's standard
  library. At the end the names come again, and the model is to say the digits.

The first layer of every model is a window of two tokens: a value has to know
the key before it, which full attention does not learn in minutes. The other
layers are of the kind that is compared.

From 2k tokens on, what is asked lies farther back than the window. But a window
of 512 in each of three layers carries what it reads over about 1.5k tokens, so
what a window alone, or random blocks, can not do shows at 8k and 32k. The loss
is of the answers alone. A model goes on to the next length as soon as almost
all of its answers are right; the learning rate stays as it is after a warm-up.
That of each kind of attention is the best of `RATES`. A model that is not
trained when `--minutes` are over starts anew the next time.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks import harness, quality, trials
from examples.lm import data, train
from nsa_jax import NSAConfig, PackedRow, TransformerConfig, TransformerLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATES = (5e-4, 1e-3, 2e-3)
TASKS = ("pairs", "needle")
IGNORED = -100  # label of a token that is no answer
DIGITS = 5
FIRST = 2  # window of the first layer: a token and the one before it
WARMUP = 100  # steps
SOLVED = 0.999  # of the answers: training at a length ends


@dataclasses.dataclass(frozen=True)
class Study:
  """What all trials share.

  Attributes:
    model: fields of TransformerConfig.
    lengths: tokens of a row; a model is trained at one after the other.
    steps: at each of the lengths, at most.
    tokens: of a step.
    asked: pairs or lines in a row, by task, at each of the lengths.
    far: tokens between the last pair or line and the first question, likewise.
    vocab_size: of the pairs: half of it are keys, a quarter values.
    tested: rows that are tested.
    evaluations: number of tests at a length.
    kinds: as in `quality.Study`.
    rates: learning rates to choose from.
  """

  model: Mapping[str, Any]
  lengths: tuple[int, ...]
  steps: tuple[int, ...]
  tokens: int
  asked: Mapping[str, tuple[int, ...]]
  far: tuple[int, ...]
  vocab_size: int
  tested: int
  evaluations: int
  kinds: tuple[str, ...]
  rates: tuple[float, ...]

  def config(self, task: str, kind: str) -> TransformerConfig:
    vocab_size = self.vocab_size if task == "pairs" else 256
    fields = {**self.model, "vocab_size": vocab_size, **quality.fields_of(kind)}
    nsa = fields.get("nsa", NSAConfig())
    first = dataclasses.replace(nsa, window=FIRST)
    others = fields["num_layers"] - 1
    attention = fields.get("attention", "nsa")
    fields["attention"] = ("window", *[attention] * others)
    fields["layer_nsa"] = (first, *[nsa] * others)
    return TransformerConfig(**fields)


STUDY = Study(
  model={
    "num_layers": 4,
    "model_dim": 256,
    "num_heads": 16,
    "num_kv_heads": 1,
    "head_dim": 32,
    "mlp_dim": 704,
    "dtype": "bfloat16",
  },
  lengths=(128, 2048, 8192, 32768),
  steps=(4000, 2000, 1000, 1000),
  tokens=65536,
  # As many in a step of long rows as in one of short ones: with 64 pairs at
  # 32k, 128 in a step, full attention gets no farther than a third of them.
  asked={"pairs": (8, 64, 256, 1024), "needle": (2, 8, 32, 128)},
  far=(32, 640, 640, 640),  # the window and two blocks, but for the first
  vocab_size=4096,
  tested=64,
  evaluations=20,
  kinds=(*quality.STUDY.kinds, "nsa, best blocks"),
  rates=RATES,
)
QUICK = Study(
  # It compiles faster than None.
  model={**quality.QUICK.model, "implementation": "xla"},
  lengths=(96,),
  steps=(400,),
  tokens=1024,
  asked={"pairs": (8,), "needle": (1,)},
  far=(32,),
  vocab_size=64,
  tested=64,
  evaluations=2,
  kinds=("nsa", "window"),
  rates=(5e-3,),
)


def places(
  rng: np.random.Generator, rows: int, count: int, size: int, stop: int
) -> np.ndarray:
  """Starts of so many places of `size` tokens before `stop`, [rows, count].

  They do not overlap, and are not aligned with the blocks of any attention.
  """
  slots = np.tile(np.arange(stop // size - 1), (rows, 1))
  shift = rng.integers(0, size, (rows, 1))
  return shift + size * rng.permuted(slots, axis=1)[:, :count]


def make_pairs(
  rng: np.random.Generator,
  *,
  rows: int,
  length: int,
  pairs: int,
  vocab_size: int,
  far: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the first task.

  Args:
    rng: the source of randomness.
    rows: R.
    length: T.
    pairs: pairs in a row, all of which are asked for.
    vocab_size: half of it are keys, a quarter values, the rest noise.
    far: tokens between the last pair and the first question, at least.

  Returns:
    Tokens int32 [R, T], and the values after the keys that are asked for;
    IGNORED elsewhere.
  """
  quarter = vocab_size // 4
  tokens = rng.integers(3 * quarter, vocab_size, (rows, length))
  labels = np.full((rows, length), IGNORED)
  keys = rng.permuted(np.tile(np.arange(2 * quarter), (rows, 1)), axis=1)
  keys = keys[:, :pairs]
  values = rng.integers(2 * quarter, 3 * quarter, (rows, pairs))
  first = length - 2 * pairs
  at = places(rng, rows, pairs, 2, first - far)
  row = np.arange(rows)[:, None]
  tokens[row, at], tokens[row, at + 1] = keys, values
  order = rng.permuted(np.tile(np.arange(pairs), (rows, 1)), axis=1)
  tokens[:, first::2] = keys[row, order]
  tokens[:, first + 1 :: 2] = labels[:, first::2] = values[row, order]
  return tokens.astype(np.int32), labels.astype(np.int32)


def make_needles(
  rng: np.random.Generator,
  text: np.ndarray,
  *,
  rows: int,
  length: int,
  lines: int,
  far: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of the second task, bytes; `make_pairs` says what is returned."""
  letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
  names = rng.choice(letters, (rows, lines, 4))
  numbers = rng.integers(ord("0"), ord("9") + 1, (rows, lines, DIGITS))

  def bytes_of(part: bytes) -> np.ndarray:
    constant = np.frombuffer(part, np.uint8)
    return np.broadcast_to(constant, (rows, lines, len(constant)))

  line = np.concatenate(
    [bytes_of(b"\n# "), names, bytes_of(b" = "), numbers, bytes_of(b"\n")], -1
  )
  size = line.shape[-1]
  starts = rng.integers(0, len(text) - length, rows)
  tokens = text[starts[:, None] + np.arange(length)].astype(np.int64)
  labels = np.full((rows, length), IGNORED)
  first = length - lines * size
  at = places(rng, rows, lines, size, first - far)
  row = np.arange(rows)[:, None, None]
  tokens[row, at[..., None] + np.arange(size)] = line
  order = rng.permuted(np.tile(np.arange(lines), (rows, 1)), axis=1)
  asked = line[np.arange(rows)[:, None], order]
  tokens[:, first:] = asked.reshape(rows, -1)
  # A digit is predicted by the token before it.
  answer = np.full(asked.shape, IGNORED)
  digits = slice(size - 1 - DIGITS, size - 1)
  answer[..., size - 2 - DIGITS : size - 2] = asked[..., digits]
  labels[:, first:] = answer.reshape(rows, -1)
  return tokens.astype(np.int32), labels.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A model to train."""

  task: str
  kind: str
  rate: float
  seed: int = 0

  @property
  def name(self) -> str:
    kind = re.sub(r"\W+", "_", self.kind)
    return f"{self.task}-{kind}-{self.rate:g}-{self.seed}"


def make_rows(
  study: Study, trial: Trial, corpus: data.Corpus | None, length: int
) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
  """A function of a seed and a number of rows; a seed < 0 is for tests."""
  at = study.lengths.index(length)
  sizes = {"length": length, "far": study.far[at]}
  asked = study.asked[trial.task][at]

  def rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((trial.seed, length, abs(seed), seed < 0))
    if trial.task == "pairs":
      return make_pairs(
        rng, rows=count, pairs=asked, vocab_size=study.vocab_size, **sizes
      )
    assert corpus is not None
    text = corpus.validation if seed < 0 else corpus.train
    return make_needles(rng, text, rows=count, lines=asked, **sizes)

  return rows


def accuracy(
  predict: Callable[..., Any],
  params: Any,
  tokens: np.ndarray,
  labels: np.ndarray,
  batch: int,
) -> float:
  """The fraction of answers, of the digits if a number, that are right."""
  right = 0
  for start in range(0, len(tokens), batch):
    part = slice(start, start + batch)
    found = np.asarray(predict(params, tokens[part]))
    right += ((found == labels[part]) & (labels[part] != IGNORED)).sum()
  return float(right / (labels != IGNORED).sum())


def run_trial(
  study: Study, trial: Trial, stop_at: float = float("inf")
) -> dict[str, Any] | None:
  """Trains and tests a model at one length after the other.

  Returns:
    The accuracy by length, and the curve of (steps at the length, length,
    accuracy); None if `stop_at` is over.
  """
  model = TransformerLM(study.config(trial.task, trial.kind))
  corpus = None
  if trial.task == "needle":
    corpus = data.load_corpus(None, 2**26, max(study.lengths))
  # How soon a model goes on must not change its learning rate.
  optimizer = train.make_optimizer(
    trial.rate, sum(study.steps), WARMUP, trial.rate
  )
  step_fn = jax.jit(train.make_train_step(model, optimizer), donate_argnums=0)

  @jax.jit
  def predict(params, tokens):
    logits: Any = model.apply({"params": params}, tokens)
    return jnp.argmax(logits, axis=-1)

  @jax.jit
  def init():
    tokens = jnp.zeros((1, study.lengths[0]), jnp.int32)
    params = model.init(jax.random.key(trial.seed), tokens)["params"]
    return {"params": params, "opt_state": optimizer.init(params)}

  state, curve, done = init(), [], 0
  for length, steps in zip(study.lengths, study.steps, strict=True):
    rows = make_rows(study, trial, corpus, length)
    batch = study.tokens // length
    tested = rows(-1, study.tested)
    every, right = -(-steps // study.evaluations), 0.0
    for step in range(1, steps + 1):
      tokens, labels = rows(done + step, batch)
      # One segment, at positions from 0 on.
      nothing: Any = None
      state, _ = step_fn(state, PackedRow(tokens, labels, nothing, nothing))
      if step % every == 0 or step == steps:
        right = accuracy(predict, state["params"], *tested, batch)
        curve.append([step, length, right])
        print(f"{trial.name}: {length} {step} {right:.3f}", flush=True)
      if step % 20 == 0 and time.time() > stop_at:
        return None
      if right >= SOLVED:
        break
    done += step
  last = {length: right for _, length, right in curve}
  return {
    "accuracy": [last[length] for length in study.lengths],
    "wrong": 1 - float(np.mean([*last.values()])),
    "curve": curve,
    "device": jax.devices()[0].device_kind,
  }


def by_task(
  results: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
  """The results of each task that has some."""
  found = {task: [x for x in results if x["task"] == task] for task in TASKS}
  return {task: own for task, own in found.items() if own}


def tables(
  study: Study, results: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
  """Accuracy at the best learning rate by task and length; and by rate."""
  found = {}
  for task, own in by_task(results).items():
    rates = trials.best(own, "wrong")
    rows = []
    for kind in study.kinds:
      for x in own:
        if x["kind"] == kind and x["rate"] == rates[kind]:
          accuracies = zip(study.lengths, x["accuracy"], strict=True)
          rows.append(
            {"attention": kind, "learning rate": x["rate"]}
            | {f"{length}": f"{y:.1%}" for length, y in accuracies}
          )
    found[f"{task}: answers that are right"] = rows
  tried: dict[str, dict[str, Any]] = {}
  for x in results:
    row = tried.setdefault(x["kind"], {"attention": x["kind"]})
    row[f"{x['task']}, {x['rate']:g}"] = f"{1 - x['wrong']:.1%}"
  return found | {"Mean over the lengths, by learning rate": [*tried.values()]}


def plot(
  path: pathlib.Path, study: Study, results: Sequence[Mapping[str, Any]]
) -> None:
  """Plots the accuracy over training, at the best learning rates."""
  found = by_task(results)
  figure, panels = plt.subplots(
    len(found),
    len(study.lengths),
    figsize=(11, 3 * len(found)),
    sharey=True,
    squeeze=False,
    constrained_layout=True,
  )
  for (task, own), line in zip(found.items(), panels, strict=True):
    rates = trials.best(own, "wrong")
    for length, axes in zip(study.lengths, line, strict=True):
      for i, kind in enumerate(study.kinds):
        for x in own:
          if x["kind"] == kind and x["rate"] == rates[kind]:
            points = [(at, y) for at, of, y in x["curve"] if of == length]
            axes.plot(
              *zip(*points, strict=True), ".-", color=f"C{i}", label=kind
            )
      axes.set(title=f"{task}, {length} tokens", ylim=(0, 1.05))
      axes.grid(alpha=0.3)
    line[0].set_ylabel("answers that are right")
  for axes in panels[-1]:
    axes.set_xlabel("steps at this length")
  panels[0, 0].legend()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  result = harness.arguments(__doc__.splitlines()[0])
  result.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
  result.add_argument("--name", default="recall", help="of the records")
  result.add_argument(
    "--kinds", nargs="+", type=quality.kind_flag, metavar="KIND"
  )
  result.add_argument("--rates", nargs="+", type=float, metavar="RATE")
  trials.add_flags(result, pathlib.Path("runs/recall"))
  return result


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the benchmark."""
  args = parser().parse_args(argv)
  study = QUICK if args.quick else STUDY
  study = dataclasses.replace(
    study,
    kinds=tuple(args.kinds or study.kinds),
    rates=tuple(args.rates or study.rates),
  )
  folder = args.runs / ("quick" if args.quick else "full")
  if args.trial is not None:
    if not args.quick:
      harness.require_gpu()
    run = functools.partial(run_trial, study, stop_at=args.stop_at)
    trials.write(folder, Trial(**args.trial), run)
    return
  wanted = [
    Trial(task, kind, rate)
    for task in args.tasks
    for kind in study.kinds
    for rate in study.rates
  ]
  queue = trials.Queue("benchmarks.recall", folder, args, argv)
  trials.keep_known(folder, args.known, {})
  found = queue.run(wanted)
  if found:
    harness.record(
      args.out,
      args.name,
      "What models find far back",
      tables(study, found),
      results=found,
    )
    plot(args.out / f"{args.name}.png", study, found)
  if len(found) < len(wanted):
    print(f"{len(found)} of {len(wanted)} models are trained; run it again")


if __name__ == "__main__":
  main()
