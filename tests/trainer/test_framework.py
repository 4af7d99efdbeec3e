"""Either of Lightning's packages, whatever was imported first."""

import pickle
import subprocess
import sys

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer import framework
from qat_tricks.tricks import Prune
from tests.helpers import ROOT
from tests.helpers.lightning import pl

FIT = """
import importlib, sys
first, used, early = sys.argv[1:4]
if early == "early":  # nothing of Lightning is imported yet
    import qat_tricks
    callbacks = qat_tricks.recipe("int8_qat")
for name in (first, used):
    pl = importlib.import_module(name)
import qat_tricks
if early != "early":
    callbacks = qat_tricks.recipe("int8_qat")
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_num_threads(1)

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 4),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

data = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 4), batch_size=8)
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
settings = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet}
trainer = pl.Trainer(callbacks=callbacks, **settings)
lit = Lit().train()
trainer.fit(lit, data)
assert type(trainer).__module__.startswith(used)
trainer.save_checkpoint(sys.argv[4])
loaded = qat_tricks.load_from_checkpoint(Lit, sys.argv[4])
x = torch.randn(2, 1, 8, 8)
with torch.no_grad():
    print(torch.equal(loaded(x), lit.eval()(x)))
print(qat_tricks.export_onnx(lit.net, sys.argv[4] + ".onnx", x).top1_agreement)
"""


@pytest.mark.parametrize("early", ["early", "late"])
@pytest.mark.parametrize(
    ("first", "used"),
    [
        ("pytorch_lightning", "lightning.pytorch"),
        ("lightning.pytorch", "pytorch_lightning"),
        ("lightning.pytorch", "lightning.pytorch"),
    ],
)
def test_the_trainer_decides_which_package_it_is(first, used, early, tmp_path):
    command = [sys.executable, "-c", FIT, first, used, early, str(tmp_path / "a.ckpt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-2:] == ["True", "1.0"], done.stderr[-2000:]


def test_a_trick_is_a_callback_of_the_package_in_use_and_can_be_pickled():
    trick = pickle.loads(pickle.dumps(Prune(sparsity=0.25)))
    assert isinstance(trick, pl.Callback)
    assert trick.sparsity == 0.25
    assert trick.state_key == "Prune"  # as in checkpoints written before


def test_objects_tell_their_package():
    class Mine(pl.LightningModule):
        pass

    assert framework.package_of(Mine()) is pl
    assert framework.package_of(pl.Trainer(logger=False, barebones=True)) is pl
    with pytest.raises(QatTricksError, match="no object of Lightning's"):
        framework.package_of(object())


def test_without_lightning_the_error_says_how_to_get_it(monkeypatch):
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(QatTricksError, match="pip install pytorch-lightning"):
        framework.default_package.__wrapped__()
