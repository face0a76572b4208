"""Hyper-parameters of the algorithm; tile sizes of kernels are not here."""

import dataclasses
from typing import Any

from nsa_jax import _checks


@dataclasses.dataclass(frozen=True)
class NSAConfig:
  """What Native Sparse Attention reads per query (arXiv 2502.11089).

  The defaults are the paper's. Lengths are in tokens. Instances are frozen and
  hashable, so they can be static arguments of `jax.jit`.

  Attributes:
    compression_block: l, tokens in one compressed block.
    compression_stride: d, tokens between the starts of two compressed blocks;
      divides `compression_block` and `selection_block`.
    selection_block: l', tokens in one selection block; at least
      `compression_block`.
    num_selected: n, blocks every query selects, the forced ones included.
    num_initial: forced blocks at the start of the sequence (or segment).
    num_local: forced blocks ending at the query's own; at least 1.
    window: w, tokens of the sliding window, the query's own included.

  Raises:
    ValueError: if a value is not an integer or breaks a rule above.

  Example:
    >>> from nsa_jax import NSAConfig
    >>> NSAConfig(num_selected=8).selection_block
    64
  """

  compression_block: int = 32
  compression_stride: int = 16
  selection_block: int = 64
  num_selected: int = 16
  num_initial: int = 1
  num_local: int = 2
  window: int = 512

  def __post_init__(self):
    for field in dataclasses.fields(self):
      low = 0 if field.name == "num_initial" else 1
      value = _checks.static_int(field.name, getattr(self, field.name), low)
      object.__setattr__(self, field.name, value)
    for name in ("compression_block", "selection_block"):
      if getattr(self, name) % self.compression_stride:
        raise ValueError(
          f"`{name}`={getattr(self, name)} must be a multiple of "
          f"`compression_stride`={self.compression_stride}."
        )
    if self.compression_block > self.selection_block:
      raise ValueError(
        f"`compression_block`={self.compression_block} must be at most "
        f"`selection_block`={self.selection_block}."
      )
    if self.num_initial + self.num_local > self.num_selected:
      raise ValueError(
        f"`num_selected`={self.num_selected} must be at least `num_initial` + "
        f"`num_local`={self.num_initial + self.num_local}, the forced blocks."
      )


def check_config(value: Any) -> None:
  """Raises ValueError unless the value of `config` is an NSAConfig."""
  if not isinstance(value, NSAConfig):
    raise ValueError(f"`config`={value!r} must be an NSAConfig.")
