"""Runs the user's own validation before the training, and leaves everything as it was.

Lightning's own loop does it, so that the figures are those that the fit's validation would give,
however the module comes by them: of its steps, of metric objects, or at the end of the epoch.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qat_tricks.errors import one_line
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.progress import Bar
from qat_tricks.trainer.framework import Callback, package_of
from qat_tricks.trainer.training_step import attributes, left_as_it_was

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


@dataclass(frozen=True)
class Validated:
    """What a pass over the validation batches gave, or why it gave nothing."""

    metrics: dict[str, float] = field(default_factory=dict)  # as the module has logged them
    reason: str | None = None  # why there are none


class Validation:
    """The validation of a fit that has not begun.

    Args:
        trainer: in ``setup`` of a fit, after the set-up of the data.
        pl_module: on its device.
    """

    def __init__(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self._loop: Any = None  # both passes share its loaders

    def run(self, name: str) -> Validated:
        """Validates the module as it is now; every process has to call this.

        An error of the user's code is no error of the fit: it is the reason that there are no
        figures.

        Args:
            name: of what is validated, for the progress bar.
        """
        if not self.trainer.enable_validation:
            return Validated(reason="the fit has no validation")
        try:
            metrics = self._run(name)
        except Exception as error:  # whatever the user's code raises
            reason = f"{type(error).__name__}: {one_line(error, 80)}"
            return Validated(reason=f"the validation fails before the training ({reason})")
        return Validated(metrics) if metrics else Validated(reason="the validation logs nothing")

    def _run(self, name: str) -> dict[str, float]:
        trainer, connector = self.trainer, self.trainer._logger_connector
        epoch_loop = trainer.fit_loop.epoch_loop
        loop = self._loop = self._loop or _fresh_loop(trainer)
        watch = _Watch(name)
        quiet = {
            "callbacks": [watch],
            "profiler": package_of(trainer).profilers.PassThroughProfiler(),
        }
        # What a pass sets beside the metrics, in the versions that have it.
        kept = {key: vars(trainer)[key] for key in ("_last_val_time",) if key in vars(trainer)}
        with ExitStack() as stack:
            stack.enter_context(kept_random_state())
            stack.enter_context(left_as_it_was(trainer, self.pl_module))
            stack.enter_context(attributes(trainer, **quiet, **kept))
            stack.enter_context(attributes(connector, **_copies(connector)))
            stack.enter_context(attributes(epoch_loop, val_loop=loop))
            stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
            stack.callback(watch.close)
            trainer.validating = True  # put back with the rest of the trainer's state
            connector.reset_results()
            loop.setup_data()
            # None where the trainer's limits leave no batch.
            loaders = loop._combined_loader.flattened if loop._combined_loader is not None else ()
            with _kept_loaders(loaders):
                loop.run()
                loop.teardown()
        return watch.metrics


def epoch_metrics(trainer: "Trainer") -> dict[str, float]:
    """What the validation that is just ending has logged, the mean or whatever over its epoch."""
    logged = trainer._logger_connector.metrics["callback"]
    return {
        str(name): float(value)
        for name, value in logged.items()
        if not isinstance(value, torch.Tensor) or value.numel() == 1
    }


class _Watch(Callback):
    """The only callback of a pass: it takes the metrics, and shows the progress."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metrics: dict[str, float] = {}
        self._bar: Bar | None = None

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Opens the bar, on the first process."""
        if trainer.is_global_zero:
            self._bar = Bar(f"validate {self.name}", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", *args: Any, **kwargs: Any
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.advance()

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Takes the metrics."""
        self.metrics = epoch_metrics(trainer)

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


def _fresh_loop(trainer: "Trainer") -> Any:
    """A loop like that of the fit, with its source of batches and none of its progress."""
    own: Any = trainer.fit_loop.epoch_loop.val_loop
    taken = inspect.signature(type(own).__init__).parameters
    settings = {"verbose": False, "inference_mode": own.inference_mode}
    loop = type(own)(
        trainer, own._trainer_fn, own._stage, **{k: v for k, v in settings.items() if k in taken}
    )
    loop._data_source = own._data_source
    return loop


def _copies(connector: Any) -> dict[str, Any]:
    """The metrics so far, in dictionaries of their own."""
    return {k: dict(v) if type(v) is dict else v for k, v in vars(connector).items()}


@contextmanager
def _kept_loaders(loaders: Iterable[Any]) -> Iterator[None]:
    """Puts back what a pass moves in loaders, which the fit goes through again.

    That is their generators, which the training loader may share, and the processes of persistent
    workers: the pass that starts them draws a random number.
    """
    loaders = list(loaders)
    owners = [owner for it in loaders for owner in (it, getattr(it, "sampler", None))]
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    iterators = [(it, it._iterator) for it in loaders if hasattr(it, "_iterator")]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        for loader, iterator in iterators:
            loader._iterator = iterator
