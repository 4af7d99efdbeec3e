"""``torch.fx`` tracing and surgery, on which the tricks stand.

It is plain PyTorch; nothing here knows of Lightning.
"""

from qat_tricks.graph.integers import note_integers
from qat_tricks.graph.layers import Layer, activation_quantizers, as_layer, is_layer, layers
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.place import place_quantizers
from qat_tricks.graph.quantize_settings import QuantizeSettings
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.trace import trace

__all__ = [
    "Layer",
    "QuantizeSettings",
    "activation_quantizers",
    "as_layer",
    "float_mode",
    "is_layer",
    "layers",
    "note_integers",
    "place_quantizers",
    "rebuild",
    "spec_of",
    "trace",
]
