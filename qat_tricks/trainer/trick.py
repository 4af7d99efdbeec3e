"""The callback that every trick is."""

from typing import TYPE_CHECKING, Any, ClassVar

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.framework import Callback
from qat_tricks.trainer.order import trick_name
from qat_tricks.trainer.session import Session

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Trick(Callback):
    """One trick as a Lightning callback.

    A trick is applied once, in the run's ``Session`` (or by ``qat_tricks.quantize``, without a
    trainer). One that also acts during training uses Lightning's hooks for that.

    Attributes:
        requires: tricks without which this one cannot work, applied earlier in this recipe or in a
            stage before.
        after: names of tricks that must come earlier where a recipe has them.
        needs_teacher: whether the float network has to be kept beside the quantized one.
    """

    requires: ClassVar[tuple[type["Trick"], ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    needs_teacher: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The trick's name, which is its file's and its YAML's."""
        return trick_name(type(self))

    def apply(self, work: Workbench) -> None:
        """Does the trick to ``work.network``; one that only acts during training changes nothing
        here.
        """

    def restructure(self, work: Workbench) -> None:
        """Does the part of ``apply`` that changes the network's structure, for a forecast; values
        do not matter.
        """

    def apply_once(self, work: Workbench) -> bool:
        """Applies the trick unless this stage has done so; returns whether it did."""
        if self.name in work.applied:
            return False
        self.apply(work)
        work.applied.append(self.name)
        work.history.append(self.name)
        return True

    def reset(self) -> None:
        """Forgets an earlier fit; called before each one, and before a checkpoint is restored."""

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Leaves the work to the run's session; a trick that was given without one adds it."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, Session) for callback in callbacks):
            session = Session()
            callbacks.insert(callbacks.index(self), session)
            session.setup(trainer, pl_module, stage)


def check_num_images(num_images: int) -> int:
    """Returns ``num_images``; raises QatTricksError if it is below 1."""
    if num_images < 1:
        raise QatTricksError(f"num_images={num_images} is not allowed: give 1 or more")
    return num_images
