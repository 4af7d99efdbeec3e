# python benchmarks/lightning_matrix.py --out docs/results/lightning.md
"""What works in a Lightning trainer: runs the tests that are marked with a feature, and writes a
row for each feature.
"""

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

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
            result = (
                "pass"
                if set(outcomes) == {"passed"}
                else "FAIL"
                if "failed" in outcomes
                else outcomes[0]
            )
            cases = f"{len(names)} cases" if len(names) > 1 else ""
            shown = dict.fromkeys(name.partition("[")[0].replace("::", " ") for name in names)
            rows.append(
                (
                    feature,
                    f"{result} {cases}".strip(),
                    ", ".join(f"`{Path(name).name}`" for name in shown),
                )
            )
        return rows


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.chdir(TESTS.parent)
    matrix = Matrix()
    # -n0: the plugin sees only what runs in this process
    options = ["-n0", "-q", "-W", "ignore", "--durations=0", "--no-header"]
    status = pytest.main([*options, str(TESTS)], plugins=[matrix])
    rows = matrix.rows()
    lines = [
        "# In a Lightning trainer",
        "",
        "`python benchmarks/lightning_matrix.py`, on CPU, with "
        + ", ".join(map(installed, PACKAGES))
        + ".",
        "Each row is shown by a test, nearly all with a real `pl.Trainer`. Refused means one line "
        "that says what to do instead.",
        "",
        "| feature | result | test |",
        "|---|---|---|",
        *(f"| {feature} | {result} | {test} |" for feature, result, test in rows),
    ]
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(status)


if __name__ == "__main__":
    main()
