"""The gated sum of the branches (Eq. 5)."""

import functools

import jax

from nsa_jax.precision import sum_dtype


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated_sum(gates, branches):
  """Sum of gates[..., c] * branches[c], in float32 at least.

  The forward pass reads three [T, N, V] tensors and writes one, which is the
  minimum. The minimum of the backward pass is 7: it reads the cotangent and the
  three outputs and writes three cotangents. On a GPU, XLA reaches 7 and fuses
  the sums over V at the start of the branches' backward passes into the same
  pass. On a CPU it takes 12: products and sums are separate, and each reads the
  cotangent. The checkpoint prevents float32 copies of the outputs from being
  saved for the backward pass.
  """
  acc = sum_dtype(branches[0].dtype)
  out = sum(
    gates[..., c, None].astype(acc) * branch.astype(acc)
    for c, branch in enumerate(branches)
  )
  return out.astype(branches[0].dtype)
