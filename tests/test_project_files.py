"""CITATION.cff and SECURITY.md say what is so."""

import re
import tomllib

import yaml

from qat_tricks.version import __version__
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version_and_these_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format wants
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["abstract"] == PROJECT["description"]


def test_the_citation_refers_to_the_paper():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Hu", "Zeng", "Wu"]
    assert paper["year"] == 2023
    assert paper["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:"))


def test_the_line_of_versions_that_get_fixes_is_the_packages():
    told = (ROOT / "SECURITY.md").read_text()
    (line,) = re.findall(r"one version line, (\d+\.\d+)", told)
    assert __version__.startswith(f"{line}.")
