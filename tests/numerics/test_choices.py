import itertools

import numpy as np
import pytest

from qat_tricks.numerics.choices import Pair, choose, cost_of


def cheapest_error(errors, costs, budget, pairs=()):
    """By trying every choice."""
    choices = itertools.product(*(range(len(options)) for options in errors))
    found = [
        sum(options[i] for options, i in zip(errors, chosen, strict=True))
        for chosen in choices
        if cost_of(chosen, costs, pairs) <= budget
    ]
    return min(found)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
@pytest.mark.parametrize("with_pairs", [False, True])
def test_the_choice_is_the_best_of_all(with_pairs, scale):
    random = np.random.default_rng(0)
    for share in (0.5, 0.65, 0.8):
        errors = (scale * random.random((5, 3)) ** 4).tolist()
        costs = random.integers(1, 1000, (5, 3)).tolist()
        pairs = []
        if with_pairs:
            places = [(0, 3), (1, 3), (2, 4)]
            tables = random.integers(1, 1000, (3, 3, 3)).tolist()
            pairs = [Pair(places=p, costs=t) for p, t in zip(places, tables, strict=True)]
        budget = share * (sum(map(max, costs)) + sum(max(map(max, pair.costs)) for pair in pairs))
        chosen = choose(errors, costs, budget, pairs)
        assert cost_of(chosen, costs, pairs) <= budget
        found = sum(options[i] for options, i in zip(errors, chosen, strict=True))
        assert found == pytest.approx(cheapest_error(errors, costs, budget, pairs), rel=1e-9)


def test_places_may_have_different_numbers_of_options():
    assert choose([[3, 1], [2, 1, 0], [5]], [[0, 4], [0, 3, 6], [1]], 5) == [1, 0, 0]
    assert choose([[0, 0]], [[1, 2]], 2) in ([0], [1])


def test_a_budget_that_nothing_meets_has_no_choice():
    assert choose([[1, 2], [3, 4]], [[5, 6], [5, 9]], 9.9) is None
    assert choose([[1, 2], [3, 4]], [[5, 6], [5, 9]], 10) == [0, 0]


def test_the_solver_prints_nothing(capfd):
    random = np.random.default_rng(16)  # one of the problems of which it would
    sizes = random.integers(500, 40000, 20)
    levels = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
    errors = np.abs(random.normal(size=(20, 1))) * levels**4 * random.uniform(0.5, 2, (20, 12))
    costs = sizes[:, None] * (1 - levels)
    print("before")
    chosen = choose(errors.tolist(), costs.tolist(), sizes.sum() / 2)
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
    assert cost_of(chosen, costs.tolist()) <= sizes.sum() / 2
