import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.forecast import forecast, forecast_network
from qat_tricks.deploy.export import export_onnx
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import QuantizeSettings, trace
from qat_tricks.tricks import calibrate, quantize
from tests.helpers import networks


@pytest.mark.parametrize(
    "kind", [networks.Residual, networks.Concatenated, networks.SqueezeExcite, networks.Tokens]
)
def test_what_is_foreseen_is_what_is_measured(kind, tmp_path):
    foreseen = forecast_network(networks.seeded(kind), networks.images(1))
    export_onnx(networks.quantized(kind), tmp_path / "model.onnx", networks.images(2))
    measured = integer_coverage(tmp_path / "model.onnx", (3, 32, 32))
    assert (foreseen.integer_macs, foreseen.total_macs) == (
        measured.integer_macs,
        measured.total_macs,
    )


class NormBehindReLU(nn.Module):
    """A BatchNorm that no conv or linear before it can take in."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.last(self.bn(torch.relu(self.stem(x)))).mean([2, 3]))


def test_a_recipe_without_fold_batchnorm_is_foreseen_as_it_is_exported(tmp_path):
    images = networks.images(4)[:, :, :16, :16]
    prepared = quantize(trace(networks.seeded(NormBehindReLU)))
    foreseen = forecast(prepared, images)
    export_onnx(calibrate(prepared, [images]), tmp_path / "model.onnx", images)
    measured = integer_coverage(tmp_path / "model.onnx", (3, 16, 16))
    convs_and_linear = 16 * 16 * 8 * (27 + 72) + 8 * 5
    assert foreseen.total_macs == measured.total_macs == convs_and_linear
    assert foreseen.integer_macs == measured.integer_macs
    assert [(row.name, row.operation) for row in foreseen.in_float] == [("bn", "BatchNorm2d")]
    # the guideline makes a depthwise conv of it, which computes one product a value
    folded = forecast_network(networks.seeded(NormBehindReLU), images)
    assert folded.total_macs == convs_and_linear + 16 * 16 * 8
    assert not folded.in_float


def test_a_batchnorm_that_export_folds_is_foreseen_in_integers(tmp_path):
    prepared = quantize(trace(networks.seeded(networks.Residual)))
    keys, code = list(prepared.state_dict()), prepared.code
    foreseen = forecast(prepared, networks.images(1))
    assert (foreseen.coverage, foreseen.in_float) == (1.0, [])
    assert (list(prepared.state_dict()), prepared.code) == (keys, code)  # the copy was folded
    export_onnx(calibrate(prepared, [networks.images()]), tmp_path / "m.onnx", networks.images(2))
    measured = integer_coverage(tmp_path / "m.onnx", (3, 32, 32))
    assert (foreseen.integer_macs, foreseen.total_macs) == (
        measured.integer_macs,
        measured.total_macs,
    )


class Mixed(nn.Module):
    """Something of each kind that stays in float."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(3)
        self.left, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm, self.fc = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(self.bn(x)))
        x = self.norm(self.up(nn.functional.gelu(self.left(x))))
        return self.fc((x * 2).mean([2, 3]))


def test_every_operation_in_float_is_named_with_its_reason():
    seen = forecast_network(Mixed(), networks.images(1), QuantizeSettings(exclude=["left"]))
    reasons = {(row.name, row.operation): row.reason for row in seen.in_float}
    assert set(reasons) == {
        ("bn", "BatchNorm2d"), ("left", "Conv2d"), ("gelu", "gelu"),
        ("up", "ConvTranspose2d"), ("norm", "GroupNorm"), ("mul", "mul"),
    }  # fmt: skip
    assert "folded" in reasons["bn", "BatchNorm2d"]
    assert "exclude" in reasons["left", "Conv2d"]
    assert "transposed" in reasons["up", "ConvTranspose2d"]
    macs = {row.name: row.macs for row in seen.in_float}
    assert macs["left"] == 32 * 32 * 8 * 8
    assert macs["up"] == 32 * 32 * 8 * 8 * 4
    stem, fc = 32 * 32 * 8 * 27, 8 * 5
    assert (seen.integer_macs, seen.total_macs) == (
        stem + fc,
        stem + fc + macs["left"] + macs["up"],
    )


class Opaque(nn.Module):
    """Products with weights within modules that are kept whole, outside of any layer, and one of
    two activations.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.windows = (
            nn.Conv2d(3, 8, 4, stride=4),
            ShiftedWindowAttention(8, [4, 4], [2, 2], 2),
        )
        self.attention, self.matrix = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Parameter(torch.randn(8, 6)),
        )
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.windows(self.stem(x).permute(0, 2, 3, 1)).flatten(1, 2)
        x = self.attention(x, x, x)[0] @ self.matrix
        return self.fc((x @ (x.transpose(1, 2) @ x)).mean(1))


def test_products_within_what_is_not_traced_are_foreseen_too(tmp_path):
    torch.manual_seed(0)
    net = Opaque().eval()
    foreseen = forecast_network(net, networks.images(1), untraced=["windows"])
    of = {row.operation: (row.reason, row.macs) for row in foreseen.in_float if row.macs}
    attention = 64 * 8 * (3 * 8 + 8)
    assert of == {
        "ShiftedWindowAttention": ("kept whole", attention),
        "MultiheadAttention": ("kept whole", attention),
        "matmul": ("product with a constant that is no layer's weight", 64 * 8 * 6),
    }
    quantized = calibrate(quantize(trace(net, ["windows"])), [networks.images()])
    export_onnx(quantized, tmp_path / "model.onnx", networks.images(2))
    measured = integer_coverage(tmp_path / "model.onnx", (3, 32, 32))
    assert (foreseen.integer_macs, foreseen.total_macs) == (
        measured.integer_macs,
        measured.total_macs,
    )


def test_the_network_stays_and_bad_patterns_are_refused():
    net = Mixed()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    forecast_network(net, networks.images(1))
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(QatTricksError, match="matches no"):
        forecast_network(net, networks.images(1), QuantizeSettings(exclude=["rigth"]))
