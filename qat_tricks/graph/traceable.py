"""What has to be so before a network can be traced, and what is taken over from other tools."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.graph.inputs import input_names
from qat_tricks.graph.layers import LAYER_OF
from qat_tricks.graph.outside import has_steps
from qat_tricks.graph.spec import KERNELS, QUANTIZERS
from qat_tricks.graph.traced_network import TracedNetwork

# Old-style hooks of torch.nn.utils that make a weight anew at each call, with the function that
# makes it a parameter again.
_MADE_BY_HOOKS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}


# What a graph module has beside a module's own attributes, and where tricks add their parts.
_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())
_RESERVED = {
    name
    for name in (*dir(fx.GraphModule), *vars(_EMPTY))
    if not hasattr(nn.Module(), name) and not name.startswith("__")
} | {QUANTIZERS, KERNELS}


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What ``trace`` does; a spec records it, so that a network is rebuilt as it was."""

    training_mode: bool = True  # follow the code in training mode too
    keep_unused: bool = True  # keep parts and parameters that the graph does not use
    splits_attention: bool = True  # make linears and products of self-attention
    functions_to_modules: bool = True  # make modules of functions with weights

    def as_spec(self) -> dict[str, Any]:
        """The entry in a spec."""
        return {"trace": asdict(self)}

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> "TraceSettings":
        """The settings with which a spec's network was traced."""
        # Specs written before had one mode, and only parts in use.
        before: dict[str, Any] = {"training_mode": False, "keep_unused": False}
        return cls(**spec.get("trace", before))


def check_traceable(network: nn.Module, untraced: Sequence[str] = ()) -> None:
    """Refuses networks that a tracer would follow wrong.

    Args:
        network: the user's; one that was traced here before is right.
        untraced: name patterns of submodules that stay whole, which may be anything.

    Raises:
        QatTricksError: one line with the part and the way out.
    """
    if isinstance(network, TracedNetwork):
        return
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise QatTricksError(
            f"{type(network).__name__} spreads a network over devices: hand over its .module"
        )
    _check_kind(network, type(network).__name__)
    if "forward" in vars(network):
        raise QatTricksError(
            f"the forward of {type(network).__name__} was replaced on the object, and a tracer "
            "reads its class: define a class with that forward"
        )
    parameters = inspect.signature(type(network).forward).parameters.values()
    variable = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if variable is not None and not input_names(network):
        raise QatTricksError(
            f"the forward of {type(network).__name__} takes *{variable}, which does not tell its "
            "inputs: give each of them a name, as in forward(self, image)"
        )
    _check_names(network)
    floats = [p for p in network.named_parameters() if p[1].is_floating_point()]
    if floats and all(p.dtype != torch.float32 for _, p in floats):
        raise _other_precision(*floats[0])
    apart = _without_parameters(network) if has_steps(network) else set()
    for path, module in network.named_modules():
        if module in apart or _is_under(path, untraced):
            continue
        where = f'"{path}"' if path else type(network).__name__
        _check_kind(module, where)
        _check_weights(module, where)
        if path:
            _check_hooks(module, where)
            _check_forward(module, where)


def check_precision(traced: fx.GraphModule, untraced: Sequence[str] = ()) -> None:
    """Refuses parts that compute in another precision than float32, which scales and kernels have.

    Args:
        traced: the network; parts that it does not call may be anything.
        untraced: name patterns of parts that stay whole, in any precision.

    Raises:
        QatTricksError: one line with the tensor and the way out.
    """
    for node in traced.graph.nodes:
        path = str(node.target)
        if node.op != "call_module" or _is_under(path, untraced):
            continue
        part = traced.get_submodule(path)
        own: list[tuple[str, Tensor | None]] = [*part._parameters.items()]
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            own += part._buffers.items()
        for name, tensor in own:
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise _other_precision(f"{path}.{name}", tensor)


def _other_precision(name: str, tensor: Tensor) -> QatTricksError:
    return QatTricksError(
        f'"{name}" is in {str(tensor.dtype).removeprefix("torch.")}, and scales and integer grids '
        "need float32: call .float() on the network, or keep that part whole with untraced"
    )


def _without_parameters(network: nn.Module) -> set[nn.Module]:
    """The losses and metrics among the parts of a module of steps, and activations."""
    children = [child for child in network.children() if not any(True for _ in child.parameters())]
    return {module for child in children for module in child.modules()}


def _check_names(network: nn.Module) -> None:
    """Refuses attributes whose names a graph module needs for itself."""
    own = {name for kind in type(network).__mro__ if _is_users(kind) for name in vars(kind)}
    taken = sorted((own | _attributes(network)) & _RESERVED)
    if taken:
        raise QatTricksError(
            f"{type(network).__name__} has an attribute {taken[0]}, which torch.fx needs for "
            f"itself: call it something else, such as {taken[0]}_"
        )


