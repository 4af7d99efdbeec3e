"""The tables that a logger shows are those of the page."""

from qat_tricks.jobs.report_tables import report_tables
from tests.evidence.test_page import whole
from tests.helpers.samples import report


def test_rows_are_those_of_the_report_in_columns_that_all_of_them_have():
    made = whole()
    made["stages"][1]["drop_points"] = 0.5  # the first stage has none
    tables = report_tables(made)
    assert [row["name"] for row in tables["ledger"]] == ["fp32", "onnx"]
    assert [row["drop_points"] for row in tables["ledger"]] == [None, 0.5]
    assert tables["ledger"][1]["latency_ms/p50"] == 0.6
    assert [row["kind"] for row in tables["layers"]] == ["weight", "activation"]
    for name in ("classes", "confusions", "disagreements"):
        assert len(tables[name]) == len(made["comparison"][name]) > 0
    for rows in tables.values():
        assert all(row.keys() == rows[0].keys() for row in rows)
        assert not any(isinstance(cell, (list, dict)) for row in rows for cell in row.values())


def test_what_was_not_measured_has_no_table():
    assert report_tables(report()).keys() == {"ledger", "checklist"}
