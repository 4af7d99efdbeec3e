# python benchmarks/step_cost.py --out docs/results/step_cost.md
"""The cost of a QAT step: one training step of ``int8_qat``'s network against one of the untouched
float network.

Both run in one process, interleaved step by step, eager, so that a machine that speeds up or slows
down does so for both.
"""

import copy
import platform
import statistics
import time

import torch
import torchvision
from common import Report, argument_parser, command
from torch import nn
from torch.nn import functional as F

from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe

BARS = {"mobilenet_v2": 1.3, "resnet18": 1.4}


def quantized(net: nn.Module, images: torch.Tensor) -> nn.Module:
    """The network as the training stage of ``int8_qat`` trains it, by its defaults."""
    recipe = load_recipe("int8_qat")
    work = Workbench(copy.deepcopy(net).eval(), lambda count: [images])
    for stage in recipe.stages:
        assert not any(trick.needs_teacher for trick in stage.tricks), (
            "a teacher's forward pass would belong to the step"
        )
        stage.apply(work)
    return work.network.train()


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> float:
    """Runs one training step and returns its seconds."""
    started = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - started


def measure(
    name: str, *, batch: int, size: int, steps: int, warmup: int
) -> tuple[float, float, float, float]:
    """Returns median seconds of a float and of a QAT step, their ratio's median and its middle
    half's width.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    plain = getattr(torchvision.models, name)().train()
    contenders = [plain, quantized(plain, images)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9) for net in contenders]
    seconds: list[list[float]] = [[], []]
    for i in range(warmup + steps):
        for times, net, optimizer in zip(seconds, contenders, optimizers, strict=True):
            taken = step(net, optimizer, images, labels)
            if i >= warmup:
                times.append(taken)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    quarter = len(ratios) // 4
    spread = ratios[-1 - quarter] - ratios[quarter]
    return (
        statistics.median(seconds[0]),
        statistics.median(seconds[1]),
        statistics.median(ratios),
        spread,
    )


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--models", nargs="+", default=list(BARS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = platform.processor() or platform.machine()
    report = Report(
        "Cost of a QAT step",
        [
            command(args, "batch", "size", "threads", "steps"),
            f"on {processor}, torch {torch.__version__}, eager, float32.",
        ],
        (
            "network",
            "float step ms",
            "QAT step ms",
            "ratio (median of pairs)",
            "middle half of the ratios",
            "bar",
        ),
        args.out,
    )
    for name in args.models:
        plain, qat, ratio, spread = measure(
            name, batch=args.batch, size=args.size, steps=args.steps, warmup=args.warmup
        )
        report.add(
            name,
            f"{plain * 1e3:.0f}",
            f"{qat * 1e3:.0f}",
            f"**{ratio:.2f}**",
            f"{spread:.2f} wide",
            BARS.get(name, ""),
        )


if __name__ == "__main__":
    main()
