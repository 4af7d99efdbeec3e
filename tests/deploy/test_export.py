"""Export: what the file holds is what was simulated, and ONNX Runtime runs it in integers."""

import copy
import json
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qat_tricks.deploy import export
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.weights import WEIGHT_BITS_KEY, weight_size, weight_sparsity
from qat_tricks.deploy.export import _output_names, export_onnx
from qat_tricks.deploy.parity.network import measure_parity
from qat_tricks.deploy.parity.tensors import measure_tensor_parity
from qat_tricks.deploy.runtimes.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, as_layer, layers, trace
from qat_tricks.graph.spec import NARROW
from qat_tricks.models.build import build_model
from qat_tricks.recipes.ptq import quantize
from tests.helpers import networks
from tests.helpers.networks import images, quantized, seeded

SHAPE = (3, 32, 32)
INTEGER = {
    "QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool", "QGemm",
    "NhwcMaxPool", "MaxPool",
    "Transpose", "Reshape", "Flatten", "Split", "Slice", "Pad", "Resize",
}  # fmt: skip


def initializers(path):
    return {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer
    }


def properties(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def optimized(path, folder):
    """The nodes of the graph that ONNX Runtime really runs, and which of its tensors are float."""
    open_session(path, optimized_path=folder / "optimized.onnx")
    return list(onnx.load(folder / "optimized.onnx").graph.node)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a calibrated network of a kind, once: its file and its parity on three images."""

    @cache
    def export(kind):
        path = tmp_path_factory.mktemp(kind.__name__) / "model.onnx"
        metadata = {"preprocessing": '{"mean": 0.5}'}
        return path, export_onnx(quantized(kind), path, images(3), metadata=metadata)

    return export


@pytest.mark.parametrize(
    "kind",
    [
        networks.Residual,
        networks.ShortcutOfZeros,
        networks.PaddedOnOneSide,
        networks.Concatenated,
        networks.PartlyRectified,
        networks.Shuffled,
        networks.Flat,
    ],
)
def test_nothing_but_integer_kernels_between_the_two_ends(kind, exported, tmp_path):
    path, report = exported(kind)
    assert report.sqnr_db > 40
    assert integer_coverage(path, SHAPE).coverage == 1.0
    ran = [node.op_type for node in optimized(path, tmp_path)]
    assert ran.count("QuantizeLinear") == 1  # of the images
    # of the logits, where no linear yields them
    assert ran.count("DequantizeLinear") == ("QGemm" not in ran)
    assert set(ran) - {"QuantizeLinear", "DequantizeLinear"} <= INTEGER


@pytest.mark.parametrize("kind", [networks.SqueezeExcite, networks.Tokens, networks.CalledTwice])
def test_float_operations_stand_between_integer_layers(kind, exported):
    path, report = exported(kind)
    assert report.sqnr_db > 40
    assert integer_coverage(path, SHAPE).coverage == 1.0


def test_padding_on_one_side_becomes_the_convs_own(exported):
    nodes = onnx.load(exported(networks.PaddedOnOneSide)[0]).graph.node
    attributes = [
        attribute for node in nodes if node.op_type == "Conv" for attribute in node.attribute
    ]
    pads = [list(attribute.ints) for attribute in attributes if attribute.name == "pads"]
    assert pads == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert "Pad" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trainers_autocast_does_not_reach_the_file(tmp_path, dtype):
    network = quantized(networks.Residual)
    export_onnx(network, tmp_path / "expected.onnx", images())
    with torch.autocast("cpu", dtype):
        export_onnx(network, tmp_path / "found.onnx", images())
    expected, found = (initializers(tmp_path / f"{n}.onnx") for n in ("expected", "found"))
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_metadata_travels_and_paths_do_not(exported):
    path, _ = exported(networks.Flat)
    assert properties(path)["preprocessing"] == '{"mean": 0.5}'
    assert onnx.load(path).producer_name == "qat_tricks"
    assert b".py" not in path.read_bytes()
    session = open_session(path)
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    for batch in (1, 5):  # whatever the example's was
        assert run_batch(session, images(batch).numpy()).shape == (batch, 5)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_the_file_holds_the_integers_of_the_simulation(tmp_path):
    network, path = (
        quantized(networks.Residual, overrides={"b": {"weight_bits": 4}}),
        tmp_path / "model.onnx",
    )
    export_onnx(network, path, images(1))
    stored = initializers(path)
    for name, layer in layers(network).items():
        weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
        assert weight.dtype == np.int8
        assert weight.min() >= -127
        assert bias.dtype == np.int32
        scale = stored[f"{name}.weight_scale"].reshape(-1, *[1] * (weight.ndim - 1))
        simulated = layer.effective_weight().detach().numpy()
        np.testing.assert_allclose(weight * scale, simulated, rtol=1e-6)
        grid = layer.input_quantizer[0].current_scale().item() * np.float64(scale.ravel())
        simulated = layer.effective_bias().detach().double().numpy() / grid
        np.testing.assert_allclose(bias, simulated, rtol=1e-6, atol=1e-3)
    assert np.abs(stored["b.weight"]).max() == 7
    assert np.abs(stored["a.0.weight"]).max() == 127
    # no float weight is left
    assert max(v.ndim for v in stored.values() if v.dtype == np.float32) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_below_8_bits_values_stay_exact_in_8_bit_containers(bits, tmp_path):
    settings = {
        "weight_bits": bits,
        "activation_bits": bits,
        "first_last_bits": 8 if bits > 2 else None,
    }
    network, path = quantized(networks.Residual, **settings), tmp_path / "model.onnx"
    for quantizer in activation_quantizers(network).values():
        quantizer.set_range(-0.1, 0.1)  # clips much
    assert export_onnx(network, path, images(3)).sqnr_db > 35
    assert integer_coverage(path, SHAPE).coverage == 1.0
    named = json.loads(properties(path)[WEIGHT_BITS_KEY])
    own = {name: layer.weight_quantizer.scheme.bits for name, layer in layers(network).items()}
    assert named == {f"{name}.weight": bits for name, bits in own.items()}
    assert weight_size(path).packed < weight_size(path).on_disk
    assert np.abs(initializers(path)["b.weight"]).max() <= 2 ** (bits - 1) - 1

    model = onnx.load(path)  # without its Clips it is another network
    clips = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Clip"}
    for node in model.graph.node:
        node.input[:] = [clips.get(name, name) for name in node.input]
    onnx.save(model, path)
    assert measure_parity(path, network.eval(), [images(3)]).sqnr_db < 20


def test_layers_with_a_grid_of_their_own_behind_a_shortcut_run_as_simulated(tmp_path):
    network = quantized(networks.ShortcutOfZeros, weight_bits=4, activation_bits=4)
    names = [name for name in activation_quantizers(network) if name.endswith(NARROW)]
    assert names
    path = tmp_path / "model.onnx"
    export_onnx(network, path, images(3))
    assert integer_coverage(path, SHAPE).coverage == 1.0
    rows = measure_tensor_parity(path, network.eval(), images(3))
    assert len(rows) == len(activation_quantizers(network))  # the narrow ones are among them
    assert max(row.differing for row in rows) < 0.01


def test_the_network_is_left_as_it_was(tmp_path):
    network = quantized(networks.Residual, fold=False).train()
    network.get_submodule("stem.1").eval()  # a frozen BatchNorm
    state, code = copy.deepcopy(network.state_dict()), network.code
    modes = [module.training for module in network.modules()]
    report = export_onnx(network, tmp_path / "m.onnx", images(3))
    assert report.sqnr_db > 38  # the BatchNorms left unfolded for training are folded in the file
    assert integer_coverage(tmp_path / "m.onnx", SHAPE).coverage == 1.0
    assert "BatchNormalization" not in {
        node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node
    }
    assert network.code == code
    assert [module.training for module in network.modules()] == modes
    assert network.state_dict().keys() == state.keys()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_pruned_weights_are_exact_zeros_and_excluded_layers_float(tmp_path):
    network, path = quantized(networks.Residual, exclude=["a*", "stem*"]), tmp_path / "m.onnx"
    for name in ("a.0", "stem.0", "b", "shortcut", "fc"):
        layer = as_layer(network.get_submodule(name))
        layer.weight_mask = (torch.rand_like(layer.weight) > 0.5).float()
    effective = [layer.effective_weight() for layer in layers(network).values()]
    assert export_onnx(network, path, images(3)).sqnr_db > 40
    zeros = sum(int((weight == 0).sum()) for weight in effective)
    assert weight_sparsity(path) == pytest.approx(
        zeros / sum(weight.numel() for weight in effective)
    )
    stored = initializers(path)
    assert stored["b.weight"].dtype == np.int8
    assert sum(v.dtype == np.float32 and v.ndim == 4 for v in stored.values()) == 2
    # Left alone, ONNX Runtime quantizes the weight of a float conv between quantizers.
    operators = integer_coverage(path, SHAPE).operators
    assert [operator.integer for operator in operators].count(False) == 2


def test_weights_alone_in_integers_make_a_valid_file(tmp_path):
    network = quantized(networks.Residual)
    for quantizer in activation_quantizers(network).values():
        quantizer.enabled = False
    assert export_onnx(network, tmp_path / "m.onnx", images(3)).sqnr_db > 60
    assert initializers(tmp_path / "m.onnx")["b.weight"].dtype == np.int8
    assert integer_coverage(tmp_path / "m.onnx", SHAPE).coverage == 0.0


class Wide(networks.Flat):
    def __init__(self):
        super().__init__()
        self.hidden, self.fc = nn.Linear(256, 400), nn.Linear(400, 5)


def test_a_float_network_becomes_a_float_file_four_times_as_large(tmp_path):
    network = seeded(Wide).train()
    assert export_onnx(network, tmp_path / "fp32.onnx", images(3)).sqnr_db > 80
    assert network.training
    export_onnx(quantized(Wide), tmp_path / "int8.onnx", images(3))
    assert (tmp_path / "int8.onnx").stat().st_size < 0.3 * (tmp_path / "fp32.onnx").stat().st_size


def test_an_older_file_stays_when_parity_fails(tmp_path):
    network, path = quantized(networks.Flat), tmp_path / "model.onnx"
    path.write_text("an older model")
    measured = r"on 2 images top-1 agreement \d\.\d+ .* SQNR \d+\.\d dB \(at least 300\)"
    with pytest.raises(QatTricksError, match=measured):
        export_onnx(network, path, images(2), min_sqnr_db=300)
    assert path.read_text() == "an older model"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class Named(networks.Flat):
    """Has an output with the name of a tensor inside."""

    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits, "relu": logits * 2}


class Foreign(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).real if x.sum() > 0 else x


def test_bad_input_is_refused_in_one_line(tmp_path):
    path = tmp_path / "m.onnx"
    uncalibrated = trace(seeded(networks.Flat))
    networks.quantize(uncalibrated)
    (tmp_path / "file").write_text("")
    net = seeded(networks.Flat)
    ours = quantized(networks.Flat)
    inside = nn.Sequential(ours)
    for network, where, example, message in [
        (uncalibrated, path, images(1), "has no range yet"),
        (net, tmp_path / "file" / "m.onnx", images(1), "cannot be written"),
        (net, path, images(1)[:0], "at least one image"),
        (net, path, torch.zeros(1, 3, 20, 20), "cannot be exported"),
        (Foreign(), path, images(1), "cannot be exported"),
        (inside, path, images(1), "hand over the traced network"),
        (net, path, images(1).byte(), r"images of torch.uint8 .*float\(\) / 255"),
        (Named(), path, images(1), 'no valid ONNX network .*"?relu.*other names'),
    ]:
        with pytest.raises(QatTricksError, match=message) as caught:
            export_onnx(network, where, example)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_deep_residual_network_runs_to_the_last_bit_as_simulated(tmp_path):
    network = quantize(build_model("resnet20", num_classes=10).eval(), [torch.randn(32, 3, 32, 32)])
    report = export_onnx(network, tmp_path / "m.onnx", torch.randn(16, 3, 32, 32))
    assert report.top1_agreement == 1.0
    assert report.sqnr_db > 45  # 200, no difference at all, where kernels fuse as on x86 with AVX2


class Spoilt(networks.Flat):
    """Yields no numbers for images that begin below zero."""

    def forward(self, x):
        return super().forward(x) / (x[:, 0, 0, 0].gt(0)[:, None] * 1.0)


def test_logits_that_are_no_numbers_are_named(tmp_path):
    given = images(4)
    given[0] = float("nan")
    for network, batch in [(seeded(Spoilt), -images(4).abs()), (seeded(networks.Flat), given)]:
        with pytest.raises(QatTricksError, match="NaN or infinite") as refused:
            export_onnx(network, tmp_path / "m.onnx", batch, min_top1_agreement=0, min_sqnr_db=-200)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_wrappers_are_taken_off(tmp_path):
    network, path = quantized(networks.Flat), tmp_path / "plain.onnx"
    export_onnx(network, path, images(3))
    for wrapped in [torch.compile(network), nn.DataParallel(network)]:
        export_onnx(wrapped, tmp_path / "wrapped.onnx", images(3))
        assert (tmp_path / "wrapped.onnx").read_bytes() == path.read_bytes()
    scripted = torch.jit.script(seeded(networks.Flat))
    with pytest.raises(QatTricksError, match=r"before torch\.jit\.script") as refused:
        export_onnx(scripted, path, images(3))
    assert "\n" not in str(refused.value)


def scaled(name, save):
    """Saves a file in which the tensor ``name`` is larger than in the simulation."""

    def spoil(model, *args):
        tensor = next(each for each in model.graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.1, name))
        save(model, *args)

    return spoil


@pytest.mark.parametrize(
    ("network", "tensor", "begins"),
    [
        (lambda: quantized(networks.Residual), "b.weight_scale", r'differs is "b" \(\d\d\.\d dB\)'),
        (lambda: quantized(networks.Residual), "fc.weight_scale", "differs, only the logits"),
        (lambda: seeded(networks.Residual), "fc.weight", "of a float network only the logits"),
    ],
)
def test_the_error_names_the_first_tensor_that_differs(
    network, tensor, begins, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "_save", scaled(tensor, export._save))
    with pytest.raises(QatTricksError, match=rf"dB \(at least 30\).*{begins}") as refused:
        export_onnx(network(), tmp_path / "m.onnx", images(8), min_top1_agreement=0)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (lambda y, f: (y, y, f), ["logits", "output_1", "output_2"]),
        (lambda y, f: {"logits": y, "again": y}, ["logits", "again"]),
        (lambda y, f: {"logits": y, "p": {"f": f}, "q": {"f": f * 2}}, ["logits", "f", "f_0"]),
        (lambda y, f: {"out": y, "f": [f, f * 2]}, ["logits", "f", "f_0"]),
        (lambda y, f: {"out": y, "logits_of_box": f}, ["logits", "logits_of_box"]),
    ],
)
def test_each_output_has_a_name_of_its_own(outputs, names):
    assert _output_names(outputs(torch.zeros(2, 4), torch.zeros(2, 8))) == names
