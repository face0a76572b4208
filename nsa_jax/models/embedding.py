"""Rows of a table by token, with a gradient that has the same bits in each run.

The gradient that jax derives adds the rows of the cotangent by a scatter. On a
GPU that uses atomics: in bfloat16 on text, whose tokens are few and frequent,
they took half of a training step, and the order of their sums differs from run
to run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nsa_jax.precision import sum_dtype
from nsa_jax.typing import Array
from nsa_jax.xla.chunks import map_chunks

# Sorted tokens per block; a power of two that matrix units like.
_BLOCK = 128
# Up to some such vocabulary a product with indicators is faster than the sort,
# and XLA partitions it over a sharded batch; the sort needs all tokens on every
# device.
_FEW = 2048
# Numbers in the indicators of a chunk, 256 MiB.
_CHUNK_ELEMENTS = 2**26
# Not in any vocabulary.
_NONE = 2**31 - 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def embed(table: Array, tokens: Array, dtype: Any) -> Array:
  """Rows of the table: NaN for tokens that are not in [0, vocabulary).

  Args:
    table: [vocabulary, D].
    tokens: int32 [B, T].
    dtype: of the result.

  Returns:
    [B, T, D]. The gradient of the table is summed in float32 at least. A
    cotangent that is not finite may reach the rows of other tokens.
  """
  with jax.named_scope("embed"):
    return _gather(table, tokens, jnp.nan).astype(dtype)


@embed.defjvp
@jax.named_scope("embed")
def _jvp(dtype, primals, tangents):
  table, tokens = primals
  tangent, _ = tangents
  if table.shape[0] <= _FEW:
    rows = _rows_of_few(tangent, tokens, dtype)
  elif isinstance(tokens.size, int):
    rows = _rows(tangent, tokens.reshape(-1), dtype)
    rows = rows.reshape(*tokens.shape, table.shape[1])
  else:  # A symbolic size, as in `jax.export`, cannot be cut into blocks.
    rows = _gather(tangent, tokens, 0)
  # The cotangents of other tokens take no part, not even as 0 * NaN.
  inside = (tokens >= 0) & (tokens < table.shape[0])
  rows = jnp.where(inside[..., None], rows, 0).astype(dtype)
  return embed(table, tokens, dtype), rows


def _gather(table: Array, tokens: Array, fill: float) -> Array:
  return (
    jnp.asarray(table)
    .at[tokens]
    .get(mode="fill", fill_value=fill, wrap_negative_indices=False)
  )


def _rows_of_few(table: Array, tokens: Array, dtype: Any) -> Array:
  """`table[tokens]` by products, [B, T, D], for a small vocabulary."""
  batch, length = tokens.shape
  vocabulary = table.shape[0]
  acc = sum_dtype(table.dtype)
  table = jnp.asarray(table, acc)
  token = jnp.arange(vocabulary, dtype=jnp.int32)[None, None]

  def body(tokens: Array) -> Array:
    return jnp.einsum(
      "btv,vd->btd",
      (tokens[..., None] == token).astype(acc),
      table,
      precision=_precision(dtype),
    )

  # A batch of symbolic size, as in `jax.export`, counts as one row.
  rows = batch if isinstance(batch, int) else 1
  size = min(max(_CHUNK_ELEMENTS // (rows * vocabulary), 1), length)
  return map_chunks(body, size, tokens)


def _precision(dtype: Any) -> lax.Precision | None:
  """Of products with 0 and 1 that copy or sum numbers of `dtype` exactly."""
  # TF32, a GPU's default, holds 16-bit numbers.
  return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize > 2 else None


class _Runs(NamedTuple):
  """Sorted tokens in blocks [n, R], and their runs of equal tokens."""

  place: Array  # int32 [n R], place in the order of the caller; unique
  run: Array  # int32 [n, R], index of the run within its block
  last: Array  # int32 [n], index of the last run
  token: Array  # int32 [n, R], token of each run; _NONE past the last run


def _sorted_runs(tokens: Array) -> _Runs:
  """Sorts tokens [T]; each block begins a run."""
  size = -(-tokens.shape[0] // _BLOCK) * _BLOCK
  place = jnp.arange(size, dtype=jnp.int32)
  padded = jnp.pad(tokens, (0, size - tokens.shape[0]), constant_values=_NONE)
  padded, place = lax.sort((padded, place), num_keys=1, is_stable=True)
  padded = padded.reshape(-1, _BLOCK)
  run = _count_runs(padded)
  return _Runs(place, run, run[:, -1], _tokens_of_runs(padded, run))


def _count_runs(x: Array) -> Array:
  """Number of changes up to each entry of [..., R]."""
  changed = x[..., 1:] != x[..., :-1]
  changes = jnp.cumsum(changed, axis=-1, dtype=jnp.int32)
  return jnp.pad(changes, [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def _tokens_of_runs(tokens: Array, run: Array) -> Array:
  """The token of each run in [n, R], then _NONE."""
  index = jnp.arange(run.shape[-1], dtype=jnp.int32)
  here = run[..., None, :] == index[None, :, None]
  return jnp.where(here, tokens[..., None, :], _NONE).min(axis=-1)


def _rows(table: Array, tokens: Array, dtype: Any) -> Array:
  """`table[tokens]` in steps whose transposes are products and unique scatters.

  The tokens are sorted and cut into blocks. A product of each block with the
  indicators of its runs copies the row of a run to its tokens; its transpose
  sums over the run. A run inside a block is all of its token. The first and the
  last may continue in other blocks, so a second product copies rows to them.

  Args:
    table: [vocabulary, D].
    tokens: int32 [T].
    dtype: of what the result will be cast to.
  """
  vocabulary = table.shape[0]
  acc = sum_dtype(table.dtype)
  table = jnp.asarray(table, acc)
  runs = _sorted_runs(tokens)
  index = jnp.arange(_BLOCK, dtype=jnp.int32)[None]
  last = runs.last[:, None]

  def unique(ids: Array) -> Array:
    """Rows of different ids; 0 for those outside the table."""
    ids = ids.reshape(-1)
    other = vocabulary + jnp.arange(ids.shape[0], dtype=jnp.int32)
    ids = jnp.where((ids >= 0) & (ids < vocabulary), ids, other)
    return table.at[ids].get(mode="fill", fill_value=0, unique_indices=True)

  # The rows of the first and the last run of every block.
  ends = jnp.stack(
    [runs.token[:, 0], jnp.take_along_axis(runs.token, last, axis=1)[:, 0]],
    axis=1,
  ).reshape(1, -1)
  end = _count_runs(ends)
  found = unique(_tokens_of_runs(ends, end))
  outer = jnp.einsum(
    "er,rd->ed",
    _indicators(end, acc)[0],
    found,
    precision=lax.Precision.HIGHEST,
  )
  outer = outer.reshape(-1, 2, 1, table.shape[1])

  inner = unique(jnp.where((index > 0) & (index < last), runs.token, _NONE))
  inner = inner.reshape(-1, _BLOCK, table.shape[1])
  inner += jnp.where((index == 0)[..., None], outer[:, 0], 0)
  at_last = (index == last) & (last > 0)
  inner += jnp.where(at_last[..., None], outer[:, 1], 0)

  rows = jnp.einsum(
    "nir,nrd->nid",
    _indicators(runs.run, acc),
    inner,
    precision=_precision(dtype),
  )
  rows = rows.reshape(-1, table.shape[1])
  # The inverse of the sort.
  order = (
    jnp.zeros_like(runs.place)
    .at[runs.place]
    .set(jnp.arange(runs.place.shape[0], dtype=jnp.int32), unique_indices=True)
  )
  return rows.at[order[: tokens.shape[0]]].get(
    unique_indices=True, mode="promise_in_bounds"
  )


def _indicators(run: Array, dtype: Any) -> Array:
  """[n, R] -> [n, R, R], 1 where an entry is of the run."""
  index = jnp.arange(run.shape[-1], dtype=jnp.int32)
  return (run[..., None] == index[None, None]).astype(dtype)
