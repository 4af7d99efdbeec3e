"""Convs and linears whose weight passes through a mask, then through a quantizer.

A layer is turned in place: its class changes, the object and its parameters stay. So every
reference that the user holds, in an optimizer or another attribute, goes on being right.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer
from qat_tricks.numerics import integer_kernels as kernels
from qat_tricks.numerics.fake_quantize import straight_through

# 1d to 3d, synchronized, and Lightning's replacement of a synchronized one
BATCHNORMS = (nn.modules.batchnorm._BatchNorm,)
PLAIN_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Those that a layer can have as its own; subclasses may compute more than their BatchNorm, such as
# the activation that follows.
OWN_BATCHNORMS = (*PLAIN_BATCHNORMS, nn.SyncBatchNorm)
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What is known of the BatchNorm that was folded into a layer."""

    eps: float
    momentum: float | None
    weight_trains: bool
    bias_trains: bool
    # The user held it in evaluation mode while the rest of the network trains.
    is_frozen: bool
    # The L2 norm of each channel's weight before, [C]; None in a network that was rebuilt.
    norms: Tensor | None
    # The user's own, which optimizers and lists of the user's may hold; None if it had other
    # channels than the layer. No child of the layer until it is given back.
    module: nn.Module | None


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """By what equalization has multiplied the channels of a conv or linear.

    Attributes:
        inputs: of the weight for its input channels, broadcasts to it.
        outputs: of the weight and bias for each output channel, ``[C]``.
    """

    inputs: Tensor
    outputs: Tensor


