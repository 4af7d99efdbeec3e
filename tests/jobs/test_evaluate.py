"""Evaluating what a run wrote: in each runtime, without Lightning, and never under another
preprocessing unawares.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn

import qat_tricks
from qat_tricks.cli import main as cli
from qat_tricks.data import Preprocessing, build_data
from qat_tricks.deploy.runtimes.session import input_specs, open_session
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.report import read_report
from qat_tricks.jobs.artifact import load_artifact
from qat_tricks.jobs.evaluate import evaluate_artifact
from qat_tricks.jobs.train import run_job
from qat_tricks.trainer.checkpoints import load_checkpoint
from tests.helpers import ROOT
from tests.helpers.configs import job_config
from tests.helpers.lit import Lit, trainer
from tests.helpers.nets import SmallNet, small_net

QUICK = ["measure.runs=5", "measure.threads=1"]
EVALUATE = [
    *QUICK,
    "measure.batch_sizes=[1,3]",
    "measure.thread_counts=[1]",
    "measure.point_seconds=0.01",
]
TRAIN = [
    "recipe=int8_ptq",
    "data=fake",
    "model=custom",
    "model.factory=tests.helpers.nets.SmallNet",
    "baseline.epochs=2",
    *QUICK,
]


def run(folder, *overrides):
    os.environ["QAT_TRICKS_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)  # of training: a module's fixtures come before those of its tests
    config = job_config(*TRAIN, "trainer.enable_progress_bar=false", *overrides)
    return run_job(config, folder)


def one_logit(in_channels):
    return nn.Sequential(SmallNet(1, in_channels), nn.Flatten(0))


def evaluate(artifact, folder, *overrides):
    settings = [f"artifact={artifact}", f"folder={folder}", *EVALUATE, *overrides]
    return evaluate_artifact(job_config(*settings, name="evaluate"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """The folder of a run whose files normalize pixels themselves."""
    folder = tmp_path_factory.mktemp("pixels")
    run(folder, "export.normalize=true")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The images that the runs were tested on, as files, and the overrides that read them in the
    runs' own way.
    """
    root = tmp_path_factory.mktemp("images")
    data = build_data("fake")
    data.setup()
    images, labels = data.splits.pixels.batch(range(64))
    for part in ("train", "val"):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / part / data.class_names[label] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    same = [
        f"data.{key}=[{value},{value},{value}]" for key, value in (("mean", 0.5), ("std", 0.25))
    ]
    return ["data=imagefolder", f"data.root={root}", "data.resize=[16,16]", "data.crop=null", *same]


def test_an_onnx_file_is_measured_without_lightning_or_loggers(ran, tmp_path):
    code = """
import sys
from qat_tricks.cli.main import evaluate
evaluate(sys.argv[1:])
absent = {"pytorch_lightning", "lightning", "lightning_fabric", "wandb", "onnxscript"}
absent |= {"qat_tricks.trainer.session", "qat_tricks.recipes.recipe"}
print(sorted(absent & set(sys.modules)))
"""
    command = [
        sys.executable,
        "-c",
        code,
        f"artifact={ran / 'model.onnx'}",
        f"folder={tmp_path}",
        *EVALUATE,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["stages"][-1]["accuracy"]
        == json.loads((ran / "report.json").read_text())["stages"][-1]["accuracy"]
    )
    for file in ("fp32", "int8"):
        assert (
            0
            < report["latency_ms"][file]["p50"]
            <= report["latency_ms"][file]["p95"]
            <= report["latency_ms"][file]["p99"]
        )
        assert report["load_ms"][file] > 0
    points = [(row["runtime"], row["threads"], row["batch_size"]) for row in report["throughput"]]
    assert points[:2] == [("onnxruntime", 1, 1), ("onnxruntime", 1, 3)]
    assert all(row["fp32"] > 0 and row["int8"] > 0 for row in report["throughput"])
    text = (tmp_path / "report.md").read_text()
    assert "| onnxruntime | 1 | 3 |" in text
    assert "| latency p99 |" in text
    assert "| time to open |" in text


def test_a_checkpoint_is_exported_with_what_it_says_of_itself(ran, tmp_path):
    report = evaluate(ran / "model.ckpt", tmp_path, "sensitivity=true")
    worst = read_report(tmp_path)["sensitivity"]["parts"][0]
    assert f"| {worst['name']} | {worst['kind']} | 8 |" in (tmp_path / "report.md").read_text()
    assert report["parity"]["top1_agreement"] == 1
    assert report["parity"]["max_abs_error"] < 1e-5
    assert report["runtimes"]["onnxruntime"]["parity"] == report["parity"]
    assert report["parity"]["against"] == "simulated"
    assert [stage["name"] for stage in report["stages"]] == ["fp32", "simulated", "onnx"]
    assert (
        load_artifact(tmp_path / "model.onnx").preprocessing
        == load_artifact(ran / "model.onnx").preprocessing
    )
    saved = load_checkpoint(ran / "model.ckpt")["hyper_parameters"]["preprocessing"]
    assert saved == report["preprocessing"] == build_data("fake").preprocessing.described()


