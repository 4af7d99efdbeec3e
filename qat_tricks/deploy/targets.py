"""Where a network is to run, and what that asks of its quantization.

Quantizers are placed for ONNX Runtime's fast kernels on x86: weights int8, symmetric, per channel; activations uint8, affine,
per tensor. A target narrows that where its kernels would be wrong, and is refused where they need what is not placed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat_tricks.deploy.runtimes import check_runtimes
from qat_tricks.errors import QatTricksError, did_you_mean

DEFAULT_TARGET = "onnxruntime_cpu"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a runtime on a device needs."""

    about: str
    runtime: str = "onnxruntime"  # who runs the finished file, besides ONNX Runtime, to prove it
    max_weight_bits: int = 8
    refused: str = ""  # why nothing can be exported for it, and what would do


TARGETS: Mapping[str, Target] = {
    "onnxruntime_cpu": Target(about="x86 in sessions that set session.x64quantprecision to 1, or with VNNI: products are exact"),
    "onnxruntime_cpu_no_vnni": Target(
        about="x86 without VNNI, in any session: vpmaddubsw adds two products in 16 bits, and 2 * 255 * 63 fits where "
        "2 * 255 * 127 saturates",
        max_weight_bits=7,
    ),
    "onnxruntime_arm": Target(
        about="64-bit ARM, not measured yet: its kernels take unsigned activations and add in 32 bits, so nothing changes"
    ),
    "openvino_cpu": Target(about="OpenVINO on x86 with VNNI; the finished file is run there as well", runtime="openvino"),
    "tensorrt": Target(
        about="NVIDIA's TensorRT",
        refused="it takes int8 activations with zero point 0 alone, and activations are placed unsigned and affine: "
        "export for another target",
    ),
}


def check_target(name: Any) -> Target:
    """The target called ``name``.

    Raises:
        QatTricksError: it is unknown or refused, or its runtime is not installed here to prove the file.
    """
    if name not in TARGETS:
        raise QatTricksError(f'unknown target "{name}": {did_you_mean(str(name), TARGETS)}')
    target = TARGETS[name]
    if target.refused:
        raise QatTricksError(f"target={name} cannot be had: {target.refused}")
    check_runtimes([target.runtime])
    return target


def fit_to_target(quantize: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """The settings of the ``quantize`` trick with no weight above the target's bits.

    ``first_last_bits`` are those of weights and inputs alike. Where all are of 8 bits its limit becomes null, so that the
    inputs keep theirs; below, it is lowered.
    """
    limit, fitted = target.max_weight_bits, dict(quantize)
    if limit >= 8:
        return fitted
    fitted["weight_bits"] = min(quantize["weight_bits"], limit)
    if (quantize["first_last_bits"] or 0) > limit:
        keeps_ends = quantize["weight_bits"] >= limit and quantize["activation_bits"] == quantize["first_last_bits"]
        fitted["first_last_bits"] = None if keeps_ends else limit
    fitted["overrides"] = {
        pattern: {key: min(bits, limit) if key == "weight_bits" else bits for key, bits in given.items()}
        for pattern, given in quantize["overrides"].items()
    }
    return fitted
