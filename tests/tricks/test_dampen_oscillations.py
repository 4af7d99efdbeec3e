import math

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.tricks import DampenOscillations, calibrate, dampen_oscillations, learn_scales
from qat_tricks.tricks import quantize as place
from qat_tricks.tricks.dampen_oscillations import Track, low_bit_layers
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, differences, loader, trainer
from tests.helpers.nets import images, small_net

ADD = "+trick@recipe.stages.qat.tricks=dampen_oscillations"
ADD_BOTH = "+trick@recipe.stages.qat.tricks=[dampen_oscillations,prune]"
PLACE = "stages.qat.tricks.dampen_oscillations"
# So that weights are frozen within a dozen steps.
EAGER = [f"{PLACE}.momentum=0.05", f"{PLACE}.threshold=0.06", f"{PLACE}.first_threshold=0.1"]


def quantized(weight_bits=4):
    traced = place(trace(small_net()), weight_bits=weight_bits, first_last_bits=None)
    calibrate(traced, [images()])
    learn_scales(traced)
    return traced


def integers(layer):
    """The integers that an exported file would have."""
    weight = layer.deployed_weight()
    return torch.round(layer.effective_weight() / layer.weight_scale(weight)).detach()


def factored(layer):
    """``layer`` with pruned weights and factors of equalization."""
    layer.weight_mask = (torch.rand_like(layer.weight) > 0.3).float()
    layer.weight_factor = 0.5 + torch.rand_like(layer.weight)
    return layer


def test_the_pull_is_the_gradient_of_the_added_loss():
    torch.manual_seed(0)
    layer = factored(layers(quantized())["left"])
    layer.weight.data *= 1.5  # some are clipped
    with torch.no_grad():
        on_grid = layer.weight_quantizer(layer.masked_weight())
        scale = layer.weight_quantizer.scale
        scheme = layer.weight_quantizer.scheme
        low, high = scale * scheme.qmin, scale * scheme.qmax
    weight = layer.masked_weight()
    clipped = torch.minimum(torch.maximum(weight, low), high)
    assert bool((clipped != weight).any())
    (0.3 * (clipped - on_grid).square().sum()).backward()
    expected = layer.weight.grad.clone()
    layer.weight.grad = torch.ones_like(layer.weight)
    dampen_oscillations([layer], 0.3)
    torch.testing.assert_close(layer.weight.grad, 1 + expected)
    assert expected.abs().max() > 0


def test_steps_along_the_pull_lead_to_the_middle_of_the_steps_and_change_no_integer():
    layer = layers(quantized())["right"]
    before = integers(layer)
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)

    scheme = layer.weight_quantizer.scheme
    inside = before.abs() < scheme.qmax  # the others may be clipped, and are not pulled

    @torch.no_grad()
    def distance():
        apart = layer.weight - layer.weight_quantizer(layer.weight)
        return float(apart[inside].abs().max())

    first = distance()
    for _ in range(30):
        layer.weight.grad = torch.zeros_like(layer.weight)
        dampen_oscillations([layer], 1.0)
        optimizer.step()
    assert distance() < 0.01 * first
    assert torch.equal(integers(layer), before)


def followed_by_hand(steps, threshold, momentum):
    """The integers of one weight as the paper's algorithm 1 gives them, and when it was frozen."""
    before, direction, frequency, average, kept = steps[0], 0, 0.0, float(steps[0]), None
    seen = []
    for given in steps[1:]:
        now = given if kept is None else kept
        change = (now > before) - (now < before)
        frequency += momentum * ((change * direction == -1) - frequency)
        average += momentum * (now - average)
        direction = change or direction
        if kept is None and frequency > threshold:
            kept = now = round(average)
        before = now
        seen.append(now)
    return seen


@pytest.mark.parametrize("has_factor", [False, True])
def test_freezing_is_the_papers_algorithm_whatever_the_scale_does(has_factor):
    torch.manual_seed(0)
    layer = layers(quantized())["right"]
    if has_factor:
        layer.weight_factor = 0.5 + torch.rand_like(layer.weight)
    count = layer.weight.numel()
    # Some weights stay, others walk, and others go to and fro more or less often.
    random = torch.rand(40, count)
    often = torch.linspace(0, 1, count)
    wanted = (random < often).float() * torch.randint(-1, 3, (40, count))

    def put(integer):
        weight = (integer.view_as(layer.weight) + 0.3 * torch.rand_like(layer.weight)) * scale
        layer.weight.data.copy_(weight / (layer.weight_factor if has_factor else 1))

    scale = layer.weight_quantizer.scale.data
    put(wanted[0])
    track, seen = Track.of([layer]), []
    for given in wanted[1:]:
        scale.mul_(1.02)  # in place, as a step of the optimizer
        put(given)
        track.follow([layer], 0.2, 0.1)
        seen.append(integers(layer).flatten())
    for place_of, found in enumerate(torch.stack(seen, 1).tolist()):
        by_hand = followed_by_hand(wanted[:, place_of].tolist(), 0.2, 0.1)
        assert found == by_hand, place_of
    assert 0.2 < float(track.frozen.float().mean()) < 0.95


