"""The images that tricks see: those of the training, as the network itself gets them."""

import pytest
import torch
from torch.utils.data import DataLoader

import qat_tricks
from qat_tricks.graph import activation_quantizers
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.trainer.calibration_images import datamodule_images
from tests.helpers.lit import Data, Lit, dataset, loader, trainer

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def test_calibration_sees_what_the_network_sees():
    """``Lit.forward`` halves the images before the network."""
    lit = Lit()
    trainer(
        qat_tricks.recipe("int8_ptq", ["stages.ptq.tricks.calibrate.estimator=minmax"])
    ).validate(lit, Data(), verbose=False)
    x = torch.cat([batch[0] for batch in loader()]) * 0.5
    first = activation_quantizers(lit.backbone)["activation_quantizers.x"]
    assert float(first.scale) * 255 == pytest.approx(float(x.max() - x.min()), rel=1e-5)


class WithCalibration(Data):
    """Images for calibration that are brighter than those for training."""

    def calibration_loader(self, num_images):
        images, labels = dataset().tensors
        return DataLoader(torch.utils.data.TensorDataset(3 * images, labels), batch_size=16)


def test_calibration_reads_the_loader_made_for_it_else_the_one_for_training():
    def range_of_images(data):
        lit = Lit()
        recipe = load_recipe("int8_ptq", ["stages.ptq.tricks.calibrate.estimator=minmax"])
        qat_tricks.run_stages(lit, data, recipe, trainer=QUIET)
        low, high = activation_quantizers(lit.backbone)["activation_quantizers.x"].range
        return high - low

    # no module stands before the network here: what the loader yields is what it sees
    assert range_of_images(WithCalibration()) == pytest.approx(
        3 * range_of_images(Data()), rel=0.01
    )
    (batch, *_) = datamodule_images(WithCalibration(), 16)
    assert torch.equal(batch[0], 3 * dataset().tensors[0][:16])
