"""LSQ+: the smallest values of ranges learn beside the scales."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.graph import activation_quantizers, spec_of, trace
from qat_tricks.tricks import calibrate, learn_scales, quantize
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, ResumableLoader, differences, loader, trainer
from tests.helpers.nets import images, small_net

OFFSETS = "stages.qat.tricks.learn_scales.offsets=true"


class Bottleneck(nn.Module):
    """A SiLU, a layer that reads another layer, and ReLUs: grids with and without an offset."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU())
        self.narrow, self.wide = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.wide(self.narrow(self.stem(x))))
        return self.head(x.mean([2, 3]))


class LitBottleneck(Lit):
    def __init__(self, seed=0):
        super().__init__(seed=seed)
        torch.manual_seed(seed)
        self.backbone = Bottleneck()


def offsets_of(network):
    return {n for n, q in activation_quantizers(network).items() if q.low is not None}


def test_offsets_learn_below_8_bits_where_no_relu_is():
    traced = quantize(trace(Bottleneck().eval()), weight_bits=4, activation_bits=4)
    learn_scales(calibrate(traced, [images()]), offsets=True)
    quantizers = activation_quantizers(traced)
    expected = {
        name
        for name, q in quantizers.items()
        if q.scheme.bits == 4 and q.activation is None and q.scale.requires_grad
    }
    assert offsets_of(traced) == expected
    assert len(expected) == 2  # behind the SiLU, and of the narrow layer
    entries = spec_of(traced)["activations"]
    assert {f"activation_quantizers.{n}" for n, e in entries.items() if e.get("low")} == expected


@pytest.mark.parametrize("settings", [{"activations": "signed_symmetric"}, {"activation_bits": 8}])
def test_without_a_coarse_affine_grid_nothing_is_added(settings):
    traced = quantize(trace(small_net()), **{"activation_bits": 4, **settings})
    learn_scales(calibrate(traced, [images()]), offsets=True)
    assert offsets_of(traced) == set()


class Push(pl.Callback):
    """Adds a gradient to each smallest value, so that a few steps move its zero point."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for quantizer in activation_quantizers(pl_module.backbone).values():
            if quantizer.low is not None:
                if quantizer.low.grad is None:  # of a frozen part
                    continue
                quantizer.low.grad += 50 * quantizer.scale.detach()


def run(folder, ckpt_path=None, seed=0, extra=(), overrides=(OFFSETS,)):
    pl.seed_everything(11, verbose=False)
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    callbacks = qat_tricks.recipe("w4a4_qat", overrides)
    fit = trainer([*callbacks, Push(), *extra, keep], max_epochs=2, enable_checkpointing=True)
    lit = LitBottleneck(seed).train()
    fit.fit(lit, ResumableLoader(), loader(32, seed=4), ckpt_path=ckpt_path)
    fit.save_checkpoint(folder / "end.ckpt")
    return lit, torch.load(folder / "end.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def zero_points(network):
    return {n: q.offset for n, q in activation_quantizers(network).items()}


def test_zero_points_move_in_training(whole):
    folder, lit, _ = whole
    first = torch.load(folder / "step=1.ckpt", weights_only=True)["state_dict"]
    moved = {
        name: (int(first[f"backbone.{name}.zero_point"]), zero)
        for name, zero in zero_points(lit.backbone).items()
        if int(first[f"backbone.{name}.zero_point"]) != zero
    }
    assert moved
    assert moved.keys() <= offsets_of(lit.backbone)


def test_what_was_trained_is_what_is_exported(whole, tmp_path):
    _, lit, _ = whole
    network, x = lit.backbone.cpu().eval(), images(32, seed=9)
    parity = qat_tricks.export_onnx(network, tmp_path / "model.onnx", x)
    assert parity.layers
    assert all(tensor.differing == 0 for tensor in parity.layers)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = network(x)
    assert torch.equal(torch.from_numpy(found), expected)


def test_a_checkpoint_alone_gives_the_network_again(whole):
    folder, lit, _ = whole
    loaded = qat_tricks.load_from_checkpoint(LitBottleneck, folder / "end.ckpt")
    x = images(8, seed=5)
    assert zero_points(loaded.backbone) == zero_points(lit.backbone)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), lit.eval()(x))


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_resumed_fit_ends_as_the_whole_one(whole, tmp_path, step):
    folder, _, expected = whole
    _, resumed = run(tmp_path, folder / f"step={step}.ckpt", seed=5)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "qat_tricks"):
        assert differences(expected[key], resumed[key]) == [], key


def test_offsets_hold_still_with_the_scales(tmp_path):
    lit, _ = run(tmp_path, overrides=[OFFSETS, "stages.qat.tricks.learn_scales.stop=0"])
    first = torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"]
    for name in offsets_of(lit.backbone):
        assert torch.equal(first[f"backbone.{name}.low"], lit.state_dict()[f"backbone.{name}.low"])


def test_compiled_training_is_the_same_up_to_rounding(whole, tmp_path):
    _, eager, _ = whole
    torch._dynamo.reset()
    compiled, _ = run(tmp_path, extra=[qat_tricks.CompileNetwork(backend="aot_eager")])
    assert zero_points(compiled.backbone) == zero_points(eager.backbone)


def test_an_averaged_network_has_grids_of_its_own_averages(tmp_path):
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    lit, _ = run(tmp_path, extra=[average])
    for name, quantizer in activation_quantizers(lit.backbone.eval()).items():
        if quantizer.low is not None:
            low, high = quantizer.range
            assert low == pytest.approx(float(quantizer.low), abs=0.5 * float(quantizer.scale)), (
                name
            )
            assert low < 0 < high


def test_the_first_forward_follows_what_has_moved(whole, tmp_path):
    """Kernels before a quantizer read its grid before it is called."""
    network, x = copy.deepcopy(whole[1].backbone).cpu().eval(), images(16, seed=9)
    with torch.no_grad():
        for quantizer in activation_quantizers(network).values():
            if quantizer.low is not None:
                quantizer.low -= 2 * quantizer.scale
        first = network(x)
        assert torch.equal(network(x), first)


class Unfreeze(pl.callbacks.BaseFinetuning):
    """Freezes the layers before the grids with an offset, in the first epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.backbone.stem, pl_module.backbone.narrow])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            network = pl_module.backbone
            self.unfreeze_and_add_param_group([network.stem, network.narrow], optimizer)


def test_an_average_beside_what_is_unfrozen_later_keeps_each_tensor_in_its_place(tmp_path):
    extra = [Unfreeze(), pl.callbacks.EMAWeightAveraging(decay=0.5)]
    lit, _ = run(tmp_path, extra=extra)
    assert offsets_of(lit.backbone)
    for name, quantizer in activation_quantizers(lit.backbone).items():
        assert 1e-3 < float(quantizer.scale) < 1, name
        if quantizer.low is not None:
            assert -2 < float(quantizer.low) <= 0, name
