"""What one network gives and costs in each runtime that is installed here."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_tricks.deploy.cost.latency import measure_latency, measure_load
from qat_tricks.deploy.parity.logits import agrees, compare_logits
from qat_tricks.deploy.runtimes.registry import open_network, runtime_version
from qat_tricks.deploy.runtimes.session import Shapes
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, call_network
from qat_tricks.jobs.config import timing

PARITY_BATCHES = 8  # on which a runtime is compared with the reference

Predict = Callable[..., Tensor]


def predictor(path: Path, threads: int, runtime: str) -> Predict:
    """Images ``[N, C, H, W]``, or several inputs, as the file takes them, to its logits in
    ``runtime``.
    """
    network = open_network(path, threads=threads, runtime=runtime)
    return lambda *inputs: torch.from_numpy(
        network.prepare(*(values.numpy() for values in inputs))()
    )


def measure_runtime(
    runtime: str, paths: Mapping[str, Path], *, image_shape: Shapes, measure: Any
) -> dict[str, Any]:
    """Measures ``{"fp32": path, "int8": path}`` in ``runtime``; ``fp32`` may be missing, its
    figures are then None.

    Args:
        runtime: its name.
        paths: ONNX files.
        image_shape: channels, height, width; of networks with several inputs one shape for each.
        measure: the settings of ``qat_tricks.jobs.config.Measure``.

    Returns:
        ``version``, ``latency_ms``, ``load_ms`` and ``int8_layers``, the share of convs and linears
        that it runs in integers, None where it does not say.
    """
    latency = measure_latency(
        paths,
        image_shape=image_shape,
        runtime=runtime,
        **timing(measure),
    )
    load = measure_load(paths, threads=measure.threads, runtime=runtime)
    return {
        "version": runtime_version(runtime),
        "latency_ms": {name: latency.get(name) for name in ("fp32", "int8")},
        "load_ms": {name: load.get(name) for name in ("fp32", "int8")},
        "int8_layers": open_network(paths["int8"], threads=1, runtime=runtime).integer_layers,
    }


def parity(
    predict: Predict, reference: Predict, loader: Iterable[tuple[Inputs, Tensor]], *, against: str
) -> dict[str, Any]:
    """Compares the logits of ``predict`` with those of ``reference``, called ``against``, on the
    first images of a loader.
    """
    batches = islice(loader, PARITY_BATCHES)
    with torch.no_grad():
        found = compare_logits(
            (call_network(reference, inputs).numpy(), call_network(predict, inputs).numpy())
            for inputs, _ in batches
        )
    return {**found, "against": against}


def check_parity(runtime: str, found: Mapping[str, Any], min_top1_agreement: float) -> None:
    """Refuses a runtime that gives more images another class than allowed; one image alone is never
    held against it.

    Raises:
        QatTricksError: with the figures.
    """
    if not agrees(found["top1_agreement"], found["images"], min_top1_agreement):
        raise QatTricksError(
            f"{runtime} does not run the file as ONNX Runtime does: on {found['images']} images "
            f"top-1 agreement {found['top1_agreement']:.4f} (at least {min_top1_agreement}), SQNR "
            f"{found['sqnr_db']:.1f} dB; choose another target, or lower "
            "measure.min_top1_agreement"
        )
