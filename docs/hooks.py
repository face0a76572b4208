"""What the site takes from outside this folder, and how docstrings are read.

mkdocs calls `on_files` and `on_page_markdown`; mkdocstrings loads `Examples`.
"""

import pathlib
import posixpath
import re
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]

# Pages and images that are kept once, where what makes them keeps them.
SHOWN = (
  "CHANGELOG.md",
  "CONTRIBUTING.md",
  "benchmarks/README.md",
  "benchmarks/results/**/*.md",
  "benchmarks/results/**/*.png",
  "examples/images/*.png",
)


def on_files(files: Files, *, config: Any) -> Files:
  """Adds the files of `SHOWN` under their paths in the repository."""
  for pattern in SHOWN:
    for path in sorted(ROOT.glob(pattern)):
      name = path.relative_to(ROOT).as_posix()
      files.append(File.generated(config, name, abs_src_path=str(path)))
  return files


def on_page_markdown(
  markdown: str, *, page: Any, files: Files, **_: Any
) -> str:
  """Links that hold in the repository lead to the same files of the site.

  A page of this folder is one folder higher in the site than in the
  repository; what `on_files` adds is where it was.
  """
  name = page.file.src_uri
  here = posixpath.dirname(name)
  folder = here if page.file.generated_by else posixpath.join("docs", here)

  def translate(match: re.Match[str]) -> str:
    path = posixpath.normpath(posixpath.join(folder, match[1]))
    target = path.removeprefix("docs/")
    if files.get_file_from_path(target) is None:
      return match[0]
    return f"]({posixpath.relpath(target, here or '.')}"

  return re.sub(r"\]\(([^)#:\s]+)", translate, markdown)


class Examples(griffe.Extension):
  """Docstrings here say "Example:", the parser's section is "Examples:"."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    """Called by griffe for everything that it finds."""
    if obj.docstring:
      obj.docstring.value = re.sub(
        r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
      )
