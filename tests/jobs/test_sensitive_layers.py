import torch

import qat_tricks
from qat_tricks.graph import layers
from qat_tricks.jobs.sensitive_layers import sensitive_layers
from tests.helpers.lit import Data, Lit, loader


def quantized(*overrides, spoil=None):
    lit = Lit()
    if spoil is not None:
        # One large weight takes all the steps of its channel's grid.
        with torch.no_grad():
            lit.get_submodule(spoil).weight.view(-1)[::9] *= 40
    from qat_tricks.recipes.recipe import load_recipe

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return qat_tricks.run_stages(
        lit, Data(), load_recipe("w4a8_ptq", list(overrides)), trainer=quiet
    ).eval()


def test_the_layer_whose_weights_fit_the_grid_worst_is_named():
    names = {
        name
        for name, layer in layers(quantized().backbone).items()
        if layer.weight_quantizer.scheme.bits == 4
    }
    for name in sorted(names):
        assert sensitive_layers(quantized(spoil=f"backbone.{name}"), loader(32)) == [name]


def test_layers_that_have_8_bits_already_are_not_named_beside_others():
    lit = quantized()
    (name,) = sensitive_layers(lit, loader(32))
    assert layers(lit.backbone)[name].weight_quantizer.scheme.bits == 4
    assert not lit.backbone._forward_pre_hooks
