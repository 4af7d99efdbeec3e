"""Prune weights, progressively: four independent choices, each a small function.

* schedule: cubic, ``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (t_1 - t_0))^3`` (Zhu and Gupta
  2017, "To prune, or not to prune", arXiv 1710.01878, equation 1);
* criterion: magnitude (Han et al. 2015, arXiv 1506.02626);
* granularity: single weights, or 2:4 (two of every four along the input channels, Mishra et al.
  2021, arXiv 2104.08378);
* scope: each layer alike, or global, where all weights compete after each layer's are divided by
  their root mean square (without which a layer's scale, not its use, would decide: folding and
  equalization change scales freely).

A pruned weight stays pruned: masks only grow, and pruned weights are set to exactly zero.
"""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.layers import Layer, as_layer, is_layer
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.averaging import keep_grids
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.schedule import check_fraction, fit_progress
from qat_tricks.trainer.trick import Trick

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

SCOPES = ("layer", "global")
GRANULARITIES = ("weight", "2:4")


def cubic_schedule(
    progress: float, *, initial: float, final: float, start: float, end: float
) -> float:
    """The sparsity at ``progress`` of the training: ``initial`` until ``start``, ``final`` from
    ``end`` on.
    """
    if progress >= end:
        return final
    if progress <= start:
        return initial
    remaining = 1 - (progress - start) / (end - start)
    return final + (initial - final) * remaining**3


def magnitude(layer: Layer) -> Tensor:
    """The criterion: the absolute value of each weight, in units of the layer's root mean square;
    pruned ones at 0.
    """
    weight = layer.masked_weight().detach().float()
    return weight.abs() / weight.square().mean().sqrt().clamp_min(1e-12)


def prunable(
    traced: fx.GraphModule, granularity: str, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Layer]:
    """The convs and linears that ``prune`` prunes, by name, made ready to carry a mask.

    Raises:
        QatTricksError: a pattern matches no layer, or no layer is left.
    """
    factors = spec_of(traced).get("convs", [])  # BatchNorms once: a weight less is a channel less
    modules = {
        name: module
        for name, module in traced.named_modules()
        if is_layer(module) and name not in factors
    }
    for pattern in [*include, *exclude]:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise QatTricksError(
                f'pattern "{pattern}" matches no conv or linear layer: '
                f"{did_you_mean(pattern, modules)}"
            )
    chosen = {
        name: as_layer(module)
        for name, module in modules.items()
        if any(fnmatchcase(name, p) for p in include)
        and not any(fnmatchcase(name, p) for p in exclude)
        and (granularity != "2:4" or module.weight.shape[1] % 4 == 0)
    }
    if not chosen:
        raise QatTricksError(
            f"no layer is left to prune (granularity {granularity}): widen include or narrow "
            "exclude"
        )
    for name, layer in chosen.items():
        if layer.weight_mask is None:
            layer.weight_mask = torch.ones_like(layer.weight)
        spec_of(traced).setdefault("layers", {}).setdefault(name, {})["mask"] = True
    return chosen


