"""Targets: devices and runtimes, with the quantization and the file that they ask for.

Quantizers are placed for ONNX Runtime's fast kernels on x86: weights int8, symmetric, per channel;
activations uint8, affine, per tensor. A target narrows or changes that, and refuses settings with
which its kernels are known to be wrong or slow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qat_tricks.deploy.layouts import DEFAULT_LAYOUT
from qat_tricks.deploy.runtimes.registry import check_runtimes
from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.numerics.scheme import ACTIVATIONS

OPSET = 18  # PyTorch's exporter writes it without converting, and all targets read it
NEWEST_OPSET = 25  # to which the exporter's library converts (onnxscript 0.7)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The needs of a runtime on a device, which are limits for ``QuantizeSettings.limited_to``."""

    about: str
    runtime: str = "onnxruntime"  # runs the finished file, besides ONNX Runtime, to prove it
    max_weight_bits: int = 8
    # kinds that it takes, of ``scheme.ACTIVATIONS``; its own choice first
    activations: Sequence[str] = ("unsigned_affine",)
    activation_bits: int = 2  # the fewest that it takes
    functions: str = "integer"  # see ``QuantizeSettings``
    because: str = ""  # the reason for these activations
    layout: str = DEFAULT_LAYOUT  # of the ONNX file: a name of ``deploy.layouts.LAYOUTS``
    newest_opset: int | None = None  # that it reads; None: all that ONNX Runtime reads
    # what zeros among the weights bring there; docs/results/sparsity.md has the measurements
    sparsity: str = "no kernel of ONNX Runtime's on CPUs gets faster by them"


_SLOW_ON_X86 = (
    "ONNX Runtime on x86 has no fast kernels for int8 activations: it computes in float, or slower "
    "than in float"
)

TARGETS: Mapping[str, Target] = {
    "onnxruntime_cpu": Target(
        about="x86 in sessions that set session.x64quantprecision to 1, or with VNNI: products are "
        "exact",
        because=_SLOW_ON_X86,
    ),
    "onnxruntime_cpu_no_vnni": Target(
        about="x86 without VNNI, in any session: vpmaddubsw adds two products in 16 bits, and "
        "2 * 255 * 63 fits where 2 * 255 * 127 saturates",
        max_weight_bits=7,
        because=_SLOW_ON_X86,
    ),
    "onnxruntime_arm": Target(
        about="64-bit ARM, not measured yet: its kernels take activations of either sign and add "
        "in 32 bits",
        activations=("unsigned_affine", "signed_affine"),
        because="behind each ReLU half of a symmetric grid is lost, and a Clip runs, for nothing",
    ),
    "openvino_cpu": Target(
        about="OpenVINO on x86 with VNNI, which takes all activations; the finished file is run "
        "there as well",
        runtime="openvino",
        functions="float",  # it computes SiLU and Hardswish within the conv before
        activations=tuple(ACTIVATIONS),
        sparsity="neither its kernels nor its sparse weights got faster by them where we measured",
    ),
    "tensorrt": Target(
        about="NVIDIA's TensorRT 10, not measured: the file is checked, and run in ONNX Runtime, "
        "there mostly in float",
        activations=("signed_symmetric",),
        activation_bits=8,
        functions="float",  # it computes them within the conv before
        because="TensorRT takes int8 activations with zero point 0 only",
        layout="tensorrt",
        newest_opset=24,  # of TensorRT 10.15, says its parser's list of operators
        sparsity="TensorRT has kernels for two zeros in each four weights (prune.granularity=2:4; "
        "GPUs since Ampere, if its builder may use them), and none for others; not measured here",
    ),
}


def target_named(name: Any) -> Target:
    """The target called ``name``.

    Raises:
        QatTricksError: it is unknown, or its runtime is not installed here to prove the file.
    """
    if name not in TARGETS:
        raise QatTricksError(f'unknown target "{name}": {did_you_mean(str(name), TARGETS)}')
    target = TARGETS[name]
    check_runtimes([target.runtime])
    return target


def check_opset(name: Any, opset: int) -> None:
    """Raises QatTricksError if the target called ``name`` cannot read files of ``opset``."""
    newest = target_named(name).newest_opset
    if newest is not None and opset > newest:
        raise QatTricksError(
            f"export.opset={opset} is too new for target={name}: give {newest} or less"
        )
