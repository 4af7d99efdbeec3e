"""Steps that are run by hand leave no trace in what plainly holds values."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from qat_tricks.trainer.kept_state import kept_state

VALUES = {
    "list": ([1], lambda v: v.append(2)),
    "dict": ({"a": [1]}, lambda v: v["a"].append(2)),
    "set": ({1}, lambda v: v.add(2)),
    "deque": (deque([1]), lambda v: v.append(2)),
    "defaultdict": (defaultdict(list, {"a": [1]}), lambda v: v["b"].append(2)),
    "OrderedDict": (OrderedDict(a=1), lambda v: v.update(a=2)),
    "Counter": (Counter("aab"), lambda v: v.update("a")),
    "array": (np.zeros(3), lambda v: v.__iadd__(1)),
    "tensor": (torch.zeros(3), lambda v: v.add_(1)),
}
GENERATORS = {
    "random": (random.Random(0), lambda v: v.random()),
    "numpy": (np.random.default_rng(0), lambda v: v.random()),
    "torch": (torch.Generator().manual_seed(0), lambda v: torch.rand(1, generator=v).item()),
}


def as_plain(value):
    return value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value


@pytest.mark.parametrize("name", VALUES)
def test_values_are_put_back_in_place(name):
    value, change = copy.deepcopy(VALUES[name][0]), VALUES[name][1]
    module = nn.Module()
    module.value = value
    before = copy.deepcopy(as_plain(value))
    with kept_state(module, None):
        change(value)
        module.value = None
        assert as_plain(value) != before
    assert module.value is value
    assert as_plain(value) == before


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_go_on_where_they_were(name):
    value, draw = GENERATORS[name]
    module = nn.Module()
    module.value = value
    with kept_state(module, None):
        drawn = [draw(value) for _ in range(3)]
    assert [draw(value) for _ in range(3)] == drawn


def test_a_part_that_is_idle_is_not_looked_at():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with kept_state(module, module[1]):
        for parameter in module.parameters():
            parameter.data.fill_(3.0)
    assert not (module[0].weight == 3).any()
    assert (module[1].weight == 3).all()
