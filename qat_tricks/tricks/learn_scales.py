"""Learn the scales together with the weights.

Esser et al. 2020, "Learned Step Size Quantization" (arXiv 1902.08153): the gradient is in
``numerics.fake_quantize``; here the scales, begun at the calibrated range, become trainable and
reach the user's optimizer in a group of their own, without weight decay.

Where this differs: weights of 5 and more bits keep the scale that follows their largest value.
Nothing clips there, so there is nothing to learn, and their backward costs nothing. The scale of
the network's input stays as calibrated: the images do not change. So do the scales of what the user
froze: those of frozen weights, and those of activations that come from layers, or other modules, in
which no parameter trains. So do those around a hardsigmoid that only clips integers, which other
scales would make a function to compute. With ``stop`` scales hold still in the last part of the
training, so that weights settle on grids that move no more.

Bhalgat et al. 2020, "LSQ+" (arXiv 2004.09576): with ``offsets`` the smallest value of a range below
8 bits is learned too, where no ReLU sets it to 0, as behind SiLU or a bottleneck. Where this
differs: it is rounded to the grid, so that 0.0 stays exact and the grid has an integer zero point.
"""

import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.hard_sigmoids import aligned_scales
from qat_tricks.graph.integer_ops import Kernel
from qat_tricks.graph.layers import Layer, activation_quantizers, is_calibrated, layers
from qat_tricks.graph.settle import settle_grids
from qat_tricks.graph.spec import QUANTIZERS, spec_of
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.two_modes import EVALUATION, only_in
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics.scheme import MAX_BITS
from qat_tricks.trainer.finetuning import finetuning_in, follow_unfrozen, restores_groups
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.optimizers import take_in
from qat_tricks.trainer.scale_groups import give_scales_own_group, rates_with_scales
from qat_tricks.trainer.scale_steps import ScaleSteps
from qat_tricks.trainer.schedule import check_fraction, fit_progress, is_last_batch
from qat_tricks.trainer.trick import Trick
from qat_tricks.tricks.calibrate import Calibrate

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def learn_scales(traced: fx.GraphModule, offsets: bool = False) -> list[nn.Parameter]:
    """Makes the scales of ``traced`` trainable and returns them.

    Args:
        traced: quantized and calibrated.
        offsets: whether the smallest values of ranges below 8 bits learn as well, and are returned.

    Raises:
        QatTricksError: there are no quantizers, or they have no range yet.
    """
    quantizers = activation_quantizers(traced)
    if not is_calibrated(traced):
        raise QatTricksError(
            "scales can be learned only from a range: quantize and calibrate first"
        )
    spec = spec_of(traced)
    scales = []
    # Quantizers of the network's own inputs, whose scales stay.
    of_inputs = {
        str(node.target)
        for node in traced.graph.nodes
        if node.op == "call_module"
        and node.all_input_nodes
        and node.all_input_nodes[0].op == "placeholder"
    }
    stay = of_inputs | _of_frozen_parts(traced) | _of_evaluation_only(traced)
    aligned = aligned_scales(traced)
    for name, quantizer in quantizers.items():
        if quantizer in aligned:
            continue
        entry = spec["activations"][name.removeprefix(f"{QUANTIZERS}.")]
        if offsets and name not in of_inputs and _has_offset(quantizer):
            # Also of what is frozen: a network's copies must have what is learned once it is not.
            entry["low"] = True
            quantizer.own_low()
        if name not in stay:
            entry["learned"] = True
            for parameter in quantizer.parameters():
                parameter.requires_grad_()
                scales.append(parameter)
    for name, layer in layers(traced).items():
        scale = None if layer.weight_quantizer is None else layer.weight_quantizer.scale
        if scale is not None and layer.weight.requires_grad:
            spec["layers"][name]["learned"] = True
            scale.requires_grad_()
            scales.append(scale)
    return scales


def _has_offset(quantizer: ActivationQuantizer) -> bool:
    """Whether there is a zero point to learn: coarse enough to matter, and free to move."""
    scheme = quantizer.scheme
    return quantizer.activation is None and not scheme.symmetric and scheme.bits < MAX_BITS


def _of_frozen_parts(traced: fx.GraphModule) -> set[str]:
    """The activation quantizers of which all values come straight from frozen layers."""
    trains: dict[str, list[bool]] = {}
    for node in traced.graph.nodes:
        if isinstance(module_of(node, traced), ActivationQuantizer):
            trains.setdefault(str(node.target), []).extend(_sources_train(node, traced))
    return {name for name, sources in trains.items() if sources and not any(sources)}


