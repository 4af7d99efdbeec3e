import pytest

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.quantize_settings import QuantizeSettings
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.module import workbench_of
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


@pytest.mark.parametrize(
    ("made", "asked", "error"),
    [
        (
            "int8_ptq",
            "w4a8_ptq",
            "quantize was done with weight_bits=8 already, and weight_bits=4 is asked for: give "
            "the float network that this one came from, or weight_bits=8",
        ),
        ("w4a8_ptq", "int8_ptq", "done with weight_bits=4 already, and weight_bits=8 is asked for"),
        ("w4a8_ptq", "w4a4_qat", "activation_bits=8 already, and activation_bits=4 is asked for"),
    ],
)
def test_a_network_that_is_quantized_is_refused_other_bits(made, asked, error):
    lit = Lit()
    lit.backbone = qat_tricks.quantize(lit.backbone, Data().train_dataloader(), made)
    with pytest.raises(QatTricksError, match=error):
        trainer(qat_tricks.recipe(asked)).fit(lit, datamodule=Data())
    trainer(qat_tricks.recipe(made)).fit(lit, datamodule=Data())  # the same bits go on


def test_a_module_that_run_stages_has_quantized_is_refused_other_bits():
    lit = qat_tricks.run_stages(Lit(), Data(), "int8_ptq")
    with pytest.raises(
        QatTricksError, match="activation_bits=8 already, and weight_bits=4, activation_bits=4 is"
    ):
        trainer(qat_tricks.recipe("w4a4_ptq")).fit(lit, datamodule=Data())


def test_other_settings_of_what_is_done_are_told_where_bits_stay():
    lit, kl = Lit(), qat_tricks.recipe("int8_ptq", ["stages.ptq.tricks.calibrate.estimator=kl"])
    trainer(qat_tricks.recipe("int8_ptq")).validate(lit, Data(), verbose=False)
    told = (
        r'calibrate was done with estimator="mse" already, and estimator="kl" is asked for, which'
    )
    with pytest.warns(UserWarning, match=told):
        trainer(kl).validate(lit, Data(), verbose=False)


class Noting(Trick):
    """Has arguments, some of which JSON cannot hold, and notes things as it works."""

    def __init__(self, level=1, *, names=("a", "b"), calls=(), settings=None, **more):
        super().__init__()
        self.level, self.names, self.calls = level, names, [*calls, self]
        self.settings, self.count, self.noted = settings, 0, {}

    def apply(self, work):
        self.count += 1
        self.names = [*self.names, "found"]
        self.noted[(1, 2)] = {3, 4}


def test_settings_of_a_users_own_trick_are_its_arguments(recwarn):
    lit = Lit()
    for settings in (None, [1, 2], {1: 2}, QuantizeSettings, object()):
        assert Noting(settings=settings).arguments()["level"] == 1
    for trick in (Noting(), Noting(1.0, names=["a", "b"]), Noting(calls=[print])):
        trainer([*qat_tricks.recipe("int8_ptq"), trick]).validate(lit, Data(), verbose=False)
    assert workbench_of(lit).settings["noting"] == {
        "level": 1,
        "names": ["a", "b"],
        "settings": None,
    }
    assert not [w for w in recwarn if "was done with" in str(w.message)]
    with pytest.warns(UserWarning, match="noting was done with level=1 already, and level=2 is"):
        trainer([*qat_tricks.recipe("int8_ptq"), Noting(2)]).validate(lit, Data(), verbose=False)


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ("+overrides={head:{weight_bits:6},left:{weight_bits:4}}",) * 2,
        (
            "+overrides={head:{weight_bits:6},left:{weight_bits:4}}",
            "+overrides={left:{weight_bits:4},head:{weight_bits:6}}",
        ),
        ("activations=null", "activations=unsigned_affine"),
        ("functions=integer", "functions=null"),
        ("exclude=[head]", "exclude=[head]"),
    ],
)
def test_settings_that_mean_the_same_are_the_same(made, asked, recwarn):
    lit = Lit()
    for given in (made, asked):
        adds = "+" * given.startswith("+")
        override = f"{adds}stages.ptq.tricks.quantize.{given.removeprefix('+')}"
        trainer(qat_tricks.recipe("int8_ptq", [override])).validate(lit, Data(), verbose=False)
    assert not [w for w in recwarn if "was done with" in str(w.message)]


def test_bits_that_mixed_precision_has_chosen_are_told_where_a_recipe_is_without_it():
    lit = Lit()
    lit.backbone = qat_tricks.quantize(lit.backbone, Data().train_dataloader(), "mixed_ptq")
    with pytest.warns(UserWarning, match="mixed_precision has chosen the bits of each layer"):
        trainer(qat_tricks.recipe("int8_ptq")).validate(lit, Data(), verbose=False)
    few = ["stages.ptq.tricks.mixed_precision.num_images=32"]
    with pytest.warns(UserWarning, match="num_images=256 already, and num_images=32 is asked for"):
        trainer(qat_tricks.recipe("mixed_ptq", few)).validate(lit, Data(), verbose=False)
    small = ["stages.ptq.tricks.mixed_precision.share=0.4"]
    with pytest.raises(QatTricksError, match=r"share=0\.5 already, and share=0\.4 is asked"):
        trainer(qat_tricks.recipe("mixed_ptq", small)).validate(lit, Data(), verbose=False)


def test_a_checkpoint_goes_on_in_silence_with_the_recipe_that_made_it(tmp_path, recwarn):
    run = trainer(qat_tricks.recipe("int8_qat"))
    run.fit(Lit(), datamodule=Data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = qat_tricks.load_from_checkpoint(Lit, tmp_path / "run.ckpt")
    trainer(qat_tricks.recipe("int8_qat")).validate(again, Data(), verbose=False)
    assert not [w for w in recwarn if "was done with" in str(w.message)]
    with pytest.raises(QatTricksError, match="quantize was done with weight_bits=8"):
        trainer(qat_tricks.recipe("w4a8_qat")).validate(again, Data(), verbose=False)
    with pytest.raises(QatTricksError, match="quantize was done with weight_bits=8"):
        trainer(qat_tricks.recipe("w4a8_qat")).fit(
            Lit(), datamodule=Data(), ckpt_path=tmp_path / "run.ckpt"
        )


def test_what_a_fit_uses_may_be_other_in_each():
    lit = Lit()
    run = ["stages.prune_qat.tricks.prune.sparsity=0.3"]
    trainer(qat_tricks.recipe("int8_prune50", run)).fit(lit, datamodule=Data())
    work = workbench_of(lit)
    assert {"quantize", "calibrate"} <= set(work.settings)
    assert not {"prune", "learn_scales", "distill"} & set(work.settings)


@pytest.mark.parametrize("num_images", [0, -3])
def test_one_image_is_the_least(num_images):
    assert check_num_images(1) == 1
    with pytest.raises(QatTricksError, match=f"num_images={num_images} is not allowed: give 1"):
        check_num_images(num_images)
