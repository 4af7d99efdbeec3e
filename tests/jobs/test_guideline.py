import copy
import json
from dataclasses import asdict, replace

import pytest
import torch

import qat_tricks
from qat_tricks.cli.check_train import check_train
from qat_tricks.errors import QatTricksError
from qat_tricks.files import UnwritableError
from qat_tricks.graph import layers, spec_of
from qat_tricks.jobs import guideline as module_under_test
from qat_tricks.jobs import guideline_judge
from qat_tricks.jobs.guideline_judge import Judge, Judgement
from qat_tricks.jobs.train import run_job
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.trainer.module import has_workbench
from tests.helpers.configs import composed, job_config, refusal
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, dataset, loader, trainer

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class NoTest(Data):
    """Data whose test images nobody may read."""

    def test_dataloader(self):
        raise AssertionError("the test images were read")


@pytest.fixture
def rehearsed():
    """Of tests in which steps are foretold."""


@pytest.fixture(autouse=True)
def unforetold(request, monkeypatch):
    """Rehearsals take most of the time, and few tests are of them."""
    if "rehearsed" not in request.fixturenames:
        monkeypatch.setattr(module_under_test._Run, "_foretell", _nothing)


def _nothing(run, steps):
    return {step.name: None for step in steps}


@pytest.fixture(scope="module")
def trained():
    lit = Lit(seed=1)
    trainer(max_epochs=8).fit(lit, datamodule=Data())
    return lit.eval()


def run(lit, trainer_devices=1, **settings):
    trainer = {**QUIET, "devices": trainer_devices}
    return qat_tricks.guideline(lit, NoTest(), trainer=trainer, **settings)


@pytest.mark.usefixtures("rehearsed")
def test_8_bits_without_training_are_enough_and_nothing_else_is_tried(trained):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    state = torch.get_rng_state()
    result = run(trained, budget=5)
    assert [outcome.name for outcome in result.outcomes] == ["ptq"]
    assert result.within
    assert result.kept.command == "recipe=int8_ptq"
    # the module that was given stays as it was
    assert not has_workbench(trained)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    # and the result is what the kept recipe gives alone
    assert all(layer.weight_quantizer for layer in layers(result.module.backbone).values())
    alone = Lit(seed=1)
    alone.load_state_dict(before)
    module_under_test.seed_all(0)
    qat_tricks.run_stages(alone, NoTest(), "int8_ptq", trainer=QUIET)
    x = dataset(8).tensors[0]
    assert torch.equal(alone.eval()(x), result.module(x))
    # its judgement is that of the validation images
    judged = qat_tricks.evaluate(result.module, loader(32, seed=4), reference=trained)
    assert result.kept.judgement["accuracy"] == pytest.approx(judged.accuracy)
    assert result.kept.judgement["agreement"] == pytest.approx(judged.agreement)
    assert result.images == 32
    json.dumps(result.as_dict())


def script(monkeypatch, **points):
    """Lets each step lose what ``points`` say, without running it; None: it does not work."""
    tried = []

    def run_step(self, step):
        tried.append(step.name)
        if points[step.name] is None:
            raise QatTricksError("it is too odd")
        return torch.nn.Linear(1, 1), points[step.name]

    def judge(self, module):
        change = {"points": -module[1], "low": -9.0, "high": 9.0, "lost": 0, "gained": 0, "p": 1.0}
        return Judgement(
            images=32, accuracy=0.5, change=change, f1_change=0.0, agreement=1.0, seconds=1.0
        )

    monkeypatch.setattr(module_under_test._Run, "_run_step", run_step)
    monkeypatch.setattr(Judge, "judge", judge)
    monkeypatch.setattr(module_under_test._Run, "_look", lambda self: self.state.update(LOOK))
    monkeypatch.setattr(
        module_under_test._Run, "_foretell", lambda self, steps: {step.name: 2.0 for step in steps}
    )
    monkeypatch.setattr(module_under_test._Run, "_plain", lambda self, step: None)
    monkeypatch.setattr(module_under_test, "sensitive_layers", lambda *_: ["head"])
    return tried


