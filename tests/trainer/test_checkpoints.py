"""Checkpoints stand alone, float ones begin a quantized run, and Lightning's own callbacks work
beside ours.
"""

import logging

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, spec_of
from qat_tricks.trainer.checkpoints import save_checkpoint
from qat_tricks.tricks.prune import sparsity_of
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, differences, loader, trainer
from tests.helpers.nets import images
from tests.helpers.weights import zeros

needs_averaging = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6"
)


def mean():
    return pl.callbacks.WeightAveraging()


def ema():
    return pl.callbacks.EMAWeightAveraging(decay=0.7)


def swa():
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)


def fit(callbacks=(), recipe="int8_prune50", lit=None, **settings):
    lit = lit or Lit().train()
    settings = {
        "max_epochs": 3,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        **settings,
    }
    run = trainer([*qat_tricks.recipe(recipe), *callbacks], **settings)
    run.fit(lit, ResumableLoader(), loader(32, seed=4))
    return run, lit


def agrees_with_itself(lit, path):
    """Whether a checkpoint's network, rebuilt without the recipe, is that of ``lit``."""
    loaded = qat_tricks.load_from_checkpoint(Lit, path)
    return differences(loaded.state_dict(), lit.state_dict()) == [] and torch.equal(
        loaded(images(4)), lit.eval()(images(4))
    )


@pytest.mark.feature("checkpoint alone: load_from_checkpoint and test(ckpt_path), weights_only")
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "save_weights_only"])
def test_a_checkpoint_of_modelcheckpoint_stands_alone(tmp_path, weights_only):
    best = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="val_acc", mode="max", save_top_k=2, save_weights_only=weights_only
    )
    run, lit = fit([best])
    assert len(best.best_k_models) == 2
    torch.load(best.best_model_path, weights_only=True)
    run.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
    assert agrees_with_itself(lit, tmp_path / "end.ckpt")
    loaded = qat_tricks.load_from_checkpoint(Lit, best.best_model_path)
    (expected,) = trainer().validate(loaded, loader(32, seed=4), verbose=False)  # without any trick
    fresh = Lit(seed=9)
    again = trainer(qat_tricks.recipe("int8_prune50"))
    (found,) = again.test(fresh, loader(32, seed=4), ckpt_path=best.best_model_path, verbose=False)
    assert found == expected
    assert differences(fresh.state_dict(), loaded.state_dict()) == []
    (found,) = run.test(lit, loader(32, seed=4), ckpt_path="best", verbose=False)
    assert found == expected


