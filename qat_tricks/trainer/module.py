"""Finds the network in a LightningModule, and attaches the workbench to the module."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import activation_quantizers, is_layer
from qat_tricks.graph.outside import OUTSIDE, used_parts
from qat_tricks.graph.random_state import random_state
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.traceable import check_traceable
from qat_tricks.graph.traced_network import EXPORT, TracedNetwork, become
from qat_tricks.graph.tracer import Tracer, follow
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.finetuning import finetuning_in, frozen_in
from qat_tricks.trainer.forward_alone import forward_alone
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.own_hooks import keep_networks
from qat_tricks.trainer.state_keys import differing, matched

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

CHECKPOINT_KEY = "qat_tricks"
WHOLE = "self"  # the name of a network that is the LightningModule itself
_ATTRIBUTE = "_qat_tricks_workbench"


def networks_in(pl_module: nn.Module) -> dict[str, nn.Module]:
    """The children of ``pl_module`` that have conv or linear layers, by name."""
    # A loss or a metric is a child too, but has no conv or linear.
    return {
        key: child
        for key, child in pl_module.named_children()
        if any(is_layer(m) for m in child.modules())
    }


def network_of(pl_module: nn.Module, name: str) -> nn.Module:
    """The network called ``name`` in ``pl_module``, which may be ``pl_module`` itself."""
    return pl_module if is_whole(pl_module, name) else pl_module.get_submodule(name)


def is_whole(pl_module: nn.Module, name: str) -> bool:
    """Whether ``name`` means ``pl_module`` itself, and no submodule of that name."""
    return name == WHOLE and WHOLE not in pl_module._modules


def find_network(
    pl_module: "LightningModule", name: str | None = None, untraced: Sequence[str] = ()
) -> str:
    """The attribute of ``pl_module`` that holds the network, or "self" for the module itself.

    It is the one child with conv or linear layers, unless ``name`` says which submodule to take. If
    there are several, it is the module itself, where its forward calls more than one of them.

    Args:
        pl_module: holds the network.
        name: of a submodule, or "self".
        untraced: name patterns of submodules of the network that are not traced through.

    Raises:
        QatTricksError: there is no such child, or several and no forward to put them together; or
            ``name`` is none of its submodules.
    """
    children = networks_in(pl_module)
    listed = (
        ", ".join(f'"{key}" ({type(child).__name__})' for key, child in children.items()) or "none"
    )
    owner = type(pl_module).__name__
    if name is not None:
        if not is_whole(pl_module, name) and name not in dict(pl_module.named_modules()):
            raise QatTricksError(f'{owner} has no submodule "{name}"; its networks: {listed}')
        return name
    if isinstance(pl_module, TracedNetwork):  # quantized beforehand, as a whole
        return WHOLE
    if not children:
        raise QatTricksError(
            f"{owner} holds no network with conv or linear layers: make it in __init__, setup or "
            "configure_model"
        )
    if len(children) == 1 and _has_forward(next(iter(children.values()))):
        return next(iter(children))
    reason = _why_not_whole(pl_module, children, untraced)
    if reason is None:
        return WHOLE
    raise QatTricksError(
        f"{owner} must hold one network, and these of its attributes have conv or linear "
        f"layers: {listed}; {reason}; name the one to quantize with "
        'overrides=["network=NAME"], or call all of them in forward'
    )


def _has_forward(module: nn.Module) -> bool:
    """Whether a module is called itself; a list or a mapping of modules is not."""
    # A compiled one has it on the object.
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _why_not_whole(
    pl_module: "LightningModule", children: Mapping[str, nn.Module], untraced: Sequence[str]
) -> str | None:
    """Why ``pl_module`` itself is not the network; None if it is."""
    if type(pl_module).forward is package_of(pl_module).LightningModule.forward:
        return "the module has no forward that puts them together"
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        return "as a whole the module cannot be one where it is compiled, for surgery comes first"
    try:
        check_traceable(pl_module, untraced)
        with forward_alone(pl_module):
            graph = follow(pl_module, Tracer(untraced), training=False).graph
    except QatTricksError as error:
        return f"as a whole {error}"
    used = used_parts(graph) & children.keys()
    if len(used) < min(2, len(children)):
        return f"forward calls only {', '.join(sorted(used)) or 'none'} of them"
    return None


def attach_workbench(pl_module: "LightningModule", work: Workbench, name: str) -> Workbench:
    """Puts the network of ``work`` into ``pl_module`` as submodule ``name``; returns ``work``."""
    work.network_name = name
    # A network held by a second name, or by the user, would otherwise stay behind in float.
    work.network = become(network_of(pl_module, name), work.network)
    if not is_whole(pl_module, name):
        pl_module.set_submodule(name, work.network)
    keep_networks(pl_module, _under_work(pl_module, work.network, name))
    setattr(pl_module, _ATTRIBUTE, work)
    # On the object and not on its class: other modules of that class stay as they are.
    pl_module.on_save_checkpoint = _SaveSpec(pl_module)  # type: ignore[method-assign]
    pl_module.on_load_checkpoint = _CheckSpec(pl_module)  # type: ignore[method-assign]
    lightning_module = package_of(pl_module).LightningModule
    for method in ("to_onnx", "to_torchscript"):
        # One that the user has written may well call ours.
        is_lightnings = getattr(type(pl_module), method, None) is getattr(
            lightning_module, method, 0
        )
        if is_lightnings and method not in vars(pl_module):
            setattr(pl_module, method, _FloatOnly(pl_module, method))
    return work


def _under_work(
    pl_module: "LightningModule", network: nn.Module, name: str
) -> dict[str, nn.Module]:
    """The submodules that hold a network under work, by name."""
    if not is_whole(pl_module, name):
        return {name: network}
    others = vars(network)["meta"].get(OUTSIDE, ())
    return {key: child for key, child in network.named_children() if key not in others}


def has_workbench(pl_module: nn.Module) -> bool:
    """Whether the network in ``pl_module`` is under work already."""
    return _ATTRIBUTE in pl_module.__dict__


def workbench_of(pl_module: nn.Module) -> Workbench:
    """The workbench that ``attach_workbench`` gave to ``pl_module``."""
    return pl_module.__dict__[_ATTRIBUTE]


def describe(pl_module: nn.Module) -> dict[str, Any]:
    """The entry in a checkpoint, as plain data: the network's attribute and its spec."""
    work = workbench_of(pl_module)
    return {"network": work.network_name, "spec": copy.deepcopy(spec_of(work.network))}


