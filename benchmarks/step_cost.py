# python benchmarks/step_cost.py --out docs/results/step_cost.md
"""The cost of a QAT step: one training step of ``int8_qat``'s network against one of the untouched
float network; one of the folded network, without ``restore_batchnorm``; and one of
``int8_prune50``, with its masks and its teacher. And the bytes that autograd keeps.

All run in one process, interleaved step by step, so that a machine that speeds up or slows down
does so for all.
"""

import argparse
import copy
import platform
import statistics
import time

import torch
import torchvision
from common import Report, argument_parser, command
from torch import nn
from torch.nn import functional as F

from qat_tricks.graph.features import TracedTeacher
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.tricks.distill import distill

MODELS = ("mobilenet_v2", "resnet18")
PRECISIONS = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


RESTORE = "~stages.qat.tricks.restore_batchnorm"


def quantized(
    net: nn.Module, images: torch.Tensor, *overrides: str, recipe: str = "int8_qat"
) -> nn.Module:
    """The network as the training stage of a recipe trains it."""
    work = Workbench(copy.deepcopy(net).eval(), lambda count: [images])
    work.trains = True
    for stage in load_recipe(recipe, overrides).stages:
        stage.apply(work)
    return work.network.train()


class Contender:
    """A network, its optimizer, and the seconds of its training steps."""

    def __init__(
        self, net: nn.Module, precision: str, compiled: bool, teacher: TracedTeacher | None = None
    ) -> None:
        self.teacher = teacher
        self.own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        self.net = torch.compile(net) if compiled else net
        self.precision = precision
        self.scaler = torch.amp.GradScaler(enabled=precision == "16-mixed")
        self.seconds: list[float] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Runs one training step, as Lightning does in this precision."""
        device = images.device.type
        _wait(device)
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            device, PRECISIONS[self.precision], enabled=self.precision != "32-true"
        ):
            loss = self.loss(images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        _wait(device)
        self.seconds.append(time.perf_counter() - started)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a step; a teacher has half of it, as in ``int8_prune50``."""
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        if self.teacher is None:
            return loss
        expected, _ = self.teacher(images)
        return loss / 2 + distill(logits, expected) / 2

    def kept_bytes(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """The bytes that autograd keeps for the backward, without parameters and buffers."""
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss(images, labels)
        loss.backward()
        return sum(kept.values())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(name: str, args: argparse.Namespace) -> list[tuple[float, float, float, float]]:
    """Measures the float network, the QAT network, the folded one, and the pruned one.

    Returns:
        For each: the median seconds of a step; the median of their ratio to the float step in the
        same round; the width of the ratios' middle half; and the MiB that autograd keeps.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch,), device=args.device)
    plain = getattr(torchvision.models, name)().to(args.device).train()
    pruned = quantized(plain, images, recipe="int8_prune50")
    teacher = TracedTeacher(copy.deepcopy(plain), pruned)
    networks = (plain, quantized(plain, images), quantized(plain, images, RESTORE))
    contenders = [Contender(net, args.precision, args.compile) for net in networks]
    contenders.append(Contender(pruned, args.precision, args.compile, teacher))
    for _ in range(args.warmup + args.steps):
        for contender in contenders:
            contender.step(images, labels)
    seconds = [contender.seconds[args.warmup :] for contender in contenders]
    figures = []
    for own, contender in zip(seconds, contenders, strict=True):
        ratios = sorted(b / a for a, b in zip(seconds[0], own, strict=True))
        quarter = len(ratios) // 4
        spread = ratios[-1 - quarter] - ratios[quarter]
        kept = contender.kept_bytes(images, labels) / 2**20
        figures.append((statistics.median(own), statistics.median(ratios), spread, kept))
    return figures


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="32-true")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = platform.processor() or platform.machine()
    if args.device == "cuda":
        processor = torch.cuda.get_device_name()
    how = "compiled" if args.compile else "eager"
    report = Report(
        "Cost of a QAT step",
        [
            command(args, "batch", "size", "threads", "steps", "device", "precision")
            + (" (with --compile)" if args.compile else ""),
            f"on {processor}, torch {torch.__version__}, {how}, {args.precision}.",
        ],
        (
            "network",
            "step",
            "ms",
            "to float (median of pairs)",
            "middle half of the ratios",
            "MiB kept",
            "to float",
        ),
        args.out,
    )
    for name in args.models:
        kinds = ("float", "int8_qat", "int8_qat, folded", "int8_prune50, with teacher")
        figures = measure(name, args)
        for kind, (seconds, ratio, spread, kept) in zip(kinds, figures, strict=True):
            report.add(
                name,
                kind,
                f"{seconds * 1e3:.1f}",
                f"**{ratio:.2f}**",
                f"{spread:.2f} wide",
                f"{kept:.0f}",
                f"{kept / figures[0][3]:.2f}",
            )


if __name__ == "__main__":
    main()
