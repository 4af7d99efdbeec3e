"""What is logged of each layer, and that the training is the one without it."""

import csv
import math

import pytest
import torch

import qat_tricks
from qat_tricks import LogLayers
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import activation_quantizers, layers
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, trainer

LAYERS = ["stem.0", "block.conv1", "block.conv2", "depthwise.0", "left", "right", "head"]


class Kept(pl.loggers.CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        of_layers = {key: value for key, value in metrics.items() if key.startswith("layer/")}
        if of_layers:
            assert step not in self.rows
            self.rows[step] = of_layers


def fit(
    tmp_path, *callbacks, recipe="int8_prune50", data=None, lit=None, ckpt_path=None, **settings
):
    pl.seed_everything(0, verbose=False)
    lit, logger = Lit().train() if lit is None else lit, Kept(tmp_path)
    settings = {"logger": logger, **settings}
    made = trainer([*qat_tricks.recipe(recipe), *callbacks], **settings)
    made.fit(lit, datamodule=data or Data(), ckpt_path=ckpt_path)
    return lit, logger.rows


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def no_hooks(lit):
    return not any(module._forward_hooks for module in lit.backbone.modules())


def test_each_layer_and_activation_has_its_figures_in_every_nth_step(tmp_path):
    lit, rows = fit(tmp_path, LogLayers(3))
    assert [*rows] == [0, 3, 6]  # of two epochs of four steps
    activations = [name.partition(".")[2] for name in activation_quantizers(lit.backbone)]
    expected = {f"layer/{name}/weight_sparsity" for name in LAYERS}
    expected |= {
        f"layer/{name}/{figure}"
        for name in activations
        for figure in ("low", "high", "scale", "clip_rate")
    }
    assert all(row.keys() == expected for row in rows.values())
    assert rows[0]["layer/left/weight_sparsity"] < 0.1
    assert rows[6]["layer/left/weight_sparsity"] >= 0.25  # pruning goes on
    scales = [row["layer/stem_2/scale"] for row in rows.values()]
    assert len(set(scales)) == 3  # they are learned
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        last = [row for row in csv.DictReader(file) if row["layer/left/weight_sparsity"]][-1]
    assert float(last["layer/stem_2/scale"]) == scales[-1]


class Passed(pl.Callback):
    """Counts by itself what one quantizer clips in each step."""

    def __init__(self, name):
        self.name, self.rates, self.ranges = name, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        quantizer = pl_module.backbone.get_submodule(f"activation_quantizers.{self.name}")
        # narrow, so that there is something to clip
        quantizer.set_range(-0.25 if quantizer.activation is None else 0.0, 0.5)

        def note(module, given, output):
            if not torch.is_grad_enabled():  # the last step's callbacks estimate statistics
                return
            (low, high), half = module.range, float(module.scale) / 2
            x = given[0].relu() if module.activation else given[0]
            outside = [v for v in x.flatten().tolist() if v < low - half or v > high + half]
            self.rates.append(len(outside) / x.numel())
            self.ranges.append((low, high))

        self.handle = quantizer.register_forward_hook(note)

    def on_train_batch_end(self, *args):
        self.handle.remove()


@pytest.mark.parametrize("name", ["stem_2", "block_conv2", "depthwise_2"])
def test_figures_are_those_counted_one_by_one(tmp_path, name):
    passed = Passed(name)
    _, rows = fit(tmp_path, passed, LogLayers(1), recipe="int8_qat")
    logged = [row[f"layer/{name}/clip_rate"] for row in rows.values()]
    assert logged == pytest.approx(passed.rates, abs=1e-7)
    assert min(logged) > 0
    for row, (low, high) in zip(rows.values(), passed.ranges, strict=True):
        assert row[f"layer/{name}/low"] == pytest.approx(low)
        assert row[f"layer/{name}/high"] == pytest.approx(high)


def test_values_that_a_relu6_ends_are_not_clipped(tmp_path):
    class Wide(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[0].mul_(1000)

    lit, rows = fit(tmp_path, Wide(), LogLayers(1), recipe="int8_qat", data=OrderedData())
    quantizer = lit.backbone.get_submodule("activation_quantizers.depthwise_2")
    assert quantizer.activation == "relu6"
    assert rows[7]["layer/x/clip_rate"] > 0.5  # the input goes beyond its range
    quantizer.set_range(0.0, 6.0)
    _, rows = fit(tmp_path, Wide(), LogLayers(1), lit=lit, recipe="int8_qat", data=OrderedData())
    rates = [row["layer/depthwise_2/clip_rate"] for row in rows.values()]
    at_cap = [
        rate
        for rate, row in zip(rates, rows.values(), strict=True)
        if row["layer/depthwise_2/high"] > 5.98
    ]
    assert at_cap
    assert max(at_cap) == 0


def test_sparsity_and_learned_scales_of_low_bits_are_those_of_the_weights(tmp_path):
    class Weights(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = layers(pl_module.backbone)["left"]
            self.zeros = float((layer.effective_weight() == 0).float().mean())
            self.scale = float(layer.weight_quantizer.scale.mean())

    weights = Weights()
    _, rows = fit(tmp_path, weights, LogLayers(1), recipe="w4a4_qat")
    *_, last = rows.values()
    assert last["layer/left/weight_sparsity"] == pytest.approx(weights.zeros)
    assert last["layer/left/weight_scale"] == pytest.approx(weights.scale)


@pytest.mark.parametrize("recipe", ["int8_prune50", "w4a4_qat"])
@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}]
)
def test_the_training_is_the_one_without_it(tmp_path, recipe, settings):
    lit, rows = fit(tmp_path / "with", LogLayers(1), recipe=recipe, **settings)
    alone, none = fit(tmp_path / "without", recipe=recipe, **settings)
    assert rows
    assert not none
    assert same(lit, alone)
    assert no_hooks(lit)
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())


