"""What other tools did to a network is taken over, or refused with the way out."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import spec_of, trace
from qat_tricks.graph.traceable import TraceSettings, copy_of, take_over_masks
from tests.helpers.modes import Base


def with_hook(net):
    net.conv.register_forward_hook(lambda module, args, output: None)
    return net


def changed(net, function, *args):
    function(net.conv, *args)
    return net


def with_part(net, name):
    setattr(net, name, nn.Linear(2, 2))
    return net


def forward_on_object(net):
    net.forward = lambda x: x
    return net


def forward_on_part(net):
    conv = net.conv
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 1.02
    return net


def compiled_in_place(net):
    net.fc.compile()
    return net


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (torch.jit.script, "from before torch.jit.script"),
        (torch.compile, "_orig_mod"),
        (compiled_in_place, '"fc" was compiled in place'),
        (nn.DataParallel, "hand over its .module"),
        (forward_on_object, "replaced on the object"),
        (forward_on_part, 'the forward of "conv" was replaced .*derive a class from Conv2d'),
        (with_hook, '"conv" has a forward hook'),
        (lambda net: changed(net, weight_norm), "remove_weight_norm"),
        (lambda net: changed(net, spectral_norm), "remove_spectral_norm"),
        (
            lambda net: changed(net, parametrizations.weight_norm),
            r'remove_parametrizations\(module, "weight"\)',
        ),
        (lambda net: changed(net, prune.l1_unstructured, "bias", 0.5), r"prune.remove\(module"),
        (lambda net: nn.Sequential(nn.LazyConv2d(4, 1)), "run the network once"),
        (lambda net: net.double(), '"conv.weight" is in float64'),
        (lambda net: changed(net, nn.Module.half), '"conv.weight" is in float16'),
        (lambda net: with_part(net, "meta"), "has an attribute meta, which torch.fx needs"),
        (lambda net: with_part(net, "kernels"), "has an attribute kernels"),
    ],
)
def test_what_a_tracer_would_follow_wrong_is_one_line(change, told):
    with pytest.raises(QatTricksError, match=told) as error:
        trace(change(Base().eval()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        forward_on_object,
        forward_on_part,
        lambda net: changed(net, weight_norm),
        lambda net: changed(net, parametrizations.weight_norm),
        lambda net: changed(net, prune.l1_unstructured, "bias", 0.5),
    ],
)
def test_it_is_refused_before_it_is_copied(change):
    with pytest.raises(QatTricksError):
        qat_tricks.quantize(change(Base().eval()), [torch.randn(2, 3, 8, 8)])


def test_a_part_that_is_not_traced_may_have_hooks():
    net = with_hook(Base()).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(trace(net, ["conv"])(x), net(x))


def test_a_hook_on_the_network_itself_goes_on_being_called():
    net, calls = Base().eval(), []
    net.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    trace(net)(torch.randn(2, 3, 8, 8))
    assert calls == [(2, 5)]


def test_masks_of_torch_prune_are_taken_over_and_their_zeros_stay():
    torch.manual_seed(0)
    net, x = Base().eval(), torch.randn(8, 3, 8, 8)
    prune.l1_unstructured(net.conv, "weight", 0.5)
    prune.random_unstructured(net.fc, "weight", 0.25)
    zeros = {name: getattr(net, name).weight == 0 for name in ("conv", "fc")}
    expected = net(x)
    plain = list(Base().state_dict())
    traced = trace(copy_of(net))
    torch.testing.assert_close(traced(x), expected)
    assert [key for key in traced.state_dict() if not key.endswith("mask")] == plain
    quantized = qat_tricks.quantize(net, [x])
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.1)
    quantized.train()(x).square().sum().backward()
    optimizer.step()
    for name, expected_zeros in zeros.items():
        weight = quantized.get_submodule(name).effective_weight()
        assert torch.equal(weight == 0, expected_zeros | (weight == 0))
        assert bool((weight[expected_zeros] == 0).all())
        assert bool((weight != 0).any())
    assert take_over_masks(Base()) == {}


def test_a_spec_from_before_has_one_mode_and_only_parts_in_use():
    assert TraceSettings.of_spec({}) == TraceSettings(training_mode=False, keep_unused=False)
    settings = TraceSettings(splits_attention=False)
    assert TraceSettings.of_spec(settings.as_spec()) == settings
    assert spec_of(trace(Base(), settings=settings))["trace"]["splits_attention"] is False


def test_frozen_batchnorms_of_torchvision_stay_frozen_and_exact():
    torch.manual_seed(0)
    net = Base()
    net.bn = FrozenBatchNorm2d(8)
    net.bn.running_var.uniform_(0.5, 2)
    net.bn.weight.normal_()
    x = torch.randn(4, 3, 8, 8)
    traced = trace(copy_of(net))
    for training in (False, True):
        torch.testing.assert_close(traced.train(training)(x), net.train(training)(x))
    traced.train()(x).sum().backward()
    assert torch.equal(traced.bn.running_mean, net.bn.running_mean)
    assert not any("bn" in name for name, p in traced.named_parameters() if p.grad is not None)


def test_parts_that_are_not_called_may_have_any_precision():
    net = Base()
    net.teacher = nn.Conv2d(3, 2, 1).half()
    trace(net)
    kept = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    kept[1].running_mean = kept[1].running_mean.double()
    with pytest.raises(QatTricksError, match=r'"1.running_mean" is in float64'):
        trace(kept)
    trace(kept, untraced=["1"])


@pytest.mark.parametrize("inputs", [1, 2])
def test_inputs_need_names(inputs):
    class Nameless(Base):
        def forward(self, *images):
            return super().forward(sum(images))

    batch = (torch.randn(4, 3, 8, 8),) * inputs
    with pytest.raises(QatTricksError, match=r"takes \*images, which does not tell its inputs"):
        qat_tricks.quantize(Nameless(), [batch if inputs > 1 else batch[0]])
