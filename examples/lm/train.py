"""Training: optimiser, loss, step, the loop over the steps, final sample."""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from nsa_jax import (
  NSAConfig,
  PackedRow,
  TransformerConfig,
  TransformerLM,
  generate,
  num_compressed_blocks,
)
from nsa_jax.typing import AttentionName

from .data import (
  Batch,
  Batches,
  Corpus,
  PackedFiles,
  RandomWindows,
  bigram_loss,
  describe_skipped,
  inputs_and_labels,
  load_corpus,
  num_predicted,
  split_batch,
  take_rows,
  validation_rows,
  validation_windows,
)
from .devices import Devices
from .events import check_package, open_events
from .flags import STOPPED, UsageError
from .plot import plot_losses
from .run import Params, Run, State, brief, run_config
from .terminal import StopRequest, make_printer, printable, warn
from .tokenizer import (
  FILE,
  Tokenizer,
  Unit,
  encode_corpus,
  open_tokenizer,
  unit_of,
)

EVENTS = "tensorboard"  # in the folder of a run
TrainStep: TypeAlias = Callable[[State, Any], tuple[State, jax.Array]]
EvalStep: TypeAlias = Callable[[Params, Any], jax.Array]


def read_fraction(
  attention: AttentionName, config: NSAConfig, length: int
) -> float:
  """Keys that the last query reads, as a fraction of all keys.

  A key that several branches read counts several times.
  """
  if attention == "full":
    return 1.0
  window = min(config.window, length)
  if attention == "window":
    return window / length
  compressed = num_compressed_blocks(length, config)
  selected = min(config.num_selected * config.selection_block, length)
  return (compressed + selected + window) / length