@pytest.mark.feature("checkpoint alone: written by a trainer without our callbacks")
def test_a_quantized_module_keeps_its_spec_in_any_trainer(tmp_path):
    _, lit = fit()
    plain = trainer(max_epochs=1)
    plain.fit(lit.train(), ResumableLoader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    assert agrees_with_itself(lit, tmp_path / "plain.ckpt")


class Own(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = 3

    def on_load_checkpoint(self, checkpoint):
        self.own = checkpoint["own"]


@pytest.mark.feature("checkpoint alone: the module's own hooks")
def test_the_modules_own_checkpoint_hooks_are_kept(tmp_path):
    run, _ = fit(lit=Own().train(), max_epochs=1)
    run.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert torch.load(tmp_path / "own.ckpt", weights_only=True)["own"] == 3
    fresh = Own(seed=1)
    trainer(qat_tricks.recipe("int8_prune50")).validate(
        fresh, loader(), ckpt_path=tmp_path / "own.ckpt", verbose=False
    )
    assert fresh.own == 3


@pytest.mark.feature("float checkpoint into a quantized run (fit, validate, test)")
@pytest.mark.parametrize("kind", ["of a fit", "weights only"])
def test_a_float_checkpoint_gives_its_weights_to_a_quantized_run(tmp_path, caplog, kind):
    before = Lit(seed=4).train()
    run = trainer(max_epochs=2)
    run.fit(before, ResumableLoader())
    run.save_checkpoint(tmp_path / "float.ckpt", weights_only=kind == "weights only")

    def expected(method):
        lit = Lit(seed=4).train()
        lit.load_state_dict(before.state_dict())
        return result(method, lit, None)

    def result(method, lit, path):
        run = trainer(qat_tricks.recipe("int8_prune50"))
        pl.seed_everything(3, verbose=False)
        method(run)(lit, datamodule=Data(), ckpt_path=path)
        return run.global_step, lit.state_dict()

    for method in (lambda run: run.fit, lambda run: run.validate, lambda run: run.test):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=f"{pl.__name__}.utilities.rank_zero"):
            found = result(method, Lit(seed=5).train(), tmp_path / "float.ckpt")
        assert "holds a float network: its weights are loaded" in caplog.text
        assert differences(expected(method), found) == []


@pytest.mark.feature("float checkpoint of another network is refused")
def test_a_float_checkpoint_of_another_network_is_refused(tmp_path):
    other = Lit()
    other.backbone.head = torch.nn.Linear(16, 7)
    save_checkpoint(other, tmp_path / "other.ckpt")
    with pytest.raises(
        QatTricksError, match=r"other\.ckpt does not fit Lit: .*size mismatch for backbone\.head"
    ):
        trainer(qat_tricks.recipe("int8_ptq")).test(
            Lit(), Data(), ckpt_path=tmp_path / "other.ckpt", verbose=False
        )
    _, quantized = fit(recipe="int8_qat", max_epochs=1)
    save_checkpoint(Lit(), tmp_path / "float.ckpt")
    with pytest.raises(QatTricksError, match="this module is quantized already"):
        trainer(qat_tricks.recipe("int8_ptq")).test(
            quantized, Data(), ckpt_path=tmp_path / "float.ckpt", verbose=False
        )


def grids_are_exact(lit):
    """Whether weights are on integer grids, masks are masks and zero points integers of their
    scheme.
    """
    for layer in layers(lit.backbone).values():
        scale = layer.weight_scale(layer.deployed_weight())
        steps = layer.effective_weight() / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert steps.abs().max() <= layer.weight_quantizer.scheme.qmax + 1e-3
        assert layer.weight_mask is None or set(layer.weight_mask.unique().tolist()) <= {0.0, 1.0}
    return all(
        int(q.zero_point) == q._zero_point for q in activation_quantizers(lit.backbone).values()
    )


@pytest.mark.feature("StochasticWeightAveraging")
def test_stochastic_weight_averaging_keeps_masks_and_grids():
    _, plain = fit()
    _, lit = fit(
        [
            pl.callbacks.StochasticWeightAveraging(
                swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1
            )
        ]
    )
    assert differences(plain.state_dict(), lit.state_dict()) != []
    assert sparsity_of(layers(lit.backbone).values()) >= 0.5
    assert grids_are_exact(lit.eval())


@pytest.mark.feature("StochasticWeightAveraging: scales keep their share of the learning rate")
@pytest.mark.parametrize("rates", [0.02, [0.02]])
def test_stochastic_weight_averaging_steps_scales_in_proportion(rates):
    run, _ = fit(
        [pl.callbacks.StochasticWeightAveraging(swa_lrs=rates, swa_epoch_start=1)],
        lit=Lit(optimizer="adam").train(),
    )
    weights, scales = run.optimizers[0].param_groups
    assert (weights["swa_lr"], scales["swa_lr"]) == (0.02, pytest.approx(0.0002))


@pytest.mark.feature("WeightAveraging (mean and EMA)")
@needs_averaging
@pytest.mark.parametrize("average", [mean, ema])
def test_weight_averaging_averages_no_masks_and_no_zero_points(tmp_path, average):
    _, plain = fit()
    seen = []

    class See(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            pruned = layers(pl_module.backbone).values()
            seen.append((sparsity_of(pruned), grids_are_exact(pl_module)))

    run, lit = fit([average(), See()])
    assert differences(plain.state_dict(), lit.state_dict()) != []
    assert [exact for _, exact in seen] == [True] * len(seen)
    assert seen[-1][0] >= 0.5
    assert sparsity_of(layers(lit.backbone).values()) >= 0.5
    assert grids_are_exact(lit.eval())
    run.save_checkpoint(tmp_path / "average.ckpt")
    assert agrees_with_itself(lit, tmp_path / "average.ckpt")


@pytest.mark.feature("WeightAveraging: resume")
@needs_averaging
def test_weight_averaging_resumes_exactly(tmp_path):
    def run(seed, path=None):
        pl.seed_everything(1, verbose=False)
        lit = Lit(seed=seed).train()
        keep = pl.callbacks.ModelCheckpoint(
            dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
        )
        callbacks = [*qat_tricks.recipe("int8_prune50"), ema(), *([] if path else [keep])]
        fit = trainer(callbacks, max_epochs=3, enable_checkpointing=not path)
        fit.fit(lit, ResumableLoader(), loader(32, seed=4), ckpt_path=path)
        return lit.state_dict()

    expected = run(0)
    assert differences(expected, run(5, tmp_path / "step=6.ckpt")) == []


@pytest.mark.feature("a callback that copies the network too early is refused")
@pytest.mark.parametrize("early", [pytest.param(mean, marks=needs_averaging), swa])
def test_averages_come_after_the_recipe(early):
    with pytest.raises(QatTricksError, match="WeightAveraging after the recipe"):
        trainer([early(), *qat_tricks.recipe("int8_qat")]).fit(Lit().train(), datamodule=Data())


class Tuned(Lit):
    def __init__(self, seed=0):
        super().__init__(optimizer="adam", seed=seed)
        self.lr, self.batch_size, self.seen = 1e-3, 4, set()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(16, seed=4)

    def training_step(self, batch, index):
        self.seen.add(len(batch[0]))
        return super().training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


@pytest.mark.feature("LearningRateFinder")
def test_the_learning_rate_finder_finds_and_leaves_no_trace(tmp_path):
    class See(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            state.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    state = []
    finder = pl.callbacks.LearningRateFinder(
        num_training_steps=20, early_stop_threshold=None, min_lr=1e-5, max_lr=1e-2
    )
    for extra in ([], [finder]):
        lit = Tuned().train()
        run = trainer(
            [*qat_tricks.recipe("int8_prune50"), *extra, See()],
            max_epochs=1,
            default_root_dir=tmp_path,
        )
        run.fit(lit)
    assert differences(*state) == []
    assert lit.lr == finder.optimal_lr.suggestion() != 1e-3
    weights, scales = run.optimizers[0].param_groups
    assert (scales["lr"], scales["weight_decay"]) == (pytest.approx(0.01 * weights["lr"]), 0)


@pytest.mark.feature("BatchSizeFinder")
def test_the_batch_size_finder_changes_the_batch_size_alone(tmp_path):
    lit = Tuned().train()
    finder = pl.callbacks.BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2)
    run = trainer(
        [*qat_tricks.recipe("int8_prune50"), finder], max_epochs=1, default_root_dir=tmp_path
    )
    run.fit(lit)
    assert lit.batch_size > 4
    assert lit.batch_size in lit.seen
    assert sparsity_of(layers(lit.backbone).values()) >= 0.5


@pytest.mark.feature("gradient accumulation and clipping")
def test_accumulated_batches_are_one_large_batch():
    def end(batch_size, accumulate):
        lit = Lit().train()
        lit.backbone.dropout.p = 0.0
        few = "stages.ptq.tricks.calibrate.num_images=64"
        # A BatchNorm sees each batch by itself.
        recipe = qat_tricks.recipe("w4a8_qat", [few, "~stages.qat.tricks.restore_batchnorm"])
        run = trainer(
            recipe, max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=0.1
        )
        run.fit(lit, torch.utils.data.DataLoader(loader().dataset, batch_size=batch_size))
        return lit.state_dict()

    large, small = end(16, 1), end(4, 4)
    for key, value in large.items():
        assert torch.allclose(value.float(), small[key].float(), rtol=1e-3, atol=1e-5), key


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of ``int8_qat``."""
    path = tmp_path_factory.mktemp("trained") / "qat.ckpt"
    run = trainer(qat_tricks.recipe("int8_qat"), max_epochs=1)
    run.fit(Lit().train(), datamodule=Data())
    run.save_checkpoint(path)
    return path


def resumed(path, *overrides):
    lit = Lit().train()
    run = trainer(qat_tricks.recipe("int8_qat", overrides), max_epochs=2)
    run.fit(lit, datamodule=Data(), ckpt_path=path)
    return lit


@pytest.mark.parametrize(
    ("trick", "told"),
    [
        ("qat.tricks=prune", "of other steps than this Lit has been through"),
        ("ptq.tricks=mixed_precision", "the checkpoint was made without mixed_precision"),
    ],
)
def test_a_trick_that_comes_too_late_for_a_checkpoint_is_refused(trained, trick, told):
    with pytest.raises(QatTricksError, match=told) as caught:
        resumed(trained, f"+trick@stages.{trick}")
    assert "load it with qat_tricks.load_from_checkpoint" in str(caught.value)


def test_a_checkpoint_from_before_a_recipe_got_better_is_resumed(trained):
    with pytest.warns(UserWarning, match="gptq is left out: the checkpoint was made without gptq"):
        lit = resumed(trained, "+trick@stages.ptq.tricks=gptq")
    assert "gptq" not in spec_of(lit.backbone)["history"]
    # One that acts in training alone comes in time.
    history = spec_of(resumed(trained, "+trick@stages.qat.tricks=freeze_batchnorm").backbone)
    assert history["history"][-1] == "freeze_batchnorm"


def test_another_recipe_goes_on_from_a_loaded_checkpoint_with_its_batchnorms(trained):
    lit = qat_tricks.load_from_checkpoint(Lit, trained).train()
    run = trainer(qat_tricks.recipe("int8_qat", ["+trick@stages.qat.tricks=prune"]), max_epochs=2)
    run.fit(lit, datamodule=Data())
    assert spec_of(lit.backbone)["history"][-1] == "prune"
    assert any(layer.batchnorm is not None for layer in layers(lit.backbone).values())
    assert zeros(lit) >= 0.5
