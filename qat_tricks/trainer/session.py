"""Between Lightning and the tricks: which attribute is the network, where calibration images come
from, what a checkpoint says. The only place, beside the callbacks themselves, that knows
Lightning.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.files import write_tensors
from qat_tricks.graph.inputs import Inputs, as_tensors, input_names, inputs_of, is_nested
from qat_tricks.graph.layers import is_layer
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.order import check_order
from qat_tricks.trainer.random_state import random_state
from qat_tricks.trainer.ranks import loaded_once
from qat_tricks.trainer.trick import Trick

CHECKPOINT_KEY = "qat_tricks"
_ATTRIBUTE = "_qat_tricks_workbench"
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
# What a checkpoint says of a run, beside the weights; the states of the data module and of the
# precision have names of their own.
_RUN_STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def attach(trick: Trick, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Workbench:
    """Returns the workbench of ``pl_module``, whose network it has made ready: traced, or rebuilt
    from a checkpoint.

    Raises:
        QatTricksError: tricks in an order that cannot work, no network or several, or a network
            that cannot be traced.
    """
    work: Workbench | None = pl_module.__dict__.get(_ATTRIBUTE)
    tricks = [callback for callback in trainer.callbacks if isinstance(callback, Trick)]  # type: ignore[attr-defined]
    if trick in tricks[:1]:
        check_trainer(trainer)
        if work is not None:
            _check_restore(trainer, pl_module)
    if work is None:
        name = find_network(pl_module, trick.network_name)
        network = pl_module.get_submodule(name)
        if hasattr(network, "_orig_mod"):
            raise QatTricksError(
                f"{name} is compiled, and surgery needs the network itself: leave it as it is and "
                "compile what is trained, trainer.fit(torch.compile(module))"
            )
        pl_module.to(trainer.strategy.root_device)
        saved = _prepare_restore(trainer, pl_module)
        teacher = copy.deepcopy(network) if any(t.needs_teacher for t in tricks) else None
        before = list(network.parameters())
        work = Workbench(
            network if saved is None else rebuild(network, saved),
            teacher=teacher,
            untraced=trick.whole,
        )
        work.parameters_before = before
        attach_workbench(pl_module, work, name)
    check_order(tricks, work.history)
    work.loader = partial(
        loaded_once, lambda num_images: _network_inputs(trainer, pl_module, work, num_images)
    )
    work.trains = trainer.state.fn == "fit"
    return work


def check_trainer(trainer: pl.Trainer) -> None:
    """Raises QatTricksError for what a trainer may be told and the tricks cannot work with."""
    strategy, precision = trainer.strategy, str(trainer.precision)
    if isinstance(strategy, SHARDED):
        raise QatTricksError(
            f"{type(strategy).__name__} shards parameters, which masks and scales cannot follow: "
            'use strategy="ddp", or a single device'
        )
    if precision not in PRECISIONS:
        raise QatTricksError(
            f"precision={precision} is not allowed: scales and integer grids need float32; give "
            f"one of {', '.join(PRECISIONS)}"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Trick):
            break
        if hasattr(callback, "_average_model"):
            name = type(callback).__name__
            raise QatTricksError(
                f"{name} copies the network before the recipe has changed it: give {name} after "
                "the recipe"
            )


def attach_workbench(pl_module: pl.LightningModule, work: Workbench, name: str) -> Workbench:
    """Puts the network of ``work`` in its place in ``pl_module``, as submodule ``name``, and
    returns ``work``.
    """
    work.network_name = name
    pl_module.set_submodule(name, work.network)
    setattr(pl_module, _ATTRIBUTE, work)
    pl_module.on_save_checkpoint = _SaveSpec(pl_module)  # type: ignore[method-assign]
    return work


class _SaveSpec:
    """An ``on_save_checkpoint`` that adds the network's spec to what the module's own does.

    Lightning spares callbacks where only weights are saved; the module is always asked, whatever
    trainer it is in.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.pl_module = pl_module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        type(self.pl_module).on_save_checkpoint(self.pl_module, checkpoint)
        checkpoint[CHECKPOINT_KEY] = describe(self.pl_module)
        # Of several processes each has its own state, and the first alone writes.
        if "optimizer_states" in checkpoint and self.pl_module.trainer.world_size == 1:
            checkpoint[CHECKPOINT_KEY]["random_state"] = random_state()


def workbench_of(pl_module: pl.LightningModule) -> Workbench:
    """The workbench that ``attach`` made for ``pl_module``."""
    return pl_module.__dict__[_ATTRIBUTE]


