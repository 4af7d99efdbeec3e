"""The simulated network as one for the exporter: which weights and calls it will hold."""

import pytest

from qat_tricks.deploy.emitters import EmitActivation, EmitLayer
from qat_tricks.deploy.qdq import WEIGHT, to_qdq
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, place_quantizers, trace
from tests.helpers import networks


def test_layers_and_quantizers_become_emitters_with_their_bits():
    network = networks.quantized(networks.Residual, overrides={"b": {"weight_bits": 4}})
    bits = {
        f"{name}.{WEIGHT}": layer.weight_quantizer.scheme.bits
        for name, layer in layers(network).items()
    }
    quantizers = activation_quantizers(network)
    read = {
        node.target: node.all_input_nodes[0].name
        for node in network.graph.nodes
        if node.target in quantizers
    }
    emitted = to_qdq(network)
    assert emitted.bits == bits
    assert bits[f"b.{WEIGHT}"] == 4
    assert {name: calls[0] for name, calls in emitted.calls.items()} == read
    assert layers(network) == activation_quantizers(network) == {}
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(EmitLayer) == len(bits)
    assert kinds.count(EmitActivation) == len(read)


def test_a_layer_on_two_grids_becomes_two():
    emitted = to_qdq(networks.quantized(networks.CalledTwice))
    shared = [name for name in emitted.bits if name.startswith("shared.")]
    assert len(shared) == 2
    assert len(emitted.bits) == 4  # with the stem and the last linear


def test_values_that_are_only_moved_get_their_grid_again_behind():
    network = networks.quantized(networks.Concatenated)
    pools = [node for node in network.graph.nodes if node.target == "pool"]
    calls = to_qdq(network).calls
    (behind,) = pools[0].users
    before = pools[0].all_input_nodes[0]
    assert behind.target == before.target  # the same quantizer on both sides
    assert None in calls[behind.target]  # a repetition has no name


def test_a_network_that_the_layout_or_calibration_does_not_allow_is_refused():
    with pytest.raises(QatTricksError, match="is unsigned affine with 8 bits"):
        to_qdq(networks.quantized(networks.Flat), "tensorrt")
    unready = place_quantizers(trace(networks.seeded(networks.Flat)))
    with pytest.raises(QatTricksError, match="has no range yet"):
        to_qdq(unready)
