"""Validates the file that would be deployed, while the network trains.

A network is chosen by what it will be: each validation exports it, and ONNX Runtime runs the file
on the images that the network gets. So ``ModelCheckpoint(monitor="val/accuracy_int8", mode="max")``
keeps the best deployed network.
"""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.runtimes.network import Network
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import input_names
from qat_tricks.graph.layers import is_calibrated
from qat_tricks.graph.logits import class_logits, logits_of
from qat_tricks.jobs.evaluation import labels_of
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB, decibels
from qat_tricks.trainer.framework import Callback
from qat_tricks.trainer.module import has_workbench, workbench_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

ACCURACY, AGREEMENT, SQNR = "val/accuracy_int8", "val/agreement_int8", "val/sqnr_int8_db"
FIRST_SECONDS = 5.0  # that a first export and its pass are expected to take


class ValidateDeployed(Callback):
    """Callback that logs the accuracy of the exported file on the validation images.

    Give it after the recipe's callbacks. It logs ``val/accuracy_int8``, the share of the images
    that the file has right; ``val/agreement_int8``, the share on which it and the simulated network
    agree; and ``val/sqnr_int8_db``, the ratio of the logits to their difference. After epochs that
    it skips it logs the last figures again, so that a checkpoint may monitor them in every epoch.

    An export takes some seconds, and the validation images are run once more, on the CPU. With
    several processes each validates its own share of the images.

    Args:
        every_n_epochs: exports in each n-th epoch.
        max_share: of the fit's time that it may take, 0 to 1: epochs in which it would take more
            are skipped, also before the first figures. A network in float is then left alone.

    Raises:
        QatTricksError: a value that is not allowed.
    """

    def __init__(self, every_n_epochs: int = 1, max_share: float | None = None) -> None:
        if max_share is not None and not 0 < max_share <= 1:
            raise QatTricksError(
                f"max_share={max_share} is not allowed: give a share of the fit's time, above 0 to "
                "1, or None for any"
            )
        if every_n_epochs < 1:
            raise QatTricksError(
                f"every_n_epochs={every_n_epochs} is not allowed: give a number of epochs, 1 or "
                "greater"
            )
        self.every_n_epochs, self.max_share = every_n_epochs, max_share
        self._last: dict[str, float] = {}
        self._validation: _Validation | None = None
        self._begun = time.perf_counter()  # of the fit
        self._expected = self._spent = 0.0  # seconds of one validation, and of all

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begins to count the fit's time."""
        self._begun, self._spent, self._expected = time.perf_counter(), 0.0, FIRST_SECONDS

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begins to listen to the network.

        Raises:
            QatTricksError: the module has no quantized network.
        """
        self._end()
        if trainer.sanity_checking:
            return
        if not has_workbench(pl_module) or not is_calibrated(workbench_of(pl_module).network):
            if self.max_share is not None:
                return
            raise QatTricksError(
                f"ValidateDeployed finds no quantized network in {type(pl_module).__name__}: give "
                'the callbacks of a recipe before it, as qat_tricks.recipe("int8_qat")'
            )
        due = trainer.current_epoch % self.every_n_epochs == 0 or not self._last
        # Processes differ in their clocks, and all of them must log the same names.
        if trainer.strategy.broadcast(due and self._has_time()):
            self._validation = _Validation(workbench_of(pl_module).network)
            self._validation_begun = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compares the file's answers with the labels of the batch."""
        if self._validation is not None:
            self._validation.count_right(batch, batch_idx)

    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Logs the figures."""
        if self._validation is not None:
            self._last = self._validation.figures()
            # The trainer's own pass is counted in: an upper bound.
            self._expected = time.perf_counter() - self._validation_begun
            self._spent += self._expected
        if self._last and not trainer.sanity_checking:
            pl_module.log_dict(self._last, sync_dist=True)
        self._end()

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Stops listening."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """The last figures, for a fit that goes on in an epoch that is skipped."""
        return dict(self._last)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again."""
        self._last = dict(state_dict)

    def _has_time(self) -> bool:
        """Whether one more validation leaves the share of the fit's time that was given."""
        if self.max_share is None:
            return True
        fit = time.perf_counter() - self._begun + self._expected
        return self._spent + self._expected <= self.max_share * fit

    def _end(self) -> None:
        if self._validation is not None:
            self._validation.close()
        self._validation = None


class _Validation:
    """One validation: the file, made when the first images come, and what was counted."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.names = network, input_names(network)
        self.folder = tempfile.TemporaryDirectory(prefix="qat_tricks_")
        self.file: Network | None = None
        self.logits: Tensor | None = None  # the file's, of the newest call
        self.images = self.agreeing = self.labelled = self.right = 0
        self.signal = self.noise = 0.0
        self.handle = network.register_forward_hook(self._note, with_kwargs=True)

    def _note(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A forward hook: runs the file on the same inputs."""
        named = [kwargs[name] for name in self.names[len(args) :] if name in kwargs]
        inputs = tuple(value.detach().float().cpu() for value in (*args, *named))
        if self.file is None:
            self.file = self._export(inputs)
        found = self.file.prepare(*(value.numpy() for value in inputs))()
        self.logits = torch.from_numpy(found)
        simulated = logits_of(output).detach().float().cpu()
        self.signal += float(simulated.double().square().sum())
        self.noise += float((simulated - self.logits).double().square().sum())
        classes = [class_logits(logits).argmax(1) for logits in (simulated, self.logits)]
        self.images += len(simulated)
        self.agreeing += int((classes[0] == classes[1]).sum())

    def _export(self, inputs: tuple[Tensor, ...]) -> Network:
        path = Path(self.folder.name) / "model.onnx"
        # The hook must not be copied with the network, whose copies are run in the export.
        self.handle.remove()
        example = inputs if len(inputs) > 1 else inputs[0]
        # What differs is logged here, and no reason to end a training.
        export_onnx(
            self.network, path, example, min_top1_agreement=0.0, min_sqnr_db=-LARGEST_SQNR_DB
        )
        self.handle = self.network.register_forward_hook(self._note, with_kwargs=True)
        return open_network(path, threads=torch.get_num_threads())

    def count_right(self, batch: Any, index: int) -> None:
        """Counts the answers to the newest call that are right."""
        if self.logits is None:
            return
        labels = labels_of(batch, self.names, index).cpu().flatten()
        classes = class_logits(self.logits).argmax(1)
        if len(labels) == len(classes):  # else the step shows the network parts of its images
            self.labelled += len(labels)
            self.right += int((classes == labels).sum())
        self.logits = None

    def figures(self) -> dict[str, float]:
        """What is logged; nothing of a validation that did not call the network."""
        found = {}
        if self.labelled:
            found[ACCURACY] = self.right / self.labelled
        if self.images:
            found[AGREEMENT] = self.agreeing / self.images
            found[SQNR] = decibels(self.signal, self.noise)
        return found

    def close(self) -> None:
        """Lets go of the network and the file."""
        self.handle.remove()
        self.file = None
        self.folder.cleanup()
