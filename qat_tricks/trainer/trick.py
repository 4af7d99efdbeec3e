"""The callback that every trick is."""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import begin
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
        needs_float: whether it refuses a network that has quantizers.
        needs_teacher: whether the float network has to be kept beside the quantized one.
        judged: whether it is rolled back where it harms the network's output (see ``graph.proof``).
        quantizes: whether it is one of the tricks that make a float network a calibrated one.
    """

    requires: ClassVar[tuple[type["Trick"], ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    needs_float: bool = False
    needs_teacher: ClassVar[bool] = False
    judged: bool = False
    quantizes: bool = False

    @property
    def name(self) -> str:
        """The trick's name, which is its file's and its YAML's."""
        return trick_name(type(self))

    def apply(self, work: Workbench) -> None:
        """Changes ``work.network``.

        A trick that only acts during training leaves it as it is.
        """

    def restructure(self, work: Workbench) -> None:
        """Makes the changes of ``apply`` to the network's structure, for a forecast.

        Values do not matter.
        """

    def apply_once(self, work: Workbench) -> bool:
        """Applies the trick unless this stage has done so; returns whether it did."""
        # A validation after the fit sets the same module up again.
        if self.name in work.applied:
            return False
        begin(self.name)
        try:
            if self.judged and work.proves:
                work.prove(self.name, partial(self.apply, work))
            else:
                self.apply(work)
                if work.prover is not None:
                    work.prover.forget()
        finally:
            begin("")
        work.applied.append(self.name)
        work.history.append(self.name)
        return True

    def reset(self) -> None:
        """Forgets an earlier fit; called before each one, and before a checkpoint is restored."""

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Adds a session to a trainer that has none; the session does the work."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, Session) for callback in callbacks):
            session = Session()
            # Lightning has passed this place of its list, so the session is set up by hand.
            callbacks.insert(callbacks.index(self), session)
            session.setup(trainer, pl_module, stage)


def check_num_images(num_images: int) -> int:
    """Returns ``num_images``; raises QatTricksError if it is below 1."""
    if num_images < 1:
        raise QatTricksError(f"num_images={num_images} is not allowed: give 1 or more")
    return num_images
