"""What is installed is all that is needed: the package from its wheel, away from the checkout."""

import subprocess
import sys
import tarfile
import zipfile
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


def build(source, folder):
    """Builds the sdist and the wheel of a source tree, offline; returns their paths."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel of the checkout, and the sdist unpacked."""
    folder = tmp_path_factory.mktemp("built")
    sdist, wheel = build(ROOT, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return sdist, wheel, folder / sdist.name.removesuffix(".tar.gz")


def test_the_sdist_alone_builds_the_same_wheel_and_the_same_sdist(built, tmp_path):
    sdist, wheel, source = built
    again, same = build(source, tmp_path / "again")
    assert (again.name, same.name) == (sdist.name, wheel.name)
    assert contents(same) == contents(wheel)
    with tarfile.open(sdist) as first, tarfile.open(again) as second:
        # sets: the unpacked sdist has a PKG-INFO, and its own sdist gets another
        assert {*first.getnames()} == {*second.getnames()}


def test_the_wheel_is_what_pip_installs(built, installed):
    _, wheel, _ = built
    ours = {name for name in contents(wheel) if name.startswith("qat_tricks/")}
    assert ours == {
        path.relative_to(installed).as_posix()
        for path in (installed / "qat_tricks").rglob("*.*")
        if path.suffix != ".pyc"
    }


def test_the_sdist_holds_what_a_reader_and_a_tester_need_and_nothing_made(built):
    *_, source = built
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    needed = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"]
    needed += ["SECURITY.md", "train.py", "evaluate.py", "tests/test_wheel.py", "PKG-INFO"]
    assert set(needed) <= names
    assert not {name for name in names if name.startswith(("outputs/", "multirun/", "wandb/"))}
    assert not {name for name in names if name.endswith((".pyc", ".onnx.data")) or "/." in name}
