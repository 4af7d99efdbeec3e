"""The comparison of a sweep: every job has its row, failed ones too, and the picture is drawn."""

import csv
import io

import pytest
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import (
    comparison_rows,
    comparison_table,
    front,
    labels,
    render_comparison,
    write_comparison,
)
from qat_tricks.evidence.report import write_report
from tests.evidence.test_page import Page
from tests.helpers.samples import report


def test_every_job_has_its_row_in_order(sweep):
    with write_comparison(sweep).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "10/nested"]
    assert [row["recipe"] for row in rows] == ["int8_ptq", "int8_qat", "", "int8_prune50"]
    assert [row["error"] for row in rows] == ["", "", "the loader is empty", ""]
    assert float(rows[0]["drop_points"]) == pytest.approx(1.0)
    assert (
        int(rows[3]["size_bytes_int8"])
        < int(rows[0]["size_bytes_int8"])
        < int(rows[0]["size_bytes_fp32"])
    )
    assert float(rows[0]["latency_p50_ms_int8"]) == 0.6
    assert rows[2]["accuracy_onnx"] == ""


def test_damaged_jobs_are_rows_too(sweep):
    (sweep / "0" / "report.json").write_text("{")
    (sweep / "2" / "error.json").write_text("[]")
    errors = [row["error"] for row in comparison_rows(sweep)]
    assert "not JSON" in errors[0]
    assert "names no error" in errors[2]
    write_comparison(sweep)


def printed(sweep, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(comparison_rows(sweep), width))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def swept(tmp_path):
    """Jobs of one recipe that differ in a setting, and one that has failed."""
    key = "recipe.stages.ptq.tricks.calibrate.estimator"
    for job, (estimator, accuracy) in enumerate([("kl", 0.975), ("percentile", 1.0)]):
        folder = tmp_path / f"{job}_int8_ptq"
        write_report(folder, report("int8_ptq", accuracy=accuracy))
        (folder / ".hydra").mkdir()
        lines = f"- recipe=int8_ptq\n- {key}={estimator}\n- seed=1\n"
        (folder / ".hydra" / "overrides.yaml").write_text(lines)
    failed = tmp_path / "2_int8_qat"
    (failed / ".hydra").mkdir(parents=True)
    (failed / ".hydra" / "overrides.yaml").write_text("- recipe=int8_qat\n- seed=1\n")
    (failed / "error.json").write_text('{"error": "the loader is empty"}')
    return tmp_path


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_names_what_was_swept_and_is_never_cut(swept, width):
    lines = printed(swept, width)
    text = " ".join(" ".join(lines).split())
    assert "…" not in text
    assert max(map(len, lines)) <= width
    assert "estimator=kl" in text
    assert "estimator=percentile" in text
    assert "seed" not in text  # all jobs have it
    for part in ("97.50%", "1.00", "gain 1.50", "310.0 kB", "0.600 ms"):
        assert part in text
    assert "int8_qat: the loader is empty" in text
    left_out = "comparison.csv has coverage, memory too" in text
    assert left_out == ("64 MiB" not in text) == (width == 80)
    assert [row["settings"] for row in comparison_rows(swept)][1:] == ["estimator=percentile", ""]


def test_jobs_that_nothing_tells_apart_have_their_numbers(sweep):
    write_report(sweep / "11", report("int8_ptq"))
    rows = comparison_rows(sweep)
    assert labels(rows) == [
        "int8_ptq · job 0",
        "int8_qat",
        "job 2",
        "int8_prune50",
        "int8_ptq · job 11",
    ]


