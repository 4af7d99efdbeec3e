"""Progress bars: they hand on what they count, and are silent where nobody watches."""

import sys

from qat_tricks.progress import Bar, enter, track


def test_items_pass_one_by_one_in_order_and_nothing_is_printed(capfd):
    taken = []

    def items():
        for item in range(3):
            taken.append(item)
            yield item

    tracked = track(items(), "count")
    assert next(tracked) == 0
    assert taken == [0]  # no item is read before it is asked for
    assert list(tracked) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_bars_say_where_in_a_run_they_are(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    enter("stage 1 of 2, ptq")
    try:
        assert list(track([1], "calibrate")) == [1]
        Bar("round", 2).close()
    finally:
        enter("")
    shown = capsys.readouterr().err
    assert "stage 1 of 2, ptq: calibrate" in shown
    assert "stage 1 of 2, ptq: round" in shown
    list(track([1], "calibrate"))
    assert "stage" not in capsys.readouterr().err
