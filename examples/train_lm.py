"""Train a byte-level language model with Native Sparse Attention on real text.

    python examples/train_lm.py
    python examples/train_lm.py --corpus notes/ --steps 1000 --out runs/notes
    python examples/train_lm.py --corpus notes/ --steps 1000 --out runs/notes \
        --resume

The default corpus is the source of Python's own standard library, which every
machine that can run this has. Every tenth file is held out for validation, and
the validation loss is compared with that of a bigram model fitted on the same
training bytes. Batches are a function of the seed and the step alone, so that
a resumed run sees the data that the uninterrupted one would have seen.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm

from nsa_jax import (
  Implementation,
  NSAConfig,
  RopeConfig,
  TransformerConfig,
  TransformerLM,
  generate,
)
from nsa_jax.sampling import MIN_TEMPERATURE

Params: TypeAlias = Any
State: TypeAlias = dict[str, Any]  # "params" and "opt_state"

HELD_OUT = 10  # one file in this many is for validation
NOT_TEXT = {  # folders of the standard library that are not library source
  "__pycache__",
  "dist-packages",
  "encodings",  # tables of numbers
  "idlelib",
  "lib2to3",
  "pydoc_data",
  "site-packages",
  "test",
  "tests",
}


class UsageError(Exception):
  """Something the user can put right; shown as one line, exit code 2."""


class Recipe(NamedTuple):
  """What a preset trains with, unless a flag says otherwise."""

  seq_len: int
  batch_size: int
  steps: int
  learning_rate: float


RECIPES = {
  "tiny": Recipe(512, 8, 300, 5e-3),
  "small": Recipe(2048, 16, 5_000, 1e-3),
  "base": Recipe(8192, 16, 50_000, 3e-4),
}


# Text.


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Bytes to train on and bytes held out, both uint8 vectors."""

  name: str
  train: np.ndarray
  validation: np.ndarray

  def digest(self) -> str:
    parts = (self.train.tobytes(), b"|", self.validation.tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _rank(path: str) -> int:
  return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


def split_files(paths: Iterable[str]) -> tuple[list[str], list[str]]:
  """Training and validation files, in an order given by the names alone.

  Args:
    paths: relative paths; their order does not matter.

  Returns:
    Two lists, each ordered by a hash of the path: a cap on the bytes read then
    takes a sample of the corpus, not its first letters, and a new file moves
    no other from one part to the other.
  """
  ordered = sorted(paths, key=lambda path: (_rank(path), path))
  held_out = [path for path in ordered if _rank(path) % HELD_OUT == 0]
  kept = [path for path in ordered if _rank(path) % HELD_OUT]
  return kept, held_out


def _list_files(root: pathlib.Path, suffix: str, skip: set[str]) -> list[str]:
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [
      name
      for name in subfolders
      if name not in skip and not name.startswith((".", "config-"))
    ]
    for name in names:
      if name.endswith(suffix) and not name.startswith((".", "_sysconfig")):
        path = pathlib.Path(folder, name).relative_to(root)
        found.append(path.as_posix())
  return found


def _read(root: pathlib.Path, paths: Sequence[str], max_bytes: int) -> bytes:
  texts, size = [], 0
  for path in paths:
    if size >= max_bytes:
      break
    text = (root / path).read_bytes()
    if b"\0" not in text:  # else it is no text
      texts.append(text)
      size += len(text)
  return b"".join(texts)[:max_bytes]


def load_corpus(path: str | None, max_bytes: int, seq_len: int) -> Corpus:
  """Reads and splits the corpus.

  Args:
    path: a text file, a folder of text files, or None for the Python files of
      the standard library. A single file, or a folder too small to hold out
      whole files, gives its last tenth to validation.
    max_bytes: at most so many bytes are used, validation included.
    seq_len: both parts must hold at least seq_len + 1 bytes.

  Raises:
    UsageError: if there is no such path, or not enough text in it.
  """
  if path is None:
    name, root = "the standard library", sysconfig.get_paths()["stdlib"]
    folder = pathlib.Path(root)
    files = _list_files(folder, ".py", NOT_TEXT)
  else:
    name, folder = path, pathlib.Path(path)
    if not folder.exists():
      raise UsageError(f"--corpus {path}: no such file or folder.")
    files = _list_files(folder, "", {"__pycache__"})
    if folder.is_file():
      folder, files = folder.parent, [folder.name]

  try:
    kept, held_out = split_files(files)
    held_out_bytes = max_bytes // HELD_OUT
    validation = _read(folder, held_out, held_out_bytes)
    train = _read(folder, kept, max_bytes - held_out_bytes)
    if min(len(train), len(validation)) <= seq_len:
      text = _read(folder, sorted(files), max_bytes)
      cut = len(text) - len(text) // HELD_OUT
      train, validation = text[:cut], text[cut:]
  except OSError as error:
    raise UsageError(f"--corpus {name}: {error}.") from error
  if not train:
    raise UsageError(f"--corpus {name}: no text in it.")
  if min(len(train), len(validation)) <= seq_len:
    raise UsageError(
      f"--corpus {name}: too small: {len(train)} bytes for training and "
      f"{len(validation)} for validation; --seq-len {seq_len} needs at least "
      f"{seq_len + 1} of each."
    )
  return Corpus(
    name, np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)
  )


