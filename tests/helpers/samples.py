"""Metrics and reports to build evidence from."""

from typing import Any

import torch

from qat_tricks.evidence.metrics import Metrics


def metrics(accuracy: float) -> Metrics:
    """Metrics of a given accuracy."""
    predictions = torch.zeros(4, dtype=torch.long)
    return Metrics(
        accuracy=accuracy,
        top5=0.99,
        f1=accuracy,
        ece=0.01,
        nll=0.1,
        seconds=1.5,
        predictions=predictions,
        confidences=torch.ones(4),
        labels=predictions,
    )


def latency(median):
    """Milliseconds of runs of which the slowest takes twice the median."""
    quantiles = [median * (0.8 + 0.02 * place) for place in range(20)] + [2 * median]
    return {"p50": median, "p95": 1.5 * median, "p99": 1.9 * median, "quantiles": quantiles}


def report(
    recipe: str = "int8_ptq", *, accuracy: float = 0.98, scale: float = 1.0, **changes: Any
) -> dict[str, Any]:
    """A complete report; ``scale`` multiplies what the int8 network costs."""
    stages = [
        {"name": name, **metrics(a).as_dict()} for name, a in [("fp32", 0.985), ("onnx", accuracy)]
    ]
    return {
        "recipe": recipe,
        "model": "resnet20",
        "data": "digits",
        "stages": stages,
        "agreement": 0.991,
        "parity": {"top1_agreement": 1.0, "max_abs_error": 0.02, "sqnr_db": 41.5},
        "size_bytes": {"fp32": 1_100_000, "int8": int(310_000 * scale)},
        "sparsity": 0.5,
        "int8_coverage": 1.0,
        "latency_ms": {
            "fp32": latency(1.2),
            "int8": latency(0.6 * scale),
        },
        "batch_size": 1,
        "threads": 2,
        "memory_mib": {"fp32": 71.0, "int8": 64.0},
        "preprocessing": {"resize": 32, "mean": [0.5], "hash": "sha256:abc"},
        **changes,
    }
