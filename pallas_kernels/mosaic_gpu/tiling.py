"""Tile sizes of the kernels and the heuristics that choose them.

Tile sizes change results only by rounding.
"""

import dataclasses
import itertools

# Rows of a product of one warpgroup: pairs of query and head.
ROWS = 64
# Warpgroups of a block that compute; one more loads.
WORKERS = 2
# Most compressed blocks that begin in one selection block. Keys are loaded in
# boxes of 8, one of each number in its selection block, and a warpgroup has at
# most 128.
MAX_RATIO = 16
# Most `steps` x H of the dq kernel: 192 numbers per thread.
_MAX_STEPS_WIDTH = 768
# Shared memory of a block on Hopper, in bytes, less what barriers and padding
# take.
_SHARED_MEMORY = 232448 - 2048


@dataclasses.dataclass(frozen=True)
class BandTile:
  """Tile sizes of the forward kernel of band attention.

  Attributes:
    block_k: keys per step, 64, 128, 192 or 256.
    num_stages: tiles of keys, and of values, in shared memory.
    blocks: persistent blocks; None for one per multiprocessor.
    turns: the warpgroups of a block take turns to issue products.
  """

  block_k: int
  num_stages: int = 2
  blocks: int | None = None
  turns: bool = True


@dataclasses.dataclass(frozen=True)
class BandGradientTile:
  """Tile sizes of the backward kernels of band attention.

  A step of the dk, dv kernel takes `ROWS` rows of queries against
  `gradient_keys` keys.

  Attributes:
    num_stages: steps of the dk, dv kernel whose queries and dout are in shared
      memory.
    steps: steps per query tile of the dq kernel, a multiple of `WORKERS`. Its
      accumulators, `steps` x H numbers per row, are in registers.
    dq_stages: tiles of `ROWS` keys in shared memory, with their ds, of the dq
      kernel.
    programs: number of dk, dv programs that fills a device; the queries are
      split until there are that many.
    scratch: maximum memory in bytes of ds, the stored gradients of the scores,
      of the queries of a chunk times the keys they read. A chunk has at least
      one query tile.
  """

  num_stages: int = 3
  steps: int = 4
  dq_stages: int = 4
  programs: int = 512
  scratch: int = 2**31


def _check_forward(tiles: "BandTiling | SelectedTiling") -> None:
  """Checks what the forward tiles of both kinds have.

  Raises:
    ValueError: naming the tiles and the rule.
  """
  if tiles.fwd.num_stages < 2:
    raise ValueError(f"`fwd.num_stages` of {tiles} must be at least 2.")
  if tiles.fwd.blocks is not None and tiles.fwd.blocks < 1:
    raise ValueError(f"`fwd.blocks` of {tiles} must be at least 1, or None.")


def _check_backward(
  tiles: "BandTiling | SelectedTiling",
  sizes: tuple[int, int],
  head_dims: tuple[int, int],
) -> None:
  """Checks stages and shared memory of backward tiles.

  Args:
    tiles: tiles with `bwd`.
    sizes: bytes of shared memory of the dk, dv kernel and of the dq kernel.
    head_dims: H, V.

  Raises:
    ValueError: naming the tiles and the rule.
  """
  bwd = tiles.bwd
  assert bwd is not None
  if bwd.num_stages < 2 or bwd.dq_stages < 2:
    raise ValueError(f"The stages of `bwd` of {tiles} must be at least 2.")
  for name, size in zip(("dk, dv", "dq"), sizes, strict=True):
    if size > _SHARED_MEMORY:
      raise ValueError(
        f"`bwd` of {tiles} takes {size} bytes of shared memory in the {name} "
        f"kernel with head dimensions {head_dims[0]} and {head_dims[1]}; there "
        f"are {_SHARED_MEMORY}."
      )


