"""Layouts by name."""

import pytest

from qat_tricks.deploy.layouts import LAYOUTS, layout_named
from qat_tricks.errors import QatTricksError


def test_a_layout_is_known_by_its_name_or_the_nearest_is_told():
    assert [layout_named(name) for name in LAYOUTS] == list(LAYOUTS.values())
    assert len(set(LAYOUTS.values())) == len(LAYOUTS)
    with pytest.raises(QatTricksError, match='"tensort": did you mean "tensorrt"'):
        layout_named("tensort")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_range_that_saturating_does_not_give_has_a_clip_or_never_occurs(layout):
    assert layout.clips or layout.int8_symmetric_only
    assert layout.clips or layout.relu_before_quantizer  # some operator is the ReLU
