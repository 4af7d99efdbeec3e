"""Following code leaves the network, its surroundings and the random generators as they were."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.random_state import has_moved, random_state
from qat_tricks.graph.tracer import Tracer, defaults_of, follow
from tests.helpers.modes import Base, BatchwiseDepth, MovingMean, NoGrad, OptionalArguments


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


class Swish(torch.autograd.Function):
    """A function with a gradient of its own, ten times that of what it computes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 10 * grad * torch.sigmoid(x)


class OwnGradient(Base):
    def forward(self, x):
        return self.fc(Swish.apply(self.features(x)))


class GradByMode(Base):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            features = self.features(x)
        return self.fc(features)


class Checkpointed(Base):
    def forward(self, x):
        return self.fc(checkpoint(self.features, x, use_reentrant=True))


class ScaledInPlace(Base):
    def forward(self, x):
        features = self.features(x)
        with torch.no_grad():
            features.mul_(10.0)
        return self.fc(features)


class Masked(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(5, 8).tril())

    def forward(self, x):
        return nn.functional.linear(self.features(x), self.fc.weight * self.mask, self.fc.bias)


class DetachedHead(Base):
    def forward(self, x):
        return nn.functional.linear(self.features(x), self.fc.weight.detach(), self.fc.bias)


class Adapted(Base):
    """A frozen weight, and a trained change of low rank."""

    def __init__(self):
        super().__init__()
        self.fc.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 8))

    def forward(self, x):
        return nn.functional.linear(self.features(x), self.fc.weight + self.a @ self.b)


@pytest.mark.parametrize(
    "kind",
    [OwnGradient, GradByMode, Checkpointed, ScaledInPlace, Masked, DetachedHead, Adapted],
)
def test_gradients_are_those_of_the_users_network(kind):
    torch.manual_seed(0)
    net = kind().train()
    traced = trace(copy.deepcopy(net)).train()
    for network in (net, traced):
        network(torch.ones(4, 3, 8, 8, requires_grad=True)).square().sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    given = {name: p.grad for name, p in traced.named_parameters()}
    assert given.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grad is None) == (given[name] is None), name
        if grad is not None:
            torch.testing.assert_close(given[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_what_training_writes_evaluation_leaves_alone():
    torch.manual_seed(0)
    net, x = MovingMean(), torch.randn(4, 3, 8, 8)
    traced = trace(copy.deepcopy(net))
    traced.eval()(x)
    assert float(traced.mean.abs().sum()) == 0
    for network in (net, traced):
        network.train()(x)
    assert torch.equal(traced.mean, net.mean)
    assert not traced.mean.requires_grad


class Normalizing(Base):
    def forward(self, x):
        with torch.no_grad():
            self.fc.weight.copy_(nn.functional.normalize(self.fc.weight, dim=1))
        return self.fc(self.features(x))


class Clamping(Base):
    def forward(self, x):
        self.fc.weight.data.clamp_(-1, 1)
        return self.fc(self.features(x))


@pytest.mark.parametrize("kind", [Normalizing, Clamping])
def test_a_parameter_that_forward_changes_is_refused(kind):
    with pytest.raises(QatTricksError, match=r'changes its parameter "fc\.weight" in place'):
        trace(kind())


class InPlaceInput(Base):
    def forward(self, x):
        x.sub_(0.5)
        x /= 2
        return self.fc(self.features(x))


def test_an_input_that_forward_changes_is_changed_in_a_copy():
    net, x = InPlaceInput().eval(), torch.randn(4, 3, 8, 8)
    expected = net(x.clone())
    before = x.clone()
    torch.testing.assert_close(trace(net)(x), expected)
    assert torch.equal(x, before)


class OwnGenerator(Base):
    def __init__(self, make):
        super().__init__()
        self.generator = make()

    def forward(self, x):
        draw = getattr(self.generator, "random", None) or (
            lambda: float(torch.empty(1).uniform_(generator=self.generator))
        )
        return self.fc(self.features(x)) * draw()


@pytest.mark.parametrize(
    "make", [lambda: random.Random(0), lambda: np.random.default_rng(0), torch.Generator]
)
def test_a_random_generator_of_its_own_is_refused_and_left_as_it_was(make):
    net, untouched = OwnGenerator(make), OwnGenerator(make)
    with pytest.raises(QatTricksError, match="draws a random number"):
        trace(net)
    x = torch.randn(2, 3, 8, 8)
    net.load_state_dict(untouched.state_dict())
    assert torch.equal(net.eval()(x), untouched.eval()(x))


def test_containers_that_code_fills_are_put_back():
    class Caching(Base):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            self.cache["features"] = self.features(x)
            return self.fc(self.cache["features"])

    net = Caching()
    with pytest.warns(UserWarning, match="sets cache while it computes"):
        traced = trace(net)
    assert net.cache == traced.cache == {}


def test_an_input_by_name_only_and_nodes_of_a_modules_names():
    class ByName(Base):
        def forward(self, *, x):
            return self.fc(self.features(x.to(torch.float32)))

    quantized = qat_tricks.quantize(ByName(), [torch.randn(8, 3, 8, 8)])
    assert quantized(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_a_sum_of_truth_values_counts_them():
    class Votes(Base):
        def forward(self, x):
            features = self.features(x)
            return sum(head(features) > 0 for head in (self.fc, self.other))

    torch.manual_seed(0)
    net, x = Votes().eval(), torch.randn(4, 3, 8, 8)
    assert torch.equal(trace(net)(x), net(x))


class Tempered(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x):
        return self.fc(self.features(x) + self.shift) / self.temperature.item()


def test_a_buffer_that_is_read_as_a_number_is_told(recwarn):
    net = Tempered()
    with pytest.warns(UserWarning, match='reads the value of its buffer "temperature"'):
        trace(net)
    assert not [w for w in recwarn if "shift" in str(w.message)]
    assert float(net.temperature) == float(net.shift) == 1.0


class Asserting(Base):
    def forward(self, x):
        assert x.shape[1] == 3
        assert x.dim() == 4, "images"
        features = self.features(x)
        assert features.shape[0] == x.shape[0]
        return self.fc(features)


class Branching(Base):
    def forward(self, x):
        if x.shape[1] == 3:
            return self.fc(self.features(x))
        return x


def test_assertions_are_taken_as_held_and_branches_are_not():
    net, x = Asserting().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(trace(net)(x), net(x))
    assert qat_tricks.quantize(net, [x])(x).shape == (2, 5)
    with pytest.raises(QatTricksError, match="cannot be traced"):
        trace(Branching())


class Assigning(Base):
    def forward(self, x):
        features = self.features(x)
        features[:, 0] = 0
        return self.fc(features)


def test_an_extreme_of_sizes_is_computed_and_one_of_values_is_a_branch():
    class OfSizes(nn.Module):
        def forward(self, x):
            rows, columns = x.shape[-2:]
            return x[:, : max(x.size(1) - 2, min([rows, columns]), max(x.shape[3:]))]

    class OfValues(nn.Module):
        def forward(self, x):
            return max(x.sum(), 0) * x

    traced = trace(OfSizes())
    for width in (1, 2, 5):
        assert traced(torch.rand(1, width, 3, 1)).shape[1] == max(width - 2, 1)
    with pytest.raises(QatTricksError, match=r"return max\(x\.sum\(\), 0\) \* x.*control flow"):
        trace(OfValues())


def test_an_assignment_into_a_tensor_is_told_what_to_write_in_its_place():
    with pytest.raises(QatTricksError, match=r"item assignment; make the tensor anew .*torch\.cat"):
        trace(Assigning())
