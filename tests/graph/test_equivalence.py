"""The gate catches what is not the user's network, also where everything else has failed."""

import sys

import pytest
import torch
from torch import fx, nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import fold, functional, spec_of, trace
from qat_tricks.graph.channels import ChannelAxis
from qat_tricks.graph.equivalence import Gate, Step, describe, sqnr, summary
from qat_tricks.graph.traceable import TraceSettings
from qat_tricks.graph.tracer import Tracer
from qat_tricks.graph.workbench import Workbench
from qat_tricks.tricks import Equalize, FoldBatchnorm, Quantize
from qat_tricks.tricks.equalize import find_pairs
from tests.helpers.modes import (
    AuxiliaryHead,
    Base,
    InlineNoise,
    OptionalArguments,
    SoftmaxInEvaluation,
    StochasticDepth,
)
from tests.helpers.nets import images, small_net
from tests.helpers.structures import STRUCTURES

equalize_module = sys.modules[find_pairs.__module__]


def structure(name):
    build, shape = STRUCTURES[name]
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    return build(), x


def float_db(net, traced, x):
    """Of evaluation; the networks have no quantizers."""
    with torch.no_grad():
        return sqnr([net.eval()(x)], [traced.eval()(x)])


def steps_of(work):
    return {step["name"]: step for step in spec_of(work.network)["equivalence"]}


def test_right_steps_stay_above_130_db_and_stand_in_the_spec():
    quantized = qat_tricks.quantize(small_net(), [images(16)])
    steps = spec_of(quantized)["equivalence"]
    assert [step["name"] for step in steps][:3] == ["traced", "folded", "equalized"]
    for step in steps:
        if not step["by_design"]:
            assert min(step["evaluation_db"], step["training_db"]) > 120, step
    corrected = [step for step in steps if step["by_design"]]
    assert {step["name"] for step in corrected} >= {"weights corrected", "biases corrected"}
    assert all(step["training_db"] is None for step in corrected[-2:])  # not measured
    assert summary(steps[:2]).startswith("your network → traced → folded: 200, 1")


def test_a_batchnorm_that_is_folded_wrong_is_left_out_and_the_others_are_folded(monkeypatch):
    affine_of = fold._affine_of

    work = Workbench(small_net(), lambda count: [images(16)])
    # The trials are copies: the culprit is known by its statistics.
    marked = work.network.block.bn2.running_mean.clone()
    monkeypatch.setattr(
        fold,
        "_affine_of",
        lambda bn, channels=slice(None): (
            affine_of(bn, channels)[0] * (1.1 if torch.equal(bn.running_mean, marked) else 1.0),
            *affine_of(bn, channels)[1:],
        ),
    )
    with pytest.warns(UserWarning, match=r"folded without block\.bn2"):
        FoldBatchnorm().apply(work)
    assert steps_of(work)["folded"]["undone"] == ["block.bn2"]
    assert [name for _, name in spec_of(work.network)["folded"]] == [
        "stem.1",
        "block.bn1",
        "depthwise.1",
    ]
    assert float_db(small_net(), work.network, images()) > 120


@pytest.mark.parametrize("name", ["linear_over_width", "linear_over_width_last"])
def test_a_pair_over_the_wrong_axis_is_left_out(monkeypatch, name):
    net, x = structure(name)
    expected = net(x)
    monkeypatch.setattr(ChannelAxis, "is_input_of", lambda self, layer, flat: True)
    work = Workbench(net, lambda count: [x])
    with pytest.warns(UserWarning, match="equalized without"):
        Equalize().apply(work)
    assert sqnr([expected], [work.network(x)]) > 120


def test_a_bias_absorbed_through_padding_is_left_out(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    ).eval()
    net[1].bias.data += 10
    x = images(16)
    expected = net(x)
    monkeypatch.setattr(equalize_module, "_pads", lambda layer: False)
    work = Workbench(net, lambda count: [x])
    FoldBatchnorm().apply(work)
    with pytest.warns(UserWarning, match="biases absorbed without 0 → 3"):
        Equalize().apply(work)
    assert sqnr([expected], [work.network(x)]) > 120


def test_a_function_put_over_a_module_is_undone(monkeypatch):
    class Both(Base):
        def forward(self, x):
            features = self.features(x)
            weight = nn.functional.normalize(self.fc.weight)
            return self.fc(features) + 10 * nn.functional.linear(features, weight)

    torch.manual_seed(0)
    net, x = Both().eval(), torch.randn(4, 3, 8, 8)
    expected = net(x)
    monkeypatch.setattr(functional, "_may_be_computed_once", lambda *_: True)
    monkeypatch.setattr(functional, "_user_name", lambda *_: "fc")
    work = Workbench(net, lambda count: [x])
    assert steps_of(work)["traced"]["undone"] == ["functions to modules"]
    assert sqnr([expected], [work.network.eval()(x)]) > 120


