"""The ledger: each stage against the float one, and stages that lose too much stopped."""

import io
import json

import pytest
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.ledger import Ledger, LedgerRow, check_drop
from tests.helpers.samples import metrics


@pytest.fixture
def ledger():
    ledger = Ledger()
    ledger.add(
        LedgerRow(name="fp32", before=None, after=metrics(0.98), seconds=10.0, size_bytes=1_100_000)
    )
    ledger.add(
        LedgerRow(
            name="prune",
            before=metrics(0.98),
            after=metrics(0.95),
            seconds=20.0,
            size_bytes=310_000,
            latency_ms={"p50": 0.61, "p95": 0.9},
            sparsity=0.5,
        )
    )
    ledger.add(LedgerRow(name="tune", before=metrics(0.95), after=metrics(0.99), seconds=5.0))
    return ledger


def printed(ledger, width=200):
    """The rows of the printed table, by their stage's name."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(ledger.as_table())
    _title, head, _rule, *rows = (line.rstrip() for line in console.export_text().splitlines())
    assert head.split()[:8] == ["stage", "top-1", "drop", "F1", "size", "latency", "zeros", "time"]
    return {row.split()[0]: row for row in rows}


def test_drops_are_from_the_float_stage_not_from_the_one_before(ledger):
    assert [row["drop_points"] for row in ledger.rows()] == pytest.approx([0, 3, -1])
    assert [row["before"] and row["before"]["accuracy"] for row in ledger.rows()] == [
        None,
        0.98,
        0.95,
    ]


def test_what_is_written_reads_back(ledger, tmp_path):
    path = tmp_path / "new" / "ledger.json"
    ledger.write(path)
    assert json.loads(path.read_text()) == ledger.rows()
    assert [p.name for p in path.parent.iterdir()] == ["ledger.json"]


def test_the_table_has_a_row_a_stage_and_no_invented_figures(ledger):
    lines = printed(ledger)
    assert list(lines) == ["fp32", "prune", "tune"]
    assert "98.00%" in lines["fp32"]
    assert all(
        part in lines["prune"]
        for part in ("95.00%", " 3.00", "310.0 kB", "0.610 ms", "50.00%", "20.0 s")
    )
    assert lines["tune"].split().count("-") == 3
    assert "gain 1.00" in lines["tune"]


def test_the_widest_row_fits_a_terminal():
    ledger = Ledger()
    costs = {
        "size_bytes": 553_430_000,
        "latency_ms": {"p50": 123.45, "p95": 150.0},
        "sparsity": 0.5,
    }
    ledger.add(LedgerRow(name="fp32", before=None, after=metrics(1.0), seconds=1809.7, **costs))
    ledger.add(
        LedgerRow(
            name="reconstruct8", before=metrics(1.0), after=metrics(0.0), seconds=12345.6, **costs
        )
    )
    ledger.add(
        LedgerRow(name="prune_qat", before=metrics(0.0), after=metrics(1.0), seconds=99.94, **costs)
    )
    lines = printed(ledger, width=80)
    assert list(lines) == ["fp32", "reconstruct8", "prune_qat"]
    cells = " ".join(lines["reconstruct8"].split())
    assert cells == "reconstruct8 0.00% 100.00 0.00% 553.43 MB 123.45 ms 50.00% 12346 s"
    assert lines["prune_qat"].endswith(" 99.9 s")


def test_a_folder_that_cannot_be_written_is_one_line(ledger, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QatTricksError, match=r"ledger\.json\" cannot be written"):
        ledger.write(tmp_path / "file" / "ledger.json")


def test_a_stage_may_lose_what_it_may_lose():
    check_drop("prune", 0.98, 0.97, 1.0)
    check_drop("prune", 0.98, 0.99, 0.0)
    check_drop("prune", 0.98, 0.10, None)


@pytest.mark.parametrize("after", [0.96, float("nan")])
def test_a_stage_that_lost_more_says_what_was_measured(after, tmp_path):
    with pytest.raises(QatTricksError) as caught:
        check_drop("prune", 0.98, after, 1.0, ledger_path=tmp_path / "ledger.json")
    text = str(caught.value)
    assert all(
        part in text
        for part in ('"prune"', "98.00%", f"{after:.2%}", "allowed: 1", "ledger.json", "max_drop")
    )


def test_what_is_left_of_the_users_network_stands_below_the_table(ledger):
    assert "your network" not in str(ledger.as_table().caption)
    step = {"name": "traced", "evaluation_db": 141.2, "by_design": False}
    ledger.add(LedgerRow(name="q", before=None, after=metrics(0.9), seconds=1, equivalence=[step]))
    assert ledger.as_table().caption == "your network → traced: 141 dB"
    assert ledger.rows()[-1]["equivalence"] == [step]