class _SaveSpec:
    """Calls the module's own ``on_save_checkpoint``, then adds the network's spec.

    Lightning skips callbacks where only weights are saved; it always asks the module, whatever
    trainer that is in.
    """

    def __init__(self, pl_module: "LightningModule") -> None:
        self.pl_module = pl_module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        # By the class: the attribute of the object is this wrapper.
        type(self.pl_module).on_save_checkpoint(self.pl_module, checkpoint)
        checkpoint[CHECKPOINT_KEY] = describe(self.pl_module)
        if "optimizer_states" not in checkpoint:  # not to go on from
            return
        trainer = self.pl_module.trainer
        if finetuning_in(trainer):
            checkpoint[CHECKPOINT_KEY]["frozen"] = frozen_in(self.pl_module)
        # Each of several processes has a state of its own, and only the first one writes.
        if trainer.world_size == 1:
            checkpoint[CHECKPOINT_KEY]["random_state"] = random_state()


class _CheckSpec:
    """Calls the module's own ``on_load_checkpoint``, then checks that the checkpoint fits.

    Lightning, in whatever trainer, loads the checkpoint's weights next.
    """

    def __init__(self, pl_module: "LightningModule") -> None:
        self.pl_module = pl_module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        module, name = self.pl_module, type(self.pl_module).__name__
        type(module).on_load_checkpoint(module, checkpoint)
        if CHECKPOINT_KEY not in checkpoint:
            raise QatTricksError(
                f"the checkpoint holds a float network and this {name} is quantized already: give "
                "a fresh one"
            )
        checkpoint["state_dict"] = matched(checkpoint["state_dict"], module)
        problem = differing(checkpoint["state_dict"], module) if module.strict_loading else ""
        if problem:
            raise QatTricksError(
                f"the checkpoint is of other steps than this {name} has been through ({problem}): "
                f"load it with qat_tricks.load_from_checkpoint({name}, path), and run what that "
                "returns without ckpt_path"
            )


class _FloatOnly:
    """Refuses a method that would write floats, or fail, where integers are wanted."""

    def __init__(self, pl_module: "LightningModule", method: str) -> None:
        self.pl_module, self.method = pl_module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        work, kind = workbench_of(self.pl_module), type(self.pl_module)
        whole = is_whole(self.pl_module, work.network_name)
        where = "module" if whole else f"module.{work.network_name}"
        if activation_quantizers(work.network):
            raise QatTricksError(
                f"{kind.__name__}.{self.method} cannot write a quantized network as integers: "
                + EXPORT.replace("network", where)
            )
        return getattr(kind, self.method)(self.pl_module, *args, **kwargs)
