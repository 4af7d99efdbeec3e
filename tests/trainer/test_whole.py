"""A LightningModule that is the network itself, in a user's trainer, from the fit to the test."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers
from qat_tricks.trainer.module import CHECKPOINT_KEY, find_network, workbench_of
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, OrderedData, ResumableLoader, differences, trainer
from tests.helpers.nets import images
from tests.helpers.parts import Layers, Parts


def fitted(module, recipe="int8_qat", data=OrderedData, callbacks=(), **settings):
    run = trainer([*qat_tricks.recipe(recipe), *callbacks], **{"max_epochs": 1, **settings})
    run.fit(module, datamodule=data())
    return run


@pytest.mark.feature("the module itself is the network: a backbone and a head, or layers")
@pytest.mark.parametrize("kind", [Parts, Layers])
def test_the_module_itself_is_quantized_saved_loaded_and_tested(kind, tmp_path):
    module, path = kind(), str(tmp_path / "model.ckpt")
    keys, parts = list(module.state_dict()), dict(module.named_children())
    run = fitted(module, "int8_prune50")
    assert isinstance(module, kind)
    assert workbench_of(module).network is module
    assert all(layer.is_quantizing for layer in layers(module).values())
    added = {key.split(".")[0] for key in module.state_dict().keys() - set(keys)}
    assert added - set(parts) == {"activation_quantizers"}
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)[CHECKPOINT_KEY]
    assert saved["network"] == "self"
    for made_by in (kind, type(module)):  # the class of a quantized module is the user's too
        back = qat_tricks.load_from_checkpoint(made_by, path)
        assert torch.equal(back(images()), module.eval()(images()))
    expected = trainer().test(module, Data(), verbose=False)
    fresh = trainer(qat_tricks.recipe("int8_prune50"))
    assert fresh.test(kind(), Data(), ckpt_path=path, verbose=False) == expected


@pytest.mark.parametrize("call", ["self", "forward"])
def test_both_ways_to_call_the_module_train_the_same_also_with_a_teacher(call):
    module, expected = Parts(call=call), Parts()
    for given in (expected, module):
        fitted(given, "int8_prune50")
    assert differences(expected.state_dict(), module.state_dict()) == []


def test_a_step_that_calls_the_parts_is_refused_by_name():
    with pytest.raises(QatTricksError, match=r'calls the part "backbone" .* let it call self\(x'):
        fitted(Parts(call="parts"))
    module = Parts()
    fitted(module)
    module.hparams.call = "parts"  # in a validation, and with nothing left of the refusal
    with pytest.raises(QatTricksError, match=r'"backbone", which Parts\.validation_step calls'):
        trainer().validate(module, Data(), verbose=False)
    module.hparams.call = "self"
    trainer().validate(module, Data(), verbose=False)


def test_losses_and_metrics_stay_the_users_own_objects():
    module = Parts()
    own = module.criterion, module.accuracy
    run = fitted(module)
    assert (module.criterion, module.accuracy) == own
    run = trainer()
    run.validate(module, Data(), verbose=False)
    x, y = next(iter(torch.utils.data.DataLoader(Data().val_dataloader().dataset, 32)))
    right = (module.eval()(x).argmax(1) == y).float()
    mean = torch.stack([right[y == label].mean() for label in range(4)]).mean()
    assert float(run.callback_metrics["val_acc"]) == pytest.approx(float(mean))


def test_calibration_leaves_metrics_and_statistics_as_they_were():
    class Counting(Parts):
        def training_step(self, batch, index):
            self.accuracy(torch.zeros(len(batch[1]), 4), batch[1])  # before its network
            self.seen = index
            return super().training_step(batch, index)

    module = Counting()
    module.criterion.register_forward_hook(lambda *_: None)  # of no concern to the network
    trainer(qat_tricks.recipe("int8_ptq"), limit_val_batches=0).validate(
        module, Data(), verbose=False
    )
    assert module.accuracy.update_count == 0
    assert int(module.accuracy.tp.sum()) == 0
    assert not hasattr(module, "seen")
    assert layers(module)


def test_a_resumed_fit_ends_with_the_same_bits(tmp_path):
    end = {}
    for name, resumed_from in (("whole", None), ("resumed", tmp_path / "whole" / "step=3.ckpt")):
        pl.seed_everything(11, verbose=False)
        module = Parts(seed=0 if resumed_from is None else 5)
        keep = pl.callbacks.ModelCheckpoint(
            dirpath=tmp_path / name, save_top_k=-1, every_n_train_steps=1, filename="{step}"
        )
        run = trainer([*qat_tricks.recipe("int8_prune50"), keep], enable_checkpointing=True)
        run.fit(module, ResumableLoader(), ckpt_path=resumed_from)
        end[name] = module.state_dict(), run.optimizers[0].state_dict()
    assert differences(end["whole"], end["resumed"]) == []


def test_copies_and_pickles_are_whole_and_leave_the_trainer_behind():
    module = Parts()
    fitted(module)
    module.eval()
    assert module._trainer is not None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._trainer is None
        assert workbench_of(twin).network is twin
        assert torch.equal(twin(images()), module(images()))
        with torch.no_grad():
            twin.head.bias.add_(1)
        assert not torch.equal(twin(images()), module(images()))


def test_an_averaged_module_and_each_parameter_once():
    module, rates = Parts(), []
    averaging = pl.callbacks.WeightAveraging()
    run = fitted(module, callbacks=[averaging], max_epochs=2)
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    rates = [id(parameter) for parameter in held]
    assert len(rates) == len(set(rates))
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert len(names) == len(dict(module.named_parameters()))
    averaged = averaging._average_model.module
    assert isinstance(averaged, Parts)
    assert torch.isfinite(averaged.eval()(images())).all()


def test_a_wrapper_of_several_devices_trains_it_and_refusals_stay():
    module = Parts()
    fitted(module, strategy="ddp", devices=1)
    assert "forward" in vars(module)  # Lightning leaves it there
    module.hparams.call = "parts"
    with pytest.raises(QatTricksError, match="beside the forward"):
        module.training_step(next(iter(Data().train_dataloader())), 0)
    module.hparams.call = "self"
    trainer().validate(module, Data(), verbose=False)


class Logs(Parts):
    def forward(self, x):
        self.log("mean", x.mean())
        return super().forward(x)


class ReadsTrainer(Parts):
    def forward(self, x):
        return super().forward(x) * (1 + self.current_epoch)


@pytest.mark.parametrize(("kind", "what"), [(Logs, "self.log"), (ReadsTrainer, "self.trainer")])
@pytest.mark.parametrize("overrides", [[], ["network=self"]])
def test_a_forward_that_uses_its_trainer_is_refused_in_one_line(kind, what, overrides):
    module = kind()
    with pytest.raises(QatTricksError, match=rf"{kind.__name__}.forward uses {what}") as error:
        trainer(qat_tricks.recipe("int8_ptq", overrides)).validate(module, Data(), verbose=False)
    assert "\n" not in str(error.value)
    assert "log" not in vars(module)
    assert module.trainer is not None


def test_a_forward_may_name_its_device_and_keep_an_argument():
    class Named(Parts):
        def forward(self, x, with_features=False):
            features = self.backbone(x.to(self.device)).flatten(1)
            return (self.head(features), features) if with_features else self.head(features)

    module = Named()
    fitted(module)
    assert not [node for node in module.graph.nodes if node.target == "to"]
    with pytest.raises(QatTricksError, match="was traced with with_features=False"):
        module(images(), with_features=True)


class Taught(Parts):
    """A teacher beside the network, which only the step calls."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())

    def training_step(self, batch, index):
        with torch.no_grad():
            expected = self.teacher(batch[0])
        return super().training_step(batch, index) + (self(batch[0]) - expected).square().mean()