def training_batch(
  data: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int
) -> np.ndarray:
  """Windows of one step, int32 [batch_size, seq_len + 1].

  A function of the seed and the step alone: there is no reader whose place
  would have to be saved.
  """
  rng = np.random.default_rng((seed, step))
  start = rng.integers(0, len(data) - seq_len, size=batch_size)
  return data[start[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def validation_windows(
  data: np.ndarray, *, count: int, seq_len: int
) -> np.ndarray:
  """The same evenly spaced windows every time, [count, seq_len + 1]."""
  start = np.linspace(0, len(data) - seq_len - 1, count).astype(np.int64)
  return data[start[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def bigram_loss(train: np.ndarray, windows: np.ndarray) -> float:
  """Mean loss in nats per byte of a bigram model fitted on `train`.

  Args:
    train: uint8 [length]; pairs are counted with add-one smoothing.
    windows: [count, seq_len + 1]; the predicted bytes are those that the
      language model is scored on.
  """
  pairs = train[:-1].astype(np.int64) * 256 + train[1:]
  counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + 1.0
  log_prob = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
  return float(-log_prob[windows[:, :-1], windows[:, 1:]].mean())


# Model and optimiser.


def read_fraction(attention: str, config: NSAConfig, length: int) -> float:
  """Share of the keys that the last query reads."""
  if attention == "full":
    return 1.0
  if attention == "window":
    return min(config.window, length) / length
  compressed = max(
    0, (length - config.compression_block) // config.compression_stride + 1
  )
  selected = config.num_selected * config.selection_block
  return (compressed + selected + config.window) / length


def make_optimizer(
  learning_rate: float, steps: int
) -> optax.GradientTransformation:
  warmup = max(1, min(steps // 10, 1000))
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=learning_rate / warmup,
    peak_value=learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=learning_rate / 20,
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      schedule,
      b2=0.98,
      weight_decay=0.1,
      # Vectors, that is norm scales and biases, do not decay.
      mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ),
  )


def loss_fn(
  model: TransformerLM, params: Params, windows: jax.Array
) -> jax.Array:
  """Mean cross-entropy in nats per byte, windows [B, T + 1]."""
  logits = jnp.asarray(model.apply({"params": params}, windows[:, :-1]))
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, windows[:, 1:]
  )
  return losses.mean()


def make_train_step(
  model: TransformerLM, optimizer: optax.GradientTransformation
) -> Callable[[State, jax.Array], tuple[State, jax.Array]]:
  def train_step(state, windows):
    loss, grads = jax.value_and_grad(lambda p: loss_fn(model, p, windows))(
      state["params"]
    )
    updates, opt_state = optimizer.update(
      grads, state["opt_state"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, loss

  return train_step


# Runs.


class Run:
  """The folder of a run: checkpoints, metrics, plot and sample.

  Checkpoints are atomic (orbax writes beside and renames), so that a run that
  is killed at any time can be resumed from the last one.
  """

  def __init__(self, out: str, config: dict[str, Any], resume: bool):
    self.folder = pathlib.Path(out).absolute()
    self.metrics_path = self.folder / "metrics.jsonl"
    self.config = json.loads(json.dumps(config))
    self.metrics: list[dict[str, float]] = []
    checkpoints = self.folder / "checkpoints"
    if resume and not checkpoints.is_dir():
      raise UsageError(f"--resume: no checkpoint in {self.folder}.")
    try:
      checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UsageError(f"--out {out}: {error}.") from error
    self._manager = ocp.CheckpointManager(
      checkpoints,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=2,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
      ),
    )

  @property
  def last_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: State) -> None:
    # Before the checkpoint: metrics past the last checkpoint are dropped on
    # resume, missing ones could not be made up for.
    lines = [json.dumps(line) + "\n" for line in self.metrics]
    beside = self.metrics_path.with_suffix(".tmp")
    beside.write_text("".join(lines))
    beside.replace(self.metrics_path)
    if step != self.last_step:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          config=ocp.args.JsonSave(self.config),
        ),
      )

  def restore(self, like: State) -> tuple[int, State]:
    """The last checkpoint, and the metrics up to it.

    Raises:
      UsageError: if it was written by a run with another configuration.
    """
    step = self.last_step
    if step is None:
      raise UsageError(f"--resume: no checkpoint in {self.folder}.")
    saved = self._manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config
    if different := differences(saved, self.config):
      raise UsageError(
        f"--resume: the checkpoint in {self.folder} is of another "
        f"configuration: {'; '.join(different)}."
      )
    state = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
    ).state
    try:
      lines = self.metrics_path.read_text().splitlines()
    except OSError as error:
      raise UsageError(f"--resume: {error}.") from error
    self.metrics = [
      line for line in map(json.loads, lines) if line["step"] <= step
    ]
    return step, state

  def series(self, name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in self.metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]

  def close(self) -> None:
    self._manager.close()


