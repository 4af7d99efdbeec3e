"""Operations between grids: as the kernel computes where that is known, else in float."""

import pytest
import torch

from qat_tricks.graph.integer_ops import Add, Mean, Mul
from qat_tricks.numerics import ActivationQuantizer, Scheme
from qat_tricks.numerics import integer_kernels as kernels


def grid(low, high):
    quantizer = ActivationQuantizer(Scheme(bits=4))
    quantizer.set_range(low, high)
    return quantizer


GRIDS = grid(-1.0, 2.0), grid(-2.0, 1.0), grid(-3.0, 3.0)


@torch.no_grad()
def operands(count=3):
    x, y = torch.randn(2, count, 4, 4, generator=torch.Generator().manual_seed(0)).unsqueeze(1)
    return GRIDS[0](x), GRIDS[1](y)


@pytest.mark.parametrize(
    ("kind", "kernel", "function"),
    [(Add, kernels.add, torch.add), (Mul, kernels.multiply, torch.mul)],
)
def test_the_kernel_computes_in_evaluation_and_the_function_in_training(kind, kernel, function):
    operation, (x, y) = kind(*GRIDS).eval(), operands()
    on_grid = kernel(x, y, *GRIDS)
    assert not torch.equal(on_grid, function(x, y))
    assert torch.equal(operation(x, y), on_grid)
    # values that keep the gradient, and that the grid puts where the kernel does
    x.requires_grad_()
    found = operation(x, y)
    assert found.requires_grad
    assert torch.equal(GRIDS[2](found), on_grid)
    with torch.no_grad():
        assert torch.equal(operation(x, y), on_grid)
        assert torch.equal(operation.train()(x, y), function(x, y))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Add, Mul])
def test_a_grid_that_is_unknown_or_off_means_float(kind):
    x, y = operands()
    off = grid(-3.0, 3.0)
    off.enabled = False
    for last in (off, ActivationQuantizer(Scheme())):
        operation = kind(*GRIDS[:2], last).eval()
        assert torch.equal(operation(x, y), operation.function(x, y))


@torch.no_grad()
def test_an_add_of_different_shapes_is_float_and_a_product_is_not():
    x, y = operands()
    y = y[:, :, :1, :1]  # as a gate of channels has it
    assert torch.equal(Add(*GRIDS).eval()(x, y), x + y)
    assert torch.equal(Mul(*GRIDS).eval()(x, y), kernels.multiply(x, y, *GRIDS))


@torch.no_grad()
@pytest.mark.parametrize("keepdim", [True, False])
def test_an_average_is_the_kernels_for_images_only(keepdim):
    x, _ = operands()
    images = Mean((2, 3), keepdim, GRIDS[0], GRIDS[2]).eval()
    expected = kernels.mean(x, GRIDS[0], GRIDS[2], keepdim=keepdim)
    assert torch.equal(images(x), expected)
    assert not torch.equal(images(x), x.mean((2, 3), keepdim=keepdim))
    tokens = Mean((1,), keepdim, GRIDS[0], GRIDS[2]).eval()
    assert torch.equal(tokens(x[0]), x[0].mean(1, keepdim=keepdim))


def test_quantizers_are_no_children():
    """They belong to the network, whose state names each once."""
    assert list(Add(*GRIDS).parameters()) == list(Add(*GRIDS).children()) == []
