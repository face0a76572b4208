"""Tile sizes of the kernels and the heuristics that choose them.

The numbers come from sweeps (`benchmarks/sweep_*.py`), whose tables are in
`benchmarks/results/`. Tile sizes change results only by rounding.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.triton import common


def _check_powers(tiles: object, least: int, numbers: dict[str, int]) -> None:
  """Checks that numbers of `tiles` are powers of two, at least `least`.

  Raises:
    ValueError: naming the number, the tiles and the rule.
  """
  for name, value in numbers.items():
    if value < least or value & (value - 1):
      raise ValueError(
        f"`{name}` of {tiles} must be a power of two, at least {least}."
      )


@dataclasses.dataclass(frozen=True)
class Tile:
  """Tile sizes and compiler options of one kernel.

  Attributes:
    block_k: keys per step; in the selected branch it divides l'.
    num_warps: warps per program.
    num_stages: depth of the pipeline that loads the inputs of the steps.
    queries: neighbouring queries per program, 1 or 2; two load the blocks that
      both chose only once (query-outer forward kernel only).
  """

  block_k: int
  num_warps: int
  num_stages: int
  queries: int = 1


@dataclasses.dataclass(frozen=True)
class SelectedTiling:
  """Tiles of the selected branch.

  Attributes:
    by_block: use the block-outer kernels, which gather queries (for small
      groups), instead of the query-outer kernels.
    fwd: forward kernel.
    dq: gradient of the query; not used with `by_block`, whose single backward
      kernel uses `dkv`.
    dkv: gradient of keys and values, and without `by_block` of the scores.
    rows: with `by_block`, tile rows (queries x heads of a group) per step.
    piece: maximum queries per piece of the list of a block.
    scratch: maximum memory in bytes of what a chunk of queries (at least 16)
      stores for each block of each query: with `by_block` a partial output, or
      a partial gradient of the query; else, in the backward pass, the gradients
      of the scores. Under `jax.vmap` with shared keys, of each mapped call.
  """

  by_block: bool
  fwd: Tile
  dq: Tile
  dkv: Tile
  rows: int = 64
  piece: int = 1024
  scratch: int = 2**31

  def check_fit(self, group: int, block: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      group: G, heads per key/value head.
      block: l'.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    kernels = {"fwd": self.fwd, "dkv": self.dkv}
    if self.by_block:
      _check_powers(self, max(16, group), {"rows": self.rows})
    else:
      kernels["dq"] = self.dq
    for name, tile in kernels.items():
      _check_powers(self, 16, {f"{name}.block_k": tile.block_k})
      _check_powers(self, 1, {f"{name}.num_warps": tile.num_warps})
      if block % tile.block_k:
        raise ValueError(
          f"`tiles`={self} must have a `{name}.block_k` that divides "
          f"`selection_block`={block}."
        )
      if tile.queries != 1 and (tile.queries != 2 or name != "fwd"):
        rule = "1 or 2" if name == "fwd" else "1"
        raise ValueError(
          f"`tiles`={self} must have {rule} for `{name}.queries`."
        )
    if self.piece < 1:
      raise ValueError(f"`tiles`={self} must have a `piece` of at least 1.")


@dataclasses.dataclass(frozen=True)
class BandTile:
  """Tile sizes and compiler options of a kernel of band attention.

  Attributes:
    block_k: keys per step; for `dkv`, keys per program.
    num_warps: warps per program.
    num_stages: depth of the pipeline that loads the inputs of the steps.
    rows: tile rows (queries x heads of a group) per program; for `dkv`, per
      step. A power of two, at least 16 and at least G.
  """

  block_k: int
  num_warps: int
  num_stages: int
  rows: int


@dataclasses.dataclass(frozen=True)
class BandTiling:
  """Tiles of the compressed or the window branch.

  Attributes:
    fwd: forward kernel.
    dq: gradient of the query; its `block_k` divides that of `dkv`, and its
      `rows` are a multiple of those of `dkv`.
    dkv: gradient of keys and values.
    programs: number of `dkv` programs that fills a device; the queries are
      split until there are that many.
    scratch: maximum memory in bytes of the stored gradients of the scores, of
      the queries of a chunk times the keys they read. A chunk has at least one
      query tile. Under `jax.vmap` every call takes this memory.

  Raises:
    ValueError: if the tiles of `dq` and `dkv` do not match as above.
  """

  fwd: BandTile
  dq: BandTile
  dkv: BandTile
  programs: int = 512
  scratch: int = 2**31

  def __post_init__(self) -> None:
    dq, dkv = self.dq, self.dkv
    if dkv.block_k % dq.block_k or dq.rows % dkv.rows:
      raise ValueError(
        f"`dq`={dq} must have a `block_k` that divides that of `dkv`={dkv} and "
        "a multiple of its `rows`."
      )

  def check_fit(self, group: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      group: G, heads per key/value head.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    for name in ("fwd", "dq", "dkv"):
      tile = getattr(self, name)
      _check_powers(self, 16, {f"{name}.block_k": tile.block_k})
      _check_powers(self, 1, {f"{name}.num_warps": tile.num_warps})
      _check_powers(self, max(16, group), {f"{name}.rows": tile.rows})

  @property
  def steps(self) -> int:
    """Steps of `dkv` per query tile of `dq`."""
    return self.dq.rows // self.dkv.rows


def band_tiling(
  *,
  windowed: bool,
  group: int,
  head_dim: int,
  value_dim: int,
  dtype: jnp.dtype,
) -> BandTiling:
  """Chooses tiles of the compressed or the window branch for a shape.

  Args:
    windowed: a query reads a window, not all earlier keys.
    group: G, heads per key/value head.
    head_dim: H.
    value_dim: V.
    dtype: dtype of query, key and value.
  """
  width = max(head_dim, value_dim)
  least = common.padded_rows(group)
  # Accumulators are in registers: tiles are as large as possible without
  # spills.
  if jnp.dtype(dtype).itemsize > 2:
    # Exact float32 products do not use tensor cores, and their operands are in
    # registers too.
    rows = max(32, least)
    if width <= 128:
      fwd = BandTile(32, 4, 2, rows)
      dkv = BandTile(32 if rows == 32 else 16, 8, 2, rows)
    else:
      fwd = BandTile(16, 8, 1, rows)
      dkv = BandTile(32 if least == 16 else 16, 8, 1, least)
    dq = dataclasses.replace(dkv, block_k=16, num_warps=4)
    return BandTiling(fwd, dq, dkv)

  if 128 < width <= 192:
    dq = BandTile(32, 8, 3, rows=128)
  elif windowed:
    dq = BandTile(32, 4, 4 if width <= 128 else 3, rows=64)
  else:
    dq = BandTile(64, 8, 3, rows=128)
  if windowed and group <= 4 and width <= 128:
    # With few heads a tile spans many positions: a large one would read many
    # keys outside the windows of its first and last queries.
    fwd = BandTile(32, 4, 3, rows=64)
    dkv = BandTile(64, 4, 2, rows=64)
  elif width <= 64:
    fwd = BandTile(64, 8, 3, rows=128)
    dkv = BandTile(64, 4, 3, rows=64)
  else:
    # With 32 keys, two programs fit on a multiprocessor: one computes while the
    # other waits. Larger tiles read fewer bytes.
    if width <= 192 and windowed:
      fwd = BandTile(32, 8, 3, rows=128)
    elif width <= 192:
      fwd = BandTile(64, 8, 3, rows=256 if width <= 128 else 128)
    else:
      fwd = BandTile(64, 8, 2, rows=128)
    if width <= 128:
      dkv = BandTile(128, 8, 3, rows=64)
    elif width <= 192 and least <= 32:
      dkv = BandTile(64, 4, 2, rows=32)
    else:
      dkv = BandTile(64, 8, 2, rows=64)
  return BandTiling(fwd, dq, dkv)


def selected_tiling(
  *,
  group: int,
  head_dim: int,
  value_dim: int,
  dtype: jnp.dtype,
  block: int,
  num_ids: int,
) -> SelectedTiling:
  """Chooses tiles of the selected branch for a shape.

  Args:
    group: G, heads per key/value head.
    head_dim: H.
    value_dim: V.
    dtype: dtype of query, key and value.
    block: l'.
    num_ids: m, blocks per query.
  """
  rows = common.padded_rows(group)
  width = max(head_dim, value_dim)
  wide = width > 128
  # Exact float32 products do not use tensor cores: other tiles are fastest.
  exact = jnp.dtype(dtype).itemsize > 2

  def tile(keys, num_warps, num_stages, queries=1):
    return Tile(min(keys, block), num_warps, num_stages, queries)

  if group <= 8:
    # Registers hold the accumulators of a block, 64 x (H + V), and a step's
    # queries.
    if exact:
      small = tile(32, 4, 1) if width <= 128 else tile(16, 4, 1)
      return SelectedTiling(True, small, small, small, rows=32)
    if width > 192:
      bwd = tile(64, 8, 1)
    else:
      bwd = tile(64, 4, 2 if wide else 1 if group == 8 else 3)
    return SelectedTiling(True, tile(64, 4, 1), bwd, bwd, rows=64)

  if exact:
    fwd = dq = tile(32, 2, 2) if width <= 128 else tile(16, 2, 2)
  elif rows == 64:
    fwd = dq = tile(32, 4, 2)
  elif rows == 32:
    fwd = tile(32, 1, 2) if width <= 128 else tile(32, 2, 2)
    dq = tile(64, 2, 2) if width <= 128 else tile(32, 2, 2)
  else:
    fwd = tile(32, 1, 2) if width <= 192 else tile(16, 1, 2)
    # Pairs of queries, if their two accumulators fit in the registers and the
    # lists are short: every id of one is compared with every id of the other.
    if not wide and num_ids <= 64:
      fwd = tile(32 if width <= 64 else 16, 1, 2, queries=2)
    if wide:
      dq = tile(32, 1 if width <= 192 else 2, 2)
    else:
      dq = tile(64, 2, 3)

  # Keys are the tile rows here, and wgmma needs at least 64 of them.
  if block == 16:
    dkv = tile(16, 1, 3)
  elif block == 32:
    dkv = tile(32, 2, 3)
  else:
    stages = 3 if rows < 64 else 2
    if rows == 16 and not (wide or exact):
      stages = 5  # Small tiles: two programs still fit on a multiprocessor.
    dkv = tile(64, 8 if width > 192 else 4, stages)
  return SelectedTiling(False, fwd, dq, dkv)


@dataclasses.dataclass(frozen=True)
class SelectionTiling:
  """Tiles of block selection.

  Attributes:
    block_q: queries per program of the score kernel.
    scores: score kernel; `block_k` counts compressed keys per program.
    rows: queries per program of the top-n kernel; divides `block_q`.
    block_m: scores per query and step of the top-n kernel.
    top_n_warps: warps per program of the top-n kernel.
    scratch: maximum memory in bytes of the scores of a chunk of queries.
  """

  block_q: int
  scores: Tile
  rows: int
  block_m: int
  top_n_warps: int
  scratch: int = 5 * 2**27

  def check_fit(self, ratio: int) -> None:
    """Checks that the tiles fit a call.

    Args:
      ratio: l' / d, compressed blocks that begin in one selection block.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    sides = {"block_q": self.block_q, "scores.block_k": self.scores.block_k}
    _check_powers(self, 16, sides)
    _check_powers(
      self,
      1,
      {
        "rows": self.rows,
        "block_m": self.block_m,
        "scores.num_warps": self.scores.num_warps,
        "top_n_warps": self.top_n_warps,
      },
    )
    if self.block_q % self.rows:
      raise ValueError(
        f"`tiles`={self} must have `rows` that divide `block_q`."
      )
    if self.scores.block_k % ratio:
      raise ValueError(
        f"`tiles`={self} must have a `scores.block_k` that is a multiple of "
        f"`selection_block` / `compression_stride` = {ratio} (by means, / "
        "`tokens`)."
      )


