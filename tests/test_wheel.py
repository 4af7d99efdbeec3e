"""What is installed is all that is needed: the package from its wheel, away from the checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import qat_tricks
from qat_tricks.settings.compose import config_dir
print(qat_tricks.__file__, config_dir())
print(len(qat_tricks.recipe("int8_ptq")))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package, built and installed offline."""
    folder = tmp_path_factory.mktemp("installed")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        *offline,
        "--target",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_wheel_carries_all_files_that_are_no_code(installed):
    pages = ("comparison.html.j2", "ja.toml", "page.css", "report.html.j2", "report.md.j2")
    expected = {Path("py.typed"), *(Path("evidence", name) for name in pages)}
    expected |= {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    package = installed / "qat_tricks"
    assert expected == {
        path.relative_to(package)
        for path in package.rglob("*.*")
        if path.suffix not in (".py", ".pyc")
    }


def test_an_installed_package_finds_its_recipes(installed, tmp_path):
    command = [sys.executable, "-P", "-c", PROGRAM, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    paths, tricks = done.stdout.splitlines()
    assert (
        paths == f"{installed / 'qat_tricks' / '__init__.py'} {installed / 'qat_tricks' / 'conf'}"
    )
    assert int(tricks) > 3
