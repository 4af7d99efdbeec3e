"""Comparison of logits: figures known beforehand."""

import numpy as np
import pytest

from qat_tricks.deploy.parity.logits import agrees, check_agreement, compare_logits
from qat_tricks.errors import QatTricksError
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB

LOGITS = np.array([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [3, 0, 0]])


def test_figures_are_of_all_batches_together():
    other = LOGITS.copy()
    other[0] = [0, 0.3, 0]
    found = compare_logits([(LOGITS[:3], other[:3]), (LOGITS[3:], other[3:])])
    assert (found["top1_agreement"], found["max_abs_error"], found["images"]) == (0.75, 3, 4)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(36 / 9.09))


def test_no_difference_and_no_number_have_their_ends_of_the_scale():
    assert compare_logits([(LOGITS, LOGITS)])["sqnr_db"] == LARGEST_SQNR_DB
    spoilt = compare_logits([(LOGITS, LOGITS * np.nan)])
    assert (spoilt["sqnr_db"], spoilt["max_abs_error"]) == (-LARGEST_SQNR_DB, np.inf)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(QatTricksError, match="at least one batch"):
        compare_logits([])
    with pytest.raises(QatTricksError, match="shapes"):
        compare_logits([(LOGITS, LOGITS[:1])])


@pytest.mark.parametrize(
    ("differing", "images", "least", "agreeing"),
    [
        (0, 10, 1.0, True),
        (1, 10, 1.0, False),
        (1, 10, 0.99, True),
        (2, 10, 0.99, False),
        (5, 500, 0.99, True),
        (6, 500, 0.99, False),
    ],
)
def test_one_differing_image_is_tolerated_unless_all_must_agree(differing, images, least, agreeing):
    assert agrees(1 - differing / images, images, least) is agreeing


def test_an_error_holds_the_figures_and_the_remedy():
    comparison = compare_logits([(LOGITS, np.roll(LOGITS, 1, axis=1))])
    settings = {"min_top1_agreement": 0.5, "remedy": "turn them round"}
    told = r"the wrong way: on 4 images top-1 agreement 0\.0000 \(at least 0\.5\), SQNR .* dB, "
    with pytest.raises(QatTricksError, match=f"{told}largest error of a logit 3; turn them round"):
        check_agreement(comparison, "the wrong way", **settings)
    comparison["top1_agreement"] = 1.0
    check_agreement(comparison, "the wrong way", **settings)
    with pytest.raises(QatTricksError, match=r"dB \(at least 10\)"):
        check_agreement(comparison, "the wrong way", **settings, min_sqnr_db=10.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_error_names_values_that_are_no_numbers_whatever_is_allowed(value):
    spoilt = LOGITS.copy()
    spoilt[1, 2] = value
    for pair in [(LOGITS, spoilt), (spoilt, LOGITS), (spoilt, spoilt)]:
        with pytest.raises(QatTricksError, match="of 4 images, some have logits that are NaN or"):
            check_agreement(
                compare_logits([pair]), "wrong", min_top1_agreement=0.0, remedy="no way"
            )
