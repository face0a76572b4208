"""cuDNN's attention, through `jax.nn`: window and full attention.

It returns no differentiable lse, and the bits of its query gradient change from
run to run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nsa_jax.typing import Array, Queries
from pallas_kernels.interface import Spec


@dataclasses.dataclass(frozen=True)
class _Attention:
  """Causal attention over all tokens or over a window of them."""

  windowed: bool

  # None: jax differentiates `forward`, which saves cuDNN's own residuals.
  backward = None

  def check(
    self, spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[Any, Any]
  ) -> None:
    """As in `pallas_kernels.interface`."""
    query, key, value = qkv
    queries: Queries = index[1]
    name = "window_attention" if self.windowed else "full_attention"
    if spec.need_lse:
      raise NotImplementedError(
        f"`{name}` returns lse, and cuDNN gives none that is differentiable: "
        "`return_lse`=False does without"
      )
    if spec.softcap is not None:
      raise NotImplementedError(f"`softcap`={spec.softcap}: cuDNN takes None")
    if query.dtype not in (jnp.float16, jnp.bfloat16):
      raise NotImplementedError(
        f"`query` of dtype {query.dtype}: cuDNN takes float16 and bfloat16"
      )
    if not all(isinstance(size, int) for size in query.shape):
      raise NotImplementedError(
        f"`query` has the symbolic shape {query.shape}: cuDNN takes static "
        "sizes"
      )
    offset, key_offset = queries.offset, queries.key_offset
    plain = (
      queries.key_segments is None
      and isinstance(offset, int)
      and isinstance(key_offset, int)
      and offset == key_offset >= 0
      and query.shape[1] == key.shape[1]
    )
    if not plain:
      raise NotImplementedError(
        "cuDNN takes as many queries as keys, which start at the same static "
        "position, and no `segment_ids`"
      )
    most = max_head_dim()
    for part, x in (("query", query), ("value", value)):
      if x.shape[-1] % 8 or x.shape[-1] > most:
        raise NotImplementedError(
          f"`{part}` has head dimension {x.shape[-1]}: cuDNN takes multiples "
          f"of 8 up to {most}"
        )
    try:
      jax.eval_shape(lambda *qkv: self.forward(spec, qkv, index), *qkv)
    except RuntimeError as error:  # No cuDNN is installed.
      raise NotImplementedError(str(error).rstrip(".")) from error

  def forward(
    self, spec: Spec, qkv: tuple[Array, Array, Array], index: tuple[Any, Any]
  ) -> tuple[Array, None]:
    """Out [B, T, N, V], and None in place of lse."""
    del index
    query, key, value = qkv
    value_dim = value.shape[-1]
    # cuDNN requires H = V; padding with zeros changes nothing.
    width = max(query.shape[-1], value_dim)
    query, key, value = (
      jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in qkv
    )
    window = None
    if self.windowed:
      window = min(spec.config.window, key.shape[1]) - 1, 0
    out = jax.nn.dot_product_attention(
      query,
      key,
      value,
      scale=spec.scale,
      is_causal=True,
      local_window_size=window,
      implementation="cudnn",
    )
    return out[..., :value_dim], None


window = _Attention(windowed=True)
full = _Attention(windowed=False)


def max_head_dim() -> int:
  """The largest head dimension that cuDNN supports on the default device.

  The device is checked at trace time instead of switching platforms inside the
  program, because a switch would save the residuals of both its branches.

  Raises:
    NotImplementedError: if the device is not an NVIDIA GPU, or is too old.
  """
  config: Any = jax.config
  device = config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.devices(device)[0]
  if "cuda" not in device.client.platform_version:
    raise NotImplementedError(
      f"the default device {device} is no NVIDIA GPU, which cuDNN needs"
    )
  capability = float(device.compute_capability)
  if capability < 8:
    raise NotImplementedError(
      f"{device.device_kind} has compute capability {capability}: cuDNN's "
      "attention takes 8.0 and newer"
    )
  return 256 if capability >= 9 else 128
