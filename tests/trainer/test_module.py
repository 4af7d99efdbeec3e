"""The network in a LightningModule: found, or named where there are several."""

import pytest
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.trainer.module import find_network
from tests.helpers.lit import Data, Lit, trainer


class Two(Lit):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)


def test_several_networks_are_listed_and_one_can_be_named():
    assert find_network(Lit()) == "backbone"
    with pytest.raises(
        QatTricksError, match=r'"backbone" \(SmallNet\), "head" \(Linear\).*network=NAME'
    ):
        trainer(qat_tricks.recipe("int8_ptq")).validate(Two(), Data(), verbose=False)
    two = Two()
    trainer(qat_tricks.recipe("int8_ptq", ["network=backbone"])).validate(
        two, Data(), verbose=False
    )
    assert layers(two.backbone)
    with pytest.raises(QatTricksError, match='no submodule "bone"'):
        find_network(Two(), "bone")
