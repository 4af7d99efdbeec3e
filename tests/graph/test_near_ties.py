import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.graph.near_ties import MARGIN, STEP, TRIES, avoid_rounding_ties
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, loader, trainer
from tests.helpers.nets import images, small_net


class Function(nn.Module):
    def __init__(self, function, branches=1):
        super().__init__()
        self.function = function
        self.stems = nn.ModuleList(nn.Conv2d(1, 4, 3) for _ in range(branches))
        self.head = nn.Conv2d(4 * branches, 3, 1)

    def forward(self, x):
        x = (
            torch.cat([stem(x) for stem in self.stems], 1)
            if len(self.stems) > 1
            else self.stems[0](x)
        )
        return self.head(self.function(x)).mean((2, 3))


def in_float(network):
    """The network quantized and calibrated, its functions computed in float."""
    traced = trace(network)
    quantize(traced, functions="float")
    return calibrate(traced, [images()])


def into_the_middle(network, function):
    """Puts one value that ``function`` can have between two steps; returns its quantizer's name,
    that, and all these values.
    """
    quantizers = [*activation_quantizers(network).items()]
    before = [quantizer for name, quantizer in quantizers if "stems" in name]
    name, quantizer = quantizers[1 + len(before)]
    grids = [(torch.arange(256) - grid.offset) * grid.current_scale() for grid in before]
    values = torch.cat([function(grid) for grid in grids]).detach()
    quantizer.scale.data = values[values > 20 * quantizer.scale][0] / 20.5
    return name, quantizer, values


def distance(values, scale):
    """How far the values are from the middle between two steps, in units of the margin."""
    steps = values.double() / scale.double()
    return float(((steps - steps.floor() - 0.5).abs() / (MARGIN * (steps.abs() + 1))).min())


@pytest.mark.parametrize(
    "function", [nn.SiLU(), nn.Hardswish(), F.gelu, torch.sigmoid, lambda x: F.relu6(x + 3) / 6]
)
@pytest.mark.parametrize("branches", [1, 2])
def test_no_value_of_a_function_stays_between_two_steps(function, branches):
    torch.manual_seed(0)
    network = in_float(Function(function, branches).eval())
    assert avoid_rounding_ties(network) == []  # it is settled when it is calibrated
    name, quantizer, values = into_the_middle(network, function)
    unsettled = quantizer.scale.clone()
    assert distance(values, unsettled) < 1
    assert avoid_rounding_ties(network) == [name]
    assert distance(values, quantizer.scale) >= 1
    assert abs(quantizer.scale / unsettled - 1) <= STEP * TRIES
    assert avoid_rounding_ties(network) == []


def test_other_scales_stay():
    network = in_float(small_net().eval())
    for quantizer in activation_quantizers(network).values():
        quantizer.scale.data *= 1.037
    assert avoid_rounding_ties(network) == []


def test_learned_scales_are_settled_when_the_fit_ends():
    lit = Lit().train()
    lit.backbone = Function(nn.SiLU(), 1)
    lit.backbone.head = nn.Conv2d(4, 4, 1)

    class Unsettle(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            into_the_middle(pl_module.backbone, F.silu)
            assert avoid_rounding_ties(copy.deepcopy(pl_module.backbone)) != []

    recipe = qat_tricks.recipe("int8_qat", ["stages.ptq.tricks.quantize.functions=float"])
    trainer([*recipe, Unsettle()], max_epochs=1).fit(lit, loader(32))
    assert avoid_rounding_ties(lit.backbone) == []


def test_the_last_checkpoint_has_settled_scales(tmp_path):
    lit = Lit().train()
    lit.backbone = Function(nn.SiLU(), 1)
    lit.backbone.head = nn.Conv2d(4, 4, 1)

    class Unsettle(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            into_the_middle(pl_module.backbone, F.silu)

    recipe = qat_tricks.recipe("int8_qat", ["stages.ptq.tricks.quantize.functions=float"])
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [Unsettle(), *recipe, checkpoint]
    trainer(callbacks, max_epochs=1, enable_checkpointing=True).fit(lit, loader(32))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    now = lit.state_dict()
    assert all(torch.equal(saved[name], now[name]) for name in now if name.endswith("scale"))
    assert avoid_rounding_ties(lit.backbone) == []
