"""Speculative decoding: a small model drafts tokens, a large one checks them.

    python examples/speculative.py
    python examples/speculative.py --target runs/large --draft runs/small

The large model reads all drafts in one pass. Rejected ones are taken back from
both caches by `nsa_jax.cache.rewind`, and what is kept has the distribution of
the large model (arXiv 2211.17192). For every number of drafts the script
prints how many are accepted and the tokens per second, beside those of
`nsa_jax.generate`.

Without runs of train_lm.py, both models are trained here first, on the source
of `argparse` or on `--text`.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nsa_jax import TransformerConfig, TransformerLM, cache, generate
from nsa_jax.sampling import empty_cache

if TYPE_CHECKING or __package__:
  from examples import lm
  from examples.lm.flags import Parser, UsageError, positive
else:  # a script; see lm/__init__.py
  import lm
  from lm.flags import Parser, UsageError, positive


@dataclasses.dataclass(frozen=True)
class Speculation:
  """What a program is compiled for.

  Attributes:
    target: the model whose tokens are wanted, with a cache that takes back
      `num_drafts + 1` tokens.
    draft: the model that drafts, likewise.
    num_drafts: G, drafts per pass of the target.
    temperature: of both; 0 takes the most likely tokens.
  """

  target: TransformerLM
  draft: TransformerLM
  num_drafts: int
  temperature: float


class State(NamedTuple):
  """Carry of the loop.

  Both caches hold all tokens of a row except the last.
  """

  caches: tuple[Any, Any]  # of target and draft
  tokens: jax.Array  # int32 [B, capacity]
  lengths: jax.Array  # int32 [B]
  passes: jax.Array  # int32 (), of the target, summed over rows
  accepted: jax.Array  # int32 (), drafts that were kept, likewise
  step: jax.Array  # int32 ()


def probabilities(logits: jax.Array, temperature: float) -> jax.Array:
  """Of the next token, [..., V]: one at the argmax if `temperature` is 0."""
  if temperature == 0:
    return jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1])
  return jax.nn.softmax(logits.astype(jnp.float32) / temperature)


def accept(
  key: jax.Array,
  drafts: jax.Array,
  draft_probs: jax.Array,
  target_probs: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """How many drafts are kept, and the token that follows them.

  A draft x is kept with probability min(1, p(x) / q(x)). The token in the place
  of the first one that is not comes from max(0, p - q), normalised; after the
  last draft it comes from p. Each token then has the distribution p.

  Args:
    key: of `jax.random`.
    drafts: int32 [B, G], drawn from q.
    draft_probs: q, float32 [B, G, V].
    target_probs: p, float32 [B, G + 1, V].

  Returns:
    Numbers in [0, G], int32 [B], and tokens, int32 [B].
  """
  batch, length = drafts.shape
  key_kept, key_next = jax.random.split(key)
  p, q = (
    jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0]
    for x in (target_probs[:, :-1], draft_probs)
  )
  kept = jax.random.uniform(key_kept, (batch, length)) * q < p
  count = jnp.cumprod(kept, axis=1).sum(axis=1).astype(jnp.int32)
  rows = jnp.arange(batch)
  own = target_probs[rows, count]
  nothing = jnp.zeros_like(draft_probs[:, :1])
  other = jnp.concatenate([draft_probs, nothing], axis=1)[rows, count]
  rest = jnp.maximum(own - other, 0)
  # Rounding may leave nothing of two equal distributions.
  rest = jnp.where(rest.any(axis=-1, keepdims=True), rest, own)
  return count, jax.random.categorical(key_next, jnp.log(rest))


def _apply(model, params, held, tokens, live, **options):
  """Logits of tokens [B, T], appended to the cache of rows that are live."""
  segments = jnp.broadcast_to(live[:, None], tokens.shape)
  logits, updated = model.apply(
    {"params": params, "cache": held},
    tokens,
    segment_ids=segments.astype(jnp.int32),
    mutable=["cache"],
    **options,
  )
  return logits, updated["cache"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(model, params, held, tokens):
  """The cache of whole prompts [B, T]."""
  live = jnp.ones(len(tokens), bool)
  return _apply(model, params, held, tokens, live, prefix_length=0)[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _loop(
  spec: Speculation,
  params: tuple[Any, Any],
  state: State,
  limits: jax.Array,
  key: jax.Array,
) -> State:
  """Drafts and checks until every row has `limits` [B] tokens."""
  rows = jnp.arange(len(state.tokens))

  def draw(key, probs):
    return jax.random.categorical(key, jnp.log(probs)).astype(jnp.int32)

  def advance(state):
    live = state.lengths < limits
    keys = jax.random.split(
      jax.random.fold_in(key, state.step), spec.num_drafts + 2
    )

    def draft(carry, key):
      held, token = carry
      logits, held = _apply(spec.draft, params[1], held, token[:, None], live)
      probs = probabilities(logits[:, 0], spec.temperature)
      return (held, draw(key, probs)), (token, probs)

    # One step more than there are drafts: its result is not read, but the
    # cache must hold the last draft as well, in case that it is kept.
    first = state.tokens[rows, state.lengths - 1]
    (drafting, _), (read, probs) = jax.lax.scan(
      draft, (state.caches[1], first), keys[1:]
    )
    read, probs = jnp.moveaxis(read, 0, 1), jnp.moveaxis(probs, 0, 1)
    logits, checking = _apply(
      spec.target, params[0], state.caches[0], read, live
    )
    drafts = read[:, 1:]
    count, token = accept(
      keys[0],
      drafts,
      probs[:, :-1],
      probabilities(logits, spec.temperature),
    )
    index = jnp.arange(spec.num_drafts + 1)[None]
    new = jnp.pad(drafts, [(0, 0), (0, 1)])
    new = jnp.where(index == count[:, None], token[:, None], new)
    # The others are written out of range, which is dropped.
    place = state.lengths[:, None] + index
    known = live[:, None] & (index <= count[:, None])
    place = jnp.where(known, place, state.tokens.shape[1])
    lengths = jnp.where(
      live, jnp.minimum(state.lengths + count + 1, limits), state.lengths
    )
    return State(
      caches=cache.rewind((checking, drafting), lengths - 1),
      tokens=state.tokens.at[rows[:, None], place].set(new, mode="drop"),
      lengths=lengths,
      passes=state.passes + live.sum(dtype=jnp.int32),
      accepted=state.accepted + jnp.where(live, count, 0).sum(),
      step=state.step + 1,
    )

  return jax.lax.while_loop(
    lambda state: (state.lengths < limits).any(), advance, state
  )


def speculate(
  spec: Speculation,
  params: tuple[Any, Any],
  prompts: np.ndarray,
  max_new_tokens: int,
  key: jax.Array,
) -> State:
  """Continues prompts int [B, P], all of the same length."""
  batch, length = prompts.shape
  limit = length + max_new_tokens
  # Drafts beyond the limit need room, too.
  capacity = limit + spec.num_drafts + 1
  tokens = np.zeros((batch, capacity), np.int32)
  tokens[:, :length] = prompts
  caches = []
  for model, one in zip((spec.target, spec.draft), params, strict=True):
    held = empty_cache(model, batch, capacity)
    if length > 1:
      held = _prefill(model, one, held, prompts[:, :-1])
    caches.append(held)
  lengths = np.full(batch, length, np.int32)
  counters = (np.int32(0),) * 3
  host = jax.device_put((tokens, lengths, *counters))
  state = State((caches[0], caches[1]), *host)
  limits = jnp.full(batch, limit, jnp.int32)
  return _loop(spec, params, state, limits, key)


def train(
  config: TransformerConfig, text: np.ndarray, args: argparse.Namespace
) -> tuple[TransformerLM, Any]:
  """Trains a model of bytes on a text; returns it and its parameters."""
  model, optimizer = TransformerLM(config), optax.adamw(args.learning_rate)
  length = args.seq_len
  params = jax.jit(model.init)(
    jax.random.key(0), jnp.zeros((1, length), jnp.int32)
  )["params"]
  opt_state = optimizer.init(params)

  def loss_fn(params, windows):
    losses = model.apply(
      {"params": params}, windows[:, :-1], labels=windows[:, 1:]
    )
    return jnp.mean(jnp.asarray(losses))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, opt_state, windows):
    loss, grads = jax.value_and_grad(loss_fn)(params, windows)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  rng, loss = np.random.default_rng(0), jnp.nan
  for _ in range(args.steps):
    start = rng.integers(0, len(text) - length, size=args.train_batch)
    windows = text[start[:, None] + np.arange(length + 1)].astype(np.int32)
    params, opt_state, loss = train_step(params, opt_state, windows)
  print(
    f"{config.num_layers} layers of width {config.model_dim}: "
    f"{float(loss):.2f} nats after {args.steps} steps",
    flush=True,
  )
  return model, params


def measure(
  models: Sequence[TransformerLM],
  params: tuple[Any, Any],
  prompts: np.ndarray,
  args: argparse.Namespace,
) -> list[dict[str, Any]]:
  """Acceptance and tokens per second, by number of drafts; 0 is `generate`."""
  new, rows = args.new_tokens, len(prompts)
  key = jax.random.key(args.seed)

  def timed(run):
    """The result, and the median time of the runs after the first."""
    result, times = jax.block_until_ready(run()), []
    for _ in range(args.repeats):
      start = time.perf_counter()
      result = jax.block_until_ready(run())
      times.append(time.perf_counter() - start)
    return result, statistics.median(times)

  alone, seconds = timed(
    lambda: generate(
      models[0],
      params[0],
      prompts,
      max_new_tokens=new,
      temperature=args.temperature,
      key=key,
    )
  )
  results: list[dict[str, Any]] = [
    {"drafts": 0, "tokens_per_second": rows * new / seconds}
  ]
  print(f"alone: {results[0]['tokens_per_second']:.0f} tokens/s", flush=True)
  for drafts in args.num_drafts:
    target, draft = (
      x.clone(decode=True, max_append=drafts + 1) for x in models
    )
    spec = Speculation(target, draft, drafts, args.temperature)
    state, seconds = timed(
      functools.partial(speculate, spec, params, prompts, new, key)
    )
    passes, accepted = int(state.passes), int(state.accepted)
    result = {
      "drafts": drafts,
      "accepted": accepted / (passes * drafts),
      "tokens_per_pass": rows * new / passes,
      "tokens_per_second": rows * new / seconds,
    }
    result["speedup"] = (
      result["tokens_per_second"] / results[0]["tokens_per_second"]
    )
    line = (
      f"{drafts} drafts: {result['accepted']:.0%} accepted, "
      f"{result['tokens_per_pass']:.2f} tokens per pass, "
      f"{result['tokens_per_second']:.0f} tokens/s, "
      f"{result['speedup']:.2f} times as fast"
    )
    if args.temperature == 0:
      tokens = state.tokens[:, : prompts.shape[1] + new]
      result["equal"] = float((tokens == alone.tokens).mean())
      line += f", {result['equal']:.1%} the same tokens"
    print(line, flush=True)
    results.append(result)
  return results


def load_models(
  args: argparse.Namespace,
) -> tuple[list[TransformerLM], tuple[Any, Any], np.ndarray]:
  """Both models, their parameters, and a text that they were not trained on."""
  text = pathlib.Path(args.text).read_bytes()
  if args.target is None and args.draft is None:
    data = np.frombuffer(text, np.uint8)
    cut = len(data) - len(data) // 10
    if cut <= args.seq_len:
      raise UsageError(f"--text has {len(data)} bytes, too few to train on.")
    configs = [
      TransformerConfig.preset(
        "tiny",
        num_layers=args.target_layers,
        model_dim=args.target_dim,
        num_heads=args.target_dim // 32,
        mlp_dim=args.target_dim * 11 // 4,
      ),
      TransformerConfig.preset(
        "tiny",
        num_layers=1,
        model_dim=args.draft_dim,
        num_heads=args.draft_dim // 32,
        mlp_dim=args.draft_dim * 11 // 4,
        attention="window",
      ),
    ]
    pairs = [train(config, data[:cut], args) for config in configs]
    return (
      [model for model, _ in pairs],
      (pairs[0][1], pairs[1][1]),
      data[cut:].astype(np.int32),
    )
  if args.target is None or args.draft is None:
    raise UsageError("--target and --draft come together.")
  loaded = [lm.load_run(run) for run in (args.target, args.draft)]
  sizes = [one[0].config.vocab_size for one in loaded]
  if sizes[0] != sizes[1]:
    raise UsageError(f"the runs have vocabularies of {sizes} tokens.")
  tokens = loaded[0][3].encode([text])[0]
  return (
    [one[0] for one in loaded],
    (loaded[0][1], loaded[1][1]),
    np.asarray(tokens, np.int32),
  )


def add_numbers(
  parser: argparse.ArgumentParser, *numbers: tuple[str, int, str]
) -> None:
  """Flags of positive integers: name, default, meaning."""
  for name, default, what in numbers:
    parser.add_argument(
      f"--{name}",
      type=positive(int),
      default=default,
      metavar="N",
      help=f"{what} (default: {default})",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
  """The flags that `train` and `write_results` read."""
  add_numbers(
    parser,
    ("steps", 300, "training steps of a model"),
    ("seq-len", 256, "tokens of a row in training"),
    ("train-batch", 4, "rows of a batch in training"),
  )
  parser.add_argument(
    "--learning-rate",
    type=positive(float),
    default=2e-3,
    metavar="X",
    help="of training (default: 0.002)",
  )
  parser.add_argument(
    "--json", metavar="FILE", help="also write the results to this file"
  )


def write_results(args: argparse.Namespace, results: Any) -> None:
  """Writes results, with device and flags, to `--json` if it is given."""
  if args.json is None:
    return
  found = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "flags": vars(args),
    "results": results,
  }
  pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = Parser(
    prog="speculative.py",
    description=__doc__.splitlines()[0],
    allow_abbrev=False,
  )
  add = parser.add_argument
  runs = "folder of a run of train_lm.py"
  add("--target", metavar="DIR", help=f"the large model, {runs}")
  add("--draft", metavar="DIR", help=f"the small model, {runs}")
  add(
    "--text",
    default=argparse.__file__,
    metavar="FILE",
    help="what to train on and to continue (default: the source of argparse)",
  )
  add_numbers(
    parser,
    ("rows", 1, "prompts that are continued together"),
    ("prompt-tokens", 128, "tokens of a prompt"),
    ("new-tokens", 256, "tokens to sample per row"),
    ("repeats", 3, "timed runs; the median counts"),
    ("target-layers", 4, "layers of the large model"),
    ("target-dim", 256, "its width, a multiple of 32"),
    ("draft-dim", 64, "width of the small model, a multiple of 32"),
  )
  add_training(parser)
  add(
    "--num-drafts",
    type=positive(int),
    nargs="+",
    default=[2, 4, 8],
    metavar="N",
    help="drafts per pass of the large model (default: 2 4 8)",
  )
  add(
    "--temperature",
    type=float,
    default=0.0,
    metavar="X",
    help="of sampling; 0 takes the most likely token (default: 0)",
  )
  add("--seed", type=int, default=0, metavar="N", help="of prompts and samples")
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = make_parser()
  args = parser.parse_args(argv)
  try:
    models, params, text = load_models(args)
    length = args.prompt_tokens
    if len(text) < length:
      raise UsageError(
        f"--text leaves {len(text)} tokens to continue, and prompts have "
        f"{length}."
      )
    starts = np.random.default_rng(args.seed).integers(
      0, len(text) - length + 1, args.rows
    )
    prompts = text[starts[:, None] + np.arange(length)]
    results = measure(models, params, prompts, args)
    write_results(args, results)
  except (UsageError, ValueError, NotImplementedError) as error:
    parser.error(str(error))
  except OSError as error:
    parser.error(f"{error}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
