"""How many dimensions values have, seen in the graph or in a run."""

import pytest
import torch
from torch import nn

from qat_tricks.graph import trace
from qat_tricks.graph.ranks import RANK, note_ranks, rank_of
from tests.helpers.modes import MovingMean
from tests.helpers.structures import STRUCTURES, built, inputs


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_the_graph_shows_is_what_a_run_shows(name):
    build, shape = STRUCTURES[name]
    traced = trace(built(build))
    seen = {node: rank_of(node, traced) for node in traced.graph.nodes}
    note_ranks(traced, inputs(shape, 2))
    noted = {node: node.meta[RANK] for node in traced.graph.nodes if RANK in node.meta}
    assert noted
    wrong = {n: (seen[n], rank) for n, rank in noted.items() if seen[n] not in (None, rank)}
    assert not wrong


def test_a_linear_of_the_input_is_open_and_behind_images_is_not():
    linear = trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert rank_of(list(linear.graph.nodes)[-2], linear) is None
    head = trace(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    )
    assert rank_of(list(head.graph.nodes)[-2], head) == 2
    note_ranks(linear, torch.randn(2, 5, 3))
    assert rank_of(list(linear.graph.nodes)[-2], linear) == 3


def test_what_training_alone_computes_does_not_run():
    net, x = MovingMean(), torch.randn(2, 3, 8, 8)
    traced = trace(net).eval()
    note_ranks(traced, x)
    assert float(traced.mean.abs().sum()) == 0
