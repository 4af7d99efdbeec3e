"""Following code leaves the network, its surroundings and the random generators as they were."""

import random

import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.random_state import has_moved, random_state
from qat_tricks.graph.tracer import Tracer, defaults_of, follow
from tests.helpers.modes import Base, BatchwiseDepth, NoGrad, OptionalArguments


class DrawsInPython(Base):
    def forward(self, x):
        return self.fc(self.features(x)) * random.random()


class DrawsInTraining(Base):
    def forward(self, x):
        y = self.fc(self.features(x))
        return y * random.random() if self.training else y


def test_random_numbers_of_python_are_refused_with_the_place():
    with pytest.raises(QatTricksError, match=r"DrawsInPython.forward \(.*test_tracer.py:\d+\)"):
        trace(DrawsInPython())


@pytest.mark.parametrize(
    ("kind", "told"),
    [(DrawsInTraining, "draws a random number"), (BatchwiseDepth, "in training mode: .*rand")],
)
def test_what_cannot_be_traced_in_training_quantizes_and_refuses_to_train(kind, told):
    traced, x = trace(kind()), torch.randn(2, 3, 8, 8)
    assert traced.eval()(x).shape == (2, 5)
    with pytest.raises(QatTricksError, match=told):
        traced.train()(x)


def test_nothing_is_left_behind():
    class Noisy(Base):
        def forward(self, x):
            self.last = self.features(x)
            return self.fc(self.last) + torch.arange(5) * torch.rand(1)

    net = Noisy()
    net.seen = []
    state, before = random_state(), dict(vars(net))
    with pytest.warns(UserWarning, match="Noisy sets last while it computes"):
        traced = trace(net)
    assert vars(net).keys() == before.keys()
    assert not has_moved(state)
    assert not hasattr(traced, "last")
    with pytest.raises(AttributeError):
        net.last  # noqa: B018


class Counting(Base):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.steps += 1
        else:
            self.steps = self.steps + 1
        return self.fc(self.features(x))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_code_changes_is_refused_by_name_and_put_back(in_place):
    net = Counting(in_place)
    with pytest.raises(QatTricksError, match=r'changes its buffer "\.?steps"'):
        trace(net)
    assert float(net.steps) == 0


def test_optional_arguments_keep_their_defaults():
    net, x = OptionalArguments().eval(), torch.randn(2, 3, 8, 8)
    traced = trace(net)
    assert defaults_of(net) == {"features": None, "scale": 1.0, "mask": None}
    expected = net(x)
    for given in (traced(x), traced(x, None), traced(x, scale=1.0, mask=None), traced(x=x)):
        torch.testing.assert_close(given, expected)
    with pytest.raises(QatTricksError, match=r"traced with scale=1\.0"):
        traced(x, scale=2.0)
    with pytest.raises(QatTricksError, match="traced with features=None"):
        traced(x, x)


class Keywords(Base):
    def forward(self, x, /, y, *, z):
        return self.fc(self.features(x)) + self.other(self.features(y)) * z


def test_positional_and_keyword_inputs_are_inputs():
    net, x = Keywords().eval(), torch.randn(2, 3, 8, 8)
    expected = net(x, x, z=torch.ones(2, 1))
    torch.testing.assert_close(trace(net)(x, x, torch.ones(2, 1)), expected)


def test_a_part_under_no_grad_is_not_trained():
    traced = trace(NoGrad()).train()
    traced(torch.randn(2, 3, 8, 8)).sum().backward()
    assert traced.fc.weight.grad is not None
    assert traced.conv.weight.grad is None
    assert traced.bn.weight.grad is None


def test_frames_of_the_users_code_own_their_nodes():
    net = nn.Sequential(Base())
    graph = follow(net, Tracer(), training=False).graph
    assert {node.meta["qat_tricks.owner"] for node in graph.nodes if node.target == "mean"} == {"0"}
