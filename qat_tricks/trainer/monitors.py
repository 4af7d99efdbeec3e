"""Callbacks that judge networks, held back until a schedule of ours has ended.

A network that is not yet pruned is often the better one, and never the wanted one. So what
``ModelCheckpoint(monitor=...)`` has kept and what ``EarlyStopping`` has seen before the schedule's
end do not count after it, and an average begins anew. Files are written all the time: a run can be
resumed from each, and a better network takes their place as in any fit.

What is set are attributes that these callbacks save in checkpoints themselves, at the same batch in
each run, so that a resumed run does as the whole one; and a threshold, which no checkpoint has.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from qat_tricks.trainer.averaging import is_averaging, restart_average
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.schedule import done_before, fit_progress, foreseen_batches

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def keeping_best(trainer: "Trainer") -> list[Any]:
    """The callbacks of a trainer that keep the best networks by a metric."""
    kind = package_of(trainer).callbacks.ModelCheckpoint
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, kind) and c.monitor is not None and c.save_top_k]


def describe(callbacks: list[Any]) -> str:
    """The callbacks, as the user wrote them."""
    names = [
        f'{type(c).__name__}(monitor="{c.monitor}")' if hasattr(c, "monitor") else type(c).__name__
        for c in callbacks
    ]
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last


class Hold:
    """Holds the monitoring callbacks of a trainer back, from the start of its training.

    Attributes:
        held: all callbacks that are held back.
        is_over: whether they are not held back any more.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        kind = package_of(trainer).callbacks.EarlyStopping
        self.stopping = [c for c in callbacks if isinstance(c, kind)]
        averaging = [c for c in callbacks if is_averaging(c)]
        self.held = [*keeping_best(trainer), *self.stopping, *averaging]
        # A network that is good enough may be so because it is not pruned yet.
        self._thresholds = [c.stopping_threshold for c in self.stopping]
        for callback in self.stopping:
            callback.stopping_threshold = None
        self._last: dict[str, torch.Tensor | None] = {}
        self.is_over = False
        self.forget()

    def announce(self, end: float) -> None:
        """Says what is held back, and until when.

        Args:
            end: the fraction of the training at which the schedule ends.
        """
        if not self.held or not self.trainer.is_global_zero:
            return
        fit_progress(self.trainer)  # raises for a fit without an end
        total, an_epoch = foreseen_batches(self.trainer), self.trainer.num_training_batches
        if math.isinf(total):  # it ends by steps that the module makes by hand
            when = f"when {end:.0%} of the fit is done"
        else:
            batch = math.ceil(end * total)
            when = f"at batch {batch} of {total:.0f}"
            if math.isfinite(an_epoch):
                epoch = done_before(self.trainer).epochs + min(batch, total - 1) // an_epoch
                when += f" (epoch {epoch:.0f})"
        logging.getLogger(f"{package_of(self.trainer).__name__}.utilities.rank_zero").info(
            f"pruning ends {when}, and {describe(self.held)} will not count what comes before"
        )

    def forget(self) -> None:
        """Lets ``EarlyStopping`` see the next value as its first."""
        for callback in self.stopping:
            _forget(callback)

    def end(self) -> None:
        """Lets all of them begin to judge now."""
        self.release()
        for callback in self._judging():
            _forget(callback)
        restart_average(self.trainer)
        self._last = {c.monitor: self._metric(c) for c in self._judging()}

    def begin_validation(self) -> None:
        """Forgets scores by a metric of the last validation, before the schedule's end."""
        for callback in self._judging():
            last, now = self._last.get(callback.monitor), self._metric(callback)
            if last is not None and now is not None and torch.equal(last, now):
                _forget(callback, is_pruned=True)

    def release(self) -> None:
        """Gives the callbacks back what was taken from them, whether the schedule ended or not."""
        if not self.is_over:
            for callback, threshold in zip(self.stopping, self._thresholds, strict=True):
                callback.stopping_threshold = threshold
        self.is_over = True

    def _judging(self) -> list[Any]:
        return [*keeping_best(self.trainer), *self.stopping]

    def _metric(self, callback: Any) -> torch.Tensor | None:
        return self.trainer.callback_metrics.get(callback.monitor)


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


def _forget(callback: Any, *, is_pruned: bool = False) -> None:
    """Makes every network that a callback has kept or seen worse than any that comes.

    The next ones take the places, and where their names are the same also the names, of the files.
    Until then one of them is still the best if it ``is_pruned``.
    """
    worst = _worst(callback.mode)
    if not hasattr(callback, "best_k_models"):  # EarlyStopping
        callback.wait_count, callback.best_score = 0, worst
        return
    if not callback.best_k_models:
        return
    callback.best_k_models = {
        path: worst.to(score.device) for path, score in callback.best_k_models.items()
    }
    callback.kth_value = worst
    if not is_pruned:
        callback.best_model_path = ""
        callback.best_model_score = callback.current_score = None


def without_best(trainer: "Trainer") -> list[Any]:
    """The callbacks that have kept nothing since the schedule's end."""
    return [c for c in keeping_best(trainer) if c.best_k_models and not c.best_model_path]
