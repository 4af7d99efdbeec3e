# python benchmarks/lightning_matrix.py --out docs/results/lightning.md
"""The features that work in a Lightning trainer: runs the tests that are marked with one, with each
of Lightning's two packages, and writes a row for each feature.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from common import Report, argument_parser, command

ROOT = Path(__file__).parents[1]
LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
VERSIONS = (
    "torch",
    "pytorch-lightning",
    "lightning",
    "hydra-core",
    "hydra-joblib-launcher",
    "wandb",
)


class Matrix:
    """A pytest plugin: the outcomes of each feature's tests."""

    def __init__(self) -> None:
        self.features: dict[str, list[str]] = {}  # of each test
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        marked = {item: [mark.args[0] for mark in item.iter_markers("feature")] for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not marked[item]])
        items[:] = [item for item in items if marked[item]]
        self.features = {item.nodeid: marked[item] for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def rows(self) -> dict[str, dict[str, str]]:
        """The result of each feature, and the tests that show it, in order of collection."""
        tests: dict[str, list[str]] = {}
        for test, features in self.features.items():
            for feature in features:
                tests.setdefault(feature, []).append(test)
        rows = {}
        for feature, names in tests.items():
            outcomes = [self.outcomes.get(name, "not run") for name in names]
            result = "FAIL" if "failed" in outcomes else outcomes[0]
            if set(outcomes) == {"passed"}:
                result = "pass" if len(names) == 1 else f"pass, {len(names)} cases"
            shown = dict.fromkeys(name.partition("[")[0].replace("::", " ") for name in names)
            listed = ", ".join(f"`{Path(name).name}`" for name in shown)
            rows[feature] = {"result": result, "tests": listed}
        return rows


def run_tests(out: Path) -> int:
    """Runs the marked tests in this process and writes their rows as JSON."""
    matrix = Matrix()
    # -n0: the plugin only sees the tests of its own process
    options = ["-n0", "-q", "-W", "ignore", "--no-header", "-p", "no:cacheprovider"]
    status = pytest.main([*options, str(ROOT / "tests")], plugins=[matrix])
    out.write_text(json.dumps(matrix.rows()))
    return int(status)


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, help="run one package, and write its rows as JSON")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.rows:
        sys.exit(run_tests(args.rows))
    with TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.json" for name in LIGHTNING}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rows", str(file)],
                env={**os.environ, "LIGHTNING_PACKAGE": name},
            )
            for name, file in files.items()
        ]
        statuses = [process.wait() for process in processes]
        rows = {name: json.loads(file.read_text()) for name, file in files.items()}
    report = Report(
        "In a Lightning trainer",
        [
            f"{command(args)}, on CPU, with {', '.join(map(installed, VERSIONS))}.",
            "Each row is shown by a test, nearly all with a real `Trainer`, in both of Lightning's "
            "packages. Refused means one line that says what to do instead. Skipped rows need a "
            "GPU.",
        ],
        ("feature", *LIGHTNING, "test"),
        args.out.absolute() if args.out else None,
    )
    first = rows[LIGHTNING[0]]
    for feature, row in first.items():
        results = (rows[name].get(feature, {"result": "no row"})["result"] for name in LIGHTNING)
        report.add(feature, *results, row["tests"])
    sys.exit(max(statuses))


if __name__ == "__main__":
    main()
