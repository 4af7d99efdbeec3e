"""Networks by name, their weights, and what the reader is told when either cannot be had."""

import inspect
import sys
import urllib.error

import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.models.build import build_model, model_names, register_models, register_timm_models
from tests.helpers import ROOT

CONF = ROOT / "conf"


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1", "googlenet"])
def test_torchvision_networks_take_other_channels_and_classes(name):
    net = build_model(name, num_classes=7, in_channels=1)
    assert net.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    reference = (
        torchvision.models.get_model(name, weights=None, init_weights=False)
        if name == "googlenet"
        else None
    )
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 1
    if reference is not None:
        assert any(key.startswith("aux1") for key in reference.state_dict())
        assert not any(key.startswith("aux1") for key in net.state_dict())


def test_adapted_first_conv_keeps_its_other_settings():
    theirs = torchvision.models.resnet18(weights=None).conv1
    ours = build_model("resnet18", num_classes=3, in_channels=4).conv1
    for setting in ("out_channels", "kernel_size", "stride", "padding"):
        assert getattr(ours, setting) == getattr(theirs, setting)
    assert ours.bias is None


@pytest.mark.parametrize(
    ("given", "near"), [("resnet21", '"resnet20"'), ("mobilnet_v2", '"mobilenet_v2"')]
)
def test_unknown_names_are_told_the_nearest(given, near):
    with pytest.raises(QatTricksError, match=near):
        build_model(given, num_classes=10)


def test_misspelt_torchvision_weights_are_told_the_nearest():
    with pytest.raises(QatTricksError, match='"IMAGENET1K_V1"'):
        build_model("mobilenet_v2", num_classes=1000, weights="IMAGENET_V1")


def test_torchvision_weights_need_their_classes_and_channels():
    with pytest.raises(QatTricksError, match="has 1000 classes, the data has 10"):
        build_model("mobilenet_v2", num_classes=10, weights="IMAGENET1K_V1")
    with pytest.raises(QatTricksError, match="3 channels, the data has 1"):
        build_model("mobilenet_v2", num_classes=1000, in_channels=1, weights="DEFAULT")


def test_failed_download_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(
        QatTricksError, match=r"cannot download the weights of squeezenet1_1.*no route"
    ):
        build_model("squeezenet1_1", num_classes=1000, weights="DEFAULT")


FACTORIES = """
from torch import nn
def linear(num_classes, in_channels): return nn.Linear(in_channels, num_classes)
def fixed(): return nn.Linear(2, 3)
def needy(depth): return nn.Linear(depth, depth)
def no_network(**options): return options
word = "network"
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_networks"
    sys.modules.pop("my_networks", None)


def test_custom_networks_are_given_what_they_take(factories):
    net = build_model("custom", num_classes=5, in_channels=2, factory=f"{factories}.linear")
    assert net.weight.shape == (5, 2)
    assert build_model("custom", num_classes=5, factory=f"{factories}.fixed").weight.shape == (3, 2)


@pytest.mark.parametrize("attribute", ["absent", "needy", "no_network", "word"])
def test_factories_that_are_none_are_named(factories, attribute):
    with pytest.raises(QatTricksError, match=f"{factories}.{attribute}"):
        build_model("custom", num_classes=5, factory=f"{factories}.{attribute}")


@pytest.mark.parametrize(
    ("name", "factory"), [("custom", None), ("resnet20", "os.path.join"), ("custom", "x")]
)
def test_factory_and_the_name_custom_go_together(name, factory):
    with pytest.raises(QatTricksError, match="factory"):
        build_model(name, num_classes=5, factory=factory)


def test_timm_networks_by_name():
    pytest.importorskip("timm")
    net = build_model("timm/resnet18", num_classes=5, in_channels=1).eval()
    assert net(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    assert "timm/resnet18" in model_names()
    with pytest.raises(QatTricksError, match='"timm/resnet18"'):
        build_model("timm/resnet18x", num_classes=5)
    with pytest.raises(QatTricksError, match="has 1000 classes, the data has 5"):
        build_model("timm/resnet18", num_classes=5, weights="pretrained")


def test_missing_timm_is_told_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(QatTricksError, match=r'pip install "qat_tricks\[timm\]"'):
        build_model("timm/resnet18", num_classes=5)
    assert not any(name.startswith("timm/") for name in model_names())


@pytest.fixture
def config_store():
    """Hydra's store as the command line finds it, and as it was afterwards."""
    before = dict(ConfigStore.instance().repo.get("model", {}))
    yield
    ConfigStore.instance().repo["model"] = before


def keys_of_build_model() -> set[str]:
    return {"name", *inspect.signature(build_model).parameters} - {"num_classes", "in_channels"}


def compose_model(choice: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(overrides=[f"+model={choice}"]), resolve=True)[
            "model"
        ]


@pytest.mark.parametrize(
    "choice", ["resnet20", "resnet56", "custom", "mobilenet_v2", "timm/resnet18"]
)
def test_every_network_has_its_config(config_store, choice):
    register_models()
    if choice.startswith("timm/"):
        pytest.importorskip("timm")
        register_timm_models()
    assert compose_model(choice) == {"name": choice, "weights": None, "factory": None}
    assert set(compose_model(choice)) == keys_of_build_model()


def test_every_torchvision_classifier_is_registered(config_store):
    register_models()
    stored = {name.removesuffix(".yaml") for name in ConfigStore.instance().list("model")}
    assert stored >= set(torchvision.models.list_models(module=torchvision.models))
