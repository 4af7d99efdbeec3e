"""Each structure keeps its function at every step, and its file runs as it is simulated."""

import copy

import pytest
import torch

from qat_tricks.graph import trace
from qat_tricks.graph.ranks import note_ranks
from qat_tricks.tricks.equalize import equalize
from qat_tricks.tricks.fold_batchnorm import batchnorms_to_convs, fold_batchnorm
from tests.helpers.structures import STRUCTURES, built, inputs, ratio

# Without images a bias is absorbed by statistics: of a few values that lie below, some is lost.
BY_STATISTICS = {
    "avg_pool_without_zeros", "avg_pool_ceil", "padded_max_pool", "max_pool_ceil", "adaptive_pool",
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seen", [True, False], ids=["images", "no_images"])
def test_each_step_keeps_the_function(name, seen):
    build, shape = STRUCTURES[name]
    net, x = built(build), inputs(shape)
    expected = net(x)
    traced = trace(copy.deepcopy(net))
    assert ratio(expected, traced(x)) > 130
    note_ranks(traced, x)
    fold_batchnorm(traced)
    batchnorms_to_convs(traced)
    assert ratio(expected, traced(x)) > 120  # float32, rounded a few times more
    equalize(traced, [x] if seen else [])
    assert ratio(expected, traced(x)) > (40 if name in BY_STATISTICS and not seen else 120)