def test_another_preprocessing_is_refused_field_by_field(ran, folders, tmp_path):
    with pytest.raises(QatTricksError) as caught:
        evaluate(ran / "model.onnx", tmp_path, *folders, "data.scale=0..255")
    told = str(caught.value)
    assert "resize: None → [16, 16]" in told
    assert "scale: 0..1 → 0..255" in told
    assert "mean" not in told
    assert "allow_preprocessing_change=true" in told
    assert not (tmp_path / "report.json").exists()


def test_an_allowed_change_is_measured_beside_the_networks_own(ran, folders, tmp_path):
    allowed = [*folders, "allow_preprocessing_change=true"]
    own = evaluate(ran / "model.onnx", tmp_path / "own")["stages"][-1]["accuracy"]
    # resized to the size that they have
    same = evaluate(ran / "model.onnx", tmp_path / "same", *allowed)
    assert same["stages"][-1]["accuracy"] == same["preprocessing_change"]["accuracy"] == own
    assert same["preprocessing_change"]["agreement"] == 1
    other = evaluate(ran / "model.onnx", tmp_path / "other", *allowed, "data.mean=[3,3,3]")
    assert other["stages"][-1]["accuracy"] == own
    assert other["preprocessing_change"]["accuracy"] < own
    assert other["preprocessing"]["mean"] == [0.5] * 3
    assert other["preprocessing_change"]["preprocessing"]["mean"] == [3.0] * 3
    assert (
        "mean: [0.5, 0.5, 0.5] → [3.0, 3.0, 3.0]" in (tmp_path / "other" / "report.md").read_text()
    )


def test_a_float_network_of_another_preprocessing_is_no_reference(ran, tmp_path):
    other = tmp_path / "other.onnx"
    described = Preprocessing.from_dict(
        {**build_data("fake").preprocessing.as_dict(), "mean": [0.4] * 3}
    ).described()
    _rewrite(ran / "model_fp32.onnx", other, described)
    with pytest.raises(QatTricksError, match=r"other\.onnx was made with \(mean: \[0\.4"):
        evaluate(ran / "model.onnx", tmp_path, f"float={other}")
    _rewrite(ran / "model_fp32.onnx", other, {**described, "mean": [0.3] * 3})
    with pytest.raises(QatTricksError, match="changed by hand"):
        load_artifact(other)


def test_files_that_normalize_take_pixels_and_give_the_same(ran, pixels, tmp_path):
    reports = [json.loads((folder / "report.json").read_text()) for folder in (ran, pixels)]
    for file in ("model.onnx", "model_fp32.onnx"):
        assert input_specs(open_session(pixels / file))[0].dtype == np.uint8
    for key in ("accuracy", "nll", "ece"):
        assert reports[0]["stages"][-1][key] == reports[1]["stages"][-1][key]
    assert reports[1]["int8_coverage"] == reports[0]["int8_coverage"]
    assert (reports[0]["normalization"], reports[1]["normalization"]) == ("outside", "built in")
    report = evaluate(pixels / "model.onnx", tmp_path)
    assert report["stages"][-1]["nll"] == reports[0]["stages"][-1]["nll"]
    assert report["agreement"] == reports[0]["agreement"]
    assert "takes uint8 pixels" in (tmp_path / "report.md").read_text()


def test_a_network_that_normalizes_minds_the_geometry_alone(pixels, folders, tmp_path):
    with pytest.raises(QatTricksError, match=r"made with \(resize: None → \[16, 16\]\)"):
        evaluate(pixels / "model.onnx", tmp_path, *folders, "data.mean=[3,3,3]")


def test_openvino_stands_beside_onnx_runtime(ran, pixels, tmp_path):
    pytest.importorskip("openvino")
    for folder in (ran, pixels):
        report = evaluate(folder / "model.onnx", tmp_path, "runtimes=[onnxruntime,openvino]")
        found = report["runtimes"]["openvino"]
        assert report["runtimes"]["onnxruntime"]["parity"]["sqnr_db"] == 200
        assert found["parity"]["top1_agreement"] >= 0.95
        assert found["parity"]["sqnr_db"] > 20
        assert found["int8_layers"] > 0.5
        assert abs(found["accuracy"] - report["stages"][-1]["accuracy"]) < 0.05
        assert {row["runtime"] for row in report["throughput"]} == {"onnxruntime", "openvino"}
        assert "| openvino 20" in (tmp_path / "report.md").read_text()


