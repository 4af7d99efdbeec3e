"""Settings as plain data, and errors of their libraries as one line."""

from qat_tricks.settings.plain import one_line


def test_messages_are_one_line_with_their_cause():
    error = ValueError("first\n  line")
    error.__cause__ = KeyError("cause")
    assert one_line(error) == "first line 'cause'"
    assert one_line(ValueError("wrong\n    full_key: a.b")) == "wrong"
