"""Folded layers get a BatchNorm back: the same in evaluation and in the file, alive in training."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import as_layer, is_layer, layers, rebuild, spec_of, trace
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.trainer.module import workbench_of
from qat_tricks.tricks import equalize, fold_batchnorm, reestimate_batchnorm, restore_batchnorm
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, dataset, trainer
from tests.helpers.nets import images, small_net


def quantized(net=None, recipe="int8_ptq", count=64):
    """The network after a recipe's PTQ stage, with the batches that it saw."""
    work = Workbench(net or small_net(), lambda _: [images(count)])
    load_recipe(recipe).stages[0].apply(work)
    return work.network.eval()


def restored(recipe="int8_ptq", which="folded"):
    network = quantized(recipe=recipe)
    before = copy.deepcopy(network)
    names = restore_batchnorm(network, [images(64)], which=which)
    return network, before, names


@pytest.mark.parametrize("recipe", ["int8_ptq", "w4a4_qat"])
def test_evaluation_is_what_it_was(recipe):
    network, before, names = restored(recipe)
    assert names == ["stem.0", "block.conv1", "block.conv2", "depthwise.0"]
    new = images(32, seed=5)
    with torch.no_grad():
        assert torch.allclose(network(new), before(new), atol=1e-4)
    for name in names:
        old, layer = before.get_submodule(name), network.get_submodule(name)
        scale = layer.weight_scale(layer.deployed_weight())
        integers = torch.round(layer.effective_weight() / scale)
        assert torch.equal(
            integers, torch.round(old.effective_weight() / old.weight_scale(old.masked_weight()))
        )


@pytest.mark.parametrize("which", ["folded", "all"])
def test_the_statistics_are_those_of_the_outputs(which):
    network, _, names = restored(which=which)
    assert ("left" in names) == ("right" in names) == (which == "all")
    assert "head" not in names  # a linear
    # On the same images, training normalizes by what evaluation has as running statistics.
    network.dropout.p = 0.0
    expected = network(images(64)).detach()
    frozen = copy.deepcopy(network).train()
    assert torch.allclose(frozen(images(64)), expected, atol=0.05)


def test_weights_have_the_norm_that_they_had_before_folding():
    float_net = trace(small_net())
    norms = {n: m.weight.flatten(1).norm(dim=1) for n, m in layers_of(float_net).items()}
    network, before, names = restored()
    for name in names:
        weight, folded = (net.get_submodule(name).weight for net in (network, before))
        assert torch.allclose(weight.flatten(1).norm(dim=1), norms[name], rtol=1e-4)
        assert not torch.allclose(folded.flatten(1).norm(dim=1), norms[name], rtol=0.1)


def layers_of(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def shaken(network):
    """The network after training has moved everything, with a negative gain among the rest."""
    torch.manual_seed(3)
    network.train()
    for _ in range(3):
        network(images(32, seed=7))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(torch.empty_like(module.weight).uniform_(0.5, 1.5))
            module.weight.data[0].neg_()
            module.weight.data[1] = 0.0
            module.bias.data.add_(0.1 * torch.randn_like(module.bias))
    return network.eval()


@pytest.mark.parametrize("recipe", ["int8_ptq", "w4a8_qat"])
def test_the_file_is_the_simulation_to_the_last_bit(recipe, tmp_path):
    network = shaken(restored(recipe)[0])
    report = qat_tricks.export_onnx(network, tmp_path / "m.onnx", images(8), images=[images(64)])
    assert report.top1_agreement == 1.0
    assert all(tensor.differing == 0 for tensor in report.layers)


def test_integers_are_those_of_training_where_the_gain_is_negative():
    network = shaken(restored("w4a8_qat")[0])
    layer = network.get_submodule("block.conv1")
    weight, quantizer = layer.masked_weight(), layer.weight_quantizer
    trained = torch.round(quantizer(weight) / quantizer.current_scale(weight))
    scale = layer.weight_scale(layer.deployed_weight())
    deployed = torch.round(layer.effective_weight() / scale)
    sign = layer.batchnorm.weight.sign().view(-1, 1, 1, 1)
    assert sign.min() < 0
    assert torch.equal(deployed, trained * sign)


def test_folding_for_good_changes_nothing():
    network = shaken(restored("w4a8_qat")[0])
    folded = copy.deepcopy(network)
    for layer in layers(folded).values():
        layer.make_deployed()
    assert all(layer.batchnorm is None for layer in layers(folded).values())
    with torch.no_grad():
        assert torch.equal(folded(images()), network(images()))


def test_a_network_is_rebuilt_with_its_batchnorms():
    network = shaken(restored("w4a8_qat")[0])
    again = rebuild(small_net(seed=9), spec_of(network))
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), network(images()))


