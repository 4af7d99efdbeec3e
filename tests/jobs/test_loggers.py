import json
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.report import write_report
from qat_tricks.jobs import loggers
from qat_tricks.jobs.loggers import (
    LoggerOptions,
    finish_logger,
    log_report,
    make_logger,
    report_metrics,
)
from qat_tricks.settings.compose import Composer
from tests.evidence.test_page import PICTURE, whole
from tests.helpers import wandb_file
from tests.helpers.lightning import pl
from tests.helpers.samples import report


def config(*overrides):
    composed, problems = Composer("train").compose(overrides)
    assert not problems
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user without any W&B login."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # it read the environment once
    yield
    wandb.teardown()


@pytest.fixture
def modes(monkeypatch):
    """The modes in which W&B was started, each of them refused."""
    tried = []

    def refuse(**settings):
        tried.append(settings["mode"])
        raise OSError("no such service\nat all")

    monkeypatch.setattr(wandb, "init", refuse)
    return tried


def test_an_offline_run_holds_metrics_config_table_and_artifact(tmp_path, capfd):
    written = report("int8_ptq")
    # As in a run: the steps of a stage, of which the float one has none.
    step = {"name": "traced", "evaluation_db": 200.0, "by_design": False, "undone": []}
    of_stages = [[], [{**step, "training_db": db} for db in (200.0, None)]]
    for stage, steps in zip(written["stages"], of_stages, strict=True):
        stage["equivalence"] = steps
    write_report(tmp_path, written)
    (tmp_path / "model.onnx").write_bytes(b"network")
    logger = make_logger(config("recipe=int8_ptq"), tmp_path, group="sweep", job_name="0_int8_ptq")
    assert isinstance(logger, pl.loggers.WandbLogger)
    logger.log_metrics({"train/loss": 0.5}, step=3)
    log_report(logger, written, tmp_path)
    finish_logger(logger)

    run = wandb_file.records(tmp_path)
    metrics = wandb_file.history(run)
    assert metrics["train/loss"] == 0.5
    assert metrics["stage/onnx/accuracy"] == written["stages"][-1]["accuracy"]
    assert metrics["report/size_bytes/int8"] == written["size_bytes"]["int8"]
    assert (
        wandb_file.summary(run)["report/latency_ms/int8/p50"]
        == written["latency_ms"]["int8"]["p50"]
    )
    kept = wandb_file.config(run)
    assert kept["recipe"]["name"] == "int8_ptq"
    assert kept["data"]["name"] == "digits"
    started = next(record.run for record in run if record.HasField("run"))
    assert (started.run_group, started.display_name) == ("sweep", "0_int8_ptq")
    assert next(record for record in run if record.HasField("exit")).exit.exit_code == 0

    assert metrics["ledger/_type"] == "table-file"
    (table,) = tmp_path.glob("wandb/*run-*/files/media/table/ledger_*.table.json")
    rows = json.loads(table.read_text())
    accuracies = [row[rows["columns"].index("accuracy")] for row in rows["data"]]
    assert accuracies == [stage["accuracy"] for stage in written["stages"]]

    artifacts = [record.artifact for record in run if record.HasField("artifact")]
    (model,) = [artifact for artifact in artifacts if artifact.type == "model"]
    assert {entry.path for entry in model.manifest.contents} == {
        "report.json",
        "report.md",
        "report.html",
        "model.onnx",
    }

    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_wandb_shows_the_page_its_tables_and_its_pictures(tmp_path, capsys):
    written = whole()
    images = [row["image"] for row in written["comparison"]["disagreements"]]
    pictures = dict.fromkeys(images[:3], PICTURE)
    write_report(tmp_path, written, pictures)
    logger = make_logger(config(), tmp_path)
    log_report(logger, written, tmp_path, pictures)
    finish_logger(logger)
    assert capsys.readouterr().err == ""
    records = wandb_file.records(tmp_path)
    metrics = wandb_file.history(records)
    tables = ("ledger", "layers", "classes", "confusions", "disagreements", "checklist")
    assert {metrics[f"{name}/_type"] for name in tables} == {"table-file"}
    media = next(tmp_path.glob("wandb/*run-*/files"))
    (page,) = (media / "media" / "html").glob("page_*.html")
    assert page.read_text() == (tmp_path / "report.html").read_text()
    shown = json.loads((media / metrics["disagreements/path"]).read_text())
    assert [row[shown["columns"].index("image")] for row in shown["data"]] == images
    # W&B shows a table from an artifact of its own, which has the pictures.
    (table,) = [
        record.artifact
        for record in records
        if record.HasField("artifact") and record.artifact.name.endswith("disagreements")
    ]
    assert [entry.path[-4:] for entry in table.manifest.contents].count(".png") == 1  # all the same


