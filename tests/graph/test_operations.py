"""The table of operations: one entry is all that placement, ties and forecast ask for."""

from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.graph import activation_quantizers, operations, spec_of, trace
from qat_tricks.graph import nodes as n
from qat_tricks.graph.near_ties import avoid_rounding_ties
from qat_tricks.graph.operations import OPERATIONS, UNKNOWN, Operation, entries_for
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images


@fx.wrap
def bend(x):
    """A made-up activation function."""
    return torch.where(x > 0, x * 1.5, x * 0.25)


class Bend(nn.Module):
    """The same as a module; tracers keep modules of ``torch.nn`` as they are."""

    def forward(self, x):
        return torch.where(x > 0, x * 1.5, x * 0.25)


Bend.__module__ = "torch.nn"


class Bent(nn.Module):
    def __init__(self, as_module):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 1)
        self.bend = Bend() if as_module else None

    def forward(self, x):
        x = self.stem(x)
        x = bend(x) if self.bend is None else self.bend(x)
        return self.head(x).mean((2, 3))


def add_entry(monkeypatch, **facts):
    entry = Operation(name="bend", calls=(bend, Bend), **facts)
    monkeypatch.setattr(operations, "OPERATIONS", (*OPERATIONS, entry))


def network(as_module):
    torch.manual_seed(0)
    return Bent(as_module).eval()


def grid_behind(traced):
    """The quantizer of the made-up function's values, with one of them between two steps."""
    quantizers = activation_quantizers(traced)
    before = quantizers["activation_quantizers.stem"]
    after = quantizers["activation_quantizers.bend"]
    values = bend((torch.arange(256) - before.offset) * before.current_scale()).detach()
    after.scale.data = values[values > 20 * after.scale][0] / 20.5
    return after


@pytest.mark.parametrize("as_module", [False, True], ids=["function", "module"])
def test_placement_absorbs_a_new_activation_function_by_its_entry(monkeypatch, as_module):
    def activations():
        placed = spec_of(quantize(trace(network(as_module))))["activations"].values()
        return {name: entry["activation"] for entry in placed for name in entry["nodes"]}

    assert activations() == {"x": None, "stem": None, "bend": None, "head": None, "mean": None}
    add_entry(monkeypatch, absorbed_as="relu")
    assert activations() == {"x": None, "bend": "relu", "head": None, "mean": None}


@pytest.mark.parametrize("as_module", [False, True], ids=["function", "module"])
def test_ties_of_a_new_function_are_avoided_by_its_entry(monkeypatch, as_module):
    traced = calibrate(quantize(trace(network(as_module))), [images()]).eval()
    after = grid_behind(traced)
    assert avoid_rounding_ties(traced) == []
    add_entry(monkeypatch, is_elementwise=True)
    before = after.scale.clone()
    assert avoid_rounding_ties(traced) == ["activation_quantizers.bend"]
    assert after.scale != before


@pytest.mark.parametrize("as_module", [False, True], ids=["function", "module"])
def test_forecast_gives_the_reason_of_a_new_entry(monkeypatch, as_module):
    def foreseen():
        return {
            row.name: row.reason for row in forecast_network(network(as_module), images(1)).in_float
        }

    assert foreseen() == {"bend": UNKNOWN.float_reason}
    add_entry(monkeypatch, is_elementwise=True, float_reason="bends have no integer kernel")
    assert foreseen() == {"bend": "bends have no integer kernel"}
    add_entry(monkeypatch, moves_values=True)
    assert foreseen() == {}


class Spelled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (nn.SiLU(), F.silu, "silu"),
        (nn.Sigmoid(), lambda x: x.sigmoid(), "sigmoid"),
        (nn.ReLU(), lambda x: x.relu_(), "relu"),
        (nn.Hardtanh(0.0, 6.0), lambda x: F.hardtanh(x, 0.0, max_val=6.0), "relu6"),
        (nn.Hardtanh(-2.0, 6.0), lambda x: F.hardtanh(x, -2.0, 6.0), "hardtanh"),
        (nn.Upsample(scale_factor=2), lambda x: F.interpolate(x, None, 2), "upsample"),
        (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            lambda x: F.interpolate(x, None, 2, "bilinear"),
            "unknown",
        ),
        (nn.ZeroPad2d(1), lambda x: F.pad(x, (1, 1, 1, 1)), "pad"),
        (nn.ReflectionPad2d(1), lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), "unknown"),
        (nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2), "max_pool2d"),
        (nn.Flatten(), lambda x: x.flatten(1), "flatten"),
    ],
)
def test_all_spellings_of_an_operation_have_one_entry(module, function, name):
    entries = []
    for spelling in (Spelled(module), Spelled(function)):
        traced = trace(spelling)
        # A function in place works on a copy of the network's input.
        calls = [node for node in traced.graph.nodes if node.op.startswith("call_")]
        (call,) = (node for node in calls if node.target != "clone")
        entries.append(n.operation_of(call, traced))
    assert entries[0] is entries[1]
    assert entries[0].name == name


def test_no_entry_hides_another():
    unconditional = [entry for entry in OPERATIONS if entry.when is UNKNOWN.when]
    counts = Counter(call for entry in unconditional for call in entry.calls)
    assert [call for call, count in counts.items() if count > 1] == []
    for entry in OPERATIONS:
        for call in entry.calls:
            entries = entries_for(call)
            # what has no condition comes last
            assert all(other.when is not UNKNOWN.when for other in entries[:-1])
            assert entry in entries