class Layer(nn.Module):
    """The common part of our convs and linears."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    # 0 or 1, of the weight's shape; None until a trick prunes.
    weight_mask: Tensor | None
    # None until quantizers are placed.
    weight_quantizer: WeightQuantizer | None
    # Normalizes the output in training, and is folded in evaluation; None for most layers.
    batchnorm: nn.Module | None
    # Equalization scales channels. Where these are not None, the parameters are trained as they
    # were before it: the weight is multiplied by the first, which broadcasts to it, and the bias,
    # or the BatchNorm's gain and bias, by the second, [C].
    weight_factor: Tensor | None
    output_factor: Tensor | None
    # What is known of the BatchNorm that was folded into the layer, and of its equalization.
    folded: Folded | None
    equalized: "Equalized | None"
    # For each call: its input quantizer, and its output quantizer if that is the only reader. In
    # tuples, so that they are not registered as children.
    calls: tuple[tuple[ActivationQuantizer | None, ActivationQuantizer | None], ...]
    input_quantizer: tuple[ActivationQuantizer, ...]  # those of all calls, each once
    # In evaluation: whether the output is rounded to its grid as the kernel rounds integer sums.
    rounds: bool = True
    channel_axis = 0  # the weight's dimension of output channels
    output_axis = 1  # the output's dimension of channels

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The conv or linear itself."""
        raise AssertionError(f"{type(self).__name__} does not compute")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A pickle of an earlier version has none of these.
        self._modules.setdefault("batchnorm", None)
        for name in ("weight_factor", "output_factor"):
            self._buffers.setdefault(name, None)
        for name in ("folded", "equalized"):
            self.__dict__.setdefault(name, None)

    def forward(self, input: Tensor, call: int = 0) -> Tensor:
        """The layer's output.

        Args:
            input: any floating type.
            call: which of the places where the network calls the layer; each has its own grids.
        """
        before, after = self.calls[call] if len(self.calls) > 0 else (None, None)
        if self.normalizes:
            return self._normalized(self._compute(input, self._quantized_weight(), self.bias))
        if self.training or not self.is_quantizing or before is None or not before.is_on:
            return self._compute(input, self.effective_weight(), self.effective_bias(before))
        if not (torch.is_grad_enabled() and self._is_differentiated(input)):
            return self._integer_forward(input, before, after)
        # Integers have no gradient: it goes through the computation on fake-quantized values.
        simulated = self._compute(input, self.effective_weight(), self.effective_bias(before))
        with torch.no_grad():
            exact = self._integer_forward(input, before, after)
        is_rounded = self.rounds and after is not None and after.is_on
        value = after.preimage(exact, simulated) if is_rounded and after is not None else exact
        return straight_through(value, simulated)

    def _is_differentiated(self, input: Tensor) -> bool:
        """Whether the output has a gradient where gradients are enabled."""
        return input.requires_grad or any(
            parameter.requires_grad for parameter in self.parameters()
        )

    def _integer_forward(
        self, input: Tensor, before: ActivationQuantizer, after: ActivationQuantizer | None
    ) -> Tensor:
        """Computes on integers held in float32, as the kernel does.

        Sums are then exact, so that a value near the middle between two steps is rounded to the
        same side here and there.
        """
        if torch.is_autocast_enabled(input.device.type):  # in 16 bits the sums would not be exact
            with torch.autocast(input.device.type, enabled=False):
                return self._integer_forward(input, before, after)
        scale = self.weight_scale(self.deployed_weight()).detach()
        input_scale = before.current_scale().detach()
        weight = torch.round(self.effective_weight() / scale)
        bias = self.deployed_bias()
        if bias is not None:
            bias = torch.round(bias.double() / self.bias_scale(before)).float()
        out = self._compute(torch.round(input / input_scale), weight, bias)
        step = (scale * input_scale).flatten()
        step = step if self.output_axis == -1 else step.view(-1, *[1] * (out.dim() - 2))
        if self.rounds and after is not None and after.is_on:
            return kernels.requantize(out, step, after)
        return out * step

    def masked_weight(self) -> Tensor:
        """The weight with pruned entries at exactly zero, and with equalized channels."""
        weight: Tensor = self.weight
        if self.weight_factor is not None:
            weight = weight * self.weight_factor
        return weight if self.weight_mask is None else weight * self.weight_mask

    @property
    def normalizes(self) -> bool:
        """Whether the output is normalized by the batch now, or as in training."""
        # bool() of a module: torch 2.11 cannot compile
        if self.batchnorm is None:
            return False
        # Statistics are estimated anew with only the BatchNorms in training mode.
        return self.training or self.batchnorm.training

    def _normalized(self, output: Tensor) -> Tensor:
        """The output after the layer's BatchNorm, which has the channels in dimension 1."""
        assert self.batchnorm is not None
        rows = output if self.output_axis == 1 else output.flatten(0, -2)
        if self.output_factor is None:
            return self.batchnorm(rows).view_as(output)
        norm: Any = self.batchnorm
        scaled = {name: value * self.output_factor for name, value in norm.named_parameters()}
        if type(norm) in PLAIN_BATCHNORMS:
            return _batch_norm(norm, rows, **scaled).view_as(output)
        # One that is synchronized between processes computes by its own forward.
        return functional_call(norm, scaled, (rows,)).view_as(output)

    @property
    def output_bias(self) -> Tensor | None:
        """The parameter that moves the output; a BatchNorm's comes after the layer's own bias."""
        return self.bias if self.batchnorm is None else self.batchnorm.bias  # type: ignore[return-value]

    def normalization(self) -> Tensor:
        """The BatchNorm's factor of each channel in evaluation, ``gamma / sqrt(var + eps)``.

        Returns:
            float64, ``[C]``.
        """
        norm: Any = self.batchnorm
        factor = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        return factor if self.output_factor is None else factor * self.output_factor.double()

    def deployed_weight(self) -> Tensor:
        """The weight of the layer as it is deployed: masked, and times the BatchNorm's factor."""
        weight = self.masked_weight()
        if self.batchnorm is None:
            return weight
        # In float64, so that the product is rounded once.
        return (weight.double() * self.of_channels(self.normalization())).to(weight.dtype)

    def weight_to_deploy(self, deployed: Tensor) -> Tensor:
        """The parameter with which the layer is deployed with the weight ``deployed``."""
        weight = deployed if self.weight_factor is None else deployed / self.weight_factor
        if self.batchnorm is None:
            return weight
        factor = self.of_channels(self.normalization()).to(weight.dtype)
        # A channel that the BatchNorm multiplies by 0 stays as it is.
        return torch.where(factor != 0, weight / factor, self.weight)

    def bias_change(self, shift: Tensor) -> Tensor:
        """The change of ``output_bias`` that moves the deployed output by ``shift``, ``[C]``."""
        return shift if self.output_factor is None else shift / self.output_factor

    def deployed_bias(self) -> Tensor | None:
        """The bias of the layer as it is deployed, with the BatchNorm folded in."""
        norm: Any = self.batchnorm
        if norm is None:
            scales = self.bias is not None and self.output_factor is not None
            return self.bias * self.output_factor if scales else self.bias  # type: ignore[operator]
        bias = -norm.running_mean.double()
        if self.bias is not None:
            bias = bias + self.bias.double()
        bias = bias * self.normalization()
        if norm.bias is not None:
            shift = norm.bias.double()
            bias += shift if self.output_factor is None else shift * self.output_factor.double()
        return bias.to(self.weight.dtype)

    @torch.no_grad()
    def make_deployed(self) -> None:
        """Gives the layer, for good, the parameters that it is deployed with.

        It computes what it did in evaluation.
        """
        weight, bias = self.deployed_weight(), self.deployed_bias()
        if self.weight_quantizer is not None and self.weight_quantizer.scale is not None:
            self.weight_quantizer.scale.copy_(self._deployed_scale(weight))
        self.weight.copy_(weight)
        if bias is not None:
            if self.bias is None:
                own: Any = self.batchnorm
                trains = self.weight if own.bias is None else own.bias
                self.bias = nn.Parameter(bias.clone(), requires_grad=trains.requires_grad)
            self.bias.copy_(bias)
        self.batchnorm = self.weight_factor = self.output_factor = None

    @torch.no_grad()
    def take_in_factors(self) -> None:
        """Multiplies the parameters, for good, by the factors that stand beside them."""
        if self.weight_factor is not None:
            self.weight.mul_(self.weight_factor)
        if self.output_factor is not None:
            own = self.batchnorm.parameters() if self.batchnorm is not None else [self.bias]
            for parameter in own:
                if parameter is not None:
                    parameter.mul_(self.output_factor)
        self.weight_factor = self.output_factor = None

    def _deployed_scale(self, weight: Tensor) -> Tensor:
        """The scale of ``weight``, which is deployed, as its quantizer has it."""
        assert self.weight_quantizer is not None
        scale = self.weight_quantizer.current_scale(weight)
        if self.batchnorm is None or self.weight_quantizer.scale is None:
            return scale
        # A scale of its own is that of the weight in training. So the integers stay.
        factor = self.of_channels(self.normalization()).abs()
        return (scale.double() * factor).to(scale.dtype).clamp_min(SMALLEST_NORMAL)

    def of_channels(self, values: Tensor) -> Tensor:
        """``values``, ``[C]``, in the shape of the weight's scale."""
        shape = [1] * self.weight.dim()
        shape[self.channel_axis] = -1
        return values.view(shape)

    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with: masked, then fake-quantized.

        The gradient reaches ``weight``.
        """
        if self.training:
            # A training step is spared the few extra operations of the deployed scale.
            return self._quantized_weight()
        weight = self.deployed_weight()
        if not self.is_quantizing:
            return weight
        assert self.weight_quantizer is not None
        return self.weight_quantizer(weight, self.weight_scale(weight))

    def _quantized_weight(self) -> Tensor:
        """The masked weight on its grid."""
        weight = self.masked_weight()
        if not self.is_quantizing:
            return weight
        assert self.weight_quantizer is not None
        return self.weight_quantizer(weight)

    def effective_bias(self, before: ActivationQuantizer | None = None) -> Tensor | None:
        """The bias that the layer computes with: in evaluation on the grid of the int32 bias.

        Args:
            before: the quantizer before the layer, by default that of its first call.
        """
        bias = self.deployed_bias()
        if bias is None or self.training or not self.is_quantizing or not self.has_input_scale:
            return bias
        scale = self.bias_scale(before)
        # The gradient passes straight through the rounding.
        on_grid = (torch.round(bias.detach() / scale) * scale).to(bias.dtype)
        return bias + (on_grid - bias).detach()

    @property
    def is_quantizing(self) -> bool:
        """Whether the layer's weight is fake-quantized now."""
        return self.weight_quantizer is not None and self.weight_quantizer.enabled

    @property
    def has_input_scale(self) -> bool:
        """Whether the layer's input is on a grid of known scale."""
        # bool() of a tuple: torch 2.11 cannot compile
        return len(self.input_quantizer) > 0 and self.input_quantizer[0].is_on

    def weight_scale(self, weight: Tensor) -> Tensor:
        """The scale of the deployed weight, shape ``[1, .., C, .., 1]``.

        The bias is stored in int32, in steps of input scale times weight scale. A channel whose
        weights are (nearly) 0 has so small a scale that its bias would overflow: there the scale is
        raised until the bias fits.
        """
        assert self.weight_quantizer is not None
        scale = self._deployed_scale(weight)
        if not self.has_input_scale:
            return scale
        input_scale = torch.stack(
            [quantizer.current_scale().detach() for quantizer in self.input_quantizer]
        ).amin()
        # Kernels take the product of both scales in float32, where it must be a normal number.
        least = 2 * SMALLEST_NORMAL / input_scale
        # A channel of zeros has the smallest scale, and stays one of zeros.
        scale = torch.where((scale > SMALLEST_NORMAL) & (scale < least), least, scale)
        bias = self.deployed_bias()
        if bias is None:
            return scale
        # 2 ** 30 leaves half of int32's range to the sums.
        smallest = bias.detach().float().abs() / (input_scale * 2.0**30)
        if scale.numel() == 1:
            return scale.clamp_min(float(smallest.max()))
        return torch.maximum(scale, smallest.view_as(scale))

    def bias_scale(self, before: ActivationQuantizer | None = None) -> Tensor:
        """The step of the int32 bias: input scale times weight scale, ``[C]``, float64.

        Args:
            before: the quantizer before the layer, by default that of its first call.
        """
        before = self.input_quantizer[0] if before is None else before
        scale = self.weight_scale(self.deployed_weight()).detach().flatten().double()
        return before.current_scale().detach().double() * scale


