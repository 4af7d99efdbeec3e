"""Average pools that ONNX lacks, or that a runtime computes otherwise, are spelled out."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.deploy.export import export_onnx
from qat_tricks.graph import trace
from qat_tricks.recipes.ptq import quantize
from tests.helpers.structures import C, L, Structure, built, inputs

SETTINGS = [
    {"kernel_size": k, "stride": s, "padding": p, "ceil_mode": c, "count_include_pad": i,
     "divisor_override": d}
    for k, s, p, c, i, d in itertools.product(
        (2, 3, (3, 2)), (None, 1, 2), (0, 1, (1, 0)), (False, True), (False, True), (None, 3)
    )
]  # fmt: skip


@torch.no_grad()
def test_the_function_stays_and_the_users_module_too():
    for settings in SETTINGS:
        module = nn.AvgPool2d(**settings)
        before = str(module.__dict__)
        for network in (
            module,
            Structure(lambda s, x, settings=settings: F.avg_pool2d(x, **settings)),
        ):
            outer = nn.Sequential(network)
            for size in (7, 8, 9):
                x = torch.randn(2, 3, size, size + 1)
                torch.testing.assert_close(trace(outer)(x), F.avg_pool2d(x, **settings))
        assert str(module.__dict__) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "divisor_override": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1, "divisor_override": 2},
    ],
)
def test_it_runs_as_simulated(settings, tmp_path):
    net = built(
        lambda: Structure(
            lambda s, x: s.fc(F.relu(s.d(s.pool(F.relu(s.c(x))))).mean((2, 3))),
            c=C(3, 8, 3, padding=1), d=C(8, 8, 3), pool=nn.AvgPool2d(**settings), fc=L(8, 5),
        )
    )  # fmt: skip
    x = inputs((3, 16, 16), 16)
    quantized = quantize(net, [x])
    assert export_onnx(quantized, tmp_path / "model.onnx", x[:2], images=[x]).sqnr_db > 60


def test_a_module_that_is_called_twice_is_spelled_out_twice():
    for settings in ({"divisor_override": 3}, {"padding": 1, "ceil_mode": True}):
        pool, x = nn.AvgPool2d(3, 2, **settings), torch.randn(2, 3, 16, 16)
        net = nn.Sequential(pool, pool)
        torch.testing.assert_close(trace(net)(x), net(x))
