"""A learning rate of the network's own: a share of the largest that its loss can be trained at."""

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.sharpness import sharpness
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.resume import resumes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

NUM_IMAGES = 256
RATES = ("lr", "initial_lr", "max_lr")
"""Of a parameter group: the rate now, and what a schedule begins with or rises to."""
SHARE = 0.3
"""Of ``1 / sharpness``. Descent diverges beyond 2 (1.9 times that with momentum 0.9): a network
that is fine-tuned is to stay near what it has learned, and its loss grows steeper on the way."""
HIGHEST = 0.05
"""Half of what networks are usually trained at from the beginning."""


def set_rate(module: Any, rate: Any) -> None:
    """Sets ``module.lr``, which its ``configure_optimizers`` reads.

    Raises:
        QatTricksError: it is not one number, or cannot be set.
    """
    own, name = getattr(module, "lr", None), f"{type(module).__name__}.lr"
    if own is not None and not isinstance(own, Real):
        raise QatTricksError(
            f"{name} is of type {type(own).__name__}, and the recipe sets it to a number: make it "
            "a number, or give the stages lr=null"
        )
    try:
        module.lr = rate
    except AttributeError as error:
        raise QatTricksError(
            f"{name} cannot be set, and the recipe has a rate of its own: make it an attribute, or "
            "give the stages lr=null"
        ) from error


class MeasuredRate:
    """Sets ``module.lr`` for one fit of SGD, from the sharpness of the network's loss.

    Args:
        own: the rate that the module came with, which an optimizer other than SGD keeps: it scales
            each step by gradients that it has seen, and curvature alone does not bound its rate.

    Attributes:
        found: the measured ``lr``, and the ``sharpness`` that it follows from; None before.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self.found: dict[str, float] | None = None

    def measure(self, trainer: "Trainer", pl_module: "LightningModule", work: Workbench) -> None:
        """Measures the rate before the fit makes its optimizers; a resumed fit has it already.

        Raises:
            QatTricksError: the network has no gradients, or none that are finite, or the module's
                rate cannot be set.
        """
        if resumes(trainer):
            return
        set_rate(pl_module, self.own)  # refuses at once: measuring takes a while
        curvature = sharpness(work.network, work.training_batches(NUM_IMAGES))
        # Sums on GPUs differ in their last bits between ranks.
        curvature = trainer.strategy.broadcast(curvature)
        rate = min(HIGHEST, SHARE / curvature) if curvature > 0 else HIGHEST
        self._set(pl_module, work, {"lr": rate, "sharpness": curvature})
        rank_zero_info(f"lr=auto: {rate:.3g}, for the loss has a sharpness of {curvature:.3g}")

    def restore(
        self, pl_module: "LightningModule", work: Workbench, found: dict[str, float] | None
    ) -> None:
        """Takes over what the run that goes on has ``found``; its optimizers are not made yet."""
        if found is not None:
            self._set(pl_module, work, found)

    def check(self, trainer: "Trainer", pl_module: "LightningModule", work: Workbench) -> None:
        """Gives optimizers that do not follow the rate the module's own, with a warning."""
        if self.found is None:
            return
        name, found = type(pl_module).__name__, self.found
        others = [o for o in trainer.optimizers if not isinstance(o, torch.optim.SGD)]
        rates = _rates(trainer)
        if not others and any(math.isclose(one, found["lr"], rel_tol=1e-6) for one in rates):
            return  # alike, for a schedule may have taken it through float32
        # Made once more, with the module's own rate, they show whether they depend on it.
        set_rate(pl_module, self.own)
        trainer.strategy.setup_optimizers(trainer)
        if others:
            rank_zero_warn(
                f"lr=auto measures a rate for SGD, and {name} trains with "
                f"{type(others[0]).__name__}: its own lr={self.own} stays"
            )
        elif _rates(trainer) != rates:  # they follow from it, as with a factor or a warm-up
            set_rate(pl_module, found["lr"])
            trainer.strategy.setup_optimizers(trainer)
            return
        else:
            rank_zero_warn(
                f"lr=auto sets lr={found['lr']:.3g} of {name}, and no optimizer has it: let "
                "configure_optimizers read self.lr"
            )
        # The report tells of no rate that nothing was trained at.
        self.found = None
        spec_of(work.network)["rates"].pop()

    def _set(self, pl_module: "LightningModule", work: Workbench, found: dict[str, float]) -> None:
        self.found = found
        set_rate(pl_module, found["lr"])
        rates = spec_of(work.network).setdefault("rates", [])
        if rates[-1:] != [found]:  # a network that was rebuilt from its checkpoint has it already
            rates.append(found)


def _rates(trainer: "Trainer") -> list[float]:
    """The rates of all parameter groups."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [float(group[key]) for group in groups for key in RATES if key in group]
