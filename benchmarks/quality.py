"""Whether sparse attention keeps the quality of full attention.

    python -m benchmarks.quality
    python -m benchmarks.quality --minutes 9
    python -m benchmarks.quality --quick

Trains models that differ in their attention, on the same tokens for the same
number of steps: full attention, NSA, NSA that chooses blocks by means of the
keys, a window alone, NSA without one of its branches, and NSA that reads random
blocks instead of those it would choose. NSA has more parameters than full
attention, in phi and in the projections of its branches; `--kinds "full,
wider"` has as many, in a larger SwiGLU. The learning rate of each kind is the
best of `RATES` for a tenth of the tokens, by the loss on the rows that are
evaluated in the end. Then full attention and NSA read rows four times as long
as those they were trained on, with YaRN and without.
Text is the Python source below `--corpus`, in the order of its folders, so that
definitions and their uses share a row; whole folders are held out. `--kinds`
and `--rates` compare other models, with `--name` in records of their own.

Every GPU of the machine trains one model at a time. `--minutes` ends the
command early, with checkpoints; the same command continues, and the records
have what is known by then. `--tokenizer bytes` trains on bytes.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from einops import rearrange

import nsa_jax
from benchmarks import harness, trials
from examples.lm import data, train
from examples.lm.flags import UsageError
from examples.lm.tokenizer import Tokenizer, train_bpe
from nsa_jax import NSAConfig, RopeConfig, TransformerConfig, TransformerLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATES = (5e-4, 1e-3, 2e-3)
LONGER = 4  # times the length of the rows, after training
HELD_OUT = 20  # About one folder in HELD_OUT is for validation.


def random_blocks(
  *,
  query: Any,
  selected_key: Any,
  config: NSAConfig,
  key_length: int,
  **call: Any,
) -> Any:
  """A selector: other blocks in every step, the forced ones included."""
  bits = jax.lax.bitcast_convert_type(query.astype(jnp.float32), jnp.uint32)
  shape = (
    *query.shape[:2],
    selected_key.shape[2],
    nsa_jax.num_selection_blocks(key_length, config),
  )
  scores = jax.random.uniform(jax.random.key(bits.sum()), shape)
  return nsa_jax.block_ids_from_scores(
    scores, config=config, key_length=key_length, **_places(call)
  )


# What holds most of full attention with the selected keys. It costs as much as
# full attention: a bound for other selectors.
best_blocks = nsa_jax.SelectByMeans(tokens=1)


def by_mean_keys(
  *, selected_query: Any, selected_key: Any, config: NSAConfig, **call: Any
) -> Any:
  """A selector: `SelectByMeans`, but with means as long as phi's blocks."""
  query, key = jax.lax.stop_gradient((selected_query, selected_key))
  means = nsa_jax.compress_mean(
    key, config=config, segment_ids=call["segment_ids"]
  )
  where = {name: call[name] for name in ("key_length", "scale")}
  where |= {"config": config, **_places(call)}
  _, lse = nsa_jax.compressed_attention(query, means, means, **where)
  return nsa_jax.select_blocks(query, means, lse, **where)


