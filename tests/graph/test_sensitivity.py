from contextlib import contextmanager

import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, trace
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.sensitivity import Change, errors_alone, measure_sensitivity
from qat_tricks.tricks import calibrate, fold_batchnorm, gptq, quantize
from tests.helpers.nets import images, small_net


def quantized():
    traced = trace(small_net())
    fold_batchnorm(traced)
    quantize(traced, weight_bits=4, first_last_bits=None)
    return calibrate(traced, [images(64)])


def test_each_part_is_measured_with_all_others_in_float():
    traced, batches = quantized(), [images(20, seed=3), images(9, seed=4)]
    measured = measure_sensitivity(traced, batches)
    quantizers = {
        **{name: layer.weight_quantizer for name, layer in layers(traced).items()},
        **{name.partition(".")[2]: q for name, q in activation_quantizers(traced).items()},
    }
    assert {part.name for part in measured.parts} == set(quantizers)
    # Whole passes, in the place of those that begin where the part is.
    for part in measured.parts:
        with torch.no_grad(), float_mode(traced):
            expected = torch.cat([traced(batch) for batch in batches])
            quantizers[part.name].enabled = True
            output = torch.cat([traced(batch) for batch in batches])
        assert part.error == output_error(expected, output)
        assert part.error.kl > 0
    assert measured.together == output_error(expected, torch.cat([traced(b) for b in batches]))
    assert measured.images == 29
    errors = [part.error.kl for part in measured.parts]
    assert errors == sorted(errors, reverse=True)


def test_weights_that_were_put_on_their_grid_are_told_apart():
    traced = quantized()
    assert not any(part.is_rounded for part in measure_sensitivity(traced, [images(8)]).parts)
    reference = trace(small_net())
    fold_batchnorm(reference)
    gptq(traced, reference, [images(64)])
    parts = measure_sensitivity(traced, [images(8)]).parts
    assert {part.name for part in parts if part.is_rounded} == set(layers(traced))
    assert all(part.error.kl == 0 for part in parts if part.is_rounded)


def test_the_network_stays_as_it_is_and_the_figures_repeat():
    traced = quantized().train()
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    state = torch.get_rng_state()
    first = measure_sensitivity(traced, [images(8)])
    assert measure_sensitivity(traced, [images(8)]) == first
    assert traced.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(q.enabled for q in activation_quantizers(traced).values())
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())


def test_a_value_that_is_changed_in_place_is_changed_for_one_run_only():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            return (x.mul_(3) + y).mean([2, 3])

    traced = trace(InPlace().eval())

    @contextmanager
    def nothing():
        yield

    changes = [Change(module=name, applied=nothing) for name in ("first", "second", "second")]
    _, errors = errors_alone(traced, [images(4)], changes, "test")
    assert [error.sqnr_db for error in errors] == [200, 200, 200]


def test_refusals_tell_what_is_missing():
    with pytest.raises(QatTricksError, match="quantize the network first"):
        measure_sensitivity(trace(small_net()), [images(2)])
    with pytest.raises(QatTricksError, match="no images"):
        measure_sensitivity(quantized(), [])
    change = Change(module="nowhere", applied=lambda: None)
    with pytest.raises(QatTricksError, match="does not call nowhere"):
        errors_alone(trace(small_net()), [images(2)], [change], "test")
