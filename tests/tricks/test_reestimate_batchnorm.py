import copy

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.tricks import ReestimateBatchnorm, fold_batchnorm, reestimate_batchnorm
from qat_tricks.tricks.reestimate_batchnorm import _beyond_chance
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, OrderedData, loader, trainer
from tests.helpers.nets import images, small_net

UNFOLDED = [
    "~stages.ptq.tricks.fold_batchnorm",
    "~stages.ptq.tricks.equalize",
    "~stages.ptq.tricks.correct_bias",
]


def norms(network):
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }


def averages(network, batches):
    """The plain average over ``batches`` of each BatchNorm's batch means and variances.

    The BatchNorms normalize by the batch while they are estimated, dropout does nothing.
    """
    seen = {name: [] for name in norms(network)}
    handles = [
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(
                (inputs[0].mean([0, 2, 3]), inputs[0].var([0, 2, 3]))
            )
        )
        for name, norm in norms(network).items()
    ]
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    network.eval()
    for norm in norms(network).values():
        norm.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for handle in handles:
        handle.remove()
    network.load_state_dict(kept)
    network.eval()
    return {
        name: [torch.stack(values).mean(0) for values in zip(*pairs, strict=True)]
        for name, pairs in seen.items()
    }


def assert_statistics(network, expected):
    for name, norm in norms(network).items():
        mean, variance = expected[name]
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5, msg=name)


def test_statistics_are_the_plain_average_over_the_batches():
    traced = trace(small_net())
    batches = [images(16, seed=5), images(16, seed=6) * 3, images(16, seed=7) + 1]
    expected = averages(traced, batches)
    reestimate_batchnorm(traced, batches)
    assert_statistics(traced, expected)


def test_a_rest_of_a_few_images_does_not_count():
    batches = [images(16, seed=5), images(16, seed=6), images(1, seed=7) * 50]
    traced, without = trace(small_net()), trace(small_net())
    reestimate_batchnorm(traced, batches)
    reestimate_batchnorm(without, batches[:2])
    assert torch.equal(norms(traced)["stem.1"].running_var, norms(without)["stem.1"].running_var)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_statistics_changes(training):
    traced = trace(small_net()).train(training)
    momenta = [norm.momentum for norm in norms(traced).values()]
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    reestimate_batchnorm(traced, [images()])
    assert traced.training == training
    assert all(norm.training == training for norm in norms(traced).values())
    assert [norm.momentum for norm in norms(traced).values()] == momenta == [0.1] * 4
    for key, value in traced.state_dict().items():
        is_statistic = "running" in key or "num_batches" in key
        assert is_statistic != torch.equal(before[key], value), key


def test_errors():
    with pytest.raises(QatTricksError, match="no images to re-estimate"):
        reestimate_batchnorm(trace(small_net()), [])
    folded = trace(small_net())
    fold_batchnorm(folded)
    with pytest.raises(QatTricksError, match="no BatchNorm is left to re-estimate"):
        reestimate_batchnorm(folded, [images()])
    with pytest.raises(QatTricksError, match="one image is too few to re-estimate BatchNorm on"):
        reestimate_batchnorm(trace(small_net()), [images(1)])
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten()).eval()
    with pytest.raises(QatTricksError, match=r"in a batch of 1 image\(s\).*give larger batches"):
        reestimate_batchnorm(trace(pooled), [images(1), images(1)])
    with pytest.raises(QatTricksError, match="num_images=0 is not allowed"):
        ReestimateBatchnorm(num_images=0)


def as_the_network_sees():
    """``Lit.forward`` halves the images before the network."""
    return [0.5 * batch[0] for batch in loader(64)]


def test_without_training_it_is_done_at_once_with_the_quantizers_on():
    recipe = qat_tricks.recipe(
        "int8_ptq",
        # All images count for what is expected, and none is held out.
        [*UNFOLDED, "+trick@recipe.stages.ptq.tricks=reestimate_batchnorm", "prove=false"],
    )
    lit = Lit()
    trainer(recipe).validate(lit, OrderedData(), verbose=False)
    assert all(layer.weight_quantizer for layer in layers(lit.backbone).values())
    assert_statistics(lit.backbone, averages(lit.backbone, as_the_network_sees()))
    assert not torch.allclose(
        lit.backbone.get_submodule("stem.0.batchnorm").running_mean,
        small_net().stem[1].running_mean,
    )


class Count(pl.Callback):
    """Notes after each epoch how many batches the statistics are made of."""

    def __init__(self):
        self.batches = []

    def on_train_epoch_end(self, trainer, pl_module):
        norm = pl_module.backbone.get_submodule("stem.0.batchnorm")
        self.batches.append(int(norm.num_batches_tracked))


