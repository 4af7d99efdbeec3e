"""Evaluates a classifier in any form that it has here: a module, a network, or a file of either."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.overrides import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_tricks.deploy.cost.forecast import placement
from qat_tricks.deploy.cost.weights import weight_sparsity
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.evidence.metrics import Metrics, agreement, evaluate_classifier
from qat_tricks.evidence.show import show
from qat_tricks.graph.inputs import call_network, input_names, inputs_of, is_loader
from qat_tricks.graph.logits import has_one_logit, logits_of
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.traced_network import TracedNetwork
from qat_tricks.graph.unwrap import unwrapped
from qat_tricks.recipes.fit_report import zeros
from qat_tricks.trainer.checkpoints import load_from_checkpoint
from qat_tricks.trainer.framework import PACKAGES, package_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

Evaluated = nn.Module | str | PathLike[str]

LABEL_NAMES = ("label", "labels", "target", "targets", "y", "class", "classes")
"""Names that labels usually have in a mapping, the first found counts."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one pass over N images; None for what is not known."""

    name: str  # of the class, or of the file
    images: int  # N
    accuracy: float  # 0..1
    top5: float  # 0..1; top-k of all classes where there are fewer than five
    f1: float  # macro, 0..1, over the classes that the data holds
    ece: float  # expected calibration error in 15 bins, 0..1
    nll: float  # mean cross entropy, nats
    seconds: float  # of the pass, loading included
    float_accuracy: float | None  # of the float network, if it was given
    agreement: float | None  # share of images with the class that the float network gives, 0..1
    zeros: float | None  # share of zeros among the weights of convs and linears, 0..1
    quantized: int | None  # convs and linears in integers, of a network of ours
    layers: int | None  # all of its convs and linears

    def __str__(self) -> str:
        """The figures in a few lines."""
        accuracy = show(self.accuracy, "percent")
        lines = [f"{self.name} on {self.images} images"]
        if self.float_accuracy is not None:
            drop = show((self.float_accuracy - self.accuracy) * 100, "change")
            accuracy += f" (float {show(self.float_accuracy, 'percent')}, {drop} points)"
        lines.append(f"accuracy   {accuracy}")
        if self.agreement is not None:
            lines.append(f"agreement  {show(self.agreement, 'percent')} with the float network")
        lines.append(
            f"beside it  top-5 {show(self.top5, 'percent')}, macro F1 {show(self.f1, 'percent')}, "
            f"ECE {show(self.ece, 'ratio')}, NLL {show(self.nll, 'ratio')}"
        )
        facts = []
        if self.quantized is not None:
            facts.append(f"{self.quantized} of {self.layers} convs and linears in integers")
        if self.zeros is not None:
            facts.append(f"{show(self.zeros, 'percent')} of the weights zero")
        return "\n".join([*lines, *([f"network    {', '.join(facts)}"] if facts else [])])


def evaluate(
    what: Evaluated,
    loaders: Any,
    *,
    reference: Evaluated | None = None,
    module: "type[LightningModule] | None" = None,
    **arguments: Any,
) -> Evaluation:
    """Measures a classifier on images with labels; it stays as it is.

    Args:
        what: a LightningModule, whose ``forward`` is measured; a network, quantized or not; or the
            path of a ``.onnx``, which ONNX Runtime runs, or of a ``.ckpt``.
        loaders: a loader, a list of them, or a data module, whose test images count, or else its
            validation images. A batch is ``(inputs, labels)``, or a mapping with such names.
        reference: the float network to compare with, in any of these forms.
        module: of a ``.ckpt``, the class of the LightningModule that it was saved of.
        arguments: of ``module``, over the hyperparameters in the checkpoint.

    Raises:
        QatTricksError: a file that cannot be read, a ``.ckpt`` without ``module``, batches without
            labels, or labels that are no classes of the network.
    """
    measured = _opened(what, module, arguments)
    other = None if reference is None else _opened(reference, module, arguments)
    theirs: list[Tensor] = []
    with evaluating(*(opened.owner for opened in (measured, other) if opened and opened.owner)):
        batches, data = _batches(loaders)
        pairs = _pairs(measured, other, theirs, batches, data)
        metrics = _measure(pairs)
    share = float_accuracy = None
    if other is not None:
        reference_metrics = _measure(iter(_regrouped(theirs)))
        float_accuracy = reference_metrics.accuracy
        share = agreement(metrics.predictions, reference_metrics.predictions)
    figures: dict[str, Any] = {**metrics.as_dict(), **measured.facts()}
    return Evaluation(
        name=measured.name,
        images=len(metrics.predictions),
        float_accuracy=float_accuracy,
        agreement=share,
        **figures,
    )


