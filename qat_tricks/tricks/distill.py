"""Let the float network teach the quantized, pruned one.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2:
the loss becomes ``(1 - weight) * loss + weight * T^2 * KL(softmax(teacher / T) || softmax(student /
T))``.

Where this differs: a network that yields one logit an image says with its sigmoid which of two
classes it is. The softmax of one logit is always 1; so the divergence is that of the two classes,
``KL(sigmoid(teacher / T) || sigmoid(student / T))``. A channel that the student holds (nearly)
still is measured by a step of its grid instead of its deviation, which would be divided by.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.features import (
    Listener,
    TracedTeacher,
    chosen_tensors,
    last_of_each_size,
    matching,
    quantized_tensors,
)
from qat_tricks.graph.logits import class_logits, logits_of
from qat_tricks.graph.two_modes import yields_by_mode
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.module import is_whole, workbench_of
from qat_tricks.trainer.schedule import check_fraction
from qat_tricks.trainer.trick import Trick

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


AUTO = "auto"  # of ``features``


def distill(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The distillation loss, a scalar; gradients reach ``student`` only.

    Args:
        student: logits ``[N, classes]`` of the network that is trained; or, of two classes, one
            logit an image, ``[N]`` or ``[N, 1]``.
        teacher: logits of the float network, of the same shape.
        temperature: softens both distributions; above 0.
    """
    # In float32 also under mixed precision: the differences of logits are small.
    log_p = F.log_softmax(_of_classes(student.float()) / temperature, dim=-1)
    q = F.log_softmax(_of_classes(teacher.detach().float()) / temperature, dim=-1)
    # The factor keeps gradients at the same size for all temperatures (section 2).
    return F.kl_div(log_p, q, reduction="batchmean", log_target=True) * temperature**2


def _of_classes(logits: Tensor) -> Tensor:
    """Logits ``[N, .., classes]``; one logit an image becomes those of two classes.

    Of images' positions, ``[N, classes, H, W]``, each has logits of its own.
    """
    if logits.dim() >= 4:
        by_class = class_logits(logits).movedim(1, -1)
        return by_class.reshape(-1, by_class.shape[-1])
    if logits.dim() > 1 and logits.shape[-1] > 1:
        return logits
    # The softmax of 0 and z is 1 - sigmoid(z) and sigmoid(z).
    one = logits.flatten()
    return torch.stack([torch.zeros_like(one), one], 1)


def distill_features(student: Tensor, teacher: Tensor, step: Tensor) -> Tensor:
    """``1 - r``, the mean over channels, a scalar; gradients reach ``student`` only.

    Args:
        student: maps ``[N, C, ...]``, or tokens ``[N, T, C]``, of the network that is trained.
        teacher: those of the float network, of the same shape.
        step: the scale of the student's grid, of shape ``[]``.
    """
    channels = 2 if student.dim() == 3 else 1
    ours, theirs = (
        values.float().movedim(channels, 0).flatten(1) for values in (student, teacher.detach())
    )
    ours, theirs = (values - values.mean(1, keepdim=True) for values in (ours, theirs))
    # Rounding alone deviates by 1 / sqrt(12) of a step.
    least = step.detach() * (ours.shape[1] / 12) ** 0.5
    ours = ours / torch.maximum(ours.norm(dim=1, keepdim=True), least)
    norm = theirs.norm(dim=1, keepdim=True)
    theirs = theirs / norm.clamp_min(torch.finfo(torch.float32).tiny)
    # A channel in which the teacher has nothing to tell counts for nothing.
    lives = (norm > 0).flatten().float()
    return ((1 - (ours * theirs).sum(1)) * lives).sum() / lives.sum().clamp_min(1)


def _yield_as_in_training(teacher: nn.Module) -> None:
    """Lets ``teacher`` yield what it yields in training, such as logits and no probabilities.

    Its code sees training mode. Its innermost modules, such as BatchNorms and dropout, stay in
    evaluation.
    """
    for module in teacher.modules():
        module.training = any(True for _ in module.children())