def test_a_report_of_more_figures_than_wandb_takes_as_metadata_has_its_artifact(tmp_path, capsys):
    many = report(others={f"figure {place}": place / 7 for place in range(150)})
    write_report(tmp_path, many)
    logger = make_logger(config(), tmp_path)
    log_report(logger, many, tmp_path)
    finish_logger(logger)
    records = wandb_file.records(tmp_path)
    (model,) = [
        record.artifact
        for record in records
        if record.HasField("artifact") and record.artifact.type == "model"
    ]
    metadata = json.loads(model.metadata)
    assert metadata["stage"]["onnx/accuracy"] == 0.98
    assert metadata["report"]["others/figure 149"] == 149 / 7
    assert capsys.readouterr().err == ""


def test_each_job_of_a_process_has_a_run_of_its_own(tmp_path):
    for name, failed in (("first", False), ("second", True)):
        logger = make_logger(config(), tmp_path / name, group="sweep", job_name=name)
        logger.log_metrics({"loss": 1.0})
        finish_logger(logger, failed=failed)
    runs = [wandb_file.records(tmp_path / name) for name in ("first", "second")]
    ids = {record.run.run_id for run in runs for record in run if record.HasField("run")}
    exits = [record.exit.exit_code for run in runs for record in run if record.HasField("exit")]
    assert len(ids) == 2
    assert exits == [0, 1]
    assert wandb.run is None


@pytest.mark.usefixtures("nobody")
def test_without_a_login_wandb_is_offline_and_never_asks(tmp_path, modes, monkeypatch):
    make_logger(config(), tmp_path)
    assert modes == ["offline"]
    monkeypatch.setenv("WANDB_MODE", "online")
    make_logger(config(), tmp_path)
    assert modes == ["offline", "offline"]


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("way", ["key", "netrc"])
def test_with_a_login_wandb_is_online_and_offline_where_that_fails(
    tmp_path, modes, monkeypatch, way
):
    if way == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        host = loggers.urlsplit(wandb.setup().settings.base_url).netloc
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
    make_logger(config(), tmp_path)
    assert modes == ["online", "offline"]


@pytest.mark.feature("W&B unreachable: one line, and the run is kept as csv")
def test_where_wandb_cannot_start_a_line_says_so_and_csv_takes_over(tmp_path, modes, capsys):
    logger = make_logger(config(), tmp_path)
    assert isinstance(logger, pl.loggers.CSVLogger)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no such service at all" in told
    log_report(logger, report(), tmp_path)
    finish_logger(logger)
    assert "stage/onnx/accuracy" in (tmp_path / "csv" / "metrics.csv").read_text()


@pytest.mark.feature("W&B's folder unwritable: one line, and the run is kept as csv")
def test_an_unwritable_wandb_folder_does_not_stop_the_run(tmp_path, capsys):
    (tmp_path / "wandb").write_text("a file where W&B wants its folder")
    assert isinstance(make_logger(config(), tmp_path), pl.loggers.CSVLogger)
    assert "logs to csv instead" in capsys.readouterr().err


def test_disabled_and_none_log_nothing(tmp_path, monkeypatch):
    assert make_logger(config("logger=none"), tmp_path) is False
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert make_logger(config(), tmp_path) is False
    log_report(False, report(), tmp_path)
    finish_logger(False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "package", "where"),
    [
        ("tensorboard", "tensorboard", "tensorboard/events.out.tfevents.*"),
        ("mlflow", "mlflow", "mlruns/*/*/metrics/report/size_bytes/int8"),
    ],
)
def test_lightnings_other_loggers_write_into_the_folder(
    tmp_path, monkeypatch, name, package, where
):
    pytest.importorskip(package)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    logger = make_logger(config(f"logger={name}"), Path("run"), job_name="int8_ptq-run")
    logger.log_metrics({"val/accuracy": 0.5}, step=3)
    log_report(logger, report(), tmp_path)
    finish_logger(logger)
    assert list((tmp_path / "run").glob(where))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_logger_without_its_package_is_refused_before_anything_runs(monkeypatch, name):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(QatTricksError, match=f"logger={name} needs the package {name}: pip inst"):
        LoggerOptions(name=name)


def test_a_logger_that_fails_at_the_end_is_a_warning(tmp_path, capsys):
    class Broken(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise OSError("disk full")

    log_report([Broken(tmp_path)], report(), tmp_path)
    assert "disk full" in capsys.readouterr().err


def test_metric_names_are_numbers_under_paths():
    metrics = report_metrics(report(agreement=None))
    assert metrics["stage/fp32/accuracy"] == 0.985
    assert metrics["report/memory_mib/int8"] == 64.0
    assert "report/agreement" not in metrics
    assert not any("preprocessing" in name for name in metrics)
    assert all(isinstance(value, int | float) for value in metrics.values())
