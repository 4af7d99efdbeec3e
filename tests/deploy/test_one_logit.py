"""Networks of two classes that yield one logit an image, in every shape that people write."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat_tricks
from qat_tricks.deploy.normalization import build_in_normalization
from qat_tricks.deploy.parity.logits import compare_logits
from qat_tricks.deploy.runtimes.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.metrics import evaluate_classifier
from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.tricks import calibrate, quantize, tune_ranges
from tests.helpers.networks import conv, images

SHAPES = {
    "column": lambda x: x,
    "squeezed": lambda x: x.squeeze(1),
    "squeezed from the end": lambda x: x.squeeze(-1),
    "flattened": lambda x: x.flatten(),
    "viewed": lambda x: x.view(-1),
    "indexed": lambda x: x[:, 0],
}


class OneLogit(nn.Module):
    def __init__(self, shape) -> None:
        super().__init__()
        self.stem, self.fc, self.shape = conv(3, 8, stride=2), nn.Linear(8, 1), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.fc(self.stem(x).mean([2, 3])))


def one_logit(shape) -> nn.Module:
    """A network whose logits are of both signs on ``images``."""
    torch.manual_seed(0)
    net = OneLogit(shape)
    net(images())
    net.eval()
    with torch.no_grad():
        net.fc.weight *= 5
        net.fc.bias -= net(images(64)).median()
    return net


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_network_of_one_logit_is_quantized_and_exported_as_simulated(shape, tmp_path):
    net, path = one_logit(shape), tmp_path / "m.onnx"
    assert qat_tricks.export_onnx(net, path, images(2), images=[images(16)]).sqnr_db > 80
    quantized = qat_tricks.quantize(net, [images(64)])
    report = qat_tricks.export_onnx(quantized, path, images(2), images=[images(16), images(1)])
    assert (report.top1_agreement, report.images) == (1.0, 17)
    assert report.sqnr_db > 40
    given, expected = images(64), net(images(64))
    found = run_batch(open_session(path), given.numpy())
    assert found.shape == expected.shape
    assert 0.3 < float((expected > 0).float().mean()) < 0.7  # both classes are there
    assert ((torch.from_numpy(found) > 0) == (expected > 0)).float().mean() > 0.9


@pytest.mark.parametrize("shape", [lambda x: x.squeeze(), lambda x: (x * torch.ones(3)).flatten()])
def test_a_shape_that_loses_the_batch_is_refused(shape, tmp_path):
    net = one_logit(lambda x: x)
    net.shape = shape
    with pytest.raises(QatTricksError, match=r"for 1 image, .*squeeze\(1\)") as refused:
        qat_tricks.export_onnx(net, tmp_path / "m.onnx", images(2))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_agreement_is_that_of_the_signs():
    reference = np.array([[-3.0], [-1.0], [1.0], [3.0]], np.float32)
    assert compare_logits([(reference, reference)])["top1_agreement"] == 1.0
    assert compare_logits([(reference, reference + 2)])["top1_agreement"] == 0.75
    assert compare_logits([(reference[:, 0], -reference[:, 0])])["top1_agreement"] == 0.0
    # behind a sigmoid, where no value is negative
    probabilities = np.array([0.1, 0.4, 0.6, 0.9], np.float32)
    assert compare_logits([(probabilities, 1 - probabilities)])["top1_agreement"] == 0.0


def test_ranges_are_tuned_by_the_effect_on_the_one_logit():
    """As by that on the two logits ``(0, z)``, which say the same."""
    found = []
    for shape in (SHAPES["squeezed"], SHAPES["column"], lambda x: torch.cat([x * 0, x], 1)):
        traced = quantize(trace(one_logit(shape)), activation_bits=4, first_last_bits=None)
        calibrate(traced, [images(64)], estimator="minmax")
        before = [quantizer.range for quantizer in activation_quantizers(traced).values()][:2]
        tune_ranges(traced, [images(64)])
        found.append([quantizer.range for quantizer in activation_quantizers(traced).values()][:2])
        assert found[-1] != before
    assert found[0] == found[1]
    # but for near ties, which are avoided by a hair
    for one, two in zip(found[0], found[2], strict=True):
        assert one == pytest.approx(two, rel=0.01)


def test_a_squeeze_that_takes_the_batch_is_refused_where_ranges_are_tuned():
    traced = quantize(trace(one_logit(lambda x: x.squeeze())))
    calibrate(traced, [images(9)], estimator="minmax")
    with pytest.raises(QatTricksError, match=r"shape \(\) for 1 image"):
        tune_ranges(traced, [images(9)])


def test_the_normalization_is_built_in_for_one_logit(tmp_path):
    net, path = one_logit(SHAPES["squeezed"]), tmp_path / "m.onnx"
    qat_tricks.export_onnx(net, path, images(2))
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    floats = (pixels.float() / 255 - 0.5) / 0.25
    report = build_in_normalization(
        path, [(pixels.numpy(), floats.numpy())], mean=[0.5] * 3, std=[0.25] * 3
    )
    assert (report["top1_agreement"], report["images"]) == (1.0, 8)
    found = run_batch(open_session(path), pixels.numpy())
    np.testing.assert_allclose(found, net(floats).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", ["column", "squeezed"])
def test_the_file_of_one_logit_is_measured_as_the_network(shape, tmp_path):
    net, path = one_logit(SHAPES[shape]), tmp_path / "m.onnx"
    qat_tricks.export_onnx(net, path, images(2))
    session = open_session(path)
    batches = [(images(64), torch.arange(64) % 2)]
    simulated, real = (
        evaluate_classifier(predict, batches, 2)
        for predict in (net, lambda x: torch.from_numpy(run_batch(session, x.numpy())))
    )
    assert torch.equal(simulated.predictions, (net(images(64)).flatten() > 0).long())
    expected = {**simulated.as_dict(), "seconds": real.seconds}
    assert real.as_dict() == pytest.approx(expected, rel=1e-4)
