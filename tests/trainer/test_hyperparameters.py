"""Checkpoints of modules as people write them load as Lightning would load them."""

import argparse
import functools
import pathlib
import sys
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.checkpoints import save_checkpoint
from tests.helpers.lightning import NAME, pl
from tests.helpers.lit import Data, Lit, differences, loader, trainer
from tests.helpers.nets import images, small_net


class Base(pl.LightningModule):
    lr = 0.01

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class TakesHparams(Base):
    """The way of most projects before 2020, and of many since."""

    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.net = small_net(num_classes=self.hparams.classes)
        self.lr = self.hparams.lr


class TakesCfg(Base):
    def __init__(self, cfg):
        super().__init__()
        self.save_hyperparameters()
        self.net = small_net(num_classes=cfg.model.classes)


class Colour(Enum):
    RED = "red"


class TakesMany(Base):
    """As the templates for Hydra have it, with partials; and everything else that is harmless."""

    def __init__(self, optimizer, scheduler=None, root=None, colour=None, criterion=None, act=None):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = small_net(num_classes=4)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(self.parameters())
        return [optimizer], [self.hparams.scheduler(optimizer)]


class TakesNet(Base):
    def __init__(self, net, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = net


@dataclass
class Setting:
    width: int = 3


class TakesSetting(Base):
    def __init__(self, setting, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = small_net(num_classes=4)


def many():
    return TakesMany(
        functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1),
        pathlib.Path("data") / "images",
        Colour.RED,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.ReLU,
    )


CONFIG = {"model": {"classes": 4, "widths": [8, 16]}, "lr": "${base}", "base": 0.02, "on": True}
MODULES = {
    "namespace": lambda: TakesHparams(argparse.Namespace(classes=4, lr=0.02)),
    "dict": lambda: TakesHparams({"classes": 4, "lr": 0.02}),
    "DictConfig": lambda: TakesHparams(OmegaConf.create({"classes": 4, "lr": 0.02})),
    "numbers": lambda: TakesHparams({"classes": 4, "lr": np.float64(0.02), "on": np.bool_(True)}),
    "cfg": lambda: TakesCfg(OmegaConf.create(CONFIG)),
    "many": many,
}


def written(module, path, *, weights_only=False):
    """The end of a short fit, in a file of a trainer's."""
    run = trainer(qat_tricks.recipe("int8_qat"), max_epochs=1, limit_train_batches=1)
    run.fit(module.train(), datamodule=Data())
    run.save_checkpoint(path, weights_only=weights_only)
    return run


def is_same(loaded, module):
    return (
        differences(loaded.state_dict(), module.state_dict()) == []
        and torch.equal(loaded(images(4)), module.eval()(images(4)))
        and set(loaded.hparams) == set(module.hparams)
    )


@pytest.mark.feature(
    "hyperparameters: Namespace, DictConfig, partials, paths, Enum: no trust needed"
)
@pytest.mark.parametrize("kind", MODULES)
def test_hyperparameters_that_hold_values_load_without_trust(tmp_path, kind):
    written(module := MODULES[kind](), tmp_path / "end.ckpt")
    loaded = qat_tricks.load_from_checkpoint(type(module), tmp_path / "end.ckpt")
    assert is_same(loaded, module)
    assert type(loaded.hparams) is type(module.hparams)
    assert repr(dict(loaded.hparams)) == repr(dict(module.hparams))
    save_checkpoint(module, tmp_path / "own.ckpt")
    assert is_same(qat_tricks.load_from_checkpoint(type(module), tmp_path / "own.ckpt"), module)


@pytest.mark.parametrize("kind", ["cfg", "many"])
def test_a_run_goes_on_from_such_a_file(tmp_path, kind):
    """And a test takes it; both in trainers that were given nothing besides."""
    run = written(module := MODULES[kind](), tmp_path / "end.ckpt")
    again = trainer(qat_tricks.recipe("int8_qat"), max_epochs=2, limit_train_batches=1)
    fresh = MODULES[kind]().train()
    again.fit(fresh, datamodule=Data(), ckpt_path=tmp_path / "end.ckpt")
    assert again.global_step == 2
    assert run.global_step == 1
    tested = trainer(qat_tricks.recipe("int8_qat"))
    tested.test(other := MODULES[kind](), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert differences(other.state_dict(), module.state_dict()) == []


def test_a_given_hyperparameter_goes_before_the_saved_one(tmp_path):
    written(module := MODULES["namespace"](), tmp_path / "a.ckpt")
    loaded = qat_tricks.load_from_checkpoint(TakesHparams, tmp_path / "a.ckpt", lr=0.5)
    assert (loaded.lr, loaded.hparams.classes) == (0.5, 4)
    (tmp_path / "hparams.yaml").write_text("classes: 4\nlr: 0.25\n")
    loaded = qat_tricks.load_from_checkpoint(
        TakesHparams, tmp_path / "a.ckpt", hparams_file=tmp_path / "hparams.yaml"
    )
    assert loaded.lr == 0.25
    assert differences(loaded.state_dict(), module.state_dict()) == []
    with pytest.raises(QatTricksError, match=r"hparams_file=.*\.yaml, \.yml, \.csv"):
        qat_tricks.load_from_checkpoint(TakesHparams, tmp_path / "a.ckpt", hparams_file="a.txt")


@pytest.mark.feature(
    "hyperparameters of other classes: refused by name, loaded with weights_only=False"
)
def test_a_network_among_the_hyperparameters(tmp_path):
    module = TakesNet(small_net(num_classes=4))
    written(module, path := tmp_path / "end.ckpt")
    with pytest.raises(QatTricksError) as error:
        qat_tricks.load_from_checkpoint(TakesNet, path)
    assert str(error.value).startswith(f"{path} holds ")
    assert "give net=... to load_from_checkpoint, or pass weights_only=False" in str(error.value)
    assert "\n" not in str(error.value)
    assert "damaged" not in str(error.value)
    # without trust where it is given, and with trust from the file
    given = qat_tricks.load_from_checkpoint(TakesNet, path, net=small_net(5, num_classes=4))
    assert differences(given.state_dict(), module.state_dict()) == []
    trusted = qat_tricks.load_from_checkpoint(TakesNet, path, weights_only=False)
    for loaded in (given, trusted):
        assert torch.equal(loaded(images(4)), module.eval()(images(4)))
    run = trainer(qat_tricks.recipe("int8_qat"), max_epochs=2, limit_train_batches=1)
    run.fit(TakesNet(small_net(num_classes=4)).train(), datamodule=Data(), ckpt_path=path)
    assert run.global_step == 2


class IgnoresNet(Base):
    def __init__(self, net, *, classes, lr=0.1):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net


def test_an_argument_that_was_not_saved_is_asked_for(tmp_path):
    written(module := IgnoresNet(small_net(num_classes=4), classes=4), path := tmp_path / "a.ckpt")
    with pytest.raises(
        QatTricksError,
        match=r"IgnoresNet takes net, which .*a\.ckpt does not hold: give net=\.\.\.",
    ):
        qat_tricks.load_from_checkpoint(IgnoresNet, path)
    loaded = qat_tricks.load_from_checkpoint(IgnoresNet, path, net=small_net(3, num_classes=4))
    assert is_same(loaded, module)


def test_a_class_of_the_users_is_named(tmp_path):
    written(TakesSetting(Setting()), path := tmp_path / "end.ckpt")
    with pytest.raises(QatTricksError, match=rf"holds {__name__}\.Setting, which"):
        qat_tricks.load_from_checkpoint(TakesSetting, path)
    loaded = qat_tricks.load_from_checkpoint(TakesSetting, path, weights_only=False)
    assert loaded.hparams.setting == Setting()
    assert qat_tricks.load_from_checkpoint(TakesSetting, path, setting=None).hparams.lr == 0.1


class Holding(Lit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = Setting()

    def on_load_checkpoint(self, checkpoint):
        self.own = checkpoint["own"]


@pytest.mark.skipif(
    "weights_only" not in pl.Trainer.fit.__code__.co_varnames, reason="came with Lightning 2.6"
)
def test_what_the_modules_own_hooks_need_is_asked_for(tmp_path):
    """What stands for an object that was not read never reaches the user's code."""
    written(Holding(), path := tmp_path / "end.ckpt")
    with pytest.raises(QatTricksError, match=r"Setting, which.*weights_only=False"):
        qat_tricks.load_from_checkpoint(Holding, path)
    fresh = Holding(seed=2)
    run = trainer(qat_tricks.recipe("int8_qat"), max_epochs=2, limit_train_batches=1)
    with pytest.raises(QatTricksError, match=r"Setting, which.*weights_only=False"):
        run.fit(fresh, datamodule=Data(), ckpt_path=path)
    run.fit(Holding(seed=2).train(), datamodule=Data(), ckpt_path=path, weights_only=False)
    assert run.global_step == 2
    run = trainer(qat_tricks.recipe("int8_qat"))
    run.test(fresh, loader(), ckpt_path=path, weights_only=False, verbose=False)
    assert fresh.own == Setting()
    # of a float run, whose weights are taken over
    plain = trainer(max_epochs=1, limit_train_batches=1)
    plain.fit(Holding().train(), datamodule=Data())
    plain.save_checkpoint(path := tmp_path / "float.ckpt")
    run = trainer(qat_tricks.recipe("int8_qat"), max_epochs=1, limit_train_batches=1)
    with pytest.raises(QatTricksError, match=r"Setting, which.*weights_only=False"):
        run.fit(Holding(seed=2).train(), datamodule=Data(), ckpt_path=path)
    run.fit(fresh := Holding(seed=2).train(), datamodule=Data(), ckpt_path=path, weights_only=False)
    assert fresh.own == Setting()


def test_code_in_a_file_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    save_checkpoint(Lit(), path := tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["seed"] = Bomb()
    torch.save(checkpoint, path)
    with pytest.raises(QatTricksError, match=r"holds builtins\.print.*give seed=\.\.\."):
        qat_tricks.load_from_checkpoint(Lit, path)
    assert qat_tricks.load_from_checkpoint(Lit, path, seed=1).hparams.seed == 1


@pytest.mark.parametrize("content", [b"", b"hello, I am no checkpoint", None])
def test_a_damaged_file_is_told_from_one_that_holds_more(tmp_path, content):
    path = tmp_path / "a.ckpt"
    if content is None:
        written(MODULES["cfg"](), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    for weights_only in (None, True, False):
        with pytest.raises(QatTricksError, match="it is damaged, or no checkpoint") as error:
            qat_tricks.load_from_checkpoint(Lit, path, weights_only=weights_only)
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)
        assert len(str(error.value)) < 300 + len(str(path))


def test_a_file_that_is_open_is_refused(tmp_path):
    save_checkpoint(Lit(), path := tmp_path / "a.ckpt")
    with path.open("rb") as file, pytest.raises(QatTricksError, match="not from a BufferedReader"):
        qat_tricks.load_from_checkpoint(Lit, file)


class Loose(Lit):
    """Keeps a teacher out of its checkpoints."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "head.b" not in k}


@pytest.mark.feature("strict_loading=False: load_from_checkpoint and resume")
def test_strict_loading_of_the_module_is_heeded(tmp_path):
    module = Loose().train()
    written(module, path := tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match=r"end.ckpt lacks backbone\.head\.bias"):
        loaded = qat_tricks.load_from_checkpoint(Loose, path)
    assert differences(loaded.state_dict(), module.state_dict()) == []
    with pytest.raises(
        QatTricksError, match=r"strict=True contradicts Loose\.strict_loading=False"
    ):
        qat_tricks.load_from_checkpoint(Loose, path, strict=True)
    with pytest.raises(QatTricksError, match="does not fit Lit"):
        qat_tricks.load_from_checkpoint(Lit, path)
    qat_tricks.load_from_checkpoint(Lit, path, strict=False)
    run = trainer(qat_tricks.recipe("int8_qat"), max_epochs=2, limit_train_batches=1)
    run.fit(Loose(seed=1).train(), datamodule=Data(), ckpt_path=path)
    assert run.global_step == 2


def test_map_location_is_torchs(tmp_path):
    save_checkpoint(Lit(), path := tmp_path / "a.ckpt")
    seen = []

    def note(storage, location):
        seen.append(location)
        return storage

    qat_tricks.load_from_checkpoint(Lit, path, map_location=note)
    assert set(seen) == {"cpu"}


@pytest.mark.feature("LightningCLI's checkpoints")
def test_a_module_of_the_cli_is_made_by_it(tmp_path):
    pytest.importorskip("jsonargparse")
    save_checkpoint(lit := Lit(seed=2), path := tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    hyperparameters = checkpoint["hyper_parameters"]
    other = {"lightning.pytorch": "pytorch_lightning"}.get(NAME, "lightning.pytorch")
    for package in (NAME, other):
        checkpoint["hyper_parameters"] = {
            "_instantiator": f"{package}.cli.instantiate_module",
            "_class_path": f"{Lit.__module__}.Lit",
            **hyperparameters,
        }
        torch.save(checkpoint, path)
        for kind in (Lit, pl.LightningModule):
            loaded = qat_tricks.load_from_checkpoint(kind, path)
            assert type(loaded) is Lit
            assert torch.equal(loaded(images(2)), lit.eval()(images(2)))
    checkpoint["hyper_parameters"]["_class_path"] = "nowhere.Lit"
    torch.save(checkpoint, path)
    with pytest.raises(QatTricksError, match=r"is of nowhere\.Lit, which is not imported"):
        qat_tricks.load_from_checkpoint(Lit, path)
    checkpoint["hyper_parameters"]["_instantiator"] = "os.system"
    torch.save(checkpoint, path)
    with pytest.raises(QatTricksError, match=r"made by os\.system, which is none of Lightning's"):
        qat_tricks.load_from_checkpoint(Lit, path)
    assert "nowhere" not in sys.modules
