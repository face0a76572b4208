"""Sampling from a language model with a decode cache.

One compiled program prefills the prompts, another samples; later calls with the
same model and shapes reuse both. Layers and their cache are in `nsa_jax.layers`
and `nsa_jax.cache`; tokenisation is up to the caller.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import (
  Any,
  Literal,
  NamedTuple,
  Required,
  TypeAlias,
  TypedDict,
  Unpack,
  overload,
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from nsa_jax import _checks
from nsa_jax.cache.state import Cache, quantize
from nsa_jax.typing import KV, Array

# Logits float32 [B, vocabulary], tokens int32 [B, capacity] and lengths int32
# [B] to the logits to sample from.
LogitsHook: TypeAlias = Callable[[Array, Array, Array], Array]
# One number for all rows, or one for each.
_PerRow: TypeAlias = float | Sequence[float] | np.ndarray | Array

# With a lower temperature, the scaled logits may overflow float32.
MIN_TEMPERATURE = 1e-6


class Generated(NamedTuple):
  """Prompts and their continuations.

  Attributes:
    tokens: int32 [B, P + max_new_tokens], or as many columns as the longest row
      may have, if `max_new_tokens` is one per row: the prompt, then the new
      tokens, then `pad_token`.
    lengths: int32 [B], tokens per row, including the prompt and a stop token.
  """

  tokens: Array
  lengths: Array


class GeneratedDetails(NamedTuple):
  """What `generate` returns if it is asked for more than tokens.

  Attributes:
    tokens: as in `Generated`.
    lengths: as in `Generated`.
    log_probs: float32, the shape of `tokens`: the log-probability of every new
      token by the model, before `logits_hook`, `temperature`, `top_k` and
      `top_p`; 0 at prompts and padding. None unless asked for.
    cache: the model's cache, which holds all tokens of a row except the last;
      the argument `cache` of a later call. None unless asked for.
  """

  tokens: Array
  lengths: Array
  log_probs: Array | None
  cache: Any


class _State(NamedTuple):
  """Carry of the sampling loop; `tokens` and `lengths` as in Generated."""

  cache: Any  # holds all tokens of a row except the last
  tokens: Array
  lengths: Array
  live: Array  # bool [B], rows that have not stopped
  step: Array  # int32 (), tokens sampled so far in each live row
  log_probs: Array | None = None  # as in GeneratedDetails


class _Options(TypedDict, total=False):
  """Arguments of `generate` on which the type of its result does not depend."""

  max_new_tokens: Required[_PerRow]
  lengths: Any
  temperature: _PerRow
  top_k: int | None
  top_p: float | None
  stop_token: int | Sequence[int] | None
  logits_hook: LogitsHook | None
  pad_token: int
  key: int | Array
  cache: Any
  capacity: int | None
  prefill_chunk: int | None
  stream: Callable[[np.ndarray], Any] | None
  stream_every: int


@overload
def generate(
  model: Any,
  params: Any,
  prompts: Any,
  *,
  return_log_probs: Literal[False] = False,
  return_cache: Literal[False] = False,
  **options: Unpack[_Options],
) -> Generated: ...


@overload
def generate(
  model: Any,
  params: Any,
  prompts: Any,
  *,
  return_log_probs: Literal[True],
  return_cache: bool = False,
  **options: Unpack[_Options],
) -> GeneratedDetails: ...


@overload
def generate(
  model: Any,
  params: Any,
  prompts: Any,
  *,
  return_log_probs: bool = False,
  return_cache: Literal[True],
  **options: Unpack[_Options],
) -> GeneratedDetails: ...


def generate(
  model: Any,
  params: Any,
  prompts: Any,
  *,
  max_new_tokens: _PerRow,
  lengths: Any = None,
  temperature: _PerRow = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop_token: int | Sequence[int] | None = None,
  logits_hook: LogitsHook | None = None,
  pad_token: int = 0,
  key: int | Array = 0,
  cache: Any = None,
  capacity: int | None = None,
  prefill_chunk: int | None = None,
  return_log_probs: bool = False,
  return_cache: bool = False,
  stream: Callable[[np.ndarray], Any] | None = None,
  stream_every: int = 1,
) -> Generated | GeneratedDetails:
  """Continues prompts token by token.

  Row b draws the token at position t with `key` folded with b, then t. So it
  does not depend on the other rows, on padding, on streaming or on `cache`,
  except for the rounding of logits in programs of other shapes.

  `generate` calls compiled functions itself and cannot be called under `jit`.
  The loop is compiled once per model, B, `capacity`, `top_k`, `logits_hook`,
  number of stop tokens, and which of temperature, `top_p`, values per row and
  log-probabilities are used; the prefill also per P and `prefill_chunk`. Pad
  prompts to few different lengths.

  Args:
    model: `TransformerLM`, or another flax module with the same interface: a
      field `decode`, of any value, and a cache that is initially zero; or one
      of nnx, such as `nsa_jax.nnx.TransformerLM`, with `init_cache`.
    params: parameters of the model, what `init` returns under "params"; None
      for a model of nnx.
    prompts: int [B, P] with at least one token per row; or B sequences of
      tokens, which may differ in length.
    max_new_tokens: number of tokens to sample per row, or int [B] with one
      number for each row.
    lengths: int [B], prompt lengths; P by default. Later tokens of a row are
      padding.
    temperature: divides the logits. 0 takes the most likely token; ties go to
      the lowest. Or [B], one for each row.
    top_k: samples only among the `top_k` most likely tokens; ties go to the
      lower token.
    top_p: then samples only among the smallest set of most likely tokens whose
      probability reaches `top_p`, in (0, 1]; ties likewise. The set is never
      empty.
    stop_token: ends its row, as does each of several tokens; the loop ends when
      all rows have ended.
    logits_hook: `hook(logits, tokens, lengths)` returns the logits to sample
      from, before temperature, `top_k` and `top_p`: -inf forbids a token. It
      gets float32 [B, vocabulary], int32 [B, capacity] and int32 [B], where row
      b has the `lengths[b]` tokens `tokens[b, : lengths[b]]` so far. It is
      compiled into the loop, so that the same function should be passed again
      and again, and no new lambda.
    pad_token: fills a row after its end; any int32, since it is never read.
    key: `jax.random.key`, or a seed in [0, 2**32).
    cache: what an earlier call returned under `return_cache` for the same rows,
      or a cache that `nsa_jax.cache` made of some. `prompts` are whole, as
      without it: the first tokens of row b, as many as its cache holds, are not
      read again, nor compared with those in the cache. The cache is donated: it
      cannot be used afterwards. With `prefill_chunk` prompts of all lengths
      share one program.
    capacity: tokens per row of the cache, at least P + max_new_tokens, which is
      the default, or what `cache` has. Memory grows with it and, without
      kernels, the time of a step too; but with a fixed capacity all calls with
      B rows share one compiled loop.
    prefill_chunk: prompt tokens per prefill step, all by default. It bounds the
      memory of long prompts.
    return_log_probs: also return the log-probabilities of the new tokens.
    return_cache: also return the cache, for a next turn.
    stream: called with the new tokens of each step in turn, int32 [B] on the
      host; `pad_token` in rows that have ended. The loop returns to Python for
      it, so on any backend tokens arrive in order, and exceptions, including
      Ctrl-C, end the generation as usual. A callback inside the compiled loop
      guarantees neither.
    stream_every: steps between two returns to Python. Larger values are faster,
      but their tokens arrive together.

  Returns:
    Generated; with `return_log_probs` or `return_cache` GeneratedDetails. A
    token is -1 if its logits contained a NaN or were all -inf.

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
  model = _decoder(model)
  if isinstance(params, Mapping) and "params" in params:
    raise ValueError(
      f"`params` has the collections {sorted(params)}; it must be what `init` "
      'returns under "params".'
    )
  pad_token = _checks.static_int("pad_token", pad_token)
  tokens, lengths = _read_prompts(prompts, lengths)
  batch, longest = tokens.shape
  limits = None  # final lengths of rows that end at different steps
  if _is_scalar(max_new_tokens):
    most = _checks.static_int("max_new_tokens", max_new_tokens, 1)
    needed = longest + most
  else:
    own = _row_integers("max_new_tokens", max_new_tokens, batch, 1)
    limits, most = lengths + own, int(own.max())
    needed = max(longest, int(limits.max()))
  capacity, name = _read_capacity(capacity, cache, needed)
  if capacity < needed:
    raise ValueError(
      f"{name}={capacity} must be at least {needed}, for prompts of {longest} "
      f"tokens and `max_new_tokens`={_checks.show(max_new_tokens)}."
    )
  if prefill_chunk is not None:
    prefill_chunk = _checks.static_int("prefill_chunk", prefill_chunk, 1)
  _checks.flag("return_log_probs", return_log_probs)
  _checks.flag("return_cache", return_cache)
  if stream is not None and not callable(stream):
    raise ValueError(
      f"`stream`={_checks.show(stream)} must be a function or None."
    )
  stream_every = _checks.static_int("stream_every", stream_every, 1)

  logits, empty, shapes = _shapes(model, batch, capacity)
  check_params(params, shapes)
  vocabulary = logits.shape[-1]
  given = np.arange(longest) < lengths[:, None]
  wrong = given & ((tokens < 0) | (tokens >= vocabulary))
  if wrong.any():
    raise ValueError(
      f"`prompts` has the token {tokens[wrong][0]}; tokens must lie in [0, "
      f"{vocabulary})."
    )
  options = _read_sampling(temperature, top_k, top_p, batch, vocabulary)
  top_k = options.pop("top_k")
  _check_hook(logits_hook, (batch, vocabulary), capacity)
  options |= {
    "key": _checks.random_key(key),
    "stop_tokens": _read_stop_tokens(stop_token, vocabulary),
    "limits": None if limits is None else limits.astype(np.int32),
  }
  held = _read_cache(cache, empty, lengths)

  # As wide as the cache, so that prompts of all lengths share one loop.
  padded = np.full((batch, capacity), pad_token, np.int32)
  padded[:, :longest][given] = tokens[given]
  # From here on, transfers are explicit: a user's `jax.transfer_guard` may
  # forbid others.
  if cache is None:
    cache = _empty_cache(model, batch, capacity)
  else:
    cache = jax.tree.map(
      lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), cache
    )
  # The loop starts with the last token of the prompt: no other logits of the
  # prompt are needed, and none are computed.
  for start, *part in _chunks(
    padded, lengths - 1, held, longest, prefill_chunk
  ):
    cache = _prefill(model, start, params, cache, *jax.device_put(part))
  host = padded, lengths.astype(np.int32), np.ones(batch, bool), np.int32(0)
  zeros = np.zeros(padded.shape, np.float32) if return_log_probs else None
  state = _State(cache, *jax.device_put((*host, zeros)))
  del cache  # It is donated to the loop.

  decode = functools.partial(
    _decode,
    model,
    params=params,
    top_k=top_k,
    logits_hook=logits_hook,
    **jax.device_put(options),
  )
  every = most if stream is None else stream_every
  for before in range(0, most, every):
    until = min(before + every, most)
    state = decode(state=state, until=jax.device_put(until))
    if stream is None:
      break
    first = jax.device_put(lengths + before)
    new = _window(
      state.tokens, first, jax.device_put(np.int32(pad_token)), every
    )
    new, step = jax.device_get((new, state.step))
    for column in new.T[: step - before]:
      stream(column)
    if step < until:
      break
  tokens = jax.lax.slice_in_dim(state.tokens, 0, needed, axis=1)
  if not (return_log_probs or return_cache):
    return Generated(tokens, state.lengths)
  log_probs = state.log_probs
  if log_probs is not None:
    log_probs = jax.lax.slice_in_dim(log_probs, 0, needed, axis=1)
  cache = state.cache if return_cache else None
  return GeneratedDetails(tokens, state.lengths, log_probs, cache)