def test_a_target_runs_the_file_in_its_runtime(tmp_path):
    pytest.importorskip("openvino")
    report = run(tmp_path, "target=openvino_cpu")
    assert list(report["runtimes"]) == ["openvino"]
    assert report["runtimes"]["openvino"]["parity"]["against"] == "onnxruntime"
    assert "`openvino_cpu`: OpenVINO on x86 with VNNI" in (tmp_path / "report.md").read_text()
    assert report["runtimes"]["openvino"]["parity"]["top1_agreement"] >= 0.95


def test_a_target_without_vnni_gets_weights_that_cannot_saturate(tmp_path):
    report = run(tmp_path, "target=onnxruntime_cpu_no_vnni", "baseline.epochs=1")
    model = onnx.load(tmp_path / "model.onnx")
    weights = [
        numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith(".weight")
    ]
    assert len(weights) > 4
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) == 63
    assert report["target"] == "onnxruntime_cpu_no_vnni"
    assert torch.isfinite(torch.tensor(report["parity"]["sqnr_db"]))


def _rewrite(path, to, preprocessing):
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "qat_tricks.preprocessing":
            entry.value = json.dumps(preprocessing)
    onnx.save(model, to)


def test_two_classes_are_trained_and_measured_with_one_logit(tmp_path):
    settings = ["data.num_classes=2", f"model.factory={__name__}.one_logit", "baseline.epochs=4"]
    report = run(tmp_path / "run", *settings)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["onnx"]["accuracy"] > 0.7  # chance is half
    assert 0 < stages["onnx"]["nll"] < 0.6931  # log 2, which chance has
    assert stages["onnx"]["top5"] == 1
    assert report["agreement"] > 0.9
    assert report["parity"]["sqnr_db"] > 30
    evaluated = evaluate(tmp_path / "run" / "model.onnx", tmp_path / "of the file")
    figures = {stage["name"]: stage["accuracy"] for stage in evaluated["stages"]}
    assert figures == {name: stages[name]["accuracy"] for name in ("fp32", "onnx")}
    evaluate(tmp_path / "run" / "model.ckpt", tmp_path / "of the checkpoint")
    again = read_report(tmp_path / "of the checkpoint")
    assert again["parity"]["top1_agreement"] == 1.0
    assert again["stages"][-1]["accuracy"] == stages["onnx"]["accuracy"]


class Own(Lit):
    """A module of the user's, which changes the images before its network."""

    def __init__(self, num_classes=4, gain=2.0):
        super().__init__(gain=gain)
        self.save_hyperparameters()
        self.backbone = small_net(num_classes=num_classes, in_channels=3)


class Named(Own):
    """A module that says nothing of its arguments."""

    def __init__(self, width):
        super().__init__()
        self._hparams.clear()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of files that a user has written, and the accuracy of the module."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    data = build_data("fake")
    data.setup()
    lit = Own().train()
    fit = trainer(qat_tricks.recipe("int8_qat", report=False), max_epochs=2)
    fit.fit(lit, data.train_dataloader())
    fit.save_checkpoint(folder / "own.ckpt")
    qat_tricks.export_onnx(lit.backbone, folder / "own.onnx", torch.randn(8, 3, 16, 16))
    qat_tricks.export_onnx(small_net(num_classes=4, in_channels=3), folder / "float.onnx", X)
    return folder, qat_tricks.evaluate(lit, data.test_dataloader()).accuracy


X = torch.randn(4, 3, 16, 16)


def test_a_checkpoint_of_ones_own_trainer_is_measured_as_its_module_computes(own, tmp_path):
    folder, accuracy = own
    settings = [f"module={__name__}.Own", "data=fake", f"float={folder / 'float.onnx'}"]
    report = evaluate(folder / "own.ckpt", tmp_path, *settings)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["simulated"]["accuracy"] == stages["onnx"]["accuracy"] == accuracy
    assert stages["onnx"]["latency_ms"]["p50"] > 0
    assert stages["simulated"]["sparsity"] == stages["onnx"]["sparsity"]
    assert stages["fp32"]["size_bytes"] == (folder / "float.onnx").stat().st_size
    assert report["parity"]["sqnr_db"] > 40
    assert report["runtimes"]["onnxruntime"]["int8_layers"] == 1
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Own on fake\n")
    assert "None" not in text


