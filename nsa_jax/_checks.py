"""Validation of arguments: every message names argument, value and rule."""

import contextlib
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax.typing import KV, Array

INT32 = np.iinfo(np.int32)
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def show(value: Any) -> str:
  """`value` in a message: on few lines, whatever it is."""
  try:
    text = repr(value)
  except Exception:  # An integer of many digits, for example.
    text = f"<{type(value).__name__}>"
  return text if len(text) <= 300 else f"{text[:300]}..."


def static_int(name: str, value: Any, minimum: int = int(INT32.min)) -> int:
  """Checks for a static (not traced) integer that fits int32, and returns it.

  An array of NumPy or jax is one if it holds one integer and has no axes.
  """
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None:
    raise ValueError(f"`{name}`={show(value)} must be a static integer.")
  if number < minimum:
    raise ValueError(f"`{name}`={show(number)} must be at least {minimum}.")
  if number > INT32.max:
    raise ValueError(
      f"`{name}`={show(number)} must be at most {INT32.max} (int32)."
    )
  return number


def number(name: str, value: Any) -> float:
  """Checks for a static (not traced) real number, and returns it."""
  result = math.nan
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    real = not value.shape and any(
      jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating)
    )
  else:
    real = not isinstance(value, (bool, str, bytes))
  if real:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
      result = float(value)
  if math.isnan(result):
    raise ValueError(f"`{name}`={show(value)} must be a number.")
  return result


def finite(name: str, value: Any) -> float:
  """Checks for a static (not traced) finite number, and returns it."""
  try:
    result = number(name, value)
  except ValueError:
    result = math.nan
  if not math.isfinite(result):
    raise ValueError(f"`{name}`={show(value)} must be a finite number.")
  return result


def scale(value: Any, query: Array) -> float:
  """Checks for a static, finite softmax scale; 1/sqrt(H) by default."""
  if value is None:
    return query.shape[-1] ** -0.5
  if isinstance(value, jax.core.Tracer):
    raise ValueError(
      f"`scale`={value!r} must be a static Python number; multiply the query "
      "by a traced one."
    )
  return finite("scale", value)


def softcap(value: Any) -> float | None:
  """Checks for a static, positive cap of the scores, or None."""
  if value is None:
    return None
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f"`softcap`={value!r} must be a static Python number.")
  cap = finite("softcap", value)
  if cap <= 0:
    raise ValueError(f"`softcap`={show(value)} must be positive, or None.")
  return cap


def array(name: str, value: Any, rank: int, letters: str) -> Array:
  """Converts to an array and checks its rank."""
  result = as_array(value)
  if result is None:
    raise ValueError(
      f"`{name}`={show(value)} must be an array of shape {letters}."
    )
  if result.ndim != rank:
    raise ValueError(
      f"`{name}` of shape {result.shape} must have rank {rank}: {letters}."
    )
  return result


def as_array(value: Any) -> Array | None:
  """`value` as an array of jax, or None if it is none."""
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError):
    return None


def floating(name: str, value: Array) -> None:
  """Checks for a floating-point dtype that the whole package supports."""
  if value.dtype.name not in _FLOATS:
    raise ValueError(
      f"`{name}` of dtype {value.dtype} must have a floating-point dtype: "
      f"{', '.join(_FLOATS)}."
    )


def shape(name: str, value: Array, want: tuple, rule: str) -> None:
  """Checks the shape against `want`: the size of each axis, or None for any."""
  fits = len(want) == value.ndim and all(
    w is None or w == v for w, v in zip(want, value.shape, strict=True)
  )
  if not fits:
    sizes = ", ".join("any" if size is None else str(size) for size in want)
    raise ValueError(
      f"`{name}` of shape {value.shape} must have shape ({sizes}): {rule}."
    )


def not_empty(
  name: str, value: Array, axes: Sequence[int] | None = None
) -> None:
  """Checks that no axis, or none of `axes`, has size 0."""
  for axis in range(value.ndim) if axes is None else axes:
    if not value.shape[axis]:
      raise ValueError(
        f"`{name}` of shape {value.shape} must have at least one entry on axis "
        f"{axis}."
      )


def parameter(
  name: str,
  value: Any,
  want: tuple,
  letters: str,
  of: str = "`x` and `config`",
) -> Array:
  """Checks dtype and shape of a parameter of phi; `of` fixes its sizes."""
  value = array(name, value, len(want), letters)
  floating(name, value)
  shape(name, value, want, f"{letters}, for this {of}")
  return value


def integers(
  name: str,
  value: Any,
  want: tuple,
  rule: str = "one entry per row and token of `x`",
) -> Array:
  """Converts to an int32 array of the given shape."""
  known = concrete(value)
  value = array(name, value, len(want), f"{want}")
  integer_dtype(name, value)
  shape(name, value, want, rule)
  fits_int32(name, known)
  return value.astype(jnp.int32)


def integer_dtype(name: str, value: Array) -> None:
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(
      f"`{name}` of dtype {value.dtype} must have an integer dtype."
    )


