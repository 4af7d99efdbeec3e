"""A checkpoint tells that the code of its network has changed since."""

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.graph import rebuild, spec_of, trace
from qat_tricks.graph.fingerprint import fingerprint, has_changed
from tests.helpers.modes import Base
from tests.helpers.nets import small_net


class Strided(Base):
    def __init__(self):
        super().__init__()
        self.conv.stride = (2, 2)


class OtherFunction(Base):
    def features(self, x):
        return torch.tanh(self.maps(x)).mean((2, 3))


def test_weights_do_not_count_and_settings_and_code_do():
    first = fingerprint(trace(Base()))
    assert fingerprint(trace(Base())) == first
    for kind in (Strided, OtherFunction):
        assert fingerprint(trace(kind()))["sha256"] != first["sha256"]
    assert not has_changed(trace(Strided()), None)
    assert not has_changed(trace(Strided()), {**first, "torch": "1.0"})


@pytest.mark.parametrize("kind", [Strided, OtherFunction])
def test_rebuilding_another_network_warns(kind, recwarn):
    quantized = qat_tricks.quantize(Base(), [torch.randn(8, 3, 8, 8)])
    rebuild(Base(), spec_of(quantized))
    assert not [w for w in recwarn if "code of" in str(w.message)]
    with pytest.warns(UserWarning, match=f"the code of {kind.__name__} has changed"):
        rebuild(kind(), spec_of(quantized))


def test_values_that_are_computed_while_tracing_do_not_count():
    class Buffered(Base):
        def forward(self, x):
            return super().forward(x) + nn.functional.softmax(torch.arange(5.0), 0)

    assert fingerprint(trace(Buffered())) == fingerprint(trace(Buffered()))


def test_a_batchnorm_that_is_frozen_for_a_while_is_the_same_code():
    net, frozen = small_net(), small_net()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    assert fingerprint(trace(net)) == fingerprint(trace(frozen))
