import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.order import check_order, put_in_order, working_order
from qat_tricks.tricks import (
    Calibrate,
    CorrectBias,
    Distill,
    Equalize,
    FoldBatchnorm,
    LearnScales,
    Prune,
    Quantize,
)


def refusal(tricks, done=()):
    with pytest.raises(QatTricksError) as caught:
        check_order(tricks, done)
    return str(caught.value)


def test_orders_that_work_are_let_through():
    check_order([FoldBatchnorm(), Equalize(), Quantize(), Calibrate(), LearnScales(), Prune()])
    check_order([Prune(), Distill()])  # of these none needs another
    check_order([])


def test_what_was_done_in_an_earlier_stage_counts():
    check_order([LearnScales()], done=["quantize", "calibrate"])
    assert "learn_scales needs calibrate before it" in refusal([LearnScales()], done=["quantize"])


def test_a_trick_that_comes_later_in_a_stage_may_have_been_done_before_it():
    check_order([Calibrate(), Quantize()], done=["quantize"])


def test_the_error_names_all_that_is_wrong_and_an_order_that_works():
    told = refusal([LearnScales(), Calibrate(), FoldBatchnorm(), Calibrate(), Quantize()])
    for part in (
        "in the order learn_scales, calibrate, fold_batchnorm, calibrate, quantize",
        "calibrate comes twice",
        "learn_scales must come after calibrate",
        "calibrate must come after quantize",
        "quantize must come",
    ):
        assert (part in told) == (part != "quantize must come"), part
    assert told.endswith("an order that works: fold_batchnorm, quantize, calibrate, learn_scales")


def test_what_is_missing_is_put_where_it_belongs():
    tricks = [CorrectBias(), LearnScales()]
    assert working_order(tricks) == ["quantize", "calibrate", "correct_bias", "learn_scales"]
    assert working_order(tricks, done=["quantize", "calibrate"]) == ["correct_bias", "learn_scales"]


def test_an_order_that_works_is_left_as_it_is():
    tricks = [Distill(), FoldBatchnorm(), Quantize(), Prune(), Calibrate()]
    assert working_order(tricks) == [trick.name for trick in tricks]


def test_tricks_are_put_in_order_and_those_that_come_again_stay():
    calibrate, quantize, learn_scales = Calibrate(), Quantize(), LearnScales()
    assert put_in_order([learn_scales, calibrate, quantize]) == [quantize, calibrate, learn_scales]
    again = [learn_scales, calibrate]
    assert put_in_order(again, done=["quantize", "calibrate"]) == again
    assert put_in_order([learn_scales]) == [learn_scales]  # what it needs is not made up


def test_tricks_that_wait_for_one_another_are_refused(monkeypatch):
    monkeypatch.setattr(Quantize, "after", ("calibrate",))  # which requires it
    tricks = put_in_order([Quantize(), Calibrate()])
    assert "must come after" in refusal(tricks)


def test_every_order_that_is_proposed_works():
    by_name = {
        trick.name: trick
        for trick in (LearnScales(), CorrectBias(), Calibrate(), Quantize(), FoldBatchnorm())
    }
    check_order([by_name[name] for name in working_order(list(by_name.values()))])
