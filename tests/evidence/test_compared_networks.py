"""The networks of a sweep: each different float network once, and the same ones wherever shown."""

import pytest
from matplotlib.figure import Figure

from qat_tricks.evidence import comparison_plot, page_plots
from qat_tricks.evidence.compared_networks import float_networks, job_networks
from qat_tricks.evidence.comparison import write_comparison
from qat_tricks.evidence.report import write_report
from tests.evidence.test_page import Page
from tests.helpers.samples import report


def row(job, accuracy, size=1_000_000, latency=1.0, **changes):
    """A row of which only the float figures matter."""
    figures = {"size_bytes_fp32": size, "latency_p50_ms_fp32": latency}
    named = {"job": job, "model": "custom", "data": "digits"}
    return {**named, "accuracy_fp32": accuracy, **figures, **changes}


def test_one_float_network_of_several_jobs_is_there_once():
    # the recipe's name makes the file longer, and each run has its own latency
    rows = [row("0", 0.9), row("1", 0.9, size=1_000_020, latency=1.3), row("2", None)]
    assert float_networks(rows) == [
        {
            "name": "float",
            "data": "digits",
            "accuracy": 0.9,
            "size_bytes": 1_000_000,
            "latency_ms": 1.0,
        }
    ]


@pytest.mark.parametrize(
    "other", [{"accuracy": 0.8}, {"accuracy": 0.9, "size": 1_200_000}], ids=["seed", "factory"]
)
def test_different_float_networks_of_one_name_are_all_there(other):
    found = float_networks([row("0", 0.9), row("1", **other), row("2", 0.9)])
    assert [own["name"] for own in found] == ["float · job 0 and 1 more", "float · job 1"]
    assert [own["accuracy"] for own in found] == [0.9, other["accuracy"]]
    assert [own["size_bytes"] for own in found] == [1_000_000, other.get("size", 1_000_000)]


def test_the_model_and_the_data_tell_float_networks_apart():
    rows = [row("0", 0.9), row("1", 0.9, model="resnet20"), row("2", 0.9, data="cifar10")]
    assert [own["name"] for own in float_networks(rows)] == [
        "float · custom · digits",
        "float · resnet20 · digits",
        "float · custom · cifar10",
    ]


def test_a_run_that_was_interrupted_hides_no_figure_of_its_float_network():
    (found,) = float_networks([row("0", 0.9, size=None, latency=None), row("1", 0.9)])
    assert (found["size_bytes"], found["latency_ms"]) == (1_000_000, 1.0)


def test_the_network_of_a_job_has_the_figures_of_its_file():
    own = {"accuracy_onnx": 0.8, "size_bytes_int8": 300, "latency_p50_ms_int8": 0.5}
    (found,) = job_networks([row("0", 0.9) | own], ["int8_ptq"])
    figures = {"accuracy": 0.8, "size_bytes": 300, "latency_ms": 0.5}
    assert found == {"name": "int8_ptq", "data": "digits", **figures}


def test_the_page_and_the_picture_show_the_same_float_networks(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        comparison_plot, "_panel", lambda axes, title, points: drawn.update({title: points})
    )
    for job, accuracy in enumerate((0.985, 0.9)):
        made = report(f"recipe{job}", accuracy=0.89)
        made["stages"][0]["accuracy"] = accuracy
        write_report(tmp_path / str(job), made)
    write_comparison(tmp_path)
    page = Page((tmp_path / "comparison.html").read_text()).text
    floats = [("float · job 0", 98.5), ("float · job 1", 90.0)]
    assert len(drawn) == 2
    for points in drawn.values():
        assert [(p.label, p.accuracy) for p in points if p.marker == "D"] == floats
    for name, accuracy in floats:
        assert page.count(f"{name}: {accuracy:.2f} %") == 2


def test_the_page_draws_a_front_for_each_data_set(monkeypatch):
    panels = Figure().subplots(1, 2)

    def draw_on_panels(name, draw, **options):
        draw(*panels)
        return page_plots.Markup()

    monkeypatch.setattr(page_plots, "_figure", draw_on_panels)
    places = [("digits", 1, 0.9), ("digits", 2, 0.95), ("digits", 3, 0.92), ("cifar10", 2, 0.5)]
    jobs = [
        {"name": "a", "data": d, "accuracy": y, "size_bytes": x * 1_000_000, "latency_ms": x}
        for d, x, y in places
    ]
    floats = [jobs[-1] | {"accuracy": 0.75, "size_bytes": 4_000_000, "latency_ms": 4}]
    page_plots.sweep_plot(jobs, floats)
    for axes in panels:
        lines = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
        fronts = sorted(line.get_xydata().tolist() for line in lines)
        assert fronts == [[[1, 90], [2, 95]], [[2, 50], [4, 75]]]
