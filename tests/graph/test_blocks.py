import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.blocks import MOST_LAYERS, Cells, find_blocks
from qat_tricks.graph.float_names import float_names
from qat_tricks.tricks import fold_batchnorm, quantize
from tests.helpers.networks import Concatenated, Residual, conv


def _blocks(network, granularity="block"):
    traced = trace(network.eval())
    fold_batchnorm(traced)
    quantize(traced)
    cells = Cells(traced, float_names(traced))
    return [[str(node.target) for node in b.layers] for b in find_blocks(cells, granularity)]


def _layers(blocks):
    return [block for block in blocks if block]


def test_a_residual_block_is_a_block():
    assert _layers(_blocks(Residual())) == [["stem.0"], ["a.0", "b", "shortcut"], ["fc"]]


def test_branches_that_end_in_a_concat_take_in_the_layer_before_them():
    class Fires(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, 8)
            self.squeeze, self.left, self.right = conv(8, 4, 1), conv(4, 8, 1), conv(4, 8)
            self.fc = nn.Linear(16, 5)

        def forward(self, x):
            x = self.squeeze(self.stem(x))
            return self.fc(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))

    fire = ["squeeze.0", "left.0", "right.0"]
    assert _layers(_blocks(Fires())) == [["stem.0"], fire, ["fc"]]
    assert _layers(_blocks(Concatenated())) == [["stem.0", "a.0", "b.0"], ["last"]]


class Chain(nn.Module):
    """Layers in a row, of which some work on each channel by itself."""

    def __init__(self, groups):
        super().__init__()
        self.convs = nn.ModuleList(
            conv(8 if i else 3, 8, 3, groups=g) for i, g in enumerate(groups)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def test_single_layers_in_a_row_are_joined_and_none_ends_on_a_depthwise_one():
    blocks = _layers(_blocks(Chain([1, 1, 1, 8, 1, 8, 1])))
    names = [[int(name.split(".")[1]) for name in block] for block in blocks[:-1]]
    assert names == [[0, 1], [2, 3, 4], [5, 6]]


def test_each_layer_is_in_one_block_for_every_granularity():
    for granularity in ("block", "layer", "mrecg"):
        names = [name for block in _blocks(Residual(), granularity) for name in block]
        assert sorted(names) == ["a.0", "b", "fc", "shortcut", "stem.0"]
    assert all(len(block) < 2 for block in _blocks(Residual(), "layer"))


def test_mrecg_joins_the_neighbours_of_most_unlike_capacity():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.c, self.d = nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3)
            self.e, self.f = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3)

        def forward(self, x):
            for layer in self.children():
                x = F.relu(layer(x))
            return x.mean((2, 3))

    assert _layers(_blocks(Uneven())) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert _layers(_blocks(Uneven(), "mrecg")) == [["a", "b", "c", "d"], ["e", "f"]]


def test_a_unit_of_very_many_layers_is_taken_apart():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(
                nn.Conv2d(2 if i else 3, 2, 1) for i in range(MOST_LAYERS + 1)
            )

        def forward(self, x):
            parts = [x]
            for layer in self.convs:
                parts.append(F.relu(layer(parts[-1])))
            return torch.cat(parts[1:], 1).mean((2, 3))

    assert [len(block) for block in _layers(_blocks(Dense()))] == [1] * (MOST_LAYERS + 1)


def test_a_block_is_computed_from_its_inputs_alone():
    traced = trace(Residual().eval())
    fold_batchnorm(traced)
    quantize(traced)
    cells = Cells(traced, float_names(traced))
    seen = {node.name for node in cells.inputs}
    for block in find_blocks(cells):
        assert {node.name for node in block.inputs} <= seen
        known = {*block.inputs}
        for node in block.nodes:
            assert known.issuperset(node.all_input_nodes)
            known.add(node)
        seen.add(block.output.name)
    assert block.output.op == "output"


def test_an_unknown_node_is_refused():
    cells = Cells(trace(Residual().eval()), ())
    with pytest.raises(QatTricksError, match='no "elsewhere": give the network that was quantized'):
        cells.node("elsewhere")