def test_what_the_user_froze_stays_frozen():
    net = small_net().train()
    net.stem[1].eval()  # held in evaluation mode
    net.block.bn1.requires_grad_(False)
    traced = trace(net)
    fold_batchnorm(traced)
    for name in ("stem.0", "block.conv1", "block.conv2"):
        as_layer(traced.get_submodule(name))
    names = restore_batchnorm(traced, [images(32)])
    assert names == ["block.conv1", "block.conv2"]
    flags = {name: traced.get_submodule(name).batchnorm.weight.requires_grad for name in names}
    assert flags == {"block.conv1": False, "block.conv2": True}


class Twice(nn.Module):
    """Calls a conv and its BatchNorm for two inputs of different statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.last, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        one, other = (torch.relu(self.bn(self.conv(part))) for part in (x, 3 * x + 1))
        return self.bn2(self.last(one + other)).mean((2, 3))


def test_a_layer_that_is_called_twice_stays_folded():
    """Each call would be normalized by statistics of its own, for which one gain does not do."""
    traced = trace(Twice().eval())
    fold_batchnorm(traced)
    for name in ("conv", "last"):
        as_layer(traced.get_submodule(name))
    assert restore_batchnorm(traced, [images(32)]) == ["last"]


def test_wrong_settings_are_refused():
    with pytest.raises(QatTricksError, match='which="some" is not allowed: give folded or all'):
        restore_batchnorm(trace(small_net()), [images()], which="some")
    with pytest.raises(QatTricksError, match="no images"):
        restore_batchnorm(trace(small_net()), [])


def one_step(network, lr=0.1):
    """One step of plain SGD, as a trainer makes it."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, weight_decay=0.01)
    network(images(64)).square().mean().backward()
    optimizer.step()


def plain_net():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 64, 5),
    )


def normalized_net():
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 64, 5),
    )
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0  # running statistics are those of the last batch
    net.train()(images(64))
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            # Of the batch as it is normalized, and not corrected for its size.
            module.running_var.mul_(1 - 1 / (64 * 64))
            module.momentum = 0.1
    return net


@pytest.mark.parametrize("make", [plain_net, normalized_net])
def test_a_step_has_the_effect_that_it_has_on_the_float_network(make):
    net = make()
    traced = trace(copy.deepcopy(net).eval())
    fold_batchnorm(traced)
    pairs = equalize(traced, [images(64)], absorb_bias=False)
    assert len(pairs) == 3
    for name in ("0", "2", "3", "4", "5", "6", "7", "8"):
        if is_layer(module := dict(traced.named_modules()).get(name)):
            as_layer(module)
    without = copy.deepcopy(traced)
    restore_batchnorm(traced, [images(64)])
    for network in (net, traced, without):
        one_step(network)
    expected, ours, folded = (network.train()(images(64)) for network in (net, traced, without))
    assert torch.allclose(ours, expected, atol=2e-3 * float(expected.abs().max()))
    assert not torch.allclose(folded, expected, atol=2e-2 * float(expected.abs().max()))


class Digest(pl.Callback):
    """Notes whether running statistics move and gains learn."""

    def on_train_start(self, trainer, pl_module):
        self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_end(self, trainer, pl_module):
        self.moved = {
            key
            for key, value in pl_module.state_dict().items()
            if not torch.equal(value, self.before[key])
        }


@pytest.mark.parametrize("early", [False, True])
def test_in_a_fit_gains_learn_whenever_the_optimizer_was_made(early):
    class Early(Lit):
        def __init__(self):
            super().__init__()
            self.made = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

        def configure_optimizers(self):
            return self.made

    digest = Digest()
    lit = (Early() if early else Lit()).train()
    trainer([*qat_tricks.recipe("int8_qat"), digest], max_epochs=1).fit(lit, datamodule=Data())
    ours = {key for key in digest.before if ".batchnorm." in key}
    assert len(ours) == 4 * 5
    assert ours <= digest.moved


class Augmented(OrderedData):
    """Trains on images that are brighter than those it is calibrated on."""

    def train_dataloader(self):
        images, labels = dataset().tensors
        return DataLoader(TensorDataset(3 * images + 1, labels), batch_size=16)

    def calibration_loader(self, num_images):
        return super().train_dataloader()