def metrics_of(module: nn.Module, batches: Iterable[Any], data: Any = None) -> Metrics:
    """The metrics of a LightningModule or a network, with what it gives each image.

    Args:
        module: its ``forward`` is measured, in evaluation mode; it stays as it is.
        batches: ``(inputs, labels)``, or mappings with such names.
        data: the data module that they are of, whose batch hooks run; anything else has none.

    Raises:
        QatTricksError: as of ``evaluate``.
    """
    opened = _opened(module, None, {})
    assert opened.owner is not None
    with evaluating(opened.owner):
        return _measure(_pairs(opened, None, [], iter(batches), data))


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """Something to evaluate."""

    name: str
    names: Sequence[str]  # of its inputs
    run: Callable[..., Any]  # inputs to logits
    owner: nn.Module | None = None  # what is to be in evaluation mode
    path: Path | None = None  # of an ONNX file
    takes_batch: bool = False  # whether it is called with whole batches

    def logits(self, batch: Any, data: Any) -> Tensor:
        """The logits for a batch of a loader, which may be that of a data module."""
        batch = _on_device(self.owner, data, batch)
        with torch.no_grad():
            if self.takes_batch:
                return logits_of(self.run(batch)).detach().float().cpu()
            inputs = inputs_of(batch, self.names)
            return logits_of(call_network(self.run, inputs)).detach().float().cpu()

    def facts(self) -> dict[str, Any]:
        """What the network is like, beside what it computes."""
        if self.owner is None:
            assert self.path is not None
            return {"zeros": weight_sparsity(self.path), "quantized": None, "layers": None}
        ours = [part for part in self.owner.modules() if isinstance(part, TracedNetwork)]
        placed = placement(ours[0]) if ours else None
        return {
            "zeros": zeros(self.owner),
            "quantized": placed and placed.quantized,
            "layers": placed and placed.layers,
        }


def _opened(
    what: Evaluated, module: "type[LightningModule] | None", arguments: Mapping[str, Any]
) -> _Opened:
    if isinstance(what, nn.Module):
        return _of_module(unwrapped(what), type(what).__name__)
    if not isinstance(what, (str, PathLike)):
        raise QatTricksError(
            f"{type(what).__name__} cannot be evaluated: give a LightningModule, a network, or the "
            "path of a .onnx or .ckpt"
        )
    path = Path(what)
    if path.suffix == ".onnx":
        network = open_network(path, threads=torch.get_num_threads())
        return _Opened(
            name=path.name,
            names=[spec.name for spec in network.specs],
            run=lambda *inputs: torch.from_numpy(
                network.prepare(*(values.cpu().numpy() for values in inputs))()
            ),
            path=path,
        )
    if path.suffix != ".ckpt":
        raise QatTricksError(f"{path} is neither a .onnx nor a .ckpt file: give one of them")
    if module is None:
        raise QatTricksError(
            f"{path} does not say which class it is of: give module=YourLightningModule"
        )
    return _of_module(load_from_checkpoint(module, path, **arguments), path.name)


def _of_module(owner: nn.Module, name: str) -> _Opened:
    if _is_lightning(owner) and not is_overridden("forward", owner, _base(owner)):
        raise QatTricksError(
            f"{type(owner).__name__} has no forward: give it one that yields logits, or evaluate "
            "its network"
        )
    names = input_names(owner)
    takes_batch = names == ["batch"]
    return _Opened(name=name, names=names, run=owner, owner=owner, takes_batch=takes_batch)


def _is_lightning(thing: Any) -> bool:
    kinds = type(thing).__mro__
    return any(f"{kind.__module__}.".startswith(tuple(f"{p}." for p in PACKAGES)) for kind in kinds)


def _base(module: nn.Module) -> type:
    return package_of(module).LightningModule


