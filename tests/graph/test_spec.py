import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import spec_of, trace
from tests.helpers.nets import small_net


def test_a_network_that_is_not_ours_has_no_spec():
    with pytest.raises(QatTricksError, match="not traced"):
        spec_of(torch.fx.symbolic_trace(small_net()))
    assert list(spec_of(trace(small_net()))) == ["trace", "code"]
