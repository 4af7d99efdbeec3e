"""On whose grid a value is: at concats, behind what moves values, and without quantizers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.deploy.qdq import to_qdq
from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.graph.grids import grid_of, grids_of, input_grid_of, output_grid_of
from qat_tricks.graph.near_ties import avoid_rounding_ties
from qat_tricks.graph.surgery import insert_quantizers
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images

SCHEME = {"bits": 8}


class Joined(nn.Module):
    """Two tensors, moved about, concatenated, moved about; behind them a function."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, y):
        a = self.dropout(F.max_pool2d(x.neg(), 2).flatten(1))
        b = F.max_pool2d(y.neg(), 2).reshape(-1, 16)
        return F.silu(torch.cat([a, b], 1).chunk(2, 1)[0])


def joined(*quantized):
    """The network with a quantizer on each group of nodes, and its nodes by name."""
    traced = trace(Joined().eval())
    traced.meta["qat_tricks"]["activations"] = {
        nodes[0]: {"scheme": SCHEME, "activation": None, "nodes": list(nodes)}
        for nodes in quantized
    }
    insert_quantizers(traced)
    grids = list(activation_quantizers(traced).values())
    return traced, {node.name: node for node in traced.graph.nodes}, grids


@pytest.mark.parametrize("name", ["cat", "chunk", "getitem"])
def test_a_concat_of_different_grids_is_on_each_of_them_and_on_no_single_one(name):
    traced, nodes, grids = joined(["neg"], ["neg_1"])
    assert grids_of(nodes[name], traced) == tuple(grids)
    assert grid_of(nodes[name], traced) is None


@pytest.mark.parametrize("name", ["cat", "chunk", "getitem"])
def test_a_concat_of_one_grid_is_on_that(name):
    traced, nodes, (grid,) = joined(["neg", "neg_1"])
    assert grids_of(nodes[name], traced) == (grid,)
    assert grid_of(nodes[name], traced) is grid


def test_a_concat_with_a_part_in_float_is_on_no_grid():
    traced, nodes, (grid,) = joined(["neg"])
    assert grid_of(nodes["dropout"], traced) is grid
    assert grids_of(nodes["cat"], traced) == ()


@pytest.mark.parametrize("name", ["max_pool2d", "flatten", "dropout"])
def test_values_stay_on_their_grid_behind_what_moves_them(name):
    traced, nodes, grids = joined(["neg"], ["neg_1"])
    assert grid_of(nodes[name], traced) is grids[0]
    assert input_grid_of(nodes[name], traced) is grids[0]
    assert output_grid_of(nodes["neg"], traced) is grids[0]
    assert output_grid_of(nodes["max_pool2d"], traced) is None


def test_a_function_of_values_on_a_grid_is_on_none():
    traced, nodes, _ = joined(["neg"], ["neg_1"])
    assert grids_of(nodes["silu"], traced) == ()


def test_who_asks_says_which_quantizers_count():
    traced, nodes, grids = joined(["neg"], ["neg_1"])
    grids[0].enabled = False
    assert grid_of(nodes["dropout"], traced) is grids[0]
    assert grid_of(nodes["dropout"], traced, accepts=lambda grid: grid.enabled) is None
    # with one of its parts off, the whole concat is on no grid
    assert grids_of(nodes["cat"], traced, accepts=lambda grid: grid.enabled) == ()


class TwoGrids(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        joined = torch.cat([torch.relu(self.a(x)), self.b(x)], 1)
        return self.c(F.silu(F.max_pool2d(joined, 2))).mean((2, 3))


def test_export_and_ties_agree_with_the_simulation_at_a_concat():
    """The concat of a ReLU and another tensor has a grid of its own; off, it is on none."""
    torch.manual_seed(0)
    traced = calibrate(quantize(trace(TwoGrids().eval())), [images()]).eval()
    name = "activation_quantizers.cat"
    pool = next(node for node in traced.graph.nodes if node.name == "max_pool2d")
    assert grid_of(pool, traced) is traced.get_submodule(name)
    assert avoid_rounding_ties(traced) == []
    traced.get_submodule(name).enabled = False
    assert grid_of(pool, traced, accepts=lambda grid: grid.is_on) is None
    repeated = {grid: nodes.count(None) for grid, nodes in to_qdq(traced).calls.items()}
    assert set(repeated.values()) == {0}
    assert name not in repeated
