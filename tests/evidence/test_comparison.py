"""The comparison of a sweep: every job has its row, failed ones too, and the picture is drawn."""

import csv

import pytest
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import comparison_rows, comparison_table, write_comparison
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


def test_the_table_shows_jobs_and_errors(sweep):
    console = Console(width=220, record=True, quiet=False, file=(sweep / "out.txt").open("w"))
    console.print(comparison_table(comparison_rows(sweep)))
    text = console.export_text()
    assert all(part in text for part in ("int8_prune50", "98.20%", "the loader is empty", " 1.00"))


def test_jobs_without_figures_still_compare(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text('{"error": "no"}')
    write_report(tmp_path / "1", report(latency_ms=None, memory_mib=None, size_bytes=None))
    write_comparison(tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_a_sweep_without_jobs_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match="no job"):
        write_comparison(tmp_path)
