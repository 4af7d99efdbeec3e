"""Runs a module's own step up to the call of its network, and leaves everything as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.graph.inputs import Inputs, input_names, inputs_of, map_tensors
from qat_tricks.graph.modes import kept_modes
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.kept_state import kept_state
from qat_tricks.trainer.module import is_whole, network_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

REMEDY = "or quantize beforehand with qat_tricks.quantize(network, loader)"


@dataclass(frozen=True)
class Step:
    """A method of a module that calls its network."""

    name: str
    run: Callable[[Any, int], Any]  # with a batch, already on the device, and its number


class _SeenError(BaseException):
    """Ends a step once the network's inputs are known.

    It is no ``Exception``, so that a step which catches those does not go on.
    """


class _Seen:
    """What the hooks of one step have seen."""

    def __init__(self) -> None:
        self.inputs: list[Inputs] = []
        self.part: str | None = None  # the first part of the network that was called by itself


def on_device(trainer: "Trainer", pl_module: "LightningModule", batch: Any) -> Any:
    """A batch of a loader after everything that Lightning does with it before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def network_inputs_of(
    trainer: "Trainer", pl_module: "LightningModule", name: str, step: Step, batch: Any, index: int
) -> Inputs | None:
    """The inputs that ``step`` calls the network with, for one batch; None if it does not call it.

    The first call counts. Call it inside of ``as_in_training``.

    Args:
        trainer: knows the precision of training.
        pl_module: holds the network.
        name: of the network in ``pl_module``.
        step: calls the network, or something that does.
        batch: see ``on_device``.
        index: the number of the batch.

    Raises:
        QatTricksError: the step calls a part of the network by itself, or fails.
    """
    seen, owner = _Seen(), f"{type(pl_module).__name__}.{step.name}"
    failure: Exception | None = None
    whole = is_whole(pl_module, name)
    with _hooks(network_of(pl_module, name), seen, whole=whole), torch.no_grad():
        try:
            with trainer.precision_plugin.train_step_context():
                step.run(batch, index)
        except _SeenError:
            pass
        except Exception as error:  # whatever the user's code raises
            failure = error
    # What was seen counts, also where the step has caught our exception and gone on.
    if seen.part is not None and not (whole and seen.inputs):
        part, call = (seen.part, "self(x)") if whole else (f"{name}.{seen.part}", f"{name} itself")
        raise QatTricksError(
            f'{owner} calls the part "{part}" of its network by itself, past the '
            f"quantizers: let it call {call}, which may hand out several outputs"
        )
    if not seen.inputs and isinstance(failure, QatTricksError):
        raise failure
    if not seen.inputs and failure is not None:
        raise QatTricksError(
            f"{owner} fails on a training batch before it calls its network {name} "
            f"({type(failure).__name__}: {one_line(failure)}): calibration runs it after the "
            f"module's setup and before any other hook; mend it, {REMEDY}"
        ) from failure
    return seen.inputs[0] if seen.inputs else None