def test_in_a_fit_it_is_done_once_at_the_end_of_the_last_epoch():
    recipe = qat_tricks.recipe(
        "int8_qat", [*UNFOLDED, "+trick@recipe.stages.qat.tricks=reestimate_batchnorm"]
    )
    lit, count = Lit().train(), Count()
    trainer([*recipe, count], max_epochs=3).fit(lit, datamodule=OrderedData())
    assert count.batches == [4, 8, 4]  # not 12: they were estimated anew
    assert_statistics(lit.backbone, averages(lit.backbone, as_the_network_sees()))


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 6


@pytest.mark.parametrize(
    ("settings", "callbacks"),
    [
        ({"max_steps": 6}, []),
        ({"max_steps": 6, "max_epochs": -1}, []),
        ({"max_epochs": 9}, [Stop()]),
    ],
    ids=["steps", "steps alone", "stopped"],
)
def test_in_a_fit_that_ends_otherwise_it_is_done_too(settings, callbacks):
    recipe = qat_tricks.recipe(
        "int8_qat", [*UNFOLDED, "+trick@recipe.stages.qat.tricks=reestimate_batchnorm"]
    )
    lit = Lit().train()
    trainer([*recipe, *callbacks], **settings).fit(lit, datamodule=OrderedData())
    assert_statistics(lit.backbone, averages(lit.backbone, as_the_network_sees()))


def test_running_statistics_that_chance_explains_are_kept_and_lagging_ones_are_not():
    def spoiled(by):
        network = trace(small_net())
        reestimate_batchnorm(network, [images(64, seed=seed) for seed in range(20)])
        truth = {name: norm.running_mean.clone() for name, norm in norms(network).items()}
        for norm in norms(network).values():
            norm.running_mean.add_(by * norm.running_var.sqrt())
        return network, truth

    def error(network, truth):
        return sum(
            float(((norm.running_mean - truth[name]).square() / norm.running_var).sum())
            for name, norm in norms(network).items()
        )

    few = [images(8, seed=seed) for seed in (31, 32, 33)]
    network, _ = spoiled(0.0)
    network.get_submodule("block.bn1").running_var[0] = float("nan")
    reestimate_batchnorm(network, few, keep_certain=True)
    assert all(norm.running_var.isfinite().all() for norm in norms(network).values())
    for by in (0.0, 0.5):
        kept, truth = spoiled(by)
        before = error(kept, truth)
        plain = copy.deepcopy(kept)
        reestimate_batchnorm(kept, few, keep_certain=True)
        reestimate_batchnorm(plain, few)
        if by == 0.0:
            assert error(kept, truth) < 0.7 * error(plain, truth)
        else:
            assert error(kept, truth) < 0.3 * before


def test_an_empty_batch_does_not_count():
    traced, without = trace(small_net()), trace(small_net())
    reestimate_batchnorm(traced, [images(8)[:0], images(8)], keep_certain=True)
    reestimate_batchnorm(without, [images(8)], keep_certain=True)
    assert torch.equal(norms(traced)["stem.1"].running_var, norms(without)["stem.1"].running_var)


def settled(seeds):
    """A network whose statistics are those of many images."""
    network = trace(small_net())
    reestimate_batchnorm(network, [images(64, seed=seed) for seed in seeds])
    return network


@pytest.mark.parametrize("sizes", [(64,), (48, 16), (32, 32), (2,), (3, 3)])
def test_few_large_batches_tell_what_chance_is_too(sizes):
    network = settled(range(20))
    plain = copy.deepcopy(network)
    batches = [images(size, seed=40 + i) for i, size in enumerate(sizes)]
    before = norms(network)["stem.1"].running_mean.clone()
    reestimate_batchnorm(network, batches, keep_certain=True)
    reestimate_batchnorm(plain, batches)
    moved = (norms(network)["stem.1"].running_mean - before).norm()
    assert moved < 0.5 * (norms(plain)["stem.1"].running_mean - before).norm()


def test_each_channel_moves_by_itself():
    """One that is uncertain hides no other's lag, and one that is dead moves no other."""
    old = torch.zeros(2, 5, dtype=torch.float64)
    old[1] = 1.0
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 2, 5, generator=drawn, dtype=torch.float64)
    by_batch = old + 0.02 * noise
    by_batch[:, 0, 0] += 50 * noise[:, 0, 0]  # it rarely fires
    by_batch[:, 0, 1] += 0.5  # its statistics lag
    by_batch[:, :, 2] = 0.0  # it has died
    moved = _beyond_chance(old, by_batch, 1e-5) - old
    new = by_batch.mean(0) - old
    torch.testing.assert_close(moved[:, 1:3], new[:, 1:3], rtol=0.2, atol=0.01)
    assert moved[0, 3:].abs().max() < 0.5 * new[0, 3:].abs().max()
    assert abs(moved[0, 0]) < 0.5 * abs(new[0, 0])
