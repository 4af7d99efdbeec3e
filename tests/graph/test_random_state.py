import random

import numpy as np
import pytest
import torch

from qat_tricks.graph.random_state import random_state, restore_random_state

DRAWS = {
    "python": random.random,
    "python gauss": lambda: random.gauss(0, 1),  # draws two and keeps one
    "numpy": np.random.rand,
    "numpy gauss": np.random.randn,
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("before", [0, 1, 700])
def test_draws_repeat_after_the_state_has_been_in_a_file(tmp_path, name, before):
    draw = DRAWS[name]
    for _ in range(before):
        draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(5)]
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(5)] == expected
    assert len(set(expected)) == 5


def test_reading_the_state_draws_nothing():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    random_state()
    assert torch.equal(torch.rand(3), expected)
