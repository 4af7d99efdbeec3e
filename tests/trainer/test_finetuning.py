"""Lightning's finetuning callbacks beside a recipe: parts, and their scales, wait and join."""

import pytest
import torch

import qat_tricks
from qat_tricks.graph import layers
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, OrderedData, ResumableLoader, differences, trainer
from tests.helpers.parts import Parts


class Blocks(pl.callbacks.BaseFinetuning):
    """Unfreezes the last block of a backbone first, then the others, by slices."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[3:], optimizer, train_bn=False)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[:3], optimizer, train_bn=False)


class Watch(pl.Callback):
    """Notes at each batch which values have changed, and checks the optimizer's groups."""

    def __init__(self):
        self.changed, self.before = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: value.clone() for name, value in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = dict(pl_module.named_parameters())
        self.changed.append({n for n in now if not torch.equal(now[n], self.before[n])})
        (optimizer,) = trainer.optimizers
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        names = {id(value): name for name, value in now.items()}
        for group in optimizer.param_groups:
            train = [p for p in group["params"] if p.requires_grad]
            scales = {names[id(p)].endswith("scale") for p in train}
            assert scales <= {"lr_factor" in group}
            if "lr_factor" in group:
                assert group["weight_decay"] == 0
        trains = {id(p) for p in pl_module.parameters() if p.requires_grad}
        assert trains <= set(held)


WITHOUT_DISTILL = ["~stages.qat.tricks.distill", "~stages.qat.tricks.restore_batchnorm"]


def recipes(name="w4a8_qat", overrides=WITHOUT_DISTILL):
    return qat_tricks.recipe(name, list(overrides))


def fitted(module, callbacks, epochs=3, train=None, **settings):
    run = trainer(callbacks, max_epochs=epochs, **settings)
    data = {"datamodule": OrderedData()} if train is None else {"train_dataloaders": train}
    run.fit(module, **data)
    return run


@pytest.mark.feature("BaseFinetuning: parts are frozen, and unfrozen block by block")
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_blocks_train_from_when_they_are_unfrozen_and_their_scales_with_them(first):
    module, watch = Parts(), Watch()
    # At a rate at which each step moves each scale by more than float32 rounds away.
    ours = recipes(overrides=[*WITHOUT_DISTILL, "stages.qat.tricks.learn_scales.lr_factor=1"])
    both = [Blocks(), *ours] if first else [*ours, Blocks()]
    fitted(module, [*both, watch], limit_train_batches=3)
    epochs = [set().union(*watch.changed[3 * i : 3 * i + 3]) for i in range(3)]
    tops = [{name.split(".scale")[0] for name in changed} for changed in epochs]
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    head = {name for name in trained if name.startswith("head.")}
    assert {"head.weight", "head.bias"} <= epochs[0]
    assert not any(name.startswith("backbone") for name in epochs[0])
    assert "activation_quantizers.x" not in tops[2]  # the images do not change
    assert {n for n in epochs[1] if n.startswith("backbone")} == {
        n for n in trained if n.startswith("backbone.3")
    }
    assert {n for n in epochs[2] if n.startswith("backbone")} == {
        n for n in trained if n.startswith("backbone")
    }
    of_activations = [{n for n in e if n.startswith("activation_quantizers")} for e in epochs]
    assert of_activations[0] < of_activations[1] < of_activations[2]
    assert head <= epochs[0]
    report = {name for name, layer in layers(module).items() if layer.weight_quantizer}
    assert report == set(layers(module))


