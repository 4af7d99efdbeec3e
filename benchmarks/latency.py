# python benchmarks/latency.py --calibration PATH/imagenet_calib1000 --out docs/results/latency.md
"""ONNX Runtime's latency of our int8 files against that of ``quantize_static``, ONNX Runtime's own
quantizer, interleaved.

Both quantize the same float network (random weights: no value changes how long an integer kernel
takes), unsigned 8-bit activations and signed 8-bit weights per channel, and run in the same session
options.
"""

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
from torch import Tensor

import qat_tricks
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.models.build import build_model

NETWORKS = ("resnet50", "mobilenet_v2")
BATCHES = (1, 16)
BAR = 1.02


class Reader(CalibrationDataReader):
    """Hands images to ONNX Runtime's calibration."""

    def __init__(self, calibration: list[Tensor]) -> None:
        feeds = [{"images": images.numpy()} for images in calibration]
        self.left: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def get_next(self) -> Any:
        return next(self.left, None)


def files(name: str, calibration: list[Tensor], folder: Path) -> dict[str, Path]:
    """The float file of a network, and both int8 ones."""
    torch.manual_seed(0)
    net = build_model(name, num_classes=1000).eval()
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


def main() -> None:
    parser = argument_parser(__doc__, threads=2)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each network and batch size"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = image_folder(args.calibration)
    calibration = [batch for batch, _ in batches(images, 16, range(0, 1000, 32))]
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
            "ours / quantize_static:",
            "bar",
        ),
        args.out,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            paths = files(name, calibration, Path(folder))
            for batch_size in BATCHES:
                latency = measure_latency(
                    paths,
                    image_shape=(3, 224, 224),
                    batch_size=batch_size,
                    threads=args.threads,
                    runs=1000,
                    max_seconds=args.seconds,
                )
                medians = [latency[kind]["p50"] for kind in ("float", "quantize_static", "ours")]
                ratio = medians[2] / medians[1]
                met = "met" if ratio <= BAR else "**not met**"
                milliseconds = [f"{median:.2f}" for median in medians]
                report.add(name, batch_size, *milliseconds, f"{ratio:.3f}", f"{BAR}: {met}")


if __name__ == "__main__":
    main()
