"""The channels of a network that can be removed, in groups whose members are alike.

A *unit* is a set of channels that can only be removed together, such as the channel of a residual
stream in all layers that write to it. The units that stand in the same layers are a *group*: how
many of them stay decides the shapes of those layers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph.channel_labels import NO_CHANNEL, Followed, follow_channels
from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.submodules import layer_at


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Units that stand in the same layers."""

    name: str  # of the first layer whose channels they are, or of the parameter
    units: tuple[int, ...]  # the label of each
    channels: int  # of that layer, for one unit


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Which channels of a network stand where.

    Attributes:
        groups: of the units that can be removed, in the order of the network.
        rows: for each tensor of parameters or statistics that has channels, by name, the label of
            the unit of each; ``NO_CHANNEL`` where it cannot be removed.
        columns: likewise for the input channels of convs and linears, by the layer's name.
        grouped: names of convs whose groups are removed as a whole.
        fixed: by the name of a layer, why none of its output channels can be removed.
    """

    groups: Sequence[ChannelGroup]
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    grouped: Collection[str]
    fixed: Mapping[str, str]

    @property
    def units(self) -> list[int]:
        """Those of all groups."""
        return [unit for group in self.groups for unit in group.units]


def find_channels(traced: fx.GraphModule, inputs: Inputs) -> Channels:
    """The channels of ``traced`` that can be removed.

    Args:
        traced: a float network, which stays as it is; it is run once, on two images.
        inputs: of one image or more.
    """
    followed = follow_channels(traced, inputs)
    rows = {**_rows(traced, followed), **_attributes(followed)}
    columns = {name: _removable(labels, followed) for name, labels in followed.read.items()}
    grouped = {name for name in columns if getattr(layer_at(traced, name), "groups", 1) > 1}
    return Channels(
        groups=_groups(rows, columns),
        rows=rows,
        columns=columns,
        grouped=grouped,
        fixed=_fixed(traced, followed),
    )


def _rows(traced: fx.GraphModule, followed: Followed) -> dict[str, Tensor]:
    """The labels of tensors of modules, in the order in which the network writes them."""
    names: dict[int, str] = {}
    for module_name, module in traced.named_modules():
        for name, tensor in _own_tensors(module):
            names.setdefault(id(tensor), f"{module_name}.{name}")
    found: dict[str, Tensor] = {}
    for key, labels in followed.written.items():
        found[names[key]] = _removable(labels, followed)
    return found


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _attributes(followed: Followed) -> dict[str, Tensor]:
    return {name: _removable(labels, followed) for name, labels in followed.attributes.items()}


def _removable(rows: Tensor, followed: Followed) -> Tensor:
    """The unit of each channel, ``NO_CHANNEL`` for those that stay in any case."""
    labels = followed.labels
    return torch.tensor(
        [
            NO_CHANNEL if label == NO_CHANNEL or labels.reason(label) else labels.root(label)
            for label in rows.tolist()
        ]
    )


def _groups(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> list[ChannelGroup]:
    """Groups the units by the tensors in which they stand, and by how often."""
    # In the order of the network, for a dictionary keeps it.
    stands: dict[int, dict[tuple[str, str], int]] = {}
    for kind, tensors in (("rows", rows), ("columns", columns)):
        for name, units in tensors.items():
            for unit in units.tolist():
                if unit != NO_CHANNEL:
                    counts = stands.setdefault(unit, {})
                    counts[kind, name] = counts.get((kind, name), 0) + 1
    members: dict[tuple[Any, ...], list[int]] = {}
    for unit, counts in stands.items():
        members.setdefault(tuple(counts.items()), []).append(unit)
    groups = []
    for key, of_group in members.items():
        (_, name), count = key[0]
        layer = name.removesuffix(".weight")
        groups.append(ChannelGroup(name=layer, units=tuple(of_group), channels=count))
    # A unit that is all of its layer's channels cannot go.
    return [group for group in groups if len(group.units) > 1]


def _fixed(traced: fx.GraphModule, followed: Followed) -> dict[str, str]:
    fixed: dict[str, str] = {}
    for name in followed.read:
        labels = followed.written[id(layer_at(traced, name).weight)]
        reasons = [followed.labels.reason(label) for label in labels.tolist()]
        if all(reasons):
            fixed[name] = str(reasons[0])
    return fixed


def kept_places(units: Tensor, removed: Collection[int]) -> Tensor:
    """The places of ``units``, ``[C]``, that stay."""
    return torch.tensor([i for i, unit in enumerate(units.tolist()) if unit not in removed])
