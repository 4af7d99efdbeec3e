"""NNCF's post-training quantization of the ONNX file.

The preset is MIXED (weights symmetric, activations asymmetric), which its documentation advises for
accuracy.
"""

from pathlib import Path

import nncf
import onnx
from torch import Tensor, nn

from methods import Bits, CannotError
from methods.float_onnx import export_float


def quantize(
    net: nn.Module,
    batches: list[Tensor],
    bits: Bits,
    folder: Path,
    fast_bias_correction: bool = True,
) -> Path:
    """Quantizes with NNCF's quick bias correction, or with its full one."""
    if bits != (8, 8):
        # asked for 4 bits, it refuses: "incompatible with HW capabilities ... 'ANY'"
        raise CannotError("NNCF has 8-bit quantizers only where activations are quantized too")
    path = folder / "model.onnx"
    images = [image for batch in batches for image in batch.split(1)]
    quantized = nncf.quantize(
        onnx.load(export_float(net, batches[0][:2], folder / "float.onnx")),
        nncf.Dataset(images, lambda image: {"images": image.numpy()}),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        fast_bias_correction=fast_bias_correction,
    )
    onnx.save(quantized, path)
    return path
