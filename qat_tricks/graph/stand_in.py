"""What stands where a BatchNorm was, for users who reach for it by its name."""

from typing import Any

from torch import nn

from qat_tricks.graph.layers import Layer

_SHOWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SETTINGS = ("eps", "momentum", "track_running_stats")


class BatchNormStandIn(nn.Identity):
    """Passes values on, and hands what is asked of it to the BatchNorm that its layer has now.

    So ``network.bn1.eval()`` holds that one in evaluation mode, and ``network.bn1.weight`` is its
    gain. While the layer has none, it is an ``nn.Identity``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the layer is not registered as a child.
        self.__dict__["_layer"] = (layer,)

    def _own(self) -> nn.Module | None:
        (layer,) = self.__dict__["_layer"]
        return layer.batchnorm if isinstance(layer, Layer) else None

    def train(self, mode: bool = True) -> "BatchNormStandIn":
        """Sets the mode of both."""
        own = self._own()
        if own is not None:
            own.train(mode)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> "BatchNormStandIn":
        """Lets the parameters of the BatchNorm train, or not."""
        own = self._own()
        if own is not None:
            own.requires_grad_(requires_grad)
        return self

    def __getattr__(self, name: str) -> Any:
        own = self._own() if name in (*_SHOWN, *_SETTINGS) else None
        return super().__getattr__(name) if own is None else getattr(own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = self._own() if name in (*_SHOWN, *_SETTINGS) else None
        if own is None:
            super().__setattr__(name, value)
        else:
            setattr(own, name, value)
