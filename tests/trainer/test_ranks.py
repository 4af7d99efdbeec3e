"""With one process; with two see test_scale_out.py and test_ddp.py."""

import pytest
from torch import distributed

from qat_tricks.trainer.ranks import Ranks, loaded_once
from tests.helpers.lightning import pl
from tests.helpers.nets import images


def test_one_process_does_the_work_itself():
    ranks = Ranks(pl.Trainer(accelerator="cpu", devices=1, logger=False).strategy)
    assert not distributed.is_initialized()
    assert ranks.on_zero(lambda a, *, b: a - b, 5, b=2) == 3
    with pytest.raises(ValueError, match="mine"):
        ranks.on_zero(fail)


def fail():
    raise ValueError("mine")


def test_one_process_loads_what_is_asked_for():
    asked = []

    def load(num_images):
        asked.append(num_images)
        return [images(4)]

    (batch,) = loaded_once(load, 7)
    assert asked == [7]
    assert batch.shape == (4, 1, 8, 8)
