import csv
import json
import os
import random

import numpy as np
import pytest
import torch
import wandb

import qat_tricks.jobs.train
from qat_tricks.cli import main as cli
from qat_tricks.cli.sweep import compare_jobs
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.report import write_report
from qat_tricks.jobs.loggers import log_report
from qat_tricks.settings.compose import Composer
from tests.helpers import wandb_file
from tests.helpers.lightning import pl
from tests.helpers.samples import report


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Stands in for ``run_job``: notes the state of the process, spoils it, and writes a report."""
    seen = {}

    def run_job(config, folder, logger):
        name = config.recipe.name
        pl.seed_everything(config.seed, workers=True, verbose=False)
        state = {
            "dtype": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        state |= {"threads": torch.get_num_threads(), "leaked": os.environ.get("LEAK")}
        seen[name] = state | {"draws": (random.random(), np.random.rand(), torch.rand(1).item())}
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(3)
        os.environ["LEAK"] = name
        if name == "int8_qat":
            raise QatTricksError("stage qat lost\ntoo much")
        if name == "w4a8_qat":
            raise KeyError("a bug")
        written = report(name)
        write_report(folder, written)
        log_report(logger, written, folder)
        return written

    monkeypatch.setattr(qat_tricks.jobs.train, "run_job", run_job)
    monkeypatch.chdir(tmp_path)
    return seen


def sweep(*arguments):
    """Runs a sweep; returns its exit status and its folder."""
    status = 0
    try:
        cli.train(["-m", "hydra.sweep.dir=sweep", *arguments])
    except SystemExit as error:
        status = error.code
    return status


def test_a_sweep_runs_every_job_apart_and_ends_with_a_comparison(tmp_path, jobs, capsys):
    assert sweep("recipe=int8_ptq,int8_prune50") == 0
    folders = [tmp_path / "sweep" / name for name in ("0_int8_ptq", "1_int8_prune50")]
    rows = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open()))
    assert [row["recipe"] for row in rows] == ["int8_ptq", "int8_prune50"]
    assert (tmp_path / "sweep" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "comparison" in printed.out
    assert printed.err == ""

    first, second = jobs["int8_ptq"], jobs["int8_prune50"]
    assert first == second  # reseeded, and nothing leaked
    assert second["dtype"] is torch.float32
    assert second["leaked"] is None
    assert torch.get_default_dtype() is torch.float32

    runs = [wandb_file.records(folder) for folder in folders]
    started = [next(record.run for record in run if record.HasField("run")) for run in runs]
    assert {run.run_group for run in started} == {"sweep"}
    assert [run.display_name for run in started] == [folder.name for folder in folders]
    assert started[0].run_id != started[1].run_id
    assert wandb.run is None


def test_a_job_that_fails_leaves_its_error_and_the_others_run(tmp_path, jobs, capsys):
    assert sweep("recipe=int8_qat,int8_ptq,w4a8_qat,fp32", "logger=none") == 2
    assert list(jobs) == ["int8_qat", "int8_ptq", "w4a8_qat", "fp32"]
    kept = {
        path.parent.name: json.loads(path.read_text())["error"]
        for path in tmp_path.glob("sweep/*/error.json")
    }
    assert kept == {"0_int8_qat": "stage qat lost\ntoo much", "2_w4a8_qat": "KeyError: 'a bug'"}
    told = capsys.readouterr().err
    assert "error: job 0_int8_qat: stage qat lost too much\n" in told
    assert told.count("Traceback") == 1  # the bug's, and not the user's
    rows = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open()))
    assert [bool(row["error"]) for row in rows] == [True, False, True, False]


def test_a_failed_jobs_wandb_run_ends_as_failed(tmp_path, jobs):
    assert sweep("recipe=int8_qat") == 2
    run = wandb_file.records(tmp_path / "sweep" / "0_int8_qat")
    assert next(record.exit.exit_code for record in run if record.HasField("exit")) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["recipe=int8_ptq,int8_qet"], '"int8_qat"'),
        (["recipe=int8_ptq", "seed=1,x"], "seed='x'"),
        (["recipe=int8_ptq", "baseline.lr=0.1,0"], "lr=0 "),
        (["recipe=glob(nothing*)"], "no job"),
        (["recipe=int8_ptq,int8_qat", "trainer=ddp_cpu"], "without --multirun"),
        (["recipe=int8_qat,w4a8_qat", "recipe.stages.qat.epochs=1"], "=choice(VALUE)"),
        (["recipe=int8_ptq", "hydra.sweep.dir=file/x"], "cannot be written"),
        (["seed=interval(0,1)"], "INTERVAL"),
    ],
)
def test_no_job_starts_if_one_of_them_cannot_work(tmp_path, jobs, capsys, arguments, told):
    (tmp_path / "file").touch()
    assert sweep(*arguments) == 2
    assert jobs == {}
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipe=glob(int8_p*,exclude=*50*)"], [["recipe=int8_prune30"], ["recipe=int8_ptq"]]),
        (
            ["seed=range(0,2)", "recipe=fp32"],
            [["seed=0", "recipe=fp32"], ["seed=1", "recipe=fp32"]],
        ),
        (["stage.epochs=choice(1)"], [["stage.epochs=1"]]),
    ],
)
def test_globs_ranges_and_choices_become_jobs(arguments, expected):
    assert Composer("train").jobs(arguments) == expected


def test_a_job_done_anew_forgets_its_old_error_and_a_setting_may_be_of_the_swept_recipe_alone(
    tmp_path, jobs
):
    (tmp_path / "sweep" / "0_w4a4_qat").mkdir(parents=True)
    (tmp_path / "sweep" / "0_w4a4_qat" / "error.json").write_text('{"error": "old"}')
    assert sweep("recipe=w4a4_qat", "recipe.stages.qat.epochs=choice(1)", "logger=none") == 0


def test_the_comparison_is_made_from_disk_alone(tmp_path, capsys):
    write_report(tmp_path / "0_a", report("a"))
    assert compare_jobs(tmp_path)
    assert not compare_jobs(tmp_path / "0_a")
    assert "no job" in capsys.readouterr().err
