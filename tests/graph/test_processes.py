"""With one process; with two see test_scale_out.py."""

from qat_tricks.graph.processes import from_rank_zero, has_others


def test_one_process_is_rank_zero():
    value = {"bits": 4}
    assert not has_others()
    assert from_rank_zero(value) is value
