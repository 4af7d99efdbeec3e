"""Weights from every form of file, and the error where they cannot be had."""

from pathlib import Path

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.models.build import build_model


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
