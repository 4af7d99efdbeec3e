"""The workbench of tricks: a traced network, images, and float networks to compare with."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.equivalence import GATE_IMAGES, Gate
from qat_tricks.graph.inputs import (
    Inputs,
    are_constant,
    are_finite,
    batch_size,
    first_images,
    first_of_all,
    input_names,
    inputs_of,
    map_tensors,
    without_first,
)
from qat_tricks.graph.layers import activation_quantizers
from qat_tricks.graph.proof import ALL_COUNTED, PROOF_IMAGES, Prover, held_out_of, proof_lines
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import fold_restored_batchnorms
from qat_tricks.graph.trace import trace
from qat_tricks.graph.trace_kept import trace_kept
from qat_tricks.graph.traced_network import TracedNetwork
from qat_tricks.progress import measured

TRIAL_IMAGES = 64  # on which a copy is calibrated to judge a trick before the quantizers


class Judged(Protocol):
    """A trick as it is judged; ``trainer.trick.Trick`` is one."""

    judged: bool
    quantizes: bool
    needs_float: bool  # whether it refuses a network that has quantizers

    @property
    def name(self) -> str:
        """The trick's name."""

    def apply(self, work: "Workbench") -> None:
        """Changes the network of ``work``."""

    def check_done(self, work: "Workbench", recipe: Collection[str]) -> None:
        """Tells where it has been applied to ``work`` with other settings than in a recipe."""


