"""The fit of which tests/artifacts holds a checkpoint, written in the middle of an epoch."""

import torch

import qat_tricks
from tests.helpers import ROOT
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, ResumableLoader, loader, trainer

ARTIFACTS = ROOT / "tests" / "artifacts"
EPOCHS, SAVED_AFTER = 3, 6  # steps: in the middle of the second epoch of four batches


def arithmetic():
    """What must agree for two runs to agree to the last bit."""
    return [str(torch.__version__), torch.backends.cpu.get_cpu_capability()]


def fit(seed, callbacks=(), ckpt_path=None):
    """Fits ``int8_prune50`` with dropout, from the beginning or a checkpoint, and returns the
    module.
    """
    pl.seed_everything(11, verbose=False)
    lit = Lit(seed=seed).train()
    recipe = qat_tricks.recipe("int8_prune50", ["stages.prune_qat.tricks.prune.updates=7"])
    trainer([*recipe, *callbacks], max_epochs=EPOCHS).fit(
        lit, ResumableLoader(), loader(32, seed=4), ckpt_path=ckpt_path
    )
    return lit
