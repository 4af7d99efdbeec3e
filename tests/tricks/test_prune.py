import itertools

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, spec_of, trace
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.pruning import sparsity_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import build_recipe
from qat_tricks.trainer.module import workbench_of
from qat_tricks.tricks import prune
from qat_tricks.tricks.prune import Prune
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, ResumableLoader, differences, trainer
from tests.helpers.nets import images, small_net
from tests.helpers.weights import zeros


def _zeros(layer):
    return float((layer.masked_weight() == 0).float().mean())


@pytest.mark.parametrize(
    ("sparsity", "scope", "criterion"),
    [
        *itertools.product([0.0, 0.3, 0.5, 0.97], ["layer", "global"], ["magnitude"]),
        (0.0, "sensitivity", "magnitude"),
        (0.97, "sensitivity", "magnitude"),
        (0.4, "sensitivity", "obs"),
        (0.4, "global", "obs"),
    ],
)
def test_sparsity_is_reached_exactly(sparsity, scope, criterion):
    traced = trace(small_net())
    reached = prune(traced, sparsity, scope=scope, criterion=criterion, batches=[images()])
    count = sum(layer.weight.numel() for layer in layers(traced).values())
    assert sparsity <= reached <= sparsity + len(layers(traced)) / count + 1e-6
    if scope == "layer":
        assert all(_zeros(layer) >= sparsity for layer in layers(traced).values())


def test_the_smallest_weights_go():
    traced = trace(small_net())
    weight = traced.get_submodule("block.conv1").weight.detach().abs().clone()
    prune(traced, 0.5)
    kept = traced.get_submodule("block.conv1").weight_mask.bool()
    assert weight[~kept].max() <= weight[kept].min()


def test_global_ranking_does_not_depend_on_a_layers_scale():
    first, second = trace(small_net()), trace(small_net())
    with torch.no_grad():
        second.get_submodule("left").weight.mul_(1000)
    prune(first, 0.5, scope="global")
    prune(second, 0.5, scope="global")
    for name, layer in layers(first).items():
        assert (layer.weight_mask != layers(second)[name].weight_mask).float().mean() < 0.02


@pytest.mark.parametrize(
    ("criterion", "scope"), [("magnitude", "layer"), ("obs", "global"), ("obs", "sensitivity")]
)
def test_masks_only_grow(criterion, scope):
    traced = trace(small_net())
    settings = {"criterion": criterion, "scope": scope, "batches": [images()]}
    prune(traced, 0.3, **settings)
    before = {name: layer.weight_mask.clone() for name, layer in layers(traced).items()}
    with torch.no_grad():
        for layer in layers(traced).values():
            layer.weight.add_(torch.randn_like(layer.weight))  # momentum moves pruned weights too
    prune(traced, 0.6, **settings)
    assert all((layer.weight_mask <= before[name]).all() for name, layer in layers(traced).items())


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_two_of_four(sparsity):
    net = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(32, 10))
    traced = trace(net)
    prune(traced, sparsity, granularity="2:4")
    assert set(layers(traced)) == {"0", "3"}  # three input channels make no fours
    for layer in layers(traced).values():
        fours = layer.weight_mask.transpose(1, -1).reshape(-1, 4).sum(1)
        assert (fours >= 2).all()
        assert float(1 - layer.weight_mask.mean()) == pytest.approx(sparsity, abs=1e-3)
    if sparsity == 0.5:
        assert (fours == 2).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "from 0 to below 1"),
        ({"sparsity": -0.1}, "from 0 to below 1"),
        ({"scope": "globl"}, 'did you mean "global"'),
        ({"granularity": "4:2"}, "2:4"),
        ({"granularity": "2:4", "sparsity": 0.6}, "not possible with 2:4"),
        ({"start": 0.6, "end": 0.4}, "start must not be after end"),
        ({"end": 1.5}, "from 0 to 1"),
        ({"initial": 0.9}, "initial not above"),
        ({"criterion": "obd"}, 'did you mean "obs"'),
        ({"num_images": 0}, "num_images=0 is not allowed"),
    ],
)
def test_settings_are_checked_when_made(settings, message):
    with pytest.raises(QatTricksError, match=message):
        Prune(**settings)


def test_patterns():
    traced = trace(small_net())
    prune(traced, 0.5, exclude=["stem.*", "head"])
    assert "stem.0" not in layers(traced)
    with pytest.raises(QatTricksError, match="matches no"):
        prune(traced, 0.5, include=["nothing*"])


def test_checking_the_settings_draws_no_random_numbers():
    before = torch.get_rng_state()
    Prune(granularity="2:4")
    assert torch.equal(before, torch.get_rng_state())


def test_what_images_tell_needs_images():
    for settings in ({"criterion": "obs"}, {"scope": "sensitivity"}):
        with pytest.raises(QatTricksError, match="no images to"):
            prune(trace(small_net()), 0.5, **settings)


