"""Prune weights progressively: four independent choices, each a small function in a table.

* schedule: cubic, ``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (t_1 - t_0))^3`` (Zhu and Gupta
  2017, "To prune, or not to prune", arXiv 1710.01878, equation 1);
* criterion: magnitude (Han et al. 2015, arXiv 1506.02626);
* granularity: single weights, or 2:4 (two of every four along the input channels, Mishra et al.
  2021, arXiv 2104.08378);
* scope: each layer alike, or global, where all weights compete after each layer's are divided by
  their root mean square. Without that division a layer's scale would decide instead of its use, for
  folding and equalization change scales freely.

A pruned weight stays pruned: masks only grow, and pruned weights are set to exactly zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.calls_beside import is_inside
from qat_tricks.graph.layers import Layer, as_layer, is_layer
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.averaging import keep_grids
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.monitors import Hold, describe, keeping_best, without_best
from qat_tricks.trainer.schedule import check_fraction, fit_progress
from qat_tricks.trainer.trick import Trick

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def cubic_schedule(
    progress: float, *, initial: float, final: float, start: float, end: float
) -> float:
    """The sparsity at ``progress`` of the training.

    It is ``initial`` until ``start`` and ``final`` from ``end`` on.
    """
    if progress >= end:
        return final
    if progress <= start:
        return initial
    remaining = 1 - (progress - start) / (end - start)
    return final + (initial - final) * remaining**3


def magnitude(layer: Layer) -> Tensor:
    """The absolute value of each weight, in units of the layer's root mean square; 0 if pruned.

    A layer's own BatchNorm counts: what is compared is the weight that is deployed.
    """
    weight = layer.deployed_weight().detach().float()
    return weight.abs() / weight.square().mean().sqrt().clamp_min(1e-12)


def single_weights(score: Tensor) -> Tensor | None:
    """Lets any weight go."""
    return score


def two_of_four(score: Tensor) -> Tensor | None:
    """Keeps the two largest scores of every four consecutive input channels.

    A layer whose input channels are no multiple of four does not fit.
    """
    if score.shape[1] % 4:
        return None
    # The input channels go last, where neighbours in fours are one row.
    channels_last = score.transpose(1, -1)
    fours = channels_last.reshape(*channels_last.shape[:-1], -1, 4)
    largest = fours.topk(2, dim=-1).indices
    # Infinite scores are never the smallest, so these two stay.
    fours = fours.scatter(-1, largest, float("inf"))
    return fours.reshape(channels_last.shape).transpose(1, -1)


def each_layer(names: Sequence[str]) -> list[list[str]]:
    """Lets each layer rank its own weights, so that all reach the same sparsity."""
    return [[name] for name in names]


def all_layers(names: Sequence[str]) -> list[list[str]]:
    """Ranks the weights of all layers together."""
    return [list(names)]


# A schedule gives the sparsity at a time. A criterion gives a layer's scores, of the weight's
# shape; the smallest go first. A granularity gives the scores back, infinite where a weight must
# stay, or None for a weight that it does not fit. A scope gives the groups of layers that rank
# together.
SCHEDULES: Mapping[str, Callable[..., float]] = {"cubic": cubic_schedule}
CRITERIA: Mapping[str, Callable[[Layer], Tensor]] = {"magnitude": magnitude}
GRANULARITIES: Mapping[str, Callable[[Tensor], Tensor | None]] = {
    "weight": single_weights,
    "2:4": two_of_four,
}
SCOPES: Mapping[str, Callable[[Sequence[str]], list[list[str]]]] = {
    "layer": each_layer,
    "global": all_layers,
}


def prunable(
    traced: fx.GraphModule, granularity: str, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Layer]:
    """The convs and linears that ``prune`` prunes, by name, made ready to carry a mask.

    Raises:
        QatTricksError: a pattern matches no layer, or no layer is left.
    """
    # A conv that was a BatchNorm has one weight a channel: without it the channel is lost.
    factors = spec_of(traced).get("convs", [])
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    modules = {
        name: module
        for name, module in traced.named_modules()
        if is_layer(module) and is_inside(name, called) and name not in factors
    }
    for pattern in [*include, *exclude]:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise QatTricksError(
                f'pattern "{pattern}" matches no conv or linear layer: '
                f"{did_you_mean(pattern, modules)}"
            )
    fits = GRANULARITIES[granularity]
    pruned = {
        name: as_layer(module)
        for name, module in modules.items()
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
        and fits(module.weight.detach().abs()) is not None
    }
    if not pruned:
        raise QatTricksError(
            f"no layer is left to prune (granularity {granularity}): widen include or narrow "
            "exclude"
        )
    for name, layer in pruned.items():
        if layer.weight_mask is None:
            layer.weight_mask = torch.ones_like(layer.weight)
        spec_of(traced).setdefault("layers", {}).setdefault(name, {})["mask"] = True
    return pruned


@torch.no_grad()
def prune(
    traced: fx.GraphModule,
    sparsity: float,
    *,
    criterion: str = "magnitude",
    scope: str = "layer",
    granularity: str = "weight",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> float:
    """Prunes ``traced`` in place to ``sparsity`` and returns the sparsity reached.

    Args:
        traced: a traced network, quantized or not.
        sparsity: the share of zeros among the weights of the layers that are pruned, in [0, 1);
            rounded up.
        criterion: ``magnitude``.
        scope: ``layer``: each layer alike; ``global``: one ranking of all weights.
        granularity: ``weight``, or ``2:4`` with a sparsity of at most 0.5 (layers whose input
            channels are no multiple of four are left dense).
        include, exclude: name patterns (``fnmatch``) of layers.

    Raises:
        QatTricksError: an argument that is not allowed, or a pattern that matches nothing.
    """
    check_settings(sparsity, criterion=criterion, scope=scope, granularity=granularity)
    pruned = prunable(traced, granularity, include, exclude)
    scores: dict[str, Tensor] = {}
    for name, layer in pruned.items():
        score = GRANULARITIES[granularity](CRITERIA[criterion](layer))
        assert score is not None  # ``prunable`` leaves out layers that do not fit
        scores[name] = score
    for names in SCOPES[scope](list(pruned)):
        flat = torch.cat([scores[name].flatten() for name in names])
        # Rounded up, less the error of the product in floats.
        count = math.ceil(sparsity * flat.numel() - 1e-9)
        keep = torch.ones_like(flat)
        keep[flat.argsort(stable=True)[:count]] = 0  # a full order: ties never change the count
        sizes = [scores[name].numel() for name in names]
        for name, part in zip(names, keep.split(sizes), strict=True):
            layer = pruned[name]
            assert layer.weight_mask is not None
            # Masks are multiplied, so a pruned weight stays pruned.
            layer.weight_mask.mul_(part.view_as(layer.weight_mask))
            layer.weight.mul_(layer.weight_mask)
    return sparsity_of(pruned.values())


def sparsity_of(pruned: Iterable[Layer]) -> float:
    """The share of zeros in the masks of ``pruned``."""
    masks = [layer.weight_mask for layer in pruned if layer.weight_mask is not None]
    ones = sum(float(mask.sum()) for mask in masks)
    return 1 - ones / max(1, sum(mask.numel() for mask in masks))


def largest_sparsity(granularity: str) -> float:
    """The largest share of weights that a granularity lets go, 0..1."""
    # Tried on a conv's weight of distinct scores: the finite ones may go.
    score = GRANULARITIES[granularity](torch.arange(8.0 * 32 * 9).view(8, 32, 3, 3))
    return 1.0 if score is None else float(score.isfinite().float().mean())


def check_settings(sparsity: float, **choices: str) -> None:
    """Raises QatTricksError for settings that are not allowed, all of them at once.

    Args:
        sparsity: the share of zeros.
        choices: names of ``schedule``, ``criterion``, ``granularity`` and ``scope``, if they are
            to be checked.
    """
    problems = []
    if not 0 <= sparsity < 1:
        problems.append(f"sparsity={sparsity} is not allowed: give a share from 0 to below 1")
    tables: dict[str, Mapping[str, Any]] = {
        "schedule": SCHEDULES,
        "criterion": CRITERIA,
        "granularity": GRANULARITIES,
        "scope": SCOPES,
    }
    for choice, name in choices.items():
        if name not in tables[choice]:
            problems.append(f'unknown {choice} "{name}": {did_you_mean(name, tables[choice])}')
    granularity = choices.get("granularity", "weight")
    if not problems and sparsity > (most := largest_sparsity(granularity)):
        problems.append(
            f"sparsity={sparsity} is not possible with {granularity}: give {most:g} or less, or "
            "granularity=weight"
        )
    if problems:
        raise QatTricksError("; ".join(problems))


class Prune(Trick):
    """Callback of ``prune``: raises the sparsity from ``initial`` to ``sparsity`` during the fit.

    Without training it prunes at once.

    Args:
        sparsity: the share of zeros at the end.
        initial: the share of zeros at the start.
        start: the fraction of the fit at which the schedule starts.
        end: the fraction of the fit at which it ends.
        updates: the number of times the masks are renewed in between.
        schedule: a name of ``SCHEDULES``.
        criterion, scope, granularity, include, exclude: as of ``prune``.

    Raises:
        QatTricksError: a setting that is not allowed.
    """

    after = ("fold_batchnorm", "equalize")

    def __init__(
        self,
        sparsity: float = 0.5,
        initial: float = 0.0,
        start: float = 0.0,
        end: float = 0.6,
        updates: int = 50,
        schedule: str = "cubic",
        criterion: str = "magnitude",
        scope: str = "layer",
        granularity: str = "weight",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.choices = {"criterion": criterion, "scope": scope, "granularity": granularity}
        check_settings(sparsity, schedule=schedule, **self.choices)
        check_settings(initial, **self.choices)
        self.sparsity, self.initial, self.updates = sparsity, initial, updates
        self.start, self.end = check_fraction("start", start), check_fraction("end", end)
        if start > end or initial > sparsity or updates < 1:
            raise QatTricksError(
                f"start={start}, end={end}, initial={initial}, sparsity={sparsity}, "
                f"updates={updates}: start must not be after end, initial not above sparsity, "
                "updates at least 1"
            )
        self.schedule = schedule
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.done = 0  # how many of the updates have been made
        self.reached = 0.0
        self._hold: Hold | None = None  # until the first validation after the schedule

    def apply(self, work: Workbench) -> None:
        """Prunes to ``initial`` before a training, to ``sparsity`` without one."""
        self._prune(work, self.initial if work.trains else self.sparsity)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Notes the sparsity that there is: masks of an earlier fit stay, and only grow."""
        pruned = self._prunable(workbench_of(pl_module))
        self.reached = sparsity_of(pruned.values())

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Holds back what judges networks, until they are as sparse as they are to be."""
        # Sums of masks are floats. Masks of an earlier fit may be the last ones already.
        if self.done < self.updates and self.end > 0 and self.reached < self.sparsity - 1e-6:
            self._hold = Hold(trainer)
            self._hold.announce(self.end)

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Renews the masks when an update is due, and logs the sparsity."""
        if self._advance(trainer, pl_module):
            pl_module.log("sparsity", self.reached, batch_size=1)

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Makes the last update before the last validation, which is of the final network."""
        self._advance_at_the_end(trainer, pl_module)
        if self._hold is not None and self._hold.is_over:
            self._hold.begin_validation()
            self._hold = None

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Makes the last update before the last checkpoint is written."""
        self._advance_at_the_end(trainer, pl_module)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Makes the last update."""
        self._advance(trainer, pl_module)
        self._release()
        keep_grids(trainer, pl_module)  # before a callback that averages puts its masks in

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Warns if training ended before the schedule, or did not begin."""
        best = keeping_best(trainer)
        # A fit that stops early, by time or by hand, has skipped the last updates. One that has
        # nothing to train, as in a trainer that reached its max_epochs, has skipped them all.
        if self.done < self.updates:
            rank_zero_warn(
                "training ended before the pruning schedule did: sparsity is "
                f"{self.reached:.3f}, not yet {self.sparsity}; train longer or lower end"
                + (f"; the best network of {describe(best)} is no sparser" if best else "")
            )
        elif empty := without_best(trainer):
            rank_zero_warn(
                f"{describe(empty)} has kept no network since pruning ended, and has no best one: "
                "validate once more, or lower end"
            )

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Lets go of what was held back."""
        self._release()

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()
        self._hold = None

    def _advance(self, trainer: "Trainer", pl_module: "LightningModule") -> bool:
        """Renews the masks if another update is due; returns whether it was."""
        is_due = self._update(workbench_of(pl_module), fit_progress(trainer))
        if self._hold is not None and not self._hold.is_over:
            if self.done >= self.updates:
                self._hold.end()
            else:
                self._hold.forget()
        return is_due

    def _advance_at_the_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Makes the last update where no batch follows."""
        is_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_fit and self.done < self.updates and fit_progress(trainer) >= 1:
            self._advance(trainer, pl_module)

    def _update(self, work: Workbench, progress: float) -> bool:
        """Renews the masks if another update is due; returns whether it was."""
        ramp = max(self.end - self.start, 1e-9)
        share = 1.0 if progress >= self.end else max(0.0, (progress - self.start) / ramp)
        due = math.floor(share * self.updates)
        if due <= self.done:
            return False
        self.done = due
        # The time at which the update was due, so that a late batch does not change the schedule.
        time = self.start + ramp * due / self.updates if due < self.updates else self.end
        bounds = {"initial": self.initial, "final": self.sparsity}
        sparsity = SCHEDULES[self.schedule](time, **bounds, start=self.start, end=self.end)
        self._prune(work, sparsity)
        return True

    def _prunable(self, work: Workbench) -> dict[str, Layer]:
        return prunable(work.network, self.choices["granularity"], self.include, self.exclude)

    def _prune(self, work: Workbench, sparsity: float) -> None:
        self.reached = prune(
            work.network, sparsity, include=self.include, exclude=self.exclude, **self.choices
        )

    def reset(self) -> None:
        """Begins the schedule anew."""
        self.done, self.reached = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule."""
        return {"done": self.done, "reached": self.reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at a place in the schedule."""
        self.done, self.reached = state_dict["done"], state_dict["reached"]
