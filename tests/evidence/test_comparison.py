"""The comparison of a sweep: every job has its row, failed ones too, and the picture is drawn."""

import csv
import io

import pytest
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import (
    comparison_rows,
    comparison_table,
    labels,
    write_comparison,
)
from qat_tricks.evidence.report import write_report
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


def test_a_sweep_without_jobs_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match="no job"):
        write_comparison(tmp_path)
