"""The network inside of what wraps it for speed or for several devices."""

import torch
from torch import nn

from qat_tricks.errors import QatTricksError


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    They hold the network itself, with its parameters. Any other module is returned as it is.

    Raises:
        QatTricksError: it is a TorchScript module, whose Python code is lost.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise QatTricksError(
            "the network is a TorchScript module, which can be neither traced nor exported: give "
            "the network from before torch.jit.script or torch.jit.trace"
        )
    inner = getattr(network, "_orig_mod", None)  # of torch.compile
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = network.module
    return unwrapped(inner) if isinstance(inner, nn.Module) else network
