"""Sampling from a language model with a decode cache.

One compiled program prefills the prompts, another samples; later calls with the
same model and shapes reuse both. Layers and their cache are in `nsa_jax.layers`
and `nsa_jax.cache`; tokenisation is up to the caller.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from nsa_jax import _checks
from nsa_jax.typing import Array

# With a lower temperature, the scaled logits may overflow float32.
MIN_TEMPERATURE = 1e-6


class Generated(NamedTuple):
  """Prompts and their continuations.

  Attributes:
    tokens: int32 [B, P + max_new_tokens]: in each row the prompt, then the new
      tokens, then `pad_token`.
    lengths: int32 [B], tokens per row, including the prompt and a stop token.
  """

  tokens: Array
  lengths: Array


class _State(NamedTuple):
  """Carry of the sampling loop; `tokens` and `lengths` as in Generated."""

  cache: Any  # holds all tokens of a row except the last
  tokens: Array
  lengths: Array
  live: Array  # bool [B], rows that have not stopped
  step: Array  # int32 (), tokens sampled so far in each live row


def generate(
  model: Any,
  params: Any,
  prompts: Any,
  *,
  max_new_tokens: int,
  lengths: Any = None,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop_token: int | None = None,
  pad_token: int = 0,
  key: int | Array = 0,
  capacity: int | None = None,
  prefill_chunk: int | None = None,
  stream: Callable[[np.ndarray], Any] | None = None,
  stream_every: int = 1,
) -> Generated:
  """Continues prompts token by token.

  Row b draws the token at position t with `key` folded with b, then t. So it
  does not depend on the other rows, on padding or on streaming, except for the
  rounding of logits in programs of other shapes.

  `generate` calls compiled functions itself and cannot be called under `jit`.
  The loop is compiled once per model, B, `capacity`, `top_k`, and which of
  temperature, `top_p` and `stop_token` are used; the prefill also per P and
  `prefill_chunk`. Pad prompts to few different lengths.

  Args:
    model: `TransformerLM`, or another flax module with the same interface: a
      field `decode`, of any value, and a cache that is initially zero; or one
      of nnx, such as `nsa_jax.nnx.TransformerLM`, with `init_cache`.
    params: parameters of the model, what `init` returns under "params"; None
      for a model of nnx.
    prompts: int [B, P] with at least one token per row; or B sequences of
      tokens, which may differ in length.
    max_new_tokens: number of tokens to sample per row.
    lengths: int [B], prompt lengths; P by default. Later tokens of a row are
      padding.
    temperature: divides the logits. 0 takes the most likely token; ties go to
      the lowest.
    top_k: samples only among the `top_k` most likely tokens; ties go to the
      lower token.
    top_p: then samples only among the smallest set of most likely tokens whose
      probability reaches `top_p`, in (0, 1]; ties likewise. The set is never
      empty.
    stop_token: ends its row; the loop ends when all rows have ended.
    pad_token: fills a row after its end; any int32, since it is never read.
    key: `jax.random.key`, or a seed in [0, 2**32).
    capacity: tokens per row of the cache, at least P + max_new_tokens, which is
      the default. Memory grows with it and, without kernels, the time of a step
      too; but with a fixed capacity all calls with B rows share one compiled
      loop.
    prefill_chunk: prompt tokens per prefill step, all by default. It bounds the
      memory of long prompts.
    stream: called with the new tokens of each step in turn, int32 [B] on the
      host; `pad_token` in rows that have ended. The loop returns to Python for
      it, so on any backend tokens arrive in order, and exceptions, including
      Ctrl-C, end the generation as usual. A callback inside the compiled loop
      guarantees neither.
    stream_every: steps between two returns to Python. Larger values are faster,
      but their tokens arrive together.

  Returns:
    Generated. A token is -1 if its logits contained a NaN.

  Raises:
    ValueError: if an argument does not fit, before anything runs.
    NotImplementedError: if the model's implementation cannot do the call.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from nsa_jax import TransformerConfig, TransformerLM, generate
    >>> config = TransformerConfig.preset(
    ...   "tiny", num_layers=1, model_dim=16, attention="window"
    ... )
    >>> model = TransformerLM(config)
    >>> init = jax.jit(model.init)
    >>> params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> out = generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5)
    >>> out.tokens.shape, out.lengths.tolist()
    ((2, 8), [8, 6])
  """
  model, params = with_params(model, params)
  if not hasattr(model, "decode"):
    raise ValueError(
      f"`model` of type {type(model).__name__} must be a TransformerLM or "
      "another flax module with a field `decode`."
    )
  if isinstance(params, Mapping) and "params" in params:
    raise ValueError(
      f"`params` has the collections {sorted(params)}; it must be what `init` "
      'returns under "params".'
    )
  max_new_tokens = _checks.static_int("max_new_tokens", max_new_tokens, 1)
  pad_token = _checks.static_int("pad_token", pad_token)
  tokens, lengths = _read_prompts(prompts, lengths)
  batch, longest = tokens.shape
  needed = longest + max_new_tokens
  if capacity is None:
    capacity = needed
  capacity = _checks.static_int("capacity", capacity, 1)
  if capacity < needed:
    raise ValueError(
      f"`capacity`={capacity} must be at least {needed}, for prompts of "
      f"{longest} tokens and `max_new_tokens`={max_new_tokens}."
    )
  if prefill_chunk is not None:
    prefill_chunk = _checks.static_int("prefill_chunk", prefill_chunk, 1)
  if stream is not None and not callable(stream):
    raise ValueError(
      f"`stream`={_checks.show(stream)} must be a function or None."
    )
  stream_every = _checks.static_int("stream_every", stream_every, 1)

  model = model.clone(decode=True)
  logits, _, shapes = _shapes(model, batch, capacity)
  check_params(params, shapes)
  vocabulary = logits.shape[-1]
  given = np.arange(longest) < lengths[:, None]
  wrong = given & ((tokens < 0) | (tokens >= vocabulary))
  if wrong.any():
    raise ValueError(
      f"`prompts` has the token {tokens[wrong][0]}; tokens must lie in [0, "
      f"{vocabulary})."
    )
  if stop_token is not None:
    stop_token = _checks.static_int("stop_token", stop_token, 0)
    if stop_token >= vocabulary:
      raise ValueError(
        f"`stop_token`={stop_token} must lie in [0, {vocabulary})."
      )
  options = _read_sampling(temperature, top_k, top_p, vocabulary)
  top_k = options.pop("top_k")
  options |= {"key": _checks.random_key(key), "stop_token": stop_token}

  # As wide as the cache, so that prompts of all lengths share one loop.
  padded = np.full((batch, capacity), pad_token, np.int32)
  padded[:, :longest][given] = tokens[given]
  # From here on, transfers are explicit: a user's `jax.transfer_guard` may
  # forbid others.
  cache = _empty_cache(model, batch, capacity)
  # The loop starts with the last token of the prompt: no other logits of the
  # prompt are needed, and none are computed.
  chunk = prefill_chunk or longest
  for start in range(0, longest - 1, chunk):
    stop = min(start + chunk, longest - 1)
    known = np.arange(start, stop) < lengths[:, None] - 1
    part = np.where(known, padded[:, start:stop], 0)
    part, segment_ids = jax.device_put((part, known.astype(np.int32)))
    cache = _prefill(model, start, params, cache, part, segment_ids)
  host = padded, lengths.astype(np.int32), np.ones(batch, bool), np.int32(0)
  state = _State(cache, *jax.device_put(host))

  decode = functools.partial(
    _decode, model, params=params, top_k=top_k, **jax.device_put(options)
  )
  every = max_new_tokens if stream is None else stream_every
  for before in range(0, max_new_tokens, every):
    until = min(before + every, max_new_tokens)
    state = decode(state=state, until=jax.device_put(until))
    if stream is None:
      break
    first = jax.device_put(lengths + before)
    new = _window(state.tokens, first, every)
    new, step = jax.device_get((new, state.step))
    for column in new.T[: step - before]:
      stream(column)
    if step < until:
      break
  tokens = jax.lax.slice_in_dim(state.tokens, 0, needed, axis=1)
  return Generated(tokens, state.lengths)


def filter_logits(
  logits: Array, top_k: int | None = None, top_p: float | Array | None = None
) -> Array:
  """Sets the logits of tokens that must not be sampled to -inf.

  Args:
    logits: float [..., vocabulary].
    top_k: as in `generate`.
    top_p: as in `generate`; applies to the probabilities of the tokens that
      `top_k` keeps.

  Returns:
    An array like `logits`.

  Raises:
    ValueError: if an argument does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax.sampling import filter_logits
    >>> filter_logits(jnp.log(jnp.array([0.2, 0.5, 0.3])), top_p=0.6).tolist()
    [-inf, -0.6931471824645996, -1.2039728164672852]
  """
  given = _checks.as_array(logits)
  if given is None or not given.ndim:
    raise ValueError(
      f"`logits`={_checks.show(logits)} must be an array of shape [..., "
      "vocabulary]."
    )
  logits = given
  _checks.floating("logits", logits)
  _checks.not_empty("logits", logits, axes=(logits.ndim - 1,))
  top_k = _check_top_k(top_k, logits.shape[-1], "the last axis of `logits`")
  if not isinstance(top_p, jax.core.Tracer):
    top_p = _check_top_p(top_p)
  if top_k is None and top_p is None:
    return logits
  # Sorted; ties go to the lower token.
  values, ids = jax.lax.top_k(logits, top_k or logits.shape[-1])
  if top_p is not None:
    probability = jax.nn.softmax(values)
    before = jnp.cumsum(probability, axis=-1)[..., :-1]
    before = jnp.pad(before, [(0, 0)] * (logits.ndim - 1) + [(1, 0)])
    values = jnp.where(before < top_p, values, -jnp.inf)
  return jnp.put_along_axis(
    jnp.full_like(logits, -jnp.inf), ids, values, axis=-1, inplace=False
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(model, batch, capacity):
  """Logits and cache, evaluated only for their shapes."""
  tokens = jnp.zeros((batch, capacity), jnp.int32)
  logits, variables = model.init_with_output(jax.random.key(0), tokens)
  return logits, variables["cache"], variables.get("params", {})


def _shapes(model, batch, capacity):
  """Shapes of logits, cache and parameters of a model."""
  try:
    return _init.eval_shape(model, batch, capacity)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"`model` of type {type(model).__name__} must make logits, and a "
      f"collection `cache`, of tokens [B, T]: {error}"
    ) from error


def with_params(model, params):
  """A module of linen and its parameters, or what stands for a model of nnx."""
  if isinstance(model, nn.Module):
    return model, params
  if params is None:
    # Who uses linen does not wait for the import of `flax.nnx`.
    from nsa_jax.models.nnx import functional

    return functional(model)
  raise ValueError(
    f"`model` of type {type(model).__name__} must be a TransformerLM or "
    "another flax module with a field `decode`; for one of nnx, which holds "
    "its parameters, `params` must be None."
  )


def check_params(params, shapes):
  """Checks that `params` has what the model's `init` returns."""
  leaves = dict(jax.tree.leaves_with_path(nn.meta.unbox(unfreeze(params))))
  for path, want in jax.tree.leaves_with_path(nn.meta.unbox(unfreeze(shapes))):
    name = f"params{jax.tree_util.keystr(path)}"
    if path not in leaves:
      raise ValueError(
        f"`{name}` is missing: `params` must be what `init` returns under "
        '"params".'
      )
    x = leaves[path]
    if not isinstance(x, np.ndarray | jax.Array):  # They are not copied.
      x = _checks.array(name, x, want.ndim, f"{want.shape}")
    _checks.shape(name, x, want.shape, "that of the model's parameter")
    if jnp.issubdtype(want.dtype, jnp.floating):
      _checks.floating(name, x)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(model, batch, capacity):
  _, cache, _ = _init.eval_shape(model, batch, capacity)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _prefill(model, start, params, cache, tokens, segment_ids):
  """Appends tokens [start, start + T) of the prompts to the cache."""
  _, updated = model.apply(
    {"params": params, "cache": cache},
    tokens,
    segment_ids=segment_ids,
    prefix_length=start,
    mutable=["cache"],
  )
  return updated["cache"]


