"""The laws of the layout: which room may import which, no circles, nothing loaded unasked, and a
file, a YAML and a test for each trick.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

PACKAGE = "qat_tricks"

# Which rooms a room may import; every room may import itself and the loose files.
ROOMS = {
    "numerics": set(),
    "graph": {"numerics"},
    "models": {"graph", "numerics"},
    "data": set(),
    "settings": set(),
    "deploy": {"graph", "numerics"},
    "evidence": {"deploy", "graph", "numerics"},
    "trainer": {"graph", "numerics"},
    "tricks": {"trainer", "deploy", "graph", "numerics"},
    "recipes": {"tricks", "trainer", "deploy", "graph", "numerics", "settings"},
}
ROOMS["jobs"] = set(ROOMS)
ROOMS["cli"] = set(ROOMS)
LOOSE = {"errors", "files", "progress", "version"}
MOST_LOOSE = 5

# Rooms that are plain PyTorch, and what they must not load.
PLAIN_ROOMS = ("numerics", "graph", "deploy", "trainer", "tricks", "recipes")
FRAMEWORKS = ("pytorch_lightning", "lightning", "lightning_fabric", "hydra", "wandb")

# Imports inside functions, (importing module, imported module): why. ``.*`` stands for the rest.
DEFERRED = {
    ("cli.main", "qat_tricks.*"): "a wrong argument or Ctrl-C while torch loads ends in one line",
    ("cli.main", "rich.*"): "as above",
    ("cli.command_line", "qat_tricks.cli.check_train"): "evaluate.py does without Lightning",
    ("cli.command_line", "qat_tricks.cli.check_search"): "as above",
    ("jobs.artifact", "qat_tricks.jobs.checkpoint"): "an ONNX file is measured without Lightning",
    ("recipes.recipe", "qat_tricks.settings.compose"): "a recipe without overrides needs no Hydra",
    ("tricks.prune_channels", "qat_tricks.deploy.*"): "only a budget of latency needs a runtime",
    ("numerics.choices", "scipy.optimize"): "it takes longer to load than quantizing takes",
    ("files", "torch"): "reading and writing JSON costs nothing",
    ("deploy.runtimes.openvino", "openvino"): "an extra",
    ("models.build", "timm"): "an extra",
    ("data.digits", "sklearn.datasets"): "every command would load it to check its arguments",
    ("jobs.loggers", "wandb"): "as above",
    (
        "deploy.cost.memory_probe",
        "psutil",
    ): "only where there is no /proc",
    ("deploy.cost.memory_probe", "resource"): "Windows has none",
}


class Import(NamedTuple):
    """An import: who imports what, where, and whether inside a function."""

    importer: str
    imported: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def modules() -> dict[str, ast.Module]:
    """Each module of the package, by its dotted name without the package's."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "__init__"
        found[name] = ast.parse(path.read_text(), str(path))
    return found


@cache
def imports() -> list[Import]:
    """All imports of the package's modules, wherever in a file they stand."""
    return [
        Import(importer, imported, line, deferred)
        for importer, tree in modules().items()
        for imported, line, deferred in _imports_of(tree, deferred=False)
    ]


