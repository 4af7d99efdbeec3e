"""The bits that each weight and activation of a network may get: their errors and their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.inputs import Inputs, call_network
from qat_tricks.graph.layers import activation_quantizers, layers
from qat_tricks.graph.macs import Call, macs_of_calls
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.nodes import modules_before_logits
from qat_tricks.graph.other_bits import activation_on_grid
from qat_tricks.graph.patterns import matches
from qat_tricks.graph.sensitivity import ACTIVATIONS, WEIGHTS, errors_alone
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.weight_options import weight_on_grid, weight_options
from qat_tricks.numerics import make_estimator
from qat_tricks.numerics.choices import Pair, cost_of
from qat_tricks.numerics.range_estimators import RangeEstimator
from qat_tricks.numerics.scheme import MAX_BITS

FLOAT_BITS = 32  # of an input that is on no grid
LARGEST_ERROR = 1e6  # nats; an infinite one would leave a program without a solution
UNITS: Mapping[str, str] = {"size": "bits of the weights", "bops": "MACs times bits"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A weight or an activation, with the bits that it may get."""

    name: str  # of the layer, or of the activation quantizer in the graph
    kind: str  # "weights" or "activations"
    options: Sequence[int]  # bits; its own where they are not to be chosen
    is_free: bool  # whether they are
    size: int = 0  # values of the weight


def weight_places(
    traced: fx.GraphModule, bits: Sequence[int], include: Sequence[str], exclude: Sequence[str]
) -> list[Place]:
    """The quantized weights, each with its options.

    One that the logits do not depend on, as of a second head, keeps its bits: no error tells what
    fewer would do.

    Args:
        traced: the quantized network.
        bits: those that a weight may get.
        include, exclude: name patterns of the layers that change; the others have one option.

    Raises:
        QatTricksError: a pattern that matches nothing, or scales that were learned.
    """
    found = {
        name: layer for name, layer in layers(traced).items() if layer.weight_quantizer is not None
    }
    for pattern in [*include, *exclude]:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise QatTricksError(
                f'pattern "{pattern}" matches no quantized layer: {did_you_mean(pattern, found)}'
            )
    learned = [
        name for name in found if spec_of(traced).get("layers", {}).get(name, {}).get("learned")
    ]
    if learned:
        raise QatTricksError(
            f"the scale of {learned[0]} is learned already, and would be lost with its bits: put "
            "mixed_precision before learn_scales"
        )
    places, judged = [], modules_before_logits(traced)
    for name, layer in found.items():
        changes = name in judged and matches(name, include) and not matches(name, exclude)
        assert layer.weight_quantizer is not None
        own = [layer.weight_quantizer.scheme.bits]
        places.append(
            Place(
                name=name,
                kind=WEIGHTS,
                options=bits if changes else own,
                is_free=changes,
                size=layer.weight.numel(),
            )
        )
    return places


def activation_places(
    traced: fx.GraphModule, inputs: Inputs, bits: Sequence[int] | None
) -> list[Place]:
    """The activation quantizers, each with its options; None leaves each its own bits.

    One that no conv or linear reads, such as that of a residual stream, keeps its own too: there
    are no products for its bits to make cheaper. So does one that the logits do not depend on.
    """
    read = set() if bits is None else {call.grid for call in _quantized_calls(traced, inputs)}
    judged = modules_before_logits(traced)
    places = []
    for name, quantizer in activation_quantizers(traced).items():
        changes = quantizer in read and name in judged
        options = sorted(set(bits)) if bits and changes else [quantizer.scheme.bits]
        places.append(Place(name=name, kind=ACTIVATIONS, options=options, is_free=changes))
    return places


