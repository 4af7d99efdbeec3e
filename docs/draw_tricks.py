"""Draws what each trick does to a weight or a range: the pictures of the page of tricks.

    python docs/draw_tricks.py FOLDER

Each picture comes from the package at work on a small network, which is trained here on
scikit-learn's digits within seconds. The function ``draw_NAME`` draws the trick ``NAME`` of
``conf/trick`` and returns the line below the picture, with the figures of this very run.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks import tricks
from qat_tricks.data.digits import digits
from qat_tricks.graph import activation_quantizers, layers, trace
from qat_tricks.numerics import ESTIMATORS, make_estimator
from qat_tricks.numerics.scheme import activation_scheme
from qat_tricks.numerics.sparsity import cubic_schedule
from qat_tricks.tricks.dampen_oscillations import Track

# Told apart by the colour-blind (Okabe and Ito 2008, "Color Universal Design").
BEFORE, AFTER, OTHER, MUTED = "#d55e00", "#0072b2", "#009e73", "#999999"
IMAGES = 128  # on which tricks work
SIZE = (8.0, 3.0)  # inches

Traced = fx.GraphModule


def _block(before: int, after: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


@cache
def data() -> tuple[Tensor, Tensor]:
    """Training images ``[N, 1, 8, 8]`` and their labels ``[N]``."""
    source = digits(image_size=8)
    source.setup()
    images, labels = zip(*source.calibration_loader(1024), strict=True)
    return torch.cat(images), torch.cat(labels)


@cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    body = [_block(1, 16, 1), _block(16, 24, 1), _block(24, 24, 2)]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Apart from each other, as gains of networks that were trained for long.
            nn.init.uniform_(module.weight, 0.2, 2.0)
    net.train()
    train(net, steps=80, lr=5e-3)
    return net.eval()


def float_network() -> Traced:
    """A copy of the float network, traced: three convs with BatchNorm and ReLU, and a linear."""
    return trace(copy.deepcopy(_trained()))


def quantized_network(**settings: Any) -> tuple[Traced, Traced]:
    """The network with ranges, folded and quantized, and the float one that it comes from."""
    network = float_network()
    tricks.fold_batchnorm(network)
    reference = copy.deepcopy(network)
    tricks.quantize(network, **settings)
    tricks.calibrate(network, images())
    return network.eval(), reference.eval()


def images() -> list[Tensor]:
    """The batches that tricks work on."""
    return [data()[0][:IMAGES]]


def train(
    network: nn.Module,
    *,
    steps: int,
    lr: float,
    after_step: Callable[[], Any] = lambda: None,
) -> None:
    """Trains in place, in the mode that the network is in, by Adam on batches of 64."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    inputs, labels = data()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        after_step()


def outputs_of(network: Traced, name: str) -> Tensor:
    """What the module ``name`` computes for the images, channels first: ``[C, values]``."""
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        network(images()[0])
    handle.remove()
    return seen[0].movedim(1, 0).flatten(1)


def logits(network: Traced) -> Tensor:
    """The output for the images, ``[N, 10]``."""
    with torch.no_grad():
        return network.eval()(images()[0])


def error_of_outputs(network: Traced, reference: Traced, name: str) -> float:
    """The mean squared error behind the ReLU of the layer ``name``, which its kernel computes."""
    expected = outputs_of(reference, name).relu()
    return float((outputs_of(network, name) - expected).square().mean())


def bars(
    axes: Axes, before: Any, after: Any, labels: tuple[str, str] = ("before", "after")
) -> None:
    """Two bars side by side for each channel or layer."""
    places = torch.arange(len(before)).numpy()
    axes.bar(places - 0.2, before, 0.4, color=BEFORE, label=labels[0])
    axes.bar(places + 0.2, after, 0.4, color=AFTER, label=labels[1])
    axes.legend()


