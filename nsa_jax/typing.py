"""Axis letters, array aliases and small types of the whole package.

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

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import jax
from jax import export

from pallas_kernels.interface import KV, Queries

__all__ = [
  "KV",
  "Array",
  "AttentionName",
  "BiasName",
  "BranchName",
  "CompressionName",
  "Implementation",
  "ImplementationName",
  "Queries",
  "RematName",
  "RematPolicyName",
  "RopeCompressedName",
  "RopeScalingName",
  "Select",
  "Selector",
  "SelectorName",
]

Array: TypeAlias = jax.Array

ImplementationName: TypeAlias = Literal[
  "reference", "xla", "triton", "mosaic_gpu", "cudnn"
]
# None: the fastest that supports the call, op by op. A name: exactly that one.
# A sequence: the first that supports the call.
Implementation: TypeAlias = (
  ImplementationName | Sequence[ImplementationName] | None
)

AttentionName: TypeAlias = Literal["nsa", "full", "window"]
BiasName: TypeAlias = Literal["query", "key", "value", "out"]
BranchName: TypeAlias = Literal["compressed", "selected", "window"]
BRANCHES: tuple[BranchName, ...] = get_args(BranchName)
CompressionName: TypeAlias = Literal["mean", "weighted", "linear", "mlp"]
RematPolicyName: TypeAlias = Literal[
  "full",
  "save_attention",
  "offload_attention",
  "offload_inputs",
  "offload_all",
]
RematName: TypeAlias = Literal["none", RematPolicyName]
RopeCompressedName: TypeAlias = Literal["block", "tokens", "none"]
RopeScalingName: TypeAlias = Literal[
  "yarn", "yarn_index", "llama3", "linear", "dynamic"
]

# A function that selects blocks; `native_sparse_attention` documents its
# arguments under `select`.
Selector: TypeAlias = Callable[..., Array]
SelectorName: TypeAlias = Literal["means"]
Select: TypeAlias = Selector | SelectorName | None

# Exported functions may take or return KV pairs.
export.register_namedtuple_serialization(KV, serialized_name="nsa_jax.KV")
