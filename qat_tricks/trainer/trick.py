"""The callback that every trick is."""

import re
from typing import Any, ClassVar

import pytorch_lightning as pl

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.optimizers import renew_parameters
from qat_tricks.trainer.random_state import restore_random_state


class Trick(pl.Callback):
    """One trick as a Lightning callback.

    A trick is done once, in ``setup`` (or by ``qat_tricks.quantize``, without a trainer), through
    ``apply``. One that also acts during training uses Lightning's hooks for that, and calls
    ``super()`` in those that are defined here.

    Attributes:
        requires: tricks without which this one cannot work; done earlier in this recipe or in a
            stage before.
        after: tricks that, where a recipe has them too, must come earlier.
        needs_teacher: whether the float network has to be kept beside the quantized one.
        network_name: attribute of the LightningModule that holds the network; None finds it.
        whole: name patterns of its submodules that are not traced through.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    needs_teacher: ClassVar[bool] = False
    network_name: str | None = None
    whole: tuple[str, ...] = ()
    # of a run resumed in the middle of an epoch, until it goes on
    _random_state: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The trick's name, which is its file's and its YAML's."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def apply(self, work: Workbench) -> None:
        """Does the trick to ``work.network``; a trick that only acts during training leaves it as
        it is.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from qat_tricks.trainer.session import attach, synchronize

        work = attach(self, trainer, pl_module)
        if self.do(work):
            synchronize(trainer, work)

    def do(self, work: Workbench) -> bool:
        """Applies the trick unless it has been in this stage; returns whether it did."""
        if self.name in work.applied:
            return False
        self.apply(work)
        work.applied.append(self.name)
        work.history.append(self.name)
        return True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from qat_tricks.trainer.session import workbench_of

        work = workbench_of(pl_module)
        renew_parameters(trainer.optimizers, work.network, work.parameters_before)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        from qat_tricks.trainer.session import CHECKPOINT_KEY, is_mid_epoch

        state = checkpoint.get(CHECKPOINT_KEY, {}).get("random_state")
        if trainer.state.fn == "fit" and state is not None:
            restore_random_state(state)  # an epoch that begins draws its order from here
            self._random_state = state if is_mid_epoch(checkpoint) else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._random_state is not None:  # an epoch that goes on has drawn its order once more
            restore_random_state(self._random_state)
            self._random_state = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_grids(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._keep_grids(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_grids(trainer, pl_module)

    @staticmethod
    def _keep_grids(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from qat_tricks.trainer.session import keep_grids

        keep_grids(trainer, pl_module)


def check_num_images(num_images: int) -> int:
    """Returns ``num_images``; raises QatTricksError if it is below 1."""
    if num_images < 1:
        raise QatTricksError(f"num_images={num_images} is not allowed: give 1 or more")
    return num_images
