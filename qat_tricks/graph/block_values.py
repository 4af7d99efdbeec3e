"""Computes a network block by block for all images, and keeps the tensors between in little memory.

A tensor on a grid is kept as its integers, which are exact; others in float16 where that holds
them, since they are compared and not counted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.blocks import Block
from qat_tricks.graph.inputs import Inputs, as_tensors
from qat_tricks.numerics import ActivationQuantizer

CHUNK = 32  # images computed at a time
LARGEST_HALF = 60_000.0  # float16 holds a little more
# Its steps end at 2^-24, so that it holds no tensor whose values are all smaller than this.
SMALLEST_HALF = 2.0**-10


class KeptTensor:
    """One tensor for all images.

    Args:
        parts: the tensor for consecutive images. Along its first dimension, image comes after
            image, each with the same number of rows.
        images: the number of all images.
        grid: on which all values are; None: any values.
        exactly: whether floats must stay as they are.
    """

    def __init__(
        self,
        parts: Iterable[Tensor],
        images: int,
        grid: ActivationQuantizer | None = None,
        *,
        exactly: bool = False,
    ) -> None:
        self._grid = None if grid is None else (grid.current_scale().detach().clone(), grid.offset)
        signed, self._exactly = grid is not None and grid.scheme.signed, exactly
        self._integer_type = torch.int8 if signed else torch.uint8
        # Each part by itself, so that all images are never held in float32.
        kept = [self._packed(part) for part in parts]
        if len({part.dtype for part in kept}) > 1:
            kept = [part.float() for part in kept]
        values = torch.cat(kept)
        self._by_image = values.view(images, -1, *values.shape[1:])

    def _packed(self, values: Tensor) -> Tensor:
        if self._grid is not None:
            return self._integers(values).to(self._integer_type)
        return values if self._exactly or not _fits_into_half(values) else values.half()

    @property
    def device(self) -> torch.device:
        """Where it is kept."""
        return self._by_image.device

    def _integers(self, values: Tensor) -> Tensor:
        assert self._grid is not None
        scale, offset = self._grid
        return torch.round(values / scale) + offset

    def of(self, images: Tensor | slice) -> Tensor:
        """The tensor for some images, given by their numbers; floats are float32."""
        values = self._by_image[images].flatten(0, 1)
        if self._grid is not None:
            scale, offset = self._grid
            return (values.float() - offset) * scale
        return values.float() if values.dtype == torch.float16 else values


def _fits_into_half(values: Tensor) -> bool:
    if values.dtype != torch.float32:
        return False
    largest = float(values.abs().amax())
    return largest == 0 or SMALLEST_HALF < largest < LARGEST_HALF


def keep_inputs(inputs: Sequence[fx.Node], batches: Sequence[Inputs]) -> dict[str, KeptTensor]:
    """The network's inputs for all images, by the names of their nodes.

    Raises:
        QatTricksError: the images have several sizes.
    """
    kept = {}
    images = sum(len(as_tensors(batch)[0]) for batch in batches)
    for node, parts in zip(inputs, zip(*map(as_tensors, batches), strict=True), strict=True):
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise QatTricksError(
                f"images of several shapes ({', '.join(map(str, shapes))}) cannot be mixed: give "
                "images of one size"
            )
        # A clone is an ordinary tensor, also of one that was made in inference mode.
        kept[node.name] = KeptTensor([part.clone() for part in parts], images, exactly=True)
    return kept


class BlockInterpreter(fx.Interpreter):
    """Computes blocks of a network."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)

    def compute(self, block: Block, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of ``block`` from its inputs, by the names of their nodes."""
        self.env: dict[fx.Node, Any] = {node: inputs[node.name] for node in block.inputs}
        for node in block.nodes:
            # An argument with a default, which no batch fills.
            default = node.op == "placeholder"
            self.env[node] = node.args[0] if default else self.run_node(node)
        output: Tensor = self.env[block.output]
        self.env = {}
        return output


def chunks(images: int) -> Iterator[slice]:
    """The numbers of all images in runs of at most ``CHUNK``."""
    for start in range(0, images, CHUNK):
        yield slice(start, min(start + CHUNK, images))
