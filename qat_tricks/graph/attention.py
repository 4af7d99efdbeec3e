"""Self-attention as linears and float products, in place of ``nn.MultiheadAttention``, whose projections nothing could reach.

Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762), section 3.2.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def is_plain(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is self-attention without masks, of which the weights are not asked for."""
    return (
        len(args) == 3
        and args[0] is args[1] is args[2]
        and kwargs.get("need_weights", True) is False
        and all(value in (None, False) for value in kwargs.values())
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.batch_first
    )


def attend(module: nn.MultiheadAttention, x: Any) -> Any:
    """Self-attention of ``x``, ``[N, L, E]``, with the parameters of ``module``; for a tracer to follow."""
    heads, depth = module.num_heads, module.head_dim
    images, length = x.size(0), x.size(1)
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    query, key, value = qkv.reshape(images, length, 3, heads, depth).permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(torch.matmul(query * depth**-0.5, key.transpose(-2, -1)), dim=-1)
    if module.dropout > 0:
        weights = F.dropout(weights, module.dropout, training=False)  # the tracer turns it into a module that follows the mode
    mixed = torch.matmul(weights, value).transpose(1, 2).reshape(images, length, heads * depth)
    return F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
