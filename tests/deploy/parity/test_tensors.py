"""Parity tensor by tensor: the place where a difference begins is found."""

import copy
from dataclasses import replace

import pytest
import torch
from onnx import helper
from torch import nn
from torch.nn import functional as F

from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.parity.tensors import measure_tensor_parity
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, trace
from qat_tricks.graph.hard_sigmoids import aligned_scales
from qat_tricks.graph.settle import settle_grids
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB
from qat_tricks.tricks import calibrate, quantize
from tests.helpers import networks
from tests.helpers.handmade import save
from tests.helpers.networks import images


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network and its file."""
    network, path = networks.quantized(networks.Flat), tmp_path_factory.mktemp("flat") / "m.onnx"
    export_onnx(network, path, images(2))
    return network, path


def test_what_was_exported_runs_as_simulated_in_every_tensor(exported):
    network, path = exported
    rows = measure_tensor_parity(path, network, images(8))
    assert len(rows) == len(activation_quantizers(network))
    assert [row.place for row in rows] == list(range(len(rows)))  # equals in their order
    assert {row.differing for row in rows} == {0.0}
    assert all(row.sqnr_db > 100 for row in rows)


def test_a_changed_layer_differs_from_its_own_output_on(exported):
    network, path = exported
    changed = copy.deepcopy(network)
    with torch.no_grad():
        layers(changed)["hidden"].bias.add_(3.0)
    rows = sorted(measure_tensor_parity(path, changed, images(8)), key=lambda row: row.place)
    first = next(row.place for row in rows if row.differing)
    assert rows[first].name == "hidden"
    assert first > 0
    assert rows[first].sqnr_db < 20 < rows[first - 1].sqnr_db <= LARGEST_SQNR_DB
    worst = measure_tensor_parity(path, changed, images(8))
    assert [row.sqnr_db for row in worst] == sorted(row.sqnr_db for row in rows)
    assert worst[0].as_dict()["differing"] > 0.5


def test_a_file_of_another_network_is_refused(exported, tmp_path):
    network, _ = exported
    relu = helper.make_node("Relu", ["x"], ["y"])
    save(tmp_path / "float.onnx", [relu], {}, ["batch", 3, 32, 32])
    with pytest.raises(QatTricksError, match="has no quantized tensor of this network"):
        measure_tensor_parity(tmp_path / "float.onnx", network, images(2))


class Excites(nn.Module):
    """A gate by a hardsigmoid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.g, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        gate = F.hardsigmoid(self.g(x.mean((2, 3), keepdim=True)))
        return self.fc((x * gate).mean((2, 3)))


def test_a_hardsigmoid_of_few_bits_that_clips_integers_is_compared(tmp_path):
    traced = calibrate(quantize(trace(Excites().eval())), [images(16)])
    for name in ("g", "hardsigmoid"):
        grid = activation_quantizers(traced)[f"activation_quantizers.{name}"]
        (low, high), grid.scheme = grid.range, replace(grid.scheme, bits=5)
        grid.set_range(low, high)
    settle_grids(traced)
    assert len(aligned_scales(traced)) == 2
    export_onnx(traced, tmp_path / "m.onnx", images(2))
    rows = measure_tensor_parity(tmp_path / "m.onnx", traced, images(8))
    assert {"g", "hardsigmoid"} <= {row.name for row in rows}
    assert {row.differing for row in rows} == {0.0}
