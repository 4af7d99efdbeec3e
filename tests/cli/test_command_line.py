"""The command line: split into flags and overrides, with the configs of forecasts."""

import pytest

from qat_tricks.cli.command_line import checked_arguments
from qat_tricks.errors import QatTricksError


def test_flags_come_first_and_nothing_is_forecast(tmp_path):
    arguments = ["recipe=fp32", "--config-dir", str(tmp_path), "seed=3", "--cfg", "job"]
    checked = checked_arguments("train", arguments)
    assert checked.arguments == [
        "--config-dir",
        str(tmp_path),
        "--cfg",
        "job",
        "recipe=fp32",
        "seed=3",
    ]
    assert checked.forecasts == []


def test_forecasts_are_the_configs_of_their_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked = checked_arguments("train", ["-m", "recipe=int8_ptq,w4a4_qat", "forecast=true"])
    assert [job.recipe.name for job in checked.forecasts] == ["int8_ptq", "w4a4_qat"]
    # shown, not forecast
    assert checked_arguments("train", ["forecast=true", "--cfg", "job"]).forecasts == []
    assert not list(tmp_path.iterdir())


def test_a_forecast_needs_no_folder_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (job,) = checked_arguments("train", ["forecast=true", "hydra.run.dir=file/run"]).forecasts
    assert job.forecast
    with pytest.raises(QatTricksError, match="cannot be written"):
        checked_arguments("train", ["hydra.run.dir=file/run"])