def differences(
  saved: dict[str, Any], current: dict[str, Any], prefix: str = ""
) -> list[str]:
  """Names and values of the fields in which two configurations differ."""
  result = []
  for name in sorted(saved.keys() | current.keys()):
    old, new = saved.get(name), current.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      result += differences(old, new, f"{prefix}{name}.")
    elif old != new:
      result.append(f"`{prefix}{name}` was {old}, now {new}")
  return result


def run_config(
  args: argparse.Namespace, model: TransformerConfig, corpus: Corpus
) -> dict[str, Any]:
  """What must agree for a run to be resumed."""
  model_fields = dataclasses.asdict(model)
  # A run may move to another machine: same function, another program.
  del model_fields["implementation"]
  for name, value in model_fields.items():
    if name.endswith("dtype"):
      model_fields[name] = jnp.dtype(value).name
  names = ("batch_size", "learning_rate", "seed", "seq_len", "steps")
  return {
    "model": model_fields,
    "corpus": corpus.digest(),
    **{name: getattr(args, name) for name in names},
  }


def load_model(
  out: str, implementation: Implementation = None
) -> tuple[TransformerLM, Params, int]:
  """The model of a run, and the parameters and step of its last checkpoint.

  Args:
    out: folder of the run.
    implementation: of the attention; a checkpoint does not say.

  Raises:
    UsageError: if there is no checkpoint.
  """
  checkpoints = pathlib.Path(out).absolute() / "checkpoints"
  if not checkpoints.is_dir():
    raise UsageError(f"no checkpoint in {out}; train_lm.py writes them.")
  options = ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(checkpoints, options=options) as manager:
    step = manager.latest_step()
    if step is None:
      raise UsageError(f"no checkpoint in {out} yet.")
    fields = manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config["model"]
    fields["nsa"] = NSAConfig(**fields["nsa"])
    if fields["rope"] is not None:
      fields["rope"] = RopeConfig(**fields["rope"])
    model = TransformerLM(
      TransformerConfig(**fields, implementation=implementation)
    )
    # The optimiser's state stays on the disk. What is read comes to this
    # device, wherever it was written.
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      {"params": shapes["params"]},
    )
    restore = ocp.args.PyTreeRestore(
      item=like,
      restore_args=ocp.checkpoint_utils.construct_restore_args(like),
      partial_restore=True,
    )
    state = manager.restore(step, args=ocp.args.Composite(state=restore)).state
  return model, state["params"], step


