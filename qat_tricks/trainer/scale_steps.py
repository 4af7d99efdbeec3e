"""Keeps learned scales positive and at their own learning rate, whatever moves them.

A scale is a small positive number, and one long step of an optimizer can take it past 0, where the
tensor that it stands for is lost. So a step changes a scale by at most a tenth of itself. Ordinary
steps are hundreds of times smaller and stay as they are, to the last bit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LARGEST_CHANGE = 0.1  # of a scale in one step, relative
# A scale that has changed so much since the fit began has left what was calibrated.
RUNAWAY = 16.0
# Rounding of a schedule's own products is left alone.
SAME_RATE = 1e-6


class ScaleSteps:
    """Watches the steps of a fit's optimizers.

    Args:
        optimizers: that hold the scales.
        scales: see ``watch``.

    Attributes:
        holds: whether steps leave scales and offsets as they are.
    """

    def __init__(
        self, optimizers: Iterable[Optimizer], scales: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        self.scales: dict[str, nn.Parameter] = {}
        self.lows: list[nn.Parameter] = []
        self.at_first: dict[str, Tensor] = {}
        self.holds = False
        self.named: set[str] = set()
        self.watch(scales or {})
        self._before: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._handles = []
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._note),
                optimizer.register_step_post_hook(self._limit),
            ]

    def watch(self, scales: Mapping[str, nn.Parameter], lows: Iterable[nn.Parameter] = ()) -> None:
        """Watches these learned scales too, given by the name of what they belong to.

        Of ``lows``, the smallest values that learn, no step is too long: each is rounded to the
        grid that its scale makes. Only ``holds`` concerns them.
        """
        self.lows += [low for low in lows if all(low is not known for known in self.lows)]
        self.scales |= scales
        for name, scale in scales.items():
            self.at_first.setdefault(name, scale.detach().clone())

    def let_go(self) -> None:
        """Takes the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def running_away(self) -> list[tuple[str, float]]:
        """The scales that have left their first value by ``RUNAWAY``, each named once.

        Returns:
            Names, each with the largest or smallest ratio of the scale to its first value.
        """
        found = []
        for name, scale in self.scales.items():
            if name in self.named:
                continue
            ratio = scale.detach() / self.at_first[name]
            least, most = float(ratio.min()), float(ratio.max())
            if most > RUNAWAY or least < 1 / RUNAWAY:
                self.named.add(name)
                found.append((name, most if most > RUNAWAY else least))
        return found

    @torch.no_grad()
    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step: mends the rates of the scales' groups, and notes the values."""
        groups = optimizer.param_groups
        for group in groups:
            # A schedule that sets one rate for all groups knows nothing of the scales' share.
            if "lr_factor" in group:
                _set_rate(group, groups[group["of_group"]]["lr"] * group["lr_factor"])
        held = self.lows if self.holds else ()
        own = {id(scale) for scale in (*self.scales.values(), *held)}
        scales = [p for group in groups for p in group["params"] if id(p) in own]
        if scales:
            self._before[id(optimizer)] = (scales, [scale.detach().clone() for scale in scales])

    @torch.no_grad()
    def _limit(self, optimizer: Optimizer, *_: Any) -> None:
        """After a step: takes back what is more than a tenth, or all of it."""
        scales, before = self._before.pop(id(optimizer), ([], []))
        if scales and self.holds:
            torch._foreach_copy_(scales, before)
        elif scales:
            torch._foreach_maximum_(scales, torch._foreach_mul(before, 1 - LARGEST_CHANGE))
            torch._foreach_minimum_(scales, torch._foreach_mul(before, 1 + LARGEST_CHANGE))


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    """Gives a group its rate where it has another one."""
    if isinstance(group["lr"], Tensor):  # of a compiled optimizer, which reads it in place
        group["lr"].copy_(torch.as_tensor(rate))
    elif abs(group["lr"] - float(rate)) > SAME_RATE * abs(float(rate)):
        group["lr"] = float(rate)
