"""Prune weights progressively: four independent choices, each a small function in a table.

* schedule and granularity: see ``numerics.sparsity``;
* criterion and scope: see ``graph.pruning``, and ``graph.sparsity_shares`` for shares by measured
  sensitivity.

A pruned weight stays pruned: masks only grow, and pruned weights are set to exactly zero. The
second-order criterion takes the layers' inputs from the beginning of a fit, and the weights as they
are whenever the masks grow: inputs measured anew gave no better network, and a checkpoint would
have to hold the images. Where no training follows, the weights that stay make up for those that
went (``prune_and_refit``).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.pruning import (
    NEED_IMAGES,
    SCOPES,
    check_settings,
    count_of,
    grow_masks,
    prunable,
    scores_of,
    sparsity_of,
)
from qat_tricks.graph.pruning_by_images import Measured, measure, prune_and_refit
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics.sparsity import (
    SCHEDULES,
)
from qat_tricks.trainer.averaging import keep_grids
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.monitors import Hold, describe, keeping_best, without_best
from qat_tricks.trainer.schedule import check_fraction, fit_progress
from qat_tricks.trainer.trick import Trick, check_num_images

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


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
    batches: Sequence[Inputs] = (),
    measured: Measured | None = None,
) -> float:
    """Prunes ``traced`` in place to ``sparsity`` and returns the sparsity reached.

    Args:
        traced: a traced network, quantized or not.
        sparsity: the share of zeros among the weights of the layers that are pruned, in [0, 1);
            rounded up.
        criterion: ``magnitude``; or ``obs``, what a weight's loss does to its layer's output.
        scope: ``layer``: each layer alike; ``global``: one ranking of all weights;
            ``sensitivity``: each layer as far as the network's output bears it.
        granularity: ``weight``, or ``2:4`` with a sparsity of at most 0.5 (layers whose input
            channels are no multiple of four are left dense).
        include, exclude: name patterns (``fnmatch``) of layers.
        batches: the network's inputs, a batch each, for ``obs`` and ``sensitivity``.
        measured: what ``measure`` has told of the network before; by default measured now.

    Raises:
        QatTricksError: an argument that is not allowed, a pattern that matches nothing, or no
            batches where they are needed.
    """
    check_settings(sparsity, criterion=criterion, scope=scope, granularity=granularity)
    pruned = prunable(traced, granularity, include, exclude)
    if measured is None:
        settings = {"criterion": criterion, "scope": scope, "granularity": granularity}
        measured = measure(traced, pruned, batches, sparsity=sparsity, **settings)
    scores = scores_of(pruned, criterion, granularity, measured.curvatures)
    return grow_masks(pruned, scores, SCOPES[scope](list(scores), sparsity, measured.shares))


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
        num_images: on which ``obs`` and ``sensitivity`` are measured.

    Raises:
        QatTricksError: a setting that is not allowed.
    """

    after = ("prune_channels", "fold_batchnorm", "equalize")

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
        num_images: int = 128,
    ) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)
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
        self.done = 0  # how many of the updates of this schedule have been made
        self.reached = 0.0
        self.measured: Measured | None = None  # once it was
        self._hold: Hold | None = None  # until the first validation after the schedule

    def apply(self, work: Workbench) -> None:
        """Prunes to ``initial`` before a training, to ``sparsity`` without one."""
        before = sparsity_of(self._prunable(work).values())
        if work.trains or self.choices["criterion"] != "obs":
            self._prune(work, self.initial if work.trains else self.sparsity)
        else:
            self.reached = prune_and_refit(
                work.network,
                self.sparsity,
                work.batches(self.num_images),
                include=self.include,
                exclude=self.exclude,
                **{key: self.choices[key] for key in ("scope", "granularity")},
            )
        if self.reached > before:  # what comes next is compared with the pruned network
            work.note_change("pruned")

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Notes the sparsity that there is: masks of an earlier fit stay, and only grow."""
        pruned = self._prunable(workbench_of(pl_module))
        self.reached = sparsity_of(pruned.values())
        # Now, for in the middle of a fit its loader is in use. A resumed one has it already.
        self._measure_once(workbench_of(pl_module))

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Holds back what judges networks, until they are as sparse as they are to be."""
        most = self._most(workbench_of(pl_module))
        if self.reached > most:
            rank_zero_warn(
                f"the network has a sparsity of {self.reached:.3f} already, more than sparsity="
                f"{self.sparsity}: a pruned weight stays pruned"
            )
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

    def _most(self, work: Workbench) -> float:
        """The largest sparsity that ``sparsity`` gives, where each layer's count is rounded up."""
        sizes = [layer.weight.numel() for layer in self._prunable(work).values()]
        return sum(count_of(self.sparsity, size) + 1 for size in sizes) / sum(sizes)

    @property
    def _plan(self) -> dict[str, Any]:
        """The settings on which ``done`` depends."""
        names = ("sparsity", "initial", "start", "end", "updates", "schedule")
        return {name: getattr(self, name) for name in names}

    @property
    def _measured_for(self) -> dict[str, Any]:
        """The settings on which ``measured`` depends."""
        patterns = {"include": list(self.include), "exclude": list(self.exclude)}
        others = {"sparsity": self.sparsity, "num_images": self.num_images}
        return self.choices | patterns | others

    def _prunable(self, work: Workbench) -> dict[str, Layer]:
        return prunable(work.network, self.choices["granularity"], self.include, self.exclude)

    def _prune(self, work: Workbench, sparsity: float) -> None:
        self.reached = prune(
            work.network,
            sparsity,
            criterion=self.choices["criterion"],
            scope=self.choices["scope"],
            granularity=self.choices["granularity"],
            include=self.include,
            exclude=self.exclude,
            measured=self._measure_once(work),
        )

    def _measure_once(self, work: Workbench) -> Measured:
        """What images tell, for the whole fit: layers so keep their proportions on the way."""
        if self.measured is None:
            needed = any(choice in NEED_IMAGES for choice in self.choices.values())
            batches = work.batches(self.num_images) if needed else []
            pruned = self._prunable(work)
            self.measured = measure(
                work.network, pruned, batches, sparsity=self.sparsity, **self.choices
            )
        return self.measured

    def reset(self) -> None:
        """Begins the schedule anew."""
        self.done, self.reached, self.measured = 0, 0.0, None

    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule, and what was measured for it."""
        measured = None if self.measured is None else self.measured.as_dict()
        state = {"done": self.done, "reached": self.reached, "measured": measured}
        return state | {"plan": self._plan, "measured_for": self._measured_for}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at a place in the schedule; in another one from where the masks are."""
        # Checkpoints of before have no plan.
        is_same = state_dict.get("plan", self._plan) == self._plan
        self.done = state_dict["done"] if is_same else 0
        self.reached = state_dict["reached"]
        measured = state_dict.get("measured")  # checkpoints of before have none
        # Measured for other settings, or it is not known for which, it is measured anew.
        fits = state_dict.get("measured_for") == self._measured_for
        self.measured = Measured.of(measured) if measured is not None and fits else None