LOOK = {"potential": {}}


@pytest.mark.parametrize(
    ("points", "kept", "within"),
    [
        ({"ptq": 0.5}, "ptq", True),
        ({"ptq": 0.6, "sensitive_layers": 0.4}, "sensitive_layers", True),
        ({"ptq": 3, "sensitive_layers": 2, "qat": 0.1}, "qat", True),
        ({"ptq": 3, "sensitive_layers": 1, "qat": 2, "qat_distill": 4}, "sensitive_layers", False),
        ({"ptq": 3, "sensitive_layers": None, "qat": 0}, "qat", True),
    ],
    ids=["first", "second", "third", "none", "one fails"],
)
def test_the_cheapest_step_within_the_budget_is_kept(monkeypatch, points, kept, within):
    tried = script(monkeypatch, **points)
    result = run(Lit(), budget=0.5)
    assert tried == list(points)
    assert (result.kept.name, result.within) == (kept, within)
    assert result.module[1] == points[kept]
    assert result.foretold_seconds == 2.0 * len(tried)
    assert ("NOT within" in str(result)) is not within


def test_pruning_keeps_the_last_share_within_the_budget(monkeypatch):
    points = {"ptq": 0, "sparsity_0.2": 0.1, "sparsity_0.4": 0.3, "sparsity_0.6": 0.9}
    tried = script(monkeypatch, **points)
    result = run(Lit(), budget=0.5, sparsity=0.6)
    assert tried == list(points)
    assert (result.kept.name, result.within) == ("sparsity_0.4", True)
    # nothing is pruned where even without it too much is lost
    points = {"ptq": 1, "sensitive_layers": 1, "qat": 1, "qat_distill": 1}
    tried = script(monkeypatch, **points)
    assert run(Lit(), budget=0.5, sparsity=0.6).kept.name == "ptq"
    assert tried == list(points)


def test_a_network_on_which_no_step_works_is_refused_with_the_reasons(monkeypatch):
    script(monkeypatch, ptq=None, sensitive_layers=None, qat=None, qat_distill=None)
    with pytest.raises(QatTricksError, match=r"no step .* ptq: does not work here \(it is too odd"):
        run(Lit())


def test_an_interrupted_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch, trained):
    aims = {"budget": 0, "weight_bits": 2, "activation_bits": 2, "folder": tmp_path}
    real = module_under_test.run_stages
    worse = {"points": -1.0, "low": -2.0, "high": 0.0, "lost": 1, "gained": 0, "p": 1.0}
    monkeypatch.setattr(guideline_judge, "paired_change", lambda before, after: worse)

    def stop_at_qat(module, data, recipe, **settings):
        if settings["checkpoints"] is not None and recipe.training:
            raise KeyboardInterrupt
        return real(module, data, recipe, **settings)

    monkeypatch.setattr(module_under_test, "run_stages", stop_at_qat)
    with pytest.raises(KeyboardInterrupt):
        run(trained, **aims)
    state = json.loads((tmp_path / "guideline.json").read_text())
    assert list(state["outcomes"]) == [
        "ptq",
        "mixed_bits",
        "learned_rounding",
        "sensitive_layers",
    ]

    again = []

    def note(module, data, recipe, **settings):
        again.append(settings["checkpoints"] and settings["checkpoints"].name)
        return real(module, data, recipe, **settings)

    monkeypatch.setattr(module_under_test, "run_stages", note)
    result = run(trained, **aims)
    assert result.kept.name == "ptq"  # the first of those that lose the same
    assert again == ["qat", "qat_distill"]  # no rehearsal, and no step that was done
    assert asdict(result.outcomes[2]) == state["outcomes"]["learned_rounding"]
    # a step that was kept from before has its network back
    done = {outcome.name: outcome for outcome in result.outcomes}
    restored = module_under_test.load_into(Lit(seed=1), tmp_path / "learned_rounding.ckpt")
    judged = qat_tricks.evaluate(restored, loader(32, seed=4))
    assert judged.accuracy == pytest.approx(done["learned_rounding"].judgement["accuracy"])
    assert spec_of(restored.backbone)["history"][-2:] == ["learned_rounding", "correct_bias"]
    with pytest.raises(QatTricksError, match="another network, other images, other settings"):
        run(trained, **{**aims, "budget": 1})


