"""Which values are integers or truth values."""

import pytest

from qat_tricks.graph import nodes as n
from qat_tricks.graph import note_integers, trace
from qat_tricks.graph.nodes import INTEGERS
from tests.helpers.several import Tokens, network
from tests.helpers.several import inputs as several_inputs
from tests.helpers.structures import STRUCTURES, built, inputs


def test_ids_and_masks_are_noted_and_what_is_computed_of_them_in_floats_is_not():
    traced = trace(network(Tokens)).train()
    statistics = [buffer.clone() for buffer in traced.buffers()]
    assert note_integers(traced, several_inputs(Tokens, 4)) is traced
    noted = {node.name for node in traced.graph.nodes if node.meta.get(INTEGERS)}
    assert noted == {"ids", "mask", "unsqueeze"}
    assert all(INTEGERS in node.meta for node in traced.graph.nodes if node.op == "call_module")
    # a look at the values changes nothing
    assert traced.training
    assert all((a == b).all() for a, b in zip(statistics, traced.buffers(), strict=True))


INTEGERS_IN = ["embedding_of_argmax", "masked", "unpooled", "unpooled_modules", "mask_of_mask",
               "mask_concatenated", "mask_averaged", "max_of_rows", "topk", "sorted"]  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS_IN)
def test_what_the_graph_shows_is_what_a_run_shows(name):
    build, shape = STRUCTURES[name]
    traced = trace(built(build))
    tensors = [node for node in traced.graph.nodes if node.op != "get_attr" and n.is_tensor(node)]
    seen = {node.name: n.yields_integers(node, traced) for node in tensors}
    note_integers(traced, inputs(shape))
    noted = {node.name: node.meta[INTEGERS] for node in tensors if INTEGERS in node.meta}
    assert any(noted.values()) or name in ("max_of_rows", "topk", "sorted")
    assert {name: seen[name] for name in noted} == noted