def by_clusters(
  *,
  selected_query: Any,
  selected_key: Any,
  config: NSAConfig,
  key_length: int,
  number: int = 8,
  **call: Any,
) -> Any:
  """A selector: NSA's, with centroids of the keys of each selection block.

  The first centroid is the key farthest from the block's mean, each further
  one the key farthest from those before it. Then every key joins the nearest
  one, and their means, each counted as often as it has keys, are the compressed
  keys. They hold keys of the whole block, so they score the blocks before a
  query's own, while its softmax is over means of consecutive keys.
  """
  query, key = jax.lax.stop_gradient((selected_query, selected_key))
  block = config.selection_block
  means = dataclasses.replace(
    config,
    compression_block=block // number,
    compression_stride=block // number,
  )
  where = {"key_length": key_length, "scale": call["scale"], **_places(call)}
  consecutive = nsa_jax.compress_mean(
    key, config=means, segment_ids=call["segment_ids"]
  )
  _, lse = nsa_jax.compressed_attention(
    query, consecutive, consecutive, config=means, **where
  )
  full = key_length // block  # The query's own block is chosen in any case.
  keys = rearrange(
    key[:, : full * block].astype(jnp.float32),
    "b (m block) k h -> b m k block h",
    block=block,
  )
  distance = jnp.square(keys - keys.mean(3, keepdims=True)).sum(-1)
  found = []
  for i in range(number):
    farthest = distance.argmax(-1)[..., None, None]
    found.append(jnp.take_along_axis(keys, farthest, axis=3))
    new = jnp.square(keys - found[-1]).sum(-1)
    distance = jnp.minimum(distance, new) if i else new
  centres = jnp.concatenate(found, axis=3)
  products = jnp.einsum("bmksh,bmkch->bmksc", keys, centres)
  nearest = (2 * products - jnp.square(centres).sum(-1)[..., None, :]).argmax(
    -1
  )
  members = jax.nn.one_hot(nearest, number)
  counts = members.sum(3)[..., None]
  centroids = jnp.einsum("bmksh,bmksc->bmkch", keys, members)
  centroids /= jnp.maximum(counts, 1)
  # A further channel, beside zeros, adds log(counts) to the scores; those of
  # consecutive means count as many keys each.
  bias = jnp.log(jnp.maximum(counts, 1e-9) / (block // number)) / call["scale"]
  padding = jnp.zeros_like(centroids[..., 1:])
  centroids = rearrange(
    jnp.concatenate([centroids, bias, padding], axis=-1),
    "b m k c h -> b (m c) k h",
  )
  rest = consecutive.shape[1] - centroids.shape[1]
  centroids = jnp.pad(centroids, [(0, 0), (0, rest), (0, 0), (0, 0)])
  query = jnp.concatenate([query, jnp.ones_like(query)], axis=-1)
  return nsa_jax.select_blocks(
    query, centroids.astype(query.dtype), lse, config=means, **where
  )


def _places(call: Mapping[str, Any]) -> dict[str, Any]:
  """Where the queries of a selector's call stand."""
  names = ("query_offset", "segment_ids", "query_segment_ids")
  return {name: call[name] for name in names}


# Fields of TransformerConfig by kind.
KINDS: dict[str, dict[str, Any]] = {
  "full": {"attention": "full"},
  "nsa": {},
  "window": {"attention": "window"},
  "compressed + window": {"branches": ("compressed", "window")},
  # Without their branch the compressed keys have no gradient: here they are
  # means of the selected ones, as in "nsa, shared K/V, mean".
  "selected + window": {
    "branches": ("selected", "window"),
    "compression": "mean",
    "share_kv": True,
  },
  "random blocks": {"select": random_blocks},
}
# What `select="means"` does, with gates that start at 0.5 or lean on it.
BY_MEANS = ("nsa, by means of 4", "nsa, by means of 4, selected first")
COMPARED = ("full", "nsa", *BY_MEANS, "window")  # with several seeds
# Fields by what may follow a kind, to find out what the quality depends on.
CHANGES: dict[str, dict[str, Any]] = {
  "wider": {"mlp_dim": 2384},
  "QK norm": {"normalize_qk": True},
  "shared K/V": {"share_kv": True},
  "own K/V": {"share_kv": False},
  "mean": {"compression": "mean"},
  "linear": {"compression": "linear"},
  "rotated tokens": {"rope_compressed": "tokens"},
  "not rotated": {"rope_compressed": "none"},
  "4 K/V heads": {"num_kv_heads": 4},
  "best blocks": {"select": best_blocks},
  "by mean keys": {"select": by_mean_keys},
  **{
    f"by means of {tokens}": {"select": nsa_jax.SelectByMeans(tokens)}
    for tokens in (4, 8, 16)
  },
  "by clusters": {"select": by_clusters},
  # Gates of 0.05, 0.9 and 0.05 at first, as those of `to_nsa`.
  "selected first": {"gate_bias": (-2.94, 2.2, -2.94)},
  "32 blocks": {"nsa": NSAConfig(num_selected=32)},
  "blocks of 32": {"nsa": NSAConfig(16, 8, 32, num_selected=32)},
  "blocks of 16": {"nsa": NSAConfig(16, 8, 16, num_selected=64)},
  "stride 8": {"nsa": NSAConfig(16, 8)},
  "window 256": {"nsa": NSAConfig(window=256)},
  # The last entry is that of all further layers.
  "first layer full": {"attention": ("full", "nsa"), "scan_layers": False},
}


def fields_of(kind: str) -> dict[str, Any]:
  """Fields of TransformerConfig for a kind and the changes that follow it.

  Raises:
    argparse.ArgumentTypeError: if there is no such kind or change.
  """
  base, *changes = kind.split(", ")
  for name, known in ((base, KINDS), *((x, CHANGES) for x in changes)):
    if name not in known:
      raise argparse.ArgumentTypeError(
        f"{kind!r} has {name!r}, which must be one of "
        f"{', '.join(map(repr, known))}."
      )
  fields = dict(KINDS[base])
  for change in changes:
    fields |= CHANGES[change]
  return fields


def kind_flag(kind: str) -> str:
  """The value of a flag."""
  fields_of(kind)
  return kind


@dataclasses.dataclass(frozen=True)
class Study:
  """What all trials share.

  Attributes:
    model: fields of TransformerConfig.
    vocab_size: of the tokenizer; 256 are bytes.
    length: tokens of a row.
    batch_size: rows of a step.
    tokens: to train on.
    rows: to evaluate on.
    curve: number of evaluations.
    seeds: of the kinds in COMPARED; the others have the first one.
    kinds: some of KINDS, perhaps with some of CHANGES: "nsa, QK norm, mean".
    rates: learning rates to choose from.
  """

  model: Mapping[str, Any]
  vocab_size: int
  length: int
  batch_size: int
  tokens: int
  rows: int
  curve: int
  seeds: tuple[int, ...]
  kinds: tuple[str, ...]
  rates: tuple[float, ...]

  def steps(self, tokens: int) -> int:
    return max(1, tokens // (self.batch_size * self.length))

  def config(self, kind: str) -> TransformerConfig:
    fields = {**self.model, "vocab_size": self.vocab_size, **fields_of(kind)}
    first = fields.get("attention")
    if isinstance(first, tuple):
      more = fields["num_layers"] - len(first)
      fields["attention"] = first + first[-1:] * more
    return TransformerConfig(**fields)

  def ranges(self, length: int) -> list[tuple[int, int]]:
    """Ranges of positions whose losses are averaged."""
    edges, edge = [length], self.length >> 4
    while edge < length:
      edges.insert(-1, edge)
      edge *= 2
    return [*itertools.pairwise([0, *edges])]


STUDY = Study(
  model={
    "num_layers": 8,
    "model_dim": 768,
    "num_heads": 16,
    "num_kv_heads": 1,
    "head_dim": 64,
    "mlp_dim": 2048,
    "scan_layers": True,
    "dtype": "bfloat16",
  },
  vocab_size=8192,
  length=8192,
  batch_size=8,
  tokens=200_000_000,
  rows=64,
  curve=10,
  seeds=(0, 1, 2),
  kinds=(*COMPARED, *(kind for kind in KINDS if kind not in COMPARED)),
  rates=RATES,
)
QUICK = Study(
  model={
    "num_layers": 2,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 16,
    "mlp_dim": 128,
    "nsa": NSAConfig(8, 4, 16, num_selected=4, window=16),
  },
  vocab_size=512,
  length=256,
  batch_size=4,
  tokens=20_000,
  rows=4,
  curve=2,
  seeds=(0,),
  kinds=("full", "nsa", "window"),
  rates=(1e-3,),
)


# ------------------------------------------------------------------- the text


def read_sources(
  folder: pathlib.Path, max_bytes: int
) -> tuple[list[bytes], list[bytes]]:
  """Texts of the Python files below a folder, in the order of their paths.

  Returns:
    Those to train on and those of held-out folders. A folder, two levels below
    the root, is held out by a hash of its path, so that another one changes
    nothing for it.
  """
  train: list[bytes] = []
  held_out: list[bytes] = []
  left = max_bytes
  for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).parts
    if any(part.startswith(".") for part in parts) or not path.is_file():
      continue
    text = path.read_bytes()[:left]
    left -= len(text)
    digest = hashlib.sha256("/".join(parts[:-1][:2]).encode()).digest()
    (held_out if digest[0] % HELD_OUT == 0 else train).append(text)
    if left <= 0:
      break
  return train, held_out


def prepare(
  study: Study, corpus: pathlib.Path, max_bytes: int, folder: pathlib.Path
) -> dict[str, Any]:
  """Writes the tokens to `folder`, once; returns what is known of the text.

  Raises:
    UsageError: if there is too little of it.
  """
  facts = folder / "text.json"
  asked = {"corpus": str(corpus), "max_bytes": max_bytes}
  asked["vocabulary"] = study.vocab_size
  if facts.exists():
    known = json.loads(facts.read_text())
    if any(known[name] != value for name, value in asked.items()):
      raise UsageError(
        f"--runs: {folder} has the text of {known}, not of {asked}; give "
        "another folder."
      )
    return known
  folder.mkdir(parents=True, exist_ok=True)
  train, held_out = read_sources(corpus, max_bytes)
  tokenizer = Tokenizer()
  if study.vocab_size > 256:
    some = train[:: 1 + len(train) // 5000]
    tokenizer = train_bpe(some, study.vocab_size, "--tokenizer bpe")
  known = dict(asked)
  for name, texts in (("train", train), ("validation", held_out)):
    ids = np.concatenate([np.zeros(0, np.uint8), *tokenizer.encode(texts)])
    np.save(folder / f"{name}.npy", ids)
    known |= {
      f"{name} files": len(texts),
      f"{name} bytes": sum(map(len, texts)),
      f"{name} tokens": len(ids),
    }
    if len(ids) <= LONGER * study.length:
      raise UsageError(
        f"--corpus {corpus}: {len(ids)} tokens for {name} are too few for "
        f"rows of {LONGER * study.length}."
      )
  facts.write_text(json.dumps(known, indent=2))
  return known


# ------------------------------------------------------------------ one trial


@dataclasses.dataclass(frozen=True)
class Trial:
  """A model to train."""

  kind: str
  seed: int
  rate: float
  steps: int

  @property
  def name(self) -> str:
    kind = re.sub(r"\W+", "_", self.kind)
    return f"{kind}-{self.steps}-{self.rate:g}-{self.seed}"


def make_evaluation(model: TransformerLM, batch_size: int) -> Any:
  """A function of parameters and rows [R, T + 1]: mean losses, float64 [T]."""

  @jax.jit
  def losses(params: Any, rows: Any) -> Any:
    return train.token_losses(model, params, rows).sum(axis=0)

  def evaluate(params: Any, rows: np.ndarray) -> np.ndarray:
    total = np.zeros(rows.shape[1] - 1)
    for start in range(0, len(rows), batch_size):
      total += np.asarray(losses(params, rows[start : start + batch_size]))
    return total / len(rows)

  return evaluate


class DivergedError(Exception):
  """The loss is not finite."""


def load_text(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tokens of `prepare`, by "train" and "validation"."""
  return {
    name: np.load(folder / f"{name}.npy", mmap_mode="r")
    for name in ("train", "validation")
  }


def make_init(
  study: Study, trial: Trial
) -> tuple[TransformerLM, optax.GradientTransformation, Callable[[], Any]]:
  """The model of a trial, its optimiser, and what makes the first state."""
  config = study.config(trial.kind)
  model = TransformerLM(config)
  optimizer = train.make_optimizer(trial.rate, trial.steps)

  def init():
    tokens = jnp.zeros((1, config.nsa.selection_block), jnp.int32)
    params = model.init(jax.random.key(trial.seed), tokens)["params"]
    return {"params": params, "opt_state": optimizer.init(params)}

  return model, optimizer, init


def fit(
  study: Study,
  trial: Any,
  folder: pathlib.Path,
  stop_at: float,
  *,
  init: Callable[[], Any],
  step_fn: Callable[..., Any],
  evaluate: Callable[..., np.ndarray],
) -> tuple[Any, dict[str, Any]] | None:
  """Trains a model, from its last checkpoint on.

  Args:
    study: what all trials share.
    trial: has a name, a seed and a number of steps.
    folder: has the tokens, and gets a folder with the checkpoints.
    stop_at: the time at which to save a checkpoint and return None.
    init: makes the first state.
    step_fn: a jitted function from a state and a batch to a state and a loss.
    evaluate: what `make_evaluation` returns.

  Returns:
    The parameters; losses, curve and speed.

  Raises:
    DivergedError: naming the step.
  """
  texts = load_text(folder)
  rows = data.validation_windows(
    texts["validation"], count=study.rows, seq_len=study.length
  )
  every = -(-trial.steps // study.curve)
  options = ocp.CheckpointManagerOptions(max_to_keep=1)
  with ocp.CheckpointManager(
    (folder / trial.name).absolute(), options=options
  ) as manager:
    step = manager.latest_step() or 0
    log: dict[str, Any] = {"losses": [], "curve": [], "tokens/s": []}
    if step:
      state, log = _restore(manager, step, init)
    else:
      state = jax.jit(init)()
    pending: list[Any] = []
    mark = None  # when the first of the pending steps began
    while step < trial.steps:
      batch = data.training_batch(
        texts["train"],
        seed=trial.seed,
        step=step,
        batch_size=study.batch_size,
        seq_len=study.length,
      )
      state, loss = step_fn(state, batch)
      pending.append(loss)
      step += 1
      last = step == trial.steps
      if len(pending) < 20 and step % every and not last:
        continue
      log["losses"] += map(float, pending)
      if not np.isfinite(log["losses"][-1]):
        raise DivergedError(step)
      now = time.perf_counter()
      if mark is not None:
        tokens = len(pending) * study.batch_size * study.length
        log["tokens/s"].append(tokens / (now - mark))
      pending, mark = [], now
      if step % every == 0 or last:
        loss = float(evaluate(state["params"], rows).mean())
        if not np.isfinite(loss):
          raise DivergedError(step)
        log["curve"].append([step, loss])
        print(f"{trial.name}: {step} {loss:.4f}", flush=True)
        mark = None
      if last or time.time() > stop_at:
        manager.save(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)
          ),
        )
        if not last:
          return None
  return state["params"], log


def load_params(study: Study, trial: Trial, folder: pathlib.Path) -> Any:
  """The parameters of a trial that has ended."""
  _, _, init = make_init(study, trial)
  with ocp.CheckpointManager((folder / trial.name).absolute()) as manager:
    state, _ = _restore(manager, trial.steps, init)
  return state["params"]


def _restore(
  manager: ocp.CheckpointManager, step: int, init: Callable[[], Any]
) -> tuple[Any, dict[str, Any]]:
  restored = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardRestore(jax.eval_shape(init)),
      log=ocp.args.JsonRestore(),
    ),
  )
  return restored.state, restored.log


def result_of(
  study: Study, losses: np.ndarray, log: Mapping[str, Any]
) -> dict[str, Any]:
  """What is recorded of a trial, given the losses by position in the end."""
  return {
    "device": jax.devices()[0].device_kind,
    "validation": float(losses.mean()),
    "by position": averages(study, losses),
    "training": float(np.mean(log["losses"][-50:])),
    "curve": log["curve"],
    "tokens/s": float(np.median(log["tokens/s"] or [np.nan])),
  }


def averages(study: Study, losses: np.ndarray) -> list[float]:
  """Means of losses by position, over the ranges of their length."""
  return [float(losses[a:b].mean()) for a, b in study.ranges(len(losses))]


def run_trial(
  study: Study, trial: Trial, folder: pathlib.Path, stop_at: float
) -> dict[str, Any] | None:
  """Trains and evaluates a model; the arguments are those of `fit`."""
  model, optimizer, init = make_init(study, trial)
  evaluate = make_evaluation(model, study.batch_size)
  try:
    fitted = fit(
      study,
      trial,
      folder,
      stop_at,
      init=init,
      step_fn=jax.jit(
        train.make_train_step(model, optimizer), donate_argnums=0
      ),
      evaluate=evaluate,
    )
  except DivergedError as error:
    (step,) = error.args
    print(f"{trial.name}: the loss is not finite at step {step}", flush=True)
    return {"validation": float("inf"), "diverged": step}
  if fitted is None:
    return None
  params, log = fitted
  text = load_text(folder)["validation"]
  rows = data.validation_windows(text, count=study.rows, seq_len=study.length)
  result = {
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    **result_of(study, evaluate(params, rows), log),
  }
  if trial.kind in ("full", "nsa", *BY_MEANS) and trial.steps == study.steps(
    study.tokens
  ):
    length = LONGER * study.length
    rows = data.validation_windows(
      text, count=-(-study.rows // LONGER), seq_len=length
    )
    config = model.config
    yarn = RopeConfig(factor=LONGER, original_max_position=study.length)
    for name, rope in (("plain", config.rope), ("YaRN", yarn)):
      longer = TransformerLM(dataclasses.replace(config, rope=rope))
      losses = make_evaluation(longer, 1)(params, rows)
      result[name] = averages(study, losses)
  return result


# ----------------------------------------------------------------- all trials


def tables(
  study: Study,
  searched: Sequence[Mapping[str, Any]],
  found: Sequence[Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
  """Losses by kind; against full attention, by seed; by learning rate."""

  def columns(losses: Sequence[float], length: int) -> dict[str, str]:
    places = zip(study.ranges(length), losses, strict=True)
    return {f"{a}-{b}": f"{x:.3f}" for (a, b), x in places}

  losses, longer, apart, rates = [], [], [], []
  by_kind = {
    kind: [x for x in found if x["kind"] == kind] for kind in study.kinds
  }
  for kind, every in by_kind.items():
    results = [x for x in every if "diverged" not in x]
    row: dict[str, Any] = {
      "attention": kind,
      "learning rate": ", ".join({f"{x['rate']:g}": None for x in every}),
      "seeds": len(every),
      "diverged": len(every) - len(results),
    }
    losses.append(row)
    if not results:
      continue
    means = {
      name: np.mean([x[name] for x in results], axis=0)
      for name in ("validation", "by position", "training")
    }
    speeds: dict[str, list[float]] = {}
    for x in results:
      card = x["device"].removeprefix("NVIDIA ")
      speeds.setdefault(f"tokens/s, {card}", []).append(x["tokens/s"])
    row |= {
      "parameters": f"{results[0]['parameters'] / 1e6:.1f}M",
      "loss": f"{means['validation']:.4f}",
      **columns(means["by position"], study.length),
      "training loss": f"{means['training']:.4f}",
      **{name: f"{np.mean(x):,.0f}" for name, x in speeds.items()},
    }
    for name in ("plain", "YaRN"):
      if all(name in x for x in results):
        mean = np.mean([x[name] for x in results], axis=0)
        row = {"attention": kind, "positions": name}
        longer.append(row | columns(mean, LONGER * study.length))
  full = {x["seed"]: x["validation"] for x in by_kind.get("full", ())}
  for kind, results in by_kind.items():
    row = {"attention": kind}
    for x in results:
      if kind != "full" and x["seed"] in full:
        row[f"seed {x['seed']}"] = f"{x['validation'] - full[x['seed']]:+.4f}"
    if len(row) > 1:
      apart.append(row)
  best = trials.best(searched, "validation")
  for kind in study.kinds:
    tried = {x["rate"]: x["validation"] for x in searched if x["kind"] == kind}
    at_end = best.get(kind) in (min(study.rates), max(study.rates))
    if tried:
      rates.append(
        {"attention": kind}
        | {f"{rate:g}": f"{loss:.4f}" for rate, loss in sorted(tried.items())}
        | {"the best is the": "last one tried" if at_end else "middle one"}
      )
  found_tables = {
    "Validation loss, nats per token": losses,
    "Loss minus that of full attention": apart,
    f"In rows of {LONGER * study.length} tokens": longer,
    "Loss after a tenth of the tokens, by learning rate": rates,
  }
  return {heading: rows for heading, rows in found_tables.items() if rows}


def plot(path: pathlib.Path, study: Study, found: Sequence[Any]) -> None:
  """Plots losses minus those of full attention, over training and by position.

  A model is compared with that of the same seed, which saw the same rows;
  nothing is plotted of seeds without full attention. Differences of the first
  third may be beyond the axes.
  """
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), constrained_layout=True, sharey=True
  )
  edges = [0, *(stop for _, stop in study.ranges(study.length))]
  trained = [x for x in found if "diverged" not in x]
  full = {x["seed"]: x for x in trained if x["kind"] == "full"}
  colors = plt.get_cmap("tab10" if len(study.kinds) <= 10 else "tab20")
  shown: list[float] = []
  for i, kind in enumerate(study.kinds):
    pairs = [
      (x, full[x["seed"]])
      for x in trained
      if x["kind"] == kind and x["seed"] in full
    ]
    if not pairs:
      continue
    curve, places = (
      np.mean([np.subtract(x[name], y[name]) for x, y in pairs], axis=0)
      for name in ("curve", "by position")
    )
    steps = np.array([at for at, _ in pairs[0][0]["curve"]])
    tokens = steps * study.batch_size * study.length / 1e6
    left.plot(tokens, curve[:, 1], color=colors(i), label=kind)
    right.stairs(places, edges, baseline=None, color=colors(i))
    shown += [*curve[len(curve) // 3 :, 1], *places]
  left.set(xlabel="million tokens", ylabel="loss minus that of full attention")
  if shown:
    margin = 0.1 * (max(shown) - min(shown)) + 1e-3
    left.set_ylim(min(shown) - margin, max(shown) + margin)
  # Every range is as wide as the first one.
  right.set_xscale("symlog", linthresh=edges[1], linscale=np.log10(2))
  right.set_xlim(0, edges[-1])
  right.set_xlabel("position in the row, in the end")
  right.set_xticks(edges, [str(x) for x in edges])
  left.legend(fontsize="x-small", ncols=1 + len(study.kinds) // 8)
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def add_text_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of a command that trains on this text."""
  add = parser.add_argument
  add(
    "--corpus",
    type=pathlib.Path,
    default=pathlib.Path(sysconfig.get_paths()["purelib"]),
    help="folder of Python source (default: the installed packages)",
  )
  add("--max-bytes", type=int, default=2**29, help="of the corpus (2**29)")
  add("--tokenizer", choices=("bpe", "bytes"), default="bpe")
  trials.add_flags(parser, pathlib.Path("runs/quality"))


def parser() -> argparse.ArgumentParser:
  """The flags."""
  result = harness.arguments(__doc__.splitlines()[0])
  add_text_flags(result)
  add = result.add_argument
  add("--tokens", type=int, help="to train on (default: 200 million)")
  add(
    "--kinds",
    nargs="+",
    type=kind_flag,
    metavar="KIND",
    help=f"of {', '.join(map(repr, KINDS))}, each perhaps with changes after "
    f"commas: {', '.join(CHANGES)} (default: all, and "
    f"{' and '.join(map(repr, BY_MEANS))})",
  )
  add("--rates", nargs="+", type=float, help=f"learning rates {RATES}")
  add("--seeds", type=int, nargs="+", help="default: 0 1 2")
  add("--name", help="of the records (default: quality_bpe, quality_bytes)")
  return result


def study_of(args: argparse.Namespace) -> Study:
  """The study that the flags ask for."""
  study = QUICK if args.quick else STUDY
  changed: dict[str, Any] = {}
  if args.tokenizer == "bytes":
    changed["vocab_size"] = 256
  for name in ("tokens", "kinds", "seeds", "rates"):
    value = getattr(args, name, None)
    if value is not None:
      changed[name] = tuple(value) if isinstance(value, list) else value
  return dataclasses.replace(study, **changed)


def text_folder(args: argparse.Namespace) -> pathlib.Path:
  """Where the text, the checkpoints and the results of trials are."""
  return args.runs / (args.tokenizer + "-quick" * args.quick)


def main(argv: Sequence[str] | None = None) -> None:
  args = parser().parse_args(argv)
  study = study_of(args)
  folder = text_folder(args)
  if args.trial is not None:
    if not args.quick:
      harness.require_gpu()
    trials.write(
      folder,
      Trial(**args.trial),
      lambda trial: run_trial(study, trial, folder, args.stop_at),
    )
    return
  queue = trials.Queue("benchmarks.quality", folder, args, argv)
  try:
    text = prepare(study, args.corpus, args.max_bytes, folder)
  except UsageError as error:
    raise SystemExit(str(error)) from error
  trials.keep_known(folder, args.known, text)
  few = study.steps(study.tokens // 10)
  searched, rates = [], dict.fromkeys(study.kinds, study.rates[0])
  if len(study.rates) > 1:
    searched = queue.run(
      Trial(kind, study.seeds[0], rate, few)
      for kind in study.kinds
      for rate in study.rates
    )
    rates = trials.best(searched, "validation")
  wanted = [
    Trial(kind, seed, rates[kind], study.steps(study.tokens))
    for i, seed in enumerate(study.seeds)
    for kind in study.kinds
    if kind in rates and (i == 0 or kind in COMPARED)
  ]
  found = queue.run(wanted)
  name = args.name or f"quality_{args.tokenizer}"
  harness.record(
    args.out,
    name,
    f"Quality after {study.tokens / 1e6:g}M tokens, rows of {study.length}",
    tables(study, searched, found),
    text=text,
    results=found,
    searched=searched,
  )
  if found:
    plot(args.out / f"{name}.png", study, found)
  if len(found) < len(wanted):
    print(f"{len(found)} of {len(wanted)} models are trained; run it again")


if __name__ == "__main__":
  main()
