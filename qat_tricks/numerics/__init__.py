"""Numerics: schemes, fake-quant with straight-through gradients, learned scales, range estimators.

Plain PyTorch: nothing here knows of graphs or Lightning. ``integer_kernels`` repeats the arithmetic
of ONNX Runtime's kernels to the last bit, without importing it; everything else belongs to no
runtime.
"""

from qat_tricks.numerics.fake_quantize import fake_quantize, quantize_weight
from qat_tricks.numerics.quantizer import ActivationQuantizer, WeightQuantizer
from qat_tricks.numerics.range_estimators import ESTIMATORS, RangeEstimator, make_estimator
from qat_tricks.numerics.scheme import Scheme

__all__ = [
    "ESTIMATORS",
    "ActivationQuantizer",
    "RangeEstimator",
    "Scheme",
    "WeightQuantizer",
    "fake_quantize",
    "make_estimator",
    "quantize_weight",
]
