"""Settings as plain data, and errors of their libraries as one line."""

import pytest
from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.settings.plain import as_plain, one_line


def test_interpolations_are_resolved_or_told_with_the_settings_they_are_in():
    config = OmegaConf.create({"size": 3, "stages": [{"of": "${size}"}]})
    plain = as_plain(config, "recipe mine")
    assert plain == {"size": 3, "stages": [{"of": 3}]}
    assert (type(plain), type(plain["stages"])) == (dict, list)
    config.stages[0].of = "${nothing}"
    with pytest.raises(QatTricksError, match=r"^recipe mine: .*'nothing' not found") as caught:
        as_plain(config, "recipe mine")
    assert "\n" not in str(caught.value)


def test_messages_are_one_line_with_their_cause():
    error = ValueError("first\n  line")
    error.__cause__ = KeyError("cause")
    assert one_line(error) == "first line 'cause'"
    assert one_line(ValueError("wrong\n    full_key: a.b")) == "wrong"
