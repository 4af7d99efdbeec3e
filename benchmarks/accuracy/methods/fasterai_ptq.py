"""fasterai's ``Quantizer``, which wraps PyTorch's quantization: 8 bits only."""

from collections.abc import Callable
from pathlib import Path

from fasterai.quantize.quantizer import Quantizer
from torch import Tensor, nn

from methods import Bits, CannotError


def quantize(
    net: nn.Module, batches: list[Tensor], bits: Bits, folder: Path
) -> Callable[[Tensor], Tensor]:
    """Static quantization with its default backend, ``x86``; its kernels give the logits."""
    if bits != (8, 8):
        raise CannotError("fasterai quantizes activations to 8 bits only, and then weights too")
    count = sum(map(len, batches))
    loader = [(batch, None) for batch in batches]
    return Quantizer().quantize(net, loader, max_calibration_samples=count)
