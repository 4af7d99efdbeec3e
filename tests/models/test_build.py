"""Networks by name, their weights, and what the reader is told when either cannot be had."""

import inspect
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.models.build import build_model, model_names, register_models, register_timm_models

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_cifar_resnets_have_the_published_size_and_trace(name, parameters):
    net = build_model(name, num_classes=10).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    traced = torch.fx.symbolic_trace(net)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(traced(images), net(images))
    assert net(images).shape == (2, 10)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(calls) == len(set(calls)), "a module is used twice"


def test_cifar_shortcut_takes_every_second_pixel_and_pads_both_sides():
    block = build_model("resnet20", num_classes=10).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    images = torch.rand(1, 16, 8, 8) + 0.1
    out = block(images)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0
    assert out[:, 24:].abs().sum() == 0


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


def save(tmp_path: Path, content: object) -> str:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("wrap", ["bare", "lightning", "with-loss", "without-counters"])
def test_weights_load_from_every_form_of_file(tmp_path, wrap):
    source = build_model("resnet20", num_classes=10)
    state = source.state_dict()
    content = {
        "bare": state,
        "lightning": {"state_dict": {f"net.{k}": v for k, v in state.items()}, "epoch": 3},
        "with-loss": {
            "state_dict": {f"model.{k}": v for k, v in state.items()}
            | {"loss.weight": torch.ones(10)}
        },
        "without-counters": {k: v for k, v in state.items() if "num_batches" not in k},
    }[wrap]
    loaded = build_model("resnet20", num_classes=10, weights=save(tmp_path, content))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_weights_for_other_classes_get_a_message_of_their_own(tmp_path):
    path = save(tmp_path, build_model("resnet20", num_classes=100).state_dict())
    with pytest.raises(QatTricksError, match=r"for 100 classes, the data has 10\b") as caught:
        build_model("resnet20", num_classes=10, weights=path)
    assert path in str(caught.value)


def test_weights_of_another_network_name_the_keys(tmp_path):
    path = save(tmp_path, build_model("resnet56", num_classes=10).state_dict())
    with pytest.raises(QatTricksError, match=r"unexpected \(layer1\.3\.conv1\.weight"):
        build_model("resnet20", num_classes=10, weights=path)
    path = save(tmp_path, build_model("resnet20", num_classes=10, in_channels=1).state_dict())
    with pytest.raises(
        QatTricksError, match=r"conv1\.weight \[16, 1, 3, 3\] instead of \[16, 3, 3, 3\]"
    ):
        build_model("resnet20", num_classes=10, weights=path)


def test_a_checkpoint_with_two_such_networks_is_refused(tmp_path):
    state = build_model("resnet20", num_classes=10).state_dict()
    both = {f"{part}.{key}": value for part in ("net", "teacher") for key, value in state.items()}
    with pytest.raises(QatTricksError, match=r"net\., teacher\."):
        build_model("resnet20", num_classes=10, weights=save(tmp_path, {"state_dict": both}))


@pytest.mark.parametrize("fault", ["missing", "truncated", "text", "no-state-dict", "whole-module"])
def test_unusable_files_are_one_line_that_names_them(tmp_path, fault):
    net = build_model("resnet20", num_classes=10)
    path = Path(
        save(tmp_path, {"whole-module": net, "no-state-dict": [1, 2]}.get(fault, net.state_dict()))
    )
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "text":
        path.write_text("these are not the weights you are looking for")
    with pytest.raises(QatTricksError) as caught:
        build_model("resnet20", num_classes=10, weights=str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


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
