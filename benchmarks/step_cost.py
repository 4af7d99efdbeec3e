# python benchmarks/step_cost.py --out docs/results/step_cost.md
"""The cost of a QAT step: one training step of ``int8_qat``'s network against one of the untouched
float network; one of the folded network, without ``restore_batchnorm``; and one of
``int8_prune50``, with its masks and its teacher. And the bytes that autograd keeps.

All run in one process, interleaved step by step, so that a machine that speeds up or slows down
does so for all.
"""

import argparse
import copy
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from common import Report, argument_parser, command
from peer_step_cost import ENVIRONMENTS
from torch import Tensor, nn
from torch.nn import functional as F
from training_steps import PRECISIONS, Contender, Loss, StepCost, random_batch
from training_steps import measure as measure_steps

from qat_tricks.graph.features import TracedTeacher
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe
from qat_tricks.tricks.distill import distill

MODELS = ("mobilenet_v2", "resnet18")
RESTORE = "~stages.qat.tricks.restore_batchnorm"
KINDS = ("float", "int8_qat", "int8_qat, folded", "int8_prune50, with teacher")


def quantized(
    net: nn.Module, images: Tensor, *overrides: str, recipe: str = "int8_qat"
) -> nn.Module:
    """The network as the training stage of a recipe trains it."""
    work = Workbench(copy.deepcopy(net).eval(), lambda count: [images])
    work.trains = True
    for stage in load_recipe(recipe, overrides).stages:
        stage.apply(work)
    return work.network.train()


def with_teacher(teacher: TracedTeacher) -> Loss:
    """The loss of a step of which a teacher has half, as in ``int8_prune50``."""

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        expected, _ = teacher(images)
        return F.cross_entropy(logits, labels) / 2 + distill(logits, expected) / 2

    return loss


def measure(name: str, args: argparse.Namespace) -> list[StepCost]:
    """Measures the float network, the QAT network, the folded one, and the pruned one."""
    torch._dynamo.reset()
    images, labels = random_batch(args.batch, args.size, args.device)
    plain = getattr(torchvision.models, name)().to(args.device).train()
    pruned = quantized(plain, images, recipe="int8_prune50")
    teacher = TracedTeacher(copy.deepcopy(plain), pruned)
    networks = (plain, quantized(plain, images), quantized(plain, images, RESTORE))
    contenders = [Contender(net, args.precision, args.compile) for net in networks]
    contenders.append(Contender(pruned, args.precision, args.compile, with_teacher(teacher)))
    return measure_steps(contenders, images, labels, args.warmup, args.steps)


def measure_peer(peer: str, name: str, args: argparse.Namespace) -> list[StepCost]:
    """The float network and the peer's, in the peer's own environment."""
    python = args.environments / ENVIRONMENTS[peer] / "bin" / "python"
    script = Path(__file__).with_name("peer_step_cost.py")
    numbers = [
        f"--{option}={getattr(args, option)}"
        for option in ("batch", "size", "threads", "steps", "warmup")
    ]
    run = subprocess.run(
        [python, script, f"--peer={peer}", f"--model={name}", *numbers],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"{peer} on {name} failed:\n{run.stderr}")
    return [StepCost(**cost) for cost in json.loads(run.stdout.splitlines()[-1])]


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
    parser.add_argument(
        "--environments", type=Path, help="made by accuracy/make_environments.py: peers beside"
    )
    args = parser.parse_args()
    if args.environments and (args.compile or args.device == "cuda"):
        parser.error("peers are measured eagerly, in float32, on the CPU")
    torch.set_num_threads(args.threads)
    processor = platform.processor() or platform.machine()
    if args.device == "cuda":
        processor = torch.cuda.get_device_name()
    how = "compiled" if args.compile else "eager"
    report = Report(
        "Cost of a QAT step",
        [
            command(args, "batch", "size", "threads", "steps", "device", "precision")
            + (" (with --compile)" if args.compile else "")
            + (" (with --environments)" if args.environments else ""),
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
        costs = measure(name, args)
        for kind, cost in zip(KINDS, costs, strict=True):
            report.add(name, kind, *cost.cells(costs[0]))
        for peer in ENVIRONMENTS if args.environments else ():
            plain, cost = measure_peer(peer, name, args)
            report.add(name, peer, *cost.cells(plain))


if __name__ == "__main__":
    main()
