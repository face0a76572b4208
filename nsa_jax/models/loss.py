"""Cross-entropy of tokens, from logits in chunks."""

import jax
import jax.numpy as jnp

from nsa_jax.precision import sum_dtype
from nsa_jax.sharding import dot_general
from nsa_jax.typing import Array
from nsa_jax.xla.chunks import map_chunks

# Logits of a chunk, in float32 256 MiB: enough to fill the matrix units.
CHUNK_LOGITS = 2**26


def logits_of(
  x: Array,
  head: Array,
  vocab_size: int | None = None,
  softcap: float | None = None,
) -> Array:
  """x head^T, float32: [B, T, D], [rows, D] -> [B, T, vocab_size].

  Args:
    x: [B, T, D].
    head: [rows, D].
    vocab_size: rows that belong to tokens; all by default.
    softcap: c, if logits z become c tanh(z / c).
  """
  logits = dot_general(
    x, head, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )
  # Not the head is cut: it may be split over devices.
  if vocab_size is not None and vocab_size < head.shape[0]:
    logits = logits[..., :vocab_size]
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@jax.named_scope("token_losses")
def token_losses(
  head: Array,
  x: Array,
  labels: Array,
  chunk_logits: int = CHUNK_LOGITS,
  vocab_size: int | None = None,
  softcap: float | None = None,
) -> Array:
  """-log softmax(x head^T)[label] in nats, chunk by chunk.

  The backward pass computes the logits of a chunk again. Under `jax.vmap` every
  mapped call has a chunk of its own.

  Args:
    head: [rows, D].
    x: [B, T, D].
    labels: int32 [B, T]; others than [0, vocabulary) have loss 0 and no
      gradient.
    chunk_logits: maximum number of logits of a chunk.
    vocab_size: as in `logits_of`, as is `softcap`.
    softcap: as there.

  Returns:
    float32 [B, T].
  """
  batch, length = labels.shape
  vocabulary = head.shape[0] if vocab_size is None else vocab_size
  # The gradient of the head is a sum over chunks in this dtype.
  head = head.astype(sum_dtype(head.dtype))
  token = jnp.arange(vocabulary, dtype=jnp.int32)[None, None]

  def body(x: Array, labels: Array) -> Array:
    logits = logits_of(x, head.astype(x.dtype), vocab_size, softcap)
    # Not a gather: its transpose is a scatter.
    own = jnp.where(labels[..., None] == token, logits, 0).sum(axis=-1)
    valid = (labels >= 0) & (labels < vocabulary)
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - own, 0)

  # A batch of symbolic size, as in `jax.export`, counts as one row.
  rows = batch if isinstance(batch, int) else 1
  size = max(chunk_logits // (rows * vocabulary), 1)
  if size < length:
    size = 1 << (size.bit_length() - 1)
  return map_chunks(body, size, x, labels)