def fits_int32(name: str, known: np.ndarray | None) -> None:
  """Checks that concrete values do not overflow int32."""
  if known is None or not known.size:
    return
  for worst in (known.min(), known.max()):
    if not INT32.min <= worst <= INT32.max:
      raise ValueError(f"`{name}` has the value {worst}, which must fit int32.")


def concrete(value: Any) -> np.ndarray | None:
  """The values of a numeric array; None if traced, not addressable or no such.

  Pass the argument as the user gave it: under `jit`, jax.numpy turns a NumPy
  array into a tracer.
  """
  if isinstance(value, jax.core.Tracer):
    return None
  if not getattr(value, "is_fully_addressable", True):
    return None
  try:
    # An explicit transfer, as `jax.transfer_guard("disallow")` requires.
    known = np.asarray(jax.device_get(value))
  except (TypeError, ValueError, OverflowError):
    return None
  kinds = (jnp.number, jnp.bool_)
  return known if any(jnp.issubdtype(known.dtype, k) for k in kinds) else None


def not_negative(name: str, ids: Any) -> None:
  """Checks that concrete segment ids are at least 0."""
  known = concrete(ids)
  if known is not None and known.size and known.min() < 0:
    raise ValueError(
      f"`{name}` has the value {known.min()}; ids must be at least 0, and 0 "
      "means padding."
    )


def segments(segment_ids: Any, alignment: int) -> None:
  """Checks concrete ids [B, S]: at least 0, one aligned run per segment."""
  not_negative("segment_ids", segment_ids)
  ids = concrete(segment_ids)
  if ids is None or not ids.size:
    return
  starts = np.ones(ids.shape, bool)
  starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
  for row, position in np.argwhere(starts & (ids > 0)):
    segment = ids[row, position]
    if position % alignment:
      raise ValueError(
        f"`segment_ids` starts segment {segment} of row {row} at position "
        f"{position}; starts must be multiples of `selection_block`="
        f"{alignment}."
      )
    if (ids[row, :position] == segment).any():
      raise ValueError(
        f"`segment_ids` has segment {segment} of row {row} in two runs, the "
        f"second at position {position}; segments must be contiguous."
      )


def block_ids(name: str, ids: Any, num_blocks: int) -> None:
  """Checks concrete ids: strictly ascending in [0, M), then -1."""
  values = concrete(ids)
  if values is None or not values.size:
    return
  rule = "ids must be strictly ascending, then -1"
  if values.min() < -1 or values.max() >= num_blocks:
    worst = values.min() if values.min() < -1 else values.max()
    raise ValueError(
      f"`{name}` has the value {worst}; {rule}, and lie in [0, "
      f"{num_blocks}), the selection blocks of the keys by `config`."
    )
  left, right = values[..., :-1], values[..., 1:]
  wrong = (right >= 0) & (right <= left) | (left < 0) & (right >= 0)
  if wrong.any():
    row = tuple(np.argwhere(wrong)[0][:-1].tolist())
    raise ValueError(f"`{name}`[{row}]={values[row].tolist()}; {rule}.")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
  if not isinstance(value, str) or value not in choices:
    raise ValueError(
      f"`{name}`={show(value)} must be one of {', '.join(map(repr, choices))}."
    )


def flag(name: str, value: Any) -> None:
  if not isinstance(value, bool):
    raise ValueError(f"`{name}`={show(value)} must be True or False.")


def implementation(value: Any) -> None:
  """Checks for None, a string or a sequence of them; `dispatch` knows which."""
  several = isinstance(value, Sequence) and not isinstance(value, str)
  for name in value if several else (value,):
    if name is not None and not isinstance(name, str):
      raise ValueError(
        f"`implementation`={show(value)} must be None, a name, or a sequence "
        "of names."
      )


def instance(name: str, value: Any, kind: type) -> None:
  if not isinstance(value, kind):
    raise ValueError(f"`{name}`={show(value)} must be {_a(kind)}.")


def _a(kind: type) -> str:
  article = "an" if kind.__name__[0] in "AEIOUN" else "a"
  return f"{article} {kind.__name__}"


def precision(value: Any) -> None:
  """Checks for what `jax.lax.dot` takes as `precision`."""
  if value is None:
    return
  x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
  try:
    jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=value), x)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"`precision`={show(value)} must be None or a precision of jax.lax.dot."
    ) from error


def dtype(name: str, value: Any) -> jnp.dtype:
  """Checks for a floating-point dtype that the whole package supports."""
  result = None
  # An array has a dtype, too, but nobody asked for that.
  if isinstance(value, str | type | np.dtype):
    with contextlib.suppress(TypeError, ValueError):
      result = jnp.dtype(value)
  if result is None or not jnp.issubdtype(result, jnp.floating):
    raise ValueError(f"`{name}`={show(value)} must be a floating-point dtype.")
  if result.name not in _FLOATS:
    raise ValueError(
      f"`{name}`={result.name} must be one of {', '.join(_FLOATS)}."
    )
  return result