def test_without_training_the_weights_that_stay_make_up_for_the_others():
    batches, x = [images(64)], images(64, seed=5)
    errors = {}
    for criterion in ("magnitude", "obs"):
        work = Workbench(small_net(), lambda _: batches)
        trick = Prune(0.6, criterion=criterion, scope="global")
        trick.apply(work)
        assert trick.reached == pytest.approx(sparsity_of(layers(work.network).values()))
        assert trick.reached >= 0.6
        with torch.no_grad():
            errors[criterion] = output_error(small_net()(x), work.network.eval()(x)).kl
    assert errors["obs"] < 0.3 * errors["magnitude"]


@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
def test_quantizers_are_placed_in_a_network_that_was_pruned_at_once(criterion):
    tricks = {"fold_batchnorm": {}, "prune": {"criterion": criterion}, "quantize": {}}
    recipe = build_recipe({"stages": {"ptq": {"epochs": 0, "tricks": tricks | {"calibrate": {}}}}})
    work = Workbench(small_net(), lambda _: [images(32)])
    recipe.stages[0].apply(work)
    steps = {step["name"]: step for step in spec_of(work.network)["equivalence"]}
    assert steps["pruned"]["by_design"]
    assert steps["pruned"]["evaluation_db"] < 70
    assert steps["quantizers placed"]["evaluation_db"] > 70


class Sparsity(pl.Callback):
    """Notes what the trick says it has reached, and the share of zeros, at each step."""

    def __init__(self):
        self.reached, self.masks = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        (trick,) = (c for c in trainer.callbacks if isinstance(c, Prune))
        masks = [layer.weight_mask for layer in layers(pl_module.backbone).values()]
        self.reached.append(trick.reached)
        self.masks.append([mask.clone() for mask in masks])


def fit(run, lit, path=None):
    (seen,) = (c for c in run.callbacks if isinstance(c, Sparsity))
    seen.reached, seen.masks = [], []
    pl.seed_everything(1, verbose=False)
    run.fit(lit.train(), ResumableLoader(), ckpt_path=path)
    return seen.reached, seen.masks


@pytest.mark.feature("one list of callbacks, several fits: the pruning schedule begins anew")
def test_one_list_prunes_two_modules_alike():
    callbacks = [*qat_tricks.recipe("int8_prune50"), Sparsity()]
    first, _ = fit(trainer(callbacks, max_epochs=3), Lit())
    second, _ = fit(trainer(callbacks, max_epochs=3), other := Lit(seed=1))
    assert first == second
    assert first[-1] == pytest.approx(zeros(other), abs=1e-6)
    assert first[-1] >= 0.5 > first[0]


def test_a_trainer_that_goes_on_with_another_module_begins_the_schedule_anew(tmp_path):
    def trainer_and_first():
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
        )
        callbacks = [*qat_tricks.recipe("int8_prune50"), Sparsity(), keep]
        run = trainer(callbacks, max_epochs=3, enable_checkpointing=True)
        reached, _ = fit(run, Lit())
        run.fit_loop.max_epochs = 6
        return run, reached

    run, first = trainer_and_first()
    second, _ = fit(run, other := Lit(seed=1))
    assert second == first
    assert zeros(other) >= 0.5
    # and a run that goes on from its middle, in a trainer of its own, ends like it
    callbacks = [*qat_tricks.recipe("int8_prune50"), Sparsity()]
    rest, _ = fit(trainer(callbacks, max_epochs=6), again := Lit(seed=2), tmp_path / "step=16.ckpt")
    assert rest == second[4:]
    assert differences(dict(other.state_dict()), dict(again.state_dict())) == []


def test_a_second_fit_of_the_same_module_keeps_its_masks():
    callbacks = [*qat_tricks.recipe("int8_prune50"), Sparsity()]
    lit = Lit()
    _, masks = fit(trainer(callbacks, max_epochs=3), lit)
    reached, again = fit(trainer(callbacks, max_epochs=3), lit)
    assert min(reached) >= 0.5  # and not that of a schedule that begins at zero
    assert zeros(lit) >= 0.5
    for now in again:
        assert all((new <= old).all() for new, old in zip(now, masks[-1], strict=True))