def test_loaders_do_in_the_place_of_a_data_module(trained):
    result = qat_tricks.guideline(
        trained, loader(64), val_dataloaders=loader(32, seed=4), trainer=QUIET, budget=50
    )
    assert result.within


def test_what_it_cannot_begin_with_is_refused(trained):
    with pytest.raises(QatTricksError, match="judges and decides in one process"):
        run(trained, budget=1, trainer_devices=2)
    quantized = qat_tricks.run_stages(Lit(), Data(), "int8_ptq", trainer=QUIET)
    with pytest.raises(QatTricksError, match="Lit is quantized already"):
        run(quantized)


@pytest.mark.usefixtures("rehearsed")
def test_a_step_that_cannot_be_rehearsed_is_tried_all_the_same(trained, monkeypatch):
    real = module_under_test.run_stages

    def odd(module, data, recipe, **settings):
        if recipe.training:
            raise QatTricksError("it is too odd")
        return real(module, data, recipe, **settings)

    monkeypatch.setattr(module_under_test, "run_stages", odd)
    result = run(trained, budget=5, sparsity=0.3)
    assert [outcome.foretold_seconds is None for outcome in result.outcomes] == [False, True]
    assert result.outcomes[1].decision == "does not work here"
    assert result.outcomes[1].reason == "it is too odd"
    assert (result.kept.name, result.within) == ("ptq", True)


class Unordered(torch.utils.data.DataLoader):
    """Gives other images in each pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([(x.roll(self.passes, 0), y.roll(self.passes)) for x, y in loader(32)])


class NoVal(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(64)


class Splits(pl.LightningDataModule):
    """Draws its split in ``setup``, for as many processes as its trainer has."""

    def __init__(self, generator=None):
        super().__init__()
        self.generator = generator

    def setup(self, stage=None):
        assert self.trainer.world_size == 1
        generator = torch.Generator().manual_seed(0) if self.generator == "own" else None
        self.parts = torch.utils.data.random_split(dataset(64), [48, 16], generator=generator)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[0], batch_size=16)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[1], batch_size=16)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(dataset(32))


def ways(val):
    return {"val_dataloaders": val, "trainer": QUIET, "budget": 50}


@pytest.mark.parametrize(
    ("data", "val", "told"),
    [
        (loader(64), None, "decides on validation images, and there are none"),
        (NoVal(), None, "decides on validation images, and there are none"),
        (loader(64), [], "decides on validation images, and there are none"),
        (loader(64), Unordered(dataset(32)), "shuffle=False"),
        (loader(64), [loader(32), loader(32)], "2 validation loaders"),
        (loader(64), iter(loader(32)), "only once"),
        (Splits(), None, "Splits.setup splits otherwise each time"),
    ],
    ids=["none", "no loader", "empty", "unordered", "two", "iterator", "split"],
)
def test_it_says_which_images_it_needs(trained, data, val, told):
    with pytest.raises(QatTricksError, match=told):
        qat_tricks.guideline(trained, data, **ways(val))


@pytest.mark.parametrize(
    ("data", "val"),
    [
        (Splits("own"), None),
        (loader(64), torch.utils.data.DataLoader(Stream(), batch_size=16)),
        (loader(64), [loader(32)]),
        (loader(64), list(loader(32))),
        (loader(64), list(loader(16))),
    ],
    ids=["split", "stream", "a list of one", "batches", "one batch"],
)
def test_images_may_come_in_many_ways(trained, data, val):
    assert qat_tricks.guideline(trained, data, **ways(val)).within


def test_names_of_files_beside_the_images_are_no_hindrance(trained):
    named = [
        (images, labels, tuple(f"{index}_{place}.png" for place in range(len(labels))))
        for index, (images, labels) in enumerate(loader(61))
    ]
    judge = Judge(trained, named, few=30)
    assert sum(len(batch[1]) for batch in judge.few) == 30


class Numbered(Lit):
    """A network whose layers have numbers for names."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        more = [torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)]
        head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 4)]
        self.backbone = torch.nn.Sequential(conv, torch.nn.ReLU(), *more, *head)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_with_numbers_for_names_are_spared(bits, monkeypatch):
    worse = {"points": -1.0, "low": -2.0, "high": 0.0, "lost": 1, "gained": 0, "p": 1.0}
    monkeypatch.setattr(guideline_judge, "paired_change", lambda before, after: worse)
    result = run(Numbered(), budget=0.5, weight_bits=bits, prepare=_untrained)
    (step,) = [outcome for outcome in result.outcomes if outcome.name == "sensitive_layers"]
    assert step.decision == "over the budget", step.reason


