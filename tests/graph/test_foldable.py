"""Which BatchNorms a linear can take in: those of rows, whose channels are its own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.fold import fold_batchnorm, needs_ranks
from qat_tricks.graph.ranks import note_ranks
from qat_tricks.recipes.ptq import quantize
from tests.helpers.structures import built

TOKENS = torch.randn(16, 8, 6, generator=torch.Generator().manual_seed(0))


def rows():
    """A linear and a BatchNorm whose input's rank the graph leaves open."""
    return built(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    )


@torch.no_grad()
def test_a_run_tells_rows_from_tokens():
    for x, folded in ((TOKENS[:, 0], [("0", "1")]), (TOKENS, [])):
        net = rows()
        expected = net(x)
        traced = trace(net)
        assert needs_ranks(traced)
        note_ranks(traced, x)
        assert not needs_ranks(traced)
        assert fold_batchnorm(traced) == folded
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folded_on_a_supposition_a_linear_refuses_what_it_was_not_folded_for():
    net, x = rows(), TOKENS[:, 0]
    expected = net(x)
    traced = trace(net)
    assert fold_batchnorm(traced) == [("0", "1")]
    for network in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(QatTricksError, match="3 dimensions, and it was folded for 2: call"):
            network(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize(("x", "coverage"), [(TOKENS[:, 0], 1.0), (TOKENS, 1.0)])
def test_the_recipe_and_the_forecast_look_at_the_inputs(x, coverage):
    net = rows()
    quantized = quantize(net, [x])
    assert (quantized(x) - net(x)).square().mean() < 1e-3 * net(x).square().mean()
    seen = forecast_network(net, x[:2])
    assert seen.coverage == coverage
    assert [row.operation for row in seen.in_float] == ([] if x.dim() == 2 else ["BatchNorm1d"])