class _Features:
    """Compares the feature maps of the two networks.

    Args:
        work: the workbench of the fit.
        teacher: on the device of the fit.
        patterns: of names; None: the last map of each size, which the first step tells.
    """

    def __init__(
        self, work: Workbench, teacher: TracedTeacher, patterns: Sequence[str] | None
    ) -> None:
        self.student, self.patterns, self.teacher = work.network, patterns, teacher
        self.tensors = quantized_tensors(work.network, self.teacher)
        self.names: list[str] = []
        if patterns is not None:
            self.tensors = chosen_tensors(self.tensors, patterns)
            every = [name for group in self.tensors.values() for name in group]
            self._choose(matching(every, patterns))

    def _choose(self, names: list[str]) -> None:
        self.names = names
        self.tensors = chosen_tensors(self.tensors, names)
        self.teacher.tap(names)

    def _alike(self, heard: dict[str, Tensor], args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Those of the maps that have as many channels in the teacher."""
        self.teacher.tap(list(heard))
        _, expected = self.teacher(*args, **kwargs)
        return {n: tensor for n, tensor in heard.items() if tensor.shape == expected[n].shape}

    def listener(self) -> Listener:
        """What listens to the student during a step."""
        return Listener(self.student, self.tensors)

    def loss(self, heard: dict[str, Tensor], args: Any, kwargs: Any) -> tuple[Tensor, Any]:
        """The loss for a call of the student, and the teacher's output."""
        if not self.names:
            alike = self._alike(heard, args, kwargs)
            self._choose(last_of_each_size(alike, self.teacher.order))
        missing = [name for name in self.names if name not in heard]
        if missing or not self.names:
            raise QatTricksError(
                f"distill found no feature maps ({', '.join(missing) or 'all are vectors'}): give "
                "features name patterns of tensors that training passes, or leave features out; "
                "of a compiled network they cannot be seen"
            )
        output, expected = self.teacher(*args, **kwargs)
        narrower = [name for name in self.names if heard[name].shape != expected[name].shape]
        if narrower:
            raise QatTricksError(
                f"distill cannot compare {', '.join(narrower)}: channels were removed there; give "
                f"features={AUTO}, which leaves such maps out, or null"
            )
        steps = {
            name: self.student.get_submodule(quantizer).current_scale()
            for quantizer, names in self.tensors.items()
            for name in names
        }
        losses = [distill_features(heard[name], expected[name], steps[name]) for name in self.names]
        return torch.stack(losses).mean(), output


class _Step:
    """A ``training_step`` that adds the distillation loss to the module's own."""

    def __init__(self, trick: "Distill", pl_module: "LightningModule") -> None:
        self.trick, self.pl_module = trick, pl_module
        work = workbench_of(pl_module)
        assert work.teacher is not None
        self.teacher: nn.Module | TracedTeacher = work.teacher
        self.features: _Features | None = None
        self.has_skipped = self.has_taught = False
        # What the network yields in training may be other than in evaluation, where alone a folded
        # teacher is the network.
        by_mode = yields_by_mode(work.network.graph)
        # A module that is the network itself is traced only where its maps are asked for.
        by_itself = by_mode or is_whole(pl_module, work.network_name)
        if trick.features is not None or not by_itself:
            traced = TracedTeacher(work.teacher, work.network)
            self.teacher = work.teacher if by_mode else traced
            if trick.features is not None:
                patterns = None if trick.features == AUTO else trick.features
                self.features = _Features(work, traced, patterns)
        # The module's own step, whose signature Lightning reads through this name, as of any
        # decorated function.
        self.__wrapped__ = pl_module.training_step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        work = workbench_of(self.pl_module)
        trick, features, teacher = self.trick, self.features, self.teacher
        # A module may call its network several times in a step, as for two views of an image.
        losses: list[Tensor] = []
        of_features: list[Tensor] = []
        listener = nullcontext() if features is None else features.listener()

        def listen(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            expected: Any = None
            if features is not None and isinstance(listener, Listener):
                of_maps, expected = features.loss(listener.take(), args, kwargs)
                of_features.append(of_maps)
            if isinstance(teacher, nn.Module):
                with torch.no_grad():
                    expected = teacher(*args, **kwargs)
            elif features is None:
                expected = teacher(*args, **kwargs)[0]
            losses.append(
                distill(logits_of(output), logits_of(expected), temperature=trick.temperature)
            )

        # For this step only: validation and export run without the teacher.
        handle = work.network.register_forward_hook(listen, with_kwargs=True)
        try:
            with listener:
                result = self.__wrapped__(*args, **kwargs)
        finally:
            handle.remove()
        if result is None:  # the module skips this batch, as Lightning allows
            self.has_skipped = True
            return None
        if not losses:
            raise self.needs_both()
        self.has_taught = True
        loss: Any = result["loss"] if isinstance(result, dict) else result
        loss = (1 - trick.weight) * loss + trick.weight * torch.stack(losses).mean()
        if of_features:
            loss = loss + trick.feature_weight * torch.stack(of_features).mean()
        return {**result, "loss": loss} if isinstance(result, dict) else loss

    def needs_both(self) -> QatTricksError:
        """The error of a step without a loss, or without the network's output."""
        return QatTricksError(
            f"distill needs {type(self.pl_module).__name__}.training_step to run the network and "
            "to return its loss: let it do both, or leave distill out"
        )


class Distill(Trick):
    """Callback of ``distill``: adds it to the loss.

    The teacher is the network from before the first trick.

    Args:
        weight: share of the loss of the logits, 0 to 1.
        temperature: as of ``distill``.
        features: which feature maps are compared too: ``auto``, the last of each size; or name
            patterns (``fnmatch``) of tensors, such as ``layer*.relu2``; None: none.
        feature_weight: of their loss.

    Raises:
        QatTricksError: a setting that is not allowed; later, a pattern that matches nothing.
    """

    needs_teacher = True

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 1.0,
        features: str | Sequence[str] | None = None,
        feature_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = check_fraction("weight", weight)
        if not 0 < temperature < float("inf"):
            raise QatTricksError(f"temperature={temperature} is not allowed: give a number above 0")
        self.temperature = temperature
        if (isinstance(features, str) and features != AUTO) or features == []:
            raise QatTricksError(
                f"features={features!r} is not allowed: give {AUTO}, a list of name patterns, or "
                "null for none"
            )
        if not 0 <= feature_weight < float("inf"):
            raise QatTricksError(
                f"feature_weight={feature_weight} is not allowed: give a number of 0 or more"
            )
        self.features = features if features is None or features == AUTO else tuple(features)
        self.feature_weight = feature_weight
        self._teacher_state: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Puts the teacher on the device, and replaces the module's ``training_step``."""
        work = workbench_of(pl_module)
        if not pl_module.automatic_optimization:
            raise QatTricksError(
                "distill adds to the loss that training_step returns, and "
                f"{type(pl_module).__name__} optimizes by hand: use automatic optimization, or "
                "leave distill out with the override "
                '"~stages.STAGE.tricks.distill"'
            )
        if work.teacher is None:
            raise QatTricksError(
                "distill has no teacher: the network was already quantized when it was first seen"
            )
        # A resumed run goes on with the teacher of the run before.
        if self._teacher_state is not None:
            work.teacher.load_state_dict(self._teacher_state)
        work.teacher.to(pl_module.device).requires_grad_(False)
        work.teacher.eval()
        if yields_by_mode(work.network.graph):
            _yield_as_in_training(work.teacher)
        self._teacher_state = work.teacher.state_dict()
        pl_module.training_step = _Step(self, pl_module)  # type: ignore[method-assign]

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Raises QatTricksError if no step of the fit has returned a loss."""
        step = pl_module.training_step
        if isinstance(step, _Step) and step.has_skipped and not step.has_taught:
            raise step.needs_both()

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Gives the module its own ``training_step`` back."""
        pl_module.__dict__.pop("training_step", None)

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Gives the module its own ``training_step`` back."""
        self.on_fit_end(trainer, pl_module)

    def reset(self) -> None:
        """Forgets the teacher of an earlier fit."""
        self._teacher_state = None

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, which a resumed run cannot make again."""
        return {"teacher": self._teacher_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes in the teacher's weights."""
        self._teacher_state = state_dict["teacher"]
