"""Builds classifiers by name: CIFAR ResNets, torchvision's, timm's, and the user's own."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torchvision
from hydra.core.config_store import ConfigStore
from torch import nn

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.inputs import input_names
from qat_tricks.models.cifar_resnet import CIFAR_RESNETS, CifarResNet
from qat_tricks.models.weights import load_weights, weights_file

TIMM = "timm/"
IMAGENET_CLASSES = 1000  # of torchvision's weights


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    weights: str | None = None,
    factory: str | None = None,
) -> nn.Module:
    """Builds a classifier: images ``[B, in_channels, H, W]`` to logits ``[B, num_classes]``.

    torchvision's networks take 3 channels; for another number, their first ``Conv2d`` is replaced
    by a new, untrained one. googlenet and inception_v3 come without their auxiliary heads.

    Args:
        name: one of ``model_names()``, or ``custom``.
        num_classes: of the logits.
        in_channels: of the images.
        weights: the path of a ``state_dict`` file, which is loaded strictly; or a name of
            torchvision's (``IMAGENET1K_V1``, ``DEFAULT``), or ``pretrained`` for timm's, which are
            downloaded; None leaves the network untrained.
        factory: belongs to the name ``custom``: the dotted path of a callable that returns the
            network. It is called with ``num_classes`` and ``in_channels`` if it names them; one
            with ``**kwargs`` gets ``num_classes``, and ``in_channels`` where that is not 3.

    Raises:
        QatTricksError: the name is unknown, the weights cannot be had or do not fit, or the factory
            does not return such a network.
    """
    if (factory is not None) != (name == "custom"):
        raise QatTricksError(
            f'model.name="{name}" with model.factory={factory}: the name "custom", and no other, '
            'takes a factory ("package.module.callable")'
        )
    if factory is not None:
        network = _from_factory(factory, num_classes, in_channels)
    elif name in CIFAR_RESNETS:
        network = CifarResNet(CIFAR_RESNETS[name], num_classes, in_channels)
    elif name.startswith(TIMM):
        return _timm_model(name, num_classes, in_channels, weights)
    elif name in _torchvision_names():
        return _torchvision_model(name, num_classes, in_channels, weights)
    else:
        raise QatTricksError(
            f'unknown model "{name}": {did_you_mean(name, [*model_names(), "custom"])}'
        )
    return network if weights is None else load_weights(network, weights, num_classes)


def check_weights(name: str, weights: str | None) -> None:
    """Raises QatTricksError if ``weights`` are neither a file nor known for the model by name."""
    if weights is not None and weights not in (names := _weight_names(name)):
        weights_file(weights, names)


def _weight_names(name: str) -> list[str]:
    """Weights of a model that can be downloaded."""
    if name.startswith(TIMM):
        return ["pretrained"]
    if name not in _torchvision_names():
        return []
    return [*(entry.name for entry in torchvision.models.get_model_weights(name)), "DEFAULT"]


def model_names() -> list[str]:
    """Returns the names that ``build_model`` knows, sorted; timm's only where timm is installed."""
    return sorted([*CIFAR_RESNETS, *_torchvision_names(), *_timm_names()])


def register_models() -> None:
    """Adds torchvision's classifiers to Hydra's group ``model``, as in ``model=mobilenet_v2``."""
    for name in _torchvision_names():
        _register("model", name, name)


def register_timm_models() -> None:
    """Adds timm's classifiers to Hydra's group ``model/timm``, as in ``model=timm/resnet18``."""
    for name in _timm_names():
        _register("model/timm", name.removeprefix(TIMM), name)


def _register(group: str, option: str, name: str) -> None:
    node = {"name": name, "weights": None, "factory": None}
    ConfigStore.instance().store(
        group=group, name=option, node=node, package="model", provider="qat_tricks"
    )


