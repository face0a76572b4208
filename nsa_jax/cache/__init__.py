"""Decode caches: state, and attention over it."""

from nsa_jax.cache.rows import evict, insert, take
from nsa_jax.cache.state import (
  KINDS,
  Cache,
  Compress,
  append,
  bytes_per_token,
  init,
  max_append,
  num_bytes,
  prefill,
  quantize,
  rewind,
  too_short,
)
from nsa_jax.ops.cached import attend, attend_full, attend_window

__all__ = [
  "KINDS",
  "Cache",
  "Compress",
  "append",
  "attend",
  "attend_full",
  "attend_window",
  "bytes_per_token",
  "evict",
  "init",
  "insert",
  "max_append",
  "num_bytes",
  "prefill",
  "quantize",
  "rewind",
  "take",
  "too_short",
]
