"""Objectives: figures of a report, with the direction in which they are better."""

import itertools

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.objectives import (
    OBJECTIVES,
    check_objectives,
    objective_values,
    undominated,
)
from tests.helpers.samples import report


def test_objectives_are_the_reports_figures_in_the_order_asked_for():
    found = report(accuracy=0.98, validation={"accuracy": 0.91, "images": 270})
    assert objective_values(found, ["accuracy", "latency"]) == [0.91, 0.6]
    assert objective_values(found, ["latency", "accuracy"]) == [0.6, 0.91]
    assert objective_values(found, ["size", "memory"]) == [310_000, 64]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.9"])
def test_the_accuracy_on_test_images_is_no_objective_and_nothing_takes_its_place(value):
    with pytest.raises(QatTricksError, match=r"no validation\.accuracy"):
        objective_values(report(accuracy=0.98), ["accuracy"])
    with pytest.raises(QatTricksError, match=r"no validation\.accuracy"):
        objective_values(report(validation={"accuracy": value}), ["latency", "accuracy"])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("accuracy", "give a list of"),
        (None, "give a list of"),
        ([1], "give a list of"),
        (["accuray", "latency"], 'unknown objective "accuray": did you mean "accuracy"?'),
        (["latency", "latency"], "twice"),
    ],
)
def test_wrong_objectives_are_refused(names, told):
    with pytest.raises(QatTricksError) as caught:
        check_objectives(names)
    assert told in str(caught.value)


def test_all_objectives_may_be_asked_for():
    check_objectives([*OBJECTIVES])
    check_objectives([])


def test_the_front_is_all_that_nothing_beats():
    costs = [*itertools.product((1.0, 2.0, 3.0), repeat=2), None]
    assert undominated(costs) == [True, *[False] * 9]
    assert undominated([(1, 3), (2, 2), (3, 1), (3, 2), (2, 2)]) == [True, True, True, False, True]
    assert undominated([None, (5,), (4,)]) == [False, False, True]