def label(axes: Axes, x: str, y: str) -> None:
    """Names both axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def scatter_rounding(axes: Axes, network: Traced, reference: Traced, name: str) -> int:
    """Draws float weights against the integers they got; returns how many are not the nearest."""
    layer = network.get_submodule(name)
    scale = layer.weight_scale(layer.deployed_weight()).detach()
    steps = (reference.get_submodule(name).weight.detach() / scale).flatten()
    integers = (layer.effective_weight().detach() / scale).round().flatten()
    scheme = layer.weight_quantizer.scheme
    other = integers != steps.round().clamp(scheme.qmin, scheme.qmax)
    axes.scatter(steps[~other], integers[~other], s=5, color=MUTED, label="to the nearest")
    axes.scatter(steps[other], integers[other], s=7, color=AFTER, label="to another")
    axes.legend()
    label(axes, "float weight, in steps of the grid", "integer")
    return int(other.sum())


def draw_fold_batchnorm(figure: Figure) -> str:
    """The largest weight of each channel of the second conv."""
    network = float_network()
    first, before = logits(network), network.get_submodule("1.0").weight.detach().abs()
    tricks.fold_batchnorm(network)
    after = network.get_submodule("1.0").weight.detach().abs()
    axes = figure.subplots()
    bars(axes, before.amax((1, 2, 3)), after.amax((1, 2, 3)), ("conv", "conv with its BatchNorm"))
    label(axes, "output channel", "largest weight")
    change = float((logits(network) - first).abs().max())
    return (
        "Each channel of a conv is multiplied by its BatchNorm's factor. The logits, which go "
        f"up to {float(first.abs().max()):.0f}, change by at most {change:.0e}."
    )


def draw_equalize(figure: Figure) -> str:
    """The largest value of each channel between two layers."""
    network = float_network()
    tricks.fold_batchnorm(network)
    before = outputs_of(network, "1.2").amax(1)
    tricks.equalize(network, images())
    after = outputs_of(network, "1.2").amax(1)
    axes = figure.subplots()
    bars(axes, before, after)
    label(axes, "channel between the second and the third conv", "largest value")
    ratio = [float(values.amax() / values.median()) for values in (before, after)]
    return (
        "All channels share one grid, whose step the largest decides. The largest channel was "
        f"{ratio[0]:.1f} times the median one; now it is {ratio[1]:.1f} times."
    )


def draw_quantize(figure: Figure) -> str:
    """The weights of one channel, in float and on their grids."""
    both = figure.subplots(1, 2, sharey=True)
    shares = []
    for axes, bits in zip(both, (8, 3), strict=True):
        network, reference = quantized_network(weight_bits=bits, first_last_bits=None)
        weight = reference.get_submodule("1.0").weight[0].detach().flatten()
        on_grid = network.get_submodule("1.0").effective_weight()[0].detach().flatten()
        order = weight.argsort()
        axes.plot(weight[order], color=BEFORE, label="float")
        axes.plot(on_grid[order], color=AFTER, lw=1, drawstyle="steps-mid", label="on its grid")
        axes.set_title(f"{bits} bits")
        label(axes, "weights of one channel, sorted", "value")
        axes.legend()
        shares.append(float((on_grid - weight).norm() / weight.norm()))
    return (
        f"The error is {shares[0]:.1%} of the weights with 8 bits, and {shares[1]:.1%} with 3 bits."
    )


def draw_calibrate(figure: Figure) -> str:
    """The values of one activation, and the ends of the range that each estimator finds."""
    network = float_network()
    values = outputs_of(network, "1.2").flatten()
    axes = figure.subplots()
    axes.hist(values.numpy(), bins=100, color=MUTED, log=True)
    ends = {}
    for place, name in enumerate(ESTIMATORS):
        estimator = make_estimator(name)
        estimator.observe(values)
        ends[name] = estimator.range(activation_scheme(4))[1]
        axes.axvline(ends[name], color=f"C{place}", ls="--", label=f"{name}: {ends[name]:.2f}")
    axes.legend()
    label(axes, "value behind the second ReLU", "count")
    return (
        "Where each estimator ends the range of a 4-bit activation. What lies to the right of a "
        f"line is clipped; mse, the default, gives up {ends['minmax'] - ends['mse']:.2f} of "
        f"{ends['minmax']:.2f} for smaller steps."
    )


def draw_correct_weights(figure: Figure) -> str:
    """How far mean and spread of each channel's quantized weights are from the float ones."""
    network, reference = quantized_network(weight_bits=3, first_last_bits=None)

    def spread() -> Tensor:
        weight = network.get_submodule("1.0").effective_weight().detach().flatten(1)
        return weight.std(1) / reference.get_submodule("1.0").weight.detach().flatten(1).std(1)

    before = spread()
    tricks.correct_weights(network)
    after = spread()
    axes = figure.subplots()
    bars(axes, before - 1, after - 1)
    label(axes, "output channel, 3 bits", "change of the spread")
    off = [float((values - 1).abs().mean()) for values in (before, after)]
    return (
        "Rounding changes the spread of a channel's weights; this gives it back. It was off by "
        f"{off[0]:.1%} on average, and is by {off[1]:.1%}."
    )


