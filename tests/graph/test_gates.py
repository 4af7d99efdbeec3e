"""SiLU and Hardswish as products of a gate: the same function, in integers, in every form."""

import copy

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, rebuild, spec_of, trace
from qat_tricks.graph.gates import gate_of, split_gates
from qat_tricks.graph.hard_sigmoids import COARSEST, aligned_scales, hard_sigmoids
from qat_tricks.tricks import calibrate, learn_scales, quantize
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import images


class Gated(nn.Module):
    """Convs of large outputs with an activation between them."""

    def __init__(self, activation, gain=8.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.activation = nn.BatchNorm2d(8), activation
        self.fc = nn.Linear(8, 4)
        self.norm.weight.data.fill_(gain / 3)
        self.a.weight.data *= gain

    def forward(self, x):
        x = self.activation(self.a(x))
        x = x + self.activation(self.norm(self.b(x)))
        return self.fc(x.mean((2, 3)))


FORMS = [
    nn.SiLU,
    nn.Hardswish,
    lambda: nn.SiLU(inplace=True),
    lambda: nn.Hardswish(inplace=True),
    lambda: F.silu,
    lambda: F.hardswish,
]


@pytest.mark.parametrize("form", FORMS)
def test_the_function_stays_and_is_computed_in_integers(form, tmp_path):
    net = Gated(form()).eval()
    expected = net(images(32))
    quantized = qat_tricks.quantize(net, [images(32)])
    assert len(spec_of(quantized)["gated"]) == 2
    error = (quantized(images(32)) - expected).square().mean() / expected.square().mean()
    assert error < 1e-3
    path = tmp_path / "m.onnx"
    report = qat_tricks.export_onnx(quantized, path, images(2), images=[images(32)])
    assert report.max_abs_error == 0
    assert max(tensor.differing for tensor in report.layers) == 0
    gates = [name for name in report.layers if name.name.endswith("_gate")]
    assert len(gates) == 2  # they are compared too
    in_float = {node.op_type for node in onnx.load(path).graph.node} & {"HardSigmoid", "HardSwish"}
    assert not in_float


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_rebuilds_it(activation, bits):
    net = Gated(activation()).eval()
    traced = trace(copy.deepcopy(net))
    quantize(traced, activation_bits=bits)
    calibrate(traced, [images(32)])
    again = rebuild(net, spec_of(traced))
    again.load_state_dict(traced.state_dict(), strict=True)
    assert torch.equal(again.eval()(images()), traced(images()))


def test_functions_may_stay_in_float():
    traced = trace(Gated(nn.SiLU()).eval())
    quantize(traced, functions="float")
    assert "gated" not in spec_of(traced)
    with pytest.raises(QatTricksError, match='functions="integers" is not supported: did you mean'):
        quantize(trace(Gated(nn.SiLU()).eval()), functions="integers")


def test_one_without_a_grid_on_both_sides_stays_whole():
    """Splitting it would only round more."""
    traced = trace(Gated(nn.SiLU()).eval())
    quantize(traced, exclude=["a"])
    assert len(spec_of(traced)["gated"]) == 1


class OverwritesAView(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
        self.again = again

    def forward(self, x):
        x = self.a(x)
        y = F.silu(x.view(-1, 4, 36, 1), inplace=True).view(-1, 4, 6, 6)
        # x holds the function's values by now
        return self.fc((self.b(y) + (x if self.again else y)).mean((2, 3)))


def test_a_view_that_is_overwritten_is_split_only_if_nobody_reads_its_source():
    traced = trace(OverwritesAView(again=False).eval())
    quantize(traced)
    assert len(spec_of(traced)["gated"]) == 1
    with pytest.raises(QatTricksError, match="changes a view of a tensor in place"):
        trace(OverwritesAView(again=True).eval())


class GateAmongOthers(nn.Module):
    """A hardsigmoid whose values share a grid with others."""

    def __init__(self, joins):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1)
        self.last, self.fc, self.joins = nn.LazyConv2d(8, 1), nn.Linear(8, 4), joins
        self.a.weight.data *= 8

    def forward(self, x):
        y = self.a(x)
        return self.fc(self.last(self.joins(F.hardsigmoid(y), y, self.b(y))).mean((2, 3)))


@pytest.mark.parametrize(
    "joins",
    [
        lambda gate, y, z: gate + F.silu(z),
        lambda gate, y, z: torch.cat([gate, y], 1),
        lambda gate, y, z: torch.cat([gate, z], 1),
        lambda gate, y, z: torch.cat([gate, F.hardswish(y)], 1),
        lambda gate, y, z: F.silu(y + z) + gate,
    ],
    ids=["add", "cat with its input", "cat", "cat with hardswish", "two adds"],
)
def test_a_grid_that_others_share_is_not_moved(joins, tmp_path):
    net = GateAmongOthers(joins).eval()
    expected = net(images(32)).detach()
    quantized = qat_tricks.quantize(net, [images(32)])
    error = (quantized(images(32)) - expected).square().mean() / expected.square().mean()
    assert error < 3e-4  # 35 dB
    report = qat_tricks.export_onnx(quantized, tmp_path / "m.onnx", images(2), images=[images(32)])
    assert max(tensor.differing for tensor in report.layers) == 0


def test_splitting_again_changes_nothing():
    traced = trace(Gated(nn.SiLU()).eval())
    names = [node.name for node in traced.graph.nodes if "activation" in node.name]
    split_gates(traced, names)
    code = traced.code
    split_gates(traced, names)
    assert traced.code == code
    assert {gate_of(name) for name in names} <= {node.name for node in traced.graph.nodes}
    torch.testing.assert_close(traced(images()), Gated(nn.SiLU()).eval()(images()))


def calibrated(net, values, **settings):
    traced = trace(net.eval())
    quantize(traced, **settings)
    return calibrate(traced, [values], estimator="minmax")


def test_a_hardsigmoid_is_a_clamp_of_the_same_integers():
    traced = calibrated(Gated(nn.Hardswish()), images(32))
    pairs = list(hard_sigmoids(traced))
    assert len(pairs) == 2
    for pair in pairs:
        assert pair.is_aligned
        x, y = pair.grids
        integers = torch.arange(256) - x.offset
        values = F.hardsigmoid(integers * x.current_scale())
        steps = torch.round(values / y.current_scale()) + y.offset
        knee = round(3 / float(x.current_scale()))
        assert torch.equal(steps, (integers + x.offset).clamp(x.offset - knee, x.offset + knee))


def test_a_range_that_would_grow_coarse_stays_as_it_is():
    small = calibrated(Gated(nn.Hardswish(), gain=0.5), images(32))
    whole = calibrated(Gated(nn.Hardswish(), gain=0.5), images(32), functions="float")
    assert not aligned_scales(small)
    scales = {name: q.scale for name, q in activation_quantizers(small).items()}
    for name, quantizer in activation_quantizers(whole).items():
        torch.testing.assert_close(scales[name], quantizer.scale, rtol=1e-3, atol=0)
    for gain in (1.0, 2.0, 3.0, 8.0, 80.0):
        aligned = calibrated(Gated(nn.Hardswish(), gain=gain), images(32))
        plain = calibrated(Gated(nn.Hardswish(), gain=gain), images(32), functions="float")
        for name, quantizer in activation_quantizers(plain).items():
            if not name.endswith("_gate"):
                now = aligned.get_submodule(name).range
                assert now[1] - now[0] <= 1.001 * COARSEST * (
                    quantizer.range[1] - quantizer.range[0]
                )
                # nothing is cut off that was not
                assert now[0] <= quantizer.range[0] + float(quantizer.scale)
                assert now[1] >= quantizer.range[1] - float(quantizer.scale)


@pytest.mark.parametrize("gain", [0.01, 0.3, 1.0, 8.0])
def test_a_gate_that_alone_reads_its_input_is_always_a_clamp_and_rounds_less(gain, tmp_path):
    class Excites(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.g, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
            self.g.weight.data *= gain

        def forward(self, x):
            x = self.a(x).relu()
            gate = F.hardsigmoid(self.g(x.mean((2, 3), keepdim=True)))
            return self.fc((x * gate).mean((2, 3)))

    net = Excites().eval()
    expected = net(images(64)).detach()
    error = {}
    for clamps in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not clamps:
                patch.setattr("qat_tricks.graph.settle.align_hard_sigmoids", lambda _: None)
            traced = calibrated(copy.deepcopy(net), images(64))
        assert len(aligned_scales(traced)) == 2 * clamps
        error[clamps] = (traced(images(64)) - expected).square().mean()
    assert error[True] < 1.2 * error[False]


def test_scales_around_a_clamp_are_not_learned_and_a_fit_keeps_it(tmp_path):
    traced = calibrated(Gated(nn.Hardswish()), images(32))
    aligned = aligned_scales(traced)
    assert len(aligned) == 4
    learned = {id(scale) for scale in learn_scales(traced)}
    assert all((id(q.scale) in learned) == (q not in aligned) for q in list(aligned))

    lit = Lit().train()
    lit.backbone = Gated(nn.Hardswish())
    recipe = qat_tricks.recipe("int8_qat", report=False)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    run = trainer([*recipe, checkpoint], max_epochs=2, enable_checkpointing=True)
    run.fit(lit, datamodule=Data())
    assert len(aligned_scales(lit.backbone)) == 4
    lit.eval()
    report = qat_tricks.export_onnx(lit.backbone, tmp_path / "m.onnx", images(2))
    assert max(tensor.differing for tensor in report.layers) == 0
    fresh = Lit()
    fresh.backbone = Gated(nn.Hardswish())
    trainer(qat_tricks.recipe("int8_qat", report=False)).test(
        fresh, datamodule=Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert torch.equal(fresh.backbone.eval()(images()), lit.backbone(images()))
