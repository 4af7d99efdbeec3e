import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import spec_of, trace
from qat_tricks.graph.spec import mixed_precision_of
from tests.helpers.nets import small_net


def test_a_network_that_is_not_ours_has_no_spec():
    with pytest.raises(QatTricksError, match="not traced"):
        spec_of(torch.fx.symbolic_trace(small_net()))
    assert list(spec_of(trace(small_net()))) == ["trace", "code"]


def test_the_bits_that_were_chosen_are_found_where_there_are_any():
    traced = trace(small_net())
    assert mixed_precision_of(small_net()) is None
    assert mixed_precision_of(traced) is None
    spec_of(traced)["mixed_precision"] = {"share": 0.5}
    assert mixed_precision_of(traced) == {"share": 0.5}
