"""The checks that a run and an evaluation share."""

import pytest
from omegaconf import OmegaConf

from qat_tricks.cli.checks import check_data, check_folder, sections
from qat_tricks.errors import QatTricksError
from qat_tricks.settings.binding import Problems


def test_a_folder_that_cannot_be_written_is_refused_and_one_that_can_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QatTricksError, match="cannot be written"):
        check_folder(tmp_path / "file" / "run")
    check_folder(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_sections_of_a_config_are_plain_data_without_hydras():
    config = OmegaConf.create({"a": {"x": 1, "y": "${b}"}, "b": 2, "hydra": {}, "c": 3})
    problems = Problems()
    assert sections(config, ["a"], ["b"], problems) == {"a": {"x": 1, "y": 2}, "b": 2}
    assert problems.messages == ['the config has no setting "c": allowed: a, b']


def test_sections_that_cannot_be_had_are_told_at_once():
    config = OmegaConf.create({"a": 1, "b": "${nope}"})
    with pytest.raises(QatTricksError) as caught:
        sections(config, ["a"], ["b", "c"], Problems())
    for part in ("a=1 is not allowed", "b: Interpolation key 'nope'", "lacks c"):
        assert part in str(caught.value)


def test_data_is_checked_without_reading_it():
    check_data({"name": "digits", "shift": 2})
    with pytest.raises(QatTricksError) as caught:
        check_data({"name": "digits", "shift": "x", "sed": 1})
    for part in ("data.shift='x' is not allowed", 'has no setting "sed": did you mean "seed"'):
        assert part in str(caught.value)
