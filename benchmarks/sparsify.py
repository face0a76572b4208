"""What becomes of a dense model that is made sparse and trained on.

    python -m benchmarks.sparsify
    python -m benchmarks.sparsify --minutes 9
    python -m benchmarks.sparsify --checkpoint SmolLM2-135M --name smollm2
    python -m benchmarks.sparsify --quick

Trains a model with full attention on the text of `benchmarks.quality`, whose
study says the rest. `to_nsa` then makes layers sparse, and before any further
training the tables have the distance of the logits to the dense ones, in rows
of two lengths: by the number of sparse layers, and by the size of the blocks
and who selects them. At last the dense model and sparse ones are trained on, on
the same new tokens: as they are, with other gates, phi or choice of blocks,
with the first layer left dense, and "distilled", with the loss plus the KL
divergence to the dense model in every token. That is an alignment with the full
attention as it was, of the whole model at once; the loss of SSA (arXiv
2511.20102) aligns each layer with full attention over its own keys, which goes
on learning.

`--checkpoint` measures the distances of a model that others have trained, a
folder for `nsa_jax.load`, on the same text, and trains nothing.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import nsa_jax
from benchmarks import harness, quality, trials
from examples.lm import data, train
from examples.lm.flags import UsageError
from nsa_jax import NSAConfig, TransformerLM, unstack_layers
from nsa_jax.models.convert import to_nsa

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Keyword arguments of `to_nsa` by kind, and perhaps a selector; None for the
# dense model.
KINDS: dict[str, dict[str, Any] | None] = {
  "dense": None,
  "sparse": {},
  "sparse, equal gates": {"gates": (0.5, 0.5, 0.5)},
  "sparse, phi learns": {"compression": "weighted"},
  "sparse, by means of 8": quality.CHANGES["by means of 8"],
  "sparse, by means of 4": quality.CHANGES["by means of 4"],
  "sparse, distilled": {},
  "sparse, first layer dense": {},
}
# What a query reads, and who selects it, when distances are measured.
BLOCKS: dict[str, NSAConfig | None] = {
  "those of the model": None,
  **{
    name: quality.CHANGES[name]["nsa"]
    for name in ("blocks of 32", "blocks of 16", "32 blocks")
  },
}
SELECTIONS: dict[str, Any] = {
  "NSA's": None,
  **{
    name: quality.CHANGES[name]["select"]
    for name in ("by means of 16", "by means of 8", "by means of 4")
  },
  "best": quality.best_blocks,
  "random": quality.random_blocks,
}
RATE = 5e-4
KL_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Trial:
  """A model that is trained on.

  Attributes:
    kind: one of KINDS.
    base: steps of the dense model before.
    base_rate: its learning rate.
    steps: further steps.
    rate: their learning rate.
    seed: of the order of the text; another one than that of the dense model.
  """

  kind: str
  base: int
  base_rate: float
  steps: int
  rate: float = RATE
  seed: int = 1

  @property
  def name(self) -> str:
    kind = re.sub(r"\W+", "_", self.kind)
    return f"sparsify-{kind}-{self.base}-{self.steps}-{self.rate:g}"


@dataclasses.dataclass(frozen=True)
class Distance:
  """Of sparse models to the dense one, before they are trained on."""

  base: int
  base_rate: float

  @property
  def name(self) -> str:
    return f"sparsify-distance-{self.base}"


def dense_trial(trial: Trial | Distance) -> quality.Trial:
  """The trial that trained the dense model."""
  return quality.Trial("full", 0, trial.base_rate, trial.base)


def make_sparse(
  study: quality.Study, dense: quality.Trial, kind: str, params: Any
) -> tuple[TransformerLM, Any]:
  """The model of a kind, and its parameters from those of the dense one."""
  model, _, _ = quality.make_init(study, dense)
  options = KINDS[kind]
  if options is None:
    return model, params
  if kind == "sparse, first layer dense":
    if model.config.scan_layers:
      model, params = unstack_layers(model, params)
    options = {"layers": range(1, model.config.num_layers)}
  return convert(model, params, **options)


def convert(
  model: TransformerLM, params: Any, select: Any = None, **options: Any
) -> tuple[TransformerLM, Any]:
  """What `to_nsa` makes of a model, with a selector."""
  config, params = to_nsa(model.config, params, **options)
  return TransformerLM(dataclasses.replace(config, select=select)), params


def kl_divergence(teacher: Any, student: Any) -> jax.Array:
  """KL(teacher | student) of logits [..., vocabulary], in nats, [...]."""
  teacher, student = (jax.nn.log_softmax(x) for x in (teacher, student))
  return (jnp.exp(teacher) * (teacher - student)).sum(axis=-1)


def make_distilling_step(
  model: TransformerLM,
  optimizer: optax.GradientTransformation,
  dense: TransformerLM,
) -> Any:
  """A step whose state has the parameters of the dense model, too."""

  def loss_fn(params, teacher, batch):
    tokens, labels = batch[:, :-1], batch[:, 1:]

    # Logits of a row at a time, again in the backward pass.
    @jax.checkpoint
    def row(tokens, labels):
      wanted = dense.apply({"params": teacher}, tokens[None])
      logits: Any = model.apply({"params": params}, tokens[None])
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, labels[None]
      )
      return losses.mean(), kl_divergence(wanted, logits).mean()

    losses, distances = jax.lax.map(lambda x: row(*x), (tokens, labels))
    return losses.mean() + distances.mean(), losses.mean()

  def step(state, batch):
    teacher = state["teacher"]
    grads, loss = jax.grad(loss_fn, has_aux=True)(
      state["params"], teacher, batch
    )
    updates, opt_state = optimizer.update(
      grads, state["opt_state"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "opt_state": opt_state, "teacher": teacher}
    return new, loss

  return step


def run_trial(
  study: quality.Study, trial: Trial, folder: pathlib.Path, stop_at: float
) -> dict[str, Any] | None:
  """Trains a model on; the arguments are those of `quality.fit`."""
  params = quality.load_params(study, dense_trial(trial), folder)
  dense, _, _ = quality.make_init(study, dense_trial(trial))
  model, start = make_sparse(study, dense_trial(trial), trial.kind, params)
  optimizer = train.make_optimizer(trial.rate, trial.steps)
  distilled = trial.kind == "sparse, distilled"

  def init():
    state = {"params": start, "opt_state": optimizer.init(start)}
    return state | ({"teacher": params} if distilled else {})

  step = train.make_train_step(model, optimizer)
  if distilled:
    step = make_distilling_step(model, optimizer, dense)
  evaluate = quality.make_evaluation(model, study.batch_size)
  fitted = quality.fit(
    study,
    trial,
    folder,
    stop_at,
    init=init,
    step_fn=jax.jit(step, donate_argnums=0),
    evaluate=evaluate,
  )
  if fitted is None:
    return None
  rows = data.validation_windows(
    quality.load_text(folder)["validation"],
    count=study.rows,
    seq_len=study.length,
  )
  result = quality.result_of(study, evaluate(fitted[0], rows), fitted[1])
  return result | {"before": float(evaluate(start, rows).mean())}


def run_distance(
  study: quality.Study, trial: Distance, folder: pathlib.Path, stop_at: float
) -> dict[str, Any]:
  """The distances of the dense model of a trial."""
  del stop_at  # It is quick.
  params = quality.load_params(study, dense_trial(trial), folder)
  model, _, _ = quality.make_init(study, dense_trial(trial))
  text = quality.load_text(folder)["validation"]
  return measure_distances(model, params, text, study.length)


def measure_checkpoint(
  study: quality.Study, args: argparse.Namespace
) -> dict[str, Any]:
  """The distances of the model in the folder `--checkpoint`.

  Raises:
    UsageError: if the folder has no tokenizer, or there is too little text.
  """
  config, model, params, tokenizer = nsa_jax.load(
    args.checkpoint, scan_layers=True
  )
  if tokenizer is None:
    raise UsageError(f"--checkpoint {args.checkpoint} has no tokenizer.json")
  _, texts = quality.read_sources(args.corpus, args.max_bytes)
  encoded = tokenizer.encode_batch(
    [text.decode(errors="replace") for text in texts], add_special_tokens=False
  )
  text = np.concatenate([np.zeros(0, np.int32), *(x.ids for x in encoded)])
  length = study.length
  if config.rope is not None:
    length = min(length, config.rope.original_max_position)
  if len(text) <= length:
    raise UsageError(
      f"--corpus {args.corpus}: {len(text)} tokens of validation are too few "
      f"for rows of {length}."
    )
  return measure_distances(model, params, text.astype(np.int32), length)


def measure_distances(
  model: TransformerLM, params: Any, text: np.ndarray, longest: int
) -> dict[str, Any]:
  """KL to the dense model: by the number of sparse layers, and by blocks.

  Args:
    model: the dense one.
    params: its parameters.
    text: tokens.
    longest: the length of a row; the other length is a quarter of it.
  """
  dense = model, params
  if model.config.scan_layers:  # Some layers become sparse, others do not.
    model, params = unstack_layers(model, params)
  layers = model.config.num_layers

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def measure(model, sparse, params, made, row):
    tokens = row[None, :-1]
    wanted = model.apply({"params": params}, tokens)
    return kl_divergence(wanted, sparse.apply({"params": made}, tokens))

  def distance(rows, model, params, **options):
    sparse, made = convert(model, params, **options)
    kl = [measure(model, sparse, params, made, row).mean() for row in rows]
    return float(np.mean(kl))

  by_layers, by_blocks = [], []
  for length in (longest // 4, longest):
    rows = data.validation_windows(text, count=KL_ROWS, seq_len=length)
    for gates in ((0.05, 0.9, 0.05), (0.5, 0.5, 0.5)):
      for count in sorted({1, layers // 2, layers - 1, layers}):
        last = range(layers - count, layers)
        kl = distance(rows, model, params, layers=last, gates=gates)
        by_layers.append([length, list(gates), count, kl])
        print(by_layers[-1], flush=True)
    for blocks, nsa in BLOCKS.items():
      for selection, select in SELECTIONS.items():
        kl = distance(rows, *dense, select=select, nsa=nsa)
        by_blocks.append([length, blocks, selection, kl])
        print(by_blocks[-1], flush=True)
  return {
    "by layers": by_layers,
    "by blocks": by_blocks,
    "device": jax.devices()[0].device_kind,
  }


def tables(
  study: quality.Study,
  distances: Sequence[dict[str, Any]],
  found: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
  """Distances before, and losses after further training."""
  by_layers: dict[Any, dict[str, Any]] = {}
  by_blocks: dict[Any, dict[str, Any]] = {}
  for result in distances:
    for length, gates, count, kl in result["by layers"]:
      row = by_layers.setdefault(
        (length, tuple(gates)),
        {"tokens": length, "gates": " ".join(map(str, gates))},
      )
      row[f"{count} layers"] = f"{kl:.4f}"
    for length, blocks, selection, kl in result["by blocks"]:
      row = by_blocks.setdefault(
        (length, blocks), {"tokens": length, "blocks": blocks}
      )
      row[selection] = f"{kl:.4f}"
  dense = [x["validation"] for x in found if x["kind"] == "dense"]
  after = []
  for x in found:
    row = {
      "model": x["kind"],
      "loss before": f"{x['before']:.4f}",
      "after": f"{x['validation']:.4f}",
    }
    if dense:
      row["minus dense"] = f"{x['validation'] - dense[0]:+.4f}"
    for (a, b), loss in zip(
      study.ranges(study.length), x["by position"], strict=True
    ):
      row[f"{a}-{b}"] = f"{loss:.3f}"
    after.append(row | {"tokens/s": f"{x['tokens/s']:,.0f}"})
  headings = {
    "KL to the dense model, nats per token, by the number of sparse layers "
    "(the last ones)": [*by_layers.values()],
    "The same of all layers, by blocks and how they are selected": [
      *by_blocks.values()
    ],
    "Validation loss, nats per token": after,
  }
  return {heading: rows for heading, rows in headings.items() if rows}


def plot(
  path: pathlib.Path, study: quality.Study, found: Sequence[dict[str, Any]]
) -> None:
  """Plots the validation loss over further training."""
  figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
  for x in found:
    steps, losses = zip(*[(0, x["before"]), *x["curve"]], strict=True)
    tokens = np.array(steps) * study.batch_size * study.length / 1e6
    axes.plot(tokens, losses, label=x["kind"])
  axes.set(
    xlabel="million further tokens", ylabel="validation loss, nats per token"
  )
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  result = harness.arguments(__doc__.splitlines()[0])
  quality.add_text_flags(result)
  add = result.add_argument
  add("--tokens", type=int, help="of the dense model (default: 200 million)")
  add("--rate", type=float, default=1e-3, help="its learning rate (1e-3)")
  add(
    "--more", type=int, help="further tokens (default: a quarter of --tokens)"
  )
  add(
    "--kinds",
    nargs="+",
    choices=tuple(KINDS),
    metavar="KIND",
    help=f"of {', '.join(map(repr, KINDS))} (default: all)",
  )
  add("--checkpoint", metavar="FOLDER", help="measure the distances of a model")
  add("--name", default="sparsify", help="of the records")
  return result


def run_any(
  study: quality.Study,
  fields: dict[str, Any],
  folder: pathlib.Path,
  stop_at: float,
) -> None:
  """Runs the trial with these fields and writes its result."""
  trial: Any
  run: Any
  if "base" not in fields:
    trial = quality.Trial(**fields)
    run = functools.partial(quality.run_trial, study)
  elif "kind" in fields:
    trial, run = Trial(**fields), functools.partial(run_trial, study)
  else:
    trial = Distance(**fields)
    run = functools.partial(run_distance, study)
  trials.write(folder, trial, lambda trial: run(trial, folder, stop_at))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the benchmark."""
  args = parser().parse_args(argv)
  study = quality.QUICK if args.quick else quality.STUDY
  vocab_size = 256 if args.tokenizer == "bytes" else study.vocab_size
  study = dataclasses.replace(
    study, tokens=args.tokens or study.tokens, vocab_size=vocab_size
  )
  folder = quality.text_folder(args)
  if args.trial is not None:
    if not args.quick:
      harness.require_gpu()
    run_any(study, args.trial, folder, args.stop_at)
    return
  if args.checkpoint is not None:
    if not args.quick:
      harness.require_gpu()
    try:
      result = measure_checkpoint(study, args)
    except UsageError as error:
      raise SystemExit(str(error)) from error
    harness.record(
      args.out,
      args.name,
      "A checkpoint made sparse",
      tables(study, [result], []),
      checkpoint=pathlib.Path(args.checkpoint).name,
      results=[result],
    )
    return
  queue = trials.Queue("benchmarks.sparsify", folder, args, argv)
  try:
    text = quality.prepare(study, args.corpus, args.max_bytes, folder)
  except UsageError as error:
    raise SystemExit(str(error)) from error
  trials.keep_known(folder, args.known, text)
  base = study.steps(study.tokens)
  steps = study.steps(args.more or study.tokens // 4)
  distance = Distance(base, args.rate)
  distances: list[dict[str, Any]] = []
  found: list[dict[str, Any]] = []
  if queue.run([dense_trial(distance)]):
    wanted: list[Any] = [
      Trial(kind, base, args.rate, steps) for kind in args.kinds or KINDS
    ]
    for result in queue.run([*wanted, distance]):
      (distances if "by layers" in result else found).append(result)
  harness.record(
    args.out,
    args.name,
    "A dense model made sparse",
    tables(study, distances, found),
    text=text,
    results=[*found, *distances],
  )
  if found:
    plot(args.out / f"{args.name}.png", study, found)


if __name__ == "__main__":
  main()
