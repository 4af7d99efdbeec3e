"""``qat_tricks`` without training, judged by the file that it exports."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

import qat_tricks
from methods import Bits

# Of the bits: the recipe and its overrides.
RECIPES: dict[Bits, tuple[str, list[str]]] = {
    Bits(8, 8): ("int8_ptq", []),
    Bits(4, 8): ("w4a8_ptq", []),
    Bits(4, 4): ("w4a4_ptq", []),
}


def quantize(
    net: nn.Module,
    batches: list[Tensor],
    bits: Bits,
    folder: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Quantizes by a recipe; None takes that of the bits. ``overrides`` come after its own."""
    name, own = RECIPES[bits] if recipe is None else (recipe, [])
    quantized = qat_tricks.quantize(net, batches, name, [*own, *overrides])
    path = folder / "model.onnx"
    qat_tricks.export_onnx(quantized, path, batches[0], images=batches[:1])
    return path
