import copy
import sys

import pytest
import torch
from torch.nn import functional as F

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.module import workbench_of
from qat_tricks.tricks import Calibrate, Distill, FoldBatchnorm, PruneChannels, Quantize, distill
from qat_tricks.tricks.distill import distill_features
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, differences, loader, trainer
from tests.helpers.nets import images, small_net

WEIGHT, TEMPERATURE = 0.3, 2.0
DISTIL = [
    f"stages.qat.tricks.distill.weight={WEIGHT}",
    f"stages.qat.tricks.distill.temperature={TEMPERATURE}",
]


def logits(count=6, classes=5, seed=0):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient_are_the_formulas(temperature):
    student, teacher = logits(seed=1).requires_grad_(), logits(seed=2).requires_grad_()
    loss = distill(student, teacher, temperature=temperature)
    p, q = (values.detach().div(temperature).softmax(1) for values in (student, teacher))
    expected = temperature**2 * (q * (q / p).log()).sum(1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    torch.testing.assert_close(student.grad, temperature * (p - q) / len(p))
    assert teacher.grad is None


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_one_logit_is_the_probability_of_two_classes(shape, temperature):
    student = logits(seed=1)[:, 0].reshape(shape).requires_grad_()
    teacher = logits(seed=2)[:, 0].reshape(shape)
    loss = distill(student, teacher, temperature=temperature)
    p, q = (values.detach().div(temperature).sigmoid() for values in (student, teacher))
    of_each = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(loss.detach(), temperature**2 * of_each.mean())
    assert loss > 0.1
    loss.backward()
    torch.testing.assert_close(student.grad, temperature * (p - q) / len(p))
    assert float(distill(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_equal_logits_cost_nothing_and_half_precision_is_computed_in_float():
    assert float(distill(logits(), logits())) == pytest.approx(0, abs=1e-6)
    half = distill(logits(seed=1).bfloat16(), logits(seed=2).bfloat16())
    full = distill(logits(seed=1).bfloat16().float(), logits(seed=2).bfloat16().float())
    assert half.dtype == torch.float32
    assert float(half) == float(full)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, "weight=1.5 is not allowed"),
        ({"weight": -0.1}, "weight=-0.1 is not allowed"),
        ({"temperature": float("nan")}, "temperature=nan is not allowed: give a number above 0"),
        ({"temperature": 0.0}, "temperature=0.0 is not allowed: give a number above 0"),
        ({"features": "layer1"}, "features='layer1' is not allowed: give auto, a list"),
        ({"features": []}, "features=\\[\\] is not allowed"),
        ({"features": "auto", "feature_weight": -1.0}, "feature_weight=-1.0 is not allowed"),
    ],
)
def test_settings_are_checked_when_made(settings, message):
    with pytest.raises(QatTricksError, match=message):
        Distill(**settings)


def maps(seed, shape=(6, 5, 4, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_correlation(student, teacher):
    """``1 - r`` of each channel, of maps whose channels are in dimension 1."""
    pairs = zip(student.transpose(0, 1), teacher.transpose(0, 1), strict=True)
    return [1 - torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]


def test_the_loss_of_features_is_one_less_the_correlation_of_channels():
    student, teacher, step = maps(0), maps(1), torch.tensor(0.1)
    expected = torch.stack(by_correlation(student, teacher))
    torch.testing.assert_close(distill_features(student, teacher, step), expected.mean())
    # half the squared error of maps that are normalized
    normalized = [
        (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), correction=0, keepdim=True)
        for x in (student, teacher)
    ]
    half = (normalized[0] - normalized[1]).square().mean() / 2
    torch.testing.assert_close(distill_features(student, teacher, step), half)
    tokens = distill_features(student.flatten(2).mT, teacher.flatten(2).mT, step)
    torch.testing.assert_close(tokens, expected.mean())


def test_the_loss_of_features_knows_no_scale_and_no_shift_of_a_channel():
    student, teacher = maps(0), maps(1)
    scale, shift = torch.rand(1, 5, 1, 1) + 0.1, torch.randn(1, 5, 1, 1)
    losses = [
        distill_features(ours, theirs, torch.tensor(1e-3))
        for ours in (student, student * scale + shift)
        for theirs in (teacher, teacher * 1e3, teacher * scale)
    ]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(6))
    assert float(distill_features(teacher * scale, teacher, torch.tensor(1e-3))) < 1e-6


def test_channels_that_hold_still_neither_count_nor_explode():
    student, teacher, step = maps(0), maps(1), torch.tensor(0.1)
    teacher[:, 0] = 3.0  # the teacher has nothing to tell
    student[:, 1] = 0.0
    student.requires_grad_()
    loss = distill_features(student, teacher, step)
    expected = [torch.tensor(1.0), *by_correlation(student, teacher)[2:]]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert not student.grad[:, 0].any()
    assert 0 < student.grad[:, 1].abs().max() < 10 * student.grad[:, 2].abs().max() / 0.1


