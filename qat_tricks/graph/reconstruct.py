"""Learns the rounding of a block's weights so that its output comes near to the float one.

Nagel et al. 2020, "AdaRound" (arXiv 2004.10568); Li et al. 2021, "BRECQ" (arXiv 2102.05426), for
blocks of several layers; Wei et al. 2022, "QDrop" (arXiv 2203.05740): half of the activations,
drawn anew in each step, are not quantized, so that the weights suit other images too.

Where this differs:

- The error is measured in units of what it is before, so that one setting suits all blocks.
- Rounding is fixed layer by layer and part by part, and not driven by a regularizer (see
  ``numerics.soft_rounding``).
- The scales of the weights' channels are learned beside the rounding. Where a channel has few
  weights, as in a depthwise conv, they make up for much.
- Biases are learned beside the rounding, and take up the mean error.
- Activations of 8 bits are clipped and not rounded while weights are learned: beside weights of few
  bits that rounding is nothing, and it costs.
- So are those of the block's output, whatever their bits: that rounding is noise that no weight of
  the block can take away. Only the output's own scale learns from it.
- A step takes as many images as have about ``POSITIONS`` positions together.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.block_values import BlockInterpreter, KeptTensor
from qat_tricks.graph.blocks import Block
from qat_tricks.graph.integer_ops import Elementwise, Mean
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.logits import logits_of
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics.fake_quantize import fake_quantize_between
from qat_tricks.numerics.soft_rounding import SoftRounding, partly_rounded

POSITIONS = 25_000
BATCHES = (2, 32)  # the fewest and the most images of a step
# The shares of the steps between which weights are fixed, and in how many parts.
FIRST_FIXED, ALL_FIXED, PARTS = 0.1, 0.9, 64
FALLS = 0.7  # the share of the steps after which those of biases and scales become smaller
FINE_BITS = 8
# Of the draws of dropped values: how many are windows of one, and how far those may shift.
USES, SLACK = 24, 2**16


@dataclass(frozen=True, kw_only=True)
class ReconstructSettings:
    """How a block is learned.

    Raises:
        QatTricksError: everything that is wrong with the values, in one message.
    """

    iterations: int = 500
    # The share of activations that are not quantized in a step.
    drop: float = 0.5
    # Whether the scales of activations of fewer than 8 bits are learned beside the rounding.
    learn_activation_scales: bool = True
    # Steps of Adam: of the logits of the rounding, of scales relative to themselves, and of biases
    # relative to the spread of their channel.
    lr: float = 0.05
    scale_lr: float = 0.005
    bias_lr: float = 0.002

    def __post_init__(self) -> None:
        problems = []
        if self.iterations < 1:
            problems.append(f"iterations={self.iterations}: give 1 or more")
        if not 0 <= self.drop < 1:
            problems.append(f"drop={self.drop}: give a share from 0 to below 1")
        for name in ("lr", "scale_lr", "bias_lr"):
            if not getattr(self, name) >= 0:
                problems.append(f"{name}={getattr(self, name)}: give 0 or more")
        if problems:
            raise QatTricksError(f"not allowed: {'; '.join(problems)}")


class _LearnedLayer:
    """A layer whose rounding and bias are learned."""

    def __init__(self, layer: Layer, reference: nn.Module) -> None:
        assert layer.weight_quantizer is not None
        self.layer = layer
        weight = layer.deployed_weight().detach()
        self.scale = layer.weight_scale(weight).detach()
        scheme = layer.weight_quantizer.scheme
        present = torch.round(weight / self.scale).clamp(scheme.qmin, scheme.qmax)
        # A layer that no trick has touched is still one of torch.
        of_float: Any = (
            reference.deployed_weight() if isinstance(reference, Layer) else reference.weight
        )
        exact = of_float.detach().to(weight) / self.scale
        # Zeros that were pruned stay, whether a mask tells of them or not.
        stays = exact == 0
        if layer.weight_mask is not None:
            stays |= layer.weight_mask == 0
        self.rounding = SoftRounding(exact, present, stays & (present == 0), scheme)
        bias = layer.deployed_bias()
        self.bias = None if bias is None else bias.detach().clone()
        # By what the scale of each channel is multiplied, of the shape of the scale.
        self.ratio = torch.ones_like(self.scale).requires_grad_()
        # What is added to the bias, in units of the spread of each channel's output, [C].
        self.shift = torch.zeros(len(bias), device=weight.device) if bias is not None else None
        if self.shift is not None:
            self.shift.requires_grad_()
        self.spread = torch.ones(())

    def see(self, output: Tensor) -> None:
        """Takes the spread of the channels from an output of the layer."""
        by_channel = output.detach().movedim(self.layer.output_axis, 0).flatten(1)
        # That of a single value is no number.
        self.spread = by_channel.std(1, correction=0)

    def current(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, both of them differentiable."""
        weight = self.rounding.steps() * (self.scale * self.ratio)
        if self.bias is None or self.shift is None:
            return weight, None
        return weight, self.bias + self.shift * self.spread

    @torch.no_grad()
    def write(self) -> None:
        """Writes what was learned to the layer's own parameters."""
        layer = self.layer
        assert layer.weight_quantizer is not None
        assert layer.weight_quantizer.scale is not None
        layer.weight_quantizer.scale.mul_(self.ratio)
        _write_weight(layer, self.rounding.rounded() * (self.scale * self.ratio))
        bias: Any = layer.output_bias
        if self.shift is not None and bias is not None:
            shift = self.shift * self.spread
            bias.add_(shift if layer.output_factor is None else shift / layer.output_factor)


