"""The README's and CONTRIBUTING's code runs as it stands."""

import re
import sys

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import qat_tricks
from qat_tricks.graph import layers
from qat_tricks.settings.config_dir import config_dir
from tests.helpers import ROOT
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, loader, trainer
from tests.helpers.nets import images, small_net


def _block(file, language, place=0):
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), flags=re.S)
    block = blocks[place]
    lines = block.splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[indent:] for line in lines) + "\n"


def test_readme_shows_purpose_install_and_a_run_within_forty_lines():
    top = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "pip install -e ." in top
    assert "python train.py recipe=int8_prune50" in top


def test_readmes_lines_run(tmp_path, monkeypatch):
    code = _block("README.md", "python")
    code = code.replace("import pytorch_lightning as pl", f"import {pl.__name__} as pl")
    assert len(code.splitlines()) < 20
    monkeypatch.chdir(tmp_path)
    scope = {
        "module": Lit().train(),
        "datamodule": Data(),
        "example": images(2),
        "net": small_net(),
        "loader": loader(),
    }
    exec(code, scope)
    assert scope["report"].top1_agreement >= 0.99
    weights = torch.cat(
        [layer.effective_weight().flatten() for layer in layers(scope["module"].backbone).values()]
    )
    assert (weights == 0).float().mean() >= 0.5
    assert isinstance(scope["trainer"], pl.Trainer)
    assert scope["quantized"](images(2)).shape == (2, 10)


def test_readmes_config_instantiates_to_a_recipe():
    config = OmegaConf.create(_block("README.md", "yaml"))
    (callback,) = [instantiate(entry) for entry in config.callbacks.values()]
    lit = Lit().train()
    trainer([callback]).fit(lit, datamodule=Data())
    weights = [layer.effective_weight().flatten() for layer in layers(lit.backbone).values()]
    assert 0.3 <= (torch.cat(weights) == 0).float().mean() < 0.4


def test_readmes_config_for_lightningcli_parses_to_a_recipe():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--trainer.callbacks", type=list[pl.Callback])
    config = parser.parse_string(_block("README.md", "yaml", 1))
    (callback,) = parser.instantiate_classes(config).trainer.callbacks
    assert isinstance(callback, qat_tricks.Recipe)
    assert callback.name == "int8_qat"


@pytest.fixture
def toy_trick(tmp_path, monkeypatch):
    """The trick of CONTRIBUTING in its own folders."""
    import qat_tricks.tricks

    package, conf = tmp_path / "tricks", tmp_path / "conf"
    package.mkdir()
    (package / "my_trick.py").write_text(_block("CONTRIBUTING.md", "python"))
    for path in config_dir().rglob("*.yaml"):
        copy = conf / path.relative_to(config_dir())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (conf / "trick" / "my_trick.yaml").write_text(_block("CONTRIBUTING.md", "yaml"))
    monkeypatch.setattr(qat_tricks.tricks, "__path__", [*qat_tricks.tricks.__path__, str(package)])
    for module in [m for m in sys.modules.values() if getattr(m, "config_dir", None) is config_dir]:
        monkeypatch.setattr(module, "config_dir", lambda: conf)
    yield
    sys.modules.pop("qat_tricks.tricks.my_trick", None)


@pytest.mark.usefixtures("toy_trick")
def test_a_trick_in_three_files():
    assert OmegaConf.load(config_dir() / "trick" / "my_trick.yaml").my_trick.factor == 1.0
    added = "+trick@recipe.stages.ptq.tricks=my_trick"
    plain = qat_tricks.quantize(small_net(), [images()])
    same = qat_tricks.quantize(small_net(), [images()], overrides=[added])
    assert torch.equal(plain(images()), same(images()))
    zero = qat_tricks.quantize(
        small_net(), [images()], overrides=[added, "recipe.stages.ptq.tricks.my_trick.factor=0.0"]
    )
    assert all((layer.effective_weight() == 0).all() for layer in layers(zero).values())
    with pytest.raises(qat_tricks.QatTricksError, match="needs quantize"):
        qat_tricks.quantize(
            small_net(), [images()], overrides=[added, "~recipe.stages.ptq.tricks.quantize"]
        )
