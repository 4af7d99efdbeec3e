"""Parity: whether the network that runs gives the logits of the network that was simulated."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat_tricks.deploy.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.workbench import images_of, logits_of

if TYPE_CHECKING:
    from qat_tricks.deploy.layer_parity import LayerParity

LARGEST_SQNR_DB = 200.0  # stands for logits without any difference, so that a report stays plain JSON


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """ONNX Runtime's logits against the simulated ones."""

    top1_agreement: float  # share of images with the same best class, 0..1
    max_abs_error: float  # largest difference of a logit
    sqnr_db: float  # power of the simulated logits over that of the difference, in dB, at most 200
    images: int  # how many were compared
    layers: "tuple[LayerParity, ...]" = ()  # every quantized tensor, the worst first; none of a float network

    def as_dict(self) -> dict[str, Any]:
        """The report as ``report.json`` holds it."""
        return asdict(self)


@torch.no_grad()
def measure_parity(path: str | PathLike[str], network: nn.Module, batches: Iterable[object]) -> ParityReport:
    """Runs ``batches`` through the ONNX file and through ``network``, on the CPU and in evaluation mode.

    Args:
        batches: images ``[N, C, H, W]`` each, or what a loader of images and labels yields.

    Raises:
        QatTricksError: no images, or logits of another shape than the network's.
    """
    session = open_session(path, threads=torch.get_num_threads())
    images = 0
    agreeing = largest = signal = noise = 0.0
    for batch in batches:
        inputs = images_of(batch).detach().float().cpu()
        simulated = logits_of(network(inputs))
        run = torch.from_numpy(run_batch(session, inputs.numpy()))
        if simulated.shape != run.shape:
            raise QatTricksError(
                f"the network yields {tuple(simulated.shape)}, its ONNX file {tuple(run.shape)}: it is another network's"
            )
        difference = (run - simulated).double()
        images += len(run)
        agreeing += len(run) * float((run.argmax(1) == simulated.argmax(1)).double().mean())
        largest = max(largest, float(difference.abs().nan_to_num(nan=math.inf).max()))
        noise += float(difference.square().sum())
        signal += float(simulated.double().square().sum())
    if images == 0:
        raise QatTricksError("there are no images to measure parity on: give at least one batch")
    return ParityReport(
        top1_agreement=agreeing / images,
        max_abs_error=largest,
        sqnr_db=decibels(signal, noise),
        images=images,
    )


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in dB, from -200 to 200."""
    if noise == 0.0:
        return LARGEST_SQNR_DB
    if not math.isfinite(noise) or not math.isfinite(signal):
        return -LARGEST_SQNR_DB
    return min(max(10 * math.log10(max(signal, 1e-300) / noise), -LARGEST_SQNR_DB), LARGEST_SQNR_DB)
