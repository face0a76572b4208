"""Runs whose tokens are not bytes, JSON lines, evaluation, event files."""

import json
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

import nsa_jax
from examples import generate, lm
from examples.lm import UsageError, cli, data, evaluate, train
from examples.lm import tokenizer as tok
from examples.lm.jsonl import read_jsonl
from tests import tiny_run

WORDS = ["the", "fox", "jumps", "over", "a", "lazy", "dog", "while", "été"]
WORDS += ["and", "東京", "are", "far", "away"]


def make_texts(count: int) -> list[str]:
  rng = np.random.default_rng(0)
  return [
    " ".join(rng.choice(WORDS, size)) + ".\n"
    for size in rng.integers(5, 60, count)
  ]


def encoded(texts: list[str]) -> list[bytes]:
  return [text.encode() for text in texts]


def error_line(capsys, main, *args: object) -> str:
  """The one line that wrong arguments give."""
  with pytest.raises(SystemExit) as caught:
    main([str(arg) for arg in args])
  assert caught.value.code == 2
  *_, line = capsys.readouterr().err.splitlines()
  return line


# ------------------------------------------------------------------ tokenizer


def test_a_bpe_says_the_same_text_in_fewer_tokens(monkeypatch):
  texts = encoded(make_texts(50))
  bpe = tok.train_bpe(texts, 300, "here")
  assert len(bpe.pieces) == 300
  assert bpe.digest == tok.train_bpe(texts, 300, "here").digest
  assert bpe.digest != tok.train_bpe(texts, 301, "here").digest

  strange = [b"", bytes(range(128)), "\u00e9\n\t \U0001f600".encode(), *texts]
  tokens = bpe.encode(strange)
  assert [bpe.decode(x) for x in tokens] == strange
  assert sum(map(len, tokens)) < 0.5 * sum(map(len, strange))
  assert {x.dtype for x in tokens} == {np.dtype(np.uint16)}
  for text, x in zip(strange, tokens, strict=True):
    assert bpe.sizes()[x].sum() == len(text)
  assert bpe.decode(bpe.encode([b"a\xff"])[0]) == "a\ufffd".encode()

  # Long texts are encoded in pieces, several at once.
  monkeypatch.setattr(tok, "PIECE", 7)
  monkeypatch.setattr(tok, "GROUP", 20)
  assert [bpe.decode(x) for x in bpe.encode(strange)] == strange
  assert bpe.encode([]) == []


def test_a_bpe_is_trained_on_the_training_part_alone(tmp_path):
  path = tmp_path / "text.txt"
  path.write_text("".join(make_texts(60)) + "zebra " * 10)
  corpus = data.load_corpus(str(path), 10**6, 32)
  assert b"zebra" in corpus.validation.tobytes()
  bpe = tok.open_tokenizer("bpe:300", corpus)
  assert not any(b"ze" in piece for piece in bpe.pieces)
  assert b" lazy" in bpe.pieces


def test_every_byte_has_its_token():
  bpe = tok.train_bpe(encoded(make_texts(50)), 300, "here")
  alphabet = tok._alphabet(tokenizers)
  assert sorted(alphabet.values()) == list(range(256))
  assert (alphabet["a"], alphabet["Ġ"], alphabet["Ċ"]) == (97, 32, 10)
  assert {bytes([i]) for i in range(256)} <= set(bpe.pieces)


def test_added_tokens_and_gaps(tmp_path):
  package = tokenizers.Tokenizer.from_buffer(
    tok.train_bpe(encoded(make_texts(50)), 300, "here")._content
  )
  package.add_special_tokens(["<|end é|>"])
  package.enable_truncation(3)
  package.enable_padding(length=9)
  path = tmp_path / "other.json"
  package.save(str(path))
  corpus: Any = None
  bpe = tok.open_tokenizer(str(path), corpus)
  assert bpe.pieces[300] == "<|end é|>".encode()
  text = "the fox<|end é|>and the dog".encode()
  assert bpe.decode(bpe.encode([text])[0]) == text
  assert 300 in bpe.encode([text])[0]
  bpe.save(tmp_path)
  assert (tmp_path / tok.FILE).read_bytes() == path.read_bytes()
  assert tok.load_tokenizer(tmp_path, bpe.digest).pieces == bpe.pieces
  with pytest.raises(UsageError, match=r"is not the tokenizer of the run: its"):
    tok.load_tokenizer(tmp_path, "0123")


