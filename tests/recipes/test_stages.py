import copy
from collections import deque

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, spec_of
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.recipes.stages import KEY
from qat_tricks.trainer.module import workbench_of
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, Rated, differences, loader
from tests.helpers.weights import zeros

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def test_each_stage_has_its_own_tricks_and_its_own_fit():
    lit = Lit()
    seen = []
    qat_tricks.run_stages(
        lit,
        Data(),
        "int8_prune50_multistage",
        trainer=QUIET,
        after_stage=lambda stage, network: seen.append(
            (stage.name, bool(layers(network)["head"].weight_quantizer))
        ),
    )
    assert seen == [("prune", False), ("ptq", True), ("qat", True)]
    weights = torch.cat(
        [layer.effective_weight().flatten() for layer in layers(lit.backbone).values()]
    )
    assert (weights == 0).float().mean() >= 0.5
    assert spec_of(lit.backbone)["history"].count("quantize") == 1


class Note(pl.Callback):
    def __init__(self):
        self.fits = []

    def on_train_start(self, trainer, pl_module):
        self.fits.append((trainer.max_epochs, trainer.optimizers[0].param_groups[0]["lr"]))
        assert pl_module.training


@pytest.mark.parametrize(("kind", "rate"), [(Rated, 0.25), (Lit, 0.01)])
def test_a_stage_trains_for_its_epochs_at_its_rate_where_the_module_has_one(kind, rate):
    note = Note()
    recipe = load_recipe("int8_qat", ["stages.qat.epochs=2", "stages.qat.lr=0.25"])
    lit = kind().eval()
    assert qat_tricks.run_stages(lit, Data(), recipe, trainer={**QUIET, "callbacks": [note]}) is lit
    assert note.fits == [(2, rate)]


def test_what_is_called_after_a_stage_can_stop_the_run():
    def stop(stage, network):
        raise RuntimeError(f"{stage.name} is enough")

    lit = Lit()
    with pytest.raises(RuntimeError, match="ptq is enough"):
        qat_tricks.run_stages(lit, Data(), "int8_qat", trainer=QUIET, after_stage=stop)
    assert spec_of(lit.backbone)["history"][-1] == "correct_bias"  # nothing was trained


def test_a_stage_without_training_does_all_at_once_and_needs_no_training():
    class Bare(pl.LightningModule):
        """Has neither a step nor an optimizer."""

        def __init__(self):
            super().__init__()
            self.backbone = Lit().backbone

    class Watching(Data):
        calls = []

        def setup(self, stage):
            self.calls.append(("setup", stage))

        def teardown(self, stage):
            self.calls.append(("teardown", stage))

    lit, data = Bare(), Watching()
    recipe = load_recipe("int8_prune50", ["stages.prune_qat.epochs=0"])
    qat_tricks.run_stages(lit, data, recipe, trainer=QUIET)
    assert zeros(lit) >= 0.5
    assert spec_of(lit.backbone)["history"][-1] == "distill"
    assert data.calls == [("setup", "fit"), ("teardown", "fit")] * 2  # as in fits


