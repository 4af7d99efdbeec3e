import copy
import itertools
from importlib import import_module

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import rebuild, spec_of, trace
from qat_tricks.graph.channel_scores import CRITERIA
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.tricks import Distill, PruneChannels, prune_channels
from qat_tricks.tricks.fold_batchnorm import fold_batchnorm
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, differences, trainer
from tests.helpers.nets import images, small_net

# The package has the function under the module's name.
trick = import_module("qat_tricks.tricks.prune_channels")
SETTINGS = {"multiple": 2, "share": 0.5}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def _macs(traced, x):
    return sum(call.macs for call in macs_of_calls(traced, x))


@pytest.mark.parametrize(
    ("criterion", "scope"), itertools.product(CRITERIA, ["layer", "global", "sensitivity"])
)
def test_the_budget_is_met_and_nearly_used(criterion, scope):
    traced, x = trace(small_net()), images(64)
    whole, first = _macs(traced, x), traced(x).detach()
    entry = prune_channels(traced, [x], criterion=criterion, scope=scope, **SETTINGS)
    assert entry["macs"] == [whole, _macs(traced, x)]
    assert 0.25 * whole < _macs(traced, x) <= 0.5 * whole
    assert output_error(first, traced(x).detach()).agreement > 0.3  # of ten classes
    assert all(after % 2 == 0 for after in (g["channels"][1] for g in entry["groups"]))


def test_parameters_can_be_the_budget():
    traced, x = trace(small_net()), images(64)
    before = sum(p.numel() for p in traced.parameters())
    entry = prune_channels(traced, [x], budget="parameters", **SETTINGS)
    left = sum(p.numel() for p in traced.parameters())
    assert entry["parameters"] == [before, left]
    assert 0.3 * before < left <= 0.5 * before


def test_what_is_left_is_rebuilt_from_the_spec():
    traced, x = trace(small_net()), images(64)
    prune_channels(traced, [x], **SETTINGS)
    again = rebuild(small_net(seed=5), spec_of(traced))
    again.load_state_dict(traced.state_dict())
    assert torch.equal(again(x), traced(x))
    with pytest.raises(
        QatTricksError, match=r"of another network than SmallNet: it has no .*weight"
    ):
        rebuild(small_net(width=2), spec_of(traced))


def test_a_second_time_goes_on_from_the_first_towards_a_share_of_the_whole():
    traced, x = trace(small_net()), images(64)
    whole = _macs(traced, x)
    prune_channels(traced, [x], multiple=2, share=0.75)
    once = copy.deepcopy(spec_of(traced)["channels"])
    entry = prune_channels(traced, [x], multiple=2, share=0.4)
    assert once["macs"][1] > entry["macs"][1] == _macs(traced, x)
    assert entry["macs"][0] == whole
    assert entry["macs"][1] <= 0.4 * whole
    assert [group["channels"][0] for group in entry["groups"]] == [8, 8, 8, 8]
    again = rebuild(small_net(), spec_of(traced))
    again.load_state_dict(traced.state_dict())
    assert torch.equal(again(x), traced(x))


def test_it_is_masked_by_design_and_removed_exactly():
    work = Workbench(small_net(), lambda count: [images(64)])
    PruneChannels(**SETTINGS).apply(work)
    steps = spec_of(work.network)["equivalence"]
    masked, removed = steps[-2:]
    assert (masked["name"], masked["by_design"]) == ("channels masked", True)
    assert (removed["name"], removed["by_design"]) == ("channels removed", False)
    assert removed["evaluation_db"] > 120
    assert masked["evaluation_db"] < 60
    # Later steps are compared in training mode too, with dropout's pattern of the narrower network.
    work.keep_function("folded", lambda traced, skip: [str(p) for p in fold_batchnorm(traced)])
    assert spec_of(work.network)["equivalence"][-1]["training_db"] > 100


