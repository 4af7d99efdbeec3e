"""The parts of an error's text: names that are near, and other libraries' errors on one line."""

from qat_tricks.errors import LINE, SHOWN, did_you_mean, one_line


def test_near_names_are_proposed_and_the_allowed_listed_where_none_is_near():
    assert did_you_mean("calibrat", ["prune", "calibrate"]) == 'did you mean "calibrate"?'
    assert did_you_mean("x", ["prune", "distill", "prune"]) == "allowed: distill, prune"
    assert did_you_mean("x", []) == "allowed: nothing"


def test_a_long_list_of_names_is_cut_and_the_rest_counted():
    names = [f"name{index:04}" for index in range(SHOWN + 1234)]
    told = did_you_mean("x", names)
    assert [name for name in names if name in told] == names[:SHOWN]
    assert told.endswith(" and 1,234 others")


def test_an_error_of_many_lines_becomes_one_of_a_bounded_length():
    assert one_line(ValueError("first\n   second\tthird ")) == "first second third"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    long = ValueError("x" * (LINE + 1))
    assert one_line(long) == "x" * (LINE - 3) + "..."
    assert one_line(ValueError("x" * LINE)) == "x" * LINE
    assert one_line(long, limit=None) == "x" * (LINE + 1)
