"""The table of operations: how networks call each of them, and the facts that quantization needs.

A new activation function or element-wise operation is one entry in ``OPERATIONS``, such as
``_function("softsign", nn.Softsign, F.softsign)``. The entry holds for all spellings: a module, a
function, a method. Placement, near-tie avoidance, forecast, export and equalization ask through
``nodes``, where ``operation_of`` looks a node's call up. An operation without an entry stays in
float.

Convs, linears and BatchNorms are not here: they have parameters, and rooms of their own
(``layers``, ``fold``).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.graph.attention import from_windows, to_windows
from qat_tricks.graph.integer_ops import Add, Elementwise, Mean, Mul
from qat_tricks.graph.two_modes import by_mode

Arguments = Mapping[str, Any]
"""The numbers that a call computes with: a module's attributes, or a function's arguments."""


def _always(arguments: Arguments) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation, or one variant of it; by default no fact holds."""

    name: str  # for people, and for code that needs this very operation
    # Module classes, functions and names of methods that compute it. A subclass is another call.
    calls: tuple[Any, ...]
    # Names of module classes that compute it, of packages that are not imported here.
    class_names: tuple[str, ...] = ()

    # A variant holds only with some arguments; the first entry whose condition holds counts.
    when: Callable[[Arguments], bool] = _always
    # The names of a function's positional arguments after its first, as far as they are read.
    arguments: tuple[str, ...] = ()

    # Where values are: each of the result is one of the first input, so it is on the same grid.
    moves_values: bool = False
    # The result is a tuple of tensors, not one tensor.
    yields_parts: bool = False
    # The result holds the values of all inputs, which therefore share one grid.
    concatenates: bool = False
    # It adds zeros at the border, as the conv behind it could do itself.
    pads: bool = False
    # In evaluation it returns its input; in training it drops values at random.
    is_dropout: bool = False

    # In evaluation it works on each channel by itself and passes on factors and shifts of it:
    # f(s * x + c) = s * f(x) + c with s > 0. Equalization passes through it.
    is_homogeneous: bool = False

    # Integer kernels: the module that computes two activations as the integer kernel does.
    kernel: type[Elementwise] | None = None
    # An integer kernel averages one quantized tensor.
    averages: bool = False
    # The activation function ("relu" or "relu6") that the quantizer behind it can stand in for.
    absorbed_as: str | None = None

    # It multiplies its input by this function of it; the two steps have integer kernels.
    gate: Callable[..., Any] | None = None
    # Between two grids an integer kernel has its 256 values in a table.
    is_tabulated: bool = False

    # In float: each value of the result is a function of one value, so that behind a grid of 8 bits
    # it has 256 results at most.
    is_elementwise: bool = False
    # It computes with numbers or tensors; with a number it is such a function.
    is_arithmetic: bool = False
    # It multiplies matrices, whose products a forecast counts.
    multiplies_matrices: bool = False
    # It is a transposed conv, whose products a forecast counts.
    is_transposed_conv: bool = False
    # Why it is computed in float where it is.
    float_reason: str = "no integer kernel"


UNKNOWN = Operation(name="unknown", calls=())
"""The facts of an operation without an entry."""


def entries_for(call: Any) -> Sequence[Operation]:
    """The entries of a call, in the order of the table.

    Args:
        call: a module class, a function, or the name of a method.
    """
    global _table, _by_call
    if _table is not OPERATIONS:  # built at the first question, and anew for another table
        _table, _by_call = OPERATIONS, {}
        for operation in OPERATIONS:
            for key in (*operation.calls, *map(_ClassName, operation.class_names)):
                _by_call.setdefault(key, []).append(operation)
    entries = _by_call.get(call)
    if entries is None and isinstance(call, type):
        entries = _by_call.get(_ClassName(call.__name__))
    return entries or ()


@dataclass(frozen=True)
class _ClassName:
    """Keeps a class's name apart from a method's."""

    name: str


_table: Sequence[Operation] | None = None
_by_call: dict[Any, list[Operation]] = {}


def _is_relu6(arguments: Arguments) -> bool:
    return (arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)) == (0, 6)


def _returns_indices(arguments: Arguments) -> bool:
    return bool(arguments.get("return_indices", False))


def _takes_nearest(arguments: Arguments) -> bool:
    return bool(arguments.get("mode", "nearest") == "nearest")


def _pads_with_zeros(arguments: Arguments) -> bool:
    # Zero is on every grid; other constants need not be, and the other modes compute or repeat.
    is_constant = arguments.get("mode", "constant") == "constant"
    return is_constant and arguments.get("value") in (0, None)


def _averages_values_alone(arguments: Arguments) -> bool:
    counts_zeros = arguments.get("count_include_pad", True) and arguments.get("padding", 0) not in (
        0,
        (0, 0),
        [0, 0],
    )
    return not counts_zeros and arguments.get("divisor_override") is None


def _averages_positions(arguments: Arguments) -> bool:
    dims = arguments.get("dim")
    return isinstance(dims, (list, tuple)) and len(dims) == 2 and set(dims) <= {2, 3, -1, -2}