@pytest.mark.feature("second-order pruning by sensitivity resumes to the bit")
def test_masks_that_images_decide_resume_to_the_bit(tmp_path):
    settings = [
        "stages.prune_qat.tricks.prune.criterion=obs",
        "stages.prune_qat.tricks.prune.scope=sensitivity",
        "stages.prune_qat.tricks.prune.updates=4",
        "stages.prune_qat.tricks.prune.num_images=16",
    ]

    def callbacks(*more):
        return [*qat_tricks.recipe("int8_prune50", settings), Sparsity(), *more]

    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    run = trainer(callbacks(keep), max_epochs=3, enable_checkpointing=True)
    reached, masks = fit(run, whole := Lit())
    assert len(set(reached)) > 2
    assert reached[-1] >= 0.5
    for before, after in itertools.pairwise(masks):
        assert all((new <= old).all() for old, new in zip(before, after, strict=True))
    assert len({float(mask.mean()) for mask in masks[-1]}) > 2  # each layer its own share
    # The resumed run has another random state where it takes its images.
    torch.rand(7)
    rest, _ = fit(
        trainer(callbacks(), max_epochs=3), other := Lit(seed=2), tmp_path / "step=5.ckpt"
    )
    assert rest == reached[-len(rest) :]
    assert differences(dict(whole.state_dict()), dict(other.state_dict())) == []


def test_a_resumed_fit_goes_on_to_another_sparsity(tmp_path):
    def run(sparsity, epochs, **settings):
        lit = Lit().train()
        fit = trainer([Prune(sparsity=sparsity)], max_epochs=epochs)
        fit.fit(lit, ResumableLoader(), **settings)
        return fit, lit

    first, lit = run(0.5, 1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert zeros(lit) == pytest.approx(0.5, abs=0.01)
    _, lit = run(0.8, 3, ckpt_path=tmp_path / "half.ckpt")
    assert zeros(lit) == pytest.approx(0.8, abs=0.01)
    with pytest.warns(UserWarning, match=r"sparsity of 0\.50\d already, more than sparsity=0\.3"):
        _, lit = run(0.3, 3, ckpt_path=tmp_path / "half.ckpt")
    assert zeros(lit) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "changed",
    [
        {"criterion": "obs"},
        {"scope": "sensitivity"},
        {"scope": "global"},
        {"criterion": "obs", "scope": "global"},
        {"exclude": ["left"]},
    ],
)
def test_a_resumed_fit_goes_on_with_other_choices(changed, tmp_path):
    def run(epochs, sparsity=0.5, ckpt_path=None, **choices):
        lit = Lit().train()
        pruning = Prune(sparsity=sparsity, end=0.9, num_images=16, **choices)
        fit = trainer([pruning], max_epochs=epochs)
        fit.fit(lit, ResumableLoader(), ckpt_path=ckpt_path)
        return fit, lit, pruning

    first, _, _ = run(1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, lit, pruning = run(3, 0.8, tmp_path / "half.ckpt", **changed)
    reached = sparsity_of(pruning._prunable(workbench_of(lit)).values())
    assert reached == pytest.approx(0.8, abs=0.01)
    assert pruning.reached == reached


def test_shares_are_measured_for_the_sparsity_that_is_asked_for(tmp_path):
    def run(sparsity, epochs, ckpt_path=None):
        fit = trainer(
            [pruning := Prune(sparsity=sparsity, scope="sensitivity", num_images=16)],
            max_epochs=epochs,
        )
        fit.fit(lit := Lit().train(), ResumableLoader(), ckpt_path=ckpt_path)
        return fit, lit, pruning

    first, _, before = run(0.5, 1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, lit, after = run(0.9, 3, tmp_path / "half.ckpt")
    assert zeros(lit) == pytest.approx(0.9, abs=0.01)
    assert after.measured.shares != before.measured.shares


class SharedWeights(nn.Module):
    """Two pairs of layers with one weight each; the first by name is not the first to be called."""

    def __init__(self):
        super().__init__()
        self.later, self.sooner = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.later.weight = self.sooner.weight
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.later(torch.relu(self.sooner(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.second(torch.relu(self.first(x.mean((2, 3)))))))


@pytest.mark.parametrize("scope", ["layer", "global", "sensitivity"])
@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
def test_layers_that_share_a_weight_are_pruned_as_one(criterion, scope):
    network = SharedWeights().eval()
    traced = trace(network)
    with torch.no_grad():
        reached = prune(traced, 0.5, scope=scope, criterion=criterion, batches=[images()])
    found = layers(traced)
    for one, other in (("later", "sooner"), ("first", "second")):
        assert torch.equal(found[one].weight_mask, found[other].weight_mask)
        assert found[one].weight_mask is not found[other].weight_mask
    shared = [found[name] for name in ("sooner", "stem", "first", "head")]
    count = sum(layer.weight.numel() for layer in shared)
    assert sum(int((layer.weight == 0).sum()) for layer in shared) / count == pytest.approx(
        0.5, abs=len(shared) / count
    )
    assert reached == pytest.approx(sparsity_of(found.values()))


def test_a_pattern_that_excludes_one_of_two_layers_with_one_weight_spares_both():
    traced = trace(SharedWeights())
    prune(traced, 0.5, exclude=["second"])
    assert set(layers(traced)) == {"later", "sooner", "stem", "head"}
    assert (traced.get_submodule("first").weight != 0).all()
    assert _zeros(traced.get_submodule("head")) == 0.5
