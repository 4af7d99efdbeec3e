import re

import pytest

from qat_tricks.evidence.checklist import CHECKS, FAIL, OPEN, PASS, checklist
from qat_tricks.evidence.language import language_named
from qat_tricks.evidence.paired import compare
from tests.evidence.test_page import answered
from tests.helpers import ROOT
from tests.helpers.samples import report


def states(made):
    rows = checklist(made)
    assert [row["check"] for row in rows] == list(CHECKS)
    return {row["check"]: row["state"] for row in rows}


def of(made, word):
    (row,) = [row for row in checklist(made) if word in row["check"]]
    return row["state"], row["figure"]


def test_what_was_not_measured_is_no_pass():
    keys = ("parity", "int8_coverage", "latency_ms", "memory_mib", "preprocessing")
    empty = report() | dict.fromkeys(keys)
    found = states(empty | {"stages": empty["stages"][:1]})
    assert set(found.values()) == {OPEN}


def test_a_good_run_passes():
    same = answered(585)
    found = states(report(comparison=compare(same, same, []), accuracy=0.985))
    opened = {check for check, state in found.items() if state == OPEN}
    assert FAIL not in found.values()
    assert opened == {
        "calibration images are like the test images",
        "every stage kept within its budget",
        "preparing the network changed nothing",
        "other seeds give the same",
    }


@pytest.mark.parametrize(
    ("changes", "word", "figure"),
    [
        ({"comparison": compare(answered(585), answered(400), [])}, "accuracy is", "worse: -30.83"),
        ({"comparison": compare(answered(585), answered(300), [])}, "no class", "q = "),
        ({"accuracy": 0.95}, "other metrics", "macro F1 -3.50 points"),
        ({"parity": {"top1_agreement": 0.99}}, "was trained", "99.00% of the images"),
        ({"int8_coverage": 0.8}, "integers", "80.00% of the multiplications"),
        ({"scale": 3.0}, "faster", "1.80 ms against 1.20 ms"),
        ({"memory_mib": {"fp32": 60.0, "int8": 80.0}}, "memory", "80 MiB against 60 MiB"),
        ({"preprocessing_change": {"differences": ["mean: 0 → 1"]}}, "preprocessing", "mean: 0"),
    ],
)
def test_what_is_wrong_fails_with_its_figure(changes, word, figure):
    state, told = of(report(**changes) | {"preprocessing_change": None} | changes, word)
    assert state == FAIL
    assert figure in told


def test_a_class_that_fails_is_one_beyond_chance():
    row = {"fp32": {}, "int8": {}, "low": 0.0, "high": 0.0, "p": 0.1}
    classes = [
        {**row, "name": "two images", "points": -100.0, "q": 0.5},
        {**row, "name": "many images", "points": -6.0, "q": 1e-9},
    ]
    comparison = compare(answered(585), answered(585), []) | {"classes": classes}
    state, figure = of(report(comparison=comparison), "no class")
    assert state == FAIL
    assert figure.startswith("many images: -6.00 points")


@pytest.mark.parametrize(("clipped", "state"), [(0.002, PASS), (0.2, FAIL), (None, OPEN)])
def test_test_images_beyond_the_ranges_tell_of_calibration(clipped, state):
    row = {"name": "relu", "kind": "activation", "bits": 8, "clipped": clipped}
    coarse = {**row, "bits": 4, "clipped": 0.9}  # clips on purpose
    made = report(layers={"images": 256, "tensors": [row, coarse]})
    assert of(made, "calibration")[0] == state


@pytest.mark.parametrize(("shift", "state"), [(0.02, PASS), (0.3, FAIL)])
def test_calibration_images_whose_activations_lie_elsewhere_are_told(shift, state):
    row = {"name": "relu", "kind": "activation", "bits": 8, "clipped": 0.002}
    compared = {"images": 256, "class_gap": 0.05, "class": "cat", "shift": shift, "tensor": "pool"}
    made = report(layers={"images": 256, "tensors": [row]}, calibration=compared)
    found, figure = of(made, "calibration")
    assert found == state
    assert f"{shift:.2%} of a range (pool), shares of a class by 5.00% (cat)" in figure


@pytest.mark.parametrize(("decibels", "state"), [(200.0, PASS), (133.0, PASS), (40.0, FAIL)])
def test_steps_that_are_to_change_nothing(decibels, state):
    made = report()
    made["stages"][1]["equivalence"] = [
        {"name": "folded", "evaluation_db": decibels, "by_design": False},
        {"name": "weights corrected", "evaluation_db": 20.0, "by_design": True},
    ]
    assert of(made, "changed nothing")[0] == state


def test_a_stage_without_a_budget_is_none_kept():
    made = report(stage_budgets={"ptq": None})
    made["stages"][1]["drop_points"] = 0.5
    assert of(made, "budget") == (OPEN, "no stage has a budget (max_drop); onnx -0.50 points")
    assert of(made | {"stage_budgets": {"ptq": 1.0}}, "budget") == (PASS, "onnx -0.50 points")


def test_the_printed_lists_have_these_checks():
    def rows(name):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        return [row.split("|")[2].strip() for row in re.findall("^[|] ☐ .*$", text, re.MULTILINE)]

    assert rows("checklist.md") == list(CHECKS)
    assert rows("checklist.ja.md") == [language_named("ja")(check) for check in CHECKS]
