"""A search by Hydra's Optuna sweeper: it decides by the reports' figures, and survives failures."""

import contextlib
import csv
import io
import json
import re
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore

import qat_tricks.jobs.train
from qat_tricks.cli import main as cli
from qat_tricks.data import build_data
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.report import write_report
from tests.helpers.configs import quick_job
from tests.helpers.samples import report

# As a user's own, in the folder that --config-dir names.
SPACE = """
# @package _global_
defaults:
  - override /recipe: int8_ptq
  - override /hydra/sweeper: optuna
objectives: [accuracy, latency]
hydra:
  sweeper:
    direction: [maximize, minimize]
    n_trials: 3
    n_jobs: 1
    max_failure_rate: 1
    sampler: {seed: 1, n_startup_trials: 2}
    params:
      recipe.stages.ptq.tricks.calibrate.estimator: choice(minmax, mse)
      recipe.stages.ptq.tricks.calibrate.num_images: range(32, 128, 32)
      recipe.stages.ptq.tricks.quantize.weight_bits: choice(2, 8)
"""
QUICK = [*quick_job("digits"), "logger=none"]


def search(*arguments):
    """Runs a search into the folder ``search``; returns its exit status."""
    try:
        cli.train(["-m", "hydra.sweep.dir=search", *arguments])
    except SystemExit as error:
        return error.code
    return 0


def overrides_of(job):
    lines = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text())
    return {line.partition("=")[0]: yaml.safe_load(line.partition("=")[2]) for line in lines}


def solutions(folder):
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())["solutions"]
    return [(solution["params"], solution["values"]) for solution in found]


def beaten(own, others):
    """Whether another is as accurate and as fast, and not the same."""
    return any(a >= own[0] and b <= own[1] and [a, b] != [*own] for a, b in others)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A real search on digits: its exit status, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "conf" / "sweep").mkdir(parents=True)
    (folder / "conf" / "sweep" / "tiny.yaml").write_text(SPACE)
    printed = io.StringIO()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        torch.set_num_threads(1)
        status = search("--config-dir", "conf", "sweep=tiny", *QUICK)
    torch.set_num_threads(threads)
    jobs = sorted((folder / "search").glob("*_int8_ptq"))
    return SimpleNamespace(
        status=status, folder=folder / "search", jobs=jobs, printed=printed.getvalue()
    )


@pytest.fixture
def reports(done):
    return [json.loads((job / "report.json").read_text()) for job in done.jobs]


def test_every_trial_is_a_job_within_the_space(done):
    assert done.status == 0
    assert [job.name for job in done.jobs] == [f"{number}_int8_ptq" for number in range(3)]
    tricks = "recipe.stages.ptq.tricks"
    for job in done.jobs:
        given = overrides_of(job)
        assert given[f"{tricks}.calibrate.estimator"] in ("minmax", "mse")
        assert given[f"{tricks}.calibrate.num_images"] in (32, 64, 96, 128)
        assert given[f"{tricks}.quantize.weight_bits"] in (2, 8)
        # and the job was run so
        config = yaml.safe_load((job / "config.yaml").read_text())["recipe"]["stages"]["ptq"]
        assert (
            config["tricks"]["quantize"]["weight_bits"] == given[f"{tricks}.quantize.weight_bits"]
        )


