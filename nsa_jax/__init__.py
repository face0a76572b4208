"""Native Sparse Attention (arXiv 2502.11089) for JAX and Flax.

Importing this package touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nsa_jax import cache

# Not in `__all__`: a star import would hide the standard library's.
from nsa_jax import inspect as inspect
from nsa_jax.compression import (
  compress_linear,
  compress_mean,
  compress_mlp,
  compress_weighted,
)
from nsa_jax.config import AttentionConfig, NSAConfig, SelectByMeans
from nsa_jax.dispatch import EXPORT_DISABLED_CHECKS
from nsa_jax.geometry import num_compressed_blocks, num_selection_blocks
from nsa_jax.layers.linen import NativeSparseAttention
from nsa_jax.models.config import TransformerConfig
from nsa_jax.models.convert import load, save
from nsa_jax.models.linen import TransformerLM, unstack_layers
from nsa_jax.models.remat import remat_policy
from nsa_jax.ops.branches import (
  compressed_attention,
  full_attention,
  selected_attention,
  window_attention,
)
from nsa_jax.ops.nsa import native_sparse_attention
from nsa_jax.ops.selection import (
  block_ids_from_scores,
  block_mass,
  block_scores,
  select_blocks,
)
from nsa_jax.packing import PackedRow, PackedRows
from nsa_jax.partitioning import PARAMETER_RULES, parameter_shardings
from nsa_jax.rope import RopeConfig, apply_rope
from nsa_jax.sampling import generate
from nsa_jax.sharding import Layout, restore_zigzag, zigzag
from nsa_jax.typing import KV, Implementation

if TYPE_CHECKING:
  from nsa_jax import nnx as nnx

__version__ = "0.1.0"

__all__ = [
  "EXPORT_DISABLED_CHECKS",
  "KV",
  "PARAMETER_RULES",
  "AttentionConfig",
  "Implementation",
  "Layout",
  "NSAConfig",
  "NativeSparseAttention",
  "PackedRow",
  "PackedRows",
  "RopeConfig",
  "SelectByMeans",
  "TransformerConfig",
  "TransformerLM",
  "apply_rope",
  "block_ids_from_scores",
  "block_mass",
  "block_scores",
  "cache",
  "compress_linear",
  "compress_mean",
  "compress_mlp",
  "compress_weighted",
  "compressed_attention",
  "full_attention",
  "generate",
  "load",
  "native_sparse_attention",
  "num_compressed_blocks",
  "num_selection_blocks",
  "parameter_shardings",
  "remat_policy",
  "restore_zigzag",
  "save",
  "select_blocks",
  "selected_attention",
  "unstack_layers",
  "window_attention",
  "zigzag",
]


def __getattr__(name: str) -> Any:
  # Who uses linen does not wait for the import of `flax.nnx`.
  if name == "nnx":
    return importlib.import_module("nsa_jax.nnx")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
