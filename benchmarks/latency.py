# python benchmarks/latency.py --calibration PATH/imagenet_calib1000 --out docs/results/latency.md
"""ONNX Runtime's latency of our int8 files against that of ``quantize_static``, ONNX Runtime's own
quantizer, interleaved.

Both quantize the same float network (random weights: no value changes how long an integer kernel
takes), unsigned 8-bit activations and signed 8-bit weights per channel, and run in the same session
options.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import qat_tricks
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.models.build import build_model

NETWORKS = ("resnet50", "mobilenet_v2")
BATCHES = (1, 16)
BAR = 1.02


class Reader(CalibrationDataReader):
    """Hands ``batches`` to ONNX Runtime's calibration."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.left: Iterator[dict[str, np.ndarray]] = iter(
            [{"images": batch.numpy()} for batch in batches]
        )

    def get_next(self) -> Any:
        return next(self.left, None)


def files(name: str, batches: list[Tensor], folder: Path) -> dict[str, Path]:
    """The float file of a network, and both int8 ones."""
    torch.manual_seed(0)
    net = build_model(name, num_classes=1000).eval()
    paths = {kind: folder / f"{name}_{kind}.onnx" for kind in ("float", "ours", "quantize_static")}
    qat_tricks.export_onnx(net, paths["float"], batches[0])
    quantized = qat_tricks.quantize(net, batches)
    qat_tricks.export_onnx(quantized, paths["ours"], batches[0], min_top1_agreement=0.0)
    prepared = folder / f"{name}_prepared.onnx"
    quant_pre_process(str(paths["float"]), str(prepared))
    quantize_static(
        str(prepared),
        str(paths["quantize_static"]),
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each network and batch size"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transform = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    data = DataLoader(
        Subset(ImageFolder(str(args.calibration), transform), range(0, 1000, 32)), batch_size=16
    )
    batches = [images for images, _ in data]
    lines = [
        "# Latency against ONNX Runtime's own quantizer",
        "",
        f"`python benchmarks/latency.py --threads {args.threads} --seconds {args.seconds:g}`, ONNX "
        f"Runtime {onnxruntime.__version__}, 224 px; median milliseconds a batch, the files run in "
        "turn.",
        "",
        "| network | batch | float | quantize_static | ours | ours / quantize_static | bar |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            paths = files(name, batches, Path(folder))
            for batch in BATCHES:
                found = measure_latency(
                    paths,
                    image_shape=(3, 224, 224),
                    batch_size=batch,
                    threads=args.threads,
                    runs=1000,
                    max_seconds=args.seconds,
                )
                plain, peer, ours = (
                    found[kind]["p50"] for kind in ("float", "quantize_static", "ours")
                )
                ratio = ours / peer
                met = "met" if ratio <= BAR else "**not met**"
                lines.append(
                    f"| {name} | {batch} | {plain:.2f} | {peer:.2f} | {ours:.2f} | {ratio:.3f} | "
                    f"{BAR}: {met} |"
                )
                print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
