"""torchao's PT2E flow with its ``X86InductorQuantizer``.

At 8 bits its default configuration; below, the same with narrower ranges, which its specification
takes and simulates: there are no kernels for them. It is judged by the converted graph, whose
quantizers and dequantizers PyTorch runs.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from networks import edge_layers
from torch import Tensor, nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    QuantizationConfig,
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from methods import Bits


def quantize(
    net: nn.Module, batches: list[Tensor], bits: Bits, folder: Path
) -> Callable[[Tensor], Tensor]:
    """Captures, prepares, calibrates and converts."""
    quantizer = X86InductorQuantizer()
    quantizer.set_global(_configuration(bits))
    if bits != (8, 8):
        for name in edge_layers(net):
            quantizer.set_module_name_qconfig(name, _configuration(Bits(8, 8)))
    shapes = ({0: torch.export.Dim("batch")},)
    captured = torch.export.export(net, (batches[0][:2],), dynamic_shapes=shapes).module()
    prepared = prepare_pt2e(captured, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


def _configuration(bits: Bits) -> QuantizationConfig:
    default = get_default_x86_inductor_quantization_config()
    if bits == (8, 8):
        return default
    activations = replace(default.input_activation, quant_max=2**bits.activations - 1)
    half = 2 ** (bits.weights - 1)
    weights = replace(default.weight, quant_min=-half, quant_max=half - 1)
    return replace(
        default, input_activation=activations, output_activation=activations, weight=weights
    )
