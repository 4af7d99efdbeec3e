"""The float network: trained once for all runs with the same settings, or loaded."""

import importlib
import inspect
import sys

import pytest
import torch
from PIL import Image

from qat_tricks.jobs.baseline import cache_dir, prepare_baseline
from qat_tricks.jobs.classifier import make_classifier
from qat_tricks.jobs.datamodule import ImageDataModule, load_data
from qat_tricks.trainer.ranks import Ranks
from tests.helpers.configs import job_config
from tests.helpers.lightning import pl
from tests.helpers.nets import SmallNet

QUICK = [
    "data=fake",
    "model=custom",
    "model.factory=tests.helpers.nets.SmallNet",
    "baseline.epochs=1",
]
TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def fits(monkeypatch):
    """Counts the fits."""
    counted = []
    fit = pl.Trainer.fit

    def counting(self, *args, **kwargs):
        counted.append(self)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "fit", counting)
    return counted


def baseline(*overrides):
    """The weights after the preparation."""
    config = job_config(*QUICK, *overrides)
    data = load_data(config.data)
    module = make_classifier(config, data)
    prepare_baseline(
        config, module, ImageDataModule(data), TRAINER, Ranks(pl.Trainer(**TRAINER).strategy)
    )
    return module.network.state_dict()


def same(first, second):
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_network_is_trained_once_for_the_same_settings(fits):
    first, second = baseline(), baseline()
    assert len(fits) == 1
    assert same(first, second)
    baseline("baseline.lr=0.05")
    assert len(fits) == 2
    baseline("baseline.cache=false")
    assert len(fits) == 3
    assert len(list(cache_dir().iterdir())) == 2


def test_a_damaged_cache_is_told_and_trained_again(fits, capsys):
    baseline()
    (cached,) = cache_dir().iterdir()
    cached.write_bytes(b"cut")
    capsys.readouterr()
    baseline()
    assert len(fits) == 2
    assert "is damaged" in capsys.readouterr().err
    assert torch.load(cached, weights_only=True)


def test_weights_are_only_measured_unless_they_are_fine_tuned(fits, tmp_path):
    torch.save(baseline("seed=7"), tmp_path / "weights.pt")
    loaded = baseline(f"model.weights={tmp_path / 'weights.pt'}")
    assert len(fits) == 1
    assert same(loaded, torch.load(tmp_path / "weights.pt", weights_only=True))
    tuned = baseline(f"model.weights={tmp_path / 'weights.pt'}", "baseline.finetune=true")
    assert len(fits) == 2
    assert not same(tuned, loaded)


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(fits, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QAT_TRICKS_CACHE", str(tmp_path / "file"))
    baseline()
    assert len(fits) == 1
    assert "could not be cached" in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def images(tmp_path):
    """A folder of images in two classes, and the overrides that read it."""
    for index in range(24):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (10 * index, 0, 0)).save(path)
    return [
        "data=imagefolder",
        f"data.root={tmp_path / 'images'}",
        "data.resize=null",
        "data.crop=12",
        "data.batch_size=8",
    ]


def test_other_images_under_the_same_name_are_trained_on(fits, images, tmp_path):
    baseline(*images)
    baseline(*images)
    assert len(fits) == 1
    for path in (tmp_path / "images" / "a").iterdir():
        Image.new("RGB", (12, 12), (0, 0, 200)).save(path)
    baseline(*images)
    assert len(fits) == 2
    for index in (2, 4, 6, 8, 10):
        (tmp_path / f"images/a/{index}.png").rename(tmp_path / f"images/b/{index}.png")
    baseline(*images)
    assert len(fits) == 3


def test_a_network_whose_code_has_changed_is_trained_anew(fits, tmp_path, monkeypatch, capsys):
    source = inspect.getsource(inspect.getmodule(SmallNet))
    monkeypatch.syspath_prepend(tmp_path)

    def trained(source):
        (tmp_path / "own_nets.py").write_text(source)
        sys.modules.pop("own_nets", None)
        importlib.invalidate_caches()
        return baseline("model.factory=own_nets.SmallNet")

    trained(source)
    trained(source)
    assert len(fits) == 1
    assert "float baseline: from the cache" in capsys.readouterr().out
    trained(source.replace("torch.relu(self.left", "torch.sigmoid(self.left"))
    sys.modules.pop("own_nets", None)
    assert len(fits) == 2
