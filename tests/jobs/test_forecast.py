"""The forecast of a run, on the command line: what stays in float, and nothing on disk."""

import re

import pytest

from qat_tricks.cli import main as cli
from qat_tricks.jobs.forecast import forecast_job
from tests.helpers.configs import composed

QUICK = ["model=custom", "model.factory=tests.helpers.nets.SmallNet", "data=fake"]


def test_forecast_prints_what_stays_in_float_and_trains_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    in_float = "recipe.stages.ptq.tricks.quantize.functions=float"
    model = "model=mobilenet_v3_small"
    cli.train(["recipe=int8_ptq", "forecast=true", model, "data=fake", in_float])
    printed = " ".join(capfd.readouterr().out.split())
    assert "100.00% of the " in printed
    assert "million MACs of convs and linears in integers, for images of 3x16x16" in printed
    # Operations of one kind are one row, and say that no MACs are in float.
    assert printed.count("Hardswish") == 1
    assert "features.0.2" in printed
    assert re.search(r"features\S* and \d+ more", printed)
    assert not list(tmp_path.iterdir())


def test_a_sweep_of_forecasts_prints_each_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    cli.train(["-m", "recipe=int8_ptq,w4a8_qat", "forecast=true", *QUICK])
    printed = capfd.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines() if "nothing is" in line] == [
        "int8_ptq",
        "w4a8_qat",
    ]
    assert printed.out.count("MACs of convs and") == 2
    assert printed.err == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["recipe=fp32", "forecast=true"], "does not quantize"),
        (["forecast=maybe"], "forecast='maybe' is not allowed: give true or false"),
        (["-m", "forecast=true,false"], "forecast is true in some jobs only"),
    ],
)
def test_a_forecast_that_cannot_be_made_is_refused(tmp_path, monkeypatch, capfd, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.train(arguments)
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_excluded_layers_and_untraced_parts_are_forecast_in_float():
    plain = forecast_job(composed("recipe=int8_ptq", *QUICK))
    quantize = "recipe.stages.ptq.tricks.quantize"
    without = forecast_job(composed("recipe=int8_ptq", *QUICK, f"{quantize}.exclude=[head]"))
    assert plain.coverage == 1
    assert without.coverage < 1
    assert "head" in [row.name for row in without.in_float]
    untraced = forecast_job(composed("recipe=int8_ptq", *QUICK, "recipe.untraced=[block]"))
    assert "block" in [row.name for row in untraced.in_float]
