"""Removes channels: parameters become smaller, and modules say so.

A parameter stays the object that it is, and gets other values: so an optimizer, or a list of the
user's, that holds it goes on being right.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph.channel_groups import Channels, kept_places
from qat_tricks.graph.layers import is_layer
from qat_tricks.graph.submodules import layer_at
from qat_tricks.numerics.optimal_brain import refit

Shapes = dict[str, list[int]]
"""Shapes of parameters and buffers by name, and the number of groups of grouped convs.

The latter have the name ``<conv>.groups`` and a list of one number.
"""

_GROUPS, _MASK = ".groups", "weight_mask"


@torch.no_grad()
def mask_channels(
    traced: fx.GraphModule,
    channels: Channels,
    removed: Collection[int],
    hessians: Mapping[str, Tensor] | None = None,
) -> None:
    """Lets no conv or linear read the channels that are to be removed: their weights become 0.

    After that, removing them changes no other value of the network.

    Args:
        traced: changed in place.
        channels: of it.
        removed: labels of units.
        hessians: of the layers' inputs; given, the weights that stay are fitted anew.
    """
    mask_weights(traced, read_masks(traced, channels, removed), hessians or {})


@torch.no_grad()
def mask_weights(
    traced: fx.GraphModule, masks: Mapping[str, Tensor], hessians: Mapping[str, Tensor]
) -> None:
    """Sets weights to 0 where ``masks`` do; with Hessians, those that stay follow the output.

    Args:
        traced: changed in place.
        masks: of its layers, which broadcast to the weights.
        hessians: of the layers' inputs, where they are known.
    """
    for name, mask in masks.items():
        layer = layer_at(traced, name)
        weight, keep = layer.weight, mask.expand_as(layer.weight)
        if getattr(layer, "weight_mask", None) is not None:  # what was pruned stays 0
            keep = keep * layer.weight_mask
        hessian = hessians.get(name)
        weight.copy_(weight * keep if hessian is None else refit(weight, keep, hessian, weight))


def read_masks(
    traced: fx.GraphModule, channels: Channels, removed: Collection[int]
) -> dict[str, Tensor]:
    """For each layer that reads removed channels, 1 where its weight reads others.

    Returns:
        Masks that broadcast to the weights, ``[1, columns, 1, ..]``. Of a conv whose groups are
        removed as a whole there is nothing to mask.
    """
    masks: dict[str, Tensor] = {}
    for name, units in channels.columns.items():
        if name in channels.grouped:
            continue
        weight = layer_at(traced, name).weight
        keep = torch.tensor([unit not in removed for unit in units.tolist()])
        if not bool(keep.all()):
            shape = [1, -1, *[1] * (weight.dim() - 2)]
            masks[name] = keep.to(weight).view(shape)
    return masks


@torch.no_grad()
def remove_channels(traced: fx.GraphModule, channels: Channels, removed: Collection[int]) -> Shapes:
    """Removes units from every tensor in which they stand.

    Args:
        traced: changed in place.
        channels: of it.
        removed: labels of units.

    Returns:
        The shapes of all that has changed, for ``resize``.
    """
    places: dict[str, dict[int, Tensor]] = {}  # by tensor and dimension, what stays
    groups: dict[str, int] = {}
    for name, units in channels.rows.items():
        keep = kept_places(units, removed)
        if len(keep) < len(units):
            dim = channel_dim(tensor_of(traced, name))
            places.setdefault(name, {})[dim] = keep
    for name, units in channels.columns.items():
        keep = kept_places(units, removed)
        if len(keep) == len(units):
            continue
        layer = layer_at(traced, name)
        if name in channels.grouped:
            # Whole groups go, so that each group keeps its inputs.
            groups[name] = len(keep) // layer.weight.shape[1]
        else:
            places.setdefault(f"{name}.weight", {})[1] = keep
    for name in list(places):  # a mask has the shape of its weight
        mask = f"{name.removesuffix('.weight')}.{_MASK}"
        if name.endswith(".weight") and isinstance(tensor_of(traced, mask), Tensor):
            places[mask] = places[name]
    shapes: Shapes = {}
    for name, of_dims in places.items():
        tensor = tensor_of(traced, name)
        values = tensor.data
        for dim, keep in of_dims.items():
            values = values.index_select(dim, keep.to(values.device))
        _give(tensor, values)
        shapes[name] = list(values.shape)
    shapes |= {f"{name}{_GROUPS}": [count] for name, count in groups.items()}
    _tell_modules(traced, shapes)
    return shapes


@torch.no_grad()
def resize(traced: fx.GraphModule, shapes: Mapping[str, list[int]]) -> None:
    """Gives a network the shapes that ``remove_channels`` has left; its values do not matter.

    Args:
        traced: of the network as it was built, changed in place.
        shapes: as ``remove_channels`` returns them.
    """
    for name, shape in shapes.items():
        tensor = tensor_of(traced, name)
        if not isinstance(
            tensor, Tensor
        ):  # the groups of a conv, or a mask that a step makes later
            continue
        values = tensor.data
        for dim, size in enumerate(shape):
            values = values.narrow(dim, 0, size)
        _give(tensor, values.clone())
    _tell_modules(traced, shapes)


def _give(tensor: Tensor, values: Tensor) -> None:
    tensor.data = values.contiguous()
    if tensor.grad is not None:  # of the shape before
        tensor.grad = None


def channel_dim(tensor: Tensor) -> int:
    """The first dimension, or the one that has a size where others have none."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    return dims[0] if len(dims) == 1 else 0


def tensor_of(traced: fx.GraphModule, name: str) -> Any:
    """The parameter, buffer or number of this name; None if its module has none."""
    owner, _, last = name.rpartition(".")
    return getattr(traced.get_submodule(owner), last, None)


def missing_tensors(traced: fx.GraphModule, shapes: Mapping[str, list[int]]) -> list[str]:
    """The tensors, and convs, of ``shapes`` that a network does not have, or has with fewer values.

    A mask is none of them, for a later step makes it.
    """
    missing = []
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        try:
            found = getattr(traced.get_submodule(owner), last, None)
        except AttributeError:
            found = None
        if name.endswith(_GROUPS):
            fits = isinstance(found, int)
        elif last == _MASK and found is None:
            fits = True
        else:
            fits = isinstance(found, Tensor) and _holds(found, shape)
        if not fits:
            missing.append(name)
    return missing


def _holds(tensor: Tensor, shape: Sequence[int]) -> bool:
    is_alike = tensor.dim() == len(shape)
    return is_alike and all(size <= own for size, own in zip(shape, tensor.shape, strict=True))


def _tell_modules(traced: fx.GraphModule, shapes: Mapping[str, list[int]]) -> None:
    """Sets the numbers of channels that modules hold beside their tensors."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        module: Any = traced.get_submodule(owner)
        if f"{owner}{_GROUPS}" in shapes:
            module.groups = shapes[f"{owner}{_GROUPS}"][0]
        _tell(module)


def _tell(module: Any) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif is_layer(module):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        of_channels = module.weight if module.running_mean is None else module.running_mean
        module.num_features = len(of_channels)