class Noting(Lit):
    """Notes the loss and the logits of each of its own training steps."""

    def __init__(self):
        super().__init__()
        self.own = []

    def training_step(self, batch, _):
        student = self(batch[0])
        loss = torch.nn.functional.cross_entropy(student, batch[1])
        self.own.append((loss.detach(), batch[0], student.detach()))
        return loss


class NotingLosses(pl.Callback):
    """Notes the losses that the trainer has minimized, and the teacher at the end."""

    def __init__(self):
        self.losses, self.teacher = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(outputs["loss"].detach())

    def on_train_end(self, trainer, pl_module):
        (trick,) = (callback for callback in trainer.callbacks if isinstance(callback, Distill))
        self.teacher = copy.deepcopy(trick.state_dict()["teacher"])


def test_a_trainer_minimizes_the_weighted_sum_and_the_teacher_stays_the_float_network():
    lit, noting = Noting().train(), NotingLosses()
    recipe = qat_tricks.recipe("w4a8_qat", DISTIL)
    trainer([*recipe, noting], max_epochs=1).fit(lit, datamodule=Data())
    teacher = small_net(0, num_classes=4)
    assert len(lit.own) == len(noting.losses) == 4
    for (own, x, student), loss in zip(lit.own, noting.losses, strict=True):
        with torch.no_grad():
            pull = distill(student, teacher(0.5 * x), temperature=TEMPERATURE)
        torch.testing.assert_close(loss, (1 - WEIGHT) * own + WEIGHT * pull)
        assert pull > 0
    assert differences(dict(teacher.state_dict()), dict(noting.teacher)) == []
    assert "training_step" not in lit.__dict__  # the module's own step is back


def test_a_step_that_returns_a_mapping_keeps_what_else_is_in_it():
    class Mapping(Noting):
        def training_step(self, batch, index):
            return {"loss": super().training_step(batch, index), "labels": batch[1]}

    seen = []

    class See(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, *args):
            seen.append(torch.equal(outputs["labels"], batch[1]))

    lit, noting = Mapping().train(), NotingLosses()
    recipe = qat_tricks.recipe("w4a8_qat", DISTIL)
    trainer([*recipe, noting, See()], max_epochs=1).fit(lit, datamodule=Data())
    assert seen == [True] * 4
    assert all(loss != own for (own, *_), loss in zip(lit.own, noting.losses, strict=True))


def test_the_modules_own_step_is_back_after_an_exception():
    class Failing(Lit):
        def training_step(self, batch, index):
            if self.trainer.global_step == 1:
                raise RuntimeError("the user's own mistake")
            return super().training_step(batch, index)

    lit = Failing().train()
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(qat_tricks.recipe("w4a8_qat", DISTIL), max_epochs=1).fit(lit, datamodule=Data())
    assert "training_step" not in lit.__dict__
    assert not lit.backbone._forward_hooks  # nobody listens any more


class WithoutNetwork(Lit):
    def training_step(self, batch, _):
        return sum(p.square().sum() for p in self.parameters())


class WithoutLoss(Lit):
    def training_step(self, batch, index):
        super().training_step(batch, index)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (WithoutNetwork, "WithoutNetwork.training_step does not call its network backbone"),
        (WithoutLoss, "distill needs WithoutLoss.training_step to run"),
    ],
)
def test_a_step_that_cannot_be_distilled_is_refused(kind, told):
    with pytest.raises(QatTricksError, match=told):
        trainer([Distill()], max_epochs=1).fit(kind().train(), datamodule=Data())


@pytest.mark.parametrize("runs_network", [True, False])
def test_a_step_may_skip_a_batch(runs_network):
    class Skipping(Lit):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index) if runs_network or index != 1 else None
            return None if index == 1 else loss

    lit, run = Skipping().train(), trainer([Distill()], max_epochs=2)
    run.fit(lit, datamodule=Data())
    assert run.current_epoch == 2


def test_a_network_that_was_quantized_before_has_no_teacher():
    lit = Lit()
    trainer(qat_tricks.recipe("int8_ptq")).validate(lit, Data(), verbose=False)
    with pytest.raises(QatTricksError, match="distill has no teacher"):
        trainer([Distill()], max_epochs=1).fit(lit.train(), loader())


def test_distillation_pulls_towards_the_float_network():
    def distance(weight):
        pl.seed_everything(0, verbose=False)
        lit = Lit().train()
        overrides = [f"stages.qat.tricks.distill.weight={weight}"]
        trainer(qat_tricks.recipe("w4a8_qat", overrides), max_epochs=4).fit(lit, datamodule=Data())
        assert "training_step" not in lit.__dict__  # the module is its own again
        teacher = small_net(0, num_classes=4)
        return float(
            (lit.backbone.eval()(images(64)).detach() - teacher(images(64)).detach())
            .square()
            .mean()
        )

    assert distance(1.0) < 0.5 * distance(0.0)