def selection_tiling(
  *, length: int, dtype: jnp.dtype, ratio: int
) -> SelectionTiling:
  """Chooses tiles of block selection for a shape.

  Args:
    length: T.
    dtype: dtype of query and key.
    ratio: l' / d, compressed blocks that begin in one selection block.
  """
  # The keys of a tile stay in shared memory, and its queries are loaded head by
  # head; scores and their sum over heads are in registers. A program waits for
  # its products, so three per multiprocessor overlap products with
  # exponentials: two stages and 64 scores per thread allow that at H = 128.
  exact = jnp.dtype(dtype).itemsize == 4  # Without tensor cores.
  block_q = 32 if exact else 64
  block_q = min(block_q, common.padded_rows(length))
  block_k = 32 if exact else 128
  return SelectionTiling(block_q, Tile(max(block_k, ratio), 4, 2), 2, 128, 2)


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
  """Tiles of the decode kernels.

  Attributes:
    rows: tile rows (queries x heads of a group) per program of the compressed
      kernel; a power of two, at least 16 and at least G.
    compressed: compressed kernel; its `block_k` is a multiple of l' / d.
    splits: number of parts that the visible compressed keys are split into.
    block_m: scores per step of selection, a multiple of
      `compressed.block_k` / (l' / d).
    blocks: kernel that selects blocks, and reads these and the window; its
      `block_k` divides l'.
    selected_steps: steps per piece of the selected blocks.
    window_steps: steps per piece of the window.
    merge_warps: warps per program of the merge.

  Raises:
    ValueError: if `splits` or a number of steps is less than 1, or another
      number is not a power of two, or `rows` or a `block_k` is less than 16.
  """

  rows: int
  compressed: Tile
  splits: int
  block_m: int
  blocks: Tile
  selected_steps: int
  window_steps: int
  merge_warps: int

  def __post_init__(self) -> None:
    for name in ("splits", "selected_steps", "window_steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` of {self} must be at least 1.")
    # Sides of a matrix product.
    _check_powers(self, 16, {"rows": self.rows})
    for name, tile in (
      ("compressed", self.compressed),
      ("blocks", self.blocks),
    ):
      _check_powers(self, 16, {f"{name}.block_k": tile.block_k})
      _check_powers(self, 1, {f"{name}.num_warps": tile.num_warps})
    _check_powers(
      self, 1, {"block_m": self.block_m, "merge_warps": self.merge_warps}
    )

  def check_fit(self, group: int, block: int, ratio: int) -> None:
    """Checks that the tiles fit each other and a call.

    Args:
      group: G, heads per key/value head.
      block: l'.
      ratio: l' / d, compressed blocks that begin in one selection block.

    Raises:
      ValueError: naming the tiles and the rule.
    """
    if self.rows < group:
      raise ValueError(
        f"`tiles`={self} must have at least as many `rows` as a group has "
        f"heads, {group}."
      )
    if block % self.blocks.block_k:
      raise ValueError(
        f"`tiles`={self} must have a `block_k` of `blocks` that divides "
        f"`selection_block`={block}."
      )
    if self.compressed.block_k % ratio:
      raise ValueError(
        f"`tiles`={self} must have a `block_k` of `compressed` that is a "
        f"multiple of `selection_block` / `compression_stride` = {ratio} (by "
        "means, / `tokens`)."
      )
    columns = self.compressed.block_k // ratio
    if self.block_m % columns:
      raise ValueError(
        f"`tiles`={self} must have a `block_m` that is a multiple of the "
        f"{columns} selection blocks in a tile of compressed keys."
      )


