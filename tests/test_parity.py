"""What transformers computes, live: `pytest -m parity`.

The fast tier compares with what is kept in tests/data/checkpoints; this makes
the checkpoints anew, of other random numbers, and lets transformers read ours.
"""

import jax
import numpy as np
import pytest

import nsa_jax
from tests import parity
from tests.test_convert import FLOAT32, check_attention, check_rope

pytestmark = [
  pytest.mark.parity,
  # Whatever torch and transformers warn of.
  pytest.mark.filterwarnings("default"),
]


# CPU and GPU alike: no TF32, as in transformers.
@pytest.fixture(autouse=True)
def _precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("case", parity.CASES)
def test_logits_and_greedy_tokens(case, implementation, tmp_path):
  _, results = parity.make_distinct(case, tmp_path, seed=3)
  loaded = nsa_jax.load(tmp_path, **FLOAT32, implementation=implementation)
  logits = jax.jit(loaded.model.apply)(
    {"params": loaded.params}, results["tokens"]
  )
  np.testing.assert_allclose(logits, results["logits"], atol=1e-4)
  generated = nsa_jax.generate(
    loaded.model,
    loaded.params,
    results["tokens"][:, : parity.PROMPT],
    max_new_tokens=parity.NEW,
    temperature=0,
  )
  np.testing.assert_array_equal(generated.tokens, results["generated"])


@pytest.mark.parametrize("case", parity.CASES)
def test_transformers_reads_what_we_write(case, tmp_path):
  import torch
  import transformers

  model = parity.make(case, tmp_path / "theirs", seed=4)
  loaded = nsa_jax.load(tmp_path / "theirs")
  nsa_jax.save(tmp_path / "ours", loaded.config, loaded.params)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", dtype=torch.float32
  )
  assert type(again) is type(model)
  tokens = torch.arange(parity.LENGTH)[None] % parity.VOCAB
  with torch.no_grad():
    want, got = model(tokens).logits, again(tokens).logits
  np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("index", range(len(parity.ROPES)))
def test_rope(index):
  parameters, _, head_dim = parity.ROPES[index]
  check_rope(index, *parity.angles(parameters, head_dim))


@pytest.mark.parametrize("kind", ["softcap", "sink"])
def test_attention(kind):
  check_attention(kind, parity.attention(kind, seed=5))
