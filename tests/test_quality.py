"""The studies of quality: their text, tasks, models, tables and queue."""

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from benchmarks import harness, quality, recall, trials
from examples.lm.flags import UsageError


def write_sources(root: pathlib.Path, folders: int = 60) -> None:
  """A folder of Python files, two in every folder but for those at the top."""
  for i in range(folders):
    for name in ("a", "b"):
      path = root / "package" / f"part{i:02}" / f"{name}.py"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f"def f_{name}{i}(x):\n  return x + {i}\n" * 8)
  (root / "package" / "notes.txt").write_text("no source")
  (root / ".hidden").mkdir()
  (root / ".hidden" / "c.py").write_text("hidden")


# ------------------------------------------------------------------- the text


def test_whole_folders_are_held_out(tmp_path):
  write_sources(tmp_path)
  train, held_out = quality.read_sources(tmp_path, 2**30)
  assert len(train) + len(held_out) == 120
  assert 0 < len(held_out) < 20
  assert not len(held_out) % 2  # Both files of a folder.
  in_order = [text.split(b"(")[0].removeprefix(b"def f_a") for text in train]
  in_order = in_order[::2]
  assert in_order == sorted(in_order, key=int)
  assert not any(b"hidden" in text for text in train)
  few, _ = quality.read_sources(tmp_path, 1000)
  assert sum(map(len, few)) <= 1000


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_tokens_are_the_text(tmp_path, vocab_size):
  write_sources(tmp_path / "source")
  study = dataclasses.replace(quality.QUICK, vocab_size=vocab_size, length=128)
  arguments = study, tmp_path / "source", 2**20, tmp_path / "runs"
  facts = quality.prepare(*arguments)
  train = np.load(tmp_path / "runs" / "train.npy")
  assert facts["train tokens"] == len(train)
  assert train.max() < vocab_size
  compressed = len(train) < facts["train bytes"]
  assert compressed == (vocab_size > 256)
  # Once: the second call reads what the first one wrote.
  (tmp_path / "runs" / "train.npy").unlink()
  assert quality.prepare(*arguments) == facts
  with pytest.raises(UsageError, match="give another folder"):
    quality.prepare(study, tmp_path / "other", *arguments[2:])


def test_too_little_text(tmp_path):
  write_sources(tmp_path, folders=1)
  for vocab_size, message in (
    (256, "tokens for .* are too few for rows of 1024"),
    (512, "pairs for [0-9]* tokens only"),
  ):
    study = dataclasses.replace(quality.QUICK, vocab_size=vocab_size)
    with pytest.raises(UsageError, match=message):
      quality.prepare(study, tmp_path, 2**20, tmp_path / "runs")


# ------------------------------------------------------------------ the kinds


@pytest.mark.parametrize(
  "kind", [*quality.KINDS, *(f"nsa, {x}" for x in quality.CHANGES)]
)
def test_every_kind_is_a_model(kind):
  config = quality.QUICK.config(kind)
  model = nsa_jax.TransformerLM(config)
  tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)
  losses = jax.eval_shape(
    lambda p, t: model.apply(p, t, labels=t), params, tokens
  )
  assert losses.shape == (1, 64)
  large = quality.STUDY.config(kind)
  params = jax.eval_shape(
    nsa_jax.TransformerLM(large).init, jax.random.key(0), tokens
  )
  count = sum(x.size for x in jax.tree.leaves(params))
  assert 50e6 < count < (66e6 if kind in quality.KINDS else 90e6)


def test_kinds_have_changes():
  config = quality.QUICK.config("selected + window, QK norm, 4 K/V heads")
  assert config.branches == ("selected", "window")
  assert config.normalize_qk
  assert config.num_kv_heads == 4
  for wrong, name in (("dense", "dense"), ("nsa, QK norm, cubic", "cubic")):
    with pytest.raises(
      argparse.ArgumentTypeError, match=f"{wrong!r}.*{name!r}"
    ):
      quality.fields_of(wrong)


