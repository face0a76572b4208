"""The short examples run and say what they should."""

import pytest

from examples import check_kernels, plot_reads

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_check_kernels(capsys):
  check_kernels.main()
  title, *rows = capsys.readouterr().out.splitlines()
  assert "relative difference" in title
  assert [row.split()[0] for row in rows] == ["xla", "triton"]
  for row in rows:
    words = row.split()
    assert words[1::2] == ["out", "dq", "dk", "dv"]
    assert max(map(float, words[2::2])) < 1e-5


def test_plot_reads(tmp_path):
  plot_reads.draw(tmp_path / "reads.png")
  assert (tmp_path / "reads.png").stat().st_size > 10_000
