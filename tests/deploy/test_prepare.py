"""What an export changes first."""

import torch

from qat_tricks.deploy.prepare import prepare_for_export
from qat_tricks.graph import trace
from qat_tricks.graph.layers import BATCHNORMS
from tests.helpers.nets import images, small_net


def test_a_batchnorm_that_is_left_is_folded_and_the_function_stays():
    traced = trace(small_net())
    prepare_for_export(traced)
    assert not [module for module in traced.modules() if isinstance(module, BATCHNORMS)]
    torch.testing.assert_close(traced(images()), small_net()(images()), rtol=1e-4, atol=1e-5)