def test_bytes_need_no_file_and_no_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  plain = tok.load_tokenizer(tmp_path, "bytes")
  plain.save(tmp_path)
  assert not [*tmp_path.iterdir()]
  np.testing.assert_array_equal(plain.encode([b"a\xff"])[0], [97, 255])
  assert plain.decode([97, 255]) == b"a\xff"
  unit = tok.unit_of(plain, [3, 4, -100])
  assert unit == tok.Unit()
  assert unit.describe(np.log(2)) == "0.6931 nats/byte (1.0000 bits/byte)"


def test_losses_per_byte():
  bpe = tok.train_bpe(encoded(make_texts(50)), 300, "here")
  tokens = bpe.encode([b"the lazy fox"])[0].astype(int)
  unit = tok.unit_of(bpe, [*tokens, -100])
  assert unit.num_bytes == 12 / len(tokens)
  assert tok.Unit("token", 4.0).describe(8 * np.log(2)) == (
    "5.5452 nats/token, 1.3863 nats/byte (2.0000 bits/byte)"
  )


def test_tokenizer_messages(tmp_path, capsys, monkeypatch):
  texts = tmp_path / "text.txt"
  texts.write_text("".join(make_texts(60)))
  words = tmp_path / "words.json"
  tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).save(str(words))
  # Byte-level, but for one token.
  content = tok.train_bpe(encoded(make_texts(50)), 300, "here")._content
  mixed = tmp_path / "mixed.json"
  mixed.write_bytes(content.replace(b'"?":', '"\u2581":'.encode()))
  broken = tmp_path / "broken.json"
  broken.write_text("{")
  args = [f"--corpus={texts}", f"--out={tmp_path / 'run'}", "--seq-len=32"]
  args += ["--attention=window"]
  for name, message in (
    ("bpe:256", "argument --tokenizer: 'bpe:256' must name more tokens than"),
    ("bpe:many", "argument --tokenizer: 'bpe:many' must name more tokens than"),
    (tmp_path / "none", f"--tokenizer {tmp_path / 'none'}: [Errno 2] No such"),
    (broken, f"--tokenizer {broken}: is no tokenizer.json: "),
    (words, f"--tokenizer {words}: must be a byte-level BPE, with the decoder"),
    (mixed, f"--tokenizer {mixed}: must be a byte-level BPE, with the decoder"),
    ("bpe:9999", "--tokenizer bpe:9999: the text for training has pairs for "),
  ):
    line = error_line(capsys, cli.main, *args, f"--tokenizer={name}")
    assert line.startswith("train_lm.py: error: ")
    assert message in line
  args[2] = "--seq-len=400"
  line = error_line(capsys, cli.main, *args, "--tokenizer=bpe:300")
  assert "too small: " in line
  assert re.search(r"\d+ tokens for training and \d+ for validation; ", line)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  line = error_line(capsys, cli.main, *args, "--tokenizer=bpe:300")
  assert "bpe:300: needs the package tokenizers: pip install" in line


def test_bigram_loss_of_many_kinds_of_tokens(monkeypatch):
  rng = np.random.default_rng(0)
  text = rng.integers(0, 50, 2000).astype(np.uint16)
  windows = rng.integers(0, 60, (3, 17))  # Some pairs are not in the text.
  table = data.bigram_loss(text, windows, 70)
  monkeypatch.setattr(data, "MAX_TABLE", 70)
  np.testing.assert_allclose(data.bigram_loss(text, windows, 70), table)


