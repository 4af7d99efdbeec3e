"""The network in a LightningModule: found, or named where there are several."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, spec_of
from qat_tricks.graph.layers import LAYER_OF
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.module import (
    CHECKPOINT_KEY,
    attach_workbench,
    describe,
    find_network,
    has_workbench,
    workbench_of,
)
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import images


class Two(Lit):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)


def test_several_networks_are_listed_and_one_can_be_named():
    assert find_network(Lit()) == "backbone"
    with pytest.raises(
        QatTricksError, match=r'"backbone" \(SmallNet\), "head" \(Linear\).*network=NAME'
    ):
        trainer(qat_tricks.recipe("int8_ptq")).validate(Two(), Data(), verbose=False)
    two = Two()
    trainer(qat_tricks.recipe("int8_ptq", ["network=backbone"])).validate(
        two, Data(), verbose=False
    )
    assert layers(two.backbone)
    with pytest.raises(QatTricksError, match='no submodule "bone"'):
        find_network(Two(), "bone")


class Own(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = 3


def test_a_network_under_work_is_in_its_place_and_described_in_a_checkpoint():
    lit = Own()
    assert not has_workbench(lit)
    work = Workbench(lit.backbone)
    assert attach_workbench(lit, work, "backbone") is workbench_of(lit) is work
    assert has_workbench(lit)
    assert lit.backbone is work.network
    work.applied.append("prune")
    checkpoint = {}
    lit.on_save_checkpoint(checkpoint)
    assert checkpoint["own"] == 3  # the module's own hook
    assert checkpoint[CHECKPOINT_KEY] == describe(lit)
    assert checkpoint[CHECKPOINT_KEY]["network"] == "backbone"
    saved = checkpoint[CHECKPOINT_KEY]["spec"]
    work.applied.append("distill")
    assert saved["applied"] == ["prune"]  # as it was when it was saved
    assert spec_of(lit.backbone)["applied"] == ["prune", "distill"]


def test_the_users_own_object_is_the_quantized_network():
    lit = Lit()
    lit.alias, held = lit.backbone, [lit.backbone]
    trainer(qat_tricks.recipe("int8_qat"), max_epochs=1).fit(lit.train(), datamodule=Data())
    assert lit.alias is lit.backbone is held[0] is workbench_of(lit).network
    assert torch.equal(held[0].eval()(images()), lit.backbone(images()))
    assert not [key for key in lit.state_dict() if "bn" in key]


def test_masks_on_every_layer_are_taken_over_and_keep_their_zeros():
    lit = Lit()
    weights = [(m, "weight") for m in lit.backbone.modules() if type(m) in LAYER_OF]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.5)
    zeros = {n: m.weight == 0 for n, m in lit.backbone.named_modules() if type(m) in LAYER_OF}
    trainer(qat_tricks.recipe("int8_qat"), max_epochs=1).fit(lit.train(), datamodule=Data())
    for name, layer in layers(lit.backbone).items():
        assert bool((layer.effective_weight()[zeros[name]] == 0).all()), name


def test_a_hook_that_prepares_the_input_is_calibrated_behind_it_once():
    class Raw(Lit):
        def training_step(self, batch, index):
            return super().training_step((batch[0] * 0.02 + 20, batch[1]), index)

    lit, plain = Raw(), Lit()  # whose own forward halves its input
    lit.backbone.register_forward_pre_hook(lambda module, args: ((args[0] - 10) / 0.02,))
    for module in (lit, plain):
        trainer(qat_tricks.recipe("int8_ptq", ["prove=false"])).validate(
            module, Data(), verbose=False
        )
    scale, expected = (
        float(next(iter(activation_quantizers(module.backbone).values())).scale)
        for module in (lit, plain)
    )
    assert scale == pytest.approx(expected, rel=1e-3)
