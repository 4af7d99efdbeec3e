"""Signed activations, affine and symmetric: what is simulated is what runs, and TensorRT's layout
of the file.
"""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.runtimes import session
from qat_tricks.deploy.runtimes.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, spec_of
from qat_tricks.trainer.checkpoints import save_checkpoint
from tests.helpers import networks
from tests.helpers.lit import Data, Lit, loader, trainer
from tests.helpers.networks import conv, images, quantized

SHAPE = (3, 32, 32)
SIGNED = ("signed_affine", "signed_symmetric")


class Everything(nn.Module):
    """ReLU, ReLU6, a residual add, two concats, one of which only one part comes from a ReLU, and
    three pools.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.pool = conv(3, 8, stride=2), nn.MaxPool2d(2)
        self.a, self.b, self.shortcut = (
            conv(8, 16),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(8, 16, 1),
        )
        self.six, self.left, self.right = nn.Conv2d(16, 8, 1), conv(8, 8), nn.Conv2d(8, 8, 1)
        self.last, self.fc = conv(24, 16), nn.Linear(16, 5)
        nn.init.normal_(self.six.weight, std=2.0)  # some values exceed the cap

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = F.relu(self.b(self.a(x)) + self.shortcut(x))
        x = F.relu6(self.six(x))
        x = torch.cat([torch.cat([self.left(x), x], 1), self.right(x)], 1)
        return self.fc(F.adaptive_avg_pool2d(F.avg_pool2d(self.last(x), 2), 1).flatten(1))


@pytest.fixture
def int8_kernels(monkeypatch):
    """Sessions in which ONNX Runtime keeps int8 activations on x86, as it does by itself on ARM:
    slowly, but in integers.
    """
    monkeypatch.setattr(session, "session_config", lambda: {"session.qdqisint8allowed": "1"})


@pytest.mark.parametrize("activations", SIGNED)
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_kernels_run_to_the_last_bit_as_simulated(
    activations, bits, int8_kernels, tmp_path
):
    # Weights of 7 bits: products of two int8 are exact on processors without VNNI too.
    network = quantized(
        Everything,
        activations=activations,
        activation_bits=bits,
        weight_bits=7,
        first_last_bits=None,
    )
    report = export_onnx(network, tmp_path / "m.onnx", images(2), images=[images(16)])
    assert integer_coverage(tmp_path / "m.onnx", SHAPE).coverage == 1.0
    assert {row.name for row in report.layers if row.differing} == set()
    assert report.max_abs_error == 0.0


def assert_begins_with_rare_roundings(report):
    """The first tensor to differ, if any, does so in less than a value in thousands: float sums
    round it to the other side.
    """
    assert report.top1_agreement == 1.0
    assert report.sqnr_db > 40
    differing = [
        row.differing for row in sorted(report.layers, key=lambda row: row.place) if row.differing
    ]
    assert not differing or differing[0] < 0.001


@pytest.mark.parametrize("activations", SIGNED)
def test_eight_bits_run_as_simulated_in_an_ordinary_session(activations, tmp_path):
    """There ONNX Runtime on x86 computes most of it in float."""
    network = quantized(Everything, activations=activations)
    report = export_onnx(network, tmp_path / "m.onnx", images(2), images=[images(16)])
    assert_begins_with_rare_roundings(report)


def test_a_symmetric_grid_does_not_stand_in_for_its_relu_by_saturating(tmp_path):
    """Without its Clips the file is another network."""
    export_onnx(
        quantized(Everything, activations="signed_symmetric"), tmp_path / "m.onnx", images(2)
    )
    model = onnx.load(tmp_path / "m.onnx")
    expected = run_batch(open_session(tmp_path / "m.onnx"), images(8).numpy())
    clips = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Clip"}
    assert clips
    for node in model.graph.node:
        node.input[:] = [clips.get(name, name) for name in node.input]
    onnx.save(model, tmp_path / "m.onnx")
    assert not np.allclose(
        run_batch(open_session(tmp_path / "m.onnx"), images(8).numpy()), expected, atol=0.05
    )


@pytest.fixture(scope="module")
def for_tensorrt(tmp_path_factory):
    """A network, its file in TensorRT's layout, and its parity."""
    path = tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    network = quantized(Everything, activations="signed_symmetric")
    return (
        network,
        path,
        export_onnx(network, path, images(2), images=[images(16)], layout="tensorrt"),
    )


