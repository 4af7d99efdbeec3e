"""A network's inputs: found in every form that a batch has, and refused where they are not."""

import itertools

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import (
    Replayed,
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


IMAGES, PIXELS = torch.randn(4, 3, 8, 8), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
LABELS, WEIGHTS = torch.arange(4), torch.rand(4)
CODES = torch.randn(4, 6)  # larger than labels, smaller than images


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        PIXELS,
        PIXELS.long(),
        [PIXELS],
        (IMAGES, LABELS),
        (PIXELS, LABELS),
        (PIXELS, CODES, LABELS),
        [PIXELS, {"label": LABELS}],
        ({"image": IMAGES, "weight": WEIGHTS}, LABELS),
        {"weight": WEIGHTS, "image": IMAGES, "label": LABELS},
        {"weight": WEIGHTS, "image": PIXELS, "label": LABELS},
        {"features": CODES, "photo": IMAGES, "label": LABELS},
        {"photo": PIXELS, "label": LABELS},
        {"mask": CODES.expand(5, 4, 4, 6), "crop": IMAGES},  # the argument's name before all others
        {"mask": IMAGES.clone(), "pixel_values": IMAGES},
        {"crop": WEIGHTS, "img": IMAGES},  # a vector is no image, whatever its name
        {"image": "a/path.png", "x": IMAGES, "y": LABELS},
    ],
)
def test_the_images_of_one_input_are_found(batch):
    found = inputs_of(batch, ["crop"])
    assert any(found is images for images in (IMAGES, PIXELS)) or torch.equal(found, PIXELS.long())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (LABELS, r"torch.int64 of shape \(4,\), which may be labels: yield \(images, labels\)"),
        ((LABELS, IMAGES), "may be labels"),
        ((PIXELS, PIXELS.clone()), "may be labels"),
        ({"left": IMAGES, "right": IMAGES.clone()}, 'left, right are the images: name them "crop"'),
        ({"left": PIXELS, "right": PIXELS.clone()}, 'left, right are the images: name them "crop"'),
        ({"label": LABELS}, "dict holds no images"),
        ((), "tuple holds no images"),
        ("images", "str holds no images"),
        (([IMAGES], LABELS), "tuple holds no images"),
    ],
)
def test_what_may_be_labels_or_either_of_two_is_refused(batch, message):
    with pytest.raises(QatTricksError, match=message) as refused:
        inputs_of(batch, ["crop"])
    assert "\n" not in str(refused.value)


def test_a_network_of_floats_given_integers_is_one_line():
    conv = nn.Conv2d(3, 4, 1)
    assert call_network(lambda x: x.float(), PIXELS).dtype == torch.float32
    with pytest.raises(QatTricksError, match=r"images of torch.uint8 .*float\(\) / 255") as refused:
        call_network(conv, PIXELS)
    assert "\n" not in str(refused.value)


def test_an_iterator_is_asked_for_no_more_than_is_needed_and_remembered():
    asked = []

    def endless():
        for number in itertools.count():
            asked.append(number)
            yield number

    batches = Replayed(endless())
    assert list(itertools.islice(batches, 3)) == [0, 1, 2]
    assert list(itertools.islice(batches, 2)) == [0, 1]
    assert asked == [0, 1, 2]
    first, second = iter(batches), iter(batches)  # two passes side by side
    pairs = list(itertools.islice(zip(first, second, strict=True), 5))
    assert pairs == [(number, number) for number in range(5)]
    assert asked[:5] == list(range(5))


def test_an_iterable_is_asked_anew():
    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield self.passes

    batches = Replayed(Shuffled())
    assert [list(batches), list(batches)] == [[1], [2]]
    assert list(Replayed([])) == list(Replayed(iter([]))) == []


class UsedUp:
    """A dataset that goes through a generator."""

    def __init__(self):
        self.rest = iter([1, 2])

    def __iter__(self):
        return (number for number in self.rest)


def test_an_iterable_that_is_used_up_is_refused():
    batches = Replayed(UsedUp())
    assert list(batches) == [1, 2]
    with pytest.raises(QatTricksError, match=r"only once.*list\(loader\)"):
        list(batches)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: iter([1]), r"the loader is a function: give what it returns, <lambda>\(\)"),
        (IMAGES, r"tensor of shape \(4, 3, 8, 8\).*\[images\]"),
        (None, "NoneType, which yields no batches"),
        (torch.utils.data.TensorDataset(IMAGES), r"TensorDataset, .* give DataLoader\(dataset"),
    ],
)
def test_what_is_no_loader_is_refused(loader, message):
    with pytest.raises(QatTricksError, match=message) as refused:
        Replayed(loader)
    assert "\n" not in str(refused.value)
