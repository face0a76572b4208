"""The documentation is true: its blocks run, its tables are the code's."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import jax
import pytest

import nsa_jax
from nsa_jax import dispatch, inspect
from pallas_kernels.mosaic_gpu import support as mosaic_support
from pallas_kernels.triton import support
from tests import tiny_run

# What is shown is that the blocks run.
ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  *sorted(DOCS.rglob("*.md")),
]
# Pages whose blocks go on from one another.
NOTEBOOKS = ("docs/inside-a-model.md", "docs/nnx.md", "docs/serving.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _blocks(language: str) -> dict[str, str]:
  """Code by page and line; that of a notebook in one piece."""
  blocks: dict[str, str] = {}
  for page in PAGES:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    first = 0
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
      line = text.count("\n", 0, block.start()) + 1
      if first and name in NOTEBOOKS:
        place = f"{name}:{first}"
        gap = line - first - blocks[place].count("\n")
        blocks[place] += "\n" * gap + block[1]
      else:
        first = line
        blocks[f"{name}:{line}"] = block[1]
  return blocks


PYTHON = _blocks("python")
# A command is run once, however many pages name it.
COMMANDS = list(
  dict.fromkeys(
    command.strip()
    for code in _blocks("bash").values()
    for line in code.splitlines()
    for command in line.split("&&")
  )
)
# Flags that make a documented run short; its other flags stay.
SHORT = {
  "train_lm.py": (
    # As in test_train_lm.py: the same programs are compiled once.
    "--steps=6 --seq-len=384 --batch-size=1 --max-bytes=200000"
    " --eval-batches=1 --sample-tokens=8"
  ),
  "train_sharded.py": (
    "--attention=window --steps=2 --seq-len=128 --batch-size=4"
    " --max-bytes=200000 --eval-batches=1 --sample-tokens=2"
  ),
  "generate.py": "--max-new-tokens=8",
}


# ----------------------------------------------------------------------- code


def test_blocks_are_of_known_languages() -> None:
  known = {"bash", "bibtex", "python"}
  for page in PAGES:
    opened = re.findall(r"^```(.*)$", page.read_text(), re.M)
    assert set(opened[::2]) <= known, page
    assert not any(opened[1::2]), page


def _folder(tmp_path: pathlib.Path, uses_run: bool) -> pathlib.Path:
  """Where a block runs: beside the trained model that it may read."""
  if uses_run:
    tiny_run.save(tmp_path / "runs" / "train_lm")
  return tmp_path


@pytest.mark.parametrize("place", PYTHON)
def test_python(
  place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  code = re.sub(r"^STEPS = \d+$", "STEPS = 3", PYTHON[place], flags=re.M)
  monkeypatch.chdir(_folder(tmp_path, "runs/train_lm" in code))
  # A block may register a backend.
  monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
  path, line = place.rsplit(":", 1)
  lines = "\n" * int(line) + code  # so that a traceback names the line
  exec(compile(lines, path, "exec"), {"__name__": "docs"})


@pytest.mark.slow
def test_the_indexer_learns() -> None:
  """The table of the page, in as many steps as the page says."""
  page = "docs/own-selectors.md"
  space: dict[str, Any] = {"__name__": "docs"}
  for place, code in PYTHON.items():
    if place.startswith(page) and ("def mean_key(" in code or "STEPS" in code):
      exec(compile(code, page, "exec"), space)
  query, key, config = (space[name] for name in ("query", "key", "config"))
  where = {"config": config, "key_length": key.shape[1]}
  compressed = nsa_jax.compress_mean(key, config=config)
  mass = nsa_jax.block_mass(query, key, config=config)
  _, lse = nsa_jax.compressed_attention(query, compressed, compressed, **where)
  choose = nsa_jax.block_ids_from_scores
  ignored = dict.fromkeys(("query", "compressed_key", "lse", "scale"))
  ids = {
    "random": choose(
      jax.random.uniform(jax.random.key(0), mass.shape), **where
    ),
    "by the product": space["mean_key"](query, key, **ignored, **where),
    "by the paper's": nsa_jax.select_blocks(query, compressed, lse, **where),
    "those with the": choose(mass, **where),
  }
  found = {
    name: inspect.recall(query, key, x, config=config)
    for name, x in ids.items()
  }
  found["by the indexer"] = space["recall"]
  text = (ROOT / page).read_text()
  for name, recall in found.items():
    stated = re.search(rf"^\| {name}.* \| (\S+) \|$", text, re.M)
    assert stated is not None, name
    # Queries of the first blocks read everything.
    mean = float(recall[:, 64:].mean())
    assert mean == pytest.approx(float(stated[1]), abs=0.006), name


@pytest.mark.slow
@pytest.mark.parametrize(
  "option, start",
  [
    ("", "by head |"),
    ("share_kv=True", "`share_kv=True`, one pair"),
    ('select="means"', '`select="means"`, where'),
  ],
)
def test_what_a_trained_model_reads(option: str, start: str) -> None:
  """The recall that the page states, up to what other rounding does to it.

  Another version of Python has another library to read.
  """
  page = "docs/inside-a-model.md"
  (whole,) = (code for place, code in PYTHON.items() if place.startswith(page))
  code = whole.split("from matplotlib")[0]
  code = code.replace("scan_layers=True", f"scan_layers=True, {option}")
  space: dict[str, Any] = {"__name__": "docs"}
  exec(compile(code, page, "exec"), space)
  means = inspect.summarize(space["layers"]["layer_0"])
  assert (means.oracle_recall > means.recall).all()
  gain = float((means.recall - means.random_recall).mean())
  assert gain > 0.05 if option else abs(gain) < 0.05
  if sys.version_info[:2] != (3, 11):
    return
  text = " ".join((ROOT / page).read_text().split())
  stated = text[text.index(start) + len(start) :]
  numbers = re.findall(r"0\.\d\d", stated)
  assert means.recall.tolist() == pytest.approx(
    [*map(float, numbers[:4])], abs=0.03
  )


@pytest.mark.parametrize("command", COMMANDS)
def test_command(
  command: str, tmp_path: pathlib.Path, script_environment: Any
) -> None:
  program, *arguments = shlex.split(command)
  if program == "python" and arguments[0] == "-m":
    # A benchmark needs a GPU: without one, its arguments are read.
    module = importlib.import_module(arguments[1])
    assert module.parser().parse_args(arguments[2:])
  elif program == "python":
    script = ROOT / arguments[0]
    short = shlex.split(SHORT.get(script.name, ""))
    if script.name == "train_lm.py" and "--out" not in arguments:
      short.append(f"--out={tmp_path / 'run'}")
    uses_run = script.name == "generate.py" or "--evaluate" in arguments
    subprocess.run(
      [sys.executable, script, *arguments[1:], *short],
      cwd=_folder(tmp_path, uses_run),
      env=script_environment,
      check=True,
      capture_output=True,
    )
  elif program == "pip":  # Continuous integration installs; here: it exists.
    assert arguments[:2] == ["install", "-e"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])
    assert extras is not None
    known = PROJECT["project"]["optional-dependencies"]
    assert set(extras[1].split(",") if extras[1] else []) <= set(known)
  elif program == "pytest":
    _check_pytest(arguments)
  else:  # The tools that continuous integration runs.
    assert program in ("mkdocs", "pre-commit"), command


def _check_pytest(arguments: list[str]) -> None:
  markers = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
  known = {marker.split(":")[0] for marker in markers}
  values = iter(arguments)
  for value in values:
    if value == "-m":
      assert next(values) in known
    elif value == "-n":
      assert next(values).isdigit()
    else:
      assert (ROOT / value).exists(), value


# --------------------------------------------------------------------- tables


def _table(page: str, heading: str) -> list[list[str]]:
  """Cells of the rows of the first table under a heading."""
  text = (DOCS / page).read_text()
  assert f"\n## {heading}\n" in text, f"{page} has no section {heading!r}"
  section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
  rows = re.findall(r"^\|(.*)\|$", section, re.M)
  cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
  return [cells[0], *cells[2:]]


def test_functions_and_tests_of_the_equations_exist() -> None:
  _, *rows = _table("algorithm.md", "From equation to test")
  assert len(rows) > 10
  for *_, function, test in rows:
    assert function.strip("`") in nsa_jax.__all__, f"no nsa_jax.{function}"
    file, name = (part.strip("`") for part in test.split("<br>"))
    path = ROOT / "tests" / file
    assert path.exists(), f"docs/algorithm.md: there is no tests/{file}"
    assert re.search(rf"^def {name}\(", path.read_text(), re.M), (
      f"docs/algorithm.md: tests/{file} has no {name}"
    )


def _served(name: str, op: str) -> bool:
  if name in dispatch.PORTABLE:
    return hasattr(dispatch.PORTABLE[name], op)
  backend = dispatch.BACKENDS[name]
  if isinstance(backend, str):
    backend = importlib.import_module(backend)
  return getattr(backend, op, None) is not None


def test_the_table_of_ops_is_that_of_the_code() -> None:
  (_, *names), *rows = _table("implementations.md", "Which ops each one has")
  names = [name.strip("`") for name in names]
  assert names == [*dispatch.PORTABLE, *dispatch.BACKENDS]
  ops = {row[0].strip("`") for row in rows}
  assert ops == {
    *(f"{branch}_attention" for branch in dispatch.ATTENTION_OPS),
    "block_scores",
    "select_blocks",
    "cache.attend",
  }
  for title, *cells in rows:
    op = title.strip("`").removesuffix("_attention")
    op = {"cache.attend": "decode"}.get(op, op)
    actual = {
      name: _served(name, op) for name in names if "branches" not in cells[0]
    }
    for name, cell in zip(names, cells, strict=True):
      if cell == "by the branches":
        assert not _served(name, op), (title, name)
        actual[name] = True
      else:
        assert cell == ("yes" if _served(name, op) else "no"), (title, name)


def test_the_defaults_are_those_of_the_code(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  text = " ".join((DOCS / "implementations.md").read_text().split())
  for cards in ([], ["a card"]):
    monkeypatch.setattr(dispatch, "visible_gpus", lambda cards=cards: cards)
    for op in (
      *dispatch.ATTENTION_OPS,
      "block_scores",
      "select_blocks",
      "decode",
    ):
      want: tuple[str, ...] = ("cudnn" if op == "full" else "triton", "xla")
      if cards and op in ("compressed", "select_blocks", "selected", "window"):
        want = ("mosaic_gpu", *want)
      assert dispatch.names(None, op) == want, op
  default = "for the three branches and block selection on Hopper cards"
  assert f"{default} `mosaic_gpu`" in text
  assert "else `triton` on NVIDIA GPUs and `xla` on everything else" in text
  assert "For `full_attention` it is `cudnn`" in text


def test_the_limits_are_those_of_the_code() -> None:
  text = (DOCS / "implementations.md").read_text().split("\n## ")[0]
  rows = {
    row[0]: row
    for row in (line.strip("|").split(" | ") for line in text.splitlines())
    if len(row) == 6
  }
  triton = {name.strip(): cells[3].strip() for name, cells in rows.items()}
  assert f"capability {support._MIN_CAPABILITY} " in triton["runs on"]
  assert triton["heads per group"] == f"up to {support._MAX_GROUP}"
  assert triton["head dimensions"].endswith(f"up to {support._MAX_HEAD_DIM}")
  blocks = ", ".join(map(str, support.BLOCKS))
  assert triton["`selection_block`"] == blocks
  row = triton["selection blocks of a row of a decode cache"]
  assert row == f"up to {support._MAX_BLOCKS_OF_A_ROW}"
  names = sorted(dtype.dtype.name for dtype in map(_zero, support._DTYPES))
  assert sorted(triton["dtypes"].split(", ")) == names
  mosaic = {name.strip(): cells[4].strip() for name, cells in rows.items()}
  assert f"capability {mosaic_support._CAPABILITY}, " in mosaic["runs on"]
  least = ".".join(map(str, mosaic_support._MIN_JAX))
  assert f"jax {least} and newer" in mosaic["runs on"]
  group = f"multiples of 8 up to {mosaic_support._MAX_GROUP}"
  assert mosaic["heads per group"] == group
  widths = ", ".join(map(str, mosaic_support._HEAD_DIMS))
  assert mosaic["head dimensions"] == widths
  names = sorted(
    dtype.dtype.name for dtype in map(_zero, mosaic_support._DTYPES)
  )
  assert sorted(mosaic["dtypes"].split(", ")) == names


def _zero(dtype: Any) -> Any:
  return dtype(0)


def test_the_reference_has_every_public_name() -> None:
  text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
  shown = re.findall(r"^::: nsa_jax\.([\w.]+)$", text, re.M)
  assert set(nsa_jax.__all__) - {"cache"} <= set(shown)
  assert {f"nnx.{name}" for name in nsa_jax.nnx.__all__} <= set(shown)
  # The other names of the cache are types of arguments.
  names = set(nsa_jax.cache.__all__) - {"Compress", "KINDS"}
  assert {f"cache.{name}" for name in names} <= set(shown)


# ---------------------------------------------------------------------- pages


def test_the_readme_is_short() -> None:
  lines = (ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 150
  assert not [line for line in lines if len(line) > 80]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: pathlib.Path) -> None:
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if not target.startswith(("https://", "#")):
      path = page.parent / target.split("#")[0]
      assert path.exists(), target


def test_every_page_is_in_the_navigation() -> None:
  navigation = (ROOT / "mkdocs.yml").read_text()
  for page in DOCS.rglob("*.md"):
    assert f": {page.relative_to(DOCS)}\n" in navigation, page


def test_the_citation_names_this_version() -> None:
  text = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {nsa_jax.__version__}\n" in text
  assert f"{{{nsa_jax.__version__}}}" in (DOCS / "index.md").read_text()
