"""Self-attention as linears and float products.

Tricks can then reach the projections, which the replaced modules hide.

``nn.MultiheadAttention``: Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762),
section 3.2. torchvision's attention in shifted windows: Liu et al. 2021, "Swin Transformer" (arXiv
2103.14030), section 3.2, and Liu et al. 2022, "Swin Transformer V2" (arXiv 2111.09883), section 3.
Three functions that a tracer does not trace through hold all code that depends on the image's size:
two move tokens into windows and back, one masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_IN_WINDOWS = {"ShiftedWindowAttention", "ShiftedWindowAttentionV2"}
_MASKED = -100.0  # added to a score; the networks were trained with this number


def is_plain(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is self-attention without masks that does not return its weights."""
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
    """Self-attention with the parameters of ``module``, for a tracer to follow.

    Args:
        module: one of which ``is_plain`` is true.
        x: ``[N, L, E]``, as is the result.
    """
    heads, depth = module.num_heads, module.head_dim
    images, length = x.size(0), x.size(1)
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    # One linear makes all three, so that it is one layer to quantize; then heads come forward.
    query, key, value = (
        qkv.reshape(images, length, 3, heads, depth).permute(2, 0, 3, 1, 4).unbind(0)
    )
    weights = torch.softmax(torch.matmul(query * depth**-0.5, key.transpose(-2, -1)), dim=-1)
    if module.dropout > 0:
        # the tracer turns it into a module that follows the mode
        weights = F.dropout(weights, module.dropout, training=module.training)
    mixed = torch.matmul(weights, value).transpose(1, 2).reshape(images, length, heads * depth)
    return F.linear(mixed, module.out_proj.weight, module.out_proj.bias)


def is_in_windows(module: nn.Module) -> bool:
    """Whether ``module`` is torchvision's attention in shifted windows, of either version.

    A class derived from it may compute otherwise, and does not count.
    """
    return (
        type(module).__module__ == "torchvision.models.swin_transformer"
        and type(module).__name__ in _IN_WINDOWS
    )


def attend_in_windows(module: Any, x: Any) -> Any:
    """Self-attention within each window, with the parameters of ``module``, for a tracer to follow.

    Args:
        module: one of which ``is_in_windows`` is true.
        x: ``[N, H, W, E]``, as is the result.
    """
    heads, window, shift = module.num_heads, tuple(module.window_size), tuple(module.shift_size)
    depth = module.qkv.in_features // heads
    # Kept as nodes of the graph: the image's size may differ from call to call.
    rows, columns = x.size(1), x.size(2)
    qkv = _project(module, to_windows(x, window, shift))
    query, key, value = qkv.unflatten(-1, (3, heads, depth)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    if hasattr(module, "logit_scale"):  # V2 compares directions
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        query = query * torch.clamp(module.logit_scale, max=math.log(100.0)).exp()
    else:
        query = query * depth**-0.5
    scores = torch.matmul(query, key.transpose(-2, -1)) + module.get_relative_position_bias()
    if any(shift):
        scores = mask_windows(scores, rows, columns, window, shift)
    weights = torch.softmax(scores, dim=-1)
    if module.attention_dropout > 0:
        weights = F.dropout(weights, module.attention_dropout, training=module.training)
    mixed = module.proj(torch.matmul(weights, value).transpose(2, 3).flatten(3))
    if module.dropout > 0:
        mixed = F.dropout(mixed, module.dropout, training=module.training)
    return from_windows(mixed, rows, columns, window, shift)


def _project(module: Any, x: Any) -> Any:
    """Query, key and value; V2 ignores the part of the bias that belongs to keys."""
    bias = module.qkv.bias
    if bias is None or not hasattr(module, "logit_scale"):
        return module.qkv(x)
    width = module.qkv.in_features
    return F.linear(
        x,
        module.qkv.weight,
        torch.cat([bias[:width], torch.zeros_like(bias[:width]), bias[2 * width :]]),
    )


@fx.wrap
def to_windows(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The windows of ``x``, padded with zeros to full windows and rolled by ``shift``.

    Args:
        x: ``[N, H, W, C]``.
        window: rows and columns of a window.
        shift: by how many rows and columns to roll.

    Returns:
        ``[N, windows, tokens, C]``.
    """
    (rows, row_shift), (columns, column_shift) = _padded(x.size(1), x.size(2), window, shift)
    if (rows, columns) != (x.size(1), x.size(2)):
        x = F.pad(x, (0, 0, 0, columns - x.size(2), 0, rows - x.size(1)))
    return _partition(_roll(x, -row_shift, -column_shift), window)


@fx.wrap
def from_windows(
    x: Tensor, rows: int, columns: int, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """The inverse of ``to_windows``.

    Args:
        x: ``[N, windows, tokens, C]``.
        rows: of the image, in tokens.
        columns: of the image, in tokens.
        window: rows and columns of a window.
        shift: as in ``to_windows``.

    Returns:
        ``[N, rows, columns, C]``.
    """
    (padded_rows, row_shift), (padded_columns, column_shift) = _padded(rows, columns, window, shift)
    x = x.unflatten(2, tuple(window)).unflatten(
        1, (padded_rows // window[0], padded_columns // window[1])
    )
    # Windows and tokens interleave again to rows and columns.
    x = x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    return _roll(x, row_shift, column_shift)[:, :rows, :columns]


@fx.wrap
def mask_windows(
    scores: Tensor, rows: int, columns: int, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """Lowers the scores between tokens that only the roll has brought together.

    Args:
        scores: ``[N, windows, heads, tokens, tokens]``.
        rows: of the image, in tokens.
        columns: of the image, in tokens.
        window: rows and columns of a window.
        shift: as in ``to_windows``.
    """
    sides = _padded(rows, columns, window, shift)
    # Nothing was rolled where one window holds the whole image.
    if not any(by for _, by in sides):
        return scores
    wrapped_rows, wrapped_columns = (
        torch.arange(size, device=scores.device) >= size - by for size, by in sides
    )
    # 0 to 3: over which sides (rows, columns) the roll took a token to the other end.
    regions = wrapped_rows[:, None] + 2 * wrapped_columns
    regions = _partition(regions[None, :, :, None], window)  # [1, windows, tokens, 1]
    return scores + ((regions != regions.transpose(2, 3)) * _MASKED).to(scores.dtype).unsqueeze(2)


def _roll(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.roll(x, (rows, columns), (1, 2)) if rows or columns else x


def _partition(x: Tensor, window: Sequence[int]) -> Tensor:
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def _padded(
    rows: int, columns: int, window: Sequence[int], shift: Sequence[int]
) -> list[tuple[int, int]]:
    """For rows and for columns: the size in full windows, and by how much to roll.

    By nothing where one window holds all.
    """
    sizes = [
        math.ceil(size / side) * side for size, side in zip((rows, columns), window, strict=True)
    ]
    return [
        (size, by if size > side else 0)
        for size, side, by in zip(sizes, window, shift, strict=True)
    ]
