"""From the simulated network to one that says QuantizeLinear and DequantizeLinear where it rounds.

The integers are those of the simulation: int8 weights with a zero point a channel (ONNX Runtime
needs it spelled out to keep products exact on x86 without VNNI), an int32 bias in steps of input
scale times weight scale.

Layouts differ in what stands around those integers:

- ``onnxruntime``: the bias is dequantized like the weight, and a ReLU is nothing but the range of
  integers behind it: those that saturating does not give (a grid that reaches below 0.0, or fewer
  than 8 bits) a ``Clip`` between QuantizeLinear and DequantizeLinear does, which leaves the kernel
  before it an integer one.
- ``tensorrt``: the bias is float, since TensorRT dequantizes no int32, and a ReLU stands before the
  QuantizeLinear, where TensorRT fuses it with the conv before. Activations are int8 with zero point
  0. The numbers are the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph import nodes as n
from qat_tricks.graph.grids import grid_of, input_grid_of
from qat_tricks.graph.integer_ops import Elementwise, Mean
from qat_tricks.graph.layers import Layer, activation_quantizers
from qat_tricks.graph.trace import module_of
from qat_tricks.numerics import ActivationQuantizer

WEIGHT = "weight"  # an integer layer's int8 weight is the initializer "<layer>.weight"


class Emitted(NamedTuple):
    """What the ONNX file will hold."""

    bits: dict[str, int]  # of each int8 weight, by the name that its initializer will have
    # of each quantizer by name, in order: the node quantized, None for a repetition
    calls: dict[str, list[str | None]]


LAYOUTS = ("onnxruntime", "tensorrt")


def to_qdq(traced: fx.GraphModule, layout: str = LAYOUTS[0]) -> Emitted:
    """Turns ``traced``, in place, into a network for ``torch.onnx.export``, in one of ``LAYOUTS``.

    Quantizers and quantized layers become modules that emit ONNX operators. What only moves values
    gets a quantizer of the same grid behind it: it changes no value, and what follows finds its
    integers.

    Raises:
        QatTricksError: a quantizer in use has no range, or the layout is unknown or cannot have its
            integers.
    """
    if layout not in LAYOUTS:
        raise QatTricksError(f'unknown layout "{layout}": {did_you_mean(layout, LAYOUTS)}')
    for_tensorrt = layout == "tensorrt"
    layers = [node for node in traced.graph.nodes if _calls_quantized(node, traced)]
    inputs = {node: (module_of(node, traced), input_grid_of(node, traced)) for node in layers}
    enabled = _enabled(traced)
    names_of = {quantizer: name for name, quantizer in enabled.items()}
    behind = [
        (node, names_of[grid])
        for node in traced.graph.nodes
        if (grid := _grid_to_repeat(node, traced)) is not None
    ]
    placed = {
        node: node.all_input_nodes[0].name for node in traced.graph.nodes if node.target in enabled
    }
    if for_tensorrt:
        _put_relus_first(traced, enabled)
    emitters: dict[ActivationQuantizer | None, EmitActivation] = {
        quantizer: EmitActivation(name, quantizer, clips=not for_tensorrt)
        for name, quantizer in enabled.items()
    }
    _keep_what_is_read(traced, {str(node.target) for node in layers})
    names: dict[Any, str] = {}  # a layer called on two grids has two biases, and is two
    bits: dict[str, int] = {}
    for node, (layer, quantizer) in inputs.items():
        assert isinstance(layer, Layer)
        assert layer.weight_quantizer is not None
        if (layer, quantizer) not in names:
            name = (
                f"{node.target}.on.{node.name}"
                if f"{node.target}.{WEIGHT}" in bits
                else str(node.target)
            )
            traced.add_submodule(
                name, EmitLayer(layer, emitters.get(quantizer), float_bias=for_tensorrt)
            )
            bits[f"{name}.{WEIGHT}"] = layer.weight_quantizer.scheme.bits
            names[layer, quantizer] = name
        node.target, node.args, node.kwargs = (
            names[layer, quantizer],
            (node.all_input_nodes[0],),
            {},
        )
    for name, quantizer in enabled.items():
        traced.add_submodule(name, emitters[quantizer])
    for node, name in behind:
        with traced.graph.inserting_after(node):
            call = traced.graph.call_module(name, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    for node in traced.graph.nodes:
        module = module_of(node, traced)
        if isinstance(module, Elementwise):
            node.op, node.target = "call_function", module.function
        elif isinstance(module, Mean):
            node.op, node.target = "call_function", torch.mean
            node.args, node.kwargs = (*node.args, module.dims), {"keepdim": module.keepdim}
    traced.recompile()
    calls: dict[str, list[str | None]] = {name: [] for name in enabled}
    for node in traced.graph.nodes:
        if node.target in calls:
            calls[node.target].append(placed.get(node))
    return Emitted(bits, calls)


def _put_relus_first(traced: fx.GraphModule, enabled: Mapping[str, ActivationQuantizer]) -> None:
    """Puts the ReLU that a quantizer stands in for before it; the cap of a ReLU6 is where the
    integers end.
    """
    for name, quantizer in enabled.items():
        scheme = quantizer.scheme
        if (scheme.bits, scheme.signed, scheme.symmetric) != (8, True, True):
            kind = f"{'signed' if scheme.signed else 'unsigned'} {'symmetric' if scheme.symmetric else 'affine'}"
            raise QatTricksError(
                f'"{name}" is {kind} with {scheme.bits} bits, and TensorRT takes int8 activations '
                "with zero point 0 alone: quantize with activations=signed_symmetric and "
                "activation_bits=8"
            )
    for node in traced.graph.nodes:
        if node.target in enabled and enabled[node.target].activation is not None:
            with traced.graph.inserting_before(node):
                node.args = (traced.graph.call_function(F.relu, node.args),)


class EmitActivation(nn.Module):
    """``QuantizeLinear`` and ``DequantizeLinear`` of one activation, and a ``Clip`` between unless
    saturating does the same.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor

    def __init__(self, name: str, quantizer: ActivationQuantizer, clips: bool = True) -> None:
        super().__init__()
        if not quantizer.is_calibrated:
            raise QatTricksError(
                f'quantizer "{name}" has no range yet: calibrate the network first'
            )
        self.name = name
        self.dtype = torch.int8 if quantizer.scheme.signed else torch.uint8
        qmin, qmax = quantizer.integers
        self.clips = clips and (qmin, qmax) != (
            torch.iinfo(self.dtype).min,
            torch.iinfo(self.dtype).max,
        )
        self.register_buffer("scale", quantizer.current_scale().detach().clone())
        integers = {"zero_point": int(quantizer.zero_point), "qmin": qmin, "qmax": qmax}
        for key, value in integers.items():
            self.register_buffer(key, torch.tensor(value, dtype=self.dtype))

    def forward(self, x: Tensor) -> Tensor:
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

    Without a quantizer before it (``grid`` is None) only the weight is stored in integers. With
    ``float_bias`` the bias is stored as the values that its integers stand for.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    bias_scale: Tensor

    @torch.no_grad()
    def __init__(self, layer: Layer, grid: EmitActivation | None, float_bias: bool = False) -> None:
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
        if self.bias is not None and grid is not None and not float_bias:
            bias_scale = grid.scale.double() * scale.double().expand(len(self.bias))
            assert layer.bias is not None
            self.bias = torch.round(layer.bias / bias_scale).to(torch.int32)
            self.register_buffer("bias_scale", bias_scale.float())

    def forward(self, x: Tensor) -> Tensor:
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
        out = F.linear(rows if grid is None else grid(rows), weight, bias)
        return out.reshape(-1, *x.shape[1:-1], layer.out_features)


