import qat_tricks
from qat_tricks.graph import layers
from qat_tricks.jobs.sensitive_layers import sensitive_layers, without_rounding
from qat_tricks.recipes.recipe import load_recipe
from tests.helpers.lit import Data, Lit, loader

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def quantized(*overrides):
    recipe = without_rounding(load_recipe("w4a8_ptq", list(overrides)))
    assert [trick.name for trick in recipe.tricks] == ["fold_batchnorm", "quantize", "calibrate"]
    return qat_tricks.run_stages(Lit(), Data(), recipe, trainer=QUIET).eval()


def test_the_layer_of_fewest_bits_is_named():
    names = {
        name
        for name, layer in layers(quantized().backbone).items()
        if layer.weight_quantizer.scheme.bits == 4
    }
    assert len(names) > 2
    for name in sorted(names):
        bits = f"++stages.ptq.tricks.quantize.overrides={{{name}:{{weight_bits:2}}}}"
        others = "stages.ptq.tricks.quantize.weight_bits=7"
        assert sensitive_layers(quantized(others, bits), loader(32)) == [name]


def test_layers_that_have_8_bits_already_are_not_named_beside_others():
    lit = quantized()
    (name,) = sensitive_layers(lit, loader(32))
    assert layers(lit.backbone)[name].weight_quantizer.scheme.bits == 4
    assert not lit.backbone._forward_pre_hooks
