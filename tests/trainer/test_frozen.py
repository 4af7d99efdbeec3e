"""What the user froze stays frozen: parameters without gradients, BatchNorms' statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

import qat_tricks
from qat_tricks.graph import activation_quantizers, layers
from qat_tricks.recipes.recipe import load_recipe
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, differences, trainer

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
UNFOLDED = [
    "~stages.ptq.tricks.fold_batchnorm",
    "~stages.ptq.tricks.equalize",
    "~stages.ptq.tricks.correct_bias",
]


# The BatchNorms by the layers that they belong to once the network is quantized.
LAYER_OF = {
    "stem.1": "stem.0",
    "block.bn1": "block.conv1",
    "block.bn2": "block.conv2",
    "depthwise.1": "depthwise.0",
}
OWN = {f"{layer}.batchnorm.{kind}" for layer in LAYER_OF.values() for kind in ("weight", "bias")}


class Start(pl.Callback):
    """Keeps the state from when training begins."""

    def on_train_start(self, trainer, pl_module):
        self.state = copy.deepcopy(dict(pl_module.backbone.state_dict()))


def moved(start, lit):
    """The names of what training has changed."""
    names = differences(start.state, dict(lit.backbone.state_dict()))
    return {name.removeprefix(".") for name in names}


def of_all(lit):
    return SGD(lit.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def of_those_that_train(lit):
    return SGD([p for p in lit.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


def made_before(lit):
    return lit.early


class Frozen(Lit):
    """Freezes the parameters of its network of which ``freezes`` is true."""

    def __init__(self, make, freezes):
        super().__init__()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not freezes(name))
        self.make, self.early = make, of_those_that_train(self)

    def configure_optimizers(self):
        return self.make(self)


def fit(lit, recipe, overrides=(), **settings):
    start = Start()
    callbacks = [*qat_tricks.recipe(recipe, list(overrides)), start]
    trainer(callbacks, **settings).fit(lit.train(), datamodule=Data())
    return start


@pytest.mark.feature("a frozen part stays frozen: weights, folded biases, scales")
@pytest.mark.parametrize("recipe", ["int8_qat", "w4a4_qat"])
@pytest.mark.parametrize("make", [of_all, of_those_that_train, made_before])
def test_a_frozen_backbone_stays_as_it_is(recipe, make):
    lit = Frozen(make, lambda name: not name.startswith("head"))
    start = fit(lit, recipe)
    # no scale either: what the head computes has no quantizer, and its 8 bits no scale of their own
    assert moved(start, lit) == {"head.weight", "head.bias"}
    frozen = {name for name, p in lit.backbone.named_parameters() if not p.requires_grad}
    assert {f"{name}.bias" for name in layers(lit.backbone)} - frozen == {"head.bias"}


@pytest.mark.parametrize("make", [of_all, of_those_that_train, made_before])
def test_where_only_batchnorms_train_biases_do_and_weights_do_not(make):
    """A folded BatchNorm's factor is in the weight, which is frozen; its shift is the bias."""

    def is_conv_of_a_batchnorm(name):
        return name in (
            "stem.0.weight",
            "block.conv1.weight",
            "block.conv2.weight",
            "depthwise.0.weight",
            "depthwise.0.bias",
        )

    lit = Frozen(make, is_conv_of_a_batchnorm)
    start = fit(lit, "int8_qat", ["~stages.qat.tricks.restore_batchnorm"], max_epochs=3)
    assert not any(is_conv_of_a_batchnorm(n) for n in moved(start, lit) if n.endswith("weight"))
    biases = {"stem.0.bias", "block.conv1.bias", "block.conv2.bias"}
    # its own bias is in no optimizer that holds only what trained, so that it stays out
    biases |= {"depthwise.0.bias"} if make is not made_before else set()
    assert biases <= moved(start, lit)
    lit = Frozen(make, is_conv_of_a_batchnorm)
    names = moved(fit(lit, "int8_qat", max_epochs=3), lit)
    assert not any(is_conv_of_a_batchnorm(n) for n in names)
    assert names >= OWN  # given back, with their gains


def test_where_batchnorms_are_frozen_weights_train_and_folded_biases_do_not():
    lit = Frozen(of_all, lambda name: ".bn" in name or name.startswith("stem.1"))
    start = fit(lit, "int8_qat")
    names = moved(start, lit)
    assert {"stem.0.weight", "block.conv1.weight", "depthwise.0.batchnorm.bias"} <= names
    assert {n for n in OWN if n.startswith("depthwise")} == OWN & names


def test_scales_between_frozen_and_trained_layers():
    lit = Frozen(of_all, lambda name: not name.startswith(("head", "block")))
    fit(lit, "w4a4_qat")
    learned = {n for n, q in activation_quantizers(lit.backbone).items() if q.scale.requires_grad}
    # those that the block computes; its last one rounds a sum, of which one term is trained
    names = ("block_relu", "block_conv2", "block_relu_1")
    assert learned == {f"activation_quantizers.{name}" for name in names}


def hold(lit):
    """Puts the BatchNorms of the block into evaluation mode, as users freeze statistics."""
    lit.train()
    lit.backbone.train()
    for module in lit.backbone.block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return lit


def statistics(lit):
    return {
        key: value.clone() for key, value in lit.backbone.state_dict().items() if "running" in key
    }


def in_a_fit(lit, recipe):
    trainer([qat_tricks.trainer.session.Session(recipe.tricks)]).fit(lit, datamodule=Data())


def in_stages(lit, recipe):
    def evaluate(stage, network):
        network.eval()

    qat_tricks.run_stages(lit, Data(), recipe, trainer=QUIET, after_stage=evaluate)


@pytest.mark.feature("BatchNorms held in evaluation mode keep their statistics")
@pytest.mark.parametrize("run", [in_a_fit, in_stages])
@pytest.mark.parametrize(
    "freeze",
    [[], ["+trick@recipe.stages.qat.tricks=freeze_batchnorm"]],
    ids=["", "freeze_batchnorm"],
)
def test_batchnorms_that_are_held_in_evaluation_mode_stay_so(run, freeze):
    lit = hold(Lit())
    before = {}
    for key, value in statistics(lit).items():
        batchnorm, _, statistic = key.rpartition(".")
        before[f"{LAYER_OF[batchnorm]}.batchnorm.{statistic}"] = value
    late = ["stages.qat.tricks.freeze_batchnorm.start=1.0"] if freeze else []
    run(lit, load_recipe("int8_qat", [*UNFOLDED, *freeze, *late, "stages.qat.epochs=2"]))
    after = differences(before, statistics(lit))
    assert after == [f".{key}" for key in before if not key.startswith("block")]
    assert len(after) == 4


class WithoutGradients(nn.Module):
    """The first part is run under ``torch.no_grad()``, and nothing is frozen by hand."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Linear(8, 10)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        with torch.no_grad():
            features = torch.relu(self.bn(self.stem(x))).mean((2, 3))
        return self.head(features)


def test_a_part_that_forward_runs_under_no_grad_is_not_trained():
    lit, start = Lit(), Start()
    lit.backbone = WithoutGradients()
    lit.configure_optimizers = lambda: SGD(lit.parameters(), lr=0.1)
    callbacks = [*qat_tricks.recipe("int8_qat"), start]
    trainer(max_epochs=1, callbacks=callbacks).fit(lit, Data())
    changed = moved(start, lit)
    assert "head.weight" in changed
    # Statistics move, as those of the float network do.
    parameters = dict(lit.backbone.named_parameters())
    assert not any(name.startswith("stem") for name in changed & parameters.keys())
