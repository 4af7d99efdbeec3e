"""What would compute beside the graph is refused by name, and the graph itself never is."""

import copy

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.calls_beside import is_inside
from qat_tricks.graph.inputs import input_names
from tests.helpers.nets import Named, images


@pytest.fixture
def quantized():
    torch.manual_seed(0)
    return qat_tricks.quantize(Named(), [images(32)])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda net, x: net.forward_features(x), '"features", which Named.forward_features calls,'),
        (lambda net, x: net.features(x), '"features"'),
        (lambda net, x: net.features[:2](x), "slice"),
        (lambda net, x: net.features[4](net.features[0](x)), '"features.4"'),
        (lambda net, x: net.features[4].forward(x), '"features.4"'),
        (lambda net, x: net.features[1](x), '"features.1"'),
    ],
)
def test_what_walks_around_forward_is_refused_by_name(quantized, call, name):
    with pytest.raises(QatTricksError, match=f"{name}.* beside the forward"):
        call(quantized, images())
    quantized(images())  # and nothing is left of the refusal


def test_hooks_work_or_are_refused_by_name(quantized):
    calls = []
    quantized.register_forward_hook(lambda *args: calls.append("network"))
    quantized.head.register_forward_hook(lambda *args: calls.append("head"))
    quantized(images())
    assert calls == ["head", "network"]
    with pytest.raises(QatTricksError, match='hook on "features" would never be called'):
        quantized.features.register_forward_hook(lambda *args: None)


def test_a_method_may_look_at_the_network_and_copy_it():
    class Exporting(Named):
        def names(self):
            twin = copy.deepcopy(self)
            return input_names(self), "forward" in vars(twin), twin(images())

    torch.manual_seed(0)
    quantized = qat_tricks.quantize(Exporting(), [images(32)])
    names, is_left, output = quantized.names()
    assert names == ["x"]
    assert not is_left
    assert torch.equal(output, quantized(images()))


def test_a_part_is_inside_of_what_is_called():
    assert is_inside("a.b.c", {"a.b"})
    assert is_inside("a", {"a"})
    assert not is_inside("a", {"a.b"})
    assert not is_inside("ab", {"a"})