def test_the_file_for_tensorrt_holds_what_its_parser_reads(for_tensorrt):
    network, path, _ = for_tensorrt
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    # no uint8, no int32
    assert {array.dtype.name for array in values.values()} <= {"int8", "float32", "int64"}
    producers = {name: node for node in model.graph.node for name in node.output}
    rectified = 0
    for node in model.graph.node:
        assert node.op_type != "Clip"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
            assert (values[node.input[1]] > 0).all()
            assert values[node.input[1]].shape == values[node.input[2]].shape
        if node.op_type == "QuantizeLinear" and producers.get(node.input[0]) is not None:
            before = producers[node.input[0]]
            if before.op_type == "Relu":
                rectified += 1
                assert producers[before.input[0]].op_type in ("Conv", "Add")
        if node.op_type in ("Conv", "Gemm"):
            assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    entries = spec_of(network)["activations"].values()
    assert rectified == sum(len(entry["nodes"]) for entry in entries if entry["activation"]) == 6
    for name, layer in layers(network).items():
        np.testing.assert_allclose(
            values[f"{name}.bias"], layer.effective_bias().detach().numpy(), rtol=1e-6
        )


def test_both_layouts_are_the_same_network(for_tensorrt, tmp_path):
    network, path, report = for_tensorrt
    assert_begins_with_rare_roundings(report)
    export_onnx(network, tmp_path / "m.onnx", images(2))
    runs = [
        run_batch(open_session(file, optimize=False), images(16).numpy())
        for file in (path, tmp_path / "m.onnx")
    ]
    np.testing.assert_allclose(*runs, atol=0.01 * np.abs(runs[0]).max())


@pytest.mark.parametrize(
    ("settings", "export", "told"),
    [
        (
            {},
            {"layout": "tensorrt"},
            "is unsigned affine with 8 bits, .* activations=signed_symmetric",
        ),
        ({"activations": "signed_affine"}, {"layout": "tensorrt"}, "is signed affine with 8 bits"),
        (
            {"activations": "signed_symmetric", "activation_bits": 4},
            {"layout": "tensorrt"},
            "signed symmetric with 4 bits",
        ),
        ({}, {"layout": "tensorflow"}, 'unknown layout "tensorflow": did you mean "tensorrt"'),
        ({}, {"opset": 17}, "opset=17 is not supported: give 18 to 25"),
        ({}, {"opset": 26}, "opset=26 is not supported: give 18 to 25"),
    ],
)
def test_files_that_cannot_be_are_refused(settings, export, told, tmp_path):
    with pytest.raises(QatTricksError, match=told):
        export_onnx(quantized(networks.Flat, **settings), tmp_path / "m.onnx", images(1), **export)
    assert not list(tmp_path.iterdir())


def test_symmetric_scales_learn_in_a_trainer_and_come_back_from_a_checkpoint(tmp_path):
    lit = Lit().train()
    symmetric = "stages.ptq.tricks.quantize.activations=signed_symmetric"
    begun = Lit()
    trainer(qat_tricks.recipe("int8_qat", [symmetric])).validate(begun, Data(), verbose=False)
    run = trainer(qat_tricks.recipe("int8_qat", [symmetric]), max_epochs=1)
    run.fit(lit, datamodule=Data())
    before, after = (activation_quantizers(module.backbone) for module in (begun, lit))
    assert all(
        quantizer.scheme.symmetric and quantizer.scheme.signed and quantizer.offset == 0
        for quantizer in after.values()
    )
    learned = {
        after[name].activation
        for name in after
        if not torch.equal(after[name].scale, before[name].scale)
    }
    assert learned == {None, "relu", "relu6"}

    save_checkpoint(lit, tmp_path / "m.ckpt")
    loaded = qat_tricks.load_from_checkpoint(Lit, tmp_path / "m.ckpt")
    x = torch.cat([batch[0] for batch in loader()])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), lit.eval()(x))
    assert spec_of(loaded.backbone)["activations"] == spec_of(lit.backbone)["activations"]
    report = export_onnx(
        loaded.backbone, tmp_path / "m.onnx", x[:2] * 0.5, images=[x * 0.5], layout="tensorrt"
    )
    assert report.top1_agreement == 1.0
    assert report.sqnr_db > 40
