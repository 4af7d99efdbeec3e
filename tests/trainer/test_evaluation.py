"""Evaluation is free of side effects: sanity check, validate, test and predict leave every tensor
and statistic alone.
"""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import qat_tricks
from qat_tricks.graph import activation_quantizers
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe
from tests.helpers.lit import Data, Lit, ResumableLoader, dataset, differences, loader, trainer

UNFOLDED = [
    "~stages.ptq.tricks.fold_batchnorm",
    "~stages.ptq.tricks.equalize",
    "~stages.ptq.tricks.correct_bias",
]


def fitted(recipe, overrides):
    lit = Lit().train()
    run = trainer(qat_tricks.recipe(recipe, overrides), max_epochs=2)
    run.fit(lit, ResumableLoader(), loader(32, seed=4))
    return run, lit


def everything(lit):
    """All tensors, the mode of each module, and what quantizers keep beside their tensors."""
    kept = [
        (q._zero_point, q.enabled, q.observer) for q in activation_quantizers(lit.backbone).values()
    ]
    modes = {name: module.training for name, module in lit.named_modules()}
    return copy.deepcopy([dict(lit.state_dict()), kept, modes, lit.backbone.meta["qat_tricks"]])


@pytest.mark.feature("validate, test and predict, in inference_mode or not, change no tensor")
@pytest.mark.parametrize("inference_mode", [True, False], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("int8_prune50", []), ("w4a4_qat", []), ("int8_qat", UNFOLDED)],
    ids=["int8_prune50", "w4a4_qat", "BatchNorm unfolded"],
)
def test_evaluation_changes_nothing_and_training_goes_on(recipe, overrides, inference_mode):
    _, lit = fitted(recipe, overrides)
    before = everything(lit)
    for method in ("validate", "test", "predict"):
        for callbacks in (qat_tricks.recipe(recipe, overrides), []):
            run = trainer(callbacks, inference_mode=inference_mode)
            data = (
                DataLoader(dataset(32).tensors[0], batch_size=16)
                if method == "predict"
                else loader(32, seed=4)
            )
            getattr(run, method)(lit, data, **({} if method == "predict" else {"verbose": False}))
            assert differences(before, everything(lit)) == []
    assert not any(tensor.is_inference() for tensor in lit.state_dict().values())
    # raises if an inference tensor is saved for a backward
    trainer(max_epochs=1).fit(lit, ResumableLoader())
    assert differences(before[0], dict(lit.state_dict())) != []


@pytest.mark.feature("quantized first in test() under inference_mode, trained afterwards")
def test_a_network_quantized_for_a_test_can_be_trained():
    lit = Lit().train()
    run = trainer(qat_tricks.recipe("int8_ptq"))
    run.test(lit, Data(), verbose=False)
    before = everything(lit)
    trainer(qat_tricks.recipe("int8_qat"), max_epochs=1).fit(lit.train(), datamodule=Data())
    after = dict(lit.state_dict())
    scales = [name for name in before[0] if name.endswith("scale")]
    moved = [name for name in scales if not torch.equal(before[0][name], after[name])]
    assert len(moved) > 3


@pytest.mark.feature("the sanity check and validation in between change no result of training")
def test_validation_during_training_changes_no_result():
    def end(**settings):
        lit = Lit().train()
        torch.manual_seed(0)
        run = trainer(qat_tricks.recipe("int8_prune50"), max_epochs=2, **settings)
        # a loader draws a seed for its workers, from dropout's generator if it has none
        own = torch.Generator()
        run.fit(lit, ResumableLoader(), DataLoader(dataset(32), batch_size=16, generator=own))
        return lit.state_dict()

    plain = end(limit_val_batches=0)
    assert differences(plain, end(num_sanity_val_steps=2, val_check_interval=1)) == []


@pytest.mark.feature("ranges in a trainer are those of the plain function")
def test_a_trainer_calibrates_as_the_plain_function_does():
    lit, plain = Lit(gain=1.0), Lit(gain=1.0)

    class Ordered(Data):
        def train_dataloader(self):
            return loader(64)

    trainer(qat_tricks.recipe("int8_ptq")).test(lit, Ordered(), verbose=False)
    work = Workbench(plain.backbone, lambda _: Ordered().train_dataloader())
    for stage in load_recipe("int8_ptq").stages:
        stage.apply(work)
    assert differences(dict(lit.backbone.state_dict()), dict(work.network.state_dict())) == []
