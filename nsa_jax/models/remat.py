"""What a recomputing backward pass keeps, and where: policies by name.

The ops and the blocks of `TransformerLM` give the names; here is which of them
a policy keeps.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax

from nsa_jax import _checks, dispatch
from nsa_jax.typing import RematPolicyName

# Names that the ops give to results by `checkpoint_name`. If these are kept,
# the selection is not recomputed, nor is the forward pass of a branch whose
# implementation has its own backward rule.
ATTENTION_NAMES = (
  *(
    f"nsa_{branch}_{result}"
    for branch in dispatch.ATTENTION_OPS
    for result in ("out", "lse")
  ),
  "nsa_block_ids",
)
# The residual stream that enters a block, from which all else is recomputed.
INPUT_NAME = "block_input"

# Names that stay on the device, and names that go to the host. A block's input
# without its name in either is kept as every argument of `jax.checkpoint` is.
_KEPT: dict[RematPolicyName, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "full": ((), ()),
  "save_attention": (ATTENTION_NAMES, ()),
  "offload_attention": ((), ATTENTION_NAMES),
  "offload_inputs": ((), (INPUT_NAME,)),
  "offload_all": ((), (INPUT_NAME, *ATTENTION_NAMES)),
}


def remat_policy(name: RematPolicyName) -> Callable[..., Any]:
  """The `policy` of `jax.checkpoint` that `TransformerConfig.remat` names.

  For models of your own. What the names of the policies mean is the same with
  one exception: the offloading of a block's input needs that your block names
  it, by `jax.ad_checkpoint.checkpoint_name(x, "block_input")`, before its first
  use.

  Args:
    name: one of

      - "full": nothing is kept but the arguments of the function;
      - "save_attention": out and lse of every branch and the block ids are
        kept, so that neither the selection nor a kernel of the branches runs
        forward twice;
      - "offload_attention": the same, in pinned memory of the host;
      - "offload_inputs": what is named "block_input" is kept, in pinned memory
        of the host;
      - "offload_all": both of these, there.

      On a CPU device and host are one memory, and nothing is moved.

  Returns:
    A policy; the same one for the same name.

  Raises:
    ValueError: if `name` is another one, such as "none": do without
      `jax.checkpoint`.

  Example:
    >>> import functools, jax, jax.numpy as jnp
    >>> import nsa_jax
    >>> policy = nsa_jax.remat_policy("save_attention")
    >>> @functools.partial(jax.checkpoint, policy=policy)
    ... def block(x):
    ...   return nsa_jax.window_attention(
    ...     x, x, x, config=nsa_jax.NSAConfig(window=4), return_lse=False
    ...   )
    >>> jax.grad(lambda x: block(x).sum())(jnp.ones((1, 8, 2, 4))).shape
    (1, 8, 2, 4)
  """
  _checks.choice("name", name, get_args(RematPolicyName))
  return _policy(name)


@functools.cache
def _policy(name: RematPolicyName) -> Callable[..., Any]:
  # jax compares these functions by identity.
  saved, offloaded = _KEPT[name]
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=saved,
    names_which_can_be_offloaded=offloaded,
    offload_src="device",
    offload_dst="pinned_host",
  )
