"""A checkpoint that a run wrote, as an evaluation needs it.

It loads Lightning, which the evaluation of an ONNX file does without.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.data import build_data
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.parity.logits import MIN_SQNR_DB
from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.graph.inputs import check_batches, input_names
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.jobs.description import to_metadata
from qat_tricks.trainer.checkpoints import load_checkpoint, load_from_checkpoint
from qat_tricks.trainer.module import find_network, has_workbench, workbench_of


def load_classifier(path: Path) -> Classifier:
    """Loads the classifier of a checkpoint.

    Raises:
        QatTricksError: ``train.py`` did not write it.
    """
    model = load_checkpoint(path).get("hyper_parameters", {}).get("model")
    if not isinstance(model, Mapping) or not {"name", "num_classes"} <= set(model):
        raise QatTricksError(
            f"{path} was not written by train.py: it does not say which network it holds; give "
            "module=package.Class, the LightningModule that it was saved of, and data=NAME"
        )
    module = load_from_checkpoint(Classifier, path)
    assert isinstance(module, Classifier)
    return module


@dataclass(frozen=True)
class OwnModule:
    """A LightningModule of the user's, from a checkpoint, and the network in it."""

    module: Any
    network: nn.Module

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Any:
        """What ``forward`` of the module hands to its network, which the file holds alone.

        Raises:
            QatTricksError: ``forward`` does not call the network.
        """
        seen: list[Any] = []

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0] if len(args) == 1 else args)

        names = input_names(self.module.forward)
        handle = self.network.register_forward_pre_hook(see)
        try:
            with torch.no_grad():
                self.module(batch if names == ["batch"] else batch[0])
        finally:
            handle.remove()
        if not seen:
            raise QatTricksError(
                f"{type(self.module).__name__}.forward does not call its network: evaluate it with "
                "qat_tricks.evaluate(module, loader) in Python"
            )
        return seen[0]


def load_own_module(path: Path, dotted: str) -> OwnModule:
    """Loads a checkpoint of the user's LightningModule.

    Args:
        path: of the checkpoint.
        dotted: ``package.Class``.

    Raises:
        QatTricksError: there is no such class, or it cannot be built from what is saved.
    """
    kind = _class_named(dotted)
    try:
        module = load_from_checkpoint(kind, path)
    except TypeError as error:  # an argument that was not saved among the hyperparameters
        raise QatTricksError(
            f"{dotted} cannot be built from what {path} has saved of its arguments "
            f"({one_line(error)}): evaluate it in Python, qat_tricks.evaluate(path, loader, "
            f"module={kind.__name__}, NAME=VALUE)"
        ) from error
    known = has_workbench(module)
    name = workbench_of(module).network_name if known else find_network(module)
    return OwnModule(module.eval(), module.get_submodule(name))


def _class_named(dotted: str) -> Any:
    module_name, _, attribute = dotted.rpartition(".")
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise QatTricksError(
            f'cannot import module="{dotted}" ({error}): give "package.Class", and put its folder '
            "on the PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise QatTricksError(
            f'module="{dotted}" is a {type(found).__name__}: give a LightningModule\'s class'
        )
    return found


def describe(module: Classifier) -> dict[str, Any]:
    """Returns the description of a checkpoint: ``recipe``, ``model``, ``data``, ``preprocessing``.

    Raises:
        QatTricksError: it does not say which data it was made for.
    """
    data, preprocessing = module.hparams["data"], module.hparams["preprocessing"]
    if data is None:
        raise QatTricksError(
            "the checkpoint does not say which data it was made for: give one that train.py wrote"
        )
    if preprocessing is None:  # older checkpoints: that of their data
        preprocessing = build_data(**data).preprocessing.described()
    return {
        "recipe": None,
        "model": module.hparams["model"],
        "data": data,
        "preprocessing": preprocessing,
        # Older checkpoints have neither.
        "class_names": module.hparams.get("class_names"),
        "export": module.hparams.get("export"),
    }


def export_network(
    network: nn.Module,
    path: Path,
    description: dict[str, Any],
    images: Iterable[Any],
    min_sqnr_db: float = MIN_SQNR_DB,
    **choices: Any,
) -> None:
    """Writes a network to an ONNX file with a description.

    Args:
        network: of a checkpoint.
        path: of the file.
        description: from ``describe``.
        images: at least one batch ``[N, C, H, W]``, or pairs of one and labels, on which the file
            is compared with the network.
        min_sqnr_db: the least ratio of the network's logits to their error in the file.
        choices: further arguments of ``export_onnx``.

    Raises:
        QatTricksError: there are no images, or the file does not run as simulated.
    """
    batches = list(images)
    check_batches(batches, "to compare the exported file on")
    export_onnx(
        network,
        path,
        batches[0],
        images=batches,
        metadata=to_metadata(description),
        min_sqnr_db=min_sqnr_db,
        **choices,
    )