def random_key(value: Any) -> Array:
  """Checks for one `jax.random.key`, or makes one of a seed."""
  if isinstance(value, jax.Array) and value.ndim == 0:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
      return value
  elif not isinstance(value, bool):
    with contextlib.suppress(TypeError):
      seed = operator.index(value)
      if 0 <= seed < 2**32:
        return jax.random.key(jax.device_put(np.uint32(seed)))
  raise ValueError(
    f"`key`={show(value)} must be one key made by jax.random.key, or a seed in "
    "[0, 2**32)."
  )


def offset(
  name: str, value: Any, shapes: Sequence[tuple[int, ...]]
) -> int | Array:
  """Checks for a Python integer, or an integer array of one of the shapes."""
  if isinstance(value, int | np.integer):
    return static_int(name, value)
  offset = as_array(value)
  if (
    offset is None
    or offset.shape not in shapes
    or not jnp.issubdtype(offset.dtype, jnp.integer)
  ):
    found = show(value)
    if offset is not None:
      found = f"{found} of shape {offset.shape}"
    raise ValueError(
      f"`{name}`={found} must be an integer, or an integer array of shape "
      f"{' or '.join(map(str, shapes))}."
    )
  # Arithmetic in a narrow or unsigned type would wrap around. An offset outside
  # int32 may be clipped: it is out of range, as the ends of int32 are.
  return clip_int32(offset)


def clip_int32(value: Array) -> Array:
  """Integers as int32; those outside become the ends of int32."""
  limits = jnp.iinfo(value.dtype)
  if limits.max > INT32.max:
    low = max(limits.min, int(INT32.min))
    value = jnp.clip(value, low, INT32.max)
  return value.astype(jnp.int32)


def pair(
  name: str, query: Any, pair: Any, min_length: int = 1
) -> tuple[Array, KV]:
  """Checks the query and the KV pair of one branch of the whole op."""
  key, value = two(name, pair)
  names = (f"{name}.key", f"{name}.value")
  query, key, value = attention_inputs(query, key, value, names, min_length)
  return query, KV(key, value)


def two(name: str, pair: Any) -> KV:
  """Checks for a KV, or a list or tuple of two entries; returns a KV."""
  if not isinstance(pair, list | tuple) or len(pair) != 2:
    raise ValueError(
      f"`{name}` of type {type(pair).__name__} must be a KV(key, value) pair."
    )
  return KV(*pair)


def attention_inputs(
  query: Any,
  key: Any,
  value: Any,
  names: tuple[str, str] = ("key", "value"),
  min_length: int = 1,
) -> tuple[Array, Array, Array]:
  """Checks shapes and dtypes of query, key and value of one branch."""
  key_name, value_name = names
  query = queries(query)
  key = keys(key_name, key, query, min_length)
  value = array(value_name, value, 4, "[B, S, K, V]")
  shape(
    value_name,
    value,
    (*key.shape[:3], None),
    f"all but the head dimension of `{key_name}`",
  )
  same_dtype(value_name, value, query)
  not_empty(value_name, value, axes=(3,))
  return query, key, value


def queries(query: Any, name: str = "query") -> Array:
  query = array(name, query, 4, "[B, T, N, H]")
  floating(name, query)
  not_empty(name, query)
  return query


def keys(name: str, key: Any, query: Array, min_length: int) -> Array:
  key = array(name, key, 4, "[B, S, K, H]")
  shape(
    name,
    key,
    (query.shape[0], None, None, query.shape[-1]),
    f"the batch and head dimension of `query` of shape {query.shape}",
  )
  same_dtype(name, key, query)
  if min_length:
    not_empty(name, key)
  if not key.shape[2] or query.shape[2] % key.shape[2]:
    raise ValueError(
      f"`query` has {query.shape[2]} heads, which must be a multiple of the "
      f"{key.shape[2]} key/value heads of `{name}`."
    )
  return key


def same_dtype(
  name: str, value: Array, other: Array, other_name: str = "query"
) -> None:
  if value.dtype != other.dtype:
    raise ValueError(
      f"`{name}` of dtype {value.dtype} must have the dtype of "
      f"`{other_name}`, {other.dtype}."
    )


def same_as(name: str, value: Any, other_name: str, other: Array) -> Array:
  value = array(name, value, other.ndim, f"that of `{other_name}`")
  shape(name, value, other.shape, f"the shape of `{other_name}`")
  same_dtype(name, value, other, other_name)
  return value


def layer_input(x: Any, name: str = "x") -> Array:
  """Validates a layer's input and returns it."""
  x = array(name, x, 3, "[B, T, D]")
  floating(name, x)
  not_empty(name, x)
  return x


def batch_and_length(name: str, x: Any) -> Array:
  """Validates an array [B, T, ...] of any dtype and returns it."""
  result = as_array(x)
  if result is None or result.ndim < 2:
    raise ValueError(
      f"`{name}`={show(x)} must be an array of shape [B, T, ...]."
    )
  not_empty(name, result, axes=(0, 1))
  return result