@torch.no_grad()
def prune(
    traced: fx.GraphModule,
    sparsity: float,
    *,
    scope: str = "layer",
    granularity: str = "weight",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> float:
    """Prunes ``traced`` in place to ``sparsity`` and returns the sparsity reached, of all weights
    of the chosen layers.

    Args:
        traced: a traced network, quantized or not.
        sparsity: the share of zeros among the weights of the chosen layers, in [0, 1); rounded up.
        scope: ``layer``: each layer alike; ``global``: one ranking of all weights.
        granularity: ``weight``, or ``2:4`` with a sparsity of at most 0.5 (layers whose input
            channels are no multiple of four are left dense).
        include, exclude: name patterns (``fnmatch``) of layers.

    Raises:
        QatTricksError: an argument that is not allowed, or a pattern that matches nothing.
    """
    check_settings(sparsity, scope, granularity)
    chosen = prunable(traced, granularity, include, exclude)
    scores = {name: magnitude(layer) for name, layer in chosen.items()}
    if granularity == "2:4":
        for score in scores.values():
            _protect_two_of_four(score)
    groups = [list(chosen)] if scope == "global" else [[name] for name in chosen]
    for names in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        count = math.ceil(sparsity * flat.numel() - 1e-9)
        keep = torch.ones_like(flat)
        keep[flat.argsort(stable=True)[:count]] = 0  # a full order: ties can never change the count
        for name, part in zip(
            names, keep.split([scores[name].numel() for name in names]), strict=True
        ):
            layer = chosen[name]
            assert layer.weight_mask is not None
            layer.weight_mask.mul_(part.view_as(layer.weight_mask))
            layer.weight.mul_(layer.weight_mask)
    return sparsity_of(chosen.values())


def sparsity_of(pruned: Iterable[Layer]) -> float:
    """The share of zeros in the masks of ``pruned``."""
    masks = [layer.weight_mask for layer in pruned if layer.weight_mask is not None]
    return 1 - sum(float(mask.sum()) for mask in masks) / max(
        1, sum(mask.numel() for mask in masks)
    )


def _protect_two_of_four(score: Tensor) -> None:
    """Puts the two largest of every four consecutive input channels of ``score`` out of reach."""
    groups = score.transpose(1, -1)  # input channels last
    fours = groups.reshape(*groups.shape[:-1], -1, 4)
    top = fours.topk(2, dim=-1).indices
    fours = fours.scatter(-1, top, float("inf"))
    score.copy_(fours.reshape(groups.shape).transpose(1, -1))


def check_settings(sparsity: float, scope: str, granularity: str) -> None:
    """Raises QatTricksError for settings that are not allowed, all of them at once."""
    problems = []
    if not 0 <= sparsity < 1:
        problems.append(f"sparsity={sparsity} is not allowed: give a share from 0 to below 1")
    if scope not in SCOPES:
        problems.append(f'unknown scope "{scope}": {did_you_mean(scope, SCOPES)}')
    if granularity not in GRANULARITIES:
        problems.append(
            f'unknown granularity "{granularity}": {did_you_mean(granularity, GRANULARITIES)}'
        )
    if granularity == "2:4" and sparsity > 0.5:
        problems.append(
            f"sparsity={sparsity} is not possible with 2:4: give 0.5, or granularity=weight"
        )
    if problems:
        raise QatTricksError("; ".join(problems))


class Prune(Trick):
    """Callback: raises the sparsity from ``initial`` to ``sparsity`` between the fractions
    ``start`` and ``end`` of the fit.

    Without training it prunes at once. ``updates`` is how many times the masks are renewed between
    ``start`` and ``end``.
    """

    after = ("fold_batchnorm", "equalize")

    def __init__(
        self,
        sparsity: float = 0.5,
        initial: float = 0.0,
        start: float = 0.0,
        end: float = 0.6,
        updates: int = 50,
        scope: str = "layer",
        granularity: str = "weight",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_settings(sparsity, scope, granularity)
        check_settings(initial, scope, granularity)
        self.sparsity, self.initial, self.updates = sparsity, initial, updates
        self.start, self.end = check_fraction("start", start), check_fraction("end", end)
        if start > end or initial > sparsity or updates < 1:
            raise QatTricksError(
                f"start={start}, end={end}, initial={initial}, sparsity={sparsity}, "
                f"updates={updates}: start must not be after end, initial not above sparsity, "
                "updates at least 1"
            )
        self.choice: dict[str, Any] = {
            "scope": scope, "granularity": granularity, "include": tuple(include), "exclude": tuple(exclude),
        }  # fmt: skip
        self.done = 0  # how many of the updates have been made
        self.reached = 0.0

    def apply(self, work: Workbench) -> None:
        prune(work.network, self.initial if work.trains else self.sparsity, **self.choice)

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._update(workbench_of(pl_module), fit_progress(trainer)):
            pl_module.log("sparsity", self.reached, batch_size=1)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._update(workbench_of(pl_module), fit_progress(trainer))
        if self.done < self.updates:
            rank_zero_warn(
                f"training ended before the pruning schedule did: sparsity is {self.reached:.3f}, "
                f"not yet {self.sparsity}; train longer or lower end"
            )
        keep_grids(trainer, pl_module)  # before a callback that averages puts its masks in

    def _update(self, work: Workbench, progress: float) -> bool:
        """Renews the masks if another update is due; returns whether it was."""
        ramp = max(self.end - self.start, 1e-9)
        share = 1.0 if progress >= self.end else max(0.0, (progress - self.start) / ramp)
        due = math.floor(share * self.updates)
        if due <= self.done:
            return False
        self.done = due
        at = self.start + ramp * due / self.updates if due < self.updates else self.end
        target = cubic_schedule(
            at, initial=self.initial, final=self.sparsity, start=self.start, end=self.end
        )
        self.reached = prune(work.network, target, **self.choice)
        return True

    def reset(self) -> None:
        self.done, self.reached = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "reached": self.reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.reached = state_dict["done"], state_dict["reached"]