def _torchvision_names() -> list[str]:
    # its other modules hold detectors, segmentation and quantized networks
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision_model(
    name: str, num_classes: int, in_channels: int, weights: str | None
) -> nn.Module:
    known_weights = _weight_names(name)
    options: dict[str, Any] = {"num_classes": num_classes}
    has_heads = name in ("googlenet", "inception_v3")  # auxiliary ones, and a slow initialization
    if has_heads:
        options |= {"aux_logits": False, "init_weights": True}
    if weights not in known_weights:
        network = torchvision.models.get_model(name, weights=None, **options)
        if in_channels != 3:
            _replace_first_conv(network, in_channels)
        if weights is None:
            return network
        return load_weights(network, weights, num_classes, known_weights)
    _check_pretrained(name, weights, num_classes, IMAGENET_CLASSES)
    if in_channels != 3:
        raise QatTricksError(
            f"{name} with weights {weights} takes images of 3 channels, the data has "
            f"{in_channels}: use RGB images, or leave model.weights=null and train"
        )
    if has_heads:
        options["init_weights"] = False  # the downloaded ones replace them
    return _download(name, torchvision.models.get_model, name, weights=weights, **options)


def _replace_first_conv(network: nn.Module, in_channels: int) -> None:
    """Replaces the first ``Conv2d`` by an untrained one of ``in_channels``, otherwise the same."""
    path, old = next(
        (item for item in network.named_modules() if isinstance(item[1], nn.Conv2d)), ("", None)
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
    network.set_submodule(path, new)


def _timm_names() -> list[str]:
    try:
        import timm  # optional, and slow to load
    except ImportError:
        return []
    return [TIMM + name for name in timm.list_models()]


def _timm_model(name: str, num_classes: int, in_channels: int, weights: str | None) -> nn.Module:
    try:
        import timm  # optional, and slow to load
    except ImportError as error:
        raise QatTricksError(
            f'model "{name}" needs timm: pip install "qat_tricks[timm]"'
        ) from error
    timm_name = name.removeprefix(TIMM)
    if not timm.is_model(timm_name):
        raise QatTricksError(f'unknown model "{name}": {did_you_mean(name, _timm_names())}')
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if weights != "pretrained":
        network = timm.create_model(timm_name, **options)
        if weights is None:
            return network
        return load_weights(network, weights, num_classes, _weight_names(name))
    pretrained = timm.get_pretrained_cfg(timm_name)
    # a network without weights fails in the download, with timm's own reason
    trained_classes = num_classes if pretrained is None else pretrained.num_classes
    _check_pretrained(name, weights, num_classes, trained_classes)
    return _download(name, timm.create_model, timm_name, pretrained=True, **options)


def _check_pretrained(
    name: str, weights: str | None, num_classes: int, trained_classes: int
) -> None:
    if num_classes != trained_classes:
        raise QatTricksError(
            f"{name} with weights {weights} has {trained_classes} classes, the data has "
            f"{num_classes}: use data with the same classes, or leave model.weights=null and train"
        )


def _download(name: str, create: Any, *args: Any, **options: Any) -> nn.Module:
    try:
        network: nn.Module = create(*args, **options)
    except (OSError, RuntimeError) as error:  # no connection, no space, a damaged file
        reason = " ".join(str(error).split())[:200]
        raise QatTricksError(
            f"cannot download the weights of {name} ({reason}): check the network, or set "
            "model.weights to the path of a file"
        ) from error
    return network


def _from_factory(factory: str, num_classes: int, in_channels: int) -> nn.Module:
    create = _import_factory(factory)
    signature = inspect.signature(create)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    known = {"num_classes": num_classes, "in_channels": in_channels}
    named = set(signature.parameters)
    if takes_any:  # and often hands on to a network of 3 channels, as torchvision's do
        named |= {"num_classes"} if in_channels == 3 else set(known)
    arguments = {key: value for key, value in known.items() if key in named}
    try:
        # Tried before the call, so that an error inside the factory is not taken for this one.
        signature.bind(**arguments)
    except TypeError as error:
        raise QatTricksError(
            f'model.factory="{factory}" needs more than {", ".join(arguments) or "no arguments"} '
            f"({error}): give its other arguments defaults"
        ) from error
    network = create(**arguments)
    if not isinstance(network, nn.Module):
        raise QatTricksError(
            f'model.factory="{factory}" returned a {type(network).__name__}, not an nn.Module'
        )
    names = input_names(network)
    if len(names) > 1:
        raise QatTricksError(
            f'model.factory="{factory}" returned a network of {len(names)} inputs '
            f"({', '.join(names)}), and the data sets here hold images only: train it in your own "
            "trainer, with callbacks=qat_tricks.recipe(NAME)"
        )
    return network


def _import_factory(factory: str) -> Callable[..., Any]:
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
    return create