def draw_correct_bias(figure: Figure) -> str:
    """The mean error of each logit."""
    network, reference = quantized_network(weight_bits=3, first_last_bits=None)

    def shift() -> Tensor:
        return _mean_logits(network) - _mean_logits(reference)

    before = shift()
    tricks.correct_bias(network, reference, images())
    after = shift()
    axes = figure.subplots()
    bars(axes, before, after)
    label(axes, "logit, weights of 3 bits", "mean error")
    off = [float(values.abs().mean()) for values in (before, after)]
    return (
        "Rounded weights shift what a channel computes on average; the bias takes the shift back. "
        f"The mean error of a logit was {off[0]:.3f}, and is {off[1]:.3f}."
    )


def _mean_logits(network: Traced) -> Tensor:
    return logits(network).mean(0)


def draw_gptq(figure: Figure) -> str:
    """The integer that each weight of the second conv is rounded to."""
    network, reference = quantized_network(weight_bits=4, first_last_bits=None)
    before = error_of_outputs(network, reference, "1.0")
    tricks.gptq(network, reference, images())
    moved = scatter_rounding(figure.subplots(), network, reference, "1.0")
    after = error_of_outputs(network, reference, "1.0")
    return _rounding_line(moved, network, before, after)


def draw_learned_rounding(figure: Figure) -> str:
    """The integer that each weight of the second conv is rounded to."""
    network, reference = quantized_network(weight_bits=4, first_last_bits=None)
    before = error_of_outputs(network, reference, "1.0")
    tricks.learned_rounding(network, reference, images(), iterations=60)
    moved = scatter_rounding(figure.subplots(), network, reference, "1.0")
    after = error_of_outputs(network, reference, "1.0")
    return _rounding_line(moved, network, before, after)


def _rounding_line(moved: int, network: Traced, before: float, after: float) -> str:
    total = network.get_submodule("1.0").weight.numel()
    return (
        f"{moved} of {total} weights are not rounded to the nearest integer of 4 bits. The squared "
        f"error behind the ReLU of this conv goes from {before:.2e} to {after:.2e}."
    )


def draw_learn_scales(figure: Figure) -> str:
    """The scale of one activation while the network trains."""
    network, _ = quantized_network(activation_bits=3, first_last_bits=None)
    tricks.learn_scales(network)
    quantizers = list(activation_quantizers(network).values())[1:4]
    history: list[list[float]] = [[] for _ in quantizers]

    def note() -> None:
        for values, quantizer in zip(history, quantizers, strict=True):
            values.append(float(quantizer.scale.detach()))

    network.train()
    train(network, steps=60, lr=1e-3, after_step=note)
    axes = figure.subplots()
    for place, values in enumerate(history):
        axes.plot([value / values[0] for value in values], label=f"behind ReLU {place + 1}")
    axes.legend()
    label(axes, "step", "scale over its first value")
    change = max(abs(values[-1] / values[0] - 1) for values in history)
    return (
        "The step of each grid is trained with the weights. In 60 steps, with activations of 3 "
        f"bits, one of these scales has moved by {change:.1%}."
    )


def draw_dampen_oscillations(figure: Figure) -> str:
    """The integers of one weight while the network trains."""
    paths, changes = {}, {}
    for name, threshold in (("free", None), ("frozen when it oscillates", 0.02)):
        network, _ = quantized_network(weight_bits=3, first_last_bits=None)
        layer, history = network.get_submodule("1.0"), []
        track = Track.of([layer])

        def note(layer=layer, history=history, track=track, threshold=threshold) -> None:
            if threshold is not None:
                track.follow([layer], threshold, 0.01)
            weight = layer.masked_weight().detach()
            history.append((weight / layer.weight_quantizer.current_scale(weight)).flatten())

        network.train()
        train(network, steps=120, lr=2e-3, after_step=note)
        paths[name] = torch.stack(history).round()
        changes[name] = int((paths[name][-30:].diff(dim=0) != 0).sum())
    worst = int((paths["free"].diff(dim=0) != 0).sum(0).argmax())
    axes = figure.subplots()
    for (name, path), colour in zip(paths.items(), (BEFORE, AFTER), strict=True):
        axes.step(range(len(path)), path[:, worst], color=colour, label=name)
    axes.legend()
    label(axes, "step", "integer of one weight")
    free, frozen = changes.values()
    return (
        "A weight between two integers goes to and fro. In the last 30 of 120 steps the integers "
        f"of this conv change {free} times; with those frozen that oscillate, {frozen} times."
    )


