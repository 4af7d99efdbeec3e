"""Forecasts, before any training, which operations of a network will run in integers.

For each of the others the forecast has a reason.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qat_tricks.deploy.prepare import prepare_for_export
from qat_tricks.graph import nodes as n
from qat_tricks.graph.fold import batchnorms_to_convs, fold_batchnorm, needs_ranks
from qat_tricks.graph.grids import grids_of, input_grid_of, output_grid_of
from qat_tricks.graph.hard_sigmoids import hard_sigmoid_at
from qat_tricks.graph.inputs import Inputs, as_tensors, first_images, input_names
from qat_tricks.graph.integer_ops import Elementwise
from qat_tricks.graph.integers import note_integers
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.place import place_quantizers
from qat_tricks.graph.quantize_settings import QuantizeSettings
from qat_tricks.graph.ranks import note_ranks
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.trace import trace
from qat_tricks.numerics import ActivationQuantizer


@dataclass(frozen=True, kw_only=True)
class FloatOperation:
    """An operation that stays in float."""

    name: str  # of the module, or of the node where a function is called
    operation: str  # the module's type, or the function's name
    reason: str
    macs: int  # products with weights, for one image


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Integer coverage as it will be measured, and every operation left in float, in order."""

    integer_macs: int
    total_macs: int
    in_float: list[FloatOperation]
    image_shape: tuple[int, ...]  # of the first input, without the batch
    # Tensors turned into integers or back; a runtime may do so again for each reader, or each of
    # the operators that a function consists of.
    conversions: int

    @property
    def coverage(self) -> float:
        """The share of MACs of convs and linears in integer kernels, 0 to 1."""
        return self.integer_macs / self.total_macs if self.total_macs else 0.0

    def as_text(self) -> Group:
        """The share of MACs in integers, and a table of the operations in float, alike ones as one.

        Operations that multiply by no weights, such as activation functions, have no MACs: they
        may stay in float where all MACs are in integers.
        """
        shape = "x".join(map(str, self.image_shape))
        summary = (
            f"{self.coverage:.2%} of the {self.total_macs / 1e6:.1f} million MACs of convs and "
            f"linears in integers, for images of {shape}; conversions between floats and integers: "
            f"{self.conversions} or more"
        )
        if not self.in_float:
            return Group(f"{summary}; nothing stays in float")
        table = Table(box=box.SIMPLE_HEAD, title=f"{len(self.in_float)} operations in float")
        for header in ("operation", "times", "MACs", "where", "why"):
            right = header in ("times", "MACs")
            table.add_column(header, justify="right" if right else "left", overflow="fold")
        for group in grouped(self.in_float):
            macs = sum(row.macs for row in group)
            table.add_row(
                group[0].operation,
                str(len(group)),
                f"{macs:,}" if macs else "none",
                named(group),
                group[0].reason,
            )
        return Group(summary, table)


def grouped(operations: Sequence[FloatOperation]) -> list[list[FloatOperation]]:
    """The operations, those of one kind and one reason together, in the order of their firsts."""
    groups: dict[tuple[str, str], list[FloatOperation]] = {}
    for operation in operations:
        groups.setdefault((operation.operation, operation.reason), []).append(operation)
    return list(groups.values())