class Compare(pl.Callback):
    """Compares evaluation and training mode on training images when the fit begins, and ends it."""

    def on_train_start(self, trainer, pl_module):
        network = copy.deepcopy(pl_module.backbone)
        network.dropout.p = 0.0
        inputs = torch.cat([images for images, _ in trainer.datamodule.train_dataloader()])
        inputs = pl_module.hparams.gain * inputs
        with torch.no_grad():
            outputs, expected = network.train()(inputs), network.eval()(inputs)
        self.apart = (outputs - expected).abs().max() / expected.std()
        trainer.should_stop = True


def test_statistics_are_those_of_training_images_as_they_are_augmented():
    compare, lit = Compare(), Lit().train()
    trainer([*qat_tricks.recipe("int8_qat"), compare], max_epochs=1).fit(lit, Augmented())
    assert compare.apart < 0.05


class Stream(IterableDataset):
    """Goes on where it stopped, as what can be read only once does."""

    def __init__(self):
        self.left = iter(list(dataset()))

    def __iter__(self):
        return self.left


@pytest.mark.parametrize("averages", [False, True])
def test_a_fit_on_a_stream_that_is_used_up_ends_well_and_says_so(averages):
    if averages and not hasattr(pl.callbacks, "WeightAveraging"):
        pytest.skip("came with Lightning 2.6")

    class Streamed(Augmented):
        stream = Stream()

        def train_dataloader(self):
            return DataLoader(self.stream, batch_size=16)

    few = "stages.qat.tricks.restore_batchnorm.num_images=16"
    lit = Lit().train()
    recipe = qat_tricks.recipe("int8_qat", [few], report=False)
    callbacks = [*recipe, pl.callbacks.EMAWeightAveraging(decay=0.5)] if averages else recipe
    run = trainer(callbacks, max_epochs=1)
    with pytest.warns(UserWarning, match="keeps its running statistics.*training loader is empty"):
        run.fit(lit, Streamed())
    assert run.global_step == 3


class Drifts(pl.Callback):
    """Spoils the statistics in each step, and may stop the fit."""

    def __init__(self, stops):
        self.stops = stops

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.backbone.stem[1].running_mean.fill_(100.0)
        trainer.should_stop = self.stops and trainer.global_step >= 2


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("reestimate", [False, True])
def test_statistics_are_estimated_anew_when_a_fit_ends_by_itself_or_is_stopped(stops, reestimate):
    override = f"stages.qat.tricks.restore_batchnorm.reestimate={reestimate}"
    lit = Lit().train()
    recipe = qat_tricks.recipe("int8_qat", [override])
    trainer([*recipe, Drifts(stops)], max_epochs=2, min_epochs=None).fit(lit, datamodule=Data())
    mean = lit.backbone.stem[1].running_mean
    assert (mean.abs().max() < 10) == reestimate


@pytest.mark.skipif(not hasattr(pl.callbacks, "WeightAveraging"), reason="came with Lightning 2.6")
@pytest.mark.parametrize("stops", [False, True])
def test_statistics_of_an_averaged_network_are_its_own(stops):
    """In the last validation, which judges it, and at the end."""

    class Watch(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            self.validated = pl_module.backbone.stem[1].running_mean.clone()

    lit, watch = Lit().train(), Watch()
    recipe = qat_tricks.recipe("w4a4_qat")
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    run = trainer([*recipe, Drifts(stops), average, watch], max_epochs=2, min_epochs=None)
    run.fit(lit, datamodule=OrderedData())
    norm = lit.backbone.stem[1]
    if not stops:
        assert torch.equal(watch.validated, norm.running_mean)
    found = norm.running_mean.clone(), norm.running_var.clone()
    reestimate_batchnorm(lit.backbone, workbench_of(lit).batches(512))
    estimate = norm.running_mean, norm.running_var
    torch.testing.assert_close(found, estimate, rtol=0.05, atol=0.05)


def test_without_training_nothing_is_restored():
    lit = Lit().train()
    trainer(qat_tricks.recipe("int8_qat", ["stages.qat.epochs=0"])).test(lit, datamodule=Data())
    assert all(layer.batchnorm is None for layer in layers(lit.backbone).values())


def test_a_later_stage_begins_with_what_is_deployed():
    network, _, _ = restored()
    shaken(network)
    work = Workbench(network, lambda _: [images(32)])
    with torch.no_grad():
        expected = network(images())
        work.begin_stage()
        assert torch.equal(work.network(images()), expected)
    assert all(layer.batchnorm is None for layer in layers(work.network).values())
    assert "batchnorm" not in str(spec_of(work.network)["layers"])