# ----------------------------------------------------------------- JSON lines


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
  lines = [json.dumps({"id": i, field: t}) for i, t in enumerate(texts)]
  path.write_text("\n".join(lines) + "\n\n")
  return path


def test_documents_of_json_lines(tmp_path):
  texts = make_texts(40)
  path = write_jsonl(tmp_path / "all.jsonl", texts, "body")
  assert read_jsonl(path, 10**6, "body") == encoded(texts)
  size = len(encoded(texts[:2])[0]) + 3
  assert read_jsonl(path, size, "body") == [
    encoded(texts)[0],
    encoded(texts)[1][:3],
  ]
  corpus = data.load_corpus(str(path), 10**6, 64, "body")
  joined = corpus.train.tobytes() + corpus.validation.tobytes()
  assert joined == "".join(texts).encode()
  documents = [file.tobytes() for file in corpus.train_files() if len(file)]
  assert documents[:-1] == encoded(texts)[: len(documents) - 1]

  # In a folder, beside text, a whole file is held out.
  for i in range(40):
    write_jsonl(tmp_path / f"{i}.jsonl", [f"{i} one", f"{i} two"], "body")
    (tmp_path / f"{i}.txt").write_text(f"text {i}")
  corpus = data.load_corpus(str(tmp_path), 10**6, 4, "body")
  _, held_out = data.split_files(path.name for path in tmp_path.iterdir())
  found = [file.tobytes().decode() for file in corpus.validation_files()]
  want: list[str] = []
  for name in held_out:
    number, suffix = name.split(".")
    if suffix == "txt":
      want.append(f"text {number}")
    else:
      want += [f"{number} one", f"{number} two"]
  assert found == want


@pytest.mark.parametrize(
  "line, message",
  [
    (b"{", "line 2: is not JSON: Expecting property name"),
    (b'{"text": "\xff"}', "line 2: is not JSON: 'utf-8' codec can't decode"),
    (b"[1]", "line 2: is of type list, must be an object with the field 'te"),
    (
      b'{"body": "a", "n": 1}',
      "line 2: has no field 'text'; its fields: 'body', 'n'. --text-field",
    ),
    (b"{}", "line 2: has no field 'text'; its fields: none."),
    (b'{"text": 3}', "line 2: the field 'text' is of type int, must be a str"),
  ],
)
def test_json_lines_messages(line, message, tmp_path, capsys):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
  error = error_line(capsys, cli.main, f"--corpus={path}")
  assert error.startswith(f"train_lm.py: error: --corpus: {path}, {message}")


# ----------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The flags of a run with a BPE and packed JSON lines, and its folder."""
  folder = tmp_path_factory.mktemp("bpe")
  corpus = write_jsonl(folder / "text.jsonl", make_texts(200), "body")
  args = [
    *(f"--corpus={corpus}", "--text-field=body", "--tokenizer=bpe:300"),
    *("--pack", "--attention=window", "--batch-size=2", "--seq-len=96"),
    *("--steps=4", "--eval-batches=2", "--eval-every=2"),
    *("--checkpoint-every=2", "--sample-tokens=8", "--tensorboard"),
    "--prompt=été",
  ]
  out = folder / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "model_config", lambda args: tiny_run.CONFIG)
    assert cli.main([*args, f"--out={out}"]) == 0
    yield args, out


@pytest.fixture
def run(finished, tmp_path):
  """The same with a copy of the folder."""
  args, out = finished
  folder = shutil.copytree(out, tmp_path / "run")
  return [*args, f"--out={folder}"], folder


def leaves(out: Path, step: int) -> list[np.ndarray]:
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(out / "checkpoints" / str(step) / "state")
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def read_events(folder: Path) -> list[Any]:
  """The events of all files of a folder, in order."""
  from tensorboardX.proto.event_pb2 import Event

  events = []
  for path in sorted(folder.iterdir()):
    content, at = path.read_bytes(), 0
    while at < len(content):
      (size,) = struct.unpack_from("<Q", content, at)
      events.append(Event.FromString(content[at + 12 : at + 12 + size]))
      at += 16 + size
  return events


