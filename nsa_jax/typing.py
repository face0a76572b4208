"""Letters, array aliases and small types shared by the whole package.

Shapes in docstrings use one letter per axis:

  B        batch
  T, S     query length, key/value length
  N, K, G  query heads, key/value heads, group size G = N // K; query head n
           uses key/value head n // G
  H, V     head dimension of queries and keys, of values
  C        compressed blocks: 0 if S < l, else (S - l) // d + 1
  M        selection blocks: ceil(S / l')
  l, d, l', n, w
           compression block and stride, selection block, selected blocks,
           window (the fields of `NSAConfig`)
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
from jax import export

Array: TypeAlias = jax.Array

ImplementationName: TypeAlias = Literal["reference", "xla", "triton", "cudnn"]
# None: the kernels on NVIDIA GPUs, XLA elsewhere and for what the kernels
# cannot do. A name: exactly that one. A sequence: the first that can. "cudnn"
# serves the window of the whole op.
Implementation: TypeAlias = (
  ImplementationName | Sequence[ImplementationName] | None
)


class KV(NamedTuple):
  """A pair of keys and values of one branch.

  Attributes:
    key: [B, S, K, H] (compressed: [B, C, K, H]).
    value: [B, S, K, V] (compressed: [B, C, K, V]).
  """

  key: Array
  value: Array


# So that exported functions may take or return pairs.
export.register_namedtuple_serialization(KV, serialized_name="nsa_jax.KV")


class Queries(NamedTuple):
  """Where the queries of a call lie; what every implementation is told.

  Attributes:
    positions: int32 [B, T], of the queries in the row of keys.
    key_segments: int32 [B, S], or None if all tokens are of one segment.
    query_segments: int32 [B, T], 0 for queries that read nothing; None iff
      `key_segments` is.
  """

  positions: Array
  key_segments: Array | None
  query_segments: Array | None