def empty_cache(model: Any, batch: int, capacity: int) -> Any:
  """A model's cache without tokens, for steps of one's own.

  Args:
    model: as in `generate`, of linen or nnx; its `max_append` is that of the
      cache.
    batch: B.
    capacity: tokens per row.

  Returns:
    What `init` returns under "cache" for tokens [B, capacity], but without
    parameters; for a model of nnx the same, of its `nnx.Cache` variables.

  Raises:
    ValueError: if an argument does not fit.

  Example:
    >>> from nsa_jax import TransformerConfig, TransformerLM, cache
    >>> from nsa_jax.sampling import empty_cache
    >>> model = TransformerLM(
    ...   TransformerConfig.preset("tiny", num_layers=1, attention="window")
    ... )
    >>> cache.num_bytes(empty_cache(model, 2, 64))
    16400
  """
  batch = _checks.static_int("batch", batch, 1)
  capacity = _checks.static_int("capacity", capacity, 1)
  model, _ = with_params(model, None)
  model = _decoder(model)
  _shapes(model, batch, capacity)  # Raises if the model has no cache.
  return _empty_cache(model, batch, capacity)


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


# What depends on the kind of module is in `_decoder`, `_init` and `_apply`.


def _decoder(model):
  """The model with its cache."""
  if not hasattr(model, "decode") or not hasattr(model, "clone"):
    raise ValueError(
      f"`model` of type {type(model).__name__} must be a TransformerLM or "
      "another flax module with a field `decode`."
    )
  return model.clone(decode=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(model, batch, capacity):
  """Logits and cache, evaluated only for their shapes."""
  tokens = jnp.zeros((batch, capacity), jnp.int32)
  logits, variables = model.init_with_output(jax.random.key(0), tokens)
  return logits, variables["cache"], variables.get("params", {})


def _apply(model, params, cache, tokens, segment_ids, prefix_length=None):
  """Logits [B, T, vocabulary] and the cache with the tokens [B, T]."""
  logits, updated = model.apply(
    {"params": params, "cache": cache},
    tokens,
    segment_ids=segment_ids,
    prefix_length=prefix_length,
    mutable=["cache"],
  )
  return logits, updated["cache"]


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
  """Appends tokens [B, T] of the prompts, from position `start` if static."""
  return _apply(model, params, cache, tokens, segment_ids, start)[1]


@functools.partial(
  jax.jit,
  static_argnames=("model", "top_k", "logits_hook"),
  donate_argnames="state",
)
def _decode(
  model,
  params,
  state,
  until,
  key,
  temperature,
  top_k,
  top_p,
  stop_tokens,
  limits=None,
  logits_hook=None,
):
  """Samples until step `until` or until all rows have stopped."""
  rows = jnp.arange(state.tokens.shape[0])
  all_live = stop_tokens is None and limits is None

  def advance(state):
    segment_ids = None
    if not all_live:
      segment_ids = state.live[:, None].astype(jnp.int32)
    logits, cache = _apply(
      model,
      params,
      state.cache,
      state.tokens[rows, state.lengths - 1][:, None],
      segment_ids,
    )
    logits = raw = logits[:, 0].astype(jnp.float32)
    if logits_hook is not None:
      logits = logits_hook(logits, state.tokens, state.lengths)
    token = _sample(logits, key, state.lengths, temperature, top_k, top_p)
    # Stopped rows write out of range, which is dropped.
    place = jnp.where(state.live, state.lengths, state.tokens.shape[1])
    lengths = state.lengths + state.live.astype(jnp.int32)
    live = state.live
    if stop_tokens is not None:
      live &= (token[:, None] != stop_tokens[None]).all(axis=1)
    if limits is not None:
      live &= lengths < limits
    log_probs = state.log_probs
    if log_probs is not None:
      own = _log_prob(raw, token)
      log_probs = log_probs.at[rows, place].set(own, mode="drop")
    return _State(
      cache=cache,
      tokens=state.tokens.at[rows, place].set(token, mode="drop"),
      lengths=lengths,
      live=live,
      step=state.step + 1,
      log_probs=log_probs,
    )

  return jax.lax.while_loop(
    lambda state: (state.step < until) & state.live.any(), advance, state
  )


@functools.partial(jax.jit, static_argnames="size")
def _window(tokens, first, pad_token, size):
  """`size` tokens of each row from `first` [B] on; `pad_token` past the end."""
  index = first[:, None] + jnp.arange(size)[None]
  new = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
  return jnp.where(index < tokens.shape[1], new, pad_token)


def _sample(logits, key, positions, temperature, top_k, top_p):
  """One token per row, int32 [B]; the argmax if `temperature` is None."""
  logits = logits.astype(jnp.float32)
  token = logits.argmax(axis=-1)
  if temperature is not None:
    per_row = jnp.ndim(temperature) == 1
    divisor = temperature
    if per_row:
      divisor = jnp.where(temperature > 0, temperature, 1)[:, None]
    # The largest logit becomes 0, which no temperature can overflow, even if it
    # is infinite.
    high = logits.max(axis=-1, keepdims=True)
    scaled = jnp.where(logits == high, 0, (logits - high) / divisor)
    drawn = _draw(key, positions, filter_logits(scaled, top_k, top_p))
    token = jnp.where(temperature > 0, drawn, token) if per_row else drawn
  # A hook may forbid every token.
  valid = ~jnp.isnan(logits).any(axis=-1) & (logits > -jnp.inf).any(axis=-1)
  return jnp.where(valid, token, -1).astype(jnp.int32)


def _log_prob(logits, token):
  """Of one token per row, float32 [B]; NaN for token -1."""
  log_probs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(log_probs, token.clip(0)[:, None], axis=1)[:, 0]
  return jnp.where(token < 0, jnp.nan, own)


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


def _chunks(padded, counts, held, longest, size):
  """Start, if static, tokens [B, n] and segments of each step of the prefill.

  Args:
    padded: int32 [B, capacity], the prompts.
    counts: int [B], tokens of each prompt that the cache must hold.
    held: int [B], tokens that it holds.
    longest: P.
    size: tokens per step; None for all.
  """
  if not held.any():
    size = size or longest
    for start in range(0, longest - 1, size):
      stop = min(start + size, longest - 1)
      known = np.arange(start, stop) < counts[:, None]
      part = np.where(known, padded[:, start:stop], 0)
      yield start, part, known.astype(np.int32)
    return
  # Rows go on from lengths of their own, which a program does not know. All
  # steps have the same shape.
  new = counts - held
  size = size or max(int(new.max()), 1)
  for first in range(0, int(new.max()), size):
    index = first + np.arange(size)
    known = index < new[:, None]
    place = np.where(known, held[:, None] + index, 0)
    part = np.where(known, np.take_along_axis(padded, place, axis=1), 0)
    yield None, part, known.astype(np.int32)


def _read_capacity(capacity, cache, needed):
  """The capacity and what it is called: the argument, or that of the cache."""
  if capacity is not None:
    return _checks.static_int("capacity", capacity, 1), "`capacity`"
  keys = [x.selected[0] for x in _caches(cache) if isinstance(x.selected, KV)]
  sizes = [x.shape[-3] for x in keys if getattr(x, "ndim", 0) >= 4]
  return min(sizes, default=needed), "`capacity` of `cache`"


def _caches(cache):
  """The caches of the layers in a model's cache."""
  parts = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, Cache))
  return [x for x in parts if isinstance(x, Cache)]