def scalars(events: list[Any]) -> list[tuple[str, int, float]]:
  return [
    (value.tag, event.step, value.simple_value)
    for event in events
    for value in event.summary.value
  ]


def test_resume_with_a_tokenizer_is_exact(run, finished, capsys):
  args, folder = run
  _, straight = finished
  shutil.rmtree(folder / "checkpoints" / "4")
  assert cli.main([*args, "--resume"]) == 0
  assert "steps 2 to 4, 2 x 96 tokens each" in capsys.readouterr().out
  for name in ("metrics.jsonl", "sample.txt", tok.FILE):
    assert (folder / name).read_bytes() == (straight / name).read_bytes()
  assert (folder / "sample.txt").read_bytes().startswith("été".encode())
  for a, b in zip(leaves(folder, 4), leaves(straight, 4), strict=True):
    assert a.tobytes() == b.tobytes()

  # Event files: losses as in the metrics, and TensorBoard forgets the steps
  # that are done again.
  events = read_events(folder / train.EVENTS)
  starts = [i for i, e in enumerate(events) if e.HasField("session_log")]
  assert [events[i].step for i in starts] == [1, 3]
  kept = [e for e in events[: starts[1]] if e.step < 3] + events[starts[1] :]
  metrics = [
    json.loads(line)
    for line in (straight / "metrics.jsonl").read_text().splitlines()
  ]
  for tag, name in {
    "loss/training": "train_loss",
    "loss/validation": "validation_loss",
  }.items():
    found = [(step, value) for t, step, value in scalars(kept) if t == tag]
    want = [(line["step"], line[name]) for line in metrics if name in line]
    np.testing.assert_allclose(found, want, rtol=1e-6)
  rates = [v for tag, _, v in scalars(kept) if tag == "learning_rate"]
  assert len(rates) == 4
  assert rates[0] == pytest.approx(cli.RECIPES["tiny"].learning_rate)
  assert {"tokens_per_second", "validation_bits_per_byte"} <= {
    tag for tag, *_ in scalars(kept)
  }


def test_another_tokenizer_does_not_resume(run, capsys):
  args, folder = run
  args.append("--resume")
  line = error_line(capsys, cli.main, *args, "--tokenizer=bpe:301")
  assert "--tokenizer bpe:301: the run in --out has a BPE of 300 tok" in line
  line = error_line(capsys, cli.main, *args, "--tokenizer=bytes")
  assert "`model.vocab_size` was 300, now 256; `tokenizer` was" in line
  path = folder / tok.FILE
  path.write_text(path.read_text() + "\n")
  line = error_line(capsys, cli.main, *args)
  assert re.search(r"configuration: `tokenizer` was \w{16}, now \w{16}\.", line)
  args = [f"--run={folder}", "--prompt=a"]
  line = error_line(capsys, generate.main, *args)
  assert f"{path}: is not the tokenizer of the run: its hash was" in line
  path.unlink()
  line = error_line(capsys, generate.main, *args)
  assert f"{path}: [Errno 2] No such file" in line


def test_evaluation_alone_gives_the_loss_of_training(run, capsys):
  args, folder = run
  (folder / "metrics.jsonl").rename(folder / "before")
  *_, last = (folder / "before").read_text().splitlines()
  want = json.loads(last)["validation_loss"]
  text = [arg for arg in args if re.match("--(corpus|text|eval-b|out)", arg)]
  assert cli.main([*text, "--evaluate"]) == 0
  out, err = capsys.readouterr()
  assert err == ""
  assert f"checkpoint {folder}, step 4\n" in out
  found = re.search(r"^validation +(\S+) nats/token, \S+ nats/byte", out, re.M)
  assert found is not None
  assert float(found[1]) == pytest.approx(want, abs=1e-4)
  assert re.search(r"^at 0 to 63 +\d.* bits/byte\)$", out, re.M)
  assert not (folder / "metrics.jsonl").exists()

  # Also in longer rows, and of another text.
  other = write_jsonl(folder / "other.jsonl", make_texts(100)[::-1], "body")
  longer = ["--evaluate", f"--corpus={other}", "--seq-len=256"]
  assert cli.main([*text, *longer, "--batch-size=1"]) == 0
  assert "warning: --corpus " in capsys.readouterr().err
  line = error_line(capsys, cli.main, *text, "--evaluate", "--seq-len=900")
  assert "--seq-len 900: the validation text has only" in line


