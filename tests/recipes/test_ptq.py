import itertools
import warnings

import numpy as np
import pytest
import torch

import qat_tricks
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.runtimes.session import input_specs, open_session
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
        ([torch.arange(3)], "may be labels"),
        ([images().byte()], r"does not take images of torch.uint8 .*float\(\) / 255"),
        ([images(channels=2)], r"SmallNet does not run on images \[\d+, 2, 8, 8\].*give batches"),
        (list(images()), r"does not run on images \[1, 8, 8\].*give batches"),
        (iter([]), "empty"),
        (lambda: [images()], "the loader is a function"),
        (images(), "the loader is a tensor"),
    ],
)
def test_loaders_that_cannot_be_calibrated_on(loader, message):
    with pytest.raises(QatTricksError, match=message):
        qat_tricks.quantize(small_net(), loader)


def test_images_that_are_all_alike_are_warned_of():
    with pytest.warns(UserWarning, match="all values that the calibration loader yields are the"):
        qat_tricks.quantize(small_net(), [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat_tricks.quantize(small_net(), [torch.zeros(4, 1, 8, 8), images()])


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


def test_a_loader_in_any_form_gives_the_same_network():
    given = [images(16, seed=seed) for seed in range(4)]
    expected = qat_tricks.quantize(small_net(), given).state_dict()
    endless = itertools.cycle(given)
    dataset = torch.utils.data.TensorDataset(torch.cat(given))
    for loader, batches in [
        ((batch for batch in given), given),
        (itertools.islice(endless, 4), given),
        (map(torch.clone, given), given),
        (iter(torch.utils.data.DataLoader(dataset, 16)), given),
        (itertools.cycle(given), given * 8),  # of which calibration takes 512 images
    ]:
        found = qat_tricks.quantize(small_net(), loader).state_dict()
        if batches is not given:
            expected = qat_tricks.quantize(small_net(), batches).state_dict()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


class Pixels(torch.nn.Module):
    """Makes floats of uint8 pixels itself."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, photo):
        return self.net(photo.float() / 255)


@pytest.mark.parametrize("kind", ["tensor", "pair", "mapping"])
def test_a_network_that_takes_pixels_is_calibrated_and_exported_on_them(kind, tmp_path):
    pixels, labels = (images(64) * 50 + 128).clamp(0, 255).byte(), torch.arange(64)
    forms = {
        "tensor": pixels,
        "pair": (pixels, labels),
        "mapping": {"weight": torch.rand(64), "photo": pixels, "label": labels},
    }
    net = Pixels().eval()
    quantized = qat_tricks.quantize(net, [forms[kind]])
    expected = net(pixels)
    assert (quantized(pixels) - expected).square().mean() < 0.01 * expected.var()
    path = tmp_path / "m.onnx"
    report = qat_tricks.export_onnx(quantized, path, pixels[:2], images=[forms[kind]])
    assert (report.images, report.top1_agreement) == (64, 1.0)
    assert report.sqnr_db > 40
    (spec,) = input_specs(open_session(path))
    assert (spec.name, spec.dtype) == ("images", np.uint8)
    assert integer_coverage(path, tuple(pixels.shape[1:])).coverage == 1.0


def test_wrappers_are_taken_off_and_torchscript_is_refused():
    net = small_net()
    expected = qat_tricks.quantize(net, [images()]).state_dict()
    for wrapped in (torch.compile(net), torch.nn.DataParallel(net)):
        found = qat_tricks.quantize(wrapped, [images()]).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(QatTricksError, match=r"before torch\.jit\.script"):
        qat_tricks.quantize(torch.jit.trace(net, images(1)), [images()])
