import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.graph import nodes as n
from qat_tricks.graph import trace
from tests.helpers.nets import small_net


class Shared(nn.Module):
    """Weights that are used once, by two calls, by two modules, and by an operation."""

    def __init__(self):
        super().__init__()
        self.once, self.twice, self.read = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.register_buffer("table", torch.randn(3, 4))

    def forward(self, x):
        x = self.read(self.twice(self.twice(self.once(x)))) * self.read.weight.abs().mean()
        constant = F.gelu(self.table).mean(0)
        return self.other(self.one(x)) + constant


def test_every_use_of_a_weight_counts():
    traced = trace(Shared().eval())
    uses = n.uses_of_weights(traced)
    names = {node.name: [user.name for user in users] for node, users in uses.items()}
    assert names == {
        "once": ["once"],
        "twice": ["twice", "twice_1"],
        "twice_1": ["twice", "twice_1"],
        "read": ["read", "read_weight"],
        "one": ["one", "other"],
        "other": ["one", "other"],
    }
    once = {node.name for node in traced.graph.nodes if n.is_used_once(node, uses)}
    assert once == {"once"}


@pytest.mark.parametrize("make", [small_net, lambda: Shared().eval()])
def test_one_pass_finds_what_depends_on_images(make):
    traced = trace(make())
    asked = {node for node in traced.graph.nodes if n.depends_on_images(node)}
    assert n.nodes_from_images(traced) == asked
    constants = {node.name for node in traced.graph.nodes} - {node.name for node in asked}
    assert ("_tensor_constant0" in constants) == hasattr(traced, "table")