class Workbench:
    """A network under work.

    Attributes:
        network: the traced network; tricks change it in place.
        reference: the float network with the structure of the quantized one (folded, equalized),
            a copy that ``quantize`` makes.
        loader: called with a number of images, yields batches of training images: that number or
            more, unless there are fewer.
        training_loader: the same, of images as training has them, augmented; None: ``loader``.
        teacher: the float network as it came, for distillation.
        network_name: the attribute of the LightningModule that holds the network, or empty.
        trains: whether training follows; without it a trick that acts gradually does all at once.
        unfreezes: whether that training unfreezes what is frozen now.
        parameters_before: the network's parameters as it came, which an optimizer may still hold.
        gate: compares the network after each step with the user's own; None without a loader.
        images: the most images that a trick has taken.
        proves: whether tricks that ask for it are judged by the network's output (see ``proof``).
        quantizing: the tricks that will quantize the network, for trials on a copy.
        restored: names of the tricks that the current stage had done in the checkpoint of which
            the values are yet to be loaded; None: the network has its values.
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
        self.training_loader: Callable[[int], Iterable[Any]] | None = None
        self.teacher = teacher
        self.network_name = ""
        self.trains = False
        self.unfreezes = False
        self.images = 0
        self.proves = False
        self.quantizing: Sequence[Callable[[Workbench], None]] = ()
        self.prover: Prover | None = None
        self.restored: frozenset[str] | None = None
        self.most_images: int | None = None  # that a trick can have; None: as many as it asks for
        self._held_out = 0  # images kept from the tricks
        # All images of the loader that a stage needs, while its tricks are judged: a loader that
        # shuffles would give a trick those held out, the next time it is gone through.
        self._remembered: list[Inputs] | None = None
        self._reference: fx.GraphModule | None = None
        self.gate: Gate | None = None
        self.network: Any = network
        if loader is None or not compares or isinstance(network, TracedNetwork):
            self.network = trace(network, untraced)
        else:
            self.gate = Gate(network, self._load(loader, GATE_IMAGES)[0])
            self.network = trace_kept(network, untraced, self.gate)
            self._record()

    def batches(self, num_images: int) -> list[Inputs]:
        """The network's inputs for ``num_images`` images of the loader, behind those held out.

        Returns:
            Batches, on the network's device; fewer images if the loader has fewer.

        Raises:
            QatTricksError: there is no loader, it is empty, its batches do not hold the inputs, or
                hold no finite numbers.
        """
        if self.most_images is not None:
            num_images = min(num_images, self.most_images)
        if self._remembered is None:
            batches = self._load(self.loader, num_images)
        else:
            batches = first_of_all(without_first(self._remembered, self._held_out), num_images)
        if are_constant(batches):
            warnings.warn(
                "all values that the calibration loader yields are the same: what is measured on "
                "them says nothing of other images; give it images as the network will see them",
                stacklevel=2,
            )
        return self._counted(batches)

    def training_batches(self, num_images: int) -> list[Inputs]:
        """As ``batches``, of the images that training will have, or has had.

        Statistics by which training normalizes have to be theirs: augmentation changes them.
        """
        return self._counted(self._load(self.training_loader or self.loader, num_images))

    def _counted(self, batches: list[Inputs]) -> list[Inputs]:
        self.images = max(self.images, sum(map(batch_size, batches)))
        return batches

    def _load(self, loader: Callable[[int], Iterable[Any]] | None, num_images: int) -> list[Inputs]:
        """The inputs for the loader's first images, see ``batches``."""
        if loader is None:
            raise QatTricksError(
                "this recipe needs images to calibrate on: give a loader of training images"
            )
        # Loaders yield on the CPU; the network may be on a GPU.
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        names = input_names(self.network)
        kind = "training" if loader is self.training_loader else "calibration"
        batches: list[Inputs] = []
        missing = num_images
        for batch in loader(num_images):
            # Just the number asked for, so that results do not depend on the loader's batch size.
            inputs = first_images(inputs_of(batch, names), missing)
            # One NaN would become the range of every tensor behind it.
            if not are_finite(inputs):
                raise QatTricksError(
                    f"the {kind} loader yields NaN or infinite pixels: check its transforms"
                )
            batches.append(map_tensors(inputs, lambda values: values.to(device)))
            missing -= batch_size(inputs)
            if missing <= 0:
                break
        if not batches:
            raise QatTricksError(
                f"the {kind} loader is empty: give one that yields at least one batch of images"
            )
        return batches

    @property
    def reference(self) -> fx.GraphModule:
        """The float copy; raises QatTricksError if none was kept."""
        if self._reference is None:
            raise QatTricksError(
                "there is no float reference, which quantize keeps for its stage: put this trick "
                "behind quantize, on a float network"
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
            "training_loader": None,
            "parameters_before": [],
            "gate": None,
            "prover": None,
            "quantizing": (),
            "proves": False,
            "_remembered": None,
            "_held_out": 0,
            "_reference": None,
            "restored": None,
        }

    def begin_stage(self) -> None:
        """Begins a stage with the network as it is deployed; its steps are compared with it."""
        fold_restored_batchnorms(self.network)
        self._compare_from_here()

    def _compare_from_here(self) -> None:
        """Lets the steps that follow be compared with the network as it is."""
        if self.gate is not None:
            self.gate.rebase(self.network)
        # A network that was rebuilt from a checkpoint has no values yet to compare with.
        elif self.loader is not None and self.restored is None:
            self.gate = Gate(self.network, self._load(self.loader, GATE_IMAGES)[0])

    def begin_tricks(self, tricks: Sequence[Judged], *, prove: bool) -> None:
        """Begins a stage, or what is left of it.

        Args:
            tricks: of the stage; those that it has done already do not count.
            prove: whether to judge those that ask for it.

        Raises:
            QatTricksError: one of them needs a float network, and this one has quantizers; or was
                done with settings that make another network.
        """
        names = [trick.name for trick in tricks]
        for trick in tricks:
            if trick.name in self.applied:
                trick.check_done(self, names)
        tricks = [trick for trick in tricks if trick.name not in self.applied]
        # Before the tricks that come first: they would change a network that is done.
        check_needs(self.network, tricks)
        if self.history and tricks:
            # Tricks that join a stage find what the others have made of the network.
            if self.applied:
                self._compare_from_here()
            else:
                self.begin_stage()
        self.begin_proofs(tricks, prove=prove)

    def begin_proofs(self, tricks: Sequence[Judged], *, prove: bool) -> None:
        """Judges, from here on, those of ``tricks`` that ask for it, if ``prove`` says so."""
        self.end_proofs()
        if not prove or self.loader is None or not any(trick.judged for trick in tricks):
            return
        asked = max(getattr(trick, "num_images", 0) for trick in tricks)
        remembered = self._load(self.loader, max(asked + PROOF_IMAGES, ALL_COUNTED))
        self._held_out = held_out_of(sum(map(batch_size, remembered)))
        if self._held_out == 0:
            return
        self.proves, self._remembered = True, remembered
        self.quantizing = [trick.apply for trick in tricks if trick.quantizes]

    def end_proofs(self) -> None:
        """Holds no images out any more: what follows, such as training, is not judged."""
        self.proves, self.quantizing, self.prover = False, (), None
        self._held_out, self._remembered = 0, None

    def keep_function(
        self,
        name: str,
        step: Callable[[fx.GraphModule, Sequence[str]], Sequence[str]],
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

    def check_function(self, name: str, *, in_training: bool = True) -> None:
        """Checks that the step just made has kept the network's function.

        Args:
            name: of the step.
            in_training: whether to compare in training mode too. If not, later steps are compared
                there with what there is now.

        Raises:
            QatTricksError: it has not.
        """
        if self.gate is not None:
            self.gate.enter(self.gate.measure(self.network, name, in_training=in_training))
            self._record()
            if not in_training:
                self.gate.rebase(self.network)

    def note_change(self, name: str, *, in_training: bool = True) -> None:
        """Measures a step that changes the network's function by design.

        Args:
            name: of the step.
            in_training: whether to measure training mode too.
        """
        if self.gate is not None:
            self.gate.note_change(name, self.network, in_training=in_training)
            self._record()

    def prove(self, name: str, apply: Callable[[], None]) -> None:
        """Applies a trick, and rolls it back if it harms the network's output.

        Args:
            name: of the trick.
            apply: changes ``network``.
        """
        if self.prover is None:
            assert self._remembered is not None
            self.prover = Prover(first_of_all(self._remembered, self._held_out))
            self.prover.begin(self.network)
        reference = None if self.gate is None else self.gate.reference
        proof = self.prover.prove(
            name, self.network, apply, self._quantized if self.quantizing else None
        )
        measured(proof.line)
        spec_of(self.network).setdefault("proofs", []).append(proof.as_dict())
        if not proof.is_rolled_back:
            return
        if self.gate is not None and reference is not None:
            # Later steps are compared with the function that is left.
            self.gate.reference = reference
            if proof.undone:
                self.gate.rebase(self.network)
        warnings.warn(proof_lines([proof.as_dict()])[0], stacklevel=2)

    def _quantized(self, network: fx.GraphModule) -> fx.GraphModule:
        """Quantizes ``network``, a copy, on a few images as the recipe will do it."""
        trial = copy.copy(self)
        trial.network, trial.loader = network, self.loader
        trial._remembered, trial._held_out = self._remembered, self._held_out
        trial.most_images = TRIAL_IMAGES
        for apply in self.quantizing:
            apply(trial)
        return trial.network

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
    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings with which tricks were done, by the trick's name."""
        return spec_of(self.network).setdefault("settings", {})

    @property
    def history(self) -> list[str]:
        """Names of the tricks done in all stages, in order."""
        return spec_of(self.network).setdefault("history", [])


def check_needs(network: nn.Module, tricks: Iterable[Judged]) -> None:
    """Raises QatTricksError if one of ``tricks`` needs a float network and this is quantized."""
    needs_float = next((trick.name for trick in tricks if trick.needs_float), None)
    if needs_float and activation_quantizers(network):
        raise QatTricksError(
            f"{needs_float} needs a float network, and this {type(network).__name__} is "
            "quantized already: give the float network that it came from"
        )