def _untrained(recipe):
    return replace(recipe, stages=[replace(stage, epochs=0) for stage in recipe.stages])


@pytest.mark.parametrize("change", ["images", "forward", "file", "version"])
def test_a_folder_of_something_else_is_refused(trained, tmp_path, change):
    settings = {"trainer": QUIET, "budget": 50, "folder": tmp_path}
    first = qat_tricks.guideline(trained, loader(64), val_dataloaders=loader(32), **settings)
    again = qat_tricks.guideline(trained, loader(64), val_dataloaders=loader(32), **settings)
    assert asdict(again.kept) == asdict(first.kept)
    other, val, path = trained, loader(32), tmp_path / "guideline.json"
    if change == "images":
        val = [(100 * torch.randn_like(x), y) for x, y in val]
    elif change == "forward":
        other = Lit(seed=1, gain=-5.0).eval()
        other.load_state_dict(trained.state_dict())
    elif change == "file":
        path.write_text("[]")
    else:
        state = json.loads(path.read_text())
        del state["outcomes"]["ptq"]["reason"]
        path.write_text(json.dumps(state))
    with pytest.raises(QatTricksError, match="give another folder, or delete that one"):
        qat_tricks.guideline(other, loader(64), val_dataloaders=val, **settings)


def test_a_damaged_checkpoint_is_told_and_no_fault_of_the_step(trained, tmp_path, monkeypatch):
    aims = {"budget": 0.5, "folder": tmp_path}
    worse = {"points": -1.0, "low": -2.0, "high": 0.0, "lost": 1, "gained": 0, "p": 1.0}
    monkeypatch.setattr(guideline_judge, "paired_change", lambda before, after: worse)
    run(trained, **aims)
    (tmp_path / "qat" / "qat.ckpt").write_bytes(b"abc")
    state = json.loads((tmp_path / "guideline.json").read_text())
    del state["outcomes"]["qat"]
    (tmp_path / "guideline.json").write_text(json.dumps(state))
    with pytest.raises(QatTricksError, match=r"qat\.ckpt"):
        run(trained, **aims)
    assert "qat" not in json.loads((tmp_path / "guideline.json").read_text())["outcomes"]


@pytest.mark.parametrize("aims", [{"budget": "x"}, {"budget": None}, {"sparsity": "0.5"}], ids=str)
def test_aims_of_another_type_are_refused(trained, aims):
    with pytest.raises(QatTricksError, match=next(iter(aims))):
        run(trained, **aims)
    with pytest.raises(QatTricksError, match="trainer=Trainer is not allowed"):
        qat_tricks.guideline(trained, Data(), trainer=pl.Trainer(logger=False))