def test_random_blocks_are_valid_and_change():
  nsa = quality.QUICK.config("nsa").nsa
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 128, 2, 8))
  call: dict[str, Any] = dict.fromkeys(
    ("query_offset", "segment_ids", "query_segment_ids")
  )

  def ids(query: Any) -> Any:
    return quality.random_blocks(
      query=query, selected_key=key, config=nsa, key_length=128, **call
    )

  first = np.asarray(ids(query))
  assert (first == np.asarray(ids(query))).all()
  assert (first != np.asarray(ids(query + 1))).any()
  assert (first[0, -1, :, 0] == 0).all()  # the initial block
  assert (first[0, -1, :, -1] == 7).all()  # the query's own
  pair = nsa_jax.KV(key, key)
  nsa_jax.native_sparse_attention(
    query,
    nsa_jax.KV(*2 * [nsa_jax.compress_mean(key, config=nsa)]),
    pair,
    pair,
    jnp.ones((1, 128, 2, 3)),
    config=nsa,
    block_ids=first,
  )


def chosen(query: Any, key: Any, select: Any) -> Any:
  """Block ids of an op whose compressed keys are means."""
  nsa = quality.QUICK.config("nsa").nsa
  compressed = nsa_jax.KV(*2 * [nsa_jax.compress_mean(key, config=nsa)])
  pair = nsa_jax.KV(key, key)
  _, ids = nsa_jax.native_sparse_attention(
    query,
    compressed,
    pair,
    pair,
    jnp.ones((*query.shape[:3], 3)),
    config=nsa,
    select=select,
    return_block_ids=True,
  )
  return ids


def test_best_blocks_hold_the_most_of_full_attention():
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 128, 2, 8))
  query *= 4  # sharp attention
  mass = nsa_jax.block_mass(query, key, config=quality.QUICK.config("nsa").nsa)

  def held(select: Any) -> Any:
    ids = chosen(query, key, select)
    own = jnp.take_along_axis(mass, jnp.maximum(ids, 0), axis=-1)
    return np.asarray(jnp.where(ids >= 0, own, 0).sum(-1))

  best = held(quality.best_blocks)
  for other in (None, quality.by_mean_keys, quality.random_blocks):
    assert (best >= held(other) - 1e-6).all()
    assert best.mean() > held(other).mean() + 0.01


def test_mean_keys_select_as_nsa_does_with_means_of_its_keys():
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 128, 2, 8))
  np.testing.assert_array_equal(
    chosen(query, key, quality.by_mean_keys), chosen(query, key, None)
  )


def test_clusters_of_single_keys_are_the_best_blocks():
  random = [*jax.random.normal(jax.random.key(0), (3, 1, 130, 2, 8))]
  query, key, other = 4 * random[0], *random[1:]
  single = functools.partial(quality.by_clusters, number=16)
  np.testing.assert_array_equal(
    chosen(query, key, single), chosen(query, key, quality.best_blocks)
  )
  # No key of the future takes part, those of the query's own block included.
  before = chosen(query, key, quality.by_clusters)[:, :70]
  changed = key.at[:, 70:].set(9 * other[:, 70:])
  later = chosen(query, changed, quality.by_clusters)[:, :70]
  np.testing.assert_array_equal(before, later)
  assert (before != chosen(query, key, None)[:, :70]).any()


def test_the_first_layers_may_differ():
  kinds = quality.STUDY.config("nsa, first layer full").layer_kinds
  assert kinds == ("full",) + ("nsa",) * 7


# ---------------------------------------------------------------- the results


