"""The progress of a fit, on which schedules are based."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.framework import package_of

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a trainer has done, in all its fits together."""

    batches: int = 0
    epochs: int = 0
    steps: int = 0  # of optimizers


def done_by(trainer: "Trainer") -> Done:
    """What ``trainer`` has done up to now."""
    loop = trainer.fit_loop
    # Not ``total_batch_idx``: it counts twice a batch in the midst of which a run broke off and
    # that is repeated.
    return Done(
        batches=loop.epoch_loop.batch_progress.total.completed,
        epochs=loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
        steps=loop.epoch_loop.global_step,
    )


def done_before(trainer: "Trainer") -> Done:
    """What ``trainer`` had done before this fit, which its session knows; nothing without one."""
    found = (getattr(callback, "done_before", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return next((done for done in found if isinstance(done, Done)), Done())


def fit_batches(trainer: "Trainer") -> int:
    """The number of this fit's batches that are done; the one being trained on is not."""
    return done_by(trainer).batches - done_before(trainer).batches


def check_not_done(trainer: "Trainer", done: Done) -> None:
    """Raises QatTricksError if a trainer that has ``done`` so much in earlier fits trains no more.

    Lightning would say so in a log line, and the network would stay as it was quantized.
    """
    ends = {"max_epochs": done.epochs, "max_steps": done.steps}
    for name, count in ends.items():
        limit = getattr(trainer, name)
        if limit is not None and 0 < limit <= count:
            raise QatTricksError(
                f"this trainer has reached {name}={limit} in an earlier fit and would train "
                "nothing: make a new trainer for this fit"
            )


def check_trained(trainer: "Trainer", what: str) -> None:
    """Raises QatTricksError if ``trainer``, whose fit has ended, has trained on no batch.

    Lightning skips such a fit without a word, and ``what`` would be reported as if it had trained.
    """
    if done_by(trainer).batches == 0:
        raise QatTricksError(
            f"{what} has trained on no batch: give a train loader that has batches, and a trainer "
            "without limit_train_batches=0 or another limit that ends it at once"
        )


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """What ends a fit.

    Attributes:
        done: how much of it is done.
        allowed: how much of it the fit may do.
        counts_steps: whether it counts steps of optimizers; else batches.
    """

    done: int
    allowed: float
    counts_steps: bool = False

    @property
    def share(self) -> float:
        """The share that is done, 0 to 1."""
        return min(1.0, self.done / self.allowed) if self.allowed > 0 else 1.0


def _limits(trainer: "Trainer") -> list[_Limit]:
    """What may end the fit, as far as it can be foreseen; the first to be reached does."""
    before, limits = done_before(trainer), []
    batches = fit_batches(trainer)
    if (
        trainer.max_epochs is not None
        and trainer.max_epochs > 0
        and math.isfinite(trainer.num_training_batches)
    ):
        epochs = trainer.max_epochs - before.epochs
        limits.append(_Limit(done=batches, allowed=epochs * trainer.num_training_batches))
    if trainer.max_steps > 0:
        steps = trainer.max_steps - before.steps
        if trainer.lightning_module.automatic_optimization:
            limits.append(_Limit(done=batches, allowed=_batches_of(trainer, steps)))
        else:
            # A module that optimizes by hand makes any number of steps of a batch: none, as while
            # it accumulates gradients, or one with each of its optimizers.
            done = done_by(trainer).steps - before.steps
            limits.append(_Limit(done=done, allowed=steps, counts_steps=True))
    return limits


def foreseen_batches(trainer: "Trainer") -> float:
    """The number of training batches that the fit will have; infinite where none is foreseeable."""
    limits = _limits(trainer)
    if any(limit.counts_steps for limit in limits):
        return math.inf
    return min((limit.allowed for limit in limits), default=math.inf)


def _batches_of(trainer: "Trainer", steps: int) -> float:
    """The number of batches that so many steps of an optimizer take."""
    an_epoch, epoch, batches = trainer.num_training_batches, done_before(trainer).epochs, 0
    while True:
        accumulated = _accumulated(trainer, epoch)
        if not math.isfinite(an_epoch) or an_epoch < 1:
            return steps * accumulated
        # An epoch ends with a step, also where fewer batches are left for it.
        steps_of_epoch = math.ceil(an_epoch / accumulated)
        if steps <= steps_of_epoch:
            return batches + min(max(steps, 0) * accumulated, an_epoch)
        steps, batches, epoch = steps - steps_of_epoch, batches + int(an_epoch), epoch + 1


def _accumulated(trainer: "Trainer", epoch: int) -> int:
    """The number of batches of which the gradients make a step in an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Lightning's own would give the trainer the number of a later epoch only then.
        if isinstance(callback, package_of(trainer).callbacks.GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def is_last_batch(trainer: "Trainer") -> bool:
    """Whether the fit's last batch has just been trained on.

    For ``on_train_batch_end``, where the batch does not count as done yet, and its steps do. Of a
    fit without a foreseeable end, no batch is the last.
    """
    return any(limit.done + (not limit.counts_steps) >= limit.allowed for limit in _limits(trainer))


def fit_progress(trainer: "Trainer") -> float:
    """The share of the fit that is done, 0 to 1: of its batches, or of steps made by hand.

    It also holds right after a resume, and when training has ended.

    Raises:
        QatTricksError: the trainer has no end that can be foreseen.
    """
    limits = _limits(trainer)
    if not limits:
        raise QatTricksError(
            "schedules are fractions of the training, and this trainer has no foreseeable end: "
            "give it max_epochs (and a loader that has a length) or max_steps"
        )
    return max(limit.share for limit in limits)


def check_fraction(name: str, value: float) -> float:
    """Returns ``value``; raises QatTricksError unless it is a fraction of the training, 0 to 1."""
    if not 0 <= value <= 1:
        raise QatTricksError(
            f"{name}={value} is not allowed: give a fraction of the training, from 0 to 1"
        )
    return value
