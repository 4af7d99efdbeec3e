"""The spec: a record of the changes to a network, as plain data; it travels in the checkpoint.

::

    untraced     [pattern, ...]                submodules that were not traced through
    trace        {setting: bool}               how the network was traced (``TraceSettings``)
    code         {"torch", "sha256"}           the fingerprint of the code that was traced
    equivalence  [step, ...]                   what each step has left of the user's network
    channels     {"macs": [before, after], "parameters": [before, after], "latency_ms"?: likewise,
                  "groups": [{"name", "channels": [before, after]}, ...], "fixed": {layer: reason},
                  "shapes": {tensor: [int, ...], "<conv>.groups": [int]}}
                                               channels that were removed
    folded       [[layer, batchnorm], ...]     BatchNorms folded into the layer before them, or
                                               into the layers whose outputs are concatenated
    attached     [[layer, batchnorm], ...]     BatchNorms that their layer folds in evaluation
    convs        [batchnorm, ...]              BatchNorms that became depthwise convs
    uncapped     [node, ...]                   ReLU6 that became ReLU for equalization
    gated        [node, ...]                   SiLU and the like, split into a gate and a product
    layers       {name: {"weight": scheme, "scale": bool, "learned": bool, "mask": bool,
                         "batchnorm": {"eps": float, "momentum": float | None},
                         "factors": bool}}
    activations  {name: {"scheme": scheme, "activation": "relu" | "relu6" | None,
                         "nodes": [node, ...], "learned": bool, "low": bool,
                         "readers": [node, ...]}}
                                               with "readers", only these layers read it, and it
                                               stands behind the quantizer that the others read
    proofs       [proof, ...]                  what each trick did to the output (``graph.proof``)
    mixed_precision {"budget", "share", "reached", "parts": [{"name", "kind", "bits", "kl"}, ...]}
                                               bits that were chosen, and the error of each part
    applied      [trick, ...]                  tricks done in the current stage
    history      [trick, ...]                  tricks done in all stages
    settings     {trick: {setting: value}}     of tricks that have no part in training

``node`` is a node's name in the traced graph. ``layer``, ``batchnorm`` and the ``name`` of an entry
in ``layers`` are names of submodules. Values (weights, scales, zero points, masks) are in the state
dict, under the keys that ``surgery.rebuild`` creates again.
"""

from typing import Any

from torch import fx, nn

from qat_tricks.errors import QatTricksError

# Where surgery adds its submodules, and so the prefixes of their keys in the state dict.
QUANTIZERS, KERNELS = "activation_quantizers", "kernels"
NARROW = "_for_layers"  # ends the name of a quantizer that has "readers"


def spec_of(traced: fx.GraphModule) -> dict[str, Any]:
    """The spec of a network that ``trace`` made, to read and to add to.

    Raises:
        QatTricksError: something else traced the network.
    """
    if "qat_tricks" not in traced.meta:
        raise QatTricksError(
            "this network was not traced by qat_tricks: call qat_tricks.graph.trace(network) first"
        )
    return traced.meta["qat_tricks"]


def channels_of(network: nn.Module) -> dict[str, Any] | None:
    """The channels removed from ``network``, as its spec has them, without the shapes."""
    meta: Any = getattr(network, "meta", {})
    entry = meta.get("qat_tricks", {}).get("channels")
    return entry and {key: value for key, value in entry.items() if key != "shapes"}


def mixed_precision_of(network: nn.Module) -> dict[str, Any] | None:
    """The bits that were chosen for ``network``, as its spec has them; None if none were."""
    meta: Any = getattr(network, "meta", {})
    return meta.get("qat_tricks", {}).get("mixed_precision")
