"""``qat_tricks.evaluate``: the same figures for a module, its network, and the files of both."""

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, dataset, loader, trainer
from tests.helpers.nets import small_net


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A module after a fit that learns, the float network, and the folder of its files."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lit = Lit(optimizer="adam", gain=1.0).train()
    trainer(max_epochs=15).fit(lit, datamodule=Data())
    float_network = small_net(num_classes=4)
    float_network.load_state_dict(lit.backbone.state_dict())
    run = trainer(qat_tricks.recipe("int8_qat", report=False), max_epochs=1)
    run.fit(lit, datamodule=Data())
    run.save_checkpoint(folder / "model.ckpt")
    qat_tricks.export_onnx(lit.backbone, folder / "model.onnx", dataset(8)[:][0])
    return lit, float_network, folder


def test_every_form_has_the_same_figures(fitted):
    lit, float_network, folder = fitted
    val = loader(32, seed=4)
    (tested,) = trainer().test(lit, val, verbose=False)
    of_module = qat_tricks.evaluate(lit, Data(), reference=float_network)
    of_network = qat_tricks.evaluate(lit.backbone, val, reference=float_network)
    of_onnx = qat_tricks.evaluate(folder / "model.onnx", [val], reference=float_network)
    of_ckpt = qat_tricks.evaluate(str(folder / "model.ckpt"), val, module=Lit)
    figures = [(e.images, e.accuracy, e.f1, e.zeros) for e in (of_module, of_network, of_ckpt)]
    assert figures == [figures[0]] * 3
    assert of_module.accuracy == pytest.approx(tested["val_acc"])
    assert of_onnx.accuracy == of_module.accuracy > 0.5
    assert of_onnx.nll == pytest.approx(of_module.nll, abs=1e-4)
    assert of_onnx.zeros == pytest.approx(of_module.zeros, abs=1e-6)
    assert of_module.agreement == of_onnx.agreement > 0.8
    assert (of_module.quantized, of_module.layers) == (7, 7)
    assert of_ckpt.agreement is None


def test_it_prints_as_a_few_lines(fitted):
    lit, float_network, folder = fitted
    lines = str(qat_tricks.evaluate(lit, Data(), reference=float_network)).splitlines()
    assert lines[0] == "Lit on 32 images"
    assert [line.split()[0] for line in lines[1:]] == ["accuracy", "agreement", "beside", "network"]
    assert "(float " in lines[1]
    assert "7 of 7 convs and linears in integers" in lines[-1]
    alone = str(qat_tricks.evaluate(folder / "model.onnx", loader()))
    assert alone.startswith("model.onnx on 64 images")
    assert "float" not in alone


def test_a_module_stays_as_it_is_and_loaders_that_shuffle_are_gone_through_once(fitted):
    lit, _, _ = fitted
    lit.train()
    evaluation = qat_tricks.evaluate(lit, loader(shuffle=True), reference=lit)
    assert lit.training
    assert lit.backbone.training
    assert evaluation.agreement == 1
    assert evaluation.float_accuracy == evaluation.accuracy


class OfBatch(Lit):
    """A module whose ``forward`` takes a batch, which a hook of it changes."""

    def forward(self, batch):
        return {"logits": self.backbone(batch["pixels"]).log_softmax(1)}

    def on_after_batch_transfer(self, batch, _):
        return {"pixels": batch["image"] * 2}


def test_mappings_batches_and_hooks():
    lit = OfBatch()
    batches = [{"image": images, "target": labels} for images, labels in loader(32)]
    found = qat_tricks.evaluate(lit, batches)
    doubled = [(images * 2, labels) for images, labels in loader(32)]
    assert found.nll == pytest.approx(qat_tricks.evaluate(lit.backbone, doubled).nll, abs=1e-5)


def test_one_logit_is_two_classes():
    network = nn.Sequential(small_net(num_classes=1), nn.Flatten(0)).eval()
    images, labels = dataset(16)[:]
    found = qat_tricks.evaluate(network, [(images, labels % 2)])
    assert found.accuracy == ((network(images) > 0) == (labels % 2)).float().mean()


class Headless(pl.LightningModule):
    pass


@pytest.mark.parametrize(
    ("what", "loaders", "told"),
    [
        (5, [], "int cannot be evaluated: give a LightningModule"),
        ("model.pt", [], r"model.pt is neither a .onnx nor a .ckpt"),
        ("model.ckpt", [], "give module=YourLightningModule"),
        (Headless(), [], "Headless has no forward"),
        (small_net(), [], "the loader to evaluate on is empty"),
        (small_net(), 3, "int is no loader"),
        (
            small_net(),
            [torch.zeros(2, 1, 8, 8)],
            "0 of the loader is a Tensor without labels",
        ),
        (small_net(), [{"image": torch.zeros(2, 1, 8, 8)}], "dict without labels"),
        (small_net(), [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 99]))], "labels of batch 0 run"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(what, loaders, told):
    with pytest.raises(QatTricksError, match=told) as caught:
        qat_tricks.evaluate(what, loaders)
    assert "\n" not in str(caught.value)


class Normalizing(Data):
    """A data module whose hook makes of its images what the network takes."""

    def on_after_batch_transfer(self, batch, _):
        return batch[0] * 2 - 1, batch[1]


class OwnHook(Lit):
    def on_before_batch_transfer(self, batch, _):
        return batch[0] + 0.25, batch[1]

    def on_after_batch_transfer(self, batch, _):
        raise AssertionError("the data module's comes in its place")


def test_hooks_of_a_data_module_run_in_the_place_of_the_modules(tmp_path):
    def changed(change):
        return [(change(images), labels) for images, labels in loader(32, seed=4)]

    network, normalized = Lit().backbone, changed(lambda images: images * 2 - 1)
    qat_tricks.export_onnx(network, tmp_path / "net.onnx", normalized[0][0])
    expected = qat_tricks.evaluate(network, normalized).nll
    assert qat_tricks.evaluate(network, loader(32, seed=4)).nll != pytest.approx(expected, abs=1e-3)
    for what in (network, tmp_path / "net.onnx"):
        assert qat_tricks.evaluate(what, Normalizing()).nll == pytest.approx(expected, abs=1e-4)
    both = changed(lambda images: (images + 0.25) * 2 - 1)
    lit = OwnHook()
    expected = qat_tricks.evaluate(Lit(), both).nll
    assert qat_tricks.evaluate(lit, Normalizing()).nll == pytest.approx(expected, abs=1e-4)
