"""Which implementation serves a call, and the errors when none can.

`ValueError` means that the caller is wrong; it is never swallowed.
`NotImplementedError` means that this implementation cannot do it; the next one
asked for may.
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import export
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import compression, reference, xla
from nsa_jax.config import NSAConfig
from nsa_jax.typing import (
  KV,
  Array,
  Implementation,
  ImplementationName,
  Queries,
)

# `disabled_checks` of `jax.export.export` for programs that hold the kernels,
# whose custom calls jax does not promise to keep: run such a program with the
# version of jax that exported it. The target depends on that version.
EXPORT_DISABLED_CHECKS = tuple(
  export.DisabledSafetyCheck.custom_call(target)
  for target in ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
)


def _triton_compressed_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float,
  queries: Queries,
  elsewhere: Any = None,
) -> tuple[Array, Array]:
  # Imported at the first use, so that importing nsa_jax imports no Pallas.
  import pallas_kernels

  segments = queries.key_segments
  if segments is not None:
    segments = compression.compressed_block_segments(segments, config)
  return pallas_kernels.compressed_attention(
    query,
    key,
    value,
    stride=config.compression_stride,
    span=config.compression_block,
    key_length=key_length,
    scale=scale,
    query_offset=queries.positions[:, 0],
    key_segments=segments,
    query_segments=queries.query_segments,
    elsewhere=elsewhere,
  )


def _triton_selected_attention(
  query: Array,
  key: Array,
  value: Array,
  block_ids: Array,
  *,
  config: NSAConfig,
  scale: float,
  queries: Queries,
  elsewhere: Any = None,
) -> tuple[Array, Array]:
  import pallas_kernels

  return pallas_kernels.selected_attention(
    query,
    key,
    value,
    block_ids,
    selection_block=config.selection_block,
    scale=scale,
    query_offset=queries.positions[:, 0],
    key_segments=queries.key_segments,
    query_segments=queries.query_segments,
    elsewhere=elsewhere,
  )


def _triton_window_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  scale: float,
  key_offset: int | Array,
  queries: Queries,
  elsewhere: Any = None,
) -> tuple[Array, Array]:
  import pallas_kernels

  return pallas_kernels.window_attention(
    query,
    key,
    value,
    window=config.window,
    scale=scale,
    query_offset=queries.positions[:, 0],
    key_offset=key_offset,
    key_segments=queries.key_segments,
    query_segments=queries.query_segments,
    elsewhere=elsewhere,
  )


def _cudnn_window_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  config: NSAConfig,
  scale: float,
  key_offset: int | Array,
  queries: Queries,
  plain: bool,
  with_lse: bool,
) -> tuple[Array, None]:
  del key_offset, queries
  if with_lse:
    raise NotImplementedError(
      "`window_attention` returns lse, and cuDNN gives none that is "
      "differentiable; it serves the window of `native_sparse_attention`"
    )
  if query.dtype not in (jnp.float16, jnp.bfloat16):
    raise NotImplementedError(
      f"`query` of dtype {query.dtype}: cuDNN takes float16 and bfloat16"
    )
  if query.shape[-1] != value.shape[-1]:
    raise NotImplementedError(
      f"`value` has head dimension {value.shape[-1]}, which must be "
      f"{query.shape[-1]}, that of `query`"
    )
  if not plain:
    raise NotImplementedError(
      "cuDNN's window takes as many queries as keys, and no `query_offset`, "
      "`segment_ids` or `key_offset`"
    )
  try:
    out = jax.nn.dot_product_attention(
      query,
      key,
      value,
      scale=scale,
      is_causal=True,
      local_window_size=(min(config.window, key.shape[1]) - 1, 0),
      implementation="cudnn",
    )
  except RuntimeError as error:  # No cuDNN is installed.
    raise NotImplementedError(str(error).rstrip(".")) from error
  return out, None


def _triton_select_blocks(
  query: Array,
  compressed_key: Array,
  lse: Array,
  *,
  config: NSAConfig,
  key_length: int,
  scale: float,
  queries: Queries,
  elsewhere: Any = None,
) -> Array:
  import pallas_kernels

  segments: dict[str, Any] = {}
  if queries.key_segments is not None and queries.query_segments is not None:
    segments = {
      "block_segments": compression.compressed_block_segments(
        queries.key_segments, config
      ),
      "query_segments": queries.query_segments,
      "segment_starts": compression.segment_starts(
        queries.key_segments, queries.query_segments
      ),
    }
  return pallas_kernels.select_blocks(
    query,
    compressed_key,
    lse,
    key_length=key_length,
    compression_block=config.compression_block,
    compression_stride=config.compression_stride,
    selection_block=config.selection_block,
    num_selected=config.num_selected,
    num_initial=config.num_initial,
    num_local=config.num_local,
    scale=scale,
    query_offset=queries.positions[:, 0],
    **segments,
    elsewhere=elsewhere,
  )


def _triton_decode_attention(
  query: Array,
  compressed: KV,
  selected: KV,
  window: KV | None,
  gates: Array,
  query_offset: Array,
  lengths: Array,
  *,
  config: NSAConfig,
  scale: float,
  compressed_query: Array,
  elsewhere: Any = None,
) -> tuple[Array, Array]:
  import pallas_kernels

  return pallas_kernels.decode_attention(
    query,
    compressed.key,
    compressed.value,
    selected.key,
    selected.value,
    None if window is None else window.key,
    None if window is None else window.value,
    gates,
    query_offset,
    lengths,
    stride=config.compression_stride,
    span=config.compression_block,
    selection_block=config.selection_block,
    num_selected=config.num_selected,
    num_initial=config.num_initial,
    num_local=config.num_local,
    window=config.window,
    scale=scale,
    compressed_query=compressed_query,
    elsewhere=elsewhere,
  )


_OPS: dict[str, dict[str, Callable[..., Any]]] = {
  op: {"reference": getattr(reference, op), "xla": getattr(xla, op)}
  for op in (
    "compressed_attention",
    "block_scores",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "decode_attention",
  )
}
_OPS["compressed_attention"]["triton"] = _triton_compressed_attention
_OPS["selected_attention"]["triton"] = _triton_selected_attention
_OPS["window_attention"]["triton"] = _triton_window_attention
_OPS["window_attention"]["cudnn"] = _cudnn_window_attention
_OPS["select_blocks"]["triton"] = _triton_select_blocks
_OPS["decode_attention"]["triton"] = _triton_decode_attention


def names(implementation: Implementation) -> Sequence[ImplementationName]:
  """The implementations to try, in order.

  Raises:
    ValueError: if a name is unknown or the sequence is empty.
  """
  known = get_args(ImplementationName)
  if implementation is None:
    return ("triton", "xla")
  if isinstance(implementation, str):
    tried: Sequence[Any] = (implementation,)
  elif isinstance(implementation, Sequence) and implementation:
    tried = tuple(implementation)
  else:
    tried = (implementation,)
  for name in tried:
    if name not in known:
      raise ValueError(
        f"`implementation`={implementation!r} must be None, one of "
        f"{', '.join(map(repr, known))}, or a sequence of these names."
      )
  return tried


def call(
  op: str,
  implementation: Implementation,
  *args: Any,
  cudnn: dict[str, Any] | None = None,
  **kwargs: Any,
) -> Any:
  """Calls the first implementation of `op` that can do it.

  `cudnn` are arguments that only "cudnn" takes.

  None is "triton" on NVIDIA GPUs with "xla" in place of the kernels everywhere
  else, in one traced program; or "xla" alone, if the kernels cannot do it.

  Raises:
    NotImplementedError: if none of those asked for can, with every reason.
  """
  reasons = []
  for name in names(implementation):
    function = _OPS[op].get(name)
    if function is None:
      reasons.append(f"{name!r} has no `{op}` in this version")
      continue
    own: dict[str, Any] = {}
    if name == "triton" and implementation is None:
      own = {"elsewhere": _elsewhere(op, args[3:], kwargs)}
    elif name == "cudnn":
      own = cudnn or {}
    try:
      result = function(*args, **kwargs, **own)
    except NotImplementedError as error:
      reasons.append(f"{name!r}: {error}")
      continue
    # The rules of the kernels name what they keep themselves.
    return result if name == "triton" else _named(op, result)
  raise NotImplementedError(
    f"`implementation`={implementation!r} cannot do this call of `{op}`: "
    f"{'; '.join(reasons)}."
  )


def _elsewhere(op: str, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
  """`xla` in place of the kernels; the arrays among its arguments apart."""
  import pallas_kernels

  arrays: dict[str, Any] = {}
  static: dict[str, Any] = {}
  for name, value in kwargs.items():
    kind = arrays if isinstance(value, jax.Array | Queries) else static
    kind[name] = value
  return pallas_kernels.Elsewhere(
    pallas_kernels.Partial(_with_xla, op, tuple(static.items())),
    (rest, arrays),
  )


def _with_xla(op, static, a, b, c, rest, arrays):
  return _OPS[op]["xla"](a, b, c, *rest, **arrays, **dict(static))


def _named(op: str, result: Any) -> Any:
  """Names out and lse of a branch for remat policies."""
  branch = op.removesuffix("_attention")
  if branch not in ("compressed", "selected", "window"):
    return result
  out, lse = result
  out = checkpoint_name(out, f"nsa_{branch}_out")
  if lse is not None:
    lse = checkpoint_name(lse, f"nsa_{branch}_lse")
  return out, lse
