# python benchmarks/proof_cost.py --networks mobilenet_v2 resnet18 --out docs/results/proof_cost.md
"""What it costs that each trick proves itself, in passes of the float network.

The networks are torchvision's, with random weights and images: only time is measured. A pass takes
all calibration images through the float network; it is timed before and after, in the same run.
"""

import argparse
import time
import warnings

import torch
import torchvision
from common import Report, argument_parser, command
from gate_cost import Watch
from torch import Tensor, nn

import qat_tricks
from qat_tricks.graph.proof import Prover
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.workbench import Workbench

# Whatever is done for a proof and not for the trick itself.
MEASURED = {Prover: ("begin", "measure", "_roll_back"), Workbench: ("_quantized",)}


def seconds_of_pass(net: nn.Module, images: list[Tensor]) -> float:
    """How long the float network takes for all images."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in images:
            net(batch)
    return time.perf_counter() - started


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--recipe", default="int8_ptq")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    watch = Watch(MEASURED)
    report = Report(
        "What proofs cost",
        [f"{command(args, 'recipe', 'images', 'threads')}, torch {torch.__version__}, 224 px."],
        ("network", "recipe:", "proofs:", "tricks judged:", "passes a trick:"),
        args.out,
    )
    for name in args.networks:
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(weights=None).eval()
        images = [torch.randn(32, 3, 224, 224) for _ in range(args.images // 32)]
        before = seconds_of_pass(net, images)
        watch.seconds, started = 0.0, time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights: what is rolled back tells nothing
            quantized = qat_tricks.quantize(net, images, args.recipe)
        total = time.perf_counter() - started
        one_pass = (before + seconds_of_pass(net, images)) / 2
        judged = len(spec_of(quantized)["proofs"])
        passes = watch.seconds / one_pass / judged
        report.add(name, f"{total:.1f} s", f"{watch.seconds:.1f} s", judged, f"{passes:.2f}")


if __name__ == "__main__":
    main()
