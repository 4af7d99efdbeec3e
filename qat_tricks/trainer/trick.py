"""The callback that every trick is."""

import json
import warnings
from collections.abc import Collection, Set
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_utilities.core.rank_zero import rank_zero_warn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import begin
from qat_tricks.trainer.framework import Callback
from qat_tricks.trainer.order import trick_name
from qat_tricks.trainer.session import Session

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

NOT_PLAIN = object()


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
        decisive: names of settings that say what is deployed, as bits do, and not only how well.
    """

    requires: ClassVar[tuple[type["Trick"], ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    needs_float: bool = False
    needs_teacher: ClassVar[bool] = False
    judged: bool = False
    quantizes: bool = False
    decisive: ClassVar[Set[str]] = frozenset()

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
        if self.name in work.applied or self._is_too_late(work):
            return False
        settings = self.arguments()  # it may note other things as it works
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
        if not self._acts_in_training:
            work.settings[self.name] = settings
        return True

    def _is_too_late(self, work: Workbench) -> bool:
        """Whether a checkpoint, whose values are loaded next, was made without this trick's work.

        They would undo it in silence. A trick that only makes a network better is left out: recipes
        have got more of these since older checkpoints.

        Raises:
            QatTricksError: the trick decides what network it is.
        """
        if work.restored is None or self.name in work.restored or self._acts_in_training:
            return False
        line = (
            f"the checkpoint was made without {self.name}, and its values replace what that would "
            "do; for another recipe, load it with qat_tricks.load_from_checkpoint, and run what "
            "that returns without ckpt_path"
        )
        if not self.judged:
            raise QatTricksError(line)
        rank_zero_warn(f"{self.name} is left out: {line}")
        return True

    @property
    def _acts_in_training(self) -> bool:
        """Whether a fit uses the settings, which may then be others in each."""
        hooks = (name for name in dir(type(self)) if name.startswith("on_"))
        return any(getattr(type(self), hook) is not getattr(Callback, hook, 0) for hook in hooks)

    def arguments(self) -> dict[str, Any]:
        """The arguments that the trick was made with, as far as they are plain data."""
        values = dict(vars(self))
        given = values.get("settings")
        if is_dataclass(given):
            values |= {field.name: getattr(given, field.name, None) for field in fields(given)}
        elif isinstance(given, dict):
            values |= given
        names = signature(type(self)).parameters
        plain = {name: plain_data(values[name]) for name in names if name in values}
        return {name: value for name, value in plain.items() if value is not NOT_PLAIN}

    def check_done(self, work: Workbench, recipe: Collection[str]) -> None:
        """Tells where the network was made with other settings, which this trick cannot change.

        Args:
            work: the network; this trick has been applied to it.
            recipe: names of the tricks that are asked for.

        Raises:
            QatTricksError: they decide what is deployed.
        """
        made = work.settings.get(self.name)
        if made is None:  # of an older version, or settings that a fit uses
            return
        asked = self.arguments()
        others = [key for key in made if asked.get(key, made[key]) != made[key]]
        if not others:
            return
        was, wanted = (
            ", ".join(f"{key}={json.dumps(values[key])}" for key in others)
            for values in (made, asked)
        )
        line = f"{self.name} was done with {was} already, and {wanted} is asked for"
        if not self.decisive.isdisjoint(others):
            raise QatTricksError(
                f"{line}: give the float network that this one came from, or {was}"
            )
        warnings.warn(f"{line}, which changes nothing", stacklevel=2)

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


def plain_data(value: Any) -> Any:
    """``value`` as JSON has it, in which a tuple is a list; else ``NOT_PLAIN``."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):  # an object within, or a list that holds itself
        return NOT_PLAIN


def check_num_images(num_images: int) -> int:
    """Returns ``num_images``; raises QatTricksError if it is below 1."""
    if num_images < 1:
        raise QatTricksError(f"num_images={num_images} is not allowed: give 1 or more")
    return num_images
