# python benchmarks/sparsity.py --out docs/results/sparsity.md
"""What zeros among the weights of an int8 file bring: its size, plain and compressed, and its
latency in ONNX Runtime, in OpenVINO, and in OpenVINO with its sparse weights, interleaved.

Weights are random, and the smallest of each layer are zero: where the zeros are does not change how
long a kernel takes. Needs ``pip install openvino``.
"""

import argparse
import copy
import platform
import statistics
import tempfile
from pathlib import Path

import onnxruntime
import openvino
import torch
import torchvision
from common import Report, argument_parser, command
from torch import nn
from torch.nn.utils import prune

import qat_tricks
from qat_tricks.deploy.cost.latency import time_in_turn
from qat_tricks.deploy.cost.weights import compressed_bytes
from qat_tricks.deploy.runtimes.openvino import OpenvinoNetwork
from qat_tricks.deploy.runtimes.registry import open_network

NETWORKS = ("resnet50", "vgg16")  # the second has 124 of its 138 million weights in linears
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
# A layer's weights are stored sparse from this share of zeros on, where OpenVINO can.
SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.2}


def files(name: str, folder: Path) -> dict[float, Path]:
    """The int8 file of a network at each sparsity."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)().eval()
    images = torch.randn(4, 3, 224, 224)
    paths = {}
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(net)
        for module in pruned.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and sparsity > 0:
                prune.l1_unstructured(module, "weight", sparsity)
                prune.remove(module, "weight")
        # Placing and calibrating is enough here; the other tricks move weights, zeros excepted.
        without = [
            f"~stages.ptq.tricks.{trick}"
            for trick in ("equalize", "correct_weights", "correct_bias")
        ]
        quantized = qat_tricks.quantize(pruned, [images], overrides=["prove=false", *without])
        paths[sparsity] = folder / f"{name}_{sparsity}.onnx"
        qat_tricks.export_onnx(quantized, paths[sparsity], images, min_top1_agreement=0.0)
    return paths


def main() -> None:
    parser = argument_parser(__doc__, threads=1)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    args: argparse.Namespace = parser.parse_args()
    report = Report(
        "What sparsity brings at inference",
        [
            f"{command(args, 'threads', 'rounds')} on {platform.machine()}, ONNX Runtime "
            f"{onnxruntime.__version__}, OpenVINO {openvino.__version__.split('-')[0]}, 224 px; "
            "times are median milliseconds a batch, and in brackets to the dense file.",
        ],
        (
            "network",
            "batch:",
            "zeros:",
            "file MB:",
            "compressed MB (zstd):",
            "ONNX Runtime:",
            "OpenVINO:",
            "OpenVINO, sparse weights:",
        ),
        args.out,
    )
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            paths = files(name, Path(folder))
            for size in (1, 16):
                add_rows(report, name, paths, size, args)


def add_rows(
    report: Report, name: str, paths: dict[float, Path], size: int, args: argparse.Namespace
) -> None:
    """Adds the rows of one network and batch size."""
    kinds = {
        "ort": lambda path: open_network(path, threads=args.threads),
        "ov": lambda path: OpenvinoNetwork(path, threads=args.threads),
        "sparse": lambda path: OpenvinoNetwork(path, threads=args.threads, settings=SPARSE),
    }
    networks = {f"{k} {s}": make(path) for s, path in paths.items() for k, make in kinds.items()}
    spent = time_in_turn(networks, (3, 224, 224), size, 2, args.rounds, float("inf"), seed=0)
    times = {key: statistics.median(runs) for key, runs in spent.items()}
    for sparsity, path in paths.items():
        cells = [
            f"{times[f'{k} {sparsity}']:.1f} ({times[f'{k} {sparsity}'] / times[f'{k} 0.0']:.2f})"
            for k in kinds
        ]
        sizes = [f"{count / 1e6:.1f}" for count in (path.stat().st_size, compressed_bytes(path))]
        report.add(name, size, f"{sparsity:.0%}", *sizes, *cells)


if __name__ == "__main__":
    main()