def test_layers_that_forward_does_not_call_stay_in_float_and_this_is_said():
    module = Taught()
    teacher = module.teacher
    with pytest.warns(UserWarning, match="Taught.forward does not call teacher"):
        fitted(module)
    assert module.teacher is teacher
    assert type(teacher[0]) is nn.Conv2d


def test_a_setup_that_makes_the_parts_anew_keeps_the_quantized_ones():
    class Late(Parts):
        def setup(self, stage):
            self.head = nn.Linear(8, 4)
            self.accuracy = type(self.accuracy)(4)

    module = Late()
    run = fitted(module)
    head, counts = module.head, module.accuracy
    with pytest.warns(UserWarning, match="has made head anew"):
        run.test(module, Data(), verbose=False)
    assert module.head is head
    assert module.accuracy is not counts


def test_no_module_is_its_network_unless_forward_calls_its_layers():
    class Silent(Lit):
        """Calls one of two networks."""

        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 4)

    class Listed(Parts):
        """Holds its layers in a list, which is no network."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([self.backbone, nn.Flatten(), self.head])
            del self.backbone, self.head

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class NoForward(Parts):
        forward = pl.LightningModule.forward

    class Branching(Parts):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else super().forward(-x)

    assert find_network(Parts()) == find_network(Listed()) == find_network(Layers()) == "self"
    assert find_network(Lit()) == "backbone"
    for kind, reason in (
        (Silent, "forward calls only backbone of them"),
        (NoForward, "has no forward that puts them together"),
        (Branching, r"Branching cannot be traced: .*return super\(\)\.forward"),
    ):
        with pytest.raises(QatTricksError, match=f"must hold one network.*{reason}"):
            find_network(kind())
    fitted(Listed())


def test_a_compiled_module_is_refused_as_a_whole():
    module = Parts()
    with pytest.raises(QatTricksError, match="where it is compiled"):
        trainer(qat_tricks.recipe("int8_ptq")).validate(
            torch.compile(module), Data(), verbose=False
        )


def test_a_module_quantized_beforehand_is_fitted_as_it_is():
    module = qat_tricks.quantize(Parts(), [images(32)])
    assert find_network(module) == "self"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted(module)
    assert isinstance(module, Parts)
    assert activation_quantizers(module)