def plot(run: Run, bigram: float, title: str) -> pathlib.Path:
  """Draws training and validation loss over the steps."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
  steps, losses = run.series("train_loss")
  width = max(1, len(losses) // 40)
  kernel = np.ones(width) / width
  axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
  smooth = np.convolve(losses, kernel, mode="valid")
  first = width // 2  # each mean stands at the middle of its steps
  axes.plot(
    steps[first : first + len(smooth)],
    smooth,
    color="C0",
    label=f"training (mean of {width} steps)" if width > 1 else "training",
  )
  axes.plot(
    *run.series("validation_loss"), "o-", color="C1", label="validation"
  )
  axes.axhline(
    bigram, color="0.3", linestyle="--", label="bigram model, validation"
  )
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per byte)")
  axes.secondary_yaxis(
    "right",
    functions=(
      lambda nats: np.divide(nats, math.log(2)),
      lambda bits: np.multiply(bits, math.log(2)),
    ),
  ).set_ylabel("bits per byte")
  axes.set_title(title, fontsize="medium")
  axes.grid(alpha=0.3)
  axes.legend()
  path = run.folder / "loss.png"
  figure.savefig(path, dpi=150)
  plt.close(figure)
  return path


class StopRequest:
  """Turns the first SIGINT or SIGTERM into a stop after the current step.

  A second one acts as if this were not here.
  """

  def __enter__(self) -> "StopRequest":
    self.signal = 0
    self._before = {
      number: signal.signal(number, self._handle)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _handle(self, number: int, frame: Any) -> None:
    self.signal = number
    self.__exit__()

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


def in_bits(nats: float) -> str:
  return f"{nats:.4f} nats/byte ({nats / math.log(2):.4f} bits/byte)"


def train(args: argparse.Namespace) -> int:
  """Trains as the arguments say.

  Returns:
    The exit code: 0, or 128 + the signal that stopped the run.
  """
  started = time.perf_counter()
  config = TransformerConfig.preset(
    args.preset,
    attention=args.attention,
    dtype=jnp.dtype(args.dtype),
    implementation=args.implementation,
  )
  fraction = read_fraction(args.attention, config.nsa, args.seq_len)
  if args.attention == "nsa" and fraction >= 0.5:
    raise UsageError(
      f"--seq-len {args.seq_len}: too short for the preset {args.preset}: the "
      f"last query would read {fraction:.1%} of the keys, and sparse attention "
      f"must read less than half."
    )
  corpus = load_corpus(args.corpus, args.max_bytes, args.seq_len)
  windows = validation_windows(
    corpus.validation,
    count=args.eval_batches * args.batch_size,
    seq_len=args.seq_len,
  )
  bigram = bigram_loss(corpus.train, windows)
  eval_batches = np.split(windows, args.eval_batches)

  model = TransformerLM(config)
  optimizer = make_optimizer(args.learning_rate, args.steps)

  def init() -> State:
    tokens = jnp.zeros((1, args.seq_len), jnp.int32)
    params = model.init(jax.random.key(args.seed), tokens)["params"]
    return {"params": params, "opt_state": optimizer.init(params)}

  # What the implementation cannot do shows here, before a folder is made.
  shapes = jax.eval_shape(init)
  run = Run(args.out, run_config(args, config, corpus), args.resume)
  if run.last_step is not None and not args.resume:
    raise UsageError(
      f"--out {args.out}: holds a run of {run.last_step} steps already; "
      "continue it with --resume, or choose another folder."
    )
  if args.resume:
    step, state = run.restore(shapes)
  else:
    step, state = 0, jax.jit(init)()

  count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
  device = jax.devices()[0]
  print(
    f"text       {corpus.name}: {len(corpus.train):,} bytes for training, "
    f"{len(corpus.validation):,} for validation\n"
    f"model      {args.preset}, {count:,} parameters, {args.attention} "
    f"attention, {args.dtype}, on {device.device_kind}\n"
    f"sparsity   the last query of {args.seq_len} reads {fraction:.1%} of the "
    f"keys\n"
    f"bigram     {in_bits(bigram)} on the validation text\n"
    f"run        {run.folder}, steps {step} to {args.steps}, "
    f"{args.batch_size} x {args.seq_len} bytes each",
    flush=True,
  )

  batch_shape = jax.ShapeDtypeStruct(windows[: args.batch_size].shape, "int32")
  compile_started = time.perf_counter()
  train_step = (
    jax.jit(make_train_step(model, optimizer), donate_argnums=0)
    .lower(shapes, batch_shape)
    .compile()
  )
  eval_step = (
    jax.jit(lambda params, batch: loss_fn(model, params, batch))
    .lower(shapes["params"], batch_shape)
    .compile()
  )
  print(f"compiled   in {time.perf_counter() - compile_started:.1f} s")

  pending: list[tuple[int, jax.Array]] = []  # losses still on the device

  def flush() -> None:
    run.metrics += [
      {"step": at, "train_loss": float(loss)} for at, loss in pending
    ]
    pending.clear()
    if run.metrics and not math.isfinite(run.metrics[-1]["train_loss"]):
      raise UsageError(
        f"the training loss is not finite at step {step}; a lower "
        "--learning-rate may help."
      )

  with (
    StopRequest() as request,
    tqdm.tqdm(total=args.steps, initial=step, unit="step") as bar,
  ):
    mark, mark_time = step, time.perf_counter()
    while step < args.steps and not request.signal:
      batch = training_batch(
        corpus.train,
        seed=args.seed,
        step=step,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
      )
      state, loss = train_step(state, batch)
      step += 1
      pending.append((step, loss))
      bar.update()
      last = step == args.steps
      if step % 10 == 0 or last:
        flush()
        now = time.perf_counter()
        speed = (
          (step - mark) * args.batch_size * args.seq_len / (now - mark_time)
        )
        bar.set_postfix_str(
          f"loss {run.metrics[-1]['train_loss']:.3f}, {speed:,.0f} tokens/s"
        )
        mark, mark_time = step, now
      if step % args.eval_every == 0 or last:
        flush()
        pause = time.perf_counter()
        validation = float(
          np.mean([eval_step(state["params"], b) for b in eval_batches])
        )
        run.metrics[-1]["validation_loss"] = validation
        bar.write(f"step {step}: validation {in_bits(validation)}")
        mark_time += time.perf_counter() - pause
      if step % args.checkpoint_every == 0 or last:
        flush()
        pause = time.perf_counter()
        run.save(step, state)
        mark_time += time.perf_counter() - pause
    flush()
    run.save(step, state)

  try:
    if step < args.steps:
      print(
        f"stopped at step {step} of {args.steps}; continue with\n"
        f"  {resume_command()}"
      )
      return 128 + request.signal
    sample_path = write_sample(args, model, state["params"], corpus, run)
    validation = run.series("validation_loss")[1][-1]
    plot_path = plot(
      run, bigram, f"{args.preset} preset, {args.attention} attention"
    )
  finally:
    run.close()
  verdict = "beats" if validation < bigram else "does NOT beat"
  print(
    f"validation {in_bits(validation)}\n"
    f"bigram     {in_bits(bigram)}: the model {verdict} it\n"
    f"took       {time.perf_counter() - started:.0f} s\n"
    f"metrics    {run.metrics_path}\n"
    f"plot       {plot_path}\n"
    f"sample     {sample_path}\n"
    f"checkpoint {run.folder / 'checkpoints' / str(step)}"
  )
  return 0


def resume_command() -> str:
  words = [word for word in sys.argv if word != "--resume"]
  return shlex.join(["python", *words, "--resume"])


def write_sample(
  args: argparse.Namespace,
  model: TransformerLM,
  params: Params,
  corpus: Corpus,
  run: Run,
) -> pathlib.Path:
  """Continues a prompt, prints the text and writes it to sample.txt."""
  if args.prompt is None:
    prompt = corpus.validation[: min(64, args.seq_len // 2)]
  else:
    prompt = np.frombuffer(os.fsencode(args.prompt), np.uint8)
  room = args.seq_len - len(prompt)
  out = generate(
    model,
    params,
    [prompt.tolist()],
    max_new_tokens=min(args.sample_bytes, room),
    temperature=args.temperature,
    key=args.seed,
  )
  text = np.asarray(out.tokens[0]).astype(np.uint8).tobytes()
  path = run.folder / "sample.txt"
  path.write_bytes(text)
  shown = text[len(prompt) :].decode(errors="replace")
  print(f"---- sample, after {text[: len(prompt)]!r}\n{shown}\n----")
  return path


# Command line.


class Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {message}\n")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
  def convert(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = 0
    if not 0 < value < math.inf:
      noun = "integer" if kind is int else "number"
      raise argparse.ArgumentTypeError(f"{text!r} is not a positive {noun}")
    return value

  return convert


def make_parser() -> argparse.ArgumentParser:
  parser = Parser(
    prog="train_lm.py",
    description="Train a byte-level language model with Native Sparse "
    "Attention on real text.",
    epilog="Ctrl-C saves a checkpoint first; the same command with --resume "
    "continues, and ends where the uninterrupted run would have ended.",
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "--preset",
    choices=sorted(RECIPES, key=lambda name: RECIPES[name].seq_len),
    default="tiny",
    help="model and training recipe; tiny takes minutes on a CPU, the others "
    "want an accelerator (default: tiny)",
  )
  add(
    "--attention",
    choices=("nsa", "full", "window"),
    default="nsa",
    help="attention of every layer (default: nsa)",
  )
  add(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the computation; parameters are float32 (default: float32)",
  )
  add(
    "--implementation",
    choices=("reference", "xla", "triton"),
    help="of the attention (default: the fastest that the device has)",
  )
  add(
    "--corpus",
    metavar="PATH",
    help="text file, or folder of text files (default: the source of Python's "
    "standard library)",
  )
  add(
    "--max-bytes",
    type=positive(int),
    default=64 * 2**20,
    metavar="N",
    help="use at most N bytes of the corpus (default: 64 MiB)",
  )

  def recipe(name: str) -> str:
    values = [f"{getattr(r, name):g}" for r in RECIPES.values()]
    return f"(default: {', '.join(values)} for {', '.join(RECIPES)})"

  kinds: dict[str, tuple[Callable[[str], Any], str]] = {
    "steps": (int, "optimiser steps"),
    "seq-len": (int, "bytes in a sequence"),
    "batch-size": (int, "sequences in a step"),
    "learning-rate": (float, "peak learning rate"),
  }
  for name, (kind, text) in kinds.items():
    add(
      f"--{name}",
      type=positive(kind),
      metavar="N" if kind is int else "X",
      help=f"{text} {recipe(name.replace('-', '_'))}",
    )
  add(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="of parameters, data order and sample (default: 0)",
  )
  add(
    "--out",
    default="runs/train_lm",
    metavar="DIR",
    help="folder for checkpoints, metrics, plot and sample (default: "
    "runs/train_lm)",
  )
  add(
    "--resume",
    action="store_true",
    help="continue the run in --out; the other flags must be as before",
  )
  add(
    "--eval-every",
    type=positive(int),
    default=50,
    metavar="N",
    help="steps between evaluations (default: 50)",
  )
  add(
    "--eval-batches",
    type=positive(int),
    default=16,
    metavar="N",
    help="batches of held-out text in an evaluation (default: 16)",
  )
  add(
    "--checkpoint-every",
    type=positive(int),
    default=100,
    metavar="N",
    help="steps between checkpoints (default: 100)",
  )
  add(
    "--prompt",
    metavar="TEXT",
    help="start of the final sample (default: the start of the held-out text)",
  )
  add(
    "--sample-bytes",
    type=positive(int),
    default=400,
    metavar="N",
    help="length of the final sample; it ends with the sequence at the latest "
    "(default: 400)",
  )
  add(
    "--temperature",
    type=positive(float),
    default=0.8,
    metavar="X",
    help="of the final sample (default: 0.8)",
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  parser = make_parser()
  args = parser.parse_args(argv)
  for name, value in RECIPES[args.preset]._asdict().items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  if not 0 <= args.seed < 2**32:
    parser.error(f"argument --seed: {args.seed} is not in [0, 2**32)")
  prompt_len = 1 if args.prompt is None else len(os.fsencode(args.prompt))
  if not 0 < prompt_len < args.seq_len:
    parser.error(
      f"argument --prompt: must have 1 to {args.seq_len - 1} bytes, has "
      f"{prompt_len}"
    )
  if not MIN_TEMPERATURE <= args.temperature < math.inf:
    parser.error(
      f"argument --temperature: {args.temperature} is not a finite number of "
      f"at least {MIN_TEMPERATURE}"
    )
  try:
    return train(args)
  # What the library cannot do, it says in one sentence.
  except (UsageError, NotImplementedError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  sys.exit(main())
