"""The parameter groups of learned scales in the user's optimizers, and what schedules know of them.

Scales have a group of their own, without weight decay and at a share of the rate of the group that
they come from.
"""

from typing import Any

import torch
from torch import nn

from qat_tricks.trainer.optimizers import take_out

# What a group calls its rates.
_RATES = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr"}
# The lists of a scheduler that have one entry for each group.
_PER_GROUP = {
    "base_lrs",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "_last_lr",
    "base_momentums",
    "max_momentums",
}


def give_scales_own_group(
    optimizer: torch.optim.Optimizer,
    scales: list[nn.Parameter],
    schedulers: list[Any],
    lr_factor: float | None,
) -> None:
    """Moves the ``scales`` that ``optimizer`` holds into new groups without weight decay.

    Each new group copies the settings of the old group, so that schedulers treat both alike. A
    scheduler's lists with one entry for each group (such as base learning rates) are extended.

    Args:
        optimizer: with or without the scales among its parameters.
        scales: parameters to move.
        schedulers: the optimizer's learning rate schedulers.
        lr_factor: the scales' learning rate over their old group's; None: 0.1 for SGD (at 1, and a
            rate of 0.1, a network lost five points), else 0.01 (an adaptive optimizer steps by
            the learning rate itself, and scales are of the order of 0.01).
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        # It has one group for good, at whose rate scales would run away: they stay as calibrated.
        take_out(optimizer.param_groups[0], {id(scale) for scale in scales})
        return
    factor = (
        lr_factor
        if lr_factor is not None
        else 0.1
        if isinstance(optimizer, torch.optim.SGD)
        else 0.01
    )
    own = {id(scale) for scale in scales}
    # A copy of the list, which grows inside the loop.
    for index, group in enumerate(list(optimizer.param_groups)):
        if "lr_factor" in group:  # made before, as a finetuning callback restores it
            continue
        settings = {
            key: value for key, value in group.items() if key not in ("params", "param_names")
        }
        moved = take_out(group, own)
        if not moved["params"]:
            continue
        # Schedulers keep a group's peak and initial rates beside the current one.
        for key in _RATES & settings.keys():
            settings[key] = settings[key] * factor
        own_settings = {
            "weight_decay": 0.0,
            "name": "scales",
            "of_group": index,
            "lr_factor": factor,
        }
        optimizer.param_groups.append({**settings, **moved, **own_settings})
        for scheduler in _flatten(schedulers):
            _extend_lists(scheduler, len(optimizer.param_groups) - 1, index, factor)


def _extend_lists(scheduler: Any, groups: int, index: int, factor: float) -> None:
    """Adds an entry to each list of ``scheduler`` that has one for each of so many ``groups``.

    It is that of the group ``index``, a rate times ``factor``.
    """
    for key, values in vars(scheduler).items():
        if (
            isinstance(values, list)
            and len(values) == groups
            and (key in _PER_GROUP or _is_per_group(scheduler, values))
        ):
            is_rate = isinstance(values[index], float) and "momentum" not in key
            values.append(values[index] * factor if is_rate else values[index])


def rates_with_scales(rates: float | list[float], optimizer: torch.optim.Optimizer) -> list[float]:
    """One learning rate for each group, where scales keep their share of their old group's.

    Args:
        rates: one for all groups, or one for each group that the user has made.
        optimizer: has the groups.
    """
    groups = optimizer.param_groups
    of_scales = [group for group in groups if "lr_factor" in group]
    given = rates if isinstance(rates, list) else [rates] * (len(groups) - len(of_scales))
    if len(given) == len(groups):
        return given
    return [*given, *(given[group["of_group"]] * group["lr_factor"] for group in of_scales)]


def _is_per_group(scheduler: Any, values: list[Any]) -> bool:
    """Whether a list of so many entries as there are groups, of a user's scheduler, is of them."""
    # PyTorch's own have other lists too, such as milestones.
    is_own = not type(scheduler).__module__.startswith("torch.")
    return is_own and all(isinstance(value, float) or callable(value) for value in values)


def _flatten(schedulers: list[Any]) -> list[Any]:
    """The schedulers, and those inside a SequentialLR or ChainedScheduler."""
    return [
        s for outer in schedulers for s in (outer, *_flatten(getattr(outer, "_schedulers", [])))
    ]
