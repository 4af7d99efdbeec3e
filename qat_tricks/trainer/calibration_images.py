"""Training images for the tricks, as the module's ``forward`` passes them to its network."""

from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.overrides import is_overridden
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, as_tensors, input_names, inputs_of, is_nested
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.framework import package_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class _SeenError(Exception):
    """Ends a forward pass once the network's input is known."""


def network_inputs(
    trainer: "Trainer", pl_module: "LightningModule", work: Workbench, num_images: int
) -> Iterator[Inputs]:
    """The network's inputs for the training images, after the module's own preprocessing.

    Raises:
        QatTricksError: there are no training images, or ``forward`` does not take the inputs that
            a batch holds.
    """
    # A batch gives the module its arguments where it takes one, or as many as the network does.
    names, required = input_names(work.network), input_names(pl_module.forward)
    through_module = _overrides("forward", pl_module) and len(required) in (0, 1, len(names))
    seen: list[Inputs] = []

    def see(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature(network.forward).bind(*args, **kwargs).arguments
        seen.append(inputs_of([arguments[name] for name in names], names) if names else args[0])
        # The network itself need not run: its inputs are known.
        raise _SeenError

    # Augmentations draw random numbers. The fit must draw the same ones with or without tricks.
    with kept_random_state():
        for batch in _training_loader(trainer, pl_module, num_images):
            batch = trainer.strategy.batch_to_device(batch)
            if not through_module:
                yield inputs_of(batch, names)
                continue
            handle = work.network.register_forward_pre_hook(see, with_kwargs=True)
            try:
                with torch.no_grad():
                    pl_module(*_module_inputs(batch, required, names))
                raise QatTricksError(
                    f"{type(pl_module).__name__}.forward does not call its network "
                    f"{work.network_name}"
                )
            except _SeenError:
                yield seen.pop()
            except (TypeError, ValueError) as error:
                raise QatTricksError(
                    f"{type(pl_module).__name__}.forward does not take what a batch begins with "
                    f"({error}): let a batch be (inputs, labels), inputs being a tensor, or the "
                    "tuple of tensors that forward takes"
                ) from error
            finally:
                handle.remove()


def _module_inputs(batch: Any, required: Sequence[str], names: Sequence[str]) -> tuple[Any, ...]:
    """The part of a batch that a module's ``forward`` takes.

    Args:
        batch: of a training loader.
        required: names of the arguments of ``forward``.
        names: names of the network's inputs; ``forward`` may make several of one argument.
    """
    if len(required) == 1 and (len(names) > 1 or is_nested(batch)):
        return (batch[0] if isinstance(batch, (list, tuple)) else batch,)
    return as_tensors(inputs_of(batch, required or names))


def datamodule_images(datamodule: Any, num_images: int) -> Iterable[Any]:
    """Batches of training images of a data module, set up for a fit.

    They come from its ``calibration_loader``, without augmentation, if it has one.
    """
    if hasattr(datamodule, "calibration_loader"):
        return datamodule.calibration_loader(num_images)
    return datamodule.train_dataloader()


def _training_loader(
    trainer: "Trainer", pl_module: "LightningModule", num_images: int
) -> Iterable[Any]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None:
        if trainer.state.fn != "fit":
            datamodule.setup("fit")  # validation and test set up their own split only
        return datamodule_images(datamodule, num_images)
    # A loader that was handed to ``fit`` wins over the module's own, as in Lightning.
    source = trainer.fit_loop._data_source
    if source.instance is not None and source.is_defined():
        loader = source.dataloader()
        if not isinstance(loader, Iterable):
            raise QatTricksError(
                f"calibration needs one training loader, not {type(loader).__name__}"
            )
        return loader
    if _overrides("train_dataloader", pl_module):
        return pl_module.train_dataloader()
    raise QatTricksError(
        "there are no training images to calibrate on: give the trainer a data module, or "
        "quantize beforehand with qat_tricks.quantize(network, loader)"
    )


def _overrides(method: str, pl_module: "LightningModule") -> bool:
    return is_overridden(method, pl_module, package_of(pl_module).LightningModule)
