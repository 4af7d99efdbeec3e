"""Decides how many channels of each group stay, so that a network meets a budget.

The choice is that of the least sum of the groups' errors, as for bits and for sparsity (see
``numerics.choices``). The cost of a layer is a product of the channels that it reads and makes, so
that it is no sum over groups. The plan therefore goes down step by step: the next channels to go
are those that cost the least error for what they spare by then.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.channel_groups import ChannelGroup, Channels
from qat_tricks.graph.channel_labels import NO_CHANNEL
from qat_tricks.graph.channel_removal import tensor_of
from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.graph.submodules import layer_at

CHOICES = 64  # numbers of units to choose from, at most: more would only take time

Kept = NDArray[np.int64]
"""How many units of each group stay."""

Errors = Sequence[Sequence[float]]
"""Of each group, the error for each number of units that stay, from none to all; it falls to 0."""

Hull = list[tuple[int, float]]
"""Of a group, each number of units that may stay, with the error that each unit down to it costs.
"""


class ChannelCosts:
    """What a network costs with some of its channels.

    Args:
        traced: the network with all of them.
        channels: of it.
        inputs: of one image or more.
    """

    def __init__(self, traced: fx.GraphModule, channels: Channels, inputs: Inputs) -> None:
        self.all: Kept = np.array([len(group.units) for group in channels.groups])
        group_of = {unit: i for i, group in enumerate(channels.groups) for unit in group.units}

        def count(units: Tensor) -> NDArray[np.float64]:
            """How many channels stay in any case, and how many for a unit of each group."""
            row = np.zeros(1 + len(channels.groups))
            for unit in units.tolist():
                # A unit of no group is all of its layer.
                row[0 if unit == NO_CHANNEL or unit not in group_of else 1 + group_of[unit]] += 1
            for i, group in enumerate(channels.groups):
                row[1 + i] /= len(group.units)
            return row

        macs: dict[str, int] = {}
        for call in macs_of_calls(traced, inputs):
            macs[call.layer] = macs.get(call.layer, 0) + call.macs
        one = np.zeros(1 + len(channels.groups))
        one[0] = 1.0
        rows_of: list[NDArray[np.float64]] = []
        columns_of: list[NDArray[np.float64]] = []
        parameters, products = [], []
        self._layers = list(channels.columns)
        for name, units in channels.columns.items():
            weight = layer_at(traced, name).weight
            rows = channels.rows.get(f"{name}.weight")
            is_grouped = name in channels.grouped
            rows_of.append(one * len(weight) if rows is None else count(rows))
            # Whole groups go, so that an output channel reads as many as before.
            columns_of.append(one * weight.shape[1] if is_grouped else count(units))
            parameters.append(weight[0, 0].numel())
            products.append(macs.get(name, 0) / weight.shape[0] / weight.shape[1])
        for name, units in channels.rows.items():
            tensor = tensor_of(traced, name)
            if (
                isinstance(tensor, nn.Parameter)
                and name.removesuffix(".weight") not in channels.columns
            ):
                rows_of.append(count(units))
                columns_of.append(one)
                parameters.append(1)
                products.append(0.0)
        # Channels that stay in any case, and for a unit of each group, ``[tensors, 1 + groups]``.
        self._row_table, self._column_table = np.array(rows_of), np.array(columns_of)
        self._parameters, self._products = np.array(parameters), np.array(products)
        total = sum(parameter.numel() for parameter in traced.parameters())
        self._other_parameters = 0.0
        self._other_parameters = total - self.parameters(self.all)
        self._other_macs = sum(macs.values()) - float(self._cells(self.all) @ self._products)

    def parameters(self, kept: Kept) -> float:
        """The number of parameters."""
        return float(self._cells(kept) @ self._parameters) + self._other_parameters

    def macs(self, kept: Kept) -> float:
        """The products with weights for one image."""
        return float(self._cells(kept) @ self._products) + self._other_macs

    def times(self, milliseconds: Mapping[str, float]) -> "Cost":
        """A cost that is the layers' time: it goes with their output times their input channels.

        Args:
            milliseconds: of each layer with all channels; of those that are not named, none.
        """
        names = [milliseconds.get(name, 0.0) for name in self._layers]
        of_layers = np.zeros(len(self._products))
        of_layers[: len(names)] = names
        of_cells = of_layers / self._cells(self.all)
        return lambda kept: float(self._cells(kept) @ of_cells)

    def _cells(self, kept: Kept) -> NDArray[np.float64]:
        """Output channels times input channels of each layer."""
        counts = np.concatenate([[1.0], kept])
        return np.asarray((self._row_table @ counts) * (self._column_table @ counts))


Cost = Callable[[Kept], float]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Which numbers of units a group may keep."""

    # Of channels, which kernels of a runtime like; of a group with fewer than two times as many,
    # its half, and so on.
    multiple: int = 16
    least: float = 0.1  # share of a group's channels that stays at least

    def of(self, group: ChannelGroup) -> list[int]:
        """From the fewest to all."""
        everything, multiple = len(group.units), self.multiple
        while multiple > 1 and everything * group.channels < 2 * multiple:
            multiple //= 2
        step = math.lcm(multiple, group.channels) // group.channels
        step *= math.ceil(everything / step / CHOICES)
        fewest = max(1, math.ceil(self.least * everything))
        return sorted({*range(step * math.ceil(fewest / step), everything, step), everything})


