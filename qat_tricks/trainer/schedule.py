"""The progress of a fit, on which schedules are based."""

import math
from typing import TYPE_CHECKING

from qat_tricks.errors import QatTricksError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def total_batches(trainer: "Trainer") -> float:
    """The number of training batches that the fit will have.

    Raises:
        QatTricksError: the trainer has no end that can be foreseen.
    """
    ends = []
    if (
        trainer.max_epochs is not None
        and trainer.max_epochs > 0
        and math.isfinite(trainer.num_training_batches)
    ):
        ends.append(trainer.max_epochs * trainer.num_training_batches)
    if trainer.max_steps > 0:
        # A step of an optimizer may take several batches.
        ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if not ends:
        raise QatTricksError(
            "schedules are fractions of the training, and this trainer has no foreseeable end: "
            "give it max_epochs (and a loader that has a length) or max_steps"
        )
    return min(ends)


def fit_progress(trainer: "Trainer") -> float:
    """The share of the fit's batches that are done, 0 to 1.

    It also holds right after a resume, and when training has ended.
    """
    # Not ``total_batch_idx``: it counts twice a batch in the midst of which a run broke off and
    # that is repeated.
    return min(
        1.0, trainer.fit_loop.epoch_loop.batch_progress.total.completed / total_batches(trainer)
    )


def check_fraction(name: str, value: float) -> float:
    """Returns ``value``; raises QatTricksError unless it is a fraction of the training, 0 to 1."""
    if not 0 <= value <= 1:
        raise QatTricksError(
            f"{name}={value} is not allowed: give a fraction of the training, from 0 to 1"
        )
    return value
