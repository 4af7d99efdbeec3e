"""One live display on a terminal: what it says, what it hands on, and where it is silent."""

import sys
import threading

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from qat_tricks.progress import Bar, begin, console, enter, live, measured, track


def test_items_pass_one_by_one_in_order_and_nothing_is_printed(capfd):
    taken = []

    def items():
        for item in range(3):
            taken.append(item)
            yield item

    with live():
        tracked = track(items(), "count")
        assert next(tracked) == 0
        assert taken == [0]  # no item is read before it is asked for
        assert list(tracked) == [1, 2]
        enter("stage 1 of 2, ptq")
    enter("")
    assert capfd.readouterr() == ("", "")


def test_bars_share_a_display_that_says_where_the_run_is(terminal, capsys):
    with live():
        enter("stage 1 of 2, ptq")
        begin("equalize")
        assert list(track([1], "count")) == [1]
        measured("equalize kept: logits at 31.2 dB")
        begin("calibrate")
        outer = Bar("round", 2)
        for _ in track(range(3), "calibrate"):  # a display within a display would raise
            outer.advance()
        outer.show("round again", 2, lambda: "loss 0.1")
        outer.close()
    shown = capsys.readouterr().err
    assert "stage 1 of 2, ptq · equalize" in shown
    assert "stage 1 of 2, ptq · calibrate · equalize kept: logits at 31.2 dB" in shown
    assert "count" in shown
    assert "round" in shown
    assert shown.endswith("\x1b[2K")  # it has gone
    list(track([1], "count"))
    assert "kept" not in capsys.readouterr().err  # and what it said


def test_a_display_ends_with_what_it_was_opened_for(terminal, capsys):
    def interrupted():
        with live():
            for _ in track([1, 2], "count"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    capsys.readouterr()
    begin("equalize")
    assert capsys.readouterr().err == ""
    begin("")


def test_a_bar_is_taken_away_only_once(terminal):
    with live():
        bar = Bar("round", 2)
        bar.close()
        bar.close()
        with live():  # as a run within a sweep
            assert list(track([1], "count")) == [1]


def test_what_is_printed_into_a_pipe_stays_there(terminal, capsys):
    with live():
        print("fp32: top-1 99.33 %")
    assert capsys.readouterr().out == "fp32: top-1 99.33 %\n"


def test_a_console_prints_above_the_display(terminal, capsys, monkeypatch):
    console().print("no display")
    assert capsys.readouterr().out == "no display\n"
    with live():
        console().print("a table, into a pipe")
        console(stderr=True).print("a warning")
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda file: True)
        console().print("a table")
    out, err = capsys.readouterr()
    assert out == "a table, into a pipe\n"
    assert "a warning\n" in err
    assert "a table\n" in err


def test_no_thread_draws(terminal):
    before = threading.active_count()
    with live():
        for _ in track([1], "count"):
            assert threading.active_count() == before


def test_a_dumb_terminal_gets_no_display(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    list(track([1], "count"))
    assert capsys.readouterr().err == ""


def test_other_processes_than_the_first_draw_nothing(terminal, monkeypatch, capsys):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with live():
        enter("stage 1 of 2, ptq")
        assert list(track([1], "count")) == [1]
    assert capsys.readouterr().err == ""