def plan_alike(groups: Sequence[ChannelGroup], steps: Steps, cost: Cost, budget: float) -> Kept:
    """Keeps the same share of each group, the largest that meets the budget.

    Args:
        groups: of channels.
        steps: see ``Steps``.
        cost: of a choice.
        budget: that it must not exceed.

    Raises:
        QatTricksError: even the fewest channels cost more.
    """
    options = [steps.of(group) for group in groups]
    shares = sorted(
        {n / len(group.units) for group, each in zip(groups, options, strict=True) for n in each}
    )

    def kept(share: float) -> Kept:
        return np.array(
            [
                max([n for n in each if n <= share * each[-1] + 1e-9], default=each[0])
                for each in options
            ]
        )

    meeting = [share for share in shares if cost(kept(share)) <= budget]
    if not meeting:
        raise _too_small(cost(kept(0.0)), budget, cost(kept(1.0)))
    return kept(max(meeting))


def plan_by_errors(
    groups: Sequence[ChannelGroup], errors: Errors, steps: Steps, cost: Cost, budget: float
) -> Kept:
    """Keeps what gives the least sum of errors under a budget, see the module.

    Args:
        groups: of channels.
        errors: see ``Errors``.
        steps: see ``Steps``.
        cost: of a choice.
        budget: that it must not exceed.

    Raises:
        QatTricksError: even the fewest channels cost more.
    """
    hulls = [
        _hull(steps.of(group), of_group) for group, of_group in zip(groups, errors, strict=True)
    ]

    def error(kept: Kept) -> float:
        return sum(of_group[n] for of_group, n in zip(errors, kept.tolist(), strict=True))

    kept = np.array([len(group.units) for group in groups])
    everything = cost(kept)
    last: list[Kept] = []  # the best choice that one large step would have come to
    while (now := cost(kept)) > budget:
        last = sorted([*last, *_last_steps(kept, hulls, cost, budget)], key=error)[:1]
        best, chosen = math.inf, None
        for index, hull in enumerate(hulls):
            smaller = [step for step in hull if step[0] < kept[index]]
            if not smaller:
                continue
            count, slope = smaller[-1]
            trial = _with(kept, index, count)
            spared = now - cost(trial)
            price = slope * (kept[index] - count) / spared if spared > 0 else math.inf
            if price < best:
                best, chosen = price, trial
        if chosen is None:
            raise _too_small(now, budget, everything)
        kept = chosen
    # The steps on the way were the best a unit spared, and the last one may spare far too much.
    every = [_with_leftovers(each, errors, hulls, cost, budget) for each in [kept, *last]]
    return min(every, key=error)