def test_evaluation_messages(tmp_path, capsys):
  args = ["--evaluate", f"--out={tmp_path}"]
  line = error_line(capsys, cli.main, *args)
  assert f"--evaluate: no checkpoint in {tmp_path}; train_lm.py wri" in line
  line = error_line(capsys, cli.main, *args, "--resume")
  assert "argument --resume: not allowed with argument --evaluate" in line


def test_losses_by_position():
  losses = np.array([np.arange(200), 1000 + np.arange(200)], np.float32)
  windows = np.zeros((2, 201), np.int32)
  sizes = np.ones(256, int)
  lines = dict(evaluate._report(losses, windows, sizes, "byte"))
  names = ["validation", "at 0 to 63", "at 64 to 127", "at 128 to 199"]
  assert [*lines] == names
  assert lines["validation"].startswith("599.5000 nats/byte")
  assert lines["at 64 to 127"].startswith("595.5000 nats/byte")

  # In packed rows it is the position in the document.
  labels = np.zeros((2, 200), np.int32)
  labels[0, 150:] = -100
  positions = np.stack([np.arange(200), np.arange(200) % 50])
  row = nsa_jax.PackedRow(labels, labels, np.ones_like(labels), positions)
  lines = dict(evaluate._report(losses, row, 2 * sizes, "token"))
  assert [*lines] == ["validation", *names[1:3], "at 128 to 149"]
  assert lines["at 128 to 149"].startswith("138.5000 nats/token, 69.2500 na")


def test_text_of_the_tokenizer_of_the_run(run, capsys):
  _, folder = run
  args = [f"--run={folder}", "--max-new-tokens=6", "--temperature=0"]
  assert generate.main([*args, "--prompt=the fox été"]) == 0
  out, err = capsys.readouterr()
  assert err == f"{folder}, step 4\n"
  assert out.startswith("the fox été")
  model, params, step, tokenizer, _ = lm.load_run(str(folder))
  assert step == 4
  assert model.config.vocab_size == 300
  prompt = tokenizer.encode(["the fox été".encode()])[0].tolist()
  new = nsa_jax.generate(
    model, params, [prompt], max_new_tokens=6, temperature=0
  )
  show = generate.make_printer()
  show(tokenizer.decode(np.asarray(new.tokens[0])))
  show(b"")
  assert capsys.readouterr().out + "\n" == out


# ------------------------------------------- event files, learning rate, flags


def test_event_files_need_their_package(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  line = error_line(capsys, cli.main, "--tensorboard", f"--out={tmp_path}")
  assert "--tensorboard: needs the package tensorboardX: pip install" in line


def test_warm_up_and_decay():
  schedule = train.make_schedule(1.0, 100)
  assert float(schedule(10)) == pytest.approx(1.0)
  assert float(schedule(100)) == pytest.approx(0.05)
  schedule = train.make_schedule(1.0, 100, 4, 0.0)
  rates = [float(schedule(step)) for step in (0, 2, 4, 52, 100)]
  np.testing.assert_allclose(rates, [0.25, 0.625, 1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize(
  "args, message",
  [
    (
      ["--warmup-steps=300"],
      "--warmup-steps: 300 is not less than --steps 300",
    ),
    (
      ["--final-learning-rate=0.1"],
      "--final-learning-rate: 0.1 is not between 0 and --learning-rate 0.005",
    ),
    (["--final-learning-rate=nan"], "--final-learning-rate: nan is not betw"),
  ],
)
def test_learning_rate_messages(args, message, capsys):
  assert f"argument {message}" in error_line(capsys, cli.main, *args)
