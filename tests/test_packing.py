"""Packed rows: nothing is lost, moved or read across documents."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import nsa_jax
from nsa_jax import NSAConfig, PackedRow, PackedRows
from nsa_jax.packing import PackingReport

NO_LABEL = -100
# Lengths of documents and the options; every token differs from all others.
SETTINGS = st.tuples(
  st.lists(st.integers(0, 40), max_size=25),
  st.fixed_dictionaries(
    {
      "length": st.integers(1, 20),
      "alignment": st.integers(1, 8),
      "open_rows": st.integers(1, 4),
      "long_documents": st.sampled_from(["split", "truncate"]),
    }
  ),
)


def _documents(lengths: list[int]) -> list[np.ndarray]:
  ends = np.cumsum(lengths, dtype=int)
  return [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def _segments(rows: list[PackedRow]) -> list[PackedRow]:
  """The segments of all rows, each as the part of its row."""
  return [
    PackedRow(*(x[row.segment_ids == i] for x in row))
    for row in rows
    for i in range(1, row.segment_ids.max() + 1)
  ]


def _same(rows: list[PackedRow], others: list[PackedRow]) -> bool:
  return len(rows) == len(others) and all(
    np.array_equal(a, b) for a, b in zip(rows, others, strict=True)
  )


# ------------------------------------------------------------------- properties


@given(SETTINGS)
def test_every_token_is_there_once(settings):
  lengths, options = settings
  size = options["length"]
  rows = list(PackedRows(_documents(lengths), **options))
  # The tokens are their own order.
  segments = sorted(_segments(rows), key=lambda s: s.tokens[0])
  expected = _documents(lengths)
  if options["long_documents"] == "truncate":
    expected = [document[:size] for document in expected]
  pieces = [
    document[i : i + size]
    for document in expected
    for i in range(0, len(document), size)
  ]
  assert len(segments) == len(pieces)
  for segment, piece in zip(segments, pieces, strict=True):
    np.testing.assert_array_equal(segment.tokens, piece)


@given(SETTINGS)
def test_labels_are_the_next_token_of_the_document(settings):
  lengths, options = settings
  following: dict[int, int] = {}
  for document in _documents(lengths):
    if options["long_documents"] == "truncate":
      document = document[: options["length"]]
    following |= dict(itertools.pairwise(document))
  for row in PackedRows(_documents(lengths), **options):
    used = row.segment_ids > 0
    expected = [following.get(token, NO_LABEL) for token in row.tokens]
    np.testing.assert_array_equal(row.labels, np.where(used, expected, -100))


@given(SETTINGS)
def test_segments_are_runs_at_aligned_starts(settings):
  lengths, options = settings
  for row in PackedRows(_documents(lengths), **options):
    for x in row:
      assert x.shape == (options["length"],)
      assert x.dtype == np.int32
    count = row.segment_ids.max()
    assert count > 0
    end = 0
    for i in range(1, count + 1):
      places = np.flatnonzero(row.segment_ids == i)
      start = -(-end // options["alignment"]) * options["alignment"]
      end = start + len(places)
      np.testing.assert_array_equal(places, np.arange(start, end))
      np.testing.assert_array_equal(row.positions[places], places - start)
    padding = row.segment_ids == 0
    assert not row.tokens[padding].any()
    assert not row.positions[padding].any()


@given(SETTINGS)
def test_the_report_counts_tokens(settings):
  lengths, options = settings
  rows, tokens, padding = PackedRows(_documents(lengths), **options), 0, 0
  assert rows.report == PackingReport()
  for i, row in enumerate(rows):
    tokens += int((row.segment_ids > 0).sum())
    padding += int((row.segment_ids == 0).sum())
    report = rows.report
    assert (report.rows, report.tokens, report.padding) == (
      i + 1,
      tokens,
      padding,
    )
    assert report.padding_fraction == padding / (tokens + padding)
  assert rows.report.tokens + rows.report.truncated == sum(lengths)
  if options["long_documents"] == "split":
    assert rows.report.truncated == 0


class Resumable(Iterator[np.ndarray]):
  """Documents with a state of their own, as the iterators of grain have."""

  def __init__(self, documents):
    self.documents = documents
    self.next = 0
    self.given = 0

  def __next__(self):
    if self.next == len(self.documents):
      raise StopIteration
    self.next += 1
    self.given += 1
    return self.documents[self.next - 1]

  def get_state(self):
    return {"next": self.next}

  def set_state(self, state):
    self.next = state["next"]


@pytest.mark.parametrize("kind", [list, iter, Resumable])
@given(settings=SETTINGS)
def test_a_state_gives_the_same_rest(kind, settings):
  lengths, options = settings

  def start():
    return PackedRows(kind(_documents(lengths)), **options)

  rows = start()
  states = [json.dumps(rows.get_state())]
  expected, reports = [], []
  for row in rows:
    expected.append(row)
    reports.append(rows.report)
    states.append(json.dumps(rows.get_state()))
  assert _same(expected, list(start()))
  for i, state in enumerate(states):
    again = start()
    again.set_state(json.loads(state))
    assert json.dumps(again.get_state()) == state
    assert _same(list(again), expected[i:])
    if reports:
      assert again.report == reports[-1]


# --------------------------------------------------------------------- by hand


def test_rows_are_filled_as_they_fit():
  lengths = [7, 5, 3, 8, 2, 20, 1]
  rows = PackedRows(_documents(lengths), length=12, alignment=4, open_rows=2)
  # 7 leaves room for 4; so does 5, in a second row; 3 goes to the first, which
  # is full then. 8 opens another, and 2 goes to the second row, which is full.
  # 20 fills a row and leaves 8.
  found = [(row.segment_ids > 0).astype(int).tolist() for row in rows]
  assert found == [
    [1] * 7 + [0] + [1] * 3 + [0],
    [1] * 5 + [0] * 3 + [1] * 2 + [0] * 2,
    [1] * 12,
    [1] * 8 + [1] + [0] * 3,
    [1] * 8 + [0] * 4,
  ]
  assert rows.report == PackingReport(rows=5, tokens=46, padding=14)


def test_the_fullest_row_makes_room():
  documents = _documents([4, 4, 7])
  rows = PackedRows(documents, length=10, alignment=1, open_rows=1)
  assert next(rows).tokens[:8].tolist() == [*range(8)]
  documents = _documents([4, 7, 9])
  rows = PackedRows(documents, length=10, alignment=1, open_rows=2)
  assert next(rows).tokens[:7].tolist() == documents[1].tolist()


def test_documents_are_streamed():
  given = 0

  def documents():
    nonlocal given
    while True:
      given += 1
      yield [1] * 9

  rows = PackedRows(documents(), length=16, alignment=4, open_rows=3)
  next(rows)
  assert given == 4


def test_a_source_with_a_state_is_not_read_again():
  source = Resumable(_documents([5] * 100))
  rows = PackedRows(source, length=8, alignment=4, open_rows=2)
  for _ in range(50):
    next(rows)
  state = rows.get_state()
  fresh = Resumable(_documents([5] * 100))
  again = PackedRows(fresh, length=8, alignment=4, open_rows=2)
  again.set_state(state)
  assert _same([next(again)], [next(rows)])
  assert fresh.given <= 2


def test_documents_of_any_integers():
  for document in (
    [1, 2],
    (1, 2),
    np.array([1, 2], np.uint8),
    jnp.array([1, 2]),
  ):
    (row,) = PackedRows([document, []], length=2, alignment=1)
    assert row.tokens.tolist() == [1, 2]


# --------------------------------------------------------------------- messages


@pytest.mark.parametrize(
  "change, message",
  [
    ({"length": 0}, r"`length`=0 must be at least 1\."),
    ({"length": 1.5}, r"`length`=1\.5 must be a static integer\."),
    ({"alignment": 0}, r"`alignment`=0 must be at least 1\."),
    ({"open_rows": 0}, r"`open_rows`=0 must be at least 1\."),
    (
      {"long_documents": "cut"},
      r"`long_documents`='cut' must be one of 'split', 'truncate'\.",
    ),
    (
      {"documents": 3},
      r"`documents`=3 must be an iterable of vectors of integers\.",
    ),
    (
      {"documents": [[1], [1.5]]},
      r"`documents`\[1\]=\[1\.5\] must be a vector of integers\.",
    ),
    (
      {"documents": ["text"]},
      r"`documents`\[0\]='text' must be a vector of integers\.",
    ),
    ({"documents": [[[1]]]}, r"`documents`\[0\]=\[\[1\]\] must be a vector"),
    (
      {"documents": [[], [3, -1]]},
      r"`documents`\[1\] has the value -1; tokens must be at least 0 and fit",
    ),
    (
      {"documents": [[2**31]]},
      r"`documents`\[0\] has the value 2147483648; tokens must be at least 0",
    ),
  ],
)
def test_wrong_arguments(change, message):
  arguments: Any = {"documents": [[1]], "length": 8, "alignment": 4} | change
  with pytest.raises(ValueError, match=message):
    list(PackedRows(**arguments))


def test_wrong_states():
  documents = _documents([5, 20, 6])
  options: Any = {"length": 8, "alignment": 4, "open_rows": 1}
  rows = PackedRows(documents, **options)
  next(rows)
  next(rows)
  state = rows.get_state()
  assert state["offset"]

  def says(message, change=(), documents: Any = documents, **others):
    rows = PackedRows(documents, **options | others)
    with pytest.raises(ValueError, match=message):
      rows.set_state(state | dict(change))

  rule = r"`state`=\{.*must be what `get_state` returns\."
  says(rule, {"rows": [3]})
  says(rule, {"report": [1]})
  says(rule, {"documents": -1})
  with pytest.raises(ValueError, match=r"`state`=3 must be what `get_state`"):
    rows.set_state(3)  # type: ignore[arg-type]
  says(r"with `length`=8, which must be that of this iterator, 9", length=9)
  says(r"with `open_rows`=1, which must be .*, 16\.", open_rows=16)
  says(r"after 1 documents; `documents` has 0", documents=[])
  says(r"`documents`\[1\] has 3 tokens, .* 8", documents=_documents([5, 3]))
  says("`documents` has a state of .*`state` has none", documents=Resumable([]))
  says("`state` has a state of .*`documents` has none", {"source": 0})
  once = iter(documents)
  rows = PackedRows(once, **options)
  next(rows)
  with pytest.raises(
    ValueError, match=r"`documents` .* once, .* up to `documents`\[1\]; "
  ):
    rows.set_state(state)


# ------------------------------------------------------- packed equals alone

NSA = NSAConfig(4, 2, 8, num_selected=3, num_local=1, window=6)
LENGTH = 48
LENGTHS = [13, 40, 7, 22, 1, 30, 8]


def _stack(rows: list[PackedRow]) -> PackedRow:
  return PackedRow(*(np.stack(x) for x in zip(*rows, strict=True)))


def _pack(documents: list[np.ndarray]) -> PackedRow:
  """All documents in the rows of a batch."""
  rows = list(
    PackedRows(documents, length=LENGTH, alignment=NSA.selection_block)
  )
  assert len(rows) < len(documents)
  return _stack(rows)


def _alone(documents: list[np.ndarray], count: int) -> list[PackedRow]:
  """Batches of `count` rows, of one document each.

  That the padding of a row changes nothing is tested with the layer and the
  model; here it lets all batches have one shape.
  """
  rows = []
  for tokens in documents:
    row = PackedRow(*np.zeros((4, LENGTH), np.int32))
    size = len(tokens)
    row.tokens[:size] = tokens
    row.labels[:] = NO_LABEL
    row.labels[: size - 1] = tokens[1:]
    row.segment_ids[:size] = 1
    row.positions[:] = np.arange(LENGTH)
    rows.append(row)
  empty = PackedRow(*np.zeros((4, LENGTH), np.int32))
  empty.labels[:] = NO_LABEL
  rows += [empty] * (-len(rows) % count)
  return [_stack(rows[i : i + count]) for i in range(0, len(rows), count)]


def _tokens() -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  return [rng.integers(0, 32, n) for n in LENGTHS]


def _assert_equal_grads(packed: Any, alone: list[Any]) -> None:
  """A sum over the documents, whose rounding grows with its terms."""
  total = jax.tree.map(lambda *x: sum(np.asarray(y, float) for y in x), *alone)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(packed), jax.tree.leaves(total), strict=True
  ):
    scale = np.abs(b).max()
    assert scale > 0, jax.tree_util.keystr(path)
    np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path)
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "attention",
  ["nsa", *(pytest.param(kind, marks=SLOW) for kind in ("full", "window"))],
)
def test_the_model_trains_as_on_the_documents_alone(attention):
  config = nsa_jax.TransformerConfig.preset(
    "tiny",
    num_layers=2,
    model_dim=16,
    mlp_dim=16,
    vocab_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    nsa=NSA,
    attention=attention,
    scan_layers=True,
    implementation="xla",
  )
  model = nsa_jax.TransformerLM(config)
  batch = _pack(_tokens())

  @jax.jit
  def run(params, row):
    def loss(params):
      losses = jnp.asarray(
        model.apply(
          {"params": params},
          row.tokens,
          positions=row.positions,
          segment_ids=row.segment_ids,
          labels=row.labels,
        )
      )
      return losses.sum(), losses

    return jax.value_and_grad(loss, has_aux=True)(params)

  params = jax.jit(model.init)(jax.random.key(0), batch.tokens)["params"]
  (total, losses), grads = run(params, batch)
  np.testing.assert_array_equal(losses[batch.labels < 0], 0)
  alone = _alone(_tokens(), len(batch.tokens))
  alone_runs = [run(params, one) for one in alone]
  assert (batch.labels >= 0).sum() == sum(n - 1 for n in LENGTHS)
  np.testing.assert_allclose(
    total, sum(float(loss) for (loss, _), _ in alone_runs), rtol=1e-6
  )
  _assert_equal_grads(grads, [one for _, one in alone_runs])


@pytest.mark.parametrize(
  "compression", ["mlp", pytest.param("mean", marks=SLOW)]
)
def test_the_layer_gives_each_document_what_it_has_alone(compression):
  layer = nsa_jax.NativeSparseAttention(
    2, 1, 8, config=NSA, compression=compression, implementation="xla"
  )
  rng = np.random.default_rng(1)
  # Different tokens, so that they tell where a document is.
  documents = _documents(LENGTHS)
  table = rng.standard_normal((sum(LENGTHS), 16), np.float32)
  weight = rng.standard_normal(16, np.float32)

  @jax.jit
  def run(params, row):
    def loss(params, x):
      out = jnp.asarray(
        layer.apply(
          params, x, segment_ids=row.segment_ids, positions=row.positions
        )
      )
      return ((out @ weight) ** 2).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      params, jnp.asarray(table)[row.tokens]
    )
    return out, grads

  batch = _pack(documents)
  params = jax.jit(layer.init)(jax.random.key(0), table[batch.tokens])

  def by_token(row, x):
    """x [B, T, D] in the order of the tokens."""
    used = row.segment_ids > 0
    return np.asarray(x)[used], row.tokens[used]

  out, (grads, dx) = run(params, batch)
  alone = _alone(documents, len(batch.tokens))
  alone_runs = [run(params, one) for one in alone]
  for packed, parts in (
    (out, [run[0] for run in alone_runs]),
    (dx, [run[1][1] for run in alone_runs]),
  ):
    actual, order = by_token(batch, packed)
    pairs = [by_token(*pair) for pair in zip(alone, parts, strict=True)]
    values, tokens = map(np.concatenate, zip(*pairs, strict=True))
    np.testing.assert_array_equal(tokens, np.arange(sum(LENGTHS)))
    np.testing.assert_allclose(
      actual, values[order], atol=1e-5 * np.abs(values).max()
    )
  _assert_equal_grads(grads, [run[1][0] for run in alone_runs])


# ------------------------------------------------------------------------ grain


class TestGrain:
  """What the guide says of grain."""

  def test_its_iterators_are_resumed_by_their_state(self):
    import grain

    documents = _documents([5, 20, 6, 3, 9, 14, 2])

    def start():
      source = grain.MapDataset.source(documents).seed(0).shuffle()
      return PackedRows(
        source.to_iter_dataset(), length=16, alignment=4, open_rows=2
      )

    rows = start()
    next(rows)
    state = json.dumps(rows.get_state())
    again = start()
    again.set_state(json.loads(state))
    assert _same(list(again), list(rows))

  def test_it_packs_aligned_rows_as_well(self):
    import grain
    import grain.experimental

    documents = _documents([5, 12, 6, 3, 9, 14, 2])

    def finish(tokens):
      return {
        "tokens": tokens,
        "labels": np.append(tokens[1:], NO_LABEL),
      }

    def each(value):
      return {"tokens": value, "labels": value}

    packed = grain.experimental.FirstFitPackIterDataset(
      grain.MapDataset.source(documents).map(finish).to_iter_dataset(),
      length_struct=each(16),
      pack_alignment_struct=each(4),
      padding_struct={"tokens": 0, "labels": NO_LABEL},
      num_packing_bins=10,
      shuffle_bins=False,
    )
    found = [
      PackedRow(
        row["tokens"],
        row["labels"],
        row["tokens_segment_ids"],
        row["tokens_positions"],
      )
      for row in packed
    ]
    ours = list(PackedRows(documents, length=16, alignment=4, open_rows=10))
    order = np.argsort([row.tokens[0] for row in ours])
    assert _same(found, [ours[i] for i in order])
