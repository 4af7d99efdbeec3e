"""Give each layer its own bits: the least error of the output under a budget of size or of BOPs.

Yao et al. 2021, "HAWQ-V3: Dyadic Neural Network Quantization" (arXiv 2011.10680), section 3.3: with
``E_l(b)`` the error that layer ``l`` causes at ``b`` bits and ``C_l(b)`` its cost, choose bits that
minimize ``sum_l E_l(b_l)`` subject to ``sum_l C_l(b_l) <= budget``, by an integer linear program.
BOPs are MACs times the bits of the weight times those of the activation.

Where this differs: ``E_l`` is not the trace of a Hessian times the squared error of the weights. It
is measured: the divergence of the class probabilities from the float network's, with nothing but
this weight, or activation, on its grid. The weight is rounded as the tricks that follow would round
it, on other images than those on which it is measured. A layer's bits and those of its input are
chosen together, each product of both being a variable of the program.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.bit_options import (
    UNITS,
    Place,
    activation_places,
    observers_of,
    option_costs,
    option_errors,
    present_cost,
    weight_places,
)
from qat_tricks.graph.inputs import (
    Inputs,
    batch_size,
    call_network,
    check_batches,
    first_of_all,
    without_first,
)
from qat_tricks.graph.layers import activation_quantizers, is_calibrated, layers
from qat_tricks.graph.logits import logits_of
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.other_bits import (
    quantizer_with,
    set_activation_bits,
)
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.processes import from_rank_zero
from qat_tricks.graph.quantize_settings import Limits
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.graph.sensitivity import ACTIVATIONS, WEIGHTS
from qat_tricks.graph.settle import settle_grids
from qat_tricks.graph.spec import QUANTIZERS, spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics.choices import choose, cost_of
from qat_tricks.numerics.scheme import MAX_BITS, MIN_BITS, is_bits
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate

WEIGHT_BITS = (2, 3, 4, 6, 8)
# One of so many images measures errors; the others round the weights.
UNSEEN = 4


def mixed_precision(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    *,
    budget: str = "size",
    share: float | None = 0.5,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    activation_bits: Sequence[int] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Gives the quantizers of ``traced`` the bits of least error under a budget.

    Args:
        traced: a quantized, calibrated network; its quantizers and its spec are changed.
        batches: the network's inputs, a batch each.
        budget: ``size``: bits of all weights; ``bops``: MACs times both their bits.
        share: of what the network costs with 8 bits everywhere, above 0 and up to 1. For
            ``size``, 0.5 is 4 bits on average. None: what it costs with the bits that it has.
        weight_bits: those that a weight may get.
        activation_bits: those that an activation may get which a conv or linear reads; None leaves
            them as they are.
        include, exclude: name patterns of the layers whose weights are to change; others keep their
            bits, and count.

    Returns:
        What was chosen, as the spec has it under ``mixed_precision``.

    Raises:
        QatTricksError: a setting that is not allowed, ranges that are not calibrated, no batches,
            or a budget that even the fewest bits do not meet.
    """
    chosen = choose_bits(
        traced,
        batches,
        budget=budget,
        share=share,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        include=include,
        exclude=exclude,
    )
    set_bits(traced, batches, chosen)
    return chosen


