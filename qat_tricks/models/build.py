"""Classifiers by name: CIFAR ResNets, every torchvision classifier, timm's as ``timm/NAME``, and
the user's own.

The CIFAR ResNets are those of "Deep Residual Learning for Image Recognition" (He et al., CVPR
2016), section 4.2, with its shortcut A: where the shape changes, every second row and column, and
zeros for the new channels. Here half of the zeros stand before the old channels and half after, as
in the weights in circulation.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.inputs import input_names

CIFAR_RESNETS = {"resnet20": 3, "resnet56": 9}  # blocks a layer
TIMM = "timm/"
SHOWN = 3  # keys named in an error


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    weights: str | None = None,
    factory: str | None = None,
) -> nn.Module:
    """Builds the classifier ``name``: images ``[B, in_channels, H, W]`` to logits ``[B,
    num_classes]``.

    torchvision's networks take 3 channels; for another number their first ``Conv2d`` is replaced by
    a new, untrained one. googlenet and inception_v3 come without their auxiliary heads.

    ``weights`` is the path of a ``state_dict`` file, loaded strictly; or a name of torchvision's
    (``IMAGENET1K_V1``, ``DEFAULT``), or ``pretrained`` for timm's, which are downloaded.
    ``factory`` belongs to the name ``custom``: the dotted path of a callable that returns the
    network, called with ``num_classes`` and ``in_channels`` if it takes them.

    Raises ``QatTricksError`` for an unknown name, weights that cannot be had or do not fit, and a
    factory that is none.
    """
    if (factory is not None) != (name == "custom"):
        raise QatTricksError(
            f'model.name="{name}" with model.factory={factory}: the name "custom", and it alone, '
            'takes a factory ("package.module.callable")'
        )
    if factory is not None:
        net = _from_factory(factory, num_classes, in_channels)
    elif name in CIFAR_RESNETS:
        net = CifarResNet(CIFAR_RESNETS[name], num_classes, in_channels)
    elif name.startswith(TIMM):
        return _timm_model(name, num_classes, in_channels, weights)
    elif name in _torchvision_names():
        return _torchvision_model(name, num_classes, in_channels, weights)
    else:
        raise QatTricksError(
            f'unknown model "{name}": {did_you_mean(name, [*model_names(), "custom"])}'
        )
    return net if weights is None else _load_weights(net, weights, num_classes)


def model_names() -> list[str]:
    """The names that ``build_model`` knows, sorted; timm's as well where timm is installed."""
    return sorted([*CIFAR_RESNETS, *_torchvision_names(), *_timm_names()])


def register_models() -> None:
    """Adds a config for each torchvision classifier to Hydra's group ``model``, as in
    ``model=mobilenet_v2``.
    """
    for name in _torchvision_names():
        _register("model", name, name)


def register_timm_models() -> None:
    """Adds a config for each timm classifier to Hydra's group ``model/timm``, as in
    ``model=timm/resnet18``.
    """
    for name in _timm_names():
        _register("model/timm", name.removeprefix(TIMM), name)


def _register(group: str, option: str, name: str) -> None:
    node = {"name": name, "weights": None, "factory": None}
    ConfigStore.instance().store(
        group=group, name=option, node=node, package="model", provider="qat_tricks"
    )


