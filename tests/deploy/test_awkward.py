"""Networks as people write them: each is quantized by ``int8_ptq``, exported, and run as it was
simulated.
"""

import copy

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.ops import StochasticDepth

import qat_tricks
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.deploy.runtimes.session import open_session
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, rebuild, spec_of
from tests.helpers.networks import conv, images, seeded

INTEGER_OPERATORS = {
    *("QuantizeLinear", "QLinearConv", "QGemm", "QLinearGlobalAveragePool", "QLinearMul"),
    *("QLinearSigmoid", "QLinearLeakyRelu", "Clip", "Transpose", "Reshape"),
}


class Head(nn.Module):
    """A stem, what a test puts between, and a classifier."""

    def __init__(self, *between: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.between, self.last = (
            conv(3, 8, stride=2),
            nn.Sequential(*between),
            conv(channels, 16),
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.between(self.stem(x))).mean([2, 3]))


class AfterActivation(Head):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8))


class BeforeConv(Head):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


class WithoutAffine(Head):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()
        )


class GroupedAndDilated(Head):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=(0, 1)),
        )


class Dropped(Head):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 8, 1),
            nn.Dropout2d(0.5),
            nn.ReLU(),
            StochasticDepth(0.5, "row"),
            nn.Identity(),
        )


class TwoReaders(nn.Module):
    """A BatchNorm whose output a ReLU and an add read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.branch = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.fc((x + self.branch(F.relu(x))).mean([2, 3]))


class Shared(nn.Module):
    """Two convs with one weight, each with a BatchNorm of its own, and a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 8), conv(8, 8)
        self.b[0].weight = self.a[0].weight
        self.twice, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.stem(x)))
        return self.fc(F.relu(self.twice(F.relu(self.twice(x)))).mean([2, 3]))