def test_a_resumed_fit_logs_the_steps_that_were_left(tmp_path):
    whole, rows = fit(tmp_path / "whole", LogLayers(3), data=OrderedData())
    keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    _, first = fit(
        tmp_path / "a", LogLayers(3), keep, data=OrderedData(), max_epochs=1,
        enable_checkpointing=True,
    )  # fmt: skip
    _, second = fit(
        tmp_path / "b", LogLayers(3), data=OrderedData(), ckpt_path=keep.last_model_path
    )
    assert [*first, *second] == [*rows] == [0, 3, 6]
    assert whole is not None


def test_one_callback_serves_a_second_fit(tmp_path):
    callback = LogLayers(5)
    assert [*fit(tmp_path / "a", callback)[1]] == [*fit(tmp_path / "b", callback)[1]] == [0, 5]


@pytest.mark.parametrize("way", ["callback", "module"])
def test_a_compiled_network_has_all_but_clip_rates_and_a_warning_says_so(tmp_path, way):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    callbacks = [qat_tricks.CompileNetwork(backend=count)] if way == "callback" else []
    lit = Lit().train()
    lit.backbone.dropout.p = 0.0
    lit = lit if way == "callback" else torch.compile(lit, backend=count)
    with pytest.warns(UserWarning, match="compiled, .* and no clip_rate"):
        _, rows = fit(tmp_path, *callbacks, LogLayers(1), lit=lit)
    assert len(graphs) == 1 if way == "callback" else graphs
    assert len(rows) == 8
    names = {key.rpartition("/")[2] for row in rows.values() for key in row}
    assert names == {"low", "high", "scale", "weight_sparsity"}


def test_a_fit_that_fails_leaves_no_hooks(tmp_path):
    class Fails(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 1:
                raise OSError("the disk is gone")
            return loss

    lit = Fails().train()
    with pytest.raises(OSError, match="the disk"):
        fit(tmp_path, LogLayers(1), lit=lit)
    assert no_hooks(lit)


def test_parts_in_evaluation_have_no_clip_rate(tmp_path):
    lit = Lit().train()
    lit.backbone.stem.eval()
    for parameter in lit.backbone.stem.parameters():
        parameter.requires_grad_(False)
    _, rows = fit(tmp_path, LogLayers(1), lit=lit, recipe="int8_qat")
    for row in rows.values():
        assert {"layer/stem_2/high", "layer/left/weight_sparsity"} <= row.keys()
        assert [key for key in row if key.endswith("/clip_rate") and "stem" in key] == []
        assert "layer/relu/clip_rate" in row


def test_what_cannot_be_logged_is_refused_in_one_line(tmp_path):
    with pytest.raises(QatTricksError, match="every_n_steps=0 is not allowed: give"):
        LogLayers(0)
    with pytest.raises(QatTricksError, match="finds no network of a recipe in Lit: give"):
        trainer([LogLayers()], logger=Kept(tmp_path)).fit(Lit().train(), datamodule=Data())
    with pytest.raises(QatTricksError, match="has no logger to log to: give"):
        fit(tmp_path, LogLayers(), logger=False)
