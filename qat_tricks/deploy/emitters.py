"""Modules that ``torch.onnx.export`` writes as QuantizeLinear and DequantizeLinear."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_tricks.deploy.layouts import Layout
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import Layer
from qat_tricks.numerics import ActivationQuantizer


class EmitActivation(nn.Module):
    """Emits ``QuantizeLinear`` and ``DequantizeLinear`` of one activation.

    A ``Clip`` stands between them if the layout has one and saturating does not give the range.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor

    def __init__(self, name: str, quantizer: ActivationQuantizer, layout: Layout) -> None:
        super().__init__()
        if not quantizer.is_calibrated:
            raise QatTricksError(
                f'quantizer "{name}" has no range yet: calibrate the network first'
            )
        self.name = name
        self.dtype = torch.int8 if quantizer.scheme.signed else torch.uint8
        qmin, qmax = quantizer.integers
        saturated = torch.iinfo(self.dtype)
        # Integers of fewer bits are stored in 8, which saturate later.
        self.clips = layout.clips and (qmin, qmax) != (saturated.min, saturated.max)
        self.register_buffer("scale", quantizer.current_scale().detach().clone())
        integers = {"zero_point": quantizer.offset, "qmin": qmin, "qmax": qmax}
        for key, value in integers.items():
            self.register_buffer(key, torch.tensor(value, dtype=self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Emits the operators; raises QatTricksError for integers."""
        if not x.is_floating_point():
            raise QatTricksError(
                f'quantizer "{self.name}" is given {x.dtype}: turn the values into floats before, '
                "with .float()"
            )
        integers = _emit("QuantizeLinear", (x, self.scale, self.zero_point), x, self.dtype)
        if self.clips:
            integers = _emit("Clip", (integers, self.qmin, self.qmax), x, self.dtype)
        return _emit("DequantizeLinear", (integers, self.scale, self.zero_point), x, torch.float32)


class EmitLayer(nn.Module):
    """A conv or linear on dequantized integers, which a runtime fuses into an integer kernel.

    Without a quantizer before it (``grid`` is None) only the weight is stored in integers. Where
    the layout has float biases, the bias holds the values that its integers stand for.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    bias_scale: Tensor

    @torch.no_grad()
    def __init__(self, layer: Layer, grid: EmitActivation | None, layout: Layout) -> None:
        super().__init__()
        assert layer.weight_quantizer is not None
        # In tuples, so that no float weight is registered and exported.
        self._layer, self._grid = (layer,), (grid,)
        scheme, weight = layer.weight_quantizer.scheme, layer.masked_weight().float()
        scale = layer.weight_scale(weight)
        steps = torch.round(weight / scale).clamp_(scheme.qmin, scheme.qmax)
        scale = scale.flatten() if scheme.per_channel else scale.reshape(())
        self.register_buffer("weight", steps.to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", torch.zeros(scale.shape, dtype=torch.int8))
        self.register_buffer("bias", layer.effective_bias())
        if self.bias is not None and grid is not None and not layout.float_bias:
            # in float64, so that the bias is rounded once
            bias_scale = grid.scale.double() * scale.double().expand(len(self.bias))
            assert layer.bias is not None
            self.bias = torch.round(layer.bias / bias_scale).to(torch.int32)
            self.register_buffer("bias_scale", bias_scale.float())

    def forward(self, x: Tensor) -> Tensor:
        """Emits the dequantized weight and bias, and the layer on them."""
        weight = _dequantize(self.weight, self.weight_scale, self.weight_zero_point)
        bias = self.bias
        if bias is not None and not bias.is_floating_point():
            bias = _dequantize(bias, self.bias_scale)
        (layer,), (grid,) = self._layer, self._grid
        if not isinstance(layer, nn.Linear):
            return layer._conv_forward(x, weight, bias)  # type: ignore[operator]
        if x.dim() == 2:
            return F.linear(x, weight, bias)
        rows = x.flatten(0, -2)  # integer linears take a matrix
        # The matrix is quantized again: it is the value that the linear reads.
        out = F.linear(rows if grid is None else grid(rows), weight, bias)
        return out.reshape(-1, *x.shape[1:-1], layer.out_features)


def _emit(
    operator: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: int
) -> Tensor:
    # The exporter writes the operator as it stands; torch itself computes nothing.
    return torch.onnx.ops.symbolic(
        operator, inputs, dict(attributes), dtype=dtype, shape=like.shape
    )


def _dequantize(*initializers: Tensor) -> Tensor:
    """Dequantizes ``(values, scale)`` or ``(values, scale, zero point)``.

    A scale of each channel runs along dimension 0.
    """
    values, scale = initializers[:2]
    axis = {"axis": 0} if scale.dim() else {}
    return _emit("DequantizeLinear", initializers, values, torch.float32, **axis)