class Functional(nn.Module):
    """Convs called as functions, with parameters of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = (
            nn.Parameter(torch.randn(8, 3, 3, 3) / 5),
            nn.Parameter(torch.zeros(8)),
        )
        self.matrix = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.shift, stride=2, padding=1))
        return F.linear(x.mean([2, 3]), self.matrix)


class ChannelsLast(nn.Module):
    """Linears on ``[N, H, W, C]``, as in ConvNeXt's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.last, self.fc = (
            conv(3, 8),
            nn.Linear(8, 16),
            nn.Conv2d(16, 8, 1),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(self.stem(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.fc(F.relu(self.last(x)).mean([2, 3]))


class Positions(nn.Module):
    """Coordinates made of the shape alone, as in EdgeNeXt, in the type of the weight of the conv
    that takes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.place, self.fc = conv(3, 8, stride=2), nn.Conv2d(2, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        counted = ~torch.zeros((x.shape[0], x.shape[2], x.shape[3])).to(
            device=x.device, dtype=torch.bool
        )
        rows, columns = (
            counted.cumsum(1, dtype=torch.float32),
            counted.cumsum(2, dtype=torch.float32),
        )
        at = torch.stack([rows / (rows[:, -1:] + 1e-6), columns.sin()], 1).to(
            self.place.weight.dtype
        )
        return self.fc(F.relu(x + self.place(at)).mean([2, 3]))


class ReadsAWeight(Head):
    """The values of a conv's weight used beside the conv."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.last(x * self.last[0].weight.abs().mean()).mean([2, 3]))


class Windowed(nn.Module):
    """Attention in shifted windows of 3 by 3, of which 8 by 8 tokens make no whole number."""

    def __init__(self, kind: type[nn.Module] = ShiftedWindowAttention) -> None:
        super().__init__()
        self.stem, self.attention, self.fc = (
            conv(3, 8, stride=4),
            kind(8, [3, 3], [1, 1], 2),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.fc((x + self.attention(x)).mean([1, 2]))


class WindowedV2(Windowed):
    def __init__(self) -> None:
        super().__init__(ShiftedWindowAttentionV2)


PURE = [
    AfterActivation, BeforeConv, WithoutAffine, GroupedAndDilated, Dropped, TwoReaders, Shared,
    Functional, ChannelsLast, Positions, ReadsAWeight, Windowed, WindowedV2,
]  # fmt: skip


def deployed(net, folder):
    """The quantized network, the path of its file, and its parity."""
    quantized = qat_tricks.quantize(net, [images(64)])
    path = folder / "model.onnx"
    return quantized, path, qat_tricks.export_onnx(quantized, path, images(2), images=[images(16)])


@pytest.mark.parametrize("kind", PURE)
def test_all_in_integers_and_as_simulated(kind, tmp_path):
    net = seeded(kind)
    expected = net(images(64)).detach()
    quantized, path, report = deployed(net, tmp_path)
    assert report.sqnr_db > 40
    assert integer_coverage(path, (3, 32, 32)).coverage == 1.0
    assert forecast_network(net, images(1)).coverage == 1.0
    error = (quantized(images(64)) - expected).square().mean() / expected.square().mean()
    assert error < 0.01  # 20 dB


def test_layers_that_share_a_weight_still_do(tmp_path):
    quantized, _, _ = deployed(seeded(Shared), tmp_path)
    assert quantized.get_submodule("a.0").weight is quantized.get_submodule("b.0").weight
    assert [pair[0] for pair in spec_of(quantized)["folded"]] == ["stem.0"]


@pytest.mark.parametrize(
    ("activation", "in_float"),
    [
        (nn.SiLU(), []),
        (nn.Hardswish(), []),
        (nn.LeakyReLU(0.1), []),
        (nn.Sigmoid(), []),
        (nn.GELU(), ["GELU"]),
        (nn.PReLU(8), ["PReLU"]),
        (nn.Tanh(), ["Tanh"]),
        (nn.ELU(), ["ELU"]),
        (nn.Mish(), ["Mish"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stays_in_float_between_integer_layers_is_named(activation, in_float, tmp_path):
    torch.manual_seed(0)
    net = Head(nn.Conv2d(8, 8, 3, padding=1), activation)
    net.between[0].weight.data *= 8  # so that values reach -3, where a Hardswish is 0
    net(images())
    _, path, report = deployed(net.eval(), tmp_path)
    assert report.sqnr_db > 40
    assert max(tensor.differing for tensor in report.layers) == 0
    assert integer_coverage(path, (3, 32, 32)).coverage == 1.0
    assert [row.operation for row in forecast_network(net, images(1)).in_float] == in_float
    if not in_float:  # and so it runs
        open_session(path, optimized_path=tmp_path / "optimized.onnx")
        run = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert run <= INTEGER_OPERATORS


class Unfoldable(Head):
    """A BatchNorm that always takes the statistics of its batch."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()
        )


def test_a_batchnorm_without_running_statistics_stays_in_float(tmp_path):
    net = seeded(Unfoldable)
    seen = forecast_network(net, images(1))
    assert (seen.coverage, [row.operation for row in seen.in_float]) == (1.0, ["BatchNorm2d"])
    quantized = qat_tricks.quantize(net, [images(64)])
    expected = net(images(64))
    assert (quantized(images(64)) - expected).square().mean() < 0.01 * expected.square().mean()


class Transposed(Head):
    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )


def test_a_transposed_conv_stays_in_float_and_is_named(tmp_path):
    net = seeded(Transposed)
    _, path, report = deployed(net, tmp_path)
    assert report.sqnr_db > 40
    seen, measured = forecast_network(net, images(1)), integer_coverage(path, (3, 32, 32))
    assert (seen.integer_macs, seen.total_macs) == (measured.integer_macs, measured.total_macs)
    assert 0 < seen.coverage < 1
    assert seen.in_float[0].name == "between.0"
    assert "transposed" in seen.in_float[0].reason


class Outputs(nn.Module):
    """Logits and an auxiliary head, in the container that a test names."""

    def __init__(self, container: type = tuple) -> None:
        super().__init__()
        self.container, self.stem, self.aux, self.fc = (
            container,
            conv(3, 8),
            nn.Linear(8, 3),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> object:
        x = self.stem(x).mean([2, 3])
        logits, aux = self.fc(x), self.aux(x)
        return (
            {"features": aux, "logits": logits}
            if self.container is dict
            else self.container([logits, aux])
        )


@pytest.mark.parametrize(
    ("container", "second"), [(tuple, "output_1"), (list, "output_1"), (dict, "features")]
)
def test_of_several_outputs_the_logits_come_first(container, second, tmp_path):
    torch.manual_seed(0)
    net = Outputs(container)
    net(images())
    quantized, path, report = deployed(net.eval(), tmp_path)
    assert report.sqnr_db > 40
    assert [output.name for output in onnx.load(path).graph.output] == ["logits", second]
    found = open_session(path).run(None, {"images": images(3).numpy()})
    yielded = quantized(images(3))
    logits, aux = (yielded["logits"], yielded["features"]) if container is dict else yielded
    torch.testing.assert_close(torch.from_numpy(found[0]), logits.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.from_numpy(found[1]), aux.detach(), atol=1e-3, rtol=0)


def test_channels_last_changes_nothing(tmp_path):
    net = seeded(AfterActivation)
    plain = qat_tricks.quantize(net, [images(64)])
    last = qat_tricks.quantize(
        copy.deepcopy(net).to(memory_format=torch.channels_last),
        [images(64).to(memory_format=torch.channels_last)],
    )
    for name, layer in layers(plain).items():
        same = torch.isclose(layers(last)[name].weight, layer.weight, rtol=1e-4, atol=1e-5)
        # one that lies between two integers may be rounded otherwise
        assert same.float().mean() > 0.99
    torch.testing.assert_close(last(images(4)), plain(images(4)), rtol=0, atol=0.05)
    report = qat_tricks.export_onnx(last, tmp_path / "model.onnx", images(2), images=[images(16)])
    assert report.sqnr_db > 40


class Untraceable(nn.Module):
    """A part whose control flow depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > -1000 else x


class PartlyUntraceable(Head):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), Untraceable(), nn.Conv2d(8, 8, 1)
        )


def test_a_part_that_cannot_be_traced_is_named_and_can_be_kept_whole(tmp_path):
    net = seeded(PartlyUntraceable)
    with pytest.raises(QatTricksError, match=r'test_awkward.py:\d+ .* untraced=\["between.2"\]'):
        qat_tricks.quantize(net, [images(64)])
    with pytest.raises(QatTricksError, match=r'"betwixt\.2" matches no submodule'):
        qat_tricks.quantize(net, [images(64)], overrides=["untraced=[betwixt.2]"])
    quantized = qat_tricks.quantize(net, [images(64)], overrides=["untraced=[between.2]"])
    expected = net(images(64)).detach()
    assert (quantized(images(64)) - expected).square().mean() < 0.01 * expected.square().mean()
    assert set(layers(quantized)) == {"stem.0", "between.0", "between.3", "last.0", "fc"}
    seen = forecast_network(net, images(1), untraced=["between.2"])
    assert [(row.name, row.reason, row.macs) for row in seen.in_float] == [
        ("between.2", "kept whole", 16 * 16 * 8 * 8)
    ]
    rebuilt = rebuild(seeded(PartlyUntraceable), spec_of(quantized)).eval()
    rebuilt.load_state_dict(quantized.state_dict())
    assert torch.equal(rebuilt(images(4)), quantized(images(4)))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_hook_on_the_network_may_watch_and_not_change(quantized, tmp_path):
    network = seeded(Head)
    seen = []
    if quantized:
        network = qat_tricks.quantize(network, [images()])
    watching = network.register_forward_hook(lambda module, args, output: seen.append(output))
    qat_tricks.export_onnx(network, tmp_path / "model.onnx", images())
    assert seen
    watching.remove()
    for hook in (
        network.register_forward_hook(lambda module, args, output: output * 1.01),
        network.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,)),
    ):
        with pytest.raises(QatTricksError, match="a hook on the network changes its output"):
            qat_tricks.export_onnx(network, tmp_path / "changed.onnx", images())
        hook.remove()
    assert not (tmp_path / "changed.onnx").exists()