def test_the_accuracy_is_that_of_the_file_on_validation_images(done, reports):
    data = build_data("digits")
    data.setup()
    for job, found in zip(done.jobs, reports, strict=True):
        session = onnxruntime.InferenceSession(job / "model.onnx")
        right = count = 0
        for images, labels in data.val_dataloader():
            (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            right += int((logits.argmax(1) == labels.numpy()).sum())
            count += len(labels)
        assert found["validation"]["images"] == count
        assert found["validation"]["accuracy"] == pytest.approx(right / count, abs=1.5 / count)


def test_the_best_trials_are_the_front_of_the_reports_figures(done, reports):
    figures = [[r["validation"]["accuracy"], r["latency_ms"]["int8"]["p50"]] for r in reports]
    front = [own for own in figures if not beaten(own, figures)]
    assert len(front) > 0
    # Optuna was told exactly these
    assert sorted(values for _, values in solutions(done.folder)) == sorted(front)
    params = [overrides_of(job) for job in done.jobs]
    for chosen, values in solutions(done.folder):
        given = params[figures.index(values)]
        assert {key: given[key] for key in chosen} == chosen
    searched = json.loads((done.folder / "search.json").read_text())
    assert searched["objectives"] == {"accuracy": "maximize", "latency": "minimize"}
    assert [[*job["values"].values()] for job in searched["jobs"]] == figures
    assert [job["on_front"] for job in searched["jobs"]] == [own in front for own in figures]
    named = re.findall(r"^  (\d_int8_ptq): ", done.printed, flags=re.M)
    assert named == [job["job"] for job in searched["jobs"] if job["on_front"]]


def test_a_search_ends_with_a_comparison_as_every_sweep_does(done, reports):
    assert "<html" in (done.folder / "comparison.html").read_text()
    assert (done.folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    with (done.folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy_validation"]) for row in rows] == [
        found["validation"]["accuracy"] for found in reports
    ]
    assert "the sweep is in search: comparison.html" in done.printed


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Stands in for ``run_job``; jobs fail in turn in each way, or all of them."""
    seen, fail_always = [], SimpleNamespace(on=False)

    def run_job(config, folder, logger):
        prune = config.recipe.stages.channels.tricks.prune_channels
        number = len(seen)
        seen.append(
            (prune.share, prune.criterion, prune.multiple, config.recipe.stages.channels.lr)
        )
        if fail_always.on or number == 1:
            raise QatTricksError("the channels\nare gone")
        if number == 2:
            raise KeyError("a bug")
        validated = {"images": 270, "accuracy": None if number == 3 else 1 - prune.share / 2}
        found = report(config.recipe.name, scale=1 / prune.share, validation=validated)
        write_report(folder, found)
        return found

    monkeypatch.setattr(qat_tricks.jobs.train, "run_job", run_job)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(seen=seen, fail_always=fail_always)


SHIPPED = ["sweep=accuracy_latency", "logger=none"]
# fewer values to check before the first job
FEW = [
    "recipe.stages.channels.tricks.prune_channels.criterion=taylor",
    "recipe.stages.ptq.tricks.calibrate.estimator=mse",
    "hydra.sweeper.n_trials=3",
    "hydra.sweeper.sampler.n_startup_trials=2",
]


def test_the_shipped_space_is_searched_and_failed_jobs_are_failed_trials(tmp_path, jobs, capsys):
    trials = ["hydra.sweeper.n_trials=8", "hydra.sweeper.sampler.n_startup_trials=6"]
    assert search(*SHIPPED, *trials) == 0
    folder = tmp_path / "search"
    assert len(jobs.seen) == 8
    assert all(0.25 <= share <= 1 and 0.01 <= lr <= 0.1 for share, _, _, lr in jobs.seen)
    assert {criterion for _, criterion, _, _ in jobs.seen} <= {
        "taylor",
        "magnitude",
        "output_error",
    }
    assert {multiple for _, _, multiple, _ in jobs.seen} == {8, 16}
    assert len({share for share, *_ in jobs.seen}) == 8
    failed = {path.parent.name for path in folder.glob("*/error.json")}
    assert failed == {f"{number}_int8_channels50" for number in (1, 2, 3)}
    searched = json.loads((folder / "search.json").read_text())["jobs"]
    assert [job["values"] is None for job in searched] == [n in (1, 2, 3) for n in range(8)]
    # a smaller share is more accurate here, and slower: all that did not fail are on the front
    assert len(solutions(folder)) == sum(job["on_front"] for job in searched) == 5
    told = capsys.readouterr()
    assert "Pareto front, 5 of 8 jobs (3 failed)" in told.out
    assert "error: job 1_int8_channels50: the channels are gone\n" in told.err
    assert "no validation.accuracy" in told.err
    assert told.err.count("Traceback") == 1  # the bug's
    assert "A new study" not in told.err


def test_the_search_is_the_same_with_the_same_seed(jobs):
    assert search(*SHIPPED, *FEW) == 0
    first = [*jobs.seen]
    assert len(first) == 3
    jobs.seen.clear()
    assert search(*SHIPPED, *FEW) == 0
    assert jobs.seen == first


def test_a_setting_that_is_given_is_not_searched(tmp_path, jobs):
    given = "recipe.stages.channels.tricks.prune_channels.multiple=32"
    assert search(*SHIPPED, *FEW, given) == 0
    assert {multiple for _, _, multiple, _ in jobs.seen} == {32}
    assert len({share for share, *_ in jobs.seen}) == 3


def test_a_search_in_which_every_job_fails_has_failed(tmp_path, jobs):
    jobs.fail_always.on = True
    assert search(*SHIPPED, *FEW) == 2
    assert len(jobs.seen) == 3
    assert solutions(tmp_path / "search") == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sweep=accuracy_latncy"], 'unknown sweep "accuracy_latncy": did you mean "accuracy_lat'),
        (["sweep=accuracy_latency", "objectives=[]"], "objectives=[] tells it none"),
        (["sweep=accuracy_latency", "forecast=true"], "needs jobs that are known beforehand"),
    ],
)
def test_no_job_of_a_wrong_search_starts(tmp_path, jobs, capsys, arguments, told):
    assert search(*arguments) == 2
    refused(tmp_path, jobs, capsys, told)


def test_a_search_without_the_extra_names_it(tmp_path, jobs, capsys, monkeypatch):
    sweepers = ConfigStore.instance().repo["hydra"]["sweeper"]
    monkeypatch.delitem(sweepers, "optuna.yaml")
    assert search("sweep=accuracy_latency") == 2
    refused(tmp_path, jobs, capsys, 'pip install "qat_tricks[sweep]"')


def refused(folder, jobs, capsys, told):
    assert jobs.seen == []
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(folder.iterdir())
