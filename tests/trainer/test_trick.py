import pytest

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.trick import Trick, check_num_images
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import small_net


class MyOwnTrick(Trick):
    """Counts how often it is applied."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def apply(self, work):
        self.count += 1


def test_a_trick_is_named_as_its_class_in_small_letters():
    assert MyOwnTrick().name == "my_own_trick"
    assert Trick().name == "trick"


def test_a_trick_is_done_once_in_a_stage_and_noted_in_the_networks_history():
    trick, work = MyOwnTrick(), Workbench(small_net())
    assert [trick.apply_once(work), trick.apply_once(work)] == [True, False]
    work.applied.clear()  # a stage that follows
    assert trick.apply_once(work)
    assert trick.count == 2
    assert work.applied == ["my_own_trick"]
    assert work.history == ["my_own_trick"] * 2


def test_setup_of_a_trainer_does_each_trick_once_whatever_it_runs():
    lit, trick = Lit(), MyOwnTrick()
    run = trainer([*qat_tricks.recipe("int8_ptq"), trick])
    for call in (run.validate, run.test, run.validate):
        call(lit, Data(), verbose=False)
    run.fit(lit.train(), datamodule=Data())
    assert trick.count == 1


@pytest.mark.parametrize("num_images", [0, -3])
def test_one_image_is_the_least(num_images):
    assert check_num_images(1) == 1
    with pytest.raises(QatTricksError, match=f"num_images={num_images} is not allowed: give 1"):
        check_num_images(num_images)