def test_an_onnx_file_of_export_onnx_is_measured_on_the_data_that_are_given(own, tmp_path):
    folder, _ = own
    report = evaluate(folder / "own.onnx", tmp_path, "data=fake")
    assert [stage["name"] for stage in report["stages"]] == ["onnx"]
    assert report["agreement"] is None
    assert (tmp_path / "report.md").read_text().startswith("# own on fake\n")


@pytest.mark.parametrize(
    ("file", "settings", "told"),
    [
        ("own.onnx", [], "it does not say its recipe, model, data, preprocessing; give data=NAME"),
        ("own.ckpt", [], "does not say which network it holds; give module=package.Class"),
        ("own.ckpt", ["module=x.Y", "data=fake"], 'cannot import module="x.Y"'),
        ("own.ckpt", ["module=math.pi", "data=fake"], 'module="math.pi" is a float'),
        ("own.ckpt", [f"module={__name__}.Own"], "does not say which data it was made for"),
        ("own.ckpt", [f"module={__name__}.Named", "data=fake"], "Named cannot be built from what"),
    ],
)
def test_files_that_say_too_little_tell_what_to_give(own, tmp_path, file, settings, told):
    with pytest.raises(QatTricksError, match=re.escape(told)) as caught:
        evaluate(own[0] / file, tmp_path / "folder", *settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "folder").exists()


def test_a_report_is_never_overwritten(own, tmp_path, monkeypatch, capfd):
    folder, _ = own
    monkeypatch.chdir(tmp_path)
    for name in ("evaluation", "evaluation_2"):
        cli.evaluate([f"artifact={folder / 'own.onnx'}", "data=fake", *EVALUATE])
        assert (folder / name / "report.json").is_file()
        # by these a comparison of jobs tells a run from an evaluation
        assert not {".hydra", "config.yaml"} & {path.name for path in (folder / name).iterdir()}
        assert f"{name}: report.html" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        cli.evaluate([f"artifact={folder / 'own.onnx'}", "data=fake", f"folder={folder / name}"])
    assert "has a report already: give another folder" in capfd.readouterr().err


def test_a_file_of_the_users_is_never_overwritten(own, tmp_path, capfd):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"the user's own")
    with pytest.raises(SystemExit):
        cli.evaluate([f"artifact={own[0] / 'own.ckpt'}", "data=fake", f"folder={tmp_path}"])
    assert "has a model.onnx already: give another folder" in capfd.readouterr().err
    assert file.read_bytes() == b"the user's own"


def test_data_with_other_classes_are_refused(ran, folders, tmp_path):
    root = Path(folders[1].removeprefix("data.root="))
    shutil.copytree(root, tmp_path / "renamed")
    first = min(path.name for path in root.glob("train/*"))
    for part in ("train", "val"):
        (tmp_path / "renamed" / part / first).rename(tmp_path / "renamed" / part / "zebra")
    for artifact in ("model.onnx", "model.ckpt"):
        renamed = [*folders, f"data.root={tmp_path / 'renamed'}", "allow_preprocessing_change=true"]
        with pytest.raises(
            QatTricksError, match=rf"4 classes of the data are not the 4 of {artifact}"
        ):
            evaluate(ran / artifact, tmp_path / "out", *renamed)
        assert not (tmp_path / "out").exists()


def test_an_artifact_knows_its_data_from_every_folder(folders, tmp_path, monkeypatch):
    root = Path(folders[1].removeprefix("data.root="))
    monkeypatch.chdir(root.parent)
    config = job_config("recipe=int8_ptq", *QUICK, *folders, f"data.root={root.name}")
    run_job(config, tmp_path / "run")
    assert load_artifact(tmp_path / "run" / "model.onnx").data["root"] == str(root)
    monkeypatch.chdir(tmp_path)
    own = evaluate(tmp_path / "run" / "model.onnx", tmp_path / "own")
    given = evaluate(tmp_path / "run" / "model.onnx", tmp_path / "given", *folders)
    assert own["stages"][-1]["accuracy"] == given["stages"][-1]["accuracy"]


def test_a_checkpoint_is_exported_for_the_runs_own_target(tmp_path):
    run(tmp_path / "run", "target=tensorrt", "export.opset=20")
    evaluate(tmp_path / "run" / "model.ckpt", tmp_path / "evaluated", "runtimes=[onnxruntime]")
    own, exported = (onnx.load(tmp_path / folder / "model.onnx") for folder in ("run", "evaluated"))
    for found in (own, exported):
        assert {entry.key: entry.value for entry in found.metadata_props}[
            "qat_tricks.target"
        ] == '"tensorrt"'
    kinds = [[node.op_type for node in found.graph.node] for found in (own, exported)]
    assert kinds[0] == kinds[1]
    assert own.opset_import[0].version == exported.opset_import[0].version == 20
