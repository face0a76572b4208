"""The third launch of decoding: the gated sum of the branches (Eq. 5)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import platforms
from pallas_kernels.interface import Spec
from pallas_kernels.triton import common
from pallas_kernels.triton.decode.softmax import PartialSoftmax


def _merge_kernel(
  gates_ref,  # [3]
  *refs,  # acc [pieces, V], top and total [pieces] of every branch; out [V]
  counts: tuple[int, ...],
  exp2: Callable[[jax.Array], jax.Array],
):
  """Merges one query and head.

  `counts` has the number of pieces of each branch; the compressed branch may be
  missing.
  """
  *partial_refs, out_ref = refs
  value_pieces = common.pieces(out_ref.shape[0])
  # All loads are issued first, so that their latencies overlap.
  loaded = []
  for branch, count in enumerate(counts):
    acc_ref, top_ref, total_ref = partial_refs[3 * branch : 3 * branch + 3]
    mask = common.padding_mask(count, len(top_ref))
    loaded.append(
      (
        gates_ref[3 - len(counts) + branch].astype(jnp.float32),
        common.load(top_ref, mask, common.MAX_INIT),
        common.load(total_ref, mask),
        common.load_pieces(acc_ref, slice(None), value_pieces, mask),
      )
    )
  out = [jnp.zeros((width,), jnp.float32) for _, width in value_pieces]
  # Padding reads nothing in any branch, and its gates may be NaN.
  token: Any = False
  for gate, top, total, acc in loaded:
    weight = exp2(top - top.max())
    total = (weight * total).sum()
    some = total != 0
    token |= some
    share = 1 / jnp.where(some, total, 1)
    for i, a in enumerate(acc):
      x = (weight[:, None] * a).sum(axis=0) * share
      out[i] += gate * jnp.where(some, x, 0)
  for (column, width), x in zip(value_pieces, out, strict=True):
    x = jnp.where(token, x, 0)
    out_ref[pl.ds(column, width)] = x.astype(out_ref.dtype)


def merge_branches(
  branches: Sequence[PartialSoftmax], gates: jax.Array, dtype: Any, spec: Spec
) -> jax.Array:
  """Out [B, T, N, V]."""
  _, num_rows, value_dim = branches[0].acc.shape
  counts = tuple(len(x.acc) for x in branches)
  specs = []
  for count in counts:
    padded = pl.next_power_of_2(count)  # As loads require.
    specs += [
      pl.BlockSpec((padded, None, value_dim), lambda r: (0, r, 0)),
      pl.BlockSpec((padded, None), lambda r: (0, r)),
      pl.BlockSpec((padded, None), lambda r: (0, r)),
    ]
  out = pl.pallas_call(
    functools.partial(
      _merge_kernel, counts=counts, exp2=common.exp2(spec.interpret)
    ),
    **common.options(
      "nsa_decode_merge", spec.tiles.merge_warps, 1, spec.interpret
    ),
    grid=(num_rows,),
    in_specs=[pl.BlockSpec((None, 3), lambda r: (r, 0)), *specs],
    out_specs=pl.BlockSpec((None, value_dim), lambda r: (r, 0)),
    out_shape=platforms.out_shape((num_rows, value_dim), dtype),
  )(gates.reshape(-1, 3), *(leaf for x in branches for leaf in x))
  return out.reshape(*gates.shape[:3], value_dim)
