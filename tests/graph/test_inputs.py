"""A network's inputs: found in every form that a batch has, and refused where they are not."""

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import inputs_of
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
