"""Tiny random checkpoints of transformers, with what it computes from them.

`python -m tests.parity` writes those in tests/data/checkpoints, which tests
read without torch. The version of transformers stands in each config.json.
"""

import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "data" / "checkpoints"
RESULTS = "results.npz"
VOCAB, LENGTH, PROMPT, NEW = 48, 80, 8, 64

_TINY = {
  "vocab_size": VOCAB,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  # Weights this large make logits that differ by tokens and by options.
  "initializer_range": 0.25,
  "bos_token_id": None,
  "eos_token_id": None,
}


def _rope(kind: str, factor: float, **other: Any) -> dict[str, Any]:
  return {"rope_theta": 1000.0, "rope_type": kind, "factor": factor, **other}


# By name: the family, the fields of its configuration, the dtype of the file.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
  # Several files, an epsilon that shows, heads wider than D / N, no tie.
  "llama3": (
    "Llama",
    {
      "rms_norm_eps": 1e-2,
      "head_dim": 8,
      "rope_parameters": _rope(
        "llama3",
        8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    },
    "float32",
  ),
  "llama_linear": (
    "Llama",
    {
      "attention_bias": True,
      "tie_word_embeddings": True,
      "rope_parameters": _rope("linear", 4.0),
    },
    "float32",
  ),
  # The logits are of a row longer than the context, generation is within.
  "llama_dynamic": (
    "Llama",
    {
      "head_dim": 8,
      "max_position_embeddings": 74,
      "rope_parameters": _rope("dynamic", 4.0),
    },
    "float32",
  ),
  "llama_bfloat16": (
    "Llama",
    {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "bfloat16",
  ),
  # One full layer, one with a window.
  "qwen2": (
    "Qwen2",
    {
      "use_sliding_window": True,
      "sliding_window": 12,
      "max_window_layers": 1,
      "rope_parameters": _rope(
        "yarn", 4.0, original_max_position_embeddings=32
      ),
    },
    "float32",
  ),
  "qwen3": (
    "Qwen3",
    {
      "head_dim": 8,
      "tie_word_embeddings": True,
      "rope_parameters": _rope(
        "yarn",
        2.0,
        original_max_position_embeddings=64,
        attention_factor=1.2,
        beta_fast=8.0,
        beta_slow=2.0,
      ),
    },
    "float32",
  ),
  "mistral": ("Mistral", {"sliding_window": 12, "head_dim": 8}, "float32"),
}


def make(case: str, folder: pathlib.Path, seed: int = 0) -> Any:
  """Saves a random model of transformers in the folder, and returns it."""
  import torch
  import transformers

  family, fields, dtype = CASES[case]
  config_class = getattr(transformers, f"{family}Config")
  model_class = getattr(transformers, f"{family}ForCausalLM")
  torch.manual_seed(seed)
  model = model_class(config_class(**_TINY | fields)).eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      if name.endswith("bias"):
        x.normal_(0, 0.5)
      elif "norm" in name:
        x.normal_(1, 0.2)
  model.to(getattr(torch, dtype))
  several = "10KB" if case == "llama3" else "1GB"
  model.save_pretrained(folder, max_shard_size=several)
  # `model.to(torch.float32)` would keep the rounded frequencies of RoPE.
  return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def compute(model: Any, seed: int = 0) -> dict[str, Any]:
  """Tokens and their logits, and a greedy continuation of their start."""
  import torch

  tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
    continued = model.generate(
      torch.tensor(tokens[:, :PROMPT]),
      max_new_tokens=NEW,
      do_sample=False,
      return_dict_in_generate=True,
      output_logits=True,
    )
  best = torch.stack(continued.logits).sort(-1).values
  # The least distance between the best two: 0 would be a tie.
  margin = (best[..., -1] - best[..., -2]).min().item()
  return {
    "tokens": tokens.astype(np.int32),
    "logits": logits,
    "generated": continued.sequences.numpy().astype(np.int32),
    "margin": np.float32(margin),
  }


def make_distinct(
  case: str, folder: pathlib.Path, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
  """The first random model whose greedy tokens no rounding changes."""
  while True:
    model = make(case, folder, seed)
    results = compute(model, seed)
    if results["margin"] > 2e-3:
      return model, results
    seed += 1


# Arguments of `RopeConfig`, and H, by the parameters of transformers.
ROPES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
  ({"rope_type": "default", "rope_theta": 1e4}, {}, 64),
  (
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"scaling": "linear", "factor": 4.0},
    64,
  ),
  (
    {
      "rope_type": "llama3",
      "rope_theta": 5e5,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
    {
      "base": 5e5,
      "scaling": "llama3",
      "factor": 8.0,
      "beta_slow": 1.0,
      "beta_fast": 4.0,
    },
    128,
  ),
  (
    {
      "rope_type": "yarn",
      "rope_theta": 1e6,
      "factor": 4.0,
      "original_max_position_embeddings": 32768,
    },
    {
      "base": 1e6,
      "scaling": "yarn_index",
      "factor": 4.0,
      "original_max_position": 32768,
    },
    128,
  ),
  (
    {
      "rope_type": "yarn",
      "rope_theta": 1e4,
      "factor": 3.0,
      "original_max_position_embeddings": 64,
      "partial_rotary_factor": 0.5,
    },
    {
      "scaling": "yarn_index",
      "factor": 3.0,
      "original_max_position": 64,
      "rotary_dim": 32,
    },
    64,
  ),
  (
    {
      "rope_type": "dynamic",
      "rope_theta": 1e4,
      "factor": 4.0,
      "partial_rotary_factor": 0.25,
    },
    {
      "scaling": "dynamic",
      "factor": 4.0,
      "original_max_position": 64,
      "rotary_dim": 16,
    },
    64,
  ),
]


def angles(
  parameters: dict[str, Any], head_dim: int, length: int = 200
) -> tuple[np.ndarray, float]:
  """Radians of every pair at the last of `length` tokens; the multiplier."""
  import torch
  import transformers
  from transformers.models.llama import modeling_llama

  config = transformers.LlamaConfig(
    head_dim=head_dim,
    max_position_embeddings=64,
    rope_parameters=dict(parameters),
  )
  rope = modeling_llama.LlamaRotaryEmbedding(config)
  rope(torch.zeros(1), torch.arange(length)[None])
  frequencies = rope.inv_freq.numpy().astype(np.float64)
  return frequencies * (length - 1), rope.attention_scaling


def attention(kind: str, seed: int = 0) -> dict[str, Any]:
  """Attention with a soft cap (Gemma 2) or a sink per head (gpt-oss)."""
  import torch
  from transformers.models.gemma2 import modeling_gemma2
  from transformers.models.gpt_oss import modeling_gpt_oss

  class Module:
    num_key_value_groups = 2
    training = False
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0])

  torch.manual_seed(seed)
  query = torch.randn(1, 4, 12, 8)
  key, value = torch.randn(2, 1, 2, 12, 8)
  mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
  given = (query, key, value, mask)
  if kind == "softcap":
    out, _ = modeling_gemma2.eager_attention_forward(
      Module(), *given, scaling=8**-0.5, softcap=0.5
    )
  else:
    out, _ = modeling_gpt_oss.eager_attention_forward(
      Module(), *given, scaling=8**-0.5
    )
  arrays = {"query": query, "key": key, "value": value}
  return {name: x.transpose(1, 2).numpy() for name, x in arrays.items()} | {
    "sinks": Module.sinks.numpy(),
    "out": out.numpy(),
  }


def main() -> None:
  stored: dict[str, Any] = {}
  for i, (parameters, _, head_dim) in enumerate(ROPES):
    stored[f"angles_{i}"], stored[f"multiplier_{i}"] = angles(
      parameters, head_dim
    )
  np.savez_compressed(FOLDER / "rope.npz", **stored)
  for kind in ("softcap", "sink"):
    np.savez_compressed(FOLDER / f"{kind}.npz", **attention(kind))
  for case in CASES:
    _, results = make_distinct(case, FOLDER / case)
    print(case, results["margin"], np.std(results["logits"]))
    results["logits"] = results["logits"][:, ::4]  # Enough, and smaller.
    np.savez_compressed(FOLDER / case / RESULTS, **results)
    for path in (FOLDER / case).glob("generation_config.json"):
      path.unlink()


if __name__ == "__main__":
  main()
