"""Networks that a module makes in ``setup`` or ``configure_model``, as Lightning's users do."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.trainer.checkpoints import save_checkpoint
from qat_tricks.trainer.own_hooks import OwnHook
from qat_tricks.tricks import Calibrate
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, ResumableLoader, differences, loader, trainer
from tests.helpers.nets import images, small_net

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def net(seed, num_classes=4):
    """A network in training mode, without seeding the generator of what follows."""
    with torch.random.fork_rng():
        return small_net(seed, num_classes=num_classes).train()


class Later(Lit):
    """Has no network until a hook makes it."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        del self.backbone
        self.made = []

    def make(self, where):
        self.made.append(where)
        self.backbone = net(self.hparams.seed)


class InConfigureModel(Later):
    def configure_model(self):
        if not hasattr(self, "backbone"):
            self.make("configure_model")


class InConfigureModelAnew(Later):
    """Makes the network whenever it is called, which Lightning advises against."""

    def configure_model(self):
        self.make("configure_model")


class InSetup(Later):
    """Makes the network anew for each run."""

    def setup(self, stage):
        self.make(stage)


class InSetupOnce(Later):
    def setup(self, stage=None):
        if not self.made:
            self.make(stage)


class InBoth(Later):
    """Counts in one hook what the other needs."""

    def setup(self, stage):
        self.classes = 4

    def configure_model(self):
        self.made.append("configure_model")
        self.backbone = net(self.hparams.seed, self.classes)


KINDS = [InConfigureModel, InConfigureModelAnew, InSetup, InSetupOnce, InBoth]
ALONE = KINDS[:-1]  # those whose checkpoints load without a trainer


def expected(run):
    """The weights of a module that makes its network in ``__init__``, after the same run."""
    lit = Lit().train()
    lit.backbone.train()
    run(lit)
    return dict(lit.state_dict())


def fit(lit, recipe="int8_prune50", path=None, callbacks=(), **settings):
    pl.seed_everything(5, verbose=False)
    settings = {"max_epochs": 2, "enable_checkpointing": bool(callbacks), **settings}
    run = trainer([*qat_tricks.recipe(recipe), *callbacks], **settings)
    run.fit(lit, ResumableLoader(), loader(32, seed=4), ckpt_path=path)
    return run


@pytest.mark.feature("a network made in setup or configure_model")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_finds_the_network_and_lightning_does_not_replace_it(kind):
    lit = kind().train()
    fit(lit)
    assert len(lit.made) == 1
    assert all(layer.weight_quantizer for layer in layers(lit.backbone).values())
    assert differences(expected(fit), dict(lit.state_dict())) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_before_any_fit_and_stages(kind):
    def test(lit):
        trainer(qat_tricks.recipe("int8_ptq")).test(lit, OrderedData(), verbose=False)

    def stages(lit):
        pl.seed_everything(5, verbose=False)
        qat_tricks.run_stages(lit, OrderedData(), "int8_qat", trainer={**QUIET, "max_steps": 6})

    for run in (test, stages):
        lit = kind().train()
        run(lit)
        assert differences(expected(run), dict(lit.state_dict())) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["int8_prune50", None])
def test_runs_after_the_fit_keep_the_quantized_network(kind, recipe):
    lit = kind().train()
    fit(lit)
    before = copy.deepcopy(dict(lit.state_dict()))
    callbacks = [] if recipe is None else qat_tricks.recipe(recipe)
    for method in ("validate", "test"):
        getattr(trainer(callbacks), method)(lit, Data(), verbose=False)
        assert differences(before, dict(lit.state_dict())) == []
    # each hook is the module's own again, and is called in each run
    assert not any(hook.skip for hook in vars(lit).values() if isinstance(hook, OwnHook))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(callbacks, max_epochs=1).fit(lit.train(), ResumableLoader())
    told = any("has made backbone anew" in str(w.message) for w in warned)
    assert told == (kind in (InSetup, InConfigureModelAnew, InBoth))
    assert layers(lit.backbone)["head"].weight_quantizer is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_fit_ends_as_one_that_was_not_stopped(kind, tmp_path, monkeypatch):
    whole = kind().train()
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    fit(whole, callbacks=[keep])

    def never(*args):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(Calibrate, "apply", never)
    resumed = kind(seed=3).train()
    fit(resumed, path=tmp_path / "step=3.ckpt")
    assert differences(dict(whole.state_dict()), dict(resumed.state_dict())) == []


@pytest.mark.parametrize("kind", ALONE)
def test_a_checkpoint_loads_without_a_trainer(kind, tmp_path):
    lit = kind().train()
    fit(lit).save_checkpoint(tmp_path / "a.ckpt")
    loaded = qat_tricks.load_from_checkpoint(kind, tmp_path / "a.ckpt")
    assert differences(dict(loaded.state_dict()), dict(lit.state_dict())) == []
    assert torch.equal(loaded(images(4)), lit.eval()(images(4)))
    trainer().test(loaded, Data(), verbose=False)
    assert differences(dict(loaded.state_dict()), dict(lit.state_dict())) == []
    floats = kind()
    floats.make("here")
    save_checkpoint(floats, tmp_path / "float.ckpt")
    loaded = qat_tricks.load_from_checkpoint(kind, tmp_path / "float.ckpt")
    assert differences(dict(loaded.state_dict()), dict(floats.state_dict())) == []


def test_a_setup_that_needs_a_trainer_is_told_when_loading(tmp_path):
    class NeedsTrainer(Later):
        def setup(self, stage):
            self.make(self.trainer.max_epochs)

    lit = NeedsTrainer().train()
    fit(lit).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        QatTricksError, match="NeedsTrainer makes backbone in setup, which fails without a trainer"
    ):
        qat_tricks.load_from_checkpoint(NeedsTrainer, tmp_path / "a.ckpt")


def test_hooks_are_called_again_after_a_run_that_broke_off():
    class Break(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("broken off")

    lit = InSetup().train()
    with pytest.raises(RuntimeError, match="broken off"):
        fit(lit, recipe="int8_qat", callbacks=[Break()])
    with pytest.warns(UserWarning, match="has made backbone anew"):
        fit(lit, recipe="int8_qat")
    assert lit.made == ["fit", "fit"]


def test_a_hook_that_was_put_on_the_object_is_called():
    lit = Later().train()
    lit.configure_model = lambda: setattr(lit, "backbone", net(0))
    fit(lit, recipe="int8_qat")
    assert isinstance(layers(lit.backbone)["head"], nn.Linear)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda lit: pickle.loads(pickle.dumps(lit))])
def test_a_copy_of_the_module_has_hooks_of_its_own(make):
    lit = InSetup().train()
    fit(lit, recipe="int8_qat")
    other = make(lit)
    network = other.backbone
    trainer().test(other, Data(), verbose=False)
    assert other.backbone is network is not lit.backbone
    assert (lit.made, other.made) == (["fit"], ["fit", "test"])
