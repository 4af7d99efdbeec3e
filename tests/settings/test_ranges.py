"""Ranges of settings: their borders, and the error of a value outside."""

import math
from types import SimpleNamespace

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.config import StageOverride
from qat_tricks.recipes.recipe import Stage
from qat_tricks.settings.ranges import (
    NOT_NEGATIVE,
    POSITIVE,
    at_least,
    below,
    between,
    check_ranges,
    counts,
)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (at_least(2), [2, 3, math.inf], [1, math.nan]),
        (between(0, 1), [0, 1], [-0.1, 1.1, math.nan]),
        (below(0, 1), [0, 0.99], [-0.1, 1]),
        (POSITIVE, [1e-9], [0, -1, math.inf, math.nan]),
        (NOT_NEGATIVE, [0, 1e9], [-1, math.inf, math.nan]),
        (POSITIVE.or_null(), [None, 1], [0]),
        (counts(between(1, 8), "[1]"), [[1], (1, 8)], [[], [0], [1, 0], [9]]),
    ],
    ids=lambda value: getattr(value, "text", None),
)
def test_borders(allowed, inside, outside):
    assert all(allowed.contains(value) for value in inside)
    assert not any(allowed.contains(value) for value in outside)


def test_every_value_outside_its_range_is_told_in_one_line():
    settings = SimpleNamespace(a=0, b=1, c=None)
    with pytest.raises(QatTricksError) as caught:
        check_ranges(settings, a=POSITIVE, b=below(0, 1), c=at_least(1).or_null())
    assert str(caught.value) == (
        "a=0 is not allowed: give a number above 0; b=1 is not allowed: give 0 to below 1"
    )


@pytest.mark.parametrize(
    "settings", [{"epochs": -1}, {"lr": 0}, {"lr": math.nan}, {"max_drop": -0.5}]
)
def test_a_stage_and_what_replaces_its_settings_have_the_same_ranges(settings):
    for make in (StageOverride, lambda **rest: Stage(name="qat", tricks=[], **rest)):
        with pytest.raises(QatTricksError, match=f"{next(iter(settings))}=.* is not allowed"):
            make(**settings)