@torch.no_grad()
def put_on_grid(layer: Layer) -> None:
    """Gives a layer with a quantized weight that quantized weight: it computes the same."""
    weight = layer.deployed_weight()
    assert layer.weight_quantizer is not None
    _write_weight(layer, layer.weight_quantizer(weight, layer.weight_scale(weight)))


def _write_weight(layer: Layer, deployed: Tensor) -> None:
    """Sets the weight of ``layer`` so that it is deployed with the weight ``deployed``."""
    weight = deployed
    if layer.batchnorm is not None:
        factor = layer.of_channels(layer.normalization())
        weight = torch.where(factor == 0, layer.weight, weight / factor).to(weight.dtype)
    if layer.weight_factor is not None:
        weight = weight / layer.weight_factor
    layer.weight.copy_(weight)


class _LearnedScale:
    """An activation quantizer whose scale is learned, relative to the one that it has."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.begun_at = quantizer.current_scale().detach().clone()
        self.ratio = torch.ones_like(self.begun_at).requires_grad_()

    def current(self) -> Tensor:
        """The scale, differentiable."""
        return self.begun_at * self.ratio.clamp_min(0.1)

    @torch.no_grad()
    def write(self) -> None:
        """Writes the scale to the quantizer."""
        self.quantizer.move_scale(self.current())


class _Drop:
    """Draws which values are quantized in a step."""

    def __init__(self, drop: float, seed: int, device: torch.device) -> None:
        self.drop = drop
        self._places = torch.Generator().manual_seed(seed)  # read by the CPU
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drawn = torch.empty(0, device=device)
        self._uses = 0

    def draw(self, shape: torch.Size) -> Tensor:
        """1.0 where a value is quantized, else 0.0; of ``shape``, which is not written to."""
        number = shape.numel()
        if self._uses % USES == 0 or len(self._drawn) < number + SLACK:
            self._drawn = self._new(max(number + SLACK, len(self._drawn)))
        self._uses += 1
        # Draws of a few steps are windows of one: random numbers cost as much as a conv.
        windows = len(self._drawn) - number + 1
        start = int(torch.randint(windows, (), generator=self._places))
        return self._drawn[start : start + number].view(shape)

    def _new(self, number: int) -> Tensor:
        # A byte each: drawing 64 bits at a time is much cheaper than drawing floats.
        words = torch.empty(-(-number // 8), dtype=torch.int64, device=self._generator.device)
        words.random_(torch.iinfo(torch.int64).min, None, generator=self._generator)
        bytes_ = words.view(torch.uint8)[:number]
        return (bytes_ >= round(256 * self.drop)).float()


class _SoftInterpreter(BlockInterpreter):
    """Computes a block with soft rounding, and with activations dropped from quantization."""

    def __init__(
        self,
        network: fx.GraphModule,
        layers: Mapping[Layer, _LearnedLayer],
        scales: Mapping[ActivationQuantizer, _LearnedScale],
        drop: "_Drop | None",
        output: fx.Node,
    ) -> None:
        super().__init__(network)
        self.layers, self.scales = layers, scales
        self.drop = drop
        self.last, self.node = output, output
        self.unrounded: Tensor | None = None  # what the quantizer of the block's output takes
        self.looks = False  # whether layers see the spread of their outputs
        self.fixed: dict[Layer, tuple[Tensor, Tensor | None]] = {}
        self.soft: dict[Layer, tuple[Tensor, Tensor | None]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node."""
        self.node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layers, quantizers and kernels by their soft counterparts, others as they are."""
        module = self.fetch_attr(target)
        if isinstance(module, Layer):
            return self._layer_output(args[0], module)
        if isinstance(module, ActivationQuantizer):
            return self._quantized(args[0], module)
        if isinstance(module, Elementwise):
            return module.function(*args)
        if isinstance(module, Mean):
            return module._in_float(*args)
        return super().call_module(target, args, kwargs)

    def _layer_output(self, x: Tensor, layer: Layer) -> Tensor:
        if layer in self.layers:
            output = layer._compute(x, *self.soft[layer])
            if self.looks:
                self.layers[layer].see(output)
            return output
        if layer not in self.fixed:
            fixed = layer.effective_bias()
            self.fixed[layer] = (
                layer.effective_weight().detach(),
                None if fixed is None else fixed.detach(),
            )
        return layer._compute(x, *self.fixed[layer])

    def _quantized(self, x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
        low, high = quantizer.steps
        learned = self.scales.get(quantizer)
        scale = quantizer.current_scale().detach() if learned is None else learned.current()
        if self.node is self.last and learned is not None:
            self.unrounded = x.detach()
        if self.node is self.last or quantizer.scheme.bits >= FINE_BITS:
            return F.hardtanh(x, low * float(scale.detach()), high * float(scale.detach()))
        if self.drop is None:
            return fake_quantize_between(x, scale, low, high)
        return partly_rounded(x, scale, low, high, self.drop.draw(x.shape))

    def rounded_output(self) -> Tensor | None:
        """The block's output on its grid, differentiable in the scale of that if it is learned."""
        if self.unrounded is None:
            return None
        quantizer: Any = self.fetch_attr(str(self.last.target))
        scale = self.scales[quantizer].current()
        return fake_quantize_between(self.unrounded, scale, *quantizer.steps)


