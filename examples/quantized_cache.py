"""What keys and values in 8 bit change: losses, tokens, bytes, time.

    python examples/quantized_cache.py
    python examples/quantized_cache.py --run runs/train_lm

A text is read token by token through a decode cache, once as it is and once
after `nsa_jax.cache.quantize`. Without a run of train_lm.py, a model is trained
here first, on the source of `argparse` or on `--text`.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import TransformerConfig, TransformerLM, cache, unstack_layers
from nsa_jax.sampling import empty_cache

if TYPE_CHECKING or __package__:
  from examples import lm
  from examples.lm.flags import Parser, UsageError
  from examples.speculative import (
    add_numbers,
    add_training,
    train,
    write_results,
  )
else:  # a script; see lm/__init__.py
  import lm
  from lm.flags import Parser, UsageError
  from speculative import add_numbers, add_training, train, write_results


def read(
  model: TransformerLM, params: Any, tokens: np.ndarray, quantized: bool
) -> tuple[jax.Array, int, float]:
  """Logits of tokens [B, T] by steps, bytes of the cache, seconds per step."""

  def step(held, token):
    logits, updated = model.apply(
      {"params": params, "cache": held}, token[:, None], mutable=["cache"]
    )
    return updated["cache"], logits[:, 0]

  @functools.partial(jax.jit, donate_argnums=0)
  def run(held, tokens):
    return jax.lax.scan(step, held, tokens.T)

  def timed():
    held = empty_cache(model, *tokens.shape)
    if quantized:
      held = cache.quantize(held)
    size = cache.num_bytes(held)
    start = time.perf_counter()
    _, logits = jax.block_until_ready(run(held, tokens))
    return jnp.moveaxis(logits, 0, 1), size, time.perf_counter() - start

  timed()  # compiles
  runs = [timed() for _ in range(3)]
  seconds = statistics.median(seconds for *_, seconds in runs)
  return runs[0][0], runs[0][1], seconds / tokens.shape[1]


def compare(
  model: TransformerLM, params: Any, tokens: np.ndarray
) -> dict[str, float]:
  """Both caches on a text, int [B, T + 1]."""
  decoder = model.clone(decode=True)
  found: dict[str, float] = {}
  log_probs = {}
  for name in ("full", "int8"):
    logits, size, seconds = read(
      decoder, params, tokens[:, :-1], name == "int8"
    )
    log_probs[name] = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(
      log_probs[name], jnp.asarray(tokens)[:, 1:, None], axis=-1
    )
    found |= {
      f"loss_{name}": -float(own.mean()),
      f"bytes_{name}": size,
      f"ms_per_step_{name}": 1e3 * seconds,
    }
  full, small = log_probs["full"], log_probs["int8"]
  found["kl"] = float((jnp.exp(full) * (full - small)).sum(axis=-1).mean())
  found["same_argmax"] = float(
    (full.argmax(axis=-1) == small.argmax(axis=-1)).mean()
  )
  return found


def load(
  args: argparse.Namespace,
) -> tuple[TransformerLM, Any, np.ndarray]:
  """The model, its parameters, and a text that it was not trained on."""
  text = pathlib.Path(args.text).read_bytes()
  if args.run is None:
    data = np.frombuffer(text, np.uint8)
    cut = len(data) - len(data) // 10
    if cut <= args.seq_len:
      raise UsageError(f"--text has {len(data)} bytes, too few to train on.")
    config = TransformerConfig.preset("tiny")
    model, params = train(config, data[:cut], args)
    return model, params, data[cut:].astype(np.int32)
  model, params, _, tokenizer, _ = lm.load_run(args.run)
  if model.config.scan_layers:
    model, params = unstack_layers(model, params)
  return model, params, np.asarray(tokenizer.encode([text])[0], np.int32)


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = Parser(
    prog="quantized_cache.py",
    description=__doc__.splitlines()[0],
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--run", metavar="DIR", help="folder of a run of train_lm.py")
  add(
    "--text",
    default=argparse.__file__,
    metavar="FILE",
    help="what to train on and to read (default: the source of argparse)",
  )
  add_numbers(
    parser,
    ("rows", 4, "rows that are read together"),
    ("tokens", 1024, "tokens per row"),
  )
  add_training(parser)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = make_parser()
  args = parser.parse_args(argv)
  try:
    model, params, text = load(args)
    rows, length = args.rows, args.tokens
    if len(text) <= length:
      raise UsageError(
        f"--text leaves {len(text)} tokens to read, and rows have {length}."
      )
    starts = np.linspace(0, len(text) - length - 1, rows).astype(int)
    tokens = text[starts[:, None] + np.arange(length + 1)]
    found = compare(model, params, tokens)
    write_results(args, found)
  except (UsageError, ValueError, NotImplementedError) as error:
    parser.error(str(error))
  except OSError as error:
    parser.error(f"{error}.")
  for name in ("full", "int8"):
    print(
      f"{name}: {found[f'loss_{name}']:.4f} nats, "
      f"{found[f'bytes_{name}'] / 2**20:.2f} MiB, "
      f"{found[f'ms_per_step_{name}']:.2f} ms per step"
    )
  print(
    f"KL {found['kl']:.1e} nats, {found['same_argmax']:.2%} of the most likely "
    "tokens are the same"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