def named(operations: Sequence[FloatOperation], most: int = 3) -> str:
    """The names of the first operations, and how many others there are."""
    names = ", ".join(operation.name for operation in operations[:most])
    others = len(operations) - most
    return f"{names} and {others} more" if others > 0 else names


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What of a network with quantizers is in integers, by its structure."""

    quantized: int  # convs and linears that run in integers
    layers: int  # all that the deployed network calls
    in_float: list[FloatOperation]  # in order; without their MACs, which depend on the images


@torch.no_grad()
def forecast(prepared: fx.GraphModule, images: Inputs) -> Forecast:
    """Forecasts which operations of a network ONNX Runtime will run in integers.

    Nothing is calibrated or trained.

    Args:
        prepared: a traced network with quantizers, calibrated or not; it stays as it is. Only the
            changes that export makes by itself are made here.
        images: one image or more, ``[N, C, H, W]``, whose shape the MACs are counted for; a tuple
            for several inputs.
    """
    traced = copy.deepcopy(prepared).eval()
    prepare_for_export(traced)
    run = _run_once(traced, images)
    integer = total = 0
    in_float = []
    for node in _deployed(traced):
        within = run.within.get(node, 0)
        macs = _macs(node, traced, run.shapes) + within
        # Float operations count in the total too, as in the measurement.
        total += macs
        operation = _float_operation(node, traced, within > 0, macs)
        if operation is None:
            integer += macs
        else:
            in_float.append(operation)
    return Forecast(
        integer_macs=integer,
        total_macs=total,
        in_float=in_float,
        image_shape=tuple(as_tensors(images)[0].shape[1:]),
        conversions=_conversions(traced),
    )


def _conversions(traced: fx.GraphModule) -> int:
    """How many tensors are turned into integers, or from integers into floats."""
    into = 0
    back: set[fx.Node] = set()
    for node in _deployed(traced):
        before = [source for source in node.all_input_nodes if n.is_tensor(source)]
        if isinstance(module_of(node, traced), ActivationQuantizer):
            into += _yields_floats(before[0], traced)
        elif _reason(node, traced, within=False) is not None:
            back.update(source for source in before if grids_of(source, traced))
    (output,) = traced.graph.find_nodes(op="output")
    back.update(source for source in output.all_input_nodes if grids_of(source, traced))
    return into + len(back)


def _yields_floats(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether no integer kernel makes the values of ``node``, which a quantizer takes."""
    return node.op == "placeholder" or _reason(node, traced, within=False) is not None


@torch.no_grad()
def placement(prepared: fx.GraphModule) -> Placement:
    """The part of ``forecast`` that needs no images.

    Args:
        prepared: as of ``forecast``.
    """
    traced = copy.deepcopy(prepared).eval()
    prepare_for_export(traced)
    calls = _deployed(traced)
    called = [module for node in calls if (module := module_of(node, traced)) is not None]
    inside = dict.fromkeys(part for module in called for part in module.modules())
    in_float = [_float_operation(node, traced, _holds_layers(node, traced), 0) for node in calls]
    return Placement(
        quantized=sum(isinstance(m, Layer) and _reason_of_layer(m) is None for m in inside),
        layers=sum(isinstance(m, (Layer, *_MULTIPLYING)) for m in inside),
        in_float=[operation for operation in in_float if operation is not None],
    )


# The base of all convs, transposed ones too, and that of linears.
_MULTIPLYING = (nn.modules.conv._ConvNd, nn.Linear)


