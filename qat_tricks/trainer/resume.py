"""Restores the checkpoint that a trainer resumes from: of a quantized run, or of a float one."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.checkpoints import RUN_STATE, check_read, load_checkpoint, load_state
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.hyperparameters import KEYS as HYPERPARAMETERS
from qat_tricks.trainer.module import CHECKPOINT_KEY, describe
from qat_tricks.trainer.reading import DamagedError, is_trusted, names_in

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def spec_to_restore(trainer: "Trainer", pl_module: "LightningModule") -> dict[str, Any] | None:
    """The spec in the checkpoint that this run is about to restore.

    The weights of a float checkpoint are loaded now, and the recipe begins from them.

    Returns:
        The spec; None if the run restores no checkpoint, or a float one.
    """
    path, _ = _checkpoint_to_restore(trainer)
    if path is None:
        return None
    checkpoint, path = _read_or_previous(trainer)
    if CHECKPOINT_KEY in checkpoint:
        return checkpoint[CHECKPOINT_KEY]["spec"]
    load_state(pl_module, checkpoint, path, strict=pl_module.strict_loading)
    if trainer.is_global_zero:
        _log(trainer).info(
            f"{path} holds a float network: its weights are loaded, and the recipe begins from them"
        )
    # Lightning is about to read the file itself. It gets one without the float run's epochs and
    # optimizers, and with the weights of the network as the recipe has changed it.
    stateful = (trainer.precision_plugin, trainer.datamodule)  # type: ignore[attr-defined]
    gone = {*RUN_STATE, *(type(plugin).__qualname__ for plugin in stateful)}
    rest = {key: value for key, value in checkpoint.items() if key not in gone}
    fresh_optimizers: dict[str, Any] = {"optimizer_states": [], "lr_schedulers": []}
    _HandOver(
        trainer,
        lambda: {
            **rest,
            CHECKPOINT_KEY: describe(pl_module),
            "state_dict": pl_module.state_dict(),
            **fresh_optimizers,
        },
    )
    return None


def resumes(trainer: "Trainer") -> bool:
    """Whether this run is about to restore a checkpoint."""
    return _checkpoint_to_restore(trainer)[0] is not None


def _log(trainer: "Trainer") -> logging.Logger:
    """The logger of the trainer's own package; both packages share one in ``rank_zero_info``."""
    return logging.getLogger(f"{package_of(trainer).__name__}.utilities.rank_zero")


def spec_for_quantized(trainer: "Trainer") -> dict[str, Any] | None:
    """The spec in the checkpoint that this run is about to restore into a quantized module.

    Returns:
        The spec; None if the run restores no checkpoint.

    Raises:
        QatTricksError: it is a float network.
    """
    path, _ = _checkpoint_to_restore(trainer)
    if path is None:
        return None
    checkpoint = _read_or_previous(trainer)[0]
    if CHECKPOINT_KEY not in checkpoint:
        raise QatTricksError(
            f"{path} holds a float network and this module is quantized already: give a fresh one"
        )
    return checkpoint[CHECKPOINT_KEY]["spec"]


def _read_or_previous(trainer: "Trainer") -> tuple[dict[str, Any], str | Path]:
    """Reads the checkpoint, or the newest readable one beside a damaged ``last`` one."""
    path, weights_only = _checkpoint_to_restore(trainer)
    assert path is not None
    try:
        checkpoint = _read(path, weights_only)
    except DamagedError as error:
        kind = package_of(trainer).callbacks.ModelCheckpoint
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, kind)]
        lasts = {Path(last) for c in callbacks for last in c._find_last_checkpoints(trainer)}
        # Only for a last checkpoint: for any other that the user asks for, no other file will do.
        previous = None
        if Path(path) in lasts:
            previous = _newest(Path(path).parent, weights_only, trainer.state.fn == "fit")
        if previous is None:
            raise
        checkpoint, previous_path = previous
        rank_zero_warn(
            f"{error}: the previous one is used, {previous_path}, of step "
            f"{checkpoint['global_step']}"
        )
        _HandOver(trainer, lambda: checkpoint)
        return previous
    # Lightning reads with torch alone, which would not make them.
    if not is_trusted(weights_only) and names_in(Path(path)):
        _HandOver(trainer, lambda: checkpoint)
    return checkpoint, path


def _read(path: str | Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint; of a float one the run is not restored, and of no one hyperparameters."""
    checkpoint = load_checkpoint(path, weights_only=weights_only)
    if CHECKPOINT_KEY in checkpoint:
        check_read(checkpoint, path, HYPERPARAMETERS)
    return checkpoint


def _newest(
    folder: Path, weights_only: bool | None, for_a_fit: bool
) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint in ``folder`` that can be read, and its path.

    ``for_a_fit`` asks for one that a fit can go on from: with the states of its optimizers.
    """
    for path in sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            checkpoint = _read(path, weights_only)
        except QatTricksError:  # damaged too: an older one may not be
            continue
        if not for_a_fit or "optimizer_states" in checkpoint:
            return checkpoint, path
    return None


class _HandOver:
    """Gives Lightning, once, a checkpoint in the place of the file that it is about to read.

    It stands in for the strategy's CheckpointIO until then, and hands on all other calls.
    """

    def __init__(self, trainer: "Trainer", checkpoint: Callable[[], dict[str, Any]]) -> None:
        self.strategy, self.checkpoint = trainer.strategy, checkpoint
        self.own: Any = trainer.strategy.checkpoint_io
        if isinstance(self.own, _HandOver):  # put there before, and not needed any more
            self.own = self.own.own
        self.strategy.checkpoint_io = self  # type: ignore[assignment]

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Before the answer, so that later reads and writes go to files again.
        self.strategy.checkpoint_io = self.own
        return self.checkpoint()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def _checkpoint_to_restore(trainer: "Trainer") -> tuple[str | Path | None, bool | None]:
    """The checkpoint path of ``fit``, ``validate``, ``test`` or ``predict``, and ``weights_only``.

    "last" and "best" are resolved.

    Lightning tells callbacks of it only after ``setup``, when it is too late to rebuild instead of
    calibrating again; until then it is an argument of ``Trainer._run``, and is read there.
    """
    # The path is on the call stack: ``setup`` is called from within ``Trainer._run``.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            # Lightning 2.5 has no such argument, and makes all objects.
            return frame.f_locals["ckpt_path"], frame.f_locals.get("weights_only", False)
        frame = frame.f_back  # type: ignore[assignment]
    return trainer.ckpt_path, None