def test_the_teacher_of_a_later_stage_is_the_float_network():
    taught = []

    class See(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            taught.append(copy.deepcopy(workbench_of(pl_module).teacher.state_dict()))

    lit = Lit()
    expected = copy.deepcopy(dict(lit.backbone.state_dict()))
    trainer = {**QUIET, "callbacks": [See()], "max_steps": 1}
    qat_tricks.run_stages(lit, Data(), "int8_prune50_multistage", trainer=trainer)
    assert len(taught) == 2
    assert all(differences(expected, dict(found)) == [] for found in taught)


def test_a_recipe_without_stages_gives_the_traced_network():
    lit = Lit()
    seen = []
    qat_tricks.run_stages(lit, Data(), "fp32", trainer=QUIET, after_stage=seen.append)
    assert spec_of(lit.backbone)["history"] == seen == []
    assert not layers(lit.backbone)


def test_an_unknown_recipe_is_refused_before_anything_is_changed():
    lit = Lit()
    with pytest.raises(QatTricksError, match='did you mean "int8_qat"'):
        qat_tricks.run_stages(lit, Data(), "int8_qta", trainer=QUIET)
    assert not layers(lit.backbone)


def test_loaders_serve_as_well_as_a_data_module():
    by_loader, by_datamodule = Lit(), Lit()
    given = (
        (by_loader, OrderedData().train_dataloader(), {"val_dataloaders": loader(32)}),
        (by_datamodule, OrderedData(), {}),
    )
    for module, data, more in given:
        torch.manual_seed(7)
        qat_tricks.run_stages(module, data, "int8_prune50_multistage", trainer=QUIET, **more)
    assert differences(by_loader.state_dict(), by_datamodule.state_dict()) == []


def test_a_list_of_batches_serves_as_a_loader():
    by_loader, by_list = Lit(), Lit()
    data, val = OrderedData().train_dataloader(), loader(32)
    lists = list(data), deque(val)
    for module, batches, given in ((by_loader, data, val), (by_list, *lists)):
        torch.manual_seed(7)
        qat_tricks.run_stages(
            module, batches, "int8_prune50_multistage", val_dataloaders=given, trainer=QUIET
        )
    assert differences(by_loader.state_dict(), by_list.state_dict()) == []


def test_a_module_that_is_quantized_is_not_quantized_again():
    module = Lit()
    qat_tricks.run_stages(module, Data(), "int8_ptq", trainer=QUIET)
    state = copy.deepcopy(module.state_dict())
    # One of them would train a stage before the one that quantizes.
    for recipe in ("int8_qat", "int8_prune50_multistage"):
        with pytest.raises(QatTricksError, match="quantize needs a float network, and"):
            qat_tricks.run_stages(module, Data(), recipe, trainer=QUIET)
    assert differences(state, module.state_dict()) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: iter(loader()), "yields its batches only once"),
        (lambda: torch.zeros(4, 1, 8, 8), "the loader is a tensor"),
        (lambda: loader().dataset, "the loader is a data set"),
        (lambda: None, "the loader is a NoneType"),
    ],
)
def test_what_is_no_loader_is_refused(data, reason):
    with pytest.raises(QatTricksError, match=reason):
        qat_tricks.run_stages(Lit(), data(), "int8_ptq", trainer=QUIET)
    if data() is not None:
        with pytest.raises(QatTricksError, match=reason):
            qat_tricks.run_stages(Lit(), loader(), "int8_ptq", val_dataloaders=data())
    with pytest.raises(QatTricksError, match="val_dataloaders beside a data module"):
        qat_tricks.run_stages(Lit(), Data(), "int8_ptq", val_dataloaders=loader())


class ByIndex:
    """Loads batches by their number alone."""

    asked = ()

    def __getitem__(self, index):
        self.asked = (*self.asked, index)
        return list(loader())[index]

    def __len__(self):
        return 2


def test_a_list_of_loaders_stays_one():
    val = ByIndex()
    qat_tricks.run_stages(Lit(), loader(), "int8_qat", val_dataloaders=[val], trainer=QUIET)
    assert {0, 1} <= set(val.asked)


def test_the_epochs_are_those_of_the_stages():
    with pytest.raises(QatTricksError, match=r"'max_epochs': 3\} is not allowed: a stage has its"):
        qat_tricks.run_stages(Lit(), Data(), "int8_qat", trainer={"max_epochs": 3})


