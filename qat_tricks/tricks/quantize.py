"""Place quantizers where integer kernels have them; weights get their scales at once.

Weights of 5 and more bits take the scale of their largest value, and it goes on following the
weight. Below that, rounding is so coarse that clipping pays: each channel takes the scale of least
squared error. A BatchNorm that was not folded becomes a part of its layer, and is folded there
whenever the network does not train.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import fx

from qat_tricks.graph.finite import check_finite
from qat_tricks.graph.fold import attach_batchnorms
from qat_tricks.graph.inputs import input_names
from qat_tricks.graph.integers import note_integers
from qat_tricks.graph.layers import layers
from qat_tricks.graph.other_bits import fit_low_bit_scale
from qat_tricks.graph.place import place_quantizers
from qat_tricks.graph.quantize_settings import FUNCTIONS, QuantizeSettings
from qat_tricks.graph.spec import mixed_precision_of, spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics.scheme import DEFAULT_ACTIVATIONS
from qat_tricks.trainer.trick import Trick


def quantize(
    traced: fx.GraphModule, settings: QuantizeSettings | None = None, **changes: Any
) -> fx.GraphModule:
    """Places quantizers and gives low-bit weights scales of their own; ``calibrate`` comes next.

    Where some inputs of ``traced`` are integers that meet others in a sum or product,
    ``note_integers`` comes first.

    Args:
        traced: a traced network without quantizers; it is changed in place.
        settings: by default those of ``QuantizeSettings``.
        changes: fields of ``QuantizeSettings`` to change in ``settings``, as ``weight_bits=4``.

    Raises:
        QatTricksError: see ``place_quantizers``.
    """
    attach_batchnorms(traced)
    place_quantizers(traced, settings, **changes)
    for name, layer in layers(traced).items():
        quantizer = layer.weight_quantizer
        if quantizer is not None and fit_low_bit_scale(quantizer, layer):
            # A rebuilt network so gets the parameter that the checkpoint has a value for.
            spec_of(traced)["layers"][name]["scale"] = True
    return traced


class Quantize(Trick):
    """Callback of ``quantize``; its arguments are the fields of ``QuantizeSettings``."""

    after = ("prune_channels", "fold_batchnorm", "equalize")
    needs_float = True
    quantizes = True
    decisive = frozenset(field.name for field in fields(QuantizeSettings))

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int = 8,
        first_last_bits: int | None = 8,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, int]] | None = None,
        activations: str | None = None,
        functions: str | None = None,
    ) -> None:
        super().__init__()
        # Made now, so that wrong settings are refused before anything is trained.
        self.settings = QuantizeSettings(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            first_last_bits=first_last_bits,
            include=include,
            exclude=exclude,
            overrides=overrides or {},
            activations=activations,
            functions=functions,
        )

    def arguments(self) -> dict[str, Any]:
        """The settings, with what None means where there is no target."""
        settings = super().arguments()
        defaults = {"activations": DEFAULT_ACTIVATIONS, "functions": FUNCTIONS[0]}
        return {key: value or defaults.get(key, value) for key, value in settings.items()}

    def check_done(self, work: Workbench, recipe: Collection[str]) -> None:
        """Tells also where bits were chosen that the recipe does not choose."""
        super().check_done(work, recipe)
        if "mixed_precision" not in recipe and mixed_precision_of(work.network) is not None:
            warnings.warn(
                "mixed_precision has chosen the bits of each layer, and the recipe is without it: "
                "they stay as they are; give the float network to have the recipe's",
                stacklevel=2,
            )

    def restructure(self, work: Workbench) -> None:
        """Places the quantizers."""
        # Token ids and masks come only beside other inputs; a single input is images.
        if len(input_names(work.network)) > 1:
            note_integers(work.network, work.batches(2)[0])
        quantize(work.network, self.settings)

    def apply(self, work: Workbench) -> None:
        """Keeps a float reference, then places the quantizers."""
        check_finite(work.network)
        # Both networks compute layers with their BatchNorm.
        attach_batchnorms(work.network)
        # Before the quantizers: bias correction compares with this float copy.
        work.keep_reference()
        self.restructure(work)
        work.check_function("quantizers placed")
