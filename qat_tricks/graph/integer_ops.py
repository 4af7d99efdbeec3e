"""Adds, products and averages that an integer kernel computes between grids."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics import integer_kernels as kernels


class Kernel(nn.Module):
    """What in evaluation, between calibrated grids, is computed as the integer kernel does it.

    Attributes:
        quantizers: of the inputs and of the output; a tuple, so that they are not registered as
            children.
    """

    def __init__(self, *quantizers: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizers = quantizers

    @property
    def is_exact(self) -> bool:
        """Whether the kernel's own arithmetic is wanted now, and all grids are there."""
        return not (self.training or torch.is_grad_enabled()) and all(
            grid.is_on for grid in self.quantizers
        )


class Elementwise(Kernel):
    """Two tensors into one."""

    function: Callable[[Any, Any], Any]
    kernel: Callable[..., Tensor]
    broadcasts: bool  # whether the kernel computes the same where the shapes differ

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
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
        if self.is_exact and x.dim() == 4:
            return kernels.mean(x, *self.quantizers, keepdim=self.keepdim)
        return x.mean(self.dims, keepdim=self.keepdim)
