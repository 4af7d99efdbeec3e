"""A step that was run for its network's inputs leaves no trace: no log, state or random number."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers
from qat_tricks.trainer.calibration_images import network_inputs
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, differences, loader, trainer


class Noisy(Lit):
    """Changes all it can before it calls its network."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)  # before the network, and outside of it
        self.ema = nn.Parameter(torch.zeros(3))
        self.accuracy, self.mean = MulticlassAccuracy(4), MeanMetric()
        self.register_buffer("count", torch.zeros(1))
        self.steps, self.shown, self.nested = 0, [], {"deep": {"list": [1]}}

    def training_step(self, batch, index):
        x, y = batch
        type(self).modes_seen.append((self.training, self.norm.training, self.trainer.training))
        self.log("a", 1.0, prog_bar=True)
        self.log_dict({"b": 2.0})
        self.print("never printed")
        self.logger.experiment.add_scalar("c", 3.0)
        self.logger.log_metrics({"d": 4.0})
        self.count += 1
        self.steps += 1
        self.shown.append(x)
        self.nested["deep"]["list"].append(2)
        self.new = x
        with torch.no_grad():
            self.ema.mul_(0.5).add_(1)
        self.accuracy(torch.rand(len(y), 4), y)
        self.mean.update(x.mean())
        x = self.norm(x) + torch.randn(()) * 0 + random.random() * 0
        return F.cross_entropy(self(x), y)


def tensors_and_rest(lit):
    """All that the module holds."""
    metrics = {
        name: {k: v for k, v in vars(m).items() if isinstance(v, (torch.Tensor, list, int))}
        for name, m in lit.named_modules()
    }
    modes = {name: m.training for name, m in lit.named_modules()}
    return copy.deepcopy([dict(lit.state_dict()), metrics, modes, lit.nested, sorted(vars(lit))])


class Look(pl.Callback):
    """Asks for the network's inputs by itself, and compares all before and after."""

    def setup(self, trainer, pl_module, stage):
        before, modes = tensors_and_rest(pl_module), {m: m.training for m in pl_module.modules()}
        state = torch.get_rng_state(), random.getstate()
        own = pl_module.shown, pl_module.nested, pl_module.count
        self.inputs = network_inputs(trainer, pl_module, "backbone", 40)
        assert differences(before, tensors_and_rest(pl_module)) == []
        assert modes == {m: m.training for m in pl_module.modules()}
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1] == random.getstate()
        # the same objects, for others may hold them
        assert all(
            a is b
            for a, b in zip(own, (pl_module.shown, pl_module.nested, pl_module.count), strict=True)
        )
        assert trainer.loggers == self.loggers
        assert trainer.state.fn == stage


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["fit", "validate"])
def test_nothing_is_logged_or_changed(tmp_path, capsys, method, training):
    class Spy(pl.loggers.CSVLogger):
        calls = []

        def log_metrics(self, *args, **kwargs):
            self.calls.append(args)

    Noisy.modes_seen = []
    look, spy = Look(), Spy(tmp_path)
    look.loggers = [spy]
    lit = Noisy().train(training)
    lit.norm.eval()
    run = trainer([look], logger=spy, limit_train_batches=0, limit_val_batches=0)
    getattr(run, method)(lit, datamodule=OrderedData())
    assert [len(values) for values in look.inputs] == [16, 16, 16]  # as many as were asked for
    assert spy.calls == []
    assert "never printed" not in capsys.readouterr().out
    # a BatchNorm that its owner holds in evaluation mode stays so where the owner trains
    assert set(Noisy.modes_seen) == {(True, not training, True)}


def test_the_optimizers_of_a_running_fit_do_not_step():
    """Re-estimation asks for images at the end of the last epoch."""

    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, _):
            optimizer = self.optimizers()
            optimizer.step()  # with the gradients of the step before
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))

    class Ask(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            before = copy.deepcopy([dict(lit.state_dict()), trainer.optimizers[0].state_dict()])
            self.asked = len(network_inputs(trainer, pl_module, "backbone", 64))
            after = [dict(lit.state_dict()), trainer.optimizers[0].state_dict()]
            assert differences(before, after) == []
            assert any(p.grad is not None for p in pl_module.parameters())

    lit, ask = Manual().train(), Ask()
    trainer([ask], max_epochs=1).fit(lit, loader())
    assert ask.asked == 4


def test_under_autocast_the_network_gets_its_inputs_in_float():
    class Stem(Lit):
        def __init__(self):
            super().__init__()
            self.register_module("stem", nn.Sequential(nn.Linear(8, 8)))

        def training_step(self, batch, _):
            return F.cross_entropy(self.backbone(self.stem(batch[0])), batch[1])

        validation_step = None

    lit = Stem().train()
    callbacks = qat_tricks.recipe("int8_qat", ["network=backbone"])
    trainer(callbacks, precision="bf16-mixed", max_epochs=1).fit(lit, loader())
    x = lit.stem(torch.cat([x for x, _ in loader()])).detach()
    assert activation_quantizers(lit.backbone)["activation_quantizers.x"].range[1] == pytest.approx(
        float(x.max()), rel=0.2
    )


def test_the_hooks_of_a_data_module_count_too():
    class Hooked(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 5 * batch[0], batch[1]

    plain, hooked = Lit(), Lit()
    for lit, data in ((plain, Data()), (hooked, Hooked())):
        trainer(qat_tricks.recipe("int8_ptq", ["prove=false"])).test(lit, data, verbose=False)
    ranges = [
        activation_quantizers(lit.backbone)["activation_quantizers.x"].range[1]
        for lit in (plain, hooked)
    ]
    assert ranges[1] == pytest.approx(5 * ranges[0], rel=0.05)


class Gathers(Lit):
    def training_step(self, batch, index):
        return F.cross_entropy(self(self.all_gather(batch[0])), batch[1])


class AsksForTheLength(Lit):
    def training_step(self, batch, index):
        share = self.global_step / self.trainer.estimated_stepping_batches
        return share + super().training_step(batch, index)


@pytest.mark.parametrize(
    ("kind", "what"), [(Gathers, "all_gather"), (AsksForTheLength, "the length of the training")]
)
def test_one_of_several_processes_asks_nothing_of_the_others(monkeypatch, kind, what):
    class Ask(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            assert len(network_inputs(trainer, pl_module, "backbone", 16)) == 1
            monkeypatch.setattr(type(trainer), "world_size", property(lambda self: 2))
            trainer.fit_loop._combined_loader = None
            with pytest.raises(QatTricksError, match=f"asks for {what} before it calls its net"):
                network_inputs(trainer, pl_module, "backbone", 16)
            monkeypatch.undo()

    trainer([Ask()], limit_train_batches=1).fit(kind().train(), loader())