def _read_cache(cache, empty, lengths):
  """Tokens that the rows of a given cache hold, int [B] in NumPy."""
  if cache is None:
    return np.zeros_like(lengths)
  if any(part.scales is not None for part in _caches(cache)):
    empty = jax.eval_shape(quantize, empty)
  want = dict(jax.tree.leaves_with_path(empty))
  have = dict(jax.tree.leaves_with_path(cache))
  if not _caches(empty):
    raise ValueError(
      "`cache` must be None for a model whose layers have no "
      "nsa_jax.cache.Cache."
    )
  other = sorted(map(jax.tree_util.keystr, want.keys() ^ have.keys()))
  if other:
    raise ValueError(
      f"`cache{other[0]}` is missing or one too many: `cache` must be what an "
      "earlier call returned for this model."
    )
  for path, x in have.items():
    name = f"cache{jax.tree_util.keystr(path)}"
    like = want[path]
    if not isinstance(x, jax.Array):
      x = _checks.array(name, x, like.ndim, f"{like.shape}")
    rule = "that of the model's cache for these prompts and this capacity"
    _checks.shape(name, x, like.shape, rule)
    if x.dtype != like.dtype:
      raise ValueError(
        f"`{name}` of dtype {x.dtype} must have the dtype {like.dtype}, {rule}."
      )
    if not isinstance(x, jax.core.Tracer) and x.is_deleted():
      raise ValueError(
        f"`{name}` was donated to an earlier call: pass the cache that it "
        "returned."
      )
  known = _checks.concrete(_caches(cache)[0].lengths)
  if known is None:
    raise ValueError(
      "`cache` must hold lengths that are known here, not traced: `generate` "
      "calls compiled functions itself."
    )
  # A scanned model stacks its layers.
  held = known.reshape(-1, len(lengths))[0]
  wrong = (held < 0) | (held >= lengths)
  if wrong.any():
    row = int(wrong.argmax())
    raise ValueError(
      f"`cache` holds {held[row]} tokens in row {row}, whose prompt has "
      f"{lengths[row]}: prompts must be whole, with at least one token after "
      "those in the cache, from which `nsa_jax.cache.rewind` takes some back."
    )
  return held


