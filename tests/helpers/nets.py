"""Small networks and data for tests."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with one ReLU module for both activations, as torchvision writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class SmallNet(nn.Module):
    """Conv, BatchNorm, a residual block, a depthwise ReLU6 part, a concat, a pool and a linear."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.block = Block(width)
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
        )
        self.left = nn.Conv2d(width, width, 1)
        self.right = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.block(self.stem(x)))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        return self.head(self.dropout(x.mean([2, 3])))


def small_net(seed: int = 0, **settings: int) -> SmallNet:
    """A ``SmallNet`` in evaluation mode whose BatchNorms have statistics and gains that are not
    trivial.
    """
    torch.manual_seed(seed)
    net = SmallNet(**settings)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def images(count: int = 16, channels: int = 1, size: int = 8, seed: int = 1) -> Tensor:
    """Random images ``[count, channels, size, size]``."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Named(nn.Module):
    """A network with everything that users reach for."""

    kind = "example"

    def __init__(self):
        super().__init__()
        self.num_classes = 10
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Identity(), nn.ReLU(), Block(8)
        )
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 10)

    @property
    def width(self):
        return self.head.in_features

    def forward_features(self, x):
        x = self.features(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return x.mean((2, 3))

    def forward(self, x):
        return self.head(self.forward_features(x))

    def predict(self, x):
        return self(x).argmax(1)

    def predict_by_forward(self, x):
        return self.forward(x).argmax(1)

    def describe(self):
        return f"{self.num_classes} classes"
