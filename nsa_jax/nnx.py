"""Layers and models for `flax.nnx`, over the same core as those for linen.

    from nsa_jax import nnx as nsa_nnx

keeps the name `nnx` for flax's. Names of modules and parameters are those of
linen, and the same parameters give the same numbers.
"""

from nsa_jax.layers.nnx import (
  CompressBlocks,
  DenseAttention,
  Inspect,
  NativeSparseAttention,
  from_linen,
  to_linen,
)
from nsa_jax.models.nnx import TransformerLM, unstack_layers

__all__ = [
  "CompressBlocks",
  "DenseAttention",
  "Inspect",
  "NativeSparseAttention",
  "TransformerLM",
  "from_linen",
  "to_linen",
  "unstack_layers",
]
