"""Parity of logits: the ONNX file in ONNX Runtime against the simulated network."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from qat_tricks.deploy.parity.logits import compare_logits
from qat_tricks.deploy.parity.tensors import TensorParity
from qat_tricks.deploy.runtimes.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import as_tensors, call_network, input_names, inputs_of, on_cpu
from qat_tricks.graph.logits import logits_of


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """ONNX Runtime's logits against the simulated ones."""

    top1_agreement: float  # share of images with the same best class, 0..1
    max_abs_error: float  # largest difference of a logit
    sqnr_db: float  # power of the simulated logits over that of the difference, in dB, at most 200
    images: int  # number of images compared
    # every quantized tensor, the worst first; none of a float network (``report.json`` has long
    # called them layers)
    layers: tuple[TensorParity, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as ``report.json`` holds it."""
        return asdict(self)

    def __str__(self) -> str:
        """The report in five lines; ``repr`` has every tensor."""
        differing = [tensor for tensor in self.layers if tensor.differing > 0]
        tensors = f"{len(self.layers) - len(differing)} of {len(self.layers)} to the last bit"
        if differing:
            first = min(differing, key=lambda tensor: tensor.place)
            tensors += f', "{first.name}" the first that differs ({first.sqnr_db:.1f} dB)'
        if not self.layers:
            tensors = "none, the network is a float one"
        return "\n".join(
            (
                f"the ONNX file against the simulated network, on {self.images} images",
                f"same class         {self.top1_agreement:.2%}",
                f"SQNR of logits     {self.sqnr_db:.1f} dB",
                f"largest error      {self.max_abs_error:.3g}",
                f"quantized tensors  {tensors}",
            )
        )


@torch.no_grad()
def measure_parity(
    path: str | PathLike[str], network: nn.Module, batches: Iterable[object]
) -> ParityReport:
    """Runs ``batches`` through an ONNX file and through a network, and compares the logits.

    Args:
        path: the ONNX file.
        network: on the CPU and in evaluation mode.
        batches: inputs of the network, images ``[N, C, H, W]`` if it takes one; or batches of a
            loader, which hold labels too.

    Raises:
        QatTricksError: no images, inputs that the network does not take, or logits of another shape
            than the network's.
    """
    session, names = open_session(path, threads=torch.get_num_threads()), input_names(network)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in batches:
            inputs = on_cpu(inputs_of(batch, names))
            simulated = logits_of(call_network(network, inputs)).numpy()
            real = run_batch(session, *(values.numpy() for values in as_tensors(inputs)))
            if simulated.shape != real.shape:
                raise QatTricksError(
                    f"the network yields {simulated.shape}, its ONNX file {real.shape}: it is "
                    "another network's"
                )
            yield simulated, real

    return ParityReport(**compare_logits(pairs()))