@torch.no_grad()
def option_errors(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    places: Sequence[Place],
    to_round: Sequence[Inputs],
) -> list[list[float]]:
    """The divergence that each option of each place causes alone; 0 where none is free.

    Args:
        traced: the quantized, calibrated network.
        batches: of its inputs, on which the errors are measured.
        places: with their options.
        to_round: the inputs on which weights are rounded. On these they err less than on others.
    """
    observers = observers_of(traced, batches, places)
    weights = weight_options(
        traced,
        to_round,
        {place.name: place.options for place in places if place.kind == WEIGHTS and place.is_free},
    )
    tried = [(place, bits) for place in places for bits in place.options if place.is_free]
    changes = [
        weight_on_grid(traced, place.name, weights[place.name, bits])
        if place.kind == WEIGHTS
        else activation_on_grid(traced, place.name, bits, observers[place.name])
        for place, bits in tried
    ]
    with float_mode(traced):
        _, measured = errors_alone(traced, batches, changes, "measure sensitivity")
    by_option = {
        (place.name, bits): error.kl for (place, bits), error in zip(tried, measured, strict=True)
    }
    return [
        [min(by_option.get((place.name, bits), 0.0), LARGEST_ERROR) for bits in place.options]
        for place in places
    ]


def observers_of(
    traced: fx.GraphModule, batches: Sequence[Inputs], places: Sequence[Place]
) -> dict[str, RangeEstimator]:
    """For each activation that is to change, what finds its range at any bits."""
    observed = {
        place.name: make_estimator("mse")
        for place in places
        if place.kind == ACTIVATIONS and place.is_free
    }
    if not observed:
        return {}
    quantizers = activation_quantizers(traced)
    try:
        for name, observer in observed.items():
            quantizers[name].observer = observer
        with evaluating(traced), float_mode(traced):
            for batch in batches:
                call_network(traced, batch)
    finally:
        for name in observed:
            quantizers[name].observer = None
    return observed


def option_costs(
    traced: fx.GraphModule, inputs: Inputs, places: Sequence[Place], budget: str
) -> tuple[list[list[float]], list[Pair], float]:
    """The costs of each option, those of pairs of places, and the cost with 8 bits everywhere."""
    if budget == "size":
        costs = [[float(place.size * bits) for bits in place.options] for place in places]
        return costs, [], float(MAX_BITS * sum(place.size for place in places))
    costs = [[0.0] * len(place.options) for place in places]
    index = {place.name: number for number, place in enumerate(places)}
    names = {quantizer: name for name, quantizer in activation_quantizers(traced).items()}
    pairs, whole = [], 0.0
    for call in _quantized_calls(traced, inputs):
        whole += call.macs * MAX_BITS * MAX_BITS
        weight = index[call.layer]
        of_weight = [call.macs * bits for bits in places[weight].options]
        if call.grid is None:  # an input in float has the bits that it has
            for option, products in enumerate(of_weight):
                costs[weight][option] += products * FLOAT_BITS
            continue
        activation = index[names[call.grid]]
        table = [[float(p * bits) for bits in places[activation].options] for p in of_weight]
        if len(table[0]) == 1:  # nothing to choose there: a cost of the weight alone
            for option, row in enumerate(table):
                costs[weight][option] += row[0]
        else:
            pairs.append(Pair(places=(weight, activation), costs=table))
    return costs, pairs, whole


def _quantized_calls(traced: fx.GraphModule, inputs: Inputs) -> list[Call]:
    """The calls of layers whose weight is quantized."""
    found = layers(traced)
    return [
        call
        for call in macs_of_calls(traced, inputs)
        if call.layer in found and found[call.layer].weight_quantizer is not None
    ]


def present_cost(traced: fx.GraphModule, inputs: Inputs, budget: str) -> float:
    """The cost with the bits that the weights and activations of ``traced`` have."""
    # No name pattern, no change: each place has its own bits as its only option.
    places = [*weight_places(traced, (), (), ()), *activation_places(traced, inputs, None)]
    costs, pairs, _ = option_costs(traced, inputs, places, budget)
    return cost_of([0] * len(places), costs, pairs)
