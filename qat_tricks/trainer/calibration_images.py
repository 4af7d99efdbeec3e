"""Training images for the tricks, as training feeds them to the network."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.overrides import is_overridden

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import (
    Inputs,
    as_tensors,
    batch_size,
    input_names,
    inputs_of,
    is_nested,
)
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.module import network_of
from qat_tricks.trainer.training_step import (
    REMEDY,
    Step,
    as_in_training,
    network_inputs_of,
    on_device,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

PATIENCE = 16  # batches after which a step that has not called its network never will


def network_inputs(
    trainer: "Trainer",
    pl_module: "LightningModule",
    name: str,
    num_images: int,
    *,
    augmented: bool = False,
) -> list[Inputs]:
    """The network's inputs for the first training images, as training feeds them to it.

    The module's own ``training_step`` runs on batches that have been through all hooks of a batch,
    up to its first call of the network. A module without one is called itself, and where it has no
    ``forward`` either, the batch holds the inputs. The module is left as it was.

    Args:
        trainer: knows the training images.
        pl_module: holds the network.
        name: of the network in ``pl_module``; it may be traced or not.
        num_images: so many, or a few more, or all that there are.
        augmented: from the fit's own loader also where the data module has a
            ``calibration_loader``, which does not augment.

    Raises:
        QatTricksError: there are no training images, or the step does not call the network with
            them, calls its parts by themselves, or fails.
    """
    network = network_of(pl_module, name)
    step = _step(trainer, pl_module, network)
    taken: list[Inputs] = []
    tried = 0
    # Augmentations draw random numbers. The fit must draw the same ones with or without tricks.
    with kept_random_state():
        loader = _training_loader(trainer, pl_module, num_images, augmented)
        opened = _open_again(trainer, loader)
        with opened as batches, as_in_training(trainer, pl_module, network):
            for index, raw in enumerate(batches):
                batch = on_device(trainer, pl_module, raw)
                if batch is None:  # Lightning skips it
                    continue
                if step is None:
                    inputs: Inputs | None = inputs_of(batch, input_names(network))
                else:
                    inputs = network_inputs_of(trainer, pl_module, name, step, batch, index)
                tried += 1
                taken += [] if inputs is None else [inputs]
                # Some steps leave the network out, and some modules never call it.
                if sum(map(batch_size, taken)) >= num_images or (not taken and tried == PATIENCE):
                    break
    if tried and not taken and step is not None:
        raise QatTricksError(
            f"{type(pl_module).__name__}.{step.name} does not call its network {name}: let it call "
            'the network, or name the one that it calls with overrides=["network=NAME"]'
        )
    return taken


def _step(trainer: "Trainer", pl_module: "LightningModule", network: Any) -> Step | None:
    """The method of ``pl_module`` that calls the network in training, or None."""
    if _overrides("training_step", pl_module):
        if "dataloader_iter" in signature(pl_module.training_step).parameters:
            raise QatTricksError(
                f"{type(pl_module).__name__}.training_step takes dataloader_iter, of which no "
                f"batch can be taken before the training: let it take batch, {REMEDY}"
            )
        build = trainer.fit_loop.epoch_loop._build_kwargs
        return Step(
            "training_step",
            lambda batch, index: pl_module.training_step(
                *build(OrderedDict(), batch, index).values()
            ),
        )
    names, required = input_names(network), input_names(pl_module.forward)
    # A batch gives the module its arguments where it takes one, or as many as the network does.
    if _overrides("forward", pl_module) and len(required) in (0, 1, len(names)):
        return Step("forward", lambda batch, _: _call_forward(pl_module, batch, required, names))
    return None


def _call_forward(
    pl_module: "LightningModule", batch: Any, required: Sequence[str], names: Sequence[str]
) -> None:
    """Calls ``forward`` of a module, which takes the images of a batch, or the batch itself.

    Both are tried, the one that the argument's name speaks for first; the error is that of the
    first.
    """
    tries = [lambda: _arguments(batch, required, names), lambda: (batch,)]
    if required == ["batch"]:
        tries.reverse()
    failures: list[Exception] = []
    for arguments in tries if len(required) == 1 else tries[:1]:
        try:
            pl_module(*arguments())
            return
        except Exception as error:  # whatever the user's code raises
            failures.append(error)
    raise failures[0]


def _arguments(batch: Any, required: Sequence[str], names: Sequence[str]) -> tuple[Any, ...]:
    """The part of a batch that a module's ``forward`` takes.

    Args:
        batch: of a training loader.
        required: names of the arguments of ``forward``.
        names: names of the network's inputs; ``forward`` may make several of one argument.
    """
    if len(required) == 1 and (len(names) > 1 or is_nested(batch)):
        return (batch[0] if isinstance(batch, (list, tuple)) else batch,)
    return as_tensors(inputs_of(batch, required or names))


def _training_loader(
    trainer: "Trainer", pl_module: "LightningModule", num_images: int, augmented: bool
) -> Iterable[Any]:
    """Batches of training images, as the fit would get them.

    They come from the data module's ``calibration_loader``, without augmentation, if it has one and
    they need not be ``augmented``.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    source = trainer.fit_loop._data_source
    if datamodule is not None:
        if trainer.state.fn != "fit":
            datamodule.setup("fit")  # validation and test set up their own split only
        if hasattr(datamodule, "calibration_loader") and not augmented:
            return datamodule.calibration_loader(num_images)
        loader = datamodule.train_dataloader()
    # A loader that was handed to ``fit`` wins over the module's own, as in Lightning.
    elif source.instance is not None and source.is_defined():
        loader = source.dataloader()
    elif _overrides("train_dataloader", pl_module):
        loader = pl_module.train_dataloader()
    else:
        raise QatTricksError(
            "there are no training images to calibrate on: give the trainer a data module, "
            f"{REMEDY}"
        )
    if isinstance(loader, (list, tuple, Mapping)):
        return package_of(trainer).utilities.CombinedLoader(loader, "max_size_cycle")
    if not isinstance(loader, Iterable):
        raise QatTricksError(f"calibration needs one training loader, not {type(loader).__name__}")
    return loader


@contextmanager
def _open_again(trainer: "Trainer", loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """The batches of ``loader``, whose own generators then draw the same ones for training."""
    combined = isinstance(loader, package_of(trainer).utilities.CombinedLoader)
    parts: list[Any] = list(loader.flattened) if combined else [loader]  # type: ignore[attr-defined]
    parts += [getattr(part, "batch_sampler", None) for part in parts]
    parts += [getattr(part, "sampler", None) for part in parts]
    drawn = [getattr(part, "generator", None) for part in parts]
    generators = [generator for generator in drawn if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        # Of several loaders, a batch is a list or mapping with a batch of each.
        yield (batch for batch, *_ in loader) if combined else loader
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _overrides(method: str, pl_module: "LightningModule") -> bool:
    return is_overridden(method, pl_module, package_of(pl_module).LightningModule)