INTEGER_RESULTS = frozenset(
    {
        *(operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne),
        *(torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne),
        *("gt", "ge", "lt", "le", "eq", "ne", "bool", "byte", "char", "short", "int", "long"),
        *(torch.isnan, torch.isinf, torch.isfinite, "isnan", "isinf", "isfinite"),
        *(torch.logical_not, torch.logical_and, torch.logical_or, torch.logical_xor),
        *("logical_not", "logical_and", "logical_or", "logical_xor"),
        *(torch.any, torch.all, "any", "all", torch.nonzero, "nonzero"),
        *(torch.argmax, torch.argmin, torch.argsort, "argmax", "argmin", "argsort"),
        *(torch.bucketize, torch.searchsorted, torch.count_nonzero, "count_nonzero"),
    }
)
"""Functions, and names of methods, whose result is integers or truth values."""

INDICES_SECOND = frozenset(
    {
        *(torch.max, torch.min, torch.topk, torch.sort, torch.kthvalue, torch.mode),
        *(torch.median, torch.nanmedian, torch.cummax, torch.cummin),
        *("max", "min", "topk", "sort", "kthvalue", "mode", "median", "cummax", "cummin"),
        F.max_pool1d_with_indices,
        F.max_pool2d_with_indices,
        F.adaptive_max_pool2d_with_indices,
    }
)
"""Those that yield a tuple of values and of their indices, or do so with some arguments."""

BITWISE = frozenset({operator.and_, operator.or_, operator.xor, operator.invert})

_INPUT_READ_ELSEWHERE = "its input is needed elsewhere too"
_WITH_CONSTANT = "arithmetic with a constant, or broadcast from one"
_OF_EACH_IMAGE = "no integer kernel: statistics of each image"
_OF_ACTIVATIONS = "product of two activations, as in attention"


def _moves(name: str, *calls: Any, **facts: Any) -> Operation:
    return Operation(name=name, calls=calls, moves_values=True, **facts)


def _dropout(name: str, *calls: Any, **facts: Any) -> Operation:
    return Operation(name=name, calls=calls, moves_values=True, is_dropout=True, **facts)


def _average(name: str, *calls: Any, **facts: Any) -> Operation:
    return Operation(name=name, calls=calls, averages=True, **facts)


def _arithmetic(name: str, *calls: Any, **facts: Any) -> Operation:
    return Operation(
        name=name, calls=calls, is_arithmetic=True, float_reason=_WITH_CONSTANT, **facts
    )


def _function(name: str, *calls: Any, **facts: Any) -> Operation:
    return Operation(name=name, calls=calls, is_elementwise=True, **facts)


def _absorbed(name: str, *calls: Any, as_: str, **facts: Any) -> Operation:
    return _function(name, *calls, absorbed_as=as_, float_reason=_INPUT_READ_ELSEWHERE, **facts)


def _normalization(name: str, *calls: Any) -> Operation:
    return Operation(name=name, calls=calls, float_reason=_OF_EACH_IMAGE)


def _product(name: str, *calls: Any) -> Operation:
    return Operation(name=name, calls=calls, multiplies_matrices=True, float_reason=_OF_ACTIVATIONS)


def _transposed(name: str, *calls: Any) -> Operation:
    return Operation(
        name=name,
        calls=calls,
        is_transposed_conv=True,
        float_reason="no integer kernel for transposed convs",
    )


