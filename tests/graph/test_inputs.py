"""A network's inputs: found in every form that a batch has, and refused where they are not."""

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import (
    are_finite,
    as_tensors,
    batch_size,
    call_network,
    check_batches,
    first_images,
    input_names,
    inputs_of,
    on_cpu,
)
from tests.helpers.several import TwoImages, inputs, network


@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b, y: (a, b),
        lambda a, b, y: [a, b, y],
        lambda a, b, y: ((a, b), y),
        lambda a, b, y: [[a, b], y, y],
        lambda a, b, y: {"whole": b, "crop": a, "label": y},
        lambda a, b, y: ({"whole": b, "crop": a}, y),
    ],
)
def test_a_batch_begins_with_the_inputs(batch):
    a, b = inputs(TwoImages, 4)
    found = inputs_of(batch(a, b, torch.arange(4)), ["crop", "whole"])
    assert [found[0] is a, found[1] is b, len(found)] == [True, True, 2]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            lambda a, b: a,
            r"takes 2 inputs \(crop, whole\), and a batch holds 1: yield \(inputs, labels\)",
        ),
        (lambda a, b: (a,), "a batch holds 1"),
        (lambda a, b: ((a,), torch.arange(4)), "a batch holds 1"),
        (lambda a, b: ((a, b, b), torch.arange(4)), "a batch holds 3"),
        (lambda a, b: {"crop": a}, "a batch holds 1"),
        (lambda a, b: (a, "b"), "a batch holds 1"),
        (
            lambda a, b: (a, b[:3]),
            r"shapes \(4, 3, 16, 16\), \(3, 1, 8, 8\): give each of them one entry an image",
        ),
        (lambda a, b: (a, torch.tensor(1.0)), "one entry an image"),
        (lambda a, b: (a, b * float("nan")), "NaN"),
    ],
)
def test_a_batch_without_the_inputs_is_one_line(batch, message):
    with pytest.raises(QatTricksError, match=message) as refused:
        qat_tricks.quantize(network(TwoImages), [batch(*inputs(TwoImages, 4))])
    assert "\n" not in str(refused.value)


class Network(nn.Module):
    def forward(self, crop, whole, *more, factor=1.0, mask, **options):
        return crop


def test_the_inputs_are_the_arguments_without_a_default():
    assert input_names(Network()) == input_names(Network().forward) == ["crop", "whole", "mask"]


@pytest.mark.parametrize("several", [False, True])
def test_inputs_are_changed_alike_whether_one_or_several(several):
    images, ids = torch.randn(4, 3, dtype=torch.float64), torch.arange(4)
    given = (images, ids) if several else images
    few = first_images(given, 3)
    assert (batch_size(given), batch_size(few)) == (4, 3)
    assert isinstance(few, tuple) == several
    assert torch.equal(as_tensors(few)[0], images[:3])
    called = call_network(lambda *inputs: inputs, on_cpu(given))
    assert [values.dtype for values in called] == [torch.float32, torch.int64][: 1 + several]
    assert are_finite(given)
    images[2, 1] = float("inf")
    assert not are_finite(given)


def test_no_batches_at_all_are_refused_with_their_purpose():
    check_batches([torch.ones(1)], "to calibrate on")
    with pytest.raises(QatTricksError, match="there are no images to calibrate on"):
        check_batches([], "to calibrate on")
