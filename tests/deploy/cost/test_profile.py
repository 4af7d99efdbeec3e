"""ONNX Runtime's own profile: every operator once, and which of them compute nothing."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.deploy.cost.profile import CONVERSIONS, layer_times, profile_file
from qat_tricks.deploy.runtimes.session import open_session
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv
from tests.helpers.nets import images, small_net


def network(*between):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), *between, nn.Conv2d(8, 8, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).eval()
    net(images(2))
    return net


def exported(folder, *between):
    path = folder / "m.onnx"
    quantized = qat_tricks.quantize(network(*between), [images(16)])
    qat_tricks.export_onnx(quantized, path, images(2))
    return path


@pytest.mark.parametrize("between", [[], [nn.GELU()], [nn.Tanh(), nn.ELU()]])
def test_each_operator_that_runs_is_in_it_once(tmp_path, between):
    path = exported(tmp_path, *between)
    profile = profile_file(path, (1, 8, 8), threads=1, runs=3)
    open_session(path, threads=1, optimized_path=tmp_path / "optimized.onnx")
    ran = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sorted(operator.op_type for operator in profile.operators) == sorted(ran)
    assert all(operator.ms >= 0 for operator in profile.operators)
    conversions = profile.conversions()
    assert conversions["count"] == sum(kind in CONVERSIONS for kind in ran)
    assert conversions["count"] == sum(conversions["by_type"].values())
    assert 0 < conversions["share"] < 1
    assert conversions["by_type"]["QuantizeLinear"] >= 1  # of the images


def test_functions_in_float_cost_conversions(tmp_path):
    counts = [
        profile_file(exported(tmp_path, *between), (1, 8, 8), threads=1, runs=1).conversions()
        for between in ([], [nn.SiLU()], [nn.GELU()])
    ]
    assert counts[1]["count"] == counts[0]["count"]
    assert counts[2]["count"] >= counts[0]["count"] + 2


def test_the_dearest_come_first_and_their_shares_are_of_the_whole(tmp_path):
    path = tmp_path / "m.onnx"
    qat_tricks.export_onnx(small_net().eval(), path, images(2))
    profile = profile_file(path, (1, 8, 8), batch_size=2, threads=1, runs=3)
    every = profile.dearest(10**6)
    assert [row["ms"] for row in every] == sorted((row["ms"] for row in every), reverse=True)
    assert sum(row["share"] for row in every) == pytest.approx(1)
    assert profile.dearest(2) == every[:2]


def test_a_file_that_is_missing_or_images_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(QatTricksError, match="no ONNX file"):
        profile_file(tmp_path / "m.onnx", (3, 8, 8), threads=1)
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    with pytest.raises(QatTricksError):
        profile_file(path, (5, 8, 8), threads=1)


@pytest.mark.parametrize(
    "between",
    [[], [nn.GELU()], [nn.ELU()], [nn.SiLU()], [nn.ELU(), nn.Conv2d(8, 8, 1), nn.Mish()]],
)
def test_the_forecast_counts_no_more_conversions_than_run(tmp_path, between):
    path = exported(tmp_path, *between)
    by_type = profile_file(path, (1, 8, 8), threads=1, runs=1).conversions()["by_type"]
    ran = by_type.get("QuantizeLinear", 0) + by_type.get("DequantizeLinear", 0)
    foreseen = forecast_network(network(*between), images(1)).conversions
    functions = sum(not isinstance(module, (nn.Conv2d, nn.SiLU)) for module in between)
    assert foreseen == 1 + 2 * functions  # the images, and each function's input and output
    assert foreseen <= ran


def test_each_layer_has_a_time_of_its_own(tmp_path):
    path = tmp_path / "m.onnx"
    qat_tricks.export_onnx(qat_tricks.quantize(small_net(), [images(16)]), path, images(2))
    profile = profile_file(path, (1, 8, 8), threads=1, runs=3)
    times = layer_times(path, profile)
    layers = {"stem.0", "block.conv1", "block.conv2", "depthwise.0", "left", "right", "head"}
    assert times.keys() == layers
    assert all(milliseconds >= 0 for milliseconds in times.values())
    assert sum(times.values()) <= profile.ms


def test_a_layer_called_twice_has_the_time_of_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, 4)

        def forward(self, x):
            return self.fc(self.conv(torch.sigmoid(self.conv(x))).flatten(1))

    path = tmp_path / "m.onnx"
    qat_tricks.export_onnx(qat_tricks.quantize(Twice().eval(), [images(16)]), path, images(2))
    profile = profile_file(path, (1, 8, 8), threads=1, runs=3)
    convs = [operator.ms for operator in profile.operators if "Conv" in operator.op_type]
    assert len(convs) == 2
    assert layer_times(path, profile)["conv"] == pytest.approx(sum(convs))