@functools.partial(
  jax.jit, static_argnames=("model", "top_k"), donate_argnames="state"
)
def _decode(
  model, params, state, until, key, temperature, top_k, top_p, stop_token
):
  """Samples until step `until` or until all rows have stopped."""
  rows = jnp.arange(state.tokens.shape[0])

  def advance(state):
    segment_ids = None
    if stop_token is not None:  # else all rows are live
      segment_ids = state.live[:, None].astype(jnp.int32)
    logits, updated = model.apply(
      {"params": params, "cache": state.cache},
      state.tokens[rows, state.lengths - 1][:, None],
      segment_ids=segment_ids,
      mutable=["cache"],
    )
    token = _sample(logits[:, 0], key, state.lengths, temperature, top_k, top_p)
    # Stopped rows write out of range, which is dropped.
    place = jnp.where(state.live, state.lengths, state.tokens.shape[1])
    live = state.live
    if stop_token is not None:
      live &= token != stop_token
    return _State(
      cache=updated["cache"],
      tokens=state.tokens.at[rows, place].set(token, mode="drop"),
      lengths=state.lengths + state.live.astype(jnp.int32),
      live=live,
      step=state.step + 1,
    )

  return jax.lax.while_loop(
    lambda state: (state.step < until) & state.live.any(), advance, state
  )


