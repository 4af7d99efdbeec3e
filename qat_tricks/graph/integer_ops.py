"""Adds, products and averages that an integer kernel computes between grids."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics import integer_kernels as kernels


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
        # Integers have no gradient.
        return not (self.training or torch.is_grad_enabled()) and all(
            grid.is_on for grid in self.quantizers
        )


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
            return self.kernel(x, y, *self.quantizers)
        return self.function(x, y)


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
            return kernels.mean(x, *self.quantizers, keepdim=self.keepdim)
        return x.mean(self.dims, keepdim=self.keepdim)