@contextmanager
def _hooks(network: nn.Module, seen: _Seen, *, whole: bool) -> Iterator[None]:
    """Ends the step at the first call of ``network``, or of a part of it.

    Where the network is the ``whole`` module, losses and augmentations are parts of it too: a part
    is noted, and the step goes on.
    """
    names = input_names(network)
    parts = {module: part for part, module in network.named_modules() if part}
    forward, kind = network.forward, type(network).__name__

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.inputs.append(_copied(_bound(forward, names, args, kwargs, kind)))
        # The network itself need not run: its inputs are known.
        raise _SeenError

    def see_part(module: nn.Module, _: Any) -> None:
        # The network does not run, so that nobody but the module calls its parts.
        if module in parts and (seen.part is None or not whole):
            seen.part = parts[module]
            if not whole:
                raise _SeenError

    with ExitStack() as stack:
        hook = network.register_forward_pre_hook(see, with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        stack.callback(register_module_forward_pre_hook(see_part).remove)
        if whole:  # a step may call ``self.forward(x)``
            seen_directly = partial(_call_with, see, network)
            stack.enter_context(attributes(network, forward=seen_directly))
        yield


def _call_with(see: Callable[..., None], network: nn.Module, *args: Any, **kwargs: Any) -> None:
    see(network, args, kwargs)


def _bound(
    forward: Callable[..., Any],
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: str,
) -> Inputs:
    """The inputs called ``names`` among the arguments of a call of a ``kind``'s ``forward``."""
    if not names:  # ``forward(*args)``
        return args[0]
    arguments = signature(forward).bind(*args, **kwargs).arguments
    values = [arguments[name] for name in names]
    alone = values[0] if len(values) == 1 else None
    if isinstance(alone, (list, tuple, Mapping)):
        raise QatTricksError(
            f"{kind}.forward takes a whole batch, {names[0]}: let it take images "
            "as its exported file will, and take them out of the batch before the call"
        )
    return alone if isinstance(alone, Tensor) else inputs_of(values, names)


def _copied(inputs: Inputs) -> Inputs:
    """The inputs by themselves, as a network outside of autocast takes them.

    A module may hand over the same memory for each batch.
    """
    halves = (torch.float16, torch.bfloat16)
    return map_tensors(
        inputs,
        lambda values: (values.float() if values.dtype in halves else values).detach().clone(),
    )


@contextmanager
def as_in_training(
    trainer: "Trainer", pl_module: "LightningModule", network: nn.Module
) -> Iterator[None]:
    """Lets steps of ``pl_module`` run as in a fit, and then puts everything back.

    Nothing is logged, no optimizer steps, and the state of every module outside of ``network``,
    which does not run, is restored.
    """
    # Of a network that is ``pl_module`` itself, parts may run before it.
    idle = None if network is pl_module else network
    with left_as_it_was(trainer, pl_module, idle), ExitStack() as stack:
        silent = ("log", "log_dict", "print", "manual_backward", "clip_gradients")
        kept = ("toggle_optimizer", "untoggle_optimizer", "lr_scheduler_step")
        stack.enter_context(attributes(pl_module, **dict.fromkeys((*silent, *kept), _nothing)))
        if trainer.world_size > 1:
            # The other processes are waiting for the images: they would be waited for in turn.
            length, others = _alone("the length of the training"), _alone("all_gather")
            stack.enter_context(attributes(trainer.fit_loop, setup_data=length))
            stack.enter_context(attributes(pl_module, all_gather=others))
        state = trainer.state
        assert state.fn is not None  # a run has begun
        # Hooks of a batch augment, and the like, only where they are told that this is training.
        state.fn, trainer.training = type(state.fn)("fit"), True
        # Lightning trains a module in the modes that it finds; one that was evaluated is not meant
        # to be trained so.
        if not pl_module.training:
            pl_module.train()
        yield


@contextmanager
def left_as_it_was(
    trainer: "Trainer", pl_module: "LightningModule", idle: nn.Module | None = None
) -> Iterator[None]:
    """Puts back what steps of ``pl_module``, run by hand, have changed in it and in the trainer.

    Loggers get nothing meanwhile, and the optimizers do not step. Before the training there are
    none, and a step that asks for them gets some that are thrown away.

    Args:
        trainer: runs something.
        pl_module: that is in it.
        idle: a part of ``pl_module`` that does not run, whose state is not looked at.
    """
    loggers, state, configured = trainer.loggers, trainer.state, _Configured(trainer, pl_module)
    fn, stage = state.fn, state.stage
    with ExitStack() as stack:
        stack.enter_context(kept_state(pl_module, idle))
        stack.enter_context(kept_modes(pl_module))
        stack.enter_context(attributes(pl_module, **_stand_ins(configured)))
        stack.enter_context(attributes(trainer.strategy, **configured.as_lists()))
        stack.enter_context(_eager(pl_module))
        stack.callback(setattr, trainer, "loggers", loggers)
        stack.callback(setattr, state, "stage", stage)
        stack.callback(setattr, state, "fn", fn)
        dummy = import_module(f"{package_of(trainer).__name__}.loggers.logger").DummyLogger
        trainer.loggers = [dummy() for _ in loggers]
        yield


def _eager(pl_module: "LightningModule") -> AbstractContextManager[Any]:
    """Runs a compiled module's step without compiling it for the few calls here."""
    if getattr(pl_module, "_compiler_ctx", None) is None:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Gives ``owner`` these attributes, in the place of its class's, for the length of a block."""
    own = {key: owner.__dict__[key] for key in values if key in owner.__dict__}
    owner.__dict__.update(values)
    try:
        yield
    finally:
        for key in values:
            owner.__dict__.pop(key, None)
        owner.__dict__.update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


def _alone(what: str) -> Callable[..., None]:
    """What refuses something for which all processes are needed."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise QatTricksError(
            f"the training step asks for {what} before it calls its network, and the first of "
            f"several processes calibrates alone: call the network first, {REMEDY}"
        )

    return refuse


class _Still:
    """An optimizer, or a schedule, whose steps do nothing."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Calls a closure, which may be what calls the network."""
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def toggle_model(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Toggles nothing."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


class _Configured:
    """The optimizers and schedules of the running fit, or, before it, some to be thrown away.

    The latter are made when a step asks for them, which few do before they call the network.
    """

    def __init__(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self.trainer, self.pl_module = trainer, pl_module
        running = list(trainer.optimizers), list(trainer.lr_scheduler_configs)
        self._made = running if running[0] else None

    @property
    def made(self) -> tuple[list[Any], list[Any]]:
        """Optimizers, and the configurations of schedules.

        Raises:
            QatTricksError: ``configure_optimizers`` fails.
        """
        if self._made is None:
            make = import_module(f"{package_of(self.trainer).__name__}.core.optimizer")
            try:
                self._made = make._init_optimizers_and_lr_schedulers(self.pl_module)
            except QatTricksError:
                raise
            except Exception as error:  # whatever the user's code raises
                raise QatTricksError(
                    f"{type(self.pl_module).__name__}.training_step asks for its optimizers before "
                    f"it calls its network, and configure_optimizers fails ({one_line(error)}): "
                    f"call the network first, {REMEDY}"
                ) from error
        return self._made

    def optimizers(self) -> list[Any]:
        """The optimizers, which do not step."""
        return [_Still(optimizer) for optimizer in self.made[0]]

    def schedules(self) -> list[Any]:
        """The schedules, which do not step."""
        return [_Still(config.scheduler) for config in self.made[1]]

    def as_lists(self) -> dict[str, Any]:
        """What a strategy holds them in, and a trainer reads them from."""
        return {
            "_optimizers": _Later(self.optimizers),
            "lr_scheduler_configs": _Later(lambda: self.made[1]),
        }


class _Later(Sequence[Any]):
    """A list that is made when somebody looks at it."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self.make = make

    def __getitem__(self, index: Any) -> Any:
        return self.make()[index]

    def __len__(self) -> int:
        return len(self.make())


def _stand_ins(configured: _Configured) -> dict[str, Callable[..., Any]]:
    """What stands in for the methods of a module that hand out what steps."""

    def optimizers(*args: Any, **kwargs: Any) -> Any:
        still = configured.optimizers()
        return still[0] if len(still) == 1 else still

    def lr_schedulers() -> Any:
        still = configured.schedules()
        return (still[0] if len(still) == 1 else still) if still else None

    return {"optimizers": optimizers, "lr_schedulers": lr_schedulers}
