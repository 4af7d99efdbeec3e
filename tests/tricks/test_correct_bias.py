import copy

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.tricks import calibrate, correct_bias, fold_batchnorm, quantize
from qat_tricks.tricks.correct_bias import _certain, bias_error
from tests.helpers.nets import images, small_net


def _coarse():
    traced = trace(small_net())
    fold_batchnorm(traced)
    reference = copy.deepcopy(traced)
    quantize(traced, weight_bits=3, activation_bits=4)
    return calibrate(traced, [images(64)]), reference


def _means(network, x):
    """The mean of each channel of every conv and linear output."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda m, i, o, name=name: seen.update(
                {name: o.detach().transpose(1, -1).flatten(0, -2).mean(0)}
            )
        )
        for name, module in network.named_modules()
        if hasattr(module, "weight")
        and module.weight is not None
        and not list(module.children())[1:]
    ]
    network.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_channel_means_come_nearer_to_those_in_float_on_the_images_seen():
    traced, reference = _coarse()
    x = images(64)
    expected = _means(reference, x)

    def error():
        return sum(
            float((mean - expected[name]).abs().mean())
            for name, mean in _means(traced, x).items()
            if name in expected
        )

    before = error()
    correct_bias(traced, reference, list(x.split(16)))
    assert error() < 0.5 * before  # not 0: what a ReLU drops does not count


def test_images_not_seen_get_better_too():
    traced, reference = _coarse()
    x = images(256, seed=5)
    before = (traced.eval()(x) - reference(x)).square().mean()
    correct_bias(traced, reference, [images(64)])
    assert (traced(x) - reference(x)).square().mean() < before


def test_only_biases_change():
    traced, reference = _coarse()
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    correct_bias(traced, reference, [images()])
    changed = {
        key for key, value in traced.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed
    assert all(key.endswith(".bias") for key in changed)


def test_an_error_is_corrected_as_far_as_it_is_more_than_chance():
    noise = torch.randn(100, 4, dtype=torch.float64)
    noise -= noise.mean(0)  # the standard error of its mean is 0.1
    errors = torch.tensor([10.0, 0.2, -0.2, 0.01], dtype=torch.float64)
    certain = _certain(errors, noise)
    assert certain[0] == pytest.approx(10.0, rel=1e-3)
    assert certain[1] == pytest.approx(0.2 * (1 - 0.25 * float(noise[:, 1].var())), rel=1e-3)
    assert -0.2 < certain[2] < 0
    assert certain[3] == 0  # nothing but chance
    assert torch.equal(_certain(errors, noise[:1]), errors.float())


def test_what_a_relu_drops_does_not_count():
    # Weights that shrank by a tenth, before a ReLU that drops nearly all of the sums.
    sums = 4 * torch.randn(64, 3, 50) - 6
    shrunk = 0.9 * sums
    error = bias_error(shrunk, sums, 0.0, float("inf"))
    mean = (sums - shrunk).mean((0, 2))
    assert (mean < -0.5).all()
    assert (error > 0).all()  # the other direction

    def squared(bias):
        return ((shrunk + bias[:, None]).relu() - sums.relu()).square().mean()

    assert squared(error) < 0.8 * squared(torch.zeros(3)) < squared(mean)


def test_a_correction_never_errs_more_behind_the_activation_function():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randn(16, 4, 30, generator=generator) * 3
        values = expected + torch.randn(16, 4, 30, generator=generator) + seed - 2
        error = bias_error(values, expected, 0.0, 6.0)[:, None]
        target = expected.clamp(0, 6)
        after = ((values + error).clamp(0, 6) - target).square().mean()
        assert after <= (values.clamp(0, 6) - target).square().mean()


def test_without_an_activation_function_it_is_the_mean_error():
    expected = torch.randn(200, 3, 20)
    error = bias_error(expected - 5, expected, float("-inf"), float("inf"))
    assert torch.allclose(error, torch.tensor(5.0), atol=1e-4)


def test_another_network_as_reference_is_refused():
    traced, _ = _coarse()
    with pytest.raises(QatTricksError, match="reference has no"):
        correct_bias(traced, trace(torch.nn.Identity()), [images()])
    with pytest.raises(QatTricksError, match="no images"):
        correct_bias(traced, traced, [])
