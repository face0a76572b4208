"""Sampling from a language model with a decode cache.

One compiled program reads the prompts, one samples; both are found again by
the next call with the same model and shapes. The layers and their cache are in
`nsa_jax.layers` and `nsa_jax.cache`; text and tokenisers are the caller's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import _checks
from nsa_jax.typing import Array

# Below it, logits divided by the temperature may leave float32.
MIN_TEMPERATURE = 1e-6


class Generated(NamedTuple):
  """Prompts and what follows them.

  Attributes:
    tokens: int32 [B, P + max_new_tokens]; the new tokens of a row stand right
      behind its prompt, `pad_token` behind those.
    lengths: int32 [B], tokens of each row, prompt and stop token included.
  """

  tokens: Array
  lengths: Array


class _State(NamedTuple):
  """What the loop carries; `tokens` and `lengths` as in Generated."""

  cache: Any  # holds all tokens of a row but the last
  tokens: Array
  lengths: Array
  live: Array  # bool [B], rows that have not stopped
  step: Array  # int32 (), tokens sampled in each live row


def generate(
  model: nn.Module,
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

  Row b draws the token at its position t with `key` folded with b, then t: what
  the other rows are, how they are padded, and streaming change nothing (up to
  the rounding of logits in programs of other shapes).

  Not to be called under `jit`: it calls compiled functions itself. The loop is
  compiled once for a model, B, `capacity`, `top_k`, and which of temperature,
  `top_p` and `stop_token` are in use; reading prompts, for each P and
  `prefill_chunk` as well. Prompts of many lengths are best padded to a few.

  Args:
    model: `TransformerLM`, or a module that is used like it: with a field
      `decode`, of any value, and a cache that starts with zeros.
    params: its parameters, what `init` returns under "params".
    prompts: int [B, P], at least one token in each row; or B sequences of
      tokens, each with a length of its own.
    max_new_tokens: to sample in each row.
    lengths: int [B], the first so many tokens of a row are its prompt; all by
      default.
    temperature: logits are divided by it. 0 takes the most likely token, the
      lowest of equally likely ones.
    top_k: sample only among so many most likely tokens; of equally likely ones
      the lower are taken.
    top_p: then sample only among the smallest set of most likely tokens whose
      probability reaches `top_p`, in (0, 1]; likewise. It is never empty.
    stop_token: a row ends with it; the loop, when all have.
    pad_token: what stands behind the end of a row. Any int32: it is not read.
    key: `jax.random.key`, or a seed in [0, 2**32).
    capacity: tokens that the cache has room for, at least P + max_new_tokens,
      the default. Memory and, without kernels, the time of a step grow with it;
      but with a fixed one all calls with B rows share one compiled loop.
    prefill_chunk: tokens of the prompts that are read at once, all by default.
      Bounds the memory of long prompts.
    stream: called with the new tokens of every step in turn, int32 [B] on the
      host; `pad_token` in rows that have ended. The loop returns to Python for
      it: so tokens come in order on any backend, and what the callback raises,
      Ctrl-C too, ends the generation as usual. A callback from inside the
      compiled loop can promise neither.
    stream_every: steps between two returns to Python. More are faster, and
      arrive together.

  Returns:
    Generated. A token is -1 where the logits held a NaN.

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
  if not isinstance(model, nn.Module) or not hasattr(model, "decode"):
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
    raise ValueError(f"`stream`={stream!r} must be a function or None.")
  stream_every = _checks.static_int("stream_every", stream_every, 1)

  model = model.clone(decode=True)
  logits, cache = _init.eval_shape(model, batch, capacity)
  vocabulary = logits.shape[-1]
  real = np.arange(longest) < lengths[:, None]
  wrong = real & ((tokens < 0) | (tokens >= vocabulary))
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
  options = {
    "key": _read_key(key),
    "stop_token": stop_token,
    **_read_sampling(temperature, top_k, top_p, vocabulary),
  }

  # As wide as the cache: one program for all prompts that it has room for.
  padded = np.full((batch, capacity), pad_token, np.int32)
  padded[:, :longest][real] = tokens[real]
  cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
  # The last token of a prompt is the first that the loop reads: no other
  # logits of the prompt are needed, and none are computed.
  chunk = prefill_chunk or longest
  for start in range(0, longest - 1, chunk):
    stop = min(start + chunk, longest - 1)
    known = np.arange(start, stop) < lengths[:, None] - 1
    part = np.where(known, padded[:, start:stop], 0)
    cache = _prefill(model, start, params, cache, part, known.astype(np.int32))
  state = _State(
    cache=cache,
    tokens=jnp.asarray(padded),
    lengths=jnp.asarray(lengths, jnp.int32),
    live=jnp.ones(batch, bool),
    step=jnp.zeros((), jnp.int32),
  )

  decode = functools.partial(_decode, model, params=params, **options)
  every = max_new_tokens if stream is None else stream_every
  for before in range(0, max_new_tokens, every):
    until = min(before + every, max_new_tokens)
    state = decode(state=state, until=until)
    if stream is None:
      break
    new = _window(state.tokens, lengths + before, every)
    new, step = jax.device_get((new, state.step))
    for column in new.T[: step - before]:
      stream(column)
    if step < until:
      break
  return Generated(state.tokens[:, :needed], state.lengths)


def filter_logits(
  logits: Array, top_k: int | None = None, top_p: float | Array | None = None
) -> Array:
  """Logits with -inf at the tokens that are not to be sampled.

  Args:
    logits: float [..., vocabulary].
    top_k: as in `generate`; as is the next.
    top_p: applies to the probabilities of the tokens that `top_k` keeps.

  Returns:
    An array like `logits`.

  Example:
    >>> import jax.numpy as jnp
    >>> from nsa_jax.sampling import filter_logits
    >>> filter_logits(jnp.log(jnp.array([0.2, 0.5, 0.3])), top_p=0.6).tolist()
    [-inf, -0.6931471824645996, -1.2039728164672852]
  """
  if top_k is None and top_p is None:
    return logits
  # Sorted, ties to the lower token.
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
  """Logits and cache; only their shapes are asked for."""
  tokens = jnp.zeros((batch, capacity), jnp.int32)
  logits, variables = model.init_with_output(jax.random.key(0), tokens)
  return logits, variables["cache"]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _prefill(model, start, params, cache, tokens, segment_ids):
  """The cache with tokens [start, start + T) of the prompts."""
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
  """Samples until step `until`, or until all rows have stopped."""
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
    keys = jax.vmap(lambda row, position: _fold_in(key, row, position))(
      rows, state.lengths
    )
    token = _sample(logits[:, 0], keys, temperature, top_k, top_p)
    # Out of range is dropped.
    place = jnp.where(state.live, state.lengths, state.tokens.shape[1])
    live = state.live
    if stop_token is not None:
      live &= token != stop_token
    return _State(
      cache=updated["cache"],
      tokens=state.tokens.at[rows, place].set(token, mode="drop"),
      lengths=state.lengths + state.live,
      live=live,
      step=state.step + 1,
    )

  return jax.lax.while_loop(
    lambda state: (state.step < until) & state.live.any(), advance, state
  )


@functools.partial(jax.jit, static_argnames="size")
def _window(tokens, first, size):
  """`size` tokens of each row from `first` [B] on; -1 behind the last."""
  index = first[:, None] + jnp.arange(size)
  return jnp.take_along_axis(tokens, index, axis=1, mode="fill", fill_value=-1)


def _fold_in(key, row, position):
  return jax.random.fold_in(jax.random.fold_in(key, row), position)


def _sample(logits, keys, temperature, top_k, top_p):
  """A token per row, int32 [B]; the most likely if `temperature` is None."""
  logits = logits.astype(jnp.float32)
  token = logits.argmax(axis=-1)
  if temperature is not None:
    # The largest is 0: no temperature makes an infinity of it.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    token = jax.vmap(jax.random.categorical)(
      keys, filter_logits(scaled, top_k, top_p)
    )
  valid = ~jnp.isnan(logits).any(axis=-1)
  return jnp.where(valid, token, -1).astype(jnp.int32)


def _read_prompts(prompts, lengths):
  """Prompts as padded int [B, P] and lengths [B], validated, in NumPy."""
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
      "prompt has at least one token."
    )
  return tokens, lengths


def _integers(name, value, rank):
  known = _checks.concrete(value)
  if known is None:
    raise ValueError(
      f"`{name}`={value!r} must have values that are known here, not traced: "
      "`generate` calls compiled functions itself."
    )
  if known.size and not np.issubdtype(known.dtype, np.integer):
    raise ValueError(
      f"`{name}` of dtype {known.dtype} must have an integer dtype."
    )
  if known.ndim != rank:
    raise ValueError(f"`{name}` of shape {known.shape} must have rank {rank}.")
  return known.astype(np.int64)


def _read_key(key):
  if isinstance(key, jax.Array) and key.ndim == 0:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      return key
  elif hasattr(key, "__index__") and 0 <= key < 2**32:
    return jax.random.key(key)
  raise ValueError(
    f"`key`={key!r} must be one key made by jax.random.key, or a seed in "
    "[0, 2**32)."
  )


def _read_sampling(temperature, top_k, top_p, vocabulary):
  """Arguments of `_decode`; what changes nothing is None."""
  temperature = _number("temperature", temperature)
  if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
    raise ValueError(
      f"`temperature`={temperature} must be 0, for the most likely token, or a "
      f"finite number of at least {MIN_TEMPERATURE}."
    )
  if top_k is not None:
    top_k = _checks.static_int("top_k", top_k, 1)
    if top_k > vocabulary:
      raise ValueError(
        f"`top_k`={top_k} must be at most {vocabulary}, the vocabulary."
      )
  if top_p is not None:
    top_p = _number("top_p", top_p)
    if not 0 < top_p <= 1:
      raise ValueError(f"`top_p`={top_p} must lie in (0, 1].")
  if temperature == 0:
    return {"temperature": None, "top_k": None, "top_p": None}
  return {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": None if top_p == 1 else top_p,
  }


def _number(name, value):
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    number = math.nan
  if math.isnan(number):
    raise ValueError(f"`{name}`={value!r} must be a number.")
  return number
