"""Draws which keys a query of Native Sparse Attention reads.

The inputs are a smooth random walk; the library selects the blocks.

    python examples/plot_reads.py --out reads.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import nsa_jax

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTH = 512
QUERY = 407
CONFIG = nsa_jax.NSAConfig(
  compression_block=16,
  compression_stride=8,
  selection_block=32,
  num_selected=5,
  num_initial=1,
  num_local=1,
  window=64,
)
COLOURS = {
  "compressed": "#4878a8",
  "selected": "#d1702f",
  "window": "#3f8f5b",
}


@jax.jit
def reads():
  """Compressed probabilities, chosen blocks and window of every query."""
  keys = jax.random.split(jax.random.key(3), 2)
  walk = jnp.cumsum(jax.random.normal(keys[0], (1, LENGTH, 1, 16)), axis=1)
  key = walk / jnp.linalg.norm(walk, axis=-1, keepdims=True)
  query = 12 * key + jax.random.normal(keys[1], key.shape)
  blocks = nsa_jax.compress_mean(key, config=CONFIG)
  _, lse = nsa_jax.compressed_attention(
    query, blocks, blocks, config=CONFIG, key_length=LENGTH
  )
  ids = nsa_jax.select_blocks(
    query, blocks, lse, config=CONFIG, key_length=LENGTH
  )
  scores = jnp.einsum("btnh,bcnh->btc", query, blocks) / 16**0.5
  ends = jnp.arange(blocks.shape[1]) * 8 + 15
  visible = ends <= jnp.arange(LENGTH)[:, None]
  p_cmp = jnp.where(visible, jnp.exp(scores[0] - lse[0]), 0)
  return p_cmp, ids[0, :, 0]


def draw(path):
  """Writes the figure to `path`."""
  p_cmp, ids = jax.device_get(reads())
  block = CONFIG.selection_block
  figure, (strips, everyone) = plt.subplots(
    2, 1, figsize=(8, 8.2), height_ratios=(1, 3), constrained_layout=True
  )

  largest = p_cmp[QUERY].max()
  for i, p in enumerate(p_cmp[QUERY]):
    start = i * CONFIG.compression_stride
    if start + CONFIG.compression_block - 1 > QUERY:
      break
    # Overlapping blocks alternate between two lines, so that all are visible.
    strips.broken_barh(
      [(start, CONFIG.compression_block)],
      (2.05 + 0.42 * (i % 2), 0.38),
      color=COLOURS["compressed"],
      alpha=0.15 + 0.85 * float(p / largest),
    )
  for j in ids[QUERY]:
    if j >= 0:
      stop = min((j + 1) * block, QUERY + 1)
      strips.broken_barh(
        [(j * block, stop - j * block)],
        (1.1, 0.75),
        color=COLOURS["selected"],
        edgecolor="white",
      )
  start = QUERY - CONFIG.window + 1
  strips.broken_barh(
    [(start, CONFIG.window)], (0.1, 0.75), color=COLOURS["window"]
  )
  strips.axvline(QUERY + 0.5, color="black", linewidth=1)
  strips.text(QUERY + 5, 2.75, f"query t = {QUERY}", va="top")
  strips.set_yticks([0.48, 1.48, 2.48], ["window", "selected", "compressed"])
  strips.set_xlim(0, LENGTH)
  strips.set_ylim(0, 3)
  strips.set_title(
    "What one query reads (darker compressed blocks: more probability)"
  )

  query, key = np.mgrid[:LENGTH, :LENGTH]
  image = np.ones((LENGTH, LENGTH, 3))
  last = (query + 1) // CONFIG.compression_stride * CONFIG.compression_stride
  layers = {
    "compressed": (key < last, 0.25),
    "selected": ((ids[:, :, None] == key[:, None] // block).any(1), 0.95),
    "window": (query - key < CONFIG.window, 0.95),
  }
  for name, (read, weight) in layers.items():
    colour = np.array(matplotlib.colors.to_rgb(COLOURS[name]))
    mask = read & (key <= query)
    image[mask] = (1 - weight) * image[mask] + weight * colour
  everyone.imshow(image, interpolation="nearest", aspect="auto")
  everyone.axhline(QUERY, color="black", linewidth=1)
  everyone.set_xlabel("key position")
  everyone.set_ylabel("query position")
  everyone.set_title("What every query reads")
  handles = [
    matplotlib.patches.Patch(color=colour, label=name)
    for name, colour in COLOURS.items()
  ]
  everyone.legend(handles=handles, loc="upper right", frameon=False)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="reads.png", help="where to write it")
  args = parser.parse_args()
  try:
    draw(args.out)
  except (OSError, ValueError) as error:  # no such folder, no such format
    parser.error(f"argument --out: {error}")
  print(f"Wrote {args.out!a}")


if __name__ == "__main__":
  main()