@torch.no_grad()
def choose_bits(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    *,
    budget: str,
    share: float | None,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int] | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, Any]:
    """Measures and chooses as ``mixed_precision`` does; ``traced`` stays as it is."""
    check_settings(budget, share, weight_bits, activation_bits)
    check_batches(batches, "to measure sensitivity on")
    if not is_calibrated(traced):
        raise QatTricksError(
            "there are no calibrated quantizers to choose bits for: quantize and calibrate first"
        )
    places = [
        *weight_places(traced, sorted(set(weight_bits)), include, exclude),
        *activation_places(traced, batches[0], activation_bits),
    ]
    # Of very few images, all do both.
    measured = first_of_all(batches, max(1, sum(map(batch_size, batches)) // UNSEEN))
    images = sum(map(batch_size, measured))
    to_round = without_first(batches, images) or measured
    errors = option_errors(traced, measured, places, to_round)
    costs, pairs, whole = option_costs(traced, batches[0], places, budget)
    if share is None:
        share = present_cost(traced, batches[0], budget) / whole
    chosen = choose(errors, costs, share * whole, pairs)
    if chosen is None:
        least = math.ceil(cost_of([0] * len(places), costs, pairs) / whole * 1000) / 1000
        raise QatTricksError(
            f"share={share:g} of the {UNITS[budget]} cannot be met: with the fewest bits "
            f"everywhere it is {least:g}; give share={least:g} or more, fewer bits, or leave fewer "
            "layers out"
        )
    parts = [
        {"name": p.name.removeprefix(f"{QUANTIZERS}."), "kind": p.kind, "bits": p.options[i]}
        | {"kl": of_place[i]}
        for p, of_place, i in zip(places, errors, chosen, strict=True)
        if p.is_free
    ]
    return {
        "budget": budget,
        "unit": UNITS[budget],
        "share": float(share),
        "reached": cost_of(chosen, costs, pairs) / whole,
        "images": images,
        "kl": sum(part["kl"] for part in parts),
        "parts": parts,
    }


def check_settings(
    budget: str,
    share: float | None,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int] | None,
) -> None:
    """Raises QatTricksError for settings that are not allowed, all of them at once."""
    problems = []
    if budget == "latency":
        problems.append(
            "budget=latency is not possible: ONNX Runtime's CPU kernels compute weights of 2 to 8 "
            "bits alike, in int8, so that fewer bits are never faster; give budget=size or bops"
        )
    elif budget not in UNITS:
        problems.append(f'unknown budget "{budget}": {did_you_mean(str(budget), UNITS)}')
    if share is not None and not 0 < share <= 1:
        problems.append(
            f"share={share} is not allowed: give a number above 0, up to 1, or null for the cost "
            "with the bits that the network has"
        )
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if bits is None and name == "activation_bits":
            continue
        is_list = isinstance(bits, Sequence) and not isinstance(bits, str)
        if not is_list or not bits or not all(map(is_bits, bits)):
            problems.append(
                f"{name}={bits!r} is not allowed: give a list of whole numbers from {MIN_BITS} to "
                f"{MAX_BITS}, such as [2,4,8]"
            )
    if budget == "size" and activation_bits is not None:
        problems.append(
            f"activation_bits={activation_bits!r} would not change the size, which is that of the "
            "weights: give budget=bops, or activation_bits=null"
        )
    if problems:
        raise QatTricksError("; ".join(problems))


@torch.no_grad()
def set_bits(traced: fx.GraphModule, batches: Sequence[Inputs], chosen: dict[str, Any]) -> None:
    """Gives ``traced`` the bits that ``choose_bits`` has chosen, and enters them in its spec.

    Args:
        traced: the network that they were chosen for.
        batches: as for ``choose_bits``; ranges of activations with other bits are found on them.
        chosen: what ``choose_bits`` returned.
    """
    spec, found = spec_of(traced), layers(traced)
    bits_of = {part["name"]: part["bits"] for part in chosen["parts"] if part["kind"] == WEIGHTS}
    for name, bits in bits_of.items():
        layer, entry = found[name], spec["layers"][name]
        layer.weight_quantizer = quantizer_with(layer, bits)
        entry["weight"] = layer.weight_quantizer.scheme.as_dict()
        # A rebuilt network so has a parameter for each value of a checkpoint, and no more.
        entry["scale"] = layer.weight_quantizer.scale is not None
    quantizers = activation_quantizers(traced)
    places = [
        Place(
            name=f"{QUANTIZERS}.{part['name']}",
            kind=ACTIVATIONS,
            options=[part["bits"]],
            is_free=True,
        )
        for part in chosen["parts"]
        if part["kind"] == ACTIVATIONS
    ]
    for name, observer in observers_of(traced, batches, places).items():
        bits = next(place.options[0] for place in places if place.name == name)
        set_activation_bits(quantizers[name], bits, observer)
        entry = spec["activations"][name.removeprefix(f"{QUANTIZERS}.")]
        entry["scheme"] = quantizers[name].scheme.as_dict()
    settle_grids(traced)
    chosen["together"] = _error_together(traced, first_of_all(batches, chosen["images"]))
    spec["mixed_precision"] = chosen


def _error_together(traced: fx.GraphModule, batches: Sequence[Inputs]) -> float:
    """The divergence that the whole network in integers causes."""

    def logits() -> Tensor:
        return torch.cat([logits_of(call_network(traced, batch)) for batch in batches])

    with evaluating(traced), kept_random_state():
        quantized = logits()
        with float_mode(traced):
            return output_error(logits(), quantized).kl


class MixedPrecision(Trick):
    """Callback of ``mixed_precision``, whose settings are its arguments."""

    requires = (Calibrate,)
    # Ranges are tuned at the bits that the recipe gives; those that stay keep theirs.
    after = ("tune_ranges",)
    decisive = frozenset(
        {"budget", "share", "weight_bits", "activation_bits", "include", "exclude"}
    )

    def __init__(
        self,
        budget: str = "size",
        share: float | None = 0.5,
        weight_bits: Sequence[int] = WEIGHT_BITS,
        activation_bits: Sequence[int] | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        num_images: int = 256,
    ) -> None:
        super().__init__()
        check_settings(budget, share, weight_bits, activation_bits)
        self.budget, self.share = budget, share
        self.weight_bits = tuple(weight_bits)
        self.activation_bits = None if activation_bits is None else tuple(activation_bits)
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.num_images = check_num_images(num_images)

    def limit(self, limits: Limits) -> None:
        """Leaves out bits that a runtime's kernels do not take.

        Raises:
            QatTricksError: it takes none of those that an activation may get.
        """
        most, fewest = limits.max_weight_bits, limits.activation_bits
        self.weight_bits = tuple(sorted({min(bits, most) for bits in self.weight_bits}))
        if self.activation_bits is None:
            return
        allowed = tuple(bits for bits in self.activation_bits if bits >= fewest)
        if not allowed:
            raise QatTricksError(
                f"mixed_precision.activation_bits={list(self.activation_bits)} are not for this "
                f"target: {limits.because}; give {fewest} or more, or null"
            )
        self.activation_bits = allowed

    def apply(self, work: Workbench) -> None:
        """Chooses the bits on the first ``num_images`` training images, the same on every rank.

        Raises:
            QatTricksError: biases were corrected for other bits; or see ``mixed_precision``.
        """
        if "correct_bias" in work.applied or "correct_weights" in work.applied:
            raise QatTricksError(
                "weights or biases were corrected for the errors of other bits: put "
                "mixed_precision before correct_weights and correct_bias"
            )
        batches = work.batches(self.num_images)
        chosen = choose_bits(
            work.network,
            batches,
            budget=self.budget,
            share=self.share,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            include=self.include,
            exclude=self.exclude,
        )
        # Sums on GPUs differ in their last bits, and bits must not: they are the structure.
        set_bits(work.network, batches, from_rank_zero(chosen))
