"""Networks that are run node by node."""

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.streams import Stream
from tests.helpers.nets import images, small_net


def test_a_stream_ends_with_the_output_of_each_batch_and_keeps_nothing_else():
    traced, batches = trace(small_net()), [images(3), images(5)]
    with torch.no_grad(), evaluating(traced):
        stream = Stream(traced, batches)
        for _ in traced.graph.nodes:
            outputs = stream.advance()
        for output, batch in zip(outputs, batches, strict=True):
            assert torch.equal(output, traced(batch))
    assert all(len(interpreter.env) <= 1 for interpreter in stream.interpreter)


def test_a_node_that_a_network_lacks_is_named():
    traced = trace(small_net())
    with torch.no_grad(), pytest.raises(QatTricksError, match='has no "elsewhere"'):
        Stream(traced, [images(2)]).run_until("elsewhere")


def test_a_node_reads_what_the_node_before_it_gave():
    traced, batches = trace(small_net()), [images(3), images(5)]
    with torch.no_grad(), evaluating(traced):
        stream = Stream(traced, batches)
        for node in traced.graph.nodes:
            if node.op == "call_module" and node.target == "block.conv1":
                inputs = stream.inputs_of(node)
                outputs = stream.advance()
                break
            stream.advance()
        layer = traced.get_submodule("block.conv1")
        assert [len(values) for values in inputs] == [3, 5]
        assert all(map(torch.equal, map(layer, inputs), outputs))
