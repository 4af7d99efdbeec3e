"""Mixed precision, compilation and memory formats change speed, and no grid."""

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, loader, trainer
from tests.helpers.nets import images

RECIPES = ["int8_prune50", "w4a4_qat"]


def fit(recipe, lit=None, **settings):
    lit = lit or Lit().train()
    lit.backbone.dropout.p = 0.0
    pl.seed_everything(0, verbose=False)
    run = trainer(qat_tricks.recipe(recipe), **settings)
    run.fit(lit, datamodule=Data())
    return run, lit


def logits(lit, x, **autocast):
    with torch.no_grad(), torch.autocast("cpu", **autocast):
        return lit.eval().backbone(x)


@pytest.mark.feature("bf16-mixed: scales in float32, integer grids exact, results within 5 %")
@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_precision_keeps_scales_and_grids(recipe):
    _, full = fit(recipe)
    run, mixed = fit(recipe, precision="bf16-mixed")
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    scales = [(name, p) for name, p in full.named_parameters() if name.endswith("scale")]
    for name, scale in scales:
        assert torch.allclose(mixed.get_parameter(name), scale, rtol=0.05), name
    x = images(32)
    expected = logits(mixed, x, enabled=False)
    # to the last bit, wherever it is evaluated
    assert torch.equal(logits(mixed, x, dtype=torch.bfloat16), expected)
    (in_trainer,) = run.validate(mixed, loader(32, seed=4), verbose=False)
    (alone,) = trainer().validate(mixed, loader(32, seed=4), verbose=False)
    assert in_trainer == alone


@pytest.mark.feature("16-mixed (on CPU Lightning takes bf16 for it)")
def test_half_precision_trains_and_keeps_scales():
    _, mixed = fit("int8_prune50", precision="16-mixed")
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert torch.isfinite(logits(mixed, images(8), enabled=False)).all()


@pytest.mark.feature("bf16-true, 16-true and 64-true are refused in one line")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_scales_are_not_cast(precision):
    with pytest.raises(QatTricksError, match=f"precision={precision} is not allowed"):
        fit("int8_qat", precision=precision)


@pytest.mark.feature("torch.compile: no graph break in the quantized network")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["training", "evaluation", "evaluation without gradients"])
def test_the_quantized_network_compiles_without_a_graph_break(recipe, mode):
    _, lit = fit(recipe, max_epochs=1)
    network = lit.backbone.train(mode == "training")
    torch._dynamo.reset()
    with torch.set_grad_enabled("without" not in mode):
        expected = network(images(4))
        # raises at a graph break
        compiled = torch.compile(network, backend="eager", fullgraph=True)(images(4))
        assert torch.allclose(compiled, expected, atol=1e-6)


@pytest.mark.feature(
    "torch.compile: the gradients of the eager network; those of activations' scales within 5 %"
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_compiled_network_has_the_same_gradients(recipe):
    _, lit = fit(recipe, max_epochs=1)
    network = lit.backbone.train()
    torch._dynamo.reset()

    def gradients(compute):
        network.zero_grad()
        compute(images(4)).square().sum().backward()
        return {
            name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None
        }

    expected, found = gradients(network), gradients(torch.compile(network, backend="eager"))
    assert expected.keys() == found.keys()
    assert any("scale" in name for name in expected)
    # An activation's scale has no dimensions, and one byte a value tells its gradient.
    of_scales = torch.stack([g for g in expected.values() if g.dim() == 0]).abs().mean()
    for name, gradient in expected.items():
        rtol, atol = (1e-4, 1e-6) if gradient.dim() > 0 else (0.05, 0.05 * float(of_scales))
        assert torch.allclose(found[name], gradient, rtol=rtol, atol=atol), name


@pytest.mark.feature("torch.compile(module) in a trainer: the same weights within 1e-4")
def test_a_compiled_module_trains_as_the_eager_one():
    _, eager = fit("int8_prune50", max_epochs=1)
    torch._dynamo.reset()
    lit = Lit().train()
    lit.backbone.dropout.p = 0.0
    pl.seed_everything(0, verbose=False)
    trainer(qat_tricks.recipe("int8_prune50"), max_epochs=1).fit(
        torch.compile(lit, backend="eager"), datamodule=Data()
    )
    for (name, expected), found in zip(
        eager.state_dict().items(), lit.state_dict().values(), strict=True
    ):
        assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-4), name


@pytest.mark.feature("a network that is compiled already is refused in one line")
def test_a_compiled_network_is_refused():
    lit = Lit()
    lit.backbone = torch.compile(lit.backbone, backend="eager")
    with pytest.raises(QatTricksError, match="backbone is compiled"):
        fit("int8_qat", lit)


class ChannelsLast(Lit):
    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))


@pytest.mark.feature("channels_last: the same evaluation to the last bit, training within 1e-3")
@pytest.mark.parametrize("recipe", RECIPES)
def test_channels_last_changes_no_result(recipe):
    _, plain = fit(recipe)
    _, last = fit(recipe, ChannelsLast().to(memory_format=torch.channels_last).train())
    convs = [
        layer
        for layer in layers(last.backbone).values()
        if layer.weight.dim() == 4 and layer.weight.shape[1] > 1
    ]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in convs)
    for name, value in plain.state_dict().items():
        assert torch.allclose(
            value.float(), last.state_dict()[name].float(), rtol=1e-3, atol=1e-3
        ), name
    x = images(16)
    expected = logits(plain, x, enabled=False)
    plain.to(memory_format=torch.channels_last)
    assert torch.equal(
        logits(plain, x.contiguous(memory_format=torch.channels_last), enabled=False), expected
    )
