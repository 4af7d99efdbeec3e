import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, spec_of, trace
from qat_tricks.tricks import LearnScales, calibrate, learn_scales, quantize
from qat_tricks.tricks.learn_scales import first_not_finite
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, loader, trainer
from tests.helpers.nets import images, small_net


def calibrated(weight_bits=8):
    traced = quantize(trace(small_net()), weight_bits=weight_bits, first_last_bits=None)
    return calibrate(traced, [images()])


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_scales_of_activations_learn_and_of_weights_that_have_their_own(weight_bits):
    traced = calibrated(weight_bits)
    scales = learn_scales(traced)
    quantizers = activation_quantizers(traced)
    learned = {name for name, quantizer in quantizers.items() if quantizer.scale.requires_grad}
    assert learned == quantizers.keys() - {"activation_quantizers.x"}  # images do not change
    of_weights = [layer.weight_quantizer.scale for layer in layers(traced).values()]
    own = [scale for scale in of_weights if scale is not None]
    assert len(own) == (0 if weight_bits == 8 else len(layers(traced)))
    assert {id(scale) for scale in scales} == {
        id(p) for name, p in traced.named_parameters() if "scale" in name and p.requires_grad
    }
    assert len(scales) == len(learned) + len(own)


def test_the_spec_says_which_scales_learn():
    traced = calibrated(4)
    learn_scales(traced)
    spec = spec_of(traced)
    silent = {name for name, settings in spec["activations"].items() if "learned" not in settings}
    assert silent == {"x"}
    assert all(settings["learned"] for settings in spec["layers"].values())


@pytest.mark.parametrize("make", [lambda: trace(small_net()), lambda: quantize(trace(small_net()))])
def test_scales_without_a_range_are_refused(make):
    with pytest.raises(QatTricksError, match="only from a range: quantize and calibrate first"):
        learn_scales(make())


@pytest.mark.parametrize("lr_factor", [0.0, -1.0])
def test_the_factor_is_above_0(lr_factor):
    with pytest.raises(QatTricksError, match=f"lr_factor={lr_factor} is not allowed"):
        LearnScales(lr_factor=lr_factor)


def test_what_is_no_number_is_named_scales_first():
    traced = calibrated()
    assert first_not_finite(traced) is None
    with torch.no_grad():
        traced.get_submodule("left").weight[0] = torch.nan
    assert first_not_finite(traced) == "the weight of left"
    with torch.no_grad():
        activation_quantizers(traced)["activation_quantizers.relu"].scale.fill_(torch.inf)
    assert first_not_finite(traced) == "the scale of activation_quantizers.relu"


class Gradients(pl.Callback):
    """Notes the gradients of the scales before the first step."""

    def __init__(self):
        self.of = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.of:
            for name, p in pl_module.named_parameters():
                if name.endswith("scale") and p.grad is not None:
                    self.of[name] = p.grad.clone()


@pytest.mark.parametrize("accumulated", [1, 4])
def test_scales_gradients_shrink_by_the_root_of_the_batches_in_a_step(accumulated):
    """LSQ's factor is that of one batch, and Lightning averages over the batches of a step."""
    recipe, noted = qat_tricks.recipe("int8_qat"), Gradients()
    fitted, twin = Lit().train(), Lit().train()
    for lit in (fitted, twin):
        lit.backbone.dropout.p = 0.0
    settings = {"max_steps": 1, "max_epochs": 1, "accumulate_grad_batches": accumulated}
    trainer([*recipe, noted], **settings).fit(fitted, datamodule=OrderedData())
    # the same by hand, where no hook of the callback divides a gradient
    trainer(qat_tricks.recipe("int8_qat")).validate(twin, OrderedData(), verbose=False)
    for batch in list(loader(64))[:accumulated]:
        (twin.train().training_step(batch, 0) / accumulated).backward()
    assert len(noted.of) >= len(activation_quantizers(twin.backbone)) - 1
    for name, gradient in noted.of.items():
        expected = twin.get_parameter(name).grad / accumulated**0.5
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_scales_have_a_group_without_weight_decay(optimizer):
    lit = Lit(optimizer).train()
    run = trainer(qat_tricks.recipe("w4a4_qat"), max_epochs=1)
    run.fit(lit, datamodule=Data())
    (made,) = run.optimizers
    everything = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in lit.parameters()})  # each exactly once
    scales = [
        p for name, p in lit.named_parameters() if name.endswith(".scale") and p.requires_grad
    ]
    group = made.param_groups[-1]
    assert {id(p) for p in scales} <= {id(p) for p in group["params"]}
    assert all(p.numel() < 100 for p in group["params"])
    assert group["weight_decay"] == 0
    assert made.param_groups[0]["weight_decay"] == 0.1
    if optimizer == "sgd":  # the schedule goes on for both groups
        assert group["lr"] == pytest.approx(0.1 * made.param_groups[0]["lr"])
        assert made.param_groups[0]["lr"] < 0.01
    else:
        assert group["lr"] == pytest.approx(1e-5)


def test_scales_learn():
    lit = Lit().train()
    trainer(qat_tricks.recipe("int8_ptq")).validate(lit, Data(), verbose=False)
    before = {name: q.scale.item() for name, q in activation_quantizers(lit.backbone).items()}
    lit = Lit().train()
    trainer(qat_tricks.recipe("int8_qat")).fit(lit, datamodule=Data())
    after = {name: q.scale.item() for name, q in activation_quantizers(lit.backbone).items()}
    # the image's stays
    assert after["activation_quantizers.x"] == before["activation_quantizers.x"]
    assert sum(after[name] != before[name] for name in before) >= len(before) - 1


class Scales(pl.Callback):
    """Notes after each step which scales have moved."""

    def __init__(self):
        self.moved, self.before = [], None

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.before = self.of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.moved.append(not torch.equal(self.before, self.of(pl_module)))

    def of(self, pl_module):
        named = pl_module.named_parameters()
        return torch.cat([p.detach().flatten() for name, p in named if name.endswith(".scale")])


@pytest.mark.parametrize(("stop", "moving"), [(0.0, 0), (0.7, 6), (1.0, 8)])
def test_scales_hold_still_in_the_last_part_whatever_momentum_they_have(stop, moving):
    watch = Scales()
    recipe = qat_tricks.recipe("w4a8_qat", [f"stages.qat.tricks.learn_scales.stop={stop}"])
    trainer([*recipe, watch]).fit(Lit().train(), datamodule=Data())
    assert watch.moved == [True] * moving + [False] * (8 - moving)


def test_the_stop_is_a_fraction():
    with pytest.raises(QatTricksError, match=r"stop=1\.5 is not allowed"):
        LearnScales(stop=1.5)


class OnlyInEvaluation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.last = small_net(), torch.nn.Linear(10, 10)

    def forward(self, x):
        y = self.net(x)
        return self.last(y) if self.training else self.last(y * 2 + y)


def test_scales_that_training_does_not_pass_are_not_learned():
    """Several processes would wait for their gradients."""
    torch.manual_seed(0)
    quantized = qat_tricks.quantize(OnlyInEvaluation(), [images(16)])
    scales = learn_scales(quantized)
    quantized.train()(images()).square().sum().backward()
    assert len(scales) > 5
    assert all(scale.grad is not None for scale in scales)
