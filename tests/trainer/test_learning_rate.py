import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import spec_of
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.trainer.learning_rate import HIGHEST
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, Rated

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Stop(pl.Callback):
    """Ends a fit after its first epoch, as an interrupt would."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("interrupted")


class Note(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_start(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(module, *overrides, epochs=1, callbacks=(), **options):
    torch.manual_seed(0)  # of the images' order, and of dropout
    note = Note()
    recipe = load_recipe("int8_qat", [f"stages.qat.epochs={epochs}", *overrides])
    trainer = {**QUIET, "callbacks": [note, *callbacks]}
    qat_tricks.run_stages(module, Data(), recipe, trainer=trainer, **options)
    return note.rates


def test_a_stage_of_sgd_trains_at_the_rate_that_was_measured():
    module = Rated(scale=30.0)
    (rate,) = fit(module)
    (found,) = spec_of(module.backbone)["rates"]
    assert rate == module.lr == found["lr"] == pytest.approx(0.3 / found["sharpness"])


def test_a_flat_loss_is_trained_at_the_highest_rate():
    assert fit(Rated()) == [HIGHEST]


def test_a_steeper_loss_is_trained_more_slowly():
    (steep,) = fit(Rated(scale=30.0))
    (flat,) = fit(Rated())
    assert steep < flat / 3


def test_another_optimizer_keeps_the_modules_own_rate():
    module = Rated("adam")
    with pytest.warns(UserWarning, match=r"Rated trains with AdamW: its own lr=0\.5 stays"):
        assert fit(module) == [0.5]
    assert not spec_of(module.backbone)["rates"]


class Fixed(Rated):
    """Its optimizer has a rate of its own."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


def test_an_optimizer_that_does_not_read_the_rate_is_told_of():
    module = Fixed()
    with pytest.warns(UserWarning, match="no optimizer has it: let configure_optimizers read"):
        assert fit(module) == [0.25]
    assert not spec_of(module.backbone)["rates"]


class Doubled(Rated):
    """Its optimizer has twice the rate of the module, as by a rule of linear scaling."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2 * self.lr)


def test_a_rate_that_follows_from_the_measured_one_is_left_alone(recwarn):
    module = Doubled(scale=30.0)
    (rate,) = fit(module)
    (found,) = spec_of(module.backbone)["rates"]
    assert rate == 2 * found["lr"] == 2 * module.lr
    assert not any("lr=auto" in str(warning.message) for warning in recwarn)


def test_a_stage_without_a_rate_has_the_modules_own():
    note = Note()
    stages = ["stages.prune.epochs=1", "stages.qat.epochs=1", "stages.qat.lr=null"]
    recipe = load_recipe("int8_prune50_multistage", stages)
    qat_tricks.run_stages(Rated(), Data(), recipe, trainer={**QUIET, "callbacks": [note]})
    measured, own = note.rates
    assert measured <= HIGHEST
    assert own == 0.5


class ReadOnly(Lit):
    """Its rate cannot be set."""

    lr = property(lambda self: 0.25)


class Several(Lit):
    """It has a rate for each of its groups."""

    lr = (0.1, 0.01)


@pytest.mark.parametrize("given", ["auto", "0.01"])
@pytest.mark.parametrize(
    ("module", "told"),
    [(ReadOnly, r"ReadOnly\.lr cannot be set, "), (Several, r"Several\.lr is of type tuple, ")],
)
def test_a_rate_that_cannot_be_set_is_refused(module, told, given):
    recipe = load_recipe("int8_qat", [f"stages.qat.lr={given}"])
    with pytest.raises(QatTricksError, match=f"{told}.* lr=null"):
        qat_tricks.run_stages(module(), Data(), recipe, trainer=QUIET)


def test_a_module_without_a_rate_is_not_measured():
    module = Lit()
    assert fit(module) == [0.01]
    assert "rates" not in spec_of(module.backbone)


def test_a_rate_that_is_given_is_not_measured():
    module = Rated()
    assert fit(module, "stages.qat.lr=0.125") == [0.125]
    assert "rates" not in spec_of(module.backbone)


def test_a_fit_that_goes_on_has_the_rate_with_which_it_began(tmp_path):
    whole, begun, resumed = (Rated(scale=30.0) for _ in range(3))
    rates = fit(whole, epochs=2)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(begun, epochs=2, callbacks=[Stop()], checkpoints=tmp_path)
    assert fit(resumed, epochs=2, checkpoints=tmp_path) == rates
    assert resumed.lr == whole.lr
    assert spec_of(resumed.backbone)["rates"] == spec_of(whole.backbone)["rates"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("given", ["fast", "0", "-1"])
def test_other_words_are_refused(given):
    with pytest.raises(QatTricksError, match=r"lr=.*auto"):
        load_recipe("int8_qat", [f"stages.qat.lr={given}"])
