"""The comparison of a sweep: every job has its row, failed ones too, and the picture is drawn."""

import csv
import json
from itertools import pairwise

import pytest
from matplotlib import image
from matplotlib.text import Text
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence import comparison_plot
from qat_tricks.evidence.comparison import comparison_rows, comparison_table, write_comparison
from qat_tricks.evidence.report import write_report
from tests.helpers.samples import report


@pytest.fixture
def sweep(tmp_path):
    write_report(tmp_path / "0", report("int8_ptq", accuracy=0.975))
    write_report(tmp_path / "1", report("int8_qat", accuracy=0.982))
    write_report(tmp_path / "10" / "nested", report("int8_prune50", accuracy=0.98, scale=0.9))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "error.json").write_text(json.dumps({"error": "the loader is empty"}))
    return tmp_path


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


def test_the_picture_labels_every_network_once_and_no_label_covers_another(sweep, monkeypatch):
    figures = []
    monkeypatch.setattr(
        comparison_plot, "FigureCanvasAgg", _keeping(figures, comparison_plot.FigureCanvasAgg)
    )
    for job in range(20, 34):  # many that are alike
        write_report(sweep / str(job), report("w4a4_qat", accuracy=0.979))
    write_comparison(sweep)
    assert image.imread(sweep / "comparison.png").ndim == 3
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:
        labels = [text for text in axes.texts if text.get_text()]
        names = [text.get_text() for text in labels]
        assert len(set(names)) == len(names) == 3 + 14 + 1
        assert "float" in names
        boxes = sorted((Text.get_window_extent(text) for text in labels), key=lambda box: box.y0)
        tops = [(lower.y1, upper.y0) for lower, upper in pairwise(boxes)]
        assert all(top <= bottom + 1 for top, bottom in tops)


def test_jobs_without_figures_still_compare(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text('{"error": "no"}')
    write_report(tmp_path / "1", report(latency_ms=None, memory_mib=None, size_bytes=None))
    write_comparison(tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_a_sweep_without_jobs_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match="no job"):
        write_comparison(tmp_path)


def _keeping(figures, canvas):
    def make(figure):
        figures.append(figure)
        return canvas(figure)

    return make
