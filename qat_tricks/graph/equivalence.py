"""The equivalence gate: compares a network under work with the user's own, on real images.

Tracing, folding, equalization and the placing of quantizers claim to keep the float function. A
right step differs from the user's network only by the rounding of float32; steps that were wrong
differed by whole decimal places. The gate runs both on a few images after each step, in evaluation
mode and in training mode with the same random state. What a step changes by design is measured and
not judged.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, as_tensors, call_network, first_images
from qat_tricks.graph.modes import float_mode, modes_kept
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.graph.trace import trace
from qat_tricks.graph.traceable import TraceSettings
from qat_tricks.graph.traced_network import NO_TRAINING, TracedNetwork
from qat_tricks.graph.tracer import Tracer, follow
from qat_tricks.graph.two_modes import EVALUATION, OWNER, TRAINING, graph_in
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB, decibels

GATE_IMAGES = 4
# Right steps were measured at 100 dB and more in float32, wrong ones at 60 dB and less
# (docs/results/equivalence.md).
LEAST_DB = 80.0
BATCHNORMS = (nn.modules.batchnorm._BatchNorm,)


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
        self.reference = _run(self.network, self.inputs)
        self.kind = type(self.network).__name__
        _check_finite(self.network, self.reference.evaluation)
        # The user's network is about to be changed: its outputs are what is kept.
        del self.network

    def measure(self, traced: nn.Module, *, folded: bool = True) -> tuple[float, float | None]:
        """The SQNR of the float function of ``traced``, in evaluation and in training.

        Args:
            traced: the network under work.
            folded: whether BatchNorms may be gone, so that training is compared with those of the
                user's network frozen.
        """
        outputs = _run(traced, self.inputs, frozen_only=folded)
        evaluation = _sqnr(self.reference.evaluation, outputs.evaluation)
        there, here = self.reference.frozen, outputs.frozen
        if not folded:
            there, here = self.reference.training, outputs.training
        # A network that refuses to train says so itself, in the line that it was refused with.
        if there is None or NO_TRAINING in getattr(traced, "meta", {}):
            return evaluation, None
        return evaluation, -LARGEST_SQNR_DB if here is None else _sqnr(there, here)

    def keeps(self, figures: tuple[float, float | None]) -> bool:
        """Whether these figures are of the same function."""
        evaluation, training = figures
        return evaluation >= self.least_db and (training is None or training >= self.least_db)

    def note(
        self,
        name: str,
        traced: nn.Module,
        *,
        by_design: bool = False,
        undone: Sequence[str] = (),
        folded: bool = True,
    ) -> Step:
        """Measures a step and adds it; what one changes by design is the new reference.

        Args:
            name: of the step, a past participle such as ``folded``.
            traced: the network after it.
            by_design: whether the step changes the function.
            undone: parts that the step has left as they were.
            folded: see ``measure``.
        """
        evaluation, training = self.measure(traced, folded=folded)
        step = Step(
            name=name,
            evaluation_db=evaluation,
            training_db=training,
            by_design=by_design,
            undone=tuple(undone),
        )
        self.steps.append(step)
        if by_design:
            self.rebase(traced)
        return step

    def rebase(self, network: nn.Module) -> None:
        """Compares from here on with ``network`` as it is now."""
        self.reference = _run(network, self.inputs)

    def check(self, name: str, traced: nn.Module, *, way_out: str, folded: bool = True) -> Step:
        """Measures a step that has to keep the function.

        Raises:
            QatTricksError: it did not; the line ends with ``way_out``.
        """
        step = self.note(name, traced, folded=folded)
        if not self.keeps((step.evaluation_db, step.training_db)):
            raise QatTricksError(
                f"{self.kind} {name} is not the network that was given: {describe(step)} on "
                f"{GATE_IMAGES} calibration images (at least {self.least_db:g}); {way_out}"
            )
        return step

    def apply_kept(
        self,
        name: str,
        traced: fx.GraphModule,
        step: Callable[[fx.GraphModule, Sequence[str]], Sequence[str]],
    ) -> list[str]:
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
        undone: list[str] = []
        if parts and not self.keeps(self.measure(trial)):
            for part in parts:
                alone = copy.deepcopy(traced)
                step(alone, [other for other in parts if other != part])
                if not self.keeps(self.measure(alone)):
                    undone.append(part)
        del trial
        step(traced, undone)
        measured = self.note(name, traced, undone=undone)
        if not self.keeps((measured.evaluation_db, measured.training_db)):
            raise QatTricksError(
                f"{self.kind} {name} is not the network that was given: {describe(measured)} on "
                f"{GATE_IMAGES} calibration images (at least {self.least_db:g}), with "
                f"{', '.join(undone) or 'no part'} left out; please report this network"
            )
        return undone


def trace_kept(network: nn.Module, untraced: Sequence[str], gate: Gate) -> TracedNetwork:
    """Traces ``network`` and proves that the result computes what it computes.

    A change that tracing makes beside following the code, and that does not keep the function, is
    left out and noted.

    Args:
        network: the user's.
        untraced: name patterns of submodules to keep whole.
        gate: made of ``network``.

    Raises:
        QatTricksError: the graph computes something else; the line names the place.
    """
    traced = trace(network, untraced)
    undone: tuple[str, ...] = ()
    if not gate.keeps(gate.measure(traced, folded=False)):
        for part in ("splits_attention", "functions_to_modules"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said at the first trace
                again = trace(network, untraced, settings=TraceSettings(**{part: False}))
            if gate.keeps(gate.measure(again, folded=False)):
                traced, undone = again, (part.replace("_", " "),)
                break
    step = gate.note("traced", traced, undone=undone, folded=False)
    if not gate.keeps((step.evaluation_db, step.training_db)):
        training = step.evaluation_db >= gate.least_db
        place = _first_difference(network, traced, untraced, gate.inputs, training=training)
        raise QatTricksError(
            f"{gate.kind} traced is not the network that was given: {describe(step)} on "
            f"{GATE_IMAGES} calibration images (at least {gate.least_db:g}); {place}"
        )
    return traced


def _first_difference(
    network: nn.Module,
    traced: TracedNetwork,
    untraced: Sequence[str],
    inputs: Inputs,
    *,
    training: bool,
) -> str:
    """Where the traced network begins to differ: the part, its code, and the way out."""
    differing: list[fx.Node] = []
    mode = TRAINING if training else EVALUATION
    with kept_random_state():
        expected = _inputs_of_parts(network, traced, inputs, training=training)

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            calls = expected.get(str(n.target), []) if n.op == "call_module" else []
            if calls and not differing:
                args, _ = self.fetch_args_kwargs_from_env(n)
                if _sqnr(calls.pop(0), _tensors(args)) < LEAST_DB:
                    differing.append(n)
            return super().run_node(n)

    in_mode = fx.GraphModule(traced, graph_in(traced.graph, mode))
    with modes_kept(traced), _buffers_kept(traced), kept_random_state(), torch.no_grad():
        traced.train(training)
        Compare(in_mode).run(*as_tensors(inputs))
    node = differing[0] if differing else in_mode.graph.output_node()
    part = str(node.meta.get(OWNER, "")) if differing else ""
    tracer = Tracer(untraced)
    tracer.record_stack_traces = True
    stacks = {n.name: n.stack_trace for n in follow(network, tracer, training=training).graph.nodes}
    sources = [stacks[s.name] for s in node.all_input_nodes if stacks.get(s.name)]
    line = _users_line(sources[0] or "") if sources else ""
    before = f'before "{node.target}"' if differing else "before the output"
    where = f'in "{part}"' if part else f"in {type(network).__name__}.forward"
    return (
        f"they differ in {mode} mode {before}, {where}{line}: let it depend on nothing but its "
        f'inputs, parameters and mode, or keep that part in float with untraced=["{part or "PART"}"]'
    )


def _inputs_of_parts(
    network: nn.Module, traced: TracedNetwork, inputs: Inputs, *, training: bool
) -> dict[str, list[list[Tensor]]]:
    """What each part that ``traced`` calls is called with in the user's network, call by call."""
    seen: dict[str, list[list[Tensor]]] = {}

    def note(name: str, _: nn.Module, args: Any) -> None:
        seen.setdefault(name, []).append(_tensors(args))

    parts = dict(network.named_modules())
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    handles = [
        parts[name].register_forward_pre_hook(partial(note, name)) for name in called & parts.keys()
    ]
    try:
        with modes_kept(network), _buffers_kept(network), torch.no_grad():
            network.train(training)
            call_network(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _users_line(stack: str) -> str:
    """`` (file:line "code")`` of the last frame of the user's in a stack of torch.fx, or nothing."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+(?:\n +([^\n]+))?', stack)
    users = [frame for frame in frames if not frame[0].startswith(own)]
    return f' ({users[-1][0]}:{users[-1][1]} "{users[-1][2]}")' if users else ""


def describe(step: Step) -> str:
    """``139 dB, 138 dB in training``."""
    in_training = "" if step.training_db is None else f", {step.training_db:.0f} dB in training"
    return f"{step.evaluation_db:.0f} dB{in_training}"


def summary(steps: Sequence[dict[str, Any]]) -> str:
    """``your network → traced → folded: 141, 139 dB``, from the steps of a spec."""
    names = " → ".join(["your network", *(step["name"] for step in steps)])
    figures = ", ".join(
        f"{step['evaluation_db']:.0f}" + (" by design" if step["by_design"] else "")
        for step in steps
    )
    return f"{names}: {figures} dB"


def _run(network: nn.Module, inputs: Inputs, *, frozen_only: bool = False) -> _Outputs:
    """The float outputs of ``network`` in each mode; it stays as it was."""
    with float_mode(network), modes_kept(network), kept_random_state(), torch.no_grad():
        network.eval()
        evaluation = _tensors(call_network(network, inputs))

        def in_training(*, frozen: bool) -> list[Tensor] | None:
            seed_all(0)  # dropout drops the same values in both networks
            network.train()
            for module in network.modules():
                if frozen and isinstance(module, BATCHNORMS):
                    module.eval()
            try:
                with _buffers_kept(network):  # BatchNorms of the next run are those of this one
                    return _tensors(call_network(network, inputs))
            # Whatever the user's code raises, such as a BatchNorm of one value a channel.
            except Exception:
                return None

        training = None if frozen_only else in_training(frozen=False)
        return _Outputs(evaluation, training, in_training(frozen=True))


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[None]:
    """Puts the values of buffers back after the block."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.copy_(values)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _sqnr(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
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
    tensors = [*network.named_parameters(), *network.named_buffers()]
    culprits = [name for name, value in tensors if not bool(torch.isfinite(value).all())]
    cause = f'its "{culprits[0]}" holds some' if culprits else "its values overflow on the way"
    raise QatTricksError(
        f"{type(network).__name__} yields NaN or infinite values on calibration images: {cause}; "
        "give a network that is trained to the end"
    )
