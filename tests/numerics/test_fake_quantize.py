import pytest
import torch

from qat_tricks.numerics import Scheme, fake_quantize, quantize_weight
from qat_tricks.numerics.fake_quantize import fake_quantize_from, zero_point_from
from qat_tricks.numerics.scheme import weight_scheme


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_values_equal_core_pytorch(bits, zero_point):
    x = torch.randn(4, 3, 5, 5)
    scheme, scale = Scheme(bits=bits), torch.tensor(0.11)
    expected = torch.fake_quantize_per_tensor_affine(x, 0.11, zero_point, scheme.qmin, scheme.qmax)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, scheme), expected)


def _lsq_reference(x, scale, low, high):
    """LSQ's equations by autograd: straight-through rounding, clamp, gradient scale."""
    factor = 1 / (x.numel() / scale.numel() * max(high, -low)) ** 0.5
    scale = (scale - scale * factor).detach() + scale * factor
    steps = (x / scale).clamp(low, high)
    return ((steps.round() - steps).detach() + steps) * scale


@pytest.mark.parametrize(
    ("scheme", "zero_point", "shape"),
    [
        (Scheme(bits=4), 0, []),
        (Scheme(bits=4), 5, []),
        (Scheme(bits=8), 100, []),
        (weight_scheme(4), 0, [6, 1, 1]),
    ],
    ids=["relu-u4", "affine-u4", "affine-u8", "weight-s4"],
)
def test_gradients_are_lsqs(scheme, zero_point, shape):
    x = torch.randn(6, 20, 7).double().float()
    scale = torch.full(shape, 0.13)
    ours = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    weights = torch.randn_like(x)
    (fake_quantize(*ours, zero_point, scheme) * weights).sum().backward()
    (
        _lsq_reference(*theirs, scheme.qmin - zero_point, scheme.qmax - zero_point) * weights
    ).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-3, atol=1e-4)


def _lsq_plus_reference(x, scale, low, count):
    """LSQ+'s equations by autograd, with its offset where the range begins."""
    factor = 1 / (x.numel() * count) ** 0.5
    scale, low = ((p - p * factor).detach() + p * factor for p in (scale, low))
    steps = ((x - low) / scale).clamp(0, count)
    return ((steps.round() - steps).detach() + steps) * scale + low


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_with_an_offset_are_lsq_pluss(bits, signed):
    scheme = Scheme(bits=bits, signed=signed)
    x = torch.randn(6, 20, 7)
    # of a grid whose smallest value is a whole number of steps, as LSQ+'s need not be
    start = (torch.tensor(0.26), torch.tensor(-0.52))
    ours = [tensor.clone().requires_grad_() for tensor in (x, *start)]
    theirs = [tensor.clone().requires_grad_() for tensor in (x, *start)]
    weights = torch.randn_like(x)
    zero_point = zero_point_from(*reversed(start), scheme)
    found = fake_quantize_from(*ours, zero_point, scheme)
    expected = _lsq_plus_reference(*theirs, scheme.qmax - scheme.qmin)
    assert int(zero_point) == scheme.qmin + 2
    assert torch.equal(found, fake_quantize(x, start[0], int(zero_point), scheme))
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-3, atol=1e-4)


def test_an_offset_leaves_zero_on_the_grid():
    scheme, scale = Scheme(bits=4), torch.tensor(0.1)
    for low, expected in ((0.3, 0), (-0.04, 0), (-0.06, 1), (-9.0, 15)):
        assert int(zero_point_from(torch.tensor(low), scale, scheme)) == expected


def test_a_scale_that_is_not_learned_costs_and_gets_no_gradient():
    x = torch.randn(10, requires_grad=True)
    scale = torch.tensor(0.1)
    fake_quantize(x, scale, 3, Scheme(bits=3)).sum().backward()
    inside = (x / 0.1 > -3) & (x / 0.1 < 4)
    assert torch.equal(x.grad, inside.float())
    assert scale.grad is None


def test_weight_scale_that_follows_the_weight_never_clips():
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    out = quantize_weight(weight, None, weight_scheme(8))
    step = weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    assert ((out - weight).abs() <= step / 2 + 1e-6).all()
    out.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_zero_channel_stays_zero():
    weight = torch.randn(3, 4)
    weight[1] = 0
    assert torch.equal(quantize_weight(weight, None, weight_scheme(8))[1], torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(dtype):
    x = torch.randn(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fake_quantize(x.to(dtype), torch.tensor(0.02), 128, Scheme(bits=8))
    assert out.dtype == torch.float32
    steps = out.double() / torch.tensor(0.02).double()
    assert torch.allclose(steps, steps.round(), atol=1e-4)  # on the grid, not rounded to bfloat16


@pytest.mark.parametrize("of_grad", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_change_no_gradient(of_x, of_grad):
    """Also where the gradient comes in another format than the values."""
    scheme = Scheme(bits=4)
    x, grad = 3 * torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)

    def gradients(x_format, grad_format):
        values = x.clone(memory_format=x_format).requires_grad_()
        scale = torch.tensor(0.4, requires_grad=True)
        fake_quantize(values, scale, 3, scheme).backward(grad.to(memory_format=grad_format))
        return values.grad, scale.grad

    expected = gradients(torch.contiguous_format, torch.contiguous_format)
    for found, right in zip(gradients(of_x, of_grad), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_compiled_form_has_the_same_values_and_gradients(bits, memory_format):
    """``torch.compile`` runs another Function, which keeps a byte a value."""
    scheme = Scheme(bits=bits)
    x = (3 * torch.randn(8, 4, 16, 16)).to(memory_format=memory_format)
    weights = torch.randn_like(x)

    def run(quantizer):
        values, scale = x.clone().requires_grad_(), torch.tensor(0.02, requires_grad=True)
        out = quantizer(values, scale, 2, scheme)
        (out * weights).sum().backward()
        return out.detach(), values.grad, scale.grad

    torch._dynamo.reset()
    eager, compiled = run(fake_quantize), run(torch.compile(fake_quantize, backend="aot_eager"))
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    # to a 252nd part of a step, of which the errors of 8,192 values average out
    assert torch.allclose(compiled[2], eager[2], rtol=0.01, atol=1e-3)