class StopAfter(pl.Callback):
    """Ends the process, as far as the trainer knows, at the end of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("power is gone")


def test_an_interrupted_fit_goes_on_to_the_same_weights(tmp_path):
    recipe = ["stages.prune_qat.epochs=4"]
    whole = Lit()  # which seeds the generators, on which a fit depends
    qat_tricks.run_stages(whole, OrderedData(), load_recipe("int8_prune50", recipe), trainer=QUIET)
    with pytest.raises(RuntimeError, match="power is gone"):
        qat_tricks.run_stages(
            Lit(),
            OrderedData(),
            load_recipe("int8_prune50", recipe),
            trainer={**QUIET, "callbacks": [StopAfter(2)]},
            checkpoints=tmp_path,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"prune_qat.ckpt", KEY}
    again, note = Lit(), Note()
    qat_tricks.run_stages(
        again,
        OrderedData(),
        load_recipe("int8_prune50", recipe),
        trainer={**QUIET, "callbacks": [note]},
        checkpoints=tmp_path,
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_fits_of_another_module_or_recipe_are_refused(tmp_path):
    short = ["stages.qat.epochs=1"]

    def run(lit, *overrides, folder=tmp_path):
        recipe = load_recipe("int8_qat", [*short, *overrides])
        return qat_tricks.run_stages(lit, Data(), recipe, trainer=QUIET, checkpoints=str(folder))

    first = run(Lit())
    again = run(Lit())  # it is done already
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for lit, overrides in [
        (Lit(seed=1), []),
        (Lit(), ["stages.ptq.tricks.calibrate.num_images=9"]),
    ]:
        with pytest.raises(
            QatTricksError,
            match="fits of another module or recipe, of other settings or other images",
        ):
            run(lit, *overrides)


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_checkpoint_callback_of_the_users_works_beside(tmp_path, with_folder):
    keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "mine")
    qat_tricks.run_stages(
        Lit(),
        Data(),
        load_recipe("int8_qat", ["stages.qat.epochs=1"]),
        trainer={**QUIET, "callbacks": keep},
        checkpoints=tmp_path / "ours" if with_folder else None,
    )
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert (tmp_path / "ours" / "qat.ckpt").is_file() is with_folder


def test_an_interrupted_fit_goes_on_whatever_the_validation(tmp_path):
    recipe = ["stages.qat.epochs=4"]
    often = {**QUIET, "val_check_interval": 0.5}
    whole = Lit()
    qat_tricks.run_stages(whole, OrderedData(), load_recipe("int8_qat", recipe), trainer=often)

    def run(*callbacks):
        lit = Lit()
        settings = {**often, "callbacks": [*callbacks]}
        loaded = load_recipe("int8_qat", recipe)
        qat_tricks.run_stages(lit, OrderedData(), loaded, trainer=settings, checkpoints=tmp_path)
        return lit

    with pytest.raises(RuntimeError, match="power is gone"):
        run(StopAfter(2))
    again = run()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_trainer_in_the_place_of_its_arguments_is_refused():
    with pytest.raises(QatTricksError, match="trainer=Trainer is not allowed"):
        qat_tricks.run_stages(Lit(), Data(), "int8_ptq", trainer=pl.Trainer(logger=False))


def test_a_stage_that_trains_on_nothing_is_refused():
    nothing = {**QUIET, "limit_train_batches": 0}
    with pytest.raises(QatTricksError, match="stage qat has trained on no batch: give a train"):
        qat_tricks.run_stages(Lit(), Data(), "int8_qat", trainer=nothing)
    qat_tricks.run_stages(Lit(), Data(), "int8_ptq", trainer=nothing)  # trains nothing anyway


def test_fits_with_other_settings_or_images_are_refused(tmp_path):
    def run(images=None, *, lr=0.01, **settings):
        lit = Rated().train()
        lit.lr = lr
        recipe = ["stages.qat.epochs=1", "stages.qat.lr=null"]
        trainer = {**QUIET, **settings}
        return qat_tricks.run_stages(
            lit,
            images or loader(64),
            load_recipe("int8_qat", recipe),
            trainer=trainer,
            checkpoints=tmp_path / "fits",
        )

    run()
    run()  # the same again is taken over
    for images, settings in (
        (loader(64, seed=9), {}),
        (None, {"lr": 0.02}),
        (None, {"gradient_clip_val": 0.1}),
    ):
        with pytest.raises(QatTricksError, match="of other settings or other images"):
            run(images, **settings)
