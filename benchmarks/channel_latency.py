# python benchmarks/channel_latency.py --calibration PATH --out docs/results/channel_latency.md
"""ONNX Runtime's latency of int8 files with a part of the MACs removed, channel by channel, against
the int8 file of the whole network and the float one, interleaved.

Weights are random, as in ``latency.py``: which channels go does not change how long a kernel takes,
how many of each layer does. The planner shares them out as it does for trained networks, by what
it measures; so a trained network's layers may come out wider or narrower than here.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import Report, command
from latency import calibration_images, latency_parser, verdict, with_statistics
from torch import Tensor

import qat_tricks
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.graph import trace
from qat_tricks.models.build import build_model
from qat_tricks.tricks import prune_channels

NETWORKS = ("resnet50", "mobilenet_v2")
MOST_RATIO = 0.6  # of the int8 file of the whole network


def files(
    name: str, calibration: list[Tensor], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Path], dict[str, float]]:
    """The files of a network by their kind, and the share of MACs of each."""
    choices: dict[str, dict[str, Any]] = {
        f"{args.share:g} of MACs, {scope}, multiples of {multiple}": {
            "share": args.share,
            "multiple": multiple,
            "scope": scope,
        }
        for scope in ("global", "layer")
        for multiple in args.multiples
    }
    choices[f"{args.latency_share:g} of latency"] = {
        "budget": "latency",
        "share": args.latency_share,
        "threads": args.threads,
    }
    torch.manual_seed(0)
    net = with_statistics(build_model(name, num_classes=1000), calibration)
    name = name.replace("/", "_")
    networks, left = {"float": net, "dense": net}, {"float": 1.0, "dense": 1.0}
    for kind, settings in choices.items():
        narrow = trace(copy.deepcopy(net))
        entry = prune_channels(narrow, calibration, refit=False, **settings)
        networks[kind], left[kind] = narrow, entry["macs"][1] / entry["macs"][0]
    paths = {}
    for kind, network in networks.items():
        paths[kind] = folder / f"{name}_{len(paths)}.onnx"
        if kind != "float":
            network = qat_tricks.quantize(network, calibration, overrides=["prove=false"])
        qat_tricks.export_onnx(network, paths[kind], calibration[0], min_top1_agreement=0.0)
    return paths, left


def main() -> None:
    parser = latency_parser(__doc__, NETWORKS)
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs that stays")
    parser.add_argument("--latency-share", type=float, default=0.6, help="of int8 dense")
    parser.add_argument("--multiples", type=int, nargs="+", default=[8, 16])
    args = parser.parse_args()
    calibration = calibration_images(args)
    report = Report(
        "Latency with channels removed",
        [
            f"{command(args, 'threads', 'share', 'latency_share', 'seconds')}, ONNX Runtime "
            f"{onnxruntime.__version__}, 224 px; median milliseconds a batch, files in turn."
        ],
        (
            "network",
            "what stays",
            "MACs left:",
            "batch:",
            "float:",
            "int8 dense:",
            "int8:",
            "int8 / int8 dense:",
            "bar:",
            "float / int8:",
        ),
        args.out,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            paths, left = files(name, calibration, args, Path(folder))
            for size in (1, 16):
                times = measure_latency(
                    paths,
                    image_shape=(3, 224, 224),
                    batch_size=size,
                    threads=args.threads,
                    runs=2000,
                    max_seconds=args.seconds,
                )
                plain, dense = times["float"]["p50"], times["dense"]["p50"]
                for kind in list(paths)[2:]:
                    narrow = times[kind]["p50"]
                    report.add(
                        name,
                        kind,
                        f"{left[kind]:.3f}",
                        size,
                        f"{plain:.2f}",
                        f"{dense:.2f}",
                        f"{narrow:.2f}",
                        f"**{narrow / dense:.2f}**",
                        verdict(narrow / dense <= MOST_RATIO, MOST_RATIO),
                        f"{plain / narrow:.2f}",
                    )


if __name__ == "__main__":
    main()
