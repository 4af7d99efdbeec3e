"""The equivalence gate: compares a network under work with the user's own, on real images.

Tracing, folding, equalization and the placing of quantizers claim to keep the float function. A
right step differs from the user's network only by the rounding of float32; steps that were wrong
differed by whole decimal places. The gate runs both on a few images after each step, in evaluation
mode and in training mode with the same random state. What a step changes by design is measured and
not judged.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.graph.finite import check_finite
from qat_tricks.graph.inputs import Inputs, as_tensors, call_network, first_images, map_tensors
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.graph.modes import float_mode, kept_modes
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.graph.traced_network import NO_TRAINING
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB, decibels

GATE_IMAGES = 2
# Right steps were measured at 84 dB and more in float32 (docs/results/equivalence.md), wrong ones
# at 46 dB and less (the tests that switch a mend off).
LEAST_DB = 70.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step has left of the user's network."""

    name: str
    evaluation_db: float  # SQNR of the outputs against the user's network
    training_db: float | None  # None where the user's network does not run in training mode
    by_design: bool = False  # the step changes the function, and is not judged
    undone: tuple[str, ...] = ()  # parts that did not keep the function, and were left as they were

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a spec and a report."""
        return asdict(self) | {"undone": list(self.undone)}


@dataclass
class _Outputs:
    """Outputs of a network in each mode, None where it does not run."""

    evaluation: list[Tensor]
    # With BatchNorms in training mode as well, which a folded network cannot repeat.
    training: list[Tensor] | None
    frozen: list[Tensor] | None  # in training mode, with BatchNorms in evaluation mode


@dataclass(repr=False)
class Gate:
    """Compares a network after each step with the user's own as it was at first.

    Attributes:
        inputs: of the network, for a few images.
        steps: the figures so far.
        least_db: below it a step has not kept the function.
    """

    network: nn.Module
    inputs: Inputs
    least_db: float = LEAST_DB
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = first_images(self.inputs, GATE_IMAGES)
        self.kind = type(self.network).__name__
        try:
            self.reference = _run(self.network, self.inputs, thawed=True, frozen=True)
        except QatTricksError:
            raise
        # Whatever the user's network raises, as it was given: of shapes, most often.
        except Exception as error:
            shapes = ", ".join(str(list(each.shape)) for each in as_tensors(self.inputs))
            raise QatTricksError(
                f"{self.kind} does not run on images {shapes} of the loader ({one_line(error)}): "
                "give batches [N, C, H, W] of what it was trained on"
            ) from error
        _check_finite(self.network, self.reference.evaluation)
        # The user's network is about to be changed: its outputs are what is kept.
        del self.network

    def rebase(self, network: nn.Module) -> None:
        """Compares from here on with ``network`` as it is now."""
        self.reference = _run(network, self.inputs)

    def measure(
        self, traced: nn.Module, name: str, *, thawed: bool = False, in_training: bool = True
    ) -> Step:
        """Measures the float function of ``traced`` against the reference.

        Args:
            traced: the network under work.
            name: of the step just made, a past participle such as ``folded``.
            thawed: whether training mode means BatchNorms too. Where they may be folded, they are
                frozen in both networks.
            in_training: whether to compare in training mode too.
        """
        frozen = in_training and not thawed
        outputs = _run(traced, self.inputs, thawed=thawed, frozen=frozen)
        step = self._compare(outputs, traced, name, thawed=thawed)
        return step if in_training else replace(step, training_db=None)

    def _compare(
        self, outputs: _Outputs, traced: nn.Module, name: str, *, thawed: bool = False
    ) -> Step:
        evaluation = sqnr(self.reference.evaluation, outputs.evaluation)
        there, here = self.reference.frozen, outputs.frozen
        if thawed:
            there, here = self.reference.training, outputs.training
        in_training: float | None = None
        # A network that refuses to train says so itself, in the line that it was refused with.
        if there is not None and NO_TRAINING not in getattr(traced, "meta", {}):
            in_training = -LARGEST_SQNR_DB if here is None else sqnr(there, here)
        return Step(name=name, evaluation_db=evaluation, training_db=in_training)

    def keeps(self, step: Step) -> bool:
        """Whether a step has left the same function."""
        figures = [step.evaluation_db, *([] if step.training_db is None else [step.training_db])]
        return min(figures) >= self.least_db

    def enter(self, step: Step) -> None:
        """Adds a step to ``steps``.

        Raises:
            QatTricksError: it should have kept the function, and did not.
        """
        self.steps.append(step)
        if not step.by_design and not self.keeps(step):
            raise QatTricksError(f"{self.fault(step)}; please report this network")

    def fault(self, step: Step) -> str:
        """The beginning of the line that refuses a step."""
        left_out = f", with {', '.join(step.undone)} left out" if step.undone else ""
        return (
            f"{self.kind} {step.name} is not the network that was given: {describe(step)} on "
            f"{GATE_IMAGES} calibration images (at least {self.least_db:g}){left_out}"
        )

    def note_change(self, name: str, traced: nn.Module, *, in_training: bool) -> None:
        """Measures a step that changes the function by design; the result is the new reference.

        Args:
            name: of the step.
            traced: the network after it.
            in_training: whether to measure training mode too, for steps that come after it.
        """
        outputs = _run(traced, self.inputs, frozen=in_training)
        step = replace(self._compare(outputs, traced, name), by_design=True)
        self.enter(step if in_training else replace(step, training_db=None))
        self.reference = outputs

    def apply_kept(
        self,
        name: str,
        traced: fx.GraphModule,
        step: Callable[[fx.GraphModule, Sequence[str]], Sequence[str]],
    ) -> Sequence[str]:
        """Applies a step of several parts, without those that do not keep the function.

        Args:
            name: of the step.
            traced: the network, changed in place.
            step: changes a network in place, without the parts of these names; returns the names of
                the parts that it has changed.

        Returns:
            The parts that were left as they were.

        Raises:
            QatTricksError: the step does not keep the function without any of its parts.
        """
        # Tried on a copy, for a change of the graph cannot be taken back.
        trial = copy.deepcopy(traced)
        parts = step(trial, ())
        if not parts:
            return ()
        measured, undone = self.measure(trial, name), []
        if not self.keeps(measured):
            for part in parts:
                alone = copy.deepcopy(traced)
                step(alone, [other for other in parts if other != part])
                if not self.keeps(self.measure(alone, name)):
                    undone.append(part)
            trial = copy.deepcopy(traced)
            step(trial, undone)
            measured = replace(self.measure(trial, name), undone=tuple(undone))
        self.enter(measured)
        step(traced, undone)
        return undone


def describe(step: Step) -> str:
    """``139 dB, 138 dB in training``."""
    in_training = "" if step.training_db is None else f", {step.training_db:.0f} dB in training"
    return f"{step.evaluation_db:.0f} dB{in_training}"


def summary(steps: Sequence[dict[str, Any]], word: Callable[[str], str] = str) -> str:
    """``your network → traced → folded: 141, 139 dB``, from the steps of a spec.

    Args:
        steps: the spec's.
        word: gives the words of another language.
    """
    names = " → ".join(map(word, ["your network", *(step["name"] for step in steps)]))
    figures = ", ".join(
        f"{step['evaluation_db']:.0f}" + (f" {word('by design')}" if step["by_design"] else "")
        for step in steps
    )
    return f"{names}: {figures} dB"


def _run(
    network: nn.Module, inputs: Inputs, *, thawed: bool = False, frozen: bool = True
) -> _Outputs:
    """The float outputs of ``network`` in each mode; it stays as it was.

    Args:
        network: the user's, or a traced one.
        inputs: of it.
        thawed: whether to run it also in training mode.
        frozen: whether to run it also in training mode with BatchNorms in evaluation mode.
    """
    states = (float_mode(network), kept_modes(network), kept_random_state(), exact_products())
    with ExitStack() as stack, torch.no_grad():
        for state in states:
            stack.enter_context(state)
        network.eval()
        seed_all(0)  # a network may draw random numbers in evaluation too
        evaluation = _call(network, inputs)
        training = _in_training(network, inputs, frozen=False) if thawed else None
        with_frozen = _in_training(network, inputs, frozen=True) if frozen else None
        return _Outputs(evaluation, training, with_frozen)


def _in_training(network: nn.Module, inputs: Inputs, *, frozen: bool) -> list[Tensor] | None:
    """The outputs in training mode, with BatchNorms ``frozen`` or not; None if it does not run."""
    seed_all(0)  # dropout drops the same values in both networks
    network.train()
    for module in network.modules():
        if frozen and isinstance(module, BATCHNORMS):
            module.eval()
    try:
        with buffers_kept(network):  # BatchNorms of the next run are those of this one
            return _call(network, inputs)
    # Whatever the user's code raises, such as a BatchNorm of one value a channel.
    except Exception:
        return None


def _call(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    # Copies, for a network may change its input in place.
    return tensors_in(call_network(network, map_tensors(inputs, Tensor.clone)))


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes convs and products of matrices in float32 in the block, on a GPU too.

    By default PyTorch rounds a conv's inputs to TF32 there, with 10 bits of mantissa. Two networks
    of one function then differ by some 65 dB.
    """
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    places: tuple[Any, ...] = (conv, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Puts the values of buffers back after the block."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.copy_(values)


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in the output of a network, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf.detach().clone())
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def sqnr(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The least SQNR of several outputs, in dB; other shapes, or other integers, are no match."""
    if len(reference) != len(outputs):
        return -LARGEST_SQNR_DB
    return min(map(_sqnr_of_one, reference, outputs), default=LARGEST_SQNR_DB)


def _sqnr_of_one(expected: Tensor, given: Tensor) -> float:
    if expected.shape != given.shape or torch.equal(expected, given):
        return LARGEST_SQNR_DB if expected.shape == given.shape else -LARGEST_SQNR_DB
    if not expected.is_floating_point():
        return -LARGEST_SQNR_DB
    difference = given.double() - expected.double()
    return decibels(float(expected.double().square().sum()), float(difference.square().sum()))


def _check_finite(network: nn.Module, outputs: Sequence[Tensor]) -> None:
    if all(bool(torch.isfinite(output).all()) for output in outputs):
        return
    check_finite(network)  # names the number that it comes from
    raise QatTricksError(
        f"{type(network).__name__} yields NaN or infinite values on calibration images, although "
        "its numbers are finite: scale its inputs or weights so that nothing overflows"
    )
