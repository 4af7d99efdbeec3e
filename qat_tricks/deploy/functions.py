"""Functions that PyTorch's exporter does not know, computed by others that it knows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat_tricks.deploy.pools import EXPORTABLE_POOLS


def _rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Of the slopes that training draws, evaluation takes the mean."""
    assert not training  # what is exported is in evaluation mode
    return F.leaky_relu(input, (lower + upper) / 2, inplace)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The exporter knows it with heads, in the dimension before the tokens."""
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    mask = args[0] if args else kwargs.pop("attn_mask", None)
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    query, key, value = (each.unsqueeze(1) for each in (query, key, value))
    rest = (mask, *args[1:])
    return F.scaled_dot_product_attention(query, key, value, *rest, **kwargs).squeeze(1)


_BY: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **EXPORTABLE_POOLS,
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    F.scaled_dot_product_attention: _attention,
}


class ExportableFunctions(TorchFunctionMode):
    """While it is active, functions that the exporter does not know go by what it knows."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls ``func``, or computes what it computes."""
        return _BY.get(func, func)(*args, **(kwargs or {}))
