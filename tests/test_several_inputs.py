"""Networks with several inputs, from ``quantize`` and a trainer to the exported file."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat_tricks
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.device import measure_device
from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.deploy.parity.runtimes import parity, predictor
from qat_tricks.deploy.runtimes.network import random_batch
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.metrics import evaluate_classifier
from qat_tricks.graph import (
    activation_quantizers,
    float_mode,
    layers,
    note_integers,
    rebuild,
    spec_of,
    trace,
)
from qat_tricks.jobs.artifact import load_artifact
from qat_tricks.trainer.ranks import _first
from qat_tricks.tricks import (
    Calibrate,
    calibrate,
    fold_batchnorm,
    quantize,
    reestimate_batchnorm,
    tune_ranges,
)
from tests.helpers import several
from tests.helpers.lightning import pl
from tests.helpers.lit import differences, trainer
from tests.helpers.several import (
    KINDS,
    FlatLit,
    Gated,
    Lit,
    Siamese,
    Tokens,
    TwoImages,
    inputs,
    loader,
    network,
)

NAMES = {
    TwoImages: ["crop", "whole"],
    Gated: ["image", "metadata"],
    Tokens: ["ids", "mask", "image"],
    Siamese: ["input", "other"],
}
SHAPES = {kind: [tuple(values.shape[1:]) for values in inputs(kind, 1)] for kind in KINDS}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """By kind: the float network, the quantized one, the path of its file, and its parity."""

    def deploy(kind):
        net, path = network(kind), tmp_path_factory.mktemp(kind.__name__) / "model.onnx"
        quantized = qat_tricks.quantize(net, [inputs(kind, 64)])
        report = qat_tricks.export_onnx(
            quantized, path, inputs(kind, 2), images=[inputs(kind, 128, 7)]
        )
        return net, quantized, path, report

    return {kind: deploy(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_in_integers_close_to_float_and_run_as_simulated(kind, deployed):
    net, quantized, path, report = deployed[kind]
    assert (report.top1_agreement, report.images) == (1.0, 128)
    assert report.sqnr_db > 80
    assert {row.name.removesuffix("_1") for row in report.layers} >= set(NAMES[kind]) - {
        "ids",
        "mask",
    }
    expected = net(*inputs(kind, 64)).detach()
    error = (quantized(*inputs(kind, 64)) - expected).square().mean() / expected.square().mean()
    assert error < 0.001  # 30 dB
    measured, seen = integer_coverage(path, SHAPES[kind]), forecast_network(net, inputs(kind, 1))
    assert (measured.integer_macs, measured.total_macs) == (seen.integer_macs, seen.total_macs)
    assert measured.coverage == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_an_input_for_each_argument_with_any_number_of_images(kind, deployed):
    _, quantized, path, _ = deployed[kind]
    given = onnx.load(path).graph.input
    assert [value.name for value in given] == NAMES[kind]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in given} == {"batch"}
    session = open_session(path)
    for count in (1, 5):
        logits = run_batch(session, *(values.numpy() for values in inputs(kind, count, 9)))
        with torch.no_grad():
            np.testing.assert_allclose(
                logits, quantized(*inputs(kind, count, 9)).numpy(), atol=1e-5
            )
    with pytest.raises(
        QatTricksError,
        match=rf"1 inputs given, the ONNX network takes {len(NAMES[kind])} \({NAMES[kind][0]}, ",
    ):
        run_batch(session, inputs(kind, 1)[0].numpy())


class ByKeyword(Siamese):
    """Calls its layers with their input as a keyword."""

    def forward(self, first, *, second):
        a, b = ((self.stem(input=image)).mean([2, 3]) for image in (first, second))
        return self.fc(input=torch.cat([a, b], 1))


def test_inputs_and_layers_inputs_by_keyword(tmp_path):
    torch.manual_seed(0)
    net, batch = ByKeyword().eval(), inputs(Siamese, 64)
    quantized = qat_tricks.quantize(net, [{"second": batch[1], "first": batch[0]}])
    expected = net(batch[0], second=batch[1]).detach()
    assert (
        quantized(batch[0], second=batch[1]) - expected
    ).square().mean() < 0.001 * expected.square().mean()
    assert qat_tricks.export_onnx(quantized, tmp_path / "m.onnx", batch).sqnr_db > 80


def test_what_is_no_float_has_no_quantizer_and_keeps_its_type(deployed):
    _, quantized, path, _ = deployed[Tokens]
    assert "image" in spec_of(quantized)["activations"]
    assert not {"ids", "mask", "unsqueeze"} & set(spec_of(quantized)["activations"])
    assert [spec.dtype for spec in input_specs(open_session(path))] == [
        np.int64,
        np.int64,
        np.float32,
    ]
    # Without having seen them, place_quantizers takes a mask for a float: its file is refused.
    unseen = calibrate(quantize(trace(network(Tokens))), [inputs(Tokens, 16)])
    with pytest.raises(QatTricksError, match=r'"activation_quantizers.mask" is given torch.int64'):
        qat_tricks.export_onnx(unseen, path.with_name("unseen.onnx"), inputs(Tokens, 2))


def test_first_layers_of_all_inputs_keep_eight_bits():
    traced = quantize(trace(network(TwoImages)), weight_bits=4, activation_bits=4)
    bits = {name: layer.weight_quantizer.scheme.bits for name, layer in layers(traced).items()}
    assert bits == {"left.0": 8, "right.0": 8, "last.0": 4, "fc": 8}


def test_a_batchnorm_that_follows_one_layer_at_each_call_is_folded(deployed):
    net, quantized, _, _ = deployed[Siamese]
    assert spec_of(quantized)["folded"] == [["stem.0.0", "stem.0.1"], ["stem.1.0", "stem.1.1"]]
    folded, batch = trace(copy.deepcopy(net)), inputs(Siamese, 8)
    assert len(fold_batchnorm(folded)) == 2
    torch.testing.assert_close(folded(*batch), net(*batch))

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, a, b):
            return self.fc((self.norm(self.conv(a)) + self.conv(b)).mean([2, 3]))

    once = trace(Once().eval())
    before = once(*batch)
    assert fold_batchnorm(once) == []
    assert torch.equal(once(*batch), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_rebuilds_the_network(kind, deployed):
    _, quantized, _, _ = deployed[kind]
    rebuilt = rebuild(network(kind, seed=5), spec_of(quantized)).eval()
    rebuilt.load_state_dict(quantized.state_dict())
    assert torch.equal(rebuilt(*inputs(kind, 8)), quantized(*inputs(kind, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_tuned_where_gradients_do_not_reach_the_inputs(kind):
    batches = [inputs(kind, 32), inputs(kind, 32, 1)]
    traced = note_integers(trace(network(kind)), batches[0])
    quantize(traced, weight_bits=8, activation_bits=3, first_last_bits=None)
    calibrate(traced, batches, estimator="minmax", share_residuals=False)
    before = {name: quantizer.range for name, quantizer in activation_quantizers(traced).items()}

    def error():
        with float_mode(traced), torch.no_grad():
            expected = traced(*batches[0])
        with torch.no_grad():
            return float((traced(*batches[0]) - expected).square().mean())

    first = error()
    tune_ranges(traced, batches)
    assert before != {
        name: quantizer.range for name, quantizer in activation_quantizers(traced).items()
    }
    assert error() < first


def test_batchnorm_is_reestimated_on_all_inputs():
    traced, batch = trace(network(TwoImages)), inputs(TwoImages, 64, 5)
    reestimate_batchnorm(traced, [batch])
    norm = traced.get_submodule("right.1")
    torch.testing.assert_close(
        norm.running_mean, traced.get_submodule("right.0")(batch[1]).mean([0, 2, 3])
    )


def test_a_default_stays_as_it_is_and_the_float_network_is_exported_too(tmp_path):
    net = network(Gated)
    assert qat_tricks.export_onnx(net, tmp_path / "fp32.onnx", inputs(Gated, 3)).sqnr_db > 80
    assert [value.name for value in onnx.load(tmp_path / "fp32.onnx").graph.input] == [
        "image",
        "metadata",
    ]


def test_an_example_that_does_not_fit_is_one_line(deployed, tmp_path):
    _, quantized, _, _ = deployed[TwoImages]
    crop, whole = inputs(TwoImages, 2)
    bad = (
        (crop, "a batch holds 1"),
        ((crop, whole[:1]), "one entry"),
        ((crop[:0], whole[:0]), "at least one"),
    )
    for example, message in bad:
        with pytest.raises(QatTricksError, match=message):
            qat_tricks.export_onnx(quantized, tmp_path / "m.onnx", example)
    assert not any(tmp_path.iterdir())

    class Logits(nn.Linear):
        def forward(self, x, logits):
            return super().forward(x + logits)

    with pytest.raises(QatTricksError, match='an input called "logits"'):
        qat_tricks.export_onnx(
            Logits(3, 2), tmp_path / "m.onnx", (torch.ones(2, 3), torch.ones(2, 3))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_costs_and_metrics_are_measured_with_a_shape_an_input(kind, deployed):
    _, quantized, path, _ = deployed[kind]
    settings = {"batch_size": 2, "threads": 1, "runs": 5, "max_seconds": 0.1}
    costs = measure_device({"int8": path}, SHAPES[kind], **settings)
    assert costs["int8_coverage"] == 1.0
    assert costs["latency_ms"]["int8"]["p50"] > 0
    assert costs["memory_mib"]["int8"] > 15
    given = random_batch(input_specs(open_session(path)), SHAPES[kind], 3)
    assert [values.shape for values in given] == [(3, *shape) for shape in SHAPES[kind]]
    batches, predict = (
        [(inputs(kind, 32, 3), torch.arange(32) % 4)],
        predictor(path, 1, "onnxruntime"),
    )
    simulated, real = (evaluate_classifier(each, batches, 4) for each in (quantized, predict))
    assert torch.equal(simulated.predictions, real.predictions)
    assert parity(predict, quantized, batches, against="simulated")["sqnr_db"] > 80
    with pytest.raises(
        QatTricksError, match=f"1 inputs given, the ONNX network takes {len(NAMES[kind])}"
    ):
        measure_latency({"m": path}, image_shape=SHAPES[kind][0], threads=1)


def test_openvino_takes_them_too(deployed):
    pytest.importorskip("openvino")
    _, quantized, path, _ = deployed[TwoImages]
    given = [values.numpy() for values in inputs(TwoImages, 64, 9)]
    opened = open_network(path, threads=1, runtime="openvino")
    assert [spec.name for spec in opened.specs] == NAMES[TwoImages]
    with torch.no_grad():
        expected = quantized(*inputs(TwoImages, 64, 9)).numpy()
    assert (opened.prepare(*given)().argmax(1) == expected.argmax(1)).mean() > 0.95
    with pytest.raises(QatTricksError, match="1 inputs given, the ONNX network takes 2"):
        opened.prepare(given[0])


def test_evaluate_and_train_refuse_them_in_one_line(deployed):
    _, _, path, _ = deployed[TwoImages]
    with pytest.raises(
        QatTricksError, match=r"model.onnx takes 2 inputs \(crop, whole\), and the data sets"
    ):
        load_artifact(path)
    from qat_tricks.models.build import build_model

    with pytest.raises(
        QatTricksError, match=r"network of 2 inputs \(crop, whole\), and the data sets"
    ):
        build_model("custom", factory="tests.helpers.several.TwoImages", num_classes=4)


def fit(folder, recipe="int8_prune50", ckpt_path=None, module=None, batches=None, epochs=2, seed=0):
    torch.manual_seed(11)
    lit = (module or Lit)(seed=seed).train()
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, every_n_train_steps=4, filename="{step}"
    )
    run = trainer([*qat_tricks.recipe(recipe), keep], max_epochs=epochs, enable_checkpointing=True)
    run.fit(lit, batches or loader(), ckpt_path=ckpt_path)
    run.save_checkpoint(folder / "end.ckpt")
    return lit


@pytest.mark.parametrize(("module", "flat"), [(Lit, False), (FlatLit, True)])
def test_a_trainer_calibrates_on_what_the_network_sees(module, flat):
    lit = module(gain=0.5).train()
    trainer(qat_tricks.recipe("int8_qat"), max_epochs=1, limit_train_batches=1).fit(
        lit, loader(flat)
    )
    seen = activation_quantizers(lit.backbone)
    crop, whole = several.Nested().inputs
    for name, values in (("crop", crop * 0.5), ("whole", whole)):
        high = seen[f"activation_quantizers.{name}"].range[1]
        assert 0.7 * values.max() < high < 1.1 * values.max()


def test_training_learns_distils_prunes_and_the_checkpoint_loads(tmp_path):
    lit, nested = fit(tmp_path, epochs=6).eval(), several.Nested()
    with torch.no_grad():
        before, after = (
            F.cross_entropy(each(nested.inputs), nested.labels) for each in (Lit(), lit)
        )
    assert after < 0.9 * before
    assert "distill" in spec_of(lit.backbone)["applied"]
    zeros = (
        torch.cat([layer.effective_weight().flatten() for layer in layers(lit.backbone).values()])
        == 0
    )
    assert zeros.float().mean() >= 0.5
    loaded = qat_tricks.load_from_checkpoint(Lit, tmp_path / "end.ckpt", seed=5)
    assert differences(loaded.state_dict(), lit.state_dict()) == []
    report = qat_tricks.export_onnx(
        loaded.backbone, tmp_path / "m.onnx", nested.inputs, images=loader()
    )
    assert (report.top1_agreement, report.images) == (1.0, 64)
    assert report.sqnr_db > 80


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")

    def never(*args):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(Calibrate, "apply", never)
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=4.ckpt", seed=5)
    assert differences(whole.state_dict(), resumed.state_dict()) == []


class Data(several.pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    test_dataloader = train_dataloader


def test_without_a_fit_and_in_stages():
    for gain in (0.5, 1.0):  # the module scales an input before the network sees it
        tested, staged = Lit(gain=gain), Lit(gain=gain)
        trainer(qat_tricks.recipe("int8_ptq")).test(tested, Data(), verbose=False)
        qat_tricks.run_stages(staged, Data(), "int8_ptq")
        assert differences(tested.backbone.state_dict(), staged.backbone.state_dict()) == []
    plain = qat_tricks.quantize(network(TwoImages), loader())
    assert differences(plain.state_dict(), staged.backbone.state_dict()) == []


def test_a_batch_that_the_step_does_not_take_is_one_line():
    nested = several.Nested()
    short = DataLoader(TensorDataset(nested.inputs[0], nested.labels), batch_size=16)
    for module, batches, message in (
        (Lit, loader(flat=True), "Lit.training_step fails .*too many values"),
        (FlatLit, DataLoader([((nested.inputs[0][0],), 0)] * 4, batch_size=2), "not enough values"),
        (Lit, short, "Lit.training_step fails .*too many values"),
    ):
        with pytest.raises(QatTricksError, match=message):
            trainer(qat_tricks.recipe("int8_qat"), max_epochs=1).fit(module().train(), batches)


def test_of_several_processes_the_first_takes_whole_batches_until_it_has_enough():
    taken = _first([inputs(TwoImages, 4, seed) for seed in range(3)], 7)
    assert [[len(values) for values in batch] for batch in taken] == [[4, 4], [4, 4]]


def test_a_network_is_left_as_it_was():
    net = network(TwoImages)
    before = copy.deepcopy(net.state_dict())
    qat_tricks.quantize(net, [inputs(TwoImages, 16)])
    assert differences(before, net.state_dict()) == []
