"""Small networks, each with one thing that integer kernels make hard, and the way to a calibrated
one.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks.graph import trace
from qat_tricks.tricks.calibrate import calibrate
from qat_tricks.tricks.fold_batchnorm import fold_batchnorm
from qat_tricks.tricks.quantize import quantize


def conv(into: int, out: int, kernel: int = 3, **settings: Any) -> nn.Sequential:
    settings = {"padding": kernel // 2, **settings}
    return nn.Sequential(
        nn.Conv2d(into, out, kernel, bias=False, **settings), nn.BatchNorm2d(out), nn.ReLU()
    )


class Residual(nn.Module):
    """Max pool, an add with a projection, global pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 8, stride=2), nn.MaxPool2d(2)
        self.a, self.b = conv(8, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut, self.fc = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(self.b(self.a(x)) + self.shortcut(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ShortcutOfZeros(nn.Module):
    """Every second row and column, and zeros for the new channels; pooled by ``mean``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            conv(3, 8),
            conv(8, 16, stride=2),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.b(self.a(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(x.mean([2, 3]))


class PaddedOnOneSide(nn.Module):
    """TensorFlow's stride 2 and a depthwise conv, with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu6(self.pointwise(self.depthwise(F.pad(x, (0, 1, 0, 1)))))
        return self.fc(x.mean([2, 3], keepdim=True).flatten(1))


class Concatenated(nn.Module):
    """Two branches joined, and a conv that ends the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8, 1), conv(8, 8)
        self.pool, self.last = nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(self.pool(torch.cat([self.a(x), self.b(x)], 1)))
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(x), (1, 1)), 1)


class PartlyRectified(nn.Module):
    """A concat of which one part comes from a ReLU and the other does not; nearest neighbours
    between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8, stride=2), conv(8, 8, stride=2), nn.Conv2d(8, 8, 1)
        self.up, self.last, self.fc = (
            nn.Upsample(scale_factor=2, mode="nearest"),
            conv(16, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.last(torch.cat([self.up(self.a(x)), self.b(x)], 1)).mean([2, 3]))


class Shuffled(nn.Module):
    """Channels split, one half worked on, both joined and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.last = conv(3, 16, stride=2), conv(8, 8), conv(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = x.size()
        x = torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)
        return self.fc(self.last(x).mean([2, 3]))


class Flat(nn.Module):
    """Linears on a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.fc = conv(3, 4, stride=4), nn.Linear(256, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.hidden(torch.flatten(self.stem(x), 1))))


class Tokens(nn.Module):
    """A linear on ``[N, positions, channels]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.fc = conv(3, 8, stride=4), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).flatten(2).transpose(1, 2))
        return self.fc(x.mean(1))


class SqueezeExcite(nn.Module):
    """Hardswish, SiLU, and channels weighted by a hardsigmoid of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.up, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.stem(x)))
        x = x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(F.adaptive_avg_pool2d(F.silu(self.last(x)), 1).flatten(1))


class CalledTwice(nn.Module):
    """One conv on two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.fc = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.shared(F.relu(self.shared(self.stem(x)) * 3)).mean([2, 3]))


def images(count: int = 16) -> Tensor:
    """Images ``[count, 3, 32, 32]`` that differ in the large."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(count, 3, size, size, generator=generator) for size in (4, 32))
    return F.interpolate(coarse, size=(32, 32), mode="bilinear") + 0.2 * fine


def seeded(kind: type[nn.Module]) -> nn.Module:
    """A network with weights of a fixed seed and BatchNorm statistics of ``images``, in evaluation
    mode.
    """
    torch.manual_seed(0)
    network = kind()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                if module.affine:
                    nn.init.uniform_(module.bias, -0.5, 0.5)
        network(images())
    return network.eval()


def quantized(kind: type[nn.Module], *, fold: bool = True, **settings: Any) -> fx.GraphModule:
    """A calibrated network of ours; ``settings`` are those of ``quantize``."""
    traced = trace(seeded(kind))
    if fold:
        fold_batchnorm(traced)
    return calibrate(quantize(traced, **settings), [images()], estimator="minmax")


class TwoHeads(nn.Module):
    """A classifier with a second head, such as one that tells where a box is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.side = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
        self.classes, self.box = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        side = self.side(x).mean((2, 3))
        return self.classes(F.relu(self.trunk(x)).mean((2, 3))), self.box(side)
