"""From the user's network to a ``torch.fx.GraphModule`` that computes the same in both modes.

The names of submodules, and so the keys of checkpoints, stay the user's.
"""

import operator
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.fingerprint import CODE, fingerprint
from qat_tricks.graph.functional import functions_to_modules
from qat_tricks.graph.in_place import read_after_change, works_in_place
from qat_tricks.graph.layers import as_layer
from qat_tricks.graph.operations import entries_for
from qat_tricks.graph.outside import has_steps
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.traceable import (
    TraceSettings,
    check_precision,
    check_traceable,
    take_over_masks,
)
from qat_tricks.graph.traced_network import (
    DEFAULTS,
    NO_TRAINING,
    TracedNetwork,
    adopt,
    drop_unused,
    order_by_use,
)
from qat_tricks.graph.tracer import (
    Followed,
    Tracer,
    buffers_read,
    defaults_of,
    follow,
    functions_of_mode,
)
from qat_tricks.graph.two_modes import (
    EVALUATION,
    FOLLOWS_MODE,
    NO_GRAD,
    OWNER,
    TRAINING,
    merge,
    only_in,
    split_by_training,
)

_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "logical_not")
_TRUTH_VALUES = {
    function
    for name in _COMPARISONS
    for function in (name, getattr(torch, name), getattr(operator, name, None))
    if function is not None
}


def check_untraced(network: nn.Module, untraced: Sequence[str]) -> None:
    """Raises QatTricksError if a name pattern matches no submodule of ``network``."""
    names = [name for name, _ in network.named_modules() if name]
    for pattern in untraced:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise QatTricksError(
                f'untraced: pattern "{pattern}" matches no submodule: '
                f"{did_you_mean(pattern, names)}"
            )


def trace(
    network: nn.Module,
    untraced: Sequence[str] = (),
    *,
    settings: TraceSettings | None = None,
) -> TracedNetwork:
    """Returns ``network`` as a graph module that shares its parameters.

    The result is an object of the user's class, with the user's attributes and parts. It computes
    what the network computes in either mode. Arguments of ``forward`` with a default keep it. A
    network that was traced here before is returned as it is.

    Args:
        network: takes images, or several inputs, and yields logits.
        untraced: name patterns (``fnmatch``) of submodules to keep whole, in float.
        settings: what to do beyond following the code; by default everything.

    Raises:
        QatTricksError: the network's control flow depends on the values of its inputs (names the
            line of its code and the submodule), a pattern matches no submodule, or the network is
            one that cannot be traced right.
    """
    if isinstance(network, TracedNetwork):
        return network
    settings = settings or TraceSettings()
    check_untraced(network, untraced)
    check_traceable(network, untraced)
    masks = take_over_masks(network)
    here, no_training = _both_modes(network, untraced, settings)
    for name, constant in here.constants.items():
        setattr(network, name, constant)
    traced = adopt(network, here.graph)
    for name in here.constants:
        delattr(network, name)
    check_precision(traced, untraced)
    # Where training cannot be traced, it is not known which functions it switches on.
    _prepare(traced, network, settings, every=not settings.training_mode or no_training is not None)
    _warn_of_attributes(traced, here.written)
    if defaults := defaults_of(network):
        traced.meta[DEFAULTS] = defaults
    if no_training is not None:
        traced.meta[NO_TRAINING] = no_training
    spec = traced.meta["qat_tricks"] = {"untraced": list(untraced)} if untraced else {}
    spec |= {**settings.as_spec(), CODE: fingerprint(traced)}
    for name, mask in masks.items():
        as_layer(traced.get_submodule(name)).weight_mask = mask
        spec.setdefault("layers", {})[name] = {"mask": True}
    traced.recompile()
    return traced


def _both_modes(
    network: nn.Module, untraced: Sequence[str], settings: TraceSettings
) -> tuple[Followed, str | None]:
    """The graph of both modes; and why it is of evaluation only, if training cannot be traced."""

    def tracer(whole_functions: Sequence[Any] = ()) -> Tracer:
        return Tracer(
            untraced, splits_attention=settings.splits_attention, whole_functions=whole_functions
        )

    here = follow(network, tracer(), training=False)
    if not settings.training_mode:
        return here, None

    def again() -> Followed:
        return follow(network, tracer(), training=False)

    for name in buffers_read(network, here.graph, again):
        warnings.warn(
            f'{type(network).__name__} reads the value of its buffer "{name}" as a number, which '
            "is fixed from now on: a change of the buffer, also by a checkpoint, has no effect; "
            "compute with the buffer as a tensor instead",
            stacklevel=4,
        )
    try:
        there = follow(network, tracer(), training=True)
    except QatTricksError as error:
        # A function such as ``drop_path(x, p, training)`` can be one call, in training only.
        whole_functions = functions_of_mode(network)
        if not whole_functions:
            return here, str(error)
        try:
            there = follow(network, tracer(whole_functions), training=True)
        except QatTricksError:
            return here, str(error)
    # Each trace numbers the tensors that it makes from 0.
    for node in there.graph.nodes:
        if node.op == "get_attr" and node.target in there.constants:
            constant = there.constants[str(node.target)]
            same = here.constants.get(str(node.target))
            if same is None or not torch.equal(same, constant):
                node.target = str(node.target).replace("constant", "constant_of_training")
                here.constants[node.target] = constant
    merge(here.graph, there.graph)
    here.written += [name for name in there.written if name not in here.written]
    return here, None


