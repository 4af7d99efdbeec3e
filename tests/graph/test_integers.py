"""Which values are integers or truth values."""

from qat_tricks.graph import note_integers, trace
from qat_tricks.graph.nodes import INTEGERS
from tests.helpers.several import Tokens, inputs, network


def test_ids_and_masks_are_noted_and_what_is_computed_of_them_in_floats_is_not():
    traced = trace(network(Tokens)).train()
    statistics = [buffer.clone() for buffer in traced.buffers()]
    assert note_integers(traced, inputs(Tokens, 4)) is traced
    noted = {node.name for node in traced.graph.nodes if node.meta.get(INTEGERS)}
    assert noted == {"ids", "mask", "unsqueeze"}
    assert all(INTEGERS in node.meta for node in traced.graph.nodes if node.op == "call_module")
    # a look at the values changes nothing
    assert traced.training
    assert all((a == b).all() for a, b in zip(statistics, traced.buffers(), strict=True))
