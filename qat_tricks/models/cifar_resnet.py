"""The ResNets for CIFAR of "Deep Residual Learning for Image Recognition" (He et al., CVPR 2016).

They follow section 4.2 of the paper, with its shortcut A: where the shape changes, the shortcut
takes every second row and column, and the new channels are zeros. Here half of the zeros stand
before the old channels and half after them, as in the weights in circulation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_RESNETS = {"resnet20": 3, "resnet56": 9}  # blocks in each of the three layers


class CifarResNet(nn.Module):
    """Maps images of about 32x32 pixels to logits.

    The images are ``[B, in_channels, H, W]``, the logits ``[B, num_classes]``.

    Args:
        blocks: in each of the three layers.
        num_classes: of the logits.
        in_channels: of the images.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _layer(16, 16, blocks, stride=1)
        self.layer2 = _layer(16, 32, blocks, stride=2)
        self.layer3 = _layer(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``[B, num_classes]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights.

    It maps ``[B, in_channels, H, W]`` to ``[B, channels, H/stride, W/stride]``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        # one module a call, so that each has a place of its own in the traced graph
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        before = (channels - in_channels) // 2
        self.new_channels = (before, channels - in_channels - before)  # before and after the old

    def forward(self, x: Tensor) -> Tensor:
        """Adds the shortcut to two convolutions."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1 or any(self.new_channels):
            # the last pair of F.pad is that of the channels
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.new_channels))
        return self.relu2(out + x)


def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