def test_pruned_weights_are_let_go():
    layer = layers(quantized())["right"]
    track = Track.of([layer])
    track.frozen[:] = True
    first = layer.weight[0].numel()
    layer.weight_mask = torch.zeros_like(layer.weight)
    layer.weight_mask[0] = 1
    layer.weight.data.mul_(layer.weight_mask)
    track.follow([layer], 0.1, 0.01)
    assert bool(track.frozen[:first].all())
    assert not bool(track.frozen[first:].any())
    assert not bool(layer.weight[1:].any())


def test_weights_of_8_bits_are_left_alone_and_a_network_of_them_is_refused():
    traced = place(trace(small_net()), weight_bits=4, first_last_bits=8)
    calibrate(traced, [images()])
    assert 0 < len(low_bit_layers(traced)) < len(layers(traced))
    with pytest.raises(QatTricksError, match="no layer has weights of 4 bits or less"):
        low_bit_layers(quantized(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "damp"}, 'unknown method "damp"'),
        ({"weight": 0.0}, "weight=0.0 is not allowed"),
        ({"weight": math.nan}, "weight=nan is not allowed"),
        ({"threshold": 0.005}, "momentum=0.01, threshold=0.005"),
        ({"threshold": 0.5}, "threshold=0.5, first_threshold=0.1 is not allowed"),
    ],
)
def test_settings_are_checked_when_made(settings, message):
    with pytest.raises(QatTricksError, match=message):
        DampenOscillations(**settings)


class Restless(Lit):
    """Steps so long that weights go to and fro."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.4, momentum=0.5)


def fit(seed=0, ckpt_path=None, folder=None, overrides=(ADD,), extra=(), **settings):
    pl.seed_everything(11, verbose=False)
    lit = Restless(seed=seed).train()
    # Weights that least squares has rounded lie on their integers, and hardly oscillate.
    recipe = qat_tricks.recipe("w4a4_qat", ["~stages.ptq.tricks.gptq", *overrides, *EAGER])
    if folder is not None:
        keep = pl.callbacks.ModelCheckpoint(
            dirpath=folder, save_top_k=-1, every_n_train_steps=1, filename="{step}"
        )
        extra = [*extra, keep]
    run = trainer(
        [*recipe, *extra], max_epochs=6, enable_checkpointing=folder is not None, **settings
    )
    run.fit(lit, ResumableLoader(), loader(32, seed=4), ckpt_path=ckpt_path)
    (trick,) = (callback for callback in recipe if isinstance(callback, DampenOscillations))
    return lit, trick


@pytest.mark.parametrize(("method", "accumulated"), [("both", 1), ("freeze", 2)])
def test_a_run_that_was_stopped_in_an_epoch_ends_as_the_one_that_was_not(
    tmp_path, method, accumulated
):
    settings = {
        "overrides": [ADD, f"{PLACE}.method={method}"],
        "accumulate_grad_batches": accumulated,
    }
    lit, trick = fit(folder=tmp_path, **settings)
    step = 13 if accumulated == 1 else 7
    known = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for name, state in known.items() if "DampenOscillations" in name)
    count = sum(int(track["frozen"].sum()) for track in state.values())
    assert 0 < count < sum(int(track.frozen.sum()) for track in trick._tracks.values())
    again, resumed = fit(seed=5, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
    assert differences(lit.state_dict(), again.state_dict()) == []
    assert differences(trick.state_dict(), resumed.state_dict()) == []


def test_frozen_integers_are_those_that_are_deployed_beside_pruning():
    """Of layers with a BatchNorm of their own, and of such as have none."""
    lit, trick = fit(overrides=[ADD_BOTH, "stages.qat.tricks.prune.end=0.9"])
    lit.eval()
    assert {layer.batchnorm is None for layer in layers(lit.backbone).values()} == {True, False}
    frozen = 0
    for name, layer in low_bit_layers(lit.backbone).items():
        track = trick._tracks[name]
        kept = track.frozen.view_as(layer.weight) & (layer.weight_mask != 0)
        sign = 1.0
        if layer.batchnorm is not None:  # a negative gain turns the deployed weight around
            sign = layer.of_channels(layer.normalization().sign()).float()
        found = integers(layer) * sign
        assert torch.equal(found[kept], track.integers.view_as(layer.weight).float()[kept]), name
        frozen += int(kept.sum())
    assert frozen > 10
    assert not lit.trainer.optimizers[0]._optimizer_step_post_hooks  # nobody follows any more


def test_the_pull_grows_with_the_training():
    class Watch(pl.Callback):
        """Notes the weights and their gradients before each step."""

        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append(low_bit_layers(pl_module.backbone)["left"].weight.grad.clone())

    class Still(Lit):
        """Learns nothing, from the same images in each step."""

        def training_step(self, batch, index):
            return 0 * super().training_step(batch, index)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    lit, watch = Still().train(), Watch()
    overrides = [ADD, f"{PLACE}.method=dampen", f"{PLACE}.weight=0.5"]
    trainer(
        [*qat_tricks.recipe("w4a8_qat", [*overrides, "~stages.qat.tricks.distill"]), watch]
    ).fit(lit, datamodule=Data())
    layer = low_bit_layers(lit.backbone)["left"]
    layer.weight.grad = torch.zeros_like(layer.weight)
    dampen_oscillations([layer], 0.5)
    assert layer.weight.grad.abs().max() > 0
    for step, gradient in enumerate(watch.seen):
        expected = layer.weight.grad * (1 - math.cos(math.pi * step / 8)) / 2
        torch.testing.assert_close(gradient, expected)
