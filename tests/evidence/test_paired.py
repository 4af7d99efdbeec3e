import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.metrics import Metrics
from qat_tricks.evidence.paired import compare, paired_change, verdict


def rights(both, lost, gained, neither):
    """The answers of two classifiers, by how many images each has right."""
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return torch.tensor(before), torch.tensor(after)


def test_a_tenth_of_a_point_on_2000_images_is_no_difference():
    change = paired_change(*rights(1800, 12, 10, 178))
    assert change["points"] == pytest.approx(-0.1)
    assert change["low"] < 0 < change["high"]
    assert change["p"] == pytest.approx(0.8318, abs=1e-4)  # of 22 coins, 12 or more on one side
    assert verdict(change) == "no difference shown"


@pytest.mark.parametrize(("lost", "gained", "told"), [(40, 10, "worse"), (10, 40, "better")])
def test_what_is_beyond_chance_is_told(lost, gained, told):
    change = paired_change(*rights(1800, lost, gained, 150))
    assert verdict(change) == told
    assert (change["low"] > 0) == (told == "better")
    assert (change["high"] < 0) == (told == "worse")


def test_no_image_that_differs_is_not_certainty():
    change = paired_change(*rights(50, 0, 0, 0))
    assert (change["points"], change["p"]) == (0, 1)
    assert change["low"] < -1 < 1 < change["high"]
    wider = paired_change(*rights(5, 0, 0, 0))
    assert wider["low"] < change["low"]


@pytest.mark.parametrize("images", [60, 1000, 50_000])
def test_the_interval_and_the_test_tell_the_same(images):
    for lost in range(0, 30, 2):
        for gained in range(0, 30, 3):
            change = paired_change(*rights(images - lost - gained, lost, gained, 0))
            assert (change["low"] <= 0 <= change["high"]) == (change["p"] >= 0.05)


def test_the_interval_holds_its_confidence():
    """Of 2,000 draws with a known difference, 95 of 100 intervals have it inside."""
    random = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(2000):
        draw = torch.rand(200, generator=random)
        before, after = draw < 0.90, (draw < 0.86) | (draw > 0.985)
        change = paired_change(before, after)
        inside += change["low"] <= 100 * (0.875 - 0.90) <= change["high"]
    assert 0.93 < inside / 2000 < 0.975


def metrics(predictions, labels, confidences=None):
    predictions, labels = torch.tensor(predictions), torch.tensor(labels)
    figures = dict.fromkeys(("accuracy", "top5", "f1", "ece", "nll", "seconds"), 0.0)
    sure = torch.full((len(labels),), 0.9) if confidences is None else torch.tensor(confidences)
    return Metrics(**figures, predictions=predictions, labels=labels, confidences=sure)


LABELS = [0] * 6 + [1] * 4
FLOAT = [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
INT8 = [0, 0, 2, 1, 1, 1, 1, 1, 1, 1]


def test_classes_confusions_and_images_that_changed():
    found = compare(metrics(FLOAT, LABELS), metrics(INT8, LABELS), ["cat", "dog", "owl"])
    assert found["images"] == 10
    assert found["agreement"] == pytest.approx(0.7)
    assert found["accuracy"]["fp32"]["share"] == pytest.approx(0.7)
    assert found["accuracy"]["int8"]["low"] == pytest.approx(0.3127, abs=1e-4)  # Wilson, 6 of 10
    cat, dog = found["classes"]
    assert (cat["name"], cat["lost"], cat["gained"], cat["images"]) == ("cat", 2, 0, 6)
    assert (dog["name"], dog["points"]) == ("dog", 25.0)
    assert cat["q"] >= cat["p"]
    changes = {(row["label"], row["predicted"]): (row["fp32"], row["int8"]) for row in
               found["confusions"]}  # fmt: skip
    assert changes == {("cat", "dog"): (2, 3), ("cat", "owl"): (0, 1), ("dog", "cat"): (1, 0)}
    assert {row["image"] for row in found["disagreements"]} == {2, 3, 9}


def test_reliability_counts_how_often_a_bin_is_right():
    sure = [0.95] * 5 + [0.5] * 5
    found = compare(metrics(FLOAT, LABELS, sure), metrics(INT8, LABELS, sure), [])
    low, high = found["reliability"]["fp32"]
    assert (low["images"], high["images"]) == (5, 5)
    assert low["confidence"] == pytest.approx(0.5)
    assert (low["share"], high["share"]) == (pytest.approx(0.6), pytest.approx(0.8))
    assert found["classes"][0]["name"] == "0"  # without names, the labels


def test_other_images_are_refused():
    with pytest.raises(QatTricksError, match="the same images"):
        compare(metrics(FLOAT, LABELS), metrics(INT8[:5], LABELS[:5]), [])
