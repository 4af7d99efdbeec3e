"""A network's values and spec at one moment, which can be put back."""

import copy
from collections.abc import Collection

import torch
from torch import Tensor, fx

from qat_tricks.graph.layers import activation_quantizers, is_layer, layers
from qat_tricks.graph.spec import spec_of
from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer

# What tricks note on convs and linears beside their values.
NOTES = ("folded", "equalized", "output_statistics")


class Snapshot:
    """The parameters, buffers and spec of a network, as they are when it is made.

    Objects stay as they are when values are put back, so that an optimizer and lists of the user's
    go on holding them. The graph is not a part of it.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.values = {name: value.clone() for name, value in _tensors(traced).items()}
        self.spec = copy.deepcopy(spec_of(traced))
        self.trained = {name: value.requires_grad for name, value in traced.named_parameters()}
        self.schemes = {name: quantizer.scheme for name, quantizer in _quantizers(traced).items()}
        self.notes = {
            name: {note: vars(module).get(note) for note in NOTES}
            for name, module in traced.named_modules()
            if is_layer(module)
        }

    @torch.no_grad()
    def restore(self, names: Collection[str] | None = None) -> None:
        """Puts everything back; or, of ``names``, what belongs to these layers and quantizers."""
        for name, layer in layers(self.traced).items():
            if layer.weight_quantizer is not None and (names is None or name in names):
                self._restore_scale(name, layer.weight_quantizer, layer.weight)
        for name, quantizer in _quantizers(self.traced).items():
            if name in self.schemes and (names is None or owner_of(f"{name}.scheme") in names):
                quantizer.scheme = self.schemes[name]
        for name, value in _tensors(self.traced).items():
            if names is not None and owner_of(name) not in names:
                continue
            if name in self.values:
                value.copy_(self.values[name])
                value.requires_grad_(self.trained.get(name, False))
            else:  # such as a mask that a trick has given to a layer
                owner, _, key = name.rpartition(".")
                setattr(self.traced.get_submodule(owner), key, None)
        for quantizer in activation_quantizers(self.traced).values():
            quantizer.refresh()
        for name, notes in self.notes.items():
            if names is None or name in names:
                vars(self.traced.get_submodule(name)).update(notes)
        if names is None:
            spec = spec_of(self.traced)
            spec.clear()
            spec.update(copy.deepcopy(self.spec))

    def _restore_scale(self, layer: str, quantizer: WeightQuantizer, weight: Tensor) -> None:
        """Gives or takes the scale that the quantizer of a layer has, or has not, of its own."""
        had_scale = f"{layer}.weight_quantizer.scale" in self.values
        if had_scale == (quantizer.scale is not None):
            return
        if had_scale:
            quantizer.own_scale(weight)
        else:
            quantizer.scale = None
        # Copied, for the spec of the snapshot is to stay as it is.
        spec_of(self.traced)["layers"][layer] = copy.deepcopy(self.spec["layers"][layer])

    def changed(self) -> list[str]:
        """The layers and quantizers of which a value is another one now."""
        owners = {}
        for name, value in _tensors(self.traced).items():
            before = self.values.get(name)
            # A range is NaN before calibration, and NaN equals nothing.
            if before is None or not torch.equal(before.nan_to_num(), value.nan_to_num()):
                owners[owner_of(name)] = True
        return list(owners)


def owner_of(name: str) -> str:
    """The layer or quantizer that a parameter or buffer of this name belongs to."""
    owner = name.rpartition(".")[0]
    return owner.removesuffix(".weight_quantizer").removesuffix(".batchnorm")


def _quantizers(traced: fx.GraphModule) -> dict[str, ActivationQuantizer | WeightQuantizer]:
    kinds = (ActivationQuantizer, WeightQuantizer)
    return {name: part for name, part in traced.named_modules() if isinstance(part, kinds)}


def _tensors(traced: fx.GraphModule) -> dict[str, Tensor]:
    return dict(traced.named_parameters()) | dict(traced.named_buffers())
