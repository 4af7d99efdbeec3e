"""Whatever ``configure_optimizers`` makes: scales without weight decay at their own rate, each
parameter exactly once.
"""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.tricks.prune import sparsity_of
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, dataset, differences, trainer

WITHOUT_DISTILL = {
    "int8_prune50": ["~stages.prune_qat.tricks.distill"],
    "w4a4_qat": ["~stages.qat.tricks.distill"],
}


class Any(Lit):
    """A module whose optimizers are given."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.kept = list(self.parameters())  # from before the surgery

    def configure_optimizers(self):
        return self.make(self)


def fit(lit, recipe="w4a4_qat", **settings):
    run = trainer(qat_tricks.recipe(recipe, WITHOUT_DISTILL[recipe]), max_epochs=1, **settings)
    run.fit(lit.train(), datamodule=Data())
    return run


def check(run, lit, factor):
    """The invariants, for all optimizers of ``run`` together."""
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    trained = {id(p): name for name, p in lit.named_parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert trained.keys() <= set(held)
    assert set(held) <= {id(p) for p in lit.parameters()}
    scales = {key for key, name in trained.items() if name.endswith("scale")}
    of_scales = [group for group in groups if {id(p) for p in group["params"]} & scales]
    assert {id(p) for group in of_scales for p in group["params"]} <= {
        id(p) for n, p in lit.named_parameters() if "scale" in n
    }
    assert all(group["weight_decay"] == 0 for group in of_scales)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            assert len(group.get("param_names", group["params"])) == len(group["params"])
        for p in optimizer.state:
            assert id(p) in set(held)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[-1] == pytest.approx(rates[0] * factor)
        assert all(set(group) >= set(optimizer.defaults) for group in optimizer.param_groups)


def by_name(lit):
    decay = [p for name, p in lit.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in lit.named_parameters() if not name.endswith("weight")]
    return AdamW(
        [
            {"params": decay, "weight_decay": 0.1, "name": "decay"},
            {"params": rest, "weight_decay": 0.0, "name": "rest"},
        ]
    )


def weights_only(lit):
    return AdamW(
        [p for name, p in lit.named_parameters() if name.endswith(("weight", "bias"))],
        weight_decay=0.1,
    )


OPTIMIZERS = {
    "sgd": (lambda lit: SGD(lit.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1), 0.1),
    "adamw": (lambda lit: AdamW(lit.parameters(), weight_decay=0.1), 0.01),
    "fused": (lambda lit: AdamW(lit.parameters(), weight_decay=0.1, fused=True), 0.01),
    "foreach": (lambda lit: SGD(lit.parameters(), lr=0.01, weight_decay=0.1, foreach=True), 0.1),
    "named_parameters": (lambda lit: AdamW(lit.named_parameters(), weight_decay=0.1), 0.01),
    "groups by name": (by_name, 0.01),
    "groups that know no scales": (weights_only, 0.01),
    "parameters kept from before": (lambda lit: AdamW(lit.kept, weight_decay=0.1), 0.01),
    "in a list": (lambda lit: [SGD(lit.parameters(), lr=0.01, weight_decay=0.1)], 0.1),
}


@pytest.mark.feature("any optimizer: scales undecayed at their own rate, each parameter once")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_parameter_is_trained_once_and_scales_undecayed(name):
    make, factor = OPTIMIZERS[name]
    lit = Any(make)
    check(fit(lit), lit, factor)


@pytest.mark.feature(
    "a parameter that folding replaced is left in no optimizer, its successor trains"
)
@pytest.mark.parametrize("kind", ["bias", "batchnorm.weight", "batchnorm.bias"])
def test_what_surgery_made_is_trained_in_the_group_of_its_weight(kind):
    def recipe():
        folded = [] if kind != "bias" else ["~stages.qat.tricks.restore_batchnorm"]
        return qat_tricks.recipe("w4a4_qat", [*WITHOUT_DISTILL["w4a4_qat"], *folded])

    name = f"backbone.stem.0.{kind}"
    assert name not in dict(Lit().named_parameters())
    lit, fresh = (Any(lambda lit: [SGD(lit.kept, lr=0.01)]) for _ in range(2))
    run = trainer(recipe(), max_epochs=1)
    run.fit(lit.train(), datamodule=Data())
    (held,) = [g["params"] for g in run.optimizers[0].param_groups if "lr_factor" not in g]
    assert any(p is lit.get_parameter(name) for p in held)
    trainer(recipe()).validate(fresh, Data(), verbose=False)
    assert not torch.equal(fresh.get_parameter(name), lit.get_parameter(name))


SCHEDULES = {
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.02, total_steps=5),
    "cyclic": lambda o: CyclicLR(o, base_lr=0.001, max_lr=0.02, step_size_up=2),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=10),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, 0.5), ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


@pytest.mark.feature("any schedule moves weights and scales alike")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("kind", "factor"), [(SGD, 0.1), (AdamW, 0.01)], ids=["sgd", "adamw"])
def test_schedules_move_both_groups_alike(name, kind, factor):
    rates = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def make(lit):
        extra = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(lit.parameters(), lr=0.01, weight_decay=0.1, **extra)
        schedule = {
            "scheduler": SCHEDULES[name](optimizer),
            "interval": "step",
            "monitor": "val_acc",
            "strict": False,
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    lit = Any(make)
    recipe = qat_tricks.recipe("w4a4_qat", WITHOUT_DISTILL["w4a4_qat"])
    run = trainer([*recipe, See()], max_epochs=1, val_check_interval=1)
    run.fit(lit.train(), datamodule=Data())
    check(run, lit, factor)
    for of_weights, of_scales in rates:
        assert of_scales == pytest.approx(factor * of_weights)
    assert len({of_weights for of_weights, _ in rates}) > 1


class Manual(Lit):
    """Two optimizers, stepped by hand: one for the head, one for the rest."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        head = list(self.backbone.head.parameters())
        known = {id(p) for p in head}
        body = [p for p in self.parameters() if id(p) not in known]
        adam, sgd = Adam(head, lr=1e-3), SGD(body, lr=0.01, weight_decay=0.1)
        return [adam, sgd], [ExponentialLR(adam, 0.9), ExponentialLR(sgd, 0.9)]

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.feature("manual optimization, several optimizers with schedules")
def test_manual_optimization_trains_weights_and_scales():
    untrained = Manual()
    trainer(qat_tricks.recipe("w4a4_qat", WITHOUT_DISTILL["w4a4_qat"])).validate(
        untrained, Data(), verbose=False
    )
    lit = Manual()
    run = fit(lit)
    held = [
        id(p)
        for optimizer in run.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(held) == len(set(held))
    assert {id(p) for p in lit.parameters() if p.requires_grad} <= set(held)
    scales = [
        name for name, p in lit.named_parameters() if name.endswith("scale") and p.requires_grad
    ]
    moved = [
        name
        for name in scales
        if not torch.equal(lit.get_parameter(name), untrained.get_parameter(name))
    ]
    assert len(moved) >= len(scales) - 1
    assert len(run.optimizers[1].param_groups) == 2
    assert run.optimizers[1].param_groups[1]["weight_decay"] == 0


@pytest.mark.feature("manual optimization: pruning; distillation is refused in one line")
def test_manual_optimization_prunes_and_refuses_distillation():
    lit = Manual()
    fit(lit, "int8_prune50")
    assert sparsity_of(layers(lit.backbone).values()) >= 0.5
    with pytest.raises(QatTricksError, match="Manual optimizes by hand"):
        trainer(qat_tricks.recipe("int8_prune50")).fit(Manual().train(), datamodule=Data())


@pytest.mark.feature("gradient accumulation: scales step as in one large batch")
def test_accumulated_batches_move_scales_as_one_large_batch():
    def end(batch_size, accumulate):
        lit = Any(lambda lit: SGD(lit.parameters(), lr=0.01)).train()
        lit.backbone.dropout.p = 0.0
        recipe = qat_tricks.recipe(
            "int8_qat",
            [
                "stages.ptq.tricks.calibrate.num_images=64",
                # A BatchNorm sees each batch by itself.
                "~stages.qat.tricks.restore_batchnorm",
            ],
        )
        run = trainer(recipe, max_steps=1, max_epochs=1, accumulate_grad_batches=accumulate)
        start = {}

        class See(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                start.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

        run.callbacks.append(See())
        run.fit(lit, torch.utils.data.DataLoader(dataset(), batch_size=batch_size))
        return {name: p.detach() - start[name] for name, p in lit.named_parameters()}

    large, small = end(64, 1), end(16, 4)
    for name, step in large.items():
        assert torch.allclose(step, small[name], rtol=0.02, atol=1e-7), name
    assert differences(large, {name: torch.zeros_like(step) for name, step in large.items()}) != []