def find_network(pl_module: nn.Module, name: str | None = None) -> str:
    """The attribute of ``pl_module`` that holds the network: the one child with conv or linear
    layers.

    Raises:
        QatTricksError: there is no such child, or several; or ``name`` is none of its submodules.
    """
    children = {
        key: child
        for key, child in pl_module.named_children()
        if any(is_layer(m) for m in child.modules())
    }
    listed = (
        ", ".join(f'"{key}" ({type(child).__name__})' for key, child in children.items()) or "none"
    )
    owner = type(pl_module).__name__
    if name is not None:
        if name not in dict(pl_module.named_modules()):
            raise QatTricksError(f'{owner} has no submodule "{name}"; its networks: {listed}')
        return name
    if len(children) != 1:
        raise QatTricksError(
            f"{owner} must hold one network, and these of its attributes have conv or linear "
            f"layers: {listed}; "
            'name the one to quantize with overrides=["network=NAME"], or put its parts into one '
            "module"
        )
    return next(iter(children))


def load_spec(path: str | Path) -> dict[str, Any] | None:
    """What a checkpoint says was done: ``{"network": attribute, "spec": spec}``, or None for one
    that is not ours.

    Raises:
        QatTricksError: the file is missing, or no checkpoint.
    """
    return load_checkpoint(path).get(CHECKPOINT_KEY)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint under ``weights_only=True``.

    Raises:
        QatTricksError: the file is missing, truncated, or not a Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise QatTricksError(f"there is no checkpoint {path}: give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QatTricksError(
            f"{path} cannot be read as a checkpoint ({reason}): it is damaged, or no checkpoint"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise QatTricksError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    return checkpoint


def _prepare_restore(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any] | None:
    """The spec in the checkpoint that this run is about to restore; None when it restores none, or
    a float one.

    The weights of a float checkpoint are loaded now, for the recipe to begin from.
    """
    path = _checkpoint_to_restore(trainer)
    if path is None:
        return None
    checkpoint, path = _read_or_previous(trainer, path)
    if CHECKPOINT_KEY in checkpoint:
        return checkpoint[CHECKPOINT_KEY]["spec"]
    _load_state(pl_module, checkpoint, path, strict=pl_module.strict_loading)
    rank_zero_info(
        f"{path} holds a float network: its weights alone are loaded, and the recipe begins from "
        "them"
    )
    stateful = (trainer.precision_plugin, trainer.datamodule)  # type: ignore[attr-defined]
    gone = {*_RUN_STATE, *(type(one).__qualname__ for one in stateful)}
    kept = {key: value for key, value in checkpoint.items() if key not in gone}
    _HandOver(
        trainer,
        lambda: {
            **kept,
            "state_dict": pl_module.state_dict(),
            "optimizer_states": [],
            "lr_schedulers": [],
        },
    )
    return None


def _check_restore(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Reads what this run is about to restore into a module that is quantized already."""
    path = _checkpoint_to_restore(trainer)
    if path is not None and CHECKPOINT_KEY not in _read_or_previous(trainer, path)[0]:
        raise QatTricksError(
            f"{path} holds a float network and this module is quantized already: give a fresh one"
        )


def _read_or_previous(trainer: pl.Trainer, path: str | Path) -> tuple[dict[str, Any], str | Path]:
    """Reads a checkpoint; in the place of a damaged ``last`` one, the newest beside it that can be
    read.
    """
    try:
        return load_checkpoint(path), path
    except QatTricksError as error:
        callbacks = [
            callback
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, pl.callbacks.ModelCheckpoint)
        ]
        lasts = {
            Path(last)
            for callback in callbacks
            for last in callback._find_last_checkpoints(trainer)
        }
        if (
            Path(path) not in lasts
            or (found := _newest(Path(path).parent, whole=trainer.state.fn == "fit")) is None
        ):
            raise
        checkpoint, previous = found
        rank_zero_warn(
            f"{error}: the previous one is used, {previous}, of step {checkpoint['global_step']}"
        )
        _HandOver(trainer, lambda: checkpoint)
        return found


def _newest(folder: Path, *, whole: bool) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint in ``folder`` that can be read, and its path; ``whole``: one that a fit
    can go on from.
    """
    for path in sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except QatTricksError:  # damaged too: an older one may not be
            continue
        if not whole or "optimizer_states" in checkpoint:
            return checkpoint, path
    return None


class _HandOver(CheckpointIO):
    """Gives Lightning, once, what is made of a checkpoint in the place of the file that it is about
    to read.
    """

    def __init__(self, trainer: pl.Trainer, checkpoint: Callable[[], dict[str, Any]]) -> None:
        self.strategy, self.own, self.checkpoint = (
            trainer.strategy,
            trainer.strategy.checkpoint_io,
            checkpoint,
        )
        self.strategy.checkpoint_io = self

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.strategy.checkpoint_io = self.own
        return self.checkpoint()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.own.save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.own.remove_checkpoint(path)


def _checkpoint_to_restore(trainer: pl.Trainer) -> str | Path | None:
    """The checkpoint path given to ``fit``, ``validate``, ``test`` or ``predict``, resolved
    ("last", "best").

    Lightning tells callbacks of it only after ``setup``, when it is too late to rebuild instead of
    calibrating again; until then it is an argument of ``Trainer._run``, and is read there.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals["ckpt_path"]
        frame = frame.f_back  # type: ignore[assignment]
    return trainer.ckpt_path


def synchronize(trainer: pl.Trainer, work: Workbench) -> None:
    """Gives every rank the network of rank 0, values of parameters and buffers alike."""
    if trainer.world_size > 1:
        work.network.load_state_dict(trainer.strategy.broadcast(work.network.state_dict()))


def is_mid_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written with batches of its epoch left to train on."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["current"]["ready"] > 0 and not progress["is_last_batch"]


def keep_grids(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Gives the averaged network of a WeightAveraging or the like the masks and zero points of the
    trained one.

    They are no quantities to average: half a mask prunes nothing, and half a step belongs to no
    grid.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            averaged = {
                name.removeprefix("module."): buffer for name, buffer in average.named_buffers()
            }
            for name, buffer in pl_module.named_buffers():
                if name.rpartition(".")[2] in ("weight_mask", "zero_point"):
                    averaged[name].copy_(buffer)


class _SeenError(Exception):
    """Ends a forward pass once the network's input is known."""


def _network_inputs(
    trainer: pl.Trainer, pl_module: pl.LightningModule, work: Workbench, num_images: int
) -> Iterator[Inputs]:
    """What the network gets to see of the training images, the module's own preprocessing included."""
    names, required = input_names(work.network), input_names(pl_module.forward)
    through_module = is_overridden("forward", pl_module) and len(required) in (0, 1, len(names))
    seen: list[Inputs] = []

    def see(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature(network.forward).bind(*args, **kwargs).arguments
        seen.append(inputs_of([given[name] for name in names], names) if names else args[0])
        raise _SeenError

    with isolate_rng():
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
    """What a module's ``forward``, whose arguments are ``required``, takes of a batch: the
    network's inputs, called ``names``, or one thing that it makes them of.
    """
    if len(required) == 1 and (len(names) > 1 or is_nested(batch)):
        return (batch[0] if isinstance(batch, (list, tuple)) else batch,)
    return as_tensors(inputs_of(batch, required or names))


def _training_loader(
    trainer: pl.Trainer, pl_module: pl.LightningModule, num_images: int
) -> Iterable[Any]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None:
        if trainer.state.fn != "fit":
            datamodule.setup("fit")  # validation and test set up their own split only
        if hasattr(datamodule, "calibration_loader"):
            return datamodule.calibration_loader(num_images)
        return datamodule.train_dataloader()
    source = trainer.fit_loop._data_source
    if source.instance is not None and source.is_defined():
        loader = source.dataloader()
        if not isinstance(loader, Iterable):
            raise QatTricksError(
                f"calibration needs one training loader, not {type(loader).__name__}"
            )
        return loader
    if is_overridden("train_dataloader", pl_module):
        return pl_module.train_dataloader()
    raise QatTricksError(
        "there are no training images to calibrate on: give the trainer a data module, or "
        "quantize beforehand with qat_tricks.quantize(network, loader)"
    )


def describe(pl_module: pl.LightningModule) -> dict[str, Any]:
    """What a checkpoint carries of us, as plain data: the network's attribute and its spec."""
    work = workbench_of(pl_module)
    return {"network": work.network_name, "spec": copy.deepcopy(spec_of(work.network))}


def save_checkpoint(pl_module: pl.LightningModule, path: str | Path) -> None:
    """Writes a checkpoint of ``pl_module`` as a trainer would, without one; atomically.

    Raises:
        QatTricksError: the path cannot be written.
    """
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": pl_module.state_dict(),
        "hyper_parameters": dict(pl_module.hparams),
    }
    if _ATTRIBUTE in pl_module.__dict__:
        checkpoint[CHECKPOINT_KEY] = describe(pl_module)
    write_tensors(checkpoint, path)


def load_from_checkpoint(
    module_class: type[pl.LightningModule], path: str | Path, *, strict: bool = True, **kwargs: Any
) -> pl.LightningModule:
    """Builds a ``module_class`` and gives it the structure and the values of the checkpoint; no
    recipe is needed.

    Args:
        module_class: the LightningModule's class; built from ``kwargs`` over the hyperparameters
            saved in the checkpoint.
        path: a checkpoint, quantized or float.
        strict: whether the keys must match exactly.

    Raises:
        QatTricksError: the file is missing or damaged, or the checkpoint is of another network.
    """
    checkpoint = load_checkpoint(path)
    hyperparameters = dict(checkpoint.get("hyper_parameters", {}))
    parameters = signature(module_class.__init__).parameters
    if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        hyperparameters = {
            key: value for key, value in hyperparameters.items() if key in parameters
        }
    module = module_class(**{**hyperparameters, **kwargs})
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is not None:
        name = find_network(module, saved["network"])
        attach_workbench(
            module, Workbench(rebuild(module.get_submodule(name), saved["spec"])), name
        )
    _load_state(module, checkpoint, path, strict=strict)
    return module.eval()


def _load_state(
    module: pl.LightningModule, checkpoint: dict[str, Any], path: str | Path, *, strict: bool
) -> None:
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise QatTricksError(f"{path} does not fit {type(module).__name__}: {reason}") from error
