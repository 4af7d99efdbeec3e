import pytest

from qat_tricks.graph import layers, place_quantizers, trace
from qat_tricks.graph.modes import evaluating, float_mode, unrounded_sums
from tests.helpers.nets import small_net


def test_each_module_gets_its_own_mode_back_also_after_an_error():
    first, second = small_net().train(), small_net()
    first.block.bn1.eval()  # as a user freezes it
    modes = {name: module.training for name, module in first.named_modules()}

    def fail_while_evaluating():
        with evaluating(first, second):
            assert not any(module.training for module in first.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_evaluating()
    assert {name: module.training for name, module in first.named_modules()} == modes
    assert not second.training


def test_quantizers_and_rounding_are_as_before_after_a_block():
    traced = place_quantizers(trace(small_net()))
    head = traced.get_submodule("head")
    head.weight_quantizer.enabled = False
    with float_mode(traced):
        assert not any(layer.is_quantizing for layer in layers(traced).values())
    assert [layer.is_quantizing for layer in layers(traced).values()].count(False) == 1
    with unrounded_sums(traced):
        assert not head.rounds
    assert head.rounds