def draw_distill(figure: Figure) -> str:
    """What pulls at the logits of one image: the label alone, and the float network."""
    network, reference = quantized_network(weight_bits=2, activation_bits=3, first_last_bits=None)
    student, teacher = logits(network), logits(reference)
    # An image that the float network finds hard tells more than its label.
    image = int(teacher.softmax(1).amax(1).argmin())
    student, teacher = student[image : image + 1].requires_grad_(), teacher[image : image + 1]
    wanted = data()[1][image : image + 1]
    (by_label,) = torch.autograd.grad(F.cross_entropy(student, wanted), student)
    (by_teacher,) = torch.autograd.grad(tricks.distill(student, teacher), student)
    axes = figure.subplots()
    bars(axes, -by_label[0], -by_teacher[0], ("by the label", "by the float network"))
    axes.set_xticks(range(10))
    label(axes, f"class (the label is {int(wanted)})", "pull at the logit")
    sure = float(teacher.softmax(1).amax())
    pulls = [float(pull.abs().max()) for pull in (by_label, by_teacher)]
    return (
        f"Of this image the float network itself is only {sure:.0%} sure. The label pulls at a "
        f"logit with up to {pulls[0]:.2f}, the float network, which knows better, {pulls[1]:.2f}."
    )


def draw_prune(figure: Figure) -> str:
    """The weights of one conv before and after, and the schedule that leads there."""
    network = float_network()
    tricks.fold_batchnorm(network)
    before = network.get_submodule("1.0").weight.detach().flatten().clone()
    reached = tricks.prune(network, 0.5)
    after = network.get_submodule("1.0").masked_weight().detach().flatten()
    left, right = figure.subplots(1, 2)
    edges = torch.linspace(float(before.min()), float(before.max()), 60).numpy()
    left.hist(before.numpy(), bins=edges, color=BEFORE, label="before")
    left.hist(after[after != 0].numpy(), bins=edges, color=AFTER, label="what stays")
    left.legend()
    label(left, "weight of the second conv", "count")
    times = torch.linspace(0, 1, 101).tolist()
    shares = [cubic_schedule(t, initial=0.0, final=0.5, start=0.0, end=0.6) for t in times]
    right.plot(times, shares, color=AFTER)
    label(right, "part of the training", "share of zeros")
    return f"The smallest weights go, here {reached:.0%} of them, fast at first and then slowly."


def draw_prune_channels(figure: Figure) -> str:
    """The channels of each conv."""
    network = float_network()
    entry = tricks.prune_channels(network, images(), share=0.5, multiple=4)
    before, after = zip(*(group["channels"] for group in entry["groups"]), strict=True)
    axes = figure.subplots()
    bars(axes, before, after)
    axes.set_xticks(range(len(before)), [f"conv {group['name']}" for group in entry["groups"]])
    label(axes, "", "output channels")
    share = entry["macs"][1] / entry["macs"][0]
    return f"Layers get narrower, until {share:.0%} of the multiplications are left."


def draw_mixed_precision(figure: Figure) -> str:
    """The bits that each layer's weights get."""
    network, _ = quantized_network(first_last_bits=None)
    chosen = tricks.mixed_precision(network, images(), share=0.4)
    parts = chosen["parts"]
    axes = figure.subplots()
    axes.bar(range(len(parts)), [part["bits"] for part in parts], color=AFTER)
    axes.axhline(8, color=BEFORE, ls="--", label="before")
    sizes = {name: layer.weight.numel() for name, layer in layers(network).items()}
    names = [f"{part['name']}\n{sizes[part['name']]} weights" for part in parts]
    axes.set_xticks(range(len(parts)), names)
    axes.legend(loc="lower right")
    label(axes, "", "bits of the weights")
    return (
        f"Each layer gets bits of its own. The weights take {chosen['reached']:.0%} of the size "
        "that they have with 8 bits everywhere."
    )


