"""A progress bar says which stage it is of."""

import pytest

from qat_tricks.recipes.stages import run_stages
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_the_figures_of_a_bar_begin_with_its_stage(kind):
    class Bar(getattr(pl.callbacks, kind)):
        def on_train_end(self, trainer, pl_module):
            shown.append(next(iter(self.get_metrics(trainer, pl_module).items())))
            super().on_train_end(trainer, pl_module)

    shown = []
    settings = {"accelerator": "cpu", "enable_model_summary": False, "limit_train_batches": 1}
    run_stages(Lit(), Data(), "int8_qat", trainer={**settings, "callbacks": [Bar()]})
    assert shown == [("stage", "qat")]


def test_a_bar_that_serves_several_stages_names_each():
    shown = []

    class Bar(pl.callbacks.TQDMProgressBar):
        def on_train_end(self, trainer, pl_module):
            shown.append(self.get_metrics(trainer, pl_module)["stage"])
            super().on_train_end(trainer, pl_module)

    settings = {"accelerator": "cpu", "enable_model_summary": False, "limit_train_batches": 1}
    run_stages(Lit(), Data(), "int8_prune50_multistage", trainer={**settings, "callbacks": [Bar()]})
    assert shown == ["prune", "qat"]
