"""Checkpoints of other libraries: reading them, and writing them back.

`load` and `save` are also names of `nsa_jax`. `families` has a table for each
family, `tensors` the safetensors files.
"""

from nsa_jax.models.convert.families import read_config, write_config
from nsa_jax.models.convert.load import Loaded, load, save
from nsa_jax.models.convert.sparse import to_nsa

__all__ = [
  "Loaded",
  "load",
  "read_config",
  "save",
  "to_nsa",
  "write_config",
]
