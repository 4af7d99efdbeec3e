# python benchmarks/lightning_matrix.py --out docs/results/lightning.md
"""The features that work in a Lightning trainer: runs the tests that are marked with one, and
writes a row for each feature.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from common import Report, argument_parser, command

TESTS = Path(__file__).parents[1] / "tests"
PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "hydra-joblib-launcher", "wandb")


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

    def rows(self) -> list[tuple[str, str, str]]:
        """Feature, result, and the test that shows it, as they were collected."""
        tests: dict[str, list[str]] = {}
        for test, features in self.features.items():
            for feature in features:
                tests.setdefault(feature, []).append(test)
        rows = []
        for feature, names in tests.items():
            outcomes = [self.outcomes.get(name, "not run") for name in names]
            if set(outcomes) == {"passed"}:
                result = "pass"
            else:
                result = "FAIL" if "failed" in outcomes else outcomes[0]
            cases = f"{len(names)} cases" if len(names) > 1 else ""
            shown = dict.fromkeys(name.partition("[")[0].replace("::", " ") for name in names)
            listed = ", ".join(f"`{Path(name).name}`" for name in shown)
            rows.append((feature, f"{result} {cases}".strip(), listed))
        return rows


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    out = args.out and args.out.resolve()  # the tests run in the project's folder
    os.chdir(TESTS.parent)
    matrix = Matrix()
    options = ["-n0", "-q", "-W", "ignore", "--durations=0", "--no-header", str(TESTS)]
    status = pytest.main(options, plugins=[matrix])
    report = Report(
        "In a Lightning trainer",
        [
            f"{command(args)}, on CPU, with {', '.join(map(installed, PACKAGES))}.",
            "Each row is shown by a test, nearly all with a real `pl.Trainer`. Refused means one "
            "line that says what to do instead.",
        ],
        ("feature", "result", "test"),
        out,
    )
    for row in matrix.rows():
        report.add(*row)
    sys.exit(status)


if __name__ == "__main__":
    main()
