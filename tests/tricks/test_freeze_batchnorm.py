import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.tricks import FreezeBatchnorm, fold_batchnorm, freeze_batchnorm
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import images, small_net

# The network stays unfolded; what works on folded layers only is left out.
UNFOLDED = [
    "~stages.ptq.tricks.fold_batchnorm",
    "~stages.ptq.tricks.equalize",
    "~stages.ptq.tricks.correct_bias",
    "+trick@recipe.stages.qat.tricks=freeze_batchnorm",
]
BATCHES, EPOCHS = 4, 2


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def statistics(network):
    return torch.cat([torch.cat([norm.running_mean, norm.running_var]) for norm in norms(network)])


def test_frozen_statistics_hold_still_and_train_thaws_them():
    traced = trace(small_net()).train()
    before = statistics(traced)
    assert freeze_batchnorm(traced) == len(norms(traced)) == 4
    traced(images())
    assert torch.equal(statistics(traced), before)
    assert traced.training  # dropout goes on
    traced.train()(images())
    assert not torch.equal(statistics(traced), before)


def test_gains_and_biases_go_on_learning():
    traced = trace(small_net()).train()
    freeze_batchnorm(traced)
    traced(images()).square().sum().backward()
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms(traced))
    assert all(norm.bias.grad.abs().sum() > 0 for norm in norms(traced))


def test_a_network_without_batchnorms_is_refused():
    traced = trace(small_net())
    fold_batchnorm(traced)
    with pytest.raises(QatTricksError, match="no BatchNorm is left to freeze"):
        freeze_batchnorm(traced)


@pytest.mark.parametrize("start", [-0.1, 1.1])
def test_the_start_is_a_fraction(start):
    with pytest.raises(QatTricksError, match=f"start={start} is not allowed"):
        FreezeBatchnorm(start=start)


class Watch(pl.Callback):
    """Notes after each batch whether the statistics have moved."""

    def __init__(self):
        self.moved, self.weights_moved = [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.before = statistics(pl_module.backbone).clone()
        self.weight = pl_module.backbone.head.weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.moved.append(not torch.equal(self.before, statistics(pl_module.backbone)))
        self.weights_moved.append(not torch.equal(self.weight, pl_module.backbone.head.weight))


def fit(start):
    lit, watch = Lit().train(), Watch()
    recipe = qat_tricks.recipe(
        "int8_qat", [*UNFOLDED, f"stages.qat.tricks.freeze_batchnorm.start={start}"]
    )
    trainer([*recipe, watch], max_epochs=EPOCHS).fit(lit, datamodule=Data())
    assert len(norms(lit.backbone)) == 4
    assert watch.weights_moved == [True] * BATCHES * EPOCHS
    return watch.moved


@pytest.mark.parametrize(("start", "moving"), [(0.0, 0), (0.25, 2), (0.5, 4), (0.75, 6), (1.0, 8)])
def test_in_a_fit_statistics_move_until_the_start_and_hold_still_after_it(start, moving):
    """Between its epochs Lightning validates and puts the network back into training mode."""
    assert fit(start) == [True] * moving + [False] * (BATCHES * EPOCHS - moving)


def test_a_recipe_that_folds_is_told_before_it_trains():
    freeze = "+trick@recipe.stages.qat.tricks=freeze_batchnorm"
    recipe = qat_tricks.recipe("int8_qat", [freeze, "~stages.qat.tricks.restore_batchnorm"])
    with pytest.raises(QatTricksError, match="no BatchNorm is left to freeze"):
        trainer(recipe).fit(Lit().train(), datamodule=Data())


def test_restored_batchnorms_are_frozen_too():
    lit = Lit().train()
    recipe = qat_tricks.recipe(
        "int8_qat",
        [
            "+trick@recipe.stages.qat.tricks=freeze_batchnorm",
            "stages.qat.tricks.freeze_batchnorm.start=0",
        ],
    )
    watch = Watch()
    trainer([*recipe, watch], max_epochs=1).fit(lit, datamodule=Data())
    assert len(norms(lit.backbone)) == 4
    assert watch.moved == [False] * BATCHES


def test_statistics_that_were_frozen_are_not_estimated_anew():
    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                self.after_one = statistics(pl_module.backbone).clone()

    lit, note = Lit().train(), Note()
    freeze = [
        "+trick@recipe.stages.qat.tricks=freeze_batchnorm",
        "stages.qat.tricks.freeze_batchnorm.start=0.25",
    ]
    trainer([note, *qat_tricks.recipe("int8_qat", freeze)], max_epochs=1).fit(
        lit, datamodule=Data()
    )
    assert torch.equal(statistics(lit.backbone), note.after_one)
