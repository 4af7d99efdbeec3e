import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.reconstruct import (
    ALL_FIXED,
    BATCHES,
    FIRST_FIXED,
    ReconstructSettings,
    _Drop,
    images_of_a_step,
    share_fixed,
)


def test_a_step_takes_fewer_images_where_they_are_large():
    assert images_of_a_step(49, 512) == BATCHES[1]
    assert images_of_a_step(112 * 112, 512) == BATCHES[0]
    assert images_of_a_step(56 * 56, 512) == 7
    assert images_of_a_step(49, 8) == 8


def test_layers_are_fixed_one_after_the_other():
    middle = (FIRST_FIXED + ALL_FIXED) / 2
    for progress, expected in (
        (0.0, [0, 0]),
        (FIRST_FIXED, [0, 0]),
        ((FIRST_FIXED + middle) / 2, [0.5, 0]),
        (middle, [1, 0]),
        (1.0, [1, 1]),
    ):
        assert [share_fixed(progress, place, 2) for place in (0, 1)] == pytest.approx(expected)


def test_the_share_that_is_dropped_is_as_asked_and_other_each_time():
    drop = _Drop(0.25, 0, torch.device("cpu"))
    first, second = (drop.draw(torch.Size([10, 100, 100])).clone() for _ in range(2))
    assert first.shape == (10, 100, 100)
    assert first.unique().tolist() == [0, 1]
    assert first.mean().item() == pytest.approx(0.75, abs=0.01)
    assert (first != second).float().mean().item() == pytest.approx(2 * 0.25 * 0.75, abs=0.02)
    again = _Drop(0.25, 0, torch.device("cpu"))
    assert torch.equal(again.draw(first.shape), first)


def test_settings_that_are_not_allowed_are_named_together():
    with pytest.raises(
        QatTricksError, match=r"iterations=0: .*; drop=1: .*; lr=-1: give 0 or more"
    ):
        ReconstructSettings(iterations=0, drop=1, lr=-1)