class CifarResNet(nn.Module):
    """ResNet for images of about 32x32 pixels: ``[B, in_channels, H, W]`` to logits ``[B,
    num_classes]``.
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
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: ``[B, C, H, W]`` to ``[B, channels,
    H/stride, W/stride]``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        before = (channels - in_channels) // 2
        # zeros before and after the old ones
        self.new_channels = (before, channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1 or any(self.new_channels):
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.new_channels))
        return self.relu2(out + x)


def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision_model(
    name: str, num_classes: int, in_channels: int, weights: str | None
) -> nn.Module:
    offered = {entry.name: entry for entry in torchvision.models.get_model_weights(name)}
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    downloaded = weights == "DEFAULT" or weights in offered
    if not downloaded:
        net = torchvision.models.get_model(name, weights=None, **options)
        if in_channels != 3:
            _replace_first_conv(net, in_channels)
        names = [*offered, "DEFAULT"]
        return net if weights is None else _load_weights(net, weights, num_classes, names)
    _check_pretrained(name, weights, num_classes, 1000)
    if in_channels != 3:
        raise QatTricksError(
            f"{name} with weights {weights} takes images of 3 channels, the data has "
            f"{in_channels}: use RGB images, or leave model.weights=null and train"
        )
    if "init_weights" in options:
        options["init_weights"] = False
    return _download(name, torchvision.models.get_model, name, weights=weights, **options)


def _replace_first_conv(net: nn.Module, in_channels: int) -> None:
    """Puts an untrained convolution of ``in_channels``, otherwise the same, in the place of the
    first ``Conv2d``.
    """
    path, old = next(
        (item for item in net.named_modules() if isinstance(item[1], nn.Conv2d)), ("", None)
    )
    assert isinstance(old, nn.Conv2d), "torchvision's classifiers begin with a Conv2d"
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    net.set_submodule(path, new)


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return [TIMM + name for name in timm.list_models()]


def _timm_model(name: str, num_classes: int, in_channels: int, weights: str | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise QatTricksError(
            f'model "{name}" needs timm: pip install "qat_tricks[timm]"'
        ) from error
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        raise QatTricksError(f'unknown model "{name}": {did_you_mean(name, _timm_names())}')
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if weights != "pretrained":
        net = timm.create_model(short, **options)
        return net if weights is None else _load_weights(net, weights, num_classes, ["pretrained"])
    known = timm.get_pretrained_cfg(short)
    _check_pretrained(
        name, weights, num_classes, num_classes if known is None else known.num_classes
    )
    return _download(name, timm.create_model, short, pretrained=True, **options)


def _check_pretrained(name: str, weights: str | None, num_classes: int, trained: int) -> None:
    if num_classes != trained:
        raise QatTricksError(
            f"{name} with weights {weights} has {trained} classes, the data has {num_classes}: "
            "use data with the same classes, or leave model.weights=null and train"
        )


def _download(name: str, create: Any, *args: Any, **options: Any) -> nn.Module:
    try:
        net: nn.Module = create(*args, **options)
    except (OSError, RuntimeError) as error:  # no network, no space, a damaged file
        reason = " ".join(str(error).split())[:200]
        raise QatTricksError(
            f"cannot download the weights of {name} ({reason}): check the network, or set "
            "model.weights to the path of a file"
        ) from error
    return net


def _from_factory(factory: str, num_classes: int, in_channels: int) -> nn.Module:
    module_name, _, attribute = factory.rpartition(".")
    try:
        create = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise QatTricksError(
            f'cannot import model.factory="{factory}" ({error}): give "package.module.callable", '
            "and put its folder on the PYTHONPATH"
        ) from error
    if not callable(create):
        raise QatTricksError(
            f'model.factory="{factory}" is a {type(create).__name__}: give something callable'
        )
    signature = inspect.signature(create)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    offered: Mapping[str, int] = {"num_classes": num_classes, "in_channels": in_channels}
    given = {
        key: value for key, value in offered.items() if takes_any or key in signature.parameters
    }
    try:
        signature.bind(**given)
    except TypeError as error:
        raise QatTricksError(
            f'model.factory="{factory}" needs more than {", ".join(given) or "no arguments"} '
            f"({error}): give its other arguments defaults"
        ) from error
    net = create(**given)
    if not isinstance(net, nn.Module):
        raise QatTricksError(
            f'model.factory="{factory}" returned a {type(net).__name__}, not an nn.Module'
        )
    names = input_names(net)
    if len(names) > 1:
        raise QatTricksError(
            f'model.factory="{factory}" returned a network of {len(names)} inputs '
            f"({', '.join(names)}), and the data sets here are images alone: train it in your own "
            "trainer, with callbacks=qat_tricks.recipe(NAME)"
        )
    return net


def _load_weights(
    net: nn.Module, path: str, num_classes: int, named: Sequence[str] = ()
) -> nn.Module:
    """Loads the ``state_dict`` in the file ``path`` into ``net``, strictly, and returns ``net``.

    The file holds the ``state_dict`` itself, or a Lightning checkpoint whose keys may share a
    prefix (``net.``, ``model.``). ``num_classes`` is that of ``net``; ``named`` are weights that
    could have been asked for by name instead. Raises ``QatTricksError`` for a file that is missing,
    damaged or foreign, holds two such networks, or does not fit.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        hint = f", nor weights by name: {did_you_mean(path, named)}" if named else ""
        raise QatTricksError(f"model.weights={path} is not a file{hint}")
    expected = net.state_dict()
    state = _without_prefix(_read(file), expected, file)
    _check(state, expected, file, num_classes)
    for key in expected:
        if _is_counter(key):
            state.setdefault(key, torch.tensor(0))
    net.load_state_dict(state)
    return net


def _read(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise QatTricksError(
            f"{file} cannot be read as a state_dict ({type(error).__name__}: {reason}): "
            "it is truncated or foreign; write it with torch.save(net.state_dict(), path)"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if (
        isinstance(content, Mapping)
        and content
        and all(isinstance(v, Tensor) for v in content.values())
    ):
        return dict(content)
    raise QatTricksError(
        f"{file} holds a {type(content).__name__} that is no state_dict: write it with "
        "torch.save(net.state_dict(), path)"
    )


def _without_prefix(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The part of ``state`` under the prefix that finds the most ``expected`` keys, without that
    prefix.
    """
    wanted = {key for key in expected if not _is_counter(key)}
    anchors = (key.removesuffix(want) for key in state for want in wanted if key.endswith(want))
    prefixes = {prefix for prefix in anchors if prefix == "" or prefix.endswith(".")}
    found = {prefix: sum(prefix + want in state for want in wanted) for prefix in sorted(prefixes)}
    if found.get("") == len(wanted) or not found:
        return state
    complete = [prefix for prefix, count in found.items() if count == len(wanted)]
    if len(complete) > 1:
        raise QatTricksError(
            f"{file} holds several such networks ({', '.join(complete)}): save the state_dict of "
            "the one you mean"
        )
    best = max(found, key=lambda prefix: found[prefix])
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def _check(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path, num_classes: int
) -> None:
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    unexpected = [key for key in state if key not in expected]
    shapes = {
        key: (tuple(state[key].shape), tuple(expected[key].shape))
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    }
    only_heads = all(
        ours[:1] == (num_classes,) and given[1:] == ours[1:] for given, ours in shapes.values()
    )
    if shapes and only_heads and not missing and not unexpected:
        given, _ = next(iter(shapes.values()))
        raise QatTricksError(
            f"{file} is a network for {given[0]} classes, the data has {num_classes}: "
            "use data with the same classes, or weights trained on these"
        )
    mismatched = [
        f"{key} {list(given)} instead of {list(ours)}" for key, (given, ours) in shapes.items()
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    if any(faults.values()):
        told = "; ".join(
            f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in faults.items() if keys
        )
        raise QatTricksError(
            f"{file} does not fit the network: {told}; choose the model it was trained as"
        )


def _is_counter(key: str) -> bool:
    """BatchNorm's count of batches, which files of older PyTorch versions lack."""
    return key.endswith("num_batches_tracked")


def _first(keys: Iterable[str]) -> str:
    listed = list(keys)
    return ", ".join(listed[:SHOWN]) + (", …" if len(listed) > SHOWN else "")
