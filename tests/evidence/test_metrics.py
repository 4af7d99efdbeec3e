"""Metrics against answers worked out by hand, and bad data refused."""

import math

import pytest
import torch
from torch import Tensor

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.metrics import Metrics, agreement, evaluate_classifier


def _oracle(classes: int, confidence: float = 20.0):
    """A network whose images are their own class numbers."""
    return lambda images: torch.nn.functional.one_hot(images.long(), classes) * confidence


def _loader(answers: list[int], labels: list[int], batch: int = 3) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(torch.tensor(answers).split(batch), torch.tensor(labels).split(batch), strict=True)
    return list(pairs)


def test_figures_of_a_known_confusion():
    """Class 0: 3 images, 2 right. Class 1: 1 image, right, and one false alarm."""
    measured = evaluate_classifier(
        _oracle(3, 0.0 + math.log(8)), _loader([0, 0, 1, 1], [0, 0, 0, 1]), 3
    )
    assert measured.accuracy == pytest.approx(3 / 4)
    assert measured.f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert measured.ece == pytest.approx(abs(8 / 10 - 3 / 4), abs=1e-6)
    assert measured.nll == pytest.approx(-(3 * math.log(0.8) + math.log(0.1)) / 4, abs=1e-6)
    assert measured.predictions.tolist() == [0, 0, 1, 1]
    assert measured.seconds > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_any_integers(dtype):
    batches = _loader([0, 0, 1, 1], [0, 0, 0, 1])
    others = [(images, labels.to(dtype)) for images, labels in batches]
    figures = [evaluate_classifier(_oracle(3), loader, 3) for loader in (batches, others)]
    assert figures[0].accuracy == figures[1].accuracy == pytest.approx(3 / 4)
    assert figures[0].nll == figures[1].nll


def test_batches_do_not_change_the_figures():
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(50, 7, generator=generator),
        torch.randint(7, (50,), generator=generator),
    )
    once, often = (
        evaluate_classifier(
            lambda x: x, list(zip(logits.split(n), labels.split(n), strict=True)), 7
        )
        for n in (50, 3)
    )
    for key, value in once.as_dict().items():
        assert key == "seconds" or value == pytest.approx(often.as_dict()[key], abs=1e-6)
    assert agreement(once.predictions, often.predictions) == 1.0


def test_top5_is_among_the_five_likeliest():
    logits = torch.arange(10.0).repeat(10, 1)  # class 9 likeliest, 0 least
    measured = evaluate_classifier(lambda x: x, [(logits, torch.arange(10))], 10)
    assert (measured.accuracy, measured.top5) == (pytest.approx(0.1), pytest.approx(0.5))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_top5_of_few_classes_is_always_right(classes):
    measured = evaluate_classifier(_oracle(classes), _loader([0, 1, 0], [1, 0, 0]), classes)
    assert measured.top5 == 1.0


def test_f1_is_over_the_classes_that_the_data_holds():
    few = evaluate_classifier(_oracle(3), _loader([0, 0, 1, 2], [0, 0, 1, 1]), 3)
    many = evaluate_classifier(_oracle(1000), _loader([0, 0, 1, 2], [0, 0, 1, 1]), 1000)
    assert many.f1 == pytest.approx(few.f1) == pytest.approx((1 + 2 / 3) / 2)


def test_plain_data_leaves_the_predictions_out():
    measured = evaluate_classifier(_oracle(3), _loader([0], [0]), 3)
    assert set(measured.as_dict()) == {"accuracy", "top5", "f1", "ece", "nll", "seconds"}
    assert all(isinstance(value, float) for value in measured.as_dict().values())
    assert isinstance(measured, Metrics)


def test_gradients_are_not_recorded():
    weight = torch.ones(3, requires_grad=True)
    seen = []

    def predict(images: Tensor) -> Tensor:
        logits = images * weight
        seen.append(logits.requires_grad)
        return logits

    evaluate_classifier(predict, [(torch.ones(2, 3), torch.tensor([0, 1]))], 3)
    assert seen == [False]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "empty"),
        (_loader([0, 1], [0, 3]), "run from 0 to 3"),
        (_loader([0, 1], [-1, 1]), "run from -1 to 1"),
        ([(torch.tensor([0]), torch.tensor([0.0]))], "labels of batch 0"),
        ([(torch.tensor([0]), torch.tensor([[0]]))], "labels of batch 0"),
        ([torch.zeros(3)], "pair of tensors"),
        ([(torch.zeros(3), [0, 1, 2])], "pair of tensors"),
    ],
)
def test_bad_data_is_refused(loader, message):
    with pytest.raises(QatTricksError, match=message):
        evaluate_classifier(_oracle(3), loader, 3)


def test_bad_logits_are_refused():
    loader = _loader([0, 1], [0, 1])
    with pytest.raises(QatTricksError, match=r"\(2, 3\) on batch 0, expected \(2, 4\)"):
        evaluate_classifier(_oracle(3), loader, 4)
    with pytest.raises(QatTricksError, match="NaN"):
        evaluate_classifier(lambda x: _oracle(3)(x) * torch.nan, loader, 3)


def test_agreement_is_the_share_of_equal_answers():
    assert agreement(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(QatTricksError, match="same images"):
        agreement(torch.tensor([0, 1]), torch.tensor([0]))


ONE_LOGIT = torch.tensor([-2.0, 1.0, 3.0, -1.0, 0.5])
ONE_LABEL = torch.tensor([0, 1, 0, 0, 1])


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("logits", [ONE_LOGIT, ONE_LOGIT[:, None]], ids=["[N]", "[N, 1]"])
@pytest.mark.parametrize(
    "labels",
    [ONE_LABEL, ONE_LABEL.float(), ONE_LABEL.float()[:, None], ONE_LABEL.bool()],
    ids=["int", "float", "column", "bool"],
)
def test_one_logit_is_measured_as_a_sigmoid(classes, logits, labels):
    measured = evaluate_classifier(lambda x: x, [(logits, labels)], classes)
    assert measured.predictions.tolist() == [0, 1, 1, 0, 1]
    assert (measured.accuracy, measured.top5) == (pytest.approx(4 / 5), 1.0)
    assert measured.f1 == pytest.approx((4 / 5 + 4 / 5) / 2)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(ONE_LOGIT, ONE_LABEL.float())
    assert measured.nll == pytest.approx(loss.item(), abs=1e-6)
    two = torch.stack([torch.zeros(5), ONE_LOGIT], 1)
    expected = evaluate_classifier(lambda x: x, [(two, ONE_LABEL)], 2)
    assert measured.as_dict() == pytest.approx({**expected.as_dict(), "seconds": measured.seconds})


def test_one_logit_of_other_labels_or_classes_is_refused():
    loader = [(ONE_LOGIT, ONE_LABEL)]
    with pytest.raises(QatTricksError, match=r"\(5,\) on batch 0, expected \(5, 3\)"):
        evaluate_classifier(lambda x: x, loader, 3)
    with pytest.raises(QatTricksError, match="labels of batch 0"):
        evaluate_classifier(lambda x: x, [(ONE_LOGIT, ONE_LABEL * 0.5)], 2)
    with pytest.raises(QatTricksError, match="run from 0 to 2"):
        evaluate_classifier(lambda x: x, [(ONE_LOGIT, ONE_LABEL * 2)], 2)
    with pytest.raises(QatTricksError, match=r"expected \(5, 2\)"):
        evaluate_classifier(lambda x: x[:1], loader, 2)