def _imports_of(tree: ast.AST, deferred: bool) -> Iterator[tuple[str, int, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, deferred
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of a module"
            for alias in node.names:
                yield _imported_module(str(node.module), alias.name), node.lineno, deferred
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports_of(node, deferred or is_function)


def _imported_module(source: str, name: str) -> str:
    """What ``from source import name`` imports: the module ``source.name``, else ``source``."""
    whole = f"{source}.{name}"
    return whole if whole.removeprefix(f"{PACKAGE}.") in modules() else source


def own_imports() -> Iterator[tuple[Import, str]]:
    """The imports of the package's own modules, and the module that each imports."""
    for found in imports():
        if found.imported == PACKAGE:
            yield found, "__init__"  # the public face, which is above all rooms
        elif found.imported.startswith(f"{PACKAGE}."):
            yield found, found.imported.removeprefix(f"{PACKAGE}.")


def room_of(module: str) -> str:
    return module.partition(".")[0]


def _list(lines: Iterable[str]) -> str:
    return "\n" + "\n".join(dict.fromkeys(lines))


def test_every_folder_has_its_place_and_few_files_lie_beside_them():
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    loose = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    assert folders == set(ROOMS)
    assert loose == LOOSE
    assert len(loose) <= MOST_LOOSE


def test_the_rooms_themselves_form_no_circle():
    assert _circles(ROOMS) == []


@pytest.mark.parametrize("room", [*ROOMS, *sorted(LOOSE)])
def test_a_room_imports_those_below_it_only(room):
    allowed = {room, *ROOMS.get(room, ()), *LOOSE}
    wrong = [
        str(found)
        for found, imported in own_imports()
        if room_of(found.importer) == room and room_of(imported) not in allowed
    ]
    assert not wrong, _list(wrong)


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set() for module in modules()}
    for found, imported in own_imports():
        assert imported in graph, f"{found}, which there is not"
        graph[found.importer].add(imported)
    circles = _circles(graph)
    assert not circles, _list(circles)


def _circles(graph: dict[str, set[str]]) -> list[str]:
    """The sets of nodes that reach each other, each as one text."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reach = {node: reached(node) for node in graph}
    circles = {
        frozenset(other for other in reach[node] if node in reach[other])
        for node in graph
        if node in reach[node]
    }
    return sorted(" ↔ ".join(sorted(circle)) for circle in circles)


def _covers(pattern: str, imported: str) -> bool:
    return imported == pattern or (
        pattern.endswith(".*") and f"{imported}.".startswith(pattern.removesuffix("*"))
    )


def test_imports_inside_functions_have_a_reason():
    deferred = [found for found in imports() if found.deferred]
    unexplained = [
        str(found)
        for found in deferred
        if not any(
            found.importer == importer and _covers(pattern, found.imported)
            for importer, pattern in DEFERRED
        )
    ]
    assert not unexplained, _list(unexplained)
    unused = [
        (importer, pattern)
        for importer, pattern in DEFERRED
        if not any(f.importer == importer and _covers(pattern, f.imported) for f in deferred)
    ]
    assert unused == []  # the list of reasons stays short


@cache
def _loaded_with_each_room() -> dict[str, set[str]]:
    """The frameworks that are loaded once all modules of a room have been imported.

    One process imports room after room, so that a framework is told of the first that loads it and
    of all after it.
    """
    lines = ["import sys, qat_tricks", "qat_tricks.export_onnx"]
    for room in PLAIN_ROOMS:
        inside = [f"{PACKAGE}.{name}" for name in modules() if room_of(name) == room]
        lines.append(f"import {', '.join(inside)}")
        lines.append(f"print({room!r}, *(set({FRAMEWORKS}) & set(sys.modules)))")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(dict.fromkeys(lines))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {room: set(names) for room, *names in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("room", PLAIN_ROOMS)
def test_a_plain_room_loads_neither_lightning_nor_hydra_nor_wandb(room):
    assert _loaded_with_each_room()[room] == set()


TRICKS = sorted(path.stem for path in (ROOT / "conf" / "trick").glob("*.yaml"))


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_has_a_file_a_yaml_and_a_test(trick):
    assert f"tricks.{trick}" in modules()
    tests = ROOT / "tests" / "tricks" / f"test_{trick}.py"
    assert tests.is_file()
    assert "\ndef test_" in tests.read_text()


def test_no_file_of_a_trick_lacks_its_yaml():
    files = {name.removeprefix("tricks.") for name in modules() if name.startswith("tricks.")}
    assert files == set(TRICKS)


LONGEST_FUNCTION = 60  # lines


def test_no_function_is_longer_than_a_page():
    functions = (
        (name, node)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    long = [
        f"{name}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for name, node in functions
        if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long, _list(long)
