"""Follows the channels of a layer's output to where another layer reads them."""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from qat_tricks.graph import nodes as n

_POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")


@dataclass(frozen=True, kw_only=True)
class ChannelAxis:
    """The dimension of a tensor that holds the channels of the layer before it."""

    # From the front if the rank is known, else -1: of a linear it is known only that they are last.
    index: int
    rank: int | None
    # Whether each channel's values lie side by side where positions are flattened into its
    # dimension.
    is_outer: bool = True

    def behind(self, node: fx.Node, traced: fx.GraphModule) -> "ChannelAxis | None":
        """The dimension behind ``node``, or None where channels mix or their place is not known.

        Args:
            node: reads the tensor; an operation that is homogeneous.
            traced: the network.
        """
        name = n.operation_of(node, traced).name
        if name in _POOLS:  # over the last two dimensions, whatever these are
            return self if self._from_the_back < -2 else None
        if name == "mean_of_positions":
            return self._behind_mean(n.arguments_of(node, traced))
        if name == "flatten":
            return self._behind_flatten(n.arguments_of(node, traced))
        return self

    def is_input_of(self, layer: Any, flat: int) -> bool:
        """Whether ``layer`` takes this dimension as its channels.

        Args:
            layer: a conv or linear.
            flat: how many of its inputs come from one channel.
        """
        if isinstance(layer, nn.Linear):
            return self._from_the_back == -1 and (flat == 1 or self.is_outer)
        return flat == 1 and self.index == 1 and self.rank == layer.weight.dim()

    @property
    def _from_the_back(self) -> int:
        return self.index if self.rank is None else self.index - self.rank

    def _behind_mean(self, arguments: n.Arguments) -> "ChannelAxis | None":
        if self.rank is None:
            return None
        dims = {dim % self.rank for dim in arguments["dim"]}
        if self.index in dims:
            return None
        if arguments.get("keepdim", False):
            return self
        before = sum(dim < self.index for dim in dims)
        return replace(self, index=self.index - before, rank=self.rank - len(dims))

    def _behind_flatten(self, arguments: n.Arguments) -> "ChannelAxis | None":
        start, end = arguments.get("start_dim", 0), arguments.get("end_dim", -1)
        if self.rank is None:  # channels stay last, perhaps with positions before each of them
            return replace(self, is_outer=False)
        start, end = start % self.rank, end % self.rank
        merged = replace(self, rank=self.rank - (end - start))
        if self.index < start or start == end:
            return merged
        if self.index > end:
            return replace(merged, index=self.index - (end - start))
        return replace(merged, index=start, is_outer=self.is_outer and self.index == start)


def channel_axis(layer: nn.Module) -> ChannelAxis:
    """The dimension of channels in the output of a conv or linear."""
    if isinstance(layer, nn.Linear):
        return ChannelAxis(index=-1, rank=None)
    weight: Any = layer.weight
    return ChannelAxis(index=1, rank=weight.dim())
