"""Compares the logits that a file gives in two runtimes."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_tricks.deploy.parity.logits import check_agreement, compare_logits
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.graph.inputs import Inputs, call_network

PARITY_BATCHES = 8  # on which a runtime is compared with the reference

Predict = Callable[..., Tensor]
"""A network's inputs, images ``[N, C, H, W]`` or several, to its logits ``[N, classes]``."""


def predictor(path: Path, threads: int, runtime: str) -> Predict:
    """Opens the file at ``path`` in ``runtime`` and returns a function of tensors that runs it."""
    network = open_network(path, threads=threads, runtime=runtime)
    return lambda *inputs: torch.from_numpy(
        network.prepare(*(values.numpy() for values in inputs))()
    )


def parity(
    predict: Predict, reference: Predict, loader: Iterable[tuple[Inputs, Tensor]], *, against: str
) -> dict[str, Any]:
    """Compares the logits of two networks on the first ``PARITY_BATCHES`` batches of a loader.

    Args:
        predict: the network to judge.
        reference: the network whose logits it should give.
        loader: yields ``(inputs, labels)``.
        against: name of the reference.

    Returns:
        The figures of ``compare_logits``, and ``against``.
    """
    # A few batches show a fault; accuracy is measured on all images anyway.
    batches = islice(loader, PARITY_BATCHES)
    with torch.no_grad():
        comparison = compare_logits(
            (call_network(reference, inputs).numpy(), call_network(predict, inputs).numpy())
            for inputs, _ in batches
        )
    return {**comparison, "against": against}


def check_parity(runtime: str, comparison: Mapping[str, Any], min_top1_agreement: float) -> None:
    """Refuses a runtime whose logits differ from the reference's more than is allowed.

    Args:
        runtime: its name.
        comparison: the result of ``parity``.
        min_top1_agreement: least share of images, 0..1, with the same class (see ``agrees``).

    Raises:
        QatTricksError: one line with the figures.
    """
    check_agreement(
        comparison,
        f"{runtime} does not run the file as ONNX Runtime does",
        min_top1_agreement=min_top1_agreement,
        remedy="choose another target, or lower measure.min_top1_agreement",
    )