def test_channels_that_cannot_go_are_named():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.norm(self.conv(x).mean((2, 3))))

    with pytest.raises(QatTricksError, match=r"no channels .*\(conv: norm computes with all"):
        prune_channels(trace(Normed()), [images()])
    with pytest.raises(
        QatTricksError, match=r"no channels are left to remove \(head: it is an out"
    ):
        prune_channels(trace(small_net()), [images()], include=["head"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "mac"}, r"budget=.mac. is not allowed: .*macs"),
        ({"share": 0.0, "scope": "all"}, r"scope=.all. is not allowed: .*; share=0.0 is not"),
        ({"latency_ms": 2.0}, "latency_ms is for budget=latency, and budget is macs"),
        ({"multiple": 0}, "multiple=0 is not allowed: give 1 to 4096"),
        ({"threads": 10**11}, "threads=100000000000 is not allowed: give 1 to 1024"),
        ({"least": 1.0}, "least=1.0 is not allowed"),
        ({"include": ["stme*"]}, r'pattern "stme\*" matches no conv or linear layer'),
        ({"share": 0.01}, "share=0.01 is not allowed: the fewest channels that may stay cost"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(QatTricksError, match=message):
        prune_channels(trace(small_net()), [images()], **settings)


def test_patterns_choose_among_groups():
    traced = trace(small_net())
    entry = prune_channels(traced, [images()], share=0.995, multiple=1, include=["l*"])
    assert [group["name"] for group in entry["groups"]] == ["left"]
    traced = trace(small_net())
    # The residual stream is that of the stem, of the block's second conv and of the depthwise conv.
    entry = prune_channels(traced, [images()], share=0.7, multiple=1, exclude=["block.conv2"])
    assert [group["name"] for group in entry["groups"]] == ["block.conv1", "left", "right"]


def test_a_network_that_is_folded_already_is_refused():
    traced = trace(small_net())
    fold_batchnorm(traced)
    with pytest.raises(QatTricksError, match="put prune_channels into a stage before"):
        prune_channels(traced, [images()])
    added = qat_tricks.recipe("int8_ptq", ["+trick@stages.ptq.tricks=prune_channels"])
    names = [trick.name for trick in added]
    assert names.index("prune_channels") < names.index("fold_batchnorm")


# Files are timed ---------------------------------------------------------------------------------


class _Stopwatch:
    """Knows a network whose time is a line in its MACs, and nothing of files."""

    def __init__(self, settings, dense=4.0):
        self.settings, self.times, self.asked = settings, {"dense": dense}, []

    @property
    def wanted(self):
        return self.settings.latency_ms or self.settings.share * self.times["dense"]

    def excess(self, removed):
        share = 1 - len(removed) / 100
        self.asked.append(share)
        self.times["pruned"] = self.times["dense"] * (0.2 + 0.8 * share)
        return self.times["pruned"] / self.wanted


@pytest.mark.parametrize("wish", [{"share": 0.6}, {"latency_ms": 2.0}])
def test_a_latency_is_met_by_timing_few_networks(wish):
    stopwatch = _Stopwatch(trick.ChannelSettings(budget="latency", **wish))
    kept = trick._meet_latency(
        stopwatch, lambda share: round(100 * share), lambda n: range(100 - n)
    )
    met = 4.0 * (0.2 + 0.8 * kept / 100) / stopwatch.wanted
    assert 0.95 <= met <= 1
    assert len(stopwatch.asked) <= trick.TRIALS


def test_a_latency_that_cannot_be_met_is_told():
    stopwatch = _Stopwatch(trick.ChannelSettings(budget="latency", latency_ms=0.5))
    with pytest.raises(QatTricksError, match=r"takes .* ms .*, and 0.5 ms were asked for"):
        trick._meet_latency(stopwatch, lambda share: round(100 * share), lambda n: range(100 - n))


@pytest.mark.feature("channels removed until the int8 file is as fast as is asked for")
def test_the_files_of_a_network_are_timed(monkeypatch):
    monkeypatch.setattr(trick, "SECONDS", 0.05)
    traced = trace(small_net())
    entry = prune_channels(
        traced, [images(64)], budget="latency", latency_ms=1000.0, multiple=1, threads=1
    )
    assert len(entry["latency_ms"]) == 2
    assert all(0 < milliseconds < 1000 for milliseconds in entry["latency_ms"])
    assert entry["macs"][1] > 0.5 * entry["macs"][0]  # there was time for more than was tried first


# In a trainer ------------------------------------------------------------------------------------


def _callbacks(*more):
    return [PruneChannels(num_images=32, **SETTINGS), Distill(), *more]


@pytest.mark.feature("channels removed: resumes to the bit, loads strictly by itself")
def test_a_resumed_fit_ends_to_the_bit_like_one_that_ran_through(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    run = trainer(_callbacks(keep), max_epochs=2, enable_checkpointing=True)
    lit = Lit()
    run.fit(lit, ResumableLoader())
    assert lit.backbone.block.conv1.out_channels < 8
    other = Lit(seed=2)
    trainer(_callbacks(), max_epochs=2).fit(
        other, ResumableLoader(), ckpt_path=tmp_path / "step=5.ckpt"
    )
    assert differences(dict(lit.state_dict()), dict(other.state_dict())) == []
    loaded = qat_tricks.load_from_checkpoint(Lit, tmp_path / "step=8.ckpt")
    x = images(8)
    assert torch.equal(loaded.eval()(x), lit.eval()(x))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_optimizer_made_before_goes_on_with_what_is_left(optimizer):
    class Early(Lit):
        def __init__(self):
            super().__init__(optimizer)
            self.made = Lit.configure_optimizers(self)

        def configure_optimizers(self):
            return self.made

    lit = Early()
    before = copy.deepcopy(lit.backbone.head.weight.detach())
    trainer(_callbacks(), max_epochs=1).fit(lit, ResumableLoader())
    assert lit.backbone.head.weight.shape[1] < before.shape[1]
    again = copy.deepcopy(lit.backbone.head.weight.detach())
    trainer([], max_epochs=1).fit(lit, ResumableLoader())
    assert not torch.equal(again, lit.backbone.head.weight)


def test_the_recipe_of_a_latency_narrows_and_quantizes(monkeypatch):
    monkeypatch.setattr(trick, "SECONDS", 0.05)
    lit = Lit()
    wish = "stages.channels.tricks.prune_channels"
    settings = ["stages.channels.epochs=1", f"{wish}.latency_ms=1000", f"{wish}.threads=1"]
    recipe = load_recipe("int8_latency", settings)
    qat_tricks.run_stages(lit, Data(), recipe, trainer=QUIET)
    dense, pruned = spec_of(lit.backbone)["channels"]["latency_ms"]
    assert 0 < pruned < 1000
    assert 0 < dense < 1000
    assert spec_of(lit.backbone)["history"][0] == "prune_channels"
    assert "calibrate" in spec_of(lit.backbone)["history"]


@pytest.mark.feature("int8_channels50 in the user's own module, exported as it is simulated")
def test_the_recipe_gives_a_narrow_int8_network_that_runs_as_simulated(tmp_path):
    lit = Lit()
    settings = ["stages.channels.epochs=1", "stages.channels.tricks.prune_channels.multiple=2"]
    recipe = load_recipe("int8_channels50", settings)
    qat_tricks.run_stages(lit, Data(), recipe, trainer={**QUIET, "max_steps": -1})
    channels = spec_of(lit.backbone)["channels"]
    assert channels["macs"][1] <= 0.5 * channels["macs"][0]
    report = qat_tricks.export_onnx(lit.backbone, tmp_path / "narrow.onnx", images(32))
    assert report.max_abs_error == 0
    # And so does one whose channels were removed by hand, before it is quantized.
    traced = trace(small_net(num_classes=4))
    prune_channels(traced, [images(32)], **SETTINGS)
    by_hand = qat_tricks.quantize(traced, [images(32)])
    assert qat_tricks.export_onnx(by_hand, tmp_path / "by_hand.onnx", images(32)).max_abs_error == 0
    dense = qat_tricks.quantize(small_net(num_classes=4), [images(32)])
    qat_tricks.export_onnx(dense, tmp_path / "dense.onnx", images(32))
    sizes = [(tmp_path / name).stat().st_size for name in ("narrow.onnx", "dense.onnx")]
    assert sizes[0] < sizes[1]