def _check_hook(hook, shape, capacity):
  """Checks that a hook maps logits of a shape to such."""
  if hook is None:
    return
  if not callable(hook) or getattr(hook, "__hash__", None) is None:
    raise ValueError(
      f"`logits_hook`={_checks.show(hook)} must be a function, with a hash, or "
      "None."
    )
  batch = shape[0]
  found = jax.eval_shape(
    hook,
    jax.ShapeDtypeStruct(shape, jnp.float32),
    jax.ShapeDtypeStruct((batch, capacity), jnp.int32),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
  )
  if getattr(found, "shape", None) != shape or not jnp.issubdtype(
    found.dtype, jnp.floating
  ):
    raise ValueError(
      f"`logits_hook` returns {_checks.show(found)}, which must be logits of "
      f"shape {shape}."
    )


def _read_stop_tokens(stop_token, vocabulary):
  """Tokens that end a row, int32 [n] in NumPy; None if there are none."""
  if stop_token is None:
    return None
  if _is_scalar(stop_token):
    stop_token = [_checks.static_int("stop_token", stop_token, 0)]
  known = _integers("stop_token", stop_token, 1)
  for token in known:
    if not 0 <= token < vocabulary:
      raise ValueError(f"`stop_token`={token} must lie in [0, {vocabulary}).")
  return known.astype(np.int32) if known.size else None


