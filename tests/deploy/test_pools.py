"""Pools in every setting: the file computes what PyTorch does, in float and between integers."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.deploy.runtimes.session import open_session

SETTINGS = list(itertools.product((2, 3), (1, 2, 3), (0, 1)))  # kernel, stride, padding


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def averages() -> list[nn.Module]:
    return [nn.AvgPool2d(*sizes, True, counts) for sizes in SETTINGS for counts in (False, True)]


def averages_with_divisor() -> list[nn.Module]:
    # Two with the same settings, but for the divisor; and one as a function.
    alike = [nn.AvgPool2d(2), nn.AvgPool2d(2, divisor_override=5)]
    uneven = Function(lambda x: F.avg_pool2d(x, (3, 2), (1, 2), (1, 0), True, True, 2))
    return [
        *alike, uneven, *(nn.AvgPool2d(*sizes, True, divisor_override=3) for sizes in SETTINGS)
    ]  # fmt: skip


def max_pools() -> list[nn.Module]:
    return [
        nn.MaxPool2d(*sizes, dilation, False, True) for sizes in SETTINGS for dilation in (1, 2)
    ]


def adaptive() -> list[nn.Module]:
    sizes = (1, 2, 3, (2, 3), (None, 2))
    return [kind(size) for kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d) for size in sizes]


class Pooled(nn.Module):
    """A conv, every pool behind it, and a conv behind each."""

    def __init__(self, pools: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.pools = nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList(pools)
        self.behind = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in pools])
        self.fc = nn.Linear(4 * len(pools), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        ends = [F.relu(conv(pool(x))) for pool, conv in zip(self.pools, self.behind, strict=True)]
        return self.fc(torch.cat([end.mean([2, 3]) for end in ends], 1))


class Each(Pooled):
    """Yields what each pool yields."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        return x.mean([2, 3]), *[pool(x) for pool in self.pools]


@pytest.mark.parametrize("pools", [averages, averages_with_divisor, max_pools, adaptive])
def test_pools_run_as_in_pytorch_in_float_and_in_integers(pools, tmp_path):
    torch.manual_seed(0)
    images, path = torch.randn(32, 3, 5, 5), tmp_path / "m.onnx"
    net = Each(pools()).eval()
    qat_tricks.export_onnx(net, path, images[:2])
    found = open_session(path).run(None, {"images": images.numpy()})
    for expected, values in zip(net(images), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(values), expected, atol=1e-5, rtol=1e-5)

    net = Pooled(pools()).eval()
    quantized = qat_tricks.quantize(net, [images])
    report = qat_tricks.export_onnx(quantized, path, images[:2], images=[images])
    assert report.sqnr_db > 100
    assert max(tensor.differing for tensor in report.layers) < 1e-3
    expected = net(images)
    assert (quantized(images) - expected).square().mean() < 0.001 * expected.var()


class Sequence(Pooled):
    """Convs and pools of one dimension."""

    def __init__(self, pools: list[nn.Module]) -> None:
        super().__init__(pools)
        self.stem = nn.Conv1d(3, 4, 3, padding=1)
        self.behind = nn.ModuleList([nn.Conv1d(4, 4, 1) for _ in pools])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        ends = [F.relu(conv(pool(x))) for pool, conv in zip(self.pools, self.behind, strict=True)]
        return self.fc(torch.cat([end.mean(2) for end in ends], 1))


def test_pools_of_one_dimension(tmp_path):
    torch.manual_seed(0)
    pools = [nn.AvgPool1d(*sizes, True, counts) for sizes in SETTINGS for counts in (False, True)]
    net = Sequence([*pools, *(nn.MaxPool1d(*sizes, ceil_mode=True) for sizes in SETTINGS)]).eval()
    signals, path = torch.randn(32, 3, 5), tmp_path / "m.onnx"
    assert qat_tricks.export_onnx(net, path, signals[:2], images=[signals]).sqnr_db > 100
    quantized = qat_tricks.quantize(net, [signals])
    report = qat_tricks.export_onnx(quantized, path, signals[:2], images=[signals])
    assert report.sqnr_db > 100
    assert max(tensor.differing for tensor in report.layers) < 1e-3
