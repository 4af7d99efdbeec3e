"""A graph that is another network is refused with the part, the line of its code and a way out."""

import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.equivalence import Gate
from qat_tricks.graph.trace_kept import trace_kept
from qat_tricks.graph.traced_network import TracedNetwork
from tests.helpers.modes import Base, StochasticDepth


class Counting(Base):
    """What it computes depends on how often it was called."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.fc(self.features(x) * self.calls)  # the culprit


class CountingPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 3, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x + self.calls)


class CountsInTraining(Base):
    def forward(self, x):
        y = self.fc(self.features(x))
        if self.training:
            self.calls = getattr(self, "calls", 0) + 1
            y = y * self.calls
        return y


@pytest.mark.filterwarnings("ignore:.* while it computes")
@pytest.mark.parametrize(
    ("net", "told"),
    [
        (
            Counting(),
            r'in evaluation mode before "fc", in Counting.forward \(.*test_trace_kept.py:\d+ '
            r'"return self.fc\(self.features\(x\) \* self.calls\)  # the culprit"\)',
        ),
        (nn.Sequential(CountingPart(), Base()), r'before "0.conv", in "0" \(.*untraced=\["0"\]'),
        (CountsInTraining(), "in training mode before the output"),
    ],
)
def test_the_place_is_named(net, told):
    x = torch.randn(4, 3, 8, 8)
    gate = Gate(net, x)
    with pytest.raises(QatTricksError, match=told) as error:
        trace_kept(net, (), gate)
    assert "\n" not in str(error.value)
    assert "is not the network that was given" in str(error.value)


def test_a_right_one_is_returned_and_noted():
    net = StochasticDepth()
    gate = Gate(net, torch.randn(4, 3, 8, 8))
    assert isinstance(trace_kept(net, (), gate), TracedNetwork)
    (step,) = gate.steps
    assert (step.name, step.evaluation_db, step.training_db) == ("traced", 200, 200)