def _on_device(owner: nn.Module | None, data: Any, batch: Any) -> Any:
    """A batch on the device of ``owner``, after the hooks that Lightning would call for it.

    Args:
        owner: what is evaluated; a LightningModule has hooks.
        data: likewise a data module, whose hooks, where it has any of its own, come in the place of
            the module's.
        batch: of a loader.
    """
    parameters = iter(()) if owner is None else owner.parameters()
    device = next((p.device for p in parameters), torch.device("cpu"))
    calls = (("on_before_batch_transfer", ()), ("transfer_batch_to_device", (device,)))
    for name, arguments in (*calls, ("on_after_batch_transfer", ())):
        hooks: Any = data if _has_hook(data, name) else owner
        if not _is_lightning(hooks):
            if arguments:
                batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
            continue
        try:
            batch = getattr(hooks, name)(batch, *arguments, 0)
        except Exception as error:  # whatever the user's code raises
            raise QatTricksError(
                f"a batch hook of {type(hooks).__name__} fails without a trainer "
                f"({type(error).__name__}: {one_line(error)}): use trainer.test(module, loaders)"
            ) from error
    return batch


def _has_hook(data: Any, name: str) -> bool:
    """Whether ``data`` is a data module with a batch hook of its own."""
    if not _is_lightning(data):
        return False
    kind = package_of(data).LightningDataModule
    return isinstance(data, kind) and is_overridden(name, data, kind)


def _batches(loaders: Any) -> tuple[Iterator[Any], Any]:
    """The batches of a loader, of several, or of a data module; and that data module or None."""
    if not _is_lightning(loaders):
        return _batches_of(loaders), None
    kind = package_of(loaders).LightningDataModule
    tests = is_overridden("test_dataloader", loaders, kind)
    loaders.prepare_data()
    loaders.setup("test" if tests else "validate")
    given = loaders.test_dataloader() if tests else loaders.val_dataloader()
    return _batches_of(given), loaders


def _batches_of(loaders: Any) -> Iterator[Any]:
    """The batches of a loader, or of several."""
    if isinstance(loaders, (list, tuple)) and all(map(is_loader, loaders)):
        for loader in loaders:
            yield from loader
    elif isinstance(loaders, Iterable) and not isinstance(loaders, (str, Tensor, Mapping)):
        yield from loaders
    else:
        raise QatTricksError(
            f"{type(loaders).__name__} is no loader: give one that yields (inputs, labels), a list "
            "of such, or a data module"
        )


def labels_of(batch: Any, names: Sequence[str], index: int) -> Tensor:
    """The labels of a batch of a loader.

    Args:
        batch: a mapping, or a tuple that begins with the inputs.
        names: of the network's inputs.
        index: of the batch, for the error.

    Raises:
        QatTricksError: it has none.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in LABEL_NAMES if name in batch), None)
    elif isinstance(batch, (list, tuple)) and len(batch) > 1:
        # Of several inputs that lie flat in the batch, the labels follow the last one.
        is_flat = isinstance(batch[0], Tensor) and len(names) > 1
        place = len(names) if is_flat else 1
        labels = batch[place] if place < len(batch) else None
    if not isinstance(labels, Tensor):
        raise QatTricksError(
            f"batch {index} of the loader is a {type(batch).__name__} without labels: yield "
            f"(inputs, labels), or a mapping with {', '.join(LABEL_NAMES[:4])}"
        )
    return labels


def _pairs(
    measured: _Opened,
    other: _Opened | None,
    theirs: list[Tensor],
    batches: Iterable[Any],
    data: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields logits and labels.

    Args:
        measured: gives the logits.
        other: runs on the same batches, which another pass might shuffle otherwise.
        theirs: gets the logits of ``other``, each followed by the labels.
        batches: of a loader.
        data: the data module that they are of, if they are.
    """
    for index, batch in enumerate(batches):
        labels = labels_of(batch, measured.names, index)
        if other is not None:
            theirs += [other.logits(batch, data), labels]
        yield measured.logits(batch, data), labels


def _regrouped(flat: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _measure(pairs: Iterator[tuple[Tensor, Tensor]]) -> Metrics:
    """The metrics of logits that are computed already."""
    first = next(pairs, None)
    if first is None:
        raise QatTricksError("the loader to evaluate on is empty: give it at least one batch")
    logits = first[0]
    classes = 1 if has_one_logit(logits) else logits.shape[1]

    def whole() -> Iterator[tuple[Tensor, Tensor]]:
        yield first
        yield from pairs

    return evaluate_classifier(lambda logits: logits, whole(), classes, description="evaluate")