class Scheduled(Lit):
    """Gives its optimizer all parameters, whether they train or not."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]


@pytest.mark.parametrize("kind", [Parts, Scheduled])
def test_it_does_not_matter_where_the_callback_stands(kind):
    """Of a frozen part the BatchNorms train on, and folded, their biases."""
    states = []
    for first in (True, False):
        module, watch = kind().train(), Watch()
        own = pl.callbacks.BackboneFinetuning(1)
        both = [own, *recipes()] if first else [*recipes(), own]
        run = fitted(module, [*both, watch], epochs=2, limit_train_batches=2)
        states.append((module.state_dict(), run.optimizers[0].state_dict()))
        moved = {name.rpartition(".")[2] for name in watch.changed[0] if "backbone" in name}
        assert "bias" in moved
        assert "weight" not in moved
        assert "setup" not in vars(own)
    assert differences(*states) == []


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_the_backbone_keeps_the_last_group_and_its_rate(first):
    module = Parts()
    own = pl.callbacks.BackboneFinetuning(1, lambda_func=lambda epoch: 1.5, should_align=False)
    both = [own, *recipes("int8_qat", ())] if first else [*recipes("int8_qat", ()), own]
    run = fitted(module, [*both, Watch()], limit_train_batches=2)
    (optimizer,) = run.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    last = optimizer.param_groups[-1]
    assert {names[id(p)].split(".")[0] for p in last["params"]} == {"backbone"}
    assert last["lr"] == pytest.approx(0.02 * 0.1 * 1.5)
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_network_that_is_unfrozen_as_a_whole_keeps_the_scale_of_its_images():
    class Gained(Lit):
        """Has one parameter beside its network, so that there is something to train at first."""

        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x) * self.gain

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    for recipe in ("int8_ptq", "int8_qat"):
        module, watch = Gained().train(), Watch()
        # At a rate at which each step moves each scale by more than float32 rounds away.
        rate = ["stages.qat.tricks.learn_scales.lr_factor=1"] if recipe == "int8_qat" else []
        callbacks = [*recipes(recipe, rate), pl.callbacks.BackboneFinetuning(1), watch]
        fitted(module, callbacks, epochs=2, limit_train_batches=2)
        scales = {name for name in watch.changed[-1] if name.endswith("scale")}
        assert bool(scales) == (recipe == "int8_qat")
        assert "backbone.activation_quantizers.mul.scale" not in scales
        assert "backbone.stem.0.weight" in watch.changed[-1]
        assert "backbone.stem.0.weight" not in watch.changed[1]


def test_an_epoch_that_ends_is_gone_on_from_with_the_next_unfreezing(tmp_path):
    end = {}
    for name, resumed_from in (("whole", None), ("rest", tmp_path / "whole" / "epoch=1.ckpt")):
        pl.seed_everything(11, verbose=False)
        module = Parts()
        keep = pl.callbacks.ModelCheckpoint(
            dirpath=tmp_path / name, save_top_k=-1, filename="{epoch}"
        )
        run = trainer([Blocks(), *recipes(), keep], max_epochs=3, enable_checkpointing=True)
        run.fit(module, datamodule=OrderedData(), ckpt_path=resumed_from)
        end[name] = module.state_dict(), run.optimizers[0].state_dict()
    assert differences(end["whole"], end["rest"]) == []


@pytest.mark.feature("BaseFinetuning: resume")
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize(("recipe", "step"), [("w4a8_qat", 3), ("w4a8_qat", 5), ("int8_qat", 5)])
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path, first, recipe, step):
    overrides = WITHOUT_DISTILL if recipe == "w4a8_qat" else []
    end = {}
    for name, resumed_from in (("whole", None), ("rest", tmp_path / "whole" / f"step={step}.ckpt")):
        pl.seed_everything(11, verbose=False)
        module = Parts(seed=0 if resumed_from is None else 5)
        keep = pl.callbacks.ModelCheckpoint(
            dirpath=tmp_path / name, save_top_k=-1, every_n_train_steps=1, filename="{step}"
        )
        ours = recipes(recipe, overrides)
        both = [Blocks(), *ours] if first else [*ours, Blocks()]
        run = trainer([*both, keep], max_epochs=3, enable_checkpointing=True)
        run.fit(module, ResumableLoader(), ckpt_path=resumed_from)
        end[name] = module.state_dict(), run.optimizers[0].state_dict()
    assert differences(end["whole"], end["rest"]) == []


def test_a_run_that_breaks_off_leaves_the_callback_its_own_hooks():
    class Fails(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("not today")

    own = pl.callbacks.BackboneFinetuning(1)
    with pytest.raises(RuntimeError, match="not today"):
        fitted(Parts(), [*recipes("int8_ptq", ()), Fails(), own])
    assert "setup" not in vars(own)


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_nothing_of_a_frozen_part_moves_and_its_batchnorms_count_once_unfrozen(first):
    class States(pl.Callback):
        def __init__(self):
            self.states = []

        def on_train_epoch_start(self, trainer, pl_module):
            backbone = pl_module.backbone.state_dict()
            self.states.append({name: value.clone() for name, value in backbone.items()})

    module, states = Parts(), States()
    ours = recipes("int8_qat", ())
    both = [Blocks(), *ours] if first else [*ours, Blocks()]
    fitted(module, [*both, states], limit_train_batches=2)
    start, second, third = states.states
    assert differences(start, second) == []
    moved = [name for name in second if not torch.equal(second[name], third[name])]
    assert {name.split(".")[0] for name in moved} == {"3"}
    assert any("running_mean" in name for name in moved)
