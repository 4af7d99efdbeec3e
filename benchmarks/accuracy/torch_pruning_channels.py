# python torch_pruning_channels.py NETWORK WEIGHTS IMAGES SHARE IMPORTANCE OUT
"""Removes channels with torch-pruning, in an environment of its own; ``channels.py`` starts it.

As its documentation has it: all layers compete (``global_pruning``), widths are multiples of 8, and
it goes on step by step, with importances anew, until the share of MACs is met.
"""

import sys

import torch
import torch_pruning
from networks import _cifar_resnet
from torch.nn import functional as F

IMPORTANCES = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
}
# The shortcut of these networks pads channels with zeros, which torch-pruning (1.6.1) does not see:
# left to itself it makes layers of widths that do not fit together. So what writes to the residual
# stream is named, as its documentation has it for such cases.
STREAM = ("conv1", "linear")


def is_second(name: str) -> bool:
    """Whether a layer is the second conv of a block."""
    return name.endswith(".conv2")


STEPS = 100  # from nothing to nine tenths


def main() -> None:
    name, weights, images_file, share, importance, out = sys.argv[1:]
    network = _cifar_resnet(name).eval()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    calibration = torch.load(images_file, weights_only=True)
    images, labels = calibration["images"], calibration["labels"]
    pruner = torch_pruning.pruner.BasePruner(
        network,
        images[:1],
        importance=IMPORTANCES[importance](),
        global_pruning=True,
        pruning_ratio=0.9,
        iterative_steps=STEPS,
        ignored_layers=[
            layer for name, layer in network.named_modules() if name in STREAM or is_second(name)
        ],
        round_to=8,
    )

    def macs() -> float:
        return float(torch_pruning.utils.count_ops_and_params(network, images[:1])[0])

    wanted = float(share) * macs()
    for _ in range(STEPS):
        if macs() <= wanted:
            break
        if importance == "taylor":
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()
        pruner.step()
    network(images[:2])  # it runs, or this fails
    torch.save(network.state_dict(), out)


if __name__ == "__main__":
    main()