def _prepare(
    traced: TracedNetwork, network: nn.Module, settings: TraceSettings, *, every: bool
) -> None:
    """Brings a graph just traced into the form that tricks expect."""
    own = {name for name, _ in traced.named_modules()}
    if not settings.keep_unused:
        order_by_use(traced)
    _dropout_to_modules(traced, every=every)
    _erase_assertions(traced)
    _erase_identities(traced)
    if has_steps(network):
        _erase_moves(traced)
    if settings.training_mode:
        _refuse_changed_views(traced)
        _detach_no_grad(traced)
        _clone_changed_inputs(traced)
        _read_results(traced)
        _refuse_changed_parameters(traced)
    if settings.functions_to_modules:
        functions_to_modules(traced, network, every=every)
    split_by_training(traced)
    if not settings.keep_unused:
        drop_unused(traced)
    for name, module in traced.named_modules():
        if name not in own:  # it has the mode of the part that it was added to
            module.training = traced.get_submodule(name.rpartition(".")[0]).training


def _warn_of_attributes(traced: TracedNetwork, written: Sequence[str]) -> None:
    """Warns of attributes that the code sets, because the traced network does not set them."""
    if written:
        warnings.warn(
            f"{type(traced).__name__} sets {', '.join(written)} while it computes; the traced "
            "network does not, and they stay as they are: yield what is needed later instead",
            stacklevel=3,
        )


def _detach_no_grad(traced: fx.GraphModule) -> None:
    """Detaches what was computed under ``torch.no_grad()`` where it meets the rest."""
    nodes = list(traced.graph.nodes)
    for node in nodes:
        if not node.meta.get(NO_GRAD):
            continue
        # What comes in, which an operation in place would otherwise give a gradient to.
        for source in node.all_input_nodes:
            if not source.meta.get(NO_GRAD) and source.op != "get_attr":
                with traced.graph.inserting_before(node):
                    detached = traced.graph.call_method("detach", (source,))
                detached.meta[NO_GRAD] = True
                node.replace_input_with(source, detached)
    for node in nodes:
        outside = [user for user in node.users if not user.meta.get(NO_GRAD)]
        if not node.meta.get(NO_GRAD) or node.op in ("placeholder", "get_attr") or not outside:
            continue
        with traced.graph.inserting_after(node):
            detached = traced.graph.call_method("detach", (node,))
        node.replace_all_uses_with(
            detached, delete_user_cb=lambda user, outside=outside: user in outside
        )


def _read_results(traced: fx.GraphModule) -> None:
    """Lets what comes behind an operation in place read its result, which is the same tensor.

    In a graph with quantizers, or in a file, it is another tensor than its input.
    """
    position = {node: index for index, node in enumerate(traced.graph.nodes)}
    of_one_mode = [only_in(traced.graph, mode) for mode in (TRAINING, EVALUATION)]
    for node in traced.graph.nodes:
        if not works_in_place(node, traced) or node.target is operator.setitem or not node.args:
            continue
        source = node.args[0]
        for user in list(source.users) if isinstance(source, fx.Node) else ():
            # What one mode computes is no result in the other.
            is_there = all(node not in only or user in only for only in of_one_mode)
            if position[user] > position[node] and is_there:
                user.replace_input_with(source, node)


def _clone_changed_inputs(traced: fx.GraphModule) -> None:
    """Lets a network that changes its input in place change a copy: tricks run a batch again."""
    for node in list(traced.graph.nodes):
        if node.op != "placeholder":
            continue
        if not any(works_in_place(user, traced) for user in node.users):
            continue
        with traced.graph.inserting_after(node):
            clone = traced.graph.call_method("clone", (node,))
        node.replace_all_uses_with(
            clone, delete_user_cb=lambda user, clone=clone: user is not clone
        )