@functools.partial(jax.jit, static_argnames="size")
def _window(tokens, first, size):
  """`size` tokens of each row from `first` [B] on; -1 past the end."""
  index = first[:, None] + jnp.arange(size)[None]
  return jnp.take_along_axis(tokens, index, axis=1, mode="fill", fill_value=-1)


def _sample(logits, key, positions, temperature, top_k, top_p):
  """One token per row, int32 [B]; the argmax if `temperature` is None."""
  logits = logits.astype(jnp.float32)
  token = logits.argmax(axis=-1)
  if temperature is not None:
    # The largest logit becomes 0, which no temperature can overflow, even if it
    # is infinite.
    high = logits.max(axis=-1, keepdims=True)
    scaled = jnp.where(logits == high, 0, (logits - high) / temperature)
    token = _draw(key, positions, filter_logits(scaled, top_k, top_p))
  valid = ~jnp.isnan(logits).any(axis=-1)
  return jnp.where(valid, token, -1).astype(jnp.int32)


def _draw(key, positions, logits):
  """Samples row b with `key` folded with b, then with its position."""

  def one(row, position, logits):
    own = jax.random.fold_in(jax.random.fold_in(key, row), position)
    return jax.random.categorical(own, logits)

  rows = jnp.arange(len(logits)), positions, logits
  if key.dtype == jax.random.key(0, impl="threefry2x32").dtype:
    return jax.vmap(one)(*rows)
  # Under vmap, the other generators draw all rows from the key of the first.
  return jax.lax.map(lambda row: one(*row), rows)