def test_the_few_images_have_each_class_alike(trained):
    judge = Judge(trained, loader(62, seed=4), few=22)
    labels = torch.cat([labels for _, labels in judge.few])
    assert torch.bincount(labels).tolist() == [6, 6, 5, 5] or sorted(
        torch.bincount(labels).tolist()
    ) == [5, 5, 6, 6]
    sizes = [len(labels) for _, labels in judge.few]
    assert len(sizes) == 2  # of about 16 images, and the rest
    assert sizes[0] >= 16
    everything = torch.cat([images for images, _ in loader(62, seed=4)])
    for image in torch.cat([images for images, _ in judge.few]):
        assert any(torch.equal(image, other) for other in everything)


@pytest.mark.usefixtures("rehearsed")
def test_a_run_reports_how_the_guideline_chose(tmp_path, monkeypatch):
    # Real rehearsals are another test's: what is reported of them matters here.
    monkeypatch.setattr(module_under_test._Run, "_rehearse", lambda *work: 1.0)
    quick = [
        "data=digits",
        "baseline.epochs=2",
        "measure.runs=5",
        "measure.max_seconds=0.2",
        "measure.threads=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "stage.epochs=1",
    ]
    report = run_job(job_config("recipe=guideline", "budget=100", *quick), tmp_path / "run")
    chosen = report["guideline"]
    assert chosen["kept"] == "ptq"
    assert chosen["within"] is True
    assert [stage["name"] for stage in report["stages"]] == ["fp32", "ptq", "onnx"]
    assert chosen["steps"][0]["decision"] == "within the budget"
    assert chosen["foretold_seconds"] > 0
    assert (tmp_path / "run" / "model.onnx").is_file()
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["guideline"] == chosen
    page = (tmp_path / "run" / "report.html").read_text()
    assert "How the guideline chose" in page
    assert "<code>recipe=int8_ptq</code>" in page
    assert "`recipe=int8_ptq`" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["budget=-1"], "budget=-1 is not allowed"),
        (["weight_bits=four"], "weight_bits"),
        (["sparsity=0.5", "latency=0.5"], "exclude each other"),
        (["trainer.devices=2"], "it judges and decides in one process"),
        (["forecast=true"], "forecasts its own steps"),
        (["recipe.stages.ptq.epochs=0"], "chooses its stages itself"),
    ],
    ids=str,
)
def test_wrong_settings_end_in_one_line(settings, told):
    def check(config):
        whole = composed("recipe=guideline")
        for setting in settings:
            key, _, value = setting.partition("=")
            whole = _with(whole, key, value)
        check_train(whole)

    assert told in refusal(check)


def _with(config, key, value):
    import yaml
    from omegaconf import OmegaConf

    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, yaml.safe_load(value), merge=True, force_add=True)
    return config


def test_other_recipes_have_no_budget_and_the_guideline_is_no_list_of_callbacks():
    assert "budget" in refusal(check_train, "budget=0.5")
    for call in (qat_tricks.recipe, load_recipe):
        with pytest.raises(QatTricksError, match=r"qat_tricks\.guideline\(module, datamodule"):
            call("guideline")


def test_a_full_disk_says_nothing_of_a_step(trained, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise UnwritableError("no space left")

    monkeypatch.setattr(module_under_test, "run_stages", full)
    with pytest.raises(UnwritableError, match="no space left"):
        run(trained, budget=5, folder=tmp_path)
    state = tmp_path / "guideline.json"
    assert not state.exists() or not json.loads(state.read_text())["outcomes"]


class OtherTraining(NoTest):
    def train_dataloader(self):
        return loader(64, seed=9)


@pytest.mark.usefixtures("rehearsed")
def test_other_training_images_are_another_run(trained, tmp_path):
    aims = {"budget": 100, "folder": tmp_path}
    run(trained, **aims)
    module = copy.deepcopy(trained)
    assert [outcome.name for outcome in run(module, **aims).outcomes] == ["ptq"]
    with pytest.raises(QatTricksError, match="another network, other images, other settings"):
        qat_tricks.guideline(module, OtherTraining(), trainer={**QUIET, "devices": 1}, **aims)
    module.lr = 0.5
    with pytest.raises(QatTricksError, match="another network, other images, other settings"):
        run(module, **aims)