@dataclasses.dataclass(frozen=True)
class BandTiling:
  """Tiles of the compressed or the window branch.

  Attributes:
    fwd: forward kernel.
    bwd: backward kernels; None for the heuristic.
  """

  fwd: BandTile
  bwd: BandGradientTile | None = None

  def check_fit(self, head_dim: int, value_dim: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      head_dim: H.
      value_dim: V.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    tile = self.fwd
    if tile.block_k not in (64, 128, 192, 256):
      raise ValueError(f"`fwd.block_k` of {self} must be 64, 128, 192 or 256.")
    _check_forward(self)
    size = shared_bytes(tile, head_dim, value_dim)
    if size > _SHARED_MEMORY:
      raise ValueError(
        f"`fwd` of {self} takes {size} bytes of shared memory with head "
        f"dimensions {head_dim} and {value_dim}; there are {_SHARED_MEMORY}."
      )
    bwd = self.bwd
    if bwd is None:
      return
    most = _MAX_STEPS_WIDTH // head_dim
    if bwd.steps < WORKERS or bwd.steps % WORKERS or bwd.steps > most:
      raise ValueError(
        f"`bwd.steps` of {self} must be a multiple of {WORKERS} up to {most} "
        f"with head dimension {head_dim}."
      )
    if bwd.programs < 1:
      raise ValueError(f"`bwd.programs` of {self} must be at least 1.")
    _check_backward(
      self, gradient_bytes(bwd, head_dim, value_dim), (head_dim, value_dim)
    )


def gradient_keys(head_dim: int, value_dim: int) -> int:
  """Keys per tile of the dk, dv kernel.

  dk and dv are in registers: of each warpgroup's own keys if both fit, else one
  warpgroup has dk and the other dv of the same keys.

  Args:
    head_dim: H.
    value_dim: V.
  """
  return WORKERS * ROWS if head_dim + value_dim <= 256 else ROWS


def gradient_tile(head_dim: int, value_dim: int) -> BandGradientTile:
  """Chooses tiles of the backward kernels for a shape.

  Measured at H = V = 128 and 64k tokens, no other tile changes the time by more
  than 10%.

  Args:
    head_dim: H.
    value_dim: V.
  """
  steps = min(_MAX_STEPS_WIDTH // head_dim // WORKERS * WORKERS, 4)

  def fits(tile: BandGradientTile, kernel: int) -> bool:
    size = gradient_bytes(tile, head_dim, value_dim)[kernel]
    return size <= _SHARED_MEMORY

  def most(name: str, kernel: int, stages: int) -> int:
    while stages > 2:
      tile = BandGradientTile(**{"steps": steps, name: stages})
      if fits(tile, kernel):
        break
      stages -= 1
    return stages

  return BandGradientTile(
    num_stages=most("num_stages", 0, 3),
    steps=steps,
    dq_stages=most("dq_stages", 1, 4),
  )


def gradient_bytes(
  tile: BandGradientTile, head_dim: int, value_dim: int
) -> tuple[int, int]:
  """Bytes of shared memory of the dk, dv kernel and of the dq kernel.

  Args:
    tile: tile sizes.
    head_dim: H.
    value_dim: V.
  """
  width = 2 * (head_dim + value_dim)
  stage = ROWS * (width + 12)  # 12 for lse, delta and segment
  ds = 2 * ROWS * ROWS  # two of them for every 64 keys
  parts = gradient_keys(head_dim, value_dim) // ROWS
  dkv = parts * (ROWS * width + 2 * ds) + tile.num_stages * stage
  dq_stage = ROWS * 2 * head_dim + tile.steps * ds
  return dkv, WORKERS * ROWS * 2 * head_dim + tile.dq_stages * dq_stage


def shared_bytes(tile: BandTile, head_dim: int, value_dim: int) -> int:
  """Bytes of shared memory of the forward kernel.

  Args:
    tile: its tile sizes.
    head_dim: H.
    value_dim: V.
  """
  size = _bytes_without_output(tile, head_dim, value_dim)
  if in_place(tile, head_dim, value_dim):
    return size
  return size + _OUTPUT * value_dim


def in_place(tile: BandTile, head_dim: int, value_dim: int) -> bool:
  """Whether the output has to pass through the buffer of the queries.

  With a buffer of its own, the next queries load while the last keys are read.

  Args:
    tile: tile sizes of the forward kernel.
    head_dim: H.
    value_dim: V.
  """
  size = _bytes_without_output(tile, head_dim, value_dim)
  full = size + _OUTPUT * value_dim > _SHARED_MEMORY
  return full and value_dim == head_dim


# Bytes of the output of a piece, per value.
_OUTPUT = 2 * WORKERS * ROWS


def _bytes_without_output(tile: BandTile, head_dim: int, value_dim: int) -> int:
  keys = tile.block_k * (2 * head_dim + 2 * value_dim + 4)  # 4 for segments
  queries = WORKERS * ROWS * (2 * head_dim + 4)  # 4 for the lse
  return queries + tile.num_stages * keys


def band_tiling(*, head_dim: int, value_dim: int) -> BandTiling:
  """Chooses tiles of the compressed or the window branch for a shape.

  Args:
    head_dim: H.
    value_dim: V.
  """
  # Measured at H = V = 128 alone: 128 keys were faster than 64, and two stages
  # as fast as three. The accumulator and two tiles of scores are in registers,
  # so that wider values leave room for 64 keys only.
  tile = BandTile(128)
  fits = shared_bytes(tile, head_dim, value_dim) <= _SHARED_MEMORY
  block_k = 128 if value_dim <= 128 and fits else 64
  # As many bytes in flight for narrower heads.
  width = head_dim + value_dim
  most = min(max(2**16 // (block_k * width), 2), 4)
  for num_stages in range(most, 2, -1):
    tile = BandTile(block_k, num_stages)
    fits = shared_bytes(tile, head_dim, value_dim) <= _SHARED_MEMORY
    if fits and not in_place(tile, head_dim, value_dim):
      return BandTiling(tile)
  return BandTiling(BandTile(block_k))


@dataclasses.dataclass(frozen=True)
class UnionTile:
  """Tile sizes of the forward kernel of the selected branch.

  Attributes:
    workers: warpgroups that compute, 2 or 3, of 64 rows each. All their queries
      share the blocks that are loaded.
    num_stages: blocks of keys, and of values, in shared memory.
    blocks: persistent blocks; None for one per multiprocessor.
  """

  workers: int
  num_stages: int
  blocks: int | None = None


@dataclasses.dataclass(frozen=True)
class SelectedGradientTile:
  """Tile sizes of the backward kernels of the selected branch.

  Attributes:
    num_stages: steps of `ROWS` rows in shared memory, of each piece that a
      program of the dk, dv kernel does at the same time.
    dq_stages: blocks of keys in shared memory, with their ds, of the dq kernel.
    piece: maximum queries per piece of the list of a block.
    near: pieces whose middle queries are in the same range of so many queries
      are done at the same time.
    blocks: persistent blocks; None for one per multiprocessor.
    scratch: maximum memory in bytes of ds, the stored gradients of the scores,
      of a chunk of queries (at least 16).
  """

  num_stages: int = 2
  dq_stages: int = 4
  piece: int = 192
  near: int = 512
  blocks: int | None = None
  scratch: int = 2**31


@dataclasses.dataclass(frozen=True)
class SelectedTiling:
  """Tiles of the selected branch.

  Attributes:
    fwd: forward kernel.
    bwd: backward kernels; None for the heuristic.
  """

  fwd: UnionTile
  bwd: SelectedGradientTile | None = None

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
    _check_forward(self)
    if not _union_fits(tile, head_dim, value_dim, block):
      raise ValueError(
        f"`fwd` of {self} takes more than {_SHARED_MEMORY} bytes of shared "
        f"memory with head dimensions {head_dim} and {value_dim}."
      )
    bwd = self.bwd
    if bwd is None:
      return
    for name in ("piece", "near"):
      if getattr(bwd, name) < 1:
        raise ValueError(f"`bwd.{name}` of {self} must be at least 1.")
    if bwd.blocks is not None and bwd.blocks < 1:
      raise ValueError(f"`bwd.blocks` of {self} must be at least 1, or None.")
    _check_backward(
      self,
      selected_gradient_bytes(bwd, head_dim, value_dim),
      (head_dim, value_dim),
    )


def union_bytes(
  tile: UnionTile, head_dim: int, value_dim: int, block: int, *, in_place: bool
) -> int:
  """Bytes of shared memory of the forward kernel of the selected branch.

  Args:
    tile: its tile sizes.
    head_dim: H.
    value_dim: V.
    block: l'.
    in_place: whether the output passes through the buffer of the queries.
  """
  width = head_dim + (0 if in_place else value_dim)
  rows = tile.workers * ROWS * (2 * width + 4)
  return rows + tile.num_stages * (2 * block * (head_dim + value_dim) + 8)


def union_in_place(
  tile: UnionTile, head_dim: int, value_dim: int, block: int
) -> bool:
  """Whether the output passes through the buffer of the queries.

  With a buffer of its own the next queries load while it leaves.
  """
  size = union_bytes(tile, head_dim, value_dim, block, in_place=False)
  return value_dim == head_dim and size > _SHARED_MEMORY


def _union_fits(
  tile: UnionTile, head_dim: int, value_dim: int, block: int
) -> bool:
  in_place = head_dim == value_dim
  size = union_bytes(tile, head_dim, value_dim, block, in_place=in_place)
  return size <= _SHARED_MEMORY


def selected_tiling(
  *, head_dim: int, value_dim: int, block: int
) -> SelectedTiling | None:
  """Chooses tiles of the selected branch; None if none fit.

  Args:
    head_dim: H.
    value_dim: V.
    block: l'.
  """
  # Measured at H = V = 128: 64k tokens take 5 to 9% less time with three
  # warpgroups than with two, whatever the overlap. The accumulators of wider
  # values need the registers that two have.
  workers = (3, 2) if value_dim <= 128 else (2,)
  for tile in itertools.starmap(
    UnionTile, itertools.product(workers, (4, 3, 2))
  ):
    if _union_fits(tile, head_dim, value_dim, block):
      return SelectedTiling(tile)
  return None


def selected_tracks(head_dim: int, value_dim: int) -> int:
  """Pieces that a program of the dk, dv kernel does at the same time.

  Each computing warpgroup has one if dk and dv fit in its registers; else one
  warpgroup has dk and the other dv of the same piece.

  Args:
    head_dim: H.
    value_dim: V.
  """
  return gradient_keys(head_dim, value_dim) // ROWS


def selected_gradient_bytes(
  tile: SelectedGradientTile, head_dim: int, value_dim: int
) -> tuple[int, int]:
  """Bytes of shared memory of the dk, dv kernel and of the dq kernel.

  Args:
    tile: tile sizes.
    head_dim: H.
    value_dim: V.
  """
  keys = ROWS * 2 * (head_dim + value_dim)
  # Queries and dout, lse and delta, and at most two numbers per query.
  stage = ROWS * 2 * (head_dim + value_dim) + ROWS * 8 + 64
  ds = 2 * ROWS * ROWS
  tracks = selected_tracks(head_dim, value_dim)
  dkv = tracks * (keys + ds + tile.num_stages * stage)
  rows = ROWS * 2 * head_dim
  return dkv, tile.dq_stages * (rows + WORKERS * ds) + WORKERS * rows


def selected_gradient_tile(
  head_dim: int, value_dim: int
) -> SelectedGradientTile:
  """Chooses tiles of the backward kernels of the selected branch.

  Measured at H = V = 128 and 64k tokens: pieces of 192 queries take 2 to 3%
  less time than those of 128, and of 64 queries 5 to 7% more. The stages of dq,
  and ranges of 128 to 2048 queries, hardly matter.

  Args:
    head_dim: H.
    value_dim: V.
  """

  def most(name: str, kernel: int) -> int:
    def fits(stages: int) -> bool:
      tile = SelectedGradientTile(**{name: stages})
      size = selected_gradient_bytes(tile, head_dim, value_dim)[kernel]
      return size <= _SHARED_MEMORY

    return max(filter(fits, (2, 3, 4)))

  return SelectedGradientTile(
    num_stages=most("num_stages", 0),
    dq_stages=most("dq_stages", 1),
  )


@dataclasses.dataclass(frozen=True)
class ScoresTile:
  """Tile sizes of the score kernel of block selection.

  Attributes:
    block_k: compressed keys per computing warpgroup, 64 or 128.
    num_stages: tiles of the queries of a head in shared memory. With less than
      4 of them, heads are computed one by one.
    key_stages: tiles of the keys of both warpgroups in shared memory.
    blocks: persistent blocks; None for one per multiprocessor.
  """

  block_k: int = 128
  num_stages: int = 4
  key_stages: int = 2
  blocks: int | None = None

  @property
  def keys(self) -> int:
    """Compressed keys of a unit of work."""
    return WORKERS * self.block_k

  @property
  def heads(self) -> int:
    """Heads whose products are issued together."""
    # A step of two leaves two of four stages for the next step's queries.
    return 2 if self.num_stages > 3 else 1


@dataclasses.dataclass(frozen=True)
class SelectionTiling:
  """Tiles of block selection.

  Attributes:
    scores: score kernel.
    scratch: maximum memory in bytes of the scores of a chunk of queries.
  """

  scores: ScoresTile
  scratch: int = 5 * 2**27

  def check_fit(self, head_dim: int, group: int, ratio: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      head_dim: H.
      group: G, heads per key/value head.
      ratio: l' / d, compressed blocks that begin in one selection block.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    tile = self.scores
    if tile.block_k not in (64, 128):
      raise ValueError(f"`scores.block_k` of {self} must be 64 or 128.")
    if tile.block_k % (8 * ratio):  # 8: see `MAX_RATIO`.
      raise ValueError(
        f"`scores.block_k` of {self} must be a multiple of 8 times "
        f"`selection_block` / `compression_stride` = {ratio}."
      )
    if tile.key_stages < 1:
      raise ValueError(f"`scores.key_stages` of {self} must be at least 1.")
    # A warpgroup waits for the queries of its next head while it computes.
    if tile.num_stages < 2:
      raise ValueError(f"`scores.num_stages` of {self} must be at least 2.")
    if tile.blocks is not None and tile.blocks < 1:
      raise ValueError(
        f"`scores.blocks` of {self} must be at least 1, or None."
      )
    size = scores_bytes(tile, head_dim, group)
    if size > _SHARED_MEMORY:
      raise ValueError(
        f"`scores` of {self} takes {size} bytes of shared memory with head "
        f"dimension {head_dim} and {group} heads per group; there are "
        f"{_SHARED_MEMORY}."
      )


def scores_bytes(tile: ScoresTile, head_dim: int, group: int) -> int:
  """Bytes of shared memory of the score kernel of block selection.

  Args:
    tile: its tile sizes.
    head_dim: H.
    group: G, heads per key/value head.
  """
  keys = tile.keys * 2 * head_dim + ROWS * 4 * group  # 4: lse
  queries = tile.num_stages * ROWS * 2 * head_dim
  return tile.key_stages * keys + queries


def selection_tiling(
  *, head_dim: int, group: int, ratio: int
) -> SelectionTiling:
  """Chooses tiles of block selection.

  Args:
    head_dim: H.
    group: G, heads per key/value head.
    ratio: l' / d, a divisor of `MAX_RATIO`.
  """

  def fits(tile: ScoresTile) -> bool:
    size = scores_bytes(tile, head_dim, group)
    return tile.block_k % (8 * ratio) == 0 and size <= _SHARED_MEMORY

  # Measured at H = 128 and 64k tokens: 64 keys take 10% more time, and one tile
  # of keys 8%, since the next unit's load while nothing is computed.
  tiles = (
    ScoresTile(block_k, num_stages, key_stages)
    for key_stages, block_k, num_stages in itertools.product(
      (2, 1), (128, 64), (4, 2)
    )
  )
  return SelectionTiling(next(filter(fits, tiles)))
