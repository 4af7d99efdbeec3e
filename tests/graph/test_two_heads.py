"""What the logits do not depend on: no error of theirs tells what becomes of it."""

import pytest
import torch

import qat_tricks
from qat_tricks.graph import activation_quantizers, layers, trace
from qat_tricks.graph.nodes import modules_before_logits
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.sparsity_shares import sparsity_shares
from qat_tricks.tricks import prune_channels
from tests.helpers.networks import TwoHeads, images, seeded

OF_BOX = {"side.0", "box"}
NOT_LEAVES = {"side.1"}  # a ReLU


class Named(TwoHeads):
    def forward(self, x):
        logits, box = super().forward(x)
        return {"box": box, "logits": logits}


class ByMode(TwoHeads):
    def forward(self, x):
        logits, box = super().forward(x)
        return (logits, box) if self.training else {"out": logits, "box": box}


@pytest.mark.parametrize("kind", [TwoHeads, Named, ByMode])
def test_modules_before_the_logits_are_those_that_they_depend_on(kind):
    traced = trace(seeded(kind))
    judged = modules_before_logits(traced)
    assert {"stem", "trunk", "classes"} <= judged
    assert judged.isdisjoint(OF_BOX | NOT_LEAVES)


@pytest.mark.parametrize(
    ("uniform", "mixed"), [("w4a8_ptq", "mixed_w4a8_ptq"), ("w4a4_ptq", "mixed_w4a4_ptq")]
)
def test_a_second_head_keeps_its_bits(uniform, mixed):
    def bits(network):
        weights = {name: layers(network)[name].weight_quantizer.scheme.bits for name in OF_BOX}
        before = modules_before_logits(network)
        return weights | {
            name: quantizer.scheme.bits
            for name, quantizer in activation_quantizers(network).items()
            if name not in before
        }

    net, batches = seeded(TwoHeads), [images(48)]
    networks = [qat_tricks.quantize(net, batches, recipe) for recipe in (uniform, mixed)]
    expected, found = map(bits, networks)
    assert len(expected) > len(OF_BOX)
    assert found == expected
    with torch.no_grad():
        boxes = [network(images(16))[1] for network in (net, *networks)]
    errors = [output_error(boxes[0], box).sqnr_db for box in boxes[1:]]
    assert errors[1] > errors[0] - 3


def test_a_range_that_no_logit_depends_on_stays():
    net = seeded(TwoHeads)
    share = "stages.ptq.tricks.mixed_precision.share=0.8"
    tuned, plain = (
        qat_tricks.quantize(net, [images(48)], "mixed_ptq", [share, *overrides])
        for overrides in ([], ["~stages.ptq.tricks.tune_ranges"])
    )
    before = modules_before_logits(tuned)
    ranges = [
        {name: quantizer.range for name, quantizer in activation_quantizers(network).items()}
        for network in (tuned, plain)
    ]
    behind = [name for name in ranges[0] if name not in before]
    assert behind
    assert all(ranges[0][name] == ranges[1][name] for name in behind)


def test_a_second_head_is_pruned_as_the_whole_network():
    traced = trace(seeded(TwoHeads))
    qat_tricks.tricks.prune(traced, 0.0)  # makes layers of them
    pruned = layers(traced)
    scores = {name: layer.weight.detach().abs() for name, layer in pruned.items()}
    shares = sparsity_shares(
        traced, pruned, scores, [images(16)], sparsity=0.5, granularity="weight"
    )
    assert {name: shares[name] for name in OF_BOX} == dict.fromkeys(OF_BOX, 1.0)
    rest = {name: layer.weight.numel() for name, layer in pruned.items() if name not in OF_BOX}
    mean = sum(shares[name] * size for name, size in rest.items()) / sum(rest.values())
    assert mean == pytest.approx(1)


def test_channels_of_a_second_head_stay():
    traced = trace(seeded(TwoHeads))
    prune_channels(traced, [images(16)], share=0.7, multiple=2)
    assert traced.get_submodule("side.0").weight.shape[0] == 16
    assert traced.get_submodule("trunk").weight.shape[0] < 16
