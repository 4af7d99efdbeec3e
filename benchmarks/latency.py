# python benchmarks/latency.py --calibration PATH/imagenet_calib1000 --out docs/results/latency.md
"""ONNX Runtime's latency of our int8 files against float and against ``quantize_static``, ONNX
Runtime's own quantizer, interleaved.

Both quantize the same float network, unsigned 8-bit activations and signed 8-bit weights per
channel, and run in the same session options. Weights are random: their values do not change how
long an integer kernel takes. Ranges do, where they decide whether a Hardsigmoid only clips
integers; so BatchNorms get the statistics of the images, and gains and biases as training leaves
them (gains 0.5 to 1.5, biases of standard deviation 0.5). Networks of timm are named as ``model=``
names them, ``timm/NAME``.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import Report, argument_parser, command
from images import batches, image_folder
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import qat_tricks
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.models.build import build_model

NETWORKS = (
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "timm/mobilenetv4_conv_small",
    "timm/efficientnet_lite0",
)
LEAST_GAIN = {1: 1.2, 16: 1.5}  # float / int8, by batch size
MOST_RATIO = 1.03  # ours / quantize_static, with 0.03 for noise


class Reader(CalibrationDataReader):
    """Hands images to ONNX Runtime's calibration."""

    def __init__(self, calibration: list[Tensor]) -> None:
        feeds = [{"images": images.numpy()} for images in calibration]
        self.left: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def get_next(self) -> Any:
        return next(self.left, None)


@torch.no_grad()
def with_statistics(net: nn.Module, calibration: list[Tensor]) -> nn.Module:
    """The network in evaluation mode, with BatchNorms as training might leave them."""
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # the plain average over all batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    for images in calibration[:4]:
        net(images)
    return net.eval()


def files(name: str, calibration: list[Tensor], folder: Path) -> dict[str, Path]:
    """The float file of a network, and both int8 ones."""
    torch.manual_seed(0)
    net = with_statistics(build_model(name, num_classes=1000), calibration)
    name = name.replace("/", "_")
    paths = {kind: folder / f"{name}_{kind}.onnx" for kind in ("float", "ours", "quantize_static")}
    qat_tricks.export_onnx(net, paths["float"], calibration[0])
    quantized = qat_tricks.quantize(net, calibration)
    qat_tricks.export_onnx(quantized, paths["ours"], calibration[0], min_top1_agreement=0.0)
    prepared = folder / f"{name}_prepared.onnx"
    quant_pre_process(str(paths["float"]), str(prepared))
    quantize_static(
        str(prepared),
        str(paths["quantize_static"]),
        Reader(calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return paths


def latency_parser(description: str | None, networks: tuple[str, ...]) -> argparse.ArgumentParser:
    """A parser for the timing of several files of each network."""
    parser = argument_parser(description, threads=1)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(networks))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each network and batch size"
    )
    return parser


def calibration_images(args: argparse.Namespace) -> list[Tensor]:
    """Batches of 16; PyTorch computes with the threads asked for from here on."""
    torch.set_num_threads(args.threads)
    images = image_folder(args.calibration)
    return [batch for batch, _ in batches(images, 16, range(0, 1000, 32))]


def main() -> None:
    args = latency_parser(__doc__, NETWORKS).parse_args()
    calibration = calibration_images(args)
    report = Report(
        "Latency against ONNX Runtime's own quantizer",
        [
            f"{command(args, 'threads', 'seconds')}, ONNX Runtime {onnxruntime.__version__}, 224 "
            "px; median milliseconds a batch, the files run in turn."
        ],
        (
            "network",
            "batch:",
            "float:",
            "quantize_static:",
            "ours:",
            "float / ours:",
            "bar:",
            "ours / quantize_static:",
            "bar:",
        ),
        args.out,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            paths = files(name, calibration, Path(folder))
            for batch_size in LEAST_GAIN:
                latency = measure_latency(
                    paths,
                    image_shape=(3, 224, 224),
                    batch_size=batch_size,
                    threads=args.threads,
                    runs=1000,
                    max_seconds=args.seconds,
                )
                medians = [latency[kind]["p50"] for kind in ("float", "quantize_static", "ours")]
                milliseconds = [f"{median:.2f}" for median in medians]
                gain, ratio, least = (
                    medians[0] / medians[2],
                    medians[2] / medians[1],
                    LEAST_GAIN[batch_size],
                )
                report.add(
                    name,
                    batch_size,
                    *milliseconds,
                    f"{gain:.2f}",
                    verdict(gain >= least, least),
                    f"{ratio:.3f}",
                    verdict(ratio <= MOST_RATIO, MOST_RATIO),
                )


def verdict(is_met: bool, bar: float) -> str:
    """A bar, and whether it is met."""
    return f"{bar}: {'met' if is_met else '**not met**'}"


if __name__ == "__main__":
    main()
