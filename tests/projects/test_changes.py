"""Each project has changed at most two lines to adopt a recipe."""

from pathlib import Path

import pytest

from tests.projects.journey import MARK

PROJECTS = sorted(set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)})


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.stem)
def test_at_most_two_lines_are_changed(path):
    lines = [line for line in path.read_text().splitlines() if line.rstrip().endswith(MARK)]
    assert 1 <= len(lines) <= 2
    assert "qat_tricks" in "".join(lines)


def test_there_are_eight():
    assert len(PROJECTS) == 8
