import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.patterns import check_patterns, matches


def test_a_name_matches_one_of_several_patterns():
    assert matches("layer1.0.conv1", ["head", "layer1.*"])
    assert not matches("layer1.0.conv1", ["layer1"])
    assert not matches("layer1.0.conv1", [])


def test_a_pattern_that_matches_nothing_is_told_with_what_is_near():
    check_patterns(["stem*", "head"], ["stem.0", "head"])
    with pytest.raises(QatTricksError, match=r'"haed" matches no conv or linear .*"head"'):
        check_patterns(["head", "haed"], ["stem.0", "head"])
