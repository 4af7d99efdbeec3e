import pytest
import torch

from qat_tricks.numerics.sparsity import (
    GRANULARITIES,
    cubic_schedule,
    largest_sparsity,
    without_smallest,
)


def test_cubic_schedule():
    at = [cubic_schedule(t / 10, initial=0.1, final=0.5, start=0.2, end=0.8) for t in range(11)]
    assert at[0] == at[2] == 0.1
    assert at[8] == at[10] == 0.5
    assert at[5] == pytest.approx(0.5 - 0.4 * 0.5**3)
    assert at == sorted(at)


def test_the_largest_sparsity_of_a_granularity():
    assert {name: largest_sparsity(name) for name in GRANULARITIES} == {"weight": 1.0, "2:4": 0.5}


def test_just_the_number_asked_for_goes_also_among_ties():
    score = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 0.0]])
    assert without_smallest(score, 3).tolist() == [[1, 0, 0], [1, 1, 0]]
    assert without_smallest(torch.zeros(4), 2).sum() == 2
    assert without_smallest(score, 0).all()
