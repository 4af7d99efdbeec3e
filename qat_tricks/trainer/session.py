"""The session of a run: it does once the work that all tricks of a trainer need.

It traces or rebuilds the network, hands the tricks their workbench, and sends the result to every
process. It renews the optimizers' parameters, restores random states, and keeps the grids of
averaged networks exact.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.layers import is_layer
from qat_tricks.graph.modes import kept_modes
from qat_tricks.graph.outside import OUTSIDE
from qat_tricks.graph.random_state import restore_random_state
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.traceable import check_traceable, copy_of
from qat_tricks.graph.traced_network import NO_TRAINING
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.averaging import is_averaging, keep_grids
from qat_tricks.trainer.calibration_images import network_inputs
from qat_tricks.trainer.checkpoints import is_mid_epoch
from qat_tricks.trainer.finetuning import (
    end_skips,
    finetuning_in,
    follow_unfrozen,
    freeze_again,
    freeze_early,
    hold_batchnorms,
    learned_scales,
    remembers_groups,
    skip_set_up,
)
from qat_tricks.trainer.forward_alone import forward_alone
from qat_tricks.trainer.framework import Callback, package_of
from qat_tricks.trainer.learning_rate import MeasuredRate
from qat_tricks.trainer.module import (
    CHECKPOINT_KEY,
    attach_workbench,
    find_network,
    has_workbench,
    is_whole,
    network_of,
    workbench_of,
)
from qat_tricks.trainer.optimizers import renew_parameters
from qat_tricks.trainer.order import Ordered, check_order
from qat_tricks.trainer.own_hooks import call_hooks_early, end_run
from qat_tricks.trainer.ranks import loaded_once
from qat_tricks.trainer.resume import resumes, spec_for_quantized, spec_to_restore
from qat_tricks.trainer.schedule import Done, check_not_done, done_by

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class SessionTrick(Ordered, Protocol):
    """A trick as the session uses it; ``trick.Trick`` is one."""

    needs_teacher: bool
    judged: bool
    quantizes: bool

    def apply(self, work: Workbench) -> None:
        """Changes the network of ``work``."""

    def apply_once(self, work: Workbench) -> bool:
        """Applies the trick unless this stage has done so; returns whether it did."""

    def reset(self) -> None:
        """Forgets an earlier fit."""


class Report(Protocol):
    """What tells, at the end of a fit, what it has done; ``recipes.fit_report`` has it."""

    def begin(self, *, resumed: bool) -> None:
        """A fit begins."""

    def measure_float(
        self, trainer: "Trainer", pl_module: "LightningModule", network: nn.Module
    ) -> None:
        """The recipe begins, and is about to change the network of ``pl_module``."""

    def measure_prepared(
        self, trainer: "Trainer", pl_module: "LightningModule", network: fx.GraphModule
    ) -> None:
        """All that needs no training is done."""

    def validated(self, trainer: "Trainer") -> None:
        """The trainer has validated."""

    def finish(self, trainer: "Trainer", work: Workbench) -> None:
        """The fit has ended."""


class Session(Callback):
    """The callback that comes before the tricks of a run.

    ``qat_tricks.recipe`` puts it into its list. A trick adds it to a trainer that has none.

    Args:
        tricks: the session adds them to the trainer, behind itself. Tricks that are in the
            trainer already need not be listed.
        network: attribute of the LightningModule that holds the network, or "self" for the module
            itself; None finds it.
        untraced: name patterns of its submodules that are not traced through.
        trains: whether a fit follows a validation or a test that comes first. Tricks that act
            gradually then wait for it.
        fits: whether a fit may train at all; without one, such tricks act at once.
        keeps_teacher: whether the float network is kept also for tricks of later fits.
        prove: whether tricks are judged by the network's output.
        report: measures each fit, and tells the result at its end.
        rate: measures the learning rate of each fit.

    Attributes:
        done_before: what the trainer has done in earlier fits, from which schedules begin.
        restores_groups: whether this fit is resumed, and a finetuning callback restores the
            parameter groups that there were.
    """

    name = "session"

    def __init__(
        self,
        tricks: Sequence[Any] = (),
        *,
        network: str | None = None,
        untraced: Sequence[str] = (),
        trains: bool = True,
        fits: bool = True,
        keeps_teacher: bool = False,
        prove: bool = True,
        report: Report | None = None,
        rate: MeasuredRate | None = None,
    ) -> None:
        self.prove, self.rate = prove, rate
        self.tricks, self.network, self.untraced = list(tricks), network, tuple(untraced)
        self.trains, self.fits, self.keeps_teacher = trains, fits, keeps_teacher
        self.report = report
        self.done_before = Done()
        # Of a run resumed in the middle of an epoch, until it goes on.
        self._random_state: dict[str, Any] | None = None
        # Of a run resumed beside a finetuning callback, until it has frozen its parts again.
        self._frozen: dict[str, list[str]] | None = None
        self.restores_groups = False

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Applies every trick of the trainer, in order, to the network of ``pl_module``.

        Raises:
            QatTricksError: a second session, a trainer that tricks cannot work with, tricks in an
                order that cannot work, no network or several, or one that cannot be traced.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, Session) and other is not self for other in callbacks):
            raise QatTricksError(
                "two recipes are in one trainer: give it one, or run them one after the other"
            )
        self._add_tricks(callbacks)
        # CompileNetwork is a callback of ours too, and no trick.
        ours = [c for c in callbacks if isinstance(c, Callback)]
        tricks: list[Any] = [c for c in ours if hasattr(c, "apply_once")]
        self._check_trainer(trainer)
        self._random_state = self._frozen = None
        if trainer.state.fn == "fit":
            # A callback may be used for a second fit; a restored state comes after this.
            for trick in tricks:
                trick.reset()
            # A trainer may be used for a second fit too, and counts on.
            self.done_before = Done() if resumes(trainer) else done_by(trainer)
            if self.trains and self.fits:
                check_not_done(trainer, self.done_before)
            if self.report is not None:
                self.report.begin(resumed=resumes(trainer))
        # They may make the network, or what its training step needs.
        call_hooks_early(trainer, pl_module)
        # Lightning moves the module only after ``setup``, and calibration runs in it.
        pl_module.to(trainer.strategy.root_device)
        is_fresh = not has_workbench(pl_module)
        early = freeze_early(trainer, pl_module, self) if is_fresh else []
        work = self._workbench(trainer, pl_module, tricks)
        work.begin_tricks(tricks, prove=self.prove)
        changes = [trick.apply_once(work) for trick in tricks]
        work.end_proofs()
        skip_set_up(early)
        if is_fresh and finetuning_in(trainer):
            hold_batchnorms(pl_module)
        # Each rank has calibrated by itself, and sums on GPUs differ in their last bits.
        if any(changes):
            _synchronize(trainer, work)
        if self.rate is not None and trainer.state.fn == "fit":
            self.rate.measure(trainer, pl_module, work)
        if self.report is not None and trainer.state.fn == "fit":
            self.report.measure_prepared(trainer, pl_module, work.network)
        if any(changes) and self.trains and trainer.state.fn != "fit":
            rank_zero_warn(
                "this recipe trains, and nothing was trained yet: the network is quantized, and "
                "not yet pruned or fine-tuned; a fit goes on from here"
            )

    def _add_tricks(self, callbacks: list[Any]) -> None:
        """Puts the session's own tricks behind it in the trainer's callbacks.

        A module that makes a new recipe for each call (``configure_callbacks``) has the trainer
        replace the session before; the tricks of that one leave.
        """
        orphans = [c for c in callbacks if getattr(c, "added_by", self) not in callbacks]
        fresh = [trick for trick in self.tricks if trick not in callbacks]
        # Lightning is walking through this list by index, and has to find those behind next.
        if len(orphans) > len(fresh):
            raise QatTricksError(
                "this trainer has run another, larger recipe: make a new trainer for this one"
            )
        for trick in fresh:
            trick.added_by = self
        kept = [c for c in callbacks if c not in orphans]
        place = kept.index(self) + 1
        callbacks[:] = [*kept[:place], *fresh, *kept[place:]]

    def _check_trainer(self, trainer: "Trainer") -> None:
        """Raises QatTricksError for settings of a trainer that tricks cannot work with."""
        self._check_callbacks(trainer)
        strategy, precision = trainer.strategy, str(trainer.precision)
        strategies = package_of(trainer).strategies
        if isinstance(strategy, tuple(getattr(strategies, name) for name in SHARDED)):
            raise QatTricksError(
                f"{type(strategy).__name__} shards parameters, which masks and scales cannot "
                'follow: use strategy="ddp", or a single device'
            )
        # "bf16-true" and the like would store the scales themselves in 16 bits.
        if precision not in PRECISIONS:
            raise QatTricksError(
                f"precision={precision} is not allowed: scales and integer grids need float32; "
                f"give one of {', '.join(PRECISIONS)}"
            )

    def _check_callbacks(self, trainer: "Trainer") -> None:
        """Raises QatTricksError for other callbacks that tricks cannot work with."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        kinds = package_of(trainer).callbacks
        for callback in callbacks:
            name = type(callback).__name__
            if isinstance(callback, kinds.ModelPruning):
                raise QatTricksError(
                    f"{name} prunes by parameters of its own, which surgery cannot follow: leave "
                    "it out, and take the trick prune (qat_tricks.tricks.Prune, or int8_prune50)"
                )
        for callback in callbacks[: callbacks.index(self)]:
            if is_averaging(callback):
                name = type(callback).__name__
                raise QatTricksError(
                    f"{name} copies the network before the recipe has changed it: give {name} "
                    "after the recipe"
                )

    def _workbench(
        self, trainer: "Trainer", pl_module: "LightningModule", tricks: Sequence[SessionTrick]
    ) -> Workbench:
        """The workbench of ``pl_module``, for this run."""
        if has_workbench(pl_module):
            spec = spec_for_quantized(trainer)
            work = workbench_of(pl_module)
            work.restored = None if spec is None else frozenset(spec.get("applied", ()))
            # A workbench of an earlier run still has that run's loaders.
            _give_loaders(work, trainer, pl_module, work.network_name)
        else:
            work = self._open(trainer, pl_module, tricks)
        check_order(tricks, work.history)
        work.trains = self.fits and (self.trains or trainer.state.fn == "fit")
        work.unfreezes = bool(finetuning_in(trainer))
        no_training = work.network.meta.get(NO_TRAINING)
        if work.trains and no_training is not None:
            raise QatTricksError(no_training)
        return work

    def _open(
        self, trainer: "Trainer", pl_module: "LightningModule", tricks: Sequence[SessionTrick]
    ) -> Workbench:
        """Traces the network of ``pl_module``, or rebuilds it as its checkpoint says."""
        name = find_network(pl_module, self.network, self.untraced)
        network = network_of(pl_module, name)
        if hasattr(network, "_orig_mod"):
            raise QatTricksError(
                f"{name} is compiled, and surgery needs the network itself: leave it as it is and "
                "compile what is trained, trainer.fit(torch.compile(module))"
            )
        check_traceable(network, self.untraced)
        spec = spec_to_restore(trainer, pl_module)
        # A float checkpoint is where the recipe begins.
        if self.report is not None and spec is None and trainer.state.fn == "fit":
            self.report.measure_float(trainer, pl_module, network)
        # Before surgery, and after a float checkpoint was loaded.
        needs_teacher = self.keeps_teacher or any(trick.needs_teacher for trick in tricks)
        teacher = copy_of(network) if needs_teacher else None
        before = list(network.parameters())
        load = _loader(trainer, pl_module, name)
        # A recipe that trains nothing and takes no images may have none to compare on.
        has_images = self.fits or any(hasattr(trick, "num_images") for trick in tricks)
        with ExitStack() as stack:
            first_load = load
            if is_whole(pl_module, name):
                alone = stack.enter_context(forward_alone(pl_module))
                first_load = partial(alone.load, load)
            # A part that the user holds in evaluation mode is to stay in it.
            with kept_modes(network):
                if spec is not None:
                    traced: nn.Module = rebuild(network, spec)
                else:
                    traced = network
                work = Workbench(
                    traced, first_load, teacher=teacher, untraced=self.untraced, compares=has_images
                )
            _give_loaders(work, trainer, pl_module, name)
            work.parameters_before = before  # an optimizer made in ``__init__`` holds these
            work.restored = None if spec is None else frozenset(work.applied)
            attach_workbench(pl_module, work, name)
        if is_whole(pl_module, name):
            _warn_of_outside(work.network)
        return work

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Puts the parameters that surgery has made into the optimizers."""
        self.restores_groups = self._frozen is not None and remembers_groups(trainer)
        if self.rate is not None:
            self.rate.check(trainer, pl_module, workbench_of(pl_module))
        if self._frozen is not None:
            freeze_again(pl_module, self._frozen)
            self._frozen = None
        if self.restores_groups:  # all of them, with what surgery has made
            return
        work = workbench_of(pl_module)
        renew_parameters(trainer.optimizers, work.network, work.parameters_before)

    def on_load_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Restores the random states that the checkpoint holds, and notes what is frozen."""
        state = checkpoint.get(CHECKPOINT_KEY, {}).get("random_state")
        if self.rate is not None and trainer.state.fn == "fit":  # the optimizers are made next
            own: dict[str, Any] = checkpoint["callbacks"].get(self.state_key, {})  # type: ignore[attr-defined]
            self.rate.restore(pl_module, workbench_of(pl_module), own.get("rate"))
        if trainer.state.fn == "fit" and finetuning_in(trainer):
            self._frozen = checkpoint.get(CHECKPOINT_KEY, {}).get("frozen")
        if trainer.state.fn == "fit" and state is not None:
            restore_random_state(state)  # an epoch that begins draws its order from here
            self._random_state = state if is_mid_epoch(checkpoint) else None

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Restores the random states once more, in the middle of an epoch."""
        if self._random_state is not None:  # an epoch that goes on has drawn its order once more
            restore_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keeps the scales that are not learned as they are, whatever a callback has unfrozen."""
        if batch_idx == 0 and finetuning_in(trainer):
            network = workbench_of(pl_module).network
            follow_unfrozen(trainer, pl_module, learned_scales(network), lambda: None)

    def on_validation_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Keeps the grids of averaged networks exact."""
        keep_grids(trainer, pl_module)

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Notes the figures of the fit's validation."""
        if self.report is not None and trainer.state.fn == "fit":
            self.report.validated(trainer)

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Tells what the fit has done."""
        if self.report is not None:
            self.report.finish(trainer, workbench_of(pl_module))

    def on_save_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the grids of averaged networks exact."""
        keep_grids(trainer, pl_module)

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Ends the run for the module's own hooks."""
        end_run(pl_module)

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Ends the run for the module's own hooks."""
        end_run(pl_module)
        end_skips(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What the trainer had done in earlier fits, if anything, and the measured rate."""
        state: dict[str, Any] = {}
        if self.done_before != Done():
            state |= vars(self.done_before)
        if self.rate is not None and self.rate.found is not None:
            state["rate"] = self.rate.found
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes in what the trainer had done in earlier fits."""
        # The rate was restored before the optimizers were made.
        self.done_before = Done(**{k: v for k, v in state_dict.items() if k != "rate"})

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Keeps the grids of averaged networks exact."""
        keep_grids(trainer, pl_module)


def _loader(
    trainer: "Trainer", pl_module: "LightningModule", name: str, *, augmented: bool = False
) -> Callable[[int], Iterable[Inputs]]:
    """What calls the network ``name`` with so many training images, the same on every rank."""
    load = partial(network_inputs, trainer, pl_module, name, augmented=augmented)
    return partial(loaded_once, load)


def _give_loaders(
    work: Workbench, trainer: "Trainer", pl_module: "LightningModule", name: str
) -> None:
    work.loader = _loader(trainer, pl_module, name)
    work.training_loader = _loader(trainer, pl_module, name, augmented=True)


def _warn_of_outside(network: nn.Module) -> None:
    """Warns of layers of a module that its forward does not call, and that so stay in float."""
    parts = vars(network)["meta"].get(OUTSIDE, ())
    names = [name for name in parts if any(map(is_layer, network.get_submodule(name).modules()))]
    if names:
        rank_zero_warn(
            f"{type(network).__name__}.forward does not call {', '.join(names)}: what only the "
            "steps call stays in float, and does not get into an exported file"
        )


def _synchronize(trainer: "Trainer", work: Workbench) -> None:
    """Gives every rank the network of rank 0, values of parameters and buffers alike."""
    if trainer.world_size > 1:
        work.network.load_state_dict(trainer.strategy.broadcast(work.network.state_dict()))