_MULTIPROCESSORS = 132


def decode_tiling(
  *,
  batch: int,
  length: int,
  kv_heads: int,
  group: int,
  head_dim: int,
  value_dim: int,
  dtype: jnp.dtype,
  block: int,
  ratio: int,
  num_compressed: int,
  num_selected: int,
  num_window: int,
) -> DecodeTiling:
  """Chooses tiles of decoding for a shape.

  Args:
    batch: B.
    length: T.
    kv_heads: K.
    group: G, heads per key/value head.
    head_dim: H.
    value_dim: V.
    dtype: dtype of query, keys and values.
    block: l'.
    ratio: l' / d, compressed blocks that begin in one selection block.
    num_compressed: C.
    num_selected: number of keys in the selected blocks of a query.
    num_window: number of keys that the window kernel walks: the ring's size, or
      w.
  """
  width = max(head_dim, value_dim)
  least = common.padded_rows(group)
  exact = jnp.dtype(dtype).itemsize > 2
  rows = common.padded_rows(length * group)
  rows = max(least, min(rows, 16 if exact else 128 if width <= 128 else 32))

  def tile(rows, most, num_stages):
    # These sizes spill no registers.
    if exact:
      return Tile(min(16, most), 8, 2)
    warps = 4 if rows * width <= 32 * 192 else 8
    return Tile(min(64, most), warps, num_stages)

  # The number of loads in flight limits the speed: a multiprocessor takes two
  # programs of three stages, or three of two. All have the same size and run at
  # once, so that there is no second wave.
  compressed = tile(rows, 64, 3 if width <= 128 else 2)
  compressed = dataclasses.replace(
    compressed, block_k=max(compressed.block_k, ratio)
  )
  at_once = _MULTIPROCESSORS * (2 if compressed.num_stages == 3 else 3)
  programs = -(-length // (rows // group)) * kv_heads * batch
  splits = at_once // programs
  if not splits:
    # Not all fit at once: small programs keep the last wave short.
    splits = -(-4 * at_once // programs)
  splits = min(
    splits,
    -(-num_compressed // compressed.block_k),
    128,  # The merge holds a value row of every split.
  )

  # Selection holds the scores of many blocks in registers, so only two programs
  # fit on a multiprocessor: one reads selected blocks, the other the window.
  # More pieces would only repeat the selection.
  blocks = tile(least, block, 3 if width <= 128 else 2)
  pieces = max(1, _MULTIPROCESSORS // (batch * length * kv_heads))
  selected_steps = -(-num_selected // (blocks.block_k * pieces))
  window_steps = -(-num_window // (blocks.block_k * pieces))
  # The merge holds its inputs in registers, about 64 numbers per thread.
  held = sum(
    pl.next_power_of_2(count)
    for count in (
      splits,
      -(-num_window // (blocks.block_k * window_steps)),
      -(-num_selected // (blocks.block_k * selected_steps)),
    )
  )
  merge_warps = pl.next_power_of_2(pl.cdiv(held * value_dim, 32 * 64))
  # All loads of selection are in flight at once, if they fit in registers.
  block_m = 1024 if group <= 16 else 128
  block_m = min(block_m, pl.next_power_of_2(num_compressed // ratio + 1))
  return DecodeTiling(
    rows,
    compressed,
    max(1, splits),
    max(block_m, compressed.block_k // ratio),
    blocks,
    selected_steps,
    window_steps,
    min(merge_warps, 8),
  )