def draw_tune_ranges(figure: Figure) -> str:
    """The end of the range of each activation."""
    network, _ = quantized_network(activation_bits=4, first_last_bits=None)
    tricks.calibrate(network, images(), estimator="minmax")
    quantizers = activation_quantizers(network)
    before = [quantizer.range[1] for quantizer in quantizers.values()]
    tricks.tune_ranges(network, images())
    after = [quantizer.range[1] for quantizer in quantizers.values()]
    axes = figure.subplots()
    bars(axes, before, after, ("minmax", "tuned by the logits"))
    label(axes, "activation, 4 bits", "largest value")
    share = max(1 - b / a for a, b in zip(before, after, strict=True))
    return (
        "Ranges end where the logits change least. One of these activations is clipped "
        f"{share:.0%} below its largest value."
    )


def draw_freeze_batchnorm(figure: Figure) -> str:
    """The running means of the first BatchNorm while the network trains."""
    network, history = float_network(), []
    norm = network.get_submodule("0.1")

    def note() -> None:
        history.append(norm.running_mean.clone())

    network.train()
    train(network, steps=40, lr=5e-3, after_step=note)
    tricks.freeze_batchnorm(network)
    train(network, steps=40, lr=5e-3, after_step=note)
    means = torch.stack(history)
    axes = figure.subplots()
    axes.plot(means[:, :4] - means[0, :4])
    axes.axvline(40, color=MUTED, ls="--", label="frozen from here on")
    axes.legend()
    label(axes, "step", "change of a running mean")
    moved = [float(part.diff(dim=0).abs().max()) for part in (means[:40], means[40:])]
    return (
        "In the last part of the training the statistics hold still. Here a step moves a mean by "
        f"up to {moved[0]:.3f} before, and by {moved[1]:.3f} afterwards."
    )


def draw_reestimate_batchnorm(figure: Figure) -> str:
    """The running means of the last BatchNorm against the means of what it gets."""
    network = float_network()
    tricks.quantize(network, weight_bits=2, first_last_bits=None)
    tricks.calibrate(network, images())
    norm = layers(network)["2.0"].batchnorm
    before = norm.running_mean.clone()
    tricks.reestimate_batchnorm(network, images())
    axes = figure.subplots()
    bars(axes, before, norm.running_mean, ("of the float network", "with the quantizers on"))
    label(axes, "channel of the third conv, weights of 2 bits", "running mean")
    change = float((norm.running_mean - before).norm() / before.norm())
    return (
        "Quantized layers before a BatchNorm give it other values than those that its statistics "
        f"are of. The means change by {change:.0%}."
    )


def draw_restore_batchnorm(figure: Figure) -> str:
    """The largest weight of each channel: the user's, folded, and restored."""
    network = float_network()
    name = "1.0"

    def largest() -> Tensor:
        return network.get_submodule(name).weight.detach().abs().amax((1, 2, 3))

    own = largest()
    tricks.fold_batchnorm(network)
    tricks.equalize(network, images())
    folded = largest()
    tricks.quantize(network)
    tricks.calibrate(network, images())
    tricks.restore_batchnorm(network, images())
    axes = figure.subplots()
    bars(axes, folded, largest(), ("folded and equalized", "restored"))
    axes.plot(own, "k_", ms=9, label="your network's")
    axes.legend()
    label(axes, "output channel of the second conv", "largest weight")
    off = float((largest() / own - 1).abs().max())
    return (
        "Folding and equalization change a weight's units. It is trained in those of your own "
        f"network, here to {off:.0e}, with a BatchNorm that follows the batches again."
    )


def drawings() -> dict[str, Callable[[Figure], str]]:
    """The functions of this file that draw a trick, by the trick's name."""
    return {
        name.removeprefix("draw_"): function
        for name, function in globals().items()
        if name.startswith("draw_")
    }


def write_pictures(folder: Path) -> dict[str, str]:
    """Writes ``NAME.png`` of each trick into ``folder`` and returns the lines below them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # these layers are too small to share
    lines = {}
    for name, draw in drawings().items():
        figure = Figure(figsize=SIZE, layout="constrained")
        # Without pyplot, which would keep the figure and may need a display.
        FigureCanvasAgg(figure)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines[name] = draw(figure)
        figure.savefig(folder / f"{name}.png", dpi=110)
    return lines


if __name__ == "__main__":
    for trick, line in write_pictures(Path(sys.argv[1])).items():
        print(f"{trick}: {line}")