@pytest.mark.parametrize("kind", [SoftmaxInEvaluation, AuxiliaryHead, StochasticDepth, InlineNoise])
def test_a_network_frozen_in_evaluation_is_not_kept(kind):
    torch.manual_seed(0)
    net, x = kind(), torch.randn(4, 3, 12, 12)
    gate = Gate(net, x)
    frozen = trace(net, settings=TraceSettings(training_mode=False))
    step = gate.measure(frozen, "traced", thawed=True)
    assert step.evaluation_db > 130
    assert step.training_db < 40
    assert not gate.keeps(step)
    assert gate.keeps(gate.measure(trace(net), "traced", thawed=True))


def test_optional_arguments_made_inputs_are_refused(monkeypatch):
    class Features(OptionalArguments):
        def forward(self, x, features=None):
            return super().forward(x, features=features)

    monkeypatch.setattr(sys.modules[trace.__module__], "defaults_of", lambda network: {})
    monkeypatch.setattr(Tracer, "create_args_for_root", fx.Tracer.create_args_for_root)
    with pytest.raises(QatTricksError, match="is not the network that was given"):
        Workbench(Features(), lambda count: [torch.randn(4, 3, 8, 8)])


def test_a_step_that_cannot_be_undone_is_refused(monkeypatch):
    work = Workbench(small_net(), lambda count: [images(16)])
    monkeypatch.setattr(
        Quantize,
        "restructure",
        lambda self, work: work.network.head.weight.data.mul_(1.01),
    )
    with pytest.raises(QatTricksError, match=r"SmallNet quantizers placed is not .* 4\d dB"):
        Quantize().apply(work)


def test_nan_is_refused_with_the_parameters_name():
    net = Base()
    net.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(QatTricksError, match=r'"fc\.weight" of the network holds NaN'):
        Gate(net, torch.randn(2, 3, 8, 8))


def test_values_that_overflow_are_refused():
    net = Base()
    net.fc.weight.data.fill_(3e38)
    with pytest.raises(QatTricksError, match="although its numbers are finite"):
        Gate(net, torch.full((2, 3, 8, 8), 100.0))


def test_the_gate_leaves_modes_statistics_and_random_numbers_as_they_were():
    net = StochasticDepth().train()
    net.bn.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gate = Gate(net, torch.randn(4, 3, 8, 8, generator=torch.Generator()))
    gate.measure(trace(net), "traced")
    assert torch.equal(torch.rand(3), expected)
    assert net.training
    assert not net.bn.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_what_changes_by_design_is_the_reference_from_then_on():
    net = small_net()
    work = Workbench(net, lambda count: [images(16)])
    with torch.no_grad():
        work.network.head.weight.mul_(1.5)
    work.note_change("scaled")
    assert steps_of(work)["scaled"]["by_design"]
    assert steps_of(work)["scaled"]["evaluation_db"] < 20
    FoldBatchnorm().apply(work)
    assert steps_of(work)["folded"]["evaluation_db"] > 120


def test_a_network_that_cannot_run_in_training_is_compared_in_evaluation():
    class OnePosition(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 3, 28), nn.BatchNorm1d(3)

        def forward(self, x):
            if self.training:
                raise RuntimeError("not in training")
            return self.bn(self.conv(x).flatten(1))

    gate = Gate(OnePosition(), torch.randn(2, 1, 28, 28))
    assert gate.reference.training is None
    step = Step(name="traced", evaluation_db=140.4, training_db=None)
    assert gate.keeps(step)
    assert describe(step) == "140 dB"


def test_other_shapes_and_other_integers_are_no_match():
    x = torch.randn(3, 2)
    assert sqnr([x], [x]) == 200
    assert sqnr([x], [x[:2]]) == sqnr([x], [x, x]) == -200
    assert sqnr([x.argmax(1)], [1 - x.argmax(1)]) == -200


def test_networks_are_compared_without_tf32():
    """A GPU rounds to 10 bits of mantissa by default, and right steps would be refused."""
    seen = []

    class Net(nn.Sequential):
        def forward(self, x):
            places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
            seen.append([place.fp32_precision for place in places])
            return super().forward(x)

    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32
    Gate(Net(nn.Conv2d(1, 2, 3)), images())
    assert seen
    assert all(precisions == ["ieee", "ieee"] for precisions in seen)
    after = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32
    assert before == after