OPERATIONS: Sequence[Operation] = (
    # Arithmetic. Sums and products of two activations have integer kernels.
    _arithmetic("add", Add, operator.add, operator.iadd, torch.add, "add", "add_", kernel=Add),
    _arithmetic("mul", Mul, operator.mul, operator.imul, torch.mul, "mul", "mul_", kernel=Mul),
    _arithmetic("sub", operator.sub, torch.sub, "sub"),
    _arithmetic("div", operator.truediv, torch.div, "div"),
    _arithmetic("neg", operator.neg),
    # Averages, which have integer kernels. A mean over other dimensions than positions has one too.
    _average("avg_pool1d", nn.AvgPool1d, F.avg_pool1d),
    _average(
        "avg_pool2d",
        nn.AvgPool2d,
        F.avg_pool2d,
        when=_averages_values_alone,
        arguments=(
            "kernel_size",
            "stride",
            "padding",
            "ceil_mode",
            "count_include_pad",
            "divisor_override",
        ),
        is_homogeneous=True,
    ),
    # Zeros in a border's average, or another divisor: a shift of the input does not pass through.
    _average("padded_avg_pool2d", nn.AvgPool2d, F.avg_pool2d),
    _average("adaptive_avg_pool1d", nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d),
    _average(
        "adaptive_avg_pool2d",
        nn.AdaptiveAvgPool2d,
        F.adaptive_avg_pool2d,
        arguments=("output_size",),
        is_homogeneous=True,
    ),
    _average(
        "mean_of_positions",
        torch.mean,
        "mean",
        when=_averages_positions,
        arguments=("dim", "keepdim"),
        is_homogeneous=True,
    ),
    _average("mean", torch.mean, "mean", Mean),
    # These move values about and make no new ones: values on a grid stay on it.
    _moves(
        "max_pool_with_indices",
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.AdaptiveMaxPool2d,
        when=_returns_indices,
        yields_parts=True,
    ),
    _moves("max_pool1d", nn.MaxPool1d, F.max_pool1d),
    _moves("max_pool2d", nn.MaxPool2d, F.max_pool2d, is_homogeneous=True),
    _moves("adaptive_max_pool2d", nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d),
    _moves("identity", nn.Identity, "contiguous", "detach", is_homogeneous=True),
    _moves(
        "flatten",
        nn.Flatten,
        torch.flatten,
        "flatten",
        arguments=("start_dim", "end_dim"),
        is_homogeneous=True,
    ),
    _moves("unflatten", nn.Unflatten, "unflatten"),
    _moves("reshape", torch.reshape, "view", "view_as", "reshape", "reshape_as"),
    _moves("permute", torch.permute, torch.transpose, "permute", "transpose"),
    _moves("squeeze", torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze"),
    _moves("expand", "expand"),
    _moves("chunk", torch.chunk, torch.split, "chunk", "split", yields_parts=True),
    _moves("getitem", operator.getitem),
    _moves("channel_shuffle", nn.ChannelShuffle, F.channel_shuffle),
    _moves("pixel_shuffle", nn.PixelShuffle, F.pixel_shuffle),
    _moves("pixel_unshuffle", nn.PixelUnshuffle),
    _moves("windows", to_windows, from_windows),
    _moves(
        "pad",
        nn.ZeroPad2d,
        F.pad,
        when=_pads_with_zeros,
        arguments=("pad", "mode", "value"),
        pads=True,
    ),
    _moves(
        "upsample",
        nn.Upsample,
        nn.UpsamplingNearest2d,
        F.interpolate,
        when=_takes_nearest,
        arguments=("size", "scale_factor", "mode"),
    ),
    _dropout("dropout", nn.Dropout, F.dropout, is_homogeneous=True),
    _dropout("dropout1d", nn.Dropout1d),
    _dropout("dropout2d", nn.Dropout2d, F.dropout2d, is_homogeneous=True),
    _dropout("dropout3d", nn.Dropout3d, F.dropout3d),
    _dropout("alpha_dropout", nn.AlphaDropout, F.alpha_dropout),
    _dropout("by_mode", by_mode),
    _dropout("drop_path", class_names=("StochasticDepth", "DropPath", "DropBlock2d")),
    Operation(name="cat", calls=(torch.cat, torch.concat, torch.concatenate), concatenates=True),
    # Activation functions that a quantizer stands in for: clamping to its integers is the function.
    _absorbed("relu", nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_", as_="relu"),
    _absorbed("relu6", nn.ReLU6, F.relu6, as_="relu6"),
    _absorbed(
        "relu6",
        nn.Hardtanh,
        F.hardtanh,
        when=_is_relu6,
        arguments=("min_val", "max_val"),
        as_="relu6",
    ),
    # Other functions of each value, in float between two grids.
    _function("hardtanh", nn.Hardtanh, F.hardtanh),
    _function("silu", nn.SiLU, F.silu, gate=torch.sigmoid),
    _function("hardswish", nn.Hardswish, F.hardswish, gate=F.hardsigmoid),
    _function(
        "hardsigmoid",
        nn.Hardsigmoid,
        F.hardsigmoid,
        float_reason="its input's range does not reach -3, or its grids are learned",
    ),
    _function("gelu", nn.GELU, F.gelu),
    _function("sigmoid", nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", is_tabulated=True),
    _function("tanh", nn.Tanh, F.tanh, torch.tanh, "tanh"),
    _function("leaky_relu", nn.LeakyReLU, F.leaky_relu, is_tabulated=True),
    _function("elu", nn.ELU, F.elu),
    _function("celu", nn.CELU, F.celu),
    _function("selu", nn.SELU, F.selu),
    _function("mish", nn.Mish, F.mish),
    _function("softplus", nn.Softplus, F.softplus),
    _function("exp", torch.exp, "exp"),
    _function("square", torch.square, "square"),
    # No integer kernel at all.
    _normalization("layer_norm", nn.LayerNorm, F.layer_norm),
    _normalization("group_norm", nn.GroupNorm, F.group_norm),
    _normalization("instance_norm2d", nn.InstanceNorm2d),
    _normalization("local_response_norm", nn.LocalResponseNorm),
    _product("matmul", torch.matmul, operator.matmul, "matmul"),
    _product("bmm", torch.bmm, "bmm"),
    _product("einsum", torch.einsum),
    _product("scaled_dot_product_attention", F.scaled_dot_product_attention),
    _transposed("conv_transpose1d", nn.ConvTranspose1d),
    _transposed("conv_transpose2d", nn.ConvTranspose2d),
    _transposed("conv_transpose3d", nn.ConvTranspose3d),
)
