"""Comparison of logits: figures known beforehand."""

import numpy as np
import pytest

from qat_tricks.deploy.parity.logits import LARGEST_SQNR_DB, compare_logits
from qat_tricks.errors import QatTricksError

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