def make_schedule(
  learning_rate: float,
  steps: int,
  warmup: int | None = None,
  final: float | None = None,
) -> optax.Schedule:
  """The learning rate of a step: linear warm-up, then cosine decay.

  Args:
    learning_rate: peak learning rate.
    steps: number of steps of the whole run.
    warmup: steps to the peak; by default a tenth of them, at most 1000.
    final: learning rate after the last step; by default a twentieth of the
      peak.
  """
  if warmup is None:
    warmup = max(1, min(steps // 10, 1000))
  return optax.warmup_cosine_decay_schedule(
    init_value=learning_rate / warmup,
    peak_value=learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=learning_rate / 20 if final is None else final,
  )


def make_optimizer(
  learning_rate: float,
  steps: int,
  warmup: int | None = None,
  final: float | None = None,
) -> optax.GradientTransformation:
  """AdamW with gradient clipping and the schedule of `make_schedule`."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      make_schedule(learning_rate, steps, warmup, final),
      b2=0.98,
      weight_decay=0.1,
      mask=_is_matrix,
    ),
  )


def _is_matrix(params: Params) -> Params:
  """Which parameters decay: not the vectors, norm scales and biases."""

  def one(path: Any, x: Any) -> bool:
    stacked = any(getattr(entry, "key", None) == "layers" for entry in path)
    return x.ndim - stacked > 1

  return jax.tree_util.tree_map_with_path(one, params)


def token_losses(model: TransformerLM, params: Params, batch: Any) -> jax.Array:
  """Cross-entropy of every token [B, T] of a Batch; 0 where none follows."""
  if isinstance(batch, PackedRow):
    losses = model.apply(
      {"params": params},
      batch.tokens,
      positions=batch.positions,
      segment_ids=batch.segment_ids,
      labels=batch.labels,
    )
  else:
    losses = model.apply({"params": params}, batch[:, :-1], labels=batch[:, 1:])
  return jnp.asarray(losses)


def loss_fn(
  model: TransformerLM,
  params: Params,
  batch: Any,
  predicted: jax.Array | None = None,
) -> jax.Array:
  """Mean cross-entropy in nats per predicted token of a Batch.

  Args:
    model: the model.
    params: its parameters.
    batch: a Batch.
    predicted: number of predicted tokens, if it is that of a larger batch.
  """
  losses = token_losses(model, params, batch)
  if predicted is None and isinstance(batch, PackedRow):
    predicted = _count(batch)
  return losses.mean() if predicted is None else losses.sum() / predicted


def _count(batch: Any) -> jax.Array:
  """Number of predicted tokens; 1 where files of one token leave none."""
  labels = batch.labels if isinstance(batch, PackedRow) else batch[:, 1:]
  return jnp.maximum((labels >= 0).sum(), 1)


def loss_and_grads(
  model: TransformerLM, params: Params, batch: Any, count: int = 1
) -> tuple[jax.Array, Params]:
  """Loss and gradients of a batch, `count` parts of it one after the other."""
  if count == 1:
    return jax.value_and_grad(lambda p: loss_fn(model, p, batch))(params)
  predicted = _count(batch)
  # Every part takes rows of every device: row i is in part i % count.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def add(total, part):
    new = jax.value_and_grad(
      lambda params: loss_fn(model, params, part, predicted)
    )(params)
    return jax.tree.map(jnp.add, total, new), None

  zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(add, zeros, parts)[0]


def make_train_step(
  model: TransformerLM,
  optimizer: optax.GradientTransformation,
  accumulate: int = 1,
) -> TrainStep:
  """A function from a state and a Batch to the next state and the loss.

  Args:
    model: the model.
    optimizer: its optimiser.
    accumulate: parts of the batch whose gradients are computed one after the
      other, each with the memory of a part.
  """

  def train_step(state, batch):
    loss, grads = loss_and_grads(model, state["params"], batch, accumulate)
    updates, opt_state = optimizer.update(
      grads, state["opt_state"], state["params"]
    )
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, loss

  return train_step


def model_config(args: argparse.Namespace) -> TransformerConfig:
  """The preset, with what the flags change.

  Raises:
    UsageError: if the sizes of the attention do not fit together, or a bias of
      the gates is not finite.
  """
  sizes = {
    field.name: value
    for field in dataclasses.fields(NSAConfig)
    if (value := getattr(args, field.name)) is not None
  }
  try:
    config = TransformerConfig.preset(
      args.preset,
      attention=args.attention,
      select=args.select,
      gate_bias=args.gate_bias,
      dtype=args.dtype,
      implementation=args.implementation,
    )
    nsa = dataclasses.replace(config.nsa, **sizes)
  except ValueError as error:
    raise UsageError(str(error)) from error
  return dataclasses.replace(config, nsa=nsa)


def open_data(
  args: argparse.Namespace, config: NSAConfig, corpus: Corpus
) -> tuple[Batches, Batch]:
  """The batches to train on, and those of `open_validation`."""
  sizes = {"batch_size": args.batch_size, "seq_len": args.seq_len}
  validation = open_validation(args, config, corpus.validation_files())
  if not args.pack:
    return RandomWindows(corpus.train, args.seed, **sizes), validation
  batches = PackedFiles(
    corpus.train_files(),
    seed=args.seed,
    alignment=config.selection_block,
    **sizes,
  )
  return batches, validation


def open_validation(
  args: argparse.Namespace, config: NSAConfig, files: Sequence[np.ndarray]
) -> Batch:
  """The eval_batches * batch_size rows of these files to evaluate."""
  count = args.eval_batches * args.batch_size
  if not args.pack:
    text = np.concatenate(files)
    return validation_windows(text, count=count, seq_len=args.seq_len)
  return validation_rows(
    files,
    count=count,
    seq_len=args.seq_len,
    alignment=config.selection_block,
  )


def learning_rates(args: argparse.Namespace, steps: int) -> np.ndarray:
  """Those of these flags after 0, 1, ... of `steps` steps.

  On a mesh jax computes them on all devices: every process has to call it.
  """
  schedule: Any = make_schedule(
    args.learning_rate, steps, args.warmup_steps, args.final_learning_rate
  )
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps + 1)))


def encode_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> np.ndarray:
  """The tokens of --prompt.

  Raises:
    UsageError: if they are none, or leave no room in a sequence.
  """
  tokens = tokenizer.encode([os.fsencode(args.prompt)])[0]
  if not 0 < len(tokens) < args.seq_len:
    raise UsageError(
      f"--prompt: must have 1 to {args.seq_len - 1} {tokenizer.unit}s, has "
      f"{len(tokens)}."
    )
  return tokens


def describe_tokens(tokenizer: Tokenizer, text: Corpus, corpus: Corpus) -> str:
  """A line on the tokens of a text; "" for bytes."""
  if tokenizer.unit == "byte":
    return ""
  ratio = len(text.train) / len(corpus.train)
  return (
    f"tokens     {len(corpus.train):,} for training, "
    f"{len(corpus.validation):,} for validation, of {len(tokenizer.pieces):,} "
    f"kinds, {ratio:.2f} bytes each\n"
  )


def describe_growth(
  args: argparse.Namespace, steps_before: int, step: int
) -> str:
  """What a larger --steps does to a run that is resumed."""
  before, now = (
    learning_rates(args, steps)[min(step, steps)]
    for steps in (steps_before, args.steps)
  )
  return (
    f"--steps was {steps_before}, now {args.steps}: the learning rate follows "
    f"the schedule of {args.steps} steps from step {step} on, where it is "
    f"{now:.2e} instead of {before:.2e}; a run of {args.steps} steps from the "
    "start would end elsewhere."
  )


def train(args: argparse.Namespace, devices: Devices | None = None) -> int:
  """Trains with the given flags, then writes a sample and a plot.

  Args:
    args: the parsed flags of `train_lm.py`, with the defaults of the preset.
    devices: where; one device by default.

  Returns:
    The exit code: 0, or 128 + the signal that stopped the run.

  Raises:
    UsageError: if the text, the folder or the sizes of the attention cannot be
      used, or the loss is not finite.
    NotImplementedError: if the implementation cannot do this attention.
  """
  devices = devices or Devices()
  try:
    with contextlib.ExitStack() as mesh:
      mesh.enter_context(devices.use())
      return _train(args, devices, mesh)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    raise UsageError(
      "another process has ended, or cannot be reached: "
      f"{brief(error)}; --resume continues from the last checkpoint."
    ) from error


def _train(
  args: argparse.Namespace, devices: Devices, mesh: contextlib.ExitStack
) -> int:
  started = time.perf_counter()
  config = model_config(args)
  fraction = read_fraction(args.attention, config.nsa, args.seq_len)
  if args.attention == "nsa" and fraction >= 0.5 and devices.first:
    warn(
      f"--seq-len {args.seq_len} is short for this attention: the last query "
      f"reads {fraction:.1%} of the keys, all branches together, where sparse "
      "attention should read less than half. Longer sequences, or smaller "
      "--num-selected, --selection-block and --window, make it sparse."
    )
  if args.tensorboard:
    check_package()
  text = load_corpus(args.corpus, args.max_bytes, args.seq_len, args.text_field)
  # A run that goes on reads what it has trained.
  trained = pathlib.Path(args.out, FILE) if args.resume else None
  tokenizer = open_tokenizer(args.tokenizer, text, trained)
  corpus = encode_corpus(tokenizer, text, args.seq_len)
  if args.prompt is None:
    prompt = corpus.validation[: min(64, args.seq_len // 2)]
  else:
    prompt = encode_prompt(args, tokenizer)
  config = dataclasses.replace(config, vocab_size=len(tokenizer.pieces))
  batches, validation_batch = open_data(args, config.nsa, corpus)
  eval_batches = split_batch(validation_batch, args.eval_batches)
  unit = unit_of(tokenizer, inputs_and_labels(validation_batch)[1])
  bigram = bigram_loss(corpus.train, validation_batch, config.vocab_size)
  alone = TransformerLM(config)
  model = TransformerLM(dataclasses.replace(config, layout=devices.layout))
  optimizer = make_optimizer(
    args.learning_rate,
    args.steps,
    args.warmup_steps,
    args.final_learning_rate,
  )

  def init() -> State:
    tokens = jnp.zeros((1, args.seq_len), jnp.int32)
    params = alone.init(jax.random.key(args.seed), tokens)["params"]
    return {"params": params, "opt_state": optimizer.init(params)}

  # An unsupported call raises here, before the folder is created.
  shapes = jax.eval_shape(init)
  devices.check(args.batch_size, args.seq_len, args.accumulate)
  try:
    shapes = jax.tree.map(
      lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y),
      shapes,
      devices.shardings(shapes),
    )
    example = devices.put(
      take_rows(eval_batches[0], devices.rows(args.batch_size)),
      args.batch_size,
    )
    step_fn = make_train_step(model, optimizer, args.accumulate)
    jax.eval_shape(step_fn, shapes, example)
  except ValueError as error:
    raise UsageError(str(error)) from error
  saved = run_config(args, config, text, tokenizer)
  with contextlib.closing(Run(args.out, saved, args.resume)) as run:
    if run.last_step is not None and not args.resume:
      raise UsageError(
        f"--out {args.out}: holds a run of {run.last_step} steps already; "
        "continue it with --resume, or choose another folder."
      )
    if args.resume:
      step, state = run.restore(shapes)
      batches.set_state(run.data_state)
    else:
      step, state = 0, devices.create(init, shapes)
    if devices.first:
      tokenizer.save(run.folder)
    if run.steps_before < args.steps:
      growth = describe_growth(args, run.steps_before, step)
      if devices.first:
        warn(growth)

    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    skipped = (
      f"skipped    {describe_skipped(corpus.skipped)}\n"
      if corpus.skipped
      else ""
    )
    print(
      f"text       {printable(text.name)}: {len(text.train):,} bytes for "
      f"training, {len(text.validation):,} for validation\n"
      f"{skipped}"
      f"{describe_tokens(tokenizer, text, corpus)}"
      f"model      {args.preset}, {count:,} parameters, {args.attention} "
      f"attention, {args.dtype}, on {devices.text}\n"
      f"sparsity   the last query of {args.seq_len} reads {fraction:.1%} of "
      f"the keys\n"
      f"bigram     {unit.describe(bigram)} on the validation text\n"
      f"run        {run.folder}, steps {step} to {args.steps}, "
      f"{args.batch_size} x {args.seq_len} {unit.name}s each",
      flush=True,
    )
    train_step, eval_step = compile_steps(
      model, step_fn, shapes, example, devices.whole
    )
    step, state, stopped_by = run_steps(
      args,
      run,
      step,
      state,
      train_step,
      eval_step,
      batches,
      eval_batches,
      devices,
      unit,
    )
    if isinstance(batches, PackedFiles):
      report = batches.rows.report
      print(
        f"padding    {report.padding_fraction:.1%} of {report.rows:,} packed "
        "rows"
      )
    if step < args.steps:
      print(
        f"stopped at step {step} of {args.steps}; continue with\n"
        f"  {resume_command()}"
      )
      return 128 + stopped_by
    params = devices.gather(state["params"])
    mesh.close()  # One process samples, on one device.
    if not devices.first:
      return 0
    try:
      sample_path = write_sample(args, alone, params, tokenizer, prompt, run)
      plot_path = plot_losses(
        run, bigram, f"{args.preset} preset, {args.attention} attention", unit
      )
    except OSError as error:
      raise UsageError(
        f"--out {args.out}: {error}; the checkpoint of step {step} stays, and "
        "--resume continues from it."
      ) from error
    validation = run.series("validation_loss")[1][-1]
  verdict = "beats" if validation < bigram else "does NOT beat"
  print(
    f"validation {unit.describe(validation)}\n"
    f"bigram     {unit.describe(bigram)}: the model {verdict} it\n"
    f"took       {time.perf_counter() - started:.0f} s\n"
    f"metrics    {run.metrics_path}\n"
    f"plot       {plot_path}\n"
    f"sample     {sample_path}\n"
    f"checkpoint {run.folder / 'checkpoints' / str(step)}"
  )
  return 0


def compile_steps(
  model: TransformerLM,
  train_step: TrainStep,
  shapes: State,
  batch: Any,
  whole: Any,
) -> tuple[TrainStep, EvalStep]:
  """Compiles the training step and the evaluation step, and prints the time.

  Args:
    model: the model.
    train_step: the function of a state and a batch.
    shapes: shapes, dtypes and shardings of the state.
    batch: any batch, as the devices get it.
    whole: sharding of the losses.
  """
  started = time.perf_counter()
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, whole))
  eval_step = jax.jit(functools.partial(loss_fn, model), out_shardings=whole)
  compiled = (
    step.lower(shapes, batch).compile(),
    eval_step.lower(shapes["params"], batch).compile(),
  )
  print(f"compiled   in {time.perf_counter() - started:.1f} s")
  return compiled


def run_steps(
  args: argparse.Namespace,
  run: Run,
  step: int,
  state: State,
  train_step: TrainStep,
  eval_step: EvalStep,
  batches: Batches,
  eval_batches: Sequence[Batch],
  devices: Devices | None = None,
  unit: Unit | None = None,
) -> tuple[int, State, int]:
  """Trains from `step` on, to the last step or until a signal.

  Args:
    args: the flags.
    run: receives the losses and the checkpoints.
    step: number of steps already done.
    state: the state after these steps.
    train_step: compiled training step.
    eval_step: compiled evaluation step.
    batches: what to train on.
    eval_batches: what to evaluate on.
    devices: where; one device by default.
    unit: of the losses; nats per byte by default.

  Returns:
    The last step, its state, and the signal that stopped training (0: none).

  Raises:
    UsageError: if the loss is not finite.
  """
  devices, unit = devices or Devices(), unit or Unit()
  size = args.batch_size
  rows = devices.rows(size)
  weights = [num_predicted(batch) for batch in eval_batches]
  pending: list[tuple[int, jax.Array]] = []  # losses still on the device
  events = args.tensorboard and devices.first

  def evaluated(batch: Batch) -> Any:
    return devices.put(take_rows(batch, rows), size)

  # By every process, though only the first one writes them.
  rates = learning_rates(args, args.steps) if args.tensorboard else ()

  def record() -> None:
    for at, loss in pending:
      value = float(loss)
      if not math.isfinite(value):
        raise UsageError(
          f"the training loss is not finite at step {at}; a lower "
          "--learning-rate may help."
        )
      run.metrics.append({"step": at, "train_loss": value})
      if events:
        rate = float(rates[at - 1])
        write_events(at, {"loss/training": value, "learning_rate": rate})
    pending.clear()

  with (
    StopRequest(f"\n{STOPPED}", wait=True) as request,
    open_events(run.folder / EVENTS if events else None, step) as write_events,
    tqdm.tqdm(
      total=args.steps, initial=step, unit="step", disable=not devices.first
    ) as bar,
  ):
    tokens, mark_time, stopped_by = 0, time.perf_counter(), 0
    while step < args.steps and not stopped_by:
      batch = batches.read(step, rows)
      tokens += num_predicted(batch) * size // (rows.stop - rows.start)
      state, loss = train_step(state, devices.put(batch, size))
      step += 1
      pending.append((step, loss))
      bar.update()
      last = step == args.steps
      if step % 10 == 0 or last:
        record()
        now = time.perf_counter()
        speed = tokens / (now - mark_time)
        write_events(step, {"tokens_per_second": speed})
        bar.set_postfix_str(
          f"loss {run.metrics[-1]['train_loss']:.3f}, {speed:,.0f} tokens/s"
        )
        tokens, mark_time = 0, now
      # The speed excludes evaluation and checkpoints.
      pause = time.perf_counter()
      if step % args.eval_every == 0 or last:
        record()
        validation = float(
          np.average(
            [
              float(eval_step(state["params"], evaluated(batch)))
              for batch in eval_batches
            ],
            weights=weights,
          )
        )
        run.metrics[-1]["validation_loss"] = validation
        bits = unit.bits_per_byte(validation)
        write_events(
          step,
          {"loss/validation": validation, "validation_bits_per_byte": bits},
        )
        bar.write(f"step {step}: validation {unit.describe(validation)}")
      if step % args.checkpoint_every == 0 or last:
        record()
        run.save(step, state, batches.get_state())
      mark_time += time.perf_counter() - pause
      stopped_by = devices.any(step, request.signal)
    record()
    run.save(step, state, batches.get_state())
  return step, state, stopped_by


def write_sample(
  args: argparse.Namespace,
  model: TransformerLM,
  params: Params,
  tokenizer: Tokenizer,
  prompt: np.ndarray,
  run: Run,
) -> pathlib.Path:
  """Samples a continuation of a prompt, prints it, and writes sample.txt."""
  room = args.seq_len - len(prompt)
  out = generate(
    model,
    params,
    [prompt.tolist()],
    max_new_tokens=min(args.sample_tokens, room),
    temperature=args.temperature,
    key=args.seed,
  )
  tokens = np.asarray(out.tokens[0])
  before, text = (
    tokenizer.decode(part)
    for part in (tokens[: len(prompt)], tokens[len(prompt) :])
  )
  path = run.folder / "sample.txt"
  path.write_bytes(before + text)
  print(f"---- sample, after {before!r}")
  show = make_printer()
  show(text)
  show(b"")
  print("\n----")
  return path


def resume_command() -> str:
  """The command of this process with --resume."""
  words = [word for word in sys.argv if word != "--resume"]
  return shlex.join(["python", *words, "--resume"])