def made_up(kind: str, seed: int, loss: float) -> dict[str, Any]:
  trial = quality.Trial(kind, seed, 1e-3, 19)
  result = {
    **dataclasses.asdict(trial),
    "training": loss + 0.1,
    "curve": [[10, loss + 0.2], [19, loss]],
    "parameters": 1000,
    "validation": loss,
    "by position": [loss] * 5,
    "tokens/s": 123456.0,
    "device": f"NVIDIA H{seed}00",
  }
  if kind != "window":
    result |= {"plain": [loss + 1] * 7, "YaRN": [loss] * 7}
  return result


def test_tables_of_quality(tmp_path):
  study = dataclasses.replace(quality.QUICK, seeds=(0, 1))
  assert study.ranges(256) == [
    (0, 16),
    (16, 32),
    (32, 64),
    (64, 128),
    (128, 256),
  ]
  found = [
    made_up(kind, seed, loss + seed)
    for kind, loss in (("full", 3.0), ("nsa", 2.99), ("window", 3.25))
    for seed in (0, 1)
  ]
  diverged = {"kind": "nsa", "rate": 1e-2, "diverged": 7}
  diverged["validation"] = float("inf")
  searched = [diverged, made_up("nsa", 0, 4.0)]
  assert trials.best(searched, "validation") == {"nsa": 1e-3}
  tables = quality.tables(study, searched, [*found, diverged | {"seed": 2}])
  first, second, third = tables["Validation loss, nats per token"]
  assert (first["loss"], second["loss"], third["seeds"]) == (
    "3.5000",
    "3.4900",
    2,
  )
  assert first["128-256"] == "3.500"
  assert (first["diverged"], second["diverged"], second["seeds"]) == (0, 1, 3)
  assert first["tokens/s, H000"] == first["tokens/s, H100"] == "123,456"
  nsa, window = tables["Loss minus that of full attention"]
  assert nsa["attention"] == "nsa"
  assert (nsa["seed 0"], nsa["seed 1"]) == ("-0.0100", "-0.0100")
  assert window["seed 1"] == "+0.2500"
  longer = tables["In rows of 1024 tokens"]
  assert [row["positions"] for row in longer] == 2 * ["plain", "YaRN"]
  assert longer[0]["512-1024"] == "4.500"
  quality.plot(tmp_path / "plot.png", study, found)
  assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_tables_of_recall(tmp_path):
  study = dataclasses.replace(recall.QUICK, lengths=(96, 192), steps=(9, 9))
  found = [
    dataclasses.asdict(recall.Trial(task, kind, rate))
    | {
      "accuracy": [right, right / 2],
      "wrong": 1 - 0.75 * right,
      "curve": [[9, 96, right], [9, 192, right / 2]],
    }
    for task in recall.TASKS
    for kind, rate, right in (("nsa", 1e-2, 0.9), ("nsa", 1e-3, 0.8))
  ]
  tables = recall.tables(study, found)
  (row,) = tables["pairs: answers that are right"]
  assert row == {
    "attention": "nsa",
    "learning rate": 1e-2,
    "96": "90.0%",
    "192": "45.0%",
  }
  recall.plot(tmp_path / "plot.png", study, found)
  assert (tmp_path / "plot.png").stat().st_size > 10_000


# ------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("study", [recall.STUDY, recall.QUICK])
def test_models_of_recall_differ_behind_the_first_layer(study):
  for task in recall.TASKS:
    for kind in study.kinds:
      config = study.config(task, kind)
      first, second = config.of_layer(0), config.of_layer(1)
      attention = quality.fields_of(kind).get("attention", "nsa")
      assert config.layer_kinds[0] == "window"
      assert set(config.layer_kinds[1:]) == {attention}
      assert first.nsa.window == recall.FIRST
      assert second.nsa.window > recall.FIRST


@pytest.mark.parametrize("task", recall.TASKS)
def test_rows_of_recall_have_room(task):
  text = np.zeros(2**16, np.uint8)
  corpus: Any = types.SimpleNamespace(train=text, validation=text)
  study, trial = recall.STUDY, recall.Trial(task, "full", 1e-3)
  for length, asked in zip(study.lengths, study.asked[task], strict=True):
    rows = recall.make_rows(study, trial, corpus, length)
    tokens, labels = rows(1, 2)
    assert tokens.shape == (2, length)
    digits = 1 if task == "pairs" else recall.DIGITS
    assert (labels != recall.IGNORED).sum() == 2 * asked * digits


