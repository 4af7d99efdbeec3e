"""Figures and their units."""

from qat_tricks.evidence.show import ratio, show


def test_a_figure_that_was_not_measured_is_never_a_number():
    assert show(None, "ms") == "not measured"
    assert show(None, "ms", none="-") == "-"
    assert show(0.0, "ms") == "0.000 ms"
    assert ratio(None, 2.0) is ratio(2.0, None) is ratio(2.0, 0.0) is None
    assert ratio(0.0, 2.0) == 0.0


def test_units_grow_with_the_figure():
    assert [show(size, "bytes") for size in (999_900, 1e6)] == ["999.9 kB", "1.00 MB"]
    assert [show(time, "ms") for time in (0.4567, 1.234)] == ["0.457 ms", "1.23 ms"]
    assert [show(time, "seconds") for time in (99.94, 100.0)] == ["99.9 s", "100 s"]
    assert show(0.1234, "percent") == "12.34%"
    assert [show(change, "points") for change in (0.5, -0.5)] == ["+0.50", "-0.50"]