def images_of_a_step(positions: int, images: int) -> int:
    """How many images a step takes, from the most positions that a layer of the block has."""
    fewest, most = BATCHES
    return min(images, max(fewest, min(most, POSITIONS // max(positions, 1))))


def share_fixed(progress: float, place: int, layers: int) -> float:
    """The share of a layer's weights that are fixed after a share ``progress`` of the steps.

    Args:
        progress: 0 to 1.
        place: the layer's among those of the block, from 0.
        layers: their number.
    """
    # One layer after the other: those behind it make up for what its rounding has cost.
    done = (progress - FIRST_FIXED) / (ALL_FIXED - FIRST_FIXED) * layers
    return min(1.0, max(0.0, done - place))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A block to learn, and what it is learned on."""

    block: Block  # of the quantized network
    # The layers to learn, each with its float counterpart, and the quantizers whose scale is.
    layers: Mapping[Layer, nn.Module]
    quantizers: Sequence[ActivationQuantizer]
    # The block's inputs in the quantized and in the float network, by the names of their nodes.
    quantized: Mapping[str, KeptTensor]
    exact: Mapping[str, KeptTensor]
    # The block's output in the float network, and the mean squared error of it before.
    target: KeptTensor
    error: float
    images: int
    batch: int  # images of a step
    seed: int  # of the order of images, and of what is dropped


def reconstruct(
    network: fx.GraphModule,
    task: Task,
    settings: ReconstructSettings,
    step_done: Callable[[], None] = lambda: None,
) -> None:
    """Learns a block and writes the result to its layers and quantizers.

    Args:
        network: the quantized network, in evaluation mode.
        task: what to learn.
        settings: how.
        step_done: called after each step.
    """
    layers = {layer: _LearnedLayer(layer, of) for layer, of in task.layers.items()}
    scales = {quantizer: _LearnedScale(quantizer) for quantizer in task.quantizers}
    device = task.target.device
    drop = _Drop(settings.drop, task.seed, device) if settings.drop > 0 else None
    soft = _SoftInterpreter(network, layers, scales, drop, task.block.output)
    optimizer = _optimizer(layers.values(), scales.values(), settings)
    schedule = _schedule(optimizer, settings.iterations)
    every = math.ceil(settings.iterations / PARTS)
    # Sums over weights, so that gradients are far above Adam's epsilon.
    number = max(sum(layer.rounding.number for layer in layers.values()), 1)
    order = _orders(task.images, task.batch, task.seed)
    for step in range(settings.iterations):
        picked = next(order).to(device)
        inputs = {node.name: _mixed(node.name, picked, task, drop) for node in task.block.inputs}
        soft.soft = {layer: of_layer.current() for layer, of_layer in layers.items()}
        soft.looks = step == 0
        output = logits_of(soft.compute(task.block, inputs))
        target = task.target.of(picked)
        loss = F.mse_loss(output, target)
        rounded = soft.rounded_output()
        if rounded is not None:
            loss = loss + F.mse_loss(rounded, target)
        loss = loss * (number / task.error)
        if not loss.requires_grad:  # such as the layers of another head than the one compared
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == settings.iterations - 1:
            progress = (step + 1) / settings.iterations
            for place, of_layer in enumerate(layers.values()):
                of_layer.rounding.fix(share_fixed(progress, place, len(layers)))
        step_done()
    for learned in layers.values():
        learned.write()
    for scale in scales.values():
        scale.write()


def _optimizer(
    layers: Iterable[_LearnedLayer], scales: Iterable[_LearnedScale], settings: ReconstructSettings
) -> torch.optim.Optimizer:
    layers = list(layers)
    ratios = [layer.ratio for layer in layers]
    groups: list[dict[str, Any]] = [
        {"params": [x.shift for x in layers if x.shift is not None], "lr": settings.bias_lr},
        {"params": [*ratios, *(scale.ratio for scale in scales)], "lr": settings.scale_lr},
        {"params": [layer.rounding.logit for layer in layers], "lr": settings.lr, "rounds": True},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]], eps=1e-12)


def _schedule(
    optimizer: torch.optim.Optimizer, iterations: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Lets the steps of biases and scales end; those of the rounding stay until all is fixed."""

    def falling(step: int) -> float:
        return min(1.0, (1 - step / iterations) / (1 - FALLS))

    def constant(step: int) -> float:
        return 1.0

    factors: list[Callable[[int], float]] = [
        constant if "rounds" in group else falling for group in optimizer.param_groups
    ]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _orders(images: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The numbers of the images of each step: all of them in some order, then in another."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    while True:
        order = torch.randperm(images, generator=generator)
        for start in range(0, images - batch + 1, batch):
            yield order[start : start + batch]


def _mixed(name: str, picked: Tensor, task: Task, drop: _Drop | None) -> Tensor:
    """An input of the block, of which some values are those of the float network."""
    values = task.quantized[name].of(picked)
    if drop is None or not values.is_floating_point():
        return values
    return torch.lerp(task.exact[name].of(picked), values, drop.draw(values.shape))