def test_jobs_without_figures_still_compare(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text('{"error": "no"}')
    write_report(tmp_path / "1", report(latency_ms=None, memory_mib=None, size_bytes=None))
    write_comparison(tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 0


def made_by_hydra(job, result=None):
    (job / ".hydra").mkdir(parents=True)
    if result is not None:
        write_report(job, result)


@pytest.mark.parametrize("inner", ["earlier", "evaluation", "evaluation_2"])
def test_what_lies_in_a_jobs_folder_is_no_job(sweep, inner):
    made_by_hydra(sweep / "3", report())
    made_by_hydra(sweep / "4")  # a run that was interrupted: it has no result
    (sweep / "5").mkdir()
    (sweep / "5" / "config.yaml").touch()  # likewise, where Hydra was told to keep nothing
    jobs = ["0", "1", "2", "3", "10/nested"]
    for job in (*jobs, "4", "5"):
        write_report(sweep / job / inner, report())
    assert [row["job"] for row in comparison_rows(sweep)] == jobs
    with pytest.raises(QatTricksError, match="no job"):
        comparison_rows(sweep / "0")


def test_a_sweep_in_the_folder_of_a_single_run_has_its_jobs(tmp_path):
    made_by_hydra(tmp_path, report())
    write_report(tmp_path / "evaluation", report())
    made_by_hydra(tmp_path / "0", report())
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.yaml").touch()
    write_report(tmp_path / "1", report())
    made_by_hydra(tmp_path / "0" / "inner", report())
    assert [row["job"] for row in comparison_rows(tmp_path)] == ["0", "0/inner", "1"]


def test_a_sweep_without_jobs_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match="no job"):
        write_comparison(tmp_path)


def test_the_page_has_every_job_and_the_reason_of_one_that_failed(sweep):
    write_comparison(sweep)
    text = (sweep / "comparison.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "the loader is empty" in page.text
    hrefs = [address for address in page.addresses if not address.startswith(("#", "data:"))]
    assert hrefs == ["0/report.html", "1/report.html", "10/nested/report.html"]
    assert all((sweep / href).is_file() for href in hrefs)
    # a mark in each of two panels shows its job under the pointer
    assert page.text.count("int8_qat: 98.20 %") == 2
    assert "title-" not in text


def row(accuracy, size, latency, data="digits"):
    figures = {"size_bytes_int8": size, "latency_p50_ms_int8": latency}
    return {"data": data, "accuracy_onnx": accuracy, **figures}


def test_the_front_is_of_all_three():
    rows = [row(0.9, 10, 1.0), row(0.8, 5, 2.0), row(0.8, 10, 2.0), row(0.9, 10, 1.0)]
    rows += [row(0.99, 50, 0.5), row(None, 1, 0.1)]
    assert front(rows) == [True, True, False, True, True, False]


def test_each_data_set_has_its_own_front():
    easy, hard = row(0.99, 10, 1.0), row(0.7, 20, 2.0, data="cifar10")
    worse = row(0.6, 20, 2.0, data="cifar10")
    assert front([hard, easy, worse]) == [True, True, False]
    assert front([hard | {"data": "digits"}, easy]) == [False, True]


def test_the_front_of_a_search_is_of_validation_images():
    rows = [row(0.9, 10, 1.0), row(0.99, 10, 1.0)]
    assert front(rows) == [False, True]
    validated = [one | {"accuracy_validation": v} for one, v in zip(rows, (0.8, 0.7), strict=True)]
    assert front(validated) == [True, False]


def test_the_page_of_a_search_says_which_accuracy_its_stars_are_of(sweep):
    rows = comparison_rows(sweep)
    names = labels(rows)
    assert "on validation images" not in render_comparison(rows, names, set())
    rows = [one | {"accuracy_validation": one["accuracy_onnx"]} for one in rows]
    assert "accuracy on validation images, size" in render_comparison(rows, names, set())


def test_the_page_says_that_several_data_sets_have_fronts_of_their_own(sweep):
    write_comparison(sweep)
    one = Page((sweep / "comparison.html").read_text()).text
    assert "front of digits" not in one
    assert "on the same data" not in one
    write_report(sweep / "3", report(data="cifar10", accuracy=0.5))
    write_comparison(sweep)
    several = Page((sweep / "comparison.html").read_text()).text
    # in each of two panels
    assert several.count("front of digits") == several.count("front of cifar10") == 2
    assert "Each line is the front of one data set" in several
    assert "no other job on the same data is as good" in several


def test_names_on_the_page_are_escaped(sweep):
    rows = comparison_rows(sweep)
    names = ["<script>", "b&b", "$x$", "d\x00"]
    page = Page(render_comparison(rows, names, set()))
    assert page.tags.count("script") == 1  # that which sorts
    assert "<script>: 97.50 %" in page.text
    assert "b&b" in page.text


def test_a_sweep_in_which_nothing_was_measured_has_a_page(sweep):
    rows = [
        row | {"accuracy_onnx": None, "size_bytes_int8": None} for row in comparison_rows(sweep)
    ]
    assert Page(render_comparison(rows, ["a", "b", "c", "d"], set())).text.count("-") >= 6
