"""Exporters of torch's and Lightning's, on modules that hold a quantized network."""

import copy

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import images

EXPORT = r'write it with qat_tricks\.export_onnx\(%s, "model\.onnx", example\)'


class WithExample(Lit):
    def __init__(self):
        super().__init__()
        self.example_input_array = images(2)


def fitted(recipe="int8_qat", lit=None, **settings):
    run = trainer(qat_tricks.recipe(recipe), max_epochs=1, limit_train_batches=1, **settings)
    run.fit(lit := (lit or WithExample()).train(), datamodule=Data())
    return lit


@pytest.mark.feature("TensorBoardLogger(log_graph=True)")
def test_tensorboard_logs_the_graph(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path, log_graph=True)
    lit = fitted(logger=logger)
    assert lit.training
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["graph"]
    nodes = " ".join(node.name for node in events.Graph().node)
    assert "backbone" in nodes
    assert "activation_quantizers" in nodes


def test_tracing_changes_no_gradients():
    lit = fitted().eval()
    traced = torch.jit.trace(lit.backbone, images(2))
    assert torch.equal(traced(images(2)), lit.backbone(images(2)))
    lit.backbone(images(2)).sum().backward()
    assert lit.backbone.stem[0].weight.grad is not None


@pytest.mark.feature("to_onnx and to_torchscript: refused with the line that exports")
@pytest.mark.parametrize("training", [True, False])
def test_exporters_name_ours(tmp_path, training):
    lit = fitted().train(training)
    for module in (lit, copy.deepcopy(lit)):
        for export in (module.to_onnx, module.to_torchscript):
            with pytest.raises(QatTricksError, match=EXPORT % r"module\.backbone") as error:
                export(tmp_path / "model", images(2))
            assert "\n" not in str(error.value)
    for scripted in (lit, lit.backbone):
        with pytest.raises(QatTricksError, match=EXPORT % "network"):
            torch.jit.script(scripted)
    with pytest.raises(QatTricksError, match=EXPORT % "network"):
        torch.onnx.export(lit.backbone, (images(2),), tmp_path / "a.onnx", dynamo=False)
    assert list(tmp_path.iterdir()) == []
    assert qat_tricks.export_onnx(lit.backbone, tmp_path / "a.onnx", images(2)).top1_agreement == 1


class OwnExport(Lit):
    def to_onnx(self, path):
        return qat_tricks.export_onnx(self.backbone, path, images(2))


def test_a_users_own_method_is_left_alone(tmp_path):
    assert fitted(lit=OwnExport()).to_onnx(tmp_path / "a.onnx").top1_agreement == 1


def test_a_float_network_is_exported_as_ever(tmp_path):
    lit = fitted("fp32").eval()
    lit.to_onnx(tmp_path / "a.onnx", images(2), dynamo=False)
    assert (tmp_path / "a.onnx").stat().st_size > 0