def _emit(
    operator: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: int
) -> Tensor:
    return torch.onnx.ops.symbolic(
        operator, inputs, dict(attributes), dtype=dtype, shape=like.shape
    )


def _dequantize(*initializers: Tensor) -> Tensor:
    """Values with their scale, along dimension 0 if each channel has its own, and perhaps zero
    point.
    """
    values, scale = initializers[:2]
    axis = {"axis": 0} if scale.dim() else {}
    return _emit("DequantizeLinear", initializers, values, torch.float32, **axis)


def _keep_what_is_read(traced: fx.GraphModule, layers: set[str]) -> None:
    """Keeps apart the parameters of ``layers`` that the network reads itself, be it for their
    dtype: theirs become integers.
    """
    for node in traced.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in layers:
            value = getattr(traced.get_submodule(owner), name)
            node.target = f"{node.name}_as_read"
            traced.register_buffer(node.target, value.detach())


def _enabled(traced: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    return {
        name: quantizer
        for name, quantizer in activation_quantizers(traced).items()
        if quantizer.enabled
    }


def _calls_quantized(node: fx.Node, traced: fx.GraphModule) -> bool:
    layer = module_of(node, traced)
    return isinstance(layer, Layer) and layer.is_quantizing


def _grid_to_repeat(node: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer to call again behind ``node``, whose values are on its grid, or None."""
    operation = n.operation_of(node, traced)
    if operation.yields_parts or not (n.is_passthrough(node, traced) or operation.concatenates):
        return None
    if all(user.op == "output" or _is_folded_pad(node, user, traced) for user in node.users):
        return None
    return grid_of(node, traced, accepts=lambda quantizer: quantizer.enabled)


def _is_folded_pad(node: fx.Node, user: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` pads for the conv ``user``, which will do it itself."""
    conv = module_of(user, traced)
    can_pad = isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros"
    return can_pad and n.pads_with_zeros(node, traced)
