"""A run: its files, and where it stops."""

import json

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.files import InUseError, reserved
from qat_tricks.jobs.train import run_job
from tests.helpers.configs import job_config, quick_job
from tests.helpers.nets import SmallNet

QUICK = quick_job()


def ten_classes(in_channels):
    return SmallNet(10, in_channels)


THREADS = {True: set(), False: set()}  # of the forwards, by whether they were training's


class Watching(SmallNet):
    """Notes with how many threads torch computes."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.register_forward_pre_hook(_note)


def _note(network, _):
    THREADS[network.training].add(torch.get_num_threads())


def test_threads_of_measurements_are_not_those_of_training(tmp_path):
    own = torch.get_num_threads()
    settings = [f"model.factory={__name__}.Watching", f"measure.threads={own + 1}"]
    run_job(job_config("recipe=fp32", *QUICK, *settings), tmp_path / "run")
    assert THREADS[True] == {own}
    assert THREADS[False] == {own, own + 1}  # validation while training, and measurements
    assert torch.get_num_threads() == own


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_float_recipe_hands_out_its_network_as_the_result(tmp_path):
    report = run_job(job_config("recipe=fp32", *QUICK), tmp_path / "run")
    written = [
        "report.json",
        "report.md",
        "report.html",
        "ledger.json",
        "model.ckpt",
        "config.yaml",
    ]
    assert files(tmp_path / "run") >= {*written, "model.onnx", "model_fp32.onnx"}
    assert [stage["name"] for stage in report["stages"]] == ["fp32", "onnx"]
    assert report["agreement"] == 1
    models = [(tmp_path / "run" / f"{name}.onnx").read_bytes() for name in ("model", "model_fp32")]
    assert models[0] == models[1]


def test_each_stage_is_exported_and_one_that_loses_too_much_ends_the_run(tmp_path):
    config = job_config("recipe=int8_prune50", *QUICK, "baseline.epochs=4", "stage.epochs=1")
    config.recipe.stages.prune_qat.max_drop = 0
    config.recipe.stages.prune_qat.tricks.prune.sparsity = 0.99
    config.measure.min_top1_agreement = 0
    with pytest.raises(QatTricksError, match=r"stage \"prune_qat\".*ledger\.json"):
        run_job(config, tmp_path / "run")
    assert "stages/ptq.onnx" in files(tmp_path / "run")
    assert "report.json" not in files(tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert [row["name"] for row in rows] == ["fp32", "ptq", "prune_qat"]
    assert rows[2]["accuracy"] < rows[1]["accuracy"] == rows[2]["before"]["accuracy"]
    assert all(row["size_bytes"] > 0 for row in rows)


def test_a_network_of_other_classes_than_the_data_is_refused(tmp_path):
    config = job_config("recipe=int8_ptq", *QUICK)
    config.model.factory = f"{__name__}.ten_classes"
    with pytest.raises(QatTricksError, match="has 10 classes and the data 4"):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_run_writes_into_is_refused_and_stays(tmp_path):
    with reserved(tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InUseError, match="another run that is still going"):
            run_job(job_config("recipe=int8_ptq", *QUICK), tmp_path)
        assert sorted(tmp_path.iterdir()) == before


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(QatTricksError, match='pattern "nothing" matches no submodule'):
        run_job(job_config("recipe.untraced=[nothing]", *QUICK), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_images_are_measured_for_an_objective_alone_and_as_the_file_takes_them(tmp_path):
    reports = {
        name: run_job(job_config("recipe=fp32", *QUICK, *settings), tmp_path / name)
        for name, settings in {
            "without": [],
            "floats": ["objectives=[accuracy]"],
            "pixels": ["objectives=[accuracy]", "export.normalize=true"],
        }.items()
    }
    assert "validation" not in reports["without"]
    assert reports["floats"]["validation"]["images"] == 64  # of data=fake
    assert reports["floats"]["validation"] == reports["pixels"]["validation"]
