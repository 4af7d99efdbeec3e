"""The methods that the harness compares, one module a method.

Each module has one function::

    quantize(net, batches, bits, folder, **options) -> path of an ONNX file, or a callable

which takes a float network in evaluation mode, calibration images in batches and the bits, and may
write into ``folder``. A callable maps images to logits: it is the method's own simulation, for a
method that exports nothing that ONNX Runtime runs. A module imports its library only, so that each
runs in an environment of its own; ``methods.CannotError`` says in one line what a library lacks.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Bits(NamedTuple):
    """Bits of the weights and of the activations; the first and the last layer have 8."""

    weights: int
    activations: int

    @classmethod
    def of(cls, text: str) -> "Bits":
        """Reads ``W4A8``."""
        weights, _, activations = text.upper().removeprefix("W").partition("A")
        return cls(int(weights), int(activations))


class CannotError(Exception):
    """The library cannot do this network or these bits; one line says why."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the harness."""

    title: str  # in the table
    module: str  # in this folder
    environment: str  # folder of the environment; "" is the one that runs the harness
    package: str  # what is measured, whose version is kept with the result
    options: dict[str, Any] = field(default_factory=dict)  # of the module's function


METHODS = {
    "ours": Method(title="qat_tricks", module="ours", environment="", package="qat_tricks"),
    "ort_minmax": Method(
        title="ONNX Runtime static, MinMax",
        module="onnxruntime_static",
        environment="onnxruntime",
        package="onnxruntime",
        options={"calibrator": "MinMax"},
    ),
    "ort_entropy": Method(
        title="ONNX Runtime static, Entropy",
        module="onnxruntime_static",
        environment="onnxruntime",
        package="onnxruntime",
        options={"calibrator": "Entropy"},
    ),
    "ort_percentile": Method(
        title="ONNX Runtime static, Percentile",
        module="onnxruntime_static",
        environment="onnxruntime",
        package="onnxruntime",
        options={"calibrator": "Percentile"},
    ),
    "nncf": Method(title="NNCF, default", module="nncf_ptq", environment="nncf", package="nncf"),
    "nncf_best": Method(
        title="NNCF, full bias correction",
        module="nncf_ptq",
        environment="nncf",
        package="nncf",
        options={"fast_bias_correction": False},
    ),
    "brevitas": Method(
        title="Brevitas, default", module="brevitas_ptq", environment="brevitas", package="brevitas"
    ),
    "brevitas_gptq": Method(
        title="Brevitas, GPTQ",
        module="brevitas_ptq",
        environment="brevitas",
        package="brevitas",
        options={"rounding": "gptq"},
    ),
    "brevitas_learned_round": Method(
        title="Brevitas, learned round",
        module="brevitas_ptq",
        environment="brevitas",
        package="brevitas",
        options={"rounding": "learned"},
    ),
    "aimet": Method(
        title="AIMET, cross-layer equalization",
        module="aimet_ptq",
        environment="aimet",
        package="aimet-torch",
    ),
    "aimet_adaround": Method(
        title="AIMET, AdaRound",
        module="aimet_ptq",
        environment="aimet",
        package="aimet-torch",
        options={"adaround": True},
    ),
    "mct": Method(
        title="Model Compression Toolkit, default",
        module="mct_ptq",
        environment="mct",
        package="model-compression-toolkit",
    ),
    "mct_gptq": Method(
        title="Model Compression Toolkit, GPTQ",
        module="mct_ptq",
        environment="mct",
        package="model-compression-toolkit",
        options={"gradient": True},
    ),
    "pt2e": Method(
        title="torchao PT2E, default", module="pt2e", environment="torchao", package="torchao"
    ),
    "fasterai": Method(
        title="fasterai, default", module="fasterai_ptq", environment="fasterai", package="fasterai"
    ),
}

# What each environment needs beside torch, torchvision, onnx, onnxscript and onnxruntime.
ENVIRONMENTS = {
    "onnxruntime": (),
    "nncf": ("nncf", "ninja"),
    "brevitas": ("brevitas", "onnxoptimizer", "accelerate", "tqdm", "pyyaml"),
    "aimet": ("aimet-torch",),
    "mct": ("model-compression-toolkit",),
    "torchao": ("torchao",),
    "fasterai": ("fasterai",),
}