def _holds_layers(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a module that is kept whole, and is no layer itself, has layers in it."""
    module = module_of(node, traced)
    if module is None or isinstance(module, (Layer, *_MULTIPLYING)):
        return False
    return any(isinstance(part, (Layer, *_MULTIPLYING)) for part in module.modules())


def _deployed(traced: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a runtime computes for each image; it computes the others once."""
    from_images = n.nodes_from_images(traced)
    return [node for node in traced.graph.nodes if node in from_images]


def _float_operation(
    node: fx.Node, traced: fx.GraphModule, within: bool, macs: int
) -> FloatOperation | None:
    """The operation of ``node``, or None if it does not stay in float.

    Args:
        node: of ``traced``.
        traced: a network with quantizers.
        within: whether it multiplies in a module or function that is not traced through.
        macs: products with weights.
    """
    reason = _reason(node, traced, within)
    if reason is None:
        return None
    name = str(node.target) if node.op == "call_module" else node.name
    operation = _operation(node, traced)
    return FloatOperation(name=name, operation=operation, reason=reason, macs=macs)


def forecast_network(
    network: nn.Module,
    images: Inputs,
    settings: QuantizeSettings | None = None,
    untraced: Sequence[str] = (),
) -> Forecast:
    """``forecast`` of a float network, prepared as the guideline ``int8_ptq`` prepares it.

    Args:
        network: a float classifier; it stays as it is.
        images: as of ``forecast``.
        settings: of the ``quantize`` trick; None: its defaults.
        untraced: name patterns of submodules that are not traced through.

    Raises:
        QatTricksError: the network cannot be traced, or a pattern matches no layer.
    """
    traced = trace(copy.deepcopy(network).eval(), untraced)
    if needs_ranks(traced):
        note_ranks(traced, images)
    fold_batchnorm(traced)
    batchnorms_to_convs(traced)
    if len(input_names(traced)) > 1:
        note_integers(traced, images)
    place_quantizers(traced, settings)
    return forecast(traced, images)


def _run_once(traced: fx.GraphModule, images: Inputs) -> "_Shapes":
    """Runs one image through the float network, for its shapes and the MACs of opaque modules."""
    run = _Shapes(traced)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation that hides its products
    try:
        with float_mode(traced):
            run.run(*as_tensors(first_images(images, 1)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return run


class _Shapes(fx.Interpreter):
    """Records the shape of each node's value, and the MACs inside untraced modules or functions."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.within: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        counter = _Products()
        with counter:
            result = super().run_node(n)
        # Products inside a module that is kept whole are seen only by the dispatcher.
        if counter.macs and not _is_counted(n, self.module):  # type: ignore[arg-type]
            self.within[n] = counter.macs
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


class _Products(TorchDispatchMode):
    """Counts the products of convs and of matrices.

    Products of batches of matrices, as in attention, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            # [M, K] times [K, N]: K products for each result.
            self.macs += result.numel() * args[-1].shape[0]
        elif func is torch.ops.aten.convolution.default:
            is_transposed = args[6]
            self.macs += (args[0] if is_transposed else result).numel() * math.prod(
                args[1].shape[1:]
            )
        return result


def _is_counted(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether the products of ``node`` are counted elsewhere, or are of two activations."""
    operation = n.operation_of(node, traced)
    is_product = operation.multiplies_matrices and all(
        map(n.depends_on_images, node.all_input_nodes)
    )
    return is_product or operation.is_transposed_conv or n.calls_layer(node, traced)


def _macs(node: fx.Node, traced: fx.GraphModule, shapes: Mapping[fx.Node, tuple[int, ...]]) -> int:
    module = module_of(node, traced)
    if n.operation_of(node, traced).is_transposed_conv:
        assert module is not None
        assert isinstance(module.weight, Tensor)
        # Each input value is multiplied by all weights of its channel.
        return math.prod(shapes[node.all_input_nodes[0]]) * math.prod(module.weight.shape[1:])
    if n.calls_layer(node, traced):
        assert module is not None
        assert isinstance(module.weight, Tensor)
        return math.prod(shapes[node]) * math.prod(module.weight.shape[1:])
    return 0


def _reason(node: fx.Node, traced: fx.GraphModule, within: bool) -> str | None:
    """Why a node is computed in float; None if it is computed in integers, or computes nothing.

    Args:
        node: of ``traced``.
        traced: a network with quantizers.
        within: whether it multiplies in a module or function that is not traced through.
    """
    module = module_of(node, traced)
    is_quantizer = isinstance(module, ActivationQuantizer)
    if not node.op.startswith("call_") or is_quantizer or not n.is_tensor(node):
        return None
    if n.is_computed_part(node, traced):  # what computed it is named
        return None
    if n.calls_layer(node, traced):
        return _reason_of_layer(module)
    if _is_integer(node, traced):
        return None
    operation = n.operation_of(node, traced)
    if within:
        is_product = operation.multiplies_matrices
        return "product with a constant that is no layer's weight" if is_product else "kept whole"
    if n.calls_batchnorm(node, traced):
        return "not the only reader of a conv or linear, so it is not folded"
    return operation.float_reason


def _is_integer(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether an operation that is no conv or linear moves integers, or has an integer kernel."""
    # Integers are moved as they are.
    if n.is_passthrough(node, traced) or n.is_cat(node, traced):
        return True
    if isinstance(module_of(node, traced), Elementwise):
        return True
    if n.operation_of(node, traced).is_tabulated:
        return None not in (input_grid_of(node, traced), output_grid_of(node, traced))
    clips = hard_sigmoid_at(node, traced)
    if clips is not None:  # before it is calibrated, what is likely
        return clips.is_aligned or not clips.before.is_calibrated
    return n.is_integer_op(node, traced) and output_grid_of(node, traced) is not None


def _reason_of_layer(module: nn.Module | None) -> str | None:
    """Why a conv or linear is computed in float; None if it is not."""
    if not isinstance(module, Layer) or module.weight_quantizer is None:
        return "left out by quantize.include or exclude"
    return None if module.input_quantizer else "its input is on no grid"


def _operation(node: fx.Node, traced: fx.GraphModule) -> str:
    module = module_of(node, traced)
    return (
        type(module).__name__
        if module is not None
        else getattr(node.target, "__name__", str(node.target))
    )