def _read_prompts(prompts, lengths):
  """Validates prompts; padded int [B, P] and lengths [B] in NumPy."""
  if isinstance(prompts, Sequence):
    if lengths is not None:
      raise ValueError(
        "`lengths` must be None for `prompts` that are sequences of tokens, "
        "which have their own."
      )
    rows = [_integers(f"prompts[{i}]", x, 1) for i, x in enumerate(prompts)]
    lengths = np.array([row.size for row in rows], int)
    tokens = np.zeros((len(rows), lengths.max(initial=0)), int)
    for row, one in zip(tokens, rows, strict=True):
      row[: one.size] = one
  else:
    tokens = _integers("prompts", prompts, 2)
    if lengths is None:
      lengths = np.full(tokens.shape[0], tokens.shape[1])
    lengths = _integers("lengths", lengths, 1)
    if lengths.shape != tokens.shape[:1]:
      raise ValueError(
        f"`lengths` of shape {lengths.shape} must have one entry for each of "
        f"the {tokens.shape[0]} `prompts`."
      )
  if not tokens.shape[0]:
    raise ValueError("`prompts` must hold at least one row; there are 0.")
  wrong = (lengths < 1) | (lengths > tokens.shape[1])
  if wrong.any():
    row = int(wrong.argmax())
    raise ValueError(
      f"`lengths`[{row}]={lengths[row]} must lie in [1, {tokens.shape[1]}]: a "
      "row of `prompts` has at least one token."
    )
  return tokens, lengths


def _integers(name, value, rank):
  known = _checks.concrete(value)
  if isinstance(value, jax.core.Tracer):
    raise ValueError(
      f"`{name}`={_checks.show(value)} must be integers that are known here, "
      "not traced: `generate` calls compiled functions itself."
    )
  if known is None:
    raise ValueError(f"`{name}`={_checks.show(value)} must be integers.")
  if known.size and not np.issubdtype(known.dtype, np.integer):
    raise ValueError(
      f"`{name}` of dtype {known.dtype} must have an integer dtype."
    )
  if known.ndim != rank:
    raise ValueError(f"`{name}` of shape {known.shape} must have rank {rank}.")
  _checks.fits_int32(name, known)
  return known.astype(np.int64)


def _read_sampling(temperature, top_k, top_p, vocabulary):
  """Validated arguments of `_decode`; those without effect become None."""
  temperature = _checks.number("temperature", temperature)
  if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
    raise ValueError(
      f"`temperature`={temperature} must be 0, for the most likely token, or a "
      f"finite number of at least {MIN_TEMPERATURE}."
    )
  top_k, top_p = _check_top_k(top_k, vocabulary), _check_top_p(top_p)
  if temperature == 0:
    return {"temperature": None, "top_k": None, "top_p": None}
  return {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": None if top_p == 1 else top_p,
  }


def _check_top_k(top_k, vocabulary, what="the vocabulary"):
  if top_k is None:
    return None
  top_k = _checks.static_int("top_k", top_k, 1)
  if top_k > vocabulary:
    raise ValueError(f"`top_k`={top_k} must be at most {vocabulary}, {what}.")
  return top_k


def _check_top_p(top_p):
  if top_p is None:
    return None
  top_p = _checks.number("top_p", top_p)
  if not 0 < top_p <= 1:
    raise ValueError(f"`top_p`={top_p} must lie in (0, 1].")
  return top_p
