"""What only the steps of a module use is told from its network."""

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.outside import OUTSIDE, has_steps, is_under, outside
from qat_tricks.graph.tracer import Tracer, follow
from tests.helpers.nets import Named, images


class Steps(nn.Module):
    """Has steps, a loss, a teacher, and a head under two names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = self.classifier = nn.Linear(144, 4)
        self.criterion = nn.ModuleDict({"hard": nn.CrossEntropyLoss()})
        self.teacher = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, x):
        return self.criterion["hard"](self(x), self.teacher(x.flatten(1)).argmax(1))


def test_a_part_of_which_the_graph_uses_nothing_is_outside():
    net = Steps()
    graph = follow(net, Tracer(), training=False).graph
    assert outside(net, graph) == ("criterion", "teacher")
    assert has_steps(net)
    assert not has_steps(Named())
    assert is_under("a.b", ["a"])
    assert not is_under("ab", ["a"])


def test_steps_of_a_traced_module_use_the_users_own_objects():
    torch.manual_seed(0)
    net = Steps()
    quantized = qat_tricks.quantize(net, [images(32)])
    assert quantized.meta[OUTSIDE] == ("criterion", "teacher")
    assert type(quantized.teacher) is nn.Linear
    assert torch.isfinite(quantized.training_step(images()))
    with pytest.raises(QatTricksError, match="beside the forward"):
        quantized.body(images())
