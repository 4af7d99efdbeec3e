"""Training steps run compiled, and nothing else does."""

import copy
import pickle
import shutil

import pytest
import torch

import qat_tricks
from qat_tricks import CompileNetwork
from qat_tricks.errors import QatTricksError
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, differences, loader, trainer


class Spy:
    """A backend that computes as eager does, and counts what it compiles and computes."""

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, _):
        self.graphs += 1

        def compute(*args):
            self.calls += 1
            return graph(*args)

        return compute


def fit(recipe, *compiling, overrides=(), lit=None, **settings):
    torch._dynamo.reset()
    pl.seed_everything(0, verbose=False)
    lit = lit or Lit().train()
    lit.backbone.dropout.p = 0.0
    callbacks = qat_tricks.recipe(recipe, overrides) if recipe else []
    trainer([*callbacks, *compiling], **settings).fit(lit, datamodule=Data())
    return lit


@pytest.mark.feature("CompileNetwork: every training step is compiled, in one graph, and no other")
@pytest.mark.parametrize("recipe", [None, "int8_qat"])
def test_training_steps_are_compiled_and_evaluation_is_not(recipe):
    spy = Spy()
    lit = fit(recipe, CompileNetwork(backend=spy))
    assert spy.calls == 2 * 4  # two epochs of four batches; their validation is eager
    assert spy.graphs == 1
    assert lit.backbone._compiled_call_impl is None


@pytest.mark.feature("CompileNetwork: masks that change, and a teacher, compile the network once")
def test_pruning_and_distillation_go_on_beside_it():
    spy = Spy()
    compiled = fit("int8_prune50", CompileNetwork(backend=spy))
    assert (spy.calls, spy.graphs) == (2 * 4, 1)
    eager = fit("int8_prune50")
    found = compiled.state_dict()
    for name, expected in eager.state_dict().items():
        assert torch.allclose(found[name].double(), expected.double(), rtol=1e-3, atol=1e-4), name
    # The teacher was heard: without it the weights are others.
    alone = fit("int8_prune50", overrides=["~stages.prune_qat.tricks.distill"])
    assert not torch.allclose(
        alone.backbone.head.weight, compiled.backbone.head.weight, rtol=1e-3, atol=1e-4
    )


def run(folder, ckpt_path=None):
    torch._dynamo.reset()
    pl.seed_everything(11, verbose=False)
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    compiling = CompileNetwork(backend="aot_eager")
    callbacks = [*qat_tricks.recipe("int8_prune50"), compiling, keep]
    fit = trainer(callbacks, max_epochs=2, enable_checkpointing=True)
    fit.fit(Lit().train(), ResumableLoader(), loader(32, seed=4), ckpt_path=ckpt_path)
    fit.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True)


@pytest.mark.feature("CompileNetwork: a fit stopped in an epoch ends as the one that was not")
def test_a_resumed_fit_ends_as_the_whole_one(tmp_path):
    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=5.ckpt")
    for key in ("state_dict", "optimizer_states", "qat_tricks"):
        assert differences(whole[key], resumed[key]) == [], key


class Whole(pl.LightningModule):
    """The module is the network itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).mean([2, 3]))

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.feature("CompileNetwork: what it cannot compile is refused in one line")
def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(QatTricksError, match="Whole is the network itself"):
        trainer([*qat_tricks.recipe("int8_qat"), CompileNetwork()]).fit(Whole(), datamodule=Data())
    lit = Lit()
    lit.backbone.compile(backend="eager")
    with pytest.raises(QatTricksError, match="backbone is compiled already: leave out"):
        fit(None, CompileNetwork(), lit=lit)


@pytest.mark.feature("CompileNetwork without a compiler: one line, and the network as it was")
def test_a_backend_that_fails_is_told_in_one_line():
    def broken(graph, _):
        raise RuntimeError("No working C++ compiler found\nlong story")

    lit = Lit().train()
    with pytest.raises(QatTricksError, match="here \\(No working C\\+\\+ compiler found\\)"):
        fit("int8_qat", CompileNetwork(backend=broken), lit=lit)
    assert lit.backbone._compiled_call_impl is None
    assert "forward" not in vars(lit.backbone)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.feature("the compiled kernels: the eager network's values and gradients")
def test_compiled_kernels_compute_what_eager_ones_do():
    network = fit("w4a4_qat").backbone.train()
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def step(compute):
        network.zero_grad()
        logits = compute(x)
        logits.square().mean().backward()
        return logits.detach(), network.stem[0].weight.grad.clone()

    torch._dynamo.reset()
    expected, found = step(network), step(torch.compile(network, dynamic=False))
    for a, b in zip(expected, found, strict=True):
        # a value at the middle between two steps may fall to the other side
        assert (a - b).norm() < 0.02 * a.norm()


class Copies(pl.Callback):
    """Copies the network in every way, after each step."""

    def on_train_batch_end(self, trainer, module, *_):
        network = module.backbone
        network.zero_grad()
        for twin in (
            copy.deepcopy(network),
            copy.copy(network),
            pickle.loads(pickle.dumps(network)),
            copy.deepcopy(module).backbone,
        ):
            assert twin._compiled_call_impl is None
            twin.train()(torch.ones(2, 1, 8, 8)).sum().backward()
        # of the copies, only the shallow one has the network's own parameters
        self.own = [p.grad.abs().sum() for p in network.parameters() if p.grad is not None]
        network.zero_grad()


@pytest.mark.feature("CompileNetwork: copies made during a fit compute with their own weights")
@pytest.mark.parametrize("recipe", [None, "int8_qat"])
def test_copies_are_not_compiled(recipe):
    fit(recipe, CompileNetwork(backend="eager"), Copies(), max_epochs=1)


@pytest.mark.feature("CompileNetwork: a patched forward stays, and a call within a call works")
def test_a_forward_of_the_object_stays():
    lit = Lit().train()
    network, inner = lit.backbone, lit.backbone.forward
    network.forward = patched = lambda x: inner(x) + 7.0
    nested = []

    def again(network, args, _):
        if not nested:
            nested.append(True)
            network(args[0] + 0.1)
            nested.clear()

    network.register_forward_hook(again)
    spy = Spy()
    fit(None, CompileNetwork(backend=spy), lit=lit, max_epochs=1)
    assert vars(network)["forward"] is patched
    assert spy.calls == 2 * 4


@pytest.mark.feature("CompileNetwork: the tenth fit of one class is compiled as the first")
def test_many_fits_of_one_class_are_all_compiled():
    torch._dynamo.reset()
    for _ in range(10):
        spy = Spy()
        run = trainer([CompileNetwork(backend=spy)], max_epochs=1)
        run.fit(Lit().train(), datamodule=Data())
        assert spy.calls == 4


class Views(Lit):
    """Several views of the images in one step."""

    def training_step(self, batch, _):
        views = [self(batch[0].roll(k, 2)) for k in range(4)]
        return sum(torch.nn.functional.cross_entropy(view, batch[1]) for view in views)


@pytest.mark.feature("CompileNetwork: several calls a step compile once, feature maps included")
def test_several_calls_in_a_step_compile_once():
    spy = Spy()
    features = ["stages.prune_qat.tricks.distill.features=auto"]
    fit("int8_prune50", CompileNetwork(backend=spy), overrides=features, lit=Views().train())
    assert spy.calls == 2 * 4 * 4
    assert spy.graphs <= 2  # the first call learns which maps there are
