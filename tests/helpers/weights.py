"""Figures of a quantized module's weights."""

import torch

from qat_tricks.graph import layers


def zeros(lit):
    """The share, 0..1, of the weights of the backbone of ``lit`` that are zero."""
    weights = [layer.effective_weight().flatten() for layer in layers(lit.backbone).values()]
    return float((torch.cat(weights) == 0).float().mean())
