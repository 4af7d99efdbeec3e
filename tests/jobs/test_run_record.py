"""The record of a run: what is measured is written at once, also where the run ends early."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import comparison_rows
from qat_tricks.evidence.report import read_report, write_report
from qat_tricks.jobs.classifier import make_classifier
from qat_tricks.jobs.datamodule import load_data
from qat_tricks.jobs.fitted_recipe import fitted_recipe
from qat_tricks.jobs.run_record import RunRecord
from tests.helpers.configs import job_config, quick_job
from tests.helpers.samples import report

QUICK = quick_job()


def record(folder, *overrides):
    config = job_config("recipe=int8_ptq", *QUICK, *overrides)
    data = load_data(config.data)
    module = make_classifier(config, data).eval()
    return RunRecord(config, folder, fitted_recipe(config), data, module)


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def truth(run, images):
    """Logits that are right for the test images, which fill two batches."""
    for batch, labels in run.data.test_dataloader():
        if torch.equal(batch, images):
            return torch.nn.functional.one_hot(labels, 4).float()
    raise AssertionError("no batch of test images")


def test_a_run_that_measured_nothing_leaves_its_network_and_config_only(tmp_path, capsys):
    run = record(tmp_path / "run")
    run.save_config()
    run.save_interrupted()
    assert files_in(run.folder) == {"config.yaml", "interrupted.ckpt"}
    assert OmegaConf.load(run.folder / "config.yaml") == run.config
    assert str(run.folder) in capsys.readouterr().out


def test_a_measured_network_is_exported_and_in_the_ledger_and_the_report(tmp_path):
    run = record(tmp_path / "run")
    run.measure_float(run.module.network)
    (row,) = json.loads((run.folder / "ledger.json").read_text())
    assert (row["name"], row["before"]) == ("fp32", None)
    assert row["size_bytes"] == run.float_path.stat().st_size
    assert row["latency_ms"]["p50"] > 0
    assert not run.model_path.exists()  # the float network is not the result
    run.save_interrupted()
    report = read_report(run.folder)
    assert report["interrupted"] is True
    assert [stage["name"] for stage in report["stages"]] == ["fp32"]
    assert report["parity"]["images"] == 64  # all of the test images
    assert report["latency_ms"] is None
    run.config.report.language = "ja"
    run.save_interrupted()
    assert read_report(run.folder) == report | {"language": "ja"}
    for name, heading in (("report.html", "<h2>段階</h2>"), ("report.md", "## 段階")):
        assert heading in (run.folder / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("allowed", [10, 80])  # of the 75 points that are lost
def test_a_stage_is_entered_before_it_is_judged(tmp_path, monkeypatch, capsys, allowed):
    run = record(tmp_path / "run", f"recipe.stages.ptq.max_drop={allowed}")
    exported = []
    monkeypatch.setattr(run, "_export", lambda network, path: exported.append(path))
    monkeypatch.setattr(run, "_add_costs", lambda path: None)
    (stage,) = run.recipe.stages
    run.measure_float(lambda images: truth(run, images))
    if allowed < 75:
        with pytest.raises(QatTricksError, match=r'stage "ptq".*ledger\.json'):
            run.after_stage(stage, lambda images: torch.zeros(len(images), 4))
    else:
        run.after_stage(stage, lambda images: torch.zeros(len(images), 4))
    assert exported == [run.float_path, run.model_path]
    rows = json.loads((run.folder / "ledger.json").read_text())
    assert [row["name"] for row in rows] == ["fp32", "ptq"]
    assert rows[1]["before"]["accuracy"] == rows[0]["accuracy"] == 1.0
    assert rows[1]["accuracy"] == 0.25
    measured, begun, *ended = capsys.readouterr().out.splitlines()
    assert measured.startswith("fp32: top-1 100.00%, after ")
    assert begun.startswith("stage 1 of 1, ptq: fold_batchnorm, ")
    (line,) = ended
    assert line.startswith("ptq: top-1 25.00%, drop 75.00, after ")


def test_parity_is_measured_on_images_of_all_classes(tmp_path, monkeypatch):
    run = record(tmp_path / "run")
    labels = {image.numpy().tobytes(): int(label) for image, label in run.data.splits.test}
    seen = []

    def export(network, path, example, *, images, **settings):
        seen.extend(labels[image.numpy().tobytes()] for batch in images for image in batch)
        raise QatTricksError("stop")

    monkeypatch.setattr("qat_tricks.jobs.run_record.PARITY_IMAGES", 8)
    monkeypatch.setattr("qat_tricks.jobs.run_record.export_onnx", export)
    with pytest.raises(QatTricksError, match="stop"):
        run.measure_float(run.module.network)
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_results_of_an_earlier_run_do_not_pass_for_this_ones(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    results = {"report.json", "report.html", "model.onnx", "model.ckpt"}
    results |= {"model_fp32.onnx", "ledger.json"}
    for name in results:
        (folder / name).write_text("of the earlier run")
    (folder / "notes.txt").write_text("the user's")
    (folder / "report.md").mkdir()  # a folder is no result of ours
    record(folder).save_config()
    assert files_in(folder) == {"config.yaml", "notes.txt", "report.md", "earlier"}
    assert files_in(folder / "earlier") == results


def test_a_job_that_is_done_again_is_one_job_of_its_sweep(tmp_path):
    folder = tmp_path / "0_int8_ptq"
    write_report(folder, report())
    record(folder).save_config()
    assert (folder / "earlier" / "report.json").is_file()
    with pytest.raises(QatTricksError, match="no job"):  # it has no result yet
        comparison_rows(tmp_path)
    write_report(folder, report())
    assert [row["job"] for row in comparison_rows(tmp_path)] == ["0_int8_ptq"]
