"""Convs with every padding, and resizes of every kind: the file computes what PyTorch does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat_tricks
from tests.deploy.test_pools import Function, Pooled


def convs() -> list[nn.Module]:
    modes = ("zeros", "reflect", "replicate", "circular")
    return [
        *(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode) for mode in modes),
        *(nn.Conv2d(4, 4, (3, 2), 2, padding=(2, 1), padding_mode=mode) for mode in modes),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 2, padding="same"),  # one side more than the other
        nn.Conv2d(4, 4, 2, padding="same", dilation=3),
        nn.Conv2d(4, 4, 2, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 4, 4, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="valid", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 2, stride=3),
        nn.Conv2d(4, 4, 1, stride=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=3, stride=(1, 2)),
        nn.Sequential(nn.ReplicationPad2d((1, 0, 2, 1)), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.ZeroPad2d((-1, 0, 0, -1)), nn.Conv2d(4, 4, 3)),
    ]


def resize(**settings) -> nn.Module:
    return Function(lambda x: F.interpolate(x, **settings))


def resizes() -> list[nn.Module]:
    modes = [("nearest", None), ("nearest-exact", None), ("area", None), ("bilinear", False)]
    found = [
        resize(mode=mode, align_corners=align_corners, **size)
        for mode, align_corners in [*modes, ("bilinear", True)]
        for size in ({"scale_factor": 2}, {"scale_factor": 0.7}, {"size": 7}, {"size": (9, 4)})
    ]
    cubic = [
        resize(mode="bicubic", align_corners=corners, scale_factor=2) for corners in (False, True)
    ]
    return [*found, *cubic, nn.Upsample(scale_factor=3), nn.UpsamplingBilinear2d(scale_factor=2)]


@pytest.mark.parametrize("operations", [convs, resizes])
def test_each_runs_as_in_pytorch_in_float_and_in_integers(operations, tmp_path):
    torch.manual_seed(0)
    images, path = torch.randn(32, 3, 6, 6), tmp_path / "m.onnx"
    net = Pooled(operations()).eval()
    expected = net(images)
    assert qat_tricks.export_onnx(net, path, images[:2], images=[images]).sqnr_db > 100
    quantized = qat_tricks.quantize(net, [images])
    report = qat_tricks.export_onnx(quantized, path, images[:2], images=[images])
    assert report.sqnr_db > 60
    assert max(tensor.differing for tensor in report.layers) < 1e-3
    assert (quantized(images) - expected).square().mean() < 0.001 * expected.var()
