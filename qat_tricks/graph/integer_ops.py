"""Adds, products and averages that an integer kernel computes between grids."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics import integer_kernels as kernels
from qat_tricks.numerics.fake_quantize import straight_through


class Kernel(nn.Module):
    """An operation that computes as the integer kernel does, in evaluation between grids.

    Attributes:
        quantizers: of the inputs and of the output; a tuple, so that they are not registered as
            children.
    """

    def __init__(self, *quantizers: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizers = quantizers

    @property
    def is_exact(self) -> bool:
        """Whether to compute as the kernel does: in evaluation, and with every grid known."""
        return not self.training and all(grid.is_on for grid in self.quantizers)

    def _exactly(
        self, kernel: Callable[..., Tensor], function: Callable[..., Tensor], *operands: Tensor
    ) -> Tensor:
        """What ``kernel`` computes of ``operands``, with the gradient of ``function``."""
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in operands):
            return kernel(*operands)
        # Integers have no gradient: it goes through the computation in float.
        simulated = function(*operands)
        with torch.no_grad():
            value = self.quantizers[-1].preimage(kernel(*operands), simulated)
        return straight_through(value, simulated)


class Elementwise(Kernel):
    """An operation on two tensors."""

    function: Callable[[Any, Any], Any]  # in float
    kernel: Callable[..., Tensor]  # between grids
    # Whether the integer kernel takes tensors of different shapes. If not, a runtime computes such
    # a call in float.
    broadcasts: bool

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes as the integer kernel does where it applies, else in float."""
        if self.is_exact and (self.broadcasts or x.shape == y.shape):
            return self._exactly(self._between_grids, self.function, x, y)
        return self.function(x, y)

    def _between_grids(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel(x, y, *self.quantizers)


class Add(Elementwise):
    """A residual add."""

    function, kernel, broadcasts = staticmethod(operator.add), staticmethod(kernels.add), False


class Mul(Elementwise):
    """A product of two activations, such as squeeze-and-excite's."""

    function, kernel, broadcasts = staticmethod(operator.mul), staticmethod(kernels.multiply), True


class Mean(Kernel):
    """An average over positions."""

    def __init__(
        self, dims: tuple[int, ...], keepdim: bool, *quantizers: ActivationQuantizer
    ) -> None:
        super().__init__(*quantizers)
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Computes as the integer kernel does where it applies, else in float."""
        # The kernel repeated here averages images; means of other shapes are computed in float.
        if self.is_exact and x.dim() == 4:
            return self._exactly(self._between_grids, self._in_float, x)
        return self._in_float(x)

    def _between_grids(self, x: Tensor) -> Tensor:
        return kernels.mean(x, *self.quantizers, keepdim=self.keepdim)

    def _in_float(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=self.keepdim)
