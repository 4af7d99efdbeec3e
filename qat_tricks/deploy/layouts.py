"""Layouts of a QDQ file: the integers are the same in all, their surroundings are the runtime's."""

from collections.abc import Mapping
from dataclasses import dataclass

from qat_tricks.errors import QatTricksError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The operators that a runtime wants around the integers."""

    # A ReLU stands before the QuantizeLinear, where the runtime fuses it with the conv before. Else
    # the range of integers behind a QuantizeLinear is the ReLU.
    relu_before_quantizer: bool
    # A Clip between QuantizeLinear and DequantizeLinear gives a range of integers that saturating
    # does not: that of fewer than 8 bits, or of a ReLU on a grid that reaches below 0.0. It leaves
    # the kernel before it an integer one.
    clips: bool
    # The bias is stored in float. Else it is int32, in steps of input scale times weight scale, and
    # dequantized like the weight.
    float_bias: bool
    # Activations must be int8 with zero point 0.
    int8_symmetric_only: bool


DEFAULT_LAYOUT = "onnxruntime"

LAYOUTS: Mapping[str, Layout] = {
    DEFAULT_LAYOUT: Layout(
        relu_before_quantizer=False, clips=True, float_bias=False, int8_symmetric_only=False
    ),
    # TensorRT dequantizes no int32, and takes no zero point but 0.
    "tensorrt": Layout(
        relu_before_quantizer=True, clips=False, float_bias=True, int8_symmetric_only=True
    ),
}
"""Layouts by name."""


def layout_named(name: str) -> Layout:
    """The layout called ``name``.

    Raises:
        QatTricksError: there is none.
    """
    if name not in LAYOUTS:
        raise QatTricksError(f'unknown layout "{name}": {did_you_mean(name, LAYOUTS)}')
    return LAYOUTS[name]