def _batch_norm(norm: Any, input: Tensor, *, weight: Tensor, bias: Tensor) -> Tensor:
    """The forward of a plain BatchNorm with another gain and bias; a call of it costs more."""
    momentum, counts = norm.momentum, norm.training and norm.track_running_stats
    if counts:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    # One that counts no more, as of a frozen part, still normalizes by the batch.
    known = counts or not norm.training
    return F.batch_norm(
        input,
        norm.running_mean if known else None,
        norm.running_var if known else None,
        weight,
        bias,
        norm.training,
        momentum or 0.0,
        norm.eps,
    )


class Conv1d(Layer, nn.Conv1d):  # type: ignore[misc]
    """A 1d conv."""

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)


class Conv2d(Layer, nn.Conv2d):  # type: ignore[misc]
    """A 2d conv."""

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)


class Conv3d(Layer, nn.Conv3d):  # type: ignore[misc]
    """A 3d conv."""

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)


class Linear(Layer, nn.Linear):  # type: ignore[misc]
    """A linear layer."""

    output_axis = -1

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(input, weight, bias)


LAYER_OF: dict[type[nn.Module], type[Layer]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Linear: Linear,
}


def is_layer(module: nn.Module | None) -> bool:
    """Whether ``module`` is a conv or linear that can be pruned and quantized.

    It may be a ``Layer`` already or not yet. One whose weight is no parameter is none: a hook, such
    as that of ``torch.nn.utils.weight_norm``, computes it anew at each call.
    """
    if isinstance(module, Layer):
        return True
    if module is None or type(module) not in LAYER_OF:
        return False
    # A mask of ``torch.nn.utils.prune`` is taken over when the network is traced.
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    return weight is not None


def as_layer(module: nn.Module) -> Layer:
    """Turns a conv or linear of ``torch.nn`` into the ``Layer`` of its kind, in place.

    A ``Layer`` stays as it is.
    """
    if not isinstance(module, Layer):
        module.__class__ = LAYER_OF[type(module)]
        layer = cast(Layer, module)
        layer.register_buffer("weight_mask", None)
        layer.register_module("weight_quantizer", None)
        layer.register_module("batchnorm", None)
        for name in ("weight_factor", "output_factor"):
            layer.register_buffer(name, None)
        for name in ("folded", "equalized"):
            layer.__dict__.setdefault(name, None)  # noted before, or not at all
        layer.calls = layer.input_quantizer = ()
    return cast(Layer, module)


def layers(network: nn.Module) -> dict[str, Layer]:
    """The ``Layer`` modules of ``network`` by name, in order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Layer)}


def activation_quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of ``network`` by name, in order."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def is_calibrated(network: nn.Module) -> bool:
    """Whether a network has activation quantizers, and all of them have a range."""
    quantizers = activation_quantizers(network).values()
    return len(quantizers) > 0 and all(quantizer.is_calibrated for quantizer in quantizers)
