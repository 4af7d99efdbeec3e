"""Keeps the user's optimizers right after surgery.

Each parameter that trains is in them exactly once, and none that surgery has removed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn
from torch.optim import Optimizer

BATCHNORM = "batchnorm"  # the name of a layer's own, see ``graph.layers``
Group = dict[str, Any]


def take_out(group: Group, wanted: set[int]) -> Group:
    """Takes the parameters with these ``id``s out of a parameter group.

    Returns:
        The parameters, and their names if the group has names.
    """
    # Parameters compare element by element, so identity decides.
    gone = [id(parameter) in wanted for parameter in group["params"]]
    taken: Group = {}
    for key in ("params", "param_names"):
        if key in group:
            taken[key] = [value for value, out in zip(group[key], gone, strict=True) if out]
            # In place, for LBFGS holds the same list.
            group[key][:] = [value for value, out in zip(group[key], gone, strict=True) if not out]
    return taken


def renew_parameters(
    optimizers: Sequence[Optimizer], network: fx.GraphModule, before: Iterable[nn.Parameter]
) -> None:
    """Mends optimizers that hold parameters from before the surgery.

    Surgery removes the parameters of folded BatchNorms: they leave the optimizers. It adds biases,
    and BatchNorms, to layers: their parameters join the group of the layer's weight, unless an
    optimizer has them already. Where the weight is frozen, and in no optimizer, they stand for a
    BatchNorm that was trained, and join the group that it has left.

    Args:
        optimizers: as the user has made them.
        network: after the surgery.
        before: the network's parameters before it.
    """
    now = dict(network.named_parameters())
    gone = {id(parameter) for parameter in before} - {id(parameter) for parameter in now.values()}
    left: list[tuple[Group, nn.Parameter]] = []
    for group in _groups(optimizers):
        for parameter in take_out(group, gone)["params"]:
            left.append((group, parameter))
            for optimizer in optimizers:
                # Momentum of a parameter that is gone would stay in memory and in checkpoints.
                optimizer.state.pop(parameter, None)
    # A bias that was there before and has no optimizer was left out by the user: it stays out.
    known = {id(parameter) for parameter in before} | _held(optimizers)
    for name, parameter in now.items():
        owner, _, kind = name.rpartition(".")
        is_of_batchnorm = owner.endswith(f".{BATCHNORM}")
        if (kind == "bias" or is_of_batchnorm) and id(parameter) not in known:
            layer = owner.removesuffix(f".{BATCHNORM}") if is_of_batchnorm else owner
            weight = now[f"{layer}.weight"]
            homes = [g for g in _groups(optimizers) if any(p is weight for p in g["params"])]
            if not homes and parameter.requires_grad:
                # A part of a BatchNorm behind a concat has another shape.
                same = [group for group, old in left if old.shape == parameter.shape]
                homes = [*same, *(group for group, _ in left)][:1]
            for group in homes:
                join(group, name, parameter)


def take_in(
    optimizers: Sequence[Optimizer], network: fx.GraphModule, scales: Sequence[nn.Parameter]
) -> None:
    """Adds the ``scales`` that no optimizer has to the network's main parameter group.

    That is the group with most of the network's parameters. If no group has any, nothing changes.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    # The group of the network's weights, and not that of a head or of biases, has the learning rate
    # that suits the scales.
    def share(group: Group) -> int:
        return sum(parameter.numel() for parameter in group["params"] if id(parameter) in names)

    home = max(_groups(optimizers), key=share, default=None)
    if home is None or share(home) == 0:
        return  # the network is not trained
    held = _held(optimizers)
    for scale in scales:
        if id(scale) not in held:
            join(home, names[id(scale)], scale)


def join(group: Group, name: str, parameter: nn.Parameter) -> None:
    """Adds a parameter, by its name in the network, to a parameter group."""
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)


def _groups(optimizers: Iterable[Optimizer]) -> list[Group]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _held(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(parameter) for group in _groups(optimizers) for parameter in group["params"]}
