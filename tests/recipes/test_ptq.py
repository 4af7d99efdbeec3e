import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe
from tests.helpers.nets import images, small_net


def test_the_network_handed_in_stays_as_it_was():
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    qat_tricks.quantize(net, [images()])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert type(net.head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "empty"),
        ([images() * torch.nan], "NaN"),
        ([["no image"]], "holds no images"),
        ([torch.arange(3)], "holds no images"),
    ],
)
def test_loaders_that_cannot_be_calibrated_on(loader, message):
    with pytest.raises(QatTricksError, match=message):
        qat_tricks.quantize(small_net(), loader)


def test_a_recipe_that_trains_is_refused():
    with pytest.raises(QatTricksError, match="needs a trainer"):
        qat_tricks.quantize(small_net(), [images()], recipe="int8_qat")
    pruned = qat_tricks.quantize(
        small_net(), [images()], "int8_prune50", ["stages.prune_qat.epochs=0"]
    )
    weights = torch.cat([layer.effective_weight().flatten() for layer in layers(pruned).values()])
    assert (weights == 0).float().mean() >= 0.5


def test_what_comes_back_is_quantized_and_in_evaluation_mode():
    net = small_net().train()
    quantized = qat_tricks.quantize(net, [images()])
    assert net.training
    assert not quantized.training
    assert all(layer.weight_quantizer for layer in layers(quantized).values())
    assert torch.equal(quantized(images(4)), quantized(images(4)))  # no dropout


def test_a_stage_notes_its_tricks_and_lets_the_reference_go():
    (stage,) = load_recipe("int8_ptq").stages
    work = Workbench(small_net(), lambda num_images: [images(16)])
    stage.apply(work)
    names = [trick.name for trick in stage.tricks]
    assert work.applied == work.history == names
    with pytest.raises(QatTricksError, match="there is no float reference"):
        _ = work.reference