def _sources_train(quantizer: fx.Node, traced: fx.GraphModule) -> list[bool]:
    """For each nearest layer before ``quantizer``, whether it has a parameter that trains."""
    seen: set[fx.Node] = set()
    left, found = list(quantizer.all_input_nodes), []
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        module = module_of(node, traced)
        own: list[Any] = []
        if node.op == "get_attr":
            own = [operator.attrgetter(str(node.target))(traced)]
        elif module is not None and not isinstance(module, (ActivationQuantizer, Kernel)):
            own = list(module.parameters(recurse=not isinstance(module, Layer)))
        if own:
            found.append(any(getattr(value, "requires_grad", False) for value in own))
        else:
            left += node.all_input_nodes
    return found


def _of_evaluation_only(traced: fx.GraphModule) -> set[str]:
    """The quantizers that training does not pass, whose scales would get no gradient."""
    absent = only_in(traced.graph, EVALUATION)
    return {str(node.target) for node in absent} - {
        str(node.target) for node in traced.graph.nodes if node not in absent
    }


def first_not_finite(traced: fx.GraphModule) -> str | None:
    """The first parameter of ``traced`` with NaN or infinity, as text, or None.

    Scales come before other parameters, each in the order of the calls.
    """
    called = dict.fromkeys(
        str(node.target) for node in traced.graph.nodes if node.op == "call_module"
    )
    bad = [
        (kind, name)
        for name in called
        for kind, parameter in traced.get_submodule(name).named_parameters()
        if not bool(torch.isfinite(parameter).all())
    ]
    # A scale that is not finite spreads to the weights of its layer, so it is the cause.
    bad.sort(key=lambda found: not found[0].endswith("scale"))
    return f"the {bad[0][0].replace('_', ' ').replace('.', ' ')} of {bad[0][1]}" if bad else None


def _learned(network: fx.GraphModule) -> dict[str, nn.Parameter]:
    """The scales that learn, by the name of the quantizer or the layer."""
    of_weights = {
        name: layer.weight_quantizer.scale
        for name, layer in layers(network).items()
        if layer.weight_quantizer is not None and layer.weight_quantizer.scale is not None
    }
    of_activations = {name: q.scale for name, q in activation_quantizers(network).items()}
    both = of_activations | of_weights
    return {name: scale for name, scale in both.items() if scale.requires_grad}


def _learned_lows(network: fx.GraphModule) -> list[nn.Parameter]:
    """The smallest values of ranges that learn."""
    lows = [quantizer.low for quantizer in activation_quantizers(network).values()]
    return [low for low in lows if low is not None and low.requires_grad]


