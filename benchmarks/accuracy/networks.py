"""The networks that the accuracy harness measures, with their weights and preprocessing.

It needs torch only (torchvision too, for the networks that are torchvision's), so that a peer's
environment without ``qat_tricks`` imports it.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]


class MobileNetV1(nn.Module):
    """MobileNetV1 at width 0.25 as trained in TensorFlow: convs of stride 2 pad right and bottom
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        features = _conv_batchnorm_relu6(3, 8, 3, 2, 1)
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            features += _conv_batchnorm_relu6(before, before, 3, stride, before)
            features += _conv_batchnorm_relu6(before, after, 1, 1, 1)
        self.features = nn.Sequential(*features)
        self.fc = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to logits ``[B, 1000]``."""
        for module in self.features:
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                x = F.pad(x, (0, 1, 0, 1))
            x = module(x)
        return self.fc(x.mean((2, 3)))


def _conv_batchnorm_relu6(
    before: int, after: int, size: int, stride: int, groups: int
) -> list[nn.Module]:
    padding = size // 2 if stride == 1 else 0
    conv = nn.Conv2d(before, after, size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after, eps=1e-3), nn.ReLU6()]


class ReluThenBatchNorm(nn.Module):
    """A plain CNN for CIFAR of 0.43 M weights, whose BatchNorms stand behind the ReLUs.

    No BatchNorm folds into the conv before it, and folding it into the padded conv behind it is
    not exact at the images' borders.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        before = 3
        for after, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1)):
            conv = nn.Conv2d(before, after, 3, stride, padding=1)
            blocks += [conv, nn.ReLU(), nn.BatchNorm2d(after)]
            before = after
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        return self.linear(torch.flatten(self.pool(self.features(x)), 1))


def _cifar_resnet(name: str) -> nn.Module:
    module = _module_of_file("cifar_resnet", ROOT / "qat_tricks" / "models" / "cifar_resnet.py")
    return module.CifarResNet(module.CIFAR_RESNETS[name], num_classes=10)


def _with_activation(name: str, activation: Callable[[], nn.Module]) -> nn.Module:
    """A ResNet in which another function stands for each ReLU."""
    net = _cifar_resnet(name)
    for module in list(net.modules()):
        for part, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, part, activation())
    return net


def _module_of_file(name: str, path: Path) -> ModuleType:
    """Imports a file by its path: the package around it may not be installed here."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _torchvision(name: str) -> nn.Module:
    import torchvision  # a machine that only trains the CIFAR networks needs none

    return getattr(torchvision.models, name)()


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the harness."""

    build: Callable[[], nn.Module]
    weights: str  # file in the folder of weights
    data: str  # "imagenet" or "cifar10"
    mean: tuple[float, float, float]  # of R, G, B in 0..1
    std: tuple[float, float, float]
    resize: int = 224  # pixels of both sides before the crop
    size: int = 224  # pixels of the crop

    def load(self, folder: Path) -> nn.Module:
        """Builds the network with its weights of ``folder``, in evaluation mode."""
        net = self.build()
        net.load_state_dict(torch.load(folder / self.weights, weights_only=True))
        return net.eval()

    def normalize(self, images: Tensor) -> Tensor:
        """Turns uint8 images ``[B, 3, H, W]`` into what the network takes."""
        mean, std = (
            torch.tensor(values, device=images.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std


def _cifar10(build: Callable[[], nn.Module], weights: str) -> Network:
    return Network(
        build=build,
        weights=weights,
        data="cifar10",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=32,
        size=32,
    )


_HALVES = (0.5, 0.5, 0.5)  # to -1..1

NETWORKS = {
    "MobileNetV2": Network(
        build=partial(_torchvision, "mobilenet_v2"),
        weights="imagenet_mobilenet_v2.pt",
        data="imagenet",
        mean=_HALVES,
        std=_HALVES,
    ),
    "MobileNetV1-0.25": Network(
        build=MobileNetV1,
        weights="imagenet_mobilenet_v1_025.pt",
        data="imagenet",
        mean=_HALVES,
        std=_HALVES,
    ),
    "SqueezeNet-1.1": Network(
        build=partial(_torchvision, "squeezenet1_1"),
        weights="imagenet_squeezenet1_1.pt",
        data="imagenet",
        # its weights take RGB in 0..255 minus (123, 117, 104), without a division
        mean=(123 / 255, 117 / 255, 104 / 255),
        std=(1 / 255, 1 / 255, 1 / 255),
        resize=256,
    ),
    # trained on the lossless images, and so off their training data here
    "ResNet-20": _cifar10(partial(_cifar_resnet, "resnet20"), "cifar10_resnet20.pt"),
    "ResNet-56": _cifar10(partial(_cifar_resnet, "resnet56"), "cifar10_resnet56.pt"),
    # written by train_networks.py
    "ResNet-20-jpeg": _cifar10(partial(_cifar_resnet, "resnet20"), "cifar10_resnet20_jpeg.pt"),
    "ResNet-56-jpeg": _cifar10(partial(_cifar_resnet, "resnet56"), "cifar10_resnet56_jpeg.pt"),
    "ResNet-20-silu": _cifar10(
        partial(_with_activation, "resnet20", nn.SiLU), "cifar10_resnet20_silu.pt"
    ),
    "ResNet-20-hardswish": _cifar10(
        partial(_with_activation, "resnet20", nn.Hardswish), "cifar10_resnet20_hardswish.pt"
    ),
    "relu_then_batchnorm": _cifar10(ReluThenBatchNorm, "cifar10_relu_then_batchnorm.pt"),
}


def edge_layers(net: nn.Module) -> tuple[str, str]:
    """Names of the first and the last conv or linear layer, in the order of the modules.

    The benchmark's networks keep their layers in the order in which they run.
    """
    names = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return names[0], names[-1]