def _attributes(network: nn.Module) -> set[str]:
    return {*vars(network), *network._modules, *network._parameters, *network._buffers}


def _is_users(kind: type) -> bool:
    return not kind.__module__.startswith("torch.") and kind is not object


def _is_under(path: str, patterns: Sequence[str]) -> bool:
    parts = path.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(p, pattern) for p in paths for pattern in patterns)


def _check_kind(module: nn.Module, where: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise QatTricksError(
            f"{where} is scripted, and tricks need its Python code: hand over the network from "
            "before torch.jit.script or torch.jit.trace"
        )
    if "_orig_mod" in module._modules:
        raise QatTricksError(
            f"{where} is compiled, and tricks need the network itself: hand over the network from "
            "before torch.compile (its _orig_mod), and compile what they return"
        )
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise QatTricksError(
            f"{where} was compiled in place with .compile(), and tricks need the network itself: "
            "compile what they return instead"
        )


def _check_weights(module: nn.Module, where: str) -> None:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise QatTricksError(
                f"{where} is lazy and has no {name} yet: run the network once on a batch"
            )
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise QatTricksError(
            f"{where} computes its {names} with torch.nn.utils.parametrize, which surgery would "
            "undo: make it a plain parameter with torch.nn.utils.parametrize."
            f'remove_parametrizations(module, "{names}"), or keep that part in float with untraced'
        )


def _check_hooks(module: nn.Module, where: str) -> None:
    for hook in module._forward_pre_hooks.values():
        kind = type(hook).__name__
        if kind in _MADE_BY_HOOKS:
            raise QatTricksError(
                f"{where} makes its weight anew in a hook ({kind}): make it a plain parameter with "
                f"torch.nn.utils.{_MADE_BY_HOOKS[kind]}(module), or keep that part in float with "
                "untraced"
            )
        if isinstance(hook, BasePruningMethod):
            if hook._tensor_name != "weight" or type(module) not in LAYER_OF:
                raise QatTricksError(
                    f"{where} has a mask on its {hook._tensor_name}, and only masks on weights of "
                    "convs and linears are taken over: make it permanent with torch.nn.utils."
                    f'prune.remove(module, "{hook._tensor_name}")'
                )
            continue
        if not type(hook).__module__.startswith("qat_tricks."):  # ours are of parts traced before
            raise QatTricksError(_hook(where, hook))
    for hook in module._forward_hooks.values():
        raise QatTricksError(_hook(where, hook))
    for hook in (*module._backward_hooks.values(), *module._backward_pre_hooks.values()):
        raise QatTricksError(_hook(where, hook).replace("forward hook", "backward hook", 1))


def _check_forward(module: nn.Module, where: str) -> None:
    """Refuses a part of torch's own that computes by another forward; others are traced through."""
    forward = vars(module).get("forward")
    is_ours = type(forward).__module__.startswith("qat_tricks.")  # of parts traced before
    if forward is not None and not is_ours and type(module).__module__.startswith("torch.nn."):
        raise QatTricksError(
            f"the forward of {where} was replaced on the object, and tricks would put back that of "
            f"its class: derive a class from {type(module).__name__} with that forward, or keep "
            "that part in float with untraced"
        )


def _hook(where: str, hook: Any) -> str:
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return (
        f"{where} has a forward hook ({name}), which a traced network would not call: remove it, "
        "do its work in forward, or, if it only watches, register it on the network itself"
    )


def copy_of(network: nn.Module) -> nn.Module:
    """A copy of a network of the user's, also of one under masks of ``torch.nn.utils.prune``."""
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                # Made anew by the hook at each call; with its history it cannot be copied.
                masked = getattr(module, hook._tensor_name)
                setattr(module, hook._tensor_name, masked.detach())
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever an attribute raises that cannot be copied
        raise QatTricksError(
            f"{type(network).__name__} cannot be copied ({one_line(error)}): remove the attribute "
            "that holds results of a forward, locks or files"
        ) from error


@torch.no_grad()
def take_over_masks(network: nn.Module) -> dict[str, Tensor]:
    """Makes the weights under masks of ``torch.nn.utils.prune`` plain parameters, in place.

    Returns:
        The masks by the names of their layers.
    """
    masks: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        pruned = {
            key: hook
            for key, hook in module._forward_pre_hooks.items()
            if isinstance(hook, BasePruningMethod)
        }
        # Only layers: what else has masks was refused, or is not traced.
        if not pruned or type(module) not in LAYER_OF:
            continue
        for key in pruned:
            del module._forward_pre_hooks[key]
        vars(module).pop("weight", None)
        weight = module._parameters.pop("weight_orig")
        masks[path] = module._buffers.pop("weight_mask")
        assert weight is not None
        weight.mul_(masks[path])
        # First again, as in a layer that was never pruned.
        module._parameters = {"weight": weight, **module._parameters}
    return masks
