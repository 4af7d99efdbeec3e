"""One logit an image is the second of two classes, everywhere."""

import pytest
import torch
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.logits import check_batch_first, class_logits, classes_of, has_one_logit

ONE = torch.tensor([-2.0, 0.0, 0.5, 3.0])


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
def test_of_one_logit_the_sign_is_the_class_and_the_sigmoid_its_probability(shape):
    logits = ONE.view(shape)
    assert has_one_logit(logits)
    assert classes_of(logits).flatten().tolist() == [0, 0, 1, 1]
    two = class_logits(logits).reshape(4, 2)
    torch.testing.assert_close(two.softmax(1)[:, 1], ONE.sigmoid())
    labels = torch.tensor([1, 0, 1, 0])
    expected = F.binary_cross_entropy_with_logits(ONE, labels.float())
    torch.testing.assert_close(F.cross_entropy(two, labels), expected)


def test_several_logits_are_left_as_they_are():
    logits = torch.randn(4, 3)
    assert not has_one_logit(logits)
    assert class_logits(logits) is logits
    assert torch.equal(classes_of(logits), logits.argmax(1))


def test_the_first_dimension_has_to_be_the_batch():
    check_batch_first(torch.zeros(3), 3)
    for logits, images in [(torch.zeros(()), 1), (torch.zeros(10), 2)]:
        with pytest.raises(QatTricksError, match=r"squeeze\(1\) and not squeeze\(\)") as refused:
            check_batch_first(logits, images)
        assert "\n" not in str(refused.value)