@pytest.mark.parametrize("flat", [True, False])
def test_a_network_of_one_logit_is_pulled_towards_the_float_one(flat):
    class Binary(Lit):
        def __init__(self):
            super().__init__()
            self.backbone = small_net(0, num_classes=1)
            self.losses = []

        def forward(self, x):
            logits = self.backbone(0.5 * x)
            return logits.flatten() if flat else logits[:, 0]

        def training_step(self, batch, _):
            # says nothing: all that is learned comes from the teacher
            return 0 * F.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 1).float())

        validation_step = None

    def distance(weight):
        pl.seed_everything(0, verbose=False)
        lit, noting = Binary().train(), NotingLosses()
        # With more bits, or with rounding by least squares, the quantized network begins where the
        # float one is.
        few_bits = [
            "~stages.ptq.tricks.gptq",
            "stages.ptq.tricks.quantize.weight_bits=2",
            "stages.ptq.tricks.quantize.activation_bits=2",
        ]
        recipe = qat_tricks.recipe(
            "w4a4_qat", [*few_bits, f"stages.qat.tricks.distill.weight={weight}"]
        )
        trainer([*recipe, noting], max_epochs=4).fit(lit, loader(64))
        with torch.no_grad():
            apart = lit.backbone.eval()(images(64)) - small_net(0, num_classes=1)(images(64))
        return float(apart.square().mean()), max(noting.losses)

    (pulled, loss), (left, none) = distance(1.0), distance(0.0)
    assert loss > 0 == none
    assert pulled < left


class Probabilities(torch.nn.Module):
    """Yields logits in training and probabilities in evaluation."""

    def __init__(self):
        super().__init__()
        self.net = small_net()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        logits = self.net(self.drop(x))
        return logits if self.training else logits.softmax(1)


def test_the_teacher_yields_what_the_student_yields_in_training(monkeypatch):
    compared = []

    def listen(student, teacher, **settings):
        compared.append((student.detach(), teacher))
        return student.sum()

    monkeypatch.setattr(sys.modules[Distill.__module__], "distill", listen)
    lit = Lit()
    lit.backbone = Probabilities()
    trainer([Distill()], max_epochs=1, limit_train_batches=2).fit(lit.train(), datamodule=Data())
    _, expected = compared[0]
    assert float(expected.min()) < 0  # logits, and no probabilities
    assert not workbench_of(lit).teacher.drop.training
    assert workbench_of(lit).teacher.training


class Silent(Lit):
    """Has nothing to learn itself."""

    def training_step(self, batch, index):
        return 0 * super().training_step(batch, index)


def fit_with_features(features, seed=0, **settings):
    """Fits by features alone; returns the module and its losses."""
    pl.seed_everything(5, verbose=False)
    lit, noting = Silent("adam").train(), NotingLosses()
    recipe = qat_tricks.recipe(
        "w2a4_qat",
        [
            "~stages.ptq.tricks.gptq",  # which leaves little to learn
            "stages.qat.tricks.distill.weight=0",
            f"stages.qat.tricks.distill.features={features}",
            "stages.qat.tricks.distill.feature_weight=20",
        ],
    )
    trainer([*recipe, noting], **settings).fit(lit, datamodule=OrderedData())
    return lit, torch.stack(noting.losses) / 20


def test_features_are_added_to_the_loss_and_pull_towards_the_float_network():
    lit, losses = fit_with_features("auto", max_epochs=4)
    first, last = losses[:4].mean(), losses[-4:].mean()
    assert 0 < float(last) < 0.8 * float(first) < 1
    assert "training_step" not in lit.__dict__
    # named, they are the same tensors: the last of each of the two sizes
    _, named = fit_with_features("[block.relu.1,relu_1]", max_epochs=1)
    assert torch.equal(named, losses[:4])


def test_a_pattern_of_features_that_matches_nothing_is_told_before_the_training():
    with pytest.raises(QatTricksError, match='pattern "layer9" matches no quantized tensor'):
        fit_with_features("[layer9]")


def test_maps_that_have_lost_channels_are_left_out_or_told():
    # Only the residual stream keeps its channels: the map behind block.relu.1 does, others may not.
    def narrowed(features):
        lit = Silent("adam").train()
        trainer(
            [
                PruneChannels(multiple=1, share=0.95, include=["left", "right"], num_images=16),
                FoldBatchnorm(),
                Quantize(),
                Calibrate(num_images=16),
                Distill(features=features),
            ],
            max_epochs=1,
        ).fit(lit, datamodule=OrderedData())
        return lit

    lit = narrowed("auto")
    assert lit.backbone.left.out_channels < 8
    with pytest.raises(QatTricksError, match="cannot compare relu_1: channels were removed there"):
        narrowed(["relu_1"])


def test_the_logits_of_positions_are_compared_by_class():
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    by_position = [logits.permute(0, 2, 3, 1).reshape(-1, 5) for logits in (student, teacher)]
    assert torch.allclose(distill(student, teacher), distill(*by_position))
    # All classes of a position alike: the same probabilities.
    assert float(distill(student + torch.randn(2, 1, 3, 4), student)) == pytest.approx(0, abs=1e-6)