def _refuse_changed_views(traced: TracedNetwork) -> None:
    """Refuses code that changes a part of a tensor in place and then reads the tensor."""
    for node in traced.graph.nodes:
        if read_after_change(node, traced) is not None:
            where = f' in "{node.meta[OWNER]}"' if node.meta.get(OWNER) else ""
            name = node.target if isinstance(node.target, str) else node.name
            raise QatTricksError(
                f'{type(traced).__name__} changes a view of a tensor in place ("{name}"{where}) '
                "and reads the tensor behind it: compute a new one, as with torch.cat, or keep "
                "that part in float with untraced"
            )


def _refuse_changed_parameters(traced: TracedNetwork) -> None:
    """Refuses code that changes a parameter in place, which a change of the weight would undo."""
    parameters = dict(traced.named_parameters())
    for node in traced.graph.nodes:
        source = node.all_input_nodes[0] if works_in_place(node, traced) and node.args else None
        # Through ``.data`` and other views.
        while source is not None and source.op.startswith("call_") and source.all_input_nodes:
            is_view = source.target in (getattr, operator.getitem, "detach", "view", "t")
            source = source.all_input_nodes[0] if is_view else None
        if source is not None and source.op == "get_attr" and source.target in parameters:
            raise QatTricksError(
                f'{type(traced).__name__} changes its parameter "{source.target}" in place in '
                "forward, where tricks change the weights themselves: do it between steps, as in "
                "on_train_batch_end, or keep that part in float with untraced"
            )


def _dropout_to_modules(traced: fx.GraphModule, *, every: bool) -> None:
    """Turns functional dropout into modules, which follow ``train()`` and ``eval()``.

    Args:
        traced: just traced.
        every: also those of which it is not known whether training switches them on.
    """
    for node in list(traced.graph.nodes):
        dropout = _dropout_module(node.target) if node.op == "call_function" else None
        if dropout is not None and (every or node.meta.get(FOLLOWS_MODE)):
            # torch's functions have 0.5 as their default.
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            # Beside the code that calls it, whose mode it follows.
            owner = node.meta.get(OWNER)
            name = f"{owner}.dropouts.{node.name}" if owner else f"dropouts.{node.name}"
            replace_with_module(traced, node, name, dropout(p), node.all_input_nodes[:1])
    traced.recompile()


def _dropout_module(function: Any) -> type[nn.Module] | None:
    """The module class of the entry that ``function`` is a dropout of, or None."""
    calls = [call for entry in entries_for(function) if entry.is_dropout for call in entry.calls]
    return next((call for call in calls if isinstance(call, type)), None)


def _erase_assertions(traced: fx.GraphModule) -> None:
    """Removes checks of shapes, which held while tracing, and the numbers that only they read."""
    # Backwards: a check is gone before the numbers that only it has read.
    for node in reversed(list(traced.graph.nodes)):
        is_read = node.target is getattr or node.target in (operator.eq, operator.ne)
        if (
            node.op == "call_function"
            and not node.users
            and (node.target is torch._assert or is_read)
        ):
            traced.graph.erase_node(node)


def _erase_identities(traced: fx.GraphModule) -> None:
    """Removes ``nn.Identity``, and additions of the number 0, with which ``sum`` begins."""
    for node in list(traced.graph.nodes):
        adds_zero = node.target in (operator.add, operator.iadd) and any(
            isinstance(arg, int) and arg == 0 for arg in node.args
        )
        # Two tensors would be a true sum, and a sum of truth values counts them.
        tensors = node.all_input_nodes
        if adds_zero and any(tensor.target in _TRUTH_VALUES for tensor in tensors):
            continue
        if len(tensors) == 1 and (adds_zero or type(module_of(node, traced)) is nn.Identity):
            node.replace_all_uses_with(tensors[0])
            traced.graph.erase_node(node)


def _erase_moves(traced: fx.GraphModule) -> None:
    """Removes ``x.to(self.device)``, which a graph would repeat with the device of now."""
    for node in list(traced.graph.nodes):
        kinds = [type(value) for value in (*node.args[1:], *node.kwargs.values())]
        if node.op == "call_method" and node.target == "to" and kinds == [torch.device]:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def replace_with_module(
    traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, inputs: list[fx.Node]
) -> fx.Node:
    """Puts a call of ``module`` in the place of ``node``; the caller recompiles.

    Args:
        traced: the network; ``module`` becomes its submodule ``name``.
        node: the node to replace.
        name: of the submodule.
        module: the module to call instead.
        inputs: the call's arguments.

    Returns:
        The call.
    """
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(node):
        call = traced.graph.call_module(name, tuple(inputs))
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)
    return call
