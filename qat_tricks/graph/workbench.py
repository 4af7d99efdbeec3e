"""The workbench of tricks: a traced network, images, and float networks to compare with."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.equivalence import GATE_IMAGES, Gate
from qat_tricks.graph.inputs import (
    Inputs,
    are_finite,
    batch_size,
    first_images,
    input_names,
    inputs_of,
    map_tensors,
)
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import fold_restored_batchnorms
from qat_tricks.graph.trace import trace
from qat_tricks.graph.trace_kept import trace_kept
from qat_tricks.graph.traced_network import TracedNetwork


class Workbench:
    """A network under work.

    Attributes:
        network: the traced network; tricks change it in place.
        reference: the float network with the structure of the quantized one (folded, equalized),
            a copy that ``quantize`` makes.
        loader: called with a number of images, yields batches of training images: that number or
            more, unless there are fewer.
        teacher: the float network as it came, for distillation.
        network_name: the attribute of the LightningModule that holds the network, or empty.
        trains: whether training follows; without it a trick that acts gradually does all at once.
        unfreezes: whether that training unfreezes what is frozen now.
        parameters_before: the network's parameters as it came, which an optimizer may still hold.
        gate: compares the network after each step with the user's own; None without a loader.
        images: the most images that a trick has taken.
    """

    def __init__(
        self,
        network: nn.Module,
        loader: Callable[[int], Iterable[Any]] | None = None,
        *,
        teacher: nn.Module | None = None,
        untraced: Sequence[str] = (),
        compares: bool = True,
    ) -> None:
        # Tracing may turn computed weights into parameters: the optimizer holds those from before.
        self.parameters_before = list(network.parameters())
        self.loader = loader
        self.teacher = teacher
        self.network_name = ""
        self.trains = False
        self.unfreezes = False
        self.images = 0
        self._reference: fx.GraphModule | None = None
        self.gate: Gate | None = None
        self.network: Any = network
        if loader is None or not compares or isinstance(network, TracedNetwork):
            self.network = trace(network, untraced)
        else:
            self.gate = Gate(network, self.batches(GATE_IMAGES)[0])
            self.network = trace_kept(network, untraced, self.gate)
            self._record()

    def batches(self, num_images: int) -> list[Inputs]:
        """The network's inputs for the first ``num_images`` images of the loader.

        Returns:
            Batches, on the network's device; fewer images if the loader has fewer.

        Raises:
            QatTricksError: there is no loader, it is empty, its batches do not hold the inputs, or
                hold no finite numbers.
        """
        if self.loader is None:
            raise QatTricksError(
                "this recipe needs images to calibrate on: give a loader of training images"
            )
        # Loaders yield on the CPU; the network may be on a GPU.
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        names = input_names(self.network)
        batches: list[Inputs] = []
        missing = num_images
        for batch in self.loader(num_images):
            # Just the number asked for, so that results do not depend on the loader's batch size.
            inputs = first_images(inputs_of(batch, names), missing)
            # One NaN would become the range of every tensor behind it.
            if not are_finite(inputs):
                raise QatTricksError(
                    "the calibration loader yields NaN or infinite pixels: check its transforms"
                )
            batches.append(map_tensors(inputs, lambda values: values.to(device)))
            missing -= batch_size(inputs)
            if missing <= 0:
                break
        if not batches:
            raise QatTricksError(
                "the calibration loader is empty: give one that yields at least one batch of images"
            )
        self.images = max(self.images, sum(map(batch_size, batches)))
        return batches

    @property
    def reference(self) -> fx.GraphModule:
        """The float copy; raises QatTricksError if none was kept."""
        if self._reference is None:
            raise QatTricksError(
                "there is no float reference: place quantizers with the quantize trick first"
            )
        return self._reference

    def keep_reference(self) -> None:
        """Keeps a copy of the network as it is now: still float, already folded and equalized."""
        self._reference = copy.deepcopy(self.network)

    def drop_reference(self) -> None:
        """Frees the copy."""
        self._reference = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a LightningModule take along neither its trainer's loaders nor a
        # second network.
        return {
            **self.__dict__,
            "loader": None,
            "parameters_before": [],
            "gate": None,
            "_reference": None,
        }

    def begin_stage(self) -> None:
        """Begins a stage with the network as it is deployed; its steps are compared with it."""
        fold_restored_batchnorms(self.network)
        if self.gate is not None:
            self.gate.rebase(self.network)
        elif self.loader is not None:
            self.gate = Gate(self.network, self.batches(GATE_IMAGES)[0])

    def keep_function(
        self, name: str, step: Callable[[fx.GraphModule, Sequence[str]], Sequence[str]]
    ) -> None:
        """Applies a step of several parts, but for parts that change the network's function.

        Args:
            name: of the step, such as ``folded``.
            step: see ``Gate.apply_kept``.
        """
        if self.gate is None:
            step(self.network, ())
            return
        undone = self.gate.apply_kept(name, self.network, step)
        self._record()
        if undone:
            warnings.warn(
                f"{name} without {', '.join(undone)}, which would have changed the network",
                stacklevel=2,
            )

    def check_function(self, name: str) -> None:
        """Checks that the step just made has kept the network's function.

        Raises:
            QatTricksError: it has not.
        """
        if self.gate is not None:
            self.gate.enter(self.gate.measure(self.network, name))
            self._record()

    def note_change(self, name: str, *, in_training: bool = True) -> None:
        """Measures a step that changes the network's function by design.

        Args:
            name: of the step.
            in_training: whether to measure training mode too.
        """
        if self.gate is not None:
            self.gate.note_change(name, self.network, in_training=in_training)
            self._record()

    def _record(self) -> None:
        """Enters the gate's figures in the spec, behind those of earlier stages."""
        assert self.gate is not None
        steps = spec_of(self.network).setdefault("equivalence", [])
        steps += [step.as_dict() for step in self.gate.steps]
        self.gate.steps.clear()

    @property
    def applied(self) -> list[str]:
        """Names of the tricks done in the current stage."""
        return spec_of(self.network).setdefault("applied", [])

    @property
    def history(self) -> list[str]:
        """Names of the tricks done in all stages, in order."""
        return spec_of(self.network).setdefault("history", [])


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a network.

    Args:
        output: a tensor; a mapping with ``"logits"`` or ``"out"``, else its first value counts; or
            a tuple that begins with the logits, behind which those of auxiliary heads follow.

    Raises:
        QatTricksError: there is no tensor in that place.
    """
    logits = output
    if isinstance(output, Mapping) and output:
        key = next((key for key in ("logits", "out") if key in output), next(iter(output)))
        logits = output[key]
    elif isinstance(output, (list, tuple)) and output:
        logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    raise QatTricksError(
        f"a network that yields {type(output).__name__} has no logits: yield a tensor, a tuple "
        'that begins with one, or a mapping with "logits"'
    )