def _rates(trainer: "Trainer") -> str:
    """The learning rates of all groups, as text."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return ", ".join(f"{float(group['lr']):.3g}" for group in groups)


class LearnScales(Trick):
    """Callback of ``learn_scales``.

    Args:
        lr_factor: learning rate of the scales over that of the weights; None: 0.1 for SGD, 0.01 for
            adaptive optimizers.
        stop: the fraction of the fit from which the scales hold still.
        offsets: see ``learn_scales``.

    Raises:
        QatTricksError: a setting that is not allowed.
    """

    requires = (Calibrate,)
    after = ("correct_weights", "correct_bias")

    def __init__(
        self, lr_factor: float | None = None, stop: float = 1.0, offsets: bool = False
    ) -> None:
        super().__init__()
        if lr_factor is not None and not 0 < lr_factor < float("inf"):
            raise QatTricksError(
                f"lr_factor={lr_factor} is not allowed: give a number above 0, or null for the "
                "default"
            )
        self.lr_factor, self.stop = lr_factor, check_fraction("stop", stop)
        self.offsets = offsets
        self._handles: list[Any] = []
        self._steps: ScaleSteps | None = None

    def apply(self, work: Workbench) -> None:
        """Makes the scales trainable."""
        learn_scales(work.network, self.offsets)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Gives the scales groups of their own, adjusts their gradients and limits their steps."""
        network = workbench_of(pl_module).network
        self._let_go()
        if not restores_groups(trainer):
            learned = [*_learned(network).values(), *_learned_lows(network)]
            self._give_group(trainer, network, learned)
        self._steps = ScaleSteps(trainer.optimizers)
        self._watch(trainer, network)

    def _give_group(
        self, trainer: "Trainer", network: fx.GraphModule, scales: list[nn.Parameter]
    ) -> None:
        # An optimizer made before the tricks does not know the scales.
        take_in(trainer.optimizers, network, scales)
        configs = trainer.lr_scheduler_configs
        for optimizer in trainer.optimizers:
            schedulers = [
                c.scheduler for c in configs if getattr(c.scheduler, "optimizer", None) is optimizer
            ]
            give_scales_own_group(optimizer, scales, schedulers, self.lr_factor)

    def _watch(self, trainer: "Trainer", network: fx.GraphModule) -> None:
        """Adjusts the gradients of learned scales, and limits their steps."""

        def as_of_one_batch(gradient: Tensor) -> Tensor:
            # LSQ's factor is that of the batch a process sees at a time; the batch of a step is
            # that of all of them.
            return gradient * (trainer.world_size * trainer.accumulate_grad_batches) ** -0.5

        for handle in self._handles:
            handle.remove()
        # LSQ's factor of a weight's scale does not depend on the batch.
        self._handles = [
            parameter.register_hook(as_of_one_batch)
            for quantizer in activation_quantizers(network).values()
            for parameter in quantizer.parameters()
            if parameter.requires_grad
        ]
        assert self._steps is not None
        self._steps.watch(_learned(network), _learned_lows(network))

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Learns the scales of what a finetuning callback has unfrozen, and no others."""
        if self.stop < 1 and self._steps is not None:
            self._steps.holds = fit_progress(trainer) >= self.stop
        if batch_idx > 0 or not finetuning_in(trainer):
            return
        network = workbench_of(pl_module).network
        scales = learn_scales(network, self.offsets)
        make_group = partial(self._give_group, trainer, network, scales)
        follow_unfrozen(trainer, pl_module, scales, make_group)
        self._watch(trainer, network)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Gives Lightning's averaging of weights a rate for each group."""
        averaging = package_of(trainer).callbacks.StochasticWeightAveraging
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # It would give all groups one rate when its epoch comes.
            if isinstance(callback, averaging):
                callback._swa_lrs = rates_with_scales(callback._swa_lrs, trainer.optimizers[0])

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Moves learned scales off rounding ties, if the fit has ended otherwise."""
        self._let_go()
        # After callbacks that average have put their scales in.
        settle_grids(workbench_of(pl_module).network)

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Takes the hooks off the scales."""
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._steps is not None:
            self._steps.let_go()
        self._steps = None

    def on_train_batch_end(self, trainer: "Trainer", pl_module: "LightningModule", *_: Any) -> None:
        """Names scales that run away; moves them off rounding ties before the last checkpoint."""
        if is_last_batch(trainer):
            settle_grids(workbench_of(pl_module).network)
        # A look at them waits for the GPU, so it is taken only as often as values are logged.
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._steps is not None and trainer.fit_loop.epoch_loop.batch_idx % every == 0:
            for name, ratio in self._steps.running_away():
                rank_zero_warn(
                    f"the scale of {name} runs away: in step {trainer.global_step} it is "
                    f"{ratio:.3g} times what was calibrated; lower the learning rate "
                    f"({_rates(trainer)}), or clip gradients (gradient_clip_val)"
                )

    def on_before_backward(
        self, trainer: "Trainer", pl_module: "LightningModule", loss: Tensor
    ) -> None:
        """Raises QatTricksError if the loss is not finite, and names the cause."""
        # A step with such a loss would spread NaN to all parameters. A look at the loss waits for
        # the GPU, so it is taken there only as often as values are logged.
        every = 1 if loss.device.type == "cpu" else max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if trainer.fit_loop.epoch_loop.batch_idx % every or bool(torch.isfinite(loss).all()):
            return
        first = first_not_finite(workbench_of(pl_module).network)
        if first is None and trainer.precision == "16-mixed":
            return  # an overflow, after which the loss scaler tries a smaller factor
        cause = (
            "all weights and scales are finite" if first is None else f"{first} is no finite number"
        )
        raise QatTricksError(
            f"the loss is {float(loss.detach())} in step {trainer.global_step}: {cause}; lower the "
            f"learning rate ({_rates(trainer)}), clip gradients (gradient_clip_val), or look for "
            "such numbers in the images; then resume from a checkpoint"
        )
