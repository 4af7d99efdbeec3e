"""PyTorch's exporter builds its registry once, and exports what it exports otherwise."""

import onnx
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

import qat_tricks
from qat_tricks.deploy import exporter_registry
from qat_tricks.deploy.exporter_registry import kept_registry
from qat_tricks.errors import QatTricksError


@pytest.fixture
def built(monkeypatch):
    """The opsets for which the exporter has built a registry."""
    monkeypatch.setattr(exporter_registry, "_built", {})
    own, built = _registration.ONNXRegistry.from_torchlib, []

    def build(cls, **options):
        built.append(options)
        return own(**options)

    monkeypatch.setattr(_registration.ONNXRegistry, "from_torchlib", classmethod(build))
    return built


def exported(path, opset=18):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    qat_tricks.export_onnx(net, path, torch.rand(2, 1, 4, 4), opset=opset)
    return path.read_bytes()


def test_exports_share_a_registry_and_give_the_same(built, tmp_path, monkeypatch):
    exported(tmp_path / "first.onnx")  # PyTorch registers operators when it exports first
    built.clear()
    one, other = exported(tmp_path / "one.onnx"), exported(tmp_path / "other.onnx")
    assert len(built) <= 1
    built.clear()
    monkeypatch.setattr(exporter_registry, "_BUILD", "no such part of PyTorch")
    by_itself = exported(tmp_path / "by_itself.onnx")
    assert len(built) == 1
    assert one == other == by_itself


def test_another_opset_or_more_operators_have_a_registry_of_their_own(built, tmp_path):
    exported(tmp_path / "first.onnx")
    exported(tmp_path / "a.onnx")
    built.clear()
    exported(tmp_path / "b.onnx", opset=21)
    exported(tmp_path / "c.onnx")
    assert [options["opset_version"] for options in built] == [21]
    library = torch.library.Library("qat_tricks_test", "DEF")
    library.define("nothing(Tensor x) -> Tensor")
    exported(tmp_path / "d.onnx")
    assert len(built) == 2


def test_a_file_at_another_opset_than_asked_for_is_not_kept(tmp_path, monkeypatch):
    def older(*args, opset_version, **kwargs):
        return own(*args, opset_version=opset_version - 2, **kwargs)

    own = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", older)
    with pytest.raises(QatTricksError, match=r"opset=23 cannot be written .* at 21: give 21, or"):
        exported(tmp_path / "a.onnx", opset=23)
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("opset", [20, 25])
def test_a_file_has_the_opset_asked_for(opset, tmp_path):
    exported(tmp_path / "a.onnx", opset=opset)
    versions = [entry.version for entry in onnx.load(tmp_path / "a.onnx").opset_import]
    assert versions == [opset]


def test_functions_that_an_export_enters_do_not_stay(built):
    with kept_registry():
        first = _registration.ONNXRegistry.from_torchlib(opset_version=18)
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        second = _registration.ONNXRegistry.from_torchlib(opset_version=18)
    assert len(built) == 1
    found = [len(registry.get_decomps(torch.ops.aten.relu.default)) for registry in (first, second)]
    assert found == [2, 1]


def test_others_exports_build_their_own(built):
    before = vars(_registration.ONNXRegistry)["from_torchlib"]
    with kept_registry():
        assert vars(_registration.ONNXRegistry)["from_torchlib"] is not before
    assert vars(_registration.ONNXRegistry)["from_torchlib"] is before
