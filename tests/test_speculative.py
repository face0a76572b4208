"""The example of speculative decoding: its tokens are those of the target."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import speculative
from nsa_jax import NSAConfig, TransformerConfig, TransformerLM, generate
from tests import tiny_run

VOCAB = 11


def _model(seed, num_drafts, **options):
  config = TransformerConfig(
    vocab_size=VOCAB,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    nsa=NSAConfig(4, 2, 8, 3, 1, 1, 6),
    **options,
  )
  model = TransformerLM(config, decode=True, max_append=num_drafts + 1)
  tokens = jnp.zeros((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)
  return model, params


@functools.cache
def _pair(num_drafts):
  target, params = _model(
    0,
    num_drafts,
    num_layers=1,
    attention="nsa",
    compression="mean",
    select="means",
  )
  draft, other = _model(1, num_drafts, num_layers=1, attention="window")
  return target, params, draft, other


@pytest.mark.parametrize(
  "num_drafts", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7))]
)
def test_greedy_tokens_are_those_of_the_target(num_drafts):
  """Rows of a batch accept numbers of their own, and end together."""
  target, params, draft, other = _pair(num_drafts)
  prompts = np.random.default_rng(2).integers(0, VOCAB, (3, 9), np.int32)
  new = 30
  want = generate(target, params, prompts, max_new_tokens=new, temperature=0)
  spec = speculative.Speculation(target, draft, num_drafts, 0.0)
  state = speculative.speculate(
    spec, (params, other), prompts, new, jax.random.key(0)
  )
  np.testing.assert_array_equal(state.tokens[:, : 9 + new], want.tokens)
  assert state.lengths.tolist() == [9 + new] * 3
  assert 0 < int(state.accepted) < int(state.passes) * num_drafts
  for held in state.caches:
    first = held["layer_0"]["attention"]["kv"]
    assert first.lengths.tolist() == [9 + new - 1] * 3


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_accepts_its_own_drafts(temperature):
  target, params, _, _ = _pair(3)
  prompts = np.array([[1, 2, 3]], np.int32)
  spec = speculative.Speculation(target, target, 3, temperature)
  state = speculative.speculate(
    spec, (params, params), prompts, 16, jax.random.key(0)
  )
  assert int(state.passes) == 4
  assert int(state.accepted) == 12


@pytest.mark.parametrize("length", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_accepted_tokens_have_the_distribution_of_the_target(length):
  """The first token, and the second where a draft was accepted."""
  count = 40_000
  rng = np.random.default_rng(0)
  q, p = (
    jax.nn.softmax(jnp.asarray(rng.normal(size=(n, 5)) * 1.5, jnp.float32))
    for n in (length, length + 1)
  )
  keys = jax.random.split(jax.random.key(0))
  drafts = jax.random.categorical(keys[0], jnp.log(q), shape=(count, length))
  kept, token = jax.jit(speculative.accept)(
    keys[1],
    drafts,
    jnp.broadcast_to(q, (count, *q.shape)),
    jnp.broadcast_to(p, (count, *p.shape)),
  )
  tokens = np.concatenate([drafts, np.zeros((count, 1), int)], axis=1)
  tokens[np.arange(count), kept] = token
  for place in range(length + 1):
    drawn = tokens[kept >= place, place]
    share = np.bincount(drawn, minlength=5) / len(drawn)
    # Five standard deviations at the most.
    np.testing.assert_allclose(
      share, p[place], atol=5 * 0.5 / len(drawn) ** 0.5
    )
  # With probability sum(min(p, q)).
  accepted = np.minimum(p[0], q[0]).sum()
  np.testing.assert_allclose(
    (kept > 0).mean(), accepted, atol=5 * 0.5 / count**0.5
  )


def test_equal_distributions_accept_everything():
  p = jnp.full((2, 3, 4), 0.25)
  drafts = jnp.array([[0, 1], [2, 3]])
  accept = jax.jit(speculative.accept)
  for seed in range(20):
    kept, token = accept(jax.random.key(seed), drafts, p[:, :2], p)
    assert kept.tolist() == [2, 2]
    assert ((token >= 0) & (token < 4)).all()


def test_command(tmp_path, capsys):
  run = tiny_run.save(tmp_path / "run")
  args = [
    f"--target={run}",
    f"--draft={run}",
    "--prompt-tokens=8",
    "--new-tokens=10",
    "--repeats=1",
  ]
  path = tmp_path / "found.json"
  assert speculative.main([*args, "--num-drafts", "4", f"--json={path}"]) == 0
  alone, drafts = capsys.readouterr().out.splitlines()
  assert re.fullmatch(r"alone: \d+ tokens/s", alone)
  assert re.fullmatch(
    r"4 drafts: 100% accepted, 5.00 tokens per pass, \d+ tokens/s, "
    r"\d+\.\d\d times as fast, 100.0% the same tokens",
    drafts,
  )
  found = json.loads(path.read_text())
  assert [x["drafts"] for x in found["results"]] == [0, 4]
  assert found["flags"]["new_tokens"] == 10
  for wrong, message in (
    (["--draft=x"], "--target and --draft come together."),
    ([*args, "--prompt-tokens=999999"], "and prompts have 999999."),
    ([f"--target={tmp_path}", "--draft=x"], "no checkpoint in"),
    ([*args, "--temperature=-1"], "`temperature`=-1.0 must be 0, for"),
    ([*args, f"--text={tmp_path}/none"], "No such file or directory"),
    (["--seq-len=99999999"], "too few to train on."),
    (["--draft-dim=0"], "'0' is not a positive integer"),
  ):
    with pytest.raises(SystemExit):
      speculative.main(wrong)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_trained_models_agree(tmp_path):
  """The draft learns enough to be accepted more often than by chance."""
  path = tmp_path / "found.json"
  flags = "--steps=60 --target-layers=2 --target-dim=64 --new-tokens=64"
  speculative.main([*flags.split(), "--num-drafts", "3", f"--json={path}"])
  _, found = json.loads(path.read_text())["results"]
  assert found["accepted"] > 0.3
  assert found["equal"] > 0.9