def test_places_are_aligned_with_nothing():
  at = recall.places(np.random.default_rng(0), 500, 3, 16, 200)
  assert set((at % 16).flatten()) == {*range(16)}
  assert 0 <= at.min() < at.max() <= 200 - 16
  apart = np.diff(np.sort(at, axis=1), axis=1)
  assert apart.min() == 16


def test_pairs_come_again_far_away():
  tokens, labels = recall.make_pairs(
    np.random.default_rng(0),
    rows=3,
    length=128,
    pairs=8,
    vocab_size=64,
    far=32,
  )
  for row, answers in zip(tokens, labels, strict=True):
    (asked,) = np.nonzero(answers != recall.IGNORED)
    assert asked.tolist() == [*range(112, 128, 2)]
    for at in asked:
      (places,) = np.nonzero(row[:112] == row[at])
      assert len(places) == 1
      assert at - places[0] > 32
      assert row[places[0] + 1] == answers[at] == row[at + 1]


def test_needles_come_again_far_away():
  text = np.frombuffer(b"x" * 500, np.uint8)
  tokens, labels = recall.make_needles(
    np.random.default_rng(0), text, rows=2, length=160, lines=2, far=32
  )
  for row, answers in zip(tokens, labels, strict=True):
    text_of_row = row.astype(np.uint8).tobytes().decode()
    lines = [x for x in text_of_row.split("\n") if x.startswith("# ")]
    assert len(lines) == 4
    assert sorted(lines[:2]) == sorted(lines[2:])
    (asked,) = np.nonzero(answers != recall.IGNORED)
    assert (row[asked + 1] == answers[asked]).all()
    digits = "".join(map(chr, answers[asked]))
    assert digits == "".join(line[-5:] for line in lines[2:])
    assert text_of_row.rindex(lines[2]) - text_of_row.index(lines[2]) > 32


def test_sparse_attention_finds_what_a_window_does_not():
  right = {}
  (rate,) = recall.QUICK.rates
  for kind in recall.QUICK.kinds:
    result = recall.run_trial(recall.QUICK, recall.Trial("needle", kind, rate))
    assert result is not None
    (right[kind],) = result["accuracy"]
  assert right["window"] < 0.2  # Of ten digits.
  assert right["nsa"] > right["window"] + 0.3


# ------------------------------------------------------------------ the queue


def arguments(*flags: str) -> argparse.Namespace:
  parser = argparse.ArgumentParser()
  parser.add_argument("--quick", action="store_true")
  trials.add_flags(parser, pathlib.Path("runs"))
  return parser.parse_args(["--quick", *flags])


def test_a_queue_continues(tmp_path, monkeypatch):
  wanted = [recall.Trial("pairs", "nsa", rate) for rate in (1e-3, 1e-2, 1e-1)]
  commands = []

  def run(command, env, **_):
    fields = json.loads(command[command.index("--trial") + 1])
    commands.append((fields["rate"], env["CUDA_VISIBLE_DEVICES"]))
    if fields["rate"] == 1e-1:
      return subprocess.CompletedProcess(command, trials.UNFINISHED)
    trials.write(tmp_path, recall.Trial(**fields), lambda x: {"wrong": x.rate})
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setattr(sys, "argv", ["recall", "--quick"])
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  queue = trials.Queue("benchmarks.recall", tmp_path, arguments("--workers=2"))
  found = queue.run(wanted)
  assert [x["wrong"] for x in found] == [1e-3, 1e-2]
  assert {gpu for _, gpu in commands} <= {"0", "1"}
  assert trials.best(found, "wrong") == {"nsa": 1e-3}
  commands.clear()
  assert queue.run(wanted) == found
  assert [rate for rate, _ in commands] == [1e-1]
  commands.clear()
  late = trials.Queue("benchmarks.recall", tmp_path, arguments("--minutes=0"))
  assert late.run(wanted) == found
  assert not commands


