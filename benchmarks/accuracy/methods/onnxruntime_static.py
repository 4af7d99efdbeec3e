"""ONNX Runtime's own static quantization, ``quantize_static``, with each of its calibrators.

Weights symmetric per channel, activations unsigned 8 bit, as its documentation advises for x86.
"""

from pathlib import Path

import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from methods import Bits, CannotError
from methods.float_onnx import export_float

WEIGHTS = {8: quantization.QuantType.QInt8, 4: quantization.QuantType.QInt4}
ACTIVATIONS = {8: quantization.QuantType.QUInt8, 4: quantization.QuantType.QUInt4}
# of one calibrator's histograms at a time: it keeps every activation of these images
MOST_IMAGES_AT_ONCE = 32


class Reader(quantization.CalibrationDataReader):
    """Feeds the calibration images, a part at a time."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.images = [image for batch in batches for image in batch.split(1)]
        self.set_range(0, len(self.images))

    def get_next(self) -> dict | None:
        image = next(self.rest, None)
        return None if image is None else {"images": image.numpy()}

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest = iter(self.images[start_index:end_index])


def quantize(
    net: nn.Module, batches: list[Tensor], bits: Bits, folder: Path, calibrator: str
) -> Path:
    """Quantizes the exported float network."""
    if bits.weights not in WEIGHTS or bits.activations not in ACTIVATIONS:
        raise CannotError("ONNX Runtime quantizes to 4, 8 and 16 bits only")
    # 4 bits came with operator set 21
    opset = 18 if bits == (8, 8) else 21
    plain = export_float(net, batches[0][:2], folder / "float.onnx", opset)
    ready, path = folder / "ready.onnx", folder / "model.onnx"
    quant_pre_process(plain, ready)
    quantization.quantize_static(
        ready,
        path,
        Reader(batches),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=WEIGHTS[bits.weights],
        activation_type=ACTIVATIONS[bits.activations],
        calibrate_method=quantization.CalibrationMethod[calibrator],
        extra_options={
            "CalibStridedMinMax": MOST_IMAGES_AT_ONCE,
            "TensorQuantOverrides": _edges_at_8_bits(ready, bits),
        },
    )
    return path


def _edges_at_8_bits(path: Path, bits: Bits) -> dict[str, list[dict]]:
    """Overrides that leave the weights and the inputs of the first and the last layer at 8 bits."""
    if bits == (8, 8):
        return {}
    model = onnx.load(path)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    overrides = {}
    for node in (layers[0], layers[-1]):
        data, weight = node.input[:2]
        overrides[data] = [{"quant_type": ACTIVATIONS[8]}]
        overrides[weight] = [{"quant_type": WEIGHTS[8], "symmetric": True, "axis": 0}]
    return overrides
