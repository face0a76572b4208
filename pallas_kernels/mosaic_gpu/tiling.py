"""Tile sizes of the kernels and the heuristics that choose them.

Tile sizes change results only by rounding.
"""

import dataclasses

# Rows of a product of one warpgroup: pairs of query and head.
ROWS = 64
# Warpgroups of a block that compute; one more loads.
WORKERS = 2
# Shared memory of a block on Hopper, in bytes, less what barriers and padding
# take.
_SHARED_MEMORY = 232448 - 2048


@dataclasses.dataclass(frozen=True)
class BandTile:
  """Tile sizes of the forward kernel of band attention.

  Attributes:
    block_k: keys per step, a multiple of 16 up to 256.
    num_stages: tiles of keys, and of values, in shared memory.
    blocks: persistent blocks; None for one per multiprocessor.
  """

  block_k: int
  num_stages: int = 2
  blocks: int | None = None


@dataclasses.dataclass(frozen=True)
class BandTiling:
  """Tiles of the compressed or the window branch.

  Attributes:
    fwd: forward kernel.
  """

  fwd: BandTile

  def check_fit(self, head_dim: int, value_dim: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      head_dim: H.
      value_dim: V.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    tile = self.fwd
    if tile.block_k % 16 or not 16 <= tile.block_k <= 256:
      raise ValueError(
        f"`fwd.block_k` of {self} must be a multiple of 16 up to 256."
      )
    if tile.num_stages < 2:
      raise ValueError(f"`fwd.num_stages` of {self} must be at least 2.")
    if tile.blocks is not None and tile.blocks < 1:
      raise ValueError(f"`fwd.blocks` of {self} must be at least 1, or None.")
    size = shared_bytes(
      tile, head_dim, value_dim, in_place=value_dim <= head_dim
    )
    if size > _SHARED_MEMORY:
      raise ValueError(
        f"`fwd` of {self} takes {size} bytes of shared memory with head "
        f"dimensions {head_dim} and {value_dim}; there are {_SHARED_MEMORY}."
      )


def shared_bytes(
  tile: BandTile, head_dim: int, value_dim: int, *, in_place: bool
) -> int:
  """Bytes of shared memory of the forward kernel.

  Args:
    tile: its tile sizes.
    head_dim: H.
    value_dim: V.
    in_place: whether the output passes through the buffer of the queries.
  """
  queries = 2 * WORKERS * ROWS * (head_dim + (0 if in_place else value_dim))
  keys = 2 * tile.block_k * (head_dim + value_dim)
  segments = 4 * tile.block_k
  return queries + tile.num_stages * (keys + segments) + 4 * WORKERS * ROWS


def in_place(tile: BandTile, head_dim: int, value_dim: int) -> bool:
  """Whether the output has to pass through the buffer of the queries.

  With a buffer of its own the next queries load while the last keys are read.
  """
  size = shared_bytes(tile, head_dim, value_dim, in_place=False)
  return size > _SHARED_MEMORY


def band_tiling(*, head_dim: int, value_dim: int) -> BandTiling:
  """Chooses tiles of the compressed or the window branch for a shape.

  Args:
    head_dim: H.
    value_dim: V.
  """
  # The accumulator and two tiles of scores are in registers.
  most = {64: 128, 128: 128, 192: 96, 256: 64}[value_dim]
  for block_k in (128, 96, 80, 64):
    tile = BandTile(block_k)
    if block_k <= most and not in_place(tile, head_dim, value_dim):
      return BandTiling(tile)
  return BandTiling(BandTile(64))


@dataclasses.dataclass(frozen=True)
class UnionTile:
  """Tile sizes of the forward kernel of the selected branch.

  Attributes:
    workers: warpgroups that compute, 2 or 3, of 64 rows each. All their queries
      share the blocks that are loaded.
    num_stages: blocks of keys, and of values, in shared memory.
  """

  workers: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class SelectedTiling:
  """Tiles of the selected branch.

  Attributes:
    fwd: forward kernel.
  """

  fwd: UnionTile

  def check_fit(self, head_dim: int, value_dim: int, block: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      head_dim: H.
      value_dim: V.
      block: l'.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    tile = self.fwd
    if tile.workers not in (2, 3):
      raise ValueError(f"`fwd.workers` of {self} must be 2 or 3.")
    if tile.num_stages < 2:
      raise ValueError(f"`fwd.num_stages` of {self} must be at least 2.")
    size = union_bytes(tile, head_dim, value_dim, block)
    if size > _SHARED_MEMORY:
      raise ValueError(
        f"`fwd` of {self} takes {size} bytes of shared memory with head "
        f"dimensions {head_dim} and {value_dim}; there are {_SHARED_MEMORY}."
      )


def union_bytes(
  tile: UnionTile, head_dim: int, value_dim: int, block: int
) -> int:
  """Bytes of shared memory of the forward kernel of the selected branch.

  Args:
    tile: its tile sizes.
    head_dim: H.
    value_dim: V.
    block: l'.
  """
  # The output passes through the buffer of the queries if it has their shape.
  own = 0 if value_dim == head_dim else value_dim
  rows = tile.workers * ROWS * (2 * (head_dim + own) + 4)
  return rows + tile.num_stages * (2 * block * (head_dim + value_dim) + 8)


def selected_tiling(
  *, head_dim: int, value_dim: int, block: int
) -> SelectedTiling | None:
  """Chooses tiles of the selected branch; None if none fit.

  Args:
    head_dim: H.
    value_dim: V.
    block: l'.
  """
  for num_stages in (4, 3, 2):
    tile = UnionTile(2, num_stages)
    if union_bytes(tile, head_dim, value_dim, block) <= _SHARED_MEMORY:
      return SelectedTiling(tile)
  return None
