"""NNCF's post-training quantization: of the ONNX file at 8 bits, simulated in PyTorch below.

The preset is MIXED (weights symmetric, activations asymmetric), which its documentation advises for
accuracy. 4-bit weights exist in its setup for Intel's NPU, in the PyTorch backend; 4-bit
activations do not. That backend compiles an extension, which needs a C++ compiler and ``ninja``.
"""

from collections.abc import Callable
from pathlib import Path

import nncf
import onnx
from networks import edge_layers
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    QuantizationParameters,
)
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from methods import Bits, CannotError
from methods.float_onnx import export_float


def quantize(
    net: nn.Module,
    batches: list[Tensor],
    bits: Bits,
    folder: Path,
    fast_bias_correction: bool = True,
) -> Path | Callable[[Tensor], Tensor]:
    """Quantizes with NNCF's quick bias correction, or with its full one."""
    images = [image for batch in batches for image in batch.split(1)]
    if bits == (8, 8):
        path = folder / "model.onnx"
        quantized = nncf.quantize(
            onnx.load(export_float(net, batches[0][:2], folder / "float.onnx")),
            nncf.Dataset(images, lambda image: {"images": image.numpy()}),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            fast_bias_correction=fast_bias_correction,
        )
        onnx.save(quantized, path)
        return path
    if bits.activations != 8:
        raise CannotError("none of NNCF's hardware setups has 4-bit activations of these networks")
    if not fast_bias_correction:
        raise CannotError("NNCF's PyTorch backend has no full bias correction")
    quantized = nncf.quantize(
        net,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.NPU,
        subset_size=len(images),
        advanced_parameters=AdvancedQuantizationParameters(
            weights_quantization_params=QuantizationParameters(num_bits=bits.weights)
        ),
    )
    edges = [name.replace(".", "/") for name in edge_layers(net)]
    for name, module in quantized.named_modules():
        at_an_edge = any(f"pre_hooks.{edge}/" in name for edge in edges)
        if at_an_edge and isinstance(module, BaseQuantizer):
            # the range of a weight is that of its values, whatever the bits
            module.num_bits = 8
            module.set_levels()
    return quantized