def _last_steps(kept: Kept, hulls: Sequence[Hull], cost: Cost, budget: float) -> list[Kept]:
    """The choices that one group more, with as many channels as it may keep, brings to budget."""
    found = []
    for index, hull in enumerate(hulls):
        smaller = [count for count, _ in hull if count < kept[index]]
        # Mostly even the fewest do not bring it there.
        if smaller and cost(_with(kept, index, smaller[0])) <= budget:
            trials = (_with(kept, index, count) for count in reversed(smaller))
            found.append(next(trial for trial in trials if cost(trial) <= budget))
    return found


def _with(kept: Kept, index: int, count: int) -> Kept:
    changed = kept.copy()
    changed[index] = count
    return changed


def _with_leftovers(
    kept: Kept, errors: Errors, hulls: Sequence[Hull], cost: Cost, budget: float
) -> Kept:
    """Gives back what was taken beyond the budget, the dearest errors first."""
    while True:
        best, chosen = 0.0, None
        for index, hull in enumerate(hulls):
            larger = [step for step in hull if step[0] > kept[index]]
            if not larger:
                continue
            trial = _with(kept, index, larger[0][0])
            gain = errors[index][kept[index]] - errors[index][trial[index]]
            if gain > best and cost(trial) <= budget:
                best, chosen = gain, trial
        if chosen is None:
            return kept
        kept = chosen


def largest_share(
    excess: Callable[[float], float], *, start: float, trials: int, near: float
) -> float | None:
    """The largest share of something that is not too much, by trials.

    Args:
        excess: what a share comes to, in units of what is allowed; it rises with the share.
        start: the share to try first.
        trials: at most.
        near: how near to 1 the excess need not come nearer.

    Returns:
        None if no share that was tried is little enough.

    Raises:
        QatTricksError: what ``excess`` raises for the first share.
    """
    little, much = 0.0, 1.0
    best: float | None = None
    share = start
    seen: list[tuple[float, float]] = [(0.0, 0.0)]  # shares, and their excess
    for trial in range(trials):
        try:
            found = excess(share)
        except QatTricksError:  # fewer channels than may stay
            if trial == 0:
                raise
            little, share = share, (share + much) / 2
            continue
        if found <= 1:
            little = best = share
        else:
            much = share
        if 1 - near <= found <= 1:
            break
        # Time is nearly a line in MACs: the next trial is where the last two points' meets what is
        # allowed, or stays a little below.
        (before, excess_before), seen = seen[-1], [(share, found)]
        slope = (found - excess_before) / (share - before)
        nearer = share + (1 - near / 2 - found) / slope if slope > 0 else math.inf
        share = nearer if little < nearer < much else (little + much) / 2
    return best


def _hull(options: Sequence[int], errors: Sequence[float]) -> Hull:
    """The options of a group, with the error that each unit down to it costs.

    These are the slopes of the lower convex hull: where a step is dear and those behind it are
    cheap, they are taken together at their mean.
    """
    points = [(count, errors[count]) for count in reversed(options)]
    corners: list[tuple[int, float]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    slopes = {options[-1]: 0.0}
    for start, end in pairwise(corners):
        for count in options:
            if end[0] <= count < start[0]:
                slopes[count] = max(_slope(start, end), 0.0)
    return sorted(slopes.items())


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (start[0] - end[0])


def _too_small(least: float, budget: float, everything: float) -> QatTricksError:
    return QatTricksError(
        f"share={budget / everything:.3g} is not allowed: the fewest channels that may stay cost "
        f"{least / everything:.3g} of the network; give that or more, or lower least or multiple"
    )
