"""Logs the quantized layers of a network while it trains: ranges, scales, clipping and zeros."""

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layer_watch import LayerWatch
from qat_tricks.trainer.framework import Callback
from qat_tricks.trainer.module import has_workbench, workbench_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

PREFIX = "layer/"  # of the figures in a logger
EVERY_N_STEPS = 50  # docs/results/log_layers.md has what a step with figures costs


class LogLayers(Callback):
    """Callback that logs figures of each quantized layer to the trainer's loggers.

    Give it after the recipe's callbacks. One step in ``every_n_steps`` is looked at, the first one
    included; in the others it does nothing. ``layer/NAME/low`` and ``high`` are the ends of an
    activation's range, ``scale`` is its step, and ``clip_rate`` is the share of its values in that
    step that lie beyond the range by more than half a step. ``weight_sparsity`` is the share of
    zeros in the weight that the layer computes with, and ``weight_scale`` the mean of its scales
    where they are learned. All are of the network as the step began.

    With several processes the first one logs the figures of its own images. Nothing can be seen
    within a network that is compiled: there ``clip_rate`` is left out, and a warning says so.

    Args:
        every_n_steps: optimizer steps from one look to the next.

    Raises:
        QatTricksError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = EVERY_N_STEPS) -> None:
        if every_n_steps < 1:
            raise QatTricksError(
                f"every_n_steps={every_n_steps} is not allowed: give a number of steps, 1 or "
                f"greater, such as {EVERY_N_STEPS}"
            )
        self.every_n_steps = every_n_steps
        self._last: int | None = None  # step that was looked at
        self._watch: LayerWatch | None = None
        self._is_compiled = False

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Forgets an earlier fit; a checkpoint is restored after this."""
        if stage == "fit":
            self._last = None

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Checks that there is something to log, and where to.

        Raises:
            QatTricksError: the trainer has no logger, or the module no network of a recipe.
        """
        if not trainer.loggers:
            raise QatTricksError(
                "LogLayers has no logger to log to: give one, Trainer(logger=CSVLogger(…)), or "
                "leave LogLayers out"
            )
        if not has_workbench(pl_module):
            raise QatTricksError(
                f"LogLayers finds no network of a recipe in {type(pl_module).__name__}: give the "
                'callbacks of a recipe before it, as qat_tricks.recipe("int8_qat")'
            )

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Finds out whether the network is compiled, once all callbacks have begun."""
        self._is_compiled = _is_compiled(pl_module)
        if self._is_compiled:
            rank_zero_warn(
                "the network is compiled, and values within it cannot be seen: LogLayers logs "
                "ranges, scales and zeros, and no clip_rate"
            )

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Begins to look, on the first process, if a look is due."""
        self._end()
        step = trainer.global_step
        if self._last is not None and step - self._last < self.every_n_steps:
            return
        self._last = step
        if trainer.is_global_zero:
            network = workbench_of(pl_module).network
            self._watch = LayerWatch(network, activations=not self._is_compiled)

    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the figures."""
        if self._watch is None:
            return
        figures = {f"{PREFIX}{key}": value for key, value in self._watch.figures().items()}
        self._end()
        # The count that Lightning's own metrics have, which share the row of a step.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers if figures else ():
            logger.log_metrics(figures, step=step)

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Stops looking."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """The step of the last look, for a fit that goes on."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self._last = state_dict["last"]

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None


def _is_compiled(pl_module: "LightningModule") -> bool:
    """Whether the module, or a part of it, is compiled in one of torch's ways."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        return True
    modules: list[nn.Module] = list(pl_module.modules())
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in modules)
