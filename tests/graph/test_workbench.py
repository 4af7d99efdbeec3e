"""The workbench: images as tricks ask for them, a float reference, and logits in any output."""

import copy

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.logits import logits_of
from qat_tricks.graph.workbench import Workbench
from tests.helpers.nets import images, small_net


def test_batches_hold_as_many_images_as_were_asked_for():
    asked = []

    def loader(num_images):
        asked.append(num_images)
        for seed in range(3):
            yield images(16, seed=seed), torch.zeros(16)

    work = Workbench(small_net(), loader)
    batches = work.batches(20)
    assert asked == [2, 20]  # the gate takes a few
    assert [len(batch) for batch in batches] == [16, 4]
    assert torch.equal(batches[1], images(16, seed=1)[:4])
    assert sum(map(len, work.batches(1000))) == 48  # all that there are


def test_images_that_are_missing_or_no_numbers_are_refused():
    for loader, told in (
        (None, "give a loader"),
        (lambda num_images: [], "loader is empty"),
        (lambda num_images: [images() / 0], "NaN or infinite"),
    ):
        with pytest.raises(QatTricksError, match=told):
            Workbench(small_net(), loader).batches(4)


def test_the_reference_is_a_copy_of_the_network_as_it_was():
    work = Workbench(small_net())
    with pytest.raises(QatTricksError, match="no float reference"):
        _ = work.reference
    work.keep_reference()
    expected = work.network(images())
    with torch.no_grad():
        work.network.get_parameter("head.weight").zero_()
    assert torch.equal(work.reference(images()), expected)
    work.drop_reference()
    with pytest.raises(QatTricksError, match="no float reference"):
        _ = work.reference


def test_a_copy_takes_neither_loader_nor_reference_along():
    work = Workbench(small_net(), lambda num_images: [images()])
    work.keep_reference()
    work.applied.append("prune")
    other = copy.deepcopy(work)
    assert other.loader is None
    assert other.parameters_before == []
    with pytest.raises(QatTricksError, match="no float reference"):
        _ = other.reference
    assert other.applied == ["prune"]
    assert work.loader is not None  # the original keeps its own
    assert work.reference is not None


LOGITS, OTHER = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, OTHER),
        [LOGITS, "more"],
        {"aux": OTHER, "logits": LOGITS},
        {"aux": OTHER, "out": LOGITS},
        {"anything": LOGITS, "aux": OTHER},
    ],
    ids=["tensor", "tuple", "list", "logits", "out", "first"],
)
def test_logits_are_found_in_every_output_that_has_them(output):
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize("output", [None, (), {}, ("a", LOGITS), {"logits": None}])
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(QatTricksError, match=f"yields {type(output).__name__} has no logits"):
        logits_of(output)