def _is_scalar(value):
  """Whether a value is not one for each row."""
  return not (isinstance(value, list | tuple) or np.ndim(value))


def _row_integers(name, value, batch, minimum):
  """Integers of at least `minimum`, one per row, in NumPy."""
  known = _integers(name, value, 1)
  _checks.shape(name, known, (batch,), "one entry for each of `prompts`")
  if known.min() < minimum:
    row = int(known.argmin())
    raise ValueError(
      f"`{name}`[{row}]={known[row]} must be at least {minimum}."
    )
  return known


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


def _read_sampling(temperature, top_k, top_p, batch, vocabulary):
  """Validated arguments of `_decode`; those without effect become None."""
  temperature = _read_temperature(temperature, batch)
  top_k, top_p = _check_top_k(top_k, vocabulary), _check_top_p(top_p)
  if not np.any(temperature):
    return {"temperature": None, "top_k": None, "top_p": None}
  return {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": None if top_p == 1 else top_p,
  }


def _read_temperature(temperature, batch):
  """A number, or float32 [B] in NumPy."""
  if _is_scalar(temperature):
    temperature = _checks.number("temperature", temperature)
    _check_temperature("temperature", temperature)
    return temperature
  known = _checks.concrete(temperature)
  if known is None or known.shape != (batch,):
    raise ValueError(
      f"`temperature`={_checks.show(temperature)} must be a number, or {batch} "
      "numbers that are known here, one for each of `prompts`."
    )
  for row, one in enumerate(known):
    name = f"temperature[{row}]"
    _check_temperature(name, _checks.number(name, one))
  return known.astype(np.float32)


def _check_temperature(name, value):
  if value != 0 and not MIN_TEMPERATURE <= value < math.inf:
    raise ValueError(
      f"`{name}`={value} must be 0, for the most likely token, or a finite "
      f"number of at least {MIN_TEMPERATURE}."
    )


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