def test_a_trial_that_fails_is_named(tmp_path, monkeypatch):
  failed: Any = subprocess.CompletedProcess([], 1)
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  queue = trials.Queue("benchmarks.recall", tmp_path, arguments("--workers=1"))
  with pytest.raises(SystemExit, match="pairs-nsa-1-0 ended with 1: see"):
    queue.run([recall.Trial("pairs", "nsa", 1)])


def test_known_trials_are_not_repeated(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  trial = recall.Trial("pairs", "nsa", 1e-3)
  folder = tmp_path / "other"
  folder.mkdir()
  trials.write(folder, trial, lambda _: {"wrong": 0.5})
  (result,) = [json.loads(x.read_text()) for x in folder.iterdir()]
  record = tmp_path / "record.json"
  record.write_text(
    json.dumps({"text": {"corpus": "a", "tokens": 3}, "results": [result]})
  )
  with pytest.raises(SystemExit, match="its text has 3 tokens, not 4"):
    trials.keep_known(tmp_path, [record], {"corpus": "a", "tokens": 4})
  trials.keep_known(tmp_path, [record], {"corpus": "b", "tokens": 3})
  queue = trials.Queue("benchmarks.recall", tmp_path, arguments("--workers=1"))
  assert queue.run([trial]) == [result]


@pytest.mark.parametrize("name", ["quality_bpe", "quality_variants_75M"])
def test_records_in_the_repository_are_known(tmp_path, name):
  path = harness.RESULTS / f"{name}.json"
  record = json.loads(path.read_text())
  trials.keep_known(tmp_path, [path], record["text"])
  fields = [field.name for field in dataclasses.fields(quality.Trial)]
  for result in record["results"]:
    trial = quality.Trial(**{field: result[field] for field in fields})
    assert (tmp_path / f"{trial.name}.json").exists()


def test_a_stopped_trial_has_no_result(tmp_path):
  trial = recall.Trial("pairs", "nsa", 1e-3)
  with pytest.raises(SystemExit) as caught:
    trials.write(tmp_path, trial, lambda _: None)
  assert caught.value.code == trials.UNFINISHED
  assert not list(tmp_path.iterdir())


def test_a_trial_that_diverges_says_so(tmp_path):
  write_sources(tmp_path / "source")
  study = dataclasses.replace(
    quality.QUICK, vocab_size=256, length=64, tokens=5120
  )
  quality.prepare(study, tmp_path / "source", 2**20, tmp_path)
  trial = quality.Trial("window", 0, 1e30, 20)
  result = quality.run_trial(study, trial, tmp_path, float("inf"))
  assert result == {"validation": float("inf"), "diverged": 10}


@pytest.mark.slow
def test_a_trial_continues_from_its_checkpoint(tmp_path):
  write_sources(tmp_path / "source", folders=100)
  study = dataclasses.replace(
    quality.QUICK, vocab_size=300, length=64, tokens=25600
  )
  quality.prepare(study, tmp_path / "source", 2**20, tmp_path)
  trial = quality.Trial("full", 0, 1e-3, 100)
  whole = quality.run_trial(study, trial, tmp_path, float("inf"))
  other = tmp_path / "other"
  other.mkdir()
  for name in ("train", "validation"):
    (tmp_path / f"{name}.npy").rename(other / f"{name}.npy")
  assert quality.run_trial(study, trial, other, 0) is None
  continued = quality.run_trial(study, trial, other, float("inf"))
  assert whole is not None
  assert continued is not None
  for name in ("curve", "by position", "validation", "training", "YaRN"):
    assert continued[name] == whole[name]
