"""Native Sparse Attention (arXiv 2502.11089) for JAX and Flax.

Importing this package touches no device.
"""

from nsa_jax import cache
from nsa_jax.attention import (
  block_scores,
  compressed_attention,
  native_sparse_attention,
  select_blocks,
  selected_attention,
  window_attention,
)
from nsa_jax.compression import (
  compress_linear,
  compress_mean,
  compress_mlp,
  compress_weighted,
  num_compressed_blocks,
  num_selection_blocks,
)
from nsa_jax.config import NSAConfig
from nsa_jax.dispatch import EXPORT_DISABLED_CHECKS
from nsa_jax.generate import generate
from nsa_jax.layers import NativeSparseAttention
from nsa_jax.rope import RopeConfig, apply_rope
from nsa_jax.transformer import (
  TransformerConfig,
  TransformerLM,
  unstack_layers,
)
from nsa_jax.typing import KV, Implementation

__version__ = "0.1.0"

__all__ = [
  "EXPORT_DISABLED_CHECKS",
  "KV",
  "Implementation",
  "NSAConfig",
  "NativeSparseAttention",
  "RopeConfig",
  "TransformerConfig",
  "TransformerLM",
  "apply_rope",
  "block_scores",
  "cache",
  "compress_linear",
  "compress_mean",
  "compress_mlp",
  "compress_weighted",
  "compressed_attention",
  "generate",
  "native_sparse_attention",
  "num_compressed_blocks",
  "num_selection_blocks",
  "select_blocks",
  "selected_attention",
  "unstack_layers",
  "window_attention",
]
