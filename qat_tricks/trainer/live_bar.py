"""The progress bar of a trainer whose fits are shown in the live display of a run."""

import time
from functools import cache
from types import ModuleType
from typing import Any

from qat_tricks.progress import Bar, is_watched
from qat_tricks.trainer.schedule import fit_batches, foreseen_batches

OF_THE_HEADING = ("stage", "v_num")  # said there, and of no interest


@cache
def live_bar(package: ModuleType) -> type[Any]:
    """The class of such a bar, of one of Lightning's packages."""
    return type("LiveBar", (_Hooks, package.callbacks.ProgressBar), {})


class _Hooks:
    """Counts the batches of a whole fit, so that the time left is that of the fit.

    Where nobody watches it prints a line an epoch.
    """

    get_metrics: Any  # of Lightning's bar: the figures that the module logs for it

    def __init__(self) -> None:
        super().__init__()
        self._fit: Bar | None = None
        self._validation: Bar | None = None
        self._is_enabled = True
        self._epoch_started = 0.0

    def enable(self) -> None:
        """Shows what follows; Lightning asks for it."""
        self._is_enabled = True

    def disable(self) -> None:
        """Shows nothing of what follows, as on processes that are not the first."""
        self._is_enabled = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Is silent on all processes but the first; keeps no trainer, which a copy would copy."""
        if not trainer.is_global_zero:
            self.disable()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the bar of the fit."""
        if self._is_enabled:
            self._fit = Bar("train", foreseen_batches(trainer))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the epoch's clock."""
        self._epoch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar of the fit."""
        if self._fit is not None:
            # This batch does not count as done yet.
            done = fit_batches(trainer) + 1
            self._fit.show(_epoch(trainer), done, lambda: self._figures(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Prints the epoch's line."""
        if self._is_enabled and not is_watched():
            seconds = time.perf_counter() - self._epoch_started
            figures = self._figures(trainer, pl_module)
            parts = ", ".join(filter(None, (figures, f"{seconds:.1f} s")))
            print(f"  {_epoch(trainer)}: {parts}", flush=True)

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        """Opens the bar of a validation."""
        counts = trainer.num_val_batches
        if trainer.sanity_checking:
            counts = trainer.num_sanity_val_batches
        if self._is_enabled:
            total = sum(counts) if isinstance(counts, list) else counts
            self._validation = Bar("validate", total)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Moves the bar of the validation."""
        if self._validation is not None:
            self._validation.advance()

    def on_validation_end(self, *_: Any) -> None:
        """Closes the bar of the validation."""
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    def on_train_end(self, *_: Any) -> None:
        """Closes the bar of the fit."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Closes all bars."""
        self._close()

    def _close(self) -> None:
        for bar in (self._fit, self._validation):
            if bar is not None:
                bar.close()
        self._fit = self._validation = None

    def _figures(self, trainer: Any, pl_module: Any) -> str:
        figures = self.get_metrics(trainer, pl_module).items()
        return ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in figures
            if name not in OF_THE_HEADING
        )


def _epoch(trainer: Any) -> str:
    of = "" if (trainer.max_epochs or -1) < 0 else f" of {trainer.max_epochs}"
    return f"epoch {trainer.current_epoch + 1}{of}"
